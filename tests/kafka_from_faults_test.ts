/**
 * What happens to relays out of Kafka while processes are killed and come and go, connections break, and servers go down. Afterwards
 * everything that came out is counted.
 */
import { assert, assertEquals } from "@std/assert";
import { handler, type RelayEvent, type RelayReport, type Sink } from "@effectonce/effectonce";
import { kafkaSink } from "@effectonce/effectonce/kafka";
import { kafkaSource } from "@effectonce/effectonce/kafka-source";
import { memoryStore } from "@effectonce/effectonce/memory";
import { relayShards, type ShardsOptions } from "@effectonce/effectonce/shards";
import { emptyBox, type Running, until } from "./cli_run.ts";
import { connect, ledgerOf, ledgerSink, makeLedger, type Opened, opened } from "./crash_servers_child.ts";
import { clientOf, proxied } from "./kafka/proxied.ts";
import { freshName, kafkaOf, makeTopic, readTopicInJava, type Seen } from "./kafka/topics.ts";
import { databaseOn, START } from "./servers/own.ts";
import { testDatabase } from "./servers/servers.ts";
import { breaking, COMMIT } from "./services/breaking.ts";
import { database, service } from "./services/mod.ts";
import type { Kind } from "./services/servers.ts";

const LONG = Deno.env.get("EFFECTONCE_LONG") === "1";
const KINDS = ["postgres", "mariadb", "mysql"] as const;
const BROKERS = await service("kafka");
/** A member that was killed is waited for, on a machine that has other tests to run. */
const PATIENCE_MS = 120_000;

/** Produces numbers, each with a key that is its remainder. */
async function producer(brokers: string, topic: string) {
  const producing = kafkaOf(brokers).producer({ idempotent: true, maxInFlightRequests: 1 });
  await producing.connect();
  let sent = 0;
  return {
    sent: () => sent,
    async send(count: number): Promise<void> {
      const messages = Array.from({ length: count }, (_, i) => ({
        key: `k${(sent + i) % 97}`,
        value: JSON.stringify({ id: sent + i, total: (sent + i) * 10, key: (sent + i) % 97 }),
      }));
      await producing.send({ topic, messages });
      sent += count;
    },
    [Symbol.asyncDispose]: () => producing.disconnect(),
  };
}

/** Of each key in order, and all there. */
function assertEach(numbers: readonly number[], sent: number): void {
  assertEquals(numbers.length, sent, "as many as were sent");
  const last = new Map<number, number>();
  for (const number of numbers) {
    const before = last.get(number % 97) ?? number % 97 - 97;
    assertEquals(number, before + 97, `the next one of its key, behind ${before}`);
    last.set(number % 97, number);
  }
}

// ---------------------------------------------------------------------------------------------- members that come and go

/** Tells a relay to end: it says nothing about it, unless it is too young to have heard. */
async function end(member: Running): Promise<void> {
  member.kill("SIGTERM");
  const { code, signal, stderr } = await member.ended();
  assertEquals([signal === null ? code : signal, stderr], [signal === null ? 0 : "SIGTERM", ""]);
}

/** From how many up to how many members there are. */
const [FEWEST, MOST] = [2, 4];

/**
 * Sends messages while relays are killed, told to end, and started, at random, until so many are killed; then drains what is left.
 * `done`: how much has come out, which grows.
 */
async function storm(
  start: (...more: readonly string[]) => Running,
  sending: { send(count: number): Promise<void> },
  done: () => Promise<number>,
  total: number,
): Promise<void> {
  const kills = LONG ? 200 : 20;
  const members = [start(), start(), start()];
  const pick = () => members.splice(Math.floor(Math.random() * members.length), 1)[0]!;
  for (let killed = 0; killed < kills;) {
    // One dead member is waited for as long as two.
    const victims = Math.min(2, kills - killed);
    await sending.send(total * victims / kills);
    const before = await done();
    const more = Math.random() * total / kills;
    await until(async () => await done() > before + more, PATIENCE_MS);
    for (let n = 0; n < victims; n++) {
      const victim = pick();
      victim.kill("SIGKILL");
      assertEquals((await victim.ended()).signal, "SIGKILL");
      killed++;
    }
    if (members.length > 0 && Math.random() < 0.5) await end(pick());
    const wanted = FEWEST + Math.floor(Math.random() * (MOST - FEWEST + 1));
    while (members.length < wanted) members.push(start());
  }
  for (const member of members) await end(member);
  const { code, stderr } = await start("--drain").ended();
  assertEquals([code, stderr], [0, ""]);
}

