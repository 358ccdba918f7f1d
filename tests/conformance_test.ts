/**
 * A case that no flaw can fail is not a test: for every requirement one implementation, named by it, that does not meet it.
 * Each is a right one with something wrapped around it.
 */
import { assert, assertEquals, assertRejects } from "@std/assert";
import { DatabaseSync } from "node:sqlite";
import { migrateSqlite, type SqliteClient, sqliteOutbox, sqliteStore, type SqliteValue } from "../adapters/sqlite.ts";
import {
  atomicSinkCases,
  type AtomicSinkHarness,
  type Case,
  type OpenSource,
  relayCases,
  type RelayHarness,
  sourceCases,
  type SourceHarness,
  storeCases,
  type StoreHarness,
} from "../conformance.ts";
import {
  type AtomicSession,
  type AtomicSink,
  type Batch,
  type CallSink,
  checkKey,
  type Claim,
  type ClaimStore,
  claimStore,
  createMessage,
  EffectError,
  type EffectKey,
  type EffectRecord,
  type EffectRow,
  type EffectStore,
  type EffectTransaction,
  handler,
  type Message,
  type Position,
  realRuntime,
  relay,
  type RelayOptions,
  type RelayReport,
  retryable,
  type Source,
  type SourceOptions,
  type SourceSession,
  START,
} from "../mod.ts";
import { memoryOutbox, type MemoryStore, memoryStore } from "../adapters/memory.ts";

/** Makes the tests of one list: each case must fail on its broken implementation, and say what it expected. */
function notices<H, F>(
  list: string,
  cases: readonly Case<H>[],
  faults: Readonly<Record<string, F>>,
  broken: (fault: F) => H,
) {
  for (const { name, run } of cases) {
    Deno.test(`${list} notice one that does not meet: ${name}`, async () => {
      const fault = faults[name];
      if (fault === undefined) throw new Error(`There is nothing broken for "${name}"`);
      const error = await assertRejects(() => run(broken(fault)));
      // Not because the broken implementation is broken in another way than it should.
      const told = error.message.startsWith("Expected ") || error.name === "EffectError" || error.name === "RangeError";
      assert(told, `${error.name}: ${error.message}`);
    });
  }
  Deno.test(`${list}: every case has a broken implementation, and each of these a case`, () => {
    assertEquals(Object.keys(faults).sort(), cases.map(({ name }) => name).sort());
  });
}

const nothing = (): Promise<void> => Promise.resolve();
const idOf = ({ scope, key }: EffectKey): string => JSON.stringify([scope, key]);

/** What the handles of one storage share. */
function shared<T extends object>(make: () => T): (of: object) => T {
  const values = new WeakMap<object, T>();
  return (of) => {
    let value = values.get(of);
    if (!value) values.set(of, value = make());
    return value;
  };
}

// ----------------------------------------------------------------------------------------------------------------- stores

interface Clock {
  now(): number;
}
type Store = EffectStore<null>;
type StoreFault = (right: MemoryStore, clock: Clock) => Partial<Store>;

const quick = { ...realRuntime, sleep: (ms: number, signal?: AbortSignal) => realRuntime.sleep(ms / 50, signal) };

function brokenStore(fault: StoreFault): StoreHarness {
  return {
    open() {
      let now = Date.now();
      const clock = { now: () => now };
      const right = memoryStore({ ...clock, runtime: quick });
      const handle = () => ({ ...right, ...fault(right, clock) }) as EffectStore<unknown>;
      const advance = (ms: number) => Promise.resolve(void (now += ms));
      return Promise.resolve({ store: handle(), again: handle(), waitMs: 100, advance, close: nothing });
    },
  };
}

/** A store with other claims. */
const claims = (change: (claim: Claim) => Claim): StoreFault => (right) => ({
  claim: async (key, options) => change(await right.claim(key, options)),
});

/** A store that claims otherwise. */
const claiming =
  (change: (...claim: Parameters<ClaimStore["claim"]>) => Parameters<ClaimStore["claim"]>): StoreFault => (right) => ({
    claim: (key, options) => right.claim(...change(key, options)),
    claimAll: (claims) =>
      right.claimAll(claims.map(({ key, ...options }) => {
        const [changed, others] = change(key, options);
        return { ...others, key: changed };
      })),
  });

/** A store whose rows are changed when they are read or written; it has no transactions. */
const effectsOf = shared(() => new Map<string, EffectRow>());
const rows = (change: {
  read?(row: EffectRow, now: number): EffectRow | undefined;
  write?(row: EffectRow, before: EffectRow | undefined, now: number): EffectRow;
}): StoreFault =>
(right, { now }) => {
  const effects = effectsOf(right);
  return claimStore({
    name: "rows",
    change: (steps) =>
      Promise.resolve(steps.map(({ key, step }) => {
        const before = effects.get(idOf(key));
        const { write, answer } = step(before && change.read ? change.read(before, now()) : before, now());
        if (write) effects.set(idOf(key), change.write ? change.write(write, before, now()) : write);
        return answer;
      })),
    list: ({ scope, key }) => Promise.resolve([...effects.values()].filter((row) => row.scope === scope && row.key === key)),
    count: right.count,
    prune({ olderThanMs, limit }) {
      const old = [...effects.values()].filter(({ state, changedMs }) =>
        (state === "done" || state === "rejected") && changedMs <= now() - olderThanMs
      ).slice(0, limit);
      for (const key of old) effects.delete(idOf(key));
      return Promise.resolve(old.length);
    },
  });
};

/** A store whose owners all count as the latest one. */
const fencesOf = shared(() => new Map<string, number>());
const ignoringFence: StoreFault = (right) => {
  const latest = fencesOf(right);
  const of = (key: EffectKey, fence: number) => latest.get(idOf(key)) ?? fence;
  return {
    async claim(key, options) {
      const claim = await right.claim(key, options);
      if (claim.state === "claimed") latest.set(idOf(key), claim.fence);
      return claim;
    },
    complete: (key, fence, result) => right.complete(key, of(key, fence), result),
    fail: (key, fence, failure) => right.fail(key, of(key, fence), failure),
    renew: (key, fence, leaseMs) => right.renew(key, of(key, fence), leaseMs),
  };
};

const completing = (change: (result: unknown) => unknown): StoreFault => (right) => ({
  complete: (key, fence, result) => right.complete(key, fence, change(result) as typeof result),
});
const failing =
  (change: (...fail: Parameters<ClaimStore["fail"]>) => Parameters<ClaimStore["fail"]>): StoreFault => (right) => ({
    fail: (...fail) => right.fail(...change(...fail)),
  });

/** A store that says nothing of what it refuses. */
const swallowing: StoreFault = (right) => ({
  complete: (...args) => right.complete(...args).catch(() => {}),
  renew: (...args) => right.renew(...args).catch(() => {}),
  resolve: (...args) => right.resolve(...args).catch(() => {}),
  fail: (...args) => right.fail(...args).catch(() => "waiting"),
});

/** A store with other handles in its transactions. */
const inTransactions =
  (change: (effects: EffectTransaction, right: MemoryStore) => Partial<EffectTransaction>): StoreFault => (right) => ({
    transaction: (run) =>
      right.transaction((effects, client) => {
        const changed = change(effects, right);
        const { claim } = changed;
        const claimAll = claim && (async (keys: readonly EffectKey[]) => {
          const answers = [];
          for (const key of keys) answers.push(await claim(key));
          return answers;
        });
        return run({ ...effects, ...(claimAll ? { claimAll } : {}), ...changed }, client);
      }),
  });
