/**
 * How fast an outbox in PostgreSQL gets into Kafka, exactly once, beside the at-least-once loop that people write by hand and beside
 * a bare producer; how long a row takes from its INSERT until a reader at read_committed has it; and how much memory a large backlog
 * takes. Each run is a process of its own, and the cases take turns.
 *
 * @module
 */
import { Kafka, logLevel, Partitioners } from "kafkajs";
// @ts-types="@types/pg"
import pg from "pg";
import { kafkaSink } from "../adapters/kafka.ts";
import { kafkajs } from "../adapters/kafkajs.ts";
import { migratePostgres, postgresOutbox } from "../adapters/postgres.ts";
import { relayShards } from "../adapters/shards.ts";
import { makeTopic } from "../tests/kafka/topics.ts";
import { database } from "../tests/services/mod.ts";
import { startKafka } from "../tests/services/kafka.ts";
import { median } from "./dedupe.ts";

/** One way into Kafka. */
export interface KafkaRow {
  /** What was measured. */
  readonly case: string;
  /** Rows. */
  readonly rows: number;
  /** Rows a second: the median of the rounds. Null where another thing was measured. */
  readonly rowsPerSecond: number | null;
  /** That, against the loop by hand of the same round: the median of the rounds. */
  readonly ratio: number | null;
  /** From the INSERT until a reader has it, in milliseconds: median, and of 99 in 100. */
  readonly p50Ms: number | null;
  /** See {@linkcode p50Ms}. */
  readonly p99Ms: number | null;
  /** Largest resident memory of the process, in MB. */
  readonly peakMb: number;
}

interface Place {
  readonly brokers: string;
  readonly url: string;
  readonly topic: string;
  readonly rows: number;
}

/** For what the broker refuses for a moment: kafkajs' own pauses would make transactions of a few milliseconds take hundreds. */
const RETRY = { initialRetryTime: 5, retries: 30, factor: 0.2, multiplier: 1.5 };
const clientOf = (brokers: string) => new Kafka({ brokers: brokers.split(","), logLevel: logLevel.NOTHING, retry: RETRY });
const createPartitioner = Partitioners.DefaultPartitioner;
const PARTITIONS = 6;

const fill = (pool: pg.Pool, topic: string, rows: number) =>
  pool.query(
    `insert into effectonce_outbox (topic, key, value)
      select $1, 'key-' || (i % 1000), convert_to(rpad('value ' || i, 200, 'x'), 'UTF8') from generate_series(1, $2::int) i`,
    [topic, rows],
  );

async function ours({ brokers, url }: Place): Promise<void> {
  const pool = new pg.Pool({ connectionString: url });
  const to = kafkaSink(kafkajs(clientOf(brokers)));
  await relayShards({ from: postgresOutbox(pool), to, drain: true });
  await pool.end();
}

/** Reads 500 rows that nobody else has, sends them, deletes them: at-least-once. */
async function byHand({ brokers, url }: Place): Promise<void> {
  const pool = new pg.Pool({ connectionString: url });
  const producer = clientOf(brokers).producer({ createPartitioner });
  await producer.connect();
  const client = await pool.connect();
  for (;;) {
    await client.query("begin");
    const { rows } = await client.query(
      "select seq, topic, key, value from effectonce_outbox order by seq limit 500 for update skip locked",
    );
    if (rows.length > 0) {
      await producer.send({ topic: rows[0].topic, messages: rows.map(({ key, value }) => ({ key, value })) });
      await client.query("delete from effectonce_outbox where seq = any($1)", [rows.map(({ seq }) => seq)]);
    }
    await client.query("commit");
    if (rows.length === 0) break;
  }
  client.release();
  await producer.disconnect();
  await pool.end();
}

