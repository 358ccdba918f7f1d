/**
 * Exactly-once effects between a log and the outside world.
 *
 * {@linkcode once} runs one external effect once per key. {@linkcode relay} moves the messages of a source into a sink under
 * the strongest protocol that both ends allow, and {@linkcode guarantee} says which one that is, and why.
 *
 * ```ts
 * import { once } from "@effectonce/effectonce";
 * import { memoryStore } from "@effectonce/effectonce/memory";
 * import { equal } from "node:assert/strict";
 *
 * const store = memoryStore();
 * let charges = 0;
 * const charge = () => once(store, { scope: "charge", key: "order-1" }, () => Promise.resolve(++charges));
 * equal(await charge(), 1);
 * equal(await charge(), 1); // the stored result: the effect did not run again
 * ```
 *
 * This file has no dependency and uses only web-standard APIs.
 *
 * @module
 */

/** What JSON can say. */
export type Json = null | boolean | number | string | readonly Json[] | { readonly [key: string]: Json };

/**
 * Names one effect. `scope` is a relay's or an application's name for a kind of effect. Each part is 1 to 1024 bytes of
 * UTF-8 without U+0000, and is compared byte for byte.
 */
export interface EffectKey {
  /** The kind of effect: `charge`, or a relay's name. */
  readonly scope: string;
  /** The effect within its scope: an order number, or a message's id. */
  readonly key: string;
}

/** The stable codes of {@linkcode EffectError}. Branch on these: two installed copies of a package make `instanceof` lie. */
export type EffectErrorCode =
  | "busy"
  | "lease_lost"
  | "uncertain"
  | "rejected"
  | "mismatch"
  | "fenced"
  | "diverged"
  | "cursor_lost"
  | "slot_lost"
  | "schema_newer"
  | "schema_missing"
  | "source_invalid"
  | "sink_invalid";

/** The one error class of this package. A server's own error is its `cause`; bad arguments are `RangeError` or `TypeError`. */
export class EffectError extends Error {
  /** Always `EffectError`. */
  override readonly name = "EffectError";
  /** What kind of failure this is. */
  readonly code: EffectErrorCode;
  /** The stored answer of a `rejected` effect; otherwise null. */
  readonly result: Json;

  /** Makes an error with a stable code, and for `rejected` the stored answer. */
  constructor(code: EffectErrorCode, message: string, options?: ErrorOptions & { result?: Json }) {
    super(message, options);
    this.code = code;
    this.result = options?.result ?? null;
  }
}

// ---------------------------------------------------------------------------------------------------------------- runtime

/** Time, randomness and scheduling, so that everything here runs under a simulation as well. */
export interface Runtime {
  /** Monotonic milliseconds. Used only to stop earlier than a lease ends; the store's clock decides about leases. */
  now(): number;
  /** A number from 0 up to, but not including, 1. */
  random(): number;
  /** Resolves after `ms` milliseconds, or at once when the signal fires; never rejects. */
  sleep(ms: number, signal?: AbortSignal): Promise<void>;
}

/** The real clock, randomness and timers. */
export const realRuntime: Runtime = {
  now: () => performance.now(),
  random: () => Math.random(),
  sleep: (ms, signal) =>
    new Promise((resolve) => {
      if (signal?.aborted) return resolve();
      const end = () => {
        clearTimeout(timer);
        signal?.removeEventListener("abort", end);
        resolve();
      };
      const timer = setTimeout(end, Math.min(ms, 0x7fff_ffff));
      signal?.addEventListener("abort", end);
    }),
};

/** Exponential back-off with full jitter: anything from 0 to `minMs * 2^(attempt - 1)`, at most `maxMs`. */
function backOff(attempt: number, minMs: number, maxMs: number, runtime: Runtime): number {
  return Math.ceil(runtime.random() * Math.min(maxMs, minMs * 2 ** Math.min(attempt - 1, 30)));
}

function integer(name: string, value: number, min: number, max: number = Number.MAX_SAFE_INTEGER): number {
  if (Number.isSafeInteger(value) && value >= min && value <= max) return value;
  throw new RangeError(`Cannot use ${name} ${value}: it must be a whole number from ${min} to ${max}`);
}

// --------------------------------------------------------------------------------------------------------------- messages

/** What a message consists of. */
export interface MessageFields {
  /** Unique in its source; the idempotency key of its effect. */
  readonly id: string;
  /** What kind of message it is: the Kafka topic, or what takes its place. */
  readonly topic: string;
  /** Messages with the same key are delivered in order. Null: no order. */
  readonly key: string | null;
  /** The bytes. Null: a tombstone. */
  readonly value: Uint8Array | null;
  /** Names and texts. */
  readonly headers: Readonly<Record<string, string>>;
  /** When it was enqueued. */
  readonly time: Date;
}

/** One message, as a source hands it out. */
export interface Message extends MessageFields {
  /**
   * The value, parsed as JSON; a tombstone is null.
   *
   * @throws {SyntaxError} If the value is not JSON.
   */
  json<T = Json>(): T;
  /**
   * The value as UTF-8 text; a tombstone is the empty text.
   *
   * @throws {TypeError} If the value is not UTF-8.
   */
  text(): string;
}

/** A message to be enqueued. */
export interface NewMessage {
  /**
   * Unique in the outbox, 1 to 1024 bytes.
   *
   * @default {a random UUID}
   */
  readonly id?: string;
  /** Not empty. */
  readonly topic: string;
  /**
   * The ordering key; null or left out: no order.
   *
   * @default {null}
   */
  readonly key?: string | null;
  /** Bytes as they are; a string as its UTF-8; null is a tombstone; any other JSON as its compact text. */
  readonly value: Json | Uint8Array;
  /** Names and texts. A value given as JSON adds `content-type: application/json` where there is none. */
  readonly headers?: Readonly<Record<string, string>>;
}

const encoder = new TextEncoder();
const utf8 = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });

class StoredMessage implements Message {
  readonly id: string;
  readonly topic: string;
  readonly key: string | null;
  readonly value: Uint8Array | null;
  readonly headers: Readonly<Record<string, string>>;
  readonly time: Date;

  constructor(fields: MessageFields) {
    this.id = fields.id;
    this.topic = fields.topic;
    this.key = fields.key;
    this.value = fields.value;
    this.headers = fields.headers;
    this.time = fields.time;
  }

  json<T = Json>(): T {
    return this.value === null ? null as T : JSON.parse(this.text());
  }

  text(): string {
    return this.value === null ? "" : utf8.decode(this.value);
  }
}

/** For adapters: makes a {@linkcode Message} of its fields. */
export function createMessage(fields: MessageFields): Message {
  return new StoredMessage(fields);
}

/**
 * For adapters: what an outbox stores for a new message, its time excepted.
 *
 * @throws {TypeError} If a part is missing or of the wrong kind.
 * @throws {RangeError} If the id or topic is empty or too long.
 */
export function encodeMessage(message: NewMessage): Omit<MessageFields, "time"> {
  const { id = crypto.randomUUID(), topic, key = null, value, headers = {} } = message;
  checkText("message id", id);
  checkText("topic", topic);
  if (key !== null) checkText("message key", key);
  for (const [name, text] of Object.entries(headers)) {
    checkText("header name", name);
    if (typeof text !== "string" || !text.isWellFormed() || text.includes("\0")) {
      throw new TypeError(`Cannot use header "${name}": its value must be a text without U+0000`);
    }
  }
  if (value === null || value instanceof Uint8Array) return { id, topic, key, value, headers };
  if (typeof value === "string") {
    // Encoding would put U+FFFD in the place of half a character.
    if (!value.isWellFormed()) throw new TypeError(`Cannot enqueue "${id}": its value must be well-formed Unicode text`);
    return { id, topic, key, value: encoder.encode(value), headers };
  }
  const text: string | undefined = JSON.stringify(value);
  if (text === undefined) throw new TypeError(`Cannot enqueue "${id}": its value must be JSON, a text or bytes`);
  const typed = Object.keys(headers).some((name) => name.toLowerCase() === "content-type");
  return {
    id,
    topic,
    key,
    value: encoder.encode(text),
    headers: typed ? headers : { ...headers, "content-type": "application/json" },
  };
}

function checkText(what: string, text: unknown): void {
  if (typeof text !== "string") throw new TypeError(`Cannot use ${what} ${String(text)}: it must be a text`);
  if (!text.isWellFormed() || text.includes("\0")) {
    throw new TypeError(`Cannot use ${what} ${JSON.stringify(text)}: it must be Unicode text without U+0000`);
  }
  const { length } = text;
  if (length > 0 && length * 3 <= 1024) return; // No character takes more than 3 bytes for each of its units.
  const bytes = length > 1024 ? length : encoder.encode(text).length;
  if (bytes < 1 || bytes > 1024) {
    throw new RangeError(`Cannot use ${what} of ${bytes} bytes: it must be 1 to 1024 bytes of UTF-8`);
  }
}

// ----------------------------------------------------------------------------------------------------- claims: the states

/**
 * Where an effect stands: `claimed` (an owner with a lease works on it), `waiting` (to be tried again), `done`, `rejected`
 * (refused for good), `uncertain` (started, never finished, not safe to repeat).
 */
export type EffectState = "claimed" | "waiting" | "done" | "rejected" | "uncertain";

/** What `claim` answers. Outcomes are values; only failures throw. */
export type Claim =
  /** This caller owns the effect until its lease ends. The fence grows with every claim of a key. */
  | {
    readonly state: "claimed";
    readonly fence: number;
    /** 1 for the first try of this generation. */
    readonly attempt: number;
    /** 1, and one more each time that a refused or doubtful effect was allowed to run anew. */
    readonly generation: number;
    /** The bytes stored by the first claim; null where none were given. */
    readonly request: Uint8Array | null;
  }
  /** Done before. `resultOmitted`: the result was not JSON or over 64 KiB, and was not kept. */
  | { readonly state: "done"; readonly result: Json; readonly resultOmitted: boolean }
  /** Refused for good, with its reason and answer. */
  | { readonly state: "rejected"; readonly reason: string; readonly result: Json }
  /** Another owner has it, or it waits for its next attempt, for about `retryMs` milliseconds. */
  | { readonly state: "busy"; readonly retryMs: number }
  /** Started `ageMs` after which nobody is known to work on it, and it is not known whether it happened. */
  | {
    readonly state: "uncertain";
    readonly since: Date;
    readonly ageMs: number;
    readonly fence: number;
    /** That of the attempt: with it, its idempotency key. */
    readonly generation: number;
  }
  /** The key was used with another request: an error of the caller. */
  | { readonly state: "mismatch" };

/** How to claim. */
export interface ClaimOptions {
  /** How long the claim holds, in milliseconds. A whole number from 1. */
  readonly leaseMs: number;
  /** Kept by the first claim and handed to every attempt; another request under the same key is a `mismatch`. */
  readonly request?: Json | Uint8Array;
  /** Compared instead of a request whose bytes are kept elsewhere. At most 1024 characters. */
  readonly fingerprint?: string;
  /**
   * How long after its first attempt, in milliseconds, an interrupted effect may be repeated under the same idempotency key.
   *
   * @default {undefined} An interrupted effect is never repeated: it becomes `uncertain`.
   */
  readonly repeatWithinMs?: number;
}

/** How an attempt ended that was not done. */
export interface AttemptFailure {
  /** Known not to have happened; refused for good; or not known. */
  readonly as: "retryable" | "rejected" | "unknown";
  /** What a person should read. */
  readonly reason: string;
  /** The answer of a refusal. */
  readonly result?: Json;
  /** Wait this long before the next attempt. With `unknown`: the effect may be repeated; left out: it is `uncertain`. */
  readonly retryMs?: number;
}

/** What a person, or `reconcile`, found out about an effect. */
export type Resolution =
  /** It happened. */
  | { readonly as: "done"; readonly result?: Json }
  /** It did not happen, and may run anew (under a new idempotency key if it may have been sent). */
  | { readonly as: "absent" }
  /**
   * It shall be tried again under the same idempotency key, at once. One in doubt stays in doubt, unless its caller says
   * that the target dedupes, and within its window.
   */
  | { readonly as: "retry" }
  /** It shall never run. */
  | { readonly as: "rejected"; readonly reason: string };

