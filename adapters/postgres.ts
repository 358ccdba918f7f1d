/**
 * Claims, outbox and positions in PostgreSQL, on a pool that is open already: `pg` (node-postgres) and PGlite fit.
 *
 * ```ts
 * import { PGlite } from "@electric-sql/pglite";
 * import { relay } from "@effectonce/effectonce";
 * import { memorySink } from "@effectonce/effectonce/memory";
 * import { migratePostgres, postgresOutbox, postgresStore } from "@effectonce/effectonce/postgres";
 * import { equal } from "node:assert/strict";
 *
 * const db = new PGlite();
 * await migratePostgres(db);
 * const store = postgresStore(db);
 * await store.transaction(async (effects) => {
 *   await effects.enqueue({ topic: "payments", key: "order-1", value: { amount: 5 } });
 * });
 * const to = memorySink();
 * await relay({ from: postgresOutbox(db), to, store, drain: true });
 * equal(to.messages.length, 1);
 * await db.close();
 * ```
 *
 * @module
 */
import { EffectError, type EffectStore, realRuntime, type RunSql } from "../mod.ts";
import { createTurns } from "./shared.ts";
import {
  acceptPlace,
  Broken,
  bytesOf,
  causesOf,
  checkOutbox,
  checkVersion,
  commitUnknown,
  createNetworkErrors,
  type Dialect,
  EFFECT_COLUMNS,
  type ExistingOutbox,
  notePlace,
  outboxName,
  patiently,
  type Row,
  type Run,
  setShards,
  type ShardedOutbox,
  sqlOutbox,
  type SqlOutboxOptions,
  type SqlServer,
  sqlStore,
  type SqlValue,
  type TableOptions,
  type Tables,
  tablesOf,
  takeWithin,
  textOf,
  type Transaction,
  VERSION,
} from "./sql.ts";
export type { ExistingOutbox, ShardedOutbox, TableOptions };

/** What a statement answers. */
export interface PostgresResult {
  /** The rows. */
  readonly rows: readonly unknown[];
}

/** What this adapter calls of a connection. */
export interface PostgresClient {
  /** Runs one statement with `$1` as placeholders; without values also several statements. */
  query(text: string, values?: unknown[]): Promise<PostgresResult>;
}

/** What this adapter calls of a pool of connections: `npm:pg` fits. */
export interface PostgresPool {
  /** Takes a connection from the pool. */
  connect(): Promise<PostgresClient & { release(destroy?: boolean): void }>;
}

/** What this adapter calls of a database that is one connection: PGlite fits. */
export interface PostgresDatabase extends PostgresClient {
  /** Runs several statements. */
  exec(text: string): Promise<readonly PostgresResult[]>;
}

/** What a store hands over in its transactions: the pool's own connection, with all that its driver can. */
export type PostgresClientOf<Pool extends PostgresPool | PostgresDatabase> = Pool extends {
  // By pg's overload with a callback inference would end at void.
  connect: { (): Promise<infer Client>; (callback: never): unknown };
} ? Client
  : Pool extends { connect(): Promise<infer Client> } ? Client
  : Pool;

/** How the adapter behaves. */
export interface PostgresOptions extends TableOptions {
  /** A name for people; without secrets. */
  readonly name?: string;
  /**
   * How long to wait for locks, connections and a server that is away before the error `busy`, in milliseconds.
   *
   * @default {5_000}
   */
  readonly waitMs?: number;
}

/** What of an outbox to read, and how. */
export interface PostgresOutboxOptions extends SqlOutboxOptions, PostgresOptions {
  /**
   * Connections that reach the server directly, not through PgBouncer: one of them hears of new messages by LISTEN, as long as
   * a relay runs. Without it relays look at their intervals.
   *
   * @default {undefined}
   */
  readonly listen?: PostgresPool;
}

