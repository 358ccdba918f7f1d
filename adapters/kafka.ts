/**
 * Kafka as a sink that commits its position together with the records: exactly-once, by one Kafka transaction a batch.
 *
 * The position is a record in a compacted topic of its own, the cursor topic, written in the same transaction as the batch.
 * At its start a relay takes over the transactional id, which ends whatever an earlier one left open and keeps it out from
 * then on; writes a mark into the cursor topic; and reads up to this mark where the last batch ended.
 *
 * ```ts ignore
 * import { relay } from "@effectonce/effectonce";
 * import { kafkaSink } from "@effectonce/effectonce/kafka";
 * import { kafkajs } from "@effectonce/effectonce/kafkajs";
 * import { postgresOutbox } from "@effectonce/effectonce/postgres";
 * import { Kafka, logLevel } from "kafkajs";
 * import pg from "pg";
 *
 * const pool = new pg.Pool({ connectionString: "postgres://app@127.0.0.1/app" });
 * const kafka = new Kafka({ brokers: ["127.0.0.1:9092"], logLevel: logLevel.NOTHING });
 * await relay({ from: postgresOutbox(pool), to: kafkaSink(kafkajs(kafka)) }); // To the topic that each message names.
 * ```
 *
 * @module
 */
import {
  type AtomicSession,
  type AtomicSink,
  type Batch,
  type CallSink,
  createMessage,
  EffectError,
  encodeMessage,
  type Json,
  type Message,
  type Position,
  type PositionOwner,
  realRuntime,
  refusedMessage,
  rejected,
  type Runtime,
} from "../mod.ts";
import { checkAdvance, sha256 } from "./shared.ts";

// ----------------------------------------------------------------------------------------------------------------- client

/** A Kafka client: `kafkajs()` of `@effectonce/effectonce/kafkajs` makes one. */
export interface KafkaClient {
  /** Connects to a cluster. */
  open(): Promise<KafkaConnection>;
}

/** A record to be sent. */
export interface KafkaRecord {
  /** Its topic. */
  readonly topic: string;
  /** Its partition. */
  readonly partition: number;
  /** Null: none. */
  readonly key: Uint8Array | null;
  /** Null: a tombstone. */
  readonly value: Uint8Array | null;
  /** Names and values; a text goes as its UTF-8. */
  readonly headers: readonly (readonly [name: string, value: string | Uint8Array])[];
}

/** How a topic is created. */
export interface TopicOptions {
  /**
   * Partitions.
   *
   * @default {the cluster's own number}
   */
  readonly partitions?: number;
  /**
   * Copies of each.
   *
   * @default {the cluster's own number}
   */
  readonly copies?: number;
  /** Settings of the topic, such as `cleanup.policy`. */
  readonly settings?: Readonly<Record<string, string>>;
}

/** A cluster that is connected. It throws `sink_invalid` where the user may not do what it is to do. */
export interface KafkaConnection {
  /** Which cluster it is. */
  clusterId(): Promise<string>;
  /** How many brokers there are. */
  brokers(): Promise<number>;
  /** The oldest version of Kafka that its brokers may be, as far as their protocol tells: such as `4.0`. */
  version(): Promise<string>;
  /** How many brokers keep a partition. */
  copies(topic: string, partition: number): Promise<number>;
  /** How many partitions a topic has, as far as is known since the last `refresh`; 0 if it does not exist. */
  partitions(topic: string): Promise<number>;
  /** Learns of new partitions and leaders. */
  refresh(): Promise<void>;
  /** A topic's setting; undefined where this user may not see it. */
  setting(topic: string, name: string): Promise<string | undefined>;
  /** Creates a topic, or finds it created meanwhile. */
  create(topic: string, options: TopicOptions): Promise<void>;
  /** Gives a topic more partitions, or finds them there meanwhile. */
  grow(topic: string, partitions: number): Promise<void>;
  /**
   * Reads committed records of a partition from an offset on, or from the first that there is behind it. Where there are none it
   * waits a moment. `next`: where to read on.
   */
  read(topic: string, partition: number, from: number): Promise<{
    readonly records: readonly {
      readonly offset: number;
      readonly key: Uint8Array | null;
      readonly value: Uint8Array | null;
      readonly headers: Readonly<Record<string, string>>;
    }[];
    readonly next: number;
  }>;
  /** Where committed records of a partition end: the offset of the next one. */
  end(topic: string, partition: number): Promise<number>;
  /** The offset of a partition's first record that is not older than a time; its end if there is none. */
  since(topic: string, partition: number, time: Date): Promise<number>;
  /**
   * Takes a transactional id over: what is open under it is ended, one way or the other, and whoever had it is shut out. Null:
   * without transactions.
   */
  begin(transactionalId: string | null, timeoutMs: number): Promise<KafkaTransactions>;
  /** Lets go. Nobody need wait for it. */
  close(): Promise<void>;
}

/** A partition of a topic. */
export interface KafkaPartition {
  /** The topic. */
  readonly topic: string;
  /** Its partition, from 0. */
  readonly partition: number;
}

