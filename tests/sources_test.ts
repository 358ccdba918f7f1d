/** The requirements of sources and atomic sinks, on memory, SQLite by both drivers and a file; then what is SQLite's own. */
import { renames } from "./servers/renames.ts";
import { assert, assertEquals, assertRejects, assertThrows } from "@std/assert";
import BetterSqlite3 from "better-sqlite3";
import { DatabaseSync } from "node:sqlite";
import { fileSink, parseLine } from "../adapters/file.ts";
import {
  migrateSqlite,
  type SqliteClient,
  sqliteOutbox,
  type SqliteOutboxOptions,
  sqliteStore,
  type SqliteValue,
} from "../adapters/sqlite.ts";
import { atomicSinkCases, type AtomicSinkHarness, sourceCases, type SourceHarness } from "../conformance.ts";
import { createMessage, handler, type NewMessage, relay, type SourceOptions } from "../mod.ts";
import { memorySink } from "../adapters/memory.ts";
import { memory, refused } from "./runtime/suite.ts";
import { type Client, type Driver, sqliteEnds } from "./runtime/suite_sqlite.ts";

/** No wait of the driver's own: it would block the thread, and with it the transaction that it waits for. */
const drivers: Readonly<Record<string, Driver>> = {
  "better-sqlite3": (path) => new BetterSqlite3(path, { timeout: 0 }) as Client,
  "node:sqlite": (path) => new DatabaseSync(path) as unknown as Client,
};

async function temporary() {
  const folder = await Deno.makeTempDir({ prefix: "effectonce-sources-" });
  const clients: Client[] = [];
  return {
    folder,
    open(driver: Driver): Client {
      const client = driver(`${folder}/app.db`);
      clients.push(client);
      return client;
    },
    async close() {
      for (const client of clients) client.close();
      await Deno.remove(folder, { recursive: true });
    },
  };
}

// ---------------------------------------------------------------------------------------------------------------- sources

const sources: Readonly<Record<string, SourceHarness>> = {
  memoryOutbox: memory.source,
  ...Object.fromEntries(
    Object.entries(drivers).map(([name, driver]) => [`sqliteOutbox ${name}`, sqliteEnds(driver).source]),
  ),
  "sqliteOutbox that keeps node:sqlite": sqliteEnds(drivers["node:sqlite"]!, { keep: true }).source,
};

for (const [name, harness] of Object.entries(sources)) {
  for (const { name: requirement, run } of sourceCases) {
    const reason = harness.skip?.[requirement];
    Deno.test({
      name: `${name} ${requirement}${reason ? ` (skipped: ${reason})` : ""}`,
      ignore: reason !== undefined,
      fn: () => run(harness),
    });
  }
}

// ----------------------------------------------------------------------------------------------------------- atomic sinks

const sinks: Readonly<Record<string, AtomicSinkHarness>> = {
  "handler on memoryStore": memory.sink,
  ...Object.fromEntries(
    Object.entries(drivers).map(([name, driver]) => [`handler on sqliteStore ${name}`, sqliteEnds(driver).sink]),
  ),
  fileSink: {
    async open() {
      const files = await temporary();
      const path = `${files.folder}/out.jsonl`;
      return {
        sink: fileSink(path),
        again: () => fileSink(path),
        async contents() {
          const text = await Deno.readTextFile(path).catch(() => "");
          return text.split("\n").flatMap((line) => parseLine(line)?.id ?? []);
        },
        refused: (id) => createMessage({ ...refused(id), time: new Date(NaN) }),
        close: files.close,
      };
    },
  },
};

/** The consumer that was paused commits too late: an acceptance test of the correctness notes. */
const zombie = "a second owner goes on where the first stopped, and fences it";

for (const [name, harness] of Object.entries(sinks)) {
  for (const { name: requirement, run } of atomicSinkCases) {
    const reason = harness.skip?.[requirement];
    const number = name.includes("sqlite") && requirement === zombie ? " (acceptance 20)" : "";
    Deno.test({
      name: `${name} ${requirement}${number}${reason ? ` (skipped: ${reason})` : ""}`,
      ignore: reason !== undefined,
      fn: () => run(harness),
    });
  }
}