/** How to make the tables. */
export interface PostgresMigration extends PostgresOptions {
  /**
   * Whether an INSERT into the outbox wakes relays that listen, by one NOTIFY a transaction. Under very many commits a
   * second NOTIFY costs more than it gains: it takes a lock that all committing transactions share.
   *
   * @default {undefined} As it is; at first they are woken.
   */
  readonly notify?: boolean;
  /**
   * Over how many relays at once the messages can be shared out, from 1 to 256. A key's messages stay together.
   *
   * @default {undefined} As it is; at first 1.
   */
  readonly shards?: number;
  /**
   * Takes the tables as they are after a restore, or in a copy, for those that claims were made in: nothing was done since
   * that they do not know.
   *
   * @default {false}
   */
  readonly accept?: boolean;
}

// ------------------------------------------------------------------------------------------------------------------ texts

/** `?` as `$1`, `$2` …; this package's texts have no other question marks. */
const prepared = new Map<string, string>();
function numbered(sql: string): string {
  let text = prepared.get(sql);
  if (text === undefined) {
    let n = 0;
    text = sql.replace(/\?/g, () => `$${++n}`);
    // Texts with rows of numbers in them are used once.
    if (sql.length < 4096 && prepared.size < 500) prepared.set(sql, text);
  }
  return text;
}

const hex = (bytes: Uint8Array): string => Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");

/** A value as a literal of no type that means the same under every setting of the session. */
function literal(value: SqlValue): string {
  if (value === null) return "null";
  if (typeof value === "number" || typeof value === "boolean") return String(value);
  if (typeof value !== "string") return `decode('${hex(value)}', 'hex')`;
  if (PLAIN.test(value)) return `'${value}'`;
  const escaped = (character: string) => `\\U${character.codePointAt(0)!.toString(16).padStart(8, "0")}`;
  return `E'${value.replace(SPECIAL, escaped)}'`;
}
/** Printable ASCII without apostrophe and backslash, and without the question mark of placeholders; and what is not. */
const PLAIN = /^[ -&(->@-[\]-~]*$/;
const SPECIAL = /[^ -&(->@-[\]-~]/gu;
/** Bytes would be twice as long. */
const isInlined = (value: SqlValue): boolean => !(value instanceof Uint8Array);
function inlined(sql: string, values: readonly SqlValue[]): string {
  let n = 0;
  return sql.replace(/\?/g, () => literal(values[n++]!));
}

/** Rows that came as one: their texts as JSON, and their values one behind the other. */
function unpacked(row: Row, names: readonly string[]): readonly Row[] {
  if (row["texts"] === null) return [];
  const rows: readonly (readonly (string | null)[])[] = JSON.parse(textOf(row["texts"]));
  const values = bytesOf(row["value"]);
  let at = 0;
  return rows.map((texts) => {
    const length = texts[names.length]!;
    const found: Record<string, unknown> = { value: length && values!.subarray(at, at += Number(length)) };
    names.forEach((name, i) => found[name] = texts[i]);
    return found;
  });
}

const CLOCK = "floor(extract(epoch from clock_timestamp()) * 1000)::bigint";

const dialect: Dialect = {
  clock: CLOCK,
  text: (expression) => `(${expression})::text`,
  time: (expression) => `to_char((${expression})::timestamptz at time zone 'utc', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"')`,
  bytes: (expression, stored) => stored === "bytes" ? expression : `convert_to((${expression})::text, 'UTF8')`,
  // The cluster, and the table itself: a restored dump has made another one.
  place: ({ effects }) => ({
    sql: `select concat((select system_identifier from pg_control_system()), '/', to_regclass(?)::oid) as place`,
    values: [effects],
  }),
  json: "?::text::jsonb", // As text, whatever a driver makes of JSON.
  name: (text) => text,
  bucket: (expression) => `get_byte(sha256(convert_to((${expression})::text, 'UTF8')), 0)`,
  after: ({ scope, key }) => ({ condition: `(scope, "key") > (?, ?)`, values: [scope, key] }),
  lazyValues: true, // https://www.postgresql.org/docs/current/storage-toast.html
  async messages(run, select, texts) {
    const packed = texts.map((name) => `r.${name}::text`).join(", ");
    const [row] = await run(
      `select array_to_json(array_agg(array[${packed}, octet_length(r.value)::text]))::text as texts,
        string_agg(r.value, '') as value from (${select}) r`,
    );
    return unpacked(row!, texts);
  },
  *among(seq, id, rows) {
    // Of no type, so that they take the columns'.
    const values = [0, 1].map((i) => `{${rows.map((row) => `"${row[i]!.replace(/["\\]/g, "\\$&")}"`).join()}}`);
    if (rows.length > 0) yield { sql: `${seq} = any(?) and ${id} = any(?)`, values };
  },
  replace: ` on conflict (scope, "key") do update set ${
    [...EFFECT_COLUMNS, "token"].map((column) => `${column} = excluded.${column}`).join(", ")
  }`,
  literal,
  // Not by `or`: where statistics are missing or old, it reads all of a scope.
  only: (table, keys) => ({
    sql: `${table} where (scope, "key") in (values (?::text, ?::text)${", (?, ?)".repeat(keys.length - 1)})`,
    values: keys.flatMap(({ scope, key }) => [scope, key]),
  }),
  advance(positions, owner, { n, uid, prev, rows }, gone, own) {
    const silence = own ? ", set_config('idle_in_transaction_session_timeout', '30000', true)" : "";
    return {
      sql: `with last as (
          select n, uid, prev, "rows" from ${positions} where relay = ? and source = ? order by n desc limit 1
        ), put as (
          insert into ${positions} (relay, source, n, uid, prev, "rows")
          select ?::text, ?::text, ?::bigint, ?::text, ?::text, ?::text
          where coalesce((select n from last), 0) = ?::bigint and coalesce((select uid from last), '') = ?::text
          on conflict do nothing returning 1
        ), gone as (
          delete from ${positions} where relay = ? and source = ? and n <= ?
        )
        select last.*, exists (select 1 from put) as put${silence} from (select 1) one left join last on true`,
      values: [...owner, ...owner, n, uid, prev, JSON.stringify(rows), n - 1, prev, ...owner, gone],
    };
  },
  deleteFrom: () => "delete from",
  latest: "",
  checkText: () => {},
  async insertNew(run, sql, values, count) {
    // An error would end the transaction.
    return (await run(`${sql} on conflict do nothing returning 1 as inserted`, values)).length === count;
  },
  async insertAbsent(run, effects, keys, token) {
    const one = `(?, ?, ${token}, ${CLOCK})`;
    const rows = await run(
      `insert into ${effects} (scope, "key", token, changed_ms) values ${keys.map(() => one).join(", ")}
        on conflict do nothing returning scope, "key"`,
      keys.flatMap(({ scope, key }) => [scope, key]),
    );
    return rows as unknown as readonly { readonly scope: string; readonly key: string }[];
  },
};

