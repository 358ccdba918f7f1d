/**
 * How fast a topic gets into PostgreSQL, each record once, beside loops that people write by hand; and through a relay into another
 * topic, beside a kafkajs loop with the same transactions. Each run is a process of its own, and the cases take turns.
 *
 * @module
 */
import { CompressionTypes, Kafka, logLevel, Partitioners } from "kafkajs";
// @ts-types="@types/pg"
import pg from "pg";
import { kafkaSink } from "../adapters/kafka.ts";
import { kafkaSource } from "../adapters/kafka_source.ts";
import { kafkajs } from "../adapters/kafkajs.ts";
import { migratePostgres, postgresStore } from "../adapters/postgres.ts";
import { relayShards } from "../adapters/shards.ts";
import { Flags } from "../cli/flags.ts";
import { openDatabaseSink } from "../cli/handlers.ts";
import { RELAY_FLAGS } from "../cli/relay_flags.ts";
import { handler, type Sink } from "../mod.ts";
import { makeTopic } from "../tests/kafka/topics.ts";
import { startKafka } from "../tests/services/kafka.ts";
import { database } from "../tests/services/mod.ts";
import { median } from "./dedupe.ts";

/** One way out of Kafka. */
export interface KafkaFromRow {
  /** What was measured. */
  readonly case: string;
  /** Messages. */
  readonly rows: number;
  /** Messages a second: the median of the rounds. */
  readonly rowsPerSecond: number;
  /** That, against the case that it is compared with: the median of the rounds. */
  readonly ratio: number;
  /** With which. */
  readonly against: string;
  /** Largest resident memory of the process, in MB. */
  readonly peakMb: number;
}

interface Place {
  readonly brokers: string;
  readonly url: string;
  readonly topic: string;
  readonly out: string;
  readonly rows: number;
}

const RETRY = { initialRetryTime: 5, retries: 30, factor: 0.2, multiplier: 1.5 };
const clientOf = (brokers: string) => new Kafka({ brokers: brokers.split(","), logLevel: logLevel.NOTHING, retry: RETRY });
const createPartitioner = Partitioners.DefaultPartitioner;
const PARTITIONS = 6;

async function ours({ brokers, topic }: Place, to: Sink): Promise<void> {
  await using from = kafkaSource(kafkajs(clientOf(brokers)), { topic });
  await relayShards({ name: "bench", from, to, drain: true });
}
type Payment = { readonly id: number; readonly total: number; readonly note: string };

async function oursByTable(place: Place): Promise<void> {
  // As `relay --to 'postgres://…?table=payments'` does.
  const value = { value: `${place.url}?table=payments`, source: "flag" as const, label: "--to" };
  const { sink, database } = await openDatabaseSink(new Flags(RELAY_FLAGS, [], new Map([["to", value]])));
  await ours(place, sink);
  await database.close();
}
async function oursByHandler(place: Place): Promise<void> {
  const pool = new pg.Pool({ connectionString: place.url });
  const to = handler(postgresStore(pool), async (message, _, client) => {
    const { id, total, note } = message.json<Payment>();
    await client.query("insert into payments (id, total, note) values ($1, $2, $3)", [id, total, note]);
  });
  await ours(place, to);
  await pool.end();
}
const through = (place: Place) => ours(place, kafkaSink(kafkajs(clientOf(place.brokers)), { topic: place.out }));

type Fetched = {
  readonly partition: number;
  readonly values: readonly string[];
  readonly keys: readonly string[];
  readonly next: string;
};

/** A consumer as people write it, until it has all; `each` is given what was fetched. */
async function consume({ brokers, topic, rows }: Place, each: (fetched: Fetched) => Promise<void>): Promise<void> {
  const consumer = clientOf(brokers).consumer({ groupId: crypto.randomUUID(), maxWaitTimeInMs: 50, retry: RETRY });
  await consumer.connect();
  await consumer.subscribe({ topics: [topic], fromBeginning: true });
  let seen = 0;
  const all = Promise.withResolvers<void>();
  await consumer.run({
    partitionsConsumedConcurrently: PARTITIONS,
    eachBatchAutoResolve: true,
    async eachBatch({ batch }) {
      const { messages, partition } = batch;
      const values = messages.map(({ value }) => value!.toString());
      await each({
        partition,
        values,
        keys: messages.map(({ key }) => key!.toString()),
        next: String(BigInt(batch.lastOffset()) + 1n),
      });
      if ((seen += messages.length) >= rows) all.resolve();
    },
  });
  await all.promise;
  await consumer.disconnect();
}
async function byHand(place: Place, write: (pool: pg.Pool, fetched: Fetched) => Promise<void>): Promise<void> {
  const pool = new pg.Pool({ connectionString: place.url, max: PARTITIONS });
  await consume(place, (fetched) => write(pool, fetched));
  await pool.end();
}
const INSERT = "insert into payments (id, total, note) values ($1, $2, $3)";
const valuesOf = (text: string) => {
  const { id, total, note } = JSON.parse(text) as Payment;
  return [id, total, note];
};
/** Each message by itself: at-least-once. */
const autocommit = (place: Place) =>
  byHand(place, async (pool, { values }) => {
    for (const text of values) await pool.query(INSERT, valuesOf(text));
  });
