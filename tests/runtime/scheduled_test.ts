/** The README's scheduled worker, in workerd: it drains the outbox, and stops at its deadline. */
import { assert, assertEquals } from "@std/assert";
import { join } from "node:path";
import { root } from "./install.ts";
import { readmeCode } from "./readme.ts";
import { runWorker } from "./workers.ts";

Deno.test("the README's scheduled worker drains until its deadline, and goes on at the next event", async () => {
  const files = {
    "example.ts": await readmeCode("example: scheduled worker"),
    "outbox.ts": await Deno.readTextFile(join(root, "tests/runtime/scheduled_outbox.ts")),
    "entry.ts": await Deno.readTextFile(join(root, "tests/runtime/scheduled_entry.ts")),
  };
  const seen: string[] = [];
  await using server = Deno.serve({ hostname: "127.0.0.1", port: 0, onListen: () => {} }, async (request) => {
    seen.push(request.headers.get("idempotency-key")!);
    await request.body?.cancel();
    return new Response("paid");
  });
  const bindings = { TARGET: `http://127.0.0.1:${server.addr.port}/charge` };
  const steps = ["scheduled:* * * * *", "/", "scheduled:* * * * *", "/"];
  const answers = await runWorker({ entry: "entry.ts", files }, steps, { bindings });
  const [first, second] = [1, 3].map((i) => JSON.parse((answers[i] as { text: string }).text));
  for (const i of [0, 2]) assertEquals(answers[i], { outcome: "ok", noRetry: false });

  assert(first.left > 0, `the first event must leave something: ${JSON.stringify(first)}`);
  assert(first.enqueued > first.left, `the first event must have delivered something: ${JSON.stringify(first)}`);
  assertEquals([second.left, second.enqueued], [0, first.enqueued + 10]);
  assertEquals(second.deadlines.length, 2);
  assert(
    files["example.ts"].includes(`AbortSignal.timeout(${second.deadlines[0].toLocaleString("en").replaceAll(",", "_")})`),
  );
  assertEquals(seen.length, second.enqueued);
  assertEquals(new Set(seen).size, seen.length);
});