// ------------------------------------------------------------------------------------------------------------ connections

/** The server's code of an error; https://www.postgresql.org/docs/current/errcodes-appendix.html */
function codesOf(error: unknown): readonly string[] {
  return [...causesOf(error)].flatMap(({ code }) => typeof code === "string" ? [code] : []);
}
// Serialization failure, deadlock, lock not available, idle in a transaction for too long.
const BUSY = ["40001", "40P01", "55P03", "25P03"];
// Shut down, crashed, starting; too many connections; what was the primary is read-only now.
const AWAY = ["57P01", "57P02", "57P03", "53300", "25006"];
// Those of pg have no code.
const BROKEN =
  /^(Connection terminated|timeout exceeded when trying to connect|Client has encountered a connection error|Client was closed)/;

const network = createNetworkErrors(({ message }) => BROKEN.test(String(message)));

const failures = {
  isBusy: (error: unknown) => codesOf(error).some((code) => BUSY.includes(code)),
  isAway: (error: unknown) =>
    network.has(error) || codesOf(error).some((code) => code.startsWith("08") || AWAY.includes(code)),
};

/** What is the server's own doing, and says nothing about a statement: its classes 08, 40, 53 to 58 and XX. */
const isDatabaseFailure = (error: unknown): boolean =>
  failures.isAway(error) || failures.isBusy(error) || codesOf(error).some((code) => /^(08|40|5[3-8]|XX)...$/.test(code));

