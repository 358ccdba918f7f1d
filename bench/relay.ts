/**
 * How fast a relay drains an outbox into a local HTTP server and into a JSONL file, beside a loop written by hand, and how much
 * memory it takes. Each case is a process of its own, so that none pays for another's memory.
 *
 * @module
 */
import { relay, type Sink } from "../mod.ts";
import { fileSink } from "../adapters/file.ts";
import { httpSink } from "../adapters/http.ts";
import { median } from "./dedupe.ts";
import { type Kit, KITS } from "./kits.ts";

/** One way to drain an outbox. */
export interface RelayRow {
  /** Adapter and driver. */
  readonly adapter: string;
  /** What was measured. */
  readonly case: string;
  /** Rows in the outbox. */
  readonly rows: number;
  /** Rows a second: the median of the rounds. */
  readonly rowsPerSecond: number;
  /** Largest resident memory of the process, in MB. */
  readonly peakMb: number;
}

type Run = (kit: Kit, folder: string, url: string) => Promise<unknown>;

const drained = (to: (folder: string, url: string) => Sink, lanes?: number): Run => ({ outbox, store }, folder, url) =>
  relay({ from: outbox, to: to(folder, url), store, drain: true, lanes });

/** What people write by hand: at-least-once, one by one. */
const byHand: Run = async (kit, _, url) => {
  for (let rows; (rows = await kit.firstRows()).length > 0;) {
    for (const { seq, value } of rows) {
      await (await fetch(url, { method: "POST", body: new Uint8Array(value) })).body?.cancel();
      await kit.deleteRow(seq);
    }
  }
};

const CASES: Readonly<Record<string, { readonly rows: number; readonly run: Run }>> = {
  "by hand -> http, at-least-once": { rows: 5_000, run: byHand },
  "claimed -> http": { rows: 5_000, run: drained((_, url) => httpSink(url)) },
  "claimed -> http, 64 lanes": { rows: 5_000, run: drained((_, url) => httpSink(url), 64) },
  "claimed -> http, idempotent": { rows: 5_000, run: drained((_, url) => httpSink(url, { repeat: "same-key" })) },
  "sealed -> file": { rows: 50_000, run: drained((folder) => fileSink(`${folder}/out.jsonl`)) },
  "sealed -> file, large backlog": { rows: 200_000, run: drained((folder) => fileSink(`${folder}/out.jsonl`)) },
};
const ADAPTERS = ["sqlite/node", "postgres/pg", "mysql/mysql2", "mariadb/mysql2"];
const ROUNDS = 3;

async function measure(adapter: string, name: string, url: string): Promise<RelayRow> {
  const { rows, run } = CASES[name]!;
  const folder = await Deno.makeTempDir({ prefix: "effectonce-bench-" });
  const kit = await KITS[adapter]!();
  await kit.fillOutbox(rows);
  let peak = 0;
  const timer = setInterval(() => peak = Math.max(peak, Deno.memoryUsage().rss), 20);
  const start = performance.now();
  await run(kit, folder, url);
  const seconds = (performance.now() - start) / 1000;
  clearInterval(timer);
  await kit.close();
  await Deno.remove(folder, { recursive: true });
  return { adapter, case: name, rows, rowsPerSecond: Math.round(rows / seconds), peakMb: Math.round(peak / 1e6) };
}

/** Measures each case, in turn. */
export async function relays(adapters?: readonly string[]): Promise<readonly RelayRow[]> {
  const server = Deno.serve({ hostname: "127.0.0.1", port: 0, onListen: () => {} }, async (request) => {
    await request.body?.cancel();
    return new Response("ok");
  });
  const url = `http://127.0.0.1:${server.addr.port}/`;
  const measured = new Map<string, RelayRow[]>();
  const wanted = ADAPTERS.filter((name) => !adapters || adapters.includes(name.split("/")[0]!));
  for (let round = 0; round < ROUNDS; round++) {
    for (const adapter of wanted) {
      for (const name of Object.keys(CASES)) {
        const { stdout, success } = await new Deno.Command(Deno.execPath(), {
          args: ["run", "-A", import.meta.filename!, adapter, name, url],
          stderr: "inherit",
        }).output();
        if (!success) throw new Error(`The case "${name}" on ${adapter} failed`);
        const key = `${adapter} ${name}`;
        measured.set(key, [...measured.get(key) ?? [], JSON.parse(new TextDecoder().decode(stdout))]);
      }
    }
  }
  await server.shutdown();
  return measured.values().map((rounds) => ({
    ...rounds[0]!,
    rowsPerSecond: median(rounds.map(({ rowsPerSecond }) => rowsPerSecond)),
    peakMb: Math.max(...rounds.map(({ peakMb }) => peakMb)),
  })).toArray();
}

if (import.meta.main) {
  console.log(JSON.stringify(await measure(Deno.args[0]!, Deno.args[1]!, Deno.args[2]!)));
  Deno.exit(0); // The connection that keeps the servers.
}