const TOTAL = LONG ? 100_000 : 10_000;
const PACE = ["--batch", "50", "--lease-ms", "6000", "--min-retry-ms", "1", "--max-retry-ms", "50", "--poll-ms", "5"];
const fromUrl = (topic: string, group: string) => `kafka://${BROKERS}/${topic}?group=${group}`;

Deno.test(`relays into a database that are killed, end and begin, ${LONG ? 200 : 20} kills: each record once, in order, and the sum is that of the topic (acceptance 20)`, async () => {
  await using db = await testDatabase("postgres");
  await using at = await emptyBox();
  await db.program().migrate();
  await db.sql("create table payments (at bigserial, id bigint not null, total bigint not null, key int not null)");
  const topic = await makeTopic(BROKERS, { partitions: 6 });
  await using sending = await producer(BROKERS, topic);
  const line = ["relay", "--from", fromUrl(topic, freshName("billing")), "--to", `${db.url}?table=payments`, ...PACE];
  const count = async () => Number((await db.sql("select count(*) as n from payments"))[0]!["n"]);
  await storm((...more) => at.start([...line, ...more]), sending, count, TOTAL);
  const rows = await db.sql("select id from payments order by at");
  assertEach(rows.map(({ id }) => Number(id)), sending.sent());
  const [sums] = await db.sql("select sum(total) as total from payments");
  assertEquals(Number(sums!["total"]), 10 * TOTAL * (TOTAL - 1) / 2);
});

Deno.test(`relays into Kafka that are killed, end and begin, ${LONG ? 200 : 20} kills: each record once, in order, for Kafka's own consumer (acceptance 21)`, async () => {
  await using at = await emptyBox();
  const [topic, out] = [await makeTopic(BROKERS, { partitions: 6 }), await makeTopic(BROKERS, { partitions: 3 })];
  await using sending = await producer(BROKERS, topic);
  const line = ["relay", "--from", fromUrl(topic, freshName("through")), "--to", `kafka://${BROKERS}/${out}`, ...PACE];
  const admin = kafkaOf(BROKERS).admin();
  await admin.connect();
  const count = async () => (await admin.fetchTopicOffsets(out)).reduce((sum, { offset }) => sum + Number(offset), 0);
  await storm((...more) => at.start([...line, ...more]), sending, count, TOTAL);
  await admin.disconnect();
  const seen = await readTopicInJava(BROKERS, out);
  assertEach(seen.map(({ value }: Seen) => JSON.parse(value!).id), sending.sent());
});

// ------------------------------------------------------------------------------------------------------ what breaks, breaks

/** A relay out of a topic that runs on until it is told to stop. */
function start(brokers: string, topic: string, to: Sink, more: Partial<ShardsOptions> = {}) {
  const stop = new AbortController();
  const events: RelayEvent[] = [];
  const from = kafkaSource(clientOf(brokers), { topic });
  const ended = relayShards({
    ...{ name: topic, from, to, batch: 10, leaseMs: 6_000, minRetryMs: 1, maxRetryMs: 200, pollMs: 5, attempts: 1_000 },
    ...{ signal: stop.signal, observe: (event) => void events.push(event), ...more },
  }).finally(() => from[Symbol.asyncDispose]());
  ended.catch(() => {}); // Whoever stops it hears of it.
  return {
    count: (type: RelayEvent["type"]) => events.filter((event) => event.type === type).length,
    stop(): Promise<RelayReport> {
      stop.abort();
      return ended;
    },
  };
}

/** What is in a ledger by the ids of records, which tell their offsets: each partition is there, without a gap. */
function assertOffsets(ids: readonly string[], sent: number): void {
  assertEquals(ids.length, sent, "as many as were sent");
  const next = new Map<string, number>();
  for (const id of ids) {
    const [, partition, offset] = /-(\d+)-(\d+)-\d+$/.exec(id)!;
    assertEquals(Number(offset), next.get(partition!) ?? 0, `the next one of partition ${partition}`);
    next.set(partition!, Number(offset) + 1);
  }
}

