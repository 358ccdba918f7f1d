/**
 * The flow that stores and outboxes on SQL servers share; what differs between servers is in {@linkcode Dialect}. Internal:
 * its shape may change with any version.
 *
 * @module
 */
import {
  type Batch,
  checkKey,
  type Claim,
  type ClaimStore,
  claimStore,
  createMessage,
  EffectError,
  type EffectKey,
  type EffectRow,
  type EffectState,
  type EffectStep,
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
  type RegisteredRelay,
  type RunSql,
  type SealedBatches,
  type SourceOptions,
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
  notClaimed,
  type OutboxOptions,
  overlapping,
  type Renamed,
  renamedName,
  renamePlan,
  settledShard,
  settlePlan,
  sha256,
  type Shard,
  type TransactionGuard,
} from "./shared.ts";
import type { SharedSource } from "./shards.ts";

// --------------------------------------------------------------------------------------------------------- what differs

/** What is bound to a placeholder. */
export type SqlValue = null | number | string | boolean | Uint8Array;

/** A row as a driver gives it. */
export type Row = Readonly<Record<string, unknown>>;

/** Runs one statement with `?` as placeholders and `"name"` as quoted names. */
export type Run = (sql: string, values?: readonly SqlValue[]) => Promise<readonly Row[]>;

/** How a server says it. */
export interface Dialect {
  /** Its clock, in milliseconds since 1970. */
  readonly clock: string;
  /** A number, a UUID or a text as text. */
  text(expression: string): string;
  /** A time in ISO 8601, UTC. */
  time(expression: string): string;
  /** Bytes, or what is to be taken for them. */
  bytes(expression: string, stored: "bytes" | "text"): string;
  /** What a restored dump or a copy does not have in common with the tables that it was taken of. */
  place(tables: Tables): Statement;
  /** The placeholder of a JSON text. */
  readonly json: string;
  /** A part of an effect's key, or a relay's name, as it is bound. */
  name(text: string): SqlValue;
  /**
   * Looks whether the server's columns have room for a message's id, topic or key.
   *
   * @throws {RangeError} If not.
   */
  checkText(text: string): void;
  /** The first byte of the SHA-256 of a text, which is the same everywhere: MySQL 9.6 has no MD5 any more. */
  bucket(expression: string): string;
  /** Whether (`scope`, `key`) comes after two placeholders, and their values. */
  after(key: EffectKey): { readonly condition: string; readonly values: readonly SqlValue[] };
  /** A text that is given, for use in a statement's text. */
  literal(text: string): string;
  /** The table of effects, of which only those of these keys are looked at and locked; conditions follow behind `and`. */
  only(table: string, keys: readonly EffectKey[]): Statement;
  /**
   * Puts a position behind the one that it follows, and forgets those up to `gone`, in one statement, where the server can. Answers
   * the last one that was there before, if one was, and in `put` whether the new one is. `own`: a transaction of the store's own,
   * which the server is to end if whoever has it is silent for half a minute: it keeps the position from others.
   */
  advance?(positions: string, owner: readonly SqlValue[], next: Position, gone: number, own: boolean): Statement;
  /** Says the same as `own` of `advance`, in a statement of its own. */
  readonly endSilence?: string;
  /** The beginning of a DELETE, before `only`. */
  deleteFrom(table: string): string;
  /** Whether a subquery passes on large values without reading them. */
  readonly lazyValues: boolean;
  /**
   * Runs a SELECT of columns of text, and of bytes as `value`, whose rows are in order. Drivers take longer for a row than a server:
   * where it can, it packs them into one.
   */
  messages(run: Run, select: string, texts: readonly string[]): Promise<readonly Row[]>;
  /** Conditions by which rows of these numbers and ids are found, portion by portion: each of both is one of the list. */
  among(seq: string, id: string, rows: Position["rows"]): Iterable<Statement>;
  /** The end of an INSERT of effects, some of which are there already: they are replaced. */
  readonly replace: string;
  /** The end of a SELECT that must see what is committed now, whatever the transaction's snapshot says. */
  readonly latest: string;
  /** Inserts rows; false if one is there already. The transaction goes on. */
  insertNew(run: Run, sql: string, values: readonly SqlValue[], count: number): Promise<boolean>;
  /** Inserts effects that are done, of distinct keys in order; answers which were not there. One or two statements. */
  insertAbsent(
    run: Run,
    effects: string,
    keys: readonly EffectKey[],
    token: number,
  ): Promise<readonly EffectKey[]>;
}

/** A transaction of this package's own, at READ COMMITTED. */
export interface Transaction {
  /** The rows of each of its first statements. */
  readonly first: readonly (readonly Row[])[];
  /** Runs a statement in it. */
  readonly run: Run;
  /** Runs one whose rows nobody needs, before the next one or the commit: it may travel with that. */
  later(sql: string, values?: readonly SqlValue[]): Promise<void>;
  /** The database's clock, in milliseconds since 1970: also after a wait for a lock. */
  now(): number;
}

/** A database server, as an adapter opens it. */
export interface SqlServer<Client> {
  /** A name for people, without secrets. */
  readonly name: string;
  /** How it says it. */
  readonly dialect: Dialect;
  /** Where the tables are. */
  readonly tables: Tables;
  /** Runs one statement, which commits by itself. */
  readonly run: Run;
  /** Runs in a transaction, whose first statements may ride along with its beginning; again if the server ended it. */
  write<T>(run: (transaction: Transaction) => Promise<T>, first?: readonly Statement[]): Promise<T>;
  /**
   * Runs an application's function in a transaction, which commits if the function resolves. Runs it again if the server ended
   * it, or the outcome of its COMMIT is unknown and `again` says that it may.
   */
  transaction<T>(run: (sql: RunSql, client: Client) => Promise<T>, again: () => boolean): Promise<T>;
  /** The statements of an application's open transaction. */
  join(open: Client | RunSql): RunSql;
  /** Whether an error is the server's own, or the connection's. */
  isDatabaseFailure(error: unknown): boolean;
  /** Tells of new messages until the signal fires; undefined where the server cannot. */
  listen?(wake: () => void, signal: AbortSignal): void;
}

/** One statement and what is bound. */
export interface Statement {
  /** Its text. */
  readonly sql: string;
  /** What is bound. */
  readonly values: readonly SqlValue[];
}

/** A transaction that lost against another one for a row that neither had: it runs again. */
export class LostRace extends Error {}

// --------------------------------------------------------------------------------------------------------------- tables

/** Where the tables are, and how they are called. */
export interface TableOptions {
  /**
   * The schema of the tables (on MySQL: the database).
   *
   * @default {undefined} The connection's own.
   */
  readonly schema?: string;
  /**
   * What the names of the tables begin with.
   *
   * @default {"effectonce_"}
   */
  readonly prefix?: string;
  /** An outbox table that is there already. */
  readonly outbox?: ExistingOutbox;
}

/** The columns of an outbox that is there already, such as Debezium's; columns that relays need are added to it. */
export interface ExistingOutbox {
  /** Its name, in the schema of the other tables. */
  readonly table: string;
  /**
   * A column of unique numbers that grow.
   *
   * @default {"effectonce_seq"} One is added.
   */
  readonly seq?: string;
  /**
   * A column of unique ids.
   *
   * @default {"id"}
   */
  readonly id?: string;
  /** The column of topics: Debezium's `aggregatetype`. */
  readonly topic: string;
  /** The column of ordering keys: Debezium's `aggregateid`. */
  readonly key: string;
  /** The column of values: Debezium's `payload`. */
  readonly value: string;
  /**
   * How the value is stored.
   *
   * @default {"text"} JSON or text.
   */
  readonly stored?: "text" | "bytes";
  /** A column of JSON objects of texts, if there is one. */
  readonly headers?: string;
  /** Columns that become headers, by the name of the header: `{ eventType: "type" }`. */
  readonly headerColumns?: Readonly<Record<string, string>>;
  /**
   * The column of the time at which a message was enqueued, in UTC.
   *
   * @default {"effectonce_created_at"} One is added.
   */
  readonly createdAt?: string;
}

/** The names of tables and columns, quoted. */
export interface Tables {
  /** The schema, if one was named. */
  readonly schema: string | undefined;
  /** What the names begin with. */
  readonly prefix: string;
  /** Versions and identity. */
  readonly meta: string;
  /** Messages. */
  readonly outbox: string;
  /** Effects. */
  readonly effects: string;
  /** Where relays stand. */
  readonly shards: string;
  /** What they sealed. */
  readonly batches: string;
  /** What sinks committed. */
  readonly positions: string;
  /** Who relays. */
  readonly relays: string;
  /** Who shares the shards of a relay. */
  readonly members: string;
  /** The outbox's columns. */
  readonly columns: {
    readonly seq: string;
    readonly id: string;
    readonly topic: string;
    readonly key: string;
    readonly value: string;
    readonly headers: string | undefined;
    readonly createdAt: string;
    readonly state: string;
    readonly untilMs: string;
    readonly reason: string;
  };
  /** The outbox that is there already, if it is one. */
  readonly existing: ExistingOutbox | undefined;
}

const quoted = (name: string): string => `"${name}"`;

/**
 * The names of the tables, quoted.
 *
 * @throws {RangeError} If a name is none.
 */
export function tablesOf({ schema, prefix = "effectonce_", outbox }: TableOptions): Tables {
  const columns = outbox &&
    [outbox.seq, outbox.id, outbox.topic, outbox.key, outbox.value, outbox.headers, outbox.createdAt];
  const names = { schema, prefix, table: outbox?.table };
  const headerColumns = Object.values(outbox?.headerColumns ?? {});
  for (const name of [...Object.values(names), ...columns ?? [], ...headerColumns]) {
    if (name === undefined || /^[A-Za-z_][A-Za-z0-9_$]{0,62}$/.test(name)) continue;
    throw new RangeError(`Cannot use ${JSON.stringify(name)} as a name: it must be 1 to 63 letters, digits, _ and $`);
  }
  const table = (name: string) => (schema === undefined ? "" : `${quoted(schema)}.`) + quoted(name);
  const own = (name: string) => outbox ? quoted(`effectonce_${name}`) : quoted(name);
  const optional = (name: string | undefined) => name === undefined ? undefined : quoted(name);
  return {
    schema,
    prefix,
    meta: table(`${prefix}meta`),
    outbox: table(outbox?.table ?? `${prefix}outbox`),
    effects: table(`${prefix}effects`),
    shards: table(`${prefix}shards`),
    batches: table(`${prefix}batches`),
    positions: table(`${prefix}positions`),
    relays: table(`${prefix}relays`),
    members: table(`${prefix}members`),
    existing: outbox,
    columns: {
      seq: outbox?.seq ? quoted(outbox.seq) : own("seq"),
      id: quoted(outbox?.id ?? "id"),
      topic: quoted(outbox?.topic ?? "topic"),
      key: quoted(outbox?.key ?? "key"),
      value: quoted(outbox?.value ?? "value"),
      headers: outbox ? optional(outbox.headers) : quoted("headers"),
      createdAt: outbox?.createdAt ? quoted(outbox.createdAt) : own("created_at"),
      state: own("state"),
      untilMs: own("until_ms"),
      reason: own("reason"),
    },
  };
}

