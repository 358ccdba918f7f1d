/**
 * A store, an outbox and a sink in memory, for unit tests of your own: they keep nothing.
 *
 * ```ts
 * import { relay } from "@effectonce/effectonce";
 * import { memoryOutbox, memorySink, memoryStore } from "@effectonce/effectonce/memory";
 * import { equal } from "node:assert/strict";
 *
 * const store = memoryStore();
 * await store.enqueue({ topic: "orders", key: "order-1", value: { amount: 5 } });
 * const sink = memorySink();
 * await relay({ from: memoryOutbox(store), to: sink, store, drain: true });
 * equal(sink.messages[0]?.topic, "orders");
 * ```
 *
 * @module
 */
import {
  type Batch,
  boundRing,
  type CallSink,
  checkKey,
  type Claim,
  claimStore,
  createMessage,
  type Delivery,
  EffectError,
  type EffectKey,
  type EffectRow,
  type EffectStore,
  type EffectTransaction,
  encodeMessage,
  encodeRequest,
  encodeResult,
  type Json,
  type Message,
  type MessageFields,
  type NewMessage,
  type Outbox,
  type OutboxMessage,
  type Park,
  type Position,
  type Protocol,
  type ReadLimits,
  type Runtime,
  START,
  transactionStep,
} from "../mod.ts";
import {
  alreadyEnqueued,
  chainText,
  checkAdvance,
  createGuard,
  createPrune,
  createTurns,
  notClaimed,
  type OutboxOptions,
  overlapping,
  renamePlan,
  settledShard,
  settlePlan,
  sha256,
  type Shard,
  type TransactionGuard,
} from "./shared.ts";

const encoder = new TextEncoder();

interface MemoryRow extends MessageFields {
  readonly seq: number;
  readonly state: "pending" | "waiting" | "parked";
  readonly untilMs: number;
  readonly reason: string | null;
}

interface MemoryShard extends Shard {
  readonly batches: readonly Position[];
}

interface MemoryState {
  readonly effects: Map<string, EffectRow>;
  readonly outbox: Map<number, MemoryRow>;
  readonly shards: Map<string, MemoryShard>;
  readonly positions: Map<string, readonly Position[]>;
  seq: number;
}

interface Memory {
  state: MemoryState;
  /** That of the relay which opened the outbox last. */
  onPark: "block" | "skip";
  readonly turns: <T>(run: () => T | Promise<T>) => Promise<T>;
  readonly now: () => number;
  readonly sessions: Set<{ readonly relay: string; readonly protocol: Protocol; readonly topics?: readonly string[] }>;
}

/** Rows are never changed, only replaced. */
const copyOf = ({ effects, outbox, shards, positions, seq }: MemoryState): MemoryState => ({
  effects: new Map(effects),
  outbox: new Map(outbox),
  shards: new Map(shards),
  positions: new Map(positions),
  seq,
});

const memories = new WeakMap<object, Memory>();
const NAME = "memory";
const joined = (first: string, second: string): string => JSON.stringify([first, second]);
/** By UTF-8 bytes, as databases compare; JavaScript compares by UTF-16 units. */
function byBytes(a: string, b: string): number {
  const [x, y] = [encoder.encode(a), encoder.encode(b)];
  const at = x.findIndex((byte, i) => byte !== y[i]);
  return at < 0 ? x.length - y.length : x[at]! - (y[at] ?? -1);
}
const byKey = (a: EffectKey, b: EffectKey): number => byBytes(a.scope, b.scope) || byBytes(a.key, b.key);

/** How {@linkcode memoryStore} keeps time. */
export interface MemoryStoreOptions {
  /**
   * The store's clock, in milliseconds since 1970.
   *
   * @default {Date.now}
   */
  now?(): number;
  /** Time, randomness and scheduling. */
  readonly runtime?: Runtime;
}

