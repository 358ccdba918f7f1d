/**
 * What a store, a source, an atomic sink and a relay must do, as plain cases for any test runner: two handles on one storage,
 * no runner inside, and nothing that only one runtime has.
 *
 * ```ts
 * import { memoryStore } from "@effectonce/effectonce/memory";
 * import { storeCases, type StoreHarness } from "@effectonce/effectonce/conformance";
 *
 * const harness: StoreHarness = {
 *   open() {
 *     let now = Date.now();
 *     const store = memoryStore({ now: () => now });
 *     const advance = (ms: number) => Promise.resolve(void (now += ms));
 *     return Promise.resolve({ store, again: store, advance, close: () => Promise.resolve() });
 *   },
 *   skip: { "a transaction that calls its own store ends in busy, not in a deadlock": "waits five seconds" },
 * };
 * for (const { name, run } of storeCases) {
 *   if (!(name in (harness.skip ?? {}))) await run(harness); // With Deno: Deno.test(name, () => run(harness))
 * }
 * ```
 *
 * Each case opens its own storage and fails by throwing. A requirement that an implementation cannot meet goes into the
 * harness's `skip`, with the reason.
 *
 * @module
 */
import {
  type AtomicSession,
  type AtomicSink,
  type AttemptFailure,
  type Batch,
  type CallSink,
  type Claim,
  type ClaimOptions,
  type ClaimStore,
  createMessage,
  type Delivery,
  EffectError,
  type EffectErrorCode,
  type EffectKey,
  type EffectStore,
  type EffectTransaction,
  type Found,
  handler as realHandler,
  type HandlerOptions,
  type Json,
  type Message,
  type NewMessage,
  type Position,
  type PositionOwner,
  type ReadLimits,
  rejected,
  type RelayEvent,
  type RelayOptions,
  type RelayReport,
  retryable,
  type Runtime,
  type Source,
  type SourceOptions,
  type SourceSession,
  START,
} from "./mod.ts";
import { memoryOutbox, memoryStore } from "./adapters/memory.ts";
import { chainText, type OutboxOptions } from "./adapters/shared.ts";

/** One requirement. */
export interface Case<H> {
  /** The requirement, as a sentence. */
  readonly name: string;
  /** Resolves if the requirement is met; throws an error that says what was expected and what came. */
  run(harness: H): Promise<void>;
}

/** What all harnesses have. */
export interface Harness {
  /** Requirements that do not hold here: name and reason. For the runner: the cases do not look at it. */
  readonly skip?: Readonly<Record<string, string>>;
}

/** A storage that was opened for one case. */
export interface OpenStorage {
  /** Moves the storage's clock on. */
  advance(ms: number): Promise<void>;
  /** Removes the storage. */
  close(): Promise<void>;
}

/** Two stores on one fresh storage. */
export interface OpenStore extends OpenStorage {
  /** The first handle. */
  readonly store: EffectStore<unknown>;
  /** Another handle on the same storage, as another process has it. */
  readonly again: EffectStore<unknown>;
  /**
   * How long calls wait for each other before the error `busy`, in milliseconds of real time.
   *
   * @default {5_000}
   */
  readonly waitMs?: number;
}

/** Opens the store under test. */
export interface StoreHarness extends Harness {
  /** Makes a fresh storage. */
  open(): Promise<OpenStore>;
}

/** Sources on one fresh storage. */
export interface OpenSource extends OpenStorage {
  /** A source by the first handle. */
  source(options?: OutboxOptions): Source;
  /** A source by another handle on the same storage, as another process has it. */
  again(options?: OutboxOptions): Source;
  /**
   * How many characters the id of a message may have.
   *
   * @default {1024} Bytes of UTF-8.
   */
  readonly longestId?: number;
  /** Puts messages in, in this order, by one transaction. */
  enqueue(...messages: readonly NewMessage[]): Promise<void>;
  /** Lets a parked or waiting message go, as an operator who sees all topics; false if there is none. */
  release?(id: string): Promise<boolean>;
  /** Removes a parked or waiting message, as an operator who sees all topics; false if there is none. */
  discard?(id: string): Promise<boolean>;
  /** Keeps the present content of the storage; the function that comes back restores it, as a failover or a backup does. */
  snapshot?(): Promise<() => Promise<void>>;
}

/** Opens the source under test. */
export interface SourceHarness extends Harness {
  /** Makes a fresh storage. */
  open(): Promise<OpenSource>;
}

/** An atomic sink on a fresh storage. */
export interface OpenAtomicSink {
  /** The first handle. */
  readonly sink: AtomicSink;
  /** Another handle on the same storage, as another process has it. */
  again(): AtomicSink;
  /** The ids of the messages that were committed, in order. */
  contents(): Promise<readonly string[]>;
  /** A message with this id that the sink refuses; left out where it takes all. */
  refused?(id: string): Message;
  /** Removes the storage. */
  close(): Promise<void>;
}

/** Opens the atomic sink under test. */
export interface AtomicSinkHarness extends Harness {
  /** Makes a fresh storage. */
  open(): Promise<OpenAtomicSink>;
}

/** The relay under test. */
export interface RelayHarness extends Harness {
  /** As the package's `relay`. */
  readonly relay: (options: RelayOptions) => Promise<RelayReport>;
  /**
   * As the package's `handler`.
   *
   * @default {handler}
   */
  readonly handler?: <C>(
    store: EffectStore<C>,
    run: (message: Message, effects: EffectTransaction, client: C) => Promise<void>,
    options?: HandlerOptions,
  ) => AtomicSink;
}

// ----------------------------------------------------------------------------------------------------------- expectations

/** A text that is equal for equal values, whatever the order of their members. */
function show(value: unknown): string {
  if (value instanceof Uint8Array) return `bytes[${value.join(" ")}]`;
  if (value instanceof Date) return `time ${value.getTime()}`;
  if (Array.isArray(value)) return `[${value.map(show).join(", ")}]`;
  if (value instanceof Error) return `${value.name} "${value.message}"`;
  if (typeof value === "object" && value !== null) {
    const members = Object.entries(value).sort(([a], [b]) => a < b ? -1 : 1);
    return `{ ${members.map(([name, member]) => `${name}: ${show(member)}`).join(", ")} }`;
  }
  if (typeof value === "function") return "a function";
  return typeof value === "string" ? JSON.stringify(value) : String(value);
}

const shorten = (text: string): string => text.length > 400 ? `${text.slice(0, 400)}…` : text;

function expect(condition: boolean, what: string): void {
  if (!condition) throw new Error(`Expected ${what}`);
}

function expectEqual(actual: unknown, expected: unknown, what: string): void {
  const [got, wanted] = [show(actual), show(expected)];
  if (got !== wanted) throw new Error(`Expected ${what} to be ${shorten(wanted)}, got ${shorten(got)}`);
}

function expectBetween(actual: number | null, min: number, max: number, what: string): void {
  if (actual === null || !(actual >= min && actual <= max)) {
    throw new Error(`Expected ${what} to be from ${min} to ${max}, got ${actual}`);
  }
}

async function expectError(
  run: () => unknown,
  kinds: EffectErrorCode | "RangeError" | "TypeError" | readonly ("RangeError" | "TypeError")[],
  what: string,
): Promise<Error> {
  const wanted: readonly string[] = typeof kinds === "string" ? [kinds] : kinds;
  let answer: unknown;
  try {
    answer = await run();
  } catch (error) {
    // By code and name: two copies of a package make `instanceof` lie.
    if (error instanceof Error && (wanted.includes(error.name) || "code" in error && wanted.includes(String(error.code)))) {
      return error;
    }
    throw new Error(`Expected ${what} to fail with ${wanted.join(" or ")}, got ${show(error)}`, { cause: error });
  }
  throw new Error(`Expected ${what} to fail with ${wanted.join(" or ")}, got ${shorten(show(answer))}`);
}

function expectState<S extends Claim["state"]>(claim: Claim, state: S, what = "the claim"): Extract<Claim, { state: S }> {
  if (claim.state !== state) throw new Error(`Expected ${what} to be ${state}, got ${shorten(show(claim))}`);
  return claim as Extract<Claim, { state: S }>;
}

/** A deadline on real time, for what would wait for ever if it were wrong. */
async function expectWithin<T>(ms: number, work: Promise<T>, what: string): Promise<T> {
  let timer: ReturnType<typeof setTimeout> | undefined;
  const late = new Promise<never>((_, reject) => {
    timer = setTimeout(() => reject(new Error(`Expected ${what} within ${ms} ms`)), ms);
  });
  try {
    return await Promise.race([work, late]);
  } finally {
    clearTimeout(timer);
  }
}

const utf8 = new TextEncoder();
const range = (from: number, to: number): readonly number[] => Array.from({ length: to - from + 1 }, (_, i) => from + i);

// ----------------------------------------------------------------------------------------------------------------- stores

/** Long against what a case takes, so that a store with a real clock passes as well. */
const LEASE = 60_000;
const SOON = 10_000;
const YEAR = 31_536_000_000;
const KEY: EffectKey = { scope: "charge", key: "order-1" };
const HOLD: ClaimOptions = { leaseMs: LEASE };
const keyOf = (key: string, scope = KEY.scope): EffectKey => ({ scope, key });
const OWNER: PositionOwner = { relay: "relay", source: "outbox" };

function storeCase(name: string, check: (storage: OpenStore) => Promise<void>): Case<StoreHarness> {
  return {
    name,
    async run(harness) {
      const storage = await harness.open();
      try {
        await check(storage);
      } finally {
        await storage.close();
      }
    },
  };
}

const take = async (store: ClaimStore, key: EffectKey = KEY, options: Partial<ClaimOptions> = {}) =>
  expectState(await store.claim(key, { ...HOLD, ...options }), "claimed");
const stands = async <S extends Claim["state"]>(
  store: ClaimStore,
  state: S,
  key: EffectKey = KEY,
  options: Partial<ClaimOptions> = {},
) => expectState(await store.claim(key, { ...HOLD, ...options }), state);

/** Claims, and lets the lease end. */
async function interrupt({ store, advance }: OpenStore, key: EffectKey = KEY, options: Partial<ClaimOptions> = {}) {
  const claim = await take(store, key, options);
  await advance(LEASE + SOON);
  return claim;
}

async function refuse(store: ClaimStore, failure: Partial<AttemptFailure> = {}, key: EffectKey = KEY) {
  const { fence } = await take(store, key);
  return await store.fail(key, fence, { as: "rejected", reason: "card declined", ...failure });
}

async function recordOf(store: ClaimStore, key: EffectKey = KEY) {
  const [record] = await store.list({ scope: key.scope, key: key.key });
  if (!record) throw new Error(`Expected list() to have effect "${key.key}" of "${key.scope}"`);
  return record;
}

const positionOf = (n: number, suffix = ""): Position => ({
  n,
  uid: `uid-${n}${suffix}`,
  prev: n === 1 ? "" : `uid-${n - 1}`,
  rows: [[String(n * 10), `m-${n}${suffix}`], ["9007199254740993", "𝄞"]],
});

