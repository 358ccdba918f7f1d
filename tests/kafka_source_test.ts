/** Kafka as a source, on a real broker. */
import { assert, assertEquals, assertMatch, assertRejects } from "@std/assert";
import { Buffer } from "node:buffer";
import snappy from "kafkajs-snappy";
import {
  AclOperationTypes,
  AclPermissionTypes,
  AclResourceTypes,
  CompressionCodecs,
  CompressionTypes,
  Kafka,
  logLevel,
  type Message as Produced,
  ResourcePatternTypes,
} from "kafkajs";
import {
  EffectError,
  handler,
  type Message,
  realRuntime,
  rejected,
  type RelayEvent,
  type RelayReport,
  retryable,
  type Sink,
} from "@effectonce/effectonce";
import { type KafkaMessage, kafkaSource, type KafkaSourceOptions } from "@effectonce/effectonce/kafka-source";
import { kafkajs } from "@effectonce/effectonce/kafkajs";
import { memorySink, memoryStore } from "@effectonce/effectonce/memory";
import { relayShards, type ShardsOptions } from "@effectonce/effectonce/shards";
import { until } from "./cli_run.ts";
import { deleteRecords, freshName, kafkaOf, makeTopic, produceInJava, readTopic, remakeTopic } from "./kafka/topics.ts";
import { startKafka } from "./services/kafka.ts";
import { service } from "./services/mod.ts";

const BROKERS = await service("kafka");
const clientOf = () => kafkajs(kafkaOf(BROKERS));
const utf8 = new TextEncoder();

async function produce(topic: string, messages: readonly Produced[], compression = CompressionTypes.None) {
  const producer = kafkaOf(BROKERS).producer({ idempotent: true, maxInFlightRequests: 1 }); // Else it sends twice what it repeats.
  await producer.connect();
  await producer.send({ topic, messages: [...messages], compression });
  await producer.disconnect();
}
const numbered = (from: number, to: number) =>
  Array.from({ length: to - from }, (_, i) => ({ key: `k${(from + i) % 7}`, value: String(from + i) }));

type Relaying = Partial<Omit<ShardsOptions, "to">> & { readonly to: Sink; readonly source?: Partial<KafkaSourceOptions> };
const QUICK = { leaseMs: 6_000, pollMs: 5, minRetryMs: 1, maxRetryMs: 20 } as const;

async function drained(topic: string, { source, ...options }: Relaying): Promise<RelayReport> {
  await using from = kafkaSource(clientOf(), { topic, ...source });
  return await relayShards({ ...QUICK, ...options, from, drain: true });
}
/** Keeps what it was given, in the transaction of its position. */
function ledger(fails?: (message: Message) => void) {
  const store = memoryStore();
  const to = handler(store, async (message, effects) => {
    fails?.(message);
    await effects.enqueue({ topic: "seen", key: message.key, value: message.value });
  });
  return { store, to, texts: () => store.outbox().map(({ value }) => new TextDecoder().decode(value ?? undefined)) };
}
/** Of each key, which is its number modulo 7. */
function assertOrder(texts: readonly string[]): void {
  for (let k = 0; k < 7; k++) {
    const mine = texts.map(Number).filter((n) => n % 7 === k);
    assertEquals(mine, mine.toSorted((a, b) => a - b), `k${k}`);
  }
}

Deno.test("each record is handled once, in order, over several runs, from where the sink stands", async () => {
  const topic = await makeTopic(BROKERS, { partitions: 3 });
  const { to, texts } = ledger();
  const name = freshName("group");
  await produce(topic, numbered(0, 50));
  assertEquals((await drained(topic, { name, to })).delivered, 50);
  assertEquals((await drained(topic, { name, to })).delivered, 0);
  await produce(topic, numbered(50, 80));
  assertEquals((await drained(topic, { name, to, batch: 4 })).delivered, 30);
  assertEquals(texts().map(Number).toSorted((a, b) => a - b), Array.from({ length: 80 }, (_, i) => i));
  assertOrder(texts());
  // The group knows the places, for monitors.
  const admin = kafkaOf(BROKERS).admin();
  await admin.connect();
  const [kept] = await admin.fetchOffsets({ groupId: name, topics: [topic] });
  const ends = await admin.fetchTopicOffsets(topic);
  await admin.disconnect();
  const offsets = (all: readonly { partition: number; offset: string }[]) =>
    all.map(({ partition, offset }) => `${partition}@${offset}`).toSorted();
  assertEquals(offsets(kept!.partitions), offsets(ends));
});