Deno.test("every skipped requirement of a source is a case", () => {
  const names = new Set(sourceCases.map(({ name }) => name));
  const skipped = Object.values(sources).flatMap(({ skip }) => Object.keys(skip ?? {}));
  assertEquals(skipped.filter((name) => !names.has(name)), []);
});

// ----------------------------------------------------------------------------------------------------------------- SQLite

/** One test for each driver, on a fresh file with tables. */
function sqliteTest(name: string, run: (open: () => Client) => Promise<void>): void {
  for (const [of, driver] of Object.entries(drivers)) {
    Deno.test(`sqliteOutbox ${of} ${name}`, async () => {
      const files = await temporary();
      try {
        await migrateSqlite(files.open(driver));
        await run(() => files.open(driver));
      } finally {
        await files.close();
      }
    });
  }
}

const RELAY: SourceOptions = { relay: "relay", protocol: "claimed", onPark: "block", leaseMs: 60_000 };
const SEALED: SourceOptions = { ...RELAY, protocol: "sealed" };
const ALL = { rows: 100, bytes: 1_000_000 };
const KEY_OF = /^\d*([a-z])/;
const note = (id: string): NewMessage => ({ id, topic: "orders", key: KEY_OF.exec(id)?.[1] ?? null, value: id });
const enqueue = (client: Client, ...ids: readonly string[]) =>
  sqliteStore(client).transaction((effects) => effects.enqueue(...ids.map(note)));
const all = (client: Client, sql: string, ...values: SqliteValue[]): Record<string, SqliteValue>[] =>
  client.prepare(sql).all(...values).map((row) => ({ ...row as Record<string, SqliteValue> }));

sqliteTest("takes rows that a plain INSERT of topic, key and value made", async (open) => {
  const [application, client] = [open(), open()];
  application.exec(`insert into effectonce_outbox (topic, key, value) values ('orders', 'order-1', '{"amount":5}')`);
  application.exec(
    `insert into effectonce_outbox (topic, key, value, headers) values ('orders', null, x'00ff', '{"a":"b"}')`,
  );
  application.exec(`insert into effectonce_outbox (topic) values ('orders')`);
  application.exec(`insert into effectonce_outbox (topic, value) values ('numbers', 7)`);
  const to = memorySink();
  await relay({ from: sqliteOutbox(client), to, store: sqliteStore(client), drain: true, lanes: 1 });
  const got = to.messages.map(({ topic, key, value, headers }) => [topic, key, value, headers]);
  assertEquals(got, [
    ["orders", "order-1", new TextEncoder().encode('{"amount":5}'), {}],
    ["orders", null, new Uint8Array([0, 255]), { a: "b" }],
    ["orders", null, null, {}],
    ["numbers", null, new TextEncoder().encode("7"), {}],
  ]);
  assertEquals(to.messages[0]?.json(), { amount: 5 });
  for (const { id, time } of to.messages) {
    assert(/^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$/.test(id), id);
    assert(Math.abs(time.getTime() - Date.now()) < 60_000, String(time));
  }
  assertEquals(new Set(to.messages.map(({ id }) => id)).size, 4);
  assertEquals(all(client, "select * from effectonce_outbox"), []);
});

sqliteTest("refuses rows that no relay could use", (open) => {
  const client = open();
  const long = "'" + "x".repeat(1025) + "'";
  for (
    const row of ["'', 't', 'k'", "'i', '', 'k'", "'i', 't', ''", "'i', null, 'k'", `${long}, 't', 'k'`, `'i', ${long}, 'k'`]
  ) {
    assertThrows(() => client.exec(`insert into effectonce_outbox (id, topic, key) values (${row})`), Error, "constraint");
  }
  for (
    const row of [`'i', 't', ${long}`, "'i' || char(0), 't', 'k'", "'i', 't' || char(0), 'k'", "'i', 't', 'k' || char(0)"]
  ) {
    assertThrows(() => client.exec(`insert into effectonce_outbox (id, topic, key) values (${row})`), Error, "constraint");
  }
  for (const headers of ["", "[]", "{", "1"]) {
    const insert = client.prepare("insert into effectonce_outbox (topic, headers) values ('t', ?)");
    assertThrows(() => insert.run(headers), Error, "constraint");
  }
  return Promise.resolve();
});

