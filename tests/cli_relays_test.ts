/** Which relays an outbox knows, and what the command line tells and does about them. */
import { assertEquals, assertMatch } from "@std/assert";
import {
  assertFailure,
  assertUsage,
  box,
  DB,
  drainTo,
  NO_EFFECTS,
  QUICK,
  relayTo,
  sqlOn,
  Target,
  until,
} from "./cli_run.ts";

Deno.test("relays and status tell which relays run, and which have left something behind; relays forget gives up a name", async () => {
  await using target = new Target();
  await using at = await box();
  const relays = ["relays", "--store", DB];
  assertEquals(await at.json(relays), []);
  assertEquals(await at.ok(relays), "none\n");
  assertMatch(await at.ok(["status", "--store", DB]), /\nrelays {3}none runs\n$/);
  assertFailure(await at.run(["relays", "forget", "default", "--store", DB]), `knows no relay "default"`);
  assertUsage(await at.run(["relays", "forget", "--store", DB]), "NAME");

  target.answer = () => target.hold();
  await at.enqueue({ id: "1", value: 1 });
  const running = at.start(relayTo(target.url, "--lease-ms", "1000", "--topics", "orders", "--name", "billing"));
  await until(() => target.keys().length === 1);
  const billing = { relay: "billing", protocol: "claimed", topics: ["orders"], live: true, sealed: 0 };
  assertEquals(await at.json(relays), [billing]);
  const second = at.start(relayTo(target.url, "--topics", "orders", "--name", "billing"));
  await until(async () => (await at.json(relays) as unknown[]).length === 2);
  const twice = `"billing" (claimed, topics orders) runs, or has died within its lease (2 times)\n`;
  assertEquals(await at.ok(relays), twice);
  assertEquals((await second.stop()).code, 0);
  const forget = ["relays", "forget", "billing", "--store", DB];
  assertFailure(await at.run(forget), `Cannot forget relay "billing" of ${DB}: it runs`);
  running.kill("SIGKILL");
  assertEquals((await running.ended()).signal, "SIGKILL");

  // Within its lease nobody can know that it has died.
  await until(async () => JSON.stringify(await at.json(relays)) === JSON.stringify([{ ...billing, live: false }]));
  const line =
    `"billing" (claimed, topics orders) has ended, and left behind: messages that are parked, or that it may have called and not settled\n`;
  assertEquals(await at.ok(relays), line);
  assertEquals((await at.ok(["status", "--store", DB])).split("relays   ")[1], line);
  const archive = drainTo("file:out.jsonl", "--name", "archive");
  assertFailure(await at.run(archive), `relay "billing" has them`);
  assertEquals(await at.json(forget), { relay: "billing", forgotten: true });
  assertEquals((await at.run(archive)).code, 0);
  assertEquals(await at.json(relays), []);
});

Deno.test("status of one relay counts its own effects; messages behind a parked one are held back", async () => {
  await using target = new Target();
  await using at = await box();
  target.answer = ({ key }) => new Response("why", { status: key.startsWith("bad") ? 400 : 200 });
  await at.enqueue(
    { id: "a1", value: 1, topic: "a" },
    { id: "bad1", value: 1, topic: "b", key: "k" },
    { id: "b2", value: 1, topic: "b", key: "k" },
    { id: "b3", value: 1, topic: "b", key: "other" },
  );
  await at.run(drainTo(target.url, ...QUICK, "--name", "a", "--topics", "a"));
  await at.run(drainTo(target.url, ...QUICK, "--name", "b", "--topics", "b"));
  const of = (...more: string[]) => at.json(["status", "--store", DB, ...more]) as Promise<Record<string, unknown>>;
  assertEquals((await of()).effects, { ...NO_EFFECTS, done: 2, rejected: 1 });
  assertEquals((await of("--name", "a")).effects, { ...NO_EFFECTS, done: 1 });
  assertEquals((await of("--name", "b")).effects, { ...NO_EFFECTS, done: 1, rejected: 1 });
  const { oldestMs: _, ...outbox } = (await of()).outbox as Record<string, unknown>;
  assertEquals(outbox, { pending: 1, heldBack: 1, parked: 1 });
  assertMatch(
    await at.ok(["status", "--store", DB]),
    /^outbox {3}1 pending, the oldest for .*, 1 of them held back; 1 parked\n/,
  );
  const config = {
    relays: { a: { from: DB, to: target.url, topics: ["a"] }, b: { from: DB, to: target.url, topics: ["b"] } },
  };
  await Deno.writeTextFile(at.path("relays.json"), JSON.stringify(config));
  const found = await at.json(["status", "--config", "relays.json"]) as { relays: Record<string, Record<string, unknown>> };
  assertEquals(found.relays.a!.effects, { ...NO_EFFECTS, done: 1 });
  assertEquals((found.relays.b!.relays as { relay: string }[]).map(({ relay }) => relay), ["b"], "it left a parked message");
});

Deno.test("a relay that is started while the database is locked waits, says so, and delivers in the end", async () => {
  await using target = new Target();
  await using at = await box();
  await at.enqueue({ id: "1", value: 1 });
  const { DatabaseSync } = await import("node:sqlite");
  const holder = new DatabaseSync(at.path("app.db"));
  try {
    holder.prepare("begin immediate").run();
    const running = at.start(relayTo(target.url, "--json"));
    const { reason } = await running.event("failed");
    assertMatch(String(reason), /^sqlite:app\.db has been locked by another writer for 5000 ms$/);
    holder.prepare("rollback").run();
    await running.event("delivered");
    assertEquals((await running.stop()).code, 0);
  } finally {
    holder.close();
  }
  assertEquals([target.keys(), sqlOn(at.path("app.db"), "select * from effectonce_outbox")], [["1"], []]);
});