Deno.test("keys, values and headers come as they are: no text, tombstones, empty, twice; compressed; times", async () => {
  const topic = await makeTopic(BROKERS);
  const seen: Message[] = [];
  const to = handler(memoryStore(), (message) => Promise.resolve(void seen.push(message)));
  const odd = Buffer.from([0xff, 0, 0x80]);
  const timestamp = "1700000000123";
  await produce(topic, [
    { key: odd, value: odd, headers: { "a": odd, "b": ["1", "2"] }, timestamp },
    { key: null, value: null, timestamp },
    { key: "", value: "", timestamp },
  ]);
  await produce(topic, [{ key: "ü", value: "x".repeat(1000) }], CompressionTypes.GZIP);
  await drained(topic, { name: freshName("group"), to });
  const [first, tombstone, empty, packed] = seen as unknown as readonly KafkaMessage[];
  assertEquals(first!.key, `base64:${btoa("\xff\0\x80")}`);
  assertEquals([...first!.kafka.key!], [...odd]);
  assertEquals([...first!.value!], [...odd]);
  assertEquals(first!.kafka.headers.map(([name, value]) => [name, [...value!]]), [["a", [...odd]], ["b", [49]], ["b", [
    50,
  ]]]);
  assertEquals([first!.time.getTime(), first!.kafka.offset, first!.kafka.partition], [1700000000123, 0, 0]);
  assertEquals([tombstone!.key, tombstone!.value, tombstone!.kafka.key], [null, null, null]);
  assertEquals([empty!.key, empty!.value?.length], ["", 0]);
  assertEquals([packed!.key, packed!.text().length], ["ü", 1000]);
  assertEquals(first!.id, `${topic}-0-0-1700000000123`);
});

Deno.test("records of transactions that were given up do not come, and their offsets are passed", async () => {
  const topic = await makeTopic(BROKERS);
  const connection = await clientOf().open();
  const record = (value: string) => ({ topic, partition: 0, key: null, value: utf8.encode(value), headers: [] });
  const [a, b] = [freshName("tx"), freshName("tx")];
  // Two that overlap; the one that began first ends last, so that the broker's list of them is not in order.
  const [first, second] = [await connection.begin(a, 60_000), await connection.begin(b, 60_000)];
  await first.send([record("never 1")]);
  await second.send([record("never 2")]);
  await first.send([record("never 3")]);
  await connection.begin(b, 60_000);
  await connection.begin(a, 60_000);
  const good = await connection.begin(a, 60_000);
  await good.send([record("1"), record("2")]);
  await good.commit();
  await connection.close();
  const { to, texts } = ledger();
  const name = freshName("group");
  await drained(topic, { name, to });
  assertEquals(texts(), ["1", "2"]);
  await produce(topic, [{ value: "3" }]);
  await drained(topic, { name, to });
  assertEquals(texts(), ["1", "2", "3"]);
});

Deno.test("a record that is refused goes to the dead-letter topic, with where it came from and why, and the others go on", async () => {
  const [topic, deadLetter] = [await makeTopic(BROKERS), await makeTopic(BROKERS)];
  const name = freshName("group");
  const { to, texts } = ledger((message) => {
    if (message.text() === "13") throw rejected("not that one");
    if (message.text() === "17") throw new Error("always");
  });
  await produce(topic, numbered(0, 30));
  const report = await drained(topic, { name, to, source: { deadLetter }, attempts: 2, batch: 10 });
  assertEquals([report.delivered, report.parked], [28, 2]);
  assertEquals(texts().map(Number), Array.from({ length: 30 }, (_, i) => i).filter((i) => i !== 13 && i !== 17));
  const dead = await readTopic(BROKERS, deadLetter);
  assertEquals(dead.map(({ key, value, headers }) => [key, value, headers]), [
    ["k6", "13", {
      "effectonce-topic": topic,
      "effectonce-partition": "0",
      "effectonce-offset": "13",
      "effectonce-group": name,
      "effectonce-error": "not that one",
      "effectonce-attempts": "1",
    }],
    ["k3", "17", {
      "effectonce-topic": topic,
      "effectonce-partition": "0",
      "effectonce-offset": "17",
      "effectonce-group": name,
      "effectonce-error": "always",
      "effectonce-attempts": "2",
    }],
  ]);
});

