/**
 * What the dedupe row costs: a bare insert in a transaction against the same with a claim, in turn, on one database.
 *
 * @module
 */
import { DatabaseSync } from "node:sqlite";
import Database from "better-sqlite3";
import { migrateSqlite, type SqliteClient, sqliteStore } from "../adapters/sqlite.ts";

interface Row {
  readonly adapter: string;
  readonly case: string;
  readonly baseUs: number;
  readonly dedupeUs: number;
  readonly ratio: number;
}

const OPEN: Readonly<Record<string, (path: string) => SqliteClient & { close(): unknown }>> = {
  "sqlite/better-sqlite3": (path) => new Database(path) as unknown as SqliteClient & { close(): unknown },
  "sqlite/node": (path) => new DatabaseSync(path),
};
const ROUNDS = 9;

/** The value in the middle. */
export function median(values: readonly number[]): number {
  return values.toSorted((a, b) => a - b)[Math.floor(values.length / 2)]!;
}

const round = (value: number, digits: number): number => Number(value.toFixed(digits));

/** Measures each adapter. */
export async function dedupe(adapters: readonly string[] = ["sqlite"]): Promise<readonly Row[]> {
  const rows: Row[] = [];
  for (const [adapter, connect] of Object.entries(OPEN)) {
    if (!adapters.some((wanted) => adapter.startsWith(wanted))) continue;
    const folder = await Deno.makeTempDir({ prefix: "effectonce-bench-" });
    const client = connect(`${folder}/app.db`);
    await migrateSqlite(client);
    const store = sqliteStore(client);
    await store.count(); // Sets synchronous = FULL for both sides.
    client.prepare("create table orders (id text primary key, total integer)").run();
    const insert = client.prepare("insert into orders values (?, ?)");
    const [begin, commit] = [client.prepare("begin immediate"), client.prepare("commit")];
    let serial = 0;
    const keys = (n: number) => Array.from({ length: n }, () => ({ scope: "bench", key: `order-${serial++}` }));

    const bare = (n: number) => {
      begin.run();
      for (const { key } of keys(n)) insert.run(key, 5);
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
    for (const { name, n, times, result } of cases) {
      const sides = { base: () => bare(n), dedupe: () => claimed(n, result) };
      const measured: Record<keyof typeof sides, number[]> = { base: [], dedupe: [] };
      for (let i = 0; i <= ROUNDS; i++) {
        for (const side of ["base", "dedupe"] as const) {
          const start = performance.now();
          for (let j = 0; j < times; j++) await sides[side]();
          if (i > 0) measured[side].push((performance.now() - start) * 1000 / times); // The first round warms up.
        }
      }
      const ratio = median(measured.dedupe.map((us, i) => us / measured.base[i]!));
      const [baseUs, dedupeUs] = [median(measured.base), median(measured.dedupe)];
      rows.push({ adapter, case: name, baseUs: round(baseUs, 1), dedupeUs: round(dedupeUs, 1), ratio: round(ratio, 3) });
    }
    client.close();
    await Deno.remove(folder, { recursive: true });
  }
  return rows;
}