/** One effect as `list` shows it. */
export interface EffectRecord extends EffectKey {
  /** Where it stands. */
  readonly state: EffectState;
  /** 1, and one more each time that it was let run anew under another idempotency key. */
  readonly generation: number;
  /** Attempts of this generation. */
  readonly attempts: number;
  /** Whether an attempt may have happened whose outcome is not known, so that it must not simply run anew. */
  readonly doubt: boolean;
  /** Its last change; for `uncertain` the end of the attempt that left the doubt. */
  readonly since: Date;
  /** Why it waits, was refused or is in doubt; else null. */
  readonly error: string | null;
  /** What was recorded of `done` and `rejected`. */
  readonly result: Json;
  /** The outcome of an owner that came too late, kept for whoever looks into it; else null. */
  readonly evidence: Json;
}

/** Which effects to list. */
export interface ListOptions {
  /** Only these. */
  readonly state?: EffectState;
  /** Only this scope. */
  readonly scope?: string;
  /** Only this key. */
  readonly key?: string;
  /**
   * At most so many, from 1.
   *
   * @default {1000}
   */
  readonly limit?: number;
  /** Only those behind this one, in byte order of scope and key. */
  readonly after?: EffectKey;
}

/** What to prune. */
export interface PruneOptions {
  /**
   * Only effects that ended at least so long ago, in milliseconds. Must exceed the time over which a message can come
   * again (topic retention, age of dead letters): a pruned key is a new key.
   */
  readonly olderThanMs: number;
  /**
   * At most so many in one transaction, from 1.
   *
   * @default {1000}
   */
  readonly limit?: number;
  /**
   * Outboxes in other databases whose messages have their effects here: what is still in one is kept.
   *
   * @default {[]} The store looks into the outbox of its own database only.
   */
  readonly outboxes?: readonly Pick<Outbox, "find">[];
}

/** What {@linkcode once} and {@linkcode relay} need of a store. Each call commits on its own; each change is fenced. */
export interface ClaimStore {
  /** A name for people, without secrets. */
  readonly name: string;
  /** Takes the effect for this caller, or says where it stands. At most one caller is told `claimed` per live lease. */
  claim(key: EffectKey, options: ClaimOptions): Promise<Claim>;
  /** The same for many, in one transaction; answers in the order of the keys. */
  claimAll(claims: readonly (ClaimOptions & { readonly key: EffectKey })[]): Promise<readonly Claim[]>;
  /**
   * Records that the effect happened. Repeating it is harmless.
   *
   * @throws {EffectError} `lease_lost` if a later claim or a person was faster; the result is kept as evidence.
   */
  complete(key: EffectKey, fence: number, result?: Json): Promise<void>;
  /** The same for many, in one transaction: true where recorded, false where the lease was lost. */
  completeAll(completions: readonly Completion[]): Promise<readonly boolean[]>;
  /**
   * Extends the lease to `leaseMs` from now.
   *
   * @throws {EffectError} `lease_lost` if it has ended.
   */
  renew(key: EffectKey, fence: number, leaseMs: number): Promise<void>;
  /**
   * Records that the attempt is over without success, and answers where the effect stands now: a refusal is `uncertain`
   * where an earlier attempt may have happened.
   *
   * @throws {EffectError} `lease_lost` if a later claim or a person was faster.
   */
  fail(key: EffectKey, fence: number, failure: AttemptFailure): Promise<EffectState>;
  /**
   * Ends a doubt or lifts a refusal. With `fence`: only if nothing has changed since.
   *
   * @throws {EffectError} `busy` under a live lease, `lease_lost` with another fence.
   * @throws {RangeError} If there is no such effect, or it is done.
   */
  resolve(key: EffectKey, resolution: Resolution, fence?: number): Promise<void>;
  /** Effects in byte order of scope and key. */
  list(options?: ListOptions): Promise<readonly EffectRecord[]>;
  /** How many effects stand where: all, or those of a scope. */
  count(scope?: string): Promise<Readonly<Record<EffectState, number>>>;
  /** Forgets effects that ended long ago; answers how many. Bounded: call it until it answers 0. */
  prune(options: PruneOptions): Promise<number>;
}

/** One completion of a batch. */
export interface Completion {
  /** The effect. */
  readonly key: EffectKey;
  /** The fence of its claim. */
  readonly fence: number;
  /** Its result. */
  readonly result?: Json;
}

/** Works inside an open transaction and commits nothing itself. A claim made here is done when the transaction commits. */
export interface EffectTransaction {
  /** Takes the effect for this transaction, or says where it stands. `claimed` at most once per key. */
  claim(key: EffectKey, options?: { readonly request?: Json | Uint8Array }): Promise<Claim>;
  /** The same for many; answers in the order of the keys. */
  claimAll(keys: readonly EffectKey[]): Promise<readonly Claim[]>;
  /**
   * Adds a result to an effect that this transaction claimed, to be replayed; not needed where there is none.
   *
   * @throws {RangeError} If this transaction has not claimed it.
   */
  complete(key: EffectKey, result: Json): Promise<void>;
  /** Puts messages into the outbox, in this order. */
  enqueue(...messages: readonly NewMessage[]): Promise<void>;
  /**
   * Moves a relay's position on by one batch, in this transaction.
   *
   * @throws {EffectError} `fenced` if the stored position is not the one before `position`.
   */
  advance(owner: PositionOwner, position: Position): Promise<void>;
}

/** One statement in a transaction that somebody else opened (Kysely, Drizzle, Prisma, postgres.js …). */
export type RunSql = (sql: string, values: readonly unknown[]) => Promise<readonly Record<string, unknown>[]>;

/** A store in a database that the application writes as well. */
export interface EffectStore<Client> extends ClaimStore {
  /**
   * Runs a function in a transaction of the store's own: committed if it resolves and no statement of the handle failed,
   * else rolled back. Retried as a whole when the database was busy: the function must have no effect outside of it.
   */
  transaction<T>(run: (effects: EffectTransaction, client: Client) => Promise<T>): Promise<T>;
  /** Works in the caller's own open transaction. If a call of the handle throws, roll back, even if you caught the error. */
  join(open: Client | RunSql): EffectTransaction;
  /** The positions that were committed last with {@linkcode EffectTransaction.advance}, oldest first: 100, if there are. */
  positions(owner: PositionOwner): Promise<readonly Position[]>;
  /** Whether an error is the database's own (busy, disk, connection), which says nothing about the statement. */
  isDatabaseFailure(error: unknown): boolean;
}

/** A claim as it is stored: what adapters keep, one row per effect. */
export interface EffectRow extends EffectKey {
  /** Where the effect stands. */
  readonly state: EffectState;
  /** Grows with every claim and every resolution. */
  readonly fence: number;
  /** Attempts of this generation. */
  readonly attempt: number;
  /** 1, and one more with every leave to run anew. */
  readonly generation: number;
  /** End of the lease, of the wait, or of the attempt that left the doubt; in the store's milliseconds. */
  readonly untilMs: number;
  /** Start of the first attempt that may have happened; null if none may have. */
  readonly firstMs: number | null;
  /** Whether an attempt before the present one may have happened. */
  readonly doubt: boolean;
  /** Identifies the request; null where there is none. */
  readonly fingerprint: string | null;
  /** The request's bytes; null where they are kept elsewhere. */
  readonly request: Uint8Array | null;
  /** JSON text; null where there is none. */
  readonly result: string | null;
  /** Whether the result was not kept. */
  readonly resultOmitted: boolean;
  /** Why it waits, was refused or is in doubt. */
  readonly reason: string | null;
  /** JSON text of an outcome that came too late. */
  readonly evidence: string | null;
  /** Last change, in the store's milliseconds. */
  readonly changedMs: number;
}

/** For adapters: reads a row under a lock, and answers what to write (nothing: leave it) and what to return. */
export type EffectStep<T> = (row: EffectRow | undefined, nowMs: number) => {
  readonly write?: EffectRow;
  readonly answer: T;
};

/** For adapters: what a store's client must do; {@linkcode claimStore} makes a {@linkcode ClaimStore} of it. */
export interface EffectRows {
  /** A name for people, without secrets. */
  readonly name: string;
  /** Runs the steps in order in one transaction, each on its row as locked then, with the store's clock. */
  change<T>(steps: readonly { readonly key: EffectKey; readonly step: EffectStep<T> }[]): Promise<readonly T[]>;
  /** See {@linkcode ClaimStore.list}. */
  list(options: ListOptions & { readonly limit: number }): Promise<readonly EffectRow[]>;
  /** See {@linkcode ClaimStore.count}. */
  count(scope?: string): Promise<Readonly<Record<EffectState, number>>>;
  /** See {@linkcode ClaimStore.prune}. */
  prune(options: Required<PruneOptions>): Promise<number>;
}

/** Largest result that is kept, in bytes of JSON. */
const RESULT_BYTES = 65_536;

/** For adapters: the JSON text of a result, or that it cannot be kept. */
export function encodeResult(result: Json | undefined): { readonly text: string | null; readonly omitted: boolean } {
  if (result === undefined || result === null) return { text: null, omitted: false };
  try {
    const text: string | undefined = JSON.stringify(result);
    if (text !== undefined && (text.length * 3 <= RESULT_BYTES || encoder.encode(text).length <= RESULT_BYTES)) {
      return { text, omitted: false };
    }
  } catch {
    // A bigint or a cycle: not JSON.
  }
  return { text: null, omitted: true };
}

/** The same JSON gives the same text, whatever the order of its members (RFC 8785 says more; this is for comparing only). */
function canonical(value: Json): string {
  if (value === null || typeof value !== "object") return JSON.stringify(value);
  if (Array.isArray(value)) return `[${value.map(canonical).join(",")}]`;
  const members = Object.entries(value).filter(([, member]) => member !== undefined);
  return `{${members.sort(([a], [b]) => a < b ? -1 : 1).map(([k, v]) => `${JSON.stringify(k)}:${canonical(v)}`).join(",")}}`;
}

async function sha256(bytes: Uint8Array): Promise<string> {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes as Uint8Array<ArrayBuffer>));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** For adapters: the bytes to keep of a request, and what identifies it whatever the order of its JSON members. */
export async function encodeRequest(
  request: Json | Uint8Array | undefined,
): Promise<{ readonly bytes: Uint8Array | null; readonly fingerprint: string | null }> {
  if (request === undefined) return { bytes: null, fingerprint: null };
  if (request instanceof Uint8Array) return { bytes: request, fingerprint: `bytes-1:${await sha256(request)}` };
  const text: string | undefined = JSON.stringify(request);
  if (text === undefined) throw new TypeError("Cannot keep the request: it must be JSON or bytes");
  return { bytes: encoder.encode(text), fingerprint: `json-1:${await sha256(encoder.encode(canonical(request)))}` };
}

/** For adapters: refuses an effect key that is missing, empty or too long. */
export function checkKey(key: EffectKey): void {
  checkText("effect scope", key?.scope);
  checkText("effect key", key?.key);
}

/** What a claim answers about a row that is there already, as long as it may not be taken. */
function standing(row: EffectRow, fingerprint: string | null, nowMs: number): Claim | undefined {
  if (row.fingerprint !== fingerprint) return { state: "mismatch" };
  const result: Json = row.result === null ? null : JSON.parse(row.result);
  if (row.state === "done") return { state: "done", result, resultOmitted: row.resultOmitted };
  if (row.state === "rejected") return { state: "rejected", reason: row.reason ?? "", result };
  if (row.state !== "uncertain" && row.untilMs > nowMs) return { state: "busy", retryMs: row.untilMs - nowMs };
  return undefined;
}

function doubtful(row: EffectRow, nowMs: number): Claim {
  return {
    state: "uncertain",
    since: new Date(row.untilMs),
    ageMs: Math.max(0, nowMs - row.untilMs),
    fence: row.fence,
    generation: row.generation,
  };
}

function newEffectRow(key: EffectKey, nowMs: number, fields: Partial<EffectRow>): EffectRow {
  return {
    scope: key.scope,
    key: key.key,
    state: "claimed",
    fence: 1,
    attempt: 1,
    generation: 1,
    untilMs: nowMs,
    firstMs: nowMs,
    doubt: false,
    fingerprint: null,
    request: null,
    result: null,
    resultOmitted: false,
    reason: null,
    evidence: null,
    changedMs: nowMs,
    ...fields,
  };
}

