/**
 * A relay from an outbox on a database server in a process of its own, that stops dead at a named step until it is killed. Its one
 * argument is a {@linkcode Plan}.
 *
 * @module
 */
import mysql from "mysql2/promise";
// @ts-types="@types/pg"
import pg from "pg";
import {
  type AtomicSink,
  type CallSink,
  type ClaimStore,
  type EffectStore,
  handler,
  relay,
  type Sink,
  type Source,
} from "@effectonce/effectonce";
import { httpSink } from "@effectonce/effectonce/http";
import {
  migrateMysql,
  mysqlOutbox,
  type MysqlOutboxOptions,
  type MysqlPool,
  mysqlStore,
} from "@effectonce/effectonce/mysql";
import {
  migratePostgres,
  postgresOutbox,
  type PostgresOutboxOptions,
  type PostgresPool,
  postgresStore,
} from "@effectonce/effectonce/postgres";
import { fileSink } from "../adapters/file.ts";
import type { ShardedOutbox } from "../adapters/sql.ts";
import { STEPS } from "./crash_child.ts";
import type { Kind } from "./services/servers.ts";
import { say, stopping } from "./stopping.ts";

/** What stores and outboxes take. */
export type Options = PostgresOutboxOptions & MysqlOutboxOptions;
/** One statement, with `?` as placeholders and `"name"` as quoted names. */
export type Sql = (text: string, values?: readonly unknown[]) => Promise<Record<string, unknown>[]>;

/** A program's connections to a database. */
export interface Connected extends AsyncDisposable {
  readonly kind: Kind;
  store(options?: Options): EffectStore<unknown>;
  outbox(options?: Options): ShardedOutbox;
  migrate(options?: Options & { readonly accept?: boolean }): Promise<void>;
  /** One statement, which commits by itself. */
  readonly sql: Sql;
  /** A connection of its own. */
  session(): Promise<{ readonly sql: Sql; close(): Promise<void> }>;
  /** The statements of what a store hands to its transactions and handlers. */
  on(client: unknown): Sql;
}

const numbered = (text: string) => {
  let n = 0;
  return text.replace(/\?/g, () => `$${++n}`);
};
const quoted = (text: string) => text.replaceAll(`"`, "`");

/** How to connect. */
export interface ConnectOptions {
  /**
   * How many connections a pool has.
   *
   * @default {8}
   */
  readonly connections?: number;
  /** Sees each statement of stores and outboxes. */
  readonly observe?: (text: string, values: readonly unknown[]) => void;
}

/** The same pool, its statements seen by an observer. */
function observed(pool: pg.Pool, observe: (text: string, values: readonly unknown[]) => void): PostgresPool {
  return {
    async connect() {
      const client = await pool.connect();
      return {
        query(text, values = []) {
          observe(text, values);
          return client.query(text, values);
        },
        release: (destroy) => client.release(destroy),
      };
    },
  };
}
function observedMysql(pool: mysql.Pool, observe: (text: string, values: readonly unknown[]) => void): MysqlPool {
  return {
    async getConnection() {
      const connection = await pool.getConnection();
      return {
        query(options) {
          observe(options.sql, options.values ?? []);
          return connection.query(options);
        },
        release: () => connection.release(),
        destroy: () => connection.destroy(),
      };
    },
  };
}

/** Connects to a database: through a proxy or PgBouncer, if the URL is one of theirs. */
export function connect(kind: Kind, url: string, { connections = 8, observe }: ConnectOptions = {}): Connected {
  if (kind === "postgres") {
    const pool = new pg.Pool({ connectionString: url, max: connections });
    pool.on("error", () => {}); // Of a connection that breaks while nobody uses it.
    const ends = observe ? observed(pool, observe) : pool;
    const on = (client: unknown): Sql => async (text, values = []) =>
      (await (client as pg.Pool).query(numbered(text), [...values])).rows;
    return {
      kind,
      store: (options) => postgresStore(ends, options) as EffectStore<unknown>,
      outbox: (options) => postgresOutbox(ends as PostgresPool, options),
      migrate: (options) => migratePostgres(pool, options),
      sql: on(pool),
      async session() {
        const client = new pg.Client({ connectionString: url });
        client.on("error", () => {});
        await client.connect();
        return { sql: on(client), close: () => client.end() };
      },
      on,
      [Symbol.asyncDispose]: () => pool.end(),
    };
  }
  const pool = mysql.createPool({ uri: url, connectionLimit: connections });
  pool.on("connection", (connection) => void connection.on("error", () => {}));
  const ends = observe ? observedMysql(pool, observe) : pool;
  const on = (client: unknown): Sql => async (text, values = []) =>
    (await (client as mysql.Connection).query(quoted(text), [...values]))[0] as Record<string, unknown>[];
  return {
    kind,
    store: (options) => mysqlStore(ends, options) as EffectStore<unknown>,
    outbox: (options) => mysqlOutbox(ends, options),
    migrate: (options) => migrateMysql(pool, options),
    sql: on(pool),
    async session() {
      const connection = await mysql.createConnection({ uri: url });
      connection.on("error", () => {});
      return { sql: on(connection), close: () => connection.end() };
    },
    on,
    [Symbol.asyncDispose]: () => pool.end(),
  };
}

