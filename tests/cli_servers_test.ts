/** The command line on real PostgreSQL, MySQL and MariaDB servers. */
import { assert, assertEquals, assertMatch, assertStringIncludes } from "@std/assert";
import mysql from "mysql2/promise";
// @ts-types="@types/pg"
import pg from "pg";
import { maskedUrl } from "../cli/mask.ts";
import {
  assertFailure,
  assertSays,
  assertUsage,
  type Box,
  deadUrl,
  emptyBox,
  type Ended,
  eventsOf,
  NO_EFFECTS,
  QUICK,
  type Status,
  Target,
  until,
} from "./cli_run.ts";
import { database } from "./services/mod.ts";
import { startProxy } from "./services/proxy.ts";

const KINDS = ["postgres", "mysql", "mariadb"] as const;
type Kind = (typeof KINDS)[number];

type Sql = (text: string, values?: readonly unknown[]) => Promise<Record<string, unknown>[]>;

/** A connection as an application has it, by the usual driver; `?` as placeholders. */
async function connect(kind: Kind, url: string): Promise<{ sql: Sql; end: () => Promise<void> }> {
  if (kind === "postgres") {
    const client = new pg.Client({ connectionString: url });
    await client.connect();
    let n = 0;
    return {
      sql: async (text, values = []) => {
        n = 0;
        const numbered = values.length > 0 ? text.replace(/\?/g, () => `$${++n}`) : text;
        const answer = await (values.length > 0 ? client.query(numbered, [...values]) : client.query(numbered));
        return (Array.isArray(answer) ? answer.at(-1) : answer).rows;
      },
      end: () => client.end(),
    };
  }
  const client = await mysql.createConnection({ uri: url, multipleStatements: true });
  return {
    sql: async (text, values = []) => (await client.query(text, [...values]))[0] as Record<string, unknown>[],
    end: () => client.end(),
  };
}

/** A folder to run commands in, and a database on a server. */
class Place implements AsyncDisposable {
  readonly kind: Kind;
  readonly at: Box;
  /** The database's URL, as a person writes it. */
  readonly url: string;
  /** How it is shown. */
  readonly name: string;
  /** Runs SQL as an application does. */
  readonly sql: Sql;
  readonly #stack: AsyncDisposableStack;
  constructor(kind: Kind, at: Box, url: string, sql: Sql, stack: AsyncDisposableStack) {
    this.kind = kind;
    this.at = at;
    this.url = url;
    this.name = url.replace(/\/\/[^@]*@/, "//");
    this.sql = sql;
    this.#stack = stack;
  }
  /** The table's name as its SQL has it. */
  quote(name: string): string {
    return this.kind === "postgres" ? `"${name}"` : `\`${name}\``;
  }
  /** Enqueues by a plain INSERT, in one statement. */
  async insert(...messages: readonly (readonly [id: string, key: string | null, value: string])[]): Promise<void> {
    const bytes = (value: string) => this.kind === "postgres" ? `convert_to('${value}', 'UTF8')` : `'${value}'`;
    const rows = messages.map(([id, key, value]) =>
      `('${id}', 'orders', ${key === null ? "null" : `'${key}'`}, ${bytes(value)})`
    );
    const key = this.quote("key");
    await this.sql(`insert into effectonce_outbox (id, topic, ${key}, value) values ${rows.join(", ")}`);
  }
  relay(to: string, ...more: readonly string[]): string[] {
    return ["relay", "--from", this.url, "--to", to, ...more];
  }
  async status(url: string = this.url): Promise<Status & { relays: unknown[] }> {
    return await this.at.json(["status", "--store", url]) as Status & { relays: unknown[] };
  }
  async [Symbol.asyncDispose](): Promise<void> {
    await this.#stack.disposeAsync();
  }
}

/** Makes a database; `init`: with tables. */
async function place(kind: Kind, init = true): Promise<Place> {
  await using stack = new AsyncDisposableStack();
  const at = stack.use(await emptyBox());
  const { url } = stack.use(await database(kind));
  const { sql, end } = await connect(kind, url);
  stack.defer(end);
  // Each of the schemes that there are is used by some test.
  const scheme = kind === "mariadb" ? "mariadb:" : new URL(url).protocol;
  const made = new Place(kind, at, url.replace(/^[a-z]+:/, scheme), sql, stack.move());
  if (init) await at.ok(["init", "--store", made.url]);
  return made;
}

/** Runs for each kind of server. */
function onEach(what: string, run: (kind: Kind, t: Deno.TestContext) => Promise<void>): void {
  for (const kind of KINDS) Deno.test(`${kind}: ${what}`, (t) => run(kind, t));
}

