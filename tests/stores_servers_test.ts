/** What the stores on PostgreSQL, MariaDB and MySQL promise beyond the requirements of all stores; PGlite. */
import { assert, assertEquals, assertMatch, assertRejects } from "@std/assert";
import { PGlite } from "@electric-sql/pglite";
import { sql as drizzleSql } from "drizzle-orm";
import { drizzle as drizzleMysql } from "drizzle-orm/mysql2";
import { drizzle as drizzlePostgres } from "drizzle-orm/node-postgres";
import { CompiledQuery, Kysely, MysqlDialect, PostgresDialect } from "kysely";
import { clearParserCache, createPool } from "mysql2";
import type mysql from "mysql2/promise";
// @ts-types="@types/pg"
import type pg from "pg";
import postgres from "postgres";
import {
  type Claim,
  EffectError,
  type EffectKey,
  type EffectStore,
  type EffectTransaction,
  once,
  realRuntime,
  type RunSql,
} from "@effectonce/effectonce";
import { mysqlStore } from "@effectonce/effectonce/mysql";
import { migratePostgres, postgresOutbox, postgresStore } from "@effectonce/effectonce/postgres";
import { contentsOf, type Ends, handlerOn, refused } from "./runtime/suite.ts";
import {
  ALL,
  eachServer,
  exercise,
  MYSQLS,
  placed,
  type Pool,
  runOn,
  type ServerDatabase,
  servers,
  until,
} from "./servers/each.ts";
import { suites } from "./servers/suites.ts";

const KEY: EffectKey = { scope: "orders", key: "order-1" };
const HOLD = { leaseMs: 60_000 };
const BYTES = Uint8Array.from({ length: 256 }, (_, i) => i);
const range = (count: number): number[] => Array.from({ length: count }, (_, i) => i);
const plain = (bytes: unknown): Uint8Array => new Uint8Array(bytes as Uint8Array);
const textOf = (value: unknown): string => value instanceof Uint8Array ? new TextDecoder().decode(value) : String(value);
const codeOf = async (run: () => Promise<unknown>): Promise<string> => (await assertRejects(run, EffectError)).code;
const count = async (db: ServerDatabase, table: string, where = "true"): Promise<number> =>
  Number((await db.sql(placed(db, `select count(*) as n from ${table} where ${where}`)))[0]!["n"]);
const states = (claims: readonly Claim[]): Record<string, number> => {
  const counts: Record<string, number> = {};
  for (const { state } of claims) counts[state] = (counts[state] ?? 0) + 1;
  return counts;
};

/** It is looked at later. */
const quiet = (promise: Promise<unknown>): void => void promise.catch(() => {});

/** Something to be waited for, and what ends the wait. */
function gate(): { readonly passed: Promise<void>; readonly open: () => void } {
  const { promise, resolve } = Promise.withResolvers<void>();
  return { passed: promise, open: () => resolve() };
}

// ---------------------------------------------------------------------------------------------------------- silence

Deno.test("a transaction with a position is not ended by the server while its function waits for something else", async () => {
  await Promise.all(ALL.map(async (kind) => {
    await using db = await servers[kind]();
    const pool = db.pool();
    await db.migrate(pool);
    const store = db.store(pool);
    const owner = { relay: "r", source: "s" };
    // Of half a minute 6 seconds are left, and for longer than those the function is silent.
    const less = db.postgres ? "set local idle_in_transaction_session_timeout = 6000" : "set session wait_timeout = 6";
    await store.transaction(async (effects, client) => {
      await effects.advance(owner, { n: 1, uid: "u1", prev: "", rows: [] });
      await (client as { query(sql: string): Promise<unknown> }).query(less);
      await realRuntime.sleep(8_000);
    });
    assertEquals((await store.positions(owner)).length, 1, kind);
  }));
});

// ------------------------------------------------------------------------------------------------------------- join

class Undo extends Error {}

/** All that a handle can do. */
async function useAll(effects: EffectTransaction): Promise<void> {
  const of = (key: string) => ({ scope: "joined", key });
  assertEquals((await effects.claim(of("bytes"), { request: BYTES })).state, "claimed");
  assertEquals((await effects.claim(of("json"), { request: { a: `'?$1"\\` } })).state, "claimed");
  assertEquals(await effects.claim(of("bytes"), { request: BYTES }), { state: "done", result: null, resultOmitted: false });
  const claims = await effects.claimAll([of("first"), of("json"), of("second"), of("first")]);
  assertEquals(claims.map(({ state }) => state), ["claimed", "mismatch", "claimed", "done"]);
  await effects.complete(of("bytes"), { paid: `ß'?$1"\\` });
  await effects.enqueue(
    { id: "m1", topic: "t'?", key: `k"?`, value: BYTES, headers: { h: `ß'?$1"\\` } },
    { id: "m2", topic: "t", value: null },
    { id: "m3", topic: "t", key: "k", value: { a: 1 } },
    { id: "m4", topic: "t", value: new Uint8Array() },
  );
  const twice = await assertRejects(() => effects.enqueue({ id: "m1", topic: "t", value: 1 }), RangeError);
  assertMatch(twice.message, /"m1"/);
  await effects.advance({ relay: "r", source: "s" }, { n: 1, uid: "u1", prev: "", rows: [["1", "m1"]] });
  await effects.advance({ relay: "r", source: "s" }, { n: 2, uid: "u2", prev: "u1", rows: [["2", "m2"]] });
}

/** What that leaves once it is committed. */
async function assertAll(db: ServerDatabase, store: EffectStore<never>): Promise<void> {
  const effects = await db.sql(placed(db, `select "key", state, request, result from effectonce_effects order by "key"`));
  assertEquals(effects.map((row) => [textOf(row["key"]), row["state"]]), [
    ["bytes", "done"],
    ["first", "done"],
    ["json", "done"],
    ["second", "done"],
  ]);
  assertEquals(plain(effects[0]!["request"]), BYTES);
  assertEquals(textOf(effects[2]!["request"]), JSON.stringify({ a: `'?$1"\\` }));
  assertEquals(JSON.parse(textOf(effects[0]!["result"])), { paid: `ß'?$1"\\` });
  const json = (value: unknown) => typeof value === "string" ? JSON.parse(value) : value;
  const outbox = await db.sql(
    placed(db, `select id, topic, "key", value, headers, state from effectonce_outbox order by seq`),
  );
  const got = outbox.map((row) => {
    const value = row["value"] === null ? null : plain(row["value"]);
    return [row["id"], row["topic"], row["key"], value, json(row["headers"]), row["state"]];
  });
  assertEquals(got, [
    ["m1", "t'?", `k"?`, BYTES, { h: `ß'?$1"\\` }, "pending"],
    ["m2", "t", null, null, {}, "pending"],
    ["m3", "t", "k", new TextEncoder().encode('{"a":1}'), { "content-type": "application/json" }, "pending"],
    ["m4", "t", null, new Uint8Array(), {}, "pending"],
  ]);
  const done = await store.claim({ scope: "joined", key: "bytes" }, { ...HOLD, request: BYTES });
  assertEquals(done, { state: "done", result: { paid: `ß'?$1"\\` }, resultOmitted: false });
  assertEquals((await store.positions({ relay: "r", source: "s" })).map(({ uid }) => uid), ["u1", "u2"]);
  assertEquals(await count(db, "orders"), 1);
}

/** Runs `work` in a transaction of the application's own: what it joins by, and the application's INSERT. */
type InTransaction = (
  db: ServerDatabase,
  pool: Pool,
  work: (joined: never | RunSql, insert: () => Promise<unknown>) => Promise<void>,
) => Promise<void>;

const INSERT = "insert into orders (id) values ('1')";