Deno.test("without a dead-letter topic a record that is refused ends the relay, before it, with a sentence", async () => {
  const topic = await makeTopic(BROKERS);
  const { to, texts } = ledger((message) => {
    if (message.text() === "3") throw rejected("not that one");
  });
  await produce(topic, numbered(0, 5));
  const error = await assertRejects(() => drained(topic, { name: freshName("group"), to, batch: 1 }), EffectError);
  assertMatch(
    error.message,
    /no way past record 3 of partition 0 of kafka topic .*: not that one. Give it a dead-letter topic/,
  );
  assertEquals(texts(), ["0", "1", "2"]);
});

for (const [what, again] of [["shorter", 2], ["as long, with other records", 5]] as const) {
  Deno.test(`a topic that was made anew, ${what}, ends the relay; accepted it begins with it (acceptance 26)`, async () => {
    const topic = await makeTopic(BROKERS);
    const { to, texts } = ledger();
    const name = freshName("group");
    await produce(topic, numbered(0, 5));
    await drained(topic, { name, to });
    await remakeTopic(BROKERS, topic);
    await produce(topic, numbered(100, 100 + again));
    const error = await assertRejects(() => drained(topic, { name, to }), EffectError);
    assertEquals(error.code, "diverged");
    assertMatch(error.message, /Was the topic made anew\?/);
    assertEquals(texts().length, 5);
    await drained(topic, { name, to, acceptSource: () => Promise.resolve(true) });
    assertEquals(texts().slice(5).map(Number), numbered(100, 100 + again).map(({ value }) => Number(value)));
  });
}

Deno.test("records that were deleted before they were taken end the relay; accepted it goes on behind them (acceptance 26)", async () => {
  const topic = await makeTopic(BROKERS);
  const { to, texts } = ledger();
  const name = freshName("group");
  await produce(topic, numbered(0, 3));
  await drained(topic, { name, to });
  await produce(topic, numbered(3, 8));
  await deleteRecords(BROKERS, topic, 6);
  const error = await assertRejects(() => drained(topic, { name, to }), EffectError);
  assertEquals(error.code, "diverged");
  assertMatch(error.message, /records 3 to 5 were deleted before they were taken/);
  await drained(topic, { name, to, acceptSource: () => Promise.resolve(true) });
  assertEquals(texts(), ["0", "1", "2", "6", "7"]);
});

Deno.test("so do those that were deleted before the first was taken, where the group has a place", async () => {
  const topic = await makeTopic(BROKERS);
  const { to, texts } = ledger();
  const name = freshName("group");
  await drained(topic, { name, to });
  await produce(topic, numbered(0, 4));
  await deleteRecords(BROKERS, topic, 2);
  const error = await assertRejects(() => drained(topic, { name, to }), EffectError);
  assertEquals(error.code, "diverged");
  assertMatch(error.message, /records 0 to 1 were deleted before they were taken/);
  await drained(topic, { name, to, acceptSource: () => Promise.resolve(true) });
  assertEquals(texts(), ["2", "3"]);
});

Deno.test("a relay begins at the earliest record, at the latest if it is to, or where an ordinary consumer of the group was", async () => {
  const topic = await makeTopic(BROKERS);
  await produce(topic, numbered(0, 4));
  const [late, heir] = [ledger(), ledger()];
  const names = [freshName("group"), freshName("group")];
  const admin = kafkaOf(BROKERS).admin();
  await admin.connect();
  await admin.setOffsets({ groupId: names[1]!, topic, partitions: [{ partition: 0, offset: "2" }] });
  await admin.disconnect();
  await drained(topic, { name: names[0]!, to: late.to, source: { start: "latest" } });
  await drained(topic, { name: names[1]!, to: heir.to });
  assertEquals([late.texts(), heir.texts()], [[], ["2", "3"]]);
  await produce(topic, numbered(4, 6));
  await drained(topic, { name: names[0]!, to: late.to, source: { start: "latest" } });
  assertEquals(late.texts(), ["4", "5"], "what came after the first run, though nothing was taken in it");
});

