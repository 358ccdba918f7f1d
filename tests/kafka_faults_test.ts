/**
 * What networks, brokers and paused processes do to a relay into Kafka: answers lost, requests late, brokers restarted, leaders and
 * coordinators moved. Each test has brokers of its own, behind a proxy where it says so.
 */
import { assert, assertEquals } from "@std/assert";
import { Kafka, logLevel } from "kafkajs";
import { type Message, relay, type RelayEvent, type RelayOptions } from "@effectonce/effectonce";
import { kafkaSink, type KafkaSinkOptions, readKafkaCursor } from "@effectonce/effectonce/kafka";
import { memoryOutbox, type MemoryStore, memoryStore } from "@effectonce/effectonce/memory";
import { until as untilWithin } from "./cli_run.ts";
import { clientOf, proxied } from "./kafka/proxied.ts";
import { freshName, makeTopic, readTopic } from "./kafka/topics.ts";
import { type Cluster, startKafka } from "./services/kafka.ts";

/** Brokers take their time to come back, on a machine that has other tests to run. */
const until = (condition: () => boolean | Promise<boolean>) => untilWithin(condition, 120_000);
const LONG = Deno.env.get("EFFECTONCE_LONG") === "1";

/** The protocol's numbers of requests. https://kafka.apache.org/protocol#protocol_api_keys */
const PRODUCE = 0;
const METADATA = 3;
const END_TXN = 26;

const QUICK = { minRetryMs: 1, maxRetryMs: 50, pollMs: 5, leaseMs: 300 } as const;

/** A relay from an outbox in memory that runs on. */
function running(store: MemoryStore, options: Partial<RelayOptions> & Pick<RelayOptions, "to">) {
  const stop = new AbortController();
  const events: RelayEvent[] = [];
  const ended = relay({
    ...{ name: "relay", from: memoryOutbox(store), ...QUICK, signal: stop.signal },
    ...options,
    observe: (event) => events.push(event),
  });
  ended.catch(() => {}); // Looked at in the end.
  return {
    events,
    delivered: () => events.flatMap((event) => event.type === "delivered" ? [event.id] : []),
    async stop() {
      stop.abort();
      return await ended;
    },
  };
}

const idsOf = async (brokers: string, topic: string) =>
  (await readTopic(brokers, topic)).map(({ headers }) => headers["ce_id"]!);
const enqueue = (store: MemoryStore, topic: string, ...ids: readonly string[]) =>
  store.enqueue(...ids.map((id) => ({ id, topic, key: "k", value: id })));
const ids = (from: number, to: number) => Array.from({ length: to - from + 1 }, (_, i) => `m${from + i}`);

Deno.test("a commit that was applied, and whose answer was lost, is found in the cursor, told once, and not repeated (acceptance 3)", async () => {
  await using kafka = await proxied();
  const topic = await makeTopic(kafka.brokers);
  const store = memoryStore();
  let commits = 0;
  let awaiting: number | undefined;
  kafka.watch((direction, request, connection) => {
    if (direction === "toServer" && request === END_TXN && ++commits === 2) awaiting = connection;
    if (direction === "toClient" && connection === awaiting) {
      awaiting = undefined;
      return "cut";
    }
    return "pass";
  });
  const one = running(store, { to: kafkaSink(clientOf(kafka.brokers), { topic }) });
  await enqueue(store, topic, ...ids(1, 5));
  await until(() => one.delivered().length === 5);
  await enqueue(store, topic, ...ids(6, 8));
  await until(() => one.delivered().length === 8);
  const { delivered } = await one.stop();
  assertEquals(delivered, 8);
  const found = one.events.flatMap((event) => event.type === "delivered" && event.found ? [event.id] : []);
  assert(found.length > 0, "the first batch was found, and not committed again");
  assertEquals(one.events.filter(({ type }) => type === "failed").length, 1);
  assertEquals(await idsOf(kafka.brokers, topic), ids(1, 8));
});

