/**
 * Claims, outbox and positions in SQLite, on a client that is open already: better-sqlite3, `node:sqlite` and `bun:sqlite`
 * fit.
 *
 * ```ts
 * import { DatabaseSync } from "node:sqlite";
 * import { relay } from "@effectonce/effectonce";
 * import { memorySink } from "@effectonce/effectonce/memory";
 * import { migrateSqlite, sqliteOutbox, sqliteStore } from "@effectonce/effectonce/sqlite";
 * import { equal } from "node:assert/strict";
 *
 * const db = new DatabaseSync(":memory:");
 * await migrateSqlite(db);
 * const store = sqliteStore(db);
 * await store.transaction(async (effects) => {
 *   await effects.enqueue({ topic: "payments", key: "order-1", value: { amount: 5 } });
 * });
 * const to = memorySink();
 * await relay({ from: sqliteOutbox(db), to, store, drain: true });
 * equal(to.messages.length, 1);
 * ```
 *
 * @module
 */
// Synchronous, since no await may come between BEGIN and COMMIT: a relay paused there would keep every writer out.
import { createHash } from "node:crypto";
import {
  type Batch,
  checkKey,
  type Claim,
  claimStore,
  createMessage,
  EffectError,
  type EffectKey,
  type EffectRow,
  type EffectState,
  type EffectStore,
  type EffectTransaction,
  encodeMessage,
  encodeRequest,
  encodeResult,
  type Message,
  type Outbox,
  type OutboxMessage,
  type Park,
  type Position,
  type Protocol,
  type ReadLimits,
  realRuntime,
  type RunSql,
  type SourceSession,
  START,
  transactionStep,
} from "../mod.ts";
import {
  alreadyEnqueued,
  chainText,
  checkAdvance,
  checkRenamed,
  createGuard,
  createPrune,
  createTurns,
  notClaimed,
  type OutboxOptions,
  overlapping,
  type Renamed,
  renamedName,
  renamePlan,
  settledShard,
  settlePlan,
  type Shard,
  type TransactionGuard,
  type Turns,
} from "./shared.ts";

/** What SQLite stores. */
export type SqliteValue = null | number | bigint | string | Uint8Array;

/** What this adapter calls of a prepared statement. It binds values of {@linkcode SqliteValue}. */
export interface SqliteStatement {
  // Of unknown: by the types of better-sqlite3 null cannot be bound.
  /** Runs a statement that returns no rows. */
  run(...values: unknown[]): unknown;
  /** The first row; without one undefined, or null as of `bun:sqlite`. */
  get(...values: unknown[]): unknown;
  /** All rows. */
  all(...values: unknown[]): unknown[];
  /** The rows, one by one. */
  iterate(...values: unknown[]): Iterable<unknown>;
}

/** The same, for what this file binds. */
interface Statement extends SqliteStatement {
  run(...values: SqliteValue[]): unknown;
  get(...values: SqliteValue[]): unknown;
  all(...values: SqliteValue[]): unknown[];
  iterate(...values: SqliteValue[]): Iterable<unknown>;
}

/** What this adapter calls of a client: `npm:better-sqlite3`, `node:sqlite` and `bun:sqlite` fit. */
export interface SqliteClient {
  /** Prepares one statement, with bare `?` as placeholders. */
  prepare(sql: string): SqliteStatement;
}

/** How the adapter behaves. */
export interface SqliteOptions {
  /** A name for people; without secrets. */
  readonly name?: string;
  /**
   * How long to wait for other writers before the error `busy`, in milliseconds. The wait is asynchronous.
   *
   * @default {5_000}
   */
  readonly waitMs?: number;
  /**
   * The store's clock, in milliseconds since 1970.
   *
   * @default {Date.now}
   */
  now?(): number;
}

/** What of an outbox to read, and what to do with delivered rows. */
export interface SqliteOutboxOptions extends OutboxOptions, SqliteOptions {
  /**
   * Keep delivered rows, marked, until they are pruned.
   *
   * @default {false} They are deleted.
   */
  readonly keep?: boolean;
}

const VERSION = 1;

// One list a version, forward only. Everything here is a contract with other languages; see the README.
const MIGRATIONS: readonly (readonly string[])[] = [[
  `create table effectonce_meta (name text primary key, value text not null) without rowid`,
  // AUTOINCREMENT: without it SQLite hands out the numbers of deleted rows again (https://sqlite.org/autoinc.html).
  // Not STRICT: that would refuse an INSERT of text as value.
  `create table effectonce_outbox (
  seq integer primary key autoincrement,
  id text not null unique default (lower(printf('%s-%s-4%s-%s%s-%s', hex(randomblob(4)), hex(randomblob(2)),
    substr(hex(randomblob(2)), 2), substr('89ab', 1 + (random() & 3), 1), substr(hex(randomblob(2)), 2),
    hex(randomblob(6))))) check (length(cast(id as blob)) between 1 and 1024 and instr(id, char(0)) = 0),
  topic text not null check (length(cast(topic as blob)) between 1 and 1024 and instr(topic, char(0)) = 0),
  key text check (length(cast(key as blob)) between 1 and 1024 and instr(key, char(0)) = 0),
  value blob,
  headers text not null default '{}' check (json_valid(headers) and json_type(headers) = 'object'),
  created_at text not null default (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
  state text not null default 'pending' check (state in ('pending', 'waiting', 'parked', 'blocked', 'delivered')),
  until_ms integer not null default 0,
  reason text
)`,
  `create index effectonce_outbox_pending on effectonce_outbox (seq) where state = 'pending'`,
  `create index effectonce_outbox_topic on effectonce_outbox (topic, seq) where state = 'pending'`,
  `create index effectonce_outbox_held on effectonce_outbox (key, state, seq, topic)
  where state not in ('pending', 'delivered')`,
  `create index effectonce_outbox_blocked on effectonce_outbox (key, seq, topic) where state = 'blocked'`,
  `create index effectonce_outbox_until on effectonce_outbox (state, until_ms)
  where state not in ('pending', 'blocked')`,
  `create table effectonce_effects (
  scope text not null,
  key text not null,
  state text not null default 'done'
    check (state = 'done' or state in ('claimed', 'waiting', 'rejected', 'uncertain')),
  fence integer not null default 1,
  attempt integer not null default 1,
  generation integer not null default 1,
  until_ms integer not null default 0,
  first_ms integer,
  doubt integer not null default 0,
  fingerprint text,
  request blob,
  result text,
  result_omitted integer not null default 0,
  reason text,
  evidence text,
  changed_ms integer not null,
  primary key (scope, key)
) without rowid`,
  `create index effectonce_effects_open on effectonce_effects (state, scope, key) where state <> 'done'`,
  `create table effectonce_shards (
  relay text not null,
  shard integer not null default 0,
  generation integer not null default 1,
  sealed integer not null default 0,
  sealed_uid text not null default '',
  settled integer not null default 0,
  settled_uid text not null default '',
  primary key (relay, shard)
) without rowid`,
  `create table effectonce_batches (
  relay text not null,
  shard integer not null default 0,
  n integer not null,
  uid text not null,
  prev text not null,
  rows text not null,
  primary key (relay, shard, n)
) without rowid`,
  `create table effectonce_positions (
  relay text not null,
  source text not null,
  n integer not null,
  uid text not null,
  prev text not null,
  rows text not null,
  primary key (relay, source, n)
) without rowid`,
  `create table effectonce_relays (
  instance text primary key,
  relay text not null,
  protocol text not null,
  topics text,
  until_ms integer not null
) without rowid`,
]];

