/**
 * Keeps servers for all test files of a run, which are processes or threads of their own. Each server is started when the first
 * asks for it, and all are stopped a moment after the last connection to here has closed, however its process ended.
 *
 * Started by `./mod.ts`; `Deno.args`: the socket's path. Each connection brings a {@linkcode Question} as JSON.
 *
 * @module
 */
import { administer, type Administrator } from "./databases.ts";
import { startKafka } from "./kafka.ts";
import { type Kind, startMariadb, startMysql, startPostgres } from "./servers.ts";

/** What is asked of the host. `lease` names the asking module, which stays connected for as long as it needs the answers. */
export type Question =
  | { readonly ask: "lease"; readonly lease: string }
  | { readonly ask: "service"; readonly kind: ServiceKind }
  /** `url`: of a server that is not the host's. */
  | { readonly ask: "create"; readonly kind: Kind; readonly url?: string; readonly lease: string }
  | { readonly ask: "drop"; readonly name: string };

/** A database server, or a broker. */
export type ServiceKind = Kind | "kafka";

/** What the host answers. */
export type Reply = { readonly error: string } | { readonly url: string; readonly name: string };

/** How long to wait for somebody else to ask, in milliseconds. */
const LINGER_MS = 3_000;

/** What the host keeps of a server. */
interface Kept extends AsyncDisposable {
  readonly url: string;
}

const START: Readonly<Record<ServiceKind, () => Promise<Kept>>> = {
  postgres: () => startPostgres({ max_connections: "300" }),
  mariadb: () => startMariadb({ max_connections: "500" }),
  mysql: () => startMysql({ max_connections: "500" }),
  async kafka() {
    const cluster = await startKafka();
    return { url: cluster.brokers, [Symbol.asyncDispose]: () => cluster[Symbol.asyncDispose]() };
  },
};

const servers = new Map<ServiceKind, Promise<Kept>>();
const administrators = new Map<string, Administrator>();
/** By name. */
const databases = new Map<string, { readonly lease: string; readonly administrator: Administrator }>();

async function service(kind: ServiceKind): Promise<string> {
  let server = servers.get(kind);
  if (!server) {
    server = START[kind]();
    servers.set(kind, server);
  }
  return (await server).url;
}

async function create(kind: Kind, given: string | undefined, lease: string): Promise<Reply> {
  const url = given ?? await service(kind);
  const administrator = administrators.get(url) ?? administer(kind, url);
  administrators.set(url, administrator);
  const name = `t_${crypto.randomUUID().replaceAll("-", "").slice(0, 12)}`;
  await administrator.create(name);
  databases.set(name, { lease, administrator });
  const own = new URL(url);
  own.pathname = `/${name}`;
  return { url: own.href, name };
}

async function drop(name: string): Promise<void> {
  await databases.get(name)?.administrator.drop(name);
  databases.delete(name);
}

async function answer(question: Exclude<Question, { readonly ask: "lease" }>): Promise<Reply> {
  switch (question.ask) {
    case "service":
      return { url: await service(question.kind), name: "" };
    case "create":
      return await create(question.kind, question.url, question.lease);
    case "drop":
      await drop(question.name);
      return { url: "", name: question.name };
  }
}

async function talk(connection: Deno.Conn): Promise<void> {
  const buffer = new Uint8Array(65_536);
  const count = await connection.read(buffer);
  if (count === null) return;
  const question: Question = JSON.parse(new TextDecoder().decode(buffer.subarray(0, count)));
  const say = (reply: unknown) => connection.write(new TextEncoder().encode(JSON.stringify(reply)));
  if (question.ask !== "lease") {
    await say(await answer(question).catch((error: Error): Reply => ({ error: error.message })));
    return;
  }
  await say("welcome");
  while (await connection.read(buffer).catch(() => null) !== null);
  // Of a module that was killed, or whose test did not get to the end.
  for (const [name, { lease }] of databases) if (lease === question.lease) await drop(name);
}

const path = Deno.args[0]!;
const listener = Deno.listen({ transport: "unix", path });
let connections = 0;
let timer: ReturnType<typeof setTimeout> | undefined;

function linger(): void {
  clearTimeout(timer);
  if (connections === 0) timer = setTimeout(end, LINGER_MS);
}

async function end(): Promise<void> {
  // In this order: who finds the socket finds somebody who listens, and who is not welcomed any more finds it gone.
  Deno.removeSync(path);
  listener.close();
  for (const server of await Promise.allSettled(servers.values())) {
    if (server.status === "fulfilled") await server.value[Symbol.asyncDispose]();
  }
  Deno.exit(0);
}

for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"] as const) Deno.addSignalListener(signal, end);
linger();
for await (const connection of listener) {
  connections++;
  linger();
  talk(connection)
    .catch((error) => console.error(error))
    .finally(() => {
      connection.close();
      connections--;
      linger();
    });
}
