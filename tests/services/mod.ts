/**
 * Real servers for tests: a URL from the environment, else one that is started, or installed and started, and shared by all
 * test files of a run. Each test makes a database of its own there.
 *
 * Importing this connects to the host of the servers, and starts it if there is none: at the top of a file, where the
 * sanitizers of tests take it for what was there before.
 *
 * @module
 */
import type { Question, Reply, ServiceKind } from "./host.ts";
import { CACHE, exclusively } from "./install.ts";
import type { Kind } from "./servers.ts";

/** The variables with the URL of a server that runs already. */
const VARIABLES: Readonly<Record<ServiceKind, string>> = {
  postgres: "EFFECTONCE_POSTGRES_URL",
  mariadb: "EFFECTONCE_MARIADB_URL",
  mysql: "EFFECTONCE_MYSQL_URL",
  kafka: "EFFECTONCE_KAFKA_BROKERS",
};

/** A database of a test's own. */
export interface Database {
  /** Where it is, with a user who may do everything. */
  readonly url: string;
  /** Drops it, whoever still uses it. */
  [Symbol.asyncDispose](): Promise<void>;
}

const HOST = new URL("host.ts", import.meta.url).pathname;
/** Another checkout may have another host. */
const CHECKOUT = new Uint8Array(await crypto.subtle.digest("SHA-256", new TextEncoder().encode(HOST))).toHex().slice(0, 8);
const SOCKET = `${CACHE}/host-${CHECKOUT}.sock`;
const LOG = `${CACHE}/host-${CHECKOUT}.log`;
const LEASE = crypto.randomUUID();

async function send(connection: Deno.Conn, question: Question): Promise<string> {
  await connection.write(new TextEncoder().encode(JSON.stringify(question)));
  const buffer = new Uint8Array(65_536);
  const count = await connection.read(buffer);
  return new TextDecoder().decode(buffer.subarray(0, count ?? 0));
}

/** Connects to the host, if there is one. */
async function join(): Promise<Deno.Conn | undefined> {
  let connection: Deno.Conn | undefined;
  try {
    connection = await Deno.connect({ transport: "unix", path: SOCKET });
    if (await send(connection, { ask: "lease", lease: LEASE }) !== "") return connection;
  } catch (error) {
    const { NotFound, ConnectionRefused, ConnectionReset, BrokenPipe } = Deno.errors;
    if (![NotFound, ConnectionRefused, ConnectionReset, BrokenPipe].some((gone) => error instanceof gone)) throw error;
  }
  connection?.close(); // One that does not welcome is just ending.
}

/** Connects to the host; starts it first if need be. */
async function lease(): Promise<Deno.Conn> {
  return await join() ?? await exclusively("host", async () => {
    const meanwhile = await join();
    if (meanwhile) return meanwhile;
    await Deno.remove(SOCKET).catch(() => {}); // Of one that was killed.
    const host = new Deno.Command("sh", {
      // To a file: whoever reads the tests' output to its end should not wait for the host.
      args: ["-c", `exec "$@" >"$LOG" 2>&1`, "sh", Deno.execPath(), "run", "-A", "--quiet", HOST, SOCKET],
      env: { LOG },
      stdin: "null",
      stdout: "null",
      stderr: "null",
      detached: true, // Ctrl-C is for the tests; the host ends after them.
    }).spawn();
    host.unref();
    let ended = false;
    host.status.then(() => ended = true);
    for (;;) {
      const started = await join();
      if (started) return started;
      if (ended) throw new Error(`The host of test servers did not start:\n${await Deno.readTextFile(LOG)}`);
      await new Promise((resolve) => setTimeout(resolve, 20));
    }
  });
}

// Open for as long as this module lives, which is how long the host keeps what it is asked for here.
await lease();

async function ask(question: Question): Promise<{ url: string; name: string }> {
  const patience = setTimeout(() => {
    console.error(`Still waiting for a server, which may have to be installed first; ${LOG} is the log of who does it`);
  }, 15_000);
  try {
    using connection = await Deno.connect({ transport: "unix", path: SOCKET });
    const text = await send(connection, question);
    if (text === "") throw new Error(`The host of test servers has ended; its log is ${LOG}`);
    const reply: Reply = JSON.parse(text);
    if ("error" in reply) throw new Error(reply.error);
    return reply;
  } finally {
    clearTimeout(patience);
  }
}

/**
 * The URL of a server, with a user who may do everything; of Kafka the brokers, `host:port,host:port`.
 *
 * @throws {Error} If there is none and none can be started: with what to do.
 */
export async function service(kind: ServiceKind): Promise<string> {
  return Deno.env.get(VARIABLES[kind]) ?? (await ask({ ask: "service", kind })).url;
}

/**
 * Makes a database on a server, for one test. It goes when it is disposed of, or else when the test's process ends.
 *
 * @throws {Error} If there is no server and none can be started: with what to do.
 */
export async function database(kind: Kind): Promise<Database> {
  const given = Deno.env.get(VARIABLES[kind]);
  const { url, name } = await ask({ ask: "create", kind, lease: LEASE, ...(given ? { url: given } : {}) });
  return {
    url,
    async [Symbol.asyncDispose]() {
      await ask({ ask: "drop", name });
    },
  };
}
