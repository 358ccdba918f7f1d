/** The harness that gives other tests their servers. */
import { deepEqual, equal, match, ok, rejects } from "node:assert/strict";
import mysql from "mysql2/promise";
// @ts-types="@types/pg"
import pg from "pg";
import { exclusively, run } from "./install.ts";
import { database, service } from "./mod.ts";
import { type Direction, startProxy, type Verdict } from "./proxy.ts";
import { type Kind, startPgbouncer, startPostgres, tool } from "./servers.ts";

/** A connection of either driver. */
interface Session {
  /** Answers the first column. */
  ask(sql: string): Promise<unknown[]>;
  close(): Promise<void>;
}

async function connect(url: string): Promise<Session> {
  if (url.startsWith("mysql:")) {
    const connection = await mysql.createConnection({ uri: url, rowsAsArray: true });
    connection.on("error", () => {}); // Some tests break it.
    return {
      async ask(sql) {
        const [rows] = await connection.query(sql);
        return Array.isArray(rows) ? (rows as unknown[][]).map(([value]) => value) : [];
      },
      close: () => connection.end(),
    };
  }
  const client = new pg.Client({ connectionString: url });
  client.on("error", () => {});
  await client.connect();
  return {
    ask: async (text) => (await client.query<[unknown]>({ text, rowMode: "array" })).rows.map(([value]) => value),
    close: () => client.end(),
  };
}

async function ask(url: string, sql: string): Promise<unknown[]> {
  const session = await connect(url);
  try {
    return await session.ask(sql);
  } finally {
    await session.close();
  }
}

const nameOf = (url: string) => new URL(url).pathname.slice(1);

/** Whether a server has the database of a URL. */
async function has(server: string, url: string): Promise<boolean> {
  const sql = server.startsWith("mysql:")
    ? "select schema_name from information_schema.schemata"
    : "select datname from pg_database";
  return (await ask(server, sql)).includes(nameOf(url));
}

async function until(holds: () => boolean | Promise<boolean>): Promise<void> {
  while (!await holds()) await new Promise((resolve) => setTimeout(resolve, 20));
}

/** A program of its own that imports from here; it prints one line of JSON, and may go on then. */
function program(body: string, env: Readonly<Record<string, string>> = {}): Deno.ChildProcess {
  const imports = ["install", "mod", "process", "servers"].map((name) =>
    `const ${name}_ts = () => import("${new URL(`${name}.ts`, import.meta.url)}");`
  );
  return new Deno.Command(Deno.execPath(), {
    args: ["eval", "--quiet", [...imports, body].join("\n")],
    cwd: new URL("../..", import.meta.url),
    env,
    stdin: "null",
    stdout: "piped",
    stderr: "inherit",
  }).spawn();
}

async function said<T>(child: Deno.ChildProcess): Promise<T> {
  let text = "";
  for await (const part of child.stdout.pipeThrough(new TextDecoderStream())) {
    text += part;
    if (text.endsWith("\n")) break;
  }
  return JSON.parse(text);
}

for (const kind of ["postgres", "mariadb", "mysql"] satisfies Kind[]) {
  Deno.test(`database() makes databases on ${kind}, and drops them though somebody is in a transaction`, async () => {
    const server = await service(kind);
    const made = await Promise.all([database(kind), database(kind)]);
    const sessions = await Promise.all(made.map(({ url }) => connect(url)));
    for (const session of sessions) {
      await session.ask("create table here (id int)"); // Twice: so they are two.
      await session.ask("begin");
      await session.ask("insert into here values (1)");
    }
    deepEqual(await Promise.all(made.map(({ url }) => has(server, url))), [true, true]);
    await Promise.all(made.map((one) => one[Symbol.asyncDispose]()));
    deepEqual(await Promise.all(made.map(({ url }) => has(server, url))), [false, false]);
    for (const session of sessions) await session.close().catch(() => {}); // Thrown out.
  });
}

