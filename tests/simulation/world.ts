/**
 * What the processes of a simulation work on, and what must hold there at every step: a store's rows, and a target that
 * keeps a ledger of what really happened.
 *
 * @module
 */
import {
  type CallSink,
  type ClaimStore,
  type Completion,
  type EffectKey,
  type EffectRow,
  type EffectRows,
  type EffectStep,
  type Found,
  type Json,
  type Message,
  rejected,
  retryable,
} from "../../mod.ts";
import type { Faults, Process, Simulation } from "./scheduler.ts";

/** What is to be seen of a row. */
export type RowView = Pick<EffectRow, "key" | "state" | "fence" | "generation" | "attempt" | "result" | "untilMs">;

/** What is wrong about a change of one row, whoever made it; undefined if nothing. */
export function wrongChange(before: RowView | undefined, after: RowView | undefined): string | undefined {
  if (!before || before === after) return undefined;
  const named = `effect "${before.key}"`;
  if (!after) return `${named} is gone`;
  if (after.fence < before.fence) return `the fence of ${named} fell from ${before.fence} to ${after.fence}`;
  if (after.generation < before.generation) return `the generation of ${named} fell`;
  const held = before.state === "claimed" && after.state === "claimed" && after.fence === before.fence;
  if (held && after.untilMs < before.untilMs) return `the lease of ${named} was cut short`;
  // Attempts count from 1 again where a person lets one in doubt be repeated.
  const ended = before.state === "rejected" || before.state === "uncertain" && after.attempt !== 1;
  if (ended && after.state === "claimed" && after.generation === before.generation) {
    return `${named} was ${before.state}, and runs again`;
  }
  if (before.state !== "done") return undefined;
  if (after.state !== "done") return `${named} was done, and is ${after.state}`;
  return after.result === before.result ? undefined : `the result of ${named} was overwritten`;
}

/** A store's rows in a map, each change of which is looked at. */
export class Rows implements EffectRows {
  /** For messages. */
  readonly name = "rows";
  /** All rows by scope and key. */
  readonly rows: Map<string, EffectRow> = new Map();
  readonly #simulation: Simulation;

  /** The store's clock is the simulation's. */
  constructor(simulation: Simulation) {
    this.#simulation = simulation;
  }

  /** The row of a key. */
  get(key: EffectKey): EffectRow | undefined {
    return this.rows.get(`${key.scope} ${key.key}`);
  }