/**
 * One transaction after the other. After an error nobody knows what has happened: end it by `begin`ning anew. `fenced` says
 * that another one has.
 */
export interface KafkaTransactions {
  /**
   * Sends records in the transaction, and begins it if need be. Those of one partition stay in order. `tooLarge`: partitions for
   * which a broker has refused them, which it may take in smaller portions.
   */
  send(records: readonly KafkaRecord[]): Promise<{
    readonly tooLarge: readonly KafkaPartition[];
    /** The offset of the first record for a partition. */
    offsetOf(topic: string, partition: number): number | undefined;
  }>;
  /** Commits it. */
  commit(): Promise<void>;
}

// ---------------------------------------------------------------------------------------------------------------- options

/** A record that a message becomes. */
export interface Transformed {
  /**
   * Its topic, where the sink has none for all.
   *
   * @default {that of the message}
   */
  readonly topic?: string;
  /**
   * Its key.
   *
   * @default {that of the message}
   */
  readonly key?: string | Uint8Array | null;
  /** Its value: bytes as they are, a text as its UTF-8, null as a tombstone, any other JSON as its text. */
  readonly value: Json | Uint8Array;
  /**
   * Its headers.
   *
   * @default {those of the message}
   */
  readonly headers?: Readonly<Record<string, string>>;
}

/** What becomes of a message: one record, several, or none, which is null. Of anything else the message is refused. */
export type TransformedAll = Transformed | readonly Transformed[] | null;

/** Makes records of a message. */
export type Transform = (message: Message) => TransformedAll | Promise<TransformedAll>;

/**
 * What a file exports as default for `relay --to kafka:… --handler FILE`.
 *
 * ```ts
 * import { defineTransform } from "@effectonce/effectonce/kafka";
 *
 * export default defineTransform((message) => {
 *   const { total } = message.json<{ total: number }>();
 *   return total > 0 ? { topic: "payments", value: { amount: total } } : null;
 * });
 * ```
 */
export function defineTransform(transform: Transform): { readonly transform: Transform } {
  return { transform };
}

/** How {@linkcode kafkaSink} works. */
export interface KafkaSinkOptions {
  /**
   * A name for people, without secrets.
   *
   * @default {"kafka", with the topic if there is one}
   */
  readonly name?: string;
  /**
   * One topic for all messages.
   *
   * @default {undefined} The topic that each message names.
   */
  readonly topic?: string;
  /**
   * What becomes of a message: one record, several, or none. It may run again for the same message: nothing but its answer counts.
   * One for which it throws is tried again, and parked in the end; `rejected` parks it at once.
   *
   * @default {undefined} A record with its key, value and headers.
   */
  readonly transform?: Transform;
  /**
   * Whether a topic that does not exist is created, with the cluster's own number of partitions.
   *
   * @default {false} A message to a topic that does not exist is tried again, and parked in the end.
   */
  readonly createTopics?: boolean;
  /**
   * Where the relay's position is: a topic that is compacted, and in which nobody else writes.
   *
   * @default {`effectonce-cursor-${source}-${relay}`}
   */
  readonly cursorTopic?: string;
  /**
   * Copies of the cursor topic, if it must be created.
   *
   * @default {3, or as many as there are brokers}
   */
  readonly copies?: number;
  /**
   * Copies of the cursor topic that must be in sync for a commit, if it must be created.
   *
   * @default {2 of 3 copies, else 1}
   */
  readonly minInsyncReplicas?: number;
  /**
   * How long a transaction may stay open before the broker aborts it, in milliseconds, from 1000: for as long at most does a
   * relay that died hold up the readers of its topics.
   *
   * @default {30_000}
   */
  readonly transactionTimeoutMs?: number;
  /**
   * The CloudEvents source: a URI-reference that says where the messages come from.
   *
   * @default {"effectonce"}
   */
  readonly source?: string;
  /** Time and randomness. */
  readonly runtime?: Pick<Runtime, "now" | "random">;
}

// ---------------------------------------------------------------------------------------------------------------- records

/**
 * The partition of a key, as Kafka's own producers choose it: MurmurHash2 (A. Appleby) with the seed of
 * org.apache.kafka.common.utils.Utils.
 */
export function partitionOf(key: Uint8Array, partitions: number): number {
  const m = 0x5bd1e995;
  const { length } = key;
  const whole = length & ~3;
  let hash = 0x9747b28c ^ length;
  for (let i = 0; i < whole; i += 4) {
    const word = Math.imul(key[i]! | key[i + 1]! << 8 | key[i + 2]! << 16 | key[i + 3]! << 24, m);
    hash = Math.imul(hash, m) ^ Math.imul(word ^ word >>> 24, m);
  }
  if (length > whole) {
    for (let i = whole; i < length; i++) hash ^= key[i]! << 8 * (i - whole);
    hash = Math.imul(hash, m);
  }
  hash = Math.imul(hash ^ hash >>> 13, m);
  return ((hash ^ hash >>> 15) & 0x7fff_ffff) % partitions;
}