/** Each in a transaction, with a row that says that it was done. */
const deduped = (place: Place) =>
  byHand(place, async (pool, { values }) => {
    const client = await pool.connect();
    for (const text of values) {
      const [id, ...rest] = valuesOf(text);
      await client.query("begin");
      const { rowCount } = await client.query("insert into done (id) values ($1) on conflict do nothing", [String(id)]);
      if (rowCount === 1) await client.query(INSERT, [id, ...rest]);
      await client.query("commit");
    }
    client.release();
  });
/** Many rows in one INSERT, and the offset, in one transaction: exactly-once, if the consumer then begins at that offset. */
const batched = (place: Place) =>
  byHand(place, async (pool, { values, partition, next }) => {
    const client = await pool.connect();
    for (let i = 0; i < values.length; i += 500) {
      const rows = values.slice(i, i + 500).map(valuesOf);
      await client.query("begin");
      const list = rows.map((_, n) => `($${3 * n + 1}, $${3 * n + 2}, $${3 * n + 3})`).join(", ");
      await client.query(`insert into payments (id, total, note) values ${list}`, rows.flat());
      await client.query("update offsets set next = $1 where partition = $2", [next, partition]);
      await client.query("commit");
    }
    client.release();
  });
/** By kafkajs's own transactions, with the offsets in them. */
async function throughByHand(place: Place): Promise<void> {
  const groupId = crypto.randomUUID();
  const kafka = clientOf(place.brokers);
  const producers = new Map<number, ReturnType<typeof kafka.producer>>();
  const consumer = kafka.consumer({ groupId, maxWaitTimeInMs: 50, retry: RETRY });
  await consumer.connect();
  await consumer.subscribe({ topics: [place.topic], fromBeginning: true });
  let seen = 0;
  const all = Promise.withResolvers<void>();
  await consumer.run({
    partitionsConsumedConcurrently: PARTITIONS,
    autoCommit: false,
    async eachBatch({ batch: { messages, partition } }) {
      let producer = producers.get(partition);
      if (!producer) {
        const transactionalId = `${groupId}-${partition}`;
        producers.set(
          partition,
          producer = kafka.producer({
            createPartitioner,
            transactionalId,
            idempotent: true,
            maxInFlightRequests: 1,
            retry: RETRY,
          }),
        );
        await producer.connect();
      }
      for (let i = 0; i < messages.length; i += 1000) {
        const some = messages.slice(i, i + 1000);
        const transaction = await producer.transaction();
        await transaction.send({ topic: place.out, messages: some.map(({ key, value }) => ({ key, value })) });
        const offset = String(BigInt(some.at(-1)!.offset) + 1n);
        await transaction.sendOffsets({
          consumerGroupId: groupId,
          topics: [{ topic: place.topic, partitions: [{ partition, offset }] }],
        });
        await transaction.commit();
      }
      if ((seen += messages.length) >= place.rows) all.resolve();
    },
  });
  await all.promise;
  await consumer.disconnect();
  for (const producer of producers.values()) await producer.disconnect();
}

const AUTOCOMMIT = "kafka -> postgres, by hand, each by itself, at-least-once";
const DEDUPED = "kafka -> postgres, by hand, each in a transaction with dedupe";
const BATCHED = "kafka -> postgres, by hand, 500 rows and the offset a transaction";
const TABLE = "kafka -> postgres, ?table=, exactly-once";
const THROUGH = "kafka -> kafka, by hand, transactions of 1000 by kafkajs";
const CASES: Readonly<Record<string, { readonly against: string; run(place: Place): Promise<void> }>> = {
  [AUTOCOMMIT]: { against: AUTOCOMMIT, run: autocommit },
  [DEDUPED]: { against: AUTOCOMMIT, run: deduped },
  [BATCHED]: { against: AUTOCOMMIT, run: batched },
  [TABLE]: { against: BATCHED, run: oursByTable },
  "kafka -> postgres, a handler with one INSERT, exactly-once": { against: DEDUPED, run: oursByHandler },
  [THROUGH]: { against: THROUGH, run: throughByHand },
  "kafka -> kafka, exactly-once": { against: THROUGH, run: through },
};
const ROUNDS = 3;
const LARGE = 10;