Deno.test("a sink that knows of no batch while the group knows of some ends the relay: nothing is taken again, or left out, silently", async () => {
  const topic = await makeTopic(BROKERS);
  const [was, emptied, other, third] = [ledger(), ledger(), ledger(), ledger()];
  const name = freshName("group");
  const source = { start: "latest" } as const;
  await drained(topic, { name, to: was.to, source });
  await produce(topic, numbered(0, 4));
  await drained(topic, { name, to: was.to, source });
  assertEquals(was.texts(), ["0", "1", "2", "3"]);
  for (const name_ of [name, freshName("relay")]) {
    const options = { name: name_, to: emptied.to, source: { ...source, group: name } };
    const error = await assertRejects(() => drained(topic, options), EffectError);
    assertEquals(error.code, "diverged");
    assertMatch(
      error.message,
      /the group is at 4, behind batch 1, and the target knows of no batch at all\. Was it emptied/,
    );
  }
  assertEquals(emptied.texts(), []);
  await drained(topic, { name, to: emptied.to, source, acceptSource: () => true });
  assertEquals(emptied.texts(), ["0", "1", "2", "3"]);
  // As the sentence has it, by Kafka's own tools: with no note.
  await produce(topic, numbered(4, 6));
  async function setOffset(offset: string): Promise<void> {
    const admin = kafkaOf(BROKERS).admin();
    await admin.connect();
    await admin.setOffsets({ groupId: name, topic, partitions: [{ partition: 0, offset }] });
    await admin.disconnect();
  }
  await setOffset("4");
  await drained(topic, { name, to: other.to, source });
  assertEquals(other.texts(), ["4", "5"]);
  // One that is called has claims, and the group keeps its place whatever the sink: also the other way round.
  await produce(topic, numbered(6, 8));
  const got: string[] = [];
  const to = memorySink({
    deliver(message) {
      got.push(message.text());
      return Promise.resolve(null);
    },
  });
  await drained(topic, { name, to, store: memoryStore(), source });
  assertEquals(got.toSorted(), ["6", "7"]); // Of two keys.
  await produce(topic, numbered(8, 9));
  await drained(topic, { name, to: third.to, source });
  assertEquals(third.texts(), ["8"]);
  // Where the sink knows a place, the group's decides nothing.
  await setOffset("0");
  await drained(topic, { name, to: third.to, source });
  await produce(topic, numbered(9, 11));
  await setOffset("10");
  await drained(topic, { name, to: third.to, source });
  assertEquals(third.texts(), ["8", "9", "10"]);
});

Deno.test("a group that goes on into a database where its calls have ended finds a topic that was made anew", async () => {
  const topic = await makeTopic(BROKERS);
  const { to, texts } = ledger();
  const name = freshName("group");
  await produce(topic, numbered(0, 2));
  await drained(topic, { name, to: memorySink({ deliver: () => Promise.resolve(null) }), store: memoryStore() });
  const connection = await clientOf().open();
  const kept = await connection.kept(name, topic, 0);
  await remakeTopic(BROKERS, topic);
  await produce(topic, numbered(5, 8));
  // Kafka forgets the places with a topic; a mirror, or whoever restores them, may not.
  const member = connection.member(name, topic, 6_000);
  await member.join();
  assert(await member.commit(new Map([[0, kept!]])));
  await member.leave();
  await connection.close();
  const error = await assertRejects(() => drained(topic, { name, to }), EffectError);
  assertMatch(error.message, /its record 1 is another one than that which was taken/);
  assertEquals(texts(), []);
});