Deno.test("a commit request that arrives when its relay has begun anew ends no other transaction (acceptance 4)", async () => {
  await using kafka = await proxied();
  const topic = await makeTopic(kafka.brokers);
  const store = memoryStore();
  let commits = 0;
  let produced = 0;
  let held = false;
  kafka.watch((direction, request) => {
    if (direction === "toClient") return "pass";
    if (request === END_TXN && ++commits === 2) {
      held = true;
      return "hold";
    }
    // The batch is on its way for the second time, in a transaction of the next epoch: now the first commit arrives.
    if (held && request === PRODUCE && ++produced === 2) kafka.proxy.release();
    return "pass";
  });
  const one = running(store, { to: kafkaSink(clientOf(kafka.brokers), { topic }) });
  await enqueue(store, topic, ...ids(1, 3));
  await until(() => one.delivered().length === 3);
  await enqueue(store, topic, ...ids(4, 6));
  await until(() => one.delivered().length === 6);
  await one.stop();
  assert(held && produced >= 2);
  assertEquals(await idsOf(kafka.brokers, topic), ids(1, 6));
});

Deno.test("wherever the connection to the broker breaks, a relay goes on by itself: nothing lost, nothing twice, in order", async () => {
  await using kafka = await proxied();
  const topic = await makeTopic(kafka.brokers);
  const store = memoryStore();
  // After so many chunks, either way, a connection breaks; each time a little later.
  let chunks = 0;
  let next = 3;
  let cuts = 0;
  kafka.watch(() => {
    if (++chunks < next) return "pass";
    chunks = 0;
    next++;
    cuts++;
    return "cut";
  });
  const most = LONG ? 120 : 45;
  const one = running(store, { to: kafkaSink(clientOf(kafka.brokers), { topic }), batch: 4 });
  let sent = 0;
  while (cuts < most) {
    await enqueue(store, topic, ...ids(sent + 1, sent + 4));
    sent += 4;
    const before = cuts;
    await until(() => cuts > before || one.delivered().length === sent);
  }
  kafka.watch(() => "pass");
  await until(() => one.delivered().length === sent);
  await one.stop();
  assertEquals(await idsOf(kafka.brokers, topic), ids(1, sent));
});

Deno.test("a relay that is paused in the middle of a transaction is shut out by its successor, and does no harm when it wakes (acceptance 6)", async () => {
  await using kafka = await proxied();
  const topic = await makeTopic(kafka.brokers);
  const store = memoryStore();
  // The first relay hears nothing any more, from the moment when its second commit is on its way: as if it were stopped.
  let commits = 0;
  const connections = new Set<number>();
  let asleep = false;
  kafka.watch((direction, request, connection) => {
    if (!asleep && direction === "toServer" && request === END_TXN && ++commits === 2) asleep = true;
    // Only clients ask for metadata: the broker has connections to itself, which write the ends of transactions.
    if (!asleep && direction === "toServer" && request === METADATA) connections.add(connection);
    return asleep && connections.has(connection) ? "hold" : "pass";
  });
  const first = running(store, { to: kafkaSink(clientOf(kafka.brokers, 60_000), { topic }) });
  await enqueue(store, topic, ...ids(1, 3));
  await until(() => asleep);
  const second = running(store, { to: kafkaSink(clientOf(kafka.brokers), { topic }) });
  await enqueue(store, topic, ...ids(4, 6));
  await until(() => second.delivered().length === 6);
  connections.clear();
  kafka.proxy.release();
  await until(() => first.events.some(({ type }) => type === "fenced"));
  await enqueue(store, topic, ...ids(7, 9));
  await until(() => new Set([...first.delivered(), ...second.delivered()]).size === 9);
  await first.stop();
  await second.stop();
  assertEquals(await idsOf(kafka.brokers, topic), ids(1, 9));
});

Deno.test("a transaction that the broker has given up is begun anew: nothing lost, nothing twice", async () => {
  const settings = { "transaction.abort.timed.out.transaction.cleanup.interval.ms": "200" };
  await using kafka = await proxied({ settings });
  const topic = await makeTopic(kafka.brokers);
  const store = memoryStore();
  let commits = 0;
  kafka.watch((direction, request) => {
    if (direction !== "toServer" || request !== END_TXN || ++commits !== 2) return "pass";
    setTimeout(() => kafka.proxy.release(), 2_500); // The time-out is one second.
    return "hold";
  });
  const options: KafkaSinkOptions = { topic, transactionTimeoutMs: 1_000 };
  const one = running(store, { to: kafkaSink(clientOf(kafka.brokers, 60_000), options) });
  await enqueue(store, topic, ...ids(1, 3));
  await until(() => one.delivered().length === 3);
  await one.stop();
  assertEquals(one.events.filter(({ type }) => type === "fenced").length, 1);
  assertEquals(await idsOf(kafka.brokers, topic), ids(1, 3));
});

