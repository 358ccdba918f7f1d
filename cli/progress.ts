/**
 * Whether a relay makes progress: what `/ready` answers, found out from the relay's events alone.
 *
 * Only a delivery is progress. There is work from the first event about a message until the relay says that it is idle; if it is
 * idle only because messages wait for another attempt, those are work for as long as their attempts go on failing.
 * What is parked, and what is held back behind it, is a person's work and not the relay's.
 *
 * @module
 */
import type { RelayEvent } from "../mod.ts";
import { seconds } from "./print.ts";

/** Messages that wait for another attempt and are remembered at most: the last ones, if there are more. */
const REMEMBERED = 10_000;

/** Follows one relay. */
export class Progress {
  readonly #readyMs: number;
  readonly #now: () => number;
  #state: "starting" | "running" | "standby" | "ended" = "starting";
  /** Since when there has been work, or since the last delivery. */
  #since: number | undefined;
  /** The last event that was not a pause. */
  #lastAt = 0;
  #idle = false;
  #error: string | undefined;
  /** When each message that waits for another attempt is due. */
  readonly #waiting = new Map<string, number>();

  /** `readyMs`: at most so long without a delivery while there is work; `now`: monotonic milliseconds. */
  constructor(readyMs: number, now: () => number = () => performance.now()) {
    this.#readyMs = readyMs;
    this.#now = now;
  }

  /** Hears of what the relay does. */
  event(event: RelayEvent): void {
    const now = this.#now();
    if ("id" in event) this.#waiting.delete(event.id);
    switch (event.type) {
      case "started":
      case "repaired":
        return;
      case "stopped":
        this.#state = "ended";
        return;
      case "fenced":
        this.#state = "standby";
        this.#error = event.reason;
        return;
      case "idle":
        this.#state = "running";
        this.#idle = true;
        if (this.#waiting.size === 0) this.#rest();
        return;
      case "delivered":
        this.#rest();
        break;
      case "retried":
        this.#waiting.set(event.id, now + event.afterMs);
        if (this.#waiting.size > REMEMBERED) this.#waiting.delete(this.#waiting.keys().next().value!);
        this.#error = event.reason;
        break;
      case "failed":
      case "parked":
      case "uncertain":
        this.#error = event.reason;
        break;
    }
    // A source that fails has not shown that it can be read.
    if (event.type !== "failed") this.#state = "running";
    this.#idle = false;
    this.#lastAt = now;
    this.#since ??= now;
  }

  /** Why the relay is not ready, as the rest of a sentence that begins with its name; undefined if it is. */
  complaint(): string | undefined {
    if (this.#state === "starting") return `has not started yet${this.#lastError()}`;
    if (this.#state === "standby") return `stands by${this.#error === undefined ? "" : `: ${oneLine(this.#error)}`}`;
    if (this.#state === "ended") return undefined;
    const now = this.#now();
    // What was not tried again in time is somebody else's meanwhile: another relay's, or a person took it out.
    for (const [id, dueAt] of this.#waiting) if (dueAt + this.#readyMs < now) this.#waiting.delete(id);
    if (this.#idle && this.#waiting.size === 0) this.#rest();
    if (this.#since === undefined) return undefined;
    // A pause that the target asked for is no failure: what counts is how long attempts have failed.
    const stalledMs = (this.#idle ? this.#lastAt : now) - this.#since;
    if (stalledMs < this.#readyMs) return undefined;
    return `has delivered nothing for ${seconds(now - this.#since)} although there is work${this.#lastError()}`;
  }

  #rest(): void {
    this.#since = undefined;
    this.#error = undefined;
  }

  #lastError(): string {
    return this.#error === undefined ? "" : `; the last error: ${oneLine(this.#error)}`;
  }
}

function oneLine(text: string): string {
  return text.replaceAll(/[\s\p{Cc}]+/gu, " ").trim();
}