function claimStep(
  key: EffectKey,
  { leaseMs, repeatWithinMs }: ClaimOptions,
  fingerprint: string | null,
  request: Uint8Array | null,
): EffectStep<Claim> {
  return (row, now) => {
    const take = (write: EffectRow) => {
      const { fence, attempt, generation, request } = write;
      return { write, answer: { state: "claimed", fence, attempt, generation, request } as const };
    };
    if (!row) return take(newEffectRow(key, now, { untilMs: now + leaseMs, fingerprint, request }));
    const answer = standing(row, fingerprint, now);
    if (answer) return { answer };
    // Once in doubt it stays so: the attempts may be used up, and a later caller cannot know why.
    if (row.state === "uncertain") return { answer: doubtful(row, now) };
    const doubt = row.firstMs !== null;
    if (row.firstMs === null || repeatWithinMs !== undefined && now - row.firstMs <= repeatWithinMs) {
      return take({
        ...row,
        state: "claimed",
        fence: row.fence + 1,
        attempt: row.attempt + 1,
        untilMs: now + leaseMs,
        firstMs: row.firstMs ?? now,
        doubt,
        reason: null,
        changedMs: now,
      });
    }
    // The fence stays: a late but known outcome of the first owner can still end the doubt.
    const reason = row.reason ?? "interrupted: the attempt was started and its outcome was never recorded";
    const write: EffectRow = { ...row, state: "uncertain", reason, changedMs: now };
    return { write, answer: doubtful(write, now) };
  };
}

/** For adapters: a claim inside a transaction whose commit makes the effect done. */
export function transactionStep(key: EffectKey, fingerprint: string | null, request: Uint8Array | null): EffectStep<Claim> {
  return (row, now) => {
    const answer = row && standing(row, fingerprint, now);
    if (answer) return { answer };
    if (row && row.firstMs !== null) return { answer: doubtful(row, now) };
    const write: EffectRow = row
      ? { ...row, state: "done", fence: row.fence + 1, attempt: row.attempt + 1, reason: null, changedMs: now }
      : newEffectRow(key, now, { state: "done", fingerprint, request, firstMs: null });
    const { fence, attempt, generation } = write;
    return { write, answer: { state: "claimed", fence, attempt, generation, request: write.request } };
  };
}

type Fenced<T> = { readonly lost: string } | { readonly value: T };

/** A change by the owner of `fence`; an owner that comes too late changes nothing but leaves its outcome as evidence. */
function fencedStep<T>(
  fence: number,
  states: readonly EffectState[],
  outcome: Json | undefined,
  change: (row: EffectRow, now: number) => { write?: EffectRow; value: T },
): EffectStep<Fenced<T>> {
  return (row, now) => {
    if (!row) return { answer: { lost: "it was never claimed, or has been pruned" } };
    if (row.fence === fence && states.includes(row.state)) {
      const { write, value } = change(row, now);
      return { write, answer: { value } };
    }
    const lost = row.fence === fence ? `it is ${row.state}` : `fence ${fence} has been overtaken by ${row.fence}`;
    if (outcome === undefined) return { answer: { lost } };
    const { text } = encodeResult({ fence, ...outcome as { readonly [key: string]: Json } });
    return { write: { ...row, evidence: text ?? row.evidence }, answer: { lost } };
  };
}

function completeStep(fence: number, result: Json | undefined): EffectStep<Fenced<void>> {
  const { text, omitted } = encodeResult(result);
  const evidence: Json = { done: true, result: omitted ? null : result ?? null };
  return fencedStep(fence, ["claimed", "uncertain", "done"], evidence, (row, now) => ({
    // Done already under this fence: the answer to the first complete was lost on its way.
    write: row.state === "done"
      ? undefined
      : { ...row, state: "done", result: text, resultOmitted: omitted, reason: null, changedMs: now },
    value: undefined,
  }));
}

function failStep(fence: number, failure: AttemptFailure): EffectStep<Fenced<EffectState>> {
  const { as, reason, retryMs } = failure;
  const { text } = encodeResult(failure.result);
  return fencedStep(fence, ["claimed"], { failed: as, reason }, (row, now) => {
    const base = { ...row, reason, untilMs: now + (retryMs ?? 0), changedMs: now };
    const write: EffectRow = as === "retryable"
      ? { ...base, state: "waiting", firstMs: row.doubt ? row.firstMs : null }
      : as === "rejected" && !row.doubt
      ? { ...base, state: "rejected", result: text, firstMs: null }
      : as === "unknown" && retryMs !== undefined
      ? { ...base, state: "waiting" }
      // A refusal too: it speaks of its own attempt, and an earlier one may have happened.
      : { ...base, state: "uncertain", untilMs: now };
    return { write, value: write.state };
  });
}

function renewStep(fence: number, leaseMs: number): EffectStep<Fenced<void>> {
  return (row, now) => {
    if (row?.state === "claimed" && row.fence === fence && row.untilMs <= now) {
      return { answer: { lost: "its lease has ended" } };
    }
    return fencedStep(fence, ["claimed"], undefined, (row) => ({
      write: { ...row, untilMs: Math.max(row.untilMs, now + leaseMs) },
      value: undefined,
    }))(row, now);
  };
}

function resolveStep(key: EffectKey, resolution: Resolution, fence: number | undefined): EffectStep<Error | undefined> {
  return (row, now) => {
    const refuse = (error: Error) => ({ answer: error });
    const named = `Cannot resolve effect "${key.key}" of "${key.scope}"`;
    if (!row) return refuse(new RangeError(`${named}: there is no such effect`));
    if (fence !== undefined && row.fence !== fence) {
      return refuse(new EffectError("lease_lost", `${named}: fence ${fence} has been overtaken by ${row.fence}`));
    }
    if (row.state === "done") return refuse(new RangeError(`${named}: it is done`));
    if (row.state === "claimed" && row.untilMs > now) {
      return refuse(new EffectError("busy", `${named}: an owner works on it for ${row.untilMs - now} ms more`));
    }
    const base = { ...row, fence: row.fence + 1, untilMs: now, changedMs: now };
    if (resolution.as === "done") {
      const { text, omitted } = encodeResult(resolution.result);
      return {
        write: { ...base, state: "done", result: text, resultOmitted: omitted, reason: null },
        answer: undefined,
      };
    }
    if (resolution.as === "retry") {
      if (row.state === "waiting" || row.state === "uncertain") {
        return { write: { ...base, state: "waiting", attempt: 0 }, answer: undefined };
      }
      return refuse(new RangeError(`${named}: it is ${row.state}, and waits for no attempt`));
    }
    if (resolution.as === "rejected") {
      return { write: { ...base, state: "rejected", reason: resolution.reason, result: null }, answer: undefined };
    }
    // A new generation means a new idempotency key: under the old one a target would answer what it has stored.
    const sent = row.firstMs !== null || row.state === "rejected";
    return {
      write: {
        ...base,
        state: "waiting",
        attempt: 0,
        firstMs: null,
        doubt: false,
        result: null,
        generation: row.generation + (sent ? 1 : 0),
      },
      answer: undefined,
    };
  };
}

function lost(action: string, key: EffectKey, why: string): EffectError {
  return new EffectError("lease_lost", `Cannot ${action} effect "${key.key}" of "${key.scope}": ${why}`);
}

/** For adapters: makes a {@linkcode ClaimStore} of what a client can do. All stores share this one state machine. */
export function claimStore(rows: EffectRows): ClaimStore {
  async function fenced<T>(action: string, key: EffectKey, step: EffectStep<Fenced<T>>): Promise<T> {
    checkKey(key);
    const [answer] = await rows.change([{ key, step }]);
    if ("lost" in answer!) throw lost(action, key, answer.lost);
    return answer!.value;
  }
  async function claimAll(claims: readonly (ClaimOptions & { readonly key: EffectKey })[]): Promise<readonly Claim[]> {
    const steps = [];
    for (const options of claims) {
      const { key, leaseMs, request, fingerprint } = options;
      checkKey(key);
      integer("leaseMs", leaseMs, 1);
      const encoded = await encodeRequest(request);
      steps.push({ key, step: claimStep(key, options, fingerprint ?? encoded.fingerprint, encoded.bytes) });
    }
    return await rows.change(steps);
  }
  return {
    name: rows.name,
    claimAll,
    claim: async (key, options) => (await claimAll([{ key, ...options }]))[0]!,
    complete: (key, fence, result) => fenced("complete", key, completeStep(fence, result)),
    async completeAll(completions) {
      for (const { key } of completions) checkKey(key);
      const steps = completions.map(({ key, fence, result }) => ({ key, step: completeStep(fence, result) }));
      return (await rows.change(steps)).map((answer) => "value" in answer);
    },
    renew: (key, fence, leaseMs) => fenced("renew", key, renewStep(fence, integer("leaseMs", leaseMs, 1))),
    fail: (key, fence, failure) => fenced("fail", key, failStep(fence, failure)),
    async resolve(key, resolution, fence) {
      checkKey(key);
      const [error] = await rows.change([{ key, step: resolveStep(key, resolution, fence) }]);
      if (error) throw error;
    },
    async list(options = {}) {
      const found = await rows.list({ ...options, limit: integer("limit", options.limit ?? 1000, 1) });
      return found.map((row) => ({
        scope: row.scope,
        key: row.key,
        state: row.state,
        generation: row.generation,
        attempts: row.attempt,
        doubt: row.firstMs !== null && row.state !== "done",
        since: new Date(row.state === "uncertain" ? row.untilMs : row.changedMs),
        error: row.reason,
        result: row.result === null ? null : JSON.parse(row.result),
        evidence: row.evidence === null ? null : JSON.parse(row.evidence),
      }));
    },
    count: (scope) => rows.count(scope),
    prune: ({ olderThanMs, limit = 1000, outboxes = [] }) =>
      rows.prune({ olderThanMs: integer("olderThanMs", olderThanMs, 0), limit: integer("limit", limit, 1), outboxes }),
  };
}

// ------------------------------------------------------------------------------------------------------------------- once

/** What an effect is given. */
export interface Attempt<Q> {
  /** The same on every attempt: a function of the effect's key and generation. ASCII where scope and key are. */
  readonly idempotencyKey: string;
  /** 1 for the first attempt. */
  readonly number: number;
  /** What was stored by the first claim: the same bytes on every attempt. */
  readonly request: Q;
  /** Fires before the lease ends: stop, another owner may take over. */
  readonly signal: AbortSignal;
}

/** What `reconcile` found at the destination. */
export type Found<R> =
  /** It happened; this was its result. */
  | { readonly state: "done"; readonly result: R }
  /** It did not happen and no attempt is under way. */
  | { readonly state: "absent" }
  /** The destination cannot tell. */
  | { readonly state: "unknown" };

/** How {@linkcode once} runs an effect. */
export type OnceOptions<R, Q> =
  & {
    /** Stored at the first claim and handed to every attempt; another request under the same key is an error. */
    readonly request?: Q;
    /**
     * How long this owner may be silent before others take over, in milliseconds, from 10. Renewed while the effect runs.
     *
     * @default {30_000}
     */
    readonly leaseMs?: number;
    /**
     * How long to wait for another owner before the error `busy`, in milliseconds.
     *
     * @default {5_000}
     */
    readonly waitMs?: number;
    /** Gives up waiting, and fires the attempt's signal. */
    readonly signal?: AbortSignal;
    /** Asks the destination about an effect in doubt, which was sent under this idempotency key. */
    reconcile?(key: EffectKey, idempotencyKey: string): Promise<Found<R>>;
    /**
     * How long after the end of the doubtful attempt `reconcile` is asked at the earliest, in milliseconds: what was sent
     * last must have arrived by then.
     *
     * @default {5_000}
     */
    readonly settleMs?: number;
    /** Hears of what happens. */
    observe?(event: EffectEvent): void;
    /** Time, randomness and scheduling. */
    readonly runtime?: Runtime;
  }
  & (
    /** The destination dedupes by `idempotencyKey` for `dedupeWindowMs`: repeat, but never past 80 % of it. */
    | { readonly repeat: "same-key"; readonly dedupeWindowMs: number }
    /** An interrupted effect is in doubt. */
    | { readonly repeat?: "never" }
  );

/** What the observers of {@linkcode once} hear. */
export type EffectEvent =
  | { readonly type: "claimed"; readonly scope: string; readonly key: string; readonly attempt: number }
  | { readonly type: "uncertain"; readonly scope: string; readonly key: string; readonly reason: string }
  | { readonly type: "lease_lost"; readonly scope: string; readonly key: string }
  | { readonly type: "result_omitted"; readonly scope: string; readonly key: string };

