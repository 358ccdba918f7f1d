/** What the outboxes on PostgreSQL, MariaDB and MySQL promise beyond the requirements of all sources. */
import { renames } from "./servers/renames.ts";
import { assert, assertEquals, assertMatch, assertRejects } from "@std/assert";
// @ts-types="@types/pg"
import pg from "pg";
import {
  EffectError,
  type EffectStore,
  handler,
  type Message,
  type NewMessage,
  rejected,
  relay,
  type RelayReport,
  type SourceOptions,
} from "@effectonce/effectonce";
import { memorySink } from "@effectonce/effectonce/memory";
import { migratePostgres, postgresOutbox, type PostgresPool, postgresStore } from "@effectonce/effectonce/postgres";
import {
  ALL,
  eachServer,
  exercise,
  MYSQLS,
  type Options,
  placed,
  type Pool,
  type ServerDatabase,
  servers,
  until,
} from "./servers/each.ts";

const RELAY: SourceOptions = { relay: "relay", protocol: "claimed", onPark: "block", leaseMs: 60_000 };
const LIMITS = { rows: 1_000, bytes: 100_000_000 };
const BYTES = Uint8Array.from({ length: 256 }, (_, i) => i);
const range = (count: number): number[] => Array.from({ length: count }, (_, i) => i);
const plain = (bytes: Uint8Array | null): Uint8Array | null => bytes && new Uint8Array(bytes);
const count = async (db: ServerDatabase, table: string, where = "true"): Promise<number> =>
  Number((await db.sql(placed(db, `select count(*) as n from ${table} where ${where}`)))[0]!["n"]);
const enqueue = (store: EffectStore<never>, ...messages: readonly NewMessage[]): Promise<void> =>
  store.transaction((effects) => effects.enqueue(...messages));
async function readAll(db: ServerDatabase, pool: Pool, options?: Options): Promise<readonly Message[]> {
  const session = await db.outbox(pool, options).open(RELAY);
  const { messages } = await session.read(LIMITS);
  await session.close(true);
  return messages;
}
const byKey = (messages: readonly Pick<Message, "id" | "key">[], key: string | null): string[] =>
  messages.filter((message) => message.key === key).map(({ id }) => id);

// ------------------------------------------------------------------------------------------- rows that others have inserted

eachServer("takes rows that a plain INSERT made, of text and of bytes", async (db, pool) => {
  const text = (json: string) => db.postgres ? `convert_to('${json}', 'UTF8')` : `'${json}'`;
  const bytes = (hex: string) => db.postgres ? `decode('${hex}', 'hex')` : `x'${hex}'`;
  const insert = (columns: string, values: string) =>
    db.sql(`${placed(db, `insert into effectonce_outbox (${columns})`)} values (${values})`);
  await insert(`topic, "key", value`, `'orders', 'order-1', ${text('{"to":"Zoë 😀"}')}`);
  await insert(`topic, "key", value, headers`, `'orders', null, ${bytes("00ff27")}, '{"a":"ß"}'`);
  await insert("topic", "'orders'");
  await insert(`id, topic, "key", value`, `'mine', 'orders', 'ß"?', ''`);
  await insert("id, topic, headers", `'numbers', 't', '{"n":1,"f":1.5,"t":true,"o":{"a":[1]},"z":null,"s":""}'`);
  const connection = await db.connect(pool); // As an application's own prepared statement.
  const sql = placed(db, `insert into effectonce_outbox (id, topic, "key", value, headers) values (?, ?, ?, ?, ?)`);
  const json = { a: "b" };
  await connection.sql(sql, ["bound", "orders", "k", Buffer.from(BYTES), JSON.stringify(json)]);
  connection.release();
  const to = memorySink();
  await relay({ from: db.outbox(pool), to, store: db.store(pool), drain: true, lanes: 1 });
  const utf8 = new TextEncoder();
  assertEquals(to.messages.map(({ topic, key, value, headers }) => [topic, key, plain(value), headers]), [
    ["orders", "order-1", utf8.encode('{"to":"Zoë 😀"}'), {}],
    ["orders", null, new Uint8Array([0, 255, 39]), { a: "ß" }],
    ["orders", null, null, {}],
    ["orders", `ß"?`, new Uint8Array(), {}],
    ["t", null, null, { n: "1", f: "1.5", t: "true", o: '{"a":[1]}', z: "null", s: "" }],
    ["orders", "k", BYTES, json],
  ]);
  assertEquals(to.messages[0]?.json(), { to: "Zoë 😀" });
  for (const { id, time } of to.messages.slice(0, 3)) {
    assertMatch(id, /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/);
    assert(Math.abs(time.getTime() - Date.now()) < 60_000, String(time));
  }
  assertEquals(new Set(to.messages.map(({ id }) => id)).size, 6);
  assertEquals(await count(db, "effectonce_outbox"), 0);
});