/** A store whose content can be looked at. */
export interface MemoryStore extends EffectStore<null> {
  /** Enqueues in a transaction of its own. */
  enqueue(...messages: readonly NewMessage[]): Promise<void>;
  /** What is in the outbox, in order, and where it stands. */
  outbox(): readonly (MessageFields & {
    readonly state: "pending" | "waiting" | "parked";
    readonly reason: string | null;
  })[];
  /** Keeps the present content; the function that comes back restores it, as a failover or a backup does. */
  snapshot(): () => Promise<void>;
}

/** A store in memory, with an outbox ({@linkcode memoryOutbox}): for unit tests; it keeps nothing. */
export function memoryStore(options: MemoryStoreOptions = {}): MemoryStore {
  const { now = Date.now, runtime } = options;
  const turns = createTurns(NAME, runtime);
  const memory: Memory = {
    state: { effects: new Map(), outbox: new Map(), shards: new Map(), positions: new Map(), seq: 0 },
    onPark: "block",
    turns: (run) => turns(5_000, run),
    now: () => now(),
    sessions: new Set(),
  };
  /** Runs on a copy that takes the state's place only at the end. */
  const transact = <T>(run: (draft: MemoryState) => T | Promise<T>): Promise<T> =>
    memory.turns(async () => {
      const draft = copyOf(memory.state);
      const answer = await run(draft);
      memory.state = draft;
      return answer;
    });
  function oldOf({ effects, outbox }: MemoryState, olderThanMs: number): readonly EffectRow[] {
    const needed = new Set(outbox.values().map(({ id }) => id));
    const until = memory.now() - olderThanMs;
    return effects.values().filter(({ state, changedMs, key }) =>
      (state === "done" || state === "rejected") && changedMs <= until && !needed.has(key)
    ).toArray();
  }
  function handle(draft: MemoryState): { readonly effects: EffectTransaction; readonly guard: TransactionGuard } {
    const mine = new Set<string>();
    const guard = createGuard();
    const claim: EffectTransaction["claim"] = (key, { request } = {}) =>
      guard.run(async () => {
        checkKey(key);
        const { bytes, fingerprint } = await encodeRequest(request);
        const id = joined(key.scope, key.key);
        const { write, answer } = transactionStep(key, fingerprint, bytes)(draft.effects.get(id), memory.now());
        if (write) {
          draft.effects.set(id, write);
          mine.add(id);
        }
        return answer;
      });
    const effects: EffectTransaction = {
      claim,
      async claimAll(keys) {
        const answers: Claim[] = [];
        for (const key of keys) answers.push(await claim(key));
        return answers;
      },
      complete: (key, result) =>
        guard.run(() => {
          const id = joined(key.scope, key.key);
          if (!mine.has(id)) throw notClaimed(key);
          const { text, omitted } = encodeResult(result);
          draft.effects.set(id, { ...draft.effects.get(id)!, result: text, resultOmitted: omitted });
        }),
      enqueue: (...messages) =>
        guard.run(() => {
          for (const message of messages) {
            const fields = encodeMessage(message);
            if (draft.outbox.values().some(({ id }) => id === fields.id)) throw alreadyEnqueued(fields.id);
            const row = { ...fields, time: new Date(memory.now()), state: "pending", untilMs: 0, reason: null } as const;
            draft.outbox.set(++draft.seq, { ...row, seq: draft.seq });
          }
        }),
      advance: (owner, { n, uid, prev, rows }) =>
        guard.run(() => {
          const id = joined(owner.relay, owner.source);
          const ring = draft.positions.get(id) ?? [];
          checkAdvance(ring.at(-1), { n, uid, prev, rows });
          draft.positions.set(id, boundRing([...ring, { n, uid, prev, rows }]));
        }),
    };
    return { effects, guard };
  }
  const store: MemoryStore = {
    ...claimStore({
      name: NAME,
      change: (steps) =>
        transact(({ effects }) =>
          steps.map(({ key, step }) => {
            const id = joined(key.scope, key.key);
            const { write, answer } = step(effects.get(id), memory.now());
            if (write) effects.set(id, write);
            return answer;
          })
        ),
      list: ({ state, scope, key, limit, after }) =>
        Promise.resolve(
          memory.state.effects.values().toArray().sort(byKey).filter((row) =>
            (state ?? row.state) === row.state && (scope ?? row.scope) === row.scope && (key ?? row.key) === row.key &&
            (!after || byKey(after, row) < 0)
          ).slice(0, limit),
        ),
      count(only) {
        const counts = { claimed: 0, waiting: 0, done: 0, rejected: 0, uncertain: 0 };
        for (const { state, scope } of memory.state.effects.values()) if ((only ?? scope) === scope) counts[state]++;
        return Promise.resolve(counts);
      },
      prune: createPrune({
        old(after, { olderThanMs, limit }) {
          const old = oldOf(memory.state, olderThanMs);
          const keys = old.filter((row) => byKey(after, row) < 0).sort(byKey).slice(0, limit);
          return Promise.resolve({ keys, last: keys[limit - 1] });
        },
        forget: (keys, { olderThanMs }) =>
          transact((draft) => {
            const old = new Set(oldOf(draft, olderThanMs).map(({ scope, key }) => joined(scope, key)));
            const ids = keys.map(({ scope, key }) => joined(scope, key));
            return ids.filter((id) => old.has(id) && draft.effects.delete(id)).length;
          }),
      }),
    }),
    transaction: (run) =>
      transact(async (draft) => {
        const { effects, guard } = handle(draft);
        const answer = await run(effects, null);
        guard.check();
        return answer;
      }),
    join() {
      throw new TypeError("Cannot join a transaction in memory: use store.transaction()");
    },
    positions: ({ relay, source }) => Promise.resolve(memory.state.positions.get(joined(relay, source)) ?? []),
    isDatabaseFailure: () => false,
    enqueue: (...messages) => transact((draft) => handle(draft).effects.enqueue(...messages)),
    outbox: () => memory.state.outbox.values().toArray(),
    snapshot() {
      const kept = copyOf(memory.state);
      return () => memory.turns(() => void (memory.state = copyOf(kept)));
    },
  };
  memories.set(store, memory);
  return store;
}

