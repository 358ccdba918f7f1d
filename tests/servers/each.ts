/** One face for PostgreSQL, MariaDB and MySQL, so that a test is written once for all three. */
import { assert, assertEquals } from "@std/assert";
// @ts-types="@types/pg"
import type pg from "pg";
import type mysql from "mysql2/promise";
import { type EffectStore, type Outbox, realRuntime, relay, type RunSql } from "@effectonce/effectonce";
import { memorySink } from "@effectonce/effectonce/memory";
import {
  migrateMysql,
  mysqlOutbox,
  type MysqlOutboxOptions,
  type MysqlPool,
  mysqlSchema,
  mysqlStore,
} from "@effectonce/effectonce/mysql";
import {
  migratePostgres,
  postgresOutbox,
  type PostgresOutboxOptions,
  type PostgresPool,
  postgresSchema,
  postgresStore,
} from "@effectonce/effectonce/postgres";
import { mysqlDatabase } from "./mysql.ts";
import { postgresDatabase } from "./postgres.ts";

/** What all take. */
export type Options = PostgresOutboxOptions & MysqlOutboxOptions;
/** How a pool is made. */
export interface PoolSettings {
  /** How many connections. */
  readonly max?: number;
  /** Settings of each session: `set session name = value` on MySQL, `-c name=value` on PostgreSQL. */
  readonly session?: Readonly<Record<string, string | undefined>>;
  /** What the driver takes besides. */
  readonly driver?: pg.PoolConfig | mysql.PoolOptions;
}

/** A connection of a pool, as a person at a prompt has it. */
export interface Connection {
  /** One statement. */
  sql(text: string, values?: readonly unknown[]): Promise<Record<string, unknown>[]>;
  /** As its driver gives it. */
  readonly client: never;
  /** Back to the pool. */
  release(): void;
}

/** Pools of `pg` and `mysql2`; only the functions of {@linkcode ServerDatabase} know which. */
export type Pool = (PostgresPool | MysqlPool) & { readonly end: () => Promise<void> };

/** A fresh database. */
export interface ServerDatabase extends AsyncDisposable {
  /** Which server. */
  readonly name: "postgres" | "mariadb" | "mysql";
  /** Whether it is PostgreSQL. */
  readonly postgres: boolean;
  /** Its URL. */
  readonly url: string;
  /** One statement. */
  sql(text: string, values?: readonly unknown[]): Promise<Record<string, unknown>[]>;
  /** A pool that is ended with the database. */
  pool(settings?: PoolSettings): Pool;
  /** Takes a connection. */
  connect(pool: Pool): Promise<Connection>;
  /** The adapter's functions. */
  migrate(pool: Pool, options?: Options): Promise<void>;
  store(pool: Pool, options?: Options): EffectStore<never>;
  outbox(pool: Pool, options?: Options): Outbox;
  schema(options?: Options): string;
  /** How many statements of this database's sessions wait for a lock, and have `like` in them. */
  waiting(like?: string): Promise<number>;
}