/**
 * Sets how many shards an outbox has. Under the lock of the migration.
 *
 * @throws {RangeError} If it is not a whole number from 1 to 256.
 * @throws {EffectError} `busy` while relays run, or have batches that are not known to be delivered.
 */
export async function setShards(name: string, tables: Tables, { run, now }: Transaction, count: number): Promise<void> {
  if (!Number.isSafeInteger(count) || count < 1 || count > 256) {
    throw new RangeError(`Cannot use ${count} shards: it must be a whole number from 1 to 256`);
  }
  const stored = await run(`select name, value from ${tables.meta} where name in ('shards', 'generation')`);
  const of = (name: string) => stored.find((row) => textOf(row["name"]) === name)?.["value"];
  if (count === Number(of("shards") === undefined ? 1 : textOf(of("shards")))) return;
  const live = await run(`select relay from ${tables.relays} where until_ms > ? limit 1`, [Math.floor(now())]);
  const sealed = await run(`select relay from ${tables.batches} limit 1`);
  for (
    const [rows, why] of [[live, "runs, or has died and is waited for"], [sealed, "has sealed batches to deliver"]] as const
  ) {
    if (rows.length === 0) continue;
    const relay = textOf(rows[0]!["relay"]);
    throw new EffectError("busy", `Cannot change the number of shards of ${name} to ${count}: relay "${relay}" ${why}`);
  }
  // Sinks know relays of another generation by other names: their positions begin anew.
  const generation = Number(of("generation") === undefined ? 1 : textOf(of("generation"))) + 1;
  await run(`delete from ${tables.shards}`);
  await run(`delete from ${tables.members}`);
  await run(`delete from ${tables.meta} where name in ('shards', 'generation')`);
  await run(`insert into ${tables.meta} (name, value) values ('shards', ?), ('generation', ?)`, [
    String(count),
    String(generation),
  ]);
}

/** Version of the tables that this package knows. */
export const VERSION = 1;

/**
 * Looks whether the tables are of the version that this package knows.
 *
 * @throws {EffectError} `schema_missing` or `schema_newer` if they are not.
 */
export function checkVersion(name: string, found: number): void {
  if (found > VERSION) {
    throw new EffectError(
      "schema_newer",
      `${name} has tables of version ${found}, this effectonce knows ${VERSION}: upgrade it`,
    );
  }
  if (found < VERSION) {
    throw new EffectError("schema_missing", `${name} has no effectonce tables of version ${VERSION}: run "init" first`);
  }
}

/** The name of the outbox, which its tables know. */
export const outboxName = ({ existing, prefix }: Tables): string => existing?.table ?? `${prefix}outbox`;

/**
 * Looks whether the tables are those of this outbox.
 *
 * @param stored The name that they know, if they know one.
 * @throws {EffectError} `source_invalid` if not.
 */
export function checkOutbox(name: string, tables: Tables, stored: string | undefined): void {
  if (stored === undefined || stored === outboxName(tables)) return;
  const whose = `are those of the outbox "${stored}", not of "${outboxName(tables)}"`;
  throw new EffectError("source_invalid", `The tables ${tables.prefix}… of ${name} ${whose}: give each a prefix of its own`);
}

// ---------------------------------------------------------------------------------------------------------------- waiting

/** What came of an attempt at a transaction. */
export interface Failures {
  /** Whether the server ended it for another one's sake, or a lock did not come in time. */
  isBusy(error: unknown): boolean;
  /** Whether the connection broke, or none was to be had. */
  isAway(error: unknown): boolean;
}

/**
 * Runs it until the database is not busy; with pauses, and for so long.
 *
 * @throws {EffectError} `busy` if it is so for longer.
 */
export async function patiently<T>(
  name: string,
  waitMs: number,
  { isBusy, isAway }: Failures,
  run: () => Promise<T>,
): Promise<T> {
  let until: number | undefined; // From the first failure: what takes long by itself is tried again as well.
  for (let attempt = 1;; attempt++) {
    try {
      return await run();
    } catch (error) {
      const busy = error instanceof LostRace || isBusy(error);
      if (!busy && !isAway(error)) throw error;
      until ??= realRuntime.now() + waitMs;
      if (realRuntime.now() > until) {
        const why = busy ? "has been busy with other transactions" : "could not be reached";
        const message = `${name} ${why} for ${waitMs} ms: ${error instanceof Error ? error.message : error}`;
        throw new EffectError("busy", message, { cause: error });
      }
      await realRuntime.sleep(realRuntime.random() * Math.min(500, 10 * 2 ** Math.min(attempt, 8)));
    }
  }
}

/** The sides of an error, as libraries wrap them. */
export function* causesOf(error: unknown): Generator<Readonly<Record<string, unknown>>> {
  // What this package says itself is not the server's.
  for (let depth = 0; error instanceof Error && error.name !== "EffectError" && depth < 5; depth++, error = error.cause) {
    yield error as unknown as Readonly<Record<string, unknown>>;
  }
}

// ------------------------------------------------------------------------------------------------------------ connections

/** What Node calls a network that does not work. */
const NETWORK = ["ECONNREFUSED", "ECONNRESET", "EPIPE", "ETIMEDOUT", "EHOSTUNREACH", "ENETUNREACH", "EAI_AGAIN"];

/** Tells errors of the connections here from those of an application's own. */
export interface NetworkErrors {
  /** Whether it may be a connection's here. */
  has(error: unknown): boolean;
  /** It came out of an application's function while the connection here was well. */
  disown(error: unknown): void;
}

/**
 * See {@linkcode NetworkErrors}.
 *
 * @param isBroken What else the driver says of a connection that broke.
 */
export function createNetworkErrors(isBroken: (side: Readonly<Record<string, unknown>>) => boolean): NetworkErrors {
  const foreign = new WeakSet<Error>();
  return {
    has: (error) =>
      !foreign.has(error as Error) &&
      [...causesOf(error)].some((side) => NETWORK.includes(String(side["code"])) || isBroken(side)),
    disown: (error) => void foreign.add(error as Error),
  };
}

/** The connection is not to be used again; the cause is what the caller is told. */
export class Broken extends Error {}

/** The connection broke during a COMMIT of which nothing tells whether it was done. */
export function commitUnknown(name: string, cause: unknown): Broken {
  const why = `The connection to ${name} broke during COMMIT, and nothing that it claimed tells whether that was done`;
  return new Broken(why, { cause: new EffectError("uncertain", why, { cause }) });
}

/** A connection within `waitMs`: a pool that is in use to the last would wait for ever, perhaps for its own caller. */
export async function takeWithin<Taken extends object>(
  name: string,
  waitMs: number,
  taken: Promise<Taken>,
  giveBack: (taken: Taken) => void,
): Promise<Taken> {
  const over = new AbortController();
  const late = realRuntime.sleep(waitMs, over.signal).then(() => undefined);
  const connection = await Promise.race([taken, late]).finally(() => over.abort());
  if (connection) return connection;
  taken.then(giveBack, () => {});
  throw new EffectError("busy", `${name} had no free connection for ${waitMs} ms: its pool is too small, or held in use`);
}

// --------------------------------------------------------------------------------------------------------------- effects

const COLUMNS = ["scope", `"key"`, "state", "fence", "attempt", "generation", "until_ms", "first_ms", "doubt"].concat(
  ["fingerprint", "request", "result", "result_omitted", "reason", "evidence", "changed_ms"],
);
/** The columns of an effect, but for its key. */
export const EFFECT_COLUMNS: readonly string[] = COLUMNS.slice(2);
/** How many positions are kept to repair a source that went back in time. */
const RING = 100;
/** Rows in one INSERT: drivers and servers bind at most 65,535 values. */
const PORTION = 500;

const decoder = new TextDecoder();
/** A text, whichever way it is stored. */
export const textOf = (value: unknown): string => value instanceof Uint8Array ? decoder.decode(value) : String(value);
const optionalText = (value: unknown): string | null => value === null ? null : textOf(value);
/** A plain view, whatever the driver makes of bytes: text where a parser of the application's says so. */
export const bytesOf = (value: unknown): Uint8Array | null => {
  if (value === null) return null;
  if (value instanceof Uint8Array) return new Uint8Array(value.buffer, value.byteOffset, value.byteLength);
  if (typeof value === "string" && value.startsWith("\\x") && value.length % 2 === 0) {
    const bytes = new Uint8Array(value.length / 2 - 1);
    for (let i = 0; i < bytes.length; i++) bytes[i] = parseInt(value.slice(2 * i + 2, 2 * i + 4), 16);
    return bytes;
  }
  throw new EffectError("source_invalid", "The driver gives bytes as something else: leave its type parsers as they are");
};
const numberOrNull = (value: unknown): number | null => value === null ? null : Number(value);
/** A truth value, as PostgreSQL and MySQL give it. */
const isTrue = (value: unknown): boolean => value === "t" || Number(value) === 1;

function toEffect(row: Row): EffectRow {
  return {
    scope: textOf(row["scope"]),
    key: textOf(row["key"]),
    state: textOf(row["state"]) as EffectState,
    fence: Number(row["fence"]),
    attempt: Number(row["attempt"]),
    generation: Number(row["generation"]),
    untilMs: Number(row["until_ms"]),
    firstMs: numberOrNull(row["first_ms"]),
    doubt: isTrue(row["doubt"]),
    fingerprint: optionalText(row["fingerprint"]),
    request: bytesOf(row["request"]),
    result: optionalText(row["result"]),
    resultOmitted: isTrue(row["result_omitted"]),
    reason: optionalText(row["reason"]),
    evidence: optionalText(row["evidence"]),
    changedMs: Number(row["changed_ms"]),
  };
}

/** A reason comes from anywhere, and PostgreSQL has no text with U+0000. */
const storable = (reason: string | null): string | null => reason === null ? null : reason.replaceAll("\0", "\ufffd");

function fromEffect(row: EffectRow, { name }: Dialect): SqlValue[] {
  const { state, fence, attempt, generation, untilMs, firstMs, doubt, fingerprint, request, result, reason } = row;
  const start = [name(row.scope), name(row.key), state, fence, attempt, generation, untilMs, firstMs, doubt, fingerprint];
  return [...start, request, result, row.resultOmitted, storable(reason), row.evidence, row.changedMs];
}

const toPosition = (row: Row): Position => ({
  n: Number(row["n"]),
  uid: textOf(row["uid"]),
  prev: textOf(row["prev"]),
  rows: JSON.parse(textOf(row["rows"])),
});