sqliteTest("does not stop at a row whose value is a whole number over 2^53", async (open) => {
  const client = open();
  await enqueue(client, "a1");
  client.exec("insert into effectonce_outbox (id, topic, value) values ('large', 'orders', 9007199254740993)");
  await enqueue(client, "b1");
  const to = memorySink();
  await relay({ from: sqliteOutbox(client), to, store: sqliteStore(client), drain: true, lanes: 1 });
  const got = to.messages.map(({ id, value }) => [id, new TextDecoder().decode(value ?? undefined)]);
  assertEquals(got, [["a1", "a1"], ["large", "9007199254740993"], ["b1", "b1"]]);
});

sqliteTest("handles numbers of rows over 2^53", async (open) => {
  const client = open();
  for (const seq of ["9007199254740992", "9007199254740993", "9007199254740995"]) {
    client.exec(`insert into effectonce_outbox (seq, id, topic, key) values (${seq}, 'm${seq}', 'orders', 'k')`);
  }
  const session = await sqliteOutbox(client).open(SEALED);
  const { batches: [batch] } = await session.seal([], { ...ALL, rows: 2 });
  assertEquals(batch?.rows, [["9007199254740992", "m9007199254740992"], ["9007199254740993", "m9007199254740993"]]);
  const { messages, ...position } = batch!;
  assertEquals(messages.length, 2);
  const { batches: [next] } = await session.seal([position], ALL);
  assertEquals(next?.rows, [["9007199254740995", "m9007199254740995"]]);
});

sqliteTest("refuses a connection on which the application's own transaction is open", async (open) => {
  const client = open();
  await enqueue(client, "a1");
  for (const make of [open, () => client]) {
    const connection = make();
    const outbox = sqliteOutbox(connection);
    connection.exec("begin");
    connection.exec("insert into effectonce_outbox (id, topic) values ('not committed', 'orders')");
    for (const use of [() => outbox.open(RELAY), () => outbox.status(), () => outbox.release("a1")]) {
      const error = await assertRejects(use);
      assertEquals((error as { code?: string }).code, "source_invalid", error.message);
    }
    const relaying = () => relay({ from: outbox, to: memorySink(), store: sqliteStore(connection), drain: true });
    assertEquals((await assertRejects(relaying) as { code?: string }).code, "source_invalid");
    connection.exec("rollback"); // It is still the application's.
    assertEquals((await outbox.status()).pending, 1);
  }
});

sqliteTest("never uses a number again, so a new row is published after all were deleted (acceptance 25)", async (open) => {
  const content: string[] = [];
  const run = async (client: Client) => {
    const store = sqliteStore(client);
    const to = handler(store, ({ id }) => Promise.resolve(void content.push(id)));
    await relay({ from: sqliteOutbox(client), to, drain: true });
  };
  const first = open();
  await enqueue(first, "a1", "b1", "a2");
  const before = Number(all(first, "select max(seq) as seq from effectonce_outbox")[0]?.seq);
  await run(first);
  assertEquals(all(first, "select * from effectonce_outbox"), []);
  const second = open(); // As after a restart.
  await enqueue(second, "a3");
  const [row] = all(second, "select seq from effectonce_outbox");
  assert(Number(row?.seq) > before, `${row?.seq} after ${before}`);
  await run(second);
  assertEquals(content, ["a1", "b1", "a2", "a3"]);
  assertEquals(all(second, "select * from effectonce_outbox"), []);
});