/** One connection, for as long as it is needed. */
interface Connection<Client> {
  readonly client: Client;
  /** One statement. */
  readonly run: Run;
  /** Several statements in one message; answers the rows of each, and its command tag where the driver tells it. */
  script(text: string): Promise<readonly { readonly rows: readonly Row[]; readonly command?: unknown }[]>;
}

type Listening = PostgresClient & {
  on?(event: string, listener: (argument: unknown) => void): unknown;
  off?(event: string, listener: (argument: unknown) => void): unknown;
};
const ignore = () => {};

const rowsOf = ({ rows }: PostgresResult) => rows as readonly Row[];

function createConnections(source: PostgresPool | PostgresDatabase, name: string, waitMs: number) {
  if (!("connect" in source)) {
    const turns = singles.get(source) ?? createTurns(name);
    singles.set(source, turns);
    const connection: Connection<unknown> = {
      client: source,
      run: async (sql, values = []) => rowsOf(await source.query(numbered(sql), [...values])),
      script: async (text) => (await source.exec(text)).map((result) => ({ rows: rowsOf(result) })),
    };
    return <T>(use: (connection: Connection<unknown>) => Promise<T>): Promise<T> =>
      turns(waitMs, async () => {
        // Else our COMMIT would be the application's. Not by times: PGlite's clock stands still within a millisecond.
        const probe = async () => {
          await connection.script("set local effectonce.open = 'yes'"); // Is left only where a transaction is open.
          const [shown] = await connection.script("select current_setting('effectonce.open', true) as open");
          return shown!.rows[0]!["open"] === "yes";
        };
        const over = new AbortController();
        const late = realRuntime.sleep(waitMs, over.signal).then(() => undefined);
        const open = await Promise.race([probe(), late]).finally(() => over.abort());
        if (open === false) return await use(connection);
        const why = "A transaction is open on the only connection";
        throw new EffectError(open ? "source_invalid" : "busy", `${why} of ${name}: commit it first, or join it`);
      });
  }
  survive(source);
  return async <T>(use: (connection: Connection<unknown>) => Promise<T>): Promise<T> => {
    const taken = await takeWithin(name, waitMs, source.connect(), (client) => client.release());
    const client = taken as typeof taken & Listening;
    client.on?.("error", ignore); // One that was in the pool before.
    // Taken once: a transaction puts its own in front.
    const query = client.query;
    let broken = false;
    try {
      return await use({
        client,
        run: async (sql, values = []) => rowsOf(await query.call(client, numbered(sql), [...values])),
        async script(text) {
          const answer = await query.call(client, text) as PostgresResult | readonly PostgresResult[];
          return (Array.isArray(answer) ? answer : [answer]).map(({ rows, command }) => ({ rows, command }));
        },
      });
    } catch (error) {
      broken = error instanceof Broken || failures.isAway(error);
      throw error instanceof Broken ? error.cause : error;
    } finally {
      if (!broken) client.off?.("error", ignore);
      client.release(broken);
    }
  };
}
const singles = new WeakMap<PostgresDatabase, ReturnType<typeof createTurns>>();
const pools = new WeakSet<PostgresPool>();

/**
 * Lets connections break without a listener of the application's, which would end the process. From their first moment: that
 * one is there and that it breaks can come in one message of the network, before anybody was handed it.
 */
function survive(pool: PostgresPool): void {
  if (pools.has(pool)) return;
  pools.add(pool);
  (pool as Partial<Listening>).on?.("connect", (client) => void (client as Listening).on?.("error", ignore));
}