/** What every {@linkcode EffectStore} must do. */
export const storeCases: readonly Case<StoreHarness>[] = [
  // claim
  storeCase("claim() takes a free key, as fence 1, attempt 1 and generation 1", async ({ store }) => {
    const claim = await store.claim(KEY, HOLD);
    expectEqual(claim, { state: "claimed", fence: 1, attempt: 1, generation: 1, request: null }, "the first claim");
  }),
  storeCase("claim() is busy for a second handle while the lease holds", async ({ store, again, advance }) => {
    await take(store);
    expectBetween((await stands(again, "busy")).retryMs, 1, LEASE, "retryMs");
    await advance(LEASE - SOON);
    expectBetween((await stands(again, "busy")).retryMs, 1, SOON, "retryMs near the lease's end");
    await stands(store, "busy");
  }),
  storeCase("claim() is given to one of 50 callers at once, over both handles", async ({ store, again }) => {
    const claims = await Promise.all(range(1, 50).map((i) => (i % 2 ? store : again).claim(KEY, HOLD)));
    expectEqual(claims.filter(({ state }) => state === "claimed").length, 1, "the number of callers told `claimed`");
    expectEqual(claims.filter(({ state }) => state === "busy").length, 49, "the number of callers told `busy`");
  }),
  storeCase("claim() hands out the request as it was given", async ({ store }) => {
    const json = await take(store, keyOf("json"), { request: { amount: 5, to: "Zoë" } });
    expectEqual(json.request, utf8.encode('{"amount":5,"to":"Zoë"}'), "a JSON request");
    const bytes = await take(store, keyOf("bytes"), { request: new Uint8Array([0, 255, 128]) });
    expectEqual(bytes.request, new Uint8Array([0, 255, 128]), "a request of bytes");
    const empty = await take(store, keyOf("empty"), { request: new Uint8Array() });
    expectEqual(empty.request, new Uint8Array(), "an empty request");
  }),
  storeCase("claim() refuses a key that is empty, missing, ill-formed or too long", async ({ store }) => {
    const bad: readonly unknown[] = [
      ...["", undefined, null, 7, "a\0b", "\ud83c", "x".repeat(1025), "é".repeat(513)].flatMap((part) => [
        { scope: "charge", key: part },
        { scope: part, key: "order-1" },
      ]),
      undefined,
    ];
    for (const key of bad) {
      const what = `a claim of ${shorten(show(key))}`;
      await expectError(() => store.claim(key as EffectKey, HOLD), ["RangeError", "TypeError"], what);
    }
    expectEqual(await store.list(), [], "the effects");
  }),
  storeCase("claim() accepts the longest key allowed", async ({ store, again }) => {
    const key = keyOf("𝄞".repeat(256), "x".repeat(1024));
    const { fence } = await take(store, key);
    await store.complete(key, fence, "paid");
    expectEqual((await stands(again, "done", key)).result, "paid", "the result");
  }),
  storeCase("claim() compares keys byte for byte", async ({ store, again }) => {
    const long = "x".repeat(300);
    const keys = ["Order-1", "order-1", "order-1 ", " order-1", "örder-1", "o\u0308rder-1", "ｏrder-1", "straße", "strasse"];
    keys.push("𝄞", "𝄟", "\ufffd", "?", "order\t1", "order 1", `${long}a`, `${long}b`, "%", "_", "1", "01", "1.0", "null");
    for (const key of keys) await take(store, keyOf(key));
    for (const key of keys) await stands(again, "busy", keyOf(key));
    expectEqual((await again.list()).map(({ key }) => key).sort(), [...keys].sort(), "the keys");
  }),
  storeCase("claim() tells a key apart in another scope, also where scope and key run together", async ({ store }) => {
    for (const key of [keyOf("b:c", "a"), keyOf("c", "a:b"), keyOf("order-1", "a"), keyOf("order-1", "A")]) {
      await take(store, key);
    }
    for (const key of [keyOf('b"', "a"), keyOf('"b', "a"), keyOf("ab", "c"), keyOf("b", "ca")]) await take(store, key);
  }),
  storeCase("claim() refuses a lease that is not a whole number from 1", async ({ store }) => {
    for (const leaseMs of [0, -1, 1.5, NaN, Infinity]) {
      await expectError(() => store.claim(KEY, { leaseMs }), "RangeError", `a lease of ${leaseMs} ms`);
    }
  }),

  // complete
  storeCase("complete() makes an effect done for ever, for both handles", async ({ store, again, advance }) => {
    const { fence } = await take(store);
    await store.complete(KEY, fence, { paid: 5 });
    for (const wait of [0, LEASE + SOON, YEAR]) {
      await advance(wait);
      for (const handle of [store, again]) {
        const claim = await handle.claim(KEY, { ...HOLD, repeatWithinMs: YEAR });
        expectEqual(claim, { state: "done", result: { paid: 5 }, resultOmitted: false }, "the claim");
      }
    }
  }),
  storeCase("complete() with a fence that was overtaken is refused and changes nothing", async (storage) => {
    const { store, again } = storage;
    const first = await interrupt(storage);
    const second = await take(again, KEY, { repeatWithinMs: YEAR });
    await expectError(() => store.complete(KEY, first.fence, "late"), "lease_lost", "the late owner's complete()");
    await stands(store, "busy");
    await again.complete(KEY, second.fence, "paid");
    await expectError(() => store.complete(KEY, first.fence, "late"), "lease_lost", "the late owner's complete()");
    expectEqual((await stands(store, "done")).result, "paid", "the result");
  }),
  storeCase("complete() that comes too late leaves its outcome as evidence", async (storage) => {
    const { store, again } = storage;
    const first = await interrupt(storage);
    const second = await take(again, KEY, { repeatWithinMs: YEAR });
    await again.complete(KEY, second.fence, "paid");
    expectEqual((await recordOf(store)).evidence, null, "the evidence before");
    await expectError(() => store.complete(KEY, first.fence, { charge: "ch-1" }), "lease_lost", "the late complete()");
    const { evidence, result, state } = await recordOf(again);
    expectEqual({ result, state }, { result: "paid", state: "done" }, "the record");
    const text = JSON.stringify(evidence);
    expect(text.includes("ch-1") && text.includes(String(first.fence)), `fence and result in the evidence, got ${text}`);
  }),
  storeCase("complete() can be repeated, and keeps the first result", async ({ store, again, advance }) => {
    const { fence } = await take(store);
    await store.complete(KEY, fence, "paid");
    await store.complete(KEY, fence, "paid");
    await advance(LEASE + SOON);
    await again.complete(KEY, fence, "paid twice");
    expectEqual((await stands(store, "done")).result, "paid", "the result");
  }),
  storeCase("complete() after the lease's end counts as long as nobody has taken over", async (storage) => {
    const { fence } = await interrupt(storage);
    await storage.store.complete(KEY, fence, "paid");
    expectEqual((await stands(storage.again, "done", KEY, { repeatWithinMs: YEAR })).result, "paid", "the result");
  }),
  storeCase("complete() of an effect that was never claimed is refused", async ({ store }) => {
    await expectError(() => store.complete(KEY, 1, "paid"), "lease_lost", "complete()");
    expectEqual(await store.list(), [], "the effects");
  }),
  storeCase("complete() of an effect that was refused is refused itself", async ({ store }) => {
    await refuse(store);
    await expectError(() => store.complete(KEY, 1, "paid"), "lease_lost", "complete()");
    await stands(store, "rejected");
  }),

  // interrupted effects
  storeCase("an interrupted effect is uncertain without repeatWithinMs, and stays so", async (storage) => {
    const { store, again, advance } = storage;
    const { fence } = await interrupt(storage);
    const first = await stands(again, "uncertain");
    expectEqual(first.fence, fence, "the fence of the doubt");
    expectBetween(first.ageMs, SOON, LEASE, "the age of the doubt");
    await advance(YEAR);
    const later = await stands(store, "uncertain");
    expectEqual(later.since, first.since, "the start of the doubt");
    expectBetween(later.ageMs, YEAR + SOON, YEAR + LEASE, "the age of the doubt after a year");
  }),
  storeCase(
    "an interrupted effect is repeated within repeatWithinMs: a greater fence, the next attempt, the same request",
    async (storage) => {
      const { again, advance } = storage;
      const request = { amount: 5 };
      const first = await interrupt(storage, KEY, { request, repeatWithinMs: YEAR });
      const second = await take(again, KEY, { request, repeatWithinMs: YEAR });
      expect(second.fence > first.fence, `a fence over ${first.fence}, got ${second.fence}`);
      expectEqual([second.attempt, second.generation], [2, 1], "attempt and generation");
      expectEqual(second.request, utf8.encode('{"amount":5}'), "the request");
      await advance(LEASE + SOON);
      const third = await take(again, KEY, { request, repeatWithinMs: YEAR });
      expect(third.fence > second.fence, `a fence over ${second.fence}, got ${third.fence}`);
      expectEqual(third.attempt, 3, "the attempt");
    },
  ),
  storeCase("an interrupted effect is uncertain past repeatWithinMs from its first attempt", async (storage) => {
    const { store, again, advance } = storage;
    const repeatWithinMs = 3 * LEASE;
    await interrupt(storage);
    await take(store, KEY, { repeatWithinMs });
    await advance(LEASE + SOON);
    await take(again, KEY, { repeatWithinMs });
    await advance(LEASE + SOON); // Later than that from the first attempt, not from the latest.
    await stands(store, "uncertain", KEY, { repeatWithinMs });
    await stands(again, "uncertain", KEY, { repeatWithinMs });
  }),
  storeCase("a doubt stays until it is resolved, also where repeatWithinMs is given later", async (storage) => {
    const { store, again } = storage;
    await interrupt(storage, keyOf("interrupted"));
    await stands(again, "uncertain", keyOf("interrupted"));
    await refuse(store, { as: "unknown" }, keyOf("unknown"));
    for (const key of [keyOf("interrupted"), keyOf("unknown")]) {
      await stands(again, "uncertain", key, { repeatWithinMs: YEAR });
    }
  }),
  storeCase("a known outcome of the first owner ends the doubt, however late", async (storage) => {
    const { store, again, advance } = storage;
    const { fence } = await interrupt(storage);
    await stands(again, "uncertain");
    await advance(YEAR);
    await store.complete(KEY, fence, "paid");
    expectEqual((await stands(again, "done")).result, "paid", "the result");
  }),

  // fail
  storeCase(
    "fail() as retryable waits retryMs, then it is attempt 2, also without repeatWithinMs",
    async ({ store, again, advance }) => {
      const { fence } = await take(store);
      const state = await store.fail(KEY, fence, { as: "retryable", reason: "refused", retryMs: LEASE });
      expectEqual(state, "waiting", "the answer of fail()");
      expectBetween((await stands(again, "busy")).retryMs, LEASE - SOON, LEASE, "retryMs");
      await advance(LEASE - SOON);
      await stands(again, "busy");
      await advance(2 * SOON);
      const second = await take(again);
      expectEqual([second.attempt, second.generation], [2, 1], "attempt and generation");
      expect(second.fence > fence, `a fence over ${fence}, got ${second.fence}`);
    },
  ),
  storeCase("fail() as retryable without retryMs lets the effect be tried again at once", async ({ store, again }) => {
    const { fence } = await take(store);
    await store.fail(KEY, fence, { as: "retryable", reason: "refused" });
    expectEqual((await take(again)).attempt, 2, "the attempt");
  }),
  storeCase("fail() as rejected ends the effect for ever, with reason and answer", async ({ store, again, advance }) => {
    const { fence } = await take(store);
    const failure = { as: "rejected", reason: "card declined", result: { code: 402 } } as const;
    expectEqual(await store.fail(KEY, fence, failure), "rejected", "the answer of fail()");
    for (const wait of [0, YEAR]) {
      await advance(wait);
      const claim = await again.claim(KEY, { ...HOLD, repeatWithinMs: 2 * YEAR });
      expectEqual(claim, { state: "rejected", reason: "card declined", result: { code: 402 } }, "the claim");
    }
  }),
  storeCase("fail() as unknown leaves the effect uncertain", async ({ store, again }) => {
    const { fence } = await take(store);
    expectEqual(await store.fail(KEY, fence, { as: "unknown", reason: "reset" }), "uncertain", "the answer of fail()");
    const claim = await stands(again, "uncertain");
    expectBetween(claim.ageMs, 0, SOON, "the age of the doubt");
    expectEqual(claim.fence, fence, "the fence of the doubt");
    const { state, error } = await recordOf(store);
    expectEqual([state, error], ["uncertain", "reset"], "the record");
  }),
  storeCase("fail() as unknown with retryMs waits, and then asks for repeatWithinMs", async ({ store, again, advance }) => {
    for (const key of [keyOf("repeatable"), keyOf("not repeatable")]) {
      const { fence } = await take(store, key);
      const state = await store.fail(key, fence, { as: "unknown", reason: "reset", retryMs: LEASE });
      expectEqual(state, "waiting", "the answer of fail()");
      await stands(again, "busy", key, { repeatWithinMs: YEAR });
    }
    await advance(LEASE + SOON);
    const second = await take(again, keyOf("repeatable"), { repeatWithinMs: YEAR });
    expectEqual(second.attempt, 2, "the attempt");
    await stands(again, "uncertain", keyOf("not repeatable"));
  }),
  storeCase("fail() as rejected is uncertain after an attempt that may have happened", async (storage) => {
    const { store, again } = storage;
    await interrupt(storage);
    const { fence } = await take(store, KEY, { repeatWithinMs: YEAR });
    const state = await store.fail(KEY, fence, { as: "rejected", reason: "no such order" });
    expectEqual(state, "uncertain", "the answer of fail()");
    await stands(again, "uncertain");
  }),
  storeCase("fail() as retryable does not clear the doubt of an earlier attempt", async (storage) => {
    const { store, again } = storage;
    await interrupt(storage);
    const { fence } = await take(store, KEY, { repeatWithinMs: YEAR });
    await store.fail(KEY, fence, { as: "retryable", reason: "refused" });
    await stands(again, "uncertain");
  }),
  storeCase("fail() with a fence that was overtaken is refused, and leaves its outcome as evidence", async (storage) => {
    const { store, again } = storage;
    const first = await interrupt(storage);
    const second = await take(again, KEY, { repeatWithinMs: YEAR });
    for (const as of ["retryable", "rejected", "unknown"] as const) {
      const late = () => store.fail(KEY, first.fence, { as, reason: `too late: ${as}` });
      await expectError(late, "lease_lost", `the late owner's fail() as ${as}`);
      const { state, evidence } = await recordOf(store);
      expectEqual(state, "claimed", "the state");
      expect(JSON.stringify(evidence).includes(`too late: ${as}`), `the reason in the evidence, got ${show(evidence)}`);
    }
    await again.complete(KEY, second.fence, "paid");
  }),
  storeCase("fail() of an effect that is over is refused", async ({ store }) => {
    const { fence } = await take(store);
    await store.complete(KEY, fence, "paid");
    await expectError(() => store.fail(KEY, fence, { as: "retryable", reason: "?" }), "lease_lost", "fail()");
    await stands(store, "done");
    await refuse(store, {}, keyOf("refused"));
    const again = () => store.fail(keyOf("refused"), 1, { as: "retryable", reason: "?" });
    await expectError(again, "lease_lost", "fail() after a refusal");
    await expectError(
      () => store.fail(keyOf("missing"), 1, { as: "unknown", reason: "?" }),
      "lease_lost",
      "fail() of nothing",
    );
  }),

  // renew
  storeCase("renew() extends the lease from now", async ({ store, again, advance }) => {
    const { fence } = await take(store);
    for (let i = 0; i < 3; i++) {
      await advance(LEASE - SOON);
      await store.renew(KEY, fence, LEASE);
    }
    await advance(LEASE - SOON);
    await stands(again, "busy", KEY, { repeatWithinMs: YEAR });
    await advance(2 * SOON);
    await take(again, KEY, { repeatWithinMs: YEAR });
  }),
  storeCase("renew() does not shorten a lease", async ({ store, again, advance }) => {
    const { fence } = await take(store);
    await store.renew(KEY, fence, 1);
    await advance(LEASE - SOON);
    await stands(again, "busy", KEY, { repeatWithinMs: YEAR });
  }),
  storeCase("renew() is refused after the lease's end", async (storage) => {
    const { fence } = await interrupt(storage);
    await expectError(() => storage.store.renew(KEY, fence, LEASE), "lease_lost", "renew()");
    await take(storage.again, KEY, { repeatWithinMs: YEAR });
  }),
  storeCase("renew() with a fence that was overtaken is refused", async (storage) => {
    const { store, again, advance } = storage;
    const first = await interrupt(storage);
    await take(again, KEY, { repeatWithinMs: YEAR });
    await expectError(() => store.renew(KEY, first.fence, YEAR), "lease_lost", "renew()");
    await advance(LEASE + SOON);
    await take(again, KEY, { repeatWithinMs: YEAR });
  }),
  storeCase("renew() of an effect that is over is refused", async ({ store }) => {
    const { fence } = await take(store);
    await store.complete(KEY, fence);
    await expectError(() => store.renew(KEY, fence, LEASE), "lease_lost", "renew() of a done effect");
    await expectError(() => store.renew(keyOf("missing"), 1, LEASE), "lease_lost", "renew() of nothing");
  }),

  // requests
  storeCase("claim() is a mismatch for another request, whatever the effect's state", async (storage) => {
    const { store, again, advance } = storage;
    const request = { amount: 5 };
    const outcomes: readonly (readonly [EffectKey, (fence: number) => Promise<unknown>])[] = [
      [keyOf("claimed"), () => Promise.resolve()],
      [keyOf("done"), (fence) => store.complete(keyOf("done"), fence)],
      [keyOf("rejected"), (fence) => store.fail(keyOf("rejected"), fence, { as: "rejected", reason: "declined" })],
      [keyOf("waiting"), (fence) => store.fail(keyOf("waiting"), fence, { as: "retryable", reason: "refused" })],
      [keyOf("uncertain"), (fence) => store.fail(keyOf("uncertain"), fence, { as: "unknown", reason: "reset" })],
    ];
    for (const [key, end] of outcomes) {
      await end((await take(store, key, { request })).fence);
      for (const other of [{ amount: 6 }, { amount: "5" }, [5], utf8.encode('{"amount":5}'), undefined]) {
        await stands(again, "mismatch", key, { request: other, repeatWithinMs: YEAR });
      }
    }
    await advance(LEASE + SOON);
    await stands(again, "mismatch", keyOf("claimed"), { request: { amount: 6 }, repeatWithinMs: YEAR });
    expectEqual((await take(again, keyOf("waiting"), { request })).attempt, 2, "the attempt with the right request");
  }),
  storeCase(
    "claim() takes a request with its members in another order for the same, and hands out the first bytes",
    async (storage) => {
      const request = { to: { name: "Zoë", id: 7 }, amount: 5 };
      await interrupt(storage, KEY, { request });
      const reordered = { amount: 5, to: { id: 7, name: "Zoë" } };
      const second = await take(storage.again, KEY, { request: reordered, repeatWithinMs: YEAR });
      expectEqual(second.request, utf8.encode(JSON.stringify(request)), "the request");
    },
  ),
  storeCase("claim() compares a fingerprint in place of the request", async ({ store, again }) => {
    const { fence, request } = await take(store, KEY, { fingerprint: "sha256:1" });
    expectEqual(request, null, "the request");
    await stands(again, "busy", KEY, { fingerprint: "sha256:1" });
    await stands(again, "mismatch", KEY, { fingerprint: "sha256:2" });
    await store.complete(KEY, fence);
    await stands(again, "done", KEY, { fingerprint: "sha256:1" });
    await stands(again, "mismatch", KEY, { fingerprint: "sha256:2" });
  }),

  // results
  storeCase("complete() keeps a result as JSON", async ({ store, again }) => {
    const results: readonly Json[] = [0, -1.5e300, "", "Zoë 𝄞 \u2028 \"'\\", false, [], {}, [null, [1]], {
      a: { "b c": [true] },
    }];
    for (const [i, result] of results.entries()) {
      const { fence } = await take(store, keyOf(`${i}`));
      await store.complete(keyOf(`${i}`), fence, result);
      expectEqual(await stands(again, "done", keyOf(`${i}`)), { state: "done", result, resultOmitted: false }, "the claim");
    }
  }),
  storeCase("complete() keeps null, and no result as null", async ({ store, again }) => {
    await store.complete(keyOf("null"), (await take(store, keyOf("null"))).fence, null);
    await store.complete(keyOf("none"), (await take(store, keyOf("none"))).fence);
    for (const key of [keyOf("null"), keyOf("none")]) {
      expectEqual(await again.claim(key, HOLD), { state: "done", result: null, resultOmitted: false }, "the claim");
    }
  }),
  storeCase("complete() keeps a result of 64 KiB of JSON, and omits a larger one", async ({ store, again }) => {
    const results: readonly (readonly [string, boolean])[] = [
      ["x".repeat(65_534), true],
      ["x".repeat(65_535), false],
      ["é".repeat(32_767), true],
      ["é".repeat(32_768), false],
    ];
    for (const [i, [result, kept]] of results.entries()) {
      const { fence } = await take(store, keyOf(`${i}`));
      await store.complete(keyOf(`${i}`), fence, result);
      const claim = await stands(again, "done", keyOf(`${i}`));
      expectEqual(claim, { state: "done", result: kept ? result : null, resultOmitted: !kept }, `result ${i}`);
    }
  }),
  storeCase("complete() makes an effect done whose result is not JSON, and omits that", async ({ store, again }) => {
    const cycle: unknown[] = [];
    cycle.push(cycle);
    for (const [i, result] of [10n, cycle, () => 1, Symbol("paid")].entries()) {
      const { fence } = await take(store, keyOf(`${i}`));
      await store.complete(keyOf(`${i}`), fence, result as unknown as Json);
      const claim = await again.claim(keyOf(`${i}`), HOLD);
      expectEqual(claim, { state: "done", result: null, resultOmitted: true }, `the claim after ${String(typeof result)}`);
    }
  }),

  // resolve
  storeCase("resolve() as done ends a doubt with what was found", async (storage) => {
    const { store, again } = storage;
    await interrupt(storage);
    await stands(store, "uncertain");
    await again.resolve(KEY, { as: "done", result: { charge: "ch-1" } });
    expectEqual((await stands(store, "done")).result, { charge: "ch-1" }, "the result");
  }),
  storeCase("resolve() as absent lets a doubtful effect run anew: the next generation, attempt 1", async (storage) => {
    const { store, again } = storage;
    const { fence } = await interrupt(storage);
    await stands(store, "uncertain");
    await again.resolve(KEY, { as: "absent" });
    const claim = await take(store);
    expectEqual([claim.attempt, claim.generation], [1, 2], "attempt and generation");
    expect(claim.fence > fence, `a fence over ${fence}, got ${claim.fence}`);
  }),
  storeCase("resolve() as absent lifts a refusal: the next generation, attempt 1", async ({ store, again }) => {
    await refuse(store);
    await again.resolve(KEY, { as: "absent" });
    const claim = await take(store);
    expectEqual([claim.attempt, claim.generation], [1, 2], "attempt and generation");
  }),
  storeCase(
    "resolve() as absent keeps the generation of an effect that is known not to have happened",
    async ({ store, again }) => {
      const { fence } = await take(store);
      await store.fail(KEY, fence, { as: "retryable", reason: "refused", retryMs: YEAR });
      await again.resolve(KEY, { as: "absent" });
      const claim = await take(store);
      expectEqual([claim.attempt, claim.generation], [1, 1], "attempt and generation");
    },
  ),
  storeCase("resolve() as absent starts the time of repeatWithinMs anew", async (storage) => {
    const { store, again, advance } = storage;
    await interrupt(storage);
    await advance(YEAR);
    await again.resolve(KEY, { as: "absent" });
    await interrupt(storage);
    expectEqual((await take(store, KEY, { repeatWithinMs: 2 * LEASE })).attempt, 2, "the attempt");
  }),
  storeCase(
    "resolve() as retry repeats one in doubt under its key, for those who may; for others the doubt stays",
    async (storage) => {
      const { store, again } = storage;
      const { fence, generation } = await interrupt(storage);
      for (const _ of [1, 2]) {
        await stands(store, "uncertain");
        await again.resolve(KEY, { as: "retry" });
      }
      const claim = await take(again, KEY, { repeatWithinMs: YEAR });
      expectEqual([claim.attempt, claim.generation], [1, generation], "attempt and generation");
      await expectError(() => store.complete(KEY, fence, "late"), "lease_lost", "complete() of the first owner");
      await expectError(() => store.resolve(KEY, { as: "retry" }), "busy", "resolve() under a live lease");
      await store.fail(KEY, claim.fence, { as: "rejected", reason: "no" });
      await stands(store, "uncertain"); // Refused now, but the first attempt may have happened.
    },
  ),
  storeCase("resolve() as rejected ends a doubt for ever", async (storage) => {
    const { store, again, advance } = storage;
    await interrupt(storage);
    await again.resolve(KEY, { as: "rejected", reason: "paid in cash" });
    await advance(YEAR);
    const claim = await store.claim(KEY, { ...HOLD, repeatWithinMs: 2 * YEAR });
    expectEqual(claim, { state: "rejected", reason: "paid in cash", result: null }, "the claim");
  }),
  storeCase("resolve() under a live lease is busy", async ({ store, again }) => {
    const { fence } = await take(store);
    for (const resolution of [{ as: "done" }, { as: "absent" }, { as: "rejected", reason: "no" }] as const) {
      await expectError(() => again.resolve(KEY, resolution), "busy", `resolve() as ${resolution.as}`);
    }
    await store.complete(KEY, fence, "paid");
  }),
  storeCase("resolve() with a fence that was overtaken is refused", async (storage) => {
    const { store, again, advance } = storage;
    const first = await interrupt(storage);
    const second = await take(again, KEY, { repeatWithinMs: YEAR });
    await advance(LEASE + SOON);
    for (const resolution of [{ as: "done" }, { as: "absent" }, { as: "rejected", reason: "no" }] as const) {
      await expectError(() => store.resolve(KEY, resolution, first.fence), "lease_lost", `resolve() as ${resolution.as}`);
    }
    await store.resolve(KEY, { as: "done", result: "found" }, second.fence);
    expectEqual((await stands(again, "done")).result, "found", "the result");
  }),
  storeCase("resolve() refuses an effect that is done or missing", async ({ store, again }) => {
    const { fence } = await take(store);
    await store.complete(KEY, fence, "paid");
    for (
      const resolution of [{ as: "done", result: "other" }, { as: "absent" }, { as: "rejected", reason: "no" }] as const
    ) {
      await expectError(
        () => again.resolve(KEY, resolution),
        "RangeError",
        `resolve() as ${resolution.as} of a done effect`,
      );
      await expectError(() => again.resolve(keyOf("missing"), resolution), "RangeError", "resolve() of nothing");
    }
    expectEqual((await stands(store, "done")).result, "paid", "the result");
    expectEqual((await store.list()).length, 1, "the number of effects");
  }),
  storeCase("resolve() overtakes the owner before it", async (storage) => {
    const { store, again } = storage;
    const { fence } = await interrupt(storage);
    await again.resolve(KEY, { as: "absent" });
    await expectError(() => store.complete(KEY, fence, "late"), "lease_lost", "complete()");
    await expectError(() => store.renew(KEY, fence, LEASE), "lease_lost", "renew()");
    await take(again);
  }),

  // list, count, prune
  storeCase("list() gives effects in byte order of scope and key", async ({ store, again }) => {
    const ordered = [keyOf("Z", "A"), keyOf("a", "A"), keyOf("A", "a"), keyOf("a", "a"), keyOf("aa", "a"), keyOf("é", "a")];
    ordered.push(keyOf("\uffee", "a"), keyOf("𝄞", "a"), keyOf("a", "aa"), keyOf("a", "\uffee"), keyOf("a", "𝄞"));
    for (const key of ordered.toReversed()) await take(store, key);
    expectEqual((await again.list()).map(({ scope, key }) => ({ scope, key })), ordered, "the effects");
  }),
  storeCase("list() gives at most `limit`, and goes on behind `after`", async ({ store, again }) => {
    const keys = range(10, 22).flatMap((i) => [keyOf(`k${i}`, "a"), keyOf(`k${i}`, "b")]);
    for (const key of keys) await take(store, key);
    const found: string[] = [];
    for (let after: EffectKey | undefined, pages = 0;; pages++) {
      const page = await again.list({ limit: 4, after });
      expect(page.length <= 4 && pages < 20, `at most 4 effects a page and an end, got ${page.length} on page ${pages}`);
      if (page.length === 0) break;
      found.push(...page.map(({ scope, key }) => `${scope} ${key}`));
      after = page.at(-1);
    }
    expectEqual(found, keys.map(({ scope, key }) => `${scope} ${key}`).sort(), "the pages");
    expectEqual((await again.list({ scope: "a", after: keyOf("k20", "a") })).length, 2, "those of a scope behind one");
    for (const limit of [0, -1, 1.5]) await expectError(() => again.list({ limit }), "RangeError", `a limit of ${limit}`);
  }),
  storeCase("list() gives only the state, scope and key asked for", async (storage) => {
    const { store, again } = storage;
    await interrupt(storage, keyOf("uncertain"));
    await stands(store, "uncertain", keyOf("uncertain"));
    await store.complete(keyOf("done"), (await take(store, keyOf("done"))).fence);
    await refuse(store, {}, keyOf("rejected"));
    await refuse(store, { as: "retryable" }, keyOf("waiting"));
    await take(store, keyOf("claimed"));
    await take(store, keyOf("claimed", "mail"));
    for (const state of ["claimed", "waiting", "done", "rejected", "uncertain"] as const) {
      const found = await again.list({ state, scope: "charge" });
      expectEqual(found.map(({ key, state }) => [key, state]), [[state, state]], `the effects that are ${state}`);
    }
    expectEqual((await again.list({ scope: "mail" })).length, 1, "the number in a scope");
    expectEqual((await again.list({ key: "claimed" })).length, 2, "the number with a key");
    expectEqual(await again.list({ key: "claimed", state: "done" }), [], "what is not there");
  }),
  storeCase("list() tells attempts, time, reason and result", async ({ store, again, advance }) => {
    const { fence } = await take(store);
    await store.fail(KEY, fence, { as: "retryable", reason: "refused" });
    const waiting = await recordOf(again);
    expectEqual(
      [waiting.state, waiting.attempts, waiting.error],
      ["waiting", 1, "refused"],
      "the record of a waiting effect",
    );
    await advance(LEASE);
    const second = await take(store);
    const claimed = await recordOf(again);
    expectEqual([claimed.state, claimed.attempts, claimed.error], ["claimed", 2, null], "the record of a claimed effect");
    expectBetween(claimed.since.getTime() - waiting.since.getTime(), LEASE, LEASE + SOON, "the time between the changes");
    await store.complete(KEY, second.fence, { paid: 5 });
    const done = await recordOf(again);
    expectEqual(
      [done.state, done.error, done.result, done.evidence],
      ["done", null, { paid: 5 }, null],
      "the record when done",
    );
  }),
  storeCase("list() tells the end of the attempt that left a doubt, and why", async (storage) => {
    const { store, again } = storage;
    const { fence } = await take(store);
    await store.fail(KEY, fence, { as: "retryable", reason: "connection refused" });
    await interrupt(storage);
    const claim = await stands(again, "uncertain");
    const { state, since, error } = await recordOf(store);
    expectEqual([state, since], ["uncertain", claim.since], "state and time");
    const told = error !== null && error !== "connection refused";
    expect(told, `the reason to tell of the interruption, not of the attempt before it, got ${show(error)}`);
  }),
  storeCase("count() tells how many effects stand where", async (storage) => {
    const { store, again } = storage;
    const none = { claimed: 0, waiting: 0, done: 0, rejected: 0, uncertain: 0 };
    expectEqual(await again.count(), none, "the counts of nothing");
    for (const i of [1, 2, 3]) await store.complete(keyOf(`done ${i}`), (await take(store, keyOf(`done ${i}`))).fence);
    await interrupt(storage, keyOf("uncertain"));
    await stands(store, "uncertain", keyOf("uncertain"));
    await refuse(store, {}, keyOf("rejected"));
    await refuse(store, { as: "retryable" }, keyOf("waiting"));
    for (const i of [1, 2]) await take(store, keyOf(`claimed ${i}`));
    expectEqual(await again.count(), { claimed: 2, waiting: 1, done: 3, rejected: 1, uncertain: 1 }, "the counts");
  }),
  storeCase("count() of a scope tells of that one", async ({ store, again }) => {
    for (const scope of ["a", "b", "b "]) {
      const key = { scope, key: "1" };
      await store.complete(key, (await take(store, key)).fence);
    }
    await take(store, { scope: "b", key: "2" });
    const none = { claimed: 0, waiting: 0, done: 0, rejected: 0, uncertain: 0 };
    expectEqual(await again.count("b"), { ...none, claimed: 1, done: 1 }, "the counts of b");
    expectEqual(await again.count("c"), none, "the counts of c");
  }),
  storeCase("prune() forgets what ended long ago, and nothing else", async (storage) => {
    const { store, again, advance } = storage;
    await interrupt(storage, keyOf("uncertain"));
    await stands(store, "uncertain", keyOf("uncertain"));
    await store.complete(keyOf("done"), (await take(store, keyOf("done"))).fence);
    await refuse(store, {}, keyOf("rejected"));
    await refuse(store, { as: "retryable" }, keyOf("waiting"));
    await take(store, keyOf("claimed"));
    await advance(YEAR);
    await store.complete(keyOf("young"), (await take(store, keyOf("young"))).fence);
    expectEqual(await again.prune({ olderThanMs: 2 * YEAR }), 0, "the number forgotten that is two years old");
    expectEqual(await again.prune({ olderThanMs: LEASE }), 2, "the number forgotten");
    expectEqual((await store.list()).map(({ key }) => key), ["claimed", "uncertain", "waiting", "young"], "what is left");
    expectEqual((await take(store, keyOf("done"))).attempt, 1, "the attempt of a key that was forgotten");
  }),
  storeCase("prune() forgets at most `limit` in one go", async ({ store, again, advance }) => {
    await store.transaction((effects) => effects.claimAll(range(1, 25).map((i) => keyOf(`${i}`))));
    await advance(YEAR);
    const counts = [];
    for (let i = 0; i < 4; i++) counts.push(await again.prune({ olderThanMs: LEASE, limit: 10 }));
    expectEqual(counts, [10, 10, 5, 0], "the numbers forgotten");
    await expectError(() => again.prune({ olderThanMs: LEASE, limit: 0 }), "RangeError", "a limit of 0");
    await expectError(() => again.prune({ olderThanMs: -1 }), "RangeError", "a negative age");
  }),
  storeCase("prune() keeps an effect whose message is in the outbox still", async ({ store, again, advance }) => {
    await store.transaction((effects) => effects.enqueue({ id: "m-1", topic: "orders", value: 1 }));
    for (const key of [keyOf("m-1"), keyOf("m-2")]) await store.complete(key, (await take(store, key)).fence);
    await advance(YEAR);
    expectEqual(await again.prune({ olderThanMs: LEASE }), 1, "the number forgotten");
    await stands(store, "done", keyOf("m-1"));
  }),
  storeCase("prune() keeps an effect whose message is in another outbox still", async ({ store, again, advance }) => {
    const keys = range(1, 9).map((i) => keyOf(`m-${i}`));
    await store.transaction((effects) => effects.claimAll(keys));
    await advance(YEAR);
    const find = (id: string) => {
      const state = id === "m-8" ? "delivered" as const : "waiting" as const;
      return Promise.resolve(id === "m-9" ? undefined : { id, topic: "orders", key: null, state, reason: "" });
    };
    let forgotten = 0;
    for (let n = 1; n > 0; forgotten += n) n = await again.prune({ olderThanMs: LEASE, limit: 2, outboxes: [{ find }] });
    expectEqual(forgotten, 2, "the number forgotten");
    expectEqual((await store.list()).map(({ key }) => key), keys.slice(0, 7).map(({ key }) => key), "what is left");
  }),
  storeCase("prune() keeps an effect that is let run anew while it looks", async ({ store, again, advance }) => {
    await refuse(store, {});
    await advance(YEAR);
    const find = () => store.resolve(KEY, { as: "absent" }).then(() => undefined);
    expectEqual(await again.prune({ olderThanMs: 0, outboxes: [{ find }] }), 0, "the number forgotten");
    expectEqual((await store.list()).map(({ state }) => state), ["waiting"], "what is left");
  }),

  // batches
  storeCase("claimAll() answers in the order of its keys", async ({ store, again }) => {
    expectEqual(await store.claimAll([]), [], "the answer to nothing");
    await store.complete(keyOf("b"), (await take(store, keyOf("b"))).fence, "paid");
    await take(store, keyOf("d"));
    const keys = ["e", "d", "c", "b", "a"].map((key) => ({ ...HOLD, key: keyOf(key), request: undefined }));
    const states = (await again.claimAll(keys)).map(({ state }) => state);
    expectEqual(states, ["claimed", "busy", "claimed", "done", "claimed"], "the answers");
  }),
  storeCase("claimAll() gives a key once, also where it comes twice", async ({ store }) => {
    const keys = ["a", "b", "a", "a"].map((key) => ({ ...HOLD, key: keyOf(key) }));
    const states = (await store.claimAll(keys)).map(({ state }) => state);
    expectEqual(states, ["claimed", "claimed", "busy", "busy"], "the answers");
  }),
  storeCase("claimAll() takes nothing where one of its keys is bad", async ({ store }) => {
    const keys = ["a", ""].map((key) => ({ ...HOLD, key: keyOf(key) }));
    await expectError(() => store.claimAll(keys), ["RangeError", "TypeError"], "claimAll()");
    expectEqual(await store.list(), [], "the effects");
  }),
  storeCase(
    "completeAll() tells in order which were recorded; a late one leaves its outcome as evidence",
    async (storage) => {
      const { store, again } = storage;
      expectEqual(await store.completeAll([]), [], "the answer to nothing");
      const late = await interrupt(storage, keyOf("late"));
      const taken = await take(again, keyOf("late"), { repeatWithinMs: YEAR });
      const a = await take(store, keyOf("a"));
      const b = await take(store, keyOf("b"));
      const recorded = await store.completeAll([
        { key: keyOf("b"), fence: b.fence, result: "B" },
        { key: keyOf("late"), fence: late.fence, result: "too late" },
        { key: keyOf("missing"), fence: 1, result: "nothing" },
        { key: keyOf("a"), fence: a.fence, result: "A" },
        { key: keyOf("a"), fence: a.fence, result: "A again" },
      ]);
      expectEqual(recorded, [true, false, false, true, true], "the answers");
      expectEqual((await stands(again, "done", keyOf("a"))).result, "A", "the result of a");
      expectEqual((await stands(again, "done", keyOf("b"))).result, "B", "the result of b");
      const { state, evidence } = await recordOf(store, keyOf("late"));
      expectEqual(state, "claimed", "the state of the late one");
      expect(JSON.stringify(evidence).includes("too late"), `the outcome in the evidence, got ${show(evidence)}`);
      await again.complete(keyOf("late"), taken.fence);
    },
  ),

  // transactions
  storeCase("a claim in a transaction is done for the other handle once it commits", async ({ store, again }) => {
    const answer = await store.transaction(async (effects) => {
      expectState(await effects.claim(KEY), "claimed");
      return "answer";
    });
    expectEqual(answer, "answer", "what transaction() resolves to");
    expectEqual(await again.claim(KEY, HOLD), { state: "done", result: null, resultOmitted: false }, "the claim");
    expectEqual((await again.transaction((effects) => effects.claim(KEY))).state, "done", "the claim in a transaction");
  }),
  storeCase("a transaction that fails frees what it claimed, and passes its error on", async ({ store, again }) => {
    const boom = new RangeError("boom");
    const failing = () =>
      store.transaction(async (effects) => {
        expectState(await effects.claim(KEY), "claimed");
        await effects.complete(KEY, "paid");
        throw boom;
      });
    expect(await expectError(failing, "RangeError", "the transaction") === boom, "the function's own error");
    expectEqual(await again.list(), [], "the effects");
    expectEqual((await again.transaction((effects) => effects.claim(KEY))).state, "claimed", "the claim");
  }),
  storeCase("complete() in a transaction is replayed", async ({ store, again }) => {
    await store.transaction(async (effects) => {
      await effects.claimAll([KEY, keyOf("large")]);
      await effects.complete(KEY, { paid: 5 });
      await effects.complete(keyOf("large"), "x".repeat(65_535));
    });
    expectEqual((await stands(again, "done")).result, { paid: 5 }, "the result");
    expectEqual((await stands(again, "done", keyOf("large"))).resultOmitted, true, "resultOmitted of a large result");
  }),
  storeCase("complete() in a transaction refuses what that has not claimed", async ({ store, again }) => {
    await store.transaction((effects) => effects.claim(KEY));
    const other = () =>
      again.transaction(async (effects) => {
        await effects.claim(KEY);
        await effects.complete(KEY, "other");
      });
    await expectError(other, "RangeError", "complete() of another's effect");
    await expectError(() => again.transaction((e) => e.complete(keyOf("free"), 1)), "RangeError", "complete() of nothing");
    expectEqual((await stands(store, "done")).result, null, "the result");
  }),
  storeCase("a failure of the transaction's handle rolls it back, even if it was swallowed", async ({ store, again }) => {
    const failures: Readonly<Record<string, (effects: EffectTransaction) => Promise<unknown>>> = {
      "enqueue() of an id that is there": (effects) => effects.enqueue({ id: "m-1", topic: "orders", value: 1 }),
      "advance() out of order": (effects) => effects.advance(OWNER, positionOf(7)),
      "complete() without claim()": (effects) => effects.complete(keyOf("free"), 1),
      "claim() of an empty key": (effects) => effects.claim(keyOf("")),
    };
    await store.transaction((effects) => effects.enqueue({ id: "m-1", topic: "orders", value: 1 }));
    for (const [what, failing] of Object.entries(failures)) {
      let caught = false;
      const swallowing = () =>
        store.transaction(async (effects) => {
          await effects.claim(keyOf(what));
          await failing(effects).catch(() => caught = true);
        });
      let failed = false;
      await swallowing().catch(() => failed = true);
      expect(caught, `${what} to fail`);
      expect(failed, `a transaction to fail in which a failure was swallowed: ${what}`);
      expectEqual(await again.list({ key: what }), [], `the claim beside ${what}`);
    }
  }),
  storeCase("enqueue() commits with the claim, or not at all", async ({ store, again }) => {
    const enqueue = (handle: EffectStore<unknown>, key: string, id: string, fails = false) =>
      handle.transaction(async (effects) => {
        await effects.claim(keyOf(key));
        await effects.enqueue({ id, topic: "orders", value: 1 }, { topic: "orders", key: "k", value: null });
        if (fails) throw new EffectError("rejected", "boom");
      });
    await expectError(() => enqueue(store, "a", "m-1", true), "rejected", "the transaction");
    await enqueue(store, "b", "m-1"); // What was rolled back does not take the id.
    await expectError(() => enqueue(again, "c", "m-1"), "RangeError", "the second message of one id");
    expectEqual((await again.list()).map(({ key }) => key), ["b"], "the effects");
  }),
  storeCase("claim() in a transaction is busy for a key under a live lease", async ({ store, again, advance }) => {
    const { fence } = await take(store);
    const claim = expectState(await again.transaction((effects) => effects.claim(KEY)), "busy");
    expectBetween(claim.retryMs, 1, LEASE, "retryMs");
    await advance(LEASE - SOON);
    await store.complete(KEY, fence, "paid");
    expectEqual(expectState(await again.transaction((e) => e.claim(KEY)), "done").result, "paid", "the result");
  }),
  storeCase(
    "claim() in a transaction does not take an effect that is in doubt, refused or of another request",
    async (storage) => {
      const { store, again } = storage;
      await interrupt(storage, keyOf("interrupted"));
      await refuse(store, { as: "unknown" }, keyOf("unknown"));
      await refuse(store, { result: 402 }, keyOf("refused"));
      await store.transaction((effects) => effects.claim(keyOf("request"), { request: { amount: 5 } }));
      await again.transaction(async (effects) => {
        expectState(await effects.claim(keyOf("interrupted")), "uncertain", "an interrupted effect");
        expectState(await effects.claim(keyOf("unknown")), "uncertain", "an effect of unknown outcome");
        expectEqual(
          expectState(await effects.claim(keyOf("refused")), "rejected").result,
          402,
          "the answer of a refused effect",
        );
        expectState(await effects.claim(keyOf("request"), { request: { amount: 6 } }), "mismatch", "another request");
        expectState(await effects.claim(keyOf("request"), { request: { amount: 5 } }), "done", "the same request");
      });
    },
  ),
  storeCase("claim() in a transaction takes an effect that waited to be tried again", async ({ store, again, advance }) => {
    await refuse(store, { as: "retryable", retryMs: LEASE });
    expectState(await again.transaction((effects) => effects.claim(KEY)), "busy");
    await advance(LEASE + SOON);
    const claim = expectState(await again.transaction((effects) => effects.claim(KEY)), "claimed");
    expectEqual(claim.attempt, 2, "the attempt");
    await stands(store, "done");
    await expectError(() => store.complete(KEY, 1, "late"), "lease_lost", "complete() of the owner before");
  }),
  storeCase("a transaction is not seen by the other handle before it commits", async ({ store, again }) => {
    await store.transaction(async (effects) => {
      await effects.claim(KEY);
      await effects.advance(OWNER, positionOf(1));
      expectEqual(await again.list(), [], "the effects that the other handle sees");
      expectEqual((await again.count()).done, 0, "the count that the other handle sees");
      expectEqual(await again.positions(OWNER), [], "the positions that the other handle sees");
    });
    expectEqual((await again.list()).length, 1, "the number of effects after the commit");
  }),
  storeCase("transactions for one key at once make one effect", async ({ store, again }) => {
    const run = (handle: EffectStore<unknown>) =>
      handle.transaction(async (effects) => {
        const { state } = await effects.claim(KEY);
        if (state === "claimed") await effects.enqueue({ id: "the effect", topic: "orders", value: 1 });
        return state;
      });
    const states = await Promise.all(range(1, 8).map((i) => run(i % 2 ? store : again)));
    expectEqual(states.sort(), ["claimed", ...range(1, 7).map(() => "done")], "the answers");
  }),
  storeCase("claim() in a transaction gives a key once", async ({ store }) => {
    await store.transaction(async (effects) => {
      const states = (await effects.claimAll(["a", "b", "a"].map((key) => keyOf(key)))).map(({ state }) => state);
      expectEqual(states, ["claimed", "claimed", "done"], "the answers of claimAll()");
      expectState(await effects.claim(keyOf("b")), "done", "a second claim()");
      await effects.complete(keyOf("a"), "paid");
      expectEqual(expectState(await effects.claim(keyOf("a")), "done").result, "paid", "the result");
    });
  }),
  storeCase(
    "a transaction that calls its own store ends in busy, not in a deadlock",
    async ({ store, again, waitMs = 5_000 }) => {
      const nested = store.transaction(() => store.claim(KEY, HOLD));
      nested.catch(() => {});
      await expectError(
        () => expectWithin(3 * waitMs + 2_000, nested, "an end of the transaction"),
        "busy",
        "the transaction",
      );
      await take(again);
    },
  ),
  storeCase("isDatabaseFailure() says no to errors that are not the database's", ({ store }) => {
    for (const error of [new Error("boom"), new EffectError("fenced", "overtaken"), "boom", undefined]) {
      expectEqual(store.isDatabaseFailure(error), false, `isDatabaseFailure(${show(error)})`);
    }
    return Promise.resolve();
  }),

  // positions
  storeCase("advance() moves a position on in order only", async ({ store, again }) => {
    const advance = (handle: EffectStore<unknown>, position: Position) =>
      handle.transaction(async (effects) => {
        await effects.claim(keyOf(position.uid));
        await effects.advance(OWNER, position);
      });
    await expectError(() => advance(store, positionOf(2)), "fenced", "a position that leaves one out");
    await advance(store, positionOf(1));
    await advance(again, positionOf(2));
    await expectError(() => advance(store, positionOf(2)), "fenced", "a position that is there");
    await expectError(() => advance(store, positionOf(1)), "fenced", "a position of before");
    await expectError(() => advance(store, positionOf(4)), "fenced", "a position that leaves one out");
    await expectError(() => advance(store, { ...positionOf(3), prev: "other" }), "fenced", "a position of another chain");
    expectEqual((await store.positions(OWNER)).map(({ n }) => n), [1, 2], "the positions");
    expectEqual((await store.list()).map(({ key }) => key), ["uid-1", "uid-2"], "what was committed beside them");
    await advance(store, positionOf(3));
  }),
  storeCase("advance() is refused to the slower of two owners", async ({ store, again }) => {
    const advance = (handle: EffectStore<unknown>, suffix: string) =>
      handle.transaction(async (effects) => {
        await effects.claim(keyOf(suffix));
        await effects.advance(OWNER, positionOf(1, suffix));
        return suffix;
      }).catch((error) => error);
    const answers: readonly unknown[] = await Promise.all([advance(store, "a"), advance(again, "b")]);
    const winners = answers.filter((answer) => typeof answer === "string");
    expectEqual(winners.length, 1, `the number of owners that went on (${show(answers)})`);
    expectEqual((await store.positions(OWNER)).map(({ uid }) => uid), [`uid-1${winners[0]}`], "the position");
    expectEqual((await store.list()).map(({ key }) => key), winners, "the winner's effects");
    const loser = answers.find((answer) => typeof answer !== "string");
    await expectError(() => Promise.reject(loser), "fenced", "the slower one");
  }),
  storeCase("positions() gives what was committed, oldest first", async ({ store, again }) => {
    expectEqual(await again.positions(OWNER), [], "the positions before the first batch");
    for (const n of range(1, 12)) await store.transaction((effects) => effects.advance(OWNER, positionOf(n)));
    expectEqual(await again.positions(OWNER), range(1, 12).map((n) => positionOf(n)), "the positions");
  }),
  storeCase("positions() gives the last 100 at least", async ({ store, again }) => {
    await store.transaction(async (effects) => {
      for (const n of range(1, 130)) await effects.advance(OWNER, positionOf(n));
    });
    const found = (await again.positions(OWNER)).slice(-100);
    expectEqual(found.map(({ n }) => n), range(31, 130), "the numbers of the last 100 positions");
  }),
  storeCase("advance() is rolled back with its transaction", async ({ store, again }) => {
    const failing = () =>
      store.transaction(async (effects) => {
        await effects.advance(OWNER, positionOf(1));
        throw new EffectError("rejected", "boom");
      });
    await expectError(failing, "rejected", "the transaction");
    expectEqual(await again.positions(OWNER), [], "the positions");
    await again.transaction((effects) => effects.advance(OWNER, positionOf(1)));
  }),
  storeCase("positions are kept for each relay and source", async ({ store, again }) => {
    const owners = [OWNER, { ...OWNER, relay: "RELAY" }, { ...OWNER, source: "other" }, {
      relay: "outbox",
      source: "relay",
    }];
    for (const [i, owner] of owners.entries()) {
      expectEqual(await again.positions(owner), [], "the positions before the first batch");
      await store.transaction((effects) => effects.advance(owner, positionOf(1, `-${i}`)));
    }
    for (const [i, owner] of owners.entries()) {
      expectEqual((await again.positions(owner)).map(({ uid }) => uid), [`uid-1-${i}`], "the positions of an owner");
    }
  }),
];