eachServer("refuses rows that no relay could use, in every sql_mode", async (db) => {
  const longest = db.postgres ? 1024 : 255;
  const long = (extra: number, end = "x") => `'${"x".repeat(longest - 1 + extra)}${end}'`;
  const bad = [
    ...["'', 't', 'k', '{}'", "'i', '', 'k', '{}'", "'i', 't', '', '{}'", "'i', null, 'k', '{}'"],
    ...[1, 2, 300].flatMap((extra) => [
      `${long(extra)}, 't', 'k', '{}'`,
      `'i', ${long(extra)}, 'k', '{}'`,
      `'i', 't', ${long(extra)}, '{}'`,
      `'i', 't', ${long(extra, " ")}, '{}'`, // Which MySQL cuts without a word.
    ]),
    ...["[]", "1", '"a"', "null", "{", ""].map((headers) => `'i', 't', 'k', '${headers}'`),
  ];
  const modes = db.postgres ? [{}] : [{}, { sql_mode: "''" }, { sql_mode: "'TRADITIONAL,NO_BACKSLASH_ESCAPES'" }];
  for (const session of modes) {
    const connection = await db.connect(db.pool({ max: 1, session }));
    for (const row of bad) {
      const insert = `${placed(db, 'insert into effectonce_outbox (id, topic, "key", headers)')} values (${row})`;
      const refused = await connection.sql(insert).then(() => false, () => true);
      assert(refused, `${JSON.stringify(session)} ${row}`);
    }
    const good = `${long(0)}, ${long(0)}, ${long(0, " ")}, '{}'`;
    await connection.sql(placed(db, `insert into effectonce_outbox (id, topic, "key", headers) values (${good})`));
    connection.release();
    const rows = await db.sql(placed(
      db,
      `select char_length(id) as i, char_length(topic) as t, char_length("key") as k
      from effectonce_outbox`,
    ));
    assertEquals(rows.map((row) => ({ ...row })), [{ i: longest, t: longest, k: longest }]);
    await db.sql("delete from effectonce_outbox");
  }
});

eachServer("refuses to enqueue what its columns have no room for, and cuts nothing (acceptance 14)", async (db) => {
  const longest = db.postgres ? 1024 : 255;
  for (const session of db.postgres ? [{}] : [{}, { sql_mode: "''" }]) {
    const pool = db.pool({ session });
    const store = db.store(pool);
    const [fits, long] = ["x".repeat(longest), "x".repeat(longest + 1)];
    for (const part of [{ id: long }, { topic: long }, { key: long }, { key: `${fits} ` }]) {
      const message = { id: "m", topic: "t", key: "k", value: 1, ...part };
      await assertRejects(() => enqueue(store, { topic: "t", value: 1 }, message), RangeError);
    }
    assertEquals(await count(db, "effectonce_outbox"), 0);
    // On MySQL characters are counted, not bytes.
    const wide = db.postgres ? "😀".repeat(256) : "😀".repeat(255);
    await enqueue(store, { id: fits, topic: fits, key: fits, value: 1 }, { id: wide, topic: wide, key: wide, value: 2 });
    const messages = await readAll(db, pool);
    assertEquals(messages.map(({ id, topic, key }) => [id, topic, key]), [[fits, fits, fits], [wide, wide, wide]]);
    await db.sql("delete from effectonce_outbox");
  }
});

const ALIKE = [
  ...[
    "Order-1",
    "order-1",
    "Order-1 ",
    "Order-1  ",
    " Order-1",
    "Örder-1",
    "O\u0308rder-1",
    "😀",
    "😁",
    "ß",
    "ss",
    "é",
    "e",
  ],
  ...["i", "ı", "İ", "\u00a0", "\u200b", "x".repeat(253), "x".repeat(253) + "y"],
];