/** The outbox of a {@linkcode memoryStore} as a source, for the relays and for operators. */
export function memoryOutbox(store: MemoryStore, options: OutboxOptions = {}): Outbox {
  const { topics } = options;
  if (topics?.length === 0) throw new RangeError("Cannot read no topics: name one at least, or leave them out for all");
  const memory = memories.get(store);
  if (!memory) throw new TypeError("Cannot read the outbox: the store must come from memoryStore()");
  const { turns, now } = memory;
  const toMessage = (row: MemoryRow): Message => createMessage(row);
  const find = (id: string) => memory.state.outbox.values().find((row) => row.id === id);
  const mine = () => memory.state.outbox.values().filter(({ topic }) => !topics || topics.includes(topic)).toArray();
  const mineBy = (id: string) => mine().find((row) => row.id === id);
  const heldBack = (row: MemoryRow) =>
    row.state === "pending" && row.key !== null &&
    mine().some(({ key, seq, state }) =>
      key === row.key && seq < row.seq && (state === "waiting" || state === "parked" && memory.onPark === "block")
    );
  const shown = (row: MemoryRow): OutboxMessage => {
    const { id, topic, key, reason } = row;
    return { id, topic, key, state: heldBack(row) ? "blocked" : row.state, reason: reason ?? "" };
  };
  const withMessages = (batch: Position): Batch => ({
    ...batch,
    messages: batch.rows.map(([, id]) => find(id)).filter((row) => row !== undefined).map(toMessage),
  });
  return {
    name: NAME,
    seals: true,
    sealed: (relay) =>
      turns(() => {
        const { settled: n, settledUid: uid, batches } = memory.state.shards.get(relay) ??
          { ...settledShard(START), batches: [] };
        return [{ owner: { relay, source: NAME }, settled: { n, uid }, batches: batches.map(withMessages) }];
      }),
    status: () =>
      turns(() => {
        const rows = mine();
        const pending = rows.filter(({ state }) => state !== "parked");
        const oldestMs = pending.length > 0 ? Math.max(0, now() - pending[0]!.time.getTime()) : null;
        const held = pending.filter((row) => shown(row).state === "blocked").length;
        return { pending: pending.length, heldBack: held, parked: rows.length - pending.length, oldestMs };
      }),
    parked: (limit = 1000) =>
      turns(() =>
        mine().filter(({ state }) => state === "parked").sort((a, b) => a.untilMs - b.untilMs || a.seq - b.seq)
          .slice(0, limit).map((row) => ({ ...shown(row), since: new Date(row.untilMs) }))
      ),
    find: (id) =>
      turns(() => {
        const row = mineBy(id);
        return row && shown(row);
      }),
    release: (id) =>
      turns(() => {
        const row = mineBy(id);
        if (!row || row.state === "pending") return false;
        memory.state.outbox.set(row.seq, { ...row, state: "pending", reason: null });
        return true;
      }),
    discard: (id) =>
      turns(() => {
        const row = mineBy(id);
        return row !== undefined && row.state !== "pending" && memory.state.outbox.delete(row.seq);
      }),
    relays: () =>
      turns(() =>
        [...memory.sessions].map(({ relay, protocol, topics = null }) => {
          const sealed = memory.state.shards.get(relay)?.batches.flatMap(({ rows }) => rows).length ?? 0;
          return { relay, protocol, topics, live: true, sealed };
        })
      ),
    forget: (relay) =>
      turns(() => {
        if ([...memory.sessions].some((session) => session.relay === relay)) {
          throw new EffectError("busy", `Cannot forget relay "${relay}" of ${NAME}: it runs. Stop it first`);
        }
        const shard = memory.state.shards.get(relay);
        if (!shard || shard.batches.length === 0) return false;
        // What it seals next follows on what was delivered, not on what is given up here.
        const { settled, settledUid } = shard;
        memory.state.shards.set(relay, { ...shard, sealed: settled, sealedUid: settledUid, batches: [] });
        return true;
      }),
    async rename(relay, name, move) {
      const theirs = [...memory.sessions].filter((session) => session.relay === relay).map((session) => ({
        ...session,
        live: true,
      }));
      const isKnown = (relay: string) => (memory.state.shards.get(relay)?.sealed ?? 0) > 0;
      const plan = await turns(() => renamePlan(NAME, [relay, name], { theirs, renamed: [], isKnown }));
      if (!plan) return false;
      await move();
      return await turns(() => {
        memory.state.shards.set(name, memory.state.shards.get(relay)!);
        return memory.state.shards.delete(relay);
      });
    },
    prune: () => Promise.resolve(0),
    // deno-lint-ignore require-await -- what throws here must reject
    async open({ relay, protocol, onPark }) {
      for (const other of memory.sessions) {
        const shared = !topics || !other.topics || topics.some((topic) => other.topics!.includes(topic));
        if (other.relay !== relay && shared) throw overlapping(NAME, other.relay, relay, topics);
      }
      memory.onPark = onPark;
      const session = { relay, protocol, topics };
      memory.sessions.add(session);
      const shard = () => memory.state.shards.get(relay) ?? { ...settledShard(START), batches: [] };

      function deliverable({ rows, bytes }: ReadLimits, except: ReadonlySet<number>) {
        const held = new Set<string>();
        const found: MemoryRow[] = [];
        let waitMs: number | null = null;
        let size = 0;
        for (const row of memory!.state.outbox.values()) {
          if (topics && !topics.includes(row.topic)) continue;
          const left = row.untilMs - now();
          if (row.state === "parked" || row.state === "waiting" && left > 0) {
            if (row.state === "waiting") waitMs = Math.min(waitMs ?? left, left);
            if (row.key !== null && (row.state === "waiting" || onPark === "block")) held.add(row.key);
          } else if (!(row.key !== null && held.has(row.key)) && !except.has(row.seq) && found.length < rows) {
            size += row.value?.length ?? 0;
            if (size > bytes && found.length > 0) break;
            found.push(row);
          }
        }
        return { found, waitMs };
      }
      function settleRows(rows: Position["rows"]): void {
        for (const [seq, id] of rows) {
          if (memory!.state.outbox.get(Number(seq))?.id === id) memory!.state.outbox.delete(Number(seq));
        }
      }
      function parkRows(parks: readonly Park[]): void {
        for (const { message, reason, retryMs } of parks) {
          const row = find(message.id);
          if (!row) continue;
          const state = retryMs === null ? "parked" : "waiting";
          memory!.state.outbox.set(row.seq, { ...row, state, untilMs: now() + (retryMs ?? 0), reason });
        }
      }
      return {
        id: NAME,
        inherited: false,
        read: (limits) =>
          turns(() => {
            const { found, waitMs } = deliverable(limits, new Set());
            return { messages: found.map(toMessage), waitMs };
          }),
        settle: (messages) =>
          turns(() => {
            for (const row of messages.map(({ id }) => find(id))) if (row) memory.state.outbox.delete(row.seq);
          }),
        park: (parks) => turns(() => parkRows(parks)),
        settled: () => turns(() => shard().settled),
        seal: (ring, limits) =>
          turns(async () => {
            const plan = settlePlan(shard(), shard().batches, ring);
            settleRows(plan.settle);
            let next: MemoryShard = { ...plan.shard, batches: plan.remaining };
            let waitMs: number | null = null;
            if (plan.remaining.length < 2) {
              const sealed = new Set(plan.remaining.flatMap(({ rows }) => rows.map(([seq]) => Number(seq))));
              const read = deliverable(limits, sealed);
              waitMs = read.waitMs;
              if (read.found.length > 0) {
                const rows = read.found.map(({ seq, id }) => [String(seq), id] as const);
                const uid = await sha256(chainText(next.sealedUid, rows));
                const batch = { n: next.sealed + 1, uid, prev: next.sealedUid, rows };
                next = { ...next, sealed: batch.n, sealedUid: uid, batches: [...plan.remaining, batch] };
              }
            }
            memory.state.shards.set(relay, next);
            return { batches: next.batches.map(withMessages), waitMs, repaired: plan.repaired };
          }),
        unseal: (ring, parks) =>
          turns(() => {
            const { settle } = settlePlan(shard(), shard().batches, ring);
            settleRows(settle);
            memory.state.shards.set(relay, { ...settledShard(ring.at(-1) ?? START), batches: [] });
            parkRows(parks.filter(({ message }) => find(message.id)?.state !== "parked"));
          }),
        adopt: (ring) =>
          turns(() => {
            settleRows(ring.flatMap(({ rows }) => rows));
            memory.state.shards.set(relay, { ...settledShard(ring.at(-1) ?? START), batches: [] });
          }),
        renew: () => Promise.resolve(),
        close: () => {
          memory.sessions.delete(session);
          return Promise.resolve();
        },
      };
    },
  };
}

/** How {@linkcode memorySink} behaves. */
export interface MemorySinkOptions {
  /**
   * What it declares about repeating a call.
   *
   * @default {"never"}
   */
  readonly repeat?: CallSink["repeat"];
  /** Called before a message counts as delivered: throw here to see what happens. */
  deliver?(message: Message, delivery: Delivery): Promise<Json>;
}

/** A sink in memory that is called message by message, and keeps what it was given. */
export function memorySink(options: MemorySinkOptions = {}): CallSink & { readonly messages: readonly Message[] } {
  const { repeat = "never", deliver } = options;
  const messages: Message[] = [];
  return {
    kind: "call",
    name: NAME,
    repeat,
    dedupeWindowMs: repeat === "same-key" ? 86_400_000 : undefined,
    messages,
    async deliver(message, delivery) {
      const result = deliver ? await deliver(message, delivery) : null;
      messages.push(message);
      return result;
    },
  };
}