Deno.test("a sink that is called: each record is claimed, and the group keeps the place", async () => {
  const [topic, deadLetter] = [await makeTopic(BROKERS, { partitions: 2 }), await makeTopic(BROKERS)];
  const store = memoryStore();
  const name = freshName("group");
  const got: string[] = [];
  let failures = 0;
  const to = memorySink({
    deliver(message) {
      if (message.text() === "5" && failures++ < 2) return Promise.reject(retryable("later"));
      if (message.text() === "7") return Promise.reject(rejected("never"));
      got.push(message.text());
      return Promise.resolve(null);
    },
  });
  await produce(topic, numbered(0, 20));
  const report = await drained(topic, { name, to, store, onPark: "skip", lanes: 4, source: { deadLetter } });
  assertEquals([report.delivered, report.parked], [19, 1]);
  const letters = await readTopic(BROKERS, deadLetter);
  const told = letters.map(({ value, headers }) => [value, headers["effectonce-error"], headers["effectonce-attempts"]]);
  assertEquals(told, [["7", "never", "1"]]);
  assertEquals(got.map(Number).toSorted((a, b) => a - b), Array.from({ length: 20 }, (_, i) => i).filter((i) => i !== 7));
  for (let k = 0; k < 7; k++) {
    const mine = got.map(Number).filter((n) => n % 7 === k);
    assertEquals(mine, mine.toSorted((a, b) => a - b));
  }
  assertEquals((await drained(topic, { name, to, store, onPark: "skip" })).delivered, 0);
  // The group has lost its place: claims know what was done.
  const admin = kafkaOf(BROKERS).admin();
  await admin.connect();
  await admin.deleteGroups([name]);
  await admin.disconnect();
  await drained(topic, { name, to, store, onPark: "skip" });
  assertEquals(got.length, 19);
});

Deno.test("more than a broker answers at once comes whole, from every partition", async () => {
  const topic = await makeTopic(BROKERS, { partitions: 6 });
  const { to, texts } = ledger();
  for (let n = 0; n < 120; n += 6) {
    await produce(topic, Array.from({ length: 6 }, (_, i) => ({ partition: i, value: `${n + i} ${"x".repeat(150_000)}` })));
  }
  assertEquals((await drained(topic, { name: freshName("group"), to })).delivered, 120);
  const numbers = texts().map((text) => Number(text.split(" ")[0])).toSorted((a, b) => a - b);
  assertEquals(numbers, Array.from({ length: 120 }, (_, i) => i));
});

Deno.test("members share the partitions, and hand them over: each record once, in order, while they come and go", async () => {
  const topic = await makeTopic(BROKERS, { partitions: 6 });
  const { to, texts } = ledger();
  const name = freshName("group");
  const total = 3_000;
  const events: RelayEvent[] = [];
  function start() {
    const stop = new AbortController();
    const from = kafkaSource(clientOf(), { topic });
    const ended = relayShards({
      ...{ ...QUICK, name, from, to, batch: 5, signal: stop.signal },
      observe: (event) => events.push(event),
    }).finally(() => from[Symbol.asyncDispose]());
    return {
      async stop() {
        stop.abort();
        await ended;
      },
    };
  }
  const members = [start(), start()];
  let sent = 0;
  const sending = (async () => {
    while (sent < total) {
      await produce(topic, numbered(sent, sent += 100));
      await new Promise((resolve) => setTimeout(resolve, 50));
    }
  })();
  for (let n = 0; n < 4; n++) {
    const before = texts().length;
    await until(() => texts().length > before || texts().length === total);
    members.push(start());
    await members.shift()!.stop();
  }
  await sending;
  await until(() => texts().length >= total, 60_000);
  for (const member of members) await member.stop();
  assertEquals(
    texts().map(Number).toSorted((a, b) => a - b),
    Array.from({ length: total }, (_, i) => i),
  );
  assertOrder(texts());
  assert(events.filter(({ type }) => type === "started").length > 12, "partitions went from one to another");
});

Deno.test("partitions that are added under way are found, and read from their beginning", async () => {
  const topic = await makeTopic(BROKERS);
  const { to, texts } = ledger();
  let ahead = 0;
  const runtime = { ...realRuntime, now: () => Date.now() + ahead };
  const stop = new AbortController();
  await using from = kafkaSource(clientOf(), { topic, runtime });
  await produce(topic, numbered(0, 10));
  const running = relayShards({ ...QUICK, name: freshName("group"), from, to, signal: stop.signal });
  running.catch(() => {});
  await until(() => texts().length === 10);
  const admin = kafkaOf(BROKERS).admin();
  await admin.connect();
  await admin.createPartitions({ topicPartitions: [{ topic, count: 3 }] });
  await admin.disconnect();
  await produce(topic, numbered(10, 40));
  ahead = 61_000;
  await until(() => texts().length === 40, 30_000);
  stop.abort();
  await running;
  assertEquals(texts().map(Number).toSorted((a, b) => a - b), Array.from({ length: 40 }, (_, i) => i));
});