const transactionClaims = (change: (claim: Claim) => Claim): StoreFault =>
  inTransactions((effects) => ({ claim: async (key, options) => change(await effects.claim(key, options)) }));
const freshClaim: Claim = { state: "claimed", fence: 1, attempt: 1, generation: 1, request: null };
const dirtyOf = shared(() => ({ keys: [] as EffectKey[], open: 0 }));

const storeFaults: Readonly<Record<string, StoreFault>> = {
  "claim() takes a free key, as fence 1, attempt 1 and generation 1": claims((claim) =>
    claim.state === "claimed" ? { ...claim, attempt: claim.attempt - 1 } : claim
  ),
  "claim() is busy for a second handle while the lease holds": (_, clock) => memoryStore(clock),
  "claim() is given to one of 50 callers at once, over both handles": (right) => ({
    async claim(key, options) {
      if ((await right.list(key)).length > 0) return await right.claim(key, options);
      const claim = await right.claim(key, options); // It was free a moment ago.
      return claim.state === "busy" ? freshClaim : claim;
    },
  }),
  "claim() hands out the request as it was given": claims((claim) => ({ ...claim, request: null }) as Claim),
  "claim() refuses a key that is empty, missing, ill-formed or too long": claiming((key, options) => {
    try {
      checkKey(key);
      return [key, options];
    } catch {
      return [{ scope: "none", key: "none" }, options];
    }
  }),
  "claim() accepts the longest key allowed": claiming((key, options) => {
    if (key.key.length > 255) throw new RangeError("Cannot use a key of more than 255 characters");
    return [key, options];
  }),
  "claim() compares keys byte for byte": claiming((key, options) => [{ ...key, key: key.key.toLowerCase() }, options]),
  "claim() tells a key apart in another scope, also where scope and key run together": claiming((key, options) => [
    { scope: "all", key: `${key.scope}:${key.key}` },
    options,
  ]),
  "claim() refuses a lease that is not a whole number from 1": claiming((key, options) => [
    key,
    { ...options, leaseMs: Math.max(1, Math.round(options.leaseMs) || 1) },
  ]),
  "complete() makes an effect done for ever, for both handles": rows({
    read: (row, now) => row.state === "done" && row.changedMs < now - 60_000 ? undefined : row,
  }),
  "complete() with a fence that was overtaken is refused and changes nothing": ignoringFence,
  "complete() that comes too late leaves its outcome as evidence": rows({ write: (row) => ({ ...row, evidence: null }) }),
  "complete() can be repeated, and keeps the first result": (right) => ({
    async complete(key, fence, result) {
      if ((await right.list(key))[0]?.state === "done") {
        throw new EffectError("lease_lost", "Cannot complete it: it is done");
      }
      await right.complete(key, fence, result);
    },
  }),
  "complete() after the lease's end counts as long as nobody has taken over": (right) => ({
    async complete(key, fence, result) {
      await right.renew(key, fence, 1); // Refused after the lease's end.
      await right.complete(key, fence, result);
    },
  }),
  "complete() of an effect that was never claimed is refused": swallowing,
  "complete() of an effect that was refused is refused itself": swallowing,
  "an interrupted effect is uncertain without repeatWithinMs, and stays so": claiming((key, options) => [
    key,
    { ...options, repeatWithinMs: 1e13 },
  ]),
  "an interrupted effect is repeated within repeatWithinMs: a greater fence, the next attempt, the same request": claiming(
    (key, options) => [key, { ...options, repeatWithinMs: undefined }],
  ),
  "an interrupted effect is uncertain past repeatWithinMs from its first attempt": rows({
    write: (row, _, now) => row.state === "claimed" ? { ...row, firstMs: now } : row,
  }),
  "a doubt stays until it is resolved, also where repeatWithinMs is given later": rows({
    read: (row) => row.state === "uncertain" ? { ...row, state: "claimed" } : row,
  }),
  "a known outcome of the first owner ends the doubt, however late": rows({
    write: (row) => row.state === "uncertain" ? { ...row, fence: row.fence + 1 } : row,
  }),
  "fail() as retryable waits retryMs, then it is attempt 2, also without repeatWithinMs": failing((key, fence, failure) => [
    key,
    fence,
    { ...failure, retryMs: 0 },
  ]),
  "fail() as retryable without retryMs lets the effect be tried again at once": failing((key, fence, failure) => [
    key,
    fence,
    { ...failure, retryMs: failure.retryMs ?? 1_000 },
  ]),
  "fail() as rejected ends the effect for ever, with reason and answer": failing((key, fence, failure) => [
    key,
    fence,
    { ...failure, as: "retryable" },
  ]),
  "fail() as unknown leaves the effect uncertain": failing((key, fence, failure) => [
    key,
    fence,
    { ...failure, as: "retryable" },
  ]),
  "fail() as unknown with retryMs waits, and then asks for repeatWithinMs": failing((key, fence, failure) => [
    key,
    fence,
    { ...failure, as: "retryable" },
  ]),
  "fail() as rejected is uncertain after an attempt that may have happened": rows({
    read: (row) => ({ ...row, doubt: false }),
  }),
  "fail() as retryable does not clear the doubt of an earlier attempt": rows({ read: (row) => ({ ...row, doubt: false }) }),
  "fail() with a fence that was overtaken is refused, and leaves its outcome as evidence": ignoringFence,
  "fail() of an effect that is over is refused": swallowing,
  "renew() extends the lease from now": () => ({ renew: nothing }),
  "renew() does not shorten a lease": (right, clock) => {
    let shorter = Infinity;
    const store = rows({ write: (row, _, now) => ({ ...row, untilMs: Math.min(row.untilMs, now + shorter) }) })(
      right,
      clock,
    );
    const renew: ClaimStore["renew"] = async (key, fence, leaseMs) => {
      shorter = leaseMs;
      await store.renew!(key, fence, leaseMs);
      shorter = Infinity;
    };
    return { ...store, renew };
  },
  "renew() is refused after the lease's end": swallowing,
  "renew() with a fence that was overtaken is refused": ignoringFence,
  "renew() of an effect that is over is refused": swallowing,
  "claim() is a mismatch for another request, whatever the effect's state": claiming((key, options) => [
    key,
    { ...options, request: undefined },
  ]),
  "claim() takes a request with its members in another order for the same, and hands out the first bytes": claiming(
    (key, options) => [key, { ...options, fingerprint: JSON.stringify(options.request) }],
  ),
  "claim() compares a fingerprint in place of the request": claiming((key, options) => [
    key,
    { ...options, fingerprint: undefined },
  ]),
  "complete() keeps a result as JSON": completing((result) => JSON.stringify(result)),
  "complete() keeps null, and no result as null": completing((result) => result ?? ""),
  "complete() keeps a result of 64 KiB of JSON, and omits a larger one": completing((result) =>
    String(result).length > 32_768 ? 10n : result
  ),
  "complete() makes an effect done whose result is not JSON, and omits that": (right) => ({
    async complete(key, fence, result) {
      if (typeof result === "bigint") throw new RangeError("Cannot keep the result: it must be JSON");
      await right.complete(key, fence, result);
    },
  }),
  "resolve() as done ends a doubt with what was found": (right) => ({
    resolve: (key, { as }, fence) => right.resolve(key, { as, reason: "" }, fence),
  }),
  "resolve() as absent lets a doubtful effect run anew: the next generation, attempt 1": rows({
    write: (row) => ({ ...row, generation: 1 }),
  }),
  "resolve() as absent lifts a refusal: the next generation, attempt 1": rows({
    write: (row, before) => ({ ...row, generation: before?.state === "rejected" ? before.generation : row.generation }),
  }),
  "resolve() as absent keeps the generation of an effect that is known not to have happened": rows({
    write: (row) => row.attempt === 0 ? { ...row, generation: row.generation + 1 } : row,
  }),
  "resolve() as absent starts the time of repeatWithinMs anew": rows({
    write: (row, before) => ({ ...row, firstMs: before?.firstMs ?? row.firstMs }),
  }),
  "resolve() as rejected ends a doubt for ever": (right) => ({ resolve: (key) => right.resolve(key, { as: "absent" }) }),
  "resolve() under a live lease is busy": swallowing,
  "resolve() with a fence that was overtaken is refused": (right) => ({
    resolve: (key, resolution) => right.resolve(key, resolution),
  }),
  "resolve() refuses an effect that is done or missing": swallowing,
  "resolve() as retry repeats one in doubt under its key, for those who may; for others the doubt stays": rows({
    write: (row, before) =>
      row.attempt === 0 && before?.state === "uncertain" ? { ...row, generation: row.generation + 1 } : row,
  }),
  "resolve() overtakes the owner before it": rows({
    write: (row, before) =>
      row.attempt === 0 ? { ...row, state: "claimed", fence: before!.fence, untilMs: row.untilMs - 1 } : row,
  }),
  "list() gives effects in byte order of scope and key": (right) => ({
    list: async (options) => (await right.list(options)).toSorted((a, b) => a.key.localeCompare(b.key)),
  }),
  "list() gives at most `limit`, and goes on behind `after`": (right) => ({
    list: (options) => right.list({ ...options, after: undefined }),
  }),
  "list() gives only the state, scope and key asked for": (right) => ({
    list: (options) => right.list({ ...options, state: undefined }),
  }),
  "list() tells attempts, time, reason and result": (right) => ({
    list: async (options) => (await right.list(options)).map((record) => ({ ...record, attempts: 1 })),
  }),
  "list() tells the end of the attempt that left a doubt, and why": (right, clock) => ({
    list: async (options) => (await right.list(options)).map((record) => ({ ...record, since: new Date(clock.now()) })),
  }),
  "count() tells how many effects stand where": (right) => ({
    async count() {
      const counts = await right.count();
      return { ...counts, claimed: counts.claimed + counts.waiting, waiting: 0 };
    },
  }),
  "count() of a scope tells of that one": (right) => ({ count: () => right.count() }),
  "prune() forgets what ended long ago, and nothing else": (right) => ({
    prune: (options) => right.prune({ ...options, olderThanMs: 0 }),
  }),
  "prune() forgets at most `limit` in one go": (right) => ({
    prune: (options) => right.prune({ ...options, limit: 1_000 }),
  }),
  "prune() keeps an effect whose message is in the outbox still": rows({}),
  "prune() keeps an effect whose message is in another outbox still": (right) => ({
    prune: (options) => right.prune({ ...options, outboxes: [] }),
  }),
  "prune() keeps an effect that is let run anew while it looks": (right) => ({
    async prune({ outboxes, ...options }) {
      const forgotten = await right.prune(options); // Decides, and looks afterwards.
      for (const outbox of outboxes ?? []) await outbox.find("").catch(() => {});
      return forgotten;
    },
  }),
  "claimAll() answers in the order of its keys": (right) => ({
    claimAll: async (keys) => (await right.claimAll(keys)).toReversed(),
  }),
  "claimAll() gives a key once, also where it comes twice": (right) => ({
    async claimAll(keys) {
      const answers = new Map<string, Claim>();
      for (const { key, ...options } of keys) {
        if (!answers.has(idOf(key))) answers.set(idOf(key), await right.claim(key, options));
      }
      return keys.map(({ key }) => answers.get(idOf(key))!);
    },
  }),
  "claimAll() takes nothing where one of its keys is bad": (right) => ({
    async claimAll(keys) {
      const answers = [];
      for (const { key, ...options } of keys) answers.push(await right.claim(key, options));
      return answers;
    },
  }),
  "completeAll() tells in order which were recorded; a late one leaves its outcome as evidence": (right) => ({
    completeAll: async (completions) => (await right.completeAll(completions)).map(() => true),
  }),
  "a claim in a transaction is done for the other handle once it commits": inTransactions(() => ({
    claim: () => Promise.resolve(freshClaim),
  })),
  "a transaction that fails frees what it claimed, and passes its error on": (right) => ({
    async transaction(run) {
      const taken: EffectKey[] = [];
      try {
        return await right.transaction((effects, client) =>
          run({
            ...effects,
            claim(key, options) {
              taken.push(key);
              return effects.claim(key, options);
            },
          }, client)
        );
      } catch (error) {
        await right.transaction((effects) => effects.claimAll(taken)); // The claims were committed on their own.
        throw error;
      }
    },
  }),
  "complete() in a transaction is replayed": inTransactions(() => ({ complete: nothing })),
  "complete() in a transaction refuses what that has not claimed": inTransactions((effects) => {
    const mine = new Set<string>();
    return {
      async claim(key, options) {
        const claim = await effects.claim(key, options);
        if (claim.state === "claimed") mine.add(idOf(key));
        return claim;
      },
      complete: async (key, result) => mine.has(idOf(key)) ? await effects.complete(key, result) : undefined,
    };
  }),
  "a failure of the transaction's handle rolls it back, even if it was swallowed": inTransactions((effects, right) => ({
    enqueue(...messages) {
      const known = right.outbox().some(({ id }) => messages.some((message) => message.id === id));
      // The handle hears nothing of the failure.
      return known ? Promise.reject(new RangeError("Cannot enqueue it: the id is there")) : effects.enqueue(...messages);
    },
  })),
  "enqueue() commits with the claim, or not at all": (right) => ({
    transaction: (run) =>
      right.transaction((effects, client) => run({ ...effects, enqueue: nothing }, client)).finally(() =>
        right.enqueue({ id: "m-1", topic: "orders", value: 1 })
      ),
  }),
  "claim() in a transaction is busy for a key under a live lease": transactionClaims((claim) =>
    claim.state === "busy" ? freshClaim : claim
  ),
  "claim() in a transaction does not take an effect that is in doubt, refused or of another request": transactionClaims(
    (claim) => claim.state === "uncertain" ? freshClaim : claim,
  ),
  "claim() in a transaction takes an effect that waited to be tried again": inTransactions((effects, right) => ({
    async claim(key, options) {
      const [record] = await right.list(key);
      return record?.state === "waiting" ? { state: "busy", retryMs: 1 } : await effects.claim(key, options);
    },
  })),
  "a transaction is not seen by the other handle before it commits": (right) => {
    const dirty = dirtyOf(right);
    return {
      ...inTransactions((effects) => ({
        claim(key, options) {
          dirty.keys.push(key);
          return effects.claim(key, options);
        },
      }))(right, { now: Date.now }),
      async list(options) {
        const records = await right.list(options);
        return records.length > 0 ? records : dirty.keys.map((key) => ({ ...key, state: "done" }) as EffectRecord);
      },
    };
  },
  "transactions for one key at once make one effect": (right) => ({
    async transaction(run) {
      const seen = (await right.list()).length; // Check, then act.
      return await right.transaction((effects, client) =>
        run({
          ...effects,
          async claim(key, options) {
            const claim = await effects.claim(key, options);
            return seen === 0 ? freshClaim : claim;
          },
        }, client)
      );
    },
  }),
  "claim() in a transaction gives a key once": transactionClaims((claim) => claim.state === "done" ? freshClaim : claim),
  "a transaction that calls its own store ends in busy, not in a deadlock": (right) => {
    const dirty = dirtyOf(right);
    return {
      async transaction(run) {
        dirty.open++;
        try {
          return await right.transaction(run);
        } finally {
          dirty.open--;
        }
      },
      claim: (key, options) => dirty.open > 0 ? new Promise(() => {}) : right.claim(key, options),
    };
  },
  "isDatabaseFailure() says no to errors that are not the database's": () => ({ isDatabaseFailure: () => true }),
  "advance() moves a position on in order only": inTransactions(() => ({ advance: nothing })),
  "advance() is refused to the slower of two owners": inTransactions(() => ({ advance: nothing })),
  "positions() gives what was committed, oldest first": (right) => ({
    positions: async (owner) => (await right.positions(owner)).toReversed(),
  }),
  "positions() gives the last 100 at least": (right) => ({
    positions: async (owner) => (await right.positions(owner)).slice(-50),
  }),
  "advance() is rolled back with its transaction": (right) => ({
    async transaction(run) {
      const moves: Parameters<EffectTransaction["advance"]>[] = [];
      try {
        const advance: EffectTransaction["advance"] = (...move) => Promise.resolve(void moves.push(move));
        return await right.transaction((effects, client) => run({ ...effects, advance }, client));
      } finally {
        for (const move of moves) await right.transaction((effects) => effects.advance(...move));
      }
    },
  }),
  "positions are kept for each relay and source": (right) => ({
    positions: (owner) => right.positions({ ...owner, relay: owner.relay.toLowerCase() }),
  }),
};

