/** Kafka as a sink, on a real broker. */
import { assert, assertEquals, assertMatch, assertRejects } from "@std/assert";
import { Partitioners } from "kafkajs";
import {
  type AtomicSession,
  type Batch,
  createMessage,
  type Delivery,
  EffectError,
  type Message,
  type Position,
  relay,
  type RelayEvent,
  START,
} from "@effectonce/effectonce";
import { chainText } from "@effectonce/effectonce/adapter";
import { atomicSinkCases, type OpenAtomicSink } from "@effectonce/effectonce/conformance";
import {
  type KafkaClient,
  kafkaPlainSink,
  kafkaSink,
  type KafkaSinkOptions,
  partitionOf,
} from "@effectonce/effectonce/kafka";
import { kafkajs } from "@effectonce/effectonce/kafkajs";
import { memoryOutbox, memoryStore } from "@effectonce/effectonce/memory";
import { freshName, kafkaOf, makeTopic, readTopic } from "./kafka/topics.ts";
import { service } from "./services/mod.ts";

const BROKERS = await service("kafka");
const utf8 = new TextEncoder();
const sinkOf = (options: KafkaSinkOptions = {}) => kafkaSink(kafkajs(kafkaOf(BROKERS)), options);

for (const { name, run } of atomicSinkCases) {
  Deno.test(`kafkaSink ${name}`, () =>
    run({
      async open(): Promise<OpenAtomicSink> {
        const topic = await makeTopic(BROKERS, { settings: { "max.message.bytes": "10000" } });
        const cursorTopic = freshName("cursor");
        return {
          sink: sinkOf({ topic, cursorTopic }),
          again: () => sinkOf({ topic, cursorTopic }),
          contents: async () => (await readTopic(BROKERS, topic)).map(({ headers }) => headers["ce_id"]!),
          refused: (id) => messageOf({ id, value: utf8.encode("x".repeat(20_000)) }),
          close: () => Promise.resolve(),
        };
      },
    }));
}

function messageOf(fields: Partial<Message> = {}): Message {
  const id = fields.id ?? crypto.randomUUID();
  const time = new Date("2026-01-02T03:04:05.678Z");
  return createMessage({ id, topic: "orders", key: null, value: utf8.encode(id), headers: {}, time, ...fields });
}

let seq = 0;
async function batchAfter({ n, uid: prev }: Position, messages: readonly Message[]): Promise<Batch> {
  const rows = messages.map(({ id }) => [String(++seq), id] as const);
  const digest = await crypto.subtle.digest("SHA-256", utf8.encode(chainText(prev, rows)));
  return { n: n + 1, prev, rows, uid: new Uint8Array(digest).toHex(), messages };
}

async function within<T>(
  options: KafkaSinkOptions,
  run: (session: AtomicSession) => Promise<T>,
  owner = { relay: freshName("relay"), source: freshName("outbox") },
): Promise<T> {
  const session = await sinkOf(options).open(owner);
  try {
    return await run(session);
  } finally {
    await session.close();
  }
}

Deno.test("a key goes to the partition where Kafka's own producers put it", () => {
  // Of the tests of org.apache.kafka.common.utils.Utils.murmur2, as positive numbers.
  const known: Readonly<Record<string, number>> = {
    "21": -973932308,
    foobar: -790332482,
    "a-little-bit-long-string": -985981536,
    "a-little-bit-longer-string": -1486304829,
    "lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8": -58897971,
    abc: 479470107,
  };
  for (const [text, hash] of Object.entries(known)) {
    assertEquals(partitionOf(utf8.encode(text), 0x7fff_ffff), (hash & 0x7fff_ffff) % 0x7fff_ffff, text);
  }
  const theirs = Partitioners.DefaultPartitioner();
  const partitionMetadata = Array.from({ length: 7 }, (_, partitionId) => ({ partitionId, leader: 1 }));
  for (let i = 0; i < 500; i++) {
    const key = "Ö𝄞x".repeat(i % 9) + i;
    // deno-lint-ignore no-explicit-any -- of what the partitioner is given it looks at these only
    const expected = theirs({ topic: "t", partitionMetadata, message: { key, value: null } } as any);
    assertEquals(partitionOf(utf8.encode(key), 7), expected, key);
  }
});

