/**
 * How fast a relay drains an outbox in SQLite into a local HTTP server and into a JSONL file, beside a loop written by hand,
 * and how much memory it takes. Each case is a process of its own, so that none pays for another's memory.
 *
 * @module
 */
import { DatabaseSync } from "node:sqlite";
import { relay, type Sink } from "../mod.ts";
import { fileSink } from "../adapters/file.ts";
import { httpSink } from "../adapters/http.ts";
import { migrateSqlite, type SqliteClient, sqliteOutbox, sqliteStore } from "../adapters/sqlite.ts";
import { median } from "./dedupe.ts";

/** One way to drain an outbox. */
export interface RelayRow {
  /** What was measured. */
  readonly case: string;
  /** Rows in the outbox. */
  readonly rows: number;
  /** Rows a second: the median of the rounds. */
  readonly rowsPerSecond: number;
  /** Largest resident memory of the process, in MB. */
  readonly peakMb: number;
}

type Run = (client: SqliteClient, folder: string, url: string) => Promise<void>;

const drained = (to: (folder: string, url: string) => Sink): Run => async (client, folder, url) => {
  await relay({ from: sqliteOutbox(client), to: to(folder, url), store: sqliteStore(client), drain: true });
};

/** What people write by hand: at-least-once, one by one. */
const byHand: Run = async (client, _, url) => {
  const read = client.prepare("select seq, value from effectonce_outbox order by seq limit 100");
  for (let rows; (rows = read.all() as { seq: number; value: Uint8Array }[]).length > 0;) {
    for (const { seq, value } of rows) {
      await (await fetch(url, { method: "POST", body: new Uint8Array(value) })).body?.cancel();
      client.prepare("delete from effectonce_outbox where seq = ?").run(seq);
    }
  }
};

const CASES: Readonly<Record<string, { readonly rows: number; readonly run: Run }>> = {
  "by hand -> http, at-least-once": { rows: 5_000, run: byHand },
  "claimed -> http": { rows: 5_000, run: drained((_, url) => httpSink(url)) },
  "claimed -> http, idempotent": { rows: 5_000, run: drained((_, url) => httpSink(url, { repeat: "same-key" })) },
  "sealed -> file": { rows: 50_000, run: drained((folder) => fileSink(`${folder}/out.jsonl`)) },
  "sealed -> file, large backlog": { rows: 200_000, run: drained((folder) => fileSink(`${folder}/out.jsonl`)) },
};
const ROUNDS = 5;

async function measure(name: string, url: string): Promise<RelayRow> {
  const { rows, run } = CASES[name]!;
  const folder = await Deno.makeTempDir({ prefix: "effectonce-bench-" });
  const client = new DatabaseSync(`${folder}/app.db`) as DatabaseSync & SqliteClient;
  await migrateSqlite(client);
  client.exec("begin");
  const insert = client.prepare("insert into effectonce_outbox (topic, key, value) values ('orders', ?, ?)");
  const value = new Uint8Array(200).fill(120);
  for (let i = 0; i < rows; i++) insert.run(`key-${i % 1000}`, value);
  client.exec("commit");
  let peak = 0;
  const timer = setInterval(() => peak = Math.max(peak, Deno.memoryUsage().rss), 20);
  const start = performance.now();
  await run(client, folder, url);
  const seconds = (performance.now() - start) / 1000;
  clearInterval(timer);
  client.close();
  await Deno.remove(folder, { recursive: true });
  return { case: name, rows, rowsPerSecond: Math.round(rows / seconds), peakMb: Math.round(peak / 1e6) };
}

/** Measures each case, in turn. */
export async function relays(): Promise<readonly RelayRow[]> {
  const server = Deno.serve({ hostname: "127.0.0.1", port: 0, onListen: () => {} }, async (request) => {
    await request.body?.cancel();
    return new Response("ok");
  });
  const url = `http://127.0.0.1:${server.addr.port}/`;
  const measured = new Map<string, RelayRow[]>();
  for (let round = 0; round < ROUNDS; round++) {
    for (const name of Object.keys(CASES)) {
      const { stdout, success } = await new Deno.Command(Deno.execPath(), {
        args: ["run", "-A", import.meta.filename!, name, url],
        stderr: "inherit",
      }).output();
      if (!success) throw new Error(`The case "${name}" failed`);
      measured.set(name, [...measured.get(name) ?? [], JSON.parse(new TextDecoder().decode(stdout))]);
    }
  }
  await server.shutdown();
  return measured.values().map((rounds) => ({
    ...rounds[0]!,
    rowsPerSecond: median(rounds.map(({ rowsPerSecond }) => rowsPerSecond)),
    peakMb: Math.max(...rounds.map(({ peakMb }) => peakMb)),
  })).toArray();
}

if (import.meta.main) console.log(JSON.stringify(await measure(Deno.args[0]!, Deno.args[1]!)));