notices("storeCases", storeCases, storeFaults, brokenStore);

// ---------------------------------------------------------------------------------------------------------------- sources

type SourceFault = (right: OpenSource) => Partial<OpenSource>;

function memorySource(): OpenSource {
  let now = Date.now();
  const store = memoryStore({ now: () => now });
  return {
    source: (options) => memoryOutbox(store, options),
    again: (options) => memoryOutbox(store, options),
    enqueue: store.enqueue,
    advance: (ms) => Promise.resolve(void (now += ms)),
    close: nothing,
  };
}

/** What memory does not have: operators, relays that die, and a storage that goes back in time. */
async function sqliteSource(): Promise<OpenSource> {
  const db = new DatabaseSync(":memory:") as unknown as SqliteClient & { close(): void };
  let offset = 0;
  const options = { now: () => Date.now() + offset };
  await migrateSqlite(db);
  const store = sqliteStore(db, options);
  const { release, discard } = sqliteOutbox(db, options);
  const source: OpenSource["source"] = ({ topics } = {}) => sqliteOutbox(db, { ...options, topics });
  const tables = ["outbox", "shards", "batches", "relays"].map((name) => `effectonce_${name}`);
  return {
    source,
    again: source,
    enqueue: (...messages) => store.transaction((effects) => effects.enqueue(...messages)),
    advance: (ms) => Promise.resolve(void (offset += ms)),
    release,
    discard,
    snapshot() {
      const kept = tables.map((name) => db.prepare(`select * from ${name}`).all() as Record<string, SqliteValue>[]);
      return Promise.resolve(() => {
        tables.forEach((name, i) => {
          db.prepare(`delete from ${name}`).run();
          for (const row of kept[i]!) {
            const columns = Object.keys(row);
            const places = columns.map(() => "?").join(", ");
            db.prepare(`insert into ${name} (${columns.join(", ")}) values (${places})`).run(...Object.values(row));
          }
        });
        return Promise.resolve();
      });
    },
    close: () => Promise.resolve(db.close()),
  };
}