const list = (count: number, one = "?"): string => Array(count).fill(one).join(", ");
const rowsOf = (count: number, columns: number): string => list(count, `(${list(columns)})`);
const joined = ({ scope, key }: EffectKey): string => `${scope}\0${key}`;
const byText = (a: string, b: string): number => a < b ? -1 : a > b ? 1 : 0;

/** Each once, in an order that all have: who locks in order never waits in a circle. */
function distinct(keys: readonly EffectKey[]): EffectKey[] {
  const known = new Map(keys.map((key) => [joined(key), key]));
  return [...known].sort(([a], [b]) => byText(a, b)).map(([, key]) => key);
}

function* portions<T>(all: readonly T[], size = PORTION): Generator<readonly T[]> {
  for (let i = 0; i < all.length; i += size) yield all.slice(i, i + size);
}

/** A number that no other transaction has: 53 bits. */
function randomToken(): number {
  const [high, low] = crypto.getRandomValues(new Uint32Array(2));
  return high! % 2 ** 21 * 2 ** 32 + low!;
}

/** How often a connection that may not be silent for long says something while the application does not, in milliseconds. */
const BEAT_MS = 5_000;

/** Until the signal fires: for one that only a process that is stopped leaves silent. */
async function keepAlive(run: Run, signal: AbortSignal): Promise<void> {
  for (;;) {
    await realRuntime.sleep(BEAT_MS, signal);
    if (signal.aborted) return;
    await run("select 1").catch(() => {}); // What is the matter is the application's to hear.
  }
}

/** What the attempts at one transaction have in common. */
interface Attempts {
  /** What tells of the attempts before whether their COMMIT has arrived: tokens of effects, and uids of positions. */
  readonly before: Map<number | string, EffectKey | undefined>;
  /** That of the present one. */
  readonly mine: Map<number | string, EffectKey | undefined>;
}

/** An earlier attempt at this transaction has committed. */
class CommittedBefore extends Error {}

const CLAIMED = { state: "claimed", fence: 1, attempt: 1, generation: 1, request: null } as const;

function handle(
  { dialect, tables }: Pick<SqlServer<unknown>, "dialect" | "tables">,
  sql: Run,
  /** Of a transaction of the store's own, and what keeps it alive; left out where one was joined, which is the application's. */
  own?: Attempts & { keepAlive(): void },
): { readonly effects: EffectTransaction; readonly guard: TransactionGuard } {
  const attempts: Attempts = own ?? { before: new Map(), mine: new Map() };
  const { clock, name, latest } = dialect;
  const { effects: table, columns: c } = tables;
  const guard = createGuard();
  const claimed = new Set<string>();
  const insertOne = `insert into ${table} (scope, "key", fingerprint, request, token, changed_ms)
    values (?, ?, ?, ?, ?, ${clock})`;
  const select = `select ${COLUMNS.join(", ")}, token, ${clock} as now_ms from `;

  /** What claims answer about rows that are there, in the order of the keys. */
  async function standing(keys: readonly EffectKey[], request: EncodedRequest): Promise<readonly Claim[]> {
    const stored = new Map<string, Row>();
    const read = async (some: readonly EffectKey[], end: string) => {
      const { sql: only, values } = dialect.only(table, some);
      for (const row of await sql(select + only + end, values)) stored.set(joined(toEffect(row)), row);
    };
    for (const portion of portions(distinct(keys))) await read(portion, latest);
    const step = (key: EffectKey) => {
      const row = stored.get(joined(key));
      if (!row) throw new LostRace("an effect was pruned while it was being claimed");
      if (row["token"] !== null && attempts.before.has(Number(row["token"]))) throw new CommittedBefore();
      return transactionStep(key, request.fingerprint, request.bytes)(toEffect(row), Number(row["now_ms"]));
    };
    const claims: Claim[] = [];
    for (const key of keys) {
      if (step(key).write) await read([key], " for update"); // To be written: under its lock.
      const { write, answer } = step(key);
      claims.push(answer);
      if (!write) continue;
      const token = randomToken();
      const set = EFFECT_COLUMNS.map((column) => `${column} = ?`).join(", ");
      const [scope, text, ...fields] = fromEffect(write, dialect);
      await sql(`update ${table} set ${set}, token = ? where scope = ? and "key" = ?`, [...fields, token, scope!, text!]);
      attempts.mine.set(token, key);
      claimed.add(joined(key));
      await read([key], ""); // Who claims it once more in this transaction is told that it is done.
    }
    return claims;
  }
  return {
    guard,
    effects: {
      claim: (key, { request } = {}) =>
        guard.run(async (): Promise<Claim> => {
          checkKey(key);
          const encoded = request === undefined ? NO_REQUEST : await encodeRequest(request);
          const token = randomToken();
          const values = [name(key.scope), name(key.key), encoded.fingerprint, encoded.bytes, token];
          if (!await dialect.insertNew(sql, insertOne, values, 1)) return (await standing([key], encoded))[0]!;
          attempts.mine.set(token, key);
          claimed.add(joined(key));
          return { ...CLAIMED, request: encoded.bytes };
        }),
      claimAll: (keys) =>
        guard.run(async () => {
          for (const key of keys) checkKey(key);
          const fresh = new Set<string>();
          for (const portion of portions(distinct(keys))) {
            const token = randomToken();
            const inserted = await dialect.insertAbsent(sql, table, portion, token);
            for (const key of inserted) fresh.add(joined(key));
            if (inserted.length > 0) attempts.mine.set(token, inserted[0]);
          }
          for (const key of fresh) claimed.add(key);
          // A key that comes twice is claimed once: its second answer is read.
          const first = keys.map((key) => fresh.delete(joined(key)));
          const others = first.every(Boolean) ? [] : await standing(keys.filter((_, i) => !first[i]), NO_REQUEST);
          let next = 0;
          return first.map((mine) => mine ? CLAIMED : others[next++]!);
        }),
      complete: (key, result) =>
        guard.run(async () => {
          if (!claimed.has(joined(key))) throw notClaimed(key);
          const { text, omitted } = encodeResult(result);
          const update = `update ${table} set result = ?, result_omitted = ? where scope = ? and "key" = ?`;
          await sql(update, [text, omitted, name(key.scope), name(key.key)]);
        }),
      enqueue: (...messages) =>
        guard.run(async () => {
          if (tables.existing) {
            throw new TypeError(
              `Cannot enqueue into ${tables.outbox}: it is not effectonce's own table, use your own INSERT`,
            );
          }
          const row = `(?, ?, ?, ?, ${dialect.json})`;
          const insert = `insert into ${tables.outbox} (id, topic, "key", value, headers) values `;
          for (const portion of portions(messages.map((message) => encodeMessage(message)))) {
            const values = portion.flatMap(({ id, topic, key, value, headers }) => {
              for (const text of [id, topic, key ?? ""]) dialect.checkText(text);
              return [id, topic, key, value, JSON.stringify(headers)];
            });
            if (await dialect.insertNew(sql, insert + list(portion.length, row), values, portion.length)) continue;
            const ids = portion.map(({ id }) => id);
            const twice = ids.find((id, i) => ids.indexOf(id) < i);
            if (twice !== undefined) throw alreadyEnqueued(twice);
            const known = `select ${c.id} as id from ${tables.outbox} where ${c.id} in (${list(ids.length)})${latest}`;
            const there = new Set((await sql(known, ids)).map((row) => textOf(row["id"])));
            throw alreadyEnqueued(ids.find((id) => there.has(id)) ?? ids[0]!);
          }
        }),
      advance: ({ relay, source }, { n, uid, prev, rows }) =>
        guard.run(async () => {
          const owner = [name(relay), name(source)];
          const next = { n, uid, prev, rows };
          const last = {
            sql:
              `select n, uid, prev, "rows" from ${tables.positions} where relay = ? and source = ? order by n desc limit 1`,
            values: owner,
          };
          if (own && dialect.endSilence) await sql(dialect.endSilence);
          const look = dialect.advance?.(tables.positions, owner, next, n - RING, own !== undefined) ?? last;
          const [found] = await sql(look.sql, look.values);
          const stored = found && found["n"] !== null ? toPosition(found) : START;
          if (attempts.before.has(stored.uid)) throw new CommittedBefore();
          checkAdvance(stored, next);
          attempts.mine.set(uid, undefined);
          const insert = `insert into ${tables.positions} (relay, source, n, uid, prev, "rows") values (?, ?, ?, ?, ?, ?)`;
          const put = dialect.advance
            ? found!["put"] === true
            : await dialect.insertNew(sql, insert, [...owner, n, uid, prev, JSON.stringify(rows)], 1);
          own?.keepAlive();
          if (!put) throw new EffectError("fenced", `Cannot commit batch ${n}: another owner has committed one meanwhile`);
          if (n <= RING || dialect.advance) return;
          await sql(`delete from ${tables.positions} where relay = ? and source = ? and n <= ?`, [...owner, n - RING]);
        }),
    },
  };
}
type EncodedRequest = Awaited<ReturnType<typeof encodeRequest>>;
const NO_REQUEST: EncodedRequest = { bytes: null, fingerprint: null };

async function placeOf({ dialect, tables }: Pick<SqlServer<unknown>, "dialect" | "tables">, run: Run): Promise<string> {
  const { sql, values } = dialect.place(tables);
  const [row] = await run(sql, values);
  return textOf(row!["place"]);
}

/** Notes where the tables are, unless that is known: from the first, so that no dump is without it. */
export async function notePlace(server: Pick<SqlServer<unknown>, "dialect" | "tables">, run: Run): Promise<void> {
  const insert = `insert into ${server.tables.meta} (name, value) values ('place', ?)`;
  await server.dialect.insertNew(run, insert, [await placeOf(server, run)], 1);
}

/** Takes the tables for those that claims were made in, where they are now. */
export async function acceptPlace(server: Pick<SqlServer<unknown>, "dialect" | "tables">, run: Run): Promise<void> {
  const place = await placeOf(server, run);
  const { meta } = server.tables;
  await run(`delete from ${meta} where name = 'place'`);
  await run(`insert into ${meta} (name, value) values ('place', ?)`, [place]);
}

const FORGOTTEN =
  "what was done after that is not known there, and would be done again. Once you have made sure that nothing " +
  "was, tell it so: relay --accept-source";
const COPIED =
  "its relay would go on where that of the original does, and shut it out. If this is the original, or has taken its " +
  "place, tell it so: relay --accept-source. A copy goes on under another relay name";