async function byClient(
  db: ServerDatabase,
  pool: Pool,
  work: Parameters<InTransaction>[2],
  joined: (connection: Awaited<ReturnType<ServerDatabase["connect"]>>) => never | RunSql,
): Promise<void> {
  const connection = await db.connect(pool);
  try {
    await connection.sql("begin");
    await work(joined(connection), () => connection.sql(INSERT));
    await connection.sql("commit");
  } catch (error) {
    await connection.sql("rollback");
    throw error;
  } finally {
    connection.release();
  }
}

// The one-liners of the README: a transaction of a library as what join() takes.
const ownClient: InTransaction = (db, pool, work) => byClient(db, pool, work, ({ client }) => client);
const ownFunction: InTransaction = (db, pool, work) => byClient(db, pool, work, runOn);
const kyselyPostgres: InTransaction = (_, pool, work) =>
  new Kysely<unknown>({ dialect: new PostgresDialect({ pool: pool as unknown as pg.Pool }) }).transaction().execute((trx) =>
    work(
      async (q, v) => (await trx.executeQuery<Record<string, unknown>>(CompiledQuery.raw(q, [...v]))).rows,
      () => trx.executeQuery(CompiledQuery.raw(INSERT)),
    )
  );
const drizzleOnPostgres: InTransaction = (_, pool, work) =>
  drizzlePostgres({ client: pool as unknown as pg.Pool }).transaction((tx) =>
    work(
      async (q, v) =>
        (await tx.execute(drizzleSql.join(
          q.split(/\$\d+/).flatMap((text, i) => [
            ...i > 0 ? [drizzleSql.param(v[i - 1])] : [],
            drizzleSql.raw(text),
          ]),
        ))).rows,
      () => tx.execute(drizzleSql.raw(INSERT)),
    )
  );
const postgresJs: InTransaction = async (db, _, work) => {
  const sql = postgres(db.url, { max: 1 });
  try {
    await sql.begin((tx) => work((q, v) => tx.unsafe(q, [...v] as string[]), () => tx.unsafe(INSERT)));
  } finally {
    await sql.end();
  }
};
const kyselyMysql: InTransaction = async (db, _, work) => {
  const pool = createPool({ uri: db.url, connectionLimit: 1 }); // Kysely takes the one with callbacks.
  const kysely = new Kysely<unknown>({ dialect: new MysqlDialect({ pool: pool as never }) });
  try {
    await kysely.transaction().execute((trx) =>
      work(
        async (q, v) => (await trx.executeQuery<Record<string, unknown>>(CompiledQuery.raw(q, [...v]))).rows,
        () => trx.executeQuery(CompiledQuery.raw(INSERT)),
      )
    );
  } finally {
    await kysely.destroy();
  }
};
const drizzleOnMysql: InTransaction = (_, pool, work) =>
  drizzleMysql({ client: pool as unknown as mysql.Pool }).transaction((tx) =>
    work(
      async (q, v) =>
        (await tx.execute(drizzleSql.join(
          q.split("?").flatMap((text, i) => [
            ...i > 0 ? [drizzleSql.param(v[i - 1])] : [],
            drizzleSql.raw(text),
          ]),
        )))[0] as unknown as Record<string, unknown>[],
      () => tx.execute(drizzleSql.raw(INSERT)),
    )
  );

const POSTGRES_WAYS: Readonly<Record<string, InTransaction>> = {
  "the driver's client": ownClient,
  "a function on the driver's client": ownFunction,
  "Kysely": kyselyPostgres,
  "Drizzle": drizzleOnPostgres,
  "postgres.js": postgresJs,
};
const MYSQL_WAYS: Readonly<Record<string, InTransaction>> = {
  "the driver's client": ownClient,
  "a function on the driver's client": ownFunction,
  "Kysely": kyselyMysql,
  "Drizzle": drizzleOnMysql,
};

for (const [on, ways] of [[["postgres"], POSTGRES_WAYS], [MYSQLS, MYSQL_WAYS]] as const) {
  for (const [way, inTransaction] of Object.entries(ways)) {
    eachServer(`joins the caller's own transaction by ${way}: all of it or nothing`, async (db, pool) => {
      await db.sql("create table orders (id varchar(10) primary key)");
      const store = db.store(pool);
      for (const end of ["rollback", "commit"]) {
        const run = () =>
          inTransaction(db, pool, async (joined, insert) => {
            await insert();
            await useAll(store.join(joined));
            if (end === "rollback") throw new Undo();
          });
        if (end === "commit") await run();
        else await assertRejects(run, Undo);
        const tables = ["orders", "effectonce_effects", "effectonce_outbox", "effectonce_positions"];
        if (end === "rollback") assertEquals(await Promise.all(tables.map((table) => count(db, table))), [0, 0, 0, 0]);
      }
      await assertAll(db, store);
    }, { on });
  }
}

// ------------------------------------------------------------------------------------------------------------- the types

Deno.test("postgres transaction() hands over pg's own client with its types, and Drizzle works on it", async () => {
  await using db = await servers.postgres();
  const pool = db.pool() as unknown as pg.Pool;
  await migratePostgres(pool);
  await db.sql("create table orders (id varchar(10) primary key)");
  const store = postgresStore(pool);
  const order = (id: string, fails = false) =>
    store.transaction(async (effects, client) => {
      const own: pg.PoolClient = client;
      await drizzlePostgres({ client: own }).execute(drizzleSql`insert into orders values (${id})`); // Begins it.
      const { rows: [row] } = await client.query<{ n: number }>("select count(*)::int as n from orders where id = $1", [id]);
      const n: number | undefined = row?.n;
      await effects.claim({ ...KEY, key: id });
      if (fails) throw new Undo();
      return n;
    });
  assertEquals(await order("1"), 1);
  await assertRejects(() => order("2", true), Undo);
  assertEquals(await db.sql("select id from orders"), [{ id: "1" }]);
  assertEquals((await store.list()).map(({ key }) => key), ["1"]);
});

for (const name of MYSQLS) {
  Deno.test(`${name} transaction() hands over mysql2's own connection with its types, and Drizzle works on it`, async () => {
    await using db = await servers[name]();
    const pool = db.pool();
    await db.migrate(pool);
    await db.sql("create table orders (id varchar(10) primary key)");
    const store = mysqlStore(pool as unknown as mysql.Pool);
    const order = (id: string, fails = false) =>
      store.transaction(async (effects, connection) => {
        const own: mysql.PoolConnection = connection;
        await drizzleMysql({ client: own }).execute(drizzleSql`insert into orders values (${id})`);
        const sql = "select count(*) as n from orders where id = ?";
        const [[row]] = await connection.execute<(mysql.RowDataPacket & { n: number })[]>(sql, [id]);
        const n: number | undefined = row?.n;
        await effects.claim({ ...KEY, key: id });
        if (fails) throw new Undo();
        return n;
      });
    assertEquals(await order("1"), 1);
    await assertRejects(() => order("2", true), Undo);
    assertEquals((await db.sql("select id from orders")).map(({ id }) => id), ["1"]);
    assertEquals((await store.list()).map(({ key }) => key), ["1"]);
  });
}

Deno.test("postgres transaction() begins with whatever its function sends first: a callback, an object, several at once", async () => {
  await using db = await servers.postgres();
  const pool = db.pool() as unknown as pg.Pool;
  await migratePostgres(pool);
  await db.sql("create table orders (id serial, note text)");
  const store = postgresStore(pool);
  const insert = "insert into orders (note) values ('x')";
  const ways: ((client: pg.PoolClient) => Promise<unknown>)[] = [
    (client) => new Promise<void>((resolve, reject) => client.query(insert, (error) => error ? reject(error) : resolve())),
    (client) => client.query({ text: insert }),
    (client) => client.query({ text: insert, rowMode: "array", name: "prepared" }),
    (client) => Promise.all([client.query(insert), client.query("select 1")]),
  ];
  for (const way of ways) {
    await assertRejects(() =>
      store.transaction(async (effects, client) => {
        await way(client);
        await effects.claim(KEY);
        throw new Undo();
      }), Undo);
    assertEquals(await count(db, "orders") + await count(db, "effectonce_effects"), 0, String(way));
  }
  for (const [i, way] of ways.entries()) {
    await store.transaction(async (effects, client) => {
      await Promise.all([way(client), effects.claim({ ...KEY, key: `${i}` })]);
    });
  }
  assertEquals([await count(db, "orders"), await count(db, "effectonce_effects")], [4, 4]);
});