Deno.test("a record has the message's key, value and headers, and who it is", async () => {
  const topic = await makeTopic(BROKERS, { partitions: 3 });
  const long = "ü".repeat(100);
  const messages = [
    messageOf({
      id: "a",
      key: "order-1",
      value: utf8.encode("{}"),
      headers: { traceparent: "00-1", "x-ü": long, ce_id: "no" },
    }),
    messageOf({ id: "b", key: "order-1", value: null }),
    messageOf({ id: "c-𝄞", key: "", value: new Uint8Array(0), topic: "notes" }),
  ];
  await within({ topic, source: "urn:shop" }, async (session) => {
    await session.commit(await batchAfter(START, messages));
  });
  const seen = (await readTopic(BROKERS, topic)).toSorted((a, b) => a.headers["ce_id"]! < b.headers["ce_id"]! ? -1 : 1);
  const common = {
    ce_specversion: "1.0",
    ce_source: "urn:shop",
    ce_time: "2026-01-02T03:04:05.678Z",
    "effectonce-shard": "0",
  };
  assertEquals(seen.map(({ key, value, headers }) => [key, value, headers]), [
    ["order-1", "{}", {
      ...common,
      traceparent: "00-1",
      "x-ü": long,
      ce_id: "a",
      ce_type: "orders",
      "effectonce-position": "0",
    }],
    ["order-1", null, { ...common, ce_id: "b", ce_type: "orders", "effectonce-position": "1" }],
    ["", "", { ...common, ce_id: "c-𝄞", ce_type: "notes", "effectonce-position": "2" }],
  ]);
  assertEquals(
    new Set(seen.slice(0, 2).map(({ partition }) => partition)),
    new Set([partitionOf(utf8.encode("order-1"), 3)]),
  );
});

Deno.test("positions go on without a gap in the next session", async () => {
  const topic = await makeTopic(BROKERS);
  const owner = { relay: "r", source: freshName("outbox") };
  let last: Position = START;
  for (const size of [3, 1, 4]) {
    await within({ topic }, async (session) => {
      assertEquals((session.ring.at(-1) ?? START).uid, last.uid);
      const batch = await batchAfter(last, Array.from({ length: size }, () => messageOf()));
      await session.commit(batch);
      last = batch;
    }, owner);
  }
  const seen = await readTopic(BROKERS, topic);
  assertEquals(seen.map(({ headers }) => headers["effectonce-position"]), ["0", "1", "2", "3", "4", "5", "6", "7"]);
});

Deno.test("messages without a key are spread batch by batch", async () => {
  const topic = await makeTopic(BROKERS, { partitions: 3 });
  await within({ topic }, async (session) => {
    let last: Position = START;
    for (let n = 0; n < 3; n++) {
      const batch = await batchAfter(last, [messageOf(), messageOf()]);
      await session.commit(batch);
      last = batch;
    }
  });
  const seen = await readTopic(BROKERS, topic);
  assertEquals(seen.map(({ partition }) => partition), [0, 0, 1, 1, 2, 2]);
});

Deno.test("a batch of more bytes than a topic takes at once goes in portions of one transaction, in order", async () => {
  const topic = await makeTopic(BROKERS, { settings: { "max.message.bytes": "20000" } });
  const messages = Array.from(
    { length: 40 },
    (_, i) => messageOf({ id: `m${i}`, key: "k", value: utf8.encode("x".repeat(3000)) }),
  );
  await within({ topic }, async (session) => await session.commit(await batchAfter(START, messages)));
  assertEquals((await readTopic(BROKERS, topic)).map(({ headers }) => headers["ce_id"]), messages.map(({ id }) => id));
});

