/**
 * What the dedupe row costs: a bare insert in a transaction against the same with a claim, in turn, on one database. Beside
 * them the same with a dedupe row written by hand, which is the least that it can cost: a key, a time, nothing else.
 *
 * @module
 */
import { type Kit, KITS, kitsOf } from "./kits.ts";

/** One case on one adapter. */
export interface DedupeRow {
  /** Adapter and driver. */
  readonly adapter: string;
  /** The server's version. */
  readonly version: string;
  /** What was measured. */
  readonly case: string;
  /** Microseconds of one transaction without a claim. */
  readonly baseUs: number;
  /** With a dedupe row written by hand; null where that says nothing. */
  readonly handUs: number | null;
  /** With a claim. */
  readonly dedupeUs: number;
  /** Claim against base: the median of the rounds' ratios. */
  readonly ratio: number;
  /** By hand against base. */
  readonly handRatio: number | null;
}

const ROUNDS = 11;
const WARM_UP = 3;

/** The value in the middle. */
export function median(values: readonly number[]): number {
  return values.toSorted((a, b) => a - b)[Math.floor(values.length / 2)]!;
}

const round = (value: number, digits: number): number => Number(value.toFixed(digits));

/** Runs the sides in turn; answers the microseconds of each round. The first rounds warm up. */
export async function inTurn<S extends string>(times: number, sides: Readonly<Record<S, () => Promise<unknown>>>) {
  const measured = Object.fromEntries(Object.keys(sides).map((side) => [side, [] as number[]])) as Record<S, number[]>;
  for (let i = 0; i < WARM_UP + ROUNDS; i++) {
    for (const side of Object.keys(sides) as S[]) {
      const start = performance.now();
      for (let j = 0; j < times; j++) await sides[side]();
      if (i >= WARM_UP) measured[side].push((performance.now() - start) * 1000 / times);
    }
  }
  return measured;
}

/** The median of the ratios, round by round. */
export const ratioOf = (over: readonly number[], under: readonly number[]): number =>
  round(median(over.map((us, i) => us / under[i]!)), 3);

interface Sides {
  /** How often in a round. */
  readonly times: number;
  readonly base: () => Promise<unknown>;
  readonly hand?: () => Promise<unknown>;
  readonly ours: () => Promise<unknown>;
}

function casesOn(kit: Kit): Readonly<Record<string, Sides>> {
  let serial = 0;
  const scope = "bench";
  const fresh = (n: number) => Array.from({ length: n }, () => `order-${serial++}`);
  const effectsOf = (keys: readonly string[]) => keys.map((key) => ({ scope, key }));
  const batch = (n: number, times: number): Sides => ({
    times,
    base: () => kit.bare(fresh(n)),
    hand: () => kit.bare(fresh(n), true),
    ours() {
      const keys = fresh(n);
      return kit.claimed(keys, (effects) => effects.claimAll(effectsOf(keys)));
    },
  });
  const single = (run: Kit["claimed"], result = false): Sides => ({
    times: 200,
    base: () => kit.bare(fresh(1)),
    hand: () => kit.bare(fresh(1), true),
    ours() {
      const keys = fresh(1);
      const [effect] = effectsOf(keys);
      return run(keys, async (effects) => {
        await effects.claim(effect!);
        if (result) await effects.complete(effect!, { id: "payment-1" });
      });
    },
  });
  const done = fresh(100);
  return {
    "single": single(kit.claimed),
    "single joined": single(kit.joined),
    "single with result": single(kit.claimed, true),
    "batch of 100": batch(100, 20),
    "batch of 500": batch(500, 5),
    "batch of 100, all done before": {
      times: 20,
      base: () => kit.bare(fresh(100)),
      ours: () => kit.claimed([], (effects) => effects.claimAll(effectsOf(done))),
    },
    "claim and complete of an external effect, against two inserts": {
      times: 100,
      async base() {
        await kit.bare(fresh(1));
        await kit.bare(fresh(1));
      },
      async ours() {
        const [key] = effectsOf(fresh(1));
        const claim = await kit.store.claim(key!, { leaseMs: 30_000 });
        if (claim.state === "claimed") await kit.store.complete(key!, claim.fence, { id: "payment-1" });
      },
    },
  };
}

/** Measures each adapter. */
export async function dedupe(adapters?: readonly string[]): Promise<readonly DedupeRow[]> {
  const rows: DedupeRow[] = [];
  for (const adapter of kitsOf(adapters)) {
    const kit = await KITS[adapter]!();
    for (const [name, { times, base, hand, ours }] of Object.entries(casesOn(kit))) {
      const sides: Record<string, () => Promise<unknown>> = hand ? { base, hand, ours } : { base, ours };
      const measured: Readonly<Record<string, readonly number[]>> = await inTurn(times, sides);
      const byHand = measured["hand"];
      rows.push({
        adapter,
        version: kit.version,
        case: name,
        baseUs: round(median(measured["base"]!), 1),
        handUs: byHand ? round(median(byHand), 1) : null,
        dedupeUs: round(median(measured["ours"]!), 1),
        ratio: ratioOf(measured["ours"]!, measured["base"]!),
        handRatio: byHand ? ratioOf(byHand, measured["base"]!) : null,
      });
    }
    await kit.close();
  }
  return rows;
}