Deno.test("another transaction that stays open in the cursor's partition is waited for, and what is behind it read (acceptance 9)", async () => {
  await using cluster = await startKafka();
  const { brokers } = cluster;
  const topic = await makeTopic(brokers);
  const cursorTopic = await makeTopic(brokers, { settings: { "cleanup.policy": "compact" } });
  const store = memoryStore();
  const to = kafkaSink(clientOf(brokers), { topic, cursorTopic });
  await enqueue(store, topic, ...ids(1, 3));
  await relay({ name: "relay", from: memoryOutbox(store), to, drain: true, ...QUICK });
  // Written by somebody who has the right to, in the name of this relay: readers see nothing behind it while it is open.
  const connection = await clientOf(brokers).open();
  const other = await connection.begin(freshName("other"), 60_000);
  const value = new TextEncoder().encode(JSON.stringify({ opened: "other", relay: "relay", source: "memory" }));
  await other.send([{ topic: cursorTopic, partition: 0, key: new TextEncoder().encode("opened"), value, headers: [] }]);
  await enqueue(store, topic, ...ids(4, 6));
  const two = running(store, { to });
  let ended = false;
  setTimeout(() => {
    ended = true;
    other.commit();
  }, 1_500);
  await until(() => two.delivered().length === 3);
  assert(ended, "it has waited for the other transaction");
  await two.stop();
  await connection.close();
  assertEquals(await idsOf(brokers, topic), ids(1, 6));
});

/** Keeps messages coming while something happens, and waits until they are delivered. */
async function through(cluster: Cluster, topic: string, work: (one: ReturnType<typeof running>) => Promise<void>) {
  const store = memoryStore();
  const one = running(store, {
    to: kafkaSink(clientOf(cluster.brokers, 3_000), { topic, transactionTimeoutMs: 10_000 }),
    batch: 10,
  });
  let over = false;
  let sent = 0;
  const writing = (async () => {
    while (!over) {
      await enqueue(store, topic, ...ids(sent + 1, sent + 3));
      sent += 3;
      await new Promise((resolve) => setTimeout(resolve, 20));
    }
  })();
  await until(() => one.delivered().length > 0);
  await work(one);
  over = true;
  await writing;
  await until(() => one.delivered().length === sent);
  await one.stop();
  assertEquals(await idsOf(cluster.brokers, topic), ids(1, sent));
  return one;
}

Deno.test("a broker that is killed and started again every few seconds holds a relay up, and no more (acceptance 37)", async () => {
  await using cluster = await startKafka();
  const topic = await makeTopic(cluster.brokers);
  await through(cluster, topic, async (one) => {
    for (let n = 0; n < (LONG ? 20 : 3); n++) {
      await cluster.nodes[0]!.kill();
      await cluster.nodes[0]!.start();
      const before = one.delivered().length;
      await until(() => one.delivered().length > before + 50);
    }
  });
});

Deno.test("leaders and coordinators move between three brokers, one of which is killed: nothing lost, nothing twice, in order", async () => {
  await using cluster = await startKafka({
    nodes: 3,
    settings: { "replica.lag.time.max.ms": "3000", "broker.session.timeout.ms": "3000" },
  });
  const topic = await makeTopic(cluster.brokers, { copies: 3, settings: { "min.insync.replicas": "2" } });
  await through(cluster, topic, async (one) => {
    // The first node is the controller: it stays.
    for (const victim of [1, 2, 1].slice(0, LONG ? 3 : 2)) {
      await cluster.nodes[victim]!.kill();
      const during = one.delivered().length;
      await until(() => one.delivered().length > during + 50);
      await cluster.nodes[victim]!.start();
      const after = one.delivered().length;
      await until(() => one.delivered().length > after + 50);
    }
  });
});

