/**
 * What the stories of the simulation have in common: faults, processes that are started again, and an end.
 *
 * @module
 */
import { type AtomicSink, EffectError } from "../../mod.ts";
import { type Faults, Process, type Simulation } from "./scheduler.ts";
import type { RowView, TargetFaults } from "./world.ts";

/**
 * How long things take at most. Where a target dedupes, a fifth of its window must exceed what may lie between a claim and the
 * arrival of its call: a lease, a pause, and a request that is late.
 */
export const TIMES = { leaseMs: [300, 1000], pauseMs: 1000, lateMs: 800, settleMs: 900, windowMs: 0 } as const;
/** Where a target dedupes. */
export const TIGHT = { leaseMs: [100, 500], pauseMs: 600, lateMs: 400, settleMs: 900, windowMs: 8000 } as const;
/** By then all must be over, after the faults. */
const ENDS_MS = 300_000;

/** How relays of a story go about it. */
export function paceOf(
  simulation: Simulation,
  times: { readonly leaseMs: readonly [number, number]; readonly settleMs: number },
) {
  const leaseMs = simulation.between(...times.leaseMs);
  const minRetryMs = simulation.between(1, 200);
  return {
    leaseMs,
    minRetryMs,
    maxRetryMs: minRetryMs + simulation.between(0, 1500),
    attempts: simulation.between(2, 6),
    lanes: simulation.between(1, 3),
    batch: simulation.between(1, 4),
    settleMs: times.settleMs,
    pollMs: simulation.between(50, 500),
  };
}

/** An atomic sink as one process reaches it. */
export function remoteSink(process: Process, sink: AtomicSink, faults: () => Faults): AtomicSink {
  return {
    ...sink,
    open: (owner) =>
      process.call("open sink", faults(), async () => {
        const session = await sink.open(owner);
        return {
          ring: session.ring,
          commit: (batch) => {
            const ids = batch.messages.map(({ id }) => id).join(" ");
            return process.call(`commit ${batch.n}: ${ids}`, faults(), () => session.commit(batch));
          },
          close: () => session.close(),
        };
      }),
  };
}

/** The faults of a story, until they end. */
export interface ChosenFaults {
  /** Of calls to another system. */
  readonly calls: () => Faults;
  /** Of calls to the target. */
  readonly target: () => TargetFaults;
  /** From now on nothing goes wrong any more. */
  end(): void;
}

/** How bad it gets: each kind of fault is rare, common or absent by the seed. `harmless`: nobody dies, and nothing is lost. */
export function chooseFaults(simulation: Simulation, pauseMs: number, harmless = false): ChosenFaults {
  const passing = () => simulation.pick([0, 0, 0.02, 0.1]);
  const level = () => harmless ? 0 : passing();
  const often = () => harmless ? 0 : simulation.pick([0, 0, 0.05, 0.25]);
  const calls: Faults = {
    "request lost": level(),
    "answer lost": level(),
    late: level(),
    repeated: level(),
    busy: level(),
    slow: passing(),
  };
  const target: TargetFaults = {
    lost: often(),
    unanswered: often(),
    late: often(),
    hangs: often(),
    fails: often(),
    busy: simulation.pick([0, 0, 0.05, 0.25]),
    repeated: often(),
  };
  const none: TargetFaults = { lost: 0, unanswered: 0, late: 0, hangs: 0, fails: 0, busy: 0, repeated: 0 };
  let raging = true;
  const [kills, pauses] = harmless ? [0, 0] : [simulation.pick([0, 0.005, 0.03]), simulation.pick([0, 0.005, 0.03])];
  simulation.disturb = (process) => {
    if (simulation.chance(kills)) process.kill();
    else if (simulation.chance(pauses)) process.pause(simulation.between(1, pauseMs));
  };
  return {
    calls: () => raging ? calls : {},
    target: () => raging ? target : none,
    end() {
      raging = false;
      simulation.disturb = () => {};
      simulation.log(() => "the faults end");
    },
  };
}

/** Processes that are started again. */
export interface Fleet {
  /** Tells all to stop, and starts none any more. */
  readonly stop: () => void;
  /** Those that run. */
  readonly running: ReadonlySet<Process>;
}

/** Keeps a program running in some places: starts it again when it has died or given up. */
export function supervise(
  simulation: Simulation,
  places: number,
  program: (process: Process, signal: AbortSignal) => Promise<unknown>,
): Fleet {
  const stop = new AbortController();
  const running = new Set<Process>();
  function start(place: number, generation: number): void {
    if (stop.signal.aborted) return;
    const process = new Process(simulation, `${"ABC"[place]}${generation}`);
    running.add(process);
    let over = false;
    const ended = (why: string, afterMs: number) => {
      if (over) return;
      over = true;
      running.delete(process);
      simulation.log(() => `${process.name} ends: ${why}`);
      simulation.at(simulation.now + afterMs, () => start(place, generation + 1));
    };
    // Now and then it stays away for so long that a target forgets.
    process.onKill(() => ended("killed", simulation.between(0, simulation.chance(0.15) ? TIGHT.windowMs : 2000)));
    program(process, stop.signal).then(
      () => ended("done", simulation.between(0, 500)),
      (error: unknown) => {
        const code = error instanceof EffectError ? error.code : "";
        if (["source_invalid", "sink_invalid", "diverged", "cursor_lost", "mismatch"].includes(code)) {
          simulation.violate(`${process.name} ended with ${code}: ${(error as Error).message}`);
        }
        if (error instanceof TypeError || error instanceof RangeError || error instanceof ReferenceError) {
          simulation.violate(`${process.name} ended with ${error.name}: ${error.message}`);
        }
        ended(String(error), simulation.between(0, 1000));
      },
    );
  }
  for (let place = 0; place < places; place++) simulation.at(simulation.between(0, 500), () => start(place, 1));
  return { stop: () => stop.abort(), running };
}

/** Looks at a condition every 100 ms of virtual time. */
export async function reach(simulation: Simulation, what: string, holds: () => boolean): Promise<void> {
  let held = false;
  const look = () => {
    held = holds();
    if (!held) simulation.at(simulation.now + 100, look);
  };
  simulation.at(simulation.now, look);
  if (!await simulation.until(() => held, simulation.now + ENDS_MS)) simulation.violate(`never came: ${what}`);
  simulation.check();
}

/** Tells all to stop, and waits until they have. */
export async function finish(simulation: Simulation, fleet: Fleet): Promise<void> {
  fleet.stop();
  await reach(simulation, "the end of all relays after they were told to stop", () => fleet.running.size === 0);
}

/** Whether an owner has lost its lease by the time that it sends. */
export function isZombie(
  simulation: Simulation,
  row: RowView | undefined,
  idempotencyKey: string,
  attempt: number,
): boolean {
  const generation = Number(/;generation=(\d+)$/.exec(idempotencyKey)?.[1] ?? 1);
  return row !== undefined &&
    (row.state !== "claimed" || row.generation !== generation || row.attempt !== attempt || row.untilMs <= simulation.now);
}