/** Runs a relay from a memory outbox to its end. */
async function drain(
  options: KafkaSinkOptions,
  ...messages: readonly { id: string; topic: string; value: string; key?: string }[]
) {
  const store = memoryStore();
  await store.enqueue(...messages);
  const events: RelayEvent[] = [];
  const from = memoryOutbox(store);
  const report = await relay({
    ...{ name: freshName("relay"), from, to: sinkOf(options), drain: true, attempts: 2, minRetryMs: 1, maxRetryMs: 5 },
    observe: (event) => events.push(event),
  });
  const parked = (await from.parked()).map(({ id, reason }) => [id, reason] as const);
  return { report, parked, events };
}

Deno.test("a message that is larger than its topic takes is parked, with the sizes, and the others go on", async () => {
  const topic = await makeTopic(BROKERS, { settings: { "max.message.bytes": "2000" } });
  const { report, parked } = await drain(
    {},
    { id: "a", topic, value: "a" },
    { id: "big", topic, value: "x".repeat(5000) },
    { id: "b", topic, value: "b" },
  );
  assertEquals(report, { delivered: 2, parked: 1, uncertain: 0 });
  assertEquals(parked.map(([id]) => id), ["big"]);
  assertMatch(parked[0]![1], /too large for Kafka.*topic-.* takes 2000 \(max\.message\.bytes\)/);
  assertEquals((await readTopic(BROKERS, topic)).map(({ value }) => value), ["a", "b"]);
});

Deno.test("a message to a topic that does not exist is tried again, then parked, and the others go on", async () => {
  const topic = await makeTopic(BROKERS);
  const missing = freshName("missing");
  const { report, parked, events } = await drain(
    {},
    { id: "a", topic, value: "a" },
    { id: "lost", topic: missing, value: "x" },
    { id: "odd", topic: "no such name", value: "x" },
    { id: "b", topic, value: "b" },
  );
  assertEquals(report, { delivered: 2, parked: 2, uncertain: 0 });
  const sentence = `topic "${missing}" does not exist in Kafka: create it, or let the relay create topics (--create-topics)`;
  assertEquals(parked.find(([id]) => id === "lost")![1], sentence);
  assertEquals(events.filter((event) => event.type === "retried").map(({ id }) => id), ["lost", "odd"]);
  assertEquals((await readTopic(BROKERS, topic)).map(({ value }) => value), ["a", "b"]);
});

Deno.test("with createTopics a topic that does not exist is created", async () => {
  const topic = freshName("created");
  const { report } = await drain({ createTopics: true }, { id: "a", topic, value: "a" });
  assertEquals(report, { delivered: 1, parked: 0, uncertain: 0 });
  assertEquals((await readTopic(BROKERS, topic)).map(({ value }) => value), ["a"]);
});