Deno.test("a database goes with a process that is killed", async () => {
  const child = program(`
    const { database } = await mod_ts();
    const { url } = await database("postgres");
    console.log(JSON.stringify(url));
    setInterval(() => {}, 1000);
  `);
  const url = await said<string>(child);
  const server = await service("postgres");
  ok(await has(server, url));
  child.kill("SIGKILL");
  await child.status;
  await until(async () => !await has(server, url));
});

Deno.test("a private server goes with a process that is killed, and so do its data", async () => {
  const child = program(`
    const { startPostgres } = await servers_ts();
    const { url } = await startPostgres();
    console.log(JSON.stringify(url));
    setInterval(() => {}, 1000);
  `);
  const url = await said<string>(child);
  const [folder] = await ask(url, "show data_directory");
  child.kill("SIGKILL");
  await child.status;
  await until(() => Deno.stat(String(folder)).then(() => false, () => true));
  await rejects(connect(url), /ECONNREFUSED/);
});

Deno.test("a private server keeps what was committed when it is killed, and answers behind PgBouncer", async () => {
  await using server = await startPostgres();
  await ask(server.url, "create table here (id int)");
  const busy = await connect(server.url);
  const cut = rejects(busy.ask("insert into here values (1); select pg_sleep(600)"));
  await until(async () => (await ask(server.url, "select 1 from pg_stat_activity where wait_event = 'PgSleep'")).length > 0);
  await ask(server.url, "insert into here values (2)");
  await server.kill();
  await cut;
  await rejects(connect(server.url));
  await server.start();
  deepEqual(await ask(server.url, "select id from here"), [2]);
  await server.stop();
  await server.start();
  await ask(server.url, "create database other");
  await using bouncer = await startPgbouncer(server.url, { default_pool_size: "1" });
  const other = new URL(bouncer.url);
  other.pathname = "/other";
  deepEqual(await ask(bouncer.url, "select id from here"), [2]);
  // Two sessions of the client's, one of the server's: only between transactions can both use it.
  const [first, second] = await Promise.all([connect(other.href), connect(other.href)]);
  deepEqual([await first.ask("select pg_backend_pid()"), await first.ask("select current_database()")], [
    await second.ask("select pg_backend_pid()"),
    ["other"],
  ]);
  await Promise.all([first.close(), second.close(), busy.close().catch(() => {})]);
});

Deno.test("a proxy cuts before the server has heard, or before the client has, holds, and refuses", async () => {
  await using made = await database("postgres");
  await ask(made.url, "create table here (id int)");
  const { hostname, port } = new URL(made.url);
  const seen = new Set<number>();
  let observe: (direction: Direction, text: string) => Verdict = () => "pass";
  await using proxy = startProxy({ hostname, port: Number(port) }, {
    observe(direction, bytes, connection) {
      seen.add(connection);
      return observe(direction, new TextDecoder().decode(bytes));
    },
  });
  const url = proxy.url(made.url);
  const ids = () => ask(made.url, "select id from here order by id");
  await ask(url, "insert into here values (1)");
  deepEqual(await ids(), [1]);

  observe = (_, text) => text.includes("insert") ? "cut" : "pass";
  await rejects(ask(url, "insert into here values (2)"), /terminated|ECONNRESET/);
  deepEqual(await ids(), [1]);

  let heard = false;
  observe = (direction, text) => {
    if (text.includes("insert")) heard = true;
    return heard && direction === "toClient" ? "cut" : "pass";
  };
  await rejects(ask(url, "insert into here values (3)"), /terminated|ECONNRESET/);
  deepEqual(await ids(), [1, 3]);

  const holding = Promise.withResolvers<void>();
  observe = (_, text) => {
    if (!text.includes("insert")) return "pass";
    holding.resolve();
    return "hold";
  };
  const held = ask(url, "insert into here values (4)");
  await holding.promise;
  deepEqual(await ids(), [1, 3]);
  proxy.release();
  await held;
  deepEqual(await ids(), [1, 3, 4]);

  observe = () => "pass";
  const open = await connect(url);
  await proxy.refuse(true);
  await rejects(connect(url), /ECONNREFUSED/);
  deepEqual(await open.ask("select 5"), [5]);
  proxy.cutAll();
  await rejects(open.ask("select 6"));
  await open.close().catch(() => {});
  await proxy.refuse(false);
  deepEqual(await ask(url, "select 7"), [7]);
  deepEqual([...seen], [1, 2, 3, 4, 5, 6]);
});