const TABLES = MIGRATIONS.flat().flatMap((sql) => /^create table (\w+)/.exec(sql)?.[1] ?? []);

/** The SQL of the tables, for people who run their own migrations; they also insert the version, as its last lines do. */
export function sqliteSchema(): string {
  const statements = [
    ...MIGRATIONS.flat(),
    `insert into effectonce_meta (name, value) values ('schema_version', '${VERSION}')`,
    `insert into effectonce_meta (name, value) values ('outbox_id', lower(hex(randomblob(16))))`,
  ];
  return statements.map((sql) => `${sql};\n`).join("");
}

/** The primary result code (https://sqlite.org/rescode.html); 0 if the error is not SQLite's. */
function resultCode(error: unknown): number {
  if (!(error instanceof Error)) return 0;
  const { errcode, errno, code } = error as { errcode?: unknown; errno?: unknown; code?: unknown };
  if (typeof errcode === "number") return errcode & 0xff; // node:sqlite
  if (typeof errno === "number") return errno & 0xff; // bun:sqlite
  if (code === "ERR_SQLITE_ERROR") return TEXTS[error.message] ?? 1;
  const name = typeof code === "string" ? /^SQLITE_([A-Z]+)/.exec(code)?.[1] : undefined; // better-sqlite3
  return name === undefined ? 0 : CODES[name] ?? 1;
}
const CODES: Readonly<Record<string, number>> = {
  ...{ BUSY: 5, LOCKED: 6, NOMEM: 7, READONLY: 8, IOERR: 10, CORRUPT: 11, FULL: 13, CANTOPEN: 14, NOTADB: 26 },
};
/** For `DatabaseSync.exec()`, whose errors have no errcode in Deno. */
const TEXTS: Readonly<Record<string, number>> = {
  "database is locked": 5,
  "database table is locked": 6,
  "out of memory": 7,
  "attempt to write a readonly database": 8,
  "disk I/O error": 10,
  "database disk image is malformed": 11,
  "database or disk is full": 13,
  "unable to open database file": 14,
  "file is not a database": 26,
};
const isBusy = (error: unknown): boolean => [5, 6].includes(resultCode(error));
const isOurs = (error: unknown): boolean => Object.values(CODES).includes(resultCode(error));
/** What a person can do about an error of the database's own. */
const ADVICE: Readonly<Record<number, string>> = {
  8: "Its file and its folder must be writable",
  10: "Look at its disk, and at the quota there",
  11: "Restore it from a backup",
  13: "Make room on its disk",
  26: "Put the database back in its place",
};
/** Those that no waiting heals. */
const HOPELESS = [8, 11, 26];

/** What this module does with one client, whichever store or outbox asks. */
interface Connection {
  readonly turns: Turns;
  readonly prepare: (sql: string) => Statement;
  checked: boolean;
  /** The driver's own wait for a lock. */
  readonly timeoutMs: number;
}
const connections = new WeakMap<SqliteClient, Connection>();

interface Database {
  readonly name: string;
  readonly now: () => number;
  readonly prepare: (sql: string) => Statement;
  /** Runs in a transaction that reads one state of the database. */
  read<T>(run: () => T): Promise<T>;
  /** Runs in a transaction that nobody else writes in, from its start. */
  write<T>(run: () => T): Promise<T>;
  /** Runs outside of a transaction. */
  alone<T>(run: () => T): Promise<T>;
  /** As write, with awaits in it. */
  transaction<T>(run: () => Promise<T>): Promise<T>;
  /** After an error of a statement of that transaction, which goes on: to be rolled back. */
  keepOpen(): void;
}

function connectionOf(client: SqliteClient, name: string): Connection {
  const known = connections.get(client);
  if (known) return known;
  const statements = new Map<string, Statement>();
  const connection = {
    turns: createTurns(name),
    prepare(sql: string) {
      let statement = statements.get(sql);
      if (!statement) statements.set(sql, statement = client.prepare(sql));
      return statement;
    },
    checked: false,
    timeoutMs: Number(Object.values(client.prepare("pragma busy_timeout").get() as Record<string, unknown>)[0]),
  };
  connections.set(client, connection);
  return connection;
}

const READ = "begin";
const WRITE = "begin immediate";

function open(client: SqliteClient, options: SqliteOptions, checks = true): Database {
  const { name = "sqlite", waitMs = 5_000, now = Date.now } = options;
  const connection = connectionOf(client, name);
  const { turns, prepare } = connection;

  function begin(sql: string): void {
    try {
      prepared(sql);
      // Waiting in the driver would block the thread, and with it the renewal of leases.
      if (connection.timeoutMs > 20) prepare("pragma busy_timeout = 0").run();
      try {
        prepare(sql).run();
      } finally {
        if (connection.timeoutMs > 20) prepare(`pragma busy_timeout = ${connection.timeoutMs}`).run();
      }
    } catch (error) {
      if (!(error instanceof Error && /(within|inside) a transaction/.test(error.message))) throw error;
      throw new EffectError(
        "source_invalid",
        `A transaction is open on the connection of ${name}: give effectonce a connection of its own`,
        { cause: error },
      );
    }
  }
  function rollback(): void {
    try {
      prepare("rollback").run();
    } catch {
      // Some errors have ended the transaction already (https://sqlite.org/lang_transaction.html).
    }
  }
  /** Another process has the lock: waits without blocking the thread, which renews leases meanwhile. */
  async function patiently<T>(run: () => T | Promise<T>): Promise<T> {
    const until = realRuntime.now() + waitMs;
    for (;;) {
      try {
        return await turns(waitMs, run);
      } catch (error) {
        const cause = error instanceof Error && error.cause !== undefined && !isBusy(error) ? error.cause : error;
        if (!isBusy(cause)) throw error;
        if (realRuntime.now() > until) {
          throw new EffectError("busy", `${name} has been locked by another writer for ${waitMs} ms`, { cause: error });
        }
        await realRuntime.sleep(1 + realRuntime.random() * 20);
      }
    }
  }
  /** Says which database it was that has no space left, and what to do. */
  async function named<T>(answer: Promise<T>, whose = (error: unknown) => resultCode(error) !== 0): Promise<T> {
    try {
      return await answer;
    } catch (error) {
      if (!whose(error)) throw error;
      const code = resultCode(error);
      const message = `Cannot use ${name}: ${(error as Error).message}${code in ADVICE ? `. ${ADVICE[code]}` : ""}`;
      if (HOPELESS.includes(code)) throw new EffectError("source_invalid", message, { cause: error });
      throw new Error(message, { cause: error });
    }
  }
  function prepared(sql: string): void {
    if (!checks || connection.checked && sql === READ) return;
    if (!connection.checked) checkSchema(prepare, name);
    // Each time: whoever shares the connection may have set something else since.
    makeDurable(prepare, name);
    connection.checked = true;
  }
  function within<T>(sql: string, run: () => T): () => T {
    return () => {
      begin(sql);
      try {
        const answer = run();
        prepare("commit").run();
        return answer;
      } catch (error) {
        rollback();
        throw error;
      }
    };
  }
  return {
    name,
    now,
    prepare,
    read: (run) => named(patiently(within(READ, run))),
    write: (run) => named(patiently(within(WRITE, run))),
    alone: (run) => patiently(run),
    transaction: (run) =>
      named(
        patiently(async () => {
          begin(WRITE);
          try {
            const answer = await run();
            prepare("commit").run();
            return answer;
          } catch (error) {
            rollback();
            if (!(error instanceof Error && /no transaction is active/.test(error.message))) throw error;
            const why = "was ended by an error that its function caught: let the database's own errors through";
            throw new EffectError("source_invalid", `The transaction on ${name} ${why}`, { cause: error });
          }
        }),
        isOurs,
      ),
    keepOpen() {
      try {
        // Some errors end the transaction (https://sqlite.org/lang_transaction.html). If the function catches this one, what
        // it writes next must not commit by itself.
        prepare(WRITE).run();
      } catch {
        // It is still open.
      }
    },
  };
}

