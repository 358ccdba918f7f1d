/**
 * Whether things cost more where there is more: a claim at a million stored effects against ten thousand, and a look at the
 * outbox with a backlog of a million against ten thousand. `--rows` says how many instead of a million.
 *
 * @module
 */
import type { SourceOptions } from "../mod.ts";
import { inTurn, median, ratioOf } from "./dedupe.ts";
import { type Kit, KITS, kitsOf } from "./kits.ts";

/** One case on one adapter. */
export interface GrowthRow {
  /** Adapter and driver. */
  readonly adapter: string;
  /** The server's version. */
  readonly version: string;
  /** What was measured. */
  readonly case: string;
  /** How many rows were there in the second measurement. */
  readonly rows: number;
  /** Microseconds at ten thousand rows. */
  readonly fewUs: number;
  /** Microseconds at many. */
  readonly manyUs: number;
  /** Many against few: the median of the rounds' ratios. */
  readonly ratio: number;
}

const FEW = 10_000;
const RELAY: SourceOptions = { relay: "bench", protocol: "claimed", onPark: "block", leaseMs: 3_600_000 };

async function claims(kit: Kit, count: number) {
  await kit.fillEffects(count);
  let serial = 0;
  // Anywhere between those that are there, as ids are.
  return () =>
    kit.claimed([], (effects) => effects.claim({ scope: "bench", key: `order-${(serial * 7907) % count}-${serial++}` }));
}

async function looks(kit: Kit, count: number) {
  await kit.fillOutbox(count);
  const session = await kit.outbox.open(RELAY);
  return () => session.read({ rows: 100, bytes: 8_388_608 });
}

/** Measures each adapter. */
export async function growth(adapters?: readonly string[], many = 1_000_000): Promise<readonly GrowthRow[]> {
  const rows: GrowthRow[] = [];
  for (const adapter of kitsOf(adapters)) {
    for (const [name, prepare] of [["claim", claims], ["look at the outbox", looks]] as const) {
      const [small, large] = [await KITS[adapter]!(), await KITS[adapter]!()];
      const measured = await inTurn(100, { few: await prepare(small, FEW), many: await prepare(large, many) });
      rows.push({
        adapter,
        version: small.version,
        case: name,
        rows: many,
        fewUs: Math.round(median(measured.few)),
        manyUs: Math.round(median(measured.many)),
        ratio: ratioOf(measured.many, measured.few),
      });
      await small.close();
      await large.close();
    }
  }
  return rows;
}