const OUTCOME: unique symbol = Symbol.for("effectonce.outcome") as never;
interface Outcome extends Error {
  readonly [OUTCOME]: { readonly as: "rejected" | "retryable"; readonly result?: Json; readonly afterMs?: number };
}
function outcome(reason: string, details: Outcome[typeof OUTCOME]): Error {
  return Object.assign(new Error(reason), { [OUTCOME]: details });
}
function outcomeOf(error: unknown): Outcome[typeof OUTCOME] | undefined {
  return error instanceof Error && OUTCOME in error ? (error as Outcome)[OUTCOME] : undefined;
}
function reasonOf(error: unknown): string {
  return (error instanceof Error ? error.message : String(error)).slice(0, 1000).toWellFormed();
}

/** Thrown by an effect: refused for good. The answer is replayed to later callers. */
export function rejected(reason: string, result?: Json): Error {
  return outcome(reason, { as: "rejected", result });
}

/** Thrown by an effect: known not to have happened; try again, after `afterMs` at the earliest. Anything else is unknown. */
export function retryable(reason: string, options: { readonly afterMs?: number } = {}): Error {
  return outcome(reason, { as: "retryable", afterMs: options.afterMs });
}

/** A dedupe window's share within which an effect may be repeated: the destination's clock and ours differ. */
const repeatWithin = (windowMs: number): number => Math.floor(integer("dedupeWindowMs", windowMs, 1) * 0.8);

function generationKey(key: string, generation: number): string {
  return generation === 1 ? key : `${key};generation=${generation}`;
}

/** Runs a call under a lease: renews it meanwhile, and fires the call's signal before it ends. */
async function underLease<T>(
  lease: {
    readonly store: Pick<ClaimStore, "renew">;
    readonly key: EffectKey;
    readonly fence: number;
    readonly leaseMs: number;
    /** Monotonic time just before the claim was asked for: the lease is at least `leaseMs` from then. */
    readonly since: number;
    readonly signal?: AbortSignal;
    readonly runtime: Runtime;
  },
  run: (signal: AbortSignal) => Promise<T>,
): Promise<T> {
  const { store, key, fence, leaseMs, runtime, signal } = lease;
  const stop = new AbortController();
  const over = new AbortController();
  let endsAt = lease.since + leaseMs;
  const forward = () => stop.abort(signal?.reason);
  if (signal?.aborted) forward();
  signal?.addEventListener("abort", forward);
  async function renew(): Promise<void> {
    for (;;) {
      await runtime.sleep(leaseMs / 3, over.signal);
      if (over.signal.aborted) return;
      const before = runtime.now();
      try {
        await store.renew(key, fence, leaseMs);
        endsAt = before + leaseMs;
      } catch (error) {
        // Any other error may pass: the deadline below does not depend on it.
        if (error instanceof Error && "code" in error && error.code === "lease_lost") return stop.abort(error);
      }
    }
  }
  async function watch(): Promise<void> {
    // A tenth of the lease is the margin for a call to notice its signal.
    for (let left: number; (left = endsAt - leaseMs / 10 - runtime.now()) > 0;) {
      await runtime.sleep(left, over.signal);
      if (over.signal.aborted) return;
    }
    stop.abort(lost("go on with", key, "its lease is about to end"));
  }
  renew();
  watch();
  try {
    return await run(stop.signal);
  } finally {
    over.abort();
    signal?.removeEventListener("abort", forward);
  }
}

/**
 * Runs an external effect once per key; a repeated key gets the stored result.
 *
 * The effect throws {@linkcode rejected} or {@linkcode retryable} where it knows; anything else it throws leaves open whether
 * it happened. A result that is not JSON or over 64 KiB is returned, but not kept: later callers get null.
 *
 * @throws {EffectError} `busy`: another owner still works on it. `uncertain`: it may have happened, and is not safe to
 * repeat. `rejected`: it was refused, now or before. `mismatch`: the key was used with another request.
 */
export async function once<R extends Json | void, Q extends Json | Uint8Array = null>(
  store: ClaimStore,
  key: EffectKey,
  effect: (attempt: Attempt<Q>) => Promise<R>,
  options: OnceOptions<R, Q> = {},
): Promise<R> {
  const { request, leaseMs = 30_000, waitMs = 5_000, settleMs = 5_000, signal, reconcile, observe } = options;
  const { runtime = realRuntime } = options;
  checkKey(key);
  integer("leaseMs", leaseMs, 10);
  integer("waitMs", waitMs, 0);
  const repeatWithinMs = options.repeat === "same-key" ? repeatWithin(options.dedupeWindowMs) : undefined;
  const { scope } = key;
  const named = `Effect "${key.key}" of "${scope}"`;
  const idempotencyKeyOf = (generation: number) => generationKey(`${encodeURIComponent(scope)}:${key.key}`, generation);
  const giveUpAt = runtime.now() + waitMs;
  const wait = async (ms: number, error: () => EffectError): Promise<void> => {
    const left = giveUpAt - runtime.now();
    if (left <= 0) throw error();
    await runtime.sleep(Math.min(ms, left), signal);
    signal?.throwIfAborted();
  };
  const inDoubt = (reason: string, cause?: unknown): EffectError => {
    observe?.({ type: "uncertain", scope, key: key.key, reason });
    return new EffectError("uncertain", `${named} may have happened: ${reason}`, { cause });
  };

  for (let polls = 1;; polls++) {
    const since = runtime.now();
    const claim = await store.claim(key, { leaseMs, request, repeatWithinMs });
    switch (claim.state) {
      case "done":
        return claim.result as R;
      case "rejected":
        throw new EffectError("rejected", `${named} was refused: ${claim.reason}`, { result: claim.result });
      case "mismatch":
        throw new EffectError("mismatch", `${named} was claimed with another request: use a new key for a new request`);
      case "busy":
        await wait(Math.min(claim.retryMs, 10 * 2 ** Math.min(polls, 5)), () => {
          return new EffectError("busy", `${named} is being worked on, for ${claim.retryMs} ms more at most`);
        });
        continue;
      case "uncertain": {
        if (!reconcile) throw inDoubt("it was started and its outcome was never recorded");
        if (claim.ageMs < settleMs) {
          await wait(settleMs - claim.ageMs, () => inDoubt("too early to ask the destination"));
          continue;
        }
        const found = await reconcile(key, idempotencyKeyOf(claim.generation));
        if (found.state === "unknown") throw inDoubt("the destination cannot tell");
        try {
          if (found.state === "absent") await store.resolve(key, { as: "absent" }, claim.fence);
          else await store.complete(key, claim.fence, found.result as Json);
        } catch (error) {
          if (!isCode(error, "lease_lost")) throw error; // Else somebody was faster: ask again.
        }
        continue;
      }
      case "claimed":
    }
    const { fence, attempt } = claim;
    observe?.({ type: "claimed", scope, key: key.key, attempt });
    const stored = claim.request === null
      ? null
      : request instanceof Uint8Array
      ? claim.request
      : JSON.parse(utf8.decode(claim.request));
    const idempotencyKey = idempotencyKeyOf(claim.generation);
    let result: R;
    try {
      result = await underLease(
        { store, key, fence, leaseMs, since, signal, runtime },
        (signal) => effect({ idempotencyKey, number: attempt, request: stored as Q, signal }),
      );
    } catch (error) {
      const known = outcomeOf(error);
      const retryMs = known?.afterMs ?? (known || repeatWithinMs !== undefined ? 0 : undefined);
      const failure = { as: known?.as ?? "unknown", reason: reasonOf(error), result: known?.result, retryMs } as const;
      let state: EffectState;
      try {
        state = await store.fail(key, fence, failure);
      } catch (failed) {
        if (!isCode(failed, "lease_lost")) throw failed;
        observe?.({ type: "lease_lost", scope, key: key.key });
        continue; // The truth is in the store.
      }
      if (state === "rejected") {
        throw new EffectError("rejected", `${named} was refused: ${reasonOf(error)}`, {
          cause: error,
          result: known?.result,
        });
      }
      if (state !== "uncertain") throw error;
      if (!reconcile) throw inDoubt(reasonOf(error), error);
      continue;
    }
    try {
      await insist(runtime, () => store.complete(key, fence, result as Json), fewTimes);
    } catch (error) {
      if (!isCode(error, "lease_lost")) throw error;
      observe?.({ type: "lease_lost", scope, key: key.key });
      continue;
    }
    if (encodeResult(result as Json).omitted) observe?.({ type: "result_omitted", scope, key: key.key });
    return result;
  }
}

/** Whether an error may pass by itself: what this package reports does not, unless the database was busy. */
function isPassing(error: unknown): boolean {
  return !(error instanceof Error && error.name === "EffectError") || isCode(error, "busy");
}

function isCode(error: unknown, code: EffectErrorCode): boolean {
  return error instanceof Error && "code" in error && error.code === code;
}

/** Runs it, with pauses, for as long as it fails and `again` says so. */
async function insist<T>(
  runtime: Runtime,
  run: () => Promise<T>,
  again: (error: unknown, attempt: number, afterMs: number) => boolean,
): Promise<T> {
  for (let attempt = 1;; attempt++) {
    try {
      return await run();
    } catch (error) {
      const afterMs = backOff(attempt, 50, 1000, runtime);
      if (!again(error, attempt, afterMs)) throw error;
      await runtime.sleep(afterMs);
    }
  }
}

/** What has happened outside must be written down: tried a few times before the outcome is left in doubt. */
const fewTimes = (error: unknown, attempt: number): boolean => attempt < 5 && !isCode(error, "lease_lost");

// ------------------------------------------------------------------------------------------------------ positions, batches

/** Where a sink stands: the number and identity of the last batch that it committed, and what was in it. */
export interface Position {
  /** 1 for the first batch, and one more each time; 0 before it. */
  readonly n: number;
  /** SHA-256, in hex, of `prev` and the JSON of `rows`: identifies this batch and all before it. Empty for 0. */
  readonly uid: string;
  /** The uid of the batch before. */
  readonly prev: string;
  /** The rows: number (as text) and id of each. */
  readonly rows: readonly (readonly [seq: string, id: string])[];
}

/** A sealed batch: its content and order are fixed in the source before it is first sent. */
export interface Batch extends Position {
  /** The messages of its rows; rows that a user deleted meanwhile are missing. */
  readonly messages: readonly Message[];
}

/** Whose position it is. */
export interface PositionOwner {
  /** The relay's name. */
  readonly relay: string;
  /** The source's own identity, such as the outbox's UUID; that of its shard, where it has several. */
  readonly source: string;
  /** Which part of the source it is; left out where the source is one whole. */
  readonly shard?: ShardOf;
}

/** A part of a source whose messages are shared out over relays. */
export interface ShardOf {
  /** The identity of the whole. */
  readonly of: string;
  /** From 0. */
  readonly index: number;
  /** How many parts there are. */
  readonly count: number;
}

/** Before the first batch. */
export const START: Position = { n: 0, uid: "", prev: "", rows: [] };

// ------------------------------------------------------------------------------------------------------- sources and sinks

/** How messages get from a source to a sink; see {@linkcode Guarantee}. */
export type Protocol = "sealed" | "claimed" | "plain";

/** What a relay tells the source when it starts. */
export interface SourceOptions {
  /** The relay's name. */
  readonly relay: string;
  /** The protocol it will use. */
  readonly protocol: Protocol;
  /** Whether a parked message holds back the later ones of its key. */
  readonly onPark: "block" | "skip";
  /** How long the source may take a silent relay for alive, in milliseconds. */
  readonly leaseMs: number;
  /**
   * Whether to refuse a database that was restored or copied since, where that can be seen: the sink is one in which a copy would
   * shut out the original.
   *
   * @default {false}
   */
  readonly original?: boolean;
}

/** Where messages come from. */
export interface Source {
  /** A name for people, without secrets. */
  readonly name: string;
  /** Whether it seals batches, for sinks that commit a position. */
  readonly seals: boolean;
  /**
   * Registers a relay.
   *
   * @throws {EffectError} `source_invalid` if a relay of another name has overlapping topics, or the source is unusable;
   * `diverged` if it is not the original.
   */
  open(options: SourceOptions): Promise<SourceSession>;
}