/** Whether it comes true within some seconds. */
export async function until(what: string, isTrue: () => Promise<boolean> | boolean, ms = 10_000): Promise<void> {
  const end = Date.now() + ms;
  while (!await isTrue()) {
    if (Date.now() > end) throw new Error(`It did not come true within ${ms} ms: ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 5));
  }
}

/** Ends what a test that failed left open: connections, and transactions that wait for it for ever. */
function createEnding(db: AsyncDisposable) {
  const taken = new Set<() => void>();
  return {
    /** What gives a connection back, once. */
    releasing(release: () => void, destroy: () => void): () => void {
      taken.add(destroy);
      return () => {
        if (taken.delete(destroy)) release();
      };
    },
    async end() {
      for (const destroy of taken) destroy();
      const over = new AbortController();
      const ended = await Promise.race([
        db[Symbol.asyncDispose]().then(() => true),
        realRuntime.sleep(20_000, over.signal).then(() => false),
      ]).finally(() => over.abort());
      if (!ended) throw new Error("A transaction that a test has begun does not end");
    },
  };
}

async function openPostgres(): Promise<ServerDatabase> {
  const db = await postgresDatabase();
  const ending = createEnding(db);
  return {
    name: "postgres",
    postgres: true,
    url: db.url,
    sql: db.sql,
    pool({ max = 8, session = {}, driver = {} } = {}) {
      const options = Object.entries(session).map(([name, value]) => `-c ${name}=${value!.replaceAll(" ", "\\ ")}`).join(
        " ",
      );
      return db.pool({ max, options, ...driver as pg.PoolConfig });
    },
    async connect(pool) {
      const client = await (pool as unknown as pg.Pool).connect();
      return {
        sql: async (text, values = []) => (await client.query(text, [...values])).rows,
        client: client as never,
        release: ending.releasing(() => client.release(), () => client.release(true)),
      };
    },
    migrate: (pool, options) => migratePostgres(pool as PostgresPool, options),
    store: (pool, options) => postgresStore(pool as PostgresPool, options) as EffectStore<unknown> as EffectStore<never>,
    outbox: (pool, options) => postgresOutbox(pool as PostgresPool, options),
    schema: postgresSchema,
    async waiting(like = "") {
      const [row] = await db.sql(
        `select count(*) as n from pg_stat_activity
          where datname = current_database() and wait_event_type = 'Lock' and position($1 in query) > 0`,
        [like],
      );
      return Number(row!["n"]);
    },
    [Symbol.asyncDispose]: ending.end,
  };
}

async function openMysql(name: "mysql" | "mariadb"): Promise<ServerDatabase> {
  const db = await mysqlDatabase(name);
  const ending = createEnding(db);
  return {
    name,
    postgres: false,
    url: db.url,
    sql: db.sql,
    pool({ max = 8, session = {}, driver = {} } = {}) {
      const pool = db.pool({ connectionLimit: max, ...driver as mysql.PoolOptions });
      pool.on("connection", (connection) => {
        for (const [name, value] of Object.entries(session)) connection.query(`set session ${name} = ${value}`);
      });
      return pool;
    },
    async connect(pool) {
      const client = await (pool as unknown as mysql.Pool).getConnection();
      return {
        sql: async (text, values = []) => (await client.query(text, [...values]))[0] as Record<string, unknown>[],
        client: client as never,
        release: ending.releasing(() => client.release(), () => client.destroy()),
      };
    },
    migrate: (pool, options) => migrateMysql(pool as MysqlPool, options),
    store: (pool, options) => mysqlStore(pool as MysqlPool, options) as EffectStore<unknown> as EffectStore<never>,
    outbox: (pool, options) => mysqlOutbox(pool as MysqlPool, options),
    schema: (options) => mysqlSchema(name, options),
    async waiting(like = "") {
      await new Promise((resolve) => setTimeout(resolve, 120)); // What is read more often is not renewed.
      const [row] = await db.sql(
        `select count(*) as n from information_schema.innodb_trx t
          join information_schema.processlist p on p.id = t.trx_mysql_thread_id
          where p.db = database() and t.trx_state = 'LOCK WAIT' and locate(?, t.trx_query) > 0`,
        [like],
      );
      return Number(row!["n"]);
    },
    [Symbol.asyncDispose]: ending.end,
  };
}

/** All three. */
export const servers: Readonly<Record<ServerDatabase["name"], () => Promise<ServerDatabase>>> = {
  postgres: openPostgres,
  mariadb: () => openMysql("mariadb"),
  mysql: () => openMysql("mysql"),
};

/** The two that speak MySQL's protocol. */
export const MYSQLS = ["mariadb", "mysql"] as const;
/** All. */
export const ALL = ["postgres", ...MYSQLS] as const;

/** One test for each server, on a fresh database with tables. */
export function eachServer(
  name: string,
  run: (db: ServerDatabase, pool: Pool) => Promise<void>,
  { on = ALL, migrated = true }: { readonly on?: readonly ServerDatabase["name"][]; readonly migrated?: boolean } = {},
): void {
  for (const server of on) {
    Deno.test(`${server} ${name}`, async () => {
      await using db = await servers[server]();
      const pool = db.pool();
      if (migrated) await db.migrate(pool);
      await run(db, pool);
    });
  }
}

/** As `$1` or `?`. */
export const placed = (db: ServerDatabase, sql: string): string => {
  let n = 0;
  return db.postgres ? sql.replace(/\?/g, () => `$${++n}`) : sql.replaceAll(`"`, "`");
};

/** The statements of a connection, as `join` takes them. */
export const runOn = ({ sql }: Connection): RunSql => (text, values) => sql(text, values);

const bytes = Uint8Array.from({ length: 256 }, (_, i) => i);

/** Claims with doubt, results that are omitted, requests and values of bytes: what a driver's settings could change. */
export async function exercise(store: EffectStore<never>, outbox: Outbox): Promise<void> {
  const run = crypto.randomUUID();
  const key = (key: string) => ({ scope: `exercise ${run}`, key: `${key} 'ß😀"\\?` });
  const claimed = async (of: string, request: Uint8Array | null) => {
    const options = { leaseMs: 1, repeatWithinMs: 3_600_000, request: bytes };
    let claim = await store.claim(key(of), options);
    await until("the lease of 1 ms has ended", async () => {
      if (claim.state === "busy") claim = await store.claim(key(of), options);
      return claim.state !== "busy";
    });
    assert(claim.state === "claimed", claim.state);
    assertEquals(claim.request && new Uint8Array(claim.request), request);
    return claim;
  };
  assertEquals((await claimed("doubt", bytes)).fence, 1);
  const { fence, attempt, generation } = await claimed("doubt", bytes);
  assertEquals({ fence, attempt, generation }, { fence: 2, attempt: 2, generation: 1 });
  // An attempt before this one may have happened, so this is no refusal.
  assertEquals(await store.fail(key("doubt"), 2, { as: "rejected", reason: "ß" }), "uncertain");
  const [record] = await store.list(key("doubt"));
  assert(record?.doubt === true && record.error === "ß", JSON.stringify(record));
  await store.complete(key("omitted"), (await claimed("omitted", bytes)).fence, "x".repeat(70_000));
  const omitted = await store.claim(key("omitted"), { leaseMs: 1, request: bytes });
  assertEquals(omitted, { state: "done", result: null, resultOmitted: true });
  await store.complete(key("done"), (await claimed("done", bytes)).fence, { a: "😀'\\" });
  const done = await store.claim(key("done"), { leaseMs: 1, request: bytes });
  assertEquals(done, { state: "done", result: { a: "😀'\\" }, resultOmitted: false });

  const topic = `topic ${run} ß😀`;
  const sent = [
    { id: `1 ${run}`, key: "k'", value: bytes },
    { id: `2 ${run}`, key: null, value: new Uint8Array() },
    { id: `3 ${run}`, key: "k'", value: null },
  ];
  await store.transaction(async (effects) => {
    const claims = await effects.claimAll([key("done"), key("joined"), key("joined")]);
    assertEquals(claims.map(({ state }) => state), ["mismatch", "claimed", "done"]);
    await effects.complete(key("joined"), [1]);
    await effects.enqueue(...sent.map((message) => ({ ...message, topic, headers: { h: "ß'\\" } })));
  });
  const joined = await store.claim(key("joined"), { leaseMs: 1 });
  assertEquals(joined, { state: "done", result: [1], resultOmitted: false });
  const to = memorySink();
  await relay({ name: run, from: outbox, to, store, drain: true, lanes: 1 });
  const got = to.messages.filter((message) => message.topic === topic).map(({ id, key, value, headers }) => {
    return { id, key, value: value && new Uint8Array(value), headers };
  });
  assertEquals(got.sort((a, b) => a.id < b.id ? -1 : 1), sent.map((message) => ({ ...message, headers: { h: "ß'\\" } })));
  assertEquals(await outbox.status(), { pending: 0, heldBack: 0, parked: 0, oldestMs: null });
}