/** A producer and no outbox; `size`: records in a request, or in a transaction. */
function bare(transactional: boolean, size: number) {
  return async ({ brokers, topic, rows }: Place): Promise<void> => {
    const kafka = clientOf(brokers);
    const producer = kafka.producer(
      transactional ? { createPartitioner, transactionalId: crypto.randomUUID(), retry: RETRY } : { createPartitioner },
    );
    await producer.connect();
    const value = Buffer.alloc(200, "x");
    for (let sent = 0; sent < rows; sent += size) {
      const messages = Array.from({ length: size }, (_, i) => ({ key: `key-${(sent + i) % 1000}`, value }));
      if (!transactional) await producer.send({ topic, messages });
      else {
        const transaction = await producer.transaction();
        await transaction.send({ topic, messages });
        await transaction.commit();
      }
    }
    await producer.disconnect();
  };
}

const CASES: Readonly<
  Record<string, { readonly rows: number; readonly filled: boolean; run(place: Place): Promise<void> }>
> = {
  "by hand, at-least-once": { rows: 50_000, filled: true, run: byHand },
  "outbox -> kafka, exactly-once": { rows: 50_000, filled: true, run: ours },
  "kafkajs alone, no outbox": { rows: 50_000, filled: false, run: bare(false, 1000) },
  "kafkajs alone, transactions of 1000": { rows: 50_000, filled: false, run: bare(true, 1000) },
};
const BACKLOG = "outbox -> kafka, exactly-once, large backlog";
const LATENCY = "outbox -> kafka, exactly-once, 200 rows a second";
const LATENCY_BY_HAND = "by hand, at-least-once, 200 rows a second, a look every 10 ms";
const ROUNDS = 3;

/** What a child process measures. */
interface Measured {
  readonly seconds: number;
  readonly peakMb: number;
  readonly latencies?: readonly number[];
}

async function withPeak(run: () => Promise<readonly number[] | void>): Promise<Measured> {
  let peak = 0;
  const timer = setInterval(() => peak = Math.max(peak, Deno.memoryUsage().rss), 20);
  const start = performance.now();
  const latencies = await run();
  const seconds = (performance.now() - start) / 1000;
  clearInterval(timer);
  return { seconds, peakMb: Math.round(peak / 1e6), ...latencies && { latencies } };
}

/** Inserts rows at a steady pace, each with its time, while a relay runs; a reader tells when it had them. */
async function latency({ brokers, url, topic, rows }: Place, hand: boolean): Promise<readonly number[]> {
  const pool = new pg.Pool({ connectionString: url });
  const stop = new AbortController();
  const consumer = clientOf(brokers).consumer({ groupId: crypto.randomUUID(), maxWaitTimeInMs: 5, retry: RETRY });
  await consumer.connect();
  await consumer.subscribe({ topics: [topic], fromBeginning: true });
  const latencies: number[] = [];
  const all = Promise.withResolvers<void>();
  await consumer.run({
    autoCommit: false,
    eachBatch({ batch: { messages } }) {
      const now = performance.timeOrigin + performance.now();
      for (const { value } of messages) latencies.push(now - Number(value!.toString().slice(0, 20)));
      if (latencies.length >= rows) all.resolve();
      return Promise.resolve();
    },
  });
  const relaying = hand ? byHandFor(stop.signal, { brokers, url, topic, rows }) : relayShards({
    from: postgresOutbox(pool, { listen: pool }),
    to: kafkaSink(kafkajs(clientOf(brokers))),
    signal: stop.signal,
  });
  await new Promise((resolve) => setTimeout(resolve, 1_000));
  for (let n = 0; n < rows; n++) {
    const due = performance.now() + 5;
    const value = Buffer.from(String(performance.timeOrigin + performance.now()).padEnd(20).padEnd(200, "x"));
    await pool.query("insert into effectonce_outbox (topic, key, value) values ($1, $2, $3)", [
      topic,
      `key-${n % 100}`,
      value,
    ]);
    await new Promise((resolve) => setTimeout(resolve, Math.max(0, due - performance.now())));
  }
  await all.promise;
  stop.abort();
  await relaying;
  await consumer.disconnect();
  await pool.end();
  return latencies.slice(rows / 10); // The first ones wait for what is opened once.
}

