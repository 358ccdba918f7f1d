/** Stores, sources and sinks on MySQL and MariaDB, each on a database of its own. */
import mysql from "mysql2/promise";
import type { EffectStore } from "@effectonce/effectonce";
import {
  migrateMysql,
  mysqlOutbox,
  type MysqlOutboxOptions,
  type MysqlPool,
  mysqlStore,
} from "@effectonce/effectonce/mysql";
import { contentsOf, type Ends, handlerOn, refused } from "../runtime/suite.ts";
import { database } from "../services/mod.ts";

const WAIT_MS = 2_000;

/** A fresh database. */
export interface MysqlTestDatabase {
  /** Its URL. */
  readonly url: string;
  /** A pool of its own, which is ended with the database. */
  pool(options?: mysql.PoolOptions): mysql.Pool;
  /** The same, with a clock that moves on with the others. */
  shifted(options?: mysql.PoolOptions): MysqlPool;
  /** One statement. */
  sql(text: string, values?: readonly unknown[]): Promise<Record<string, unknown>[]>;
  /** Moves the clock of the shifted pools on. */
  advance(ms: number): Promise<void>;
  /** Keeps the rows of all tables; the function that comes back puts them in again, as a restored dump has them. */
  snapshot(): Promise<() => Promise<void>>;
  [Symbol.asyncDispose](): Promise<void>;
}

/** Makes a database. */
export async function mysqlDatabase(flavor: "mysql" | "mariadb"): Promise<MysqlTestDatabase> {
  const made = await database(flavor);
  const pools: mysql.Pool[] = [];
  let shift = 0;
  function pool(options: mysql.PoolOptions = {}): mysql.Pool {
    const pool = mysql.createPool({ uri: made.url, connectionLimit: 8, ...options });
    pool.on("connection", (connection) => {
      connection.on("error", () => {}); // Of a connection that a test breaks.
      connection.query("set session innodb_lock_wait_timeout = 2");
    });
    pools.push(pool);
    return pool;
  }
  const operator = pool({ connectionLimit: 2, multipleStatements: true });
  return {
    url: made.url,
    pool,
    shifted(options) {
      const inner = pool(options);
      return {
        async getConnection() {
          const connection = await inner.getConnection();
          return {
            query(options) {
              const sql = options.sql.replaceAll(
                "utc_timestamp(6)",
                `(utc_timestamp(6) + interval ${shift * 1000} microsecond)`,
              );
              return connection.query({ ...options, sql });
            },
            release: () => connection.release(),
            destroy: () => connection.destroy(),
          };
        },
      };
    },
    sql: async (text, values = []) => (await operator.query(text, [...values]))[0] as Record<string, unknown>[],
    advance: (ms) => Promise.resolve(void (shift += ms)),
    async snapshot() {
      const [rows] = await operator.query(
        "select table_name as name from information_schema.tables where table_schema = database() and table_name not like 'kept%'",
      );
      const tables = (rows as { name: string }[]).map(({ name }) => name);
      for (const table of tables) {
        await operator.query(`drop table if exists kept_${table}; create table kept_${table} like ${table};
          insert into kept_${table} select * from ${table}`);
      }
      return async () => {
        const restore = tables.map((table) => `delete from ${table}; insert into ${table} select * from kept_${table};`);
        await operator.query(`start transaction; ${restore.join("\n")} commit`);
      };
    },
    async [Symbol.asyncDispose]() {
      for (const pool of pools) await pool.end();
      await made[Symbol.asyncDispose]();
    },
  };
}

/** Ends in MySQL or MariaDB; `more`: what its sources do beyond the usual. */
export function mysqlEnds(flavor: "mysql" | "mariadb", more: MysqlOutboxOptions = {}): Ends {
  return {
    store: {
      async open() {
        const db = await mysqlDatabase(flavor);
        const options = { waitMs: WAIT_MS, ...more };
        const [first, second] = [db.shifted({ connectionLimit: 60 }), db.shifted({ connectionLimit: 60 })];
        await migrateMysql(first, options);
        return {
          store: mysqlStore(first, options) as EffectStore<unknown>,
          again: mysqlStore(second, options) as EffectStore<unknown>,
          waitMs: WAIT_MS,
          advance: db.advance,
          close: () => db[Symbol.asyncDispose](),
        };
      },
      skip: { "a transaction that calls its own store ends in busy, not in a deadlock": "its pool has more connections" },
    },
    source: {
      async open() {
        const db = await mysqlDatabase(flavor);
        const [first, second, operator] = [db.shifted(), db.shifted(), db.shifted()];
        await migrateMysql(first, more);
        const store = mysqlStore(operator, more);
        const outbox = mysqlOutbox(operator, more);
        return {
          source: ({ topics } = {}) => mysqlOutbox(first, { ...more, topics }),
          again: ({ topics } = {}) => mysqlOutbox(second, { ...more, topics }),
          enqueue: (...messages) => store.transaction((effects) => effects.enqueue(...messages)),
          advance: db.advance,
          longestId: 255,
          release: outbox.release,
          discard: outbox.discard,
          snapshot: db.snapshot,
          close: () => db[Symbol.asyncDispose](),
        };
      },
    },
    sink: {
      async open() {
        const db = await mysqlDatabase(flavor);
        const [first, second] = [db.pool(), db.pool()];
        await migrateMysql(first, more);
        const stores = [mysqlStore(first, more), mysqlStore(second, more)] as const;
        return {
          sink: handlerOn(stores[0] as EffectStore<unknown>),
          again: () => handlerOn(stores[1] as EffectStore<unknown>),
          contents: () => contentsOf(stores[1] as EffectStore<unknown>),
          refused,
          close: () => db[Symbol.asyncDispose](),
        };
      },
    },
  };
}
