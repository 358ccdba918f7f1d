/**
 * A world of processes on virtual time, in which one seed decides everything: what happens next, who dies, which answer is
 * lost. Nothing here knows of claims or relays.
 *
 * The code under test runs as it is. Its clock, randomness and sleep come from here by `Runtime`, and each of its calls to
 * another system goes through {@linkcode Process.call}: these are the only places where a process waits, so they are the only
 * ones where it can matter that it dies.
 *
 * @module
 */
import { createHash } from "node:crypto";
import { EffectError, type Runtime } from "../../mod.ts";

/** What a run of the simulation must never show. */
export class Violation extends Error {
  /** Always `Violation`. */
  override readonly name = "Violation";
}

interface Event {
  readonly at: number;
  readonly tie: number;
  run(): void;
}

/** Virtual time and one source of chance. */
export class Simulation {
  /** Virtual milliseconds. */
  now = 0;
  /** Events so far. */
  steps = 0;
  /** Whether anything went wrong that may make an at-least-once relay deliver twice. */
  harmed = false;
  readonly #trace: ((line: string) => void) | undefined;
  readonly #heap: Event[] = [];
  /** Called before a process goes on: the place to kill or pause it. */
  disturb: (process: Process) => void = () => {};
  #state: number;
  #outside = 0;
  #violation: Violation | undefined;

  /** The seed decides all; `trace` hears of each step. */
  constructor(seed: number, trace?: (line: string) => void) {
    this.#state = (seed ^ 0x9e3779b9) >>> 0;
    this.#trace = trace;
    for (let i = 0; i < 4; i++) this.random();
  }

  /** From 0 up to, but not including, 1: PCG-RXS-M-XS of 32 bits (https://www.pcg-random.org/paper.html, 6.3.4). */
  random(): number {
    this.#state = (Math.imul(this.#state, 747796405) + 2891336453) >>> 0;
    const state = this.#state;
    const word = Math.imul((state >>> ((state >>> 28) + 4)) ^ state, 277803737) >>> 0;
    return (((word >>> 22) ^ word) >>> 0) / 2 ** 32;
  }

  /** A whole number from `min` to `max`. */
  between(min: number, max: number): number {
    return min + Math.floor(this.random() * (max - min + 1));
  }

  /** One of these. */
  pick<T>(items: readonly T[]): T {
    return items[Math.floor(this.random() * items.length)]!;
  }

  /** True with this probability. */
  chance(probability: number): boolean {
    return this.random() < probability;
  }

  /** Tells whoever repeats a seed what happened. */
  log(line: () => string): void {
    this.#trace?.(`${this.now.toFixed(0).padStart(7)}  ${line()}`);
  }

  /** Ends the run: this must never be seen. The code under test cannot catch it. */
  violate(what: string): void {
    this.log(() => `VIOLATION: ${what}`);
    this.#violation ??= new Violation(what);
  }

  /** Throws the first violation, if there was one. */
  check(): void {
    if (this.#violation) throw this.#violation;
  }

  /** Runs something at a time; what is due at the same time runs in an order of chance. */
  at(time: number, run: () => void): void {
    const event = { at: Math.max(time, this.now), tie: this.random(), run };
    const heap = this.#heap;
    let i = heap.push(event) - 1;
    for (let up; i > 0 && earlier(event, heap[up = (i - 1) >> 1]!); i = up) heap[i] = heap[up]!;
    heap[i] = event;
  }

  #next(): Event | undefined {
    const heap = this.#heap;
    const first = heap[0];
    const last = heap.pop();
    if (last === undefined || heap.length === 0) return first;
    let i = 0;
    for (let down; (down = 2 * i + 1) < heap.length; i = down) {
      if (down + 1 < heap.length && earlier(heap[down + 1]!, heap[down]!)) down++;
      if (!earlier(heap[down]!, last)) break;
      heap[i] = heap[down]!;
    }
    heap[i] = last;
    return first;
  }

  /** Something of the real world, such as a file: virtual time stands still meanwhile. */
  async outside<T>(run: () => Promise<T>): Promise<T> {
    this.#outside++;
    try {
      return await run();
    } finally {
      this.#outside--;
    }
  }

  /** Runs events until the condition holds; false if the time came first. */
  async until(condition: () => boolean, time: number): Promise<boolean> {
    while (!condition()) {
      if (this.steps++ > 200_000) throw new Violation("it goes round in circles: 200,000 steps, and no end");
      const event = this.#next();
      if (!event || event.at > time) {
        if (event) this.at(event.at, event.run);
        this.now = Math.max(this.now, time);
        return condition();
      }
      this.now = Math.max(this.now, event.at);
      event.run();
      // All that follows from it, up to the next calls and sleeps.
      do await settled(); while (this.#outside > 0);
      this.check();
    }
    return true;
  }
}

const earlier = (a: Event, b: Event): boolean => a.at < b.at || a.at === b.at && a.tie < b.tie;
const settled = (): Promise<void> => new Promise((resolve) => setImmediate(resolve));

/** What becomes of a call. */
export type Fate =
  | "answered"
  /** It never arrives; the caller is told of a broken connection. */
  | "request lost"
  /** It takes effect, and the caller is told of a broken connection: a COMMIT whose answer is lost is one. */
  | "answer lost"
  /** The caller is told of a broken connection, and then it arrives. */
  | "late"
  /** It arrives twice, as when a driver or a proxy repeats it; the caller hears the second answer. */
  | "repeated"
  /** It is refused: somebody else has the database locked. */
  | "busy"
  /** The answer takes long. */
  | "slow";

/** How likely each fate is; the rest is answered. */
export type Faults = Readonly<Partial<Record<Exclude<Fate, "answered">, number>>>;

/** Longest time that a call or its answer is on its way. */
const MAX_LATE_MS = 1500;

/** Something that can be killed, paused and lied to. */
export class Process {
  /** For traces. */
  readonly name: string;
  /** Its clock, chance and sleep. */
  readonly runtime: Runtime;
  /** False when it is dead. */
  alive = true;
  /** Whether it ever stood still. */
  wasPaused = false;
  readonly #simulation: Simulation;
  #pausedUntil = 0;
  readonly #onKill: (() => void)[] = [];