/** The payments that a target has made, which dedupes by the key that it is given. */
class Ledger {
  readonly charged: string[] = [];
  readonly #known = new Set<string>();
  charge(key: string): void {
    if (this.#known.has(key)) return;
    this.#known.add(key);
    this.charged.push(key);
  }
}

const lines = (text: string): Record<string, unknown>[] =>
  text.trimEnd().split("\n").map((line) => JSON.parse(line)).filter((line) => !("effectonce" in line));

/** A server that PostgreSQL's clients take for one that refuses the password: those of the tests trust everybody. */
function refusing(): AsyncDisposable & { readonly port: number; readonly passwords: string[] } {
  const listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const passwords: string[] = [];
  const message = (type: string, body: Uint8Array) => {
    const bytes = new Uint8Array(5 + body.length);
    bytes[0] = type.charCodeAt(0);
    new DataView(bytes.buffer).setUint32(1, 4 + body.length);
    bytes.set(body, 5);
    return bytes;
  };
  const fields = 'SFATAL\0VFATAL\0C28P01\0Mpassword authentication failed for user "u"\0\0';
  const done = (async () => {
    for await (using connection of listener) {
      const buffer = new Uint8Array(4096);
      await connection.read(buffer);
      await connection.write(message("R", Uint8Array.of(0, 0, 0, 3)));
      const count = await connection.read(buffer);
      passwords.push(new TextDecoder().decode(buffer.subarray(5, (count ?? 6) - 1)));
      await connection.write(message("E", new TextEncoder().encode(fields)));
    }
  })();
  return {
    port: listener.addr.port,
    passwords,
    async [Symbol.asyncDispose]() {
      listener.close();
      await done;
    },
  };
}

// ------------------------------------------------------------------------------------------------------- from end to end

onEach("init, a plain INSERT, relay, and what the other commands tell", async (kind) => {
  await using target = new Target();
  await using shop = await place(kind, false);
  const { at, url, name } = shop;
  assertFailure(await at.run(["status", "--store", url]), name, "no effectonce tables", "init");
  assertEquals(await at.ok(["init", "--store", url]), `${name} is ready\n`);
  assertEquals(await at.json(["init", "--store", url]), { store: name, ready: true });

  await shop.insert(["m1", "k", '{"amount":5}'], ["m2", "k", "ü🔑"], ["m3", null, "3"]);
  await at.ok(["enqueue", "--store", url, "--topic", "orders", "--key", "k", "--value", "4", "--id", "m4"]);
  assertEquals((await shop.status()).outbox.pending, 4);
  target.answer = ({ key }) => new Response("why", { status: key === "m3" ? 422 : 200 });
  const ran = await at.run(shop.relay(target.url, "--drain", "--idempotent", "--json"));
  assertEquals([ran.code, ran.stderr], [1, ""]);
  assertEquals(eventsOf(ran)[0]!.from, name);
  assertEquals(target.keys().filter((key) => key !== "m3"), ["m1", "m2", "m4"]);
  assertEquals(target.asked.find(({ key }) => key === "m2")!.body, "ü🔑");

  const { outbox, effects, relays } = await shop.status();
  assertEquals([outbox.pending, outbox.parked, effects], [0, 1, { ...NO_EFFECTS, done: 3, rejected: 1 }]);
  assertEquals(relays, await at.json(["relays", "--store", url]));
  const listed = await at.json(["effects", "list", "--store", url, "--state", "parked"]) as { key: string }[];
  assertEquals(listed.map(({ key }) => key), ["m3"]);
  assertStringIncludes(await at.ok(["effects", "show", "m3", "--store", url]), "rejected");
  target.answer = () => new Response("paid");
  await at.ok(["effects", "retry", "m3", "--store", url]);
  assertEquals((await at.run(shop.relay(target.url, "--drain", "--idempotent"))).code, 0);
  assertEquals(target.keys().at(-1), "m3;generation=2");
  assertEquals(await at.ok(["relays", "--store", url]), "none\n");

  // Into a file, which commits its position.
  await shop.insert(["f1", "k", "1"], ["f2", "k", "2"]);
  for (const _ of [1, 2]) assertEquals((await at.run(shop.relay("file:out.jsonl", "--drain"))).code, 0);
  assertEquals(lines(await Deno.readTextFile(at.path("out.jsonl"))).map(({ id }) => id), ["f1", "f2"]);
  assertEquals(await at.json(["prune", "--store", url, "--older-than-ms", "0"]), { effects: 4, messages: 0 });

  const said = await at.run(["doctor", "--from", url, "--to", target.url]);
  assertEquals([said.code, said.stderr], [0, ""], said.stdout);
  assertSays(said.stdout, [
    `ok  ${name} commits durably: `,
    `ok  ${name} can be written to: it is the primary`,
    `ok  ${name} has its tables: version 1`,
    ...kind === "postgres" ? ["a NOTIFY arrives", "CACHE 1"] : ["character_set_results = utf8mb4"],
  ]);
});

onEach("the SQL of schema makes what every command takes", async (kind) => {
  await using target = new Target();
  await using shop = await place(kind, false);
  const { at, url, name } = shop;
  const schema = await at.ok(["schema", "--store", `${kind}:`]);
  assertEquals(await at.ok(["schema", "--store", url]), schema, "with nobody asked");
  await shop.sql(schema);
  assertEquals(await at.ok(["init", "--store", url]), `${name} is ready\n`);
  await shop.insert(["m1", null, "1"]);
  assertEquals((await at.run(shop.relay(target.url, "--drain"))).code, 0);
  assertEquals(target.keys(), ["m1"]);
  assertEquals((await at.run(["doctor", "--from", url, "--to", target.url])).code, 0);
});

onEach("schema and prefix: other tables, apart from the usual ones", async (kind) => {
  await using target = new Target();
  await using shop = await place(kind);
  const { at, url, name } = shop;
  // What is a schema in PostgreSQL is a database in MySQL.
  await using other = kind === "postgres" ? undefined : await database(kind);
  const schema = other ? new URL(other.url).pathname.slice(1) : "billing";
  if (!other) await shop.sql("create schema billing");
  const theirs = `${url}?pool=3&schema=${schema}&prefix=eo_`;
  const shown = `${name}?schema=${schema}&prefix=eo_`;
  assertFailure(await at.run(["status", "--store", theirs]), shown, "init");
  assertEquals(await at.ok(["init", "--store", theirs]), `${shown} is ready\n`);
  await at.ok(["enqueue", "--store", theirs, "--topic", "t", "--value", "1", "--id", "theirs"]);
  await at.ok(["enqueue", "--store", url, "--topic", "t", "--value", "1", "--id", "usual"]);
  const ran = await at.run(["relay", "--from", theirs, "--to", target.url, "--drain"]);
  assertEquals([ran.code, target.keys()], [0, ["theirs"]]);
  const [row] = await shop.sql(`select count(*) as n from ${shop.quote(schema)}.${shop.quote("eo_effects")}`);
  assertEquals(Number(row!.n), 1);
  assertEquals((await shop.status()).outbox.pending, 1);
  assertEquals((await at.run(["doctor", "--from", theirs, "--to", target.url])).code, 0);
  const missing = await at.run(["init", "--store", `${url}?schema=nowhere`]);
  assertFailure(missing, `${name}?schema=nowhere`, "nowhere");
});

onEach("a table that is there already: Debezium's, and one with columns of its own", async (kind, t) => {
  await using target = new Target();
  await using shop = await place(kind, false);
  const { at, url, name } = shop;
  const id = kind === "postgres" ? "uuid default gen_random_uuid()" : "char(36) default (uuid())";
  await shop.sql(
    `create table outboxevent (id ${id} primary key, aggregatetype varchar(255) not null, aggregateid varchar(255) not null,
      type varchar(255) not null, payload json)`,
  );
  const insert = async (key: string, n: number) => {
    const columns = "aggregatetype, aggregateid, type, payload";
    await shop.sql(`insert into outboxevent (${columns}) values ('order', '${key}', 'OrderPlaced', '{"n":${n}}')`);
  };
  const debezium = `${url}?outbox=outboxevent&layout=debezium&prefix=dbz_`;
  await t.step("Debezium's", async () => {
    await insert("before", 0);
    assertEquals(await at.ok(["init", "--store", debezium]), `${name}?prefix=dbz_&outbox=outboxevent is ready\n`);
    await at.ok(["init", "--store", debezium]);
    for (const [key, n] of [["a", 1], ["b", 2], ["a", 3]] as const) await insert(key, n);
    const ran = await at.run(["relay", "--from", debezium, "--to", target.url, "--drain"]);
    assertEquals([ran.code, ran.stderr], [0, ""], ran.stdout);
    const asked = target.asked.map(({ body, headers }) => [JSON.parse(body).n, headers.get("eventtype")]);
    assertEquals(asked.toSorted(), [0, 1, 2, 3].map((n) => [n, "OrderPlaced"]));
    assertEquals(asked.map(([n]) => n).filter((n) => n % 2 === 1), [1, 3], "those of a key in order");
    assertEquals((await shop.sql("select count(*) as n from outboxevent")).map(({ n }) => Number(n)), [0]);
    const effects = await at.json(["effects", "list", "--store", debezium]) as { key: string }[];
    assertEquals(effects.map(({ key }) => key).toSorted(), target.keys().toSorted());
    const said = await at.ok(["doctor", "--from", debezium, "--to", target.url]);
    assertSays(said, ["by effectonce_seq", "by effectonce_created_at", "outboxevent.payload is"]);
    await insert("c", 4);
    assertEquals((await at.run(["relay", "--from", debezium, "--to", "file:events.jsonl", "--drain"])).code, 0);
    const [line] = lines(await Deno.readTextFile(at.path("events.jsonl")));
    assertEquals([line!.topic, line!.key, JSON.parse(String(line!.value))], ["order", "c", { n: 4 }]);
    const enqueue = ["enqueue", "--store", debezium, "--topic", "t", "--value", "1"];
    assertFailure(await at.run(enqueue), "outboxevent", "INSERT");
  });
  await t.step("columns of its own", async () => {
    const [seq, bytes, time] = kind === "postgres"
      ? ["bigint generated always as identity", "bytea", "timestamptz default now()"]
      : ["bigint auto_increment unique", "blob", "datetime(6) default (utc_timestamp(6))"];
    await shop.sql(
      `create table events (no ${seq}, uid varchar(40) primary key, kind varchar(40) not null, ref varchar(40), body ${bytes},
        meta json, happened ${time}, tenant varchar(40))`,
    );
    const columns = "topic:kind,key:ref,value:body,id:uid,seq:no,headers:meta,created-at:happened,header.tenant:tenant";
    const mapped = `${url}?outbox=events&columns=${columns}&stored=bytes&prefix=ev_`;
    await at.ok(["init", "--store", mapped]);
    const body = kind === "postgres" ? "'\\x00ff'" : "x'00ff'";
    await shop.sql(
      `insert into events (uid, kind, ref, body, meta, tenant) values ('u1', 't', 'k', ${body}, '{"a":"b"}', 'x')`,
    );
    assertEquals((await at.run(["relay", "--from", mapped, "--to", "file:out.jsonl", "--drain"])).code, 0);
    const [{ time: when, ...line }] = lines(await Deno.readTextFile(at.path("out.jsonl"))) as [Record<string, unknown>];
    assertEquals(line, { id: "u1", topic: "t", key: "k", valueBase64: "AP8=", headers: { a: "b", tenant: "x" } });
    assert(Math.abs(Date.parse(String(when)) - Date.now()) < 60_000, `it was enqueued at ${when}`);
    const wrong = await at.run(["doctor", "--from", mapped.replace("bytes", "text"), "--to", "stdout:"]);
    assertEquals(wrong.code, 1);
    assertSays(wrong.stdout, [/NO {2}[^\n]*events\.body is \w+, read as text: say stored=bytes/]);
  });
  await t.step("one that is not there, or another one under a prefix that is taken", async () => {
    const absent = await at.run(["init", "--store", `${url}?outbox=absent&layout=debezium&prefix=ab_`]);
    assertFailure(absent, "prefix=ab_&outbox=absent", "absent");
    const taken = await at.run(["init", "--store", `${url}?outbox=events&layout=debezium&prefix=dbz_`]);
    assertFailure(taken, "prefix=dbz_&outbox=events", "prefix of its own");
  });
});

// ----------------------------------------------------------------------------------------------------------------- crashes

onEach("kill -9 between the call and its record: each message is charged once in the ledger", async (kind) => {
  await using target = new Target();
  await using shop = await place(kind);
  const ids = ["1", "2", "3", "4", "5", "6"];
  await shop.insert(...ids.map((id) => [id, `k${Number(id) % 2}`, id] as const));
  const ledger = new Ledger();
  const kills = ["2", "5"];
  const commands: string[] = [];
  let running: ReturnType<Box["start"]> | undefined;
  target.answer = async ({ key }) => {
    ledger.charge(key);
    if (running === undefined || kills[0] !== key) return Response.json({ paid: true });
    kills.shift();
    commands.push(await Deno.readTextFile(`/proc/${running.pid}/cmdline`));
    running.kill("SIGKILL"); // The charge is made, and nobody will record it.
    return await target.hold();
  };
  const line = shop.relay(target.url, "--drain", "--idempotent", "--lease-ms", "500", ...QUICK);
  while (kills.length > 0) {
    const left = kills.length;
    running = shop.at.start(line);
    assertEquals([(await running.ended()).signal, kills.length], ["SIGKILL", left - 1]);
    running = undefined;
    assertEquals(commands.at(-1)!.split("\0")[0], Deno.execPath(), "a wrapper would die in its place");
  }
  const last = await shop.at.run(line);
  assertEquals([last.code, last.stderr], [0, ""]);
  assertEquals(ledger.charged.toSorted(), ids);
  for (const parity of [0, 1]) {
    const ofKey = (all: readonly string[]) => all.filter((id) => Number(id) % 2 === parity);
    assertEquals(ofKey(ledger.charged), ofKey(ids), "in order by key");
  }
  // What else was under way when it was killed may come again as well.
  assert(target.keys().length >= ids.length + 2, "what was killed is repeated");
  assertEquals([...new Set(target.keys())].toSorted(), ids, "under its key");
  const { outbox, effects } = await shop.status();
  assertEquals([outbox.pending + outbox.parked, effects], [0, { ...NO_EFFECTS, done: 6 }]);
});

onEach("kill -9 between the commit of a file and the outbox: each line once", async (kind) => {
  await using shop = await place(kind);
  const ids = Array.from({ length: 40 }, (_, i) => `m${String(i).padStart(2, "0")}`);
  await shop.insert(...ids.map((id) => [id, "k", id] as const));
  const line = shop.relay("file:out.jsonl", "--drain", "--batch", "2", "--lease-ms", "500", "--json");
  for (const at of [3, 11]) {
    const running = shop.at.start(line);
    for (let n = 0; n < at; n++) await running.event("delivered");
    running.kill("SIGKILL");
    assertEquals((await running.ended()).signal, "SIGKILL");
  }
  assertEquals((await shop.at.run(line)).code, 0);
  assertEquals(lines(await Deno.readTextFile(shop.at.path("out.jsonl"))).map(({ id }) => id), ids);
});

onEach("two relays at once: each message is charged once, in order by key", async (kind) => {
  await using target = new Target();
  await using shop = await place(kind);
  const ids = Array.from({ length: 60 }, (_, i) => String(i).padStart(2, "0"));
  await shop.insert(...ids.map((id) => [id, `k${Number(id) % 7}`, id] as const));
  const line = shop.relay(target.url, "--drain");
  const both = await Promise.all([shop.at.run(line), shop.at.run(line)]);
  assertEquals(both.map(({ code, stderr }) => [code, stderr]), [[0, ""], [0, ""]]);
  assertEquals(target.keys().toSorted(), ids, "none twice although it does not dedupe");
  for (let k = 0; k < 7; k++) {
    const ofKey = (all: readonly string[]) => all.filter((id) => Number(id) % 7 === k);
    assertEquals(ofKey(target.keys()), ofKey(ids));
  }
});

onEach("shards: relays of a name share the messages out, and each is shown as one relay", async (kind) => {
  await using target = new Target();
  await using shop = await place(kind);
  const { at, url, name } = shop;
  await at.ok(["init", "--store", url, "--shards", "4"]);
  const ids = Array.from({ length: 60 }, (_, i) => String(i).padStart(2, "0"));
  await shop.insert(...ids.map((id) => [id, `k${Number(id) % 7}`, id] as const));
  const line = shop.relay(target.url, "--drain", "--json");
  const both = await Promise.all([at.run(line), at.run(line)]);
  let delivered = 0;
  for (const ended of both) {
    assertEquals([ended.code, ended.stderr], [0, ""]);
    const told = eventsOf(ended).filter(({ type }) => type === "started" || type === "stopped");
    // All shards may have been the other's.
    assertEquals(told.map(({ type }) => type), told.length > 1 ? ["started", "stopped"] : ["stopped"]);
    delivered += Number(told.at(-1)!.delivered);
  }
  assertEquals([delivered, target.keys().toSorted()], [60, ids]);
  for (let k = 0; k < 7; k++) {
    const ofKey = (all: readonly string[]) => all.filter((id) => Number(id) % 7 === k);
    assertEquals(ofKey(target.keys()), ofKey(ids));
  }
  const file = await at.run(shop.relay("file:out.jsonl", "--drain"));
  assertFailure(file, "file:out.jsonl takes one shard", `${name} has 4`, "--shards 1");
  await at.ok(["init", "--store", url, "--shards", "1"]);
  assertEquals((await at.run(shop.relay("file:out.jsonl", "--drain"))).code, 0);
  assertUsage(await at.run(["init", "--store", "sqlite:app.db", "--shards", "2"]), "--shards", "postgres:");
});

onEach("a store that was restored: nothing is called until --accept-source", async (kind) => {
  await using target = new Target();
  await using shop = await place(kind);
  const { at, url } = shop;
  await shop.insert(["m1", null, "1"]);
  assertEquals((await at.run(shop.relay(target.url, "--drain"))).code, 0);
  await shop.insert(["m2", null, "2"]);
  // As a dump is restored: into another place.
  await shop.sql("update effectonce_meta set value = 'elsewhere' where name = 'place'");
  const ran = await at.run(shop.relay(target.url, "--drain"));
  assertEquals(ran.code, 1);
  assertSays(ran.stderr, ["restored from a backup, or copied", "--accept-source", "#diverged"]);
  assertEquals(target.keys(), ["m1"]);
  if (kind === "postgres") await at.ok(["init", "--store", url, "--no-notify"]);
  assertEquals((await at.run(shop.relay(target.url, "--drain", "--accept-source"))).code, 0);
  assertEquals(target.keys(), ["m1", "m2"]);
  if (kind === "postgres") {
    assertStringIncludes(await at.ok(["doctor", "--from", url, "--to", "stdout:"]), "wakes relays: no");
  }
  await at.ok(["init", "--store", "sqlite:app.db"]);
  const other = await at.run(["relay", "--from", "sqlite:app.db", "--to", "stdout:", "--drain", "--accept-source"]);
  assertUsage(other, "--accept-source", "postgres:");
});

// -------------------------------------------------------------------------------------------------------------- running on

onEach("SIGTERM stops a relay that runs: exit code 0, at once", async (kind) => {
  await using target = new Target();
  await using shop = await place(kind);
  const running = shop.at.start(shop.relay(target.url, "--json"));
  await running.event("idle");
  await shop.insert(["m1", null, "1"]);
  await running.event("delivered");
  await running.event("idle");
  const start = performance.now();
  const { code, stderr } = await running.stop("SIGTERM");
  assertEquals([code, stderr], [0, ""]);
  assert(performance.now() - start < 2_000, "it did not wait for its pool");
  assertEquals(eventsOf({ code, stderr, stdout: running.lines.join("\n") }).at(-1)!.type, "stopped");
  assertEquals(await shop.at.ok(["relays", "--store", shop.url]), "none\n");
});

Deno.test("postgres: an INSERT wakes a relay that would look a minute later; not after init --no-notify, nor with listen=off", async () => {
  await using target = new Target();
  await using shop = await place("postgres");
  const { at, url } = shop;
  const slow = ["--poll-ms", "60000", "--json"];
  const running = at.start(shop.relay(target.url, ...slow));
  await running.event("idle");
  await shop.insert(["m1", null, "1"]);
  await running.event("delivered");
  assertEquals((await running.stop("SIGTERM")).code, 0);

  const listeners = async () => {
    const rows = await shop.sql(
      "select count(*) as n from pg_stat_activity where query like 'listen %' and datname = current_database()",
    );
    return Number(rows[0]!.n);
  };
  const deaf = at.start(["relay", "--from", `${url}?listen=off`, "--to", target.url, ...slow]);
  await deaf.event("idle");
  assertEquals(await listeners(), 0);
  assertEquals((await deaf.stop("SIGTERM")).code, 0);

  await at.ok(["init", "--store", url, "--no-notify"]);
  const enabled = "select tgenabled from pg_trigger where tgname = 'effectonce_notify'";
  assertEquals(await shop.sql(enabled), [{ tgenabled: "D" }]);
  assertSays(await at.ok(["doctor", "--from", url, "--to", "stdout:"]), ["wakes relays: no", "--no-notify"]);
  await at.ok(["init", "--store", url]);
  assertEquals(await shop.sql(enabled), [{ tgenabled: "O" }]);
  assertUsage(await at.run(["init", "--store", "mysql://u@h/d", "--no-notify"]), "--no-notify", "postgres:");

  // Past a pooler.
  const direct = at.start(["relay", "--from", `${url}?listen-url=env:DIRECT`, "--to", target.url, ...slow], {
    env: { DIRECT: url.replace(/^postgres:/, "postgresql:") },
  });
  await direct.event("idle");
  await until(async () => await listeners() === 1);
  assertEquals((await direct.stop("SIGTERM")).code, 0);
});

onEach("a server that is away at the start: a relay that runs waits and says so, --drain and status fail", async (kind) => {
  await using target = new Target();
  await using shop = await place(kind);
  await shop.insert(["m1", null, "1"]);
  const { hostname, port } = new URL(shop.url);
  await using proxy = startProxy({ hostname, port: Number(port) });
  await proxy.refuse(true);
  const through = shop.url.replace(`${hostname}:${port}`, `127.0.0.1:${proxy.port}`);
  const name = shop.name.replace(`${hostname}:${port}`, `127.0.0.1:${proxy.port}`);
  const line = ["relay", "--from", through, "--to", target.url, "--json"];
  const running = shop.at.start(line);
  const impatient = shop.at.start(line);
  const start = performance.now();
  const failing = Promise.all([[...line, "--drain"], ["status", "--store", through]].map((args) => shop.at.run(args)));
  assertSays(String((await running.event("failed")).reason), [name, "could not be reached", "nothing listens there"]);
  await impatient.event("failed");
  impatient.kill("SIGTERM");
  for (const ended of await failing) assertFailure(ended, `Cannot open ${name}: nothing listens there`);
  assert(performance.now() - start < 12_000);
  const stopped = await impatient.ended();
  assertEquals([stopped.code, stopped.stderr], [0, ""], "told to stop before it could begin");
  await proxy.refuse(false);
  await running.event("delivered");
  // Connections that break are no end either.
  await running.event("idle");
  proxy.cutAll();
  await shop.insert(["m2", null, "2"]);
  await until(() => target.keys().includes("m2"));
  assertEquals((await running.stop("SIGTERM")).code, 0);
  assertEquals(target.keys(), ["m1", "m2"]);
});

// --------------------------------------------------------------------------------------------------- what is wrong with a URL

const SECRET = "hush%2Fpw";
const shows = ({ stdout, stderr }: Ended) => /hush/.test(stdout + stderr);

/** What a person may mistype, and what the answer must say. */
const USAGE: readonly (readonly [url: string, ...says: (string | RegExp)[]])[] = [
  ["oracle://u:hush@h/d", `"oracle:"`, "sqlite:, postgres:, mysql: or mariadb:"],
  ["postgres:", "postgres://user:password@host:5432/database"],
  ["postgres:app", "postgres://user:password@host:5432/database"],
  ["mariadb:", "mariadb://user:password@host:3306/database"],
  ["postgres:///d", "no host"],
  ["mysql://h/d", "no user"],
  ["postgres://u:hush@h", "no database"],
  ["postgres://u:hush@h/", "no database"],
  ["mysql://u:hush@h/a/b", "one database"],
  ["postgres://u:hu#sh@h/d", "%23"],
  ["postgres://u:hush/@h/d", "%2F"],
  ["postgres://u:1/hush@h/d", "%2F"],
  ["postgres://u:hush@h:99999/d", "cannot be read"],
  ["postgres://u:1?hush@h/d", "not a parameter"],
  ["postgres://u:hush%zz@h/d", "%25"],
  ["postgres://u:hush@h/d?poool=1", `"poool"`, "schema, prefix, outbox, columns, layout", "listen-url"],
  ["mysql://u:hush@h/d?listen=on", `"listen"`, "mysql:", "schema, prefix"],
  ["mysql://u:hush@h/d?driver=node", `"driver"`],
  ...["0", "-1", "1.5", "x", "", "9999"].map((pool) => [`mysql://u:hush@h/d?pool=${pool}`, "pool", "1 to 1000"] as const),
  ["mysql://u:hush@h/d?pool=1&pool=2", "pool is given twice"],
  ["postgres://u:hush@h/d?sslmode=prefer", "sslmode=prefer", "disable, require or verify-full"],
  ["postgres://u:hush@h/d?sslrootcert=ca.pem", "sslrootcert", "sslmode=verify-full"],
  ["postgres://u:hush@h/d?schema=a-b", `"a-b"`],
  ["postgres://u:hush@h/d?prefix=", `""`],
  ["postgres://u:hush@h/d?outbox=x", "topic, key and value", "layout=debezium"],
  ["postgres://u:hush@h/d?layout=debezium", "outbox=TABLE"],
  ["postgres://u:hush@h/d?stored=bytes", "outbox=TABLE"],
  ["postgres://u:hush@h/d?outbox=x&layout=kafka", "layout=kafka", "debezium"],
  ["postgres://u:hush@h/d?outbox=x&columns=", "NAME:COLUMN"],
  ["postgres://u:hush@h/d?outbox=x&columns=topic:a,key:b", "topic, key and value"],
  ["postgres://u:hush@h/d?outbox=x&columns=topics:a", `"topics"`, "created-at", "header.NAME"],
  ["postgres://u:hush@h/d?outbox=x&columns=topic:a,topic:b", "topic twice"],
  ["postgres://u:hush@h/d?outbox=x&columns=topic:a,key:b,value:c%20d", `"c d"`],
  ["postgres://u:hush@h/d?listen=yes", "listen=yes", "on or off"],
  ["postgres://u:hush@h/d?listen-url=http://u:hush@h/", "listen-url", "postgres:"],
  ["postgres://u:hush@h/d?listen-url=postgres://u:hush@h", "listen-url", "no database"],
  ["postgres://u:hush@h/d?listen-url=env:NONE", "listen-url", "NONE"],
  ["postgres://u:hush@h/d?listen=off&listen-url=postgres://u:hush@h/d", "exclude each other"],
];

Deno.test("what a person mistypes in the URL of a server: exit code 2, and what is meant, without the password", async (t) => {
  await using at = await emptyBox();
  const ended = await at.many(
    USAGE.flatMap(([url]) => [
      ["status", "--store", url],
      ["relay", "--from", url, "--to", "stdout:", "--drain"],
    ]),
    { USER: "", PGUSER: "" },
  );
  for (const [i, [url, ...says]] of USAGE.entries()) {
    await t.step(url, () => {
      assertUsage(ended[2 * i]!, "--store", ...says);
      assertUsage(ended[2 * i + 1]!, "--from", ...says);
      assert(!shows(ended[2 * i]!) && !shows(ended[2 * i + 1]!), ended[2 * i]!.stderr);
    });
  }
});

onEach("a server that cannot be had: exit code 1, one sentence with its name, without the password", async (kind, t) => {
  await using shop = await place(kind, false);
  const { at, url, name, sql } = shop;
  const { host, pathname } = new URL(url);
  const scheme = url.slice(0, url.indexOf(":"));
  const address = `${scheme}://${host}`;
  const dead = new URL(deadUrl()).host;
  const user = `u${crypto.randomUUID().replaceAll("-", "").slice(0, 12)}`;
  await using stack = new AsyncDisposableStack();
  if (kind === "postgres") {
    await sql(`create role ${user} login password 'right'`);
    stack.defer(async () => void await sql(`drop role ${user}`));
  } else {
    await sql(`create user ${user}@'%' identified by 'right'; create user ${user}@localhost identified by 'right'`);
    stack.defer(async () => void await sql(`drop user ${user}@'%', ${user}@localhost`));
  }
  const at0 = (user: string, host: string, path: string) => `${scheme}://${user}@${host}${path}`;
  const unknown = kind === "postgres" ? /role "nobody_here" does not exist/ : /denied for user 'nobody_here'/;
  const cases: [what: string, url: string, name: string, ...says: (string | RegExp)[]][] = [
    ["an unknown user", at0(`nobody_here:${SECRET}`, host, pathname), `${address}${pathname}`, unknown],
    [
      "an unknown database",
      url.replace(pathname, "/no_such_db"),
      `${address}/no_such_db`,
      /database .?no_such_db|unknown database/i,
      "create it first",
    ],
    [
      "an unknown host",
      at0(`u:${SECRET}`, "no-such-host.invalid", "/d"),
      `${scheme}://no-such-host.invalid:`,
      "no such host",
    ],
    ["nothing there", at0(`u:${SECRET}`, dead, "/d"), `${scheme}://${dead}/d`, "nothing listens there"],
  ];
  if (kind === "postgres") {
    const server = stack.use(refusing());
    const place = `127.0.0.1:${server.port}`;
    cases.push(
      [
        "a wrong password",
        at0(`u:${SECRET}`, place, "/d"),
        `${address.replace(host, place)}/d`,
        "password authentication failed",
      ],
      ["no password", at0("u", place, "/d"), `${address.replace(host, place)}/d`, /password/],
      ["no TLS there", `${url}?sslmode=require`, name, "TLS"],
    );
    stack.defer(() => assertEquals(new Set(server.passwords), new Set(["hush/pw", ""])));
  } else {
    cases.push(
      [
        "a wrong password",
        at0(`${user}:${SECRET}`, host, pathname),
        `${address}${pathname}`,
        "Access denied",
        "using password: YES",
      ],
      ["no password", at0(user, host, pathname), `${address}${pathname}`, "Access denied", "using password: NO"],
    );
  }
  for (const [what, url, name, ...says] of cases) {
    await t.step(what, async () => {
      const relay = ["relay", "--from", url, "--to", "stdout:", ...what === "nothing there" ? ["--drain"] : []];
      const start = performance.now();
      const ended = await Promise.all(
        [["status", "--store", url], ["init", "--store", url], relay].map((line) => at.run(line)),
      );
      assert(performance.now() - start < 10_000);
      for (const one of ended) {
        assertFailure(one, `Cannot open ${name}`, ...says);
        assert(!shows(one), one.stderr);
      }
    });
  }
  await t.step("whose user may not make tables", async () => {
    if (kind !== "postgres") return;
    const ran = await at.run(["init", "--store", at0(`${user}:right`, host, pathname)]);
    assertFailure(ran, `Cannot make the tables of ${name}`, "permission denied");
  });
});

// ------------------------------------------------------------------------------------------------------- the rest

Deno.test("secrets stay where they are: env:NAME, --print-config, and what is advised", async () => {
  await using target = new Target();
  await using shop = await place("postgres");
  const { at, url } = shop;
  const withSecret = url.replace(/\/\/[^@]*@/, (user) => `//${decodeURIComponent(user.slice(2, -1)).split(":")[0]}:hush@`);
  await at.ok(["enqueue", "--store", "env:DATABASE", "--topic", "t", "--value", "1", "--id", "1"], {
    env: { DATABASE: withSecret },
  });
  target.answer = () => new Response("why", { status: 422 });
  const ran = await at.run(["relay", "--from", `${withSecret}?pool=2`, "--to", target.url, "--drain"]);
  assertEquals(ran.code, 1);
  assertSays(ran.stdout, [`effects list --store 'postgres://***@`, "?pool=2'"]);
  assert(!shows(ran), ran.stdout);
  const config = await at.run([
    "relay",
    "--from",
    `${withSecret}?schema=s&listen-url=${url}`,
    "--to",
    "stdout:",
    "--print-config",
  ]);
  assertSays(config.stdout, ["schema=s&listen-url=***"]);
  assert(!shows(config), config.stdout);
  assertEquals(maskedUrl("mysql://u:hush@h:1/d?sslmode=require&x=hush"), "mysql://***@h:1/d?sslmode=require&x=***");
});

onEach("relays of a file: each with a database by another URL, which prune takes for the one that it is", async (kind) => {
  await using target = new Target();
  await using shop = await place(kind);
  const { at, url } = shop;
  const relays = {
    a: { from: url, to: target.url, topics: ["a"] },
    b: { from: `${url}?pool=2`, store: `${url}?pool=3&prefix=effectonce_`, to: target.url, topics: ["b"] },
  };
  await Deno.writeTextFile(at.path("effectonce.json"), JSON.stringify({ relays }));
  for (const topic of ["a", "b"]) await at.ok(["enqueue", "--store", url, "--topic", topic, "--value", "1", "--id", topic]);
  assertEquals((await at.run(["relay", "--config", "effectonce.json", "--drain"])).code, 0);
  assertEquals(target.keys().toSorted(), ["a", "b"]);
  const pruned = await at.json(["prune", "--config", "effectonce.json", "--older-than-ms", "0"]);
  assertEquals(pruned, { effects: 2, messages: 0 });
});

Deno.test("claims may be on another server than the outbox", async () => {
  await using target = new Target();
  await using outbox = await place("postgres");
  await using claims = await place("mysql");
  await outbox.insert(["m1", null, "1"], ["m2", null, "2"]);
  const ran = await outbox.at.run(outbox.relay(target.url, "--drain", "--store", claims.url));
  assertEquals([ran.code, target.keys().toSorted()], [0, ["m1", "m2"]]);
  assertEquals([(await outbox.status()).effects.done, (await claims.status()).effects.done], [0, 2]);
});

Deno.test("postgres: doctor tells what would lose or mix up messages", async () => {
  await using shop = await place("postgres");
  const { at, url, name } = shop;
  const database = new URL(url).pathname.slice(1);
  await shop.sql(`alter database ${database} set synchronous_commit = off`);
  await shop.sql(`alter database ${database} set default_transaction_isolation = 'serializable'`);
  await shop.sql("alter sequence effectonce_outbox_seq_seq cache 20");
  await shop.sql("alter table effectonce_effects set unlogged");
  await shop.sql("drop table effectonce_positions");
  const { code, stdout } = await at.run(["doctor", "--from", url, "--to", "stdout:"]);
  assertEquals(code, 1);
  assertSays(stdout, [
    `NO  ${name} commits durably: synchronous_commit = off`,
    `NO  ${name} has its tables: there is no "effectonce_positions"`,
    `NO  ${name} numbers messages as they are inserted: the sequence has CACHE 20: alter sequence`,
    "default_transaction_isolation = serializable",
  ]);
  await at.ok(["schema", "--store", "postgres:"]);
});

for (const kind of ["mysql", "mariadb"] as const) {
  Deno.test(`${kind}: doctor tells of a table without transactions`, async () => {
    await using shop = await place(kind);
    await shop.sql("alter table effectonce_relays engine = MyISAM");
    const { code, stdout } = await shop.at.run(["doctor", "--from", shop.url, "--to", "stdout:"]);
    assertEquals(code, 1);
    assertSays(stdout, [`NO  ${shop.name} has its tables: effectonce_relays is MyISAM`]);
  });
}

onEach("permissions: the sentence names what is missing, and that suffices", async (kind) => {
  await using shop = await place(kind);
  const { at, url, name } = shop;
  const { host } = new URL(url);
  const variables = kind === "postgres" ? ["--allow-env=PGBINARY,PGOPTIONS,PGREPLICATION"] : [];
  const flags = [`--allow-net=${host}`, ...variables];
  const line = ["status", "--store", url];
  assertFailure(await at.run(line, { deno: ["--no-prompt"] }), `Opening ${name} needs ${flags.join(" and ")}`);
  await at.ok(line, { deno: ["--no-prompt", ...flags] });
  const { username } = new URL(url);
  const anonymous = url.replace(`//${username}@`, "//");
  if (anonymous !== url) await at.ok(["status", "--store", anonymous], { env: { USER: username, PGUSER: "" } });
  const relay = shop.relay("stdout:", "--drain");
  assertEquals((await at.run(relay, { deno: ["--no-prompt", ...flags] })).code, 0);
});

Deno.test("help tells of the servers", async () => {
  await using at = await emptyBox();
  const [help, init] = await at.many([["help"], ["init", "--help"]]);
  assertSays(help!.stdout, ["postgres://", "mysql://", "mariadb://"]);
  assertMatch(init!.stdout, /--store URL .*postgres:.*mysql:.*\(required\)/);
});
