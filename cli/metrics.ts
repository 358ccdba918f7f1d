/**
 * The metrics of relays in the text format of Prometheus, version 0.0.4.
 * https://prometheus.io/docs/instrumenting/exposition_formats/
 *
 * @module
 */
import type { RelayEvent } from "../mod.ts";

/** The `Content-Type` of {@linkcode exposition}. */
export const CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8";

/** What counts up from the start of the process: name and help. */
const COUNTERS = {
  delivered: ["effectonce_delivered_total", "Messages delivered, those included that an earlier attempt had delivered."],
  attempts: ["effectonce_attempts_total", "Attempts begun to deliver a message."],
  retries: ["effectonce_retries_total", "Attempts that failed and are to be repeated."],
  parkings: ["effectonce_parkings_total", "Messages set aside until a person decides."],
  doubts: ["effectonce_doubts_total", "Messages set aside because it is not known whether they were delivered."],
  leaseLosses: [
    "effectonce_lease_losses_total",
    "Attempts that outlived their lease, so that their outcome was not recorded.",
  ],
  failures: ["effectonce_failures_total", "Passing failures of the outbox, the store or the target as a whole."],
  fenced: ["effectonce_fenced_total", "Times that another relay of the same name was faster."],
  repaired: [
    "effectonce_repaired_batches_total",
    "Delivered batches that the outbox had lost and that were not delivered again.",
  ],
} as const;

/** What stands at a number now: name and help. */
const GAUGES = {
  pending: ["effectonce_pending", "Messages in the outbox that are neither delivered nor parked."],
  oldestSeconds: ["effectonce_oldest_pending_age_seconds", "Age of the oldest pending message; 0 if there is none."],
  heldBack: ["effectonce_held_back", "Pending messages that wait for a parked or waiting one of their key."],
  parked: ["effectonce_parked", "Messages in the outbox that are parked, those in doubt included."],
  inDoubt: ["effectonce_in_doubt", "Effects of the relay of which it is not known whether they happened."],
} as const;

/** What is measured: name, help and the upper bounds of its buckets, in seconds. */
const HISTOGRAMS = {
  attempt: [
    "effectonce_attempt_seconds",
    "From the claim of a message, or the start of its batch, to its recorded delivery.",
    [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60],
  ],
  delivery: [
    "effectonce_delivery_seconds",
    "From enqueueing a message to its recorded delivery.",
    [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 7200, 43_200, 86_400],
  ],
} as const;

/** What was counted in the outbox and the store. */
export type Gauges = Readonly<Record<keyof typeof GAUGES, number>>;

class Histogram {
  readonly #bounds: readonly number[];
  readonly #counts: number[];
  #sum = 0;
  constructor(bounds: readonly number[]) {
    this.#bounds = bounds;
    this.#counts = Array(bounds.length + 1).fill(0);
  }
  observe(seconds: number): void {
    const found = this.#bounds.findIndex((bound) => seconds <= bound);
    this.#counts[found < 0 ? this.#bounds.length : found]!++;
    this.#sum += seconds;
  }
  samples(name: string, label: string): string {
    let total = 0;
    const buckets = this.#counts.map((count, i) => {
      total += count;
      return `${name}_bucket{${label},le="${this.#bounds[i] ?? "+Inf"}"} ${total}\n`;
    });
    return `${buckets.join("")}${name}_sum{${label}} ${this.#sum}\n${name}_count{${label}} ${total}\n`;
  }
}

/** Counts and measures what one relay does. */
export class Metrics {
  /** The relay's name. */
  readonly relay: string;
  readonly #now: () => number;
  readonly #counts = Object.fromEntries(Object.keys(COUNTERS).map((name) => [name, 0])) as Record<
    keyof typeof COUNTERS,
    number
  >;
  readonly #attempt = new Histogram(HISTOGRAMS.attempt[2]);
  readonly #delivery = new Histogram(HISTOGRAMS.delivery[2]);
  /** Where messages are not claimed one by one, an attempt is known by its outcome. */
  #sealed = false;