const onSqlite = new Set<string>();

function tapped(
  from: Source,
  change: (session: SourceSession, options: SourceOptions) => Partial<SourceSession>,
  changeOptions: (options: SourceOptions) => SourceOptions = (options) => options,
): Source {
  return {
    ...from,
    async open(options) {
      const session = await from.open(changeOptions(options));
      return { ...session, ...change(session, options) };
    },
  };
}

/** A source with other sessions. */
const sessions = (
  change: (session: SourceSession, options: SourceOptions) => Partial<SourceSession>,
  changeOptions?: (options: SourceOptions) => SourceOptions,
): SourceFault =>
({ source, again }) => ({
  source: (options) => tapped(source(options), change, changeOptions),
  again: (options) => tapped(again(options), change, changeOptions),
});
const opened = (changeOptions: (options: SourceOptions) => SourceOptions): SourceFault =>
  sessions(() => ({}), changeOptions);
const messagesRead = (change: (messages: readonly Message[]) => readonly Message[]): SourceFault =>
  sessions(({ read }) => ({
    async read(limits) {
      const { messages, waitMs } = await read(limits);
      return { messages: change(messages), waitMs };
    },
  }));

/** Reads on behind the last message that was settled. */
function withLowerBound({ read, settle, seal }: SourceSession): Partial<SourceSession> {
  let last = "";
  const behind = ({ id }: Message) => id > last;
  const note = (id: string) => {
    if (id > last) last = id;
  };
  return {
    async read(limits) {
      const answer = await read(limits);
      return { ...answer, messages: answer.messages.filter(behind) };
    },
    async settle(messages) {
      await settle(messages);
      for (const { id } of messages) note(id);
    },
    async seal(ring, limits) {
      for (const [, id] of ring.at(-1)?.rows ?? []) note(id);
      const answer = await seal(ring, limits);
      return { ...answer, batches: answer.batches.map((batch) => ({ ...batch, messages: batch.messages.filter(behind) })) };
    },
  };
}

const pinned = ({ n, uid, prev, rows }: Position): Position => ({ n, uid, prev, rows });

/** Settles what it has handed out, before it knows the sink's position. */
function settlingEarly({ seal }: SourceSession): Partial<SourceSession> {
  return {
    async seal(ring, limits) {
      const answer = await seal(ring, limits);
      await seal([...ring, ...answer.batches.map(pinned)], limits);
      return answer;
    },
  };
}

const refusingTwice = () => {
  let count = 0;
  return (from: Source): Source => ({
    ...from,
    open(options) {
      if (count++ > 0) throw new EffectError("source_invalid", "A relay is there already");
      return from.open(options);
    },
  });
};