/** Lets BEGIN ride along with the first statement of a transaction, whoever sends it. */
function createBeginning({ client, run, script }: Connection<unknown>, begin: string) {
  const target = client as { query: (...args: unknown[]) => unknown };
  const { query } = target;
  let begun: Promise<unknown> | undefined;
  // Not deleted: an object that has lost a property is slow from then on.
  const unhook = () => void (target.query = query);
  target.query = (...args: unknown[]): unknown => {
    if (!begun) {
      begun = script(begin);
      begun.then(unhook, ignore);
    }
    const [first] = args;
    const queues = typeof args.at(-1) === "function" || typeof (first as { submit?: unknown } | null)?.submit === "function";
    // A cursor, or a callback: queued behind it.
    if (queues) return query.apply(client, args);
    return begun.then(() => query.apply(client, args));
  };
  return {
    /** The answer to BEGIN, once it was sent. */
    get begun() {
      return begun;
    },
    unhook,
    async run(sql: string, values: readonly SqlValue[] = []): Promise<readonly Row[]> {
      if (begun) {
        await begun;
        return await run(sql, values);
      }
      const first = script(`${begin}; ${inlined(sql, values)}`);
      begun = first;
      begun.then(unhook, ignore);
      return (await first).at(-1)!.rows;
    },
  };
}

function createServer<Client>(source: PostgresPool | PostgresDatabase, options: PostgresOptions): SqlServer<Client> {
  const { name = "postgres", waitMs = 5_000 } = options;
  const tables = tablesOf(options);
  const connected = createConnections(source, name, waitMs);
  const limits = `set local lock_timeout = ${Math.max(1, Math.ceil(waitMs))}`;
  // A relay that is stopped here would keep its shard locked.
  const idle = "set local idle_in_transaction_session_timeout = 10000";
  const own = `begin isolation level read committed; ${limits}; ${idle}`;
  const again = <T>(run: () => Promise<T>): Promise<T> => named(name, tables, patiently(name, waitMs, failures, run));
  async function rollback({ script }: Connection<unknown>, cause: unknown): Promise<never> {
    try {
      const ofNetwork = network.has(cause);
      if (ofNetwork || !(cause instanceof Broken || failures.isAway(cause))) await script("rollback");
      if (ofNetwork) network.disown(cause); // Our connection is well.
    } catch {
      throw new Broken("rollback failed", { cause });
    }
    throw cause;
  }
  return {
    name,
    dialect,
    tables,
    run: (sql, values) => again(() => connected(({ run }) => run(sql, values))),
    write: (change, first = []) =>
      again(() =>
        connected(async (connection) => {
          const { run, script } = connection;
          /** What travels with the next message. */
          let waiting: string[] = [];
          const together = (last: string) => {
            const text = [...waiting, last].join("; ");
            waiting = [];
            return script(text);
          };
          const transaction: Omit<Transaction, "first" | "now"> = {
            async run(sql, values = []) {
              if (waiting.length === 0) return await run(sql, values);
              if (values.every(isInlined)) return (await together(inlined(sql, values))).at(-1)!.rows;
              await together("select 1");
              return await run(sql, values);
            },
            async later(sql, values = []) {
              if (values.every(isInlined)) waiting.push(inlined(sql, values));
              else await transaction.run(sql, values);
            },
          };
          try {
            const firsts = first.map(({ sql, values }) => inlined(sql, values));
            const answers = (await script([own, ...firsts, `select ${CLOCK} as now_ms`].join("; "))).map(({ rows }) => rows);
            const [clock, since] = [Number(answers.at(-1)![0]!["now_ms"]), realRuntime.now()];
            const now = () => clock + realRuntime.now() - since;
            const answer = await change({ ...transaction, first: answers.slice(-1 - first.length, -1), now });
            await together("commit");
            return answer;
          } catch (error) {
            return await rollback(connection, error);
          }
        })
      ),
    transaction: (run, mayAgain) =>
      again(() =>
        connected(async (connection) => {
          const { client, script } = connection;
          const single = source === client;
          const transaction = single ? undefined : createBeginning(connection, `begin; ${limits}`);
          try {
            if (single) await script(`begin; ${limits}`);
            const answer = await run((transaction?.run ?? connection.run) as RunSql, client as Client);
            if (!single && !transaction!.begun) return answer;
            // Without a BEGIN there would be nothing to commit, and COMMIT would say that it was done.
            await transaction?.begun;
            await commit(connection, mayAgain);
            return answer;
          } catch (error) {
            if (single || transaction!.begun) return await rollback(connection, error);
            network.disown(error); // No statement was sent.
            throw error;
          } finally {
            transaction?.unhook();
          }
        })
      ),
    join(open) {
      if (typeof open === "function") {
        const run = open as RunSql;
        return (sql, values) => run(numbered(sql), values);
      }
      const client = open as PostgresClient;
      return async (sql, values) => rowsOf(await client.query(numbered(sql), [...values]));
    },
    isDatabaseFailure,
  };

  async function commit({ script }: Connection<unknown>, mayAgain: () => boolean): Promise<void> {
    let command: unknown;
    try {
      // Where the driver tells no tag: in a transaction that has failed any statement fails.
      command = (await script(source && "connect" in source ? "commit" : "select 1; commit")).at(-1)!.command;
    } catch (error) {
      if (!failures.isAway(error) || mayAgain()) throw error;
      throw commitUnknown(name, error);
    }
    // A COMMIT of a transaction that has failed is answered with ROLLBACK, and no error.
    if (command === undefined || command === "COMMIT") return;
    const why = "was ended by an error that its function caught: let the database's own errors through";
    throw new EffectError("source_invalid", `The transaction on ${name} ${why}`);
  }
}

