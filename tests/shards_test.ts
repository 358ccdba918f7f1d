/** Relays that share the messages of one outbox. */
import { assert, assertEquals, assertRejects } from "@std/assert";
import { createHash } from "node:crypto";
import { relayShards } from "@effectonce/effectonce/shards";
import { memorySink } from "../adapters/memory.ts";
import { EffectError, handler, type Message, relay, type RelayEvent, type SourceOptions } from "../mod.ts";
import { onServers, type TestDatabase } from "./servers/servers.ts";

const RELAY: SourceOptions = { relay: "mail", protocol: "claimed", onPark: "block", leaseMs: 30_000 };
const KEYS = Array.from({ length: 40 }, (_, i) => `key-${i}`);

/** Enqueues `count` messages; each tells the version of its key. */
async function fill(db: TestDatabase, count: number, from = 0): Promise<void> {
  const store = db.program(1).store();
  const all = Array.from({ length: count }, (_, i) => from + i);
  for (let i = 0; i < count; i += 500) {
    await store.transaction((effects) =>
      effects.enqueue(
        ...all.slice(i, i + 500).map((n) => {
          const key = KEYS[n % KEYS.length]!;
          return { id: `m${n}`, topic: "orders", key, value: { version: Math.floor(n / KEYS.length) } };
        }),
      )
    );
  }
}

/** Each key's versions are 0, 1, 2 … as they came. */
function assertInOrder(messages: readonly Message[], count: number): void {
  assertEquals(messages.length, count);
  const next = new Map<string | null, number>();
  for (const message of messages) {
    const version = next.get(message.key) ?? 0;
    assertEquals(message.json<{ version: number }>().version, version, `the versions of ${message.key}`);
    next.set(message.key, version + 1);
  }
}

onServers("an outbox with shards is refused by relay(), and drained in order by relayShards()", async (db) => {
  const { migrate, store, outbox } = db.program(20);
  await migrate({ shards: 4 });
  await fill(db, 400);
  const error = await assertRejects(
    () => relay({ from: outbox(), to: memorySink(), store: store(), drain: true }),
    EffectError,
  );
  assertEquals(error.code, "source_invalid");
  const to = memorySink();
  const report = await relayShards({ name: "mail", from: outbox(), to, store: store(), drain: true });
  assertEquals(report, { delivered: 400, parked: 0, uncertain: 0 });
  assertInOrder(to.messages, 400);
});

onServers(
  "a shard is a range of the first byte of the key's SHA-256, and messages without a key are shared out",
  async (db) => {
    const { migrate, store, outbox } = db.program();
    await migrate({ shards: 3 });
    const keys = [...KEYS, "zoë", "𝄞", "a ", "A"];
    await store().transaction((effects) =>
      effects.enqueue(
        ...keys.map((key) => ({ topic: "orders", key, value: 1 })),
        ...KEYS.map((_, i) => ({ id: `none-${i}`, topic: "orders", value: 1 })),
      )
    );
    const seen: string[] = [];
    const shards = outbox();
    await shards.assign("mail", "m", 30_000, []);
    for (let shard = 0; shard < 3; shard++) {
      const session = await shards.shard(shard, "m").open(RELAY);
      const { messages } = await session.read({ rows: 1000, bytes: 1e6 });
      assert(messages.some(({ key }) => key === null));
      for (const { key } of messages) {
        if (key === null) continue;
        const bucket = createHash("sha256").update(key).digest()[0]!;
        assertEquals(bucket >= Math.floor(shard * 256 / 3) && bucket < Math.floor((shard + 1) * 256 / 3), true, key);
        seen.push(key);
      }
      await session.close(true);
    }
    assertEquals(seen.sort(), keys.sort());
  },
);

onServers("members share the shards evenly, and take over those of one that stops or dies", async (db) => {
  await db.program().migrate({ shards: 8 });
  const [a, b] = [db.program().outbox(), db.program().outbox()];
  const all = [0, 1, 2, 3, 4, 5, 6, 7];
  const lease = 10_000;
  assertEquals(await a.assign("mail", "a", lease, []), all);
  assertEquals(await b.assign("mail", "b", lease, []), [], "until a gives some up");
  const four = await a.assign("mail", "a", lease, all);
  assertEquals(four.length, 4, "a still runs all, and is to stop four");
  assertEquals(await b.assign("mail", "b", lease, []), [], "until they have stopped");
  assertEquals(await a.assign("mail", "a", lease, four), four);
  const others = await b.assign("mail", "b", lease, []);
  assertEquals([...four, ...others].sort(), all);
  assertEquals(await a.assign("billing", "a", lease, []), all, "another relay's");

  await b.leave("mail", "b");
  assertEquals(await a.assign("mail", "a", lease, four), all);
  await db.advance(lease + 1_000);
  assertEquals(await b.assign("mail", "b", lease, []), all, "those of one that died");
});