/** Refuses tables that were restored or copied, unless somebody has accepted them; `why`: what would happen otherwise. */
async function checkPlace<Client>(
  server: Pick<SqlServer<Client>, "name" | "dialect" | "tables" | "run" | "write">,
  why: string,
): Promise<void> {
  const { name, tables, run, write } = server;
  const place = await placeOf(server, run);
  const known = `select value from ${tables.meta} where name = 'place'`;
  let [stored] = await run(known);
  if (!stored) {
    await write(({ run }) => notePlace(server, run));
    [stored] = await run(known);
  }
  if (textOf(stored!["value"]) === place) return;
  throw new EffectError("diverged", `${name} was restored from a backup, or copied: ${why}`);
}

/** The same server, whose tables are looked at before they are used for the first time. */
function checked<Client>(server: SqlServer<Client>): SqlServer<Client> {
  const { name, tables } = server;
  let ready: Promise<void> | undefined;
  async function look(): Promise<void> {
    const rows = await server.run(`select name, value from ${tables.meta} where name in ('schema_version', 'outbox')`);
    const of = (name: string) => rows.filter((row) => textOf(row["name"]) === name).map((row) => textOf(row["value"]))[0];
    checkVersion(name, Number(of("schema_version") ?? 0));
    checkOutbox(name, tables, of("outbox"));
  }
  const first = () =>
    ready ??= look().catch((error: unknown) => {
      ready = undefined;
      throw error;
    });
  return {
    ...server,
    run: async (sql, values) => (await first(), await server.run(sql, values)),
    write: async (run, statements) => (await first(), await server.write(run, statements)),
    transaction: async (run, again) => (await first(), await server.transaction(run, again)),
  };
}

const isClaim = (answer: unknown): boolean => (answer as Claim | undefined)?.state === "claimed";

/** Claims and positions on a server. */
export function sqlStore<Client>(unchecked: SqlServer<Client>): EffectStore<Client> {
  const server = checked(unchecked);
  const { name, dialect, tables, run, write } = server;
  const { effects: table } = tables;
  const columns = COLUMNS.join(", ");
  let placed: Promise<void> | undefined;
  /** Tokens of claims that nobody was told of, since the server was away for too long: they are nobody's, and not begun. */
  const untold = new Set<number>();
  const claims = claimStore({
    name,
    change<T>(steps: readonly { readonly key: EffectKey; readonly step: EffectStep<T> }[]) {
      // What an attempt would have answered whose COMMIT may have arrived, though its own answer was lost, by its token.
      const before = new Map<number, readonly T[]>();
      // Bound, each by itself: keys and results are the application's, and texts of statements are logged.
      return write(async (transaction) => {
        const token = randomToken();
        const found = new Map<string, EffectRow>();
        for (const portion of portions(distinct(steps.map(({ key }) => key)))) {
          const { sql: only, values } = dialect.only(table, portion);
          const select = `select ${columns}, token from ${only} order by scope, "key" for update`;
          for (const stored of await transaction.run(select, values)) {
            const answers = before.get(Number(stored["token"]));
            if (answers) return answers;
            const row = toEffect(stored);
            const free = row.state === "claimed" && untold.has(Number(stored["token"]));
            found.set(joined(row), free ? { ...row, untilMs: 0, firstMs: row.doubt ? row.firstMs : null } : row);
          }
        }
        const now = Math.floor(transaction.now());
        const [inserts, updates] = [new Map<string, EffectRow>(), new Map<string, EffectRow>()];
        const known = new Set(found.keys());
        const answers = steps.map(({ key, step }) => {
          const id = joined(key);
          const { write, answer } = step(found.get(id), now);
          if (write) {
            found.set(id, write);
            (known.has(id) ? updates : inserts).set(id, write);
          }
          return answer;
        });
        for (const [rows, isNew] of [[inserts, true], [updates, false]] as const) {
          for (const portion of portions(distinct([...rows.values()]))) {
            const values = portion.flatMap((key) => [...fromEffect(rows.get(joined(key))!, dialect), token]);
            const insert = `insert into ${table} (${columns}, token) values ${rowsOf(portion.length, COLUMNS.length + 1)}`;
            if (!isNew) await transaction.run(insert + dialect.replace, values);
            else if (!await dialect.insertNew(transaction.run, insert, values, portion.length)) {
              throw new LostRace("another caller has claimed one of these effects");
            }
          }
        }
        before.set(token, answers);
        return answers;
      }).catch((error) => {
        for (const [token, answers] of before) if (answers.some(isClaim)) untold.add(token);
        throw error;
      });
    },
    async list({ state, scope, key, limit, after }) {
      const conditions: string[] = [];
      const values: SqlValue[] = [];
      const where = (condition: string, ...given: readonly SqlValue[]) => {
        conditions.push(condition);
        values.push(...given);
      };
      if (state !== undefined) where(state === "done" ? "state = ?" : "state <> 'done' and state = ?", state);
      if (scope !== undefined) where("scope = ?", dialect.name(scope));
      if (key !== undefined) where(`"key" = ?`, dialect.name(key));
      if (after !== undefined) {
        const behind = dialect.after(after);
        where(behind.condition, ...behind.values);
      }
      const all = conditions.length > 0 ? ` where ${conditions.join(" and ")}` : "";
      const sql = `select ${columns} from ${table}${all} order by scope, "key" limit ${limit}`;
      return (await run(sql, values)).map(toEffect);
    },
    async count(scope) {
      const counts: Record<EffectState, number> = { claimed: 0, waiting: 0, done: 0, rejected: 0, uncertain: 0 };
      const mine = scope === undefined ? "" : " where scope = ?";
      const sql = `select state, count(*) as n from ${table}${mine} group by state`;
      for (const row of await run(sql, scope === undefined ? [] : [dialect.name(scope)])) {
        counts[textOf(row["state"]) as EffectState] = Number(row["n"]);
      }
      return counts;
    },
    prune: createPrune({
      async old(after, { olderThanMs, limit }) {
        const behind = dialect.after(after);
        const sql = `select scope, "key", case when state in ('done', 'rejected') and changed_ms <= ${dialect.clock} - ?
            then 1 else 0 end as old from ${table} where ${behind.condition} order by scope, "key" limit ${limit}`;
        const rows = await run(sql, [olderThanMs, ...behind.values]);
        const keys = rows.map((row) => ({
          scope: textOf(row["scope"]),
          key: textOf(row["key"]),
          old: isTrue(row["old"]),
        }));
        const needed = await stillInOutbox(run, keys.filter(({ old }) => old));
        const old = keys.filter(({ old, key }) => old && !needed.has(key)).map(({ scope, key }) => ({ scope, key }));
        const last = keys.length === limit ? keys.at(-1) : undefined;
        return { keys: old, last: last && { scope: last.scope, key: last.key } };
      },
      forget: (keys, { olderThanMs }) =>
        write(async (transaction) => {
          let forgotten = 0;
          for (const portion of portions(distinct(keys))) {
            const { sql: only, values } = dialect.only(table, portion);
            // Looks again: nothing else locks an effect that ended long ago, and who does not get one leaves it for later.
            const select = `select scope, "key" from ${only} and state in ('done', 'rejected')
                and changed_ms <= ${dialect.clock} - ? for update skip locked`;
            const old = (await transaction.run(select, [...values, olderThanMs]))
              .map((row) => ({ scope: textOf(row["scope"]), key: textOf(row["key"]) }));
            const needed = await stillInOutbox(transaction.run, old);
            const mine = old.filter(({ key }) => !needed.has(key));
            if (mine.length === 0) continue;
            const { sql: these, values: theirs } = dialect.only(table, mine);
            await transaction.run(`${dialect.deleteFrom(table)} ${these}`, theirs);
            forgotten += mine.length;
          }
          return forgotten;
        }),
    }),
  });
  return {
    ...claims,
    claim: async (key, options) => (await claimAll([{ key, ...options }]))[0]!,
    claimAll,
    async transaction(run) {
      const attempts: Attempts = { before: new Map(), mine: new Map() };
      let answer: { readonly value: Awaited<ReturnType<typeof run>> } | undefined;
      try {
        return await server.transaction(async (sql, client) => {
          // Who did not get to its COMMIT has none.
          if (answer) { for (const [proof, key] of attempts.mine) attempts.before.set(proof, key); }
          attempts.mine.clear();
          let over: AbortController | undefined; // Not for each transaction: an abort makes an error with its stack.
          const { effects, guard } = handle(server, sql as Run, {
            ...attempts,
            keepAlive() {
              if (!over) keepAlive(sql as Run, (over = new AbortController()).signal);
            },
          });
          try {
            const value = await run(effects, client);
            guard.check();
            answer = { value };
            return value;
          } finally {
            over?.abort();
          }
        }, () => attempts.mine.size > 0);
      } catch (error) {
        // The answer to an earlier COMMIT was lost on its way: its claim is there, so all of it is. The function may have failed
        // for what it had written itself.
        const proofs = [...attempts.before, ...attempts.mine];
        if (answer && (error instanceof CommittedBefore || await hasArrived(proofs))) return answer.value;
        throw error;
      }
    },
    join: (open) => handle(server, server.join(open) as Run).effects,
    async positions({ relay, source }) {
      const sql = `select n, uid, prev, "rows" from ${tables.positions} where relay = ? and source = ? order by n`;
      return (await run(sql, [dialect.name(relay), dialect.name(source)])).map(toPosition);
    },
    isDatabaseFailure: (error) => server.isDatabaseFailure(error),
  };

  async function claimAll(all: Parameters<ClaimStore["claimAll"]>[0]): Promise<readonly Claim[]> {
    if (all.some(({ repeatWithinMs }) => repeatWithinMs === undefined)) {
      // Claims of what must not be repeated are worth nothing where later ones have been forgotten.
      await (placed ??= checkPlace(server, FORGOTTEN).catch((error: unknown) => {
        placed = undefined;
        throw error;
      }));
    }
    return await claims.claimAll(all);
  }
  async function hasArrived(proofs: readonly (readonly [number | string, EffectKey | undefined])[]): Promise<boolean> {
    for (const [token, key] of proofs) {
      if (!key) continue;
      const { sql, values } = dialect.only(table, [key]);
      const rows = await run(`select token from ${sql}`, values).catch(() => []);
      if (rows.some((row) => row["token"] !== null && Number(row["token"]) === token)) return true;
    }
    return false;
  }
  /** A key whose message is still in the outbox would be a new key. */
  async function stillInOutbox(run: Run, keys: readonly EffectKey[]): Promise<Set<string>> {
    const { id: column, state } = tables.columns;
    const id = tables.existing ? dialect.text(column) : column; // A key need not be a UUID, as ids there may be.
    const needed = new Set<string>();
    for (const portion of portions(keys)) {
      const sql = `select ${id} as id from ${tables.outbox} where ${id} in (${list(portion.length)})
        and ${state} <> 'delivered'`;
      for (const row of await run(sql, portion.map(({ key }) => key))) needed.add(textOf(row["id"]));
    }
    return needed;
  }
}

