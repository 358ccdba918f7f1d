/**
 * The databases of the benchmarks, each with an application's table: SQLite by both drivers in a temporary file, the servers as
 * `tests/services` finds or starts them.
 *
 * @module
 */
import { DatabaseSync } from "node:sqlite";
import Database from "better-sqlite3";
import mysql from "mysql2/promise";
// @ts-types="@types/pg"
import pg from "pg";
import { migrateMysql, mysqlOutbox, mysqlStore } from "../adapters/mysql.ts";
import { migratePostgres, postgresOutbox, postgresStore } from "../adapters/postgres.ts";
import { migrateSqlite, type SqliteClient, sqliteOutbox, sqliteStore } from "../adapters/sqlite.ts";
import type { ClaimStore, EffectTransaction, Outbox } from "../mod.ts";
import { database } from "../tests/services/mod.ts";

/** A database to measure on. */
export interface Kit {
  /** The server's version, as it says itself. */
  readonly version: string;
  /** Its claims. */
  readonly store: ClaimStore;
  /** Its outbox. */
  readonly outbox: Outbox;
  /** A transaction as an application writes it: one INSERT for each key; `byHand`: with a dedupe row for each, all at once. */
  bare(keys: readonly string[], byHand?: boolean): Promise<void>;
  /** The same in a transaction of the store's, with what it does first. */
  claimed(keys: readonly string[], first: (effects: EffectTransaction) => Promise<unknown>): Promise<void>;
  /** The same in a transaction of the application's. */
  joined(keys: readonly string[], first: (effects: EffectTransaction) => Promise<unknown>): Promise<void>;
  /** Stores so many effects that are done, of the scope `bench` and with the keys `order-…`. */
  fillEffects(count: number): Promise<void>;
  /** Enqueues so many messages of 200 bytes, of 1000 keys. */
  fillOutbox(count: number): Promise<void>;
  /** The first hundred messages, as a loop written by hand reads them. */
  firstRows(): Promise<readonly { readonly seq: unknown; readonly value: Uint8Array }[]>;
  /** Deletes one of them. */
  deleteRow(seq: unknown): Promise<unknown>;
  /** Lets go of it, and removes it. */
  close(): Promise<void>;
}

const ORDERS = "create table orders (id varchar(64) primary key, total integer)";

const FIRST = "select seq, value from effectonce_outbox order by seq limit 100";
const DELETE = "delete from effectonce_outbox where seq = ";
type Rows = Awaited<ReturnType<Kit["firstRows"]>>;

type Sqlite = SqliteClient & { close(): unknown };

async function sqliteKit(connect: (path: string) => Sqlite): Promise<Kit> {
  const folder = await Deno.makeTempDir({ prefix: "effectonce-bench-" });
  const client = connect(`${folder}/app.db`);
  await migrateSqlite(client);
  const store = sqliteStore(client);
  await store.count(); // Sets synchronous = FULL for all sides.
  client.prepare(ORDERS).run();
  client.prepare("create table handled (key text primary key, at integer not null) without rowid").run();
  const insert = client.prepare("insert into orders values (?, ?)");
  const handle = client.prepare("insert into handled values (?, ?) on conflict do nothing");
  const remove = client.prepare(`${DELETE}?`);
  const [begin, commit] = [client.prepare("begin immediate"), client.prepare("commit")];
  const { version } = client.prepare("select sqlite_version() as version").get() as { version: string };
  return {
    version,
    store,
    outbox: sqliteOutbox(client),
    bare(keys, byHand = false) {
      begin.run();
      if (byHand) { for (const key of keys) handle.run(key, Date.now()); }
      for (const key of keys) insert.run(key, 5);
      commit.run();
      return Promise.resolve();
    },
    claimed: (keys, first) =>
      store.transaction(async (effects) => {
        await first(effects);
        for (const key of keys) insert.run(key, 5);
      }),
    async joined(keys, first) {
      begin.run();
      await first(store.join(client));
      for (const key of keys) insert.run(key, 5);
      commit.run();
    },
    fillEffects(count) {
      client.prepare(`with recursive n (i) as (select 1 union all select i + 1 from n where i < ${count})
        insert into effectonce_effects (scope, key, changed_ms) select 'bench', 'order-' || (i * 7919 % ${count}), i from n`)
        .run();
      client.prepare("pragma wal_checkpoint(truncate)").get();
      return Promise.resolve();
    },
    fillOutbox(count) {
      client.prepare(`with recursive n (i) as (select 1 union all select i + 1 from n where i < ${count})
        insert into effectonce_outbox (topic, key, value) select 'orders', 'key-' || (i % 1000), cast(printf('%200s', i) as blob)
        from n`).run();
      return Promise.resolve();
    },
    firstRows: () => Promise.resolve(client.prepare(FIRST).all() as unknown as Rows),
    deleteRow: (seq) => Promise.resolve(remove.run(seq)),
    async close() {
      client.close();
      await Deno.remove(folder, { recursive: true });
    },
  };
}