eachServer("leaves the connection of a transaction as it was: its driver's own functions", async (db) => {
  const pool = db.pool({ max: 1 });
  const store = db.store(pool);
  const seen: unknown[] = [];
  const look = async () => {
    const connection = await db.connect(pool);
    seen.push((connection.client as { query: unknown }).query);
    connection.release();
  };
  await look();
  await store.transaction((effects) => effects.claim(KEY));
  await store.transaction(() => Promise.resolve());
  await assertRejects(() => store.transaction(() => Promise.reject(new Undo())), Undo);
  await look();
  assertEquals(seen[0], seen[1]);
});

// ------------------------------------------------------------------------------------------------------- isolation levels

const levelOf = (db: ServerDatabase, level: string): Record<string, string> =>
  db.name === "mysql" ? { transaction_isolation: `'${level}'` } : { tx_isolation: `'${level}'` };

const LEVELS: readonly { on: ServerDatabase["name"]; level: string; session: Readonly<Record<string, string>> }[] = [
  ...["read committed", "repeatable read", "serializable"].map((level) => ({
    on: "postgres" as const,
    level,
    session: { default_transaction_isolation: level },
  })),
  ...["READ-COMMITTED", "REPEATABLE-READ", "SERIALIZABLE"].flatMap((level) => [
    { on: "mysql" as const, level, session: { transaction_isolation: `'${level}'` } },
    ...[0, 1].map((isolation) => ({
      on: "mariadb" as const,
      level: `${level}, innodb_snapshot_isolation ${isolation}`,
      session: { tx_isolation: `'${level}'`, innodb_snapshot_isolation: `${isolation}` },
    })),
  ]),
];

/** One test for each isolation level. */
function eachLevel(
  name: string,
  run: (db: ServerDatabase, store: EffectStore<never>, pool: Pool) => Promise<void>,
  { max = 8, only = () => true }: { max?: number; only?: (level: (typeof LEVELS)[number]) => boolean } = {},
): void {
  for (const { on, level, session } of LEVELS.filter(only)) {
    Deno.test(`${on} at ${level} ${name}`, async () => {
      await using db = await servers[on]();
      const pool = db.pool({ max, session });
      await db.migrate(pool);
      await run(db, db.store(pool, { waitMs: 20_000 }), pool);
    });
  }
}

eachLevel("gives a key to one of 50 callers at once (acceptance 10)", async (db, store) => {
  let ran = 0;
  const inTransaction = (key: EffectKey) =>
    store.transaction(async (effects) => {
      const claim = await effects.claim(key);
      if (claim.state === "claimed") ran++;
      return claim;
    });
  const claim = (key: EffectKey) => store.claim(key, HOLD);
  const of = (key: string) => ({ scope: "fifty", key });
  const transactions = await Promise.all(range(50).map(() => inTransaction(of("transactions"))));
  assertEquals(states(transactions), { claimed: 1, done: 49 });
  assert(ran >= 1);
  assertEquals(states(await Promise.all(range(50).map(() => claim(of("claims"))))), { claimed: 1, busy: 49 });
  const both = await Promise.all(range(50).map((i) => (i % 2 ? inTransaction : claim)(of("both"))));
  const { claimed, done = 0, busy = 0, ...others } = states(both);
  assertEquals({ claimed, rest: done + busy, others }, { claimed: 1, rest: 49, others: {} });
  const batches = await Promise.all(
    range(10).map(() => store.transaction((effects) => effects.claimAll(range(5).map((i) => of(`batch ${i}`))))),
  );
  assertEquals(states(batches.flat()), { claimed: 5, done: 45 });
  assertEquals(await count(db, "effectonce_effects"), 8);
}, { max: 50 });

eachLevel("gives the key of a claimer that rolls back to one of two that wait (acceptance 11)", async (db, store) => {
  for (const again of range(3)) {
    const key = { scope: "three", key: `key-${again}` };
    const [taken, undo] = [gate(), gate()];
    const first = store.transaction(async (effects) => {
      assertEquals((await effects.claim(key)).state, "claimed");
      taken.open();
      await undo.passed;
      throw new Undo();
    });
    quiet(first);
    await taken.passed;
    const results: string[] = [];
    const others = range(2).map((i) =>
      store.transaction(async (effects) => {
        const claim = await effects.claim(key);
        if (claim.state === "claimed") await effects.complete(key, `won by ${i}`);
        return claim;
      }).then((claim) => (results.push(claim.state), claim))
    );
    others.forEach(quiet);
    await until("two wait", async () => await db.waiting("effectonce_effects") === 2);
    assertEquals(results, []);
    undo.open();
    await assertRejects(() => first, Undo);
    const claims = await Promise.all(others);
    assertEquals(states(claims), { claimed: 1, done: 1 });
    const winner = claims.findIndex(({ state }) => state === "claimed");
    const loser = claims[1 - winner];
    assert(loser?.state === "done");
    assertEquals(loser.result, `won by ${winner}`);
    assertEquals(await count(db, "effectonce_effects"), again + 1);
  }
}, { only: ({ level }) => !/serializable/i.test(level) });

eachLevel("gives who loses the kept result, also behind a snapshot without it (acceptance 13)", async (db, store, pool) => {
  await db.sql("create table orders (id varchar(20) primary key)");
  await db.sql("insert into orders values ('before')");
  const winner = db.store(db.pool());
  for (const way of ["claim", "claimAll"] as const) {
    const key = { scope: "lost", key: way };
    let runs = 0;
    const claim = await store.transaction(async (effects, client: never) => {
      runs++;
      // Its snapshot is of before the other one's commit.
      await (client as { query(sql: string): Promise<unknown> }).query("select id from orders");
      if (runs === 1) {
        await winner.transaction(async (effects) => {
          await effects.claim(key);
          await effects.complete(key, { winner: true });
        });
      }
      return way === "claim" ? await effects.claim(key) : (await effects.claimAll([key]))[0]!;
    });
    assertEquals(claim, { state: "done", result: { winner: true }, resultOmitted: false });
    assert(runs <= 2, `${runs} runs`);
  }
  if (db.postgres) return; // There a joined transaction has failed, and its owner begins it again.
  const connection = await db.connect(pool);
  await connection.sql("begin");
  await connection.sql("select id from orders");
  const key = { scope: "lost", key: "join" };
  await winner.transaction(async (effects) => {
    await effects.claim(key);
    await effects.complete(key, 7);
  });
  const claim = await store.join(connection.client).claim(key).catch((error: { errno?: number }) => error.errno);
  await connection.sql("rollback");
  connection.release();
  // MariaDB's "record has changed since last read": the caller's own transaction is to be run again.
  if (claim !== 1020) assertEquals(claim, { state: "done", result: 7, resultOmitted: false });
});

// -------------------------------------------------------------------------------------------------------- swallowed errors

/** Two rows, and others that make a transaction the heavier one of two. */
async function ordersOf(db: ServerDatabase): Promise<void> {
  await db.sql("create table orders (id integer primary key, note varchar(20))");
  await db.sql("insert into orders (id) values (1), (2), (3)");
}