/**
 * Makes the commits of a connection survive a power cut: a claim that one takes back is an effect that runs twice. WAL builds
 * often default to less. None of this can change inside a transaction.
 */
function makeDurable(prepare: Database["prepare"], name: string): void {
  const valueOf = (pragma: string) => Object.values(prepare(`pragma ${pragma}`).get() as Record<string, unknown>)[0];
  const journal = valueOf("journal_mode");
  if (journal === "memory" || journal === "off") {
    const { file } = prepare("pragma database_list").get() as { file: string | null };
    if (!file) return; // A database in memory promises nothing beyond its process.
    const why = `its journal_mode is ${journal}, which does not survive a crash`;
    throw new EffectError("source_invalid", `Cannot use ${name}: ${why}. Set another on this connection, such as wal`);
  }
  // Without WAL a commit is the removal of a file, which only EXTRA makes durable: https://sqlite.org/pragma.html#pragma_synchronous
  const [level, least] = journal === "wal" ? ["full", 2] as const : ["extra", 3] as const;
  if (Number(valueOf("synchronous")) >= least) return;
  prepare(`pragma synchronous = ${level}`).run();
  if (Number(valueOf("synchronous")) >= least) return;
  const why = `its synchronous cannot be set to ${level}, so a power cut may take commits back`;
  throw new EffectError("source_invalid", `Cannot use ${name}: ${why}`);
}

function checkSchema(prepare: Database["prepare"], name: string): void {
  const row = prepare("select name from sqlite_master where type = 'table' and name = 'effectonce_meta'").get();
  const missing = `${name} has no effectonce tables of version ${VERSION}: run "init" (or migrateSqlite) first`;
  if (!row) throw new EffectError("schema_missing", missing);
  const found = prepare("select value from effectonce_meta where name = 'schema_version'").get();
  const version = Number((found as { value: string } | undefined)?.value ?? 0);
  if (version > VERSION) {
    throw new EffectError(
      "schema_newer",
      `${name} has tables of version ${version}, this effectonce knows ${VERSION}: upgrade it`,
    );
  }
  if (version < VERSION) throw new EffectError("schema_missing", missing);
}

/**
 * Creates or upgrades the tables, and sets WAL. Repeating it is harmless, also by two processes at once.
 *
 * @throws {EffectError} `schema_newer` if the tables are of a newer version than this package.
 */
export async function migrateSqlite(client: SqliteClient, options: SqliteOptions = {}): Promise<void> {
  const { prepare, write, alone, name } = open(client, options, false);
  await write(() => {
    const { encoding } = prepare("pragma encoding").get() as { encoding: string };
    // A value may have been stored as text, and its bytes would be others.
    if (encoding !== "UTF-8") {
      throw new EffectError("source_invalid", `Cannot use ${name}: its encoding is ${encoding}, not UTF-8`);
    }
    const tables = prepare("select name from sqlite_master where type = 'table' and name like 'effectonce_%'").all();
    const names = (tables as { name: string }[]).map(({ name }) => name);
    const exists = names.includes("effectonce_meta");
    const found = exists ? prepare("select value from effectonce_meta where name = 'schema_version'").get() : undefined;
    const version = Number((found as { value: string } | undefined)?.value ?? 0);
    if (version > VERSION) checkSchema(prepare, name);
    for (const statement of MIGRATIONS.slice(version).flat()) client.prepare(statement).run();
    const lacking = version === 0 ? undefined : TABLES.find((table) => !names.includes(table));
    if (lacking) {
      const why = `its table ${lacking} is gone: restore it from a backup, or take the other effectonce tables away as well`;
      throw new EffectError("schema_missing", `Cannot use ${name}: ${why}`);
    }
    prepare("insert or replace into effectonce_meta (name, value) values ('schema_version', ?)").run(String(VERSION));
    prepare("insert or ignore into effectonce_meta (name, value) values ('outbox_id', ?)").run(crypto.randomUUID());
  });
  // After the tables, so that a refused database is left as it was. Readers and a writer do not stop each other in WAL.
  await alone(() => prepare("pragma journal_mode = wal").get());
}

const bytesOf = (value: Uint8Array | null): Uint8Array | null =>
  value && new Uint8Array(value.buffer, value.byteOffset, value.byteLength); // better-sqlite3 gives Buffers

// --------------------------------------------------------------------------------------------------------------- effects

const COLUMNS = `scope, key, state, fence, attempt, generation, until_ms, first_ms, doubt, fingerprint, request, result,
  result_omitted, reason, evidence, changed_ms`;
const SELECT_EFFECT = `select ${COLUMNS} from effectonce_effects where scope = ? and key = ?`;
const WRITE_EFFECT = `insert into effectonce_effects (${COLUMNS}) values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
  on conflict (scope, key) do update set state = excluded.state, fence = excluded.fence, attempt = excluded.attempt,
  generation = excluded.generation, until_ms = excluded.until_ms, first_ms = excluded.first_ms, doubt = excluded.doubt,
  fingerprint = excluded.fingerprint, request = excluded.request, result = excluded.result,
  result_omitted = excluded.result_omitted, reason = excluded.reason, evidence = excluded.evidence,
  changed_ms = excluded.changed_ms`;
// Insert first, never check then act; the row counts as claimed and done when the caller's transaction commits.
const CLAIM_IN_TRANSACTION = `insert into effectonce_effects (scope, key, fingerprint, request, changed_ms)
  values (?, ?, ?, ?, ?) on conflict (scope, key) do nothing returning 1`;
const CLAIM_ALL_IN_TRANSACTION = `insert into effectonce_effects (scope, key, changed_ms)
  select ?, value, ? from json_each(?) where true on conflict (scope, key) do nothing returning key`;