Deno.test("a relay that drains, and cannot reach a broker, ends with an error", async () => {
  const client = kafkajs(new Kafka({ brokers: ["127.0.0.1:1"], logLevel: logLevel.NOTHING, retry: { retries: 0 } }));
  await using from = kafkaSource(client, { topic: "none" });
  const { to } = ledger();
  const error = await assertRejects(
    () => relayShards({ ...QUICK, name: "g", from, to, drain: true, attempts: 1 }),
    EffectError,
  );
  assertEquals(error.code, "busy");
});

Deno.test("a partition whose end is no record, and was deleted, is no other one", async () => {
  const topic = await makeTopic(BROKERS);
  const { to, texts } = ledger();
  const name = freshName("group");
  const connection = await clientOf().open();
  const transactions = await connection.begin(freshName("tx"), 60_000);
  await transactions.send([{ topic, partition: 0, key: null, value: utf8.encode("1"), headers: [] }]);
  await transactions.commit();
  await connection.close();
  await until(async () => (await readTopic(BROKERS, topic)).length === 1);
  await drained(topic, { name, to });
  await deleteRecords(BROKERS, topic, 2);
  await produce(topic, [{ value: "2" }]);
  await drained(topic, { name, to });
  assertEquals(texts(), ["1", "2"]);
});

Deno.test("what a group has noted for another database, or the same before it went back, counts for nothing", async () => {
  const topic = await makeTopic(BROKERS);
  const [now, before] = [ledger(), ledger()];
  const [name, group, others] = [freshName("relay"), freshName("group"), freshName("group")];
  await produce(topic, [{ value: "0" }]);
  await drained(topic, { name, to: before.to, source: { group: others } });
  await produce(topic, [{ value: "1" }]);
  await drained(topic, { name, to: before.to, source: { group: others } });
  await drained(topic, { name, to: now.to, source: { group } });
  await produce(topic, [{ value: "2" }]);
  await drained(topic, { name, to: now.to, source: { group } });
  // The second batch of one ends with record 2, which the group has noted, and of the other with record 1.
  await drained(topic, { name, to: before.to, source: { group } });
  assertEquals([now.texts(), before.texts()], [["0", "1", "2"], ["0", "1", "2"]]);
});

Deno.test("a relay that is told to end while the group waits for a dead member does not wait for it", async () => {
  const topic = await makeTopic(BROKERS, { partitions: 2 });
  const { to, texts } = ledger();
  const name = freshName("group");
  await produce(topic, numbered(0, 10));
  const stop = new AbortController();
  await using from = kafkaSource(clientOf(), { topic });
  const running = relayShards({ ...QUICK, name, from, to, leaseMs: 120_000, signal: stop.signal });
  await until(() => texts().length === 10);
  // It joins and is never heard of again: who joins after it waits for two minutes.
  const connection = await clientOf().open();
  await connection.member(name, topic, 120_000).join();
  await connection.close();
  const late = (await clientOf().open()).member(name, topic, 120_000);
  late.join().catch(() => {});
  const admin = kafkaOf(BROKERS).admin();
  await admin.connect();
  await until(async () => (await admin.describeGroups([name])).groups[0]!.state === "PreparingRebalance");
  await admin.disconnect();
  await new Promise((resolve) => setTimeout(resolve, 2_000)); // Longer than between two beats: it has joined as well.
  stop.abort();
  const start = performance.now();
  await running;
  assert(performance.now() - start < 60_000, "it has waited for the dead member");
  await late.leave();
});