/** How much to read. */
export interface ReadLimits {
  /** At most so many messages, from 1. */
  readonly rows: number;
  /** At most so many bytes of values, but always one message. */
  readonly bytes: number;
}

/** A message that is not to be delivered now. */
export interface Park {
  /** The message. */
  readonly message: Message;
  /** What a person should read. */
  readonly reason: string;
  /** Try again after so many milliseconds; null: only when a person says so. */
  readonly retryMs: number | null;
  /** How often it was tried, where that is known. */
  readonly attempts?: number;
  /** No store tells of it: the claim of its id is another message's. */
  readonly untold?: true;
}

/** How an outbox stands. */
export interface OutboxStatus {
  /** Messages not delivered and not parked, whether they may go now, wait for another attempt or for an earlier message. */
  readonly pending: number;
  /** Those of them that are held back behind a waiting or parked one of their key, as far as a relay has seen. */
  readonly heldBack: number;
  /** Messages set aside until a person decides. */
  readonly parked: number;
  /** Age of the oldest pending message in milliseconds; null if there is none. */
  readonly oldestMs: number | null;
}

/** A relay that is registered at an outbox, as operators see it. */
export interface RegisteredRelay {
  /** Its name. */
  readonly relay: string;
  /** How it delivers. */
  readonly protocol: Protocol;
  /** Its topics; null: all. */
  readonly topics: readonly string[] | null;
  /** Whether it runs; one that has died runs until its lease ends. Else it left something behind, and keeps its topics. */
  readonly live: boolean;
  /** Messages in batches that it has sealed and not seen delivered. */
  readonly sealed: number;
}

/** A message in an outbox, as operators see it. */
export interface OutboxMessage {
  /** The message's id. */
  readonly id: string;
  /** Its topic. */
  readonly topic: string;
  /** Its ordering key. */
  readonly key: string | null;
  /** To be delivered; waits for another attempt; set aside; held back by an earlier one of its key; delivered, and kept. */
  readonly state: "pending" | "waiting" | "parked" | "blocked" | "delivered";
  /** Why it waits or is set aside; else empty. */
  readonly reason: string;
}

/** How a relay's batches stand in an outbox, or in a shard of it. */
export interface SealedBatches {
  /** Whose they are. */
  readonly owner: PositionOwner;
  /** The last batch whose messages have left the outbox. */
  readonly settled: Pick<Position, "n" | "uid">;
  /** Those that were sealed since, oldest first: committed or not, only the sink knows. */
  readonly batches: readonly Batch[];
}

/** A source that is a table, as operators see it. */
export interface Outbox extends Source {
  /** How a relay's batches stand, by shard. */
  sealed(relay: string): Promise<readonly SealedBatches[]>;
  /** How many messages stand where. */
  status(): Promise<OutboxStatus>;
  /** Parked messages, those parked first at first, at most `limit` (default 1000). */
  parked(limit?: number): Promise<readonly (OutboxMessage & { readonly since: Date })[]>;
  /** A message, whatever its state; undefined if there is none. */
  find(id: string): Promise<OutboxMessage | undefined>;
  /** Lets a parked or waiting message, and what it held back, be delivered; false if there is no such message. */
  release(id: string): Promise<boolean>;
  /** Removes a parked or waiting message for good, and frees what it held back; false if there is no such message. */
  discard(id: string): Promise<boolean>;
  /** The relays that are registered. */
  relays(): Promise<readonly RegisteredRelay[]>;
  /**
   * Gives up a relay's name, so that another may have its topics: what it called or sent and did not settle, that one calls or
   * sends again. False if there is nothing of it.
   *
   * @throws {EffectError} `busy` while it runs.
   */
  forget(relay: string): Promise<boolean>;
  /**
   * Gives a relay that has ended another name, with what it sealed. From then on the old name is refused, and the new one until
   * `move` has taken the position in its sink along; what ends in between is done by another call. False if there is nothing of
   * the relay. Not for one that claims: its claims are made under its name.
   *
   * @throws {EffectError} `busy` while it runs, `source_invalid` if it claims, or the new name is known.
   */
  rename(relay: string, name: string, move: () => Promise<void>): Promise<boolean>;
  /** Deletes delivered messages that were kept; answers how many. Bounded: call it until it answers 0. */
  prune(options: Omit<PruneOptions, "outboxes">): Promise<number>;
}

/** What makes a message the same as another one. */
export type Comparable = Pick<Message, "topic" | "key" | "value" | "headers">;

/** A source with a relay registered. */
export interface SourceSession {
  /** The source's own identity, such as the outbox's UUID; that of its shard, where it has several. */
  readonly id: string;
  /** Which part of the source it is; left out where the source is one whole. */
  readonly shard?: ShardOf;
  /** Whether a relay of this name ended here without a word, and may have left something behind. */
  readonly inherited: boolean;
  /**
   * Whether the source lets one relay of a name at a time have it, or this shard: for any other one `settled` is refused.
   *
   * @default {false}
   */
  readonly exclusive?: boolean;
  /**
   * The first undelivered messages, in order, whatever was read before; none that waits, is parked, or is held back.
   * `waitMs`: when the next one will have waited long enough; null if none waits.
   */
  read(limits: ReadLimits): Promise<{ readonly messages: readonly Message[]; readonly waitMs: number | null }>;
  /**
   * What of a message must be the same whenever its id comes again.
   *
   * @default {undefined} Topic, key, value, and headers but for `traceparent`.
   */
  comparable?(message: Message): Comparable;
  /** These are delivered. */
  settle(messages: readonly Message[]): Promise<void>;
  /** These wait, or are parked. */
  park(parks: readonly Park[]): Promise<void>;
  /**
   * The number of the last batch that was settled.
   *
   * @throws {EffectError} `fenced` if the source is exclusive, and another relay has it.
   */
  settled(): Promise<number>;
  /**
   * Settles what the sink has committed, seals the next batch unless two are sealed already, and hands out all sealed ones.
   *
   * @throws {EffectError} `fenced` if another relay has settled more than the ring tells; `diverged` if the database went back in
   * time, further than the ring reaches.
   */
  seal(ring: readonly Position[], limits: ReadLimits): Promise<{
    readonly batches: readonly Batch[];
    readonly waitMs: number | null;
    readonly repaired: readonly Position[];
  }>;
  /**
   * Takes apart the batches that are not committed, and parks messages, but for those that are parked already. Only while nothing
   * is on its way.
   */
  unseal(ring: readonly Position[], parks: readonly Park[]): Promise<void>;
  /**
   * Resolves after `ms` milliseconds, at once when the signal fires, or when there may be new messages: for sources that are
   * told of them. Never rejects.
   */
  wait?(ms: number, signal?: AbortSignal): Promise<void>;
  /**
   * Takes the sink's word for what was committed, where the source knows of another history: batches that are not in the ring are
   * taken apart, so that their messages are sealed, and delivered, again. Only while nothing is on its way.
   */
  adopt(ring: readonly Position[]): Promise<void>;
  /** Tells the source that the relay is alive; called every third of `leaseMs`. */
  renew(): Promise<void>;
  /** The relay ends; `settled`: it leaves nothing behind, and another name may take over. */
  close(settled: boolean): Promise<void>;
}

/** What a sink is given with a message. */
export type Delivery = Omit<Attempt<null>, "request">;

/** A sink that delivers message by message and cannot commit a position. */
export interface CallSink {
  /** Delivers by calls. */
  readonly kind: "call";
  /** A name for people, without secrets. */
  readonly name: string;
  /**
   * After an unknown outcome: `never` send again; `same-key`: the target dedupes by idempotency key; `always`: duplicates do
   * no harm.
   */
  readonly repeat: "never" | "same-key" | "always";
  /** How long the target remembers a key, in milliseconds; needed with `same-key`. */
  readonly dedupeWindowMs?: number;
  /** Delivers one message; what it resolves to is kept. It throws as {@linkcode once} describes. */
  deliver(message: Message, delivery: Delivery): Promise<Json>;
  /** Asks the target about a message in doubt, which was sent under the delivery's idempotency key. */
  reconcile?(message: Message, delivery: Delivery): Promise<Found<Json>>;
}

/** A sink that commits its position together with the records. */
export interface AtomicSink {
  /** Commits batches. */
  readonly kind: "atomic";
  /** A name for people, without secrets. */
  readonly name: string;
  /**
   * Messages in a batch where the relay is not told.
   *
   * @default {100}
   */
  readonly batch?: number;
  /**
   * What its promise rests on besides.
   *
   * @default {[]}
   */
  readonly conditions?: readonly string[];
  /**
   * Whether `open` always succeeds, and shuts out whoever had the sink before.
   *
   * @default {false} It is refused while another one has the sink.
   */
  readonly fences?: boolean;
  /**
   * Fences the previous owner, and reads the position back.
   *
   * @throws {EffectError} `fenced` if another relay holds it, `sink_invalid` if it is not what it should be.
   */
  open(owner: PositionOwner): Promise<AtomicSession>;
}

/** An atomic sink that is open. */
export interface AtomicSession {
  /** The positions committed last, oldest first: what repairs a source that went back in time. */
  readonly ring: readonly Position[];
  /**
   * Commits a batch and its position, all or nothing.
   *
   * @throws {EffectError} `fenced` if the position is not the one before the batch.
   * @throws {Error} As {@linkcode refusedMessage} if nothing was committed because of a message. Anything else: not known.
   */
  commit(batch: Batch): Promise<void>;
  /** Lets go of what `open` took. */
  close(): Promise<void>;
}

/** Where messages go. */
export type Sink = CallSink | AtomicSink;

const REFUSED: unique symbol = Symbol.for("effectonce.refused") as never;
interface RefusedMessage extends Error {
  readonly [REFUSED]: Message | undefined;
}

/**
 * For atomic sinks: an error that says that nothing was committed, because of this message alone. A `cause` made by
 * {@linkcode rejected} parks it at once; any other is tried again. Undefined: because of one that is not known, wherefore those of
 * the batch come one by one.
 */
export function refusedMessage(message: Message | undefined, cause: unknown): Error {
  return Object.assign(new Error(reasonOf(cause), { cause }), { [REFUSED]: message });
}

/** How {@linkcode handler} works; `C`: the database's client. */
export interface HandlerOptions<C = never> {
  /** The business key to dedupe by, within the relay's name as scope; without it the position alone prevents repetition. */
  key?(message: Message): string;
  /**
   * Does for several messages at once what `run` does for each, such as one INSERT of many rows. Where it throws, each is run
   * alone, which tells whose fault it was.
   */
  all?(messages: readonly Message[], effects: EffectTransaction, client: C): Promise<void>;
  /**
   * Messages in a batch where the relay is not told.
   *
   * @default {100}
   */
  readonly batch?: number;
}

/**
 * A sink that is the user's function: its writes, the claim and the source's position commit in one transaction. A message
 * whose function throws is tried again with back-off, alone, and parked in the end; {@linkcode rejected} parks it at once.
 */
export function handler<C>(
  store: EffectStore<C>,
  run: (message: Message, effects: EffectTransaction, client: C) => Promise<void>,
  options: HandlerOptions<C> = {},
): AtomicSink {
  const { batch, all } = options;
  if (all && options.key) throw new TypeError("Cannot dedupe by keys where messages are handled all at once");
  async function handle(message: Message, owner: PositionOwner, effects: EffectTransaction, client: C): Promise<void> {
    if (options.key) {
      const claim = await effects.claim({ scope: owner.relay, key: options.key(message) });
      if (claim.state === "done") return;
      if (claim.state === "busy") throw retryable("its key is being worked on elsewhere", { afterMs: claim.retryMs });
      if (claim.state !== "claimed") throw rejected(`the effect of its key is ${claim.state}`);
    }
    await run(message, effects, client);
  }
  return {
    kind: "atomic",
    name: `handler on ${store.name}`,
    ...batch !== undefined && { batch },
    open: async (owner) => ({
      ring: await store.positions(owner),
      async commit(batch) {
        const together = (run: (effects: EffectTransaction, client: C) => Promise<void>) =>
          store.transaction(async (effects, client) => {
            await effects.advance(owner, batch);
            await run(effects, client);
          });
        if (all && batch.messages.length > 1) {
          try {
            return await together((effects, client) => all.call(options, batch.messages, effects, client));
          } catch (error) {
            if (error instanceof EffectError || store.isDatabaseFailure(error)) throw error;
          }
        }
        let commits = false;
        try {
          await together(async (effects, client) => {
            commits = false;
            for (const message of batch.messages) {
              try {
                await handle(message, owner, effects, client);
              } catch (error) {
                throw store.isDatabaseFailure(error) ? error : refusedMessage(message, error);
              }
            }
            commits = batch.messages.length > 0;
          });
        } catch (error) {
          if (!commits || error instanceof EffectError || store.isDatabaseFailure(error)) throw error;
          // As of a constraint that is deferred.
          throw refusedMessage(batch.messages.length === 1 ? batch.messages[0] : undefined, error);
        }
      },
      close: () => Promise.resolve(),
    }),
  };
}