/** Says whose tables are missing, and what to do. */
async function named<T>(name: string, tables: Tables, answer: Promise<T>): Promise<T> {
  try {
    return await answer;
  } catch (error) {
    const [first] = [...causesOf(error)];
    const { code, message } = first ?? {};
    if (code === "42P01" && String(message).includes(tables.existing?.table ?? tables.prefix)) {
      const missing = `${name} has no effectonce tables of version ${VERSION}: run "init" (or migratePostgres) first`;
      throw new EffectError("schema_missing", missing, { cause: error });
    }
    throw error;
  }
}

// -------------------------------------------------------------------------------------------------------------- the ends

/** Claims and positions in the tables that {@linkcode migratePostgres} made. */
export function postgresStore<Pool extends PostgresPool | PostgresDatabase>(
  pool: Pool,
  options: PostgresOptions = {},
): EffectStore<PostgresClientOf<Pool>> {
  return sqlStore(createServer<PostgresClientOf<Pool>>(pool, options));
}

/** The outbox of {@linkcode migratePostgres}, or one that was there before, as a source for the relays and for operators. */
export function postgresOutbox(pool: PostgresPool | PostgresDatabase, options: PostgresOutboxOptions = {}): ShardedOutbox {
  const server = createServer<never>(pool, options);
  const { listen } = options;
  if (!listen) return sqlOutbox(server, options);
  // One connection for all sessions, such as those of shards.
  const wakes = new Set<() => void>();
  let over = new AbortController();
  return sqlOutbox({
    ...server,
    listen(wake, signal) {
      if (wakes.size === 0) {
        over = new AbortController();
        hear(listen, channelOf(server.tables), () => wakes.forEach((wake) => wake()), over.signal);
      }
      wakes.add(wake);
      signal.addEventListener("abort", () => {
        wakes.delete(wake);
        if (wakes.size === 0) over.abort();
      });
    },
  }, options);
}

/** LISTEN cuts longer names, pg_notify refuses them. */
const channelOf = ({ schema = "", prefix }: Tables): string => `${schema}.${prefix}outbox`.slice(0, 63);

/** Wakes with each notification, and whenever it listens anew. */
async function hear(pool: PostgresPool, channel: string, wake: () => void, signal: AbortSignal): Promise<void> {
  survive(pool);
  while (!signal.aborted) {
    let client: Awaited<ReturnType<PostgresPool["connect"]>> | undefined;
    try {
      client = await pool.connect();
      const heard = client as Listening;
      const over = new AbortController();
      heard.on?.("error", () => over.abort());
      heard.on?.("end", () => over.abort());
      heard.on?.("notification", wake);
      await client.query(`listen "${channel}"`);
      wake();
      await new Promise<void>((resolve) => {
        for (const end of [over.signal, signal]) end.addEventListener("abort", () => resolve());
        if (signal.aborted) resolve();
      });
    } catch {
      // Only a hint: relays look at their intervals.
    } finally {
      client?.release(true); // With its listeners.
    }
    await realRuntime.sleep(1_000, signal);
  }
}