eachServer("commits nothing of a transaction that swallowed a lock wait time-out (acceptance 12)", async (db) => {
  await ordersOf(db);
  const pool = db.pool(db.postgres ? {} : { session: { innodb_lock_wait_timeout: "1" } });
  const store = db.store(pool, { waitMs: 500 });
  const holder = await db.connect(pool);
  await holder.sql("begin");
  await holder.sql("update orders set note = 'held' where id = 1");
  let runs = 0;
  const errors: unknown[] = [];
  const transaction = store.transaction(async (effects, client: never) => {
    const { query } = client as { query(sql: string): Promise<unknown> };
    const write = (sql: string) => query.call(client, sql).catch((error: unknown) => void errors.push(error));
    if (++runs > 1) throw new Undo(); // It was asked again, which is right as well.
    await effects.claim(KEY);
    await write("insert into orders values (10, 'before')");
    await write("update orders set note = 'swallowed' where id = 1");
    await write("insert into orders values (11, 'after')");
  });
  await assertRejects(() => transaction);
  await holder.sql("rollback");
  holder.release();
  assertEquals(errors.length, 2);
  assertEquals(await count(db, "orders", "id > 3 or note is not null"), 0);
  assertEquals(await count(db, "effectonce_effects"), 0);
});

eachServer("commits nothing of a transaction that swallowed a deadlock (acceptance 12)", async (db, pool) => {
  await ordersOf(db);
  // The heavier one survives; on PostgreSQL the one that has waited less long.
  const other = await db.connect(pool);
  const store = db.store(pool, { waitMs: 5_000 });
  const errors: { errno?: number; code?: string }[] = [];
  let runs = 0;
  const transaction = store.transaction(async (effects, client: never) => {
    const { query } = client as { query(sql: string): Promise<unknown> };
    const write = (sql: string) =>
      query.call(client, sql).catch((error: unknown) => void errors.push(error as { errno?: number }));
    if (++runs > 1) throw new Undo();
    if (db.postgres) await write("set local deadlock_timeout = 10");
    await effects.claim(KEY);
    await write("update orders set note = 'swallowed' where id = 1");
    await other.sql("begin");
    await other.sql(`insert into orders values ${range(200).map((i) => `(${1000 + i}, 'heavy')`).join(", ")}`);
    await other.sql("update orders set note = 'other' where id = 2");
    const theirs = other.sql("update orders set note = 'other' where id = 1");
    await until("the other one waits", async () => await db.waiting("note = 'other' where id = 1") === 1);
    await write("update orders set note = 'swallowed' where id = 2");
    await write("insert into orders values (11, 'after')");
    await theirs;
    await other.sql("rollback");
  });
  await assertRejects(() => transaction);
  other.release();
  assertEquals(errors.length, 2, "the deadlock, and the statement after it");
  assert(db.postgres ? errors[0]?.code === "40P01" : errors[0]?.errno === 1213, String(errors[0]));
  assertEquals(await count(db, "orders", "id > 3 or note is not null"), 0);
  assertEquals(await count(db, "effectonce_effects"), 0);
  assertEquals((await store.claim(KEY, HOLD)).state, "claimed"); // The pool is whole.
});

eachServer("runs a transaction again that a deadlock ended, and commits it once (acceptance 12)", async (db, pool) => {
  await ordersOf(db);
  const store = db.store(pool);
  const other = await db.connect(pool);
  let runs = 0;
  await store.transaction(async (effects, client: never) => {
    const { query } = client as { query(sql: string): Promise<unknown> };
    const write = (sql: string) => query.call(client, sql);
    runs++;
    if (db.postgres) await write("set local deadlock_timeout = 10");
    await effects.claim(KEY);
    await write(`insert into orders values (${10 + runs}, 'mine')`);
    if (runs > 1) return;
    await write("update orders set note = 'mine' where id = 1");
    await other.sql("begin");
    await other.sql(`insert into orders values ${range(200).map((i) => `(${1000 + i}, 'heavy')`).join(", ")}`);
    await other.sql("update orders set note = 'other' where id = 2");
    const theirs = other.sql("update orders set note = 'other' where id = 1");
    await until("the other one waits", async () => await db.waiting("note = 'other' where id = 1") === 1);
    await write("update orders set note = 'mine' where id = 2").finally(async () => {
      await theirs;
      await other.sql("rollback");
    });
  });
  other.release();
  assertEquals(runs, 2);
  assertEquals(await db.sql("select id from orders where note = 'mine'").then((rows) => rows.map(({ id }) => id)), [12]);
  assertEquals((await store.list()).map(({ state }) => state), ["done"]);
});

eachServer(
  "commits nothing of a transaction that swallowed a unique violation, where the server does not",
  async (db, pool) => {
    await ordersOf(db);
    const store = db.store(pool);
    const transaction = () =>
      store.transaction(async (effects, client: never) => {
        await effects.claim(KEY);
        const { query } = client as { query(sql: string): Promise<unknown> };
        await query.call(client, "insert into orders values (10, 'before')");
        await query.call(client, "insert into orders values (1, 'twice')").catch(() => {});
      });
    if (db.postgres) {
      const error = await assertRejects(transaction, EffectError, "caught");
      assertEquals(error.code, "source_invalid");
    } else await transaction(); // There only the statement has failed.
    assertEquals(await count(db, "orders", "id = 10"), db.postgres ? 0 : 1);
    assertEquals(await count(db, "effectonce_effects"), db.postgres ? 0 : 1);
    assertEquals(await count(db, "orders", "note = 'twice'"), 0);
    assertEquals((await store.claim(KEY, HOLD)).state, db.postgres ? "claimed" : "done");
  },
);

eachServer("passes an error of the application's own on at once, whatever its code", async (db, pool) => {
  const store = db.store(pool, { waitMs: 500 });
  for (const code of ["ECONNREFUSED", "ECONNRESET", "ETIMEDOUT"]) {
    const own = Object.assign(new Error(`connect ${code} 10.0.0.1:25`), { code });
    let runs = 0;
    const error = await assertRejects(() =>
      store.transaction(async (effects) => {
        runs++;
        await effects.claim(KEY);
        throw own;
      })
    );
    assertEquals([runs, error], [1, own]);
  }
  assertEquals(await count(db, "effectonce_effects"), 0);
});

// ------------------------------------------------------------------------------------------------------------------- keys

const ALIKE = [
  ...["Order-1", "order-1", "ORDER-1", "Order-1 ", "Order-1  ", " Order-1", "Örder-1", "O\u0308rder-1", "Order-1\t"],
  ...["😀", "😁", "\u{1F600}\u200d", "ß", "ss", "ẞ", "é", "e", "i", "ı", "İ", "x".repeat(300), "x".repeat(299) + "y"],
  ...["x".repeat(1023) + "a", "x".repeat(1023) + "b", "\u{FFFD}", "\u00a0", "\u200b", "ﬁ", "fi", "１", "1"],
];

eachServer(
  "keeps keys apart that differ by case, accent, blanks or beyond 255 characters (acceptance 14)",
  async (db, pool) => {
    const store = db.store(pool);
    const keys = ALIKE.map((key) => ({ scope: "alike", key }));
    const scopes = ALIKE.map((scope) => ({ scope, key: "alike" }));
    assertEquals(states(await Promise.all(keys.map((key) => store.claim(key, HOLD)))), { claimed: keys.length });
    assertEquals(states(await store.transaction((effects) => effects.claimAll(scopes))), { claimed: scopes.length });
    for (const [i, key] of keys.entries()) await store.complete(key, 1, i);
    for (const [i, key] of keys.entries()) {
      assertEquals(await store.claim(key, HOLD), { state: "done", result: i, resultOmitted: false });
    }
    const listed = (await store.list({ scope: "alike", limit: 1000 })).map(({ key }) => key);
    const inBytes = (a: string, b: string) => {
      const [x, y] = [a, b].map((text) =>
        Array.from(new TextEncoder().encode(text), (n) => String.fromCharCode(n)).join("")
      );
      return x! < y! ? -1 : 1;
    };
    assertEquals(listed, ALIKE.toSorted(inBytes));
    assertEquals((await store.list({ key: "alike", limit: 1000 })).length, ALIKE.length);
    assertEquals(await count(db, "effectonce_effects"), 2 * ALIKE.length);
  },
);