Deno.test("the cursor topic is compacted, has a position a batch, and is for one relay alone", async () => {
  const topic = await makeTopic(BROKERS);
  const cursorTopic = freshName("cursor");
  const owner = { relay: "one", source: freshName("outbox") };
  await within({ topic, cursorTopic }, async (session) => {
    await session.commit(await batchAfter(START, [messageOf({ id: "a" })]));
  }, owner);
  const admin = kafkaOf(BROKERS).admin();
  await admin.connect();
  try {
    const { resources } = await admin.describeConfigs({
      includeSynonyms: false,
      // deno-lint-ignore no-explicit-any -- kafkajs' types want more than the request has
      resources: [{ type: 2, name: cursorTopic, configNames: ["cleanup.policy", "min.insync.replicas"] } as any],
    });
    const settings = resources[0]!.configEntries.map(({ configName, configValue }) => [configName, configValue]);
    assertEquals(Object.fromEntries(settings), { "cleanup.policy": "compact", "min.insync.replicas": "1" });
  } finally {
    await admin.disconnect();
  }
  const records = (await readTopic(BROKERS, cursorTopic)).map(({ key, value }) => [key, JSON.parse(value!)] as const);
  assertEquals(records.map(([key, { n, records, relay, source }]) => [key, n, records, relay, source]), [
    ["opened", undefined, undefined, owner.relay, owner.source],
    ["1", 1, 1, owner.relay, owner.source],
  ]);
  const other = { ...owner, relay: "other" };
  const error = await assertRejects(() => within({ topic, cursorTopic }, () => Promise.resolve(), other), EffectError);
  assertEquals(error.code, "sink_invalid");
  assertMatch(error.message, /is that of relay "one" from source "outbox-.*, and this is relay "other"/);
});

Deno.test("a topic that would delete positions, or has other records, is refused as cursor topic", async () => {
  const deleting = await makeTopic(BROKERS);
  const error = await assertRejects(() => within({ cursorTopic: deleting }, () => Promise.resolve()), EffectError);
  assertEquals(error.code, "sink_invalid");
  assertMatch(error.message, /its cleanup\.policy is "delete", which would delete it in time\. Set it to "compact"/);

  const foreign = await makeTopic(BROKERS, { settings: { "cleanup.policy": "compact" } });
  const producer = kafkaOf(BROKERS).producer({ createPartitioner: Partitioners.DefaultPartitioner });
  await producer.connect();
  await producer.send({ topic: foreign, messages: [{ key: "k", value: "a reading of a meter" }] });
  await producer.disconnect();
  const refused = await assertRejects(() => within({ cursorTopic: foreign }, () => Promise.resolve()), EffectError);
  assertEquals(refused.code, "sink_invalid");
  assertMatch(refused.message, /it has other records as well\. A cursor topic is for one relay alone/);
});

Deno.test("the ring goes back as far as it must, whatever lies between the positions", async () => {
  const topic = await makeTopic(BROKERS);
  const owner = { relay: "r", source: freshName("outbox") };
  const committed: Position[] = [];
  let last: Position = START;
  for (let round = 0; round < 3; round++) {
    await within({ topic }, async (session) => {
      for (let i = 0; i < 50; i++) {
        const batch = await batchAfter(last, [messageOf()]);
        await session.commit(batch);
        committed.push(last = { n: batch.n, uid: batch.uid, prev: batch.prev, rows: batch.rows });
      }
    }, owner);
  }
  await within({ topic }, (session) => {
    assertEquals(session.ring.map(({ n }) => n), committed.map(({ n }) => n));
    assertEquals(session.ring.at(-1)!.uid, last.uid);
    return Promise.resolve();
  }, owner);
});

Deno.test("what an earlier owner left open is aborted, and readers never see it", async () => {
  const topic = await makeTopic(BROKERS);
  const owner = { relay: "r", source: freshName("outbox") };
  const cursorTopic = await makeTopic(BROKERS, { settings: { "cleanup.policy": "compact" } });
  const connection = await kafkajs(kafkaOf(BROKERS)).open();
  const zombie = await connection.begin(`effectonce-${owner.source}-${owner.relay}`, 60_000);
  const [key, value] = [
    utf8.encode("9"),
    utf8.encode(JSON.stringify({ n: 9, uid: "x", prev: "", rows: [], records: 1, ...owner })),
  ];
  await zombie.send([
    { topic, partition: 0, key: null, value: utf8.encode("never"), headers: [] },
    { topic: cursorTopic, partition: 0, key, value, headers: [] },
  ]);
  await within({ topic, cursorTopic }, async (session) => {
    assertEquals(session.ring, []);
    await session.commit(await batchAfter(START, [messageOf({ id: "a" })]));
  }, owner);
  const error = await assertRejects(() => zombie.commit(), EffectError);
  assertEquals(error.code, "fenced");
  await connection.close();
  assertEquals((await readTopic(BROKERS, topic)).map(({ value }) => value), ["a"]);
});

for (const wrong of [false, true]) {
  const how = wrong
    ? "reads the cursor before it takes the id over sends twice, which is noticed"
    : "takes the id over first does not";
  Deno.test(`while its predecessor commits an owner comes: one that ${how} (acceptance 7)`, async () => {
    const topic = await makeTopic(BROKERS);
    const [owner, cursorTopic] = [{ relay: "r", source: freshName("outbox") }, freshName("cursor")];
    const old = await sinkOf({ topic, cursorTopic }).open(owner);
    const first = await batchAfter(START, [messageOf({ id: "a" })]);
    await old.commit(first);
    const second = await batchAfter(first, [messageOf({ id: "b" })]);
    const inner = kafkajs(kafkaOf(BROKERS));
    const client: KafkaClient = {
      async open() {
        const connection = await inner.open();
        const early = await connection.end(cursorTopic, 0);
        return {
          ...connection,
          async begin(...call) {
            await old.commit(second);
            return await connection.begin(...call);
          },
          async read(...call) {
            const { records, next } = await connection.read(...call);
            // As if it had been read early: but for the own mark nothing is there that came later.
            const isEarly = ({ offset, value }: typeof records[number]) =>
              offset < early || new TextDecoder().decode(value!).includes("opened");
            return { records: wrong ? records.filter(isEarly) : records, next };
          },
        };
      },
    };
    const session = await kafkaSink(client, { topic, cursorTopic }).open(owner);
    assertEquals(session.ring.at(-1)?.n, wrong ? 1 : 2);
    const error = await session.commit(second).then(() => undefined, (error) => error);
    assertEquals(error?.code, wrong ? undefined : "fenced");
    await Promise.all([session.close(), old.close()]);
    const seen = (await readTopic(BROKERS, topic)).map(({ headers }) => headers["ce_id"]);
    assertEquals(seen, wrong ? ["a", "b", "b"] : ["a", "b"]);
  });
}

Deno.test("partitions that are added under way are used by the next session: nothing lost, nothing twice, no gap", async () => {
  const topic = await makeTopic(BROKERS, { partitions: 2 });
  const store = memoryStore();
  const to = sinkOf({ cursorTopic: freshName("cursor") });
  const stop = new AbortController();
  const messages = (from: number) =>
    Array.from({ length: 40 }, (_, i) => ({ id: `m${from + i}`, topic, key: `k${i}`, value: i }));
  await store.enqueue(...messages(0));
  const events: RelayEvent[] = [];
  const some = Promise.withResolvers<void>();
  const running = relay({
    ...{ name: "r", from: memoryOutbox(store), to, pollMs: 5, batch: 7 },
    signal: stop.signal,
    observe(event) {
      events.push(event);
      if (event.type === "idle") some.resolve();
      if (events.filter(({ type }) => type === "delivered").length === 80) stop.abort();
    },
  });
  await some.promise;
  const admin = kafkaOf(BROKERS).admin();
  await admin.connect();
  await admin.createPartitions({ topicPartitions: [{ topic, count: 5 }] });
  await admin.disconnect();
  await store.enqueue(...messages(40));
  await running;
  await store.enqueue(...messages(80));
  await relay({ name: "r", from: memoryOutbox(store), to, drain: true });
  const seen = await readTopic(BROKERS, topic);
  assertEquals(
    seen.map(({ headers }) => headers["ce_id"]).toSorted(),
    Array.from({ length: 120 }, (_, i) => `m${i}`).toSorted(),
  );
  const last = seen.filter(({ headers }) => Number(headers["ce_id"]!.slice(1)) >= 80);
  for (const { key, partition } of last) assertEquals(partition, partitionOf(utf8.encode(key!), 5));
  assertEquals(events.filter(({ type }) => type === "failed" || type === "fenced"), []);
});

Deno.test("a broker that takes less than it says is sent less: nothing twice, and what it takes alone is not parked", async () => {
  // The setting that the sink has read is no longer true.
  const topic = await makeTopic(BROKERS, { partitions: 3 });
  const admin = kafkaOf(BROKERS).admin();
  await admin.connect();
  const store = memoryStore();
  const [first, ...rest] = Array.from({ length: 91 }, (_, i) => `m${i}`);
  const message = (id: string, key: string, bytes = 1000) => ({ id, topic, key, value: "x".repeat(bytes) });
  await store.enqueue(message(first!, "k"));
  const enqueue = () =>
    store.enqueue(
      message("large", "of its own", 12_000),
      message("too-large", "one more", 16_000),
      ...rest.map((id, i) => message(id, `k${i % 9}`)),
    );
  const stop = new AbortController();
  const events: RelayEvent[] = [];
  const from = memoryOutbox(store);
  let lowered: Promise<unknown> | undefined;
  await relay({
    ...{ name: freshName("relay"), from, to: sinkOf(), minRetryMs: 1, maxRetryMs: 5, signal: stop.signal, pollMs: 5 },
    observe(event) {
      events.push(event);
      if (event.type === "delivered" && event.id === first) {
        lowered = admin.alterConfigs({
          validateOnly: false,
          resources: [{ type: 2, name: topic, configEntries: [{ name: "max.message.bytes", value: "15000" }] }],
        }).then(enqueue);
      }
      if (events.filter(({ type }) => type === "delivered").length === 92) stop.abort();
    },
  });
  await lowered;
  await admin.disconnect();
  assert(events.some((event) => event.type === "failed" && /it gets smaller portions/.test(event.reason)), "it was refused");
  assertEquals((await from.parked()).map(({ id }) => id), ["too-large"]);
  const seen = await readTopic(BROKERS, topic);
  assertEquals(seen.map(({ headers }) => headers["ce_id"]).toSorted(), [first, "large", ...rest].toSorted());
  for (const [key, mine] of Map.groupBy(seen, ({ key }) => key)) {
    const numbers = mine.map(({ headers }) => Number(headers["ce_id"]!.slice(1)));
    assertEquals(numbers, numbers.toSorted((a, b) => a - b), String(key));
  }
});

Deno.test("without transactions messages go out at least once, refused ones are parked, and the order of a key is kept", async () => {
  const topic = await makeTopic(BROKERS, { partitions: 3, settings: { "max.message.bytes": "2000" } });
  const store = memoryStore();
  const ids = Array.from({ length: 300 }, (_, i) => `m${i}`);
  await store.enqueue(...ids.map((id, i) => ({ id, topic, key: `k${i % 7}`, value: i === 100 ? "x".repeat(5000) : id })));
  const from = memoryOutbox(store);
  await using to = kafkaPlainSink(kafkajs(kafkaOf(BROKERS)));
  const report = await relay({ from, to, drain: true, lanes: 16, onPark: "skip", attempts: 2, maxRetryMs: 200 });
  assertEquals(report, { delivered: 299, parked: 1, uncertain: 0 });
  assertMatch((await from.parked())[0]!.reason, /too large for Kafka/);
  const seen = await readTopic(BROKERS, topic);
  assertEquals(new Set(seen.map(({ value }) => value)).size, 299);
  for (let k = 0; k < 7; k++) {
    const mine = seen.filter(({ key }) => key === `k${k}`).map(({ value }) => Number(value!.slice(1)));
    assertEquals(mine, mine.toSorted((a, b) => a - b));
  }
});

Deno.test("without transactions a topic that cannot be looked up keeps no other one's messages back", async () => {
  const topic = await makeTopic(BROKERS);
  const inner = kafkajs(kafkaOf(BROKERS));
  const client: KafkaClient = {
    async open() {
      const connection = await inner.open();
      const partitions = (name: string) =>
        name === "bad" ? Promise.reject(new Error("not today")) : connection.partitions(name);
      return { ...connection, partitions };
    },
  };
  await using to = kafkaPlainSink(client);
  const delivery = { idempotencyKey: "", attempt: 1, signal: new AbortController().signal } as unknown as Delivery;
  const answers = await Promise.allSettled(
    ["a", "bad", "b"].map((id) => to.deliver(messageOf({ id, topic: id === "bad" ? "bad" : topic }), delivery)),
  );
  assertEquals(answers.map(({ status }) => status), ["fulfilled", "rejected", "fulfilled"]);
  assertEquals((await readTopic(BROKERS, topic)).map(({ headers }) => headers["ce_id"]), ["a", "b"]);
});