/** A fresh database with tables, and connections to it. */
export async function opened(kind: Kind, made: Promise<{ readonly url: string } & AsyncDisposable>): Promise<Opened> {
  const database = await made;
  const connected = connect(kind, database.url);
  await connected.migrate();
  return {
    ...connected,
    url: database.url,
    async [Symbol.asyncDispose]() {
      await connected[Symbol.asyncDispose]();
      await database[Symbol.asyncDispose]();
    },
  };
}
/** See {@linkcode opened}. */
export type Opened = Connected & { readonly url: string };

/** What a handler of these tests writes: each message once, in the order of its commits. */
export async function makeLedger({ kind, sql }: Connected): Promise<void> {
  const n = kind === "postgres" ? "n bigint generated always as identity" : "n bigint auto_increment primary key";
  await sql(`create table ledger (${n}, id varchar(100) not null, pid integer not null)`);
}
/** The ids in the ledger. */
export const ledgerOf = async ({ sql }: Pick<Connected, "sql">): Promise<string[]> =>
  (await sql("select id from ledger order by n")).map(({ id }) => String(id));
/** A sink that writes the ledger; `handled` is awaited within the transaction. */
export const ledgerSink = (
  target: Connected,
  handled: (id: string) => Promise<void> = async () => {},
  options: Options = {},
): AtomicSink =>
  handler(target.store(options), async ({ id }, _, client) => {
    await target.on(client)("insert into ledger (id, pid) values (?, ?)", [id, Deno.pid]);
    await handled(id);
  });

/** What the child does, and where it stops. */
export interface Plan {
  /** Which server has the outbox and the claims. */
  readonly server: Kind;
  /** Its database. */
  readonly url: string;
  /** Which ends. */
  readonly kind: "http" | "http-idempotent" | "file" | "handler";
  /** URL, file or database of the target. */
  readonly target: string;
  /** Such as `before store.claimAll` or `after sink.deliver`; empty: nowhere. */
  readonly step: string;
  /** At the so-manieth time that it gets there, from 1. */
  readonly time: number;
  /** Lease in milliseconds. */
  readonly leaseMs: number;
  /** Until nothing is left, or until killed. */
  readonly drain: boolean;
  /** The relay's name. */
  readonly name?: string;
  /** Only these topics. */
  readonly topics?: readonly string[];
  /** Whether it is told of new messages by LISTEN. */
  readonly listen?: boolean;
}

/** Every step of each protocol that touches one of the systems: the same as on SQLite. */
export const stepsOf = (kind: Plan["kind"]): readonly string[] =>
  STEPS[kind].flatMap((step) => [`before ${step}`, `after ${step}`]);

if (import.meta.main) {
  const plan: Plan = JSON.parse(Deno.args[0]!);
  const stop = stopping(plan);
  const db = connect(plan.server, plan.url);
  const listen = plan.listen ? new pg.Pool({ connectionString: plan.url }) : undefined;
  const store: ClaimStore = stop("store", db.store());
  const source: Source = stop("source", db.outbox({ topics: plan.topics, listen }));
  const sink = (): CallSink | AtomicSink => {
    if (plan.kind === "file") return fileSink(plan.target);
    if (plan.kind !== "handler") {
      return httpSink(plan.target, { repeat: plan.kind === "http-idempotent" ? "same-key" : "never" });
    }
    const failed = new Set<string>();
    const { handle } = stop("sink", { handle: (id: string) => Promise.resolve(id) });
    return ledgerSink(connect(plan.server, plan.target), async (id) => {
      await handle(id);
      // Once in a while a message fails alone, so that batches are taken apart.
      if (!id.endsWith("-3") || failed.has(id)) return;
      failed.add(id);
      throw new Error("not yet");
    });
  };
  const { leaseMs, drain, name } = plan;
  const observe = (event: object) => say(JSON.stringify(event));
  const pace = { minRetryMs: 1, maxRetryMs: 20, pollMs: 5 };
  const to: Sink = stop("sink", sink());
  await relay({ name, from: source, to, store, leaseMs, drain, lanes: 3, batch: 5, ...pace, observe });
  say("drained");
  Deno.exit(0); // Pools keep a process alive.
}