// ---------------------------------------------------------------------------------------------------------------- sources

function sourceCase(name: string, check: (storage: OpenSource) => Promise<void>): Case<SourceHarness> {
  return {
    name,
    async run(harness) {
      const storage = await harness.open();
      try {
        await check(storage);
      } finally {
        await storage.close();
      }
    },
  };
}

const RELAY: SourceOptions = { relay: "relay", protocol: "claimed", onPark: "block", leaseMs: LEASE };
const SEALED: SourceOptions = { ...RELAY, protocol: "sealed" };
const SKIP: SourceOptions = { ...RELAY, onPark: "skip" };
const ALL: ReadLimits = { rows: 100, bytes: 1_000_000 };

/** A message whose key is its id without the number: `a1` and `a2` have the key `a`, `-1` has none. */
const note = (id: string, fields: Partial<NewMessage> = {}): NewMessage => {
  const key = id.replace(/\d+$/, "");
  return { id, topic: "orders", key: key === "-" ? null : key, value: id, ...fields };
};
const notes = (...ids: readonly string[]): readonly NewMessage[] => ids.map((id) => note(id));
const idsOf = (messages: readonly { readonly id: string }[]): readonly string[] => messages.map(({ id }) => id);

function only(messages: readonly Message[], id: string): Message {
  const found = messages.find((message) => message.id === id);
  if (!found) throw new Error(`Expected message "${id}" among ${show(idsOf(messages))}`);
  return found;
}

