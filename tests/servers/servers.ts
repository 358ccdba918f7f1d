/** The three servers behind one interface, for tests that are the same on all. */
import type { EffectStore } from "@effectonce/effectonce";
import { migrateMysql, mysqlOutbox, type MysqlOutboxOptions, mysqlStore } from "@effectonce/effectonce/mysql";
import { migratePostgres, postgresOutbox, type PostgresOutboxOptions, postgresStore } from "@effectonce/effectonce/postgres";
import type { ShardedOutbox } from "../../adapters/sql.ts";
import { mysqlDatabase } from "./mysql.ts";
import { postgresDatabase } from "./postgres.ts";

/** What stores and outboxes of all servers take. */
export type Options = PostgresOutboxOptions & MysqlOutboxOptions;

/** One program's connections. */
export interface Program {
  /** Its claims. */
  store(options?: Options): EffectStore<unknown>;
  /** Its outbox. */
  outbox(options?: Options): ShardedOutbox;
  /** Makes the tables. */
  migrate(options?: Options & { readonly shards?: number; readonly accept?: boolean }): Promise<void>;
}

/** A fresh database. */
export interface TestDatabase {
  /** Its URL. */
  readonly url: string;
  /** Connections as those of a process of its own. */
  program(connections?: number): Program;
  /** One statement, with `?` as placeholders and `"name"` as quoted names. */
  sql(text: string, values?: readonly unknown[]): Promise<Record<string, unknown>[]>;
  /** Moves the clock of its programs on. */
  advance(ms: number): Promise<void>;
  /** Keeps the rows of all tables; the function that comes back puts them in again, as a restored dump has them. */
  snapshot(): Promise<() => Promise<void>>;
  [Symbol.asyncDispose](): Promise<void>;
}

/** A kind of server. */
export type Kind = "postgres" | "mariadb" | "mysql";

/** Makes a database. */
export async function testDatabase(kind: Kind): Promise<TestDatabase> {
  if (kind === "postgres") {
    const db = await postgresDatabase();
    return {
      url: db.url,
      program(max = 8) {
        const pool = db.pool({ max });
        return {
          store: (options) => postgresStore(pool, options) as EffectStore<unknown>,
          outbox: (options) => postgresOutbox(pool, options),
          migrate: (options) => migratePostgres(pool, options),
        };
      },
      sql(text, values) {
        let n = 0;
        return db.sql(text.replace(/\?/g, () => `$${++n}`), values);
      },
      advance: db.advance,
      snapshot: db.snapshot,
      [Symbol.asyncDispose]: () => db[Symbol.asyncDispose](),
    };
  }
  const db = await mysqlDatabase(kind);
  return {
    url: db.url,
    program(connectionLimit = 8) {
      const pool = db.shifted({ connectionLimit });
      return {
        store: (options) => mysqlStore(pool, options) as EffectStore<unknown>,
        outbox: (options) => mysqlOutbox(pool, options),
        migrate: (options) => migrateMysql(pool, options),
      };
    },
    sql: (text, values) => db.sql(text.replaceAll(`"`, "`"), values),
    advance: db.advance,
    snapshot: db.snapshot,
    [Symbol.asyncDispose]: () => db[Symbol.asyncDispose](),
  };
}

/** One test on each server, on a fresh database with tables. */
export function onServers(
  name: string,
  run: (db: TestDatabase, kind: Kind) => Promise<void>,
  kinds: readonly Kind[] = ["postgres", "mariadb", "mysql"],
): void {
  for (const kind of kinds) {
    Deno.test(`${kind}: ${name}`, async () => {
      await using db = await testDatabase(kind);
      await db.program().migrate();
      await run(db, kind);
    });
  }
}
