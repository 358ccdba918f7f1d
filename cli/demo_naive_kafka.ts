/**
 * The loop that most people write: read what is pending, send it, then delete it. Arguments: database, topic. The broker's URL is in
 * EFFECTONCE_DEMO_KAFKA.
 *
 * @module
 */
import { DatabaseSync } from "node:sqlite";
import { readKafka } from "./kafka.ts";

if (import.meta.main) {
  const [path, topic] = Deno.args;
  const db = new DatabaseSync(path!);
  const kafka = await readKafka("EFFECTONCE_DEMO_KAFKA", Deno.env.get("EFFECTONCE_DEMO_KAFKA")!).kafka();
  const producer = kafka.producer({ idempotent: true, createPartitioner: () => () => 0 });
  await producer.connect();
  for (;;) {
    const rows = db.prepare("select seq, id, key, value from effectonce_outbox order by seq limit 5").all() as {
      seq: number;
      id: string;
      key: string;
      value: Uint8Array;
    }[];
    if (rows.length === 0) break;
    const messages = rows.map(({ id, key, value }) => ({
      key,
      value: new TextDecoder().decode(value),
      headers: { ce_id: id },
    }));
    await producer.send({ topic: topic!, messages });
    console.log("sent"); // Whoever started this may act on it.
    await new Promise((resolve) => setTimeout(resolve, 20));
    for (const { seq } of rows) db.prepare("delete from effectonce_outbox where seq = ?").run(seq);
  }
  Deno.exit(0);
}