async function reads(
  session: SourceSession,
  ids: readonly string[],
  what: string,
  limits = ALL,
): Promise<readonly Message[]> {
  const { messages } = await session.read(limits);
  expectEqual(idsOf(messages), ids, what);
  return messages;
}

/** Settles message after message; answers the order in which they came. */
async function drain(session: SourceSession, limits = ALL): Promise<readonly string[]> {
  const order: string[] = [];
  for (;;) {
    const [first] = (await session.read(limits)).messages;
    if (!first) return order;
    expect(!order.includes(first.id), `a settled message not to come again, got ${show(first.id)}`);
    order.push(first.id);
    await session.settle([first]);
  }
}

const ofKey = (ids: readonly string[], key: string): readonly string[] => ids.filter((id) => id.replace(/\d+$/, "") === key);

/** Settles batch after batch, as a sink that commits all; answers the order in which the messages came. */
async function drainSealed(
  session: SourceSession,
  ring: readonly Position[] = [],
  limits = ALL,
): Promise<readonly string[]> {
  const order: string[] = [];
  const committed = [...ring];
  for (;;) {
    const { batches: [batch] } = await session.seal(committed, limits);
    if (!batch) return order;
    expectEqual(batch.n, (committed.at(-1)?.n ?? 0) + 1, "the number of the next batch");
    expectEqual(batch.prev, committed.at(-1)?.uid ?? "", "the uid before the next batch");
    order.push(...idsOf(batch.messages));
    committed.push(pinned(batch));
  }
}

const pinned = ({ n, uid, prev, rows }: Position): Position => ({ n, uid, prev, rows });