/** An upper bound of what a record takes in a batch. https://kafka.apache.org/documentation/#record */
function sizeOf({ key, value, headers }: KafkaRecord): number {
  let size = 30 + (key?.length ?? 0) + (value?.length ?? 0);
  for (const [name, text] of headers) size += 10 + name.length * 3 + text.length * 3;
  return size;
}

/** What a batch of records takes besides them. https://kafka.apache.org/documentation/#recordbatch */
const BATCH_OVERHEAD = 100;
/** The brokers' default of `message.max.bytes`, for where they do not say. */
const MAX_BYTES = 1_048_588;
const MAX_BYTES_NAME = "max.message.bytes";
/** How long what is known of a topic is taken for true, in milliseconds: partitions may be added. */
const METADATA_MS = 300_000;

const encoder = new TextEncoder();

/** What is known of a topic. */
interface Topic {
  readonly partitions: number;
  /** What a batch with one record may have. */
  readonly maxBytes: number;
}

/** Topics; or why there is none; or what went wrong when they were looked up. */
type Topics = ReadonlyMap<string, Topic | string | Error>;

/** What a topic has turned out to take, in bytes: of a single record, and of several together. */
interface Limits {
  readonly single: number;
  readonly several: number;
}
const UNLIMITED: Limits = { single: Infinity, several: Infinity };

/** Where the messages of a sink go: topics, partitions, headers, and what a topic takes. */
function createRecords(
  connection: KafkaConnection,
  name: string,
  options: KafkaSinkOptions,
  /** Where a broker has refused more than that: for longer than a session. */
  limits: Map<string, Limits>,
) {
  const { topic: fixed, createTopics = false, source = "effectonce", runtime = realRuntime } = options;
  const known = new Map<string, Topic>();
  let cluster: string | undefined;
  let knownUntil = runtime.now() + METADATA_MS;
  /** Messages without a key go together, to one partition after the other. */
  let turn = Math.floor(runtime.random() * 1024);

  async function find(topic: string): Promise<Topic | string> {
    const found = known.get(topic);
    if (found) return found;
    let partitions = await connection.partitions(topic);
    if (partitions === 0 && createTopics) {
      try {
        await connection.create(topic, {});
      } catch (error) {
        return `it could not be created: ${(error as Error).message}`;
      }
      partitions = await connection.partitions(topic);
    }
    if (partitions === 0) return "create it, or let the relay create topics (--create-topics)";
    const maxBytes = Number(await connection.setting(topic, MAX_BYTES_NAME) ?? MAX_BYTES);
    const limited = { partitions, maxBytes: Math.min(maxBytes, limits.get(topic)?.single ?? maxBytes) };
    known.set(topic, limited);
    return limited;
  }

  return {
    /** Before the next batch. */
    async next(): Promise<void> {
      turn++;
      if (runtime.now() < knownUntil) return;
      await connection.refresh();
      known.clear();
      knownUntil = runtime.now() + METADATA_MS;
    },
    /** The topics that messages go to. */
    async topicsOf(messages: readonly Message[]): Promise<Topics> {
      const found = new Map<string, Topic | string | Error>();
      cluster ??= await connection.clusterId();
      for (const { topic: type } of messages) {
        const topic = fixed ?? type;
        if (found.has(topic)) continue;
        found.set(topic, known.get(topic) ?? await find(topic).catch((error: Error) => error));
      }
      return found;
    },
    /**
     * The record of a message, which is, or was made of, `origin`.
     *
     * @throws As `refusedMessage` says, of the origin, if Kafka does not take it.
     */
    record(message: Message, origin: Message, topics: Topics, more: KafkaRecord["headers"]): KafkaRecord {
      const { id, topic: type, value, headers, time } = message;
      const topic = fixed ?? type;
      const found = topics.get(topic)!;
      if (found instanceof Error) throw found;
      if (typeof found === "string") {
        throw refusedMessage(origin, new Error(`topic "${topic}" does not exist in Kafka: ${found}`));
      }
      const read = (origin as FromKafka).kafka;
      if (read && read.cluster === cluster && read.topic === topic) {
        const why = `goes into ${topic}, the topic that is read: the relay would go round and round`;
        if (!options.transform) throw new EffectError("sink_invalid", `Cannot relay into ${name}: what it gets ${why}`);
        throw refusedMessage(origin, rejected(`what is made of it ${why}`));
      }
      // One that was a record goes on with its own bytes.
      const { kafka } = message as FromKafka;
      const key = kafka ? kafka.key : message.key === null ? null : encoder.encode(message.key);
      const own = kafka ? kafka.headers.map(([name, value]) => [name, value ?? ""] as const) : Object.entries(headers);
      const record: KafkaRecord = {
        topic,
        partition: key === null ? turn % found.partitions : partitionOf(key, found.partitions),
        key,
        value,
        headers: [
          ...own.filter(([name]) => !RESERVED.test(name)),
          ["ce_specversion", "1.0"],
          ["ce_id", id],
          ["ce_source", source],
          ["ce_type", type],
          ...Number.isNaN(time.getTime()) ? [] : [["ce_time", time.toISOString()] as const],
          ...more,
        ],
      };
      const size = sizeOf(record);
      if (size + BATCH_OVERHEAD > found.maxBytes) {
        const limit = `topic "${topic}" takes ${found.maxBytes} (${MAX_BYTES_NAME})`;
        throw refusedMessage(
          origin,
          rejected(`it is too large for Kafka: a record of about ${size} bytes, where ${limit}`),
        );
      }
      return record;
    },
    /** Divides records into portions that brokers take. */
    portions(records: readonly KafkaRecord[]): KafkaRecord[][] {
      let portion: KafkaRecord[] = [];
      let sizes = new Map<string, number>();
      const portions = [portion];
      for (const record of records) {
        const { topic, partition } = record;
        const place = `${partition} ${topic}`;
        const size = sizeOf(record);
        const before = sizes.get(place);
        const most = Math.min(known.get(topic)!.maxBytes, limits.get(topic)?.several ?? Infinity);
        if (before !== undefined && before + size > most) {
          portions.push(portion = []);
          sizes = new Map();
        }
        sizes.set(place, (sizes.get(place) ?? BATCH_OVERHEAD) + size);
        portion.push(record);
      }
      return portions;
    },
    /** A broker takes less at a time for these partitions than it says, or did not say. */
    tooLarge(portion: readonly KafkaRecord[], refused: readonly KafkaPartition[]): Error {
      for (const { topic, partition } of refused) {
        const mine = portion.filter((record) => record.topic === topic && record.partition === partition);
        const size = mine.reduce((sum, record) => sum + sizeOf(record), BATCH_OVERHEAD);
        const { single, several } = limits.get(topic) ?? UNLIMITED;
        const next = mine.length > 1
          ? { single, several: Math.min(several, Math.floor(size / 2)) }
          : { several, single: Math.min(single, size - 1) };
        limits.set(topic, next);
      }
      known.clear();
      const topics = [...new Set(refused.map(({ topic }) => topic))].join(", ");
      return new Error(`${name} did not take ${portion.length} records at once for ${topics}: it gets smaller portions`);
    },
  };
}