Deno.test("what cannot be decompressed is said, and holds up no other partition", async () => {
  const topic = await makeTopic(BROKERS, { partitions: 2 });
  await produceInJava(BROKERS, topic, "snappy", ["a", "b"]);
  const admin = kafkaOf(BROKERS).admin();
  await admin.connect();
  const free = (await admin.fetchTopicOffsets(topic)).find(({ high }) => high === "0")?.partition ?? -1;
  await admin.disconnect();
  assert(free >= 0, "both records are in one partition");
  await produce(topic, [{ partition: free, value: "c" }]);
  const registered = CompressionCodecs[CompressionTypes.Snappy];
  CompressionCodecs[CompressionTypes.Snappy] = () => ({
    compress: () => Promise.reject(new Error("not needed")),
    decompress: () => Promise.reject(new Error("there is no Snappy here")),
  });
  const to = memorySink();
  const stop = new AbortController();
  const failed = Promise.withResolvers<string>();
  await using from = kafkaSource(clientOf(), { topic });
  const running = relayShards({
    ...{ ...QUICK, name: freshName("group"), from, to, store: memoryStore(), signal: stop.signal },
    observe: (event) => void (event.type === "failed" && failed.resolve(event.reason)),
  });
  try {
    const reason = `Kafka could not be read: partition ${
      1 - free
    } of topic ${topic} from offset 0 on: there is no Snappy here`;
    assertEquals(await failed.promise, reason);
    await until(() => Promise.resolve(to.messages.length === 1), 30_000);
    CompressionCodecs[CompressionTypes.Snappy] = () => ({
      compress: () => Promise.reject(new Error("not needed")),
      decompress: (bytes: Uint8Array) => snappy().decompress(bytes),
    });
    await until(() => Promise.resolve(to.messages.length === 3), 30_000);
  } finally {
    stop.abort();
    await running;
    CompressionCodecs[CompressionTypes.Snappy] = registered;
  }
});

Deno.test("many records that are refused among others do not make these run again and again", async () => {
  const [topic, deadLetter] = [await makeTopic(BROKERS), await makeTopic(BROKERS)];
  await produce(topic, numbered(0, 300));
  let runs = 0;
  const { to, texts } = ledger((message) => {
    runs++;
    if (Number(message.text()) % 3 === 1) throw rejected("not that one");
  });
  const report = await drained(topic, { name: freshName("group"), to, source: { deadLetter }, batch: 300 });
  assertEquals([report.delivered, report.parked], [200, 100]);
  assertEquals(texts(), numbered(0, 300).map(({ value }) => value).filter((text) => Number(text) % 3 !== 1));
  assert(runs < 3 * 300, `${runs} runs`);
});

Deno.test("a record that the dead-letter topic finds too large ends the relay with what to do; a long reason is cut", async () => {
  const topic = await makeTopic(BROKERS);
  const [deadLetter, larger] = await Promise.all(
    [1_000, 20_000].map((bytes) => makeTopic(BROKERS, { settings: { "max.message.bytes": String(bytes) } })),
  );
  await produce(topic, [{ value: "x".repeat(900) }]);
  const { to } = ledger(() => {
    throw rejected("no ".repeat(10_000));
  });
  const options = { name: freshName("group"), to };
  const error = await assertRejects(() => drained(topic, { ...options, source: { deadLetter } }), EffectError);
  assertEquals(error.code, "rejected");
  assertMatch(
    error.message,
    /no way past record 0 of partition 0 .*the dead-letter topic .* Raise its max\.message\.bytes$/,
  );
  assertEquals((await drained(topic, { ...options, source: { deadLetter: larger! } })).parked, 1);
  assertEquals((await readTopic(BROKERS, larger!)).map(({ headers }) => headers["effectonce-error"]!.length), [1_000]);
});

Deno.test("what was opened is closed, also where something else could not be", async () => {
  const topic = await makeTopic(BROKERS);
  const name = freshName("group");
  const { to } = ledger();
  for (const fails of ["the second one", "no topic", undefined]) {
    let [begun, open] = [0, 0];
    const first = Promise.withResolvers<void>();
    const client = {
      async open() {
        if (++begun === 2 && fails === "the second one") {
          await first.promise;
          throw new EffectError("source_invalid", fails);
        }
        const connection = await clientOf().open();
        open++;
        first.resolve();
        return { ...connection, close: async () => (open--, await connection.close()) };
      },
    };
    await using stack = new AsyncDisposableStack();
    const from = stack.use(kafkaSource(client, { topic: fails === "no topic" ? freshName("none") : topic }));
    const ends = relayShards({ ...QUICK, name, from, to, drain: true });
    if (fails) await assertRejects(() => ends, EffectError);
    else await ends;
    if (!fails) assertEquals(open, 2);
    await stack.disposeAsync();
    assertEquals([begun, open], [2, 0], fails);
  }
});