async function sha256(text: string): Promise<string> {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", utf8.encode(text)));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

async function parkOne(session: SourceSession, id: string, retryMs: number | null, limits = ALL): Promise<void> {
  const message = only((await session.read(limits)).messages, id);
  await session.park([{ message, reason: `"${id}" was refused`, retryMs }]);
}

/** Parks messages in the way of the sealed protocol. */
async function parkSealed(session: SourceSession, ids: readonly string[], retryMs: number | null): Promise<void> {
  const { batches } = await session.seal([], ALL);
  const messages = batches.flatMap((batch) => batch.messages);
  await session.unseal([], ids.map((id) => ({ message: only(messages, id), reason: "refused", retryMs })));
}

function needs<T>(part: T | undefined, name: string): T {
  if (part === undefined) throw new Error(`Expected the harness to have ${name}(): without it, skip this requirement`);
  return part;
}

/** What every {@linkcode Source} must do. */
export const sourceCases: readonly Case<SourceHarness>[] = [
  // read, settle
  sourceCase("read() gives messages in the order in which they were enqueued", async ({ source, again, enqueue }) => {
    const ids = range(1, 30).map((i) => `${["a", "b", "-"][i % 3]}${31 - i}`);
    for (const id of ids.slice(0, 20)) await enqueue(note(id));
    await enqueue(...notes(...ids.slice(20)));
    await reads(await source().open(RELAY), ids, "the messages");
    await reads(await again().open(RELAY), ids, "the messages by another handle");
  }),
  sourceCase("read() gives the same again until it is settled", async ({ source, enqueue }) => {
    await enqueue(...notes("a1", "b1", "a2"));
    const session = await source().open(RELAY);
    const [first, second] = await reads(session, ["a1", "b1", "a2"], "the messages");
    await reads(session, ["a1", "b1", "a2"], "the messages read again");
    await session.settle([second!]);
    await reads(session, ["a1", "a2"], "the messages after the second was settled");
    await enqueue(note("c1"));
    await reads(session, ["a1", "a2", "c1"], "the messages with a new one");
    await session.settle([first!]);
    await reads(session, ["a2", "c1"], "the messages after the first was settled");
  }),
  sourceCase("settle() ends a message for ever and for all", async ({ source, again, enqueue, advance }) => {
    await enqueue(...notes("a1", "b1"));
    const session = await source().open(RELAY);
    const other = await again().open(RELAY);
    const [first] = await reads(session, ["a1", "b1"], "the messages");
    await session.settle([first!]);
    await reads(other, ["b1"], "the messages of another session");
    await session.park([{ message: first!, reason: "too late", retryMs: 1 }]);
    await session.settle([first!]);
    await advance(YEAR);
    await reads(await again().open(RELAY), ["b1"], "the messages of a later session");
    await reads(session, ["b1"], "the messages of the session");
  }),
  sourceCase("settle() ends only the messages it is given", async ({ source, enqueue }) => {
    await enqueue(...notes("a1", "a2", "b1", "b2", "-1", "-2"));
    const session = await source().open(RELAY);
    const messages = await reads(session, ["a1", "a2", "b1", "b2", "-1", "-2"], "the messages");
    await session.settle([messages[1]!, messages[3]!, messages[4]!]);
    await reads(session, ["a1", "b1", "-2"], "the messages left");
  }),
  sourceCase("read() gives a message as it was enqueued", async ({ source, enqueue, longestId = 1024 }) => {
    const id = `🧾 "1"' ${"x".repeat(longestId - 24)}`;
    await enqueue(
      {
        id,
        topic: "ordérs 𝄞",
        key: "🔑 ",
        value: new Uint8Array([0, 255, 128, 10]),
        headers: { "X-Trace": "zoë 𝄞", b: "" },
      },
      { id: "tombstone", topic: "t", key: "k", value: null },
      { id: "empty", topic: "t", key: null, value: new Uint8Array() },
      { id: "text", topic: "t", value: "zoë\u2028" },
      { id: "json", topic: "t", value: { b: 1, a: [null, "𝄞"] } },
      { id: "typed", topic: "t", value: [1], headers: { "Content-Type": "application/vnd.x+json" } },
    );
    const session = await source().open(RELAY);
    const { messages } = await session.read(ALL);
    const type = { "content-type": "application/json" };
    expectEqual(
      messages.map(({ id, topic, key, value, headers }) => [id, topic, key, value, headers]),
      [
        [id, "ordérs 𝄞", "🔑 ", new Uint8Array([0, 255, 128, 10]), { "X-Trace": "zoë 𝄞", b: "" }],
        ["tombstone", "t", "k", null, {}],
        ["empty", "t", null, new Uint8Array(), {}],
        ["text", "t", null, utf8.encode("zoë\u2028"), {}],
        ["json", "t", null, utf8.encode('{"b":1,"a":[null,"𝄞"]}'), type],
        ["typed", "t", null, utf8.encode("[1]"), { "Content-Type": "application/vnd.x+json" }],
      ],
      "the messages",
    );
    for (const { value } of messages) {
      expect(value === null || Object.getPrototypeOf(value) === Uint8Array.prototype, "a value to be a plain Uint8Array");
    }
    expectEqual(only(messages, "json").json(), { a: [null, "𝄞"], b: 1 }, "the value as JSON");
    expectEqual(only(messages, "text").text(), "zoë\u2028", "the value as text");
    const times = messages.map(({ time }) => time.getTime());
    expect(times.every((time) => Number.isSafeInteger(time)), `valid times, got ${show(times)}`);
    expectEqual((await session.read(ALL)).messages.map(({ time }) => time.getTime()), times, "the times read again");
  }),
  sourceCase("ids and keys are compared byte for byte", async ({ source, enqueue }) => {
    const texts = ["a", "A", "a ", "á", "a\u0301", "𝄞", "𝄟"];
    await enqueue(...texts.map((text) => ({ id: text, topic: "orders", key: text, value: 1 })));
    await enqueue(...texts.map((text) => ({ id: `${text}2`, topic: "orders", key: text, value: 2 })));
    const session = await source().open(RELAY);
    const { messages } = await session.read(ALL);
    expectEqual(idsOf(messages), [...texts, ...texts.map((text) => `${text}2`)], "the messages");
    await session.park([{ message: only(messages, "a"), reason: "refused", retryMs: null }]);
    const others = texts.slice(1);
    await reads(session, [...others, ...others.map((text) => `${text}2`)], "the messages of other keys");
    await session.settle(messages.filter(({ id }) => id === "A"));
    await reads(session, [...others.slice(1), ...others.map((text) => `${text}2`)], "what is left of them");
  }),
  sourceCase("a message without an id is given one of its own", async ({ source, enqueue }) => {
    await enqueue(...range(1, 20).map(() => ({ topic: "orders", value: 1 })));
    const { messages } = await (await source().open(RELAY)).read(ALL);
    const ids = new Set(idsOf(messages));
    expect(ids.size === 20 && !ids.has(""), `20 different ids, got ${show([...ids])}`);
  }),
  sourceCase("read() gives no more rows and bytes than asked for, but always one message", async ({ source, enqueue }) => {
    const value = new Uint8Array(1000);
    await enqueue(...range(1, 9).map((i) => note(`a${i}`, { value })), note("b1", { value: new Uint8Array(50_000) }));
    const session = await source().open(RELAY);
    await reads(session, ["a1", "a2", "a3"], "three rows", { rows: 3, bytes: 1_000_000 });
    await reads(session, ["a1"], "one row", { rows: 1, bytes: 1_000_000 });
    await reads(session, ["a1", "a2", "a3"], "3500 bytes", { rows: 100, bytes: 3500 });
    await reads(session, ["a1"], "one message larger than the limit", { rows: 100, bytes: 1 });
    const order = await drain(session, { rows: 100, bytes: 1 });
    expectEqual(order.at(-1), "b1", "the last message");
  }),
  sourceCase("read() gives the messages of its topics only", async ({ source, again, enqueue }) => {
    const topics = ["orders", "mail", "Orders", "audit"];
    for (const i of range(1, 3)) await enqueue(...topics.map((topic) => note(`${topic}${i}`, { topic, key: "k" })));
    const session = await source({ topics: ["orders", "audit"] }).open(RELAY);
    const mine = ["orders1", "audit1", "orders2", "audit2", "orders3", "audit3"];
    await reads(session, mine, "the messages of two topics");
    await reads(session, mine.slice(0, 4), "the first four", { ...ALL, rows: 4 });
    const other = await again({ topics: ["mail"] }).open({ ...RELAY, relay: "other" });
    await parkOne(other, "mail1", null);
    await reads(session, mine, "the messages while another topic's are parked");
    expectEqual(await drain(session), mine, "the order");
  }),

  // park
  sourceCase("park() with retryMs holds back the message and its key until then; others go on", async (storage) => {
    const { source, again, enqueue, advance } = storage;
    for (const [options, a1, b1, a2, none] of [[RELAY, "a1", "b1", "a2", "-1"], [SKIP, "a3", "b3", "a4", "-3"]] as const) {
      await enqueue(...notes(a1, b1, a2, none));
      const session = await source().open(options);
      await parkOne(session, a1, SOON);
      const { messages, waitMs } = await session.read(ALL);
      expectEqual(idsOf(messages), [b1, none], "the messages meanwhile");
      expectBetween(waitMs, 1, SOON, "waitMs");
      await reads(await again().open(options), [b1, none], "the messages of another session");
      await advance(SOON / 2);
      await reads(session, [b1, none], "the messages before the time");
      await advance(SOON);
      expectEqual((await session.read(ALL)).messages[0]?.id, a1, "the first message after the time");
      const order = await drain(session);
      expectEqual([ofKey(order, "a"), order.length], [[a1, a2], 4], "the order of the key, and the number in all");
      expectEqual(await session.read(ALL), { messages: [], waitMs: null }, "what is left");
      await session.close(true);
    }
  }),
  sourceCase(
    "a key keeps its order over parking, waking and settling, also of what is enqueued meanwhile",
    async (storage) => {
      const { source, enqueue, advance } = storage;
      await enqueue(...notes("a1", "a2", "b1"));
      const session = await source().open(RELAY);
      await parkOne(session, "a1", SOON);
      await enqueue(note("a3"));
      await reads(session, ["b1"], "the messages while a1 waits");
      await advance(2 * SOON);
      await parkOne(session, "a1", SOON);
      await enqueue(note("a4"));
      await reads(session, ["b1"], "the messages while a1 waits again");
      await advance(2 * SOON);
      const first = only((await session.read(ALL)).messages, "a1");
      await session.settle([first]);
      await parkOne(session, "a2", SOON);
      await enqueue(note("a5"), note("b2"));
      await reads(session, ["b1", "b2"], "the messages while a2 waits");
      await advance(2 * SOON);
      await enqueue(note("a6"));
      expectEqual(ofKey(await drain(session), "a"), ["a2", "a3", "a4", "a5", "a6"], "the order of the key");
    },
  ),
  sourceCase("park() for good holds back the key where onPark is block", async ({ source, again, enqueue, advance }) => {
    await enqueue(...notes("a1", "b1", "a2", "-1", "-2"));
    const session = await source().open(RELAY);
    await parkOne(session, "a1", null);
    await parkOne(session, "-1", null);
    await enqueue(note("a3"));
    const { messages, waitMs } = await session.read(ALL);
    expectEqual([idsOf(messages), waitMs], [["b1", "-2"], null], "the messages, and how long one waits");
    await advance(YEAR);
    await reads(await again().open(RELAY), ["b1", "-2"], "the messages a year later");
  }),
  sourceCase(
    "park() for good holds back only the message where onPark is skip",
    async ({ source, again, enqueue, advance }) => {
      await enqueue(...notes("a1", "b1", "a2"));
      const session = await source().open(SKIP);
      await reads(session, ["a1", "b1", "a2"], "the messages");
      await parkOne(session, "a1", SOON);
      await reads(session, ["b1"], "the messages while a1 waits");
      await advance(2 * SOON);
      await parkOne(session, "a1", null);
      await enqueue(note("a3"));
      await reads(session, ["b1", "a2", "a3"], "the messages");
      await advance(YEAR);
      await reads(await again().open(SKIP), ["b1", "a2", "a3"], "the messages a year later");
    },
  ),
  sourceCase("a later relay with another onPark holds back and frees by its own", async ({ source, enqueue }) => {
    await enqueue(...notes("a1", "a2", "b1"));
    for (const [options, ids] of [[RELAY, ["b1"]], [SKIP, ["a2", "b1"]], [RELAY, ["b1"]]] as const) {
      const session = await source().open(options);
      const { messages } = await session.read(ALL);
      if (messages[0]?.id === "a1") await session.park([{ message: messages[0], reason: "refused", retryMs: null }]);
      await reads(session, ids, `the messages with onPark ${options.onPark}`);
      await session.close(true);
    }
  }),
  sourceCase(
    "read() gives a message that was held back, though later ones are settled",
    async ({ source, enqueue, advance }) => {
      await enqueue(...notes("a1", "b1", "c1"));
      const session = await source().open(RELAY);
      await parkOne(session, "a1", SOON);
      expectEqual(await drain(session), ["b1", "c1"], "the messages that go on");
      await enqueue(note("d1"));
      await advance(2 * SOON);
      expectEqual(await drain(session), ["a1", "d1"], "the messages after the time");
    },
  ),
  sourceCase("held messages and what is behind them never fill the window of others", async ({ source, enqueue }) => {
    const window = { ...ALL, rows: 10 };
    await enqueue(...notes("a1"), ...range(1, 30).map((i) => note(`p${i}`, { key: `p${i}` })));
    const first = await source().open(RELAY);
    await parkOne(first, "a1", null);
    for (const i of range(1, 20)) await parkOne(first, `p${i}`, i % 2 ? null : YEAR);
    await enqueue(...range(2, 501).map((i) => note(`a${i}`)), ...range(1, 30).map((i) => note(`q${i}`, { key: `p${i}` })));
    await enqueue(...notes("z1", "z2"));
    const free = [...range(21, 30).map((i) => `p${i}`), ...range(21, 30).map((i) => `q${i}`), "z1", "z2"];
    await reads(first, free.slice(0, 10), "the first window", window);
    await first.close(true);
    const session = await source({ topics: ["orders", "mail"] }).open(RELAY);
    await reads(session, free.slice(0, 10), "the first window of two topics", window);
    expectEqual(await drain(session, window), free, "the messages that go on");
  }),
  sourceCase("release() lets a parked or waiting message go, then what it held back, in order", async (storage) => {
    const { source, enqueue, release } = storage;
    await enqueue(...notes("a1", "a2", "b1", "c1", "a3", "c2"));
    const session = await source().open(RELAY);
    await parkOne(session, "a1", null);
    await parkOne(session, "c1", YEAR);
    await reads(session, ["b1"], "the messages while a1 is parked and c1 waits");
    const free = needs(release, "release");
    for (const id of ["b1", "a2", "missing"]) expectEqual(await free(id), false, `the release of ${id}`);
    for (const id of ["a1", "c1"]) {
      expectEqual(await free(id), true, `the release of ${id}`);
      expectEqual(await free(id), false, `the second release of ${id}`);
    }
    await enqueue(note("a4"));
    const order = await drain(session);
    expectEqual(ofKey(order, "a"), ["a1", "a2", "a3", "a4"], "the order of the key");
    expectEqual(ofKey(order, "c"), ["c1", "c2"], "the order of the other key");
  }),
  sourceCase("discard() removes a parked or waiting message, and what it held back goes, in order", async (storage) => {
    const { source, again, enqueue, discard } = storage;
    await enqueue(note("x1", { topic: "mail", key: "a" }), ...notes("a1", "a2", "b1", "c1", "a3", "a4", "c2"));
    const other = await again({ topics: ["mail"] }).open({ ...RELAY, relay: "other" });
    await parkOne(other, "x1", null);
    const session = await source({ topics: ["orders"] }).open(RELAY);
    await parkOne(session, "a1", null);
    await parkOne(session, "c1", YEAR);
    await reads(session, ["b1"], "the messages while a1 is parked and c1 waits");
    const remove = needs(discard, "discard");
    for (const id of ["a1", "c1"]) expectEqual(await remove(id), true, `the removal of ${id}`);
    for (const id of ["a1", "a3", "b1", "missing"]) expectEqual(await remove(id), false, `the removal of ${id}`);
    await enqueue(note("a5"), note("b2"));
    // Another topic's parked message has the same key: it is in nobody's way here.
    const order = await drain(session);
    expectEqual(ofKey(order, "a"), ["a2", "a3", "a4", "a5"], "the order of the key");
    expectEqual([ofKey(order, "b"), ofKey(order, "c")], [["b1", "b2"], ["c2"]], "the messages of other keys");
    expectEqual(await remove("x1"), true, "the removal of another topic's message");
  }),

  // open, close
  sourceCase("open() refuses a relay of another name on overlapping topics", async ({ source, again }) => {
    const refused = (topics: readonly string[] | undefined, from = again) =>
      expectError(() => from({ topics }).open({ ...RELAY, relay: "other" }), "source_invalid", `open() of ${show(topics)}`);
    await source({ topics: ["a", "b"] }).open(RELAY);
    for (const topics of [undefined, ["a"], ["c", "b"], ["b", "a"]]) await refused(topics);
    await refused(["b"], source);
    await again({ topics: ["c"] }).open({ ...RELAY, relay: "third" });
    await refused(["c"]);
    await again({ topics: ["d", "A"] }).open({ ...RELAY, relay: "other" });
  }),
  sourceCase("open() refuses every other name beside a relay of all topics", async ({ source, again }) => {
    await source().open(RELAY);
    for (const topics of [undefined, ["a"]]) {
      const opening = () => again({ topics }).open({ ...RELAY, relay: "other" });
      await expectError(opening, "source_invalid", `open() of ${show(topics)}`);
    }
  }),
  sourceCase("open() takes relays of one name at once, whatever their topics", async ({ source, again, enqueue }) => {
    await enqueue(note("a1"));
    for (const topics of [undefined, ["orders", "mail"], ["orders"]]) {
      await reads(await source({ topics }).open(RELAY), ["a1"], `the messages of ${show(topics)}`);
      await reads(await again({ topics }).open(RELAY), ["a1"], `the messages of ${show(topics)} by another handle`);
    }
  }),
  sourceCase(
    "close() of the last relay of a name frees its topics, if it leaves nothing behind",
    async ({ source, again }) => {
      for (const options of [RELAY, SEALED]) {
        const first = await source().open(options);
        const second = await again().open(options);
        await first.close(true);
        const opening = () => again().open({ ...options, relay: "other" });
        await expectError(opening, "source_invalid", "open() while one of the name is there");
        await second.close(true);
        const other = await again().open({ ...options, relay: "other" });
        expectEqual(other.inherited, false, "inherited");
        await other.close(true);
      }
    },
  ),
  sourceCase("close() of a relay that leaves something behind keeps the topics for its name", async (storage) => {
    const { source, again, enqueue, advance } = storage;
    await enqueue(note("a1"));
    await (await source().open(RELAY)).close(false);
    for (const wait of [0, YEAR]) {
      await advance(wait);
      await expectError(() => again().open({ ...RELAY, relay: "other" }), "source_invalid", "open() by another name");
    }
    const heir = await again().open(RELAY);
    expectEqual(heir.inherited, true, "inherited");
    expectEqual(await drain(heir), ["a1"], "the messages");
    await heir.close(true);
    await source().open({ ...RELAY, relay: "other" });
  }),
  sourceCase("a relay that fell silent keeps its topics for its name, but for the plain protocol", async (storage) => {
    const { source, again, enqueue, advance } = storage;
    for (const protocol of ["claimed", "sealed", "plain"] as const) {
      await enqueue({ id: protocol, topic: protocol, key: null, value: null });
      const options = { ...RELAY, topics: [protocol], protocol };
      const other = () => again({ topics: [protocol] }).open({ ...options, relay: `other ${protocol}` });
      const session = await source({ topics: [protocol] }).open(options);
      await advance(LEASE - SOON);
      await session.renew();
      await advance(LEASE - SOON);
      await expectError(other, "source_invalid", `open() beside a live ${protocol} relay`);
      await advance(YEAR);
      if (protocol !== "plain") {
        await expectError(other, "source_invalid", `open() after a ${protocol} relay that fell silent`);
        expectEqual((await again({ topics: [protocol] }).open(options)).inherited, true, "inherited");
      } else {
        await other();
      }
    }
  }),
  sourceCase("a relay that fell silent keeps no topics of which nothing is left", async (storage) => {
    const { source, again, enqueue, advance } = storage;
    for (const protocol of ["claimed", "sealed"] as const) {
      const options = { ...RELAY, protocol };
      const id = protocol === "sealed" ? "b1" : "a1";
      await enqueue(note(id));
      const session = await source().open(options);
      expectEqual(protocol === "sealed" ? await drainSealed(session) : await drain(session), [id], "the messages");
      await advance(LEASE + SOON);
      const other = await again().open({ ...options, relay: "other" });
      expectEqual(other.inherited, false, "inherited");
      await other.close(true);
    }
  }),
  sourceCase("a relay that wakes after its topics went to another name delivers nothing more", async (storage) => {
    const { source, again, enqueue, advance } = storage;
    await enqueue(note("a1"));
    const session = await source().open(RELAY);
    await reads(session, ["a1"], "the messages");
    await advance(LEASE + SOON);
    const heir = await again().open(RELAY);
    await drain(heir);
    await heir.close(true);
    await again().open({ ...RELAY, relay: "other" });
    await enqueue(note("b1"));
    await expectError(() => session.read(ALL), "source_invalid", "read() of the one that woke");
  }),
  sourceCase("open() tells the source's own identity, the same for all", async ({ source, again }) => {
    const { id } = await source({ topics: ["a"] }).open(RELAY);
    expect(typeof id === "string" && id !== "", `an identity, got ${show(id)}`);
    expectEqual(
      (await again({ topics: ["b"] }).open({ ...RELAY, relay: "other" })).id,
      id,
      "the identity by another handle",
    );
  }),

  // seal
  sourceCase("seal() numbers batches from 1, each with the hash of the chain before it", async ({ source, enqueue }) => {
    await enqueue(...notes("a1", "b1", "a2", "-1", "a3"));
    const session = await source().open(SEALED);
    const limits = { ...ALL, rows: 2 };
    const { batches: [first], repaired } = await session.seal([], limits);
    if (!first) throw new Error("Expected seal() to give a batch");
    expectEqual([first.n, first.prev, repaired], [1, "", []], "number and chain of the first batch, and repairs");
    expectEqual(idsOf(first.messages), ["a1", "b1"], "the messages of the first batch");
    expectEqual(first.rows.map(([, id]) => id), ["a1", "b1"], "the rows of the first batch");
    expectEqual(first.uid, await sha256(chainText("", first.rows)), "the uid of the first batch");
    const { batches: [again, second] } = await session.seal([], limits);
    expectEqual(again?.uid, first.uid, "the uid of the first batch, handed out again");
    expectEqual([second?.n, second?.prev], [2, first.uid], "number and chain of the second batch");
    expectEqual(second?.uid, await sha256(chainText(first.uid, second!.rows)), "the uid of the second batch");
    const { batches: [, third] } = await session.seal([pinned(first)], limits);
    expectEqual([third?.n, third?.prev, idsOf(third?.messages ?? [])], [3, second!.uid, ["a3"]], "the third batch");
    expectEqual(third?.uid, await sha256(chainText(second!.uid, third!.rows)), "the uid of the third batch");
  }),
  sourceCase("seal() hands out a sealed batch unchanged, though messages are added", async ({ source, again, enqueue }) => {
    await enqueue(...notes("a1", "b1"));
    const session = await source().open(SEALED);
    const { batches: [batch] } = await session.seal([], ALL);
    await enqueue(...notes("a2", "c1"));
    const other = await again().open(SEALED);
    for (const each of [session, other, session]) {
      const { batches } = await each.seal([], { ...ALL, rows: 1 });
      expectEqual(show(batches[0]), show(batch), "the first batch");
      expectEqual(idsOf(batches[1]?.messages ?? []), ["a2"], "the messages of the second batch");
    }
  }),
  sourceCase("seal() seals at most two batches ahead", async ({ source, enqueue }) => {
    await enqueue(...notes("a1", "a2", "a3", "a4"));
    const session = await source().open(SEALED);
    for (const numbers of [[1], [1, 2], [1, 2], [1, 2]]) {
      const { batches } = await session.seal([], { ...ALL, rows: 1 });
      expectEqual(batches.map(({ n }) => n), numbers, "the numbers of the sealed batches");
    }
  }),
  sourceCase("seal() settles exactly the messages of the batches that are committed", async ({ source, enqueue }) => {
    await enqueue(...notes("a1", "b1", "a2", "b2", "a3", "b3", "c1"));
    const session = await source().open(SEALED);
    const limits = { ...ALL, rows: 2 };
    expectEqual(await session.settled(), 0, "the number settled at first");
    await session.seal([], limits);
    const { batches: [first, second] } = await session.seal([], limits);
    expectEqual(await session.settled(), 0, "the number settled before the commit");
    const { batches } = await session.seal([pinned(first!)], limits);
    expectEqual(await session.settled(), 1, "the number settled after the first commit");
    expectEqual(batches.map(({ messages }) => idsOf(messages)), [["a2", "b2"], ["a3", "b3"]], "the batches left");
    expectEqual(await session.settled(), 1, "the number settled");
    await session.seal([pinned(first!), pinned(second!)], limits);
    expectEqual(await session.settled(), 2, "the number settled after the second commit");
    await session.unseal([pinned(first!), pinned(second!)], []);
    expectEqual(await drainSealed(session, [pinned(first!), pinned(second!)]), ["a3", "b3", "c1"], "what is left");
    await session.close(true);
  }),
  sourceCase("seal() with a position of before is fenced", async ({ source, again, enqueue }) => {
    await enqueue(...notes("a1", "a2"));
    const session = await source().open(SEALED);
    const limits = { ...ALL, rows: 1 };
    const { batches: [first] } = await session.seal([], limits);
    const rival = await again().open(SEALED);
    await rival.seal([pinned(first!)], limits);
    await expectError(() => session.seal([], limits), "fenced", "seal() with the position of before");
    await expectError(() => session.unseal([], []), "fenced", "unseal() with the position of before");
    expectEqual(await drainSealed(session, [pinned(first!)]), ["a2"], "what is left");
  }),
  sourceCase("seal() hands every session of a relay the same sealed batches", async ({ source, again, enqueue }) => {
    await enqueue(...notes("a1", "b1", "a2"));
    const sessions = await Promise.all([source().open(SEALED), again().open(SEALED), again().open(SEALED)]);
    const sealed = await Promise.all(sessions.map((session) => session.seal([], { ...ALL, rows: 2 })));
    const firsts = sealed.map(({ batches: [batch] }) => show(batch));
    expectEqual(new Set(firsts).size, 1, `the number of different first batches (${firsts.join(" and ")})`);
    await (await source().open(SEALED)).seal([], { ...ALL, rows: 2 });
    const ends = await Promise.all(sessions.map((session) => session.seal([], ALL)));
    for (const { batches } of ends) {
      expectEqual(batches.map(({ messages }) => idsOf(messages)), [["a1", "b1"], ["a2"]], "the batches");
    }
  }),
  sourceCase("seal() gives no more rows and bytes than asked for, but always one message", async ({ source, enqueue }) => {
    await enqueue(...range(1, 9).map((i) => note(`a${i}`, { value: new Uint8Array(1000) })));
    const session = await source().open(SEALED);
    const committed: Position[] = [];
    for (
      const [limits, ids] of [
        [{ rows: 2, bytes: 100_000 }, ["a1", "a2"]],
        [{ rows: 100, bytes: 3500 }, ["a3", "a4", "a5"]],
        [{ rows: 100, bytes: 1 }, ["a6"]],
        [ALL, ["a7", "a8", "a9"]],
      ] as const
    ) {
      const { batches: [batch] } = await session.seal(committed, limits);
      expectEqual(idsOf(batch?.messages ?? []), ids, `the batch of ${show(limits)}`);
      committed.push(pinned(batch!));
    }
  }),
  sourceCase(
    "seal() gives nothing where nothing may go, and says how long one waits",
    async ({ source, enqueue, advance }) => {
      const session = await source().open(SEALED);
      expectEqual(await session.seal([], ALL), { batches: [], waitMs: null, repaired: [] }, "the answer about nothing");
      await enqueue(...notes("a1", "a2"));
      await parkSealed(session, ["a1"], SOON);
      const { batches, waitMs } = await session.seal([], ALL);
      expectEqual(batches, [], "the batches while a1 waits");
      expectBetween(waitMs, 1, SOON, "waitMs");
      await advance(2 * SOON);
      expectEqual(await drainSealed(session), ["a1", "a2"], "the messages after the time");
    },
  ),
  sourceCase(
    "unseal() takes apart what is not committed, and parks; the rest is sealed anew",
    async ({ source, again, enqueue }) => {
      await enqueue(...notes("a1", "b1", "a2", "c1", "-1"));
      const session = await source().open(SEALED);
      const limits = { ...ALL, rows: 1 };
      const { batches: [first] } = await session.seal([], limits);
      const ring = [pinned(first!)];
      await session.seal(ring, limits);
      const { batches } = await session.seal(ring, { ...ALL, rows: 2 });
      expectEqual(batches.map(({ messages }) => idsOf(messages)), [["b1"], ["a2", "c1"]], "the batches before");
      const parked = only(batches[1]!.messages, "a2");
      await session.unseal(ring, [{ message: parked, reason: "refused", retryMs: null }]);
      await enqueue(note("a3"));
      const other = await again().open(SEALED);
      const { batches: [next] } = await other.seal(ring, ALL);
      expectEqual([next?.n, next?.prev, idsOf(next?.messages ?? [])], [2, first!.uid, ["b1", "c1", "-1"]], "the next batch");
      expectEqual(await drainSealed(session, ring), ["b1", "c1", "-1"], "what is left to deliver");
    },
  ),
  sourceCase("seal() goes on with other keys behind a parked message and what it holds back", async (storage) => {
    const { source, enqueue, advance } = storage;
    await enqueue(...notes("a1", "a2", "b1", "a3", "b2"));
    const session = await source().open(SEALED);
    await parkSealed(session, ["a1"], SOON);
    const { batches: [batch] } = await session.seal([], { ...ALL, rows: 1 });
    expectEqual(idsOf(batch?.messages ?? []), ["b1"], "the first batch");
    await session.unseal([], [{ message: only(batch!.messages, "b1"), reason: "refused", retryMs: null }]);
    await enqueue(note("c1"));
    const { batches: [other] } = await session.seal([], { ...ALL, rows: 10 });
    expectEqual(idsOf(other?.messages ?? []), ["c1"], "the next batch");
    await advance(2 * SOON);
    expectEqual(await drainSealed(session, [pinned(other!)]), ["a1", "a2", "a3"], "the messages after the time");
  }),
  sourceCase("seal() goes on within the key behind a parked message where onPark is skip", async ({ source, enqueue }) => {
    await enqueue(...notes("a1", "a2", "b1"));
    const session = await source().open({ ...SEALED, onPark: "skip" });
    await parkSealed(session, ["a1"], null);
    expectEqual(await drainSealed(session), ["a2", "b1"], "the messages");
  }),
  sourceCase(
    "seal() seals a message that was held back, though later ones are settled",
    async ({ source, enqueue, advance }) => {
      await enqueue(...notes("a1", "b1"));
      const session = await source().open(SEALED);
      await parkSealed(session, ["a1"], SOON);
      const { batches: [batch] } = await session.seal([], ALL);
      expectEqual(idsOf(batch?.messages ?? []), ["b1"], "the first batch");
      await enqueue(note("c1"));
      await advance(2 * SOON);
      expectEqual(await drainSealed(session, [pinned(batch!)]), ["a1", "c1"], "the messages after the time");
    },
  ),
  sourceCase("seal() repairs a source that has lost batches from what the sink remembers", async (storage) => {
    const { source, again, enqueue, snapshot } = storage;
    await enqueue(...notes("a1", "b1", "a2"));
    const restore = await needs(snapshot, "snapshot")();
    const session = await source().open(SEALED);
    const limits = { ...ALL, rows: 2 };
    const { batches: [first] } = await session.seal([], limits);
    const { batches: [second] } = await session.seal([pinned(first!)], limits);
    await restore();
    await enqueue(note("b2"));
    const heir = await again().open(SEALED);
    const ring = [pinned(first!), pinned(second!)];
    const { batches: [third], repaired } = await heir.seal(ring, ALL);
    expectEqual(repaired.map(({ n, uid }) => [n, uid]), ring.map(({ n, uid }) => [n, uid]), "the repaired batches");
    expectEqual([third?.n, third?.prev, idsOf(third?.messages ?? [])], [3, second!.uid, ["b2"]], "the next batch");
    expectEqual(await heir.settled(), 2, "the number settled");
    expectEqual(await drainSealed(heir, ring), ["b2"], "what is left");
  }),
  sourceCase("seal() tells a lost batch from another one of its number", async ({ source, again, enqueue, snapshot }) => {
    await enqueue(note("a1"));
    const restore = await needs(snapshot, "snapshot")();
    await enqueue(note("b1"));
    const { batches: [lost] } = await (await source().open(SEALED)).seal([], ALL);
    await restore();
    // The source has another batch 1 now, and the sink commits the first one.
    await enqueue(note("c1"));
    const heir = await again().open(SEALED);
    const { batches: [other] } = await heir.seal([], ALL);
    expectEqual([idsOf(lost!.messages), idsOf(other!.messages)], [["a1", "b1"], ["a1", "c1"]], "the batches of one number");
    const { batches, repaired } = await heir.seal([pinned(lost!)], ALL);
    expectEqual(repaired.map(({ uid }) => uid), [lost!.uid], "the repaired batches");
    expectEqual(batches.map(({ n, messages }) => [n, idsOf(messages)]), [[2, ["c1"]]], "the batches");
  }),
  sourceCase("seal() has diverged where what the sink remembers does not reach back far enough", async (storage) => {
    const { source, again, enqueue, snapshot } = storage;
    await enqueue(...notes("a1", "a2", "a3"));
    const restore = await needs(snapshot, "snapshot")();
    const session = await source().open(SEALED);
    const limits = { ...ALL, rows: 1 };
    const { batches: [first] } = await session.seal([], limits);
    const { batches: [second] } = await session.seal([pinned(first!)], limits);
    await restore();
    const heir = await again().open(SEALED);
    await expectError(() => heir.seal([pinned(second!)], ALL), "diverged", "seal()");
    expectEqual(await heir.settled(), 0, "the number settled");
    const { batches } = await heir.seal([pinned(first!), pinned(second!)], ALL);
    expectEqual(batches.map(({ messages }) => idsOf(messages)), [["a3"]], "the batches when the sink remembers enough");
  }),
  sourceCase("adopt() goes on behind the sink's last batch, without what is known to be in it", async (storage) => {
    const { source, again, enqueue, snapshot } = storage;
    await enqueue(...notes("a1", "b1", "a2", "c1"));
    const restore = await needs(snapshot, "snapshot")();
    const session = await source().open(SEALED);
    const limits = { ...ALL, rows: 1 };
    const { batches: [first] } = await session.seal([], limits);
    const { batches: [second] } = await session.seal([pinned(first!)], limits);
    await session.seal([pinned(first!), pinned(second!)], limits);
    await restore();
    const heir = await again().open(SEALED);
    const ring = [pinned(second!)];
    await expectError(() => heir.seal(ring, ALL), "diverged", "seal()");
    await heir.adopt(ring);
    expectEqual(await heir.settled(), 2, "the number settled");
    const { batches: [next] } = await heir.seal(ring, limits);
    // a1 was delivered, but nobody knows any more: whoever accepts a source is told so.
    expectEqual([next?.n, next?.prev, idsOf(next?.messages ?? [])], [3, second!.uid, ["a1"]], "the next batch");
    expectEqual(await drainSealed(heir, ring), ["a1", "a2", "c1"], "what is left");
  }),
];

// ----------------------------------------------------------------------------------------------------------- atomic sinks

function atomicSinkCase(name: string, check: (storage: OpenAtomicSink) => Promise<void>): Case<AtomicSinkHarness> {
  return {
    name,
    async run(harness) {
      const storage = await harness.open();
      try {
        await check(storage);
      } finally {
        await storage.close();
      }
    },
  };
}

const plain = (id: string): Message =>
  createMessage({ id, topic: "orders", key: null, value: utf8.encode(id), headers: {}, time: new Date(1_800_000_000_000) });

/** The batch after a position. */
async function batchAfter({ n, uid: prev, rows: before }: Position, messages: readonly Message[]): Promise<Batch> {
  const rows = messages.map(({ id }, i) => [`${(n + 1) * 1000 + before.length + i}`, id] as const);
  return { n: n + 1, prev, rows, uid: await sha256(chainText(prev, rows)), messages };
}

async function commitNext(session: AtomicSession, before: Position, ...ids: readonly string[]): Promise<Position> {
  const batch = await batchAfter(before, ids.map(plain));
  await session.commit(batch);
  return pinned(batch);
}

/** Opens a session, and closes it afterwards. */
async function within<T>(sink: AtomicSink, run: (session: AtomicSession) => Promise<T>, owner = OWNER): Promise<T> {
  const session = await sink.open(owner);
  try {
    return await run(session);
  } finally {
    await session.close();
  }
}

const ringOf = (sink: AtomicSink): Promise<readonly Position[]> => within(sink, ({ ring }) => Promise.resolve(ring));

/** What every {@linkcode AtomicSink} must do. */
export const atomicSinkCases: readonly Case<AtomicSinkHarness>[] = [
  atomicSinkCase("open() gives no position before the first batch", async ({ sink, again, contents }) => {
    expectEqual(await ringOf(sink), [], "the ring");
    expectEqual(await ringOf(again()), [], "the ring by another handle");
    expectEqual(await contents(), [], "the content");
  }),
  atomicSinkCase(
    "open() reads back the position that was committed with the messages",
    async ({ sink, again, contents }) => {
      const first = await within(sink, (session) => commitNext(session, START, "a", "𝄞 \"b'"));
      expectEqual((await ringOf(sink)).at(-1), first, "the position");
      const second = await within(again(), (session) => commitNext(session, session.ring.at(-1)!, "c"));
      expectEqual((await ringOf(sink)).at(-1), second, "the position after the second batch");
      expectEqual(await contents(), ["a", "𝄞 \"b'", "c"], "the content");
    },
  ),
  atomicSinkCase("the ring has what was committed last, oldest first", async ({ sink, again }) => {
    const committed: Position[] = [];
    await within(sink, async (session) => {
      for (const i of range(1, 12)) committed.push(await commitNext(session, committed.at(-1) ?? START, `m${i}`));
    });
    expectEqual(await ringOf(again()), committed, "the ring");
  }),
  atomicSinkCase("commit() keeps the order of batches and messages", async ({ sink, contents }) => {
    const ids = range(1, 20).map((i) => `m${(i * 7) % 20}`);
    await within(sink, async (session) => {
      const first = await commitNext(session, START, ...ids.slice(0, 12));
      await commitNext(session, first, ...ids.slice(12));
    });
    expectEqual(await contents(), ids, "the content");
  }),
  atomicSinkCase(
    "commit() of a batch that does not come next is fenced and leaves nothing",
    async ({ sink, again, contents }) => {
      const first = await within(sink, (session) => commitNext(session, START, "a"));
      const wrong: readonly (readonly [string, Position])[] = [
        ["a batch that is there", START],
        ["a batch that leaves one out", { ...first, n: 2 }],
        ["a batch of another chain", { ...first, uid: await sha256("other") }],
      ];
      for (const [what, before] of wrong) {
        await within(sink, (session) => expectError(() => commitNext(session, before, "x", "y"), "fenced", what));
        expectEqual(await contents(), ["a"], `the content after ${what}`);
        expectEqual((await ringOf(again())).at(-1), first, `the position after ${what}`);
      }
      await within(sink, (session) => commitNext(session, first, "b"));
      expectEqual(await contents(), ["a", "b"], "the content");
    },
  ),
  atomicSinkCase("commit() of the same batch again is fenced and repeats nothing", async ({ sink, again, contents }) => {
    const batch = await batchAfter(START, [plain("a"), plain("b")]);
    await within(sink, async (session) => {
      await session.commit(batch);
      await expectError(() => session.commit(batch), "fenced", "the same batch in the same session");
    });
    await within(
      again(),
      (session) => expectError(() => session.commit(batch), "fenced", "the same batch in another session"),
    );
    expectEqual(await contents(), ["a", "b"], "the content");
  }),
  atomicSinkCase("commit() is all or nothing", async ({ sink, again, contents, refused }) => {
    const bad = needs(refused, "refused")("bad");
    await within(sink, async (session) => {
      const batch = await batchAfter(START, [plain("a"), bad, plain("b")]);
      let failed = false;
      await session.commit(batch).catch(() => failed = true);
      expect(failed, "commit() to fail where a message is refused");
    });
    expectEqual(await contents(), [], "the content");
    expectEqual(await ringOf(again()), [], "the ring");
    await within(again(), (session) => commitNext(session, START, "a", "b"));
    expectEqual(await contents(), ["a", "b"], "the content without the message");
  }),
  atomicSinkCase("commit() of an empty batch moves the position on", async ({ sink, again, contents }) => {
    const rows = [["7", "deleted meanwhile"]] as const;
    const empty = { n: 1, prev: "", rows, uid: await sha256(chainText("", rows)) };
    await within(sink, async (session) => {
      await session.commit({ ...empty, messages: [] });
      await commitNext(session, empty, "a");
    });
    expectEqual((await ringOf(again())).map(({ n, uid }) => [n, uid])[0], [1, empty.uid], "the first position");
    expectEqual(await contents(), ["a"], "the content");
  }),
  atomicSinkCase("a second owner goes on where the first stopped, and fences it", async ({ sink, again, contents }) => {
    const first = await sink.open(OWNER);
    const position = await commitNext(first, START, "a");
    let second: AtomicSession;
    try {
      second = await again().open(OWNER);
    } catch (error) {
      // A sink may keep others out for as long as its owner is there.
      await expectError(() => Promise.reject(error), "fenced", "open() while another owner is there");
      await first.close();
      second = await again().open(OWNER);
    }
    expectEqual(second.ring.at(-1), position, "where the second owner begins");
    const next = await commitNext(second, position, "b");
    const late = () => commitNext(first, position, "zombie");
    await expectError(late, "fenced", "a commit by the first owner");
    expectEqual((await contents()).join(), "a,b", "the content");
    await commitNext(second, next, "c");
    await second.close();
    await first.close();
    expectEqual((await ringOf(sink)).map(({ n }) => n), [1, 2, 3], "the numbers in the ring");
    expectEqual(await contents(), ["a", "b", "c"], "the content at the end");
  }),
  atomicSinkCase(
    "open() for another relay or source is refused, or begins at nothing",
    async ({ sink, again, contents }) => {
      const position = await within(sink, (session) => commitNext(session, START, "a"));
      for (const owner of [{ ...OWNER, relay: "other" }, { ...OWNER, source: "other" }]) {
        let session: AtomicSession;
        try {
          session = await again().open(owner);
        } catch (error) {
          await expectError(() => Promise.reject(error), "sink_invalid", "open() for another owner");
          continue;
        }
        expectEqual(session.ring, [], "the ring of another owner");
        await session.close();
      }
      expectEqual((await ringOf(sink)).at(-1), position, "the position");
      expectEqual(await contents(), ["a"], "the content");
    },
  ),
];

// ----------------------------------------------------------------------------------------------------------------- relays

/** One process on simulated time; while it is paused nothing that it waits for wakes it. */
interface Process extends Runtime {
  pause(): void;
  resume(): void;
}

/** Hashes under way, while some case counts them. */
const hashes = new Set<Promise<unknown>>();
let counting = 0;
let digest: SubtleCrypto["digest"];

/** Counts every hash from now on; the function that comes back ends that. */
function countHashes(): () => void {
  const { subtle } = crypto;
  if (counting++ === 0) {
    digest = subtle.digest.bind(subtle);
    subtle.digest = (...call) => {
      const hash = digest(...call);
      hashes.add(hash);
      const over = () => hashes.delete(hash);
      hash.then(over, over);
      return hash;
    };
  }
  return () => {
    if (--counting === 0) subtle.digest = digest;
  };
}

/** Time that moves on only when nothing else can happen, so that hours of back-off pass at once. */
function simulate() {
  let time = 0;
  let seed = 1;
  const timers = new Set<{ readonly at: number; wake(): void; awake(): boolean }>();

  function process(): Process {
    let paused = false;
    return {
      pause: () => paused = true,
      resume: () => paused = false,
      now: () => time,
      random() {
        seed = Math.imul(seed, 48_271) % 0x7fff_ffff; // Lehmer: any spread will do.
        return Math.abs(seed) / 0x7fff_ffff;
      },
      sleep: (ms, signal) =>
        new Promise((resolve) => {
          if (signal?.aborted) return resolve();
          const timer = { at: time + Math.max(0, ms), wake, awake: () => !paused };
          function wake(): void {
            timers.delete(timer);
            signal?.removeEventListener("abort", wake);
            resolve();
          }
          timers.add(timer);
          signal?.addEventListener("abort", wake);
        }),
    };
  }
  /**
   * Lets everything happen that needs no time. Hashing is the one thing here that does not end with the microtasks: a hash of
   * its own lets these run, and what other hashes there are is waited for, however busy the machine.
   */
  async function quiet(rounds: number): Promise<void> {
    for (let i = 0; i < rounds; i++) {
      await digest("SHA-256", new Uint8Array(1));
      while (hashes.size > 0) await Promise.allSettled(hashes);
    }
  }
  /** Moves time on to the next timer, at most to `end`; false if there is none. */
  async function tick(end: number): Promise<boolean> {
    const next = Math.min(...timers.values().filter(({ awake }) => awake()).map(({ at }) => at));
    if (!(next <= end)) return false;
    await quiet(next - time > 2_000 ? 60 : 10);
    const still = Math.min(...timers.values().filter(({ awake }) => awake()).map(({ at }) => at));
    if (still > next) return true;
    time = Math.max(time, still);
    for (const timer of [...timers]) if (timer.at <= time && timer.awake()) timer.wake();
    await quiet(10);
    return true;
  }
  return {
    process,
    /** Lets so much time pass. */
    async pass(ms: number): Promise<void> {
      const end = time + ms;
      await quiet(60);
      while (await tick(end));
      time = end;
      await quiet(10);
    },
    /** Lets time pass until the condition holds. */
    async until(condition: () => boolean, what: string, limitMs = 300_000): Promise<void> {
      const end = time + limitMs;
      await quiet(10);
      while (!condition()) {
        if (await tick(end)) continue;
        await quiet(300);
        if (!condition() && !await tick(end)) throw new Error(`Expected ${what} within ${limitMs} ms of simulated time`);
      }
    },
  };
}

const EPOCH = 1_800_000_000_000;

interface Call {
  readonly id: string;
  readonly key: string;
  readonly attempt: number;
  readonly at: number;
}

type Deliver = (message: Message, delivery: Delivery) => Promise<Json>;
type Started = Partial<RelayOptions> & { readonly to: RelayOptions["to"] };

/** A store with its outbox in memory, a target, and relays between them, on simulated time. */
function createWorld(harness: RelayHarness) {
  const endCount = countHashes();
  const time = simulate();
  const clock = time.process();
  const now = () => EPOCH + clock.now();
  const store = memoryStore({ now, runtime: clock });
  const events: RelayEvent[] = [];
  const calls: Call[] = [];
  const over = new AbortController();

  function start(options: Started, runtime: Runtime = clock): Promise<RelayReport> {
    const { signal, observe } = options;
    const work = harness.relay({
      ...{ name: "relay", from: memoryOutbox(store), store, drain: true, runtime },
      ...{ leaseMs: 30_000, minRetryMs: 10, maxRetryMs: 40, pollMs: 1_000 },
      ...options,
      signal: signal ? AbortSignal.any([signal, over.signal]) : over.signal,
      observe(event) {
        events.push(event);
        observe?.(event);
      },
    });
    work.catch(() => {}); // Looked at by finish(), if at all.
    return work;
  }
  async function finish(work: Promise<RelayReport>, what = "the relay to end"): Promise<RelayReport> {
    let ended = false;
    work.then(() => ended = true, () => ended = true);
    await time.until(() => ended, what);
    return await work;
  }
  return {
    time,
    clock,
    store,
    events,
    calls,
    start,
    finish,
    /** Runs a relay to its end. */
    run: (options: Started) => finish(start(options)),
    /** Stops what is left when the case is over. */
    end() {
      over.abort();
      endCount();
    },
    enqueue: (...ids: readonly string[]) => store.enqueue(...notes(...ids)),
    /** A sink that notes its calls before it makes them. */
    target(deliver: Deliver = () => Promise.resolve(null), more: Partial<CallSink> = {}): CallSink {
      return {
        kind: "call",
        name: "target",
        repeat: "never",
        ...more,
        async deliver(message, delivery) {
          const { idempotencyKey: key, number: attempt } = delivery;
          calls.push({ id: message.id, key, attempt, at: clock.now() });
          return await deliver(message, delivery);
        },
      };
    },
    /** A second store, for atomic sinks, and what is in it: the values, in order. */
    destination() {
      const store = memoryStore({ now, runtime: clock });
      const contents = () => store.outbox().map(({ value }) => new TextDecoder().decode(value ?? undefined));
      const keep = async ({ id }: Message, effects: EffectTransaction) => {
        await effects.enqueue({ topic: "copies", value: id });
      };
      const handle = (
        run: (message: Message, effects: EffectTransaction) => Promise<void> = keep,
        options: HandlerOptions = {},
      ): AtomicSink => (harness.handler ?? realHandler)(store, run, options);
      return { store, contents, keep, handle };
    },
    outbox: () => store.outbox().map(({ id, state }) => [id, state]),
    waiting: () => store.outbox().map(({ id }) => id),
    of: <T extends RelayEvent["type"]>(type: T) =>
      events.filter((event): event is Extract<RelayEvent, { type: T }> => event.type === type),
    /** The types of a message's events. */
    about: (id: string) => events.filter((event) => "id" in event && event.id === id).map(({ type }) => type),
  };
}

type World = ReturnType<typeof createWorld>;

function relayCase(name: string, check: (world: World) => Promise<void>): Case<RelayHarness> {
  return {
    name,
    async run(harness) {
      const world = createWorld(harness);
      try {
        await check(world);
      } finally {
        world.end();
      }
    },
  };
}

/** A promise that the case resolves by hand. */
function gate<T = void>() {
  let open!: (value: T) => void;
  let refuse!: (error: unknown) => void;
  const opened = new Promise<T>((resolve, reject) => {
    open = resolve;
    refuse = reject;
  });
  opened.catch(() => {});
  return { opened, open, refuse };
}

/** Never answers, as a process that was killed. */
const never = (): Promise<never> => new Promise(() => {});

/** A source whose sessions are changed. */
function tapped(from: Source, change: (session: SourceSession) => Partial<SourceSession>): Source {
  return {
    ...from,
    async open(options) {
      const session = await from.open(options);
      return { ...session, ...change(session) };
    },
  };
}

/** An atomic sink whose commits are changed. */
function tappedSink(to: AtomicSink, commit: (session: AtomicSession, batch: Batch) => Promise<void>): AtomicSink {
  return {
    ...to,
    async open(owner) {
      const session = await to.open(owner);
      return { ...session, commit: (batch) => commit(session, batch) };
    },
  };
}

/** One relay makes a call, and is paused in it for ever: its lease ends. */
async function interruptedCall(world: World, more: Partial<CallSink>, afterMs = 31_000): Promise<void> {
  const process = world.time.process();
  world.start({ to: world.target(never, more) }, process);
  const before = world.calls.length;
  await world.time.until(() => world.calls.length > before, "a call");
  process.pause();
  await world.time.pass(afterMs);
}

const sorted = (ids: readonly string[]): readonly string[] => [...ids].sort();
const WINDOW = 86_400_000;
const DEDUPES: Partial<CallSink> = { repeat: "same-key", dedupeWindowMs: WINDOW };

/** What every relay must do. */
export const relayCases: readonly Case<RelayHarness>[] = [
  // delivery and order
  relayCase("delivers every message once", async (world) => {
    const ids = range(1, 60).map((i) => `${["a", "b", "c", "d", "-"][i % 5]}${i}`);
    await world.enqueue(...ids);
    const { clock } = world;
    const report = await world.run({
      to: world.target(async () => {
        await clock.sleep(clock.random() * 50);
        return null;
      }),
      batch: 20,
    });
    expectEqual(sorted(world.calls.map(({ id }) => id)), sorted(ids), "the calls");
    expectEqual(report, { delivered: 60, parked: 0, uncertain: 0 }, "the report");
    expectEqual(world.outbox(), [], "the outbox");
  }),
  relayCase("delivers the messages of a key in order, one after the other", async (world) => {
    const ids = range(1, 60).map((i) => `${["a", "b", "c"][i % 3]}${i}`);
    await world.enqueue(...ids);
    const { clock } = world;
    const trace: string[] = [];
    await world.run({
      to: world.target(async ({ id }, { number }) => {
        trace.push(id);
        await clock.sleep(clock.random() * 50);
        if (number === 1 && clock.random() < 0.2) throw retryable("slow down");
        trace.push(`end of ${id}`);
        return null;
      }),
    });
    for (const key of ["a", "b", "c"]) {
      const ends = trace.filter((step) => step.startsWith(`end of ${key}`)).map((step) => step.slice(7));
      expectEqual(ends, ofKey(ids, key), "the order in which the calls of a key ended");
      const starts = trace.filter((step) => step.startsWith(key));
      expectEqual(starts.filter((id, i) => id !== starts[i + 1]), ofKey(ids, key), "the order in which they started");
      const steps = trace.filter((step) => step.startsWith(key) || step.startsWith(`end of ${key}`));
      const overlaps = steps.some((step, i) =>
        !step.startsWith("end") && i > 0 && steps[i - 1] !== step && !steps[i - 1]!.startsWith("end")
      );
      expect(!overlaps, `no call to start while another of its key is under way, got ${steps.join(", ")}`);
    }
  }),
  relayCase("makes as many calls at once as it has lanes, for different keys", async (world) => {
    await world.enqueue("a1", "b1", "c1", "d1", "-1", "-2", "-3", "a2");
    let [active, most] = [0, 0];
    await world.run({
      lanes: 3,
      to: world.target(async () => {
        most = Math.max(most, ++active);
        await world.clock.sleep(100);
        active--;
        return null;
      }),
    });
    expectEqual(most, 3, "the largest number of calls at once");
  }),
  relayCase("makes the call with the message as it was enqueued", async (world) => {
    await world.store.enqueue({ id: "a1", topic: "orders", key: "🔑", value: { amount: 5 }, headers: { trace: "1" } });
    const got: unknown[] = [];
    await world.run({
      to: world.target(({ id, topic, key, value, headers }, { idempotencyKey, number, signal }) => {
        got.push([id, topic, key, value, headers, idempotencyKey, number, signal.aborted]);
        return Promise.resolve(null);
      }),
    });
    const headers = { trace: "1", "content-type": "application/json" };
    expectEqual(got, [["a1", "orders", "🔑", utf8.encode('{"amount":5}'), headers, "a1", 1, false]], "the calls");
  }),
  relayCase("keeps the effect under its name and the message's id, with the target's answer", async (world) => {
    await world.enqueue("a1");
    await world.run({ name: "mail", to: world.target(() => Promise.resolve({ sent: true })) });
    const found = (await world.store.list()).map(({ scope, key, state, result }) => ({ scope, key, state, result }));
    expectEqual(found, [{ scope: "mail", key: "a1", state: "done", result: { sent: true } }], "the effects");
  }),
  relayCase("delivers a message whose answer cannot be kept, once, and says so", async (world) => {
    await world.enqueue("a1");
    const report = await world.run({ to: world.target(() => Promise.resolve("x".repeat(65_535))) });
    expectEqual([report.delivered, world.calls.length], [1, 1], "messages delivered, and calls");
    expectEqual(world.about("a1"), ["claimed", "result_omitted", "delivered"], "the events");
  }),
  relayCase("delivers rows that become visible late", async (world) => {
    await world.enqueue("a1", "b1", "c1");
    // The transaction of a1 commits when the others have been delivered.
    const late = ({ read, settle }: SourceSession): Partial<SourceSession> => ({
      async read(limits) {
        const { messages, waitMs } = await read(limits);
        const visible = messages.filter(({ id }) => id !== "a1" || messages.length === 1);
        return { messages: visible, waitMs: messages.length > 0 && visible.length === 0 ? 1 : waitMs };
      },
      settle,
    });
    const report = await world.run({ from: tapped(memoryOutbox(world.store), late), to: world.target() });
    const order = world.calls.map(({ id }) => id);
    expectEqual([order.at(-1), sorted(order)], ["a1", ["a1", "b1", "c1"]], "the last call, and all of them");
    expectEqual(report.delivered, 3, "the number delivered");
  }),

  // acknowledging
  relayCase("acknowledges nothing before it is delivered", async (world) => {
    await world.enqueue("a1");
    const answer = gate<Json>();
    const stop = new AbortController();
    const work = world.start({ drain: false, signal: stop.signal, to: world.target(() => answer.opened) });
    await world.time.until(() => world.calls.length === 1, "a call");
    for (const step of ["while the call is under way", "when told to stop"]) {
      await world.time.pass(60_000);
      expectEqual(world.waiting(), ["a1"], `the outbox ${step}`);
      expectEqual((await world.store.list()).map(({ state }) => state), ["claimed"], `the effect ${step}`);
      stop.abort();
    }
    answer.refuse(new Error("connection reset"));
    await world.finish(work);
    expectEqual(world.waiting(), ["a1"], "the outbox after an unknown outcome");
  }),
  relayCase("settles a message without a call where the store has its effect as done", async (world) => {
    await world.enqueue("a1");
    // Killed after the outcome was recorded, before the message was settled.
    const process = world.time.process();
    world.start({ from: tapped(memoryOutbox(world.store), () => ({ settle: never })), to: world.target() }, process);
    await world.time.until(() => world.calls.length === 1, "a call");
    await world.time.pass(100);
    process.pause();
    expectEqual(world.waiting(), ["a1"], "the outbox");
    const report = await world.run({ to: world.target() });
    expectEqual(world.calls.length, 1, "the number of calls");
    expectEqual([report.delivered, world.outbox()], [1, []], "the number delivered, and the outbox");
    expectEqual(world.of("delivered").map(({ id, found }) => [id, found]), [["a1", true]], "the events");
  }),
  relayCase("delivers a message once that it had read before it was settled, and all behind it", async (world) => {
    await world.enqueue("a1", "b1", "c1", "d1", "e1");
    // The answer of a read is on its way while what it tells of is delivered and settled.
    let reads = 0;
    const slow = ({ read }: SourceSession): Partial<SourceSession> => ({
      async read(limits) {
        const answer = await read(limits);
        if (++reads === 2) await world.clock.sleep(500);
        return answer;
      },
    });
    const to = world.target(async () => {
      await world.clock.sleep(100);
      return null;
    });
    const report = await world.run({ from: tapped(memoryOutbox(world.store), slow), to, batchBytes: 1, pollMs: 10 });
    expectEqual(sorted(world.calls.map(({ id }) => id)), ["a1", "b1", "c1", "d1", "e1"], "the calls");
    expectEqual([report.delivered, world.of("delivered").length], [5, 5], "the number delivered, as reported and as told");
    expectEqual(world.outbox(), [], "the outbox");
  }),
  relayCase(
    "keeps the order of a key though a read tells of the time before its first message was held back",
    async (world) => {
      for (const [key, outcome] of [["a", retryable("busy")], ["b", rejected("declined")]] as const) {
        await world.enqueue(`${key}1`);
        const [asked, answered] = [gate(), gate()];
        let reads = 0;
        const slow = ({ read }: SourceSession): Partial<SourceSession> => ({
          async read(limits) {
            if (++reads === 2) await world.enqueue(`${key}2`);
            const answer = await read(limits);
            if (reads !== 2) return answer;
            asked.open();
            await answered.opened;
            return answer;
          },
        });
        const to = world.target(async ({ id }, { number }) => {
          if (id !== `${key}1` || number > 1) return null;
          await asked.opened;
          throw outcome;
        });
        const before = world.events.length;
        const work = world.start({
          from: tapped(memoryOutbox(world.store), slow),
          to,
          minRetryMs: 5_000,
          maxRetryMs: 5_000,
        });
        const held = () => world.events.slice(before).some(({ type }) => type === "retried" || type === "parked");
        await world.time.until(held, "the first message to be held back");
        answered.open();
        await world.finish(work);
      }
      expectEqual(world.calls.map(({ id }) => id), ["a1", "a1", "a2", "b1"], "the calls");
      expectEqual(world.waiting(), ["b1", "b2"], "the outbox");
    },
  ),
  relayCase("writes an outcome down though the store fails for a moment", async (world) => {
    await world.enqueue("a1");
    let failures = 0;
    const store: ClaimStore = {
      ...world.store,
      async completeAll(completions) {
        if (failures++ < 2) throw new Error("connection lost");
        return await world.store.completeAll(completions);
      },
    };
    const report = await world.run({ store, to: world.target() });
    expectEqual([report.delivered, world.calls.length], [1, 1], "messages delivered, and calls");
    expectEqual(world.about("a1"), ["claimed", "delivered"], "the events");
  }),
  relayCase("writes an outcome down though the store is busy for longer than the lease", async (world) => {
    await world.enqueue("a1", "b1");
    const freeAt = world.clock.now() + 2 * LEASE;
    const unlessBusy = <A extends unknown[], T>(run: (...args: A) => Promise<T>) => (...args: A): Promise<T> =>
      world.clock.now() < freeAt ? Promise.reject(new EffectError("busy", "locked by another writer")) : run(...args);
    const { completeAll, fail, renew } = world.store;
    const store: ClaimStore = {
      ...world.store,
      completeAll: unlessBusy(completeAll),
      fail: unlessBusy(fail),
      renew: unlessBusy(renew),
    };
    const to = world.target(({ id }) => id === "b1" ? Promise.reject(rejected("no such account")) : Promise.resolve(null));
    const report = await world.run({ store, to });
    expectEqual(report, { delivered: 1, parked: 1, uncertain: 0 }, "the report");
    expectEqual(world.calls.length, 2, "the number of calls");
    expect(world.of("failed").length > 0, "a `failed` event meanwhile");
  }),

  // doubt
  relayCase("never repeats a call that is not safe to repeat, after an unknown outcome", async (world) => {
    await world.enqueue("a1", "b1");
    const to = world.target(({ id }) => id === "a1" ? Promise.reject(new Error("reset")) : Promise.resolve(null));
    const report = await world.run({ to });
    expectEqual(report, { delivered: 1, parked: 0, uncertain: 1 }, "the report");
    expectEqual(world.about("a1"), ["claimed", "uncertain"], "the events");
    await world.time.pass(YEAR);
    await world.run({ to });
    expectEqual(sorted(world.calls.map(({ id }) => id)), ["a1", "b1"], "the calls");
    expectEqual(world.outbox(), [["a1", "parked"]], "the outbox");
    expectEqual((await world.store.list({ key: "a1" })).map(({ state }) => state), ["uncertain"], "the effect");
  }),
  relayCase("never repeats a call that is not safe to repeat, after an interruption", async (world) => {
    await world.enqueue("a1");
    await interruptedCall(world, {});
    const report = await world.run({ to: world.target() });
    expectEqual(world.calls.length, 1, "the number of calls");
    expectEqual(report, { delivered: 0, parked: 0, uncertain: 1 }, "the report");
    expectEqual([world.outbox(), world.about("a1")], [[["a1", "parked"]], ["claimed", "uncertain"]], "outbox and events");
  }),
  relayCase("repeats a call to a target that dedupes, under the same idempotency key", async (world) => {
    await world.enqueue("a1");
    const fails = ({}: Message, { number }: Delivery) =>
      number < 3 ? Promise.reject(new Error("reset")) : Promise.resolve("sent");
    const report = await world.run({ to: world.target(fails, DEDUPES) });
    expectEqual(world.calls.map(({ key, attempt }) => [key, attempt]), [["a1", 1], ["a1", 2], ["a1", 3]], "the calls");
    expectEqual(report, { delivered: 1, parked: 0, uncertain: 0 }, "the report");
    expectEqual(world.about("a1"), ["claimed", "retried", "claimed", "retried", "claimed", "delivered"], "the events");
  }),
  relayCase("repeats an interrupted call to a target that dedupes, under the same idempotency key", async (world) => {
    await world.enqueue("a1");
    await interruptedCall(world, DEDUPES);
    const report = await world.run({ to: world.target(undefined, DEDUPES) });
    expectEqual(world.calls.map(({ key, attempt }) => [key, attempt]), [["a1", 1], ["a1", 2]], "the calls");
    expectEqual(report.delivered, 1, "the number delivered");
  }),
  relayCase("repeats no call past 80 % of the target's dedupe window", async (world) => {
    const more: Partial<CallSink> = { repeat: "same-key", dedupeWindowMs: 100_000 };
    for (const [id, wait, calls] of [["a1", 79_000, 2], ["b1", 81_000, 1]] as const) {
      await world.enqueue(id);
      await interruptedCall(world, more, wait);
      await world.run({ to: world.target(undefined, more) });
      expectEqual(world.calls.filter((call) => call.id === id).length, calls, `the number of calls after ${wait} ms`);
    }
    expectEqual(world.outbox(), [["b1", "parked"]], "the outbox");
    expectEqual(world.of("uncertain").map(({ id }) => id), ["b1"], "the messages in doubt");
  }),
  relayCase("settles a message in doubt without a call where the target has it", async (world) => {
    await world.enqueue("a1", "b1");
    const found: Found<Json> = { state: "done", result: "receipt" };
    const reconcile = () => Promise.resolve(found);
    await interruptedCall(world, { reconcile }); // b1 as well: it waits in another lane.
    const to = world.target(undefined, { reconcile });
    await world.run({ to });
    expectEqual(sorted(world.calls.map(({ id }) => id)), ["a1", "b1"], "the calls");
    expectEqual(world.outbox(), [], "the outbox");
    expectEqual(
      sorted(world.of("delivered").map(({ id, found }) => `${id} ${found}`)),
      ["a1 true", "b1 true"],
      "the events",
    );
    expectEqual((await world.store.list({ key: "a1" }))[0]?.result, "receipt", "the result");
  }),
  relayCase(
    "sends a message in doubt anew, under a new idempotency key, where the target does not have it",
    async (world) => {
      await world.enqueue("a1");
      const absent: Found<Json> = { state: "absent" };
      await interruptedCall(world, {});
      const report = await world.run({ to: world.target(undefined, { reconcile: () => Promise.resolve(absent) }) });
      const [first, second] = world.calls;
      expectEqual(
        [world.calls.length, second?.attempt, report.delivered],
        [2, 1, 1],
        "calls, attempt, and number delivered",
      );
      expect(first?.key !== second?.key, `another idempotency key than ${show(first?.key)}`);
    },
  ),
  relayCase("parks a message in doubt where the target cannot tell", async (world) => {
    await world.enqueue("a1");
    const unknown: Found<Json> = { state: "unknown" };
    await interruptedCall(world, {});
    const report = await world.run({ to: world.target(undefined, { reconcile: () => Promise.resolve(unknown) }) });
    expectEqual([world.calls.length, report.uncertain, world.outbox()], [1, 1, [["a1", "parked"]]], "calls, report, outbox");
  }),
  relayCase("asks the target about a doubt only settleMs after the attempt", async (world) => {
    await world.enqueue("a1");
    const asked: number[] = [];
    const done: Found<Json> = { state: "done", result: null };
    const reconcile = () => {
      asked.push(world.clock.now());
      return Promise.resolve(done);
    };
    let failedAt = 0;
    const fails = () => {
      failedAt = world.clock.now();
      return Promise.reject(new Error("reset"));
    };
    const report = await world.run({ settleMs: 20_000, to: world.target(fails, { reconcile }) });
    expectEqual([asked.length, report.delivered], [1, 1], "how often the target was asked, and the number delivered");
    expectBetween(asked[0]! - failedAt, 20_000, 25_000, "the time from the attempt to the question");
  }),
  relayCase("asks the target again where that fails, and parks the message in the end", async (world) => {
    await world.enqueue("a1", "b1");
    let asked = 0;
    const done: Found<Json> = { state: "done", result: null };
    const reconcile = ({ id }: Message) => {
      if (id === "b1") return Promise.resolve(done);
      asked++;
      return Promise.reject(new Error("not now"));
    };
    const to = world.target(() => Promise.reject(new Error("reset")), { reconcile });
    const report = await world.run({ attempts: 4, to });
    expectEqual([asked, world.calls.length], [4, 2], "how often the target was asked, and called");
    expectEqual(report, { delivered: 1, parked: 0, uncertain: 1 }, "the report");
    expectEqual(world.outbox(), [["a1", "parked"]], "the outbox");
  }),
  relayCase("asks a target that dedupes when the attempts are over and the outcome is not known", async (world) => {
    await world.enqueue("a1");
    const done: Found<Json> = { state: "done", result: "receipt" };
    const to = world.target(() => Promise.reject(new Error("reset")), {
      ...DEDUPES,
      reconcile: () => Promise.resolve(done),
    });
    const report = await world.run({ attempts: 3, to });
    expectEqual([world.calls.length, report.delivered], [3, 1], "the number of calls, and of messages delivered");
    expectEqual((await world.store.list())[0]?.result, "receipt", "the result");
  }),
  relayCase("parks a message in doubt when every attempt was interrupted", async (world) => {
    await world.enqueue("a1");
    for (let i = 0; i < 3; i++) {
      const process = world.time.process();
      world.start({ attempts: 3, to: world.target(never, DEDUPES) }, process);
      await world.time.until(() => world.calls.length === i + 1, "a call");
      process.pause();
      await world.time.pass(31_000);
    }
    const report = await world.run({ attempts: 3, to: world.target(undefined, DEDUPES) });
    expectEqual([world.calls.length, report.uncertain, world.outbox()], [3, 1, [["a1", "parked"]]], "calls, report, outbox");
  }),

  // retries and parking
  relayCase("tries again what is known not to have happened, after a back-off that grows to its limit", async (world) => {
    await world.enqueue("a1");
    const fails = ({}: Message, { number }: Delivery) =>
      number < 7 ? Promise.reject(retryable("busy")) : Promise.resolve(null);
    const report = await world.run({ to: world.target(fails), minRetryMs: 1_000, maxRetryMs: 10_000 });
    expectEqual(report, { delivered: 1, parked: 0, uncertain: 0 }, "the report");
    expectEqual(world.calls.map(({ key, attempt }) => [key, attempt]), range(1, 7).map((i) => ["a1", i]), "the calls");
    const retries = world.of("retried");
    expectEqual(retries.map(({ attempt, reason }) => [attempt, reason]), range(1, 6).map((i) => [i, "busy"]), "the events");
    for (const [i, { afterMs }] of retries.entries()) {
      expectBetween(afterMs, 0, Math.min(10_000, 1_000 * 2 ** i), `the back-off after attempt ${i + 1}`);
      expect(
        world.calls[i + 1]!.at - world.calls[i]!.at >= afterMs,
        `attempt ${i + 2} not before ${afterMs} ms have passed`,
      );
    }
    expect(new Set(retries.map(({ afterMs }) => afterMs)).size > 1, "the back-off to vary");
  }),
  relayCase("waits as long as the target asks", async (world) => {
    await world.enqueue("a1");
    const fails = ({}: Message, { number }: Delivery) =>
      number === 1 ? Promise.reject(retryable("slow down", { afterMs: 45_000 })) : Promise.resolve(null);
    await world.run({ to: world.target(fails) });
    expectBetween(world.calls[1]!.at - world.calls[0]!.at, 45_000, 50_000, "the time between the calls");
    expectBetween(world.of("retried")[0]!.afterMs, 45_000, 50_000, "afterMs");
  }),
  relayCase("parks a message after `attempts` attempts", async (world) => {
    await world.enqueue("a1", "b1");
    const fails = ({ id }: Message) => id === "a1" ? Promise.reject(retryable("busy")) : Promise.resolve(null);
    const report = await world.run({ to: world.target(fails), attempts: 3 });
    expectEqual(report, { delivered: 1, parked: 1, uncertain: 0 }, "the report");
    expectEqual(world.about("a1"), ["claimed", "retried", "claimed", "retried", "claimed", "parked"], "the events");
    expectEqual(world.outbox(), [["a1", "parked"]], "the outbox");
    await world.time.pass(YEAR);
    await world.run({ to: world.target(), attempts: 3 });
    expectEqual(world.calls.filter(({ id }) => id === "a1").length, 3, "the number of calls");
  }),
  relayCase("parks a refused message at once", async (world) => {
    await world.enqueue("a1", "b1");
    const refuses = ({ id }: Message) => id === "a1" ? Promise.reject(rejected("declined", 402)) : Promise.resolve(null);
    const report = await world.run({ to: world.target(refuses) });
    expectEqual(report, { delivered: 1, parked: 1, uncertain: 0 }, "the report");
    expectEqual(world.about("a1"), ["claimed", "parked"], "the events");
    expectEqual(world.of("parked").map(({ reason }) => reason), ["declined"], "the reason");
    const [effect] = await world.store.list({ key: "a1" });
    expectEqual([effect?.state, effect?.error, effect?.result], ["rejected", "declined", 402], "the effect");
  }),
  relayCase("does not drop a parked message", async (world) => {
    await world.enqueue("a1", "b1", "-1");
    const refuses = ({ id }: Message) => id === "b1" ? Promise.resolve(null) : Promise.reject(rejected("declined"));
    for (const onPark of ["block", "skip"] as const) {
      await world.run({ to: world.target(refuses), onPark });
      const parked = world.store.outbox().map(({ id, state, reason }) => ({ id, state, reason }));
      const expected = ["a1", "-1"].map((id) => ({ id, state: "parked", reason: "declined" }));
      expectEqual(parked, expected, "the parked messages");
    }
  }),
  relayCase("holds back the key of a parked message, and no other", async (world) => {
    await world.enqueue("a1", "b1", "a2", "-1", "-2", "a3", "b2");
    const refuses = ({ id }: Message) => /^(a|-)1/.test(id) ? Promise.reject(rejected("declined")) : Promise.resolve(null);
    const report = await world.run({ to: world.target(refuses) });
    await world.run({ to: world.target(refuses) });
    expectEqual(sorted(world.calls.map(({ id }) => id)), sorted(["a1", "-1", "-2", "b1", "b2"]), "the calls");
    expectEqual(report, { delivered: 3, parked: 2, uncertain: 0 }, "the report");
    expectEqual(world.waiting(), ["a1", "a2", "-1", "a3"], "the outbox");
  }),
  relayCase("lets the key go on behind a parked message where onPark is skip", async (world) => {
    await world.enqueue("a1", "b1", "a2", "a3");
    const refuses = ({ id }: Message) => id === "a1" ? Promise.reject(rejected("declined")) : Promise.resolve(null);
    const report = await world.run({ to: world.target(refuses), onPark: "skip" });
    expectEqual(ofKey(world.calls.map(({ id }) => id), "a"), ["a1", "a2", "a3"], "the calls of the key");
    expectEqual([report.delivered, report.parked, world.waiting()], [3, 1, ["a1"]], "the report and the outbox");
  }),
  relayCase("parks a message whose id was used before with other content", async (world) => {
    await world.enqueue("a1");
    await world.run({ to: world.target() });
    await world.enqueue("a1", "b1");
    const same = await world.run({ to: world.target() });
    expectEqual([world.calls.length, same.delivered], [2, 2], "the number of calls, and delivered, with the same content");
    const others: readonly Partial<NewMessage>[] = [{ value: "x" }, { topic: "x" }, { key: "x" }, { headers: { x: "" } }];
    for (const [i, fields] of others.entries()) {
      await world.store.enqueue(note(i % 2 ? "a1" : "b1", { ...fields, key: fields.key ?? `key ${i}` }));
      const report = await world.run({ to: world.target(), onPark: "skip" });
      expectEqual([world.calls.length, report.parked], [2, 1], `the number of calls, and parked, with ${show(fields)}`);
      expectEqual(world.outbox().at(-1)?.[1], "parked", "the state of the message");
      if (i % 2) break;
    }
  }),

  // leases, several relays
  relayCase("keeps its lease while a call takes long", async (world) => {
    await world.enqueue("a1");
    const slow = world.start({
      to: world.target(async () => {
        await world.clock.sleep(70_000);
        return "sent";
      }, DEDUPES),
    });
    await world.time.until(() => world.calls.length === 1, "a call");
    const other = world.start({ to: world.target(undefined, DEDUPES) }, world.time.process());
    await world.finish(slow);
    await world.finish(other);
    expectEqual(world.calls.length, 1, "the number of calls");
    expectEqual((await world.store.list()).map(({ state, result }) => [state, result]), [["done", "sent"]], "the effect");
  }),
  relayCase("tells a call to stop before its lease ends, where that cannot be renewed", async (world) => {
    await world.enqueue("a1");
    const store: ClaimStore = { ...world.store, renew: () => Promise.reject(new Error("connection lost")) };
    const stopped: number[] = [];
    const work = world.start({
      store,
      to: world.target((_, { signal }) =>
        new Promise((_, reject) =>
          signal.addEventListener("abort", () => {
            stopped.push(world.clock.now());
            reject(new Error("told to stop"));
          })
        )
      ),
    });
    await world.finish(work);
    expectEqual(stopped.length, 1, "how often the call was told to stop");
    expectBetween(stopped[0]! - world.calls[0]!.at, 10_000, 29_999, "the time until then");
  }),
  relayCase("does not record the outcome of a call whose lease was taken over", async (world) => {
    await world.enqueue("a1");
    const [late, timely] = [gate<Json>(), gate<Json>()];
    const process = world.time.process();
    const first = world.start({ to: world.target(() => late.opened, DEDUPES) }, process);
    await world.time.until(() => world.calls.length === 1, "a call");
    process.pause();
    await world.time.pass(31_000);
    const second = world.start({ to: world.target(() => timely.opened, DEDUPES) });
    await world.time.until(() => world.calls.length === 2, "a call of the second relay");
    process.resume();
    late.open("late");
    await world.time.pass(2_000);
    expectEqual(world.of("lease_lost").map(({ id }) => id), ["a1"], "the leases lost");
    expectEqual(
      [world.waiting(), (await recordOf(world.store, { scope: "relay", key: "a1" })).state],
      [["a1"], "claimed"],
      "outbox and state",
    );
    timely.open("timely");
    await world.finish(second);
    await world.finish(first);
    const { state, result, evidence } = await recordOf(world.store, { scope: "relay", key: "a1" });
    expectEqual([state, result], ["done", "timely"], "the effect");
    expect(JSON.stringify(evidence).includes("late"), `the late outcome as evidence, got ${show(evidence)}`);
    expectEqual([world.calls.length, world.outbox()], [2, []], "the number of calls, and the outbox");
  }),
  relayCase("delivers once with two relays of one name", async (world) => {
    const ids = range(1, 40).map((i) => `${["a", "b", "c", "-"][i % 4]}${i}`);
    await world.enqueue(...ids);
    const order: string[] = [];
    const to = () =>
      world.target(async ({ id }) => {
        await world.clock.sleep(world.clock.random() * 30);
        order.push(id);
        return null;
      });
    const works = [world.start({ to: to() }), world.start({ to: to() }, world.time.process())];
    for (const work of works) await world.finish(work);
    expectEqual(sorted(order), sorted(ids), "the calls");
    for (const key of ["a", "b", "c"]) expectEqual(ofKey(order, key), ofKey(ids, key), "the order of a key");
    expectEqual(world.outbox(), [], "the outbox");
  }),

  // ends
  relayCase("returns, when draining, once nothing deliverable is left", async (world) => {
    expectEqual(await world.run({ to: world.target() }), { delivered: 0, parked: 0, uncertain: 0 }, "the report of nothing");
    await world.enqueue("a1", "b1", "b2", "c1");
    const fails = ({ id }: Message, { number }: Delivery) =>
      id === "b1"
        ? Promise.reject(rejected("declined"))
        : id === "a1" && number < 3
        ? Promise.reject(retryable("slow down", { afterMs: 60_000 }))
        : Promise.resolve(null);
    const report = await world.run({ to: world.target(fails) });
    expectEqual(report, { delivered: 2, parked: 1, uncertain: 0 }, "the report");
    expectEqual(world.waiting(), ["b1", "b2"], "the outbox");
  }),
  relayCase("waits for messages, when not draining, until it is told to stop", async (world) => {
    const stop = new AbortController();
    const work = world.start({ drain: false, signal: stop.signal, to: world.target() });
    await world.time.pass(10_000);
    await world.enqueue("a1");
    await world.time.until(() => world.of("delivered").length === 1, "a message delivered");
    await world.time.pass(10_000);
    await world.enqueue("b1");
    await world.time.until(() => world.of("delivered").length === 2, "a second message delivered");
    stop.abort();
    expectEqual((await world.finish(work)).delivered, 2, "the number delivered");
  }),
  relayCase("finishes what is under way when told to stop, and starts nothing new", async (world) => {
    await world.enqueue("a1", "b1", "c1", "d1", "a2");
    const stop = new AbortController();
    const answer = gate<Json>();
    const work = world.start({ lanes: 2, drain: false, signal: stop.signal, to: world.target(() => answer.opened) });
    await world.time.until(() => world.calls.length === 2, "two calls");
    stop.abort();
    await world.time.pass(5_000);
    answer.open("sent");
    const report = await world.finish(work);
    expectEqual(sorted(world.calls.map(({ id }) => id)), ["a1", "b1"], "the calls");
    expectEqual(report, { delivered: 2, parked: 0, uncertain: 0 }, "the report");
    const effects = (await world.store.list()).map(({ key, state, result }) => [key, state, result]);
    expectEqual(effects, [["a1", "done", "sent"], ["b1", "done", "sent"]], "the effects");
    expectEqual(world.outbox(), [["c1", "pending"], ["d1", "pending"], ["a2", "pending"]], "the outbox");
  }),
  relayCase("goes on when the source or the store was busy", async (world) => {
    await world.enqueue("a1", "b1");
    let [reads, claims] = [0, 0];
    const busy = () => Promise.reject(new EffectError("busy", "locked by another writer"));
    const from = tapped(memoryOutbox(world.store), ({ read }) => ({
      read: (limits) => reads++ === 0 ? busy() : read(limits),
    }));
    const { claimAll } = world.store;
    const store: ClaimStore = { ...world.store, claimAll: (keys) => claims++ === 0 ? busy() : claimAll(keys) };
    const report = await world.run({ from, store, to: world.target() });
    expectEqual([report.delivered, world.calls.length], [2, 2], "messages delivered, and calls");
    expect(world.of("failed").length >= 2, `two \`failed\` events at least, got ${world.of("failed").length}`);
  }),
  relayCase("fails, and keeps its name, when it is told to stop and cannot write an outcome down", async (world) => {
    await world.enqueue("a1");
    const stop = new AbortController();
    const store: ClaimStore = {
      ...world.store,
      completeAll: () => Promise.reject(new EffectError("busy", "locked by another writer")),
    };
    let settled: boolean | undefined;
    const from = tapped(memoryOutbox(world.store), ({ close }) => ({
      close: (clean) => {
        settled = clean;
        return close(clean);
      },
    }));
    const work = world.start({ drain: false, signal: stop.signal, from, store, to: world.target() });
    await world.time.until(() => world.of("failed").length > 10, "eleven `failed` events");
    stop.abort();
    await expectError(() => world.finish(work), "busy", "the relay");
    expectEqual([settled, world.calls.length], [false, 1], "whether all is settled, and calls");
  }),
  relayCase("keeps its name when it is told to stop while a message is in doubt", async (world) => {
    await world.enqueue("a1");
    const stop = new AbortController();
    let settled: boolean | undefined;
    const from = tapped(memoryOutbox(world.store), ({ close }) => ({
      close: (clean) => {
        settled = clean;
        return close(clean);
      },
    }));
    const { fail } = world.store;
    const store: ClaimStore = {
      ...world.store,
      fail(key, fence, failure) {
        stop.abort();
        return fail(key, fence, failure);
      },
    };
    const target = world.target(() => Promise.reject(new Error("reset")));
    const to: CallSink = { ...target, reconcile: () => Promise.resolve({ state: "unknown" }) };
    await world.finish(world.start({ drain: false, signal: stop.signal, from, store, to }));
    expectEqual((await recordOf(world.store, { scope: "relay", key: "a1" })).state, "uncertain", "the effect");
    expectEqual([settled, world.waiting()], [false, ["a1"]], "whether all is settled, and the outbox");
  }),
  relayCase("starts once the source is no longer busy; when draining it gives up", async (world) => {
    await world.enqueue("a1");
    let opens = 0;
    const outbox = memoryOutbox(world.store);
    const from: Source = {
      ...outbox,
      open: (options) =>
        opens++ < 10 ? Promise.reject(new EffectError("busy", "locked by another writer")) : outbox.open(options),
    };
    await expectError(() => world.run({ from, to: world.target() }), "busy", "the relay that drains");
    expectEqual([opens, world.events.length], [1, 0], "attempts to open, and events");
    const stop = new AbortController();
    const work = world.start({ drain: false, signal: stop.signal, from, to: world.target() });
    await world.time.until(() => world.calls.length === 1, "a call");
    stop.abort();
    await world.finish(work);
    expectEqual(world.of("failed").length, 9, "the number of `failed` events");
  }),
  relayCase("passes on a failure of the source, once the calls under way are over", async (world) => {
    await world.enqueue("a1", "b1");
    const answer = gate<Json>();
    const boom = new RangeError("disk gone");
    let reads = 0;
    const from = tapped(memoryOutbox(world.store), ({ read }) => ({
      read: (limits) => reads++ === 0 ? read({ ...limits, rows: 1 }) : Promise.reject(boom),
    }));
    const work = world.start({ from, to: world.target(() => answer.opened) });
    await world.time.until(() => world.calls.length === 1 && reads > 1, "a call and a failure");
    answer.open("sent");
    const error = await expectError(() => world.finish(work), "RangeError", "the relay");
    expect(error === boom, "the source's own error");
    expectEqual((await recordOf(world.store, { scope: "relay", key: "a1" })).state, "done", "the effect");
    expectEqual([world.waiting(), world.events.at(-1)?.type], [["b1"], "stopped"], "the outbox, and the last event");
  }),
  relayCase("reads no more than a batch and what is in hand", async (world) => {
    await world.enqueue(...range(1, 60).map((i) => `-${i}`));
    const rows: number[] = [];
    const bytes = new Set<number>();
    let most = 0;
    const from = tapped(memoryOutbox(world.store), ({ read }) => ({
      async read(limits) {
        rows.push(limits.rows);
        bytes.add(limits.bytes);
        const answer = await read(limits);
        most = Math.max(most, answer.messages.length);
        return answer;
      },
    }));
    const to = world.target(async () => {
      await world.clock.sleep(world.clock.random() * 50);
      return null;
    });
    await world.run({ from, to, batch: 10, batchBytes: 1_234 });
    expectBetween(Math.max(...rows), 10, 20, "the largest number of rows asked for");
    expectBetween(most, 10, 20, "the largest number of messages read");
    expectEqual([...bytes], [1_234], "the bytes asked for");
  }),

  // the sealed protocol
  relayCase("commits every message once into a sink that keeps its position, in order", async (world) => {
    const ids = range(1, 50).map((i) => `${["a", "b", "-"][i % 3]}${i}`);
    await world.enqueue(...ids);
    const { handle, contents } = world.destination();
    const report = await world.run({ to: handle(), batch: 7 });
    expectEqual(contents(), ids, "what the sink has");
    expectEqual([report.delivered, world.outbox()], [50, []], "the number delivered, and the outbox");
    expectEqual(world.of("delivered").map(({ id }) => id), ids, "the events");
  }),
  relayCase("commits batches of the size asked for", async (world) => {
    const { handle } = world.destination();
    const cases = [["a", { batch: 6 }, [6, 6, 6, 2]], ["b", { batchBytes: 450 }, [4, 4, 4, 4, 4]]] as const;
    for (const [key, limits, expected] of cases) {
      await world.store.enqueue(...range(1, 20).map((i) => note(`${key}${i}`, { value: new Uint8Array(100) })));
      const sizes: number[] = [];
      const to = tappedSink(handle(), async (session, batch) => {
        sizes.push(batch.messages.length);
        await session.commit(batch);
      });
      await world.run({ to, ...limits });
      expectEqual(sizes, expected, `the sizes of the batches with ${show(limits)}`);
    }
  }),
  relayCase("goes on from the sink's position after a crash between commit and settling", async (world) => {
    await world.enqueue("a1", "b1", "a2", "b2");
    const { handle, contents } = world.destination();
    const process = world.time.process();
    let committed = false;
    const dying = tappedSink(handle(), async (session, batch) => {
      await session.commit(batch);
      committed = true;
      await never();
    });
    world.start({ to: dying, batch: 3 }, process);
    await world.time.until(() => committed, "a commit");
    process.pause();
    await world.time.pass(31_000);
    expectEqual([contents(), world.waiting()], [["a1", "b1", "a2"], ["a1", "b1", "a2", "b2"]], "sink and outbox");
    await world.run({ to: handle(), batch: 3 });
    expectEqual([contents(), world.outbox()], [["a1", "b1", "a2", "b2"], []], "what the sink has, and the outbox");
  }),
  relayCase("settles a batch only once the sink has committed it", async (world) => {
    await world.enqueue("a1", "b1", "a2", "b2");
    const { handle, contents } = world.destination();
    const process = world.time.process();
    let sent = false;
    const dying = tappedSink(handle(), () => {
      sent = true;
      return never();
    });
    world.start({ to: dying, batch: 3 }, process);
    await world.time.until(() => sent, "a commit");
    await world.time.pass(5_000);
    process.pause();
    expectEqual(world.waiting(), ["a1", "b1", "a2", "b2"], "the outbox");
    await world.time.pass(31_000);
    await world.run({ to: handle(), batch: 3 });
    expectEqual([contents(), world.outbox()], [["a1", "b1", "a2", "b2"], []], "what the sink has, and the outbox");
  }),
  relayCase("reads the sink's position again after a commit of unknown outcome", async (world) => {
    await world.enqueue("a1", "b1", "a2", "b2", "c1");
    const { handle, contents } = world.destination();
    let commits = 0;
    const flaky = tappedSink(handle(), async (session, batch) => {
      const n = ++commits;
      if (n === 1) throw new Error("connection lost before the commit");
      await session.commit(batch);
      if (n === 2) throw new Error("connection lost after the commit");
    });
    await world.run({ to: flaky, batch: 2 });
    expectEqual([contents(), world.outbox()], [["a1", "b1", "a2", "b2", "c1"], []], "what the sink has, and the outbox");
    expectEqual(world.of("failed").length, 2, "the number of `failed` events");
  }),
  relayCase("commits once with two relays of one name", async (world) => {
    const ids = range(1, 30).map((i) => `${["a", "b", "-"][i % 3]}${i}`);
    await world.enqueue(...ids);
    const { handle, contents } = world.destination();
    const slow = () =>
      tappedSink(handle(), async (session, batch) => {
        await world.clock.sleep(world.clock.random() * 50);
        await session.commit(batch);
      });
    const works = [world.start({ to: slow(), batch: 4 }), world.start({ to: slow(), batch: 4 }, world.time.process())];
    for (const work of works) await world.finish(work);
    expectEqual([contents(), world.outbox()], [ids, []], "what the sink has, and the outbox");
    expect(world.of("fenced").length > 0, "a `fenced` event of the slower one");
  }),
  relayCase("commits rows that become visible late", async (world) => {
    await world.enqueue("a1", "b1", "c1");
    const { handle, contents } = world.destination();
    // The transaction of a1 commits when the others have been delivered.
    let hidden: Message | undefined;
    const late = ({ seal, unseal }: SourceSession): Partial<SourceSession> => ({
      async seal(ring, limits) {
        if (hidden === undefined) {
          const { batches } = await seal(ring, limits);
          hidden = only(batches.flatMap(({ messages }) => messages), "a1");
          await unseal(ring, [{ message: hidden, reason: "not visible yet", retryMs: 20_000 }]);
        }
        return await seal(ring, limits);
      },
    });
    await world.run({ from: tapped(memoryOutbox(world.store), late), to: handle() });
    expectEqual([contents(), world.outbox()], [["b1", "c1", "a1"], []], "what the sink has, and the outbox");
  }),
  relayCase("halts where the sink has lost its position", async (world) => {
    await world.enqueue("a1", "b1");
    await world.run({ to: world.destination().handle() });
    await world.enqueue("a2");
    const { handle, contents } = world.destination();
    await expectError(() => world.run({ to: handle() }), "cursor_lost", "the relay");
    expectEqual([contents(), world.waiting()], [[], ["a2"]], "what the sink has, and the outbox");
    expectEqual(world.events.at(-1)?.type, "stopped", "the last event");
  }),
  relayCase("commits a handler's claim and its writes in one transaction", async (world) => {
    await world.enqueue("a1", "b1");
    const { store, handle, keep, contents } = world.destination();
    let runs = 0;
    const failsOnce = async (message: Message, effects: EffectTransaction) => {
      await keep(message, effects);
      if (++runs === 1) throw new Error("deadlock");
    };
    await world.run({ to: handle(failsOnce, { key: ({ id }) => `order ${id}` }) });
    expectEqual(sorted(contents()), ["a1", "b1"], "what the handler wrote");
    expectEqual(
      (await store.list()).map(({ key, state }) => [key, state]),
      [["order a1", "done"], ["order b1", "done"]],
      "the effects",
    );
  }),
  relayCase("commits a handler's writes and the position in one transaction", async (world) => {
    await world.enqueue("a1", "b1", "c1");
    const { handle, keep, contents } = world.destination();
    let runs = 0;
    const failsOnce = async (message: Message, effects: EffectTransaction) => {
      await keep(message, effects);
      if (++runs === 2) throw new Error("deadlock");
    };
    await world.run({ to: handle(failsOnce) });
    expectEqual([sorted(contents()), world.outbox()], [["a1", "b1", "c1"], []], "what the handler wrote, and the outbox");
  }),
  relayCase("runs a handler once for each of its keys", async (world) => {
    await world.enqueue("a1", "b1", "a2", "c1");
    const { handle, contents } = world.destination();
    const report = await world.run({ to: handle(undefined, { key: ({ id }) => id.slice(0, 1) }), batch: 2 });
    expectEqual([contents(), report.delivered], [["a1", "b1", "c1"], 4], "what the handler wrote, and the number delivered");
  }),
  relayCase("parks a message at once that the handler refuses, and delivers the others", async (world) => {
    await world.enqueue("a1", "b1", "a2", "b2", "c1");
    const { handle, keep, contents } = world.destination();
    const refuses = async (message: Message, effects: EffectTransaction) => {
      await keep(message, effects);
      if (message.id === "b1") throw rejected("no such order");
    };
    const report = await world.run({ to: handle(refuses) });
    expectEqual(contents(), ["a1", "a2", "c1"], "what the handler wrote");
    expectEqual(world.outbox(), [["b1", "parked"], ["b2", "pending"]], "the outbox");
    expectEqual(report, { delivered: 3, parked: 1, uncertain: 0 }, "the report");
    expectEqual(world.of("parked").map(({ id, reason }) => [id, reason]), [["b1", "no such order"]], "the events");
  }),
  relayCase("tries a message again that makes the handler fail, and parks it after `attempts`", async (world) => {
    await world.enqueue("a1", "b1", "a2", "c1");
    const { handle, keep, contents } = world.destination();
    const runs: string[] = [];
    const fails = async (message: Message, effects: EffectTransaction) => {
      runs.push(message.id);
      if (message.id === "a1") throw new Error("bug");
      await keep(message, effects);
    };
    const report = await world.run({ to: handle(fails), attempts: 4 });
    expectEqual(runs.filter((id) => id === "a1").length, 4, "how often the handler was run for it");
    expectEqual([contents(), world.waiting()], [["b1", "c1"], ["a1", "a2"]], "what the handler wrote, and the outbox");
    expectEqual(report, { delivered: 2, parked: 1, uncertain: 0 }, "the report");
    expectEqual(world.about("a1"), ["retried", "retried", "retried", "parked"], "the events");
  }),

  // what it promises and tells
  relayCase("says what it promises", async (world) => {
    const { handle } = world.destination();
    const promises: readonly (readonly [Started, string, string])[] = [
      [{ to: handle() }, "exactly-once", "sealed"],
      [{ to: world.target(undefined, DEDUPES) }, "effectively-once", "claimed"],
      [{ to: world.target() }, "at-most-once", "claimed"],
      [{ to: world.target(undefined, { repeat: "always" }) }, "at-least-once", "plain"],
      [{ to: world.target(), store: undefined, allowDuplicates: true }, "at-least-once", "plain"],
    ];
    for (const [options, level, protocol] of promises) {
      await world.run(options);
      const promise = world.of("started").at(-1)?.guarantee;
      expectEqual([promise?.level, promise?.protocol], [level, protocol], "level and protocol");
      expect((promise?.reasons.length ?? 0) > 0, `reasons for ${level}`);
    }
    const without = () => world.run({ to: world.target(), store: undefined });
    await expectError(without, "TypeError", "a relay without a store whose duplicates are not allowed");
  }),
  relayCase("delivers at least once without a store", async (world) => {
    await world.enqueue("a1", "b1", "c1");
    const fails = ({ id }: Message, { number }: Delivery) =>
      id === "b1"
        ? Promise.reject(rejected("declined"))
        : id === "a1" && number < 3
        ? Promise.reject(new Error("reset"))
        : Promise.resolve(null);
    const to = world.target(fails, { repeat: "always" });
    const report = await world.run({ to, store: undefined });
    expectEqual(ofKey(world.calls.map(({ id }) => id), "a").length, 3, "the number of calls for what failed twice");
    expectEqual(report, { delivered: 2, parked: 1, uncertain: 0 }, "the report");
    expectEqual([world.outbox(), await world.store.list()], [[["b1", "parked"]], []], "the outbox, and the effects");
  }),
  relayCase("calls nothing again while the source is busy, without a store too", async (world) => {
    await world.enqueue("a1");
    let busy = 0;
    const from = tapped(memoryOutbox(world.store), ({ settle }) => ({
      settle: (messages) =>
        busy++ < 10 ? Promise.reject(new EffectError("busy", "locked by another writer")) : settle(messages),
    }));
    const report = await world.run({ from, to: world.target(), store: undefined, allowDuplicates: true });
    expectEqual([report.delivered, world.calls.length], [1, 1], "messages delivered, and calls");
  }),
  relayCase("tells everything, in order and as JSON, from `started` to `stopped`", async (world) => {
    await world.enqueue("a1", "b1", "c1", "d1");
    const to = world.target(({ id }, { number }) =>
      id === "b1" && number === 1
        ? Promise.reject(retryable("busy"))
        : id === "c1"
        ? Promise.reject(rejected("declined"))
        : id === "d1"
        ? Promise.reject(new Error("reset"))
        : Promise.resolve(null)
    );
    const report = await world.run({ name: "mail", to });
    expectEqual(world.about("a1"), ["claimed", "delivered"], "the events of a delivered message");
    expectEqual(world.about("b1"), ["claimed", "retried", "claimed", "delivered"], "the events of a repeated message");
    expectEqual(world.about("c1"), ["claimed", "parked"], "the events of a parked message");
    expectEqual(world.about("d1"), ["claimed", "uncertain"], "the events of a message in doubt");
    const types = world.events.map(({ type }) => type);
    expectEqual(
      [types[0], types.at(-1), world.of("started").length],
      ["started", "stopped", 1],
      "the first and last events",
    );
    expectEqual(world.events.at(-1), { type: "stopped", relay: "mail", ...report }, "the last event");
    for (const event of world.events) {
      expectEqual(event.relay, "mail", "the relay of an event");
      const written = "time" in event ? { ...event, time: event.time.toISOString() } : event;
      expectEqual(JSON.parse(JSON.stringify(event)), written, "an event read back from JSON");
      if (!("id" in event)) continue;
      const { id, topic, key, time } = event;
      expectEqual([topic, key, time.getTime()], ["orders", id.slice(0, 1), EPOCH], "topic, key and time of an event");
    }
    const delivered = world.of("delivered").find(({ id }) => id === "a1");
    expectEqual([delivered?.attempt, delivered?.found], [1, false], "attempt and found");
    expectBetween(delivered?.ms ?? null, 0, 1_000, "ms");
  }),
  relayCase("tells once that there is nothing to do", async (world) => {
    const { handle } = world.destination();
    for (const to of [world.target(), handle()]) {
      const stop = new AbortController();
      const before = world.of("idle").length;
      const work = world.start({ drain: false, signal: stop.signal, to });
      await world.time.pass(20_000);
      expectEqual(world.of("idle").length - before, 1, "the number of `idle` events");
      await world.enqueue("a1");
      await world.time.pass(20_000);
      expectEqual(world.of("idle").length - before, 2, "the number of `idle` events after a message");
      stop.abort();
      await world.finish(work);
    }
  }),
  relayCase("tells once that another relay has the sink, until it has it itself", async (world) => {
    const { handle, contents } = world.destination();
    let taken = true;
    const unlessTaken = <T>(run: () => Promise<T>): Promise<T> =>
      taken ? Promise.reject(new EffectError("fenced", "another relay has it")) : run();
    const sink = tappedSink(handle(), (session, batch) => unlessTaken(() => session.commit(batch)));
    const to: AtomicSink = { ...sink, open: (owner) => unlessTaken(() => sink.open(owner)) };
    await world.enqueue("a1");
    const stop = new AbortController();
    const work = world.start({ drain: false, signal: stop.signal, to });
    for (const times of [1, 2]) {
      await world.time.pass(60_000);
      expectEqual(world.of("fenced").length, times, "the number of `fenced` events");
      taken = false;
      await world.time.until(() => contents().length === times, "a delivery");
      await world.time.pass(20_000);
      taken = true;
      await world.enqueue(`b${times}`);
    }
    stop.abort();
    await world.finish(work);
  }),
];