/** A message that may have been a record, as `./kafka-source` makes them. */
type FromKafka = Message & {
  readonly kafka?: Pick<KafkaRecord, "key"> & {
    readonly cluster?: string;
    readonly topic?: string;
    readonly headers: readonly (readonly [name: string, value: Uint8Array | null])[];
  };
};

/** Whose names these are does not depend on the message. */
const RESERVED = /^(ce_(specversion|id|source|type|time)|effectonce-(shard|position))$/i;

/** The messages that one becomes. */
async function transformed(message: Message, transform: Transform): Promise<readonly Message[]> {
  try {
    const answer = await transform(message);
    const all = answer === null ? [] : Array.isArray(answer) ? answer as readonly Transformed[] : [answer as Transformed];
    // Not taken for none: one that has forgotten its `return` would pass all over.
    if (all.some((one: unknown) => typeof one !== "object" || one === null)) {
      throw new TypeError("the function has answered neither an object, nor a list of some, nor null");
    }
    const { kafka } = message as FromKafka;
    return all.map(({ topic = message.topic, key, value, headers }, i) => {
      const fields = encodeMessage({
        id: i === 0 ? message.id : `${message.id}-${i}`,
        ...{ topic, value, headers: headers ?? message.headers },
        key: typeof key === "string" ? key : key === undefined ? message.key || null : null,
      });
      const made = createMessage({ ...fields, time: message.time });
      const bytes = key instanceof Uint8Array ? key : key === undefined ? kafka?.key : undefined;
      if (!bytes) return made;
      const own = headers || !kafka
        ? Object.entries(fields.headers).map(([name, text]) => [name, encoder.encode(text)] as const)
        : kafka.headers;
      return Object.assign(made, { kafka: { key: bytes, headers: own } });
    });
  } catch (error) {
    throw refusedMessage(message, error);
  }
}

// ----------------------------------------------------------------------------------------------------------------- cursor

/** How many positions are handed back, and how many keys the cursor topic has: compaction keeps the last one of each. */
const RING = 1000;
/** So many rows of positions are enough; see `boundRing` of the core. */
const RING_ROWS = 100_000;
/** Offsets of the cursor topic that are read at first. A batch takes two: its position, and the transaction's marker. */
const FIRST_LOOK = 64;
const MARK = encoder.encode("opened");

interface CursorRecord extends Position, PositionOwner {
  /** How many records the batches up to this one had: the position of the next record. */
  readonly records: number;
}

interface Mark extends PositionOwner {
  readonly opened: string;
}

const decoder = new TextDecoder();

/** A part of a topic's name: as it is, or a digest where topics have no such names. */
async function nameable(text: string): Promise<string> {
  return /^[\w.-]{1,90}$/.test(text) ? text : (await sha256(text)).slice(0, 32);
}

/** Where the position of a relay is kept. */
interface CursorPlace {
  readonly topic: string;
  readonly partition: number;
  /** Partitions that the topic needs. */
  readonly count: number;
}

