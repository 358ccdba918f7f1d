/**
 * Relays that share the messages of one outbox, in one process or in many.
 *
 * ```ts
 * import { PGlite } from "@electric-sql/pglite";
 * import { memorySink } from "@effectonce/effectonce/memory";
 * import { migratePostgres, postgresOutbox, postgresStore } from "@effectonce/effectonce/postgres";
 * import { relayShards } from "@effectonce/effectonce/shards";
 * import { equal } from "node:assert/strict";
 *
 * const db = new PGlite();
 * await migratePostgres(db, { shards: 4 });
 * const store = postgresStore(db);
 * await store.transaction(async (effects) => {
 *   await effects.enqueue({ topic: "payments", key: "order-1", value: {} }, { topic: "payments", key: "order-2", value: {} });
 * });
 * const to = memorySink();
 * await relayShards({ from: postgresOutbox(db), to, store, drain: true });
 * equal(to.messages.length, 2);
 * await db.close();
 * ```
 *
 * @module
 */
import { EffectError, realRuntime, relay, type RelayOptions, type RelayReport, type Source } from "../mod.ts";
import type { ShardedOutbox } from "./sql.ts";
export type { ShardedOutbox };

/** A source whose messages are shared out, by their keys, over relays that run at the same time. */
export interface SharedSource {
  /** A name for people, without secrets. */
  readonly name: string;
  /** How many shards it has. */
  shards(): Promise<number>;
  /** One of them, from 0, for the member that holds it. */
  shard(shard: number, member: string): Source;
  /**
   * Says that a member of a relay is alive, and answers which shards it shall run: as many as its share. It gives up those
   * that it holds, is not to run any more, and does not run any more.
   *
   * @param running Those that it still runs.
   * @param signal Fires when the member is to stop: what would take a while need not be waited for any longer.
   * @throws {EffectError} `busy` if that cannot be said at the moment: it goes on with those that it runs.
   */
  assign(
    relay: string,
    member: string,
    leaseMs: number,
    running: readonly number[],
    signal?: AbortSignal,
  ): Promise<readonly number[]>;
  /** The member has stopped: its shards are free. */
  leave(relay: string, member: string): Promise<void>;
  /** Whether there is something left that can be delivered, in whichever shard. */
  left(): Promise<boolean>;
}

/** How to relay the shards of a source. */
export interface ShardsOptions extends Omit<RelayOptions, "from"> {
  /** Where messages come from: `postgresOutbox` or `mysqlOutbox`, with any number of shards, or `kafkaSource`. */
  readonly from: SharedSource;
}

/**
 * As `relay`, for an outbox with shards: runs a relay for each shard that is this one's share. Relays of the same name, wherever
 * they run, share the shards evenly, and take over those of one that stops or dies. Messages of one key stay in order.
 *
 * @throws {EffectError} As `relay`: the others are stopped first.
 */
export async function relayShards(options: ShardsOptions): Promise<RelayReport> {
  const { from, name = "default", leaseMs = 30_000, drain = false, signal, runtime = realRuntime } = options;
  // Calls of one shard can be shared: each is claimed. Batches cannot: one relay at a time has the shard, the others stand by.
  const outbox = "open" in from ? from as ShardedOutbox : undefined;
  if (outbox && options.to.kind === "call" && await from.shards() === 1) return await relay({ ...options, from: outbox });
  const member = crypto.randomUUID();
  const report = { delivered: 0, parked: 0, uncertain: 0 };
  const running = new Map<number, { readonly stop: AbortController; readonly ended: Promise<void> }>();
  const drained = new Set<number>();
  let failure: { readonly error: unknown } | undefined;
  let refusals = 0;
  let bell = new AbortController();
  const end = new AbortController();
  const over = () => signal?.aborted || failure !== undefined;

  async function run(shard: number, stop: AbortController): Promise<void> {
    try {
      const { observe } = options;
      const part = await relay({
        ...options,
        from: from.shard(shard, member),
        signal: stop.signal,
        ...observe && { observe: (event) => observe.call(options, { ...event, shard }) },
      });
      for (const what of ["delivered", "parked", "uncertain"] as const) report[what] += part[what];
      if (drain && !stop.signal.aborted) drained.add(shard);
    } catch (error) {
      // Who was too slow has lost its shard to another one.
      const code = error instanceof Error && "code" in error ? error.code : undefined;
      if (code === "fenced") return;
      // It is another one's now, which finds out what could not be written down.
      if (code === "busy" && stop.signal.aborted && !over()) return;
      failure ??= { error };
      end.abort();
    } finally {
      running.delete(shard);
      bell.abort();
    }
  }

  const ring = () => {
    end.abort();
    bell.abort();
  };
  signal?.addEventListener("abort", ring);
  try {
    for (;;) {
      bell = new AbortController();
      let mine: readonly number[] = [];
      try {
        mine = over() ? [] : await from.assign(name, member, leaseMs, [...running.keys()], end.signal);
        refusals = 0;
      } catch (error) {
        if (!(error instanceof EffectError && error.code === "busy")) throw error;
        if (drain && ++refusals > (options.attempts ?? 10)) throw error;
        options.observe?.({ type: "failed", relay: name, reason: error.message, afterMs: 1_000 });
        mine = [...running.keys()]; // The source is away for a moment: as before.
      }
      for (const [shard, { stop }] of running) if (!mine.includes(shard)) stop.abort();
      for (const shard of mine) {
        if (running.has(shard) || drained.has(shard) || over()) continue;
        const stop = new AbortController();
        running.set(shard, { stop, ended: run(shard, stop) });
      }
      if (over()) break;
      if (drain && running.size === 0 && mine.every((shard) => drained.has(shard))) {
        // There may be more in shards that others have, who give some up when they see this one, or have died and are waited for.
        if (!await from.left()) break;
        drained.clear();
      }
      await runtime.sleep(Math.min(leaseMs / 3, 1_000), bell.signal);
    }
  } finally {
    signal?.removeEventListener("abort", ring);
    for (const { stop } of running.values()) stop.abort();
    await Promise.all(Array.from(running.values(), ({ ended }) => ended));
    await from.leave(name, member).catch(() => {}); // Its lease ends by itself.
  }
  if (failure) throw failure.error;
  return report;
}