// ---------------------------------------------------------------------------------------------------------------- outbox

/** What of an outbox to read, and how. */
export interface SqlOutboxOptions extends OutboxOptions {
  /**
   * Keep delivered rows, marked, until they are pruned.
   *
   * @default {false} They are deleted.
   */
  readonly keep?: boolean;
}

const HELD = ["waiting", "parked", "blocked"] as const;
/** The states of a message that hold back those behind it. */
const heldBy = (onPark: "block" | "skip"): readonly string[] => onPark === "block" ? ["waiting", "parked"] : ["waiting"];
const inList = (texts: readonly string[]): string => texts.map((text) => `'${text}'`).join(", ");
/** By two lists: a comparison of each pair would take a planner longer than the rest. */
export function* inPortions(seq: string, id: string, rows: Position["rows"]): Generator<Statement> {
  for (const portion of portions(rows)) {
    const sql = `${seq} in (${numbers(portion.map(([seq]) => seq))}) and ${id} in (${list(portion.length)})`;
    yield { sql, values: portion.map(([, id]) => id) };
  }
}
/** Numbers of rows, which come from the database or from JSON: as literals, since there may be thousands. */
const numbers = (seqs: readonly string[]): string => {
  if (!seqs.every((seq) => /^\d+$/.test(seq))) throw new EffectError("source_invalid", "A batch has rows without numbers");
  return seqs.join(", ");
};

/** An outbox whose messages are shared out, by their keys, over relays that run at the same time. */
export type ShardedOutbox = Outbox & SharedSource;

/** A session's part of the outbox. */
interface Part {
  readonly shard: number;
  /** Whoever holds the shard; undefined where there is one only. */
  readonly member: string | undefined;
}

interface StoredRelay {
  readonly instance: string;
  readonly relay: string;
  readonly protocol: Protocol;
  readonly topics: readonly string[] | null;
  readonly untilMs: number;
}

interface Pending {
  readonly seq: string;
  readonly behind: boolean;
  readonly message: Message;
}