  change<T>(
    steps: readonly { readonly key: EffectKey; readonly step: EffectStep<T> }[],
  ): Promise<readonly T[]> {
    return Promise.resolve(steps.map(({ key, step }) => {
      const before = this.get(key);
      const { write, answer } = step(before, this.#simulation.now);
      if (write) {
        const wrong = wrongChange(before, write);
        if (wrong) this.#simulation.violate(wrong);
        this.rows.set(`${key.scope} ${key.key}`, write);
      }
      return answer;
    }));
  }

  list({ state, scope, key, limit }: Parameters<EffectRows["list"]>[0]): Promise<readonly EffectRow[]> {
    const all = this.rows.values().filter((row) =>
      (state ?? row.state) === row.state && (scope ?? row.scope) === row.scope && (key ?? row.key) === row.key
    );
    return Promise.resolve(all.take(limit).toArray());
  }

  count(): ReturnType<EffectRows["count"]> {
    const counts = { claimed: 0, waiting: 0, done: 0, rejected: 0, uncertain: 0 };
    for (const { state } of this.rows.values()) counts[state]++;
    return Promise.resolve(counts);
  }

  prune(): Promise<number> {
    return Promise.resolve(0);
  }
}

/** A store as one process reaches it. `rowOf` looks at a row, if that can be done without disturbing anything. */
export function remoteStore(
  simulation: Simulation,
  process: Process,
  store: ClaimStore,
  faults: () => Faults,
  rowOf: (key: EffectKey) => RowView | undefined,
): ClaimStore {
  /** An owner that was overtaken may leave evidence, and nothing else. */
  function guarded<T>(completions: readonly Completion[], run: () => Promise<T>): Promise<T> {
    const before = completions.map(({ key }) => rowOf(key));
    const answer = run();
    completions.forEach(({ key, fence }, i) => {
      const [was, is] = [before[i], rowOf(key)];
      if (!was || !is || was.fence === fence) return;
      if (is.state !== was.state || is.fence !== was.fence || is.result !== was.result || is.untilMs !== was.untilMs) {
        simulation.violate(`a dead owner (fence ${fence}) changed effect "${key.key}" of fence ${was.fence}`);
      }
    });
    return answer;
  }
  const call = <T>(what: string, run: () => Promise<T>) => process.call(what, faults(), run);
  const names = (keys: readonly { readonly key: { readonly key: string } }[]) => keys.map(({ key }) => key.key).join(" ");
  return {
    name: store.name,
    claim: (key, options) => call(`claim ${key.key}`, () => store.claim(key, options)),
    claimAll: (claims) => call(`claim ${names(claims)}`, () => store.claimAll(claims)),
    complete: (key, fence, result) =>
      call(`complete ${key.key}`, () => guarded([{ key, fence }], () => store.complete(key, fence, result))),
    completeAll: (completions) =>
      call(`complete ${names(completions)}`, () => guarded(completions, () => store.completeAll(completions))),
    renew: (key, fence, leaseMs) =>
      call(`renew ${key.key}`, () => guarded([{ key, fence }], () => store.renew(key, fence, leaseMs))),
    fail: (key, fence, failure) =>
      call(`fail ${key.key} as ${failure.as}`, () => guarded([{ key, fence }], () => store.fail(key, fence, failure))),
    resolve: (key, resolution, fence) =>
      call(`resolve ${key.key} as ${resolution.as}`, () => store.resolve(key, resolution, fence)),
    list: (options) => call("list", () => store.list(options)),
    count: () => call("count", () => store.count()),
    prune: (options) => call("prune", () => store.prune(options)),
  };
}

/** One time that an effect really happened. */
export interface Execution {
  /** Which effect. */
  readonly id: string;
  /** Under which idempotency key. */
  readonly idempotencyKey: string;
  /** Whether its caller had lost its lease when it sent. */
  readonly zombie: boolean;
}

/** How a target behaves. */
export interface TargetOptions {
  /** How long it remembers idempotency keys; 0: it does not look at them. */
  readonly dedupeWindowMs: number;
  /** What it always refuses. */
  readonly refuses: (id: string) => boolean;
  /** Longest time that a request spends on its way. */
  readonly maxLateMs: number;
}

/** How likely it is that a call goes wrong, and how. */
export interface TargetFaults {
  /** The request is lost. */
  readonly lost: number;
  /** It happens, and the answer is lost. */
  readonly unanswered: number;
  /** The caller sees a broken connection, and then it happens. */
  readonly late: number;
  /** No answer within the caller's time; it happens, or not. */
  readonly hangs: number;
  /** An error that says nothing (500); it happens, or not. */
  readonly fails: number;
  /** A refusal that passes (429). */
  readonly busy: number;
  /** The request arrives twice. */
  readonly repeated: number;
}

/** The outside world: what is called, and keeps a ledger. */
export class Target {
  /** All that happened, in order. */
  readonly ledger: Execution[] = [];
  /** Requests on their way. */
  underWay = 0;
  readonly #simulation: Simulation;
  readonly #options: TargetOptions;
  readonly #remembered: Map<string, { readonly until: number; readonly result: Json | Error }> = new Map();

  /** An empty ledger. */
  constructor(simulation: Simulation, options: TargetOptions) {
    this.#simulation = simulation;
    this.#options = options;
  }

  /** How often an effect happened. */
  count(id: string): number {
    return this.ledger.filter((execution) => execution.id === id).length;
  }

  #execute(id: string, idempotencyKey: string, zombie: boolean): Json {
    const { dedupeWindowMs, refuses } = this.#options;
    const simulation = this.#simulation;
    const known = this.#remembered.get(idempotencyKey);
    if (known && known.until > simulation.now) {
      if (known.result instanceof Error) throw known.result;
      return known.result;
    }
    if (refuses(id)) throw rejected("refused for good");
    this.ledger.push({ id, idempotencyKey, zombie });
    simulation.log(() => `EFFECT ${id}, time ${this.count(id)}, key ${idempotencyKey}${zombie ? ", by a zombie" : ""}`);
    const result = { payment: this.ledger.length };
    if (dedupeWindowMs > 0) this.#remembered.set(idempotencyKey, { until: simulation.now + dedupeWindowMs, result });
    return result;
  }