// -------------------------------------------------------------------------------------------------------------- the tables

const STATES = "'pending', 'waiting', 'parked', 'blocked', 'delivered'";

function outboxIndexes({ outbox, prefix, existing, columns: c }: Tables): readonly string[] {
  const index = (name: string) =>
    `create index if not exists "${existing ? `${prefix}${existing.table}` : `${prefix}outbox`}_${name}"`;
  return [
    `${index("pending")} on ${outbox} (${c.seq}) where ${c.state} = 'pending'`,
    `${index("topic")} on ${outbox} (${c.topic}, ${c.seq}) where ${c.state} = 'pending'`,
    `${index("held")} on ${outbox} (${c.key}, ${c.state}, ${c.seq}) where ${c.state} in ('waiting', 'parked', 'blocked')`,
    `${index("until")} on ${outbox} (${c.state}, ${c.untilMs}) where ${c.state} in ('waiting', 'parked', 'delivered')`,
  ];
}

/** One list a version, forward only. Everything here is a contract with other languages; see the README. */
function migrations(tables: Tables): readonly (readonly string[])[] {
  const { meta, outbox, effects, shards, batches, positions, relays, members, prefix, existing, columns: c } = tables;
  const text = `text collate "C"`;
  const name = `octet_length($) between 1 and 1024`;
  const named = (column: string) => name.replace("$", column);
  const ofOutbox = existing
    ? [
      ...existing.seq ? [] : [`alter table ${outbox} add column if not exists ${c.seq} bigint generated always as identity`],
      ...existing.createdAt
        ? []
        : [`alter table ${outbox} add column if not exists ${c.createdAt} timestamptz not null default clock_timestamp()`],
      `alter table ${outbox} add column if not exists ${c.state} text not null default 'pending'
  check (${c.state} in (${STATES}))`,
      `alter table ${outbox} add column if not exists ${c.untilMs} bigint not null default 0`,
      `alter table ${outbox} add column if not exists ${c.reason} text`,
    ]
    : [`create table ${outbox} (
  seq bigint generated always as identity primary key,
  id ${text} not null unique default gen_random_uuid()::text check (${named("id")}),
  topic ${text} not null check (${named("topic")}),
  key ${text} check (${named("key")}),
  value bytea,
  headers jsonb not null default '{}' check (jsonb_typeof(headers) = 'object'),
  created_at timestamptz not null default clock_timestamp(),
  state text not null default 'pending' check (state in (${STATES})),
  until_ms bigint not null default 0,
  reason text
)`];
  const notify = `"${prefix}notify"`;
  const schema = tables.schema === undefined ? "" : `"${tables.schema}".`;
  return [[
    `create table ${meta} (name text primary key, value text not null)`,
    ...ofOutbox,
    ...outboxIndexes(tables),
    // One notification a transaction, however many rows: the same text is sent once.
    `create or replace function ${schema}${notify}() returns trigger language plpgsql as
  $$ begin perform pg_notify('${channelOf(tables)}', ''); return null; end $$`,
    `create trigger ${notify} after insert on ${outbox} for each statement execute function ${schema}${notify}()`,
    `create table ${effects} (
  scope ${text} not null,
  key ${text} not null,
  state text not null default 'done' check (state in ('claimed', 'waiting', 'done', 'rejected', 'uncertain')),
  fence bigint not null default 1,
  attempt bigint not null default 1,
  generation bigint not null default 1,
  until_ms bigint not null default 0,
  first_ms bigint,
  doubt boolean not null default false,
  fingerprint text,
  request bytea,
  result text,
  result_omitted boolean not null default false,
  reason text,
  evidence text,
  token bigint,
  changed_ms bigint not null,
  primary key (scope, key)
)`,
    `create index "${prefix}effects_open" on ${effects} (state, scope, key) where state <> 'done'`,
    `create table ${shards} (
  relay ${text} not null,
  shard integer not null default 0,
  sealed bigint not null default 0,
  sealed_uid text not null default '',
  settled bigint not null default 0,
  settled_uid text not null default '',
  member text,
  primary key (relay, shard)
)`,
    `create table ${batches} (
  relay ${text} not null,
  shard integer not null default 0,
  n bigint not null,
  uid text not null,
  prev text not null,
  rows text not null,
  primary key (relay, shard, n)
)`,
    // To compress what is deleted within moments costs more than to write it.
    `alter table ${batches} alter column rows set storage external`,
    `create table ${positions} (
  relay ${text} not null,
  source text not null,
  n bigint not null,
  uid text not null,
  prev text not null,
  rows text not null,
  primary key (relay, source, n)
)`,
    `create table ${relays} (
  instance text primary key,
  relay text not null,
  protocol text not null,
  topics text,
  until_ms bigint not null
)`,
    `create table ${members} (
  relay ${text} not null,
  member text not null,
  until_ms bigint not null,
  primary key (relay, member)
)`,
  ]];
}