eachServer("takes keys, results and requests that look like SQL for what they are", async (db, pool) => {
  const store = db.store(pool);
  const texts = [
    ...[
      "a'); drop table effectonce_effects; --",
      "\\'",
      "\\",
      "'",
      "''",
      '"',
      "`",
      "\\\\'; --",
      "?",
      "??",
      "$1",
      "$1$2",
      ":a",
    ],
    ...[
      "%",
      "_",
      "/*",
      "*/",
      "--",
      "#",
      "\n",
      "\r\n",
      "\t",
      "\b",
      "\x01",
      "\x1a",
      "\x1b",
      "\x7f",
      "{}",
      "@@version",
      "x'41'",
    ],
    ...["null", "$$", "$a$", "E'\\x41'", "U&'\\0041'", "a\\", "a\\'; --", "0x41", "' or '1'='1", "%s", "\u2028"],
  ];
  const keys = texts.map((text) => ({ scope: text, key: text }));
  for (const { scope: text, key } of keys) {
    assertEquals((await store.claim({ scope: text, key }, { ...HOLD, request: text })).state, "claimed", text);
    assertEquals((await store.list({ scope: text, key })).length, 1, text);
    await store.fail({ scope: text, key }, 1, { as: "retryable", reason: text });
    assertEquals((await store.list({ scope: text }))[0]?.error, text);
    assertEquals((await store.claim({ scope: text, key }, { ...HOLD, request: text })).state, "claimed", text);
    await store.complete({ scope: text, key }, 2, text);
  }
  const joined = texts.map((text) => ({ scope: "joined", key: text }));
  await store.transaction(async (effects) => {
    for (const key of joined) {
      assertEquals((await effects.claim(key, { request: key.key })).state, "claimed", key.key); // The first begins it as well.
      await effects.complete(key, key.key);
    }
  });
  for (const key of joined) {
    const alone = { ...key, scope: "alone" };
    await store.transaction((effects) => effects.claim(alone, { request: alone.key })); // In one message with BEGIN.
    const [claim] = await Promise.all([store.claim(key, { ...HOLD, request: key.key })]);
    assertEquals(claim, { state: "done", result: key.key, resultOmitted: false });
  }
  assertEquals(await count(db, "effectonce_effects"), 3 * texts.length);
  assertEquals((await store.count("alone")).done, texts.length);
});

// ------------------------------------------------------------------------------------------------------- waits with bounds

eachServer("lets the second of two open transactions wait for a bounded time, and never run its effect", async (db) => {
  const pool = db.pool(db.postgres ? {} : { session: { innodb_lock_wait_timeout: "1" } });
  const store = db.store(pool, { waitMs: 300 });
  const [taken, end] = [gate(), gate()];
  const first = store.transaction(async (effects) => {
    const claim = await effects.claim(KEY);
    taken.open();
    await end.passed;
    await effects.complete(KEY, "first");
    return claim.state;
  });
  quiet(first);
  await taken.passed;
  let ran = 0;
  const start = realRuntime.now();
  const second = () =>
    store.transaction(async (effects) => {
      const claim = await effects.claim(KEY);
      if (claim.state === "claimed") ran++;
      return claim;
    });
  const waits = [second, () => store.claim(KEY, HOLD), () => store.transaction((effects) => effects.claimAll([KEY]))];
  assertEquals(await Promise.all(waits.map(codeOf)), ["busy", "busy", "busy"]);
  const ms = Math.round(realRuntime.now() - start);
  assert(ms < 5_000, `It waited for ${ms} ms`);
  const waiting = second(); // Still within its time when the first commits.
  quiet(waiting);
  await until("it waits", async () => await db.waiting("effectonce_effects") === 1);
  end.open();
  assertEquals(await first, "claimed");
  assertEquals(await waiting, { state: "done", result: "first", resultOmitted: false });
  assertEquals(ran, 0);
});

eachServer("ends a transaction that calls its own store on a pool of one connection in busy", async (db) => {
  const store = db.store(db.pool({ max: 1 }), { waitMs: 200, name: "app" });
  const start = realRuntime.now();
  const error = await assertRejects(
    () => store.transaction((effects) => effects.claim(KEY).then(() => store.claim(KEY, HOLD))),
    EffectError,
    "app had no free connection",
  );
  assertEquals(error.code, "busy");
  assertEquals(await codeOf(() => store.transaction(() => once(store, KEY, () => Promise.resolve(), {}))), "busy");
  assert(realRuntime.now() - start < 4_000, "in time");
  assertEquals(await count(db, "effectonce_effects"), 0);
  assertEquals((await store.claim(KEY, HOLD)).state, "claimed"); // Its connection is back.
});

// ---------------------------------------------------------------------------------------------- what drivers and sessions do

const raw = (value: string) => value;
const DRIVERS: readonly { on: readonly ServerDatabase["name"][]; what: string; driver: object }[] = [
  { on: ["postgres"], what: "parsers that give every type as text", driver: { types: { getTypeParser: () => raw } } },
  {
    on: ["postgres"],
    what: "a parser that gives int8 as bigint",
    driver: { types: { getTypeParser: (oid: number) => oid === 20 ? BigInt : parserOf(oid) } },
  },
  {
    on: ["postgres"],
    what: "a parser that gives bool as 't' and 'f'",
    driver: { types: { getTypeParser: (oid: number) => oid === 16 ? raw : parserOf(oid) } },
  },
  {
    on: ["postgres"],
    what: "a parser that gives bytea as text",
    driver: { types: { getTypeParser: (oid: number) => oid === 17 ? raw : parserOf(oid) } },
  },
  { on: MYSQLS, what: "rowsAsArray", driver: { rowsAsArray: true } },
  { on: MYSQLS, what: "nestTables", driver: { nestTables: true } },
  { on: MYSQLS, what: "typeCast: all as text", driver: { typeCast: (field: { string(): unknown }) => field.string() } },
  { on: MYSQLS, what: "typeCast: false", driver: { typeCast: false } },
  {
    on: MYSQLS,
    what: "typeCast: tinyint(1) as boolean",
    driver: {
      typeCast: (field: { type: string; length: number; string(): string | null }, next: () => unknown) =>
        field.type === "TINY" && field.length === 1 ? field.string() === "1" : next(),
    },
  },
  {
    on: MYSQLS,
    what: "bigNumberStrings, dateStrings, decimalNumbers, jsonStrings, namedPlaceholders",
    driver: {
      ...{ supportBigNumbers: true, bigNumberStrings: true, dateStrings: true, decimalNumbers: true },
      ...{ jsonStrings: true, namedPlaceholders: true, multipleStatements: true, timezone: "+05:30" },
    },
  },
  { on: MYSQLS, what: "FOUND_ROWS off", driver: { flags: ["-FOUND_ROWS"] } },
  { on: MYSQLS, what: "the character set utf8mb4_general_ci", driver: { charset: "utf8mb4_general_ci" } },
];
function parserOf(oid: number): (text: string) => unknown {
  return oid === 16 ? (text) => text === "t" : oid === 17 ? (text) => Uint8Array.from(fromHex(text)) : raw;
}
const fromHex = (text: string) => (text.slice(2).match(/../g) ?? []).map((byte) => parseInt(byte, 16));

const SESSIONS: readonly { on: readonly ServerDatabase["name"][]; session: Readonly<Record<string, string>> }[] = [
  { on: ["postgres"], session: { standard_conforming_strings: "off", backslash_quote: "on", bytea_output: "escape" } },
  { on: ["postgres"], session: { DateStyle: "German", IntervalStyle: "iso_8601", timezone: "Asia/Kolkata" } },
  { on: MYSQLS, session: { sql_mode: "''" } },
  { on: MYSQLS, session: { sql_mode: "'NO_BACKSLASH_ESCAPES,ANSI_QUOTES,PIPES_AS_CONCAT,TRADITIONAL'" } },
  { on: MYSQLS, session: { sql_mode: "'ANSI,HIGH_NOT_PRECEDENCE,NO_UNSIGNED_SUBTRACTION'", time_zone: "'+05:30'" } },
  { on: MYSQLS, session: { collation_connection: "'utf8mb4_general_ci'" } },
];