async function postgresKit(): Promise<Kit> {
  const db = await database("postgres");
  const pool = new pg.Pool({ connectionString: db.url, max: 20 });
  pool.on("error", () => {}); // At the end its database goes before its connections have.
  await migratePostgres(pool);
  const store = postgresStore(pool);
  await pool.query(ORDERS);
  await pool.query("create table handled (key text primary key, at bigint not null)");
  const client = await pool.connect();
  const insert = "insert into orders values ($1, $2)";
  return {
    version: (await pool.query("show server_version")).rows[0].server_version,
    store,
    outbox: postgresOutbox(pool),
    async bare(keys, byHand = false) {
      await client.query("begin");
      if (byHand) {
        const rows = keys.map((_, i) => `($${i + 1}, 0)`).join(", ");
        await client.query(`insert into handled values ${rows} on conflict do nothing`, [...keys]);
      }
      for (const key of keys) await client.query(insert, [key, 5]);
      await client.query("commit");
    },
    claimed: (keys, first) =>
      store.transaction(async (effects, client) => {
        await first(effects);
        for (const key of keys) await client.query(insert, [key, 5]);
      }),
    async joined(keys, first) {
      await client.query("begin");
      await first(store.join(client));
      for (const key of keys) await client.query(insert, [key, 5]);
      await client.query("commit");
    },
    async fillEffects(count) {
      await pool.query(`insert into effectonce_effects (scope, key, changed_ms)
        select 'bench', 'order-' || (i::bigint * 7919 % ${count}), i from generate_series(1, ${count}) i`);
      await pool.query("vacuum analyze effectonce_effects");
      await pool.query("checkpoint");
    },
    async fillOutbox(count) {
      await pool.query(`insert into effectonce_outbox (topic, key, value)
        select 'orders', 'key-' || (i % 1000), convert_to(lpad(i::text, 200), 'UTF8') from generate_series(1, ${count}) i`);
      await pool.query("vacuum analyze effectonce_outbox");
    },
    firstRows: async () => (await client.query(FIRST)).rows,
    deleteRow: (seq) => client.query(`${DELETE}$1`, [seq]),
    async close() {
      client.release();
      await pool.end();
      await db[Symbol.asyncDispose]();
    },
  };
}

async function mysqlKit(kind: "mysql" | "mariadb"): Promise<Kit> {
  const db = await database(kind);
  const pool = mysql.createPool({ uri: db.url, connectionLimit: 20 });
  await migrateMysql(pool);
  const store = mysqlStore(pool);
  await pool.query(ORDERS);
  await pool.query("create table handled (`key` varbinary(255) primary key, at bigint not null)");
  const client = await pool.getConnection();
  const insert = "insert into orders values (?, ?)";
  const depth = kind === "mysql" ? "cte_max_recursion_depth" : "max_recursive_iterations";
  const numbers = (count: number) => `with recursive n (i) as (select 1 union all select i + 1 from n where i < ${count})`;
  const fill = async (count: number, sql: (numbers: string) => string) => {
    await client.query(`set session ${depth} = ${count + 1}`);
    await client.query(sql(numbers(count)));
  };
  const [versions] = await pool.query("select version() as version");
  return {
    version: (versions as { version: string }[])[0]!.version,
    store,
    outbox: mysqlOutbox(pool),
    async bare(keys, byHand = false) {
      await client.query("start transaction");
      if (byHand) {
        const rows = keys.map(() => "(?, 0)").join(", ");
        await client.query(`insert into handled values ${rows} on duplicate key update at = at`, [...keys]);
      }
      for (const key of keys) await client.query(insert, [key, 5]);
      await client.query("commit");
    },
    claimed: (keys, first) =>
      store.transaction(async (effects, client) => {
        await first(effects);
        for (const key of keys) await client.query(insert, [key, 5]);
      }),
    async joined(keys, first) {
      await client.query("start transaction");
      await first(store.join(client));
      for (const key of keys) await client.query(insert, [key, 5]);
      await client.query("commit");
    },
    fillEffects: (count) =>
      fill(count, (numbers) =>
        `insert into effectonce_effects (scope, \`key\`, changed_ms) ${numbers}
        select 'bench', concat('order-', i * 7919 % ${count}), i from n`),
    fillOutbox: (count) =>
      fill(count, (numbers) =>
        `insert into effectonce_outbox (topic, \`key\`, value) ${numbers}
        select 'orders', concat('key-', i % 1000), lpad(i, 200, ' ') from n`),
    firstRows: async () => (await client.query(FIRST))[0] as unknown as Rows,
    deleteRow: (seq) => client.query(`${DELETE}?`, [seq]),
    async close() {
      client.release();
      await pool.end();
      await db[Symbol.asyncDispose]();
    },
  };
}

/** How each is opened, by adapter and driver. */
export const KITS: Readonly<Record<string, () => Promise<Kit>>> = {
  "sqlite/better-sqlite3": () => sqliteKit((path) => new Database(path)),
  "sqlite/node": () => sqliteKit((path) => new DatabaseSync(path) as Sqlite),
  "postgres/pg": postgresKit,
  "mysql/mysql2": () => mysqlKit("mysql"),
  "mariadb/mysql2": () => mysqlKit("mariadb"),
};

/** Those that are asked for by the name of an adapter; all, if none is. */
export function kitsOf(adapters: readonly string[] = []): readonly string[] {
  return Object.keys(KITS).filter((name) => adapters.length === 0 || adapters.includes(name.split("/")[0]!));
}
