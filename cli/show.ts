/**
 * What `relay` shows: the guarantee, what a person must know, and on a terminal a live line for all relays together.
 *
 * @module
 */
import type { Outbox, RelayEvent } from "../mod.ts";

/** A relay that is shown. */
export interface ShownRelay {
  /** Its name. */
  readonly name: string;
  /** Asked for what is pending. */
  readonly source: Pick<Outbox, "status">;
  /** What a person does about messages that are set aside. */
  readonly advice: Advice;
}

/** What a person does about messages that are set aside, as sentences. */
export interface Advice {
  /** About those that were refused, or failed too often. */
  readonly parked: string;
  /** About those in doubt. */
  readonly uncertain: string;
}

/** How to show relays. */
export interface ShowOptions {
  /** The relays. Where there are several, each line begins with the name of its relay. */
  readonly relays: readonly ShownRelay[];
  /** One event a line, as JSON. */
  readonly json: boolean;
  /** The messages themselves go to stdout, so that everything else goes to stderr. */
  readonly messagesOnStdout: boolean;
  /** Whether the relays stop at the end: there is a whole to be at some part of. */
  readonly drain: boolean;
  /** Called when nobody reads what is shown any more. */
  gone(): void;
}

/** Shows events. */
export interface Shown {
  /** Shows one. */
  event(event: RelayEvent): void;
  /** Clears the live line. */
  end(): void;
}

const encoder = new TextEncoder();

/** Makes the observer of relays that run in a terminal, or in a script. */
export function showRelays({ relays, json, messagesOnStdout, drain, gone }: ShowOptions): Shown {
  const out = messagesOnStdout ? Deno.stderr : Deno.stdout;
  const live = !json && Deno.stderr.isTerminal();
  const counts = { delivered: 0, parked: 0, uncertain: 0 };
  let silent = false;
  let before = 0;
  let since = performance.now();
  let timer: ReturnType<typeof setTimeout> | undefined;
  const raw = (stream: { writeSync(bytes: Uint8Array): number }, text: string) => {
    if (silent) return;
    const bytes = encoder.encode(text);
    try {
      for (let done = 0; done < bytes.length;) done += stream.writeSync(bytes.subarray(done));
    } catch {
      // A full disk, or a pipe without a reader, must not leave a call in doubt.
      silent = true;
      gone();
    }
  };
  const clear = () => live && raw(Deno.stderr, "\r\x1b[K");
  const print = (text: string) => {
    clear();
    raw(out, `${text}\n`);
  };
  async function tick(): Promise<void> {
    const start = performance.now();
    const all = await Promise.all(relays.map(({ source }) => source.status())).catch(() => undefined);
    if (timer === undefined) return;
    const tookMs = performance.now() - start;
    timer = setTimeout(tick, Math.max(1000, tookMs * 10)); // Counting a million rows takes a while.
    if (!all) return;
    const pending = all.reduce((sum, status) => sum + status.pending, 0);
    const parked = all.reduce((sum, status) => sum + status.parked, 0);
    const oldestMs = Math.max(...all.map((status) => status.oldestMs ?? -1));
    const rate = Math.round((counts.delivered - before) * 1000 / (start - since));
    before = counts.delivered;
    since = start;
    const age = oldestMs < 0 ? "" : ` · oldest ${Math.round(oldestMs / 1000)} s`;
    const total = counts.delivered + pending;
    const part = total === 0 ? 1 : counts.delivered / total;
    const bar = drain ? `[${"#".repeat(Math.floor(part * 20)).padEnd(20, ".")}] ${Math.floor(part * 100)} % · ` : "";
    const doubt = `${parked} parked · ${counts.uncertain} in doubt`;
    raw(Deno.stderr, `\r\x1b[K${bar}${rate}/s · ${pending} pending · ${doubt}${age}`);
  }
  function tell(event: RelayEvent): void {
    const line = (text: string) => print(relays.length > 1 ? `${event.relay}: ${text}` : text);
    switch (event.type) {
      case "started": {
        const { level, protocol, reasons } = event.guarantee;
        line(`${relays.length > 1 ? "" : `relay "${event.relay}": `}${event.from} -> ${event.to}`);
        line(`${level} (${protocol}), because ${reasons.join("; ")}`);
        break;
      }
      case "parked":
      case "uncertain":
        line(`${event.type === "parked" ? "parked" : "in doubt"}: ${event.id} (${event.topic}): ${event.reason}`);
        break;
      case "fenced":
      case "failed":
        line(`${event.type}: ${event.reason}`);
        break;
      case "repaired":
        line(`repaired: the source had lost ${event.batches} delivered batches (${event.ids.length} messages)`);
        break;
      case "accepted":
        line(`accepted: goes on behind batch ${event.n}`);
        break;
      case "stopped": {
        const { advice } = relays.find(({ name }) => name === event.relay)!;
        line(
          `stopped: ${event.delivered} delivered, ${event.parked} parked meanwhile, ${event.uncertain} in doubt meanwhile`,
        );
        if (event.uncertain > 0) line(advice.uncertain);
        if (event.parked > 0) line(advice.parked);
        break;
      }
    }
  }
  return {
    event(event) {
      if (event.type === "delivered" || event.type === "parked" || event.type === "uncertain") counts[event.type]++;
      if (json) raw(out, `${JSON.stringify(event)}\n`);
      else tell(event);
      if (event.type === "started" && live) timer = setTimeout(tick, 1000);
    },
    end() {
      clearTimeout(timer);
      timer = undefined;
      clear();
    },
  };
}