/** A function for {@linkcode handler}, as a module of its own exports it for the command line. */
export interface Handler<C> extends HandlerOptions<C> {
  /** As `run` of {@linkcode handler}. */
  readonly handle: (message: Message, effects: EffectTransaction, client: C) => Promise<void>;
}

/**
 * What a file exports as default for `relay --handler FILE`; `C`: the database's client, such as `pg.PoolClient`.
 *
 * ```ts
 * import { defineHandler } from "@effectonce/effectonce";
 *
 * interface Client {
 *   query(sql: string, values: unknown[]): Promise<unknown>;
 * }
 * export default defineHandler<Client>(async (message, _effects, client) => {
 *   const { id, total } = message.json<{ id: string; total: number }>();
 *   await client.query("insert into payments (id, total) values ($1, $2)", [id, total]);
 * });
 * ```
 */
export function defineHandler<C>(handle: Handler<C>["handle"], options: HandlerOptions<C> = {}): Handler<C> {
  return { ...options, handle };
}

/** What a relay promises, and on what. */
export interface Guarantee {
  /** The promise. */
  readonly level: "exactly-once" | "effectively-once" | "at-most-once" | "at-least-once";
  /** How it is kept. */
  readonly protocol: Protocol;
  /** Why this and not more. */
  readonly reasons: readonly string[];
  /** What it rests on. */
  readonly conditions: readonly string[];
  /** What would make it stronger. */
  readonly stronger: readonly string[];
}

/** Says what a relay between these ends would promise, and why, without running it. */
export function guarantee(from: Source, to: Sink, store?: ClaimStore): Guarantee {
  if (to.kind === "atomic") {
    if (!from.seals) throw new EffectError("source_invalid", `${from.name} cannot seal batches, which ${to.name} needs`);
    return {
      level: "exactly-once",
      protocol: "sealed",
      reasons: [`${to.name} commits its position together with the records, and hands it back at the start`],
      conditions: [
        "the source's commits are durable (doctor looks)",
        "nobody but relays of this name writes the sink's position",
        ...to.conditions ?? [],
      ],
      stronger: [],
    };
  }
  if (to.repeat === "always" || !store) {
    const reason = to.repeat === "always"
      ? `${to.name} keeps neither a position nor message ids, and duplicates do no harm there`
      : "there is no store in which to claim a message before it is sent";
    return {
      level: "at-least-once",
      protocol: "plain",
      reasons: [reason, "after a crash, what was sent but not yet settled is sent again"],
      conditions: ["one relay at a time: two of them send everything twice"],
      stronger: [to.repeat === "always" ? "deliver into a sink that commits its position" : "give a store"],
    };
  }
  const conditions = [
    `the commits of ${store.name} are durable (doctor looks)`,
    "claims are kept for longer than a message can come again",
  ];
  if (to.repeat === "same-key") {
    const window = to.dedupeWindowMs ?? 0;
    return {
      level: "effectively-once",
      protocol: "claimed",
      reasons: [
        `${to.name} is declared to dedupe by idempotency key`,
        "each message is claimed before it is sent, and repeated under the same key with the same bytes",
      ],
      conditions: [
        `the target remembers a key for at least ${window} ms; past 80 % of that an interrupted message is in doubt, not repeated`,
        ...conditions,
      ],
      stronger: [],
    };
  }
  return {
    level: "at-most-once",
    protocol: "claimed",
    reasons: [
      `${to.name} is not declared to dedupe, so an interrupted call is never repeated blindly`,
      to.reconcile
        ? "each message is claimed before it is sent; after an interruption the target is asked whether it happened"
        : "each message is claimed before it is sent; an interrupted one is in doubt until a person finds out",
    ],
    conditions: to.reconcile
      ? [...conditions, "a process paused just before its send, and woken after the target was asked, can still send"]
      : conditions,
    stronger: [
      "if the target dedupes by the Idempotency-Key header: say so (--idempotent)",
      ...to.reconcile ? [] : ["let the target be asked about a message in doubt (reconcile)"],
    ],
  };
}

// ------------------------------------------------------------------------------------------------------------------ relay

/** What a relay did. */
export interface RelayReport {
  /** Messages settled as delivered, by this run or found done. */
  readonly delivered: number;
  /** Messages parked. */
  readonly parked: number;
  /** Messages parked in doubt. */
  readonly uncertain: number;
}

/** Names the message of an event. */
export interface MessageEvent {
  /** The relay's name. */
  readonly relay: string;
  /** The message's id. */
  readonly id: string;
  /** Its topic. */
  readonly topic: string;
  /** Its ordering key. */
  readonly key: string | null;
  /** When it was enqueued. */
  readonly time: Date;
}

/** What a relay's observer hears: a public contract. New types may come; the present ones stay. */
export type RelayEvent = RelayHappening & {
  /** Of which shard or partition it is told, where a source has several. */
  readonly shard?: number;
};

/** What an event tells. */
export type RelayHappening =
  | { readonly type: "started"; readonly relay: string; readonly from: string; readonly to: string } & {
    readonly guarantee: Guarantee;
  }
  /** A claim was taken; the call follows. */
  | { readonly type: "claimed"; readonly attempt: number } & MessageEvent
  /** Delivered and recorded; `found`: by an earlier attempt, as the store or the target told. */
  | { readonly type: "delivered"; readonly attempt: number; readonly ms: number; readonly found: boolean } & MessageEvent
  /** To be tried again after `afterMs`. */
  | { readonly type: "retried"; readonly attempt: number; readonly afterMs: number; readonly reason: string } & MessageEvent
  /** Set aside until a person decides. */
  | { readonly type: "parked"; readonly reason: string } & MessageEvent
  /** Set aside: it may have happened, or not. */
  | { readonly type: "uncertain"; readonly reason: string } & MessageEvent
  /** This relay was too slow, and its outcome was not recorded: the store tells the truth. */
  | { readonly type: "lease_lost" } & MessageEvent
  /** The target's answer was not JSON or over 64 KiB, and was not kept. */
  | { readonly type: "result_omitted" } & MessageEvent
  /** Another relay of this name was faster; this one reads its position again, and stands by. Told once, until it is over. */
  | { readonly type: "fenced"; readonly relay: string; readonly reason: string }
  /** The source's database went back in time, and was repaired from what the sink remembers. */
  | { readonly type: "repaired"; readonly relay: string; readonly batches: number; readonly ids: readonly string[] }
  /** The source was made to go on behind the sink's last batch, as `acceptSource` has allowed. */
  | { readonly type: "accepted"; readonly relay: string; readonly n: number; readonly reason: string }
  /** Something passing went wrong; it is tried again. */
  | { readonly type: "failed"; readonly relay: string; readonly reason: string; readonly afterMs: number }
  /** There is nothing to do at the moment. */
  | { readonly type: "idle"; readonly relay: string }
  /** The end. */
  | { readonly type: "stopped"; readonly relay: string } & RelayReport;

/** How to relay. */
export interface RelayOptions {
  /**
   * The scope of its effects: relays of one name share the work, and a later run goes on where this one stopped.
   *
   * @default {"default"}
   */
  readonly name?: string;
  /** Where messages come from. */
  readonly from: Source;
  /** Where they go. */
  readonly to: Sink;
  /** Where calls are claimed; not needed by atomic sinks. */
  readonly store?: ClaimStore;
  /** Accept at-least-once where there is no store. */
  readonly allowDuplicates?: boolean;
  /** Return when nothing deliverable is left. */
  readonly drain?: boolean;
  /**
   * Asked where the source's database went back in time further than the sink remembers, instead of the error `diverged`: whether
   * to go on with what is in the source now. What was delivered and is in the source again will then be delivered again.
   *
   * @default {undefined} No.
   */
  acceptSource?(reason: string): boolean | Promise<boolean>;
  /** Stops gracefully: calls under way are finished, their outcomes recorded, leases released. */
  readonly signal?: AbortSignal;
  /** Hears of everything; must not throw. */
  observe?(event: RelayEvent): void;
  /**
   * Calls at the same time, each for another key, from 1.
   *
   * @default {8}
   */
  readonly lanes?: number;
  /**
   * Messages in hand, or in a sealed batch, from 1.
   *
   * @default {100, or what an atomic sink prefers}
   */
  readonly batch?: number;
  /**
   * Bytes of values in hand, or in a sealed batch.
   *
   * @default {8_388_608}
   */
  readonly batchBytes?: number;
  /**
   * How long a call may be silent before others take over, in milliseconds, from 10. Renewed while the call runs.
   *
   * @default {30_000}
   */
  readonly leaseMs?: number;
  /**
   * Attempts before a message is parked, from 1.
   *
   * @default {10}
   */
  readonly attempts?: number;
  /**
   * Whether a parked message holds back the later ones of its key, or only itself.
   *
   * @default {"block"}
   */
  readonly onPark?: "block" | "skip";
  /**
   * First bound of the back-off between attempts, in milliseconds; it doubles with each.
   *
   * @default {200}
   */
  readonly minRetryMs?: number;
  /**
   * Last bound of the back-off, in milliseconds.
   *
   * @default {60_000}
   */
  readonly maxRetryMs?: number;
  /**
   * How long after the end of a doubtful attempt the target is asked about it, in milliseconds.
   *
   * @default {5_000}
   */
  readonly settleMs?: number;
  /**
   * How often to look for messages when idle, in milliseconds.
   *
   * @default {50}
   */
  readonly pollMs?: number;
  /** Time, randomness and scheduling. */
  readonly runtime?: Runtime;
}

type Settings =
  & Required<Omit<RelayOptions, "store" | "signal" | "observe" | "from" | "to" | "allowDuplicates" | "acceptSource">>
  & {
    readonly acceptSource: RelayOptions["acceptSource"];
    readonly stopped: () => boolean;
    readonly emit: (event: RelayEvent) => void;
    readonly count: (what: keyof RelayReport) => void;
    /** Messages whose delivery has begun, and that are neither settled nor parked. */
    readonly begun: Set<string>;
    /** A busy database passes, which is told. */
    readonly passes: (error: unknown, afterMs: number) => boolean;
    readonly signal: AbortSignal | undefined;
  };

type RelayClaims = Pick<ClaimStore, "claimAll" | "completeAll" | "renew" | "fail" | "resolve">;

/** A relay's claims where there is no store: attempts are counted, nothing is kept. */
function unclaimed(): RelayClaims {
  const attempts = new Map<string, number>();
  return {
    claimAll: (claims) =>
      Promise.resolve(claims.map(({ key: { key } }) => {
        const attempt = (attempts.get(key) ?? 0) + 1;
        attempts.set(key, attempt);
        return { state: "claimed", fence: attempt, attempt, generation: 1, request: null };
      })),
    completeAll: (completions) => {
      for (const { key } of completions) attempts.delete(key.key);
      return Promise.resolve(completions.map(() => true));
    },
    renew: () => Promise.resolve(),
    fail: (key, _, { as, retryMs }) => {
      if (retryMs === undefined) attempts.delete(key.key);
      return Promise.resolve(as === "rejected" ? "rejected" : "waiting");
    },
    resolve: () => Promise.resolve(),
  };
}

/** Gives a call a signal that fires after `ms`. */
async function withDeadline<T>(runtime: Runtime, ms: number, run: (signal: AbortSignal) => Promise<T>): Promise<T> {
  const stop = new AbortController();
  const over = new AbortController();
  runtime.sleep(ms, over.signal).then(() => stop.abort(new Error(`no answer within ${ms} ms`)));
  try {
    return await run(stop.signal);
  } finally {
    over.abort();
  }
}