interface Measured {
  readonly seconds: number;
  readonly peakMb: number;
}

async function fill(brokers: string, topic: string, rows: number): Promise<void> {
  const producer = clientOf(brokers).producer({ createPartitioner, idempotent: true, maxInFlightRequests: 1 });
  await producer.connect();
  for (let sent = 0; sent < rows; sent += 5000) {
    const messages = Array.from({ length: Math.min(5000, rows - sent) }, (_, i) => {
      const id = sent + i;
      return { key: `key-${id % 1000}`, value: JSON.stringify({ id, total: id * 10, note: "x".repeat(160) }) };
    });
    await producer.send({ topic, messages, compression: CompressionTypes.None });
  }
  await producer.disconnect();
}

/** Runs a case in a process of its own, on a fresh database and fresh topics. */
async function measure(brokers: string, name: string, rows: number): Promise<Measured> {
  await using made = await database("postgres");
  const [topic, out] = [
    await makeTopic(brokers, { partitions: PARTITIONS }),
    await makeTopic(brokers, { partitions: PARTITIONS }),
  ];
  const pool = new pg.Pool({ connectionString: made.url });
  pool.on("error", () => {}); // Of what failed, once its database is dropped.
  await migratePostgres(pool);
  await pool.query("create table payments (id bigint not null, total bigint, note text)");
  await pool.query("create table done (id text primary key)");
  await pool.query("create table offsets (partition int primary key, next bigint not null)");
  await pool.query("insert into offsets select i, 0 from generate_series(0, $1::int - 1) i", [PARTITIONS]);
  await fill(brokers, topic, rows);
  const place: Place = { brokers, url: made.url, topic, out, rows };
  const { stdout, stderr, success } = await new Deno.Command(Deno.execPath(), {
    args: ["run", "-A", "--quiet", import.meta.filename!, name, JSON.stringify(place)],
  }).output();
  if (!success) throw new Error(`The case "${name}" failed: ${new TextDecoder().decode(stderr)}`);
  const { rows: [counted] } = await pool.query("select count(*)::int as n from payments");
  if (name.includes("exactly-once") && name.includes("postgres") && counted.n !== rows) {
    throw new Error(`The case "${name}" has written ${counted.n} rows of ${rows}`);
  }
  await pool.end();
  return JSON.parse(new TextDecoder().decode(stdout).trimEnd().split("\n").at(-1)!);
}

/** Measures all cases. */
export async function kafkaFrom(_?: readonly string[], rows = 50_000): Promise<readonly KafkaFromRow[]> {
  await using cluster = await startKafka();
  const rounds: Record<string, Measured>[] = [];
  for (let round = 0; round < ROUNDS; round++) {
    const measured: Record<string, Measured> = {};
    for (const name of Object.keys(CASES)) measured[name] = await measure(cluster.brokers, name, rows);
    rounds.push(measured);
  }
  const measured = Object.entries(CASES).map(([name, { against }]) => {
    const all = rounds.map((round) => round[name]!);
    return {
      ...{ case: name, rows, against },
      rowsPerSecond: Math.round(rows / median(all.map(({ seconds }) => seconds))),
      ratio: median(rounds.map((round) => round[against]!.seconds / round[name]!.seconds)),
      peakMb: Math.max(...all.map(({ peakMb }) => peakMb)),
    };
  });
  // A large backlog, once.
  const many = rows * LARGE;
  const large: Record<string, Measured> = {};
  for (const name of [BATCHED, TABLE]) large[name] = await measure(cluster.brokers, name, many);
  return [
    ...measured,
    ...Object.entries(large).map(([name, { seconds, peakMb }]) => ({
      ...{ case: `${name}, ${LARGE} times the backlog`, rows: many, peakMb },
      against: `${BATCHED}, ${LARGE} times the backlog`,
      rowsPerSecond: Math.round(many / seconds),
      ratio: large[BATCHED]!.seconds / seconds,
    })),
  ];
}

if (import.meta.main) {
  const [name, text] = Deno.args;
  let peak = 0;
  const timer = setInterval(() => peak = Math.max(peak, Deno.memoryUsage().rss), 20);
  const start = performance.now();
  await CASES[name!]!.run(JSON.parse(text!));
  const seconds = (performance.now() - start) / 1000;
  clearInterval(timer);
  console.log(JSON.stringify({ seconds, peakMb: Math.round(peak / 1e6) }));
  Deno.exit(0); // The connection that keeps the servers.
}