const sourceFaults: Readonly<Record<string, SourceFault>> = {
  "read() gives messages in the order in which they were enqueued": messagesRead((messages) =>
    messages.toSorted((a, b) => a.id < b.id ? -1 : 1)
  ),
  "read() gives the same again until it is settled": sessions(({ read }) => {
    const given = new Set<string>();
    return {
      async read(limits) {
        const answer = await read(limits);
        const messages = answer.messages.filter(({ id }) => !given.has(id));
        for (const { id } of messages) given.add(id);
        return { ...answer, messages };
      },
    };
  }),
  "settle() ends a message for ever and for all": sessions(() => ({ settle: nothing })),
  "settle() ends only the messages it is given": sessions(({ read, settle }) => ({
    async settle(messages) {
      const all = (await read({ rows: 1_000, bytes: 1e9 })).messages;
      const last = Math.max(...messages.map(({ id }) => all.findIndex((message) => message.id === id)));
      await settle(all.slice(0, last + 1)); // All up to the last, as a position does.
    },
  })),
  "read() gives a message as it was enqueued": messagesRead((messages) =>
    messages.map((message) => createMessage({ ...message, headers: {} }))
  ),
  // As a collation does that takes case and trailing blanks for nothing.
  "ids and keys are compared byte for byte": sessions(({ read, park }) => {
    const alike = (key: string | null) => key?.trimEnd().toLowerCase();
    const held = new Set<string | undefined>();
    return {
      async park(parks) {
        await park(parks);
        for (const { message } of parks) held.add(alike(message.key));
      },
      async read(limits) {
        const answer = await read(limits);
        return { ...answer, messages: answer.messages.filter(({ key }) => key === null || !held.has(alike(key))) };
      },
    };
  }),
  "a message without an id is given one of its own": messagesRead((messages) =>
    messages.map((message) => createMessage({ ...message, id: "none" }))
  ),
  "read() gives no more rows and bytes than asked for, but always one message": sessions(({ read }) => ({
    read: (limits) => read({ ...limits, bytes: 1e9 }),
  })),
  "read() gives the messages of its topics only": ({ source }) => ({
    source: () => tapped(source(), () => ({}), (options) => ({ ...options, relay: "all" })),
    again: () => tapped(source(), () => ({}), (options) => ({ ...options, relay: "all" })),
  }),
  "park() with retryMs holds back the message and its key until then; others go on": sessions(() => ({ park: nothing })),
  "a key keeps its order over parking, waking and settling, also of what is enqueued meanwhile": sessions(({ read }) => {
    const held = new Set<string>();
    return {
      park: (parks) => Promise.resolve(parks.forEach(({ message }) => held.add(message.id))),
      async read(limits) {
        const { messages } = await read(limits);
        return { messages: messages.filter(({ id }) => !held.has(id)), waitMs: null }; // The key goes on.
      },
    };
  }),
  "park() for good holds back the key where onPark is block": opened((options) => ({ ...options, onPark: "skip" })),
  "park() for good holds back only the message where onPark is skip": opened((options) => ({ ...options, onPark: "block" })),
  "a later relay with another onPark holds back and frees by its own": (right) => {
    let first: SourceOptions["onPark"] | undefined;
    return opened((options) => ({ ...options, onPark: first ??= options.onPark }))(right);
  },
  "read() gives a message that was held back, though later ones are settled": sessions(withLowerBound),
  "held messages and what is behind them never fill the window of others": (right) => {
    let held = 0;
    return sessions(({ read, park }) => ({
      async read(limits) {
        const rows = limits.rows - held; // They are read, and thrown away.
        return rows > 0 ? await read({ ...limits, rows }) : { messages: [], waitMs: null };
      },
      async park(parks) {
        await park(parks);
        held += parks.length;
      },
    }))(right);
  },
  "release() lets a parked or waiting message go, then what it held back, in order": () => {
    const held = new Set(["a1", "c1"]);
    return { release: (id) => Promise.resolve(held.delete(id)) };
  },
  "discard() removes a parked or waiting message, and what it held back goes, in order": () => {
    const held = new Set(["a1", "c1", "x1"]);
    return { discard: (id) => Promise.resolve(held.delete(id)) };
  },
  "open() refuses a relay of another name on overlapping topics": opened((options) => ({ ...options, relay: "any" })),
  "open() refuses every other name beside a relay of all topics": opened((options) => ({ ...options, relay: "any" })),
  "open() takes relays of one name at once, whatever their topics": ({ source, again }) => {
    const once = refusingTwice();
    return { source: (options) => once(source(options)), again: (options) => once(again(options)) };
  },
  "close() of the last relay of a name frees its topics, if it leaves nothing behind": sessions(() => ({ close: nothing })),
  "close() of a relay that leaves something behind keeps the topics for its name": sessions(({ close }) => ({
    close: () => close(true),
  })),
  "a relay that fell silent keeps its topics for its name, but for the plain protocol": sessions(() => ({ renew: nothing })),
  "a relay that fell silent keeps no topics of which nothing is left": opened((options) => ({
    ...options,
    leaseMs: 2 ** 40,
  })),
  "a relay that wakes after its topics went to another name delivers nothing more": sessions(({ read }) => ({
    read: (limits) => read(limits).catch(() => ({ messages: [], waitMs: null })),
  })),
  "open() tells the source's own identity, the same for all": ({ source, again }) => ({
    source,
    again: (options) => tapped(again(options), () => ({ id: crypto.randomUUID() })),
  }),
  "seal() numbers batches from 1, each with the hash of the chain before it": sessions(({ seal }) => ({
    async seal(ring, limits) {
      const answer = await seal(ring, limits);
      return { ...answer, batches: answer.batches.map((batch) => ({ ...batch, prev: "" })) };
    },
  })),
  "seal() hands out a sealed batch unchanged, though messages are added": sessions(({ seal, unseal }) => ({
    async seal(ring, limits) {
      await unseal(ring, []);
      return await seal(ring, limits);
    },
  })),
  "seal() seals at most two batches ahead": sessions(({ seal }) => ({
    async seal(ring, limits) {
      const answer = await seal(ring, limits);
      const [first] = answer.batches;
      return { ...answer, batches: [...answer.batches, ...(first ? [{ ...first, n: first.n + 2 }] : [])] };
    },
  })),
  "seal() settles exactly the messages of the batches that are committed": sessions(settlingEarly),
  "seal() with a position of before is fenced": sessions(({ seal }) => ({
    seal: (ring, limits) => seal(ring, limits).catch(() => ({ batches: [], waitMs: null, repaired: [] })),
  })),
  "seal() hands every session of a relay the same sealed batches": (right) => {
    const owners = new Map<string, SourceSession>();
    return sessions((session) => ({
      async seal(ring, limits) {
        const answer = await session.seal(ring, limits);
        const mine = ({ uid }: Batch) => {
          if (!owners.has(uid)) owners.set(uid, session);
          return owners.get(uid) === session;
        };
        return { ...answer, batches: answer.batches.filter(mine) };
      },
    }))(right);
  },
  "seal() gives no more rows and bytes than asked for, but always one message": sessions(({ seal }) => ({
    seal: (ring, limits) => seal(ring, { ...limits, bytes: 1e9 }),
  })),
  "seal() gives nothing where nothing may go, and says how long one waits": sessions(({ seal }) => ({
    seal: async (ring, limits) => ({ ...await seal(ring, limits), waitMs: null }),
  })),
  "unseal() takes apart what is not committed, and parks; the rest is sealed anew": sessions(({ unseal }) => ({
    unseal: (ring) => unseal(ring, []),
  })),
  "seal() goes on with other keys behind a parked message and what it holds back": sessions(({ seal }) => ({
    async seal(ring, limits) {
      const answer = await seal(ring, limits);
      return answer.waitMs === null ? answer : { ...answer, batches: [] };
    },
  })),
  "seal() goes on within the key behind a parked message where onPark is skip": opened((options) => ({
    ...options,
    onPark: "block",
  })),
  "seal() seals a message that was held back, though later ones are settled": sessions(withLowerBound),
  "seal() repairs a source that has lost batches from what the sink remembers": sessions(({ seal }) => ({
    seal: (ring, limits) => seal(ring.slice(-1), limits), // It remembers only the last.
  })),
  "seal() tells a lost batch from another one of its number": sessions(({ seal }) => {
    const known = new Map<number, string>();
    return {
      async seal(ring, limits) {
        const answer = await seal(
          ring.map((position) => ({ ...position, uid: known.get(position.n) ?? position.uid })),
          limits,
        );
        for (const { n, uid } of answer.batches) known.set(n, uid); // The number is taken for the batch.
        return answer;
      },
    };
  }),
  "seal() has diverged where what the sink remembers does not reach back far enough": sessions(({ seal }) => ({
    seal: (ring, limits) => seal(ring, limits).catch(() => ({ batches: [], waitMs: null, repaired: [] })),
  })),
  "adopt() goes on behind the sink's last batch, without what is known to be in it": sessions(({ adopt }) => ({
    adopt: (ring) => adopt(ring.map((position) => ({ ...position, rows: [] }))),
  })),
};