async function placeOf({ relay, source, shard }: PositionOwner, cursorTopic: string | undefined): Promise<CursorPlace> {
  const whole = (shard?.of ?? source).replaceAll("/", ".");
  return {
    topic: cursorTopic ?? `effectonce-cursor-${await nameable(whole)}-${await nameable(relay)}`,
    partition: shard?.index ?? 0,
    count: shard?.count ?? 1,
  };
}

/** One spelling for all that write a position: Kafka shuts out an earlier writer only if it went by this very name. */
function transactionalId({ source, relay }: PositionOwner): string {
  return `effectonce-${source}-${relay}`;
}

function unusable(topic: string, why: string): EffectError {
  return new EffectError("sink_invalid", `Cannot use topic ${topic} for a relay's position: ${why}`);
}

function parseRecord(topic: string, value: Uint8Array | null): CursorRecord | Mark {
  try {
    const record: unknown = JSON.parse(decoder.decode(value ?? undefined));
    if (typeof record === "object" && record !== null && "relay" in record && ("opened" in record || "uid" in record)) {
      return record as CursorRecord | Mark;
    }
  } catch {
    // Told below.
  }
  throw unusable(topic, "it has other records as well. A cursor topic is for one relay alone");
}

/** Records of a cursor topic, which must be this relay's. */
function ownRecords(
  topic: string,
  { relay, source }: PositionOwner,
  records: readonly { readonly value: Uint8Array | null }[],
): readonly (CursorRecord | Mark)[] {
  return records.map(({ value }) => {
    const record = parseRecord(topic, value);
    if (record.relay === relay && record.source === source) return record;
    const theirs = `it is that of relay "${record.relay}" from source "${record.source}"`;
    throw unusable(topic, `${theirs}, and this is relay "${relay}" from source "${source}"`);
  });
}

/** Reads what is there before a mark that was just written. */
async function readUpTo(
  connection: KafkaConnection,
  { topic, partition }: CursorPlace,
  owner: PositionOwner,
  from: number,
  mark: { readonly opened: string; readonly offset: number },
  late: () => boolean,
): Promise<readonly CursorRecord[]> {
  const found: CursorRecord[] = [];
  for (let next = from;;) {
    const answer = await connection.read(topic, partition, next);
    next = answer.next;
    for (const record of ownRecords(topic, owner, answer.records)) {
      if ("uid" in record) found.push(record);
      else if (record.opened === mark.opened) return found;
    }
    if (next > mark.offset) throw new Error(`What was just written to ${topic} is not there: was it emptied meanwhile?`);
    if (late()) {
      throw new Error(`What was just written to ${topic} cannot be read: an earlier transaction there stays open`);
    }
  }
}

/** The last positions that follow on each other, oldest first. */
function chainOf(records: readonly CursorRecord[]): readonly CursorRecord[] {
  let from = Math.max(0, records.length - 1);
  const follows = (i: number) => records[i]!.n === records[i - 1]!.n + 1 && records[i]!.prev === records[i - 1]!.uid;
  while (from > 0 && follows(from)) from--;
  return records.slice(from).slice(-RING);
}

/** The positions before a mark, enough of them to repair a source that went back in time. */
async function readRing(
  connection: KafkaConnection,
  place: CursorPlace,
  owner: PositionOwner,
  mark: { readonly opened: string; readonly offset: number },
  waitMs: number,
  { now }: Pick<Runtime, "now">,
): Promise<readonly CursorRecord[]> {
  const deadline = now() + waitMs;
  const late = () => now() > deadline;
  for (let wanted = FIRST_LOOK;; wanted *= 4) {
    const from = Math.max(0, mark.offset - wanted);
    const ring = chainOf(await readUpTo(connection, place, owner, from, mark, late));
    if (isEnough(ring, from)) return ring;
  }
}

/** Whether there is no more, or no more is of use. */
function isEnough(ring: readonly Position[], from: number): boolean {
  return from === 0 || ring.length >= RING || ring.reduce((sum, { rows }) => sum + rows.length, 0) >= RING_ROWS;
}

/** Sees to it that the cursor topic exists, is one, and is nobody else's: before anything is written to it. */
async function prepareCursor(
  connection: KafkaConnection,
  { topic, count, partition }: CursorPlace,
  owner: PositionOwner,
  { copies, minInsyncReplicas }: KafkaSinkOptions,
): Promise<void> {
  if (await connection.partitions(topic) === 0) {
    const all = copies ?? Math.min(3, await connection.brokers());
    const settings = {
      "cleanup.policy": "compact",
      "min.insync.replicas": String(minInsyncReplicas ?? (all >= 3 ? 2 : 1)),
      "unclean.leader.election.enable": "false",
      "max.message.bytes": "16777216",
      "compression.type": "uncompressed", // kafkajs reads what is compressed by gzip only.
      "segment.bytes": "67108864",
    };
    await connection.create(topic, { partitions: count, copies: all, settings });
  }
  const policy = await connection.setting(topic, "cleanup.policy");
  if (policy !== undefined && policy !== "compact") {
    throw unusable(topic, `its cleanup.policy is "${policy}", which would delete it in time. Set it to "compact"`);
  }
  // A topic that is read may have been given more partitions.
  if (await connection.partitions(topic) < count) await connection.grow(topic, count);
  const { records } = await connection.read(topic, partition, 0);
  ownRecords(topic, owner, records);
}