async function byHandFor(signal: AbortSignal, place: Place): Promise<void> {
  const pool = new pg.Pool({ connectionString: place.url });
  const producer = clientOf(place.brokers).producer({ createPartitioner });
  await producer.connect();
  while (!signal.aborted) {
    const client = await pool.connect();
    await client.query("begin");
    const { rows } = await client.query(
      "select seq, topic, key, value from effectonce_outbox order by seq limit 500 for update skip locked",
    );
    if (rows.length > 0) {
      await producer.send({ topic: place.topic, messages: rows.map(({ key, value }) => ({ key, value })) });
      await client.query("delete from effectonce_outbox where seq = any($1)", [rows.map(({ seq }) => seq)]);
    }
    await client.query("commit");
    client.release();
    if (rows.length === 0) await new Promise((resolve) => setTimeout(resolve, 10));
  }
  await producer.disconnect();
  await pool.end();
}

/** Runs a case in a process of its own, on a fresh database and topic. */
async function measure(brokers: string, name: string, rows: number, filled: boolean): Promise<Measured> {
  await using made = await database("postgres");
  const topic = await makeTopic(brokers, { partitions: PARTITIONS });
  const pool = new pg.Pool({ connectionString: made.url });
  await migratePostgres(pool);
  if (filled) await fill(pool, topic, rows);
  await pool.query("analyze");
  await pool.end();
  const place: Place = { brokers, url: made.url, topic, rows };
  const { stdout, success } = await new Deno.Command(Deno.execPath(), {
    args: ["run", "-A", "--quiet", import.meta.filename!, name, JSON.stringify(place)],
    stderr: "null",
  }).output();
  if (!success) throw new Error(`The case "${name}" failed`);
  return JSON.parse(new TextDecoder().decode(stdout).trimEnd().split("\n").at(-1)!);
}

/** Measures all cases. */
export async function kafka(_?: readonly string[], only?: number): Promise<readonly KafkaRow[]> {
  await using cluster = await startKafka();
  const { brokers } = cluster;
  const rounds: Record<string, Measured>[] = [];
  for (let round = 0; round < ROUNDS; round++) {
    const measured: Record<string, Measured> = {};
    for (const [name, { rows, filled }] of Object.entries(CASES)) {
      measured[name] = await measure(brokers, name, only ?? rows, filled);
    }
    rounds.push(measured);
  }
  const [hand] = Object.keys(CASES);
  const found: KafkaRow[] = Object.entries(CASES).map(([name, { rows: usual }]) => {
    const rows = only ?? usual;
    const all = rounds.map((round) => round[name]!);
    return {
      case: name,
      rows,
      rowsPerSecond: Math.round(rows / median(all.map(({ seconds }) => seconds))),
      ratio: median(rounds.map((round) => round[hand!]!.seconds / round[name]!.seconds)),
      ...{ p50Ms: null, p99Ms: null },
      peakMb: Math.max(...all.map(({ peakMb }) => peakMb)),
    };
  });
  const backlog = only === undefined ? 500_000 : only * 10;
  const large = await measure(brokers, BACKLOG, backlog, true);
  found.push({
    ...{
      case: BACKLOG,
      rows: backlog,
      rowsPerSecond: Math.round(backlog / large.seconds),
      ratio: null,
      p50Ms: null,
      p99Ms: null,
    },
    peakMb: large.peakMb,
  });
  for (const name of [LATENCY_BY_HAND, LATENCY]) {
    const rows = 4_000;
    const { latencies, peakMb } = await measure(brokers, name, rows, false);
    const sorted = latencies!.toSorted((a, b) => a - b);
    const at = (part: number) => Math.round(sorted[Math.floor(part * (sorted.length - 1))]! * 10) / 10;
    found.push({ case: name, rows, rowsPerSecond: null, ratio: null, p50Ms: at(0.5), p99Ms: at(0.99), peakMb });
  }
  return found;
}

if (import.meta.main) {
  const [name, text] = Deno.args;
  const place: Place = JSON.parse(text!);
  const run = name === LATENCY || name === LATENCY_BY_HAND
    ? () => latency(place, name === LATENCY_BY_HAND)
    : name === BACKLOG
    ? () => ours(place)
    : () => CASES[name!]!.run(place);
  console.log(JSON.stringify(await withPeak(run)));
  Deno.exit(0); // The connection that keeps the servers.
}