  /** One call by a process. `zombie` says whether its lease is gone when it really sends. */
  send(
    process: Process,
    faults: TargetFaults,
    id: string,
    idempotencyKey: string,
    signal: AbortSignal,
    zombie: () => boolean,
  ): Promise<Json> {
    const simulation = this.#simulation;
    const { maxLateMs, dedupeWindowMs } = this.#options;
    const chances = Object.entries(faults) as [keyof TargetFaults, number][];
    let left = simulation.random();
    const fate = chances.find(([, probability]) => (left -= probability) < 0)?.[0];
    return new Promise((resolve, reject) => {
      process.later(simulation.between(0, 20), () => {
        // What was never sent cannot have happened; so does `httpSink`.
        if (signal.aborted) return reject(retryable("not sent: its lease was about to end"));
        signal.addEventListener("abort", () => reject(new Error("given up: its lease was about to end")), { once: true });
        const late = zombie();
        if (late && !process.wasPaused) simulation.violate(`${process.name} called the target for ${id} without a lease`);
        if (fate && fate !== "busy") simulation.harmed = true;
        simulation.log(() => `${process.name} calls the target for ${id}${fate ? ` (${fate})` : ""}`);
        const soon = () => simulation.between(0, 20);
        const answer = (settle: () => void) => process.later(soon(), settle);
        const broken = () => answer(() => reject(new Error("the connection broke")));
        const arrive = (ms: number, then?: (result: Json) => void, otherwise?: (error: unknown) => void) => {
          this.underWay++;
          simulation.at(simulation.now + ms, () => {
            this.underWay--;
            let result: Json;
            try {
              result = this.#execute(id, idempotencyKey, late);
            } catch (error) {
              return otherwise?.(error);
            }
            then?.(result);
          });
        };
        switch (fate) {
          case "lost":
            return broken();
          case "unanswered":
            return arrive(soon(), broken, broken);
          case "late":
            broken();
            return arrive(simulation.between(20, maxLateMs));
          case "hangs":
            if (simulation.chance(0.5)) arrive(simulation.between(0, maxLateMs));
            // The lease is renewed for as long as the caller waits: its own time-out ends that.
            return process.later(simulation.between(100, 3000), () => reject(new Error("no answer in time")));
          case "fails":
            if (simulation.chance(0.5)) arrive(soon());
            else if (dedupeWindowMs > 0 && simulation.chance(0.3) && !this.#remembered.has(idempotencyKey)) {
              // As payment services do: the failure itself is the answer that is kept under this key.
              const until = simulation.now + dedupeWindowMs;
              this.#remembered.set(idempotencyKey, { until, result: new Error("status 500, as before") });
            }
            return answer(() => reject(new Error("status 500")));
          case "busy":
            return answer(() => reject(retryable("status 429", { afterMs: simulation.between(0, 300) })));
          case "repeated":
            if (dedupeWindowMs > 0) arrive(simulation.between(0, maxLateMs));
        }
        arrive(
          soon(),
          (result) => answer(() => resolve(result)),
          (error) => answer(() => reject(error)),
        );
      });
    });
  }

  /** Asked about an effect in doubt. */
  find(process: Process, faults: Faults, idempotencyKey: string): Promise<Found<Json>> {
    const simulation = this.#simulation;
    return process.call(`asks the target about ${idempotencyKey}`, faults, (): Promise<Found<Json>> => {
      if (simulation.chance(faults.slow ? 0.3 : 0)) return Promise.resolve({ state: "unknown" });
      const found = this.ledger.findIndex((execution) => execution.idempotencyKey === idempotencyKey);
      return Promise.resolve(found < 0 ? { state: "absent" } : { state: "done", result: { payment: found + 1 } });
    });
  }
}

/** A target as a relay's sink. */
export function callSink(
  process: Process,
  target: Target,
  options: Pick<CallSink, "repeat" | "dedupeWindowMs"> & { readonly reconciles: boolean },
  faults: () => TargetFaults,
  callFaults: () => Faults,
  zombie: (id: string, generation: string, attempt: number) => boolean,
): CallSink {
  const { repeat, dedupeWindowMs, reconciles } = options;
  return {
    kind: "call",
    name: "target",
    repeat,
    dedupeWindowMs,
    deliver: ({ id }: Message, { idempotencyKey, number, signal }) =>
      target.send(process, faults(), id, idempotencyKey, signal, () => zombie(id, idempotencyKey, number)),
    ...reconciles
      ? { reconcile: (_: Message, { idempotencyKey }) => target.find(process, callFaults(), idempotencyKey) }
      : {},
  };
}