const COMPLETE_IN_TRANSACTION = `update effectonce_effects set result = ?, result_omitted = ?
  where scope = ? and key = ? returning 1`;
const ENQUEUE = `insert into effectonce_outbox (id, topic, key, value, headers) values (?, ?, ?, ?, ?)
  on conflict (id) do nothing returning 1`;
const ADVANCE = `insert into effectonce_positions (relay, source, n, uid, prev, rows) values (?, ?, ?, ?, ?, ?)
  on conflict do nothing returning 1`;
const FORGET_POSITIONS = `delete from effectonce_positions where relay = ? and source = ? and n <= ? returning 1`;
const SELECT_POSITIONS = `select n, uid, prev, rows from effectonce_positions where relay = ? and source = ?`;
/** How many positions are kept to repair a source that went back in time. */
const RING = 100;
// A key whose message is still in the outbox would be a new key.
const OLD = `state in ('done', 'rejected') and changed_ms <= ? and not exists (select 1 from effectonce_outbox o
  where o.id = effectonce_effects.key and o.state <> 'delivered')`;

interface StoredEffect {
  scope: string;
  key: string;
  state: EffectState;
  fence: number;
  attempt: number;
  generation: number;
  until_ms: number;
  first_ms: number | null;
  doubt: number;
  fingerprint: string | null;
  request: Uint8Array | null;
  result: string | null;
  result_omitted: number;
  reason: string | null;
  evidence: string | null;
  changed_ms: number;
}

function toEffect(stored: unknown): EffectRow | undefined {
  if (!stored) return undefined;
  const row = stored as StoredEffect;
  return {
    scope: row.scope,
    key: row.key,
    state: row.state,
    fence: row.fence,
    attempt: row.attempt,
    generation: row.generation,
    untilMs: row.until_ms,
    firstMs: row.first_ms,
    doubt: row.doubt !== 0,
    fingerprint: row.fingerprint,
    request: bytesOf(row.request),
    result: row.result,
    resultOmitted: row.result_omitted !== 0,
    reason: row.reason,
    evidence: row.evidence,
    changedMs: row.changed_ms,
  };
}

function fromEffect(row: EffectRow): SqliteValue[] {
  const { scope, key, state, fence, attempt, generation, untilMs, firstMs, fingerprint, request, result, reason } = row;
  const start = [scope, key, state, fence, attempt, generation, untilMs, firstMs, row.doubt ? 1 : 0, fingerprint, request];
  return [...start, result, row.resultOmitted ? 1 : 0, reason, row.evidence, row.changedMs];
}

const toPosition = (stored: unknown): Position => {
  const { n, uid, prev, rows } = stored as { n: number; uid: string; prev: string; rows: string };
  return { n, uid, prev, rows: JSON.parse(rows) };
};

function handle(sql: RunSql, now: () => number): { readonly effects: EffectTransaction; readonly guard: TransactionGuard } {
  const guard = createGuard();
  const mine = createKeySet();
  const claim: EffectTransaction["claim"] = (key, { request } = {}) =>
    guard.run(async (): Promise<Claim> => {
      checkKey(key);
      const { bytes, fingerprint } = request === undefined ? NO_REQUEST : await encodeRequest(request);
      const [inserted] = await sql(CLAIM_IN_TRANSACTION, [key.scope, key.key, fingerprint, bytes, now()]);
      if (inserted) {
        mine.add(key);
        return { ...CLAIMED, request: bytes };
      }
      const [stored] = await sql(SELECT_EFFECT, [key.scope, key.key]);
      const { write, answer } = transactionStep(key, fingerprint, bytes)(toEffect(stored), now());
      if (write) {
        await sql(`${WRITE_EFFECT} returning 1`, fromEffect(write));
        mine.add(key);
      }
      return answer;
    });
  return {
    guard,
    effects: {
      claim,
      claimAll: (keys) =>
        guard.run(async () => {
          for (const key of keys) checkKey(key);
          const inserted: EffectKey[] = [];
          // Most batches are of one scope; two columns in the JSON would cost half as much again.
          for (const [scope, group] of Map.groupBy(keys, ({ scope }) => scope)) {
            const texts = JSON.stringify(group.map(({ key }) => key));
            const rows = await sql(CLAIM_ALL_IN_TRANSACTION, [scope, now(), texts]);
            for (const { key } of rows) inserted.push({ scope, key: String(key) });
          }
          for (const key of inserted) mine.add(key);
          if (inserted.length === keys.length) return keys.map(() => CLAIMED);
          const fresh = createKeySet(inserted);
          const claims: Claim[] = [];
          // A key that comes twice is claimed once: its second answer is read.
          for (const key of keys) claims.push(fresh.delete(key) ? CLAIMED : await claim(key));
          return claims;
        }),
      complete: (key, result) =>
        guard.run(async () => {
          if (!mine.has(key)) throw notClaimed(key);
          const { text, omitted } = encodeResult(result);
          await sql(COMPLETE_IN_TRANSACTION, [text, omitted ? 1 : 0, key.scope, key.key]);
        }),
      enqueue: (...messages) =>
        guard.run(async () => {
          for (const message of messages) {
            const { id, topic, key, value, headers } = encodeMessage(message);
            const [inserted] = await sql(ENQUEUE, [id, topic, key, value, JSON.stringify(headers)]);
            if (!inserted) throw alreadyEnqueued(id);
          }
        }),
      advance: ({ relay, source }, { n, uid, prev, rows }) =>
        guard.run(async () => {
          const [stored] = await sql(`${SELECT_POSITIONS} order by n desc limit 1`, [relay, source]);
          checkAdvance(stored ? toPosition(stored) : START, { n, uid, prev, rows });
          await sql(ADVANCE, [relay, source, n, uid, prev, JSON.stringify(rows)]);
          await sql(FORGET_POSITIONS, [relay, source, n - RING]);
        }),
    },
  };
}
const NO_REQUEST = { bytes: null, fingerprint: null };
const CLAIMED = { state: "claimed", fence: 1, attempt: 1, generation: 1, request: null } as const;

/** A set of effects. */
function createKeySet(keys: readonly EffectKey[] = []) {
  const scopes = new Map<string, Set<string>>();
  const set = {
    add({ scope, key }: EffectKey): void {
      const known = scopes.get(scope);
      if (known) known.add(key);
      else scopes.set(scope, new Set([key]));
    },
    has: ({ scope, key }: EffectKey): boolean => scopes.get(scope)?.has(key) ?? false,
    delete: ({ scope, key }: EffectKey): boolean => scopes.get(scope)?.delete(key) ?? false,
  };
  for (const key of keys) set.add(key);
  return set;
}