eachServer("keeps ids, keys and topics apart that differ by case, accent or blanks (acceptance 14)", async (db, pool) => {
  const store = db.store(pool);
  await enqueue(store, ...ALIKE.map((id) => ({ id, topic: id, key: id, value: id })));
  await enqueue(store, ...ALIKE.map((id) => ({ id: `${id}2`, topic: id, key: id, value: id })));
  await assertRejects(() => enqueue(store, { id: "Order-1 ", topic: "t", value: 1 }), RangeError, `"Order-1 "`);
  const outbox = db.outbox(pool);
  const session = await outbox.open(RELAY);
  const { messages } = await session.read(LIMITS);
  assertEquals(messages.map(({ id }) => id), [...ALIKE, ...ALIKE.map((id) => `${id}2`)]);
  // One of them is parked, and holds back the other one of its key alone.
  await session.park([{ message: messages[0]!, reason: "no", retryMs: null }]);
  const others = (await session.read(LIMITS)).messages;
  assertEquals(others.map(({ id }) => id), [...ALIKE.slice(1), ...ALIKE.slice(1).map((id) => `${id}2`)]);
  await session.settle(others.filter(({ id }) => id !== "Order-1 "));
  assertEquals((await session.read(LIMITS)).messages.map(({ id }) => id), ["Order-1 "]);
  assertEquals(await outbox.discard("order-1"), false);
  assertEquals(await outbox.find("ORDER-1"), undefined);
  assertEquals((await outbox.find("Order-1"))?.state, "parked");
  assertEquals(await outbox.release("Order-1"), true);
  assertEquals((await session.read(LIMITS)).messages.map(({ id }) => id), ["Order-1", "Order-1 "]);
  await session.settle([messages[0]!]); // Which frees what it held back.
  assertEquals((await session.read(LIMITS)).messages.map(({ id }) => id), ["Order-1 ", "Order-12"]);
  await session.close(false);
});

const TOPICS = [
  "plain",
  "Plain",
  "plain ",
  "it's",
  "a''b",
  `say "hi"`,
  "a?b",
  "?",
  "$1",
  "a`b",
  "back\\slash",
  "\\'",
  "ß😀",
  "a;--",
  "%",
  "x,y",
];

eachServer("relays topics of any name, each alone", async (db, pool) => {
  const store = db.store(pool);
  await enqueue(store, ...TOPICS.map((topic, i) => ({ id: `m${i}`, topic, key: "k", value: topic })));
  const wrong: unknown[] = [];
  for (const [i, topic] of TOPICS.entries()) {
    for (const protocol of ["claimed", "sealed"]) {
      if (protocol === "sealed") await enqueue(store, { id: `m${i}`, topic, key: "k", value: topic });
      const got: string[] = [];
      const to = protocol === "claimed"
        ? memorySink({ deliver: ({ id }) => Promise.resolve(void got.push(id)).then(() => null) })
        : handler(store, ({ id }) => Promise.resolve(void got.push(id)));
      try {
        await relay({
          ...{ name: `r${i} ${protocol}`, from: db.outbox(pool, { topics: [topic], waitMs: 500 }), to, store },
          ...{ drain: true, signal: AbortSignal.timeout(2_000) },
        });
        if (got.join() !== `m${i}`) wrong.push([topic, protocol, got]);
      } catch (error) {
        wrong.push([topic, protocol, String(error).slice(0, 80)]);
      }
      await db.sql(placed(db, `delete from effectonce_outbox where id = 'm${i}'`));
    }
  }
  assertEquals(wrong, []);
});

// ------------------------------------------------------------------------------------------------------------------- times

eachServer("gives times in UTC to the millisecond, whatever the sessions' time zones", async (db) => {
  const zones = db.postgres
    ? ["UTC", "Asia/Kolkata", "America/St_Johns"].map((timezone) => ({ timezone }))
    : ["'+00:00'", "'+05:30'", "'-09:30'"].map((time_zone) => ({ time_zone }));
  const pools = zones.map((session) => db.pool({ max: 2, session }));
  const literal = (time: string) => db.postgres ? `timestamptz '${time}+00'` : `timestamp '${time}'`;
  const times = ["2026-03-29 01:30:00.000", "2026-10-25 02:59:59.999", "1999-12-31 23:59:59.001", "2026-06-01 12:00:00.678"];
  const before = Date.now();
  for (const [i, pool] of pools.entries()) {
    const connection = await db.connect(pool);
    for (const [n, time] of times.entries()) {
      await connection.sql(
        `insert into effectonce_outbox (id, topic, created_at) values ('${i}-${n}', 't', ${literal(time)})`,
      );
    }
    await connection.sql(`insert into effectonce_outbox (id, topic) values ('${i} now', 't')`);
    connection.release();
    await enqueue(db.store(pool), { id: `${i} enqueued`, topic: "t", value: 1 });
  }
  const after = Date.now();
  for (const pool of pools) {
    for (const { id, time } of await readAll(db, pool)) {
      const n = /-(\d)$/.exec(id)?.[1];
      if (n !== undefined) assertEquals(time.toISOString(), `${times[Number(n)]!.replace(" ", "T")}Z`, id);
      else assert(time.getTime() >= before - 2_000 && time.getTime() <= after + 2_000, `${id}: ${time.toISOString()}`);
    }
    const { oldestMs } = await db.outbox(pool).status();
    const first = Date.parse(`${times[0]!.replace(" ", "T")}Z`);
    assert(Math.abs(oldestMs! - (Date.now() - first)) < 5_000, `${oldestMs}`); // That of the first row.
  }
});