sqliteTest("hands out a sealed batch without the rows that a person deleted, and goes on behind it", async (open) => {
  const client = open();
  await enqueue(client, "a1", "b1", "c1");
  const session = await sqliteOutbox(client).open(SEALED);
  const { batches: [batch] } = await session.seal([], { ...ALL, rows: 2 });
  await session.close(false);
  client.exec("delete from effectonce_outbox where id in ('a1', 'b1')");
  const content: string[] = [];
  const to = handler(sqliteStore(client), ({ id }) => Promise.resolve(void content.push(id)));
  const heir = await sqliteOutbox(client).open(SEALED);
  const { batches: [again] } = await heir.seal([], ALL);
  assertEquals([again?.uid, again?.messages], [batch?.uid, []]);
  await heir.close(false);
  await relay({ name: "relay", from: sqliteOutbox(client), to, drain: true });
  assertEquals(content, ["c1"]);
  assertEquals((await sqliteStore(client).positions({ relay: "relay", source: heir.id })).map(({ n }) => n), [1, 2]);
});

sqliteTest("delivers what is behind a message that the handler refuses, for good or for a while", async (open) => {
  const client = open();
  await enqueue(client, "a1", "a2", "b1", "c1");
  const content: string[] = [];
  const to = handler(sqliteStore(client), async ({ id }, effects) => {
    if (id === "a1") throw new Error("bug");
    await effects.enqueue({ topic: "copies", value: id });
    content.push(id);
  });
  const report = await relay({
    from: sqliteOutbox(client, { topics: ["orders"] }),
    ...{ to, drain: true, attempts: 3, minRetryMs: 1, maxRetryMs: 5 },
  });
  assertEquals(report, { delivered: 2, parked: 1, uncertain: 0 });
  assertEquals(all(client, "select value from effectonce_outbox where topic = 'copies' order by seq").length, 2);
  assertEquals(
    all(client, "select id, state from effectonce_outbox where topic = 'orders' order by seq").map(({ id }) => id),
    [
      "a1",
      "a2",
    ],
  );
  assertEquals(content.slice(-2), ["b1", "c1"]);
});

sqliteTest("refuses another protocol while messages are under way by the first", async (open) => {
  const client = open();
  await enqueue(client, "a1");
  const session = await sqliteOutbox(client).open(SEALED);
  const refused = async () => {
    const error = await assertRejects(() => sqliteOutbox(client).open(RELAY));
    assertEquals((error as { code?: string }).code, "source_invalid");
  };
  await refused();
  await session.seal([], ALL);
  await session.close(true); // It leaves a sealed batch behind, whatever it says.
  await refused();
  const heir = await sqliteOutbox(client).open(SEALED);
  const { batches: [batch] } = await heir.seal([], ALL);
  const { messages: _, ...position } = batch!;
  await heir.seal([position], ALL);
  await heir.close(true);
  await (await sqliteOutbox(client).open(RELAY)).close(true);
});

sqliteTest("tells which relays there are, and gives up the name of one that has ended", async (open) => {
  let now = Date.now();
  const client = open();
  const outbox = sqliteOutbox(client, { now: () => now });
  assertEquals(await outbox.relays(), []);
  const sealing = await sqliteOutbox(client, { now: () => now, topics: ["orders"] }).open({ ...SEALED, relay: "archive" });
  await sqliteOutbox(client, { now: () => now, topics: ["mail", "sms"] }).open({ ...RELAY, relay: "mail" });
  await enqueue(client, "a1", "a2", "b1");
  await sealing.seal([], { ...ALL, rows: 2 });
  const archive = { relay: "archive", protocol: "sealed", topics: ["orders"], live: true, sealed: 2 } as const;
  const mail = { relay: "mail", protocol: "claimed", topics: ["mail", "sms"], live: true, sealed: 0 } as const;
  assertEquals(await outbox.relays(), [archive, mail]);
  const error = await assertRejects(
    () => outbox.forget("archive"),
    Error,
    `Cannot forget relay "archive" of sqlite: it runs`,
  );
  assertEquals((error as { code?: string }).code, "busy");
  assertEquals(await outbox.forget("none"), false);

  now += 60_000; // Both have died.
  assertEquals(await outbox.relays(), [{ ...archive, live: false }], "of mail nothing is left");
  const other = () => outbox.open({ ...RELAY, relay: "other" });
  await assertRejects(other, Error, `relay "archive" has them`);
  assertEquals(await outbox.forget("archive"), true);
  assertEquals([await outbox.relays(), await outbox.forget("archive")], [[], false]);
  const { messages } = await (await other()).read(ALL);
  assertEquals(messages.map(({ id }) => id), ["a1", "a2", "b1"], "what was sealed is pending");
  assertEquals((await outbox.relays()).map(({ relay, live }) => [relay, live]), [["other", true]]);
});