/** Lets the calls that come while one is under way ride together in the next: one transaction for all (group commit). */
function grouped<A, B>(run: (items: readonly A[]) => Promise<readonly B[]>): (item: A) => Promise<B> {
  let queue: { item: A; resolve(answer: B): void; reject(error: unknown): void }[] = [];
  let busy = false;
  async function flush(): Promise<void> {
    busy = true;
    for (let group; (group = queue).length > 0;) {
      queue = [];
      try {
        const answers = await run(group.map(({ item }) => item));
        group.forEach(({ resolve }, i) => resolve(answers[i]!));
      } catch (error) {
        for (const { reject } of group) reject(error);
      }
    }
    busy = false;
  }
  return (item) =>
    new Promise((resolve, reject) => {
      queue.push({ item, resolve, reject });
      if (!busy) {
        busy = true;
        queueMicrotask(flush);
      }
    });
}

/** Identifies a relayed message: its bytes stay in the source. `traceparent` says who asked, not what for. */
async function fingerprintOf({ topic, key, value, headers }: Comparable): Promise<string> {
  const rest = Object.fromEntries(Object.entries(headers).filter(([name]) => name.toLowerCase() !== "traceparent"));
  const head = encoder.encode(canonical([topic, key, value === null, rest]) + "\n");
  const bytes = new Uint8Array(head.length + (value?.length ?? 0));
  bytes.set(head);
  if (value) bytes.set(value, head.length);
  return `message-1:${await sha256(bytes)}`;
}

interface Lane {
  readonly messages: Message[];
  readyAt: number;
  running: boolean;
}

/** The claimed protocol, and the plain one: message by message, a lane per key, lanes in parallel. */
async function deliverClaimed(
  o: Settings,
  source: SourceSession,
  sink: CallSink,
  store: RelayClaims,
  repeat: CallSink["repeat"],
): Promise<void> {
  const { name: relay, runtime } = o;
  const lanes = new Map<string, Lane>();
  const inHand = new Set<string>();
  // What left the hand while a read was under way: its answer may be older. A message of a key that was held back meanwhile
  // must wait for the next read, which knows what is before it.
  const gone = new Set<string>();
  const heldBack = new Set<string>();
  const doubts = new Map<string, number>();
  const { begun } = o;
  const repeatWithinMs = repeat === "same-key" ? repeatWithin(sink.dedupeWindowMs ?? 0) : undefined;
  let active = 0;
  let idle = false;
  /** Any failure of source or store but a busy database ends the relay, once the calls under way are over. */
  let failure: { readonly error: unknown } | undefined;
  let bell = new AbortController();
  const wake = () => bell.abort();
  o.signal?.addEventListener("abort", wake);
  const claim = grouped(store.claimAll);
  const complete = grouped((completions: readonly Completion[]) => record(() => store.completeAll(completions)));
  const settle = grouped(async (messages: readonly Message[]) => {
    await record(() => source.settle(messages));
    return messages.map(() => undefined);
  });
  const park = grouped(async (parks: readonly Park[]) => {
    await record(() => source.park(parks));
    return parks.map(() => undefined);
  });
  const about = ({ id, topic, key, time }: Message) => ({ relay, id, topic, key, time });
  const stopping = () => failure !== undefined || o.stopped();

  /** A database that is busy for longer than a lease still learns the outcome: the fence, not the lease, lets it. */
  function record<T>(write: () => Promise<T>): Promise<T> {
    return insist(
      runtime,
      write,
      (error, attempt, afterMs) => !stopping() && o.passes(error, afterMs) || fewTimes(error, attempt),
    );
  }

  /** Whether the lane goes on with its next message. */
  type Next = "next" | "again" | "held";

  async function delivered(message: Message, attempt: number, ms: number, found: boolean): Promise<Next> {
    await settle(message);
    o.count("delivered");
    o.emit({ type: "delivered", ...about(message), attempt, ms, found });
    return "next";
  }
  async function setAside(
    message: Message,
    reason: string,
    doubt: boolean,
    more: Pick<Park, "attempts" | "untold"> = {},
  ): Promise<Next> {
    await park({ message, reason, retryMs: null, ...more });
    o.count(doubt ? "uncertain" : "parked");
    o.emit({ type: doubt ? "uncertain" : "parked", ...about(message), reason });
    return o.onPark === "block" ? "held" : "next";
  }
  async function retry(message: Message, reason: string, attempt: number, retryMs: number): Promise<Next> {
    await park({ message, reason, retryMs });
    o.emit({ type: "retried", ...about(message), attempt, afterMs: retryMs, reason });
    return "held";
  }
  function leaseLost(message: Message): Next {
    o.emit({ type: "lease_lost", ...about(message) });
    return "again"; // The next claim tells the truth.
  }

  async function reconcile(message: Message, claim: Claim & { state: "uncertain" }): Promise<Next> {
    const key = { scope: relay, key: message.id };
    if (!sink.reconcile) return await setAside(message, "its call was interrupted, and the outcome is not known", true);
    if (claim.ageMs < o.settleMs) {
      await park({ message, reason: "in doubt: the target will be asked", retryMs: o.settleMs - claim.ageMs });
      return "held";
    }
    const idempotencyKey = generationKey(message.id, claim.generation);
    let found: Found<Json>;
    try {
      found = await withDeadline(
        runtime,
        o.leaseMs,
        (signal) => sink.reconcile!(message, { idempotencyKey, number: 0, signal }),
      );
    } catch (error) {
      const asked = (doubts.get(message.id) ?? 0) + 1;
      doubts.set(message.id, asked);
      const reason = `in doubt, and asking the target failed: ${reasonOf(error)}`;
      if (asked < o.attempts) {
        return await retry(message, reason, asked, backOff(asked, o.minRetryMs, o.maxRetryMs, runtime));
      }
      doubts.delete(message.id);
      return await setAside(message, reason, true);
    }
    doubts.delete(message.id);
    if (found.state === "unknown") return await setAside(message, "in doubt, and the target cannot tell", true);
    if (found.state === "done") {
      const recorded = await complete({ key, fence: claim.fence, result: found.result });
      return recorded ? await delivered(message, 0, 0, true) : "again";
    }
    try {
      await store.resolve(key, { as: "absent" }, claim.fence);
    } catch (error) {
      if (!isCode(error, "lease_lost")) throw error;
    }
    return "again";
  }

  async function attempt(message: Message, claimed: Claim & { state: "claimed" }, since: number): Promise<Next> {
    const { fence, attempt } = claimed;
    const key = { scope: relay, key: message.id };
    o.emit({ type: "claimed", ...about(message), attempt });
    let result: Json;
    try {
      // Refused by us; the store makes it a doubt if one of the attempts may have happened.
      if (attempt > o.attempts) throw rejected("every attempt failed or was interrupted");
      const idempotencyKey = generationKey(message.id, claimed.generation);
      result = await underLease(
        { store, key, fence, leaseMs: o.leaseMs, since, runtime },
        (signal) => sink.deliver(message, { idempotencyKey, number: attempt, signal }),
      );
    } catch (error) {
      const known = outcomeOf(error);
      const reason = reasonOf(error);
      const last = attempt >= o.attempts;
      const again = known?.as !== "rejected" && !last && (known !== undefined || repeat !== "never");
      // Giving up is a refusal of ours: only a person lets it run again, whichever relay has the message in hand.
      const as = known ? again ? "retryable" : "rejected" : "unknown";
      const backOffMs = backOff(attempt, o.minRetryMs, o.maxRetryMs, runtime);
      const retryMs = again ? Math.max(known?.afterMs ?? 0, backOffMs) : undefined;
      let state: EffectState;
      try {
        state = await record(() => store.fail(key, fence, { as, reason, result: known?.result, retryMs }));
      } catch (failed) {
        if (isCode(failed, "lease_lost")) return leaseLost(message);
        throw failed;
      }
      if (retryMs !== undefined) return await retry(message, reason, attempt, retryMs);
      if (state === "uncertain" && sink.reconcile) return "again";
      return await setAside(message, reason, state === "uncertain", { attempts: attempt });
    }
    if (!await complete({ key, fence, result })) return leaseLost(message);
    if (encodeResult(result).omitted) o.emit({ type: "result_omitted", ...about(message) });
    return await delivered(message, attempt, runtime.now() - since, false);
  }

  async function step(lane: Lane, message: Message): Promise<Next> {
    begun.add(message.id);
    const fingerprint = await fingerprintOf(source.comparable?.(message) ?? message);
    const since = runtime.now();
    const answer = await claim({ key: { scope: relay, key: message.id }, leaseMs: o.leaseMs, fingerprint, repeatWithinMs });
    switch (answer.state) {
      case "claimed":
        return await attempt(message, answer, since);
      case "done":
        return await delivered(message, 0, 0, true);
      case "uncertain":
        return await reconcile(message, answer);
      case "rejected":
        return await setAside(message, answer.reason, false);
      case "mismatch": {
        const what = source.comparable ? "value" : "topic, key, value or headers";
        return await setAside(message, `the id was used before, with another ${what}`, false, { untold: true });
      }
      case "busy":
        // Another relay has it, or its row outlived a crash between recording a failure and postponing the message.
        begun.delete(message.id);
        lane.readyAt = runtime.now() + Math.min(answer.retryMs, 100);
        return "again";
    }
  }

  async function work(key: string, lane: Lane): Promise<void> {
    active++;
    lane.running = true;
    try {
      while (lane.messages.length > 0 && lane.readyAt <= runtime.now() && !stopping()) {
        const message = lane.messages[0]!;
        const next = await step(lane, message);
        if (next === "again") continue;
        // Held back: the source will hand the rest of the key out again when its first message may go.
        for (const { id } of lane.messages.splice(0, next === "held" ? Infinity : 1)) {
          inHand.delete(id);
          begun.delete(id);
          gone.add(id);
        }
        if (next === "held") heldBack.add(key);
      }
    } catch (error) {
      // Told to stop, and an outcome could not be written down: that is no good end.
      if (stopping() || !o.passes(error, 1000)) failure ??= { error };
      lane.readyAt = runtime.now() + 1000;
    }
    if (lane.messages.length === 0) lanes.delete(key);
    lane.running = false;
    active--;
    wake();
  }

  for (;;) {
    bell = new AbortController();
    if (stopping() && active === 0) break;
    let waitMs: number | null = null;
    let readable = false;
    let stale = false;
    const reads = inHand.size <= o.batch / 2;
    if (reads && !stopping()) {
      gone.clear();
      heldBack.clear();
      try {
        const read = await source.read({ rows: inHand.size + o.batch, bytes: o.batchBytes });
        readable = true;
        waitMs = read.waitMs;
        for (const message of read.messages) {
          if (inHand.has(message.id)) continue;
          const key = message.key === null ? `i${message.id}` : `k${message.key}`;
          stale ||= gone.has(message.id) || heldBack.has(key);
          if (stale) continue;
          inHand.add(message.id);
          const lane = lanes.get(key) ?? { messages: [], readyAt: 0, running: false };
          lane.messages.push(message);
          lanes.set(key, lane);
        }
      } catch (error) {
        const asks = isCode(error, "diverged") && o.acceptSource !== undefined;
        if (asks && inHand.size === 0 && await o.acceptSource!(reasonOf(error))) {
          await source.adopt([]);
          o.emit({ type: "accepted", relay, n: 0, reason: reasonOf(error) });
          stale = true;
        } else if (!(asks && inHand.size > 0) && !o.passes(error, o.pollMs)) failure ??= { error };
      }
      const rests = inHand.size === 0 && active === 0 && readable && !stale;
      if (rests && o.drain && waitMs === null) break;
      // A source that is to be asked again at once may have more.
      if (rests && !idle && waitMs !== 0) o.emit({ type: "idle", relay });
      idle = rests && waitMs !== 0;
    }
    const now = runtime.now();
    let wakeAt = stale ? now : reads ? now + Math.min(o.pollMs, waitMs ?? o.pollMs) : Infinity;
    if (!stopping()) {
      for (const [key, lane] of lanes) {
        if (active >= o.lanes) break;
        if (lane.running) continue;
        if (lane.readyAt <= now) work(key, lane);
        else wakeAt = Math.min(wakeAt, lane.readyAt);
      }
    }
    await (source.wait ?? runtime.sleep)(wakeAt - now, bell.signal);
  }
  o.signal?.removeEventListener("abort", wake);
  if (failure) throw failure.error;
}