Deno.test("what is no place to read from is said in a sentence", async () => {
  const to = memorySink();
  const missing = freshName("missing");
  const error = await assertRejects(
    () => drained(missing, { name: freshName("group"), to, store: memoryStore() }),
    EffectError,
  );
  assertMatch(error.message, new RegExp(`Topic "${missing}" does not exist in Kafka: create it`));
  const topic = await makeTopic(BROKERS);
  const name = freshName("group");
  const consumer = kafkaOf(BROKERS).consumer({ groupId: name });
  await consumer.connect();
  await consumer.subscribe({ topics: [topic] });
  const joined = Promise.withResolvers<void>();
  consumer.on("consumer.group_join", () => joined.resolve());
  await consumer.run({ eachMessage: () => Promise.resolve() });
  await joined.promise;
  const mixed = await assertRejects(() => drained(topic, { name, to, store: memoryStore() }), EffectError);
  await consumer.disconnect();
  assertMatch(
    mixed.message,
    /Cannot join group ".*": it has consumers that read another topic, or are no effectonce\. Give the relay a group of its own/,
  );
  const long = await assertRejects(
    () => drained(topic, { name: freshName("group"), to, store: memoryStore(), leaseMs: 100_000_000 }),
    EffectError,
  );
  assertMatch(long.message, /brokers take no such lease, but one from their group.min.session.timeout.ms to group.max/);
});

Deno.test("a group that is not allowed is said in a sentence", async () => {
  const settings = {
    "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
    "allow.everyone.if.no.acl.found": "true",
  };
  await using cluster = await startKafka({ settings });
  const topic = await makeTopic(cluster.brokers);
  const admin = kafkaOf(cluster.brokers).admin();
  await admin.connect();
  await admin.createAcls({
    acl: [{
      ...{
        resourceType: AclResourceTypes.GROUP,
        resourceName: "billing",
        resourcePatternType: ResourcePatternTypes.LITERAL,
      },
      ...{ principal: "User:ANONYMOUS", host: "*", operation: AclOperationTypes.READ },
      permissionType: AclPermissionTypes.DENY,
    }],
  });
  await admin.disconnect();
  await using from = kafkaSource(kafkajs(kafkaOf(cluster.brokers)), { topic });
  const { to } = ledger();
  const error = await assertRejects(() => relayShards({ ...QUICK, name: "billing", from, to, drain: true }), EffectError);
  assertEquals(error.code, "source_invalid");
  assertMatch(error.message, /Cannot join group "billing": Kafka refuses: Not authorized to access group/);
});

Deno.test("a broker that is killed and started again holds a source up, and no more: each record once, in order", async () => {
  await using cluster = await startKafka();
  const { brokers, nodes: [node] } = cluster;
  const topic = await makeTopic(brokers, { partitions: 3 });
  const { to, texts } = ledger();
  const stop = new AbortController();
  const client = kafkajs(
    new Kafka({
      ...{ brokers: [brokers], logLevel: logLevel.NOTHING, requestTimeout: 2_000, connectionTimeout: 1_000 },
      retry: { initialRetryTime: 50, retries: 3 },
    }),
  );
  await using from = kafkaSource(client, { topic });
  const running = relayShards({ ...QUICK, name: "group", from, to, batch: 7, signal: stop.signal });
  running.catch(() => {});
  const producing = async (start: number, end: number) => {
    const producer = kafkaOf(brokers).producer({ idempotent: true, maxInFlightRequests: 1 });
    await producer.connect();
    await producer.send({ topic, messages: numbered(start, end) });
    await producer.disconnect();
  };
  await producing(0, 100);
  for (let n = 1; n <= 2; n++) {
    await until(() => texts().length >= n * 100 - 50, 120_000);
    await node!.kill();
    await node!.start();
    await producing(n * 100, n * 100 + 100);
  }
  await until(() => texts().length >= 300, 120_000);
  stop.abort();
  await running;
  assertEquals(texts().map(Number).toSorted((a, b) => a - b), Array.from({ length: 300 }, (_, i) => i));
  assertOrder(texts());
});