  /** Begins at 0; `now`: milliseconds by the clock that dates messages. */
  constructor(relay: string, now: () => number = Date.now) {
    this.relay = relay;
    this.#now = now;
  }

  /** Hears of what the relay does. */
  event(event: RelayEvent): void {
    const counts = this.#counts;
    switch (event.type) {
      case "started":
        this.#sealed = event.guarantee.protocol === "sealed";
        return;
      case "claimed":
        counts.attempts++;
        return;
      case "delivered": {
        counts.delivered++;
        if (!event.found) this.#attempt.observe(event.ms / 1000);
        // The clocks of who enqueues and of the relay may differ; a row of another program may have no time at all.
        const waitedMs = this.#now() - event.time.getTime();
        if (!Number.isNaN(waitedMs)) this.#delivery.observe(Math.max(0, waitedMs) / 1000);
        break;
      }
      case "retried":
        counts.retries++;
        break;
      case "parked":
        counts.parkings++;
        break;
      case "uncertain":
        counts.doubts++;
        return;
      case "lease_lost":
        counts.leaseLosses++;
        return;
      case "failed":
        counts.failures++;
        return;
      case "fenced":
        counts.fenced++;
        return;
      case "repaired":
        counts.repaired += event.batches;
        return;
      default:
        return;
    }
    if (this.#sealed) counts.attempts++;
  }

  /** A counter. */
  count(name: keyof typeof COUNTERS): number {
    return this.#counts[name];
  }

  /** The lines of a histogram. */
  histogram(name: keyof typeof HISTOGRAMS, label: string): string {
    return (name === "attempt" ? this.#attempt : this.#delivery).samples(HISTOGRAMS[name][0], label);
  }
}

/** What is shown of one relay. */
export interface Scraped {
  /** What it has done. */
  readonly metrics: Metrics;
  /** Whether it is ready. */
  readonly ready: boolean;
  /** What it has before it; undefined if the database did not answer, and then left out. */
  readonly gauges: Gauges | undefined;
}

const keysOf = <T extends object>(object: T): (keyof T & string)[] => Object.keys(object) as (keyof T & string)[];

/** All metrics of relays, family by family. */
export function exposition(relays: readonly Scraped[]): string {
  const labelOf = ({ metrics }: Scraped) => `relay="${escaped(metrics.relay).replaceAll('"', '\\"')}"`;
  const family = (name: string, help: string, type: string, samplesOf: (relay: Scraped, label: string) => string) => {
    const samples = relays.map((relay) => samplesOf(relay, labelOf(relay))).join("");
    return samples && `# HELP ${name} ${escaped(help)}\n# TYPE ${name} ${type}\n${samples}`;
  };
  const sample = (name: string, label: string, value: number) => `${name}{${label}} ${value}\n`;
  return [
    family("effectonce_ready", "1 if the relay is ready, as /ready tells.", "gauge", ({ ready }, label) => {
      return sample("effectonce_ready", label, ready ? 1 : 0);
    }),
    ...keysOf(GAUGES).map((key) => {
      const [name, help] = GAUGES[key];
      return family(name, help, "gauge", ({ gauges }, label) => gauges ? sample(name, label, gauges[key]) : "");
    }),
    ...keysOf(COUNTERS).map((key) => {
      const [name, help] = COUNTERS[key];
      return family(name, help, "counter", ({ metrics }, label) => sample(name, label, metrics.count(key)));
    }),
    ...keysOf(HISTOGRAMS).map((key) => {
      const [name, help] = HISTOGRAMS[key];
      return family(name, help, "histogram", ({ metrics }, label) => metrics.histogram(key, label));
    }),
  ].join("");
}

function escaped(text: string): string {
  return text.replaceAll("\\", "\\\\").replaceAll("\n", "\\n");
}