sqliteTest(
  "renames a relay that has ended, with what it sealed; not one that runs or claims, nor to a name that is known",
  async (open) => {
    let now = Date.now();
    const client = open();
    const outbox = sqliteOutbox(client, { now: () => now });
    await renames(outbox, () => now += 60_000, (...ids) => enqueue(client, ...ids));
  },
);

sqliteTest("goes on under a name that was given up, behind what its sink has", async (open) => {
  let now = Date.now();
  const client = open();
  const content: string[] = [];
  const outbox = sqliteOutbox(client, { now: () => now });
  const to = handler(sqliteStore(client), ({ id }) => Promise.resolve(void content.push(id)));
  await enqueue(client, "a1");
  await relay({ name: "relay", from: outbox, to, drain: true });
  await enqueue(client, "a2", "b1");
  await (await outbox.open(SEALED)).seal([], ALL).catch(() => {});
  const dead = await outbox.open(SEALED);
  const ring = await sqliteStore(client).positions({ relay: "relay", source: dead.id });
  await dead.seal(ring, { ...ALL, rows: 1 });
  now += 120_000;
  assertEquals(await outbox.forget("relay"), true);
  await relay({ name: "relay", from: outbox, to, drain: true });
  assertEquals([content, (await outbox.status()).pending], [["a1", "a2", "b1"], 0]);
});

sqliteTest("tells operators how messages stand, and lets them decide", async (open) => {
  let now = Date.now();
  const client = open();
  const outbox = sqliteOutbox(client, { now: () => now });
  assertEquals(await outbox.status(), { pending: 0, heldBack: 0, parked: 0, oldestMs: null });
  await enqueue(client, "a1", "a2", "b1", "c1", "d1");
  const session = await outbox.open(RELAY);
  const { messages } = await session.read(ALL);
  now += 60_000;
  await session.park([
    { message: messages[0]!, reason: "declined", retryMs: null },
    { message: messages[2]!, reason: "busy", retryMs: 60_000 },
    { message: messages[3]!, reason: "gone", retryMs: null },
  ]);
  await session.read(ALL);
  const { pending, heldBack, parked, oldestMs } = await outbox.status();
  assertEquals([pending, heldBack, parked], [3, 1, 2]);
  assert(oldestMs !== null && oldestMs >= 50_000 && oldestMs < 120_000, String(oldestMs));
  const found = await outbox.parked();
  assertEquals(found.map(({ id, topic, key, reason }) => [id, topic, key, reason]), [
    ["a1", "orders", "a", "declined"],
    ["c1", "orders", "c", "gone"],
  ]);
  assertEquals(found[0]?.since.getTime(), now);
  assertEquals((await outbox.parked(1)).length, 1);
  assertEquals({ ...await outbox.find("c1") }, { id: "c1", topic: "orders", key: "c", state: "parked", reason: "gone" });
  assertEquals((await outbox.find("b1"))?.state, "waiting");
  assertEquals((await outbox.find("a2"))?.state, "blocked");
  assertEquals(await outbox.find("missing"), undefined);
  assertEquals([await outbox.release("a1"), await outbox.discard("c1")], [true, true]);
  assertEquals(await outbox.status().then(({ pending, parked }) => [pending, parked]), [4, 0]);
});

