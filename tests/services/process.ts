/**
 * Keeps a server of this machine, or a container, under control: starts, stops and kills it, and sees to it that it does not
 * outlive who started it.
 *
 * @module
 */
import { type Command, run } from "./install.ts";

/** A server that runs. */
export interface Server {
  /** Where it is, with a user who may do everything. It stays the same over `start()`. */
  readonly url: string;
  /** Its version, as it says itself. */
  readonly version: string;
  /** The process; with Docker that of Docker's client. */
  readonly pid: number;
  /** Ends it in order. */
  stop(): Promise<void>;
  /** Kills it with all its sessions, as a power cut would. What it had not flushed yet is not lost, though: the system lives. */
  kill(): Promise<void>;
  /** Starts it again on its data and its port. */
  start(): Promise<void>;
  /** Ends it, and removes its data. */
  [Symbol.asyncDispose](): Promise<void>;
}

/** How a server is started. */
export interface Recipe {
  /** For sentences. */
  readonly name: string;
  readonly url: string;
  /** Answers the version once the server answers at all. */
  readonly probe: () => Promise<string>;
  /** For its data and its log; goes with it. */
  readonly folder: string;
  /** What is to be run once, before the first start. */
  readonly prepare: readonly Command[];
  /** The command line. */
  readonly command: Command;
  /** What ends it in order. */
  readonly stopSignal: Deno.Signal;
  /** What ends it quickly, now that its data are not needed any more. */
  readonly discardSignal: Deno.Signal;
  /** The name of the container that `command` makes, if it makes one. */
  readonly container?: string;
}

/** A port that nobody listens on at the moment. */
export function freePort(): number {
  const listener = listenAnywhere();
  listener.close();
  return listener.addr.port;
}

/** Listens on a port that nothing else listens on. */
export function listenAnywhere(): Deno.TcpListener {
  for (;;) {
    // Not one that the system chooses: those serve as the near end of connections too, so a server that is down for a moment
    // might find its port taken. https://www.kernel.org/doc/html/latest/networking/ip-sysctl.html (ip_local_port_range)
    const port = 10_240 + Math.floor(Math.random() * 20_000);
    try {
      return Deno.listen({ hostname: "127.0.0.1", port });
    } catch (error) {
      if (!(error instanceof Deno.errors.AddrInUse)) throw error;
    }
  }
}

/**
 * Reads process ids from who started it, an empty line for none, until they close the pipe or have died, of whatever. Then it
 * kills the last process if there is one, and removes everything.
 */
const GUARD = `
while read -r line; do pid=$line; done
if [ -n "$container" ]; then docker rm --force --volumes "$container"; fi
if [ -n "$pid" ]; then
  kill -s "$signal" "$pid"
  tries=0
  while kill -0 "$pid" && [ "$tries" -lt 50 ]; do
    sleep 0.1
    tries=$((tries + 1))
  done
  if [ "$tries" -eq 50 ]; then kill -s KILL "$pid"; fi
fi
rm -rf "$folder"
`;

interface Guard {
  watch(pid: number | undefined): Promise<void>;
  close(): Promise<void>;
}

function startGuard({ folder, discardSignal, container = "" }: Recipe): Guard {
  const child = new Deno.Command("sh", {
    args: ["-c", GUARD],
    env: { folder, signal: discardSignal.replace("SIG", ""), container, pid: "" },
    stdin: "piped",
    stdout: "null",
    stderr: "null",
    detached: true, // Ctrl-C is for whoever started this.
  }).spawn();
  child.unref();
  const writer = child.stdin.getWriter();
  const encoder = new TextEncoder();
  return {
    watch: (pid) => writer.write(encoder.encode(`${pid ?? ""}\n`)),
    async close() {
      child.ref();
      await writer.close();
      await child.status;
    },
  };
}

