/**
 * Brings the programs of servers onto the machine: those that are there, else Docker's images, else Debian's packages, else a
 * sentence that says what to do.
 *
 * @module
 */

/** Where downloads are kept, so that the second run is quick. */
export const CACHE: string = Deno.env.get("EFFECTONCE_CACHE") ??
  `${Deno.env.get("XDG_CACHE_HOME") ?? `${Deno.env.get("HOME") ?? "/tmp"}/.cache`}/effectonce`;

/** A program and its arguments. */
export type Command = readonly [program: string, ...args: string[]];

/** Where a server's programs come from. `Found` is what tells where they are. */
export interface Origin<Found> {
  /** For sentences. */
  readonly what: string;
  /** The variable with the URL of one that runs already. */
  readonly variable?: string;
  /** Debian's packages. */
  readonly packages: readonly string[];
  /** Docker's image. */
  readonly image?: string;
  /** Answers what is on the machine already. */
  readonly find: () => Promise<Found | undefined> | Found | undefined;
  /**
   * Brings it here, once it is clear that this is wanted, and that nobody else does so at the same time.
   *
   * @default installs the packages
   */
  readonly fetch?: () => Promise<void>;
  /**
   * Whether only root can bring it here, and use it then.
   *
   * @default {false}
   */
  readonly rootOnly?: boolean;
}

const text = new TextDecoder();

/** Runs a program to its end; answers its stdout. */
export async function run([program, ...args]: Command, env: Readonly<Record<string, string>> = {}): Promise<string> {
  const { success, stdout, stderr } = await new Deno.Command(program, { args, env, stdin: "null" }).output();
  if (success) return text.decode(stdout);
  throw new Error(
    `${program} ${args.join(" ").slice(0, 200)} failed: ${(text.decode(stderr) || text.decode(stdout)).trim().slice(-2000)}`,
  );
}

/** Where a program is: in one of the folders, or on PATH; undefined if nowhere. */
export function whereIs(name: string, ...folders: readonly string[]): string | undefined {
  for (const folder of [...folders, ...(Deno.env.get("PATH") ?? "").split(":")]) {
    try {
      if (Deno.statSync(`${folder}/${name}`).isFile) return `${folder}/${name}`;
    } catch {
      // Not there.
    }
  }
}

/** Whether there is a Docker that may be used. Its client alone says nothing: the daemon must answer. */
async function dockerAnswers(): Promise<boolean> {
  if (!whereIs("docker")) return false;
  try {
    const signal = AbortSignal.timeout(10_000);
    return (await new Deno.Command("docker", { args: ["info"], stdin: "null", signal }).output()).success;
  } catch {
    return false;
  }
}

/** Whether packages may be installed here: as root on Debian, which is a container or a CI machine, or where told to. */
function mayInstall(): boolean {
  const told = Deno.env.get("EFFECTONCE_INSTALL");
  if (told !== undefined) return told === "1";
  return Deno.uid() === 0 && whereIs("apt-get") !== undefined;
}

/**
 * Finds a server's programs, and installs them if need be and if that harms nobody.
 *
 * @returns what `find()` answers, or undefined where Docker has to run its image.
 * @throws {Error} If there is no way: with what a person can do.
 */
export async function bring<Found>(origin: Origin<Found>): Promise<Found | undefined> {
  const { what, variable, packages, image, find, fetch = () => install(packages), rootOnly = false } = origin;
  const possible = !rootOnly || Deno.uid() === 0;
  const there = await find();
  if (there !== undefined) return there;
  if (image !== undefined && await dockerAnswers()) return undefined;
  if (!possible || !mayInstall()) {
    const ways = [
      `install ${packages.join(" and ")}`,
      ...(image === undefined ? [] : ["start Docker"]),
      ...(variable === undefined ? [] : [`set ${variable} to the URL of one (compose.yaml starts all)`]),
      ...(possible ? ["set EFFECTONCE_INSTALL=1 to have it installed by apt-get"] : []),
    ];
    throw new Error(`${what} is missing: ${ways.join(", or ")}`);
  }
  return await exclusively("install", async () => {
    const meanwhile = await find();
    if (meanwhile !== undefined) return meanwhile;
    await fetch();
    const fetched = await find();
    if (fetched === undefined) throw new Error(`${what} is still not to be found after ${packages.join(" and ")} came`);
    return fetched;
  });
}

/** Does work while no other process of this user does work of that name. The lock goes with the process, however it ends. */
export async function exclusively<T>(name: string, work: () => Promise<T>): Promise<T> {
  await Deno.mkdir(CACHE, { recursive: true });
  using lock = await Deno.open(`${CACHE}/${name}.lock`, { create: true, write: true });
  await lock.lock(true);
  return await work();
}

/**
 * Debian's package manager, as it has to be called on somebody's machine.
 *
 * - A policy-rc.d that says no keeps packages from starting their services, and one line of configuration keeps PostgreSQL's
 *   from making a cluster. Both go again; those that an interrupted run left behind are known by the name in them.
 *   https://people.debian.org/~hmh/invokerc.d-policyrc.d-specification.txt
 * - Somebody else may be at it, such as unattended upgrades. `DPkg::Lock::Timeout` waits for dpkg's lock only: for those of the
 *   lists and of the archives apt-get is asked again.
 */
const INSTALL = `
set -eu
export DEBIAN_FRONTEND=noninteractive
policy=/usr/sbin/policy-rc.d
cluster=/etc/postgresql-common/createcluster.d/effectonce.conf
said=$(mktemp)
if [ -e "$policy" ] && ! grep -q effectonce "$policy"; then policy=; fi
trap 'rm -f "$cluster" "$said" $policy' EXIT
if [ -n "$policy" ]; then
  printf '#!/bin/sh\n# effectonce\nexit 101\n' >"$policy"
  chmod 755 "$policy"
fi
mkdir -p "$(dirname "$cluster")"
echo 'create_main_cluster = false' >"$cluster"
patiently() {
  tries=0
  until "$@" 2>"$said"; do
    tries=$((tries + 1))
    if [ "$tries" -gt 60 ] || ! grep -q 'Could not get lock' "$said"; then
      cat "$said" >&2
      return 1
    fi
    sleep 5
  done
}
patiently apt-get -qq -o DPkg::Lock::Timeout=300 update
patiently apt-get -qq -o DPkg::Lock::Timeout=300 -y --no-install-recommends install "$@"
`;

/** Installs Debian packages without starting what they bring. To be called by one at a time. */
export async function install(packages: readonly string[]): Promise<void> {
  const asRoot = Deno.uid() === 0 ? [] : ["sudo", "-n"];
  const [program, ...args] = [...asRoot, "sh", "-c", INSTALL, "sh", ...packages];
  await run([program!, ...args]);
}