// ------------------------------------------------------------------------------------------------------------------- sink

const nameOf = ({ topic, name }: KafkaSinkOptions): string =>
  name ?? (topic === undefined ? "kafka" : `kafka topic ${topic}`);

/**
 * Kafka as an atomic sink: exactly-once, for readers at `read_committed`.
 *
 * A record has the message's key, value and headers, and those of CloudEvents in binary mode: `ce_id`, `ce_source`, `ce_type`
 * (the message's topic), `ce_time`. `effectonce-shard` and `effectonce-position` number the records of a shard from 0: whoever
 * reads all partitions can see that none is missing. A key goes to the partition where Kafka's own producers put it; messages
 * without a key are spread, batch by batch. What is larger than its topic takes is parked; what is for a topic that does not
 * exist is tried again, and parked in the end.
 */
export function kafkaSink(client: KafkaClient, options: KafkaSinkOptions = {}): AtomicSink {
  const name = nameOf(options);
  const { transactionTimeoutMs = 30_000 } = options;
  if (!Number.isSafeInteger(transactionTimeoutMs) || transactionTimeoutMs < 1000) {
    throw new RangeError(`Cannot use transactionTimeoutMs ${transactionTimeoutMs}: it must be a whole number from 1000`);
  }
  const limits = new Map<string, Limits>();
  return {
    kind: "atomic",
    name,
    batch: 1000,
    conditions: ["who reads the topics does so at isolation.level=read_committed", "the cursor topic is not deleted"],
    fences: true,
    async open(owner) {
      const place = await placeOf(owner, options.cursorTopic);
      const connection = await client.open();
      try {
        return await openSession(connection, name, place, owner, { ...options, transactionTimeoutMs }, limits);
      } catch (error) {
        void connection.close();
        throw error;
      }
    },
  };
}

/** Shuts out whoever had a relay's position, and reads it. */
async function takeOver(
  connection: KafkaConnection,
  place: CursorPlace,
  owner: PositionOwner,
  { transactionTimeoutMs, runtime = realRuntime }: {
    readonly transactionTimeoutMs: number;
    readonly runtime?: Pick<Runtime, "now">;
  },
): Promise<{ readonly transactions: KafkaTransactions; readonly ring: readonly CursorRecord[] }> {
  const { relay, source } = owner;
  const { topic, partition } = place;
  // In this order: nobody can commit a position any more that is not in what is read then.
  const transactions = await connection.begin(transactionalId(owner), transactionTimeoutMs);
  const opened = crypto.randomUUID();
  const value = encoder.encode(JSON.stringify({ opened, relay, source } satisfies Mark));
  const marked = await transactions.send([{ topic, partition, key: MARK, value, headers: [] }]);
  await transactions.commit();
  const mark = { opened, offset: marked.offsetOf(topic, partition) ?? 0 };
  const ring = await readRing(connection, place, owner, mark, 2 * transactionTimeoutMs, runtime);
  return { transactions, ring };
}

async function openSession(
  connection: KafkaConnection,
  name: string,
  place: CursorPlace,
  owner: PositionOwner,
  options: KafkaSinkOptions & { readonly transactionTimeoutMs: number },
  limits: Map<string, Limits>,
): Promise<AtomicSession> {
  const { relay, source, shard } = owner;
  const { topic, partition } = place;
  const toCursor = (key: Uint8Array, value: CursorRecord): KafkaRecord => ({
    topic,
    partition,
    key,
    value: encoder.encode(JSON.stringify(value)),
    headers: [],
  });
  await prepareCursor(connection, place, owner, options);
  const { transactions, ring } = await takeOver(connection, place, owner, options);

  const { next, topicsOf, record, portions, tooLarge } = createRecords(connection, name, options, limits);
  let last: Position | undefined = ring.at(-1);
  let records = ring.at(-1)?.records ?? 0;
  let state: "open" | "broken" | "closed" = "open";
  const shardText = String(shard?.index ?? 0);
  return {
    ring: ring.map(({ n, uid, prev, rows }) => ({ n, uid, prev, rows })),
    async commit(batch) {
      if (state !== "open") {
        throw new EffectError("fenced", `Cannot commit batch ${batch.n}: this session of ${name} is ${state}, open another`);
      }
      checkAdvance(last, batch);
      const { n, uid, prev, rows, messages } = batch;
      await next();
      const first = records;
      const { transform } = options;
      const outs: Message[] = [];
      /** Of which message each is: that is refused, whatever has become of it. */
      const origins: Message[] = [];
      for (const message of messages) {
        const these = transform ? await transformed(message, transform) : [message];
        for (const out of these) origins[outs.push(out) - 1] = message;
      }
      const topics = await topicsOf(outs);
      const made = outs.map((out, i) =>
        record(out, origins[i]!, topics, [["effectonce-shard", shardText], ["effectonce-position", String(first + i)]])
      );
      const toSend = portions(made);
      const after = first + made.length;
      toSend.at(-1)!.push(toCursor(encoder.encode(String(n % RING)), { n, uid, prev, rows, records: after, relay, source }));
      // Whatever goes wrong from here on: only the cursor tells whether the batch is there.
      state = "broken";
      for (const portion of toSend) {
        const refused = (await transactions.send(portion)).tooLarge;
        if (refused.some((place) => place.topic === topic)) {
          throw unusable(
            topic,
            `it does not take the position of ${rows.length} rows: smaller batches (--batch), or more ${MAX_BYTES_NAME}`,
          );
        }
        if (refused.length > 0) throw tooLarge(portion, refused);
      }
      await transactions.commit();
      last = { n, uid, prev, rows };
      records = after;
      state = "open";
    },
    async close() {
      if (state === "closed") return;
      // A broker that has just failed may never answer.
      if (state === "open") await connection.close();
      else void connection.close();
      state = "closed";
    },
  };
}