onServers("whoever has lost its shard delivers nothing more", async (db) => {
  await db.program().migrate({ shards: 2 });
  await fill(db, 100);
  const [a, b] = [db.program().outbox(), db.program().outbox()];
  await a.assign("mail", "a", 1_000, []);
  const read = await a.shard(0, "a").open(RELAY);
  const seal = await a.shard(1, "a").open({ ...RELAY, relay: "mail" });
  await db.advance(2_000);
  await b.assign("mail", "b", 1_000, []);
  for (const use of [() => read.read({ rows: 1, bytes: 1 }), () => seal.seal([], { rows: 1, bytes: 1 })]) {
    assertEquals((await assertRejects(use, EffectError)).code, "fenced");
  }
});

onServers("the number of shards changes only while nothing is on its way", async (db) => {
  const { migrate, outbox, store } = db.program(20);
  await fill(db, 40);
  const seen: Message[] = [];
  const to = handler(store(), (message) => Promise.resolve(void seen.push(message)));
  await relay({ name: "mail", from: outbox(), to, drain: true });
  const session = await outbox().open({ ...RELAY, protocol: "sealed" });
  assertEquals((await assertRejects(() => migrate({ shards: 2 }), EffectError)).code, "busy", "a relay runs");
  await fill(db, 40, 40);
  const ring = await store().positions({ relay: "mail", source: session.id });
  await session.seal(ring, { rows: 5, bytes: 1e6 });
  await db.advance(60_000);
  assertEquals((await assertRejects(() => migrate({ shards: 2 }), EffectError)).code, "busy", "a batch is sealed");
  await session.unseal(ring, []);
  await session.close(true);
  await assertRejects(() => migrate({ shards: 0 }), RangeError);
  await migrate({ shards: 2 });
  assertEquals(await outbox().shards(), 2);
  await relayShards({ name: "mail", from: outbox(), to, drain: true });
  await migrate({ shards: 1 });
  await fill(db, 40, 80);
  await relay({ name: "mail", from: outbox(), to, drain: true });
  assertInOrder(seen, 120);
});

onServers("a shard that cannot be opened, and goes to another relay, ends nothing", async (db) => {
  const { migrate, store, outbox } = db.program(20);
  await migrate({ shards: 2 });
  await fill(db, 40);
  const { shards, shard, assign, leave, name } = outbox();
  const stop = new AbortController();
  let mine = [0, 1];
  const to = memorySink();
  await relayShards({
    name: "mail",
    ...{ to, store: store(), signal: stop.signal },
    from: {
      name,
      shards,
      shard: (n, member) => {
        const real = shard(n, member);
        return n === 0 ? real : { ...real, open: () => Promise.reject(new EffectError("busy", "it is away")) };
      },
      async assign(relay, member, leaseMs, running, signal) {
        await assign(relay, member, leaseMs, running, signal);
        if (mine.length === 1 && running.length === 1 && to.messages.length > 0) stop.abort();
        return mine;
      },
      leave,
      left: () => Promise.resolve(true),
    },
    observe: ({ type }) => void (type === "failed" && (mine = [0])),
  });
  assert(to.messages.length > 0);
});

onServers("eight shards move between relays that come and go, and each key stays in order (acceptance 29)", async (db) => {
  const count = Deno.env.get("EFFECTONCE_LONG") ? 100_000 : 2_000;
  await db.program().migrate({ shards: 8 });
  await fill(db, count);
  const called: Message[] = [];
  const to = memorySink({
    deliver(message) {
      called.push(message);
      return Promise.resolve(null);
    },
  });
  let delivered = 0;
  const observe = (event: RelayEvent) => void (event.type === "delivered" && !event.found && delivered++);
  const stops = new Set<AbortController>();
  const start = async () => {
    const { store, outbox } = db.program(20);
    const stop = new AbortController();
    stops.add(stop);
    // So many messages, then another one comes in its place.
    const until = delivered + count / 10;
    const watch = (event: RelayEvent) => {
      observe(event);
      if (delivered >= until && delivered < count) stop.abort();
    };
    await relayShards({
      name: "mail",
      from: outbox(),
      to,
      store: store(),
      drain: true,
      signal: stop.signal,
      observe: watch,
    });
    stops.delete(stop);
    return stop.signal.aborted;
  };
  const chain = async () => {
    while (await start());
  };
  await Promise.all([chain(), chain(), chain()]);
  assertInOrder(called, count);
});
