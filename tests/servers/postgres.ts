/** Stores, sources and sinks on PostgreSQL, each on a database of its own. */
// @ts-types="@types/pg"
import pg from "pg";
import type { EffectStore } from "@effectonce/effectonce";
import { migratePostgres, postgresOutbox, type PostgresOutboxOptions, postgresStore } from "@effectonce/effectonce/postgres";
import { contentsOf, type Ends, handlerOn, refused } from "../runtime/suite.ts";
import { database } from "../services/mod.ts";

const WAIT_MS = 2_000;

/** A fresh database. */
export interface PostgresTestDatabase {
  /** Its URL. */
  readonly url: string;
  /** A pool of its own, which is ended with the database. */
  pool(options?: pg.PoolConfig): pg.Pool;
  /** One statement. */
  sql(text: string, values?: readonly unknown[]): Promise<Record<string, unknown>[]>;
  /** Moves its clock on. */
  advance(ms: number): Promise<void>;
  /** Keeps the rows of all tables; the function that comes back puts them in again, as a restored dump has them. */
  snapshot(): Promise<() => Promise<void>>;
  [Symbol.asyncDispose](): Promise<void>;
}

/** Makes a database, whose clock can be moved on: its own `clock_timestamp()` comes before the server's. */
export async function postgresDatabase(): Promise<PostgresTestDatabase> {
  const made = await database("postgres");
  const pools: pg.Pool[] = [];
  function pool(options: pg.PoolConfig = {}): pg.Pool {
    const pool = new pg.Pool({ connectionString: made.url, max: 8, ...options });
    pool.on("error", () => {}); // Of a connection that a test breaks.
    pools.push(pool);
    return pool;
  }
  const first = pool({ max: 1 });
  const name = new URL(made.url).pathname.slice(1);
  await first.query(`
    create schema clock;
    create table clock.shift (ms bigint not null);
    insert into clock.shift values (0);
    create function clock.clock_timestamp() returns timestamptz language sql volatile as
      $$ select pg_catalog.clock_timestamp() + ms * interval '1 millisecond' from clock.shift $$;
    alter database "${name}" set search_path = public, clock, pg_catalog;`);
  await first.end();
  pools.pop();
  const operator = pool({ max: 2 });
  return {
    url: made.url,
    pool,
    sql: async (text, values = []) => (await operator.query(text, [...values])).rows,
    async advance(ms) {
      await operator.query("update clock.shift set ms = ms + $1", [ms]);
    },
    async snapshot() {
      const tables = (await operator.query("select tablename from pg_tables where schemaname = 'public'")).rows
        .map(({ tablename }) => tablename as string);
      await operator.query("drop schema if exists kept cascade; create schema kept");
      for (const table of tables) await operator.query(`create table kept.${table} as table public.${table}`);
      return async () => {
        const restore = tables.map((table) =>
          `delete from public.${table}; insert into public.${table} overriding system value select * from kept.${table};`
        );
        await operator.query(`begin; ${restore.join("\n")} commit`);
      };
    },
    async [Symbol.asyncDispose]() {
      for (const pool of pools) await pool.end();
      await made[Symbol.asyncDispose]();
    },
  };
}

/** Ends in PostgreSQL; `more`: what its sources do beyond the usual. */
export function postgresEnds(more: PostgresOutboxOptions = {}): Ends {
  return {
    store: {
      async open() {
        const db = await postgresDatabase();
        const options = { waitMs: WAIT_MS, ...more };
        const [first, second] = [db.pool({ max: 60 }), db.pool({ max: 60 })];
        await migratePostgres(first, options);
        return {
          store: postgresStore(first, options) as EffectStore<unknown>,
          again: postgresStore(second, options) as EffectStore<unknown>,
          waitMs: WAIT_MS,
          advance: db.advance,
          close: () => db[Symbol.asyncDispose](),
        };
      },
      skip: { "a transaction that calls its own store ends in busy, not in a deadlock": "its pool has more connections" },
    },
    source: {
      async open() {
        const db = await postgresDatabase();
        const [first, second, operator] = [db.pool(), db.pool(), db.pool()];
        await migratePostgres(first, more);
        const store = postgresStore(operator, more);
        const outbox = postgresOutbox(operator, more);
        return {
          source: ({ topics } = {}) => postgresOutbox(first, { ...more, topics }),
          again: ({ topics } = {}) => postgresOutbox(second, { ...more, topics }),
          enqueue: (...messages) => store.transaction((effects) => effects.enqueue(...messages)),
          advance: db.advance,
          release: outbox.release,
          discard: outbox.discard,
          snapshot: db.snapshot,
          close: () => db[Symbol.asyncDispose](),
        };
      },
    },
    sink: {
      async open() {
        const db = await postgresDatabase();
        const [first, second] = [db.pool(), db.pool()];
        await migratePostgres(first, more);
        const stores = [postgresStore(first, more), postgresStore(second, more)] as const;
        return {
          sink: handlerOn(stores[0]),
          again: () => handlerOn(stores[1]),
          contents: () => contentsOf(stores[1]),
          refused,
          close: () => db[Symbol.asyncDispose](),
        };
      },
    },
  };
}