// ----------------------------------------------------------------------------------------------------------- for operators

/** How a relay's position stands in Kafka. */
export interface KafkaCursor {
  /** The cursor topic. */
  readonly topic: string;
  /** Its partition. */
  readonly partition: number;
  /** The last positions, oldest first; empty if there is none. */
  readonly ring: readonly Position[];
  /** How many records the relay has committed. */
  readonly records: number;
}

/** Where the position of a relay is, or will be. */
export async function kafkaCursorPlace(
  owner: PositionOwner,
  options: Pick<KafkaSinkOptions, "cursorTopic"> = {},
): Promise<{ readonly topic: string; readonly partition: number }> {
  const { topic, partition } = await placeOf(owner, options.cursorTopic);
  return { topic, partition };
}

/** Looks at a relay's position, without keeping the relay from its work. */
export async function readKafkaCursor(
  client: KafkaClient,
  owner: PositionOwner,
  options: Pick<KafkaSinkOptions, "cursorTopic"> = {},
): Promise<KafkaCursor> {
  const { topic, partition } = await placeOf(owner, options.cursorTopic);
  const connection = await client.open();
  try {
    if (await connection.partitions(topic) <= partition) return { topic, partition, ring: [], records: 0 };
    const end = await connection.end(topic, partition);
    for (let wanted = FIRST_LOOK;; wanted *= 4) {
      const from = Math.max(0, end - wanted);
      const found: CursorRecord[] = [];
      for (let next = from; next < end;) {
        const answer = await connection.read(topic, partition, next);
        next = answer.next;
        found.push(...ownRecords(topic, owner, answer.records).filter((record) => "uid" in record));
      }
      const ring = chainOf(found);
      if (!isEnough(ring, from)) continue;
      return {
        ...{ topic, partition, records: ring.at(-1)?.records ?? 0 },
        ring: ring.map(({ n, uid, prev, rows }) => ({ n, uid, prev, rows })),
      };
    }
  } finally {
    await connection.close();
  }
}

/**
 * Sets a relay's position. What is behind it will be sent, what is before it will not: only whoever knows what is in Kafka should
 * do so. A relay that runs is shut out, and begins anew from there.
 */
export async function writeKafkaCursor(
  client: KafkaClient,
  owner: PositionOwner,
  position: Position,
  records: number,
  options: KafkaSinkOptions = {},
): Promise<void> {
  const { relay, source } = owner;
  const place = await placeOf(owner, options.cursorTopic);
  const { topic, partition } = place;
  const connection = await client.open();
  try {
    await prepareCursor(connection, place, owner, options);
    const transactions = await connection.begin(transactionalId(owner), options.transactionTimeoutMs ?? 30_000);
    const { n, uid, prev, rows } = position;
    const value = encoder.encode(JSON.stringify({ n, uid, prev, rows, records, relay, source } satisfies CursorRecord));
    const key = encoder.encode(String(n % RING));
    const { tooLarge } = await transactions.send([{ topic, partition, key, value, headers: [] }]);
    if (tooLarge.length > 0) {
      throw unusable(topic, `it does not take the position of ${rows.length} rows: more ${MAX_BYTES_NAME}`);
    }
    await transactions.commit();
  } finally {
    await connection.close();
  }
}

/**
 * Takes a relay's position from it, for good, and gives it to another name: whoever still has the old one is shut out, and finds
 * that its outbox refuses it. Repeating it is harmless.
 */
export async function moveKafkaCursor(
  client: KafkaClient,
  owner: PositionOwner,
  relay: string,
  options: Pick<KafkaSinkOptions, "transactionTimeoutMs" | "copies" | "minInsyncReplicas"> = {},
): Promise<void> {
  const { transactionTimeoutMs = 30_000 } = options;
  const [old, heir] = [owner, { ...owner, relay }];
  const place = await placeOf(old, undefined);
  const connection = await client.open();
  try {
    if (await connection.partitions(place.topic) <= place.partition) return; // It never began.
    const { ring } = await takeOver(connection, place, old, { transactionTimeoutMs });
    if (ring.length === 0) return;
    const next = await placeOf(heir, undefined);
    await prepareCursor(connection, next, heir, options);
    const transactions = await connection.begin(transactionalId(heir), transactionTimeoutMs);
    for (const { n, uid, prev, rows, records } of ring) {
      const value = encoder.encode(JSON.stringify({ n, uid, prev, rows, records, relay, source: owner.source }));
      await transactions.send([{ ...next, key: encoder.encode(String(n % RING)), value, headers: [] }]);
    }
    await transactions.commit();
  } finally {
    await connection.close();
  }
}