sqliteTest("keeps delivered rows, marked, until they are pruned in bounded batches", async (open) => {
  let now = Date.now();
  const client = open();
  const options = { now: () => now, keep: true };
  const outbox = sqliteOutbox(client, options);
  const ids = Array.from({ length: 25 }, (_, i) => `a${i}`);
  await enqueue(client, ...ids, "b1");
  const session = await outbox.open(RELAY);
  const { messages } = await session.read(ALL);
  await session.settle(messages.slice(0, 25));
  assertEquals((await session.read(ALL)).messages.map(({ id }) => id), ["b1"]);
  assertEquals(await outbox.prune({ olderThanMs: 60_000 }), 0);
  now += 120_000;
  const counts = [];
  for (let i = 0; i < 4; i++) counts.push(await outbox.prune({ olderThanMs: 60_000, limit: 10 }));
  assertEquals(counts, [10, 10, 5, 0]);
  assertEquals(all(client, "select id from effectonce_outbox"), [{ id: "b1" }]);
});

sqliteTest("holds nothing back by rows that are gone", async (open) => {
  const client = open();
  await enqueue(client, "a1", "a2", "a3");
  const outbox = sqliteOutbox(client);
  const session = await outbox.open(RELAY);
  await session.park([{ message: (await session.read(ALL)).messages[0]!, reason: "declined", retryMs: null }]);
  assertEquals((await session.read(ALL)).messages, []);
  await session.close(false);
  client.exec("delete from effectonce_outbox where id = 'a1'");
  const heir = await outbox.open(RELAY);
  assertEquals((await heir.read(ALL)).messages.map(({ id }) => id), ["a2", "a3"]);
});

// What follows looks at the statements themselves.

const READ = /^\s*(select|update|delete)\b/i;

/** A client that notes the statements it is given, and counts the rows that they hand out. */
function recording(client: Client) {
  const statements = new Set<string>();
  const seen = { rows: 0 };
  const recorder: SqliteClient = {
    prepare(sql) {
      statements.add(sql);
      const statement = client.prepare(sql);
      return {
        run: (...values) => statement.run(...values),
        get: (...values) => statement.get(...values),
        all(...values) {
          const rows = statement.all(...values);
          seen.rows += rows.length;
          return rows;
        },
        *iterate(...values) {
          for (const row of statement.iterate(...values)) {
            seen.rows++;
            yield row;
          }
        },
      };
    },
  };
  return { client: recorder, statements, seen };
}

/** Uses all that a relay and operators use of an outbox. */
async function exercise(client: SqliteClient, options: SqliteOutboxOptions, onPark: "block" | "skip"): Promise<void> {
  const outbox = sqliteOutbox(client, options);
  const store = sqliteStore(client);
  await store.transaction((effects) => effects.enqueue(...["a1", "a2", "b1", "b2", "c1", "d1", "e1"].map(note)));
  const session = await outbox.open({ ...RELAY, onPark });
  const [first, second, third] = (await session.read({ ...ALL, rows: 3 })).messages;
  await session.park([{ message: first!, reason: "", retryMs: null }, { message: second!, reason: "", retryMs: 0 }]);
  await session.park([{ message: third!, reason: "", retryMs: 3_600_000 }]);
  await session.read(ALL);
  await session.settle((await session.read(ALL)).messages.slice(0, 1));
  await session.renew();
  await outbox.status();
  await outbox.parked();
  await outbox.release(first!.id);
  await session.park([{ message: first!, reason: "", retryMs: null }]);
  await outbox.find(first!.id);
  await outbox.discard(first!.id);
  await outbox.prune({ olderThanMs: 0 });
  await session.close(true);
  client.prepare("delete from effectonce_relays").run();
  const sealing = await outbox.open({ ...SEALED, onPark });
  const { batches: [batch] } = await sealing.seal([], ALL);
  const { messages: _, ...position } = batch!;
  await sealing.seal([position], ALL);
  await sealing.unseal([position], []);
  client.prepare("delete from effectonce_relays").run();
  client.prepare("delete from effectonce_outbox").run();
  client.prepare("delete from effectonce_shards").run();
}