/** PostgreSQL's sessions are processes, and can still commit when the first process is gone. */
async function childrenOf(pid: number): Promise<readonly number[]> {
  const list = await Deno.readTextFile(`/proc/${pid}/task/${pid}/children`).catch(async () => {
    const { stdout } = await new Deno.Command("pgrep", { args: ["-P", String(pid)] }).output();
    return new TextDecoder().decode(stdout);
  });
  return list.split(/\s+/).filter((word) => word !== "").map(Number);
}

/** A process that writes to the log. */
interface Running {
  readonly child: Deno.ChildProcess;
  ended: boolean;
}

/** Starts a server, and waits until it answers. */
export async function serve(recipe: Recipe): Promise<Server> {
  const { name, url, probe, folder, prepare, command, stopSignal, discardSignal, container } = recipe;
  const log = `${folder}/server.log`;
  const guard = startGuard(recipe);
  let running: Running | undefined;
  let version: string | undefined;

  async function spawn(line: Command): Promise<Running> {
    // Through a shell for the log: a pipe that nobody reads would stop the server.
    const child = new Deno.Command("sh", {
      args: ["-c", `exec "$@" >>"$LOG" 2>&1`, "sh", ...line],
      env: { LOG: log },
      stdin: "null",
      stdout: "null",
      stderr: "null",
    }).spawn();
    child.unref(); // A program may end without stopping its servers: the guard does.
    running = { child, ended: false };
    const spawned = running;
    child.status.then(() => spawned.ended = true);
    await guard.watch(child.pid);
    return spawned;
  }

  async function failure(what: string): Promise<Error> {
    const tail = (await Deno.readTextFile(log).catch(() => "")).split("\n").slice(-20).join("\n");
    return new Error(`${name} ${what}\n${tail}`);
  }

  async function start(): Promise<void> {
    if (running && !running.ended) throw new Error(`${name} runs already`);
    const again = version !== undefined;
    const line: Command = again && container !== undefined ? ["docker", "start", "--attach", container] : command;
    const began = performance.now();
    let spawned = await spawn(line);
    for (;;) {
      try {
        version = await probe();
        return;
      } catch (error) {
        const waitedMs = performance.now() - began;
        // Of one that was killed, a session may not be gone yet, which PostgreSQL does not put up with.
        if (spawned.ended && again && waitedMs < 10_000) spawned = await spawn(line);
        else if (spawned.ended || waitedMs > 60_000) throw await failure(`did not start: ${(error as Error).message}`);
        await new Promise((resolve) => setTimeout(resolve, 50));
      }
    }
  }

  async function end(how: "stop" | "kill" | "discard"): Promise<void> {
    if (!running) return;
    const { child } = running;
    running = undefined;
    function signal(name: Deno.Signal, ...others: readonly number[]): void {
      try {
        child.kill(name);
        for (const pid of others) Deno.kill(pid, name);
      } catch {
        // It has ended already, and the others follow it.
      }
    }
    if (container !== undefined) await run(["docker", how === "stop" ? "stop" : "kill", container]).catch(() => {});
    else if (how === "kill") signal("SIGKILL", ...await childrenOf(child.pid));
    else signal(how === "stop" ? stopSignal : discardSignal);
    const deadline = setTimeout(() => signal("SIGKILL"), 60_000);
    child.ref();
    await child.status;
    clearTimeout(deadline);
    await guard.watch(undefined);
  }

  async function dispose(): Promise<void> {
    await end("discard");
    await guard.close();
  }

  try {
    for (const line of prepare) {
      const { child } = await spawn(line);
      child.ref();
      if (!(await child.status).success) throw await failure(`could not be prepared`);
    }
    await start();
  } catch (error) {
    await dispose();
    throw error;
  }
  return {
    url,
    get version() {
      return version ?? "";
    },
    get pid() {
      if (!running || running.ended) throw new Error(`${name} does not run`);
      return running.child.pid;
    },
    stop: () => end("stop"),
    kill: () => end("kill"),
    start,
    [Symbol.asyncDispose]: dispose,
  };
}