/** By how much clocks of writers and brokers may differ, in milliseconds. */
const SKEW_MS = 3_600_000;

/**
 * Looks for batches in the topics that they go to: answers the last one of which a message is there, and how many records the
 * relay has committed. Undefined if there is none of them.
 */
export async function findInKafka(
  client: KafkaClient,
  batches: readonly Batch[],
  owner: PositionOwner,
  options: Pick<KafkaSinkOptions, "topic"> = {},
): Promise<{ readonly n: number; readonly records: number } | undefined> {
  const connection = await client.open();
  try {
    const numbers = new Map<string, number>();
    const partitions = new Map<string, { topic: string; partition: number; since: number }>();
    for (const { n, messages } of batches) {
      for (const { id, topic: own, time } of messages) {
        const topic = options.topic ?? own;
        numbers.set(id, n);
        const count = await connection.partitions(topic);
        // In all of them: there may have been fewer when it was sent.
        for (let partition = 0; partition < count; partition++) {
          const place = `${partition} ${topic}`;
          const since = Math.min(partitions.get(place)?.since ?? Infinity, time.getTime() - SKEW_MS);
          partitions.set(place, { topic, partition, since });
        }
      }
    }
    const shard = String(owner.shard?.index ?? 0);
    let found: { n: number; records: number } | undefined;
    for (const { topic, partition, since } of partitions.values()) {
      const end = await connection.end(topic, partition);
      for (let next = await connection.since(topic, partition, new Date(since)); next < end;) {
        const answer = await connection.read(topic, partition, next);
        next = answer.next;
        for (const { headers } of answer.records) {
          const n = numbers.get(headers["ce_id"] ?? "");
          if (n === undefined || headers["effectonce-shard"] !== shard) continue;
          const records = Number(headers["effectonce-position"]) + 1;
          found = { n: Math.max(n, found?.n ?? 0), records: Math.max(records, found?.records ?? 0) };
        }
      }
    }
    return found;
  } finally {
    await connection.close();
  }
}

// ---------------------------------------------------------------------------------------------------- without transactions

/** How {@linkcode kafkaPlainSink} works. */
export type KafkaPlainSinkOptions = Pick<KafkaSinkOptions, "name" | "topic" | "createTopics" | "source">;

/** Messages that are sent together at most. */
const TOGETHER = 1000;

/**
 * Kafka as a sink without transactions, for users who may not use them: at-least-once. Records are those of
 * {@linkcode kafkaSink} but for `effectonce-shard` and `effectonce-position`. Close it in the end.
 */
export function kafkaPlainSink(client: KafkaClient, options: KafkaPlainSinkOptions = {}): CallSink & AsyncDisposable {
  const name = nameOf(options);
  const limits = new Map<string, Limits>();
  const queue: { readonly message: Message; resolve(answer: Json): void; reject(error: unknown): void }[] = [];
  let busy = false;
  let opened: Promise<Opened> | undefined;

  async function open() {
    const connection = await client.open();
    try {
      const producer = await connection.begin(null, 30_000);
      return { connection, producer, ...createRecords(connection, name, options, limits) };
    } catch (error) {
      void connection.close();
      throw error;
    }
  }
  type Opened = Awaited<ReturnType<typeof open>>;

  async function send(group: typeof queue): Promise<void> {
    let connection: KafkaConnection | undefined;
    try {
      const { producer, next, topicsOf, record, portions, tooLarge, ...rest } = await (opened ??= open());
      connection = rest.connection;
      await next();
      const topics = await topicsOf(group.map(({ message }) => message));
      const made: KafkaRecord[] = [];
      const sent: typeof queue = [];
      for (const item of group) {
        try {
          made.push(record(item.message, item.message, topics, []));
          sent.push(item);
        } catch (error) {
          item.reject((error as Error).cause ?? error);
        }
      }
      for (const portion of portions(made)) {
        const refused = (await producer.send(portion)).tooLarge;
        if (refused.length > 0) throw tooLarge(portion, refused);
      }
      for (const { resolve } of sent) resolve(null);
    } catch (error) {
      opened = undefined;
      void connection?.close();
      for (const { reject } of group) reject(error); // Of those that are answered already nobody hears it.
    }
  }
  async function flush(): Promise<void> {
    while (queue.length > 0) await send(queue.splice(0, TOGETHER));
    busy = false;
  }
  return {
    kind: "call",
    name,
    repeat: "always",
    deliver: (message) =>
      new Promise((resolve, reject) => {
        queue.push({ message, resolve, reject });
        if (busy) return;
        busy = true;
        queueMicrotask(flush);
      }),
    async [Symbol.asyncDispose]() {
      const last = await opened?.catch(() => undefined);
      opened = undefined;
      await last?.connection.close();
    },
  };
}
