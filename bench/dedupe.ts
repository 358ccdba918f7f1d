/**
 * What the dedupe row costs: a bare insert in a transaction against the same with a claim, in turn, on one database. Beside
 * them the same with a dedupe row written by hand, which is the least that it can cost: a key, a time, nothing else.
 *
 * @module
 */
import { DatabaseSync } from "node:sqlite";
import Database from "better-sqlite3";
import { migrateSqlite, type SqliteClient, sqliteStore } from "../adapters/sqlite.ts";

/** One case on one adapter. */
export interface DedupeRow {
  /** Adapter and driver. */
  readonly adapter: string;
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

type Client = SqliteClient & { close(): unknown };

const OPEN: Readonly<Record<string, (path: string) => Client>> = {
  "sqlite/better-sqlite3": (path) => new Database(path),
  "sqlite/node": (path) => new DatabaseSync(path) as Client,
};
const ROUNDS = 9;

/** The value in the middle. */
export function median(values: readonly number[]): number {
  return values.toSorted((a, b) => a - b)[Math.floor(values.length / 2)]!;
}

const round = (value: number, digits: number): number => Number(value.toFixed(digits));

/** Runs the sides in turn; answers the microseconds of each round. The first round warms up. */
async function inTurn<S extends string>(times: number, sides: Readonly<Record<S, () => Promise<void>>>) {
  const measured = Object.fromEntries(Object.keys(sides).map((side) => [side, [] as number[]])) as Record<S, number[]>;
  for (let i = 0; i <= ROUNDS; i++) {
    for (const side of Object.keys(sides) as S[]) {
      const start = performance.now();
      for (let j = 0; j < times; j++) await sides[side]();
      if (i > 0) measured[side].push((performance.now() - start) * 1000 / times);
    }
  }
  return measured;
}

const ratioOf = (over: readonly number[], under: readonly number[]): number =>
  round(median(over.map((us, i) => us / under[i]!)), 3);

async function open(connect: (path: string) => Client, path: string) {
  const client = connect(path);
  await migrateSqlite(client);
  const store = sqliteStore(client);
  await store.count(); // Sets synchronous = FULL for all sides.
  client.prepare("create table orders (id text primary key, total integer)").run();
  client.prepare("create table handled (key text primary key, at integer not null) without rowid").run();
  return { client, store };
}

/** Measures each adapter. */
export async function dedupe(adapters: readonly string[] = ["sqlite"]): Promise<readonly DedupeRow[]> {
  const rows: DedupeRow[] = [];
  for (const [adapter, connect] of Object.entries(OPEN)) {
    if (!adapters.some((wanted) => adapter.startsWith(wanted))) continue;
    const folder = await Deno.makeTempDir({ prefix: "effectonce-bench-" });
    rows.push(...await againstBase(adapter, connect, folder), await againstSize(adapter, connect, folder));
    await Deno.remove(folder, { recursive: true });
  }
  return rows;
}

async function againstBase(adapter: string, connect: (path: string) => Client, folder: string): Promise<DedupeRow[]> {
  const { client, store } = await open(connect, `${folder}/app.db`);
  const insert = client.prepare("insert into orders values (?, ?)");
  const handle = client.prepare("insert into handled values (?, ?) on conflict do nothing");
  const [begin, commit] = [client.prepare("begin immediate"), client.prepare("commit")];
  let serial = 0;
  const keys = (n: number) => Array.from({ length: n }, () => ({ scope: "bench", key: `order-${serial++}` }));

  const bare = (n: number, byHand: boolean) => {
    begin.run();
    for (const { key } of keys(n)) {
      if (byHand) handle.run(key, Date.now());
      insert.run(key, 5);
    }
    commit.run();
    return Promise.resolve();
  };
  const claimed = (n: number, result: boolean) =>
    store.transaction(async (effects) => {
      const all = keys(n);
      if (n === 1) await effects.claim(all[0]!);
      else await effects.claimAll(all);
      for (const { key } of all) insert.run(key, 5);
      if (result) await effects.complete(all[0]!, { id: "payment-1" });
    });
  const cases = [
    { name: "single", n: 1, times: 300, result: false },
    { name: "batch of 100", n: 100, times: 40, result: false },
    { name: "single with result", n: 1, times: 300, result: true },
  ];
  const rows: DedupeRow[] = [];
  for (const { name, n, times, result } of cases) {
    const { base, hand, ours } = await inTurn(times, {
      base: () => bare(n, false),
      hand: () => bare(n, true),
      ours: () => claimed(n, result),
    });
    rows.push({
      adapter,
      case: name,
      baseUs: round(median(base), 1),
      handUs: round(median(hand), 1),
      dedupeUs: round(median(ours), 1),
      ratio: ratioOf(ours, base),
      handRatio: ratioOf(hand, base),
    });
  }
  client.close();
  return rows;
}

/** Whether a claim costs more when there are many: a million stored effects against ten thousand. */
async function againstSize(adapter: string, connect: (path: string) => Client, folder: string): Promise<DedupeRow> {
  const [few, many] = await Promise.all([10_000, 1_000_000].map(async (count) => {
    const { client, store } = await open(connect, `${folder}/${count}.db`);
    client.prepare(`with recursive n (i) as (select 1 union all select i + 1 from n where i < ${count})
      insert into effectonce_effects (scope, key, changed_ms) select 'bench', 'order-' || (i * 7919 % ${count}), i from n`)
      .run();
    client.prepare("pragma wal_checkpoint(truncate)").get();
    let serial = 0;
    const claim = () =>
      store.transaction(async (effects) => {
        // Anywhere between those that are there, as ids are.
        await effects.claim({ scope: "bench", key: `order-${(serial * 7907) % count}-${serial++}` });
      });
    return { client, claim };
  }));
  const measured = await inTurn(300, { few: few!.claim, many: many!.claim });
  for (const { client } of [few!, many!]) client.close();
  return {
    adapter,
    case: "single claim at 1,000,000 stored effects, against 10,000",
    baseUs: round(median(measured.few), 1),
    handUs: null,
    dedupeUs: round(median(measured.many), 1),
    ratio: ratioOf(measured.many, measured.few),
    handRatio: null,
  };
}