/** Claims and positions in the tables that {@linkcode migrateSqlite} made. Several processes may share one file. */
export function sqliteStore<Client extends SqliteClient>(client: Client, options: SqliteOptions = {}): EffectStore<Client> {
  const database = open(client, options);
  const { prepare, read, write, now } = database;
  const runOn = (client: SqliteClient, failed: () => void = () => {}): RunSql => {
    const { prepare } = connectionOf(client, database.name);
    // deno-lint-ignore require-await -- what throws here must reject
    return async (sql, values) => {
      try {
        return prepare(sql).all(...values as SqliteValue[]) as Record<string, unknown>[];
      } catch (error) {
        failed();
        throw error;
      }
    };
  };
  return {
    ...claimStore({
      name: database.name,
      change: (steps) =>
        write(() =>
          steps.map(({ key, step }) => {
            const { write, answer } = step(toEffect(prepare(SELECT_EFFECT).get(key.scope, key.key)), now());
            if (write) prepare(WRITE_EFFECT).run(...fromEffect(write));
            return answer;
          })
        ),
      list({ state, scope, key, limit, after }) {
        const conditions = ["true"];
        const values: SqliteValue[] = [];
        const where = (condition: string, ...given: SqliteValue[]) => {
          conditions.push(condition);
          values.push(...given);
        };
        if (state !== undefined) where(state === "done" ? "state = ?" : "state <> 'done' and state = ?", state);
        if (scope !== undefined) where("scope = ?", scope);
        if (key !== undefined) where("key = ?", key);
        if (after !== undefined) where("(scope, key) > (?, ?)", after.scope, after.key);
        const sql = `select ${COLUMNS} from effectonce_effects where ${
          conditions.join(" and ")
        } order by scope, key limit ?`;
        return read(() => prepare(sql).all(...values, limit).map((stored) => toEffect(stored)!));
      },
      count: (scope) =>
        read(() => {
          const counts: Record<EffectState, number> = { claimed: 0, waiting: 0, done: 0, rejected: 0, uncertain: 0 };
          const [mine, values] = scope === undefined ? ["true", []] : ["scope = ?", [scope]];
          // Only what is not done is indexed by state: a claim that is done at once costs no index entry.
          const open = prepare(
            `select state, count(*) as n from effectonce_effects where state <> 'done' and ${mine} group by state`,
          ).all(...values) as { state: EffectState; n: number }[];
          const all = prepare(`select count(*) as n from effectonce_effects where ${mine}`).get(...values) as { n: number };
          counts.done = all.n;
          for (const { state, n } of open) {
            counts[state] = n;
            counts.done -= n;
          }
          return counts;
        }),
      prune: createPrune({
        old: ({ scope, key }, { olderThanMs, limit }) =>
          read(() => {
            const last = prepare(`select scope, key from effectonce_effects where (scope, key) > (?, ?)
              order by scope, key limit 1 offset ?`).get(scope, key, limit - 1) as EffectKey | null | undefined;
            const sql = `select scope, key from effectonce_effects where (scope, key) > (?, ?)${
              last ? " and (scope, key) <= (?, ?)" : ""
            } and ${OLD}`;
            const values = last ? [scope, key, last.scope, last.key] : [scope, key];
            return { keys: prepare(sql).all(...values, now() - olderThanMs) as EffectKey[], last: last ?? undefined };
          }),
        forget: (keys, { olderThanMs }) =>
          write(() =>
            prepare(`delete from effectonce_effects
              where (scope, key) in (select value ->> 0, value ->> 1 from json_each(?)) and ${OLD} returning 1`)
              .all(JSON.stringify(keys.map(({ scope, key }) => [scope, key])), now() - olderThanMs).length
          ),
      }),
    }),
    transaction: (run) =>
      database.transaction(async () => {
        const { effects, guard } = handle(runOn(client, database.keepOpen), now);
        const answer = await run(effects, client);
        guard.check();
        return answer;
      }),
    join(open) {
      if (typeof open === "function") return handle(open as RunSql, now).effects;
      const { inTransaction, isTransaction } = open as { inTransaction?: boolean; isTransaction?: boolean };
      if ((inTransaction ?? isTransaction) === false) {
        throw new RangeError(`Cannot join ${database.name}: no transaction is open on this client`);
      }
      return handle(runOn(open), now).effects;
    },
    positions: ({ relay, source }) =>
      read(() => prepare(`${SELECT_POSITIONS} order by n`).all(relay, source).map((stored) => toPosition(stored))),
    isDatabaseFailure: (error) => isOurs(error) || error instanceof Error && isOurs(error.cause),
  };
}

// ---------------------------------------------------------------------------------------------------------------- outbox

const quoted = (text: string): string => `'${text.replaceAll("'", "''")}'`;
// Conditions in the very words of the partial indexes, or SQLite does not use them (https://sqlite.org/partialindex.html).
// NOT IN, which SQLite does not take for a search of its own, as it does IN: the state that is asked for is to be searched.
const HELD = "state not in ('pending', 'delivered')";
const UNTIL = "state not in ('pending', 'blocked')";
const WAITING = `${UNTIL} and state = 'waiting'`;

const among = (topics: readonly string[] | null | undefined): string =>
  topics ? ` and topic in (${topics.map(quoted).join(", ")})` : "";

interface StoredRelay {
  readonly instance: string;
  readonly relay: string;
  readonly protocol: Protocol;
  readonly topics: string | null;
  readonly until_ms: number;
}

interface StoredMessage {
  seq: string;
  id: string;
  topic: string;
  key: string | null;
  value: Uint8Array | null;
  headers: string;
  created_at: string;
  behind: number;
}

function toMessage({ id, topic, key, value, headers, created_at }: StoredMessage): Message {
  const texts: Record<string, string> = {};
  for (const [name, text] of Object.entries(JSON.parse(headers))) {
    texts[name] = typeof text === "string" ? text : JSON.stringify(text);
  }
  return createMessage({
    id,
    topic,
    key,
    value: bytesOf(value),
    headers: texts,
    time: new Date(created_at),
  });
}