for (const { on, what, driver } of DRIVERS) {
  eachServer(`works on a pool with ${what}`, async (db) => {
    if (!db.postgres) clearParserCache(); // By which another pool's options could help out.
    const pool = db.pool({ driver });
    await exercise(db.store(pool), db.outbox(pool));
  }, { on });
}
for (const { on, session } of SESSIONS) {
  const what = Object.entries(session).map(([name, value]) => `${name} ${value}`).join(", ");
  eachServer(`works in sessions with ${what}`, async (db) => {
    const pool = db.pool({ session });
    await db.migrate(pool); // Again, and in such a session.
    await exercise(db.store(pool), db.outbox(pool));
  }, { on });
}

eachServer(
  "refuses connections of a character set that is not Unicode, or that do not commit, in a sentence",
  async (db) => {
    for (const charset of ["latin1", "LATIN1_SWEDISH_CI"]) {
      const pool = db.pool({ driver: { charset } });
      const [store, outbox] = [db.store(pool, { name: "app" }), db.outbox(pool, { name: "app" })];
      for (
        const use of [() => store.claim(KEY, HOLD), () => store.transaction((effects) => effects.claim(KEY)), outbox.status]
      ) {
        const error = await assertRejects(
          use,
          EffectError,
          "Cannot use app: its connections are of the character set latin1",
        );
        assertEquals(error.code, "source_invalid");
      }
    }
    const pool = db.pool({ session: { autocommit: "0" } });
    const claim = () => db.store(pool, { name: "app" }).claim(KEY, HOLD);
    await assertRejects(claim, EffectError, "Cannot use app: its connections do not commit by themselves");
    assertEquals(await count(db, "effectonce_effects"), 0);
  },
  { on: MYSQLS },
);

// --------------------------------------------------------------------------------------------------- prefixes and schemas

eachServer("keeps installations with other prefixes and schemas apart", async (db, pool) => {
  const schema = db.postgres ? "Other" : `${new URL(db.url).pathname.slice(1)}_Other`;
  await db.sql(placed(db, `create schema "${schema}"`));
  try {
    const installations = [{}, { prefix: "a_" }, { prefix: "Second$" }, { schema }, { schema, prefix: "a_" }];
    for (const options of installations) {
      await db.migrate(pool, options);
      await db.migrate(pool, options);
    }
    const stores = installations.map((options) => db.store(pool, options));
    const outboxes = installations.map((options) => db.outbox(pool, options));
    for (const [i, store] of stores.entries()) {
      assertEquals((await store.claim(KEY, HOLD)).state, "claimed");
      await store.complete(KEY, 1, i);
      await store.transaction(async (effects) => {
        await effects.claim({ ...KEY, key: "m" });
        await effects.enqueue(...range(i + 1).map((n) => ({ id: `m${n}`, topic: "t", key: `${n}`, value: `${i}` })));
        await effects.advance({ relay: "r", source: "s" }, { n: 1, uid: `${i}`, prev: "", rows: [] });
      });
    }
    const ids = new Set<string>();
    for (const [i, store] of stores.entries()) {
      assertEquals(await store.claim(KEY, HOLD), { state: "done", result: i, resultOmitted: false });
      assertEquals((await store.positions({ relay: "r", source: "s" })).map(({ uid }) => uid), [`${i}`]);
      const session = await outboxes[i]!.open({ relay: `r${i}`, protocol: "claimed", onPark: "block", leaseMs: 60_000 });
      ids.add(session.id);
      const { messages } = await session.read({ rows: 10, bytes: 1000 });
      assertEquals(messages.map((message) => message.text()), range(i + 1).map(() => `${i}`));
      await session.park([{ message: messages[0]!, reason: "r", retryMs: null }]);
      await session.settle(messages.slice(1));
      await session.close(true);
      assertEquals((await outboxes[i]!.relays()).map(({ relay }) => relay), [`r${i}`]); // A parked one is left.
    }
    assertEquals(ids.size, installations.length);
    for (const outbox of outboxes) assertEquals((await outbox.parked()).map(({ id }) => id), ["m0"]);
    await outboxes[1]!.discard("m0");
    assertEquals(await Promise.all(outboxes.map(async (outbox) => (await outbox.parked()).length)), [1, 0, 1, 1, 1]);
  } finally {
    if (!db.postgres) await db.sql(placed(db, `drop schema "${schema}"`));
  }
});

Deno.test("refuses names that are none", async () => {
  for (const options of [{ prefix: 'a"; drop table x; --' }, { schema: "a.b" }, { prefix: "" }, { prefix: "1a" }]) {
    const use = async () => await postgresStore(new PGlite(), options).count();
    await assertRejects(use, RangeError, "as a name");
  }
});

eachServer("works with long names", async (db, pool) => {
  const schema = db.postgres ? "s".repeat(40) : new URL(db.url).pathname.slice(1);
  if (db.postgres) await db.sql(`create schema ${schema}`);
  for (const options of [{ prefix: "p".repeat(45) }, { prefix: "p".repeat(40), schema }]) {
    await db.migrate(pool, options);
    await exercise(db.store(pool, options), db.outbox(pool, options));
  }
});

// ----------------------------------------------------------------------------------------------------------------- migrate

eachServer("migrates by 8 pools at once on an empty database, and again", async (db) => {
  const pools = range(8).map(() => db.pool({ max: 2 }));
  await Promise.all(pools.map((pool) => db.migrate(pool)));
  const meta = await db.sql("select name, value from effectonce_meta order by name");
  assertEquals(meta.filter(({ name }) => name === "outbox_id" || name === "schema_version").length, 2);
  await Promise.all(pools.map((pool) => db.migrate(pool)));
  assertEquals(await db.sql("select name, value from effectonce_meta order by name"), meta);
  assertEquals(
    states(await Promise.all(pools.map((pool) => db.store(pool).claim(KEY, HOLD)))),
    { claimed: 1, busy: 7 },
  );
}, { migrated: false });

for (const name of ALL) {
  Deno.test(`${name} migrates by several processes at once`, async () => {
    await using db = await servers[name]();
    const adapter = db.postgres ? "postgres" : "mysql";
    const code = db.postgres
      ? `import pg from "pg"; const pool = new pg.Pool({ connectionString: ${JSON.stringify(db.url)} });
        import { migratePostgres as migrate, postgresStore as open } from "@effectonce/effectonce/${adapter}";`
      : `import mysql from "mysql2/promise"; const pool = mysql.createPool(${JSON.stringify(db.url)});
        import { migrateMysql as migrate, mysqlStore as open } from "@effectonce/effectonce/${adapter}";`;
    const run = `${code}
      await migrate(pool);
      console.log((await open(pool).claim({ scope: "s", key: "k" }, { leaseMs: 60_000 })).state);
      await pool.end();`;
    const outputs = await Promise.all(
      range(3).map(() => new Deno.Command(Deno.execPath(), { args: ["eval", "--no-check", run] }).output()),
    );
    const texts = outputs.map(({ stdout, stderr }) => new TextDecoder().decode(stdout) + new TextDecoder().decode(stderr));
    assertEquals(texts.sort(), ["busy\n", "busy\n", "claimed\n"]);
  });
}