for (const name of Object.keys(sourceFaults)) {
  if (/^(release|discard|close\(\) of a relay|a relay that)|repairs a source|lost batch|diverged|adopt/.test(name)) {
    onSqlite.add(name);
  }
}

notices("sourceCases", sourceCases, sourceFaults, (fault): SourceHarness => ({
  async open() {
    const needed = Object.entries(sourceFaults).some(([name, each]) => each === fault && onSqlite.has(name));
    const right = needed ? await sqliteSource() : memorySource();
    return { ...right, ...fault(right) };
  },
}));

// ----------------------------------------------------------------------------------------------------------- atomic sinks

/** What is wrong with a handler's store, or with the sink. */
interface SinkFault {
  store?(right: MemoryStore): MemoryStore;
  sink?(right: AtomicSink): AtomicSink;
}

const plain = (id: string): Message =>
  createMessage({ id, topic: "orders", key: null, value: null, headers: {}, time: new Date() });

function brokenSink({ store = (right) => right, sink = (right) => right }: SinkFault): AtomicSinkHarness {
  return {
    open() {
      const right = memoryStore();
      const make = () =>
        sink(handler(store(right), async ({ id }, effects) => {
          if (id === "bad") throw new Error("refused");
          await effects.enqueue({ topic: "content", value: id });
        }));
      return Promise.resolve({
        sink: make(),
        again: make,
        contents: () => Promise.resolve(right.outbox().map(({ value }) => new TextDecoder().decode(value ?? undefined))),
        refused: plain,
        close: nothing,
      });
    },
  };
}

const tappedSink = (change: (session: AtomicSession) => Partial<AtomicSession>) => (right: AtomicSink): AtomicSink => ({
  ...right,
  async open(owner) {
    const session = await right.open(owner);
    return { ...session, ...change(session) };
  },
});

/** A store that does something else in its transactions. */
const transacting = (
  change: (effects: EffectTransaction, right: MemoryStore) => Partial<EffectTransaction>,
) =>
<S extends EffectStore<unknown>>(right: S): S => ({
  ...right,
  transaction: (run: (effects: EffectTransaction, client: unknown) => Promise<unknown>) =>
    right.transaction((effects, client) => run({ ...effects, ...change(effects, right as unknown as MemoryStore) }, client)),
});

/** The position is not kept. */
const forgetful = transacting(() => ({ advance: nothing }));

/** Whatever comes is taken for the next batch. */
const unfenced = transacting((effects, right) => ({
  async advance(owner, position) {
    const last = (await right.positions(owner)).at(-1) ?? START;
    await effects.advance(owner, { ...position, n: last.n + 1, prev: last.uid });
  },
}));

/** The claims commit before the writes, in a transaction of their own. */
const claimsApart = <S extends EffectStore<unknown>>(right: S): S => ({
  ...right,
  async transaction(run: (effects: EffectTransaction, client: unknown) => Promise<unknown>) {
    const later: ((effects: EffectTransaction) => Promise<void>)[] = [];
    const put = (step: (effects: EffectTransaction) => Promise<void>) => Promise.resolve(void later.push(step));
    const answer = await run({
      claim: (key, options) => right.transaction((effects) => effects.claim(key, options)),
      claimAll: (keys) => right.transaction((effects) => effects.claimAll(keys)),
      complete: (key, result) => put((effects) => effects.complete(key, result)),
      enqueue: (...messages) => put((effects) => effects.enqueue(...messages)),
      advance: (owner, position) => put((effects) => effects.advance(owner, position)),
    }, null);
    await right.transaction(async (effects) => {
      for (const step of later) await step(effects);
    });
    return answer;
  },
});

/** The writes commit one by one, the position after them. */
const writesApart = <S extends EffectStore<unknown>>(right: S): S => ({
  ...right,
  async transaction(run: (effects: EffectTransaction, client: unknown) => Promise<unknown>) {
    const moves: Parameters<EffectTransaction["advance"]>[] = [];
    const alone = (step: (effects: EffectTransaction) => Promise<void>) => right.transaction(step);
    const answer = await run({
      claim: (key, options) => right.transaction((effects) => effects.claim(key, options)),
      claimAll: (keys) => right.transaction((effects) => effects.claimAll(keys)),
      complete: (key, result) => alone((effects) => effects.complete(key, result)),
      enqueue: (...messages) => alone((effects) => effects.enqueue(...messages)),
      advance: (...move) => Promise.resolve(void moves.push(move)),
    }, null);
    for (const move of moves) await right.transaction((effects) => effects.advance(...move));
    return answer;
  },
});

const sinkFaults: Readonly<Record<string, SinkFault>> = {
  "open() gives no position before the first batch": {
    sink: tappedSink(({ ring }) => ({ ring: [START, ...ring] })),
  },
  "open() reads back the position that was committed with the messages": { sink: tappedSink(() => ({ ring: [] })) },
  "the ring has what was committed last, oldest first": {
    sink: tappedSink(({ ring }) => ({ ring: ring.toReversed() })),
  },
  "commit() keeps the order of batches and messages": {
    sink: tappedSink(({ commit }) => ({
      commit: (batch) => commit({ ...batch, messages: batch.messages.toReversed() }),
    })),
  },
  "commit() of a batch that does not come next is fenced and leaves nothing": {
    sink: tappedSink(({ ring, commit }) => {
      let last = ring.at(-1) ?? START;
      return {
        async commit(batch) {
          const next = { ...batch, n: last.n + 1, prev: last.uid }; // Whatever comes is taken for the next.
          await commit(next);
          last = pinned(next);
        },
      };
    }),
  },
  "commit() of the same batch again is fenced and repeats nothing": {
    sink: tappedSink(({ commit }) => ({ commit: (batch) => commit(batch).catch(() => {}) })),
  },
  "commit() is all or nothing": { store: writesApart },
  "commit() of an empty batch moves the position on": {
    sink: tappedSink(({ commit }) => ({
      commit: async (batch) => batch.messages.length > 0 ? await commit(batch) : undefined,
    })),
  },
  "a second owner goes on where the first stopped, and fences it": {
    sink: tappedSink(({ ring, commit }) => {
      let last = ring.at(-1) ?? START;
      return {
        async commit(batch) {
          try {
            await commit(batch);
          } catch {
            await commit({ ...batch, n: last.n + 2, prev: batch.uid }).catch(() => {}); // Fenced, and nobody hears of it.
          }
          last = pinned(batch);
        },
      };
    }),
  },
  "open() for another relay or source is refused, or begins at nothing": {
    sink: (right) => ({ ...right, open: () => right.open({ relay: "relay", source: "outbox" }) }),
  },
};