for (const kind of KINDS) {
  Deno.test(`${kind}: a COMMIT that is lost on the way, or whose answer is: each record once, in order (acceptance 20)`, async () => {
    await using db = await opened(kind, database(kind));
    await makeLedger(db);
    await using way = breaking(db.url);
    await using own = connect(kind, way.url, { connections: 3 });
    const topic = await makeTopic(BROKERS, { partitions: 2 });
    await using sending = await producer(BROKERS, topic);
    const one = start(BROKERS, topic, ledgerSink(own));
    const isThere = async () => (await ledgerOf(db)).length >= sending.sent();
    await sending.send(20);
    await until(isThere, PATIENCE_MS);
    for (let n = 0; n < (LONG ? 50 : 6); n++) {
      way.arm(n % 2 === 0 ? "toClient" : "toServer", COMMIT);
      await sending.send(40);
      await until(isThere, PATIENCE_MS);
      assert(way.broke());
    }
    const { parked } = await one.stop();
    assertEquals(parked, 0);
    assertOffsets(await ledgerOf(db), sending.sent());
  });
}

// All at once, since each waits for its server most of the time.
Deno.test("a database that is killed and started again holds relays out of Kafka up, and no more: each record once, in order, on each server (acceptance 20)", async () => {
  async function killed(kind: Kind): Promise<void> {
    await using server = await START[kind]();
    await using db: Opened = await opened(kind, databaseOn(kind, server));
    await makeLedger(db);
    const topic = await makeTopic(BROKERS, { partitions: 3 });
    await using sending = await producer(BROKERS, topic);
    const relays = [1, 2].map(() => start(BROKERS, topic, ledgerSink(db, undefined, { waitMs: 500 })));
    const failures = () => relays.reduce((sum, one) => sum + one.count("failed"), 0);
    const delivered = () => relays.reduce((sum, one) => sum + one.count("delivered"), 0);
    for (let round = 1; round <= 3; round++) {
      const before = delivered();
      await sending.send(200);
      await until(() => delivered() > before + 10, PATIENCE_MS);
      const failed = failures();
      await server.kill();
      await sending.send(10);
      await until(() => failures() > failed, PATIENCE_MS);
      await server.start();
    }
    await until(async () => (await ledgerOf(db)).length >= sending.sent(), PATIENCE_MS);
    for (const one of relays) await one.stop();
    assertOffsets(await ledgerOf(db), sending.sent());
  }
  await Promise.all(KINDS.map(killed));
});

for (const into of ["a database", "Kafka"]) {
  Deno.test(`wherever the connection to the broker breaks, a relay into ${into} goes on by itself: each record once, in order`, async () => {
    await using kafka = await proxied();
    const [topic, out] = [await makeTopic(kafka.brokers, { partitions: 2 }), await makeTopic(kafka.brokers)];
    await using sending = await producer(kafka.brokers, topic);
    const store = memoryStore();
    const texts = handler(store, async (message, effects) => {
      await effects.enqueue({ topic: "seen", value: message.value });
    });
    const one = start(kafka.brokers, topic, into === "Kafka" ? kafkaSink(clientOf(kafka.brokers), { topic: out }) : texts);
    // After so many chunks, either way, a connection breaks; each time a little later.
    let [chunks, next, cuts] = [0, 3, 0];
    const cutting = () => {
      if (++chunks < next) return "pass";
      chunks = 0;
      next++;
      cuts++;
      return "cut";
    };
    const most = LONG ? 120 : 40;
    while (cuts < most) {
      kafka.watch(() => "pass"); // What is sent is not what is looked at.
      await sending.send(4);
      kafka.watch(cutting);
      const before = cuts;
      await until(() => cuts > before || one.count("delivered") >= sending.sent(), PATIENCE_MS);
    }
    kafka.watch(() => "pass");
    await until(() => one.count("delivered") >= sending.sent(), PATIENCE_MS);
    await one.stop();
    const values = into === "Kafka"
      ? (await readTopicInJava(kafka.brokers, out)).map(({ value }) => value!)
      : store.outbox().map(({ value }) => new TextDecoder().decode(value!));
    assertEach(values.map((value) => JSON.parse(value).id), sending.sent());
  });
}