/** Columns and indexes, as the server tells them. */
async function shapeOf(db: ServerDatabase): Promise<unknown> {
  const where = db.postgres ? "table_schema = 'public'" : "table_schema = database()";
  const columns = await db.sql(`select table_name as t, column_name as c, data_type as d, is_nullable as n,
    column_default as f, collation_name as o, character_maximum_length as l
    from information_schema.columns where ${where} order by table_name, ordinal_position`);
  const indexes = await db.sql(
    db.postgres
      ? "select indexdef as i from pg_indexes where schemaname = 'public' order by indexdef"
      : `select table_name as t, index_name as i, seq_in_index as s, column_name as c from information_schema.statistics
        where ${where} order by table_name, index_name, seq_in_index`,
  );
  const checks = await db.sql(
    db.postgres
      ? "select conrelid::regclass::text as t, pg_get_constraintdef(oid) as c from pg_constraint order by 1, 2"
      : "select constraint_name as n, check_clause as c from information_schema.check_constraints where " +
        "constraint_schema = database() order by check_clause, constraint_name",
  );
  assert(columns.length > 40 && indexes.length > 5 && checks.length > 5);
  return JSON.parse(JSON.stringify([columns, indexes, checks]));
}

for (const name of ALL) {
  Deno.test(`${name} has the tables that its printed schema makes by hand`, async () => {
    await using byHand = await servers[name]();
    await using migrated = await servers[name]();
    await byHand.sql(byHand.schema());
    await migrated.migrate(migrated.pool());
    assertEquals(await shapeOf(byHand), await shapeOf(migrated));
    const pool = byHand.pool();
    await exercise(byHand.store(pool), byHand.outbox(pool));
    const before = await byHand.sql("select name, value from effectonce_meta order by name");
    await byHand.migrate(pool);
    assertEquals(await byHand.sql("select name, value from effectonce_meta order by name"), before);
    await byHand.sql(byHand.schema({ prefix: "second_" }));
    await exercise(byHand.store(pool, { prefix: "second_" }), byHand.outbox(pool, { prefix: "second_" }));
  });
}

eachServer("refuses tables of a newer version, and leaves them as they are", async (db, pool) => {
  await db.sql("update effectonce_meta set value = '99' where name = 'schema_version'");
  const open = () => db.outbox(db.pool()).open({ relay: "r", protocol: "claimed", onPark: "block", leaseMs: 1 });
  for (const use of [() => db.migrate(pool), open]) assertEquals(await codeOf(use), "schema_newer");
  const [row] = await db.sql("select value from effectonce_meta where name = 'schema_version'");
  assertEquals(row?.["value"], "99");
});

eachServer("refuses claims in tables of a newer version, as SQLite does", async (db, pool) => {
  await db.sql("update effectonce_meta set value = '99' where name = 'schema_version'");
  for (
    const use of [
      () => db.store(pool).claim(KEY, HOLD),
      () => db.store(pool).transaction((effects) => effects.claim(KEY)),
      () => db.outbox(pool).status(),
    ]
  ) assertEquals(await codeOf(use), "schema_newer");
  assertEquals(await count(db, "effectonce_effects"), 0);
});

eachServer("says that there are no tables, and works once they are there", async (db, pool) => {
  const [store, outbox] = [db.store(pool), db.outbox(pool)];
  const uses = [
    () => store.claim(KEY, HOLD),
    () => store.list(),
    () => store.count(),
    () => store.transaction((effects) => effects.claim(KEY)),
    () => store.positions({ relay: "r", source: "s" }),
    () => store.prune({ olderThanMs: 1 }),
    () => outbox.status(),
    () => outbox.open({ relay: "r", protocol: "sealed", onPark: "block", leaseMs: 1 }),
  ];
  for (const use of uses) {
    const error = await assertRejects(use, EffectError, 'run "init"');
    assertEquals(error.code, "schema_missing");
  }
  await db.migrate(pool);
  const own = await assertRejects(() =>
    store.transaction((_, client: never) =>
      (client as { query(sql: string): Promise<unknown> }).query("select * from elsewhere")
    )
  );
  assert(!(own instanceof EffectError), "a table of the application's own that is missing is not ours");
  for (const use of uses) await use();
}, { migrated: false });

// ------------------------------------------------------------------------------------------------------------------- prune

eachServer("prunes each old effect once by several pruners, and waits for no lock on live ones", async (db, pool) => {
  const store = db.store(pool);
  const of = (i: number) => ({ scope: `s${i % 3}`, key: `k${String(i).padStart(5, "0")}` });
  await store.transaction((effects) => effects.claimAll(range(3_000).map(of)));
  await db.sql("update effectonce_effects set changed_ms = 1");
  const live = range(100).map((i) => ({ scope: `s${i % 3}`, key: `k${String(i * 30).padStart(5, "0")} live` }));
  await store.claimAll(live.slice(50).map((key) => ({ key, ...HOLD })));
  await store.transaction((effects) => effects.claimAll(live.slice(0, 50)));
  const holder = await db.connect(db.postgres ? pool : db.pool({ session: levelOf(db, "READ-COMMITTED") }));
  await holder.sql("begin");
  const locked = await holder.sql("select state from effectonce_effects where changed_ms > 1 for update");
  assertEquals(locked.length, 100);
  const own = `scope = ${db.postgres ? "'s0'" : "x'7330'"} and "key" = ${db.postgres ? "'k01500'" : "x'6b3031353030'"}`;
  assertEquals((await holder.sql(placed(db, `select state from effectonce_effects where ${own} for update`))).length, 1);
  const pruners = range(4).map(() => db.store(db.pool({ max: 1 }), { waitMs: 1_000 }));
  const start = realRuntime.now();
  const pruned = await Promise.all(pruners.map(async (pruner) => {
    let sum = 0;
    for (let idle = 0; idle < 2;) { // Another one's portion may have been skipped.
      const n = await pruner.prune({ olderThanMs: 60_000, limit: 200 });
      sum += n;
      if (n === 0) idle++;
    }
    return sum;
  }));
  assert(realRuntime.now() - start < 15_000, `${Math.round(realRuntime.now() - start)} ms`);
  assertEquals(pruned.reduce((a, b) => a + b), 2_999, JSON.stringify(pruned)); // The one that is locked is left for later.
  await holder.sql("rollback");
  holder.release();
  assertEquals(await store.prune({ olderThanMs: 60_000 }) + await store.prune({ olderThanMs: 60_000 }), 1);
  assertEquals(await count(db, "effectonce_effects"), 100);
  assertEquals(await count(db, "effectonce_effects", "changed_ms > 1"), 100);
});

eachServer("locks no live effect while it prunes, and no key that is yet to be claimed", async (db, pool) => {
  const store = db.store(pool);
  const old = range(40).map((i) => ({ scope: "s", key: `k${i}` }));
  await store.transaction((effects) => effects.claimAll(old));
  await db.sql("update effectonce_effects set changed_ms = 1");
  await store.claimAll(range(40).map((i) => ({ key: { scope: "s", key: `k${i} live` }, ...HOLD })));
  const [reached, goOn] = [gate(), gate()];
  const pruning = db.store(paused(pool, /skip locked/, reached.open, goOn.passed), { waitMs: 5_000 })
    .prune({ olderThanMs: 60_000 });
  quiet(pruning);
  await reached.passed;
  const other = await db.connect(db.postgres ? pool : db.pool({ session: levelOf(db, "READ-COMMITTED") }));
  await other.sql("begin");
  const rows = await other.sql("select state from effectonce_effects where changed_ms > 1 for update skip locked");
  assertEquals(rows.length, 40, "live rows that nobody has locked");
  await other.sql("rollback");
  other.release();
  const fresh = range(40).map((i) => ({ scope: "s", key: `k${i} fresh` }));
  const impatient = db.store(pool, { waitMs: 500 });
  assertEquals(states(await Promise.all(fresh.map((key) => impatient.claim(key, HOLD)))), { claimed: 40 });
  await db.store(pool, { waitMs: 500 }).complete({ scope: "s", key: "k1 live" }, 1, "done");
  goOn.open();
  assertEquals(await pruning, 40);
  assertEquals(await count(db, "effectonce_effects"), 80);
});

