/** The package in workerd: the suites on memory, and why SQLite in a Durable Object does not do. */
import { assertEquals, assertMatch } from "@std/assert";
import { versions } from "./install.ts";
import { checkOutcomes, serveTarget } from "./outcomes.ts";
import { runWorker } from "./workers.ts";

const options = {
  compatibilityFlags: ["nodejs_compat"], // for node:crypto, which adapters/sqlite.ts imports
  durableObjects: { OBJECT: { className: "SqliteObject", useSQLite: true } },
};

Deno.test(`workerd of miniflare ${versions.miniflare} meets every requirement`, async (t) => {
  await using target = serveTarget();
  const [answer] = await runWorker({ entry: "worker.ts" }, [`/?target=${encodeURIComponent(target.url)}`], options);
  const { status, text } = answer as { status: number; text: string };
  assertEquals(status, 200, text);
  await checkOutcomes(t, JSON.parse(text), ["memory"]);
});

Deno.test("a Durable Object's SQLite has no BEGIN, COMMIT, ROLLBACK and none of the adapter's PRAGMAs", async () => {
  // If this fails the adapter may fit by now. Until then it would need a client that runs a function in a transaction.
  const [answer] = await runWorker({ entry: "worker.ts" }, ["/object"], options);
  const { status, text } = answer as { status: number; text: string };
  assertEquals(status, 200, text);
  const { errors, migration, count } = JSON.parse(text);
  for (const sql of ["begin", "begin immediate", "commit", "rollback"]) {
    assertMatch(errors[sql], /use the state\.storage\.transaction\(\) or state\.storage\.transactionSync\(\)/);
  }
  for (const sql of ["pragma busy_timeout", "pragma synchronous = full"]) assertMatch(errors[sql], /not authorized/);
  assertMatch(migration, /not authorized/);
  assertEquals(count, { n: 0 });
});