notices("atomicSinkCases", atomicSinkCases, sinkFaults, brokenSink);

// ----------------------------------------------------------------------------------------------------------------- relays

/** Another relay, or another handler. */
interface RelayFault {
  relay?(options: RelayOptions): Promise<RelayReport>;
  store?<S extends EffectStore<unknown>>(right: S): S;
  keyless?: boolean;
}

function brokenRelay({ relay: wrong = relay, store, keyless = false }: RelayFault): RelayHarness {
  return {
    relay: wrong,
    handler: (right, run, options) => handler(store ? store(right) : right, run, keyless ? {} : options),
  };
}

/** A relay given other options, or ends with something around them. */
const given = (change: (options: RelayOptions) => Partial<RelayOptions>): RelayFault => ({
  relay: (options) => relay({ ...options, ...change(options) }),
});
const called = (change: (sink: CallSink, options: RelayOptions) => Partial<CallSink>): RelayFault =>
  given((options) => options.to.kind === "call" ? { to: { ...options.to, ...change(options.to, options) } } : {});
const committing = (change: (session: AtomicSession) => Partial<AtomicSession>): RelayFault =>
  given(({ to }) => to.kind === "atomic" ? { to: tappedSink(change)(to) } : {});
const sourced = (change: (session: SourceSession) => Partial<SourceSession>): RelayFault =>
  given(({ from }) => ({ from: tapped(from, change) }));
const stored = (change: (store: ClaimStore) => Partial<ClaimStore>): RelayFault =>
  given(({ store }) => store ? { store: { ...store, ...change(store) } } : {});

const reconciling = (
  change: (found: () => ReturnType<NonNullable<CallSink["reconcile"]>>) => ReturnType<
    NonNullable<CallSink["reconcile"]>
  >,
): RelayFault =>
  called(({ reconcile }) =>
    reconcile ? { reconcile: (message, delivery) => change(() => reconcile(message, delivery)) } : {}
  );

/** Counts every owner as the latest one. */
const ignoringFences = (): RelayFault => {
  const latest = new Map<string, number>();
  return stored(({ claimAll, completeAll, fail }) => ({
    async claimAll(keys) {
      const answers = await claimAll(keys);
      answers.forEach((answer, i) => {
        if (answer.state === "claimed") latest.set(idOf(keys[i]!.key), answer.fence);
      });
      return answers;
    },
    completeAll: (completions) =>
      completeAll(completions.map((each) => ({ ...each, fence: latest.get(idOf(each.key)) ?? each.fence }))),
    fail: (key, fence, failure) => fail(key, latest.get(idOf(key)) ?? fence, failure),
  }));
};

const acknowledgingEarly: RelayFault = given(({ from, to }) => {
  let session: SourceSession | undefined;
  return {
    from: tapped(from, (opened) => {
      session = opened;
      return {};
    }),
    to: to.kind === "atomic" ? to : {
      ...to,
      async deliver(message, delivery) {
        await session!.settle([message]);
        return await to.deliver(message, delivery);
      },
    },
  };
});

const droppingParked: RelayFault = sourced(({ park, settle }) => ({
  async park(parks) {
    await settle(parks.filter(({ retryMs }) => retryMs === null).map(({ message }) => message));
    await park(parks.filter(({ retryMs }) => retryMs !== null));
  },
}));