/** What no statement may do: visit all rows of a table. Counting them is for people, and reads an index alone. */
function visitsAll(sql: string, plan: readonly string[]): readonly string[] {
  const counts = /count\(\*\)/.test(sql);
  return plan.filter((step) => {
    if (!/^(SCAN|SEARCH) (effectonce_outbox|effectonce_effects|o|h)\b/.test(step)) return false;
    if (/^SCAN/.test(step)) {
      // In the order of an index, of which only the beginning is read; or to count.
      return !/USING (COVERING )?INDEX effectonce_outbox_(pending|held|blocked)$/.test(step) ||
        !(counts || /\blimit\b/.test(sql));
    }
    return !/ USING /.test(step); // From row to row, until one fits.
  });
}

Deno.test("sqliteOutbox finds rows by indexes, whatever their number", async (test) => {
  const db = drivers["node:sqlite"]!(":memory:");
  const { client, statements } = recording(db);
  await migrateSqlite(client);
  statements.clear();
  for (const topics of [undefined, ["orders"], ["orders", "mail"]]) {
    for (const keep of [false, true]) {
      for (const onPark of ["block", "skip"] as const) await exercise(client, { topics, keep }, onPark);
    }
  }
  const used = [...statements].filter((sql) => READ.test(sql) && /effectonce_outbox/.test(sql))
    .filter((sql) => sql !== "delete from effectonce_outbox");
  const plans = used.map((sql) => [sql, all(db, `explain query plan ${sql}`).map(({ detail }) => String(detail))] as const);
  assert(plans.length > 30, String(plans.length));
  const planned = (pattern: RegExp) => {
    const found = plans.filter(([sql]) => pattern.test(sql));
    assert(found.length > 0, String(pattern));
    return found.map(([, plan]) => plan.join("\n"));
  };
  for (const [sql, plan] of plans) {
    const name = `${sql.replaceAll(/\s+/g, " ").slice(0, 150)} (${plans.findIndex(([each]) => each === sql)})`;
    await test.step(name, () => assertEquals(visitsAll(sql, plan), [], plan.join("\n")));
  }
  await test.step("the messages to read, by their own index", () => {
    for (const plan of planned(/^select cast\(o\.seq as text\)(?!.*topic in).*order by o\.seq limit/s)) {
      assert(plan.startsWith("SCAN o USING INDEX effectonce_outbox_pending"), plan);
    }
    for (const plan of planned(/^select \* from .*and topic = .orders. order by o\.seq limit/s)) {
      assert(plan.includes("SEARCH o USING INDEX effectonce_outbox_topic (topic=?)"), plan);
    }
  });
  await test.step("those that waited long enough, and those that were delivered, by time", () => {
    for (const plan of planned(/state = 'waiting' (and until_ms <= \?|order by until_ms)/)) {
      assert(/INDEX effectonce_outbox_until \(state=\?/.test(plan), plan);
    }
    for (const plan of planned(/state = 'delivered' and until_ms <= \?/)) {
      assert(/INDEX effectonce_outbox_until \(state=\? AND until_ms<\?\)/.test(plan), plan);
    }
  });
  db.close();
});

/** Fills the outbox by SQL; a key of `k` is one for all, else each row has its own. */
function fill(client: Client, count: number, state: string, key: string, topic = "orders"): void {
  client.prepare(`with recursive n (i) as (select 1 union all select i + 1 from n where i < ?)
    insert into effectonce_outbox (id, topic, key, value, state)
    select ? || i, ?, case ? when 'k' then 'k' else ? || i end, 'x', ? from n`)
    .run(count, `${state}-${key}-${topic}-`, topic, key, key, state);
}

/** How long the reads of a relay take, and how many rows they hand out, with so many rows that are not to be delivered. */
async function readAmong(count: number, topics?: readonly string[]) {
  const db = drivers["node:sqlite"]!(":memory:");
  const { client, seen } = recording(db);
  await migrateSqlite(client);
  fill(db, 1, "parked", "k");
  if (count > 0) {
    fill(db, count, "blocked", "k");
    fill(db, count, "parked", "p");
    fill(db, count, "delivered", "d");
  }
  fill(db, 20, "pending", "q");
  const session = await sqliteOutbox(client, { topics, keep: true }).open(RELAY);
  seen.rows = 0;
  const ids = [];
  let ms = Infinity;
  for (let i = 0; i < 5; i++) {
    const start = performance.now();
    const { messages } = await session.read({ rows: 10, bytes: 1_000_000 });
    await session.settle(messages.slice(0, 1));
    ms = Math.min(ms, performance.now() - start);
    ids.push(messages[0]?.id, messages.length);
  }
  db.close();
  return { ms, rows: seen.rows, ids };
}

for (const topics of [undefined, ["orders", "mail"]]) {
  const of = topics ? "two topics" : "all topics";
  Deno.test(`sqliteOutbox hands out as few rows of ${of} among 60,000 parked, blocked and delivered ones as among none`, async () => {
    const [few, many] = [await readAmong(0, topics), await readAmong(20_000, topics)];
    assertEquals(many.ids, few.ids);
    assert(many.rows <= few.rows, `${many.rows} rows instead of ${few.rows}`);
  });
  Deno.test({
    name: `sqliteOutbox reads ${of} among 3,000,000 parked, blocked and delivered rows as fast as among none`,
    ignore: Deno.env.get("EFFECTONCE_LONG") !== "1",
    async fn() {
      const [few, many] = [await readAmong(0, topics), await readAmong(1_000_000, topics)];
      assertEquals(many.ids, few.ids);
      assert(many.ms < few.ms * 10 + 5, `${many.ms} ms instead of ${few.ms} ms`);
    },
  });
}

/** How long the fastest of three runs takes. */
async function timed(run: (i: number) => Promise<unknown>): Promise<number> {
  let best = Infinity;
  for (let i = 0; i < 3; i++) {
    const start = performance.now();
    await run(i);
    best = Math.min(best, performance.now() - start);
  }
  return best;
}

/** Fails if something takes longer by the number of rows: a few milliseconds are the clock's. */
async function assertFlat(measure: (count: number) => Promise<number>, few: number, many: number): Promise<void> {
  const [short, long] = [await measure(few), await measure(many)];
  assert(long < 4 * short + 5, `It took ${long} ms with ${many} rows, and ${short} ms with ${few}`);
}

async function readPastParked(count: number): Promise<number> {
  const db = drivers["node:sqlite"]!(":memory:");
  await migrateSqlite(db);
  fill(db, count, "parked", "k");
  fill(db, 200, "pending", "k");
  const session = await sqliteOutbox(db).open({ ...RELAY, onPark: "skip" });
  const ms = await timed(async () => assertEquals((await session.read(ALL)).messages.length, 100));
  db.close();
  return ms;
}

Deno.test("sqliteOutbox reads past parked messages of the same key, where onPark is skip, as fast among 50,000 as among 100", () =>
  assertFlat(readPastParked, 100, 50_000));

async function settleBefore(count: number): Promise<number> {
  const db = drivers["node:sqlite"]!(":memory:");
  await migrateSqlite(db);
  fill(db, 10, "pending", "k");
  fill(db, count, "blocked", "k");
  const session = await sqliteOutbox(db).open(RELAY);
  const { messages } = await session.read({ ...ALL, rows: 10 });
  const ms = await timed((i) => session.settle([messages[i]!]));
  db.close();
  return ms;
}

Deno.test("sqliteOutbox settles before messages of the same key that are held back as fast among 200,000 as among 100", () =>
  assertFlat(settleBefore, 100, 200_000));

async function statusAmong(count: number): Promise<number> {
  const db = drivers["node:sqlite"]!(":memory:");
  await migrateSqlite(db);
  fill(db, count, "delivered", "d");
  fill(db, 10, "pending", "q");
  const outbox = sqliteOutbox(db, { keep: true });
  const ms = await timed(async () => assertEquals((await outbox.status()).pending, 10));
  db.close();
  return ms;
}

Deno.test("sqliteOutbox tells its status as fast among 200,000 delivered rows that are kept as among 100", () =>
  assertFlat(statusAmong, 100, 200_000));