eachServer("waits for no lock on other keys, in batches as well", async (db, pool) => {
  const [store, impatient] = [db.store(pool), db.store(pool, { waitMs: 500 })];
  const of = (what: string, count: number) => range(count).map((i) => ({ scope: "s", key: `k${i} ${what}` }));
  await store.claimAll(of("known", 40).map((key) => ({ key, ...HOLD })));
  const [taken, end] = [gate(), gate()];
  const holding = store.transaction(async (effects) => {
    await effects.claimAll(of("held", 3));
    taken.open();
    await end.passed;
  });
  quiet(holding);
  await taken.passed;
  try {
    const fresh = of("fresh", 40).map((key) => ({ key, ...HOLD }));
    assertEquals(states(await impatient.claimAll(fresh)), { claimed: 40 });
    await impatient.completeAll(fresh.map(({ key }) => ({ key, fence: 1, result: 1 })));
    await impatient.completeAll(of("known", 40).map((key) => ({ key, fence: 1, result: 1 })));
    const claims = await impatient.transaction((effects) => effects.claimAll([...of("new", 40), ...of("known", 40)]));
    assertEquals(states(claims), { claimed: 40, done: 40 });
  } finally {
    end.open();
  }
  await holding;
});

/** A pool whose statements that match pause once they have been answered. */
function paused(pool: Pool, like: RegExp, reached: () => void, goOn: Promise<void>): Pool {
  const pausing = (client: Record<string, unknown>) =>
    new Proxy(client, {
      get(target, name) {
        const member = target[name as string];
        if (typeof member !== "function") return member;
        if (name !== "query") return member.bind(target);
        return async (...args: unknown[]) => {
          const answer = await member.apply(target, args);
          const [text] = args as [string | { sql: string }];
          if (like.test(typeof text === "string" ? text : text.sql)) {
            reached();
            await goOn;
          }
          return answer;
        };
      },
    });
  const take = async () => {
    const own = pool as unknown as Record<string, () => Promise<Record<string, unknown>>>;
    return pausing(await own["connect" in own ? "connect" : "getConnection"]!());
  };
  return ("connect" in pool ? { connect: take } : { getConnection: take }) as unknown as Pool;
}

// ------------------------------------------------------------------------------------------------------------------ PGlite

/** One for all tests: to start it takes a second. */
let started: Promise<PGlite> | undefined;
async function pglite(): Promise<PGlite> {
  started ??= PGlite.create();
  const db = await started;
  await db.exec(`rollback; drop schema if exists kept cascade; drop schema if exists clock cascade;
    drop schema public cascade; create schema public; create schema clock;
    create table clock.shift (ms bigint not null);
    insert into clock.shift values (0);
    create function clock.clock_timestamp() returns timestamptz language sql volatile as
      $$ select pg_catalog.clock_timestamp() + ms * interval '1 millisecond' from clock.shift $$;
    set search_path = public, clock, pg_catalog;`);
  return db;
}
const LITE_WAIT_MS = 100;
const alone = "PGlite is one connection: a transaction and what is beside it take turns";

const pgliteEnds: Ends = {
  store: {
    async open() {
      const db = await pglite();
      await migratePostgres(db);
      const options = { waitMs: LITE_WAIT_MS };
      return {
        store: postgresStore(db, options) as EffectStore<unknown>,
        again: postgresStore(db, options) as EffectStore<unknown>,
        waitMs: LITE_WAIT_MS,
        advance: async (ms) => void await db.query("update clock.shift set ms = ms + $1", [ms]),
        close: () => Promise.resolve(),
      };
    },
    skip: {
      "a transaction is not seen by the other handle before it commits": alone,
      "advance() is refused to the slower of two owners": alone,
    },
  },
  source: {
    async open() {
      const db = await pglite();
      await migratePostgres(db);
      const outbox = postgresOutbox(db);
      return {
        source: ({ topics } = {}) => postgresOutbox(db, { topics }),
        again: ({ topics } = {}) => postgresOutbox(db, { topics }),
        enqueue: (...messages) => postgresStore(db).transaction((effects) => effects.enqueue(...messages)),
        advance: async (ms) => void await db.query("update clock.shift set ms = ms + $1", [ms]),
        release: outbox.release,
        discard: outbox.discard,
        async snapshot() {
          const { rows } = await db.query<{ tablename: string }>(
            "select tablename from pg_tables where schemaname = 'public'",
          );
          const tables = rows.map(({ tablename }) => tablename);
          await db.exec("drop schema if exists kept cascade; create schema kept");
          for (const table of tables) await db.exec(`create table kept.${table} as table public.${table}`);
          return async () => {
            const restore = tables.map((table) =>
              `delete from public.${table}; insert into public.${table} overriding system value select * from kept.${table};`
            );
            await db.exec(`begin; ${restore.join("\n")} commit`);
          };
        },
        close: () => Promise.resolve(),
      };
    },
  },
  sink: {
    async open() {
      const db = await pglite();
      await migratePostgres(db);
      const stores = [postgresStore(db), postgresStore(db)] as const;
      return {
        sink: handlerOn(stores[0]),
        again: () => handlerOn(stores[1]),
        contents: () => contentsOf(stores[1]),
        refused,
        close: () => Promise.resolve(),
      };
    },
  },
};
suites("pglite", pgliteEnds);

Deno.test("pglite refuses to work while a transaction of the application's own is open on it", async () => {
  const db = await pglite();
  await migratePostgres(db);
  await db.exec("create table orders (id integer)");
  const [store, outbox] = [postgresStore(db, { name: "app" }), postgresOutbox(db, { name: "app" })];
  await store.transaction((effects) => effects.enqueue({ id: "m", topic: "t", value: 1 }));
  const uses = [
    () => store.claim(KEY, HOLD),
    () => store.count(),
    () => store.transaction((effects) => effects.claim(KEY)),
    () => outbox.status(),
    () => outbox.discard("m"),
    () => outbox.open({ relay: "r", protocol: "claimed", onPark: "block", leaseMs: 1 }),
  ];
  for (const again of range(3)) {
    for (const [i, use] of uses.entries()) {
      await db.exec("begin");
      await db.exec(`insert into orders values (${i})`);
      const error = await assertRejects(use, EffectError, "A transaction is open on the only connection of app");
      assertEquals(error.code, "source_invalid", `${again} ${i}`);
      await db.exec("rollback"); // It is still the application's.
    }
  }
  assertEquals((await db.query("select * from orders")).rows, []);
  assertEquals((await store.count()).claimed, 0);
  assertEquals((await outbox.status()).pending, 1);
  await store.transaction(async (effects, client) => {
    const own: PGlite = client;
    await own.query("insert into orders values ($1)", [1]);
    await effects.claim(KEY);
  });
  assertEquals((await db.query("select * from orders")).rows, [{ id: 1 }]);
  await db.exec("begin");
  await db.exec("select * from nowhere").catch(() => {});
  await assertRejects(() => store.count());
  await db.exec("rollback");
  await exercise(store as EffectStore<never>, outbox);
});

Deno.test("pglite ends in busy where it is called in the application's own db.transaction(), which join() takes", async () => {
  const db = await pglite();
  await migratePostgres(db);
  const store = postgresStore(db, { waitMs: LITE_WAIT_MS });
  const over = new AbortController();
  const late = realRuntime.sleep(5_000, over.signal).then(() => "it hangs");
  const nested = db.transaction(() =>
    Promise.race([store.claim(KEY, HOLD).then(({ state }) => state, (error: EffectError) => error.code), late])
  );
  assertEquals(await nested.finally(() => over.abort()), "busy");
  await db.transaction(async (tx) => {
    const effects = store.join(async (q, v) => (await tx.query<Record<string, unknown>>(q, [...v])).rows);
    await useAll(effects);
  });
  assertEquals((await store.count()).done, 4);
  assertEquals((await db.query("select count(*)::int as n from effectonce_outbox")).rows, [{ n: 4 }]);
});