Deno.test("tool() finds what dumps a server", async () => {
  for (const [kind, name] of [["postgres", "pg_dump"], ["mariadb", "mariadb-dump"], ["mysql", "mysqldump"]] as const) {
    match(await run([...await tool(kind, name), "--version"]), new RegExp(`^\\S*${name}`));
  }
});

Deno.test("work of one name is done by one at a time", async () => {
  let inside = 0;
  await Promise.all(Array.from({ length: 5 }, () =>
    exclusively("test", async () => {
      equal(++inside, 1);
      await new Promise((resolve) => setTimeout(resolve));
      inside--;
    })));
});

/** A folder for PATH, with a program in place of Docker's client. */
async function fakeDocker(script: string): Promise<{ folder: string; [Symbol.asyncDispose](): Promise<void> }> {
  const folder = await Deno.makeTempDir({ prefix: "effectonce-path-" });
  await Deno.writeTextFile(`${folder}/docker`, `#!/bin/sh\n${script}`, { mode: 0o755 });
  return { folder, [Symbol.asyncDispose]: () => Deno.remove(folder, { recursive: true }) };
}

Deno.test("a server that is nowhere fails with what to do", async () => {
  await using docker = await fakeDocker("exit 1"); // No daemon.
  const body = `
    const { bring } = await install_ts();
    const origin = { what: "A server", variable: "ITS_URL", packages: ["package"], image: "image:1", find() {} };
    console.log(JSON.stringify(await bring(origin).catch(({ message }) => message)));
  `;
  const child = program(body, { PATH: docker.folder });
  equal(
    await said(child),
    "A server is missing: install package, or start Docker, or set ITS_URL to the URL of one (compose.yaml starts all), " +
      "or set EFFECTONCE_INSTALL=1 to have it installed by apt-get",
  );
  await child.status;
});

/** Only how Docker is called: it runs for as long as its container would, and knows no image before it has pulled it. */
const DOCKER = `
folder=$(dirname "$0")
echo "$*" >>"$folder/calls"
case $1 in
image) exit 1 ;;
run | start)
  echo $$ >"$folder/pid"
  exec sleep 600
  ;;
stop | kill)
  kill -s KILL "$(cat "$folder/pid")"
  rm "$folder/pid"
  ;;
esac
`;

Deno.test("Docker runs what is not on the machine", async () => {
  await using docker = await fakeDocker(DOCKER);
  const body = `
    const { serve } = await process_ts();
    const { contained } = await servers_ts();
    const probe = () => Deno.readTextFile("${docker.folder}/pid");
    const recipe = { name: "It", url: "", probe, stopSignal: "SIGTERM", discardSignal: "SIGKILL" };
    const server = await serve({ ...recipe, ...await contained("postgres", 1234, 5432, { A: "b" }, ["-c", "c=d"]) });
    await server.kill();
    await server.start();
    await server.stop();
    await server.start();
    await server[Symbol.asyncDispose]();
    console.log(JSON.stringify((await Deno.readTextFile("${docker.folder}/calls")).replaceAll(/effectonce-postgres-\\w+/g, "NAME")));
  `;
  const child = program(body, { PATH: `${docker.folder}:${Deno.env.get("PATH")}` });
  deepEqual((await said<string>(child)).trim().split("\n"), [
    "image inspect postgres:17",
    "pull --quiet postgres:17",
    "run --name NAME --sig-proxy=false --publish 127.0.0.1:1234:5432 --env A=b postgres:17 -c c=d",
    "kill NAME",
    "start --attach NAME",
    "stop NAME",
    "start --attach NAME",
    "kill NAME",
    "rm --force --volumes NAME",
  ]);
  await child.status;
});
