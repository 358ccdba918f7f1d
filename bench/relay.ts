/**
 * How fast a relay drains an outbox in SQLite into a local HTTP server and into a JSONL file, against a bare loop.
 *
 * @module
 */
import { DatabaseSync } from "node:sqlite";
import { relay, type Sink } from "../mod.ts";
import { fileSink } from "../adapters/file.ts";
import { httpSink } from "../adapters/http.ts";
import { migrateSqlite, sqliteOutbox, sqliteStore } from "../adapters/sqlite.ts";

interface Row {
  readonly case: string;
  readonly rows: number;
  readonly rowsPerSecond: number;
  readonly peakMb: number;
}

async function measured(
  name: string,
  rows: number,
  run: (client: DatabaseSync, folder: string) => Promise<void>,
): Promise<Row> {
  const folder = await Deno.makeTempDir({ prefix: "effectonce-bench-" });
  const client = new DatabaseSync(`${folder}/app.db`);
  await migrateSqlite(client);
  client.prepare("begin").run();
  const insert = client.prepare("insert into effectonce_outbox (topic, key, value) values ('orders', ?, ?)");
  const value = new Uint8Array(200).fill(120);
  for (let i = 0; i < rows; i++) insert.run(`key-${i % 1000}`, value);
  client.prepare("commit").run();
  let peak = 0;
  const timer = setInterval(() => peak = Math.max(peak, Deno.memoryUsage().rss), 50);
  const start = performance.now();
  await run(client, folder);
  const seconds = (performance.now() - start) / 1000;
  clearInterval(timer);
  client.close();
  await Deno.remove(folder, { recursive: true });
  return { case: name, rows, rowsPerSecond: Math.round(rows / seconds), peakMb: Math.round(peak / 1e6) };
}

const drained = (to: (folder: string) => Sink, batch?: number) => async (client: DatabaseSync, folder: string) => {
  await relay({ from: sqliteOutbox(client), to: to(folder), store: sqliteStore(client), drain: true, batch });
};

/** Measures each way. */
export async function relays(): Promise<readonly Row[]> {
  const server = Deno.serve({ hostname: "127.0.0.1", port: 0, onListen: () => {} }, async (request) => {
    await request.body?.cancel();
    return new Response("ok");
  });
  const url = `http://127.0.0.1:${server.addr.port}/`;
  /** What people write by hand: at-least-once, one by one. */
  const byHand = async (client: DatabaseSync) => {
    for (
      let rows;
      (rows = client.prepare("select seq, value from effectonce_outbox order by seq limit 100").all()).length;
    ) {
      for (const { seq, value } of rows) {
        await (await fetch(url, { method: "POST", body: new Uint8Array(value as Uint8Array) })).body?.cancel();
        client.prepare("delete from effectonce_outbox where seq = ?").run(seq!);
      }
    }
  };
  const rows = [
    await measured("by hand -> http, at-least-once", 5_000, byHand),
    await measured("claimed -> http", 5_000, drained(() => httpSink(url))),
    await measured("sealed -> file, batch 100", 50_000, drained((folder) => fileSink(`${folder}/out.jsonl`))),
    await measured("sealed -> file, batch 1000", 200_000, drained((folder) => fileSink(`${folder}/out.jsonl`), 1000)),
  ];
  await server.shutdown();
  return rows;
}