Deno.test("a commit whose markers cannot be written yet is waited for, and the cursor is not read too early (acceptance 8)", async () => {
  await using cluster = await startKafka({ nodes: 2 });
  const [first, second] = cluster.nodes;
  // One copy, on the second broker, which goes away between the records and the commit.
  const topic = freshName("far");
  const admin = new Kafka({ brokers: [first!.url], logLevel: logLevel.NOTHING }).admin();
  await admin.connect();
  await admin.createTopics({
    waitForLeaders: false,
    topics: [{ topic, replicaAssignment: [{ partition: 0, replicas: [2] }] }],
  });
  await admin.disconnect();
  const message = (id: string) => ({ id, topic, key: "k", value: id });
  const store = memoryStore();
  await store.enqueue(message("m1"));
  const client = clientOf(cluster.brokers, 20_000);
  let sends = 0;
  const stopping = {
    async open() {
      const connection = await client.open();
      return {
        ...connection,
        async begin(id: string | null, timeoutMs: number) {
          const transactions = await connection.begin(id, timeoutMs);
          return {
            ...transactions,
            async send(records: Parameters<typeof transactions.send>[0]) {
              const answer = await transactions.send(records);
              // The mark is the first.
              if (++sends === 2) await second!.kill();
              return answer;
            },
          };
        },
      };
    },
  };
  const dead = new AbortController();
  const one = relay({
    ...{ name: "relay", from: memoryOutbox(store), to: kafkaSink(stopping, { topic, copies: 1 }), drain: true, ...QUICK },
    signal: dead.signal,
  }).catch(() => {});
  await until(() => sends === 2);
  dead.abort();
  await one;
  await second!.start();
  const heir = running(store, { to: kafkaSink(clientOf(cluster.brokers, 20_000), { topic }) });
  await store.enqueue(message("m2"));
  await until(async () => (await idsOf(cluster.brokers, topic).catch(() => [])).length === 2);
  await heir.stop();
  assertEquals(await idsOf(cluster.brokers, topic), ["m1", "m2"]);
  const { ring } = await readKafkaCursor(clientOf(cluster.brokers), { relay: "relay", source: "memory" });
  assertEquals(ring.map(({ n }) => n), [1, 2]);
});

Deno.test("two applications whose relays have the same name share a cluster, and not a position", async () => {
  await using cluster = await startKafka();
  const { brokers } = cluster;
  const topic = await makeTopic(brokers);
  const apps = ["shop", "bank"].map((source) => {
    const store = memoryStore();
    const from = memoryOutbox(store);
    // As outboxes in databases have, each has an identity of its own.
    const own = {
      ...from,
      open: async (options: Parameters<typeof from.open>[0]) => ({ ...await from.open(options), id: source }),
    };
    return { source, store, from: own };
  });
  for (const { store, source } of apps) await enqueue(store, topic, `${source}-1`, `${source}-2`);
  const reports = await Promise.all(
    apps.map(({ from }) =>
      relay({ name: "default", from, to: kafkaSink(clientOf(brokers), { topic }), drain: true, ...QUICK })
    ),
  );
  assertEquals(reports.map(({ delivered }) => delivered), [2, 2]);
  assertEquals((await idsOf(brokers, topic)).toSorted(), ["bank-1", "bank-2", "shop-1", "shop-2"]);
});

Deno.test("a message that a cleanup job has deleted between sealing and sending is left out, and the position goes on", async () => {
  await using cluster = await startKafka();
  const topic = await makeTopic(cluster.brokers);
  const store = memoryStore();
  await enqueue(store, topic, ...ids(1, 3));
  const from = memoryOutbox(store);
  const without = (messages: readonly Message[]) => messages.filter(({ id }) => id !== "m2");
  const cleaned = {
    ...from,
    async open(options: Parameters<typeof from.open>[0]) {
      const session = await from.open(options);
      return {
        ...session,
        async seal(...call: Parameters<typeof session.seal>) {
          const answer = await session.seal(...call);
          return { ...answer, batches: answer.batches.map((batch) => ({ ...batch, messages: without(batch.messages) })) };
        },
      };
    },
  };
  await relay({ name: "relay", from: cleaned, to: kafkaSink(clientOf(cluster.brokers), { topic }), drain: true, ...QUICK });
  const seen = await readTopic(cluster.brokers, topic);
  assertEquals(seen.map(({ headers }) => [headers["ce_id"], headers["effectonce-position"]]), [["m1", "0"], ["m3", "1"]]);
  assertEquals((await from.status()).pending, 0);
});