/** The outbox of a server as a source, for the relays and for operators. */
export function sqlOutbox(unchecked: SqlServer<never>, options: SqlOutboxOptions = {}): ShardedOutbox {
  const server = checked(unchecked);
  const { name, dialect, tables, run, write, listen } = server;
  const { clock } = dialect;
  const { outbox, columns: c } = tables;
  const { keep = false } = options;
  const topics = options.topics && [...new Set(options.topics)];
  if (topics?.length === 0) throw new RangeError("Cannot read no topics: name one at least, or leave them out for all");
  for (const topic of topics ?? []) {
    if (topic.includes("\0")) throw new RangeError(`Cannot read topic ${JSON.stringify(topic)}: no topic has such a name`);
  }
  const among = (topics: readonly string[] | null | undefined, of = ""): string =>
    topics ? ` and ${of}${c.topic} in (${topics.map(dialect.literal).join(", ")})` : "";
  const mine = among(topics);
  const idText = tables.existing ? dialect.text(c.id) : c.id;
  const headersOf = Object.entries(tables.existing?.headerColumns ?? {});
  const valueOf = (alias: string) =>
    dialect.bytes(`${alias}.${c.value}`, tables.existing ? tables.existing.stored ?? "text" : "bytes");
  const own = (column: string) => tables.existing ? dialect.text(`o.${column}`) : `o.${column}`;
  const texts = Object.entries({
    seq: dialect.text(`o.${c.seq}`),
    id: own(c.id),
    topic: own(c.topic),
    message_key: own(c.key),
    headers: c.headers ? dialect.text(`o.${c.headers}`) : "'{}'",
    created_at: dialect.time(`o.${c.createdAt}`),
    ...Object.fromEntries(headersOf.map(([, column], i) => [`header_${i}`, dialect.text(`o."${column}"`)])),
  });
  const textNames = texts.map(([name]) => name);
  const messageColumns = [...texts, ["value", valueOf("o")]].map(([name, sql]) => `${sql} as ${name}`).join(", ");

  function toMessage(row: Row): Message {
    const headers: Record<string, string> = {};
    const stored = textOf(row["headers"]);
    for (const [header, value] of stored === "{}" ? [] : Object.entries(JSON.parse(stored))) {
      headers[header] = typeof value === "string" ? value : JSON.stringify(value);
    }
    headersOf.forEach(([header], i) => {
      const value = row[`header_${i}`];
      if (value !== null && value !== undefined) headers[header] = textOf(value);
    });
    return createMessage({
      id: textOf(row["id"]),
      topic: textOf(row["topic"]),
      key: optionalText(row["message_key"]),
      value: bytesOf(row["value"]),
      headers,
      time: new Date(textOf(row["created_at"])),
    });
  }

  /** Whether a message of the same key in one of these states comes before `o`. */
  function behind(states: readonly string[]): string {
    const before = states.map((state) =>
      `exists (select 1 from ${outbox} h where h.${c.key} = o.${c.key} and h.${c.seq} < o.${c.seq}
        and h.${c.state} = '${state}'${among(topics, "h.")})`
    );
    return `(o.${c.key} is not null and (${before.join(" or ")}))`;
  }
  /** The first pending rows of these topics, in order, by one search of an index for each topic. */
  function pending(states: readonly string[], { rows, bytes }: ReadLimits, extra: string): string {
    const limit = Math.max(rows, 1);
    // What is beyond the bytes stays where it is: only sizes are read of it.
    const sizeOf = (alias: string) => `coalesce(octet_length(${valueOf(alias)}), 0)`;
    const chosen = dialect.lazyValues ? `o.*, ${sizeOf("o")} as effectonce_bytes` : `o.${c.seq}`;
    const some = (topic: string) =>
      `select ${chosen} from ${outbox} o where o.${c.state} = 'pending'${extra}${topic} order by o.${c.seq} limit ${limit}`;
    const first = topics
      ? `select * from (${
        topics.map((topic) => `(${some(` and o.${c.topic} = ${dialect.literal(topic)}`)})`).join(" union all ")
      }) t order by ${c.seq} limit ${limit}`
      : some("");
    const isBehind = states.length > 0 ? `case when ${behind(states)} then 1 else 0 end` : "0";
    const shown = `select ${messageColumns}, o.${c.seq} as place, ${isBehind} as behind`;
    if (dialect.lazyValues) {
      return `${shown}
        from (select p.*, sum(p.effectonce_bytes) over (order by p.${c.seq}) as effectonce_upto from (${first}) p) o
        where o.effectonce_upto - o.effectonce_bytes <= ${bytes}`;
    }
    const size = `(select ${sizeOf("v")} from ${outbox} v where v.${c.seq} = p.${c.seq})`;
    const sized = `select t.place, t.bytes, sum(t.bytes) over (order by t.place) as upto
      from (select p.${c.seq} as place, ${size} as bytes from (${first}) p) t`;
    return `${shown}
      from (${sized}) s join ${outbox} o on o.${c.seq} = s.place where s.upto - s.bytes <= ${bytes}`;
  }
  function toPending(row: Row): Pending {
    return {
      seq: textOf(row["seq"]),
      behind: isTrue(row["behind"]),
      message: toMessage(row),
    };
  }
  /** Without those that are behind, and within the bytes. */
  function within(all: readonly Pending[], bytes: number): { readonly found: Pending[]; readonly behind: string[] } {
    const found: Pending[] = [];
    const behind: string[] = [];
    let size = 0;
    for (const row of all) {
      if (row.behind) behind.push(row.seq);
      else if (behind.length === 0) { // Those after it are read again once it is marked.
        size += row.message.value?.length ?? 0;
        if (size > bytes && found.length > 0) break;
        found.push(row);
      }
    }
    return { found, behind };
  }
  const toWait = (row: Row): number | null => row["wait_ms"] === null ? null : Number(row["wait_ms"]);

  /** Frees what was held back behind messages of these keys, as far as nothing else of the key is in the way. */
  async function unblock({ run }: Transaction, keys: readonly (string | null)[], onPark: "block" | "skip"): Promise<void> {
    const all = [...new Set(keys)].filter((key) => key !== null);
    const states = heldBy(onPark);
    for (const portion of portions(all)) {
      const some = await run(
        `select distinct ${c.key} as message_key from ${outbox}
          where ${c.state} = 'blocked' and ${c.key} in (${list(portion.length)})${mine}`,
        portion,
      );
      for (const row of some) {
        const key = textOf(row["message_key"]);
        const before = `select min(${c.seq}) from ${outbox} where ${c.key} = ? and ${c.state} in (${inList(states)})${mine}`;
        // In portions: each settled message of the key calls this again.
        const next = await run(
          `select ${dialect.text(c.seq)} as seq from ${outbox} where ${c.state} = 'blocked' and ${c.key} = ?${mine}
            and ${c.seq} < coalesce((${before}), 9223372036854775807) order by ${c.seq} limit 100`,
          [key, key],
        );
        await mark({ run }, next.map((row) => textOf(row["seq"])), "blocked", "pending");
      }
    }
  }
  async function mark({ run }: Pick<Transaction, "run">, seqs: readonly string[], from: string, to: string): Promise<void> {
    for (const portion of portions(seqs)) {
      const rows = `${c.seq} in (${numbers(portion)}) and ${c.state} = '${from}'`;
      await run(`update ${outbox} set ${c.state} = '${to}' where ${rows}`);
    }
  }
  /** Frees what is held back behind rows that a person deleted, or that this relay lets pass. */
  async function freeStranded(transaction: Transaction, onPark: "block" | "skip"): Promise<void> {
    // By the first of each key: where that is held back, so are all behind it.
    const rows = await transaction.run(
      `select b.message_key from (select ${c.key} as message_key, min(${c.seq}) as lowest from ${outbox}
          where ${c.state} = 'blocked'${mine} group by ${c.key}) b
        where not exists (select 1 from ${outbox} h where h.${c.key} = b.message_key and h.${c.seq} < b.lowest
          and h.${c.state} in (${inList(heldBy(onPark))})${among(topics, "h.")})`,
    );
    await unblock(transaction, rows.map((row) => textOf(row["message_key"])), onPark);
  }
  async function setAside(transaction: Transaction, parks: readonly Park[], onPark: "block" | "skip"): Promise<void> {
    for (const { message, reason, retryMs } of parks) {
      const state = retryMs === null ? "parked" : "waiting";
      await transaction.run(
        `update ${outbox} set ${c.state} = ?, ${c.untilMs} = ?, ${c.reason} = ?
          where ${c.id} = ? and ${c.state} <> 'delivered'`,
        [state, Math.floor(transaction.now()) + (retryMs ?? 0), storable(reason), message.id],
      );
      if (state === "parked" && onPark === "skip") await unblock(transaction, [message.key], onPark);
    }
  }
  /** Those of the conditions are delivered. */
  async function remove({ later, now }: Transaction, condition: string, values: readonly SqlValue[]): Promise<void> {
    if (!keep) await later(`delete from ${outbox} where ${condition}`, values);
    else {
      await later(
        `update ${outbox} set ${c.state} = 'delivered', ${c.untilMs} = ?
        where ${condition} and ${c.state} <> 'delivered'`,
        [Math.floor(now()), ...values],
      );
    }
  }

  async function renames({ run }: Pick<Transaction, "run">): Promise<readonly Renamed[]> {
    const rows = await run(`select value from ${tables.meta} where name like 'renamed:%'`);
    return rows.map((row) => JSON.parse(textOf(row["value"])));
  }
  async function registrations({ run }: Pick<Transaction, "run">): Promise<readonly StoredRelay[]> {
    const rows = await run(
      `select instance, relay, protocol, topics, until_ms from ${tables.relays} order by relay, until_ms`,
    );
    return rows.map((row) => {
      const topics = optionalText(row["topics"]);
      return {
        instance: textOf(row["instance"]),
        relay: textOf(row["relay"]),
        protocol: textOf(row["protocol"]) as Protocol,
        topics: topics === null ? null : JSON.parse(topics),
        untilMs: Number(row["until_ms"]),
      };
    });
  }
  /** Whether messages or batches are there that a relay may have had in hand when it ended. */
  async function leaves({ run }: Pick<Transaction, "run">, { relay, protocol, topics }: StoredRelay): Promise<boolean> {
    if (protocol === "plain") return false;
    const theirs = among(topics);
    for (const state of ["pending", ...HELD]) {
      const found = await run(`select 1 as found from ${outbox} where ${c.state} = '${state}'${theirs} limit 1`);
      if (found.length > 0) return true;
    }
    return await hasBatches({ run }, relay);
  }
  async function hasBatches({ run }: Pick<Transaction, "run">, relay: string): Promise<boolean> {
    const sql = `select 1 as found from ${tables.batches} where relay = ? limit 1`;
    return (await run(sql, [dialect.name(relay)])).length > 0;
  }
  /** Whoever registers, or takes shards, one after the other. */
  const LOCK_META = [{ sql: `select value from ${tables.meta} where name = 'outbox_id' for update`, values: [] }];
  /** Locks what sessions and operators change messages under. */
  const LOCK_ALL = [{ sql: `select relay from ${tables.shards} order by relay, shard for update`, values: [] }];

  /** How many shards there are, and how often that has changed. */
  async function readShards(
    { run }: Pick<Transaction, "run">,
  ): Promise<{ readonly count: number; readonly generation: number }> {
    const rows = await run(`select name, value from ${tables.meta} where name in ('shards', 'generation')`);
    const of = (name: string) => {
      const row = rows.find((row) => textOf(row["name"]) === name);
      return row ? Number(textOf(row["value"])) : 1;
    };
    return { count: of("shards"), generation: of("generation") };
  }
  const noSuchShard = (shard: number, count: number) =>
    new EffectError("source_invalid", `${name} has ${count} shard${count === 1 ? "" : "s"}, and none of number ${shard}`);

  const toShard = (row: Row | undefined): Shard =>
    // Missing where the database went back to before this relay began; registering again brings it.
    row === undefined || row["sealed"] === null ? settledShard(START) : {
      sealed: Number(row["sealed"]),
      sealedUid: textOf(row["sealed_uid"]),
      settled: Number(row["settled"]),
      settledUid: textOf(row["settled_uid"]),
    };
  /** `known`: of these, the rows need not be read. */
  function selectBatches(owner: readonly SqlValue[], shard: number, known: ReadonlyMap<string, Batch>): Statement {
    const rows = known.size === 0 ? '"rows"' : `case when uid in (${list(known.size)}) then '[]' else "rows" end as "rows"`;
    const sql = `select n, uid, prev, ${rows} from ${tables.batches} where relay = ? and shard = ${shard} order by n`;
    return { sql, values: [...known.keys(), ...owner] };
  }
  const toBatches = (stored: readonly Row[], known: ReadonlyMap<string, Batch>): readonly Position[] =>
    stored.map(toPosition).map((position) => ({ ...position, rows: known.get(position.uid)?.rows ?? position.rows }));
  async function shardOf(run: Run, owner: readonly SqlValue[], shard: number): Promise<Shard> {
    const sql = `select sealed, sealed_uid, settled, settled_uid from ${tables.shards} where relay = ? and shard = ${shard}`;
    return toShard((await run(sql, owner))[0]);
  }
  /** Identifies a shard; `stored`: the outbox's own identity. */
  function identityOf(stored: string, generation: number, count: number, shard: number) {
    const of = stored + (generation === 1 ? "" : `/${generation}`);
    return { id: count === 1 ? of : `${of}.${shard}`, shard: { of, index: shard, count } };
  }
  async function withMessages({ run }: Pick<Transaction, "run">, batch: Position): Promise<Batch> {
    const stored = new Map<string, Message>();
    for (const portion of portions(batch.rows)) {
      const rows = await run(
        `select ${messageColumns} from ${outbox} o where o.${c.seq} in (${numbers(portion.map(([seq]) => seq))})`,
      );
      for (const row of rows) stored.set(textOf(row["seq"]), toMessage(row));
    }
    const messages = batch.rows.flatMap(([seq, id]) => {
      const message = stored.get(seq);
      return message?.id === id ? [message] : [];
    });
    return { ...batch, messages };
  }
  async function openSession({ relay, protocol, onPark, leaseMs, original }: SourceOptions, { shard, member }: Part) {
    // A name that is new here has no position anywhere yet.
    const used = original &&
      (await run(`select 1 as found from ${tables.shards} where relay = ? limit 1`, [dialect.name(relay)]));
    if (used && used.length > 0) await checkPlace(server, COPIED);
    const { count, generation } = await readShards({ run });
    if (member === undefined && count > 1) {
      throw new EffectError("source_invalid", `${name} has ${count} shards: relay it by relayShards(), or the command line`);
    }
    if (shard >= count) throw noSuchShard(shard, count);
    const [low, high] = [shard, shard + 1].map((n) => Math.floor(n * 256 / count));
    /** The messages of this shard. */
    const byKey = `${dialect.bucket(`o.${c.key}`)} between ${low} and ${high! - 1}`;
    // By `case`: of a condition that it can look into PostgreSQL expects that hardly any row meets it, and reads and sorts them all.
    const only = count === 1
      ? ""
      : ` and case when o.${c.key} is null then mod(o.${c.seq}, ${count}) = ${shard} else ${byKey} end`;
    const waitMs = `(select min(o.${c.untilMs}) from ${outbox} o where o.${c.state} = 'waiting'${
      among(topics, "o.")
    }${only}) - ${clock}`;
    const shardRow = `relay = ? and shard = ${shard}`;
    const instance = crypto.randomUUID();
    const held = onPark === "block" ? HELD : ["waiting", "blocked"] as const;
    const owner = [dialect.name(relay)];
    const cache = new Map<string, Batch>();
    const seqs = new WeakMap<Message, string>();
    const lock = { sql: `select relay from ${tables.shards} where ${shardRow} for update`, values: owner };
    const registered = `exists (select 1 from ${tables.relays} where instance = '${instance}')`;
    /** Who has lost the shard, or finds other shards than it knows. */
    const overtaken = () => new EffectError("fenced", `Shard ${shard} of ${name} is another relay's now`);
    const current = `coalesce((select value from ${tables.meta} where name = 'generation'), '1') = '${generation}'`;
    const holds = member === undefined ? current : `(${current} and exists (select 1 from ${tables.shards}
      where ${shardRow} and member = '${member}'))`;
    const holder = member === undefined ? [] : owner;

    async function register(transaction: Transaction) {
      const { run, now } = transaction;
      checkRenamed(name, relay, await renames(transaction));
      let inherited = false;
      for (const other of await registrations(transaction)) {
        const theirs = other.topics;
        if (topics && theirs && !theirs.some((topic) => topics.includes(topic))) continue;
        const ended = other.untilMs <= now();
        const leavesNothing = ended && !await leaves(transaction, other);
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
        if (leavesNothing || covered) await run(`delete from ${tables.relays} where instance = ?`, [other.instance]);
      }
      // It is there already where the answer to an earlier COMMIT was lost.
      await dialect.insertNew(
        run,
        `insert into ${tables.relays} (instance, relay, protocol, topics, until_ms) values (?, ?, ?, ?, ?)`,
        [instance, ...owner, protocol, topics ? JSON.stringify(topics.toSorted()) : null, Math.floor(now()) + leaseMs],
        1,
      );
      const shards = await run(`select relay from ${tables.shards} where ${shardRow}`, owner);
      if (shards.length === 0) await run(`insert into ${tables.shards} (relay, shard) values (?, ${shard})`, owner);
      await run(lock.sql, owner);
      await freeStranded(transaction, onPark);
      const [stored] = await run(`select value from ${tables.meta} where name = 'outbox_id'`);
      return { ...identityOf(textOf(stored!["value"]), generation, count, shard), inherited };
    }
    const registerNow = () => write(register, LOCK_META);
    const { id, shard: part, inherited } = await registerNow();

    async function pendingNow(
      transaction: Transaction,
      limits: ReadLimits,
      extra: string,
      { anyHeld }: Look,
    ): Promise<readonly Pending[]> {
      for (;;) {
        const select = `${pending(anyHeld ? held : [], limits, only + extra)} order by place`;
        const rows = await dialect.messages(transaction.run, select, [...textNames, "behind"]);
        const { found, behind } = within(rows.map(toPending), limits.bytes);
        if (behind.length === 0) return found;
        await mark(transaction, behind, "pending", "blocked");
      }
    }
    /** Looks again: what held them back may be gone since they were read. */
    async function block({ run }: Transaction, all: readonly string[]): Promise<void> {
      for (const portion of portions(all)) {
        const rows = await run(
          `select ${dialect.text(`o.${c.seq}`)} as seq from ${outbox} o where o.${c.seq} in (${numbers(portion)})
            and o.${c.state} = 'pending' and ${behind(held)}`,
        );
        await mark({ run }, rows.map((row) => textOf(row["seq"])), "pending", "blocked");
      }
    }
    async function wake(transaction: Transaction): Promise<void> {
      const rows = await transaction.run(
        `select ${dialect.text(`o.${c.seq}`)} as seq from ${outbox} o
          where o.${c.state} = 'waiting' and o.${c.untilMs} <= ?${among(topics, "o.")}${only}`,
        [Math.floor(transaction.now())],
      );
      await mark(transaction, rows.map((row) => textOf(row["seq"])), "waiting", "pending");
    }
    const handOut = (rows: readonly Pending[]): readonly Message[] =>
      rows.map(({ seq, message }) => {
        seqs.set(message, seq);
        return message;
      });

    /** These rows, and no others that carry their numbers, have left the outbox. */
    async function settleRows(transaction: Transaction, rows: Position["rows"], { anyHeld }: Look): Promise<void> {
      const { run } = transaction;
      for (const { sql, values } of dialect.among(c.seq, c.id, rows)) {
        const keys = anyHeld ? await run(`select distinct ${c.key} as message_key from ${outbox} where ${sql}`, values) : [];
        await remove(transaction, sql, values);
        if (anyHeld) await unblock(transaction, keys.map((row) => optionalText(row["message_key"])), onPark);
      }
    }
    /** Steps a to d of the protocol, under the lock: what the sink has committed is deleted, and forks are repaired. */
    async function settleUpTo(transaction: Transaction, ring: readonly Position[], seen: Look) {
      const plan = settlePlan(seen.shard, seen.batches, ring);
      await settleRows(transaction, plan.settle, seen);
      if (plan.repaired.length > 0 || plan.settle.length > 0) {
        const upTo = plan.repaired.length > 0 ? "" : ` and n <= ${plan.shard.settled}`;
        await transaction.later(`delete from ${tables.batches} where ${shardRow}${upTo}`, owner);
      }
      return plan;
    }
    async function writeShard({ later }: Transaction, { sealed }: Shard, next: Shard): Promise<void> {
      await later(
        `update ${tables.shards} set sealed = ?, sealed_uid = ?, settled = ?, settled_uid = ?
          where ${shardRow} and sealed = ?`,
        [next.sealed, next.sealedUid, next.settled, next.settledUid, ...owner, sealed],
      );
    }
    /** How everything stands, in one statement: there are many batches, and each has its round trips. */
    const LOOK = `select ${registered} as ours, ${holds} as held, ${waitMs} as wait_ms, s.relay as known,
      ${HELD.map((state) => `exists (select 1 from ${outbox} o where o.${c.state} = '${state}')`).join(" or ")} as any_held,
      exists (select 1 from ${outbox} o where o.${c.state} = 'pending'${among(topics, "o.")}${only}) as pending,
      s.sealed, s.sealed_uid, s.settled, s.settled_uid
      from (select 1 as one) p left join ${tables.shards} s on s.relay = ? and s.shard = ${shard}`;
    const look = { sql: LOOK, values: [...holder, ...owner] };
    function toLook([row]: readonly Row[]) {
      if (!isTrue(row!["held"])) throw overtaken();
      return {
        ours: isTrue(row!["ours"]),
        known: row!["known"] !== null,
        /** Whether there is a row that waits, is parked or is held back. */
        anyHeld: isTrue(row!["any_held"]),
        pending: isTrue(row!["pending"]),
        waitMs: toWait(row!),
        shard: toShard(row),
      };
    }
    interface Look extends ReturnType<typeof toLook> {
      readonly batches: readonly Position[];
    }
    /** Under the shard's lock; where the shard's row or the registration is gone, they come back first. */
    function locked<T>(change: (transaction: Transaction, seen: Look) => Promise<T>): Promise<T> {
      const known = new Map(cache);
      const batches = selectBatches(owner, shard, known);
      return write(async (transaction) => {
        const { first, run } = transaction;
        let seen = toLook(first[1]!);
        let stored = first[2]!;
        if (!seen.ours || !seen.known) {
          for (const { sql } of LOCK_META) await run(sql);
          await register(transaction);
          seen = toLook(await run(look.sql, look.values));
          stored = await run(batches.sql, batches.values);
        }
        return await change(transaction, { ...seen, batches: toBatches(stored, known) });
      }, [lock, look, batches]);
    }

    const over = new AbortController();
    /** Fires when there may be something that the last look did not see. */
    let bell = new AbortController();
    /** Whether the last look found work. */
    let busy = false;
    listen?.(() => bell.abort(), over.signal);
    const session: SourceSession = {
      id,
      shard: part,
      inherited,
      exclusive: member !== undefined,
      async wait(ms, signal) {
        await realRuntime.sleep(ms, AbortSignal.any([bell.signal, ...signal ? [signal] : []]));
        // Told once: a relay that has enough in hand, or is to stop, does not look, and would wait here no more.
        if (bell.signal.aborted) bell = new AbortController();
      },
      async read(limits) {
        for (;;) {
          if (bell.signal.aborted) bell = new AbortController();
          const rows = await run(
            `select s.wait_ms, s.ours, s.held, p.* from (select ${waitMs} as wait_ms, ${registered} as ours, ${holds} as held) s
              left join (${pending(held, limits, only)}) p on true order by p.place`,
            holder,
          );
          if (!isTrue(rows[0]!["held"])) throw overtaken();
          const wait = toWait(rows[0]!);
          const all = rows[0]!["seq"] === null ? [] : rows.map(toPending);
          const { found, behind } = within(all, limits.bytes);
          if (isTrue(rows[0]!["ours"]) && behind.length === 0 && (wait === null || wait > 0)) {
            return { messages: handOut(found), waitMs: wait };
          }
          await locked(async (transaction) => {
            await wake(transaction);
            await block(transaction, behind);
          });
        }
      },
      settle: (messages) =>
        write(async (transaction) => {
          for (const portion of portions(messages)) {
            const ids = `${c.id} in (${list(portion.length)}) and ${c.state} <> 'delivered'`;
            const known = portion.map((message) => seqs.get(message));
            const rows = known.every((seq) => seq !== undefined) ? `${c.seq} in (${numbers(known)}) and ` : "";
            await remove(transaction, rows + ids, portion.map(({ id }) => id));
          }
          await unblock(transaction, messages.map(({ key }) => key), onPark);
        }, [lock]),
      park: (parks) => write((transaction) => setAside(transaction, parks, onPark), [lock]),
      async settled() {
        const [row] = await run(
          `select ${holds} as held, s.sealed, s.sealed_uid, s.settled, s.settled_uid
            from (select 1 as one) p left join ${tables.shards} s on s.relay = ? and s.shard = ${shard}`,
          [...holder, ...owner],
        );
        if (!isTrue(row!["held"])) throw overtaken();
        return toShard(row).settled;
      },
      async seal(ring, limits) {
        const cursor = ring.at(-1) ?? START;
        if (bell.signal.aborted) bell = new AbortController();
        // A look first: an idle relay writes nothing. Where the last one found work there is more of it.
        if (!busy) {
          const seen = toLook(await run(look.sql, look.values));
          const { shard: { settled, settledUid, sealed }, ours, pending, waitMs } = seen;
          const quiet = settled === cursor.n && settledUid === cursor.uid && sealed === cursor.n;
          if (quiet && ours && !pending && (waitMs === null || waitMs > 0)) return { batches: [], waitMs, repaired: [] };
        }
        return await locked(async (transaction, seen) => {
          const { shard: settled, remaining, repaired } = await settleUpTo(transaction, ring, seen);
          let { waitMs } = seen;
          let next = settled;
          const batches = [...remaining];
          const fresh = new Map<string, Batch>();
          if (batches.length < 2) {
            if (waitMs !== null && waitMs <= 0) {
              await wake(transaction);
              ({ waitMs } = toLook(await transaction.run(look.sql, look.values)));
            }
            const sealed = remaining.flatMap(({ rows }) => rows.map(([seq]) => seq));
            const extra = sealed.length > 0 ? ` and o.${c.seq} not in (${numbers(sealed)})` : "";
            const stored = await pendingNow(transaction, limits, extra, seen);
            if (stored.length > 0) {
              const rows = stored.map(({ seq, message }) => [seq, message.id] as const);
              const uid = await sha256(chainText(settled.sealedUid, rows));
              const batch = { n: settled.sealed + 1, uid, prev: settled.sealedUid, rows };
              const insert =
                `insert into ${tables.batches} (relay, shard, n, uid, prev, "rows") values (?, ${shard}, ?, ?, ?, ?)`;
              await transaction.later(insert, [...owner, batch.n, uid, batch.prev, JSON.stringify(rows)]);
              next = { ...settled, sealed: batch.n, sealedUid: uid };
              batches.push(batch);
              fresh.set(uid, { ...batch, messages: stored.map(({ message }) => message) });
            }
          }
          await writeShard(transaction, seen.shard, next);
          const handed: Batch[] = [];
          for (const batch of batches) {
            handed.push(cache.get(batch.uid) ?? fresh.get(batch.uid) ?? await withMessages(transaction, batch));
          }
          return { batches: handed, waitMs, repaired };
        }).then((answer) => {
          // Only what has committed is remembered.
          busy = answer.batches.length > 0;
          cache.clear();
          for (const batch of answer.batches) cache.set(batch.uid, batch);
          return answer;
        });
      },
      unseal: (ring, parks) =>
        locked(async (transaction, seen) => {
          await settleUpTo(transaction, ring, seen);
          await transaction.run(`delete from ${tables.batches} where ${shardRow}`, owner);
          await writeShard(transaction, seen.shard, settledShard(ring.at(-1) ?? START));
          // What another relay has parked meanwhile stays parked: this one may be the one that is late.
          const fresh: Park[] = [];
          for (const park of parks) {
            if ((await find(transaction, park.message.id))?.state !== "parked") fresh.push(park);
          }
          await setAside(transaction, fresh, onPark);
          cache.clear();
        }),
      adopt: (ring) =>
        locked(async (transaction, seen) => {
          await settleRows(transaction, ring.flatMap(({ rows }) => rows), seen);
          await transaction.run(`delete from ${tables.batches} where ${shardRow}`, owner);
          await writeShard(transaction, seen.shard, settledShard(ring.at(-1) ?? START));
          cache.clear();
        }),
      async renew() {
        await run(`update ${tables.relays} set until_ms = ${clock} + ? where instance = ?`, [leaseMs, instance]);
      },
      async close(settled) {
        over.abort();
        await write(async (transaction) => {
          const { run } = transaction;
          let left = !settled || await hasBatches(transaction, relay);
          for (const state of HELD) {
            left ||= (await run(`select 1 as found from ${outbox} where ${c.state} = '${state}'${mine} limit 1`)).length > 0;
          }
          if (left) await run(`update ${tables.relays} set until_ms = 0 where instance = ?`, [instance]);
          else await run(`delete from ${tables.relays} where instance = ?`, [instance]);
        });
      },
    };
    return session;
  }

  const shown = `${idText} as id, ${tables.existing ? dialect.text(c.topic) : c.topic} as topic,
    ${tables.existing ? dialect.text(c.key) : c.key} as message_key, ${c.state} as state,
    coalesce(${c.reason}, '') as reason, ${c.untilMs} as until_ms`;
  const toShown = (row: Row): OutboxMessage => ({
    id: textOf(row["id"]),
    topic: textOf(row["topic"]),
    key: optionalText(row["message_key"]),
    state: textOf(row["state"]) as OutboxMessage["state"],
    reason: textOf(row["reason"]),
  });
  async function find({ run }: Pick<Transaction, "run">, id: string): Promise<OutboxMessage | undefined> {
    const [row] = await run(`select ${shown} from ${outbox} where ${idText} = ?${mine}`, [id]);
    return row && toShown(row);
  }
  const isSetAside = (message: OutboxMessage | undefined): message is OutboxMessage =>
    message?.state === "parked" || message?.state === "waiting";

  return {
    name,
    seals: true,
    open: (options) => openSession(options, { shard: 0, member: undefined }),
    shards: async () => (await readShards({ run })).count,
    async sealed(relay) {
      const { count, generation } = await readShards({ run });
      const [stored] = await run(`select value from ${tables.meta} where name = 'outbox_id'`);
      const found: SealedBatches[] = [];
      for (let shard = 0; shard < count; shard++) {
        const owner = [dialect.name(relay)];
        const { settled: n, settledUid: uid } = await shardOf(run, owner, shard);
        const batches: Batch[] = [];
        const { sql, values } = selectBatches(owner, shard, new Map());
        for (const batch of toBatches(await run(sql, values), new Map())) batches.push(await withMessages({ run }, batch));
        const identity = identityOf(textOf(stored!["value"]), generation, count, shard);
        found.push({ owner: { relay, source: identity.id, shard: identity.shard }, settled: { n, uid }, batches });
      }
      return found;
    },
    shard: (shard, member) => ({ name, seals: true, open: (options) => openSession(options, { shard, member }) }),
    assign: (relay, member, leaseMs, running) =>
      write(async ({ run, now }) => {
        const { count } = await readShards({ run });
        const owner = dialect.name(relay);
        const known = await run(
          `select shard, member from ${tables.shards} where relay = ? order by shard for update`,
          [owner],
        );
        const clock = Math.floor(now());
        await run(`delete from ${tables.members} where relay = ? and (member = ? or until_ms <= ?)`, [owner, member, clock]);
        const add = `insert into ${tables.members} (relay, member, until_ms) values (?, ?, ?)`;
        await run(add, [owner, member, clock + leaseMs]);
        const members = (await run(`select member from ${tables.members} where relay = ? order by member`, [owner]))
          .map((row) => textOf(row["member"]));
        const rank = members.indexOf(member);
        const share = Math.floor(count / members.length) + (rank < count % members.length ? 1 : 0);
        const shards = Array.from({ length: count }, (_, shard) => {
          const row = known.find((row) => Number(row["shard"]) === shard);
          const holder = row && optionalText(row["member"]);
          return { shard, row, holder: holder && members.includes(holder) ? holder : null };
        });
        const mine = shards.filter(({ holder }) => holder === member).map(({ shard }) => shard);
        // Those that run already come first: a shard moves only where it must.
        mine.sort((a, b) => Number(running.includes(b)) - Number(running.includes(a)) || a - b);
        const keep = mine.slice(0, share);
        const free = shards.filter(({ holder }) => holder === null).map(({ shard }) => shard);
        const take = free.slice(0, Math.max(0, share - mine.length));
        const give = mine.slice(share).filter((shard) => !running.includes(shard));
        for (const shard of [...take, ...give]) {
          const next = take.includes(shard) ? member : null;
          const sql = shards[shard]!.row
            ? `update ${tables.shards} set member = ? where relay = ? and shard = ?`
            : `insert into ${tables.shards} (member, relay, shard) values (?, ?, ?)`;
          await run(sql, [next, owner, shard]);
        }
        return [...keep, ...take].sort((a, b) => a - b);
      }, LOCK_META),
    async left() {
      const { pending, heldBack } = await this.status();
      return pending > heldBack;
    },
    leave: (relay, member) =>
      write(async ({ run }) => {
        const values = [dialect.name(relay), member];
        await run(`update ${tables.shards} set member = null where relay = ? and member = ?`, values);
        await run(`delete from ${tables.members} where relay = ? and member = ?`, values);
      }, LOCK_META),
    async status() {
      const rows = await run(`select ${c.state} as state, count(*) as n from ${outbox} where ${c.state} <> 'delivered'${mine}
        group by ${c.state}`);
      const counts = new Map(rows.map((row) => [textOf(row["state"]), Number(row["n"])]));
      const of = (...states: readonly string[]) => states.reduce((sum, state) => sum + (counts.get(state) ?? 0), 0);
      let oldestMs: number | null = null;
      for (const state of ["pending", "waiting", "blocked"]) {
        if (of(state) === 0) continue;
        const [row] = await run(`select ${dialect.time(`o.${c.createdAt}`)} as created_at, ${clock} as now_ms
          from ${outbox} o where o.${c.state} = '${state}'${among(topics, "o.")} order by o.${c.seq} limit 1`);
        if (row) oldestMs = Math.max(oldestMs ?? 0, Number(row["now_ms"]) - Date.parse(textOf(row["created_at"])));
      }
      return { pending: of("pending", "waiting", "blocked"), heldBack: of("blocked"), parked: of("parked"), oldestMs };
    },
    async parked(limit = 1000) {
      const rows = await run(`select ${shown} from ${outbox} where ${c.state} = 'parked'${mine}
        order by ${c.untilMs}, ${c.seq} limit ${limit}`);
      return rows.map((row) => ({ ...toShown(row), since: new Date(Number(row["until_ms"])) }));
    },
    find: (id) => find({ run }, id),
    release: (id) =>
      write(async (transaction) => {
        if (!isSetAside(await find(transaction, id))) return false;
        await transaction.run(`update ${outbox} set ${c.state} = 'pending', ${c.reason} = null where ${c.id} = ?`, [id]);
        return true; // What it held back is freed when it is delivered.
      }, LOCK_ALL),
    discard: (id) =>
      write(async (transaction) => {
        const found = await find(transaction, id);
        if (!isSetAside(found)) return false;
        await transaction.run(`delete from ${outbox} where ${c.id} = ?`, [id]);
        // Whichever topics a relay has: it holds back again what it must.
        const behind = `${c.state} = 'blocked' and ${c.key} = ?`;
        if (found.key !== null) {
          await transaction.run(`update ${outbox} set ${c.state} = 'pending' where ${behind}`, [found.key]);
        }
        return true;
      }, LOCK_ALL),
    async relays() {
      const [now] = await run(`select ${clock} as now_ms`);
      // Sessions of one relay, such as those of its shards, are one.
      const found = new Map<string, RegisteredRelay>();
      for (const stored of await registrations({ run })) {
        const { relay, protocol, topics, untilMs } = stored;
        const live = untilMs > Number(now!["now_ms"]);
        if (!live && !await leaves({ run }, stored)) continue;
        const batches = await run(`select "rows" from ${tables.batches} where relay = ?`, [dialect.name(relay)]);
        const sealed = batches.reduce((sum, row) => sum + JSON.parse(textOf(row["rows"])).length, 0);
        const id = JSON.stringify([relay, protocol, topics]);
        found.set(id, { relay, protocol, topics, live: live || (found.get(id)?.live ?? false), sealed });
      }
      return [...found.values()];
    },
    forget: (relay) =>
      write(async (transaction) => {
        const { run, now } = transaction;
        const theirs = (await registrations(transaction)).filter((stored) => stored.relay === relay);
        const untilMs = Math.max(0, ...theirs.map((stored) => stored.untilMs));
        if (untilMs > now()) {
          const how = `it runs, or has died and is waited for until ${new Date(untilMs).toISOString()}`;
          throw new EffectError("busy", `Cannot forget relay "${relay}" of ${name}: ${how}. Stop it first`);
        }
        const owner = [dialect.name(relay)];
        await run(`delete from ${tables.batches} where relay = ?`, owner);
        // What it seals next follows on what was delivered, not on what is given up here.
        await run(`update ${tables.shards} set sealed = settled, sealed_uid = settled_uid where relay = ?`, owner);
        await run(`delete from ${tables.relays} where relay = ?`, owner);
        return theirs.length > 0;
      }, LOCK_ALL),
    async rename(relay, to, move) {
      const [mark, markOfNew] = [await renamedName(relay), await renamedName(to)];
      const note = async ({ later }: Transaction, moved: boolean) => {
        await later(`delete from ${tables.meta} where name in (?, ?)`, [mark, markOfNew]);
        const value = JSON.stringify({ from: relay, to, moved } satisfies Renamed);
        await later(`insert into ${tables.meta} (name, value) values (?, ?)`, [mark, value]);
      };
      const [old, fresh] = [dialect.name(relay), dialect.name(to)];
      const plan = await write(async (transaction) => {
        const { run, later, now } = transaction;
        const theirs = (await registrations(transaction)).filter((stored) => stored.relay === relay);
        const members = await run(`select 1 as found from ${tables.members} where relay = ? and until_ms > ? limit 1`, [
          old,
          Math.floor(now()),
        ]);
        const known = await run(`select relay from ${tables.shards} where relay in (?, ?) and sealed > 0`, [old, fresh]);
        const plan = renamePlan(name, [relay, to], {
          theirs: [
            ...theirs.map((stored) => ({ ...stored, live: stored.untilMs > now() })),
            ...members.map(() => ({ protocol: "sealed", live: true })),
          ],
          renamed: await renames(transaction),
          isKnown: (relay) => known.some((row) => textOf(row["relay"]) === relay),
        });
        if (plan !== "all") return plan;
        await note(transaction, false);
        await later(`delete from ${tables.shards} where relay = ?`, [fresh]);
        for (const table of [tables.shards, tables.batches]) {
          await later(`update ${table} set relay = ? where relay = ?`, [fresh, old]);
        }
        // As others, so that one that sleeps does not take them for its own.
        await later(`delete from ${tables.relays} where relay = ?`, [old]);
        for (const { protocol, topics } of theirs) {
          await later(
            `insert into ${tables.relays} (instance, relay, protocol, topics, until_ms) values (?, ?, ?, ?, 0)`,
            [crypto.randomUUID(), fresh, protocol, topics && JSON.stringify(topics)],
          );
        }
        return plan;
      }, LOCK_META);
      if (plan === "all" || plan === "move") {
        await move();
        await write((transaction) => note(transaction, true), LOCK_META);
      }
      return plan !== undefined;
    },
    prune: ({ olderThanMs, limit = 1000 }) =>
      write(async ({ run, now }) => {
        const rows = await run(
          `select ${dialect.text(c.seq)} as seq from ${outbox} where ${c.state} = 'delivered' and ${c.untilMs} <= ?${mine}
            order by ${c.untilMs} limit ${limit} for update skip locked`,
          [Math.floor(now()) - olderThanMs],
        );
        for (const portion of portions(rows.map((row) => textOf(row["seq"])))) {
          await run(`delete from ${outbox} where ${c.seq} in (${numbers(portion)})`);
        }
        return rows.length;
      }),
  };
}
