/**
 * Runs seeds of the simulation: `main.ts FROM COUNT`, or one of them with its steps: `main.ts SEED`.
 *
 * Prints one line of JSON at the end; exit code 1 if a seed showed what must not be.
 *
 * @module
 */
import { simulate } from "./scenarios.ts";
import { Violation } from "./scheduler.ts";

/** What a run of many seeds found. */
export interface Outcome {
  /** Seeds that were run. */
  readonly seeds: number;
  /** How many of each kind. */
  readonly kinds: Readonly<Record<string, number>>;
  /** Events in all. */
  readonly steps: number;
  /** The first seed that failed, and how. */
  readonly failed?: { readonly seed: number; readonly what: string };
}

const [from, count] = Deno.args.map(Number);
if (!Number.isSafeInteger(from) || count !== undefined && !Number.isSafeInteger(count)) {
  console.error("simulation: use SEED, or FROM COUNT");
  Deno.exit(2);
}
const kinds: Record<string, number> = {};
let [seeds, steps] = [0, 0];
let failed: Outcome["failed"];
for (let seed = from!; seed < from! + (count ?? 1) && !failed; seed++) {
  seeds++;
  try {
    const run = await simulate(seed, count === undefined ? (line) => console.log(line) : undefined);
    kinds[run.kind] = (kinds[run.kind] ?? 0) + 1;
    steps += run.steps;
  } catch (error) {
    failed = { seed, what: error instanceof Violation ? error.message : `${(error as Error).stack}` };
  }
}
console.log(JSON.stringify({ seeds, kinds, steps, failed } satisfies Outcome));
Deno.exit(failed ? 1 : 0);