/**
 * For atomic sinks: how much of its last positions is enough to repair a source that went back in time. Drops the oldest
 * until at most 1000 batches and 100,000 rows are left, but never the last two.
 */
export function boundRing(ring: Position[]): Position[] {
  let rows = ring.reduce((sum, position) => sum + countOf(position), 0);
  let drop = 0;
  while (ring.length - drop > 1000 || (rows > 100_000 && ring.length - drop > 2)) rows -= countOf(ring[drop++]!);
  if (drop > 0) ring.splice(0, drop);
  return ring;
}

/** A position with its rows as text: as objects 100,000 rows are 14 MB, which the garbage collector visits again and again. */
function compact({ n, uid, prev, rows }: Position): CompactPosition {
  const text = JSON.stringify(rows);
  return {
    n,
    uid,
    prev,
    count: rows.length,
    get rows() {
      return JSON.parse(text);
    },
  };
}
type CompactPosition = Position & { readonly count?: number };
const countOf = (position: CompactPosition): number => position.count ?? position.rows.length;

/** The sealed protocol: one batch after the other, each with its position. */
async function deliverSealed(o: Settings, source: SourceSession, sink: AtomicSink): Promise<void> {
  const { name: relay, runtime } = o;
  const attempts = new Map<string, number>();
  /** How many messages a batch has while one is refused: so many before it, or one where it is to be found; for how many more. */
  let few = { rows: o.batch, left: 0 };
  let failures = 0;
  /** Since when it stands by. */
  let fencedSince: number | undefined;
  let fencedAt = -Infinity;
  /** What was on its way when the last session broke. */
  let inFlight: Batch | undefined;
  /** Why the source is to go on behind the sink's last batch. */
  let accepted: string | undefined;

  function told(batch: Batch, ms: number, found: boolean): void {
    for (const { id, topic, key, time } of batch.messages) {
      const before = attempts.size === 0 ? undefined : attempts.get(id);
      const attempt = (before ?? 0) + 1;
      if (before !== undefined) attempts.delete(id);
      o.count("delivered");
      o.emit({ type: "delivered", relay, id, topic, key, time, attempt, ms, found });
    }
  }

  async function refused(ring: readonly Position[], { messages }: Batch, error: RefusedMessage): Promise<void> {
    const message = error[REFUSED];
    if (message) await refusedOne(ring, message, error.cause);
    else await source.unseal(ring, []);
    const before = message ? messages.indexOf(message) : 0;
    if (!message) few = { rows: 1, left: messages.length };
    else if (before > 0) few = { rows: before, left: before };
    else few.left--;
  }
  async function refusedOne(ring: readonly Position[], message: Message, error: unknown): Promise<void> {
    const { id, topic, key, time } = message;
    const attempt = (attempts.get(id) ?? 0) + 1;
    const known = outcomeOf(error);
    const again = known?.as !== "rejected" && attempt < o.attempts;
    const backOffMs = backOff(attempt, o.minRetryMs, o.maxRetryMs, runtime);
    const retryMs = again ? Math.max(known?.afterMs ?? 0, backOffMs) : null;
    const reason = reasonOf(error);
    await source.unseal(ring, [{ message, reason, retryMs, attempts: attempt }]);
    if (retryMs === null) {
      attempts.delete(id);
      o.count("parked");
      o.emit({ type: "parked", relay, id, topic, key, time, reason });
    } else {
      attempts.set(id, attempt);
      o.emit({ type: "retried", relay, id, topic, key, time, attempt, afterMs: retryMs, reason });
    }
  }

  async function run(session: AtomicSession, ring: Position[]): Promise<void> {
    let idle = false;
    const seal = async () => {
      const rows = few.left > 0 ? Math.min(few.rows, o.batch) : o.batch;
      const sealed = await source.seal(ring, { rows, bytes: o.batchBytes });
      if (sealed.repaired.length > 0) {
        const ids = sealed.repaired.flatMap(({ rows }) => rows.map(([, id]) => id));
        o.emit({ type: "repaired", relay, batches: sealed.repaired.length, ids });
      }
      return sealed;
    };
    let sealed = await seal();
    let fresh = true;
    while (!o.stopped()) {
      const cursor = ring.at(-1) ?? START;
      const batch = sealed.batches.find(({ n, prev }) => n === cursor.n + 1 && prev === cursor.uid);
      if (!batch) {
        if (sealed.batches.length > 0) {
          if (fresh) {
            throw new EffectError("diverged", `${sink.name} ends at batch ${cursor.n}, but none of the source follows`);
          }
        } else {
          if (o.drain && sealed.waitMs === null) return;
          if (!idle && sealed.waitMs !== 0) o.emit({ type: "idle", relay });
          idle = sealed.waitMs !== 0;
          fencedSince = undefined;
          await (source.wait ?? runtime.sleep)(Math.min(o.pollMs, sealed.waitMs ?? o.pollMs), o.signal);
        }
        sealed = await seal();
        fresh = true;
        continue;
      }
      idle = fresh = false;
      const since = runtime.now();
      inFlight = batch;
      // The next batch is sealed while this one is on its way; its number alone says that it comes after.
      const [committed, ahead] = await Promise.allSettled([session.commit(batch), seal()]);
      if (committed.status === "rejected") {
        const error: unknown = committed.reason;
        if (!(error instanceof Error && REFUSED in error)) throw error;
        inFlight = undefined;
        await refused(ring, batch, error as RefusedMessage);
        sealed = await seal();
        fresh = true;
        continue;
      }
      ring.push(compact(batch));
      boundRing(ring);
      few.left -= batch.messages.length;
      failures = 0;
      fencedSince = undefined;
      inFlight = undefined;
      told(batch, runtime.now() - since, false);
      if (ahead.status === "rejected") throw ahead.reason;
      sealed = ahead.value;
    }
  }

  while (!o.stopped()) {
    let session: AtomicSession | undefined;
    try {
      const floor = await source.settled();
      session = await sink.open({ relay, source: source.id, ...source.shard ? { shard: source.shard } : {} });
      const ring: Position[] = session.ring.map(compact);
      const cursor = ring.at(-1) ?? START;
      if (accepted) {
        await source.adopt(ring);
        o.emit({ type: "accepted", relay, n: cursor.n, reason: accepted });
        accepted = undefined;
      }
      // The answer was lost, the batch was not.
      if (inFlight && ring.some(({ uid }) => uid === inFlight!.uid)) told(inFlight, 0, true);
      inFlight = undefined;
      if (cursor.n < floor) {
        throw new EffectError(
          "cursor_lost",
          `${sink.name} ends at batch ${cursor.n}, but ${floor} were delivered: it was removed, emptied, replaced or damaged. ` +
            `Put it back, or find out where it ends (of Kafka: cursor rebuild), or start a new relay name for what is still in the outbox`,
        );
      }
      return await run(session, ring);
    } catch (error) {
      if (isCode(error, "diverged") && await o.acceptSource?.(reasonOf(error))) {
        accepted = reasonOf(error);
        continue;
      }
      const fenced = isCode(error, "fenced");
      if (!fenced && !isPassing(error)) throw error;
      // Whoever has lost the source begins anew from the outside, if at all: it may be cut into other shards by now.
      if (fenced && source.exclusive) {
        const still = await source.settled().then(() => true, (lost) => !isCode(lost, "fenced"));
        if (!still) throw error;
      }
      // Fenced twice in a row by a sink that lets in whoever comes last: there is another relay, and only one may go on.
      const inTurns = fenced && sink.fences === true && !source.exclusive && runtime.now() - fencedAt < o.leaseMs;
      const afterMs = inTurns
        ? Math.ceil(o.leaseMs * (1 + runtime.random()) / 2)
        : backOff(fenced ? 3 : ++failures, o.minRetryMs, o.maxRetryMs, runtime);
      if (o.drain && failures > o.attempts) throw error;
      if (fenced) {
        fencedAt = runtime.now();
        if (fencedSince === undefined) o.emit({ type: "fenced", relay, reason: reasonOf(error) });
        fencedSince ??= runtime.now();
        if (o.drain && runtime.now() - fencedSince > o.leaseMs) throw error;
      } else {
        o.emit({ type: "failed", relay, reason: reasonOf(error), afterMs });
      }
      await session?.close();
      session = undefined;
      await runtime.sleep(afterMs, o.signal);
    } finally {
      await session?.close();
    }
  }
}

/**
 * Moves the messages of a source into a sink under the strongest protocol that both ends allow. Returns when drained or told
 * to stop.
 *
 * @throws {TypeError} If calls cannot be claimed for want of a store, and duplicates are not allowed.
 * @throws {EffectError} `source_invalid`, `sink_invalid`, `diverged`, `cursor_lost`; `fenced` if another relay holds the
 * sink for as long as a lease while draining; `busy` if it is told to stop and the store or source stays busy. The errors of the ends' own clients pass through.
 */
export async function relay(options: RelayOptions): Promise<RelayReport> {
  const { name = "default", from, to, store, drain = false, signal, lanes = 8 } = options;
  const batch = options.batch ?? (to.kind === "atomic" ? to.batch : undefined) ?? 100;
  const { batchBytes = 8_388_608, leaseMs = 30_000, attempts = 10, onPark = "block", runtime = realRuntime } = options;
  const { minRetryMs = 200, maxRetryMs = 60_000, settleMs = 5_000, pollMs = 50 } = options;
  checkText("relay name", name);
  integer("lanes", lanes, 1);
  integer("batch", batch, 1);
  integer("batchBytes", batchBytes, 1);
  integer("leaseMs", leaseMs, 10);
  integer("attempts", attempts, 1);
  integer("minRetryMs", minRetryMs, 0);
  integer("maxRetryMs", maxRetryMs, minRetryMs);
  integer("settleMs", settleMs, 0);
  integer("pollMs", pollMs, 1);
  const promise = guarantee(from, to, store);
  if (promise.protocol === "plain" && !options.allowDuplicates && to.kind === "call" && to.repeat !== "always") {
    throw new TypeError(`Cannot relay into ${to.name}: give a store for its claims, or allow duplicates`);
  }
  if (to.kind === "call" && to.repeat === "same-key") repeatWithin(to.dedupeWindowMs ?? 0);
  const report = { delivered: 0, parked: 0, uncertain: 0 };
  const emit = (event: RelayEvent) => options.observe?.(event);
  const count = (what: keyof RelayReport) => report[what]++;
  const stopped = () => signal?.aborted ?? false;
  const begun = new Set<string>();
  const passes = (error: unknown, afterMs: number) => {
    if (!isCode(error, "busy")) return false;
    emit({ type: "failed", relay: name, reason: reasonOf(error), afterMs });
    return true;
  };
  const times = { leaseMs, minRetryMs, maxRetryMs, settleMs, pollMs };
  const o = {
    name,
    drain,
    lanes,
    batch,
    batchBytes,
    attempts,
    onPark,
    runtime,
    signal,
    emit,
    count,
    stopped,
    passes,
    begun,
    acceptSource: options.acceptSource,
    ...times,
  };

  const source = await insist(
    runtime,
    () =>
      from.open({ relay: name, protocol: promise.protocol, onPark, leaseMs, original: to.kind === "atomic" && to.fences }),
    (error, _, afterMs) => !drain && passes(error, afterMs) && !stopped(),
  );
  emit({ type: "started", relay: name, from: from.name, to: to.name, guarantee: promise });
  const over = new AbortController();
  async function stayAlive(): Promise<void> {
    for (;;) {
      await runtime.sleep(leaseMs / 3, over.signal);
      if (over.signal.aborted) return;
      // A source that is away for a moment fails the relay's own calls as well; this one need not.
      await source.renew().catch(() => {});
    }
  }
  stayAlive();
  const claims = promise.protocol === "claimed" ? store : undefined;
  let drained = false;
  try {
    if (to.kind === "atomic") await deliverSealed(o, source, to);
    else await deliverClaimed(o, source, to, claims ?? unclaimed(), claims ? to.repeat : "always");
    drained = !stopped();
  } finally {
    over.abort();
    // If this fails the registration ends by itself; what went wrong before matters more.
    // What the sealed protocol leaves behind are batches, which the source sees itself.
    const settled = to.kind === "atomic" || begun.size === 0 && (drained || !source.inherited);
    await source.close(settled).catch(() => {});
    emit({ type: "stopped", relay: name, ...report });
  }
  return report;
}
