/**
 * Follows one relay, for whoever asks over HTTP.
 *
 * @module
 */
import type { ClaimStore, EffectKey, Outbox, RelayEvent } from "../mod.ts";
import { type Gauges, Metrics, type Scraped } from "./metrics.ts";
import { Progress } from "./progress.ts";

/** Where a relay's messages and claims are. */
export interface Watchable {
  readonly source: Pick<Outbox, "status">;
  readonly store: ClaimStore | undefined;
}

/** Follows one relay. */
export class Watch {
  /** The relay's name. */
  readonly name: string;
  readonly #metrics: Metrics;
  readonly #readyMs: number;
  readonly #progress: Progress;
  /** Of the shards that it has at the moment. */
  readonly #shards: Map<number, Progress> = new Map();
  #ends: Watchable | undefined;
  #gauges: Promise<Gauges | undefined> = Promise.resolve(undefined);
  #freshUntil = 0;

  /** For a relay that is yet to start. */
  constructor(name: string, readyMs: number) {
    this.name = name;
    this.#metrics = new Metrics(name);
    this.#readyMs = readyMs;
    this.#progress = new Progress(readyMs);
  }

  /** From now on its outbox and store can be asked. */
  open(ends: Watchable): void {
    this.#ends = ends;
  }

  /** Hears of what the relay does. */
  event(event: RelayEvent): void {
    this.#metrics.event(event);
    const { shard, type } = event;
    if (shard === undefined) return this.#progress.event(event);
    const progress = this.#shards.get(shard) ?? new Progress(this.#readyMs);
    progress.event(event);
    // It may be another relay's now.
    if (type === "stopped") this.#shards.delete(shard);
    else this.#shards.set(shard, progress);
  }

  /** Why the relay is not ready, as a sentence; undefined if it is. */
  complaint(): string | undefined {
    const shards = this.#shards.size > 0 ? [...this.#shards] : [[undefined, this.#progress] as const];
    for (const [shard, progress] of shards) {
      const complaint = progress.complaint();
      if (complaint === undefined) continue;
      return `relay "${this.name}"${shard === undefined || shards.length === 1 ? "" : `, shard ${shard},`} ${complaint}`;
    }
  }

  /** What is to be shown of it now. */
  async scrape(): Promise<Scraped> {
    return { metrics: this.#metrics, gauges: await this.#counted(), ready: this.complaint() === undefined };
  }

  /** Counting a million rows takes a while: the answer holds for some time, and for all who ask meanwhile. */
  #counted(): Promise<Gauges | undefined> {
    const ends = this.#ends;
    if (!ends || performance.now() < this.#freshUntil) return this.#gauges;
    const start = performance.now();
    this.#freshUntil = Infinity;
    return this.#gauges = count(this.name, ends).catch(() => undefined).finally(() => {
      const end = performance.now();
      this.#freshUntil = end + Math.max(1000, (end - start) * 10);
    });
  }
}

async function count(relay: string, { source, store }: Watchable): Promise<Gauges> {
  const { pending, heldBack, parked, oldestMs } = await source.status();
  // Not store.count(): relays often share a store, and each is to be told of its own.
  let inDoubt = 0;
  let after: EffectKey | undefined;
  if (store) {
    do {
      const found = await store.list({ state: "uncertain", scope: relay, limit: 1000, after });
      inDoubt += found.length;
      after = found[999];
    } while (after);
  }
  return { pending, oldestSeconds: (oldestMs ?? 0) / 1000, heldBack, parked, inDoubt };
}