  /** Starts it; its monotonic clock begins anywhere. */
  constructor(simulation: Simulation, name: string) {
    this.#simulation = simulation;
    this.name = name;
    const offset = simulation.between(0, 1_000_000);
    this.runtime = {
      now: () => simulation.now + offset,
      random: () => simulation.random(),
      sleep: (ms, signal) =>
        new Promise((resolve) => {
          if (signal?.aborted) return resolve();
          signal?.addEventListener("abort", () => resolve(), { once: true });
          this.#resume(simulation.now + Math.max(0, ms), resolve);
        }),
    };
  }

  /** Dies here and now: nothing that it waits for ever comes. */
  kill(): void {
    if (!this.alive) return;
    this.alive = false;
    this.#simulation.harmed = true;
    this.#simulation.log(() => `${this.name} is killed`);
    for (const run of this.#onKill) run();
  }

  /** What the kernel does when it dies. */
  onKill(run: () => void): void {
    this.#onKill.push(run);
  }

  /** Stands still, as by SIGSTOP or a long garbage collection. */
  pause(ms: number): void {
    this.#simulation.log(() => `${this.name} is paused for ${ms} ms`);
    this.wasPaused = true;
    this.#simulation.harmed = true;
    this.#pausedUntil = Math.max(this.#pausedUntil, this.#simulation.now + ms);
  }

  #resume(time: number, run: () => void): void {
    this.#simulation.at(time, () => {
      if (this.alive && this.#simulation.now >= this.#pausedUntil) this.#simulation.disturb(this);
      if (!this.alive) return;
      if (this.#simulation.now < this.#pausedUntil) this.#resume(this.#pausedUntil, run);
      else run();
    });
  }

  /** Calls another system. `what` is for traces; `run` takes effect at once when the call arrives. */
  call<T>(what: string, faults: Faults, run: () => Promise<T>): Promise<T> {
    const simulation = this.#simulation;
    let left = simulation.random();
    const fate: Fate = (Object.keys(faults) as (keyof Faults)[]).find((fate) => (left -= faults[fate] ?? 0) < 0) ??
      "answered";
    const latency = () => simulation.now + simulation.between(0, 20);
    const long = () => simulation.now + simulation.between(20, MAX_LATE_MS);
    return new Promise((resolve, reject) => {
      const broken = () => reject(new Error(`the connection broke at ${what}`));
      this.#resume(latency(), () => {
        if (fate !== "answered" && fate !== "slow") simulation.harmed = true;
        simulation.log(() => `${this.name} ${what}${fate === "answered" ? "" : ` (${fate})`}`);
        if (fate === "request lost") return this.#resume(latency(), broken);
        if (fate === "busy") return this.#resume(long(), () => reject(new EffectError("busy", `locked at ${what}`)));
        if (fate === "late") {
          this.#resume(latency(), broken);
          simulation.at(long(), () => {
            simulation.log(() => `late: ${what} of ${this.name}`);
            run().catch(() => {});
          });
          return;
        }
        const first = run();
        const answer = fate === "repeated" ? first.then(run, run) : first;
        const back = (settle: () => void) =>
          this.#resume(fate === "slow" ? long() : latency(), fate === "answer lost" ? broken : settle);
        answer.then((value) => back(() => resolve(value)), (error) => back(() => reject(error)));
      });
    });
  }

  /** Goes on after a while, unless it is dead. */
  later(ms: number, run: () => void): void {
    this.#resume(this.#simulation.now + ms, run);
  }
}

/** Makes what the platform does on other threads, or by chance, happen at once and by the seed. */
export function tameCrypto(random: () => number): void {
  const digest = (algorithm: string, bytes: Uint8Array) =>
    Promise.resolve(new Uint8Array(createHash(algorithm.replace("-", "")).update(bytes).digest()).buffer);
  Object.defineProperty(crypto.subtle, "digest", { value: digest, configurable: true });
  const randomUUID = (): ReturnType<Crypto["randomUUID"]> => {
    const part = () => Math.floor(random() * 0x1_0000).toString(16).padStart(4, "0");
    return `${part()}${part()}-${part()}-4${part().slice(1)}-8${part().slice(1)}-${part()}${part()}${part()}`;
  };
  Object.defineProperty(crypto, "randomUUID", { value: randomUUID, configurable: true });
}
