/**
 * The loop that most people write: read what is pending, charge, then mark it as done. Arguments: database, URL.
 *
 * @module
 */
import { DatabaseSync } from "node:sqlite";

if (import.meta.main) {
  const [path, url] = Deno.args;
  const db = new DatabaseSync(path!);
  for (;;) {
    const rows = db.prepare("select id, value from effectonce_outbox order by seq limit 10").all();
    if (rows.length === 0) break;
    for (const { id, value } of rows as { id: string; value: Uint8Array }[]) {
      const body = new Uint8Array(value);
      const response = await fetch(url!, { method: "POST", body });
      if (!response.ok) throw new Error(`the payment service answered ${response.status}`);
      await response.body?.cancel();
      db.prepare("delete from effectonce_outbox where id = ?").run(id);
    }
  }
}