/** The table `effectonce_outbox` as a source, for the relays and for operators. */
export function sqliteOutbox(client: SqliteClient, options: SqliteOutboxOptions = {}): Outbox {
  const { keep = false } = options;
  const topics = options.topics && [...new Set(options.topics)];
  if (topics?.length === 0) throw new RangeError("Cannot read no topics: name one at least, or leave them out for all");
  const { name, prepare, read, write, now } = open(client, options);
  // As literals: the same few texts in many statements.
  const mine = among(topics);
  /** Whether a message of the same key in one of these states comes before `o`. */
  const behind = (states: readonly string[]): string => {
    // One search for each: with two lists SQLite would take the longer one for the index, and walk over what is parked.
    const before = (state: string) =>
      `exists (select 1 from effectonce_outbox h where h.key = o.key and h.seq < o.seq
        and h.${HELD} and h.state = '${state}'${mine})`;
    return `(o.key is not null and (${states.map(before).join(" or ")}))`;
  };
  const columns = "id, topic, key, state, coalesce(reason, '') as reason";
  // value as blob: a plain INSERT may have stored a number, or text, which node:sqlite cuts at U+0000.
  // seq as text: it may exceed 2^53.
  const select = (states: readonly string[], extra: string): string => {
    const rows = `select cast(o.seq as text) as seq, id, topic, key, cast(value as blob) as value, headers, created_at,
      ${behind(states)} as behind from effectonce_outbox o where state = 'pending'${extra}`;
    if (!topics) return `${rows} order by o.seq limit ?`;
    // A part for each topic, so that each reads its own index only as far as the limit.
    const parts = topics.map((topic) => `select * from (${rows} and topic = ${quoted(topic)} order by o.seq limit ?)`);
    return `select * from (${parts.join(" union all ")}) order by cast(seq as integer) limit ?`;
  };
  const selectValues = (limit: number, extra: readonly SqliteValue[]): SqliteValue[] =>
    topics ? [...topics.flatMap(() => [...extra, limit]), limit] : [...extra, limit];

  /** Frees what was held back behind a message of this key, as far as nothing else of the key is in the way. */
  function unblock(key: string | null, onPark: "block" | "skip"): void {
    if (key === null) return;
    const states = onPark === "block" ? ["waiting", "parked"] : ["waiting"];
    const before = states.map((state) =>
      ` and seq < coalesce((select min(seq) from effectonce_outbox
        where key = ? and ${HELD} and state = '${state}'${mine}), 9223372036854775807)`
    );
    // In portions: each settled message of the key calls this again.
    prepare(`update effectonce_outbox set state = 'pending' where seq in (select seq from effectonce_outbox
      where state = 'blocked' and key = ?${mine}${before.join("")} order by seq limit 100)`).run(
      key,
      ...states.map(() => key),
    );
  }
  /** Frees what is held back behind rows that a person deleted, or that this relay lets pass. */
  function freeStranded(onPark: "block" | "skip"): void {
    // Key by key, not row by row: there may be a million behind one.
    const next = prepare(
      `select key from effectonce_outbox where state = 'blocked' and key > ?${mine} order by key limit 1`,
    );
    for (let key = "";;) {
      const found = (next.get(key) ?? undefined) as { key: string } | undefined;
      if (!found) break;
      key = found.key;
      unblock(key, onPark);
    }
  }
  function remove(where: string, ...values: SqliteValue[]): { readonly key: string | null }[] {
    const sql = keep
      ? `update effectonce_outbox set state = 'delivered', until_ms = ? where ${where} returning key`
      : `delete from effectonce_outbox where ${where} returning key`;
    return prepare(sql).all(...keep ? [now(), ...values] : values) as { readonly key: string | null }[];
  }
  const unblockAll = (rows: readonly { readonly key: string | null }[], onPark: "block" | "skip") => {
    for (const key of new Set(rows.map(({ key }) => key))) unblock(key, onPark);
  };
  function setAside(parks: readonly Park[], onPark: "block" | "skip"): void {
    for (const { message, reason, retryMs } of parks) {
      const state = retryMs === null ? "parked" : "waiting";
      prepare(`update effectonce_outbox set state = ?, until_ms = ?, reason = ? where id = ? and state <> 'delivered'`)
        .run(state, now() + (retryMs ?? 0), reason, message.id);
      if (state === "parked" && onPark === "skip") unblock(message.key, onPark);
    }
  }
  /** When the next waiting message will have waited long enough; those that have are pending again. */
  function nextWait(): number | null {
    const next = prepare(`select until_ms from effectonce_outbox where ${WAITING}${mine} order by until_ms limit 1`)
      .get() as { until_ms: number } | undefined;
    return next ? next.until_ms - now() : null;
  }
  function wake(): void {
    prepare(`update effectonce_outbox set state = 'pending' where ${WAITING} and until_ms <= ?${mine}`).run(now());
  }
  function find(id: string): OutboxMessage | undefined {
    const found = prepare(`select ${columns} from effectonce_outbox where id = ?${mine}`).get(id);
    return found ? { ...found as OutboxMessage } : undefined; // A plain object, whatever the driver makes.
  }

  const registrations = () =>
    prepare(`select instance, relay, protocol, topics, until_ms from effectonce_relays order by relay, until_ms`)
      .all() as readonly StoredRelay[];
  const topicsOf = ({ topics }: StoredRelay): readonly string[] | null => topics === null ? null : JSON.parse(topics);
  /** Whether messages or batches are there that a relay may have had in hand when it ended. */
  function leaves(ended: StoredRelay): boolean {
    if (ended.protocol === "plain") return false;
    const theirs = among(topicsOf(ended));
    return Boolean(
      prepare(`select 1 from effectonce_outbox where state = 'pending'${theirs} limit 1`).get() ||
        prepare(`select 1 from effectonce_outbox where ${HELD}${theirs} limit 1`).get() ||
        prepare(`select 1 from effectonce_batches where relay = ? limit 1`).get(ended.relay),
    );
  }

  const shardOf = (relay: string): Shard => {
    const row = prepare(
      `select sealed, sealed_uid, settled, settled_uid from effectonce_shards where relay = ? and shard = 0`,
    )
      .get(relay) as { sealed: number; sealed_uid: string; settled: number; settled_uid: string } | undefined;
    // Missing where the database went back to before this relay began; registering again brings it.
    if (!row) return settledShard(START);
    return { sealed: row.sealed, sealedUid: row.sealed_uid, settled: row.settled, settledUid: row.settled_uid };
  };
  const batchesOf = (relay: string): Position[] =>
    prepare(`select n, uid, prev, rows from effectonce_batches where relay = ? and shard = 0 order by n`).all(relay)
      .map((stored) => toPosition(stored));
  function withMessages(batch: Position): Batch {
    const messages = [];
    for (const [seq, id] of batch.rows) {
      const stored = prepare(
        `select cast(seq as text) as seq, id, topic, key, cast(value as blob) as value, headers, created_at, 0 as behind
        from effectonce_outbox where seq = cast(? as integer) and id = ?`,
      ).get(seq, id);
      if (stored) messages.push(toMessage(stored as StoredMessage));
    }
    return { ...batch, messages };
  }

  const renamed = (): readonly Renamed[] =>
    prepare(`select value from effectonce_meta where name like 'renamed:%'`).all()
      .map((row) => JSON.parse((row as { value: string }).value));

  async function openSession(relay: string, protocol: string, onPark: "block" | "skip", leaseMs: number) {
    const instance = crypto.randomUUID();
    const registration = topics ? JSON.stringify(topics.toSorted()) : null;
    const held = onPark === "block" ? ["waiting", "parked", "blocked"] : ["waiting", "blocked"];
    const cache = new Map<string, Batch>();

    const registered = () => Boolean(prepare(`select 1 from effectonce_relays where instance = ?`).get(instance));
    const register = (): { id: string; inherited: boolean } => {
      checkRenamed(name, relay, renamed());
      let inherited = false;
      for (const other of registrations()) {
        const theirs = topicsOf(other);
        if (topics && theirs && !theirs.some((topic) => topics.includes(topic))) continue;
        const ended = other.until_ms <= now();
        const leavesNothing = ended && !leaves(other);
        if (!leavesNothing) {
          if (other.relay !== relay) throw overlapping(name, other.relay, relay, topics);
          if (other.protocol !== protocol) {
            throw new EffectError(
              "source_invalid",
              `Relay "${relay}" of ${name} has messages under way by the ${other.protocol} protocol, this sink needs the ` +
                `${protocol} one: let it finish with its own sink first`,
            );
          }
        }
        if (!ended) continue;
        inherited ||= !leavesNothing;
        const covered = !topics || theirs?.every((topic) => topics.includes(topic));
        if (leavesNothing || covered) prepare(`delete from effectonce_relays where instance = ?`).run(other.instance);
      }
      prepare(`insert into effectonce_relays (instance, relay, protocol, topics, until_ms) values (?, ?, ?, ?, ?)`)
        .run(instance, relay, protocol, registration, now() + leaseMs);
      prepare(`insert or ignore into effectonce_shards (relay) values (?)`).run(relay);
      freeStranded(onPark);
      const { value } = prepare(`select value from effectonce_meta where name = 'outbox_id'`).get() as { value: string };
      return { id: value, inherited };
    };
    const { id, inherited } = await write(register);
    /** One that was paused for longer than its lease may find its name ended, and its topics with another relay. */
    function stillOurs(): void {
      if (!registered()) register();
    }

    /** Pending rows in order, without those that are behind; these are marked, so that they never fill the window again. */
    function pendingRows({ rows, bytes }: ReadLimits, extra: string, values: readonly SqliteValue[], mayWrite: boolean) {
      const found: StoredMessage[] = [];
      const behind: string[] = [];
      let size = 0;
      for (const stored of prepare(select(held, extra)).iterate(...selectValues(Math.max(rows, 1), values))) {
        const row = stored as StoredMessage;
        if (row.behind) {
          behind.push(row.seq);
          continue;
        }
        if (behind.length > 0 && mayWrite) continue; // To be read again once those are marked.
        size += row.value?.length ?? 0;
        if (size > bytes && found.length > 0) break;
        found.push(row);
      }
      return { found, behind };
    }
    function block(seqs: readonly string[]): void {
      // Looks again: what held them back may be gone since they were read.
      const sql = `update effectonce_outbox as o set state = 'blocked' where seq = cast(? as integer) and state = 'pending'
        and ${behind(held)}`;
      for (const seq of seqs) prepare(sql).run(seq);
    }
    function pendingNow(limits: ReadLimits, extra: string, values: readonly SqliteValue[]): StoredMessage[] {
      for (;;) {
        const { found, behind } = pendingRows(limits, extra, values, true);
        if (behind.length === 0) return found;
        block(behind);
      }
    }

    const readShard = () => shardOf(relay);
    const readBatches = () => batchesOf(relay);
    /** These rows, and no others that carry their numbers, have left the outbox. */
    function settleRows(rows: Position["rows"]): void {
      for (const [seq, id] of rows) unblockAll(remove(`seq = cast(? as integer) and id = ?`, seq, id), onPark);
    }
    /** Steps a to d of the protocol, under the lock: what the sink has committed is deleted, and forks are repaired. */
    function settleUpTo(ring: readonly Position[]) {
      const before = readShard();
      const plan = settlePlan(before, readBatches(), ring);
      settleRows(plan.settle);
      prepare(`delete from effectonce_batches where relay = ? and shard = 0 and (? or n <= ?)`)
        .run(relay, plan.repaired.length > 0 ? 1 : 0, plan.shard.settled);
      return { before, ...plan };
    }
    function writeShard({ sealed }: Shard, next: Shard): void {
      const { sealed: number, sealedUid, settled, settledUid } = next;
      const changed = prepare(`update effectonce_shards set sealed = ?, sealed_uid = ?, settled = ?, settled_uid = ?
        where relay = ? and shard = 0 and sealed = ? returning 1`)
        .all(number, sealedUid, settled, settledUid, relay, sealed);
      if (changed.length !== 1) throw new EffectError("fenced", `Another relay has sealed a batch of ${name} meanwhile`);
    }
    const SEALED = ` and o.seq not in (select cast(json_extract(r.value, '$[0]') as integer)
      from effectonce_batches b, json_each(b.rows) r where b.relay = ? and b.shard = 0)`;
    const PARKED = `select 1 from effectonce_outbox where id = ? and state = 'parked'`;
    const session: SourceSession = {
      id,
      inherited,
      async read(limits) {
        for (;;) {
          const { found, behind, waitMs, ours } = await read(() => {
            return { ...pendingRows(limits, "", [], true), waitMs: nextWait(), ours: registered() };
          });
          if (ours && behind.length === 0 && (waitMs === null || waitMs > 0)) {
            return { messages: found.map(toMessage), waitMs };
          }
          await write(() => {
            stillOurs();
            wake();
            block(behind);
          });
        }
      },
      settle: (messages) =>
        write(() => {
          unblockAll(messages.flatMap(({ id }) => remove(`id = ? and state <> 'delivered'`, id)), onPark);
        }),
      park: (parks) => write(() => setAside(parks, onPark)),
      settled: () => read(() => readShard().settled),
      async seal(ring, limits) {
        const cursor = ring.at(-1) ?? START;
        // A look first: an idle relay writes nothing.
        const { idle, waitMs } = await read(() => {
          const shard = readShard();
          const waitMs = nextWait();
          const quiet = shard.settled === cursor.n && shard.settledUid === cursor.uid && shard.sealed === cursor.n &&
            (waitMs === null || waitMs > 0) && registered();
          const { found, behind } = pendingRows({ rows: 1, bytes: 1 }, "", [], false);
          return { idle: quiet && found.length + behind.length === 0, waitMs };
        });
        if (idle) return { batches: [], waitMs, repaired: [] };
        return await write(() => {
          stillOurs();
          const { before, shard, remaining, repaired } = settleUpTo(ring);
          let next = shard;
          const batches = [...remaining];
          if (batches.length < 2) {
            wake();
            const stored = pendingNow(limits, SEALED, [relay]);
            if (stored.length > 0) {
              const rows = stored.map(({ seq, id }) => [seq, id] as const);
              const uid = createHash("sha256").update(chainText(shard.sealedUid, rows)).digest("hex");
              const batch = { n: shard.sealed + 1, uid, prev: shard.sealedUid, rows };
              prepare(`insert into effectonce_batches (relay, n, uid, prev, rows) values (?, ?, ?, ?, ?)`)
                .run(relay, batch.n, uid, batch.prev, JSON.stringify(rows));
              next = { ...shard, sealed: batch.n, sealedUid: uid };
              batches.push(batch);
              cache.set(uid, { ...batch, messages: stored.map(toMessage) });
            }
          }
          writeShard(before, next);
          const handed = batches.map((batch) => cache.get(batch.uid) ?? withMessages(batch));
          cache.clear();
          for (const batch of handed) cache.set(batch.uid, batch);
          return { batches: handed, waitMs: nextWait(), repaired };
        });
      },
      unseal: (ring, parks) =>
        write(() => {
          const { before } = settleUpTo(ring);
          prepare(`delete from effectonce_batches where relay = ? and shard = 0`).run(relay);
          writeShard(before, settledShard(ring.at(-1) ?? START));
          cache.clear();
          // What another relay has parked meanwhile stays parked: this one may be the one that is late.
          setAside(parks.filter(({ message: { id } }) => !prepare(PARKED).get(id)), onPark);
        }),
      adopt: (ring) =>
        write(() => {
          const before = readShard();
          settleRows(ring.flatMap(({ rows }) => rows));
          prepare(`delete from effectonce_batches where relay = ? and shard = 0`).run(relay);
          writeShard(before, settledShard(ring.at(-1) ?? START));
          cache.clear();
        }),
      renew: () =>
        write(() => {
          prepare(`update effectonce_relays set until_ms = ? where instance = ?`).run(now() + leaseMs, instance);
        }),
      close: (settled) =>
        write(() => {
          const left = !settled ||
            prepare(`select 1 from effectonce_outbox where ${HELD}${mine} limit 1`).get() ||
            prepare(`select 1 from effectonce_batches where relay = ? limit 1`).get(relay);
          const sql = left
            ? `update effectonce_relays set until_ms = 0 where instance = ?`
            : `delete from effectonce_relays where instance = ?`;
          prepare(sql).run(instance);
        }),
    };
    return session;
  }

  return {
    name,
    seals: true,
    open: ({ relay, protocol, onPark, leaseMs }) => openSession(relay, protocol, onPark, leaseMs),
    sealed: (relay) =>
      read(() => {
        const { value } = prepare(`select value from effectonce_meta where name = 'outbox_id'`).get() as { value: string };
        const { settled: n, settledUid: uid } = shardOf(relay);
        return [{ owner: { relay, source: value }, settled: { n, uid }, batches: batchesOf(relay).map(withMessages) }];
      }),
    status: () =>
      read(() => {
        const { pending, held, parked, oldest } = prepare(`select
          (select count(*) from effectonce_outbox where state = 'pending'${mine}) +
          (select count(*) from effectonce_outbox where ${HELD} and state <> 'parked'${mine}) as pending,
          (select count(*) from effectonce_outbox where ${HELD} and state = 'blocked'${mine}) as held,
          (select count(*) from effectonce_outbox where ${HELD} and state = 'parked'${mine}) as parked,
          (select min(created_at) from effectonce_outbox where seq in (
            select min(seq) from effectonce_outbox where state = 'pending'${mine} union all
            select min(+seq) from effectonce_outbox where ${HELD} and state <> 'parked'${mine})) as oldest`)
          .get() as {
            pending: number;
            held: number;
            parked: number;
            oldest: string | null;
          };
        const oldestMs = oldest === null ? null : Math.max(0, now() - new Date(oldest).getTime());
        return { pending, heldBack: held, parked, oldestMs };
      }),
    parked: (limit = 1000) =>
      read(() => {
        const sql = `select ${columns}, until_ms from effectonce_outbox where ${UNTIL} and state = 'parked'${mine}
          order by until_ms, seq limit ?`;
        const rows = prepare(sql).all(limit) as (OutboxMessage & { readonly until_ms: number })[];
        return rows.map(({ until_ms, ...message }) => ({ ...message, since: new Date(until_ms) }));
      }),
    find: (id) => read(() => find(id)),
    release: (id) =>
      write(() => {
        if (!["parked", "waiting"].includes(find(id)?.state ?? "")) return false;
        prepare(`update effectonce_outbox set state = 'pending', reason = null where id = ?`).run(id);
        return true; // What it held back is freed when it is delivered.
      }),
    discard: (id) =>
      write(() => {
        const found = find(id);
        if (found?.state !== "parked" && found?.state !== "waiting") return false;
        prepare(`delete from effectonce_outbox where id = ?`).run(id);
        // Whichever topics a relay has: it holds back again what it must.
        prepare(`update effectonce_outbox set state = 'pending' where state = 'blocked' and key = ?`).run(found.key);
        return true;
      }),
    relays: () =>
      read(() =>
        registrations().map((stored) => ({ ...stored, live: stored.until_ms > now() }))
          .filter((stored) => stored.live || leaves(stored)).map((stored) => {
            const { relay, protocol, live } = stored;
            const { sealed } = prepare(
              `select coalesce(sum(json_array_length(rows)), 0) as sealed from effectonce_batches where relay = ?`,
            ).get(relay) as { sealed: number };
            return { relay, protocol, topics: topicsOf(stored), live, sealed };
          })
      ),
    forget: (relay) =>
      write(() => {
        const theirs = registrations().filter((stored) => stored.relay === relay);
        const untilMs = Math.max(0, ...theirs.map((stored) => stored.until_ms));
        if (untilMs > now()) {
          const how = `it runs, or has died and is waited for until ${new Date(untilMs).toISOString()}`;
          throw new EffectError("busy", `Cannot forget relay "${relay}" of ${name}: ${how}. Stop it first`);
        }
        prepare(`delete from effectonce_batches where relay = ?`).run(relay);
        // What it seals next follows on what was delivered, not on what is given up here.
        prepare(`update effectonce_shards set sealed = settled, sealed_uid = settled_uid where relay = ?`).run(relay);
        prepare(`delete from effectonce_relays where relay = ?`).run(relay);
        return theirs.length > 0;
      }),
    async rename(relay, to, move) {
      const [mark, markOfNew] = [await renamedName(relay), await renamedName(to)];
      const note = (moved: boolean) =>
        prepare(`insert or replace into effectonce_meta (name, value) values (?, ?)`)
          .run(mark, JSON.stringify({ from: relay, to, moved } satisfies Renamed));
      const plan = await write(() => {
        const theirs = registrations().filter((stored) => stored.relay === relay);
        const plan = renamePlan(name, [relay, to], {
          theirs: theirs.map((stored) => ({ ...stored, live: stored.until_ms > now() })),
          renamed: renamed(),
          isKnown: (relay) =>
            prepare(`select 1 from effectonce_shards where relay = ? and sealed > 0`).get(relay) !== undefined,
        });
        if (plan !== "all") return plan;
        note(false);
        prepare(`delete from effectonce_meta where name = ?`).run(markOfNew);
        prepare(`delete from effectonce_shards where relay = ?`).run(to);
        for (const table of ["shards", "batches"]) {
          prepare(`update effectonce_${table} set relay = ? where relay = ?`).run(to, relay);
        }
        // As others, so that one that sleeps does not take them for its own.
        prepare(`delete from effectonce_relays where relay = ?`).run(relay);
        for (const { protocol, topics } of theirs) {
          prepare(`insert into effectonce_relays (instance, relay, protocol, topics, until_ms) values (?, ?, ?, ?, 0)`)
            .run(crypto.randomUUID(), to, protocol, topics);
        }
        return plan;
      });
      if (plan === "all" || plan === "move") {
        await move();
        await write(() => note(true));
      }
      return plan !== undefined;
    },
    prune: ({ olderThanMs, limit = 1000 }) =>
      write(() =>
        prepare(`delete from effectonce_outbox where seq in (select seq from effectonce_outbox
          where ${UNTIL} and state = 'delivered' and until_ms <= ?${mine}
          order by until_ms limit ?) returning 1`).all(now() - olderThanMs, limit).length
      ),
  };
}