/** The SQL of the tables, for people who run their own migrations; the last lines insert the version and the identity. */
export function postgresSchema(options: TableOptions = {}): string {
  const tables = tablesOf(options);
  const place = dialect.place(tables);
  const statements = [
    ...migrations(tables).flat(),
    `insert into ${tables.meta} (name, value) values ('schema_version', '${VERSION}')`,
    `insert into ${tables.meta} (name, value) values ('outbox_id', gen_random_uuid()::text)`,
    `insert into ${tables.meta} (name, value) values ('outbox', '${outboxName(tables)}')`,
    `insert into ${tables.meta} (name, value) values ('place', (${inlined(place.sql, place.values)}))`,
  ];
  return statements.map((sql) => `${sql};\n`).join("");
}

/**
 * Creates or upgrades the tables. Repeating it is harmless, also by two processes at once.
 *
 * @throws {EffectError} `schema_newer` if the tables are of a newer version than this package.
 */
export async function migratePostgres(
  pool: PostgresPool | PostgresDatabase,
  options: PostgresMigration = {},
): Promise<void> {
  const server = createServer<never>(pool, options);
  const { tables, write, name } = server;
  // One after the other; the number is this package's own.
  const alone = [{ sql: "select pg_advisory_xact_lock(7306085893296906823)", values: [] }];
  await write(async (transaction) => {
    const { run } = transaction;
    const [found] = await run("select to_regclass(?)::text as name", [tables.meta]);
    const [stored] = found!["name"] === null
      ? []
      : await run(`select value from ${tables.meta} where name = 'schema_version'`);
    const version = Number(stored?.["value"] ?? 0);
    if (version > VERSION) checkVersion(name, version);
    const [outbox] = version === 0 ? [] : await run(`select value from ${tables.meta} where name = 'outbox'`);
    checkOutbox(name, tables, outbox && String(outbox["value"]));
    for (const statement of migrations(tables).slice(version).flat()) await run(statement);
    const keep = "on conflict (name) do";
    await run(
      `insert into ${tables.meta} (name, value) values ('schema_version', ?) ${keep} update set value = excluded.value`,
      [
        String(VERSION),
      ],
    );
    await run(`insert into ${tables.meta} (name, value) values ('outbox_id', ?), ('outbox', ?) ${keep} nothing`, [
      crypto.randomUUID(),
      outboxName(tables),
    ]);
    await notePlace(server, run);
    if (options.accept) await acceptPlace(server, run);
    if (options.shards !== undefined) await setShards(name, tables, transaction, options.shards);
    const { notify } = options;
    if (notify === undefined) return;
    const trigger = `select tgenabled from pg_trigger where tgrelid = to_regclass(?) and tgname = ?`;
    const [state] = await run(trigger, [tables.outbox, `${tables.prefix}notify`]);
    if ((state?.["tgenabled"] !== "D") === notify) return; // To change it waits for every writer.
    await run(`alter table ${tables.outbox} ${notify ? "enable" : "disable"} trigger "${tables.prefix}notify"`);
  }, alone);
}