const relayFaults: Readonly<Record<string, RelayFault>> = {
  "delivers every message once": called(({ deliver }) => ({
    async deliver(message, delivery) {
      await deliver(message, delivery);
      return await deliver(message, delivery);
    },
  })),
  // Overtakes within a key.
  "delivers the messages of a key in order, one after the other": sourced(({ read }) => ({
    async read(limits) {
      const { messages, waitMs } = await read(limits);
      return { messages: messages.map((message) => createMessage({ ...message, key: null })), waitMs };
    },
  })),
  "makes as many calls at once as it has lanes, for different keys": given(() => ({ lanes: 1 })),
  "makes the call with the message as it was enqueued": called(({ deliver }) => ({
    deliver: (message, delivery) => deliver(createMessage({ ...message, value: null }), delivery),
  })),
  "keeps the effect under its name and the message's id, with the target's answer": given(() => ({ name: "other" })),
  "delivers a message whose answer cannot be kept, once, and says so": called(({ deliver }) => ({
    async deliver(message, delivery) {
      const answer = await deliver(message, delivery);
      if (JSON.stringify(answer).length > 65_536) throw new Error("the answer is too long");
      return answer;
    },
  })),
  // Reads with a lower bound.
  "delivers rows that become visible late": sourced(withLowerBound),
  // Acknowledges before delivery.
  "acknowledges nothing before it is delivered": acknowledgingEarly,
  "settles a message without a call where the store has its effect as done": stored(({ claimAll }) => ({
    claimAll: async (keys) =>
      (await claimAll(keys)).map((claim) => claim.state === "done" ? { ...freshClaim, attempt: 2 } : claim),
  })),
  "delivers a message once that it had read before it was settled, and all behind it": sourced(({ settle }) => {
    let forgotten = false;
    return {
      async settle(messages) {
        if (forgotten) await settle(messages);
        forgotten = true;
      },
    };
  }),
  "keeps the order of a key though a read tells of the time before its first message was held back": sourced(
    ({ read, park }) => {
      const held = new Set<string>();
      let last: readonly Message[] = [];
      return {
        async read(limits) {
          const answer = await read(limits);
          const known = new Set(answer.messages.map(({ id }) => id));
          // What was there a read ago counts as still there, but for the message that is held back itself.
          const messages = [...answer.messages, ...last.filter(({ id }) => !known.has(id) && !held.has(id))];
          last = answer.messages;
          return { ...answer, messages };
        },
        async park(parks) {
          await park(parks);
          for (const { message } of parks) held.add(message.id);
        },
      };
    },
  ),
  "writes an outcome down though the store fails for a moment": stored(({ completeAll }) => ({
    completeAll: (completions) => completeAll(completions).catch(() => completions.map(() => false)),
  })),
  "writes an outcome down though the store is busy for longer than the lease": stored(({ completeAll }) => {
    let busy = 0;
    return {
      completeAll: (completions) =>
        completeAll(completions).catch((error) => {
          if (busy++ < 5) throw error;
          throw new EffectError("source_invalid", "gave up");
        }),
    };
  }),
  // Repeats a call that is not repeatable.
  "never repeats a call that is not safe to repeat, after an unknown outcome": called(({ deliver }) => ({
    deliver: (message, delivery) => deliver(message, delivery).catch(() => deliver(message, delivery)),
  })),
  "never repeats a call that is not safe to repeat, after an interruption": stored(({ claimAll }) => ({
    claimAll: (keys) => claimAll(keys.map((each) => ({ ...each, repeatWithinMs: 1e12 }))),
  })),
  "repeats a call to a target that dedupes, under the same idempotency key": called(({ deliver }) => ({
    deliver: (message, delivery) =>
      deliver(message, { ...delivery, idempotencyKey: `${delivery.idempotencyKey}-${delivery.number}` }),
  })),
  "repeats an interrupted call to a target that dedupes, under the same idempotency key": called(() => ({
    repeat: "never",
  })),
  "repeats no call past 80 % of the target's dedupe window": called(({ dedupeWindowMs = 0 }) => ({
    dedupeWindowMs: dedupeWindowMs * 2,
  })),
  "settles a message in doubt without a call where the target has it": reconciling(() =>
    Promise.resolve({ state: "absent" })
  ),
  "sends a message in doubt anew, under a new idempotency key, where the target does not have it": called(({ deliver }) => ({
    deliver: (message, delivery) => deliver(message, { ...delivery, idempotencyKey: message.id }),
  })),
  "parks a message in doubt where the target cannot tell": reconciling(() => Promise.resolve({ state: "absent" })),
  "asks the target about a doubt only settleMs after the attempt": given(() => ({ settleMs: 0 })),
  "asks the target again where that fails, and parks the message in the end": reconciling((ask) =>
    ask().catch(() => ({ state: "unknown" }))
  ),
  "asks a target that dedupes when the attempts are over and the outcome is not known": called(() => ({
    reconcile: undefined,
  })),
  "parks a message in doubt when every attempt was interrupted": given(() => ({ attempts: 100 })),
  "tries again what is known not to have happened, after a back-off that grows to its limit": given(({ from, store }) => ({
    from: tapped(from, ({ park }) => ({
      park: (parks) => park(parks.map((each) => ({ ...each, retryMs: each.retryMs === null ? null : 0 }))),
    })),
    store: store && {
      ...store,
      fail: (key, fence, failure) =>
        store.fail(key, fence, { ...failure, retryMs: failure.retryMs === undefined ? undefined : 0 }),
    },
  })),
  "waits as long as the target asks": called(({ deliver }) => ({
    deliver: (message, delivery) =>
      deliver(message, delivery).catch((error) => {
        throw retryable(error.message);
      }),
  })),
  "parks a message after `attempts` attempts": given(({ attempts = 10 }) => ({ attempts: attempts * 10 })),
  "parks a refused message at once": called(({ deliver }) => ({
    deliver: (message, delivery) =>
      deliver(message, delivery).catch((error) => {
        throw retryable(error.message);
      }),
  })),
  // Drops a parked message.
  "does not drop a parked message": droppingParked,
  "holds back the key of a parked message, and no other": given(() => ({ onPark: "skip" })),
  "lets the key go on behind a parked message where onPark is skip": given(() => ({ onPark: "block" })),
  "parks a message whose id was used before with other content": stored(({ claimAll }) => ({
    claimAll: (keys) => claimAll(keys.map((each) => ({ ...each, fingerprint: undefined }))),
  })),
  "keeps its lease while a call takes long": stored(() => ({ renew: nothing })),
  "tells a call to stop before its lease ends, where that cannot be renewed": called(({ deliver }) => ({
    deliver: (message, delivery) => deliver(message, { ...delivery, signal: new AbortController().signal }),
  })),
  // Ignores the fence.
  "does not record the outcome of a call whose lease was taken over": ignoringFences(),
  "delivers once with two relays of one name": given(() => ({ store: memoryStore() })),
  "returns, when draining, once nothing deliverable is left": sourced(({ read }) => ({
    read: async (limits) => ({ ...await read(limits), waitMs: null }),
  })),
  "waits for messages, when not draining, until it is told to stop": given(() => ({ drain: true })),
  "finishes what is under way when told to stop, and starts nothing new": called(({ deliver }, { signal }) => ({
    deliver: (message, delivery) =>
      Promise.race([
        deliver(message, delivery),
        new Promise<never>((_, reject) => signal?.addEventListener("abort", () => reject(new Error("abandoned")))),
      ]),
  })),
  "goes on when the source or the store was busy": sourced(({ read }) => ({
    read: (limits) =>
      read(limits).catch((error) => {
        throw new EffectError("source_invalid", error.message);
      }),
  })),
  "fails, and keeps its name, when it is told to stop and cannot write an outcome down": {
    relay: (options) => relay(options).catch(() => ({ delivered: 0, parked: 0, uncertain: 0 })),
  },
  "keeps its name when it is told to stop while a message is in doubt": sourced(({ close }) => ({
    close: () => close(true),
  })),
  "starts once the source is no longer busy; when draining it gives up": given(({ from }) => ({
    from: {
      ...from,
      open: (options) =>
        from.open(options).catch((error) => {
          throw new EffectError("source_invalid", error.message);
        }),
    },
  })),
  "passes on a failure of the source, once the calls under way are over": {
    relay: (options) => relay(options).catch(() => ({ delivered: 0, parked: 0, uncertain: 0 })),
  },
  "reads no more than a batch and what is in hand": given(({ batch = 100 }) => ({ batch: batch * 10 })),
  "commits every message once into a sink that keeps its position, in order": committing(({ commit }) => ({
    commit: (batch) => commit({ ...batch, messages: batch.messages.flatMap((message) => [message, message]) }),
  })),
  "commits batches of the size asked for": given(() => ({ batch: 1_000 })),
  "goes on from the sink's position after a crash between commit and settling": { store: forgetful },
  // Settles before it knows the position.
  "settles a batch only once the sink has committed it": sourced(settlingEarly),
  "reads the sink's position again after a commit of unknown outcome": given(({ to }) => {
    if (to.kind === "call") return {};
    let known: readonly Position[] | undefined;
    return { to: tappedSink(({ ring }) => ({ ring: known ??= [...ring] }))(to) };
  }),
  "commits once with two relays of one name": { store: unfenced },
  "commits rows that become visible late": sourced(withLowerBound),
  "halts where the sink has lost its position": sourced(() => ({ settled: () => Promise.resolve(0) })),
  // Claims in a different transaction than the write.
  "commits a handler's claim and its writes in one transaction": { store: claimsApart },
  "commits a handler's writes and the position in one transaction": { store: writesApart },
  "runs a handler once for each of its keys": { keyless: true },
  "parks a message at once that the handler refuses, and delivers the others": committing(({ commit }) => ({
    commit: (batch) =>
      commit(batch).catch((error) => {
        throw new EffectError("sink_invalid", error.message);
      }),
  })),
  "tries a message again that makes the handler fail, and parks it after `attempts`": given(({ attempts = 10 }) => ({
    attempts: attempts * 10,
  })),
  "says what it promises": given(({ observe }) => ({
    observe: (event) =>
      observe?.(event.type === "started" ? { ...event, guarantee: { ...event.guarantee, level: "exactly-once" } } : event),
  })),
  "delivers at least once without a store": droppingParked,
  "calls nothing again while the source is busy, without a store too": given(({ to }) =>
    to.kind === "call"
      ? {
        to: {
          ...to,
          deliver: (message, delivery) => to.deliver(message, delivery).then(() => to.deliver(message, delivery)),
        },
      }
      : {}
  ),
  "tells everything, in order and as JSON, from `started` to `stopped`": given(({ observe }) => ({
    observe: (event) => observe?.("id" in event ? { ...event, key: null } : event),
  })),
  "tells once that there is nothing to do": given(({ observe }) => ({
    observe(event) {
      observe?.(event);
      if (event.type === "idle") observe?.(event);
    },
  })),
  "tells once that another relay has the sink, until it has it itself": given(({ observe }) => ({
    observe(event) {
      observe?.(event);
      if (event.type === "fenced") observe?.(event);
    },
  })),
};

notices("relayCases", relayCases, relayFaults, brokenRelay);
