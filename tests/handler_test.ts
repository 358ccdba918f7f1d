/** `handler`, where it handles messages all at once. */
import { assertEquals, assertThrows } from "@std/assert";
import { handler, rejected, relay } from "@effectonce/effectonce";
import { memoryOutbox, memoryStore } from "@effectonce/effectonce/memory";

Deno.test("messages are handled all at once; where that fails each alone, and the one whose fault it was is parked", async () => {
  const store = memoryStore();
  const calls: string[] = [];
  const refuses = (id: string) => {
    if (id === "m3") throw rejected("not that one");
  };
  const to = handler(store, async ({ id }, effects) => {
    calls.push(id);
    refuses(id);
    await effects.enqueue({ topic: "done", id: `done-${id}`, value: id });
  }, {
    batch: 4,
    async all(messages, effects) {
      calls.push(messages.map(({ id }) => id).join("+"));
      for (const { id } of messages) refuses(id);
      await effects.enqueue(...messages.map(({ id }) => ({ topic: "done", id: `done-${id}`, value: id })));
    },
  });
  await store.enqueue(...[1, 2, 3, 4, 5].map((n) => ({ id: `m${n}`, topic: "t", value: n })));
  const report = await relay({ from: memoryOutbox(store, { topics: ["t"] }), to, drain: true });
  assertEquals(report, { delivered: 4, parked: 1, uncertain: 0 });
  // Those before it come by themselves, so that another one that is refused does not make them run once more.
  assertEquals(calls, ["m1+m2+m3+m4", "m1", "m2", "m3", "m1+m2", "m4+m5"]);
  const done = store.outbox().filter(({ topic }) => topic === "done").map(({ id }) => id);
  assertEquals(done, ["done-m1", "done-m2", "done-m4", "done-m5"]);
});

Deno.test("messages that are handled all at once are not deduped by keys", () => {
  const run = () => Promise.resolve();
  assertThrows(() => handler(memoryStore(), run, { all: run, key: ({ id }) => id }), TypeError, "Cannot dedupe by keys");
});