// ------------------------------------------------------------------------------------------------------- an outbox of others

const DEBEZIUM: Options = {
  outbox: {
    table: "outbox",
    topic: "aggregatetype",
    key: "aggregateid",
    value: "payload",
    headerColumns: { type: "type" },
  },
};
const uuid = (n: number): string => `00000000-0000-4000-8000-${String(n).padStart(12, "0")}`;

/** Debezium's table, with rows. */
async function debezium(db: ServerDatabase, key = "varchar(255)"): Promise<(n: number, key: string) => Promise<void>> {
  const id = db.postgres ? "uuid" : "char(36)";
  await db.sql(`create table outbox (id ${id} not null primary key, aggregatetype varchar(255) not null,
    aggregateid ${key} not null, type varchar(255) not null, payload ${db.postgres ? "jsonb" : "json"})`);
  return async (n, key) => {
    await db.sql(`insert into outbox (id, aggregatetype, aggregateid, type, payload)
      values ('${uuid(n)}', 'orders', '${key}', 'type-${n}', '{"n": ${n}}')`);
  };
}

for (const server of ALL) {
  Deno.test(`${server} relays Debezium's table with the rows that are in it, by either protocol`, async () => {
    await using db = await servers[server]();
    const insert = await debezium(db);
    const keys = ["a", "b", "c"];
    // MySQL numbers the rows that are there in the order of their primary key.
    for (const n of range(9)) await insert(n, keys[n % 3]!);
    const pool = db.pool();
    await db.migrate(pool, DEBEZIUM);
    await db.migrate(pool, DEBEZIUM);
    assertEquals(await count(db, "outbox"), 9);
    const [store, outbox] = [db.store(pool, DEBEZIUM), db.outbox(pool, DEBEZIUM)];
    const expected = (messages: readonly Pick<Message, "id" | "key">[], from: number) => {
      for (const [i, key] of keys.entries()) {
        assertEquals(byKey(messages, key), range(3).map((n) => uuid(from + n * 3 + i)), `${from}, ${key}`);
      }
    };
    const refused = uuid(4); // The second of b.
    let refuse = true;
    const to = memorySink({
      deliver: ({ id }) => id === refused && refuse ? Promise.reject(rejected("not today")) : Promise.resolve(null),
    });
    const report = await relay({ name: "claims", from: outbox, to, store, drain: true });
    assertEquals(report, { delivered: 7, parked: 1, uncertain: 0 });
    const fifth = to.messages.find(({ id }) => id === uuid(5));
    assertEquals([fifth?.topic, fifth?.headers, fifth?.json()], ["orders", { type: "type-5" }, { n: 5 }]);
    assert(Math.abs(fifth!.time.getTime() - Date.now()) < 60_000, "the time at which they were taken over");
    assertEquals((await outbox.parked()).map(({ id, key, reason }) => [id, key, reason]), [[refused, "b", "not today"]]);
    assertEquals((await outbox.find(uuid(7)))?.state, "blocked");
    const { oldestMs, ...counts } = await outbox.status();
    assertEquals(counts, { pending: 1, heldBack: 1, parked: 1 });
    assert(oldestMs !== null && oldestMs < 60_000, `${oldestMs}`);
    assertEquals((await outbox.relays()).map(({ relay }) => relay), ["claims"]);
    await store.resolve({ scope: "claims", key: refused }, { as: "absent" });
    refuse = false;
    assertEquals(await outbox.release(refused), true);
    assertEquals(await outbox.release("no-such-id"), false);
    await insert(9, "a"); // Of the application's own, once the columns are there.
    await relay({ name: "claims", from: outbox, to, store, drain: true });
    expected(to.messages.filter(({ id }) => id !== uuid(9)), 0);
    assertEquals(to.messages.length, 10);
    assertEquals(await count(db, "outbox"), 0);

    for (const n of range(9)) await insert(20 + n, keys[n % 3]!);
    const got: Message[] = [];
    const handled = handler(store, (message, effects) => {
      if (message.id === uuid(24) && !refuse) throw rejected("not today");
      got.push(message);
      return effects.claim({ scope: "handled", key: message.id }).then(() => {});
    });
    await relay({ name: "seals", from: outbox, to: handled, drain: true, batch: 4 });
    assertEquals((await outbox.parked()).map(({ id }) => id), [uuid(24)]);
    refuse = true;
    assertEquals(await outbox.release(uuid(24)), true);
    await relay({ name: "seals", from: outbox, to: handled, drain: true, batch: 4 });
    const kept = await store.list({ scope: "handled", limit: 100 });
    assertEquals(kept.map(({ key }) => key), range(9).map((n) => uuid(20 + n)));
    const last = got.filter(({ id }, i) => got.findLastIndex((other) => other.id === id) === i);
    expected(last, 20);
    assertEquals(last[0]?.headers, { type: "type-20" });
    assertEquals(await count(db, "outbox"), 0);

    const own = await assertRejects(() => enqueue(store, { topic: "t", value: 1 }), TypeError);
    assertMatch(own.message, /Cannot enqueue into .outbox.: it is not effectonce's own table, use your own INSERT/);
    await db.migrate(pool, DEBEZIUM);
  });
}

eachServer("relays a table with numbers, times, bytes and headers of its own", async (db, pool) => {
  await db.sql(placed(
    db,
    db.postgres
      ? `create table events ("No" bigserial primary key, uid text not null unique, topic text not null, k text, body bytea,
          meta jsonb not null default '{}', at timestamptz not null, trace text)`
      : `create table events ("No" bigint auto_increment primary key, uid varchar(100) not null unique,
          topic varchar(100) not null, k varchar(100), body blob, meta json not null default ('{}'), at datetime(6) not null,
          trace varchar(100))`,
  ));
  const options: Options = {
    prefix: "events_",
    outbox: {
      ...{
        table: "events",
        seq: "No",
        id: "uid",
        topic: "topic",
        key: "k",
        value: "body",
        stored: "bytes",
        headers: "meta",
      },
      ...{ createdAt: "at", headerColumns: { "x-trace": "trace" } },
    },
  };
  const insert = (id: string, key: string | null) => {
    const [bytes, time] = db.postgres
      ? ["decode('00ff', 'hex')", "'2026-01-02 03:04:05.678+00'"]
      : ["x'00ff'", "'2026-01-02 03:04:05.678'"];
    return db.sql(`insert into events (uid, topic, k, body, meta, at, trace) values ('${id}', 't',
      ${key === null ? "null" : `'${key}'`}, ${bytes}, '{"a":"b","n":1}', ${time}, ${key === null ? "null" : "'tr'"})`);
  };
  await insert("z", "k");
  await insert("y", null);
  await db.migrate(pool, options);
  await insert("x", "k");
  const session = await db.outbox(pool, options).open(RELAY);
  const { messages } = await session.read(LIMITS);
  assertEquals(messages.map(({ id, key, value, headers, time }) => [id, key, plain(value), headers, time.toISOString()]), [
    ["z", "k", new Uint8Array([0, 255]), { a: "b", n: "1", "x-trace": "tr" }, "2026-01-02T03:04:05.678Z"],
    ["y", null, new Uint8Array([0, 255]), { a: "b", n: "1" }, "2026-01-02T03:04:05.678Z"],
    ["x", "k", new Uint8Array([0, 255]), { a: "b", n: "1", "x-trace": "tr" }, "2026-01-02T03:04:05.678Z"],
  ]);
  await session.close(true);
  await relay({
    name: "relay",
    from: db.outbox(pool, options),
    to: memorySink(),
    store: db.store(pool, options),
    drain: true,
  });
  assertEquals(await count(db, "events"), 0);
  // Both outboxes are in one database.
  await exercise(db.store(pool), db.outbox(pool));
});

eachServer("relays a table whose keys are UUIDs", async (db) => {
  const insert = await debezium(db, db.postgres ? "uuid" : "char(36)");
  for (const n of range(4)) await insert(n, uuid(100 + n % 2));
  const pool = db.pool();
  await db.migrate(pool, DEBEZIUM);
  const [store, outbox] = [db.store(pool, DEBEZIUM), db.outbox(pool, DEBEZIUM)];
  let refuse = true;
  const to = memorySink({
    deliver: ({ id }) => id === uuid(0) && refuse ? Promise.reject(rejected("not today")) : Promise.resolve(null),
  });
  await relay({ name: "claims", from: outbox, to, store, drain: true });
  assertEquals(to.messages.map(({ id }) => id), [uuid(1), uuid(3)]);
  refuse = false;
  await outbox.discard(uuid(0));
  await relay({ name: "claims", from: outbox, to, store, drain: true });
  assertEquals(to.messages.map(({ id }) => id), [uuid(1), uuid(3), uuid(2)]);
}, { migrated: false });

eachServer("migrates a table of others again where it was broken off", async (db) => {
  const insert = await debezium(db);
  await insert(1, "a");
  const pool = db.pool();
  await db.migrate(pool, DEBEZIUM);
  // As after a process that died in between: on MySQL each statement has committed by itself.
  for (const table of ["relays", "positions", "batches"]) await db.sql(`drop table effectonce_${table}`);
  await db.sql("delete from effectonce_meta");
  await db.migrate(pool, DEBEZIUM);
  const to = memorySink();
  await relay({ from: db.outbox(pool, DEBEZIUM), to, store: db.store(pool, DEBEZIUM), drain: true });
  assertEquals(to.messages.map(({ id }) => id), [uuid(1)]);
}, { migrated: false, on: MYSQLS });

eachServer("migrates a table of others by 4 pools at once", async (db) => {
  const insert = await debezium(db);
  await insert(1, "a");
  await Promise.all(range(4).map(() => db.migrate(db.pool({ max: 2 }), DEBEZIUM)));
  const pool = db.pool();
  const to = memorySink();
  await relay({ from: db.outbox(pool, DEBEZIUM), to, store: db.store(pool, DEBEZIUM), drain: true });
  assertEquals(to.messages.map(({ id }) => id), [uuid(1)]);
}, { migrated: false });

// MySQL gives a TIMESTAMP in the zone of the session, which has to be UTC.
eachServer("gives the time of a column that is a TIMESTAMP", async (db, pool) => {
  const type = db.postgres ? "timestamptz(3)" : "timestamp(3)";
  await db.sql(`create table events (id varchar(40) primary key, topic varchar(40) not null, k varchar(40), body varchar(40),
    at ${type} not null)`);
  const options: Options = {
    prefix: "events_",
    outbox: { table: "events", topic: "topic", key: "k", value: "body", createdAt: "at" },
  };
  const utc = await db.connect(db.pool({ session: db.postgres ? { timezone: "UTC" } : { time_zone: "'+00:00'" } }));
  await utc.sql("insert into events values ('1', 't', 'k', 'v', '2026-01-02 03:04:05.678')");
  utc.release();
  await db.migrate(pool, options);
  for (
    const session of db.postgres ? [{ timezone: "Asia/Kolkata" }] : [{ time_zone: "'+00:00'" }]
  ) {
    const [message] = await readAll(db, db.pool({ session }), options);
    assertEquals(message?.time.toISOString(), "2026-01-02T03:04:05.678Z", JSON.stringify(session));
    assertEquals(message?.text(), "v");
  }
});

// ------------------------------------------------------------------------------------------------------- kept, and pruned

eachServer("keeps delivered rows where it is told to, and prunes each once by several pruners", async (db, pool) => {
  const store = db.store(pool);
  const outbox = db.outbox(pool, { keep: true });
  for (const part of range(3)) {
    await enqueue(store, ...range(100).map((i) => ({ id: `${part}-${i}`, topic: "t", key: `${i % 7}`, value: i })));
  }
  const to = memorySink();
  await relay({ from: outbox, to, store, drain: true, batch: 500 });
  assertEquals(to.messages.length, 300);
  assertEquals(await count(db, "effectonce_outbox", "state = 'delivered'"), 300);
  assertEquals((await outbox.find("0-0"))?.state, "delivered");
  await db.sql("update effectonce_outbox set until_ms = 1 where seq % 2 = 0");
  await enqueue(store, { id: "fresh", topic: "t", value: 1 });
  const pruners = range(3).map(() => db.outbox(db.pool({ max: 1 }), { keep: true }));
  const pruned = await Promise.all(pruners.map(async (pruner) => {
    let sum = 0;
    for (let idle = 0; idle < 2;) {
      const n = await pruner.prune({ olderThanMs: 60_000, limit: 100 });
      sum += n;
      if (n === 0) idle++;
    }
    return sum;
  }));
  assertEquals(pruned.reduce((a, b) => a + b), 150);
  assertEquals(await count(db, "effectonce_outbox", "state = 'delivered'"), 150);
  assertEquals((await outbox.find("fresh"))?.state, "pending");
});

// ------------------------------------------------------------------------------------------------------------------ LISTEN

interface Listening {
  readonly db: ServerDatabase;
  readonly pool: PostgresPool;
  /** The ids that were delivered. */
  readonly got: string[];
  /** How often the relay said that there was nothing to do. */
  idle(): number;
  insert(id: string): Promise<unknown>;
  /** The connection that listens. */
  listener(): Promise<number | undefined>;
}

/** A relay that looks once a minute and listens; ended at the end. */
function listenTest(
  name: string,
  run: (test: Listening) => Promise<void>,
  { protocol = "claimed", notify = true, ...options }: Options & { protocol?: "claimed" | "sealed"; notify?: boolean } = {},
): void {
  Deno.test(`postgres ${name}`, async () => {
    await using db = await servers.postgres();
    const pool = db.pool() as unknown as PostgresPool;
    if (options.schema) await db.sql(`create schema "${options.schema}"`);
    await migratePostgres(pool, { ...options, notify });
    const listen = options.listen ??
      db.pool({ max: 1, driver: { application_name: "listener" } }) as unknown as PostgresPool;
    const store = postgresStore(pool, options);
    const got: string[] = [];
    let idle = 0;
    const end = new AbortController();
    const to = protocol === "claimed"
      ? memorySink({ deliver: ({ id }) => Promise.resolve(void got.push(id)).then(() => null) })
      : handler(store, ({ id }) => Promise.resolve(void got.push(id)));
    const table = `${options.schema ? `"${options.schema}".` : ""}"${options.prefix ?? "effectonce_"}outbox"`;
    const running: Promise<RelayReport> = relay({
      ...{ from: postgresOutbox(pool, { ...options, listen }), to, store, pollMs: 60_000, signal: end.signal },
      observe: ({ type }) => void (idle += type === "idle" ? 1 : 0),
    });
    try {
      await until("the relay is idle", () => idle > 0);
      await run({
        ...{ db, pool, got, idle: () => idle },
        insert: (id) => db.sql(`insert into ${table} (id, topic) values ('${id}', 't')`),
        async listener() {
          const [row] = await db.sql(
            "select pid from pg_stat_activity where datname = current_database() and " +
              "application_name = 'listener' and query ilike 'listen%' and state = 'idle'",
          );
          return row?.["pid"] as number | undefined;
        },
      });
    } finally {
      end.abort();
    }
    assertEquals((await running).delivered, got.length);
    const left = "select 1 from pg_stat_activity where datname = current_database() and application_name = 'listener'";
    await until("nobody listens any more", async () => (await db.sql(left)).length === 0);
  });
}

for (const protocol of ["claimed", "sealed"] as const) {
  listenTest(
    `wakes an idle relay with each plain INSERT, by the ${protocol} protocol`,
    async ({ got, insert, idle, listener }) => {
      await until("it listens", async () => await listener() !== undefined);
      for (const id of ["1", "2", "3"]) {
        const before = idle();
        await insert(id);
        await until(`${id} is delivered`, () => got.includes(id));
        await until("it is idle again", () => idle() > before);
      }
      assertEquals(got, ["1", "2", "3"]);
    },
    { protocol },
  );
}

listenTest("wakes a relay also where schema and prefix are others", async ({ got, insert }) => {
  await insert("1");
  await until("it is delivered", () => got.length === 1);
}, { schema: "Other", prefix: "Mine_" });

listenTest("replaces a LISTEN connection that was killed", async ({ db, got, insert, listener }) => {
  let killed: number | undefined;
  await until("it listens", async () => (killed = await listener()) !== undefined);
  await db.sql("select pg_terminate_backend($1)", [killed]);
  await until("another one listens", async () => ![undefined, killed].includes(await listener()));
  await insert("1");
  await until("it is delivered", () => got.length === 1);
});

listenTest(
  "misses nothing that was inserted while its LISTEN connection was away",
  async ({ db, got, insert, listener }) => {
    let killed: number | undefined;
    await until("it listens", async () => (killed = await listener()) !== undefined);
    await db.sql("select pg_terminate_backend($1)", [killed]);
    await insert("1");
    await until("it is delivered", () => got.length === 1);
  },
);

listenTest(
  "does not wake a relay where notify is false, until it is asked for",
  async ({ db, pool, got, insert, listener }) => {
    await until("it listens", async () => await listener() !== undefined);
    const heard: string[] = [];
    const ear = new pg.Client({ connectionString: db.url });
    await ear.connect();
    try {
      ear.on("notification", ({ channel, payload }) => void heard.push(`${channel} ${payload}`));
      const [row] = await db.sql("select pid, query from pg_stat_activity where application_name = 'listener'");
      const channel = /"(.*)"/.exec(String(row?.["query"]))![1]!;
      await ear.query(`listen "${channel}"`);
      await insert("1");
      assertEquals(got, []);
      await db.sql("select pg_notify($1, 'by hand')", [channel]); // Notifications come in order: none was before this one.
      await until("it is heard", () => heard.length > 0);
      assertEquals(heard, [`${channel} by hand`]);
      await until("it is delivered", () => got.length === 1);
      await migratePostgres(pool, { notify: true });
      await insert("2");
      await until("it is delivered", () => got.length === 2);
      assertEquals(heard, [`${channel} by hand`, `${channel} `]);
      await db.sql("insert into effectonce_outbox (topic) select 't' from generate_series(1, 50)");
      await until("all are delivered", () => got.length === 52);
      await db.sql("select pg_notify($1, 'end')", [channel]);
      await until("it is heard", () => heard.at(-1) === `${channel} end`);
      assertEquals(heard.length, 4, "one notification for all rows of a transaction");
    } finally {
      await ear.end();
    }
  },
  { notify: false },
);

Deno.test("postgres goes on when a notification comes while more than half a batch is in hand", async () => {
  await using db = await servers.postgres();
  await migratePostgres(db.pool() as unknown as PostgresPool);
  // A loop that never lets go would hang this process as well.
  const code = `import pg from "pg";
    import { relay } from "@effectonce/effectonce";
    import { memorySink } from "@effectonce/effectonce/memory";
    import { postgresOutbox, postgresStore } from "@effectonce/effectonce/postgres";
    const pool = new pg.Pool({ connectionString: ${JSON.stringify(db.url)} });
    const store = postgresStore(pool);
    const message = (_, i) => ({ id: "m" + i, topic: "t", key: "k" + i, value: i });
    await store.transaction((effects) => effects.enqueue(...Array.from({ length: 10 }, message)));
    const listen = new pg.Pool({ connectionString: ${JSON.stringify(db.url)}, max: 1 });
    const heard = Promise.withResolvers();
    listen.on("connect", (client) => client.on("notification", ({ payload }) => payload === "now" && heard.resolve()));
    const to = memorySink({
      async deliver({ id }) {
        if (id === "m0") {
          const query = "select 1 from pg_stat_activity where datname = current_database() and query ilike 'listen%'";
          while ((await pool.query(query)).rowCount === 0);
          await pool.query("select pg_notify('.effectonce_outbox', 'now')");
        }
        await heard.promise;
        await new Promise((resolve) => setTimeout(resolve));
        return null;
      },
    });
    console.log((await relay({ from: postgresOutbox(pool, { listen }), to, store, drain: true, batch: 10, lanes: 2 })).delivered);
    Deno.exit();`;
  const child = new Deno.Command(Deno.execPath(), { args: ["eval", "--no-check", code], stdout: "piped", stderr: "piped" })
    .spawn();
  const timer = setTimeout(() => child.kill("SIGKILL"), 15_000);
  const { stdout, stderr } = await child.output();
  clearTimeout(timer);
  assertEquals(new TextDecoder().decode(stdout) + new TextDecoder().decode(stderr), "10\n");
});

Deno.test("postgres relays by looking where its LISTEN connections cannot be had", async () => {
  await using db = await servers.postgres();
  const pool = db.pool() as unknown as PostgresPool;
  await migratePostgres(pool);
  const store = postgresStore(pool);
  const nobody = new pg.Pool({ connectionString: "postgres://127.0.0.1:1/none" });
  try {
    await store.transaction((effects) => effects.enqueue({ id: "1", topic: "t", value: 1 }));
    const to = memorySink();
    await relay({ from: postgresOutbox(pool, { listen: nobody }), to, store, drain: true });
    assertEquals(to.messages.map(({ id }) => id), ["1"]);
  } finally {
    await nobody.end();
  }
});

Deno.test("postgres relays on a pool of one connection that it listens by as well", async () => {
  await using db = await servers.postgres();
  const pool = db.pool({ max: 2 }) as unknown as PostgresPool;
  await migratePostgres(pool);
  const store = postgresStore(pool);
  await store.transaction((effects) => effects.enqueue({ id: "1", topic: "t", value: 1 }));
  const to = memorySink();
  await relay({ from: postgresOutbox(pool, { listen: pool }), to, store, drain: true });
  assertEquals(to.messages.map(({ id }) => id), ["1"]);
});

// ---------------------------------------------------------------------------------------------------------------- the tables

eachServer("says that there are no tables, and that they are of a newer version", async (db, pool) => {
  const outbox = db.outbox(pool, { name: "app" });
  for (
    const use of [
      outbox.status,
      outbox.parked,
      outbox.relays,
      () => outbox.open(RELAY),
      () => outbox.prune({ olderThanMs: 1 }),
    ]
  ) {
    const error = await assertRejects(use, EffectError, 'app has no effectonce tables of version 1: run "init"');
    assertEquals(error.code, "schema_missing");
  }
  await db.migrate(pool);
  await db.sql("update effectonce_meta set value = '99' where name = 'schema_version'");
  const error = await assertRejects(() => outbox.open(RELAY), EffectError, "upgrade it");
  assertEquals(error.code, "schema_newer");
  assertEquals(await count(db, "effectonce_relays"), 0);
}, { migrated: false });

eachServer(
  "renames a relay that has ended, with what it sealed; not one that runs or claims, nor to a name that is known",
  async (db, pool) => {
    const store = db.store(pool);
    const over = `update effectonce_relays set until_ms = 0`;
    const insert = (...ids: readonly string[]) =>
      enqueue(store, ...ids.map((id) => ({ id, topic: "t", key: id[0]!, value: id })));
    await renames(db.outbox(pool), () => db.sql(placed(db, over)), insert);
  },
);
