/**
 * Connects `npm:kafkajs` with `./kafka`: kafkajs keeps the connections, logs in and finds the brokers; what is said in a
 * transaction is said from here.
 *
 * kafkajs encodes a record with headers in about 50 µs, does not repeat a refused EndTxn, asks who the coordinator is before
 * each request, and is not maintained any more. So records are encoded here, and requests of a transaction are repeated if,
 * and only if, a broker says that it has not done them.
 *
 * ```ts ignore
 * import { kafkaSink } from "@effectonce/effectonce/kafka";
 * import { kafkajs } from "@effectonce/effectonce/kafkajs";
 * import { Kafka, logLevel } from "kafkajs";
 *
 * const sink = kafkaSink(kafkajs(new Kafka({ brokers: ["127.0.0.1:9092"], logLevel: logLevel.NOTHING })));
 * ```
 *
 * @module
 */
import { Buffer } from "node:buffer";
import { EffectError } from "../mod.ts";
import type { KafkaPartition, KafkaRecord, KafkaTransactions, TopicOptions } from "./kafka.ts";
import type { Fetched, FetchedRecord, KafkaMember, KafkaSourceClient, KafkaSourceConnection } from "./kafka_source.ts";

// -------------------------------------------------------------------------------------------------------- what kafkajs has

/** What is called of kafkajs' `Kafka`. */
export interface KafkajsKafka {
  /**
   * Makes a consumer. It is not used as one, since it reads by way of a consumer group only. But its assigners of partitions
   * are given the cluster, which is what all else in kafkajs works with.
   */
  consumer(options: {
    readonly groupId: string;
    readonly allowAutoTopicCreation: boolean;
    // deno-lint-ignore no-explicit-any -- kafkajs' own type of an assigner, which is none here
    readonly partitionAssigners: any[];
  }): unknown;
}

interface Cluster {
  connect(): Promise<void>;
  disconnect(): Promise<void>;
  addTargetTopic(topic: string): Promise<void>;
  refreshMetadata(): Promise<void>;
  getNodeIds(): readonly unknown[];
  findTopicPartitionMetadata(topic: string): readonly { readonly replicas: readonly number[] }[];
  readonly brokerPool: {
    readonly connectionPoolBuilder: { build(to?: unknown): Promise<{ readonly pool: readonly Connection[] }> };
    readonly metadata: { readonly clusterId?: string | null } | null;
    readonly versions: Readonly<Record<number, { readonly maxVersion: number }>> | null;
  };
  findLeaderForPartitions(topic: string, partitions: readonly number[]): { readonly [leader: string]: readonly number[] };
  findBroker(node: { readonly nodeId: string }): Promise<Broker>;
  findControllerBroker(): Promise<Broker>;
  findGroupCoordinator(of: { readonly groupId: string; readonly coordinatorType: number }): Promise<Broker>;
  fetchTopicsOffset(
    topics: readonly (
      & { topic: string; partitions: readonly { partition: number }[] }
      & (
        | { fromBeginning: boolean }
        | { fromTimestamp: number }
      )
    )[],
  ): Promise<readonly { readonly partitions: readonly { readonly offset: string }[] }[]>;
}

interface Connection {
  isConnected(): boolean;
  rejectRequests(error: Error): void;
  connect(): Promise<unknown>;
  /** What has come of an answer, and how much of it is needed to go on. */
  chunks: readonly Buffer[];
  bytesBuffered: number;
  bytesNeeded: number;
}

interface Broker {
  readonly connectionPool: { send(request: Request): Promise<unknown> };
  initProducerId(options: { transactionalId: string | undefined; transactionTimeout: number }): Promise<Producer>;
  addPartitionsToTxn(
    options: Producer & { transactionalId: string; topics: readonly { topic: string; partitions: readonly number[] }[] },
  ): Promise<unknown>;
  endTxn(options: Producer & { transactionalId: string; transactionResult: boolean }): Promise<unknown>;
  findGroupCoordinator(of: { readonly groupId: string; readonly coordinatorType: number }): Promise<unknown>;
  joinGroup(options: {
    groupId: string;
    memberId: string;
    sessionTimeout: number;
    rebalanceTimeout: number;
    groupProtocols: readonly { name: string; metadata: Buffer }[];
  }): Promise<{
    readonly generationId: number;
    readonly memberId: string;
    readonly leaderId: string;
    readonly members: readonly { readonly memberId: string; readonly memberMetadata: Buffer }[];
  }>;
  syncGroup(
    options: Membership & { groupAssignment: readonly { memberId: string; memberAssignment: Buffer }[] },
  ): Promise<{ readonly memberAssignment: Buffer }>;
  heartbeat(options: { groupId: string; groupGenerationId: number; memberId: string }): Promise<unknown>;
  leaveGroup(options: { groupId: string; memberId: string }): Promise<unknown>;
  offsetCommit(options: {
    groupId: string;
    groupGenerationId: number;
    memberId: string;
    topics: readonly {
      topic: string;
      partitions: readonly { partition: number; offset: string; metadata: string }[];
    }[];
  }): Promise<unknown>;
  offsetFetch(
    options: { groupId: string; topics: readonly { topic: string; partitions: readonly { partition: number }[] }[] },
  ): Promise<{
    readonly responses: readonly {
      readonly partitions: readonly { readonly offset: string; readonly metadata: string | null }[];
    }[];
  }>;
  createTopics(options: { topics: readonly unknown[]; timeout: number }): Promise<unknown>;
  createPartitions(options: {
    topicPartitions: readonly { topic: string; count: number }[];
    timeout: number;
  }): Promise<unknown>;
  describeConfigs(options: { resources: readonly unknown[] }): Promise<{
    readonly resources: readonly {
      readonly configEntries: readonly { readonly configName: string; readonly configValue: string }[];
    }[];
  }>;
  fetch(options: {
    isolationLevel: number;
    maxWaitTime: number;
    minBytes: number;
    maxBytes: number;
    topics: readonly {
      topic: string;
      partitions: readonly { partition: number; fetchOffset: string; maxBytes: number }[];
    }[];
  }): Promise<{ readonly responses: readonly { readonly partitions: readonly FetchedPartition[] }[] }>;
}

/** Who produces: an id, and how often it was taken over. */
interface Producer {
  /** 64 bits. */
  readonly producerId: string;
  readonly producerEpoch: number;
}

/** A membership in a group, in one of its generations. */
interface Membership {
  readonly groupId: string;
  readonly generationId: number;
  readonly memberId: string;
}

interface FetchedPartition {
  readonly partition: number;
  readonly lastStableOffset: string;
  readonly abortedTransactions: readonly { readonly producerId: string; readonly firstOffset: string }[] | null;
  readonly messages: readonly {
    readonly offset: string;
    readonly timestamp: string;
    readonly key: Buffer | null;
    readonly value: Buffer | null;
    readonly headers?: Readonly<Record<string, Buffer | readonly Buffer[] | null>>;
    readonly isControlRecord: boolean;
    readonly batchContext: { readonly producerId: string; readonly inTransaction: boolean };
  }[];
}

/** A request as kafkajs sends it. */
interface Request {
  readonly request: {
    readonly apiKey: number;
    readonly apiVersion: number;
    readonly apiName: string;
    readonly encode: () => Promise<{ readonly buf: Buffer; readonly buffer: Buffer }>;
  };
  readonly response: {
    readonly decode: (payload: Buffer) => Promise<{ readonly clientSideThrottleTime: number } & ProduceAnswer>;
    readonly parse: (answer: ProduceAnswer) => Promise<ProduceAnswer>;
  };
}

interface ProduceAnswer {
  readonly partitions: readonly {
    readonly topic: string;
    readonly partition: number;
    readonly errorCode: number;
    readonly baseOffset: number;
  }[];
}

function clusterOf(kafka: KafkajsKafka): Connected {
  let found: Cluster | undefined;
  kafka.consumer({
    groupId: "effectonce-unused",
    allowAutoTopicCreation: false,
    partitionAssigners: [({ cluster }: { readonly cluster: Cluster }) => {
      found = cluster;
      return { name: "unused", version: 0 };
    }],
  });
  if (!found?.brokerPool?.connectionPoolBuilder) {
    throw new TypeError("Cannot use this Kafka client: it is not kafkajs 2, whose assigners are given the cluster");
  }
  return { cluster: found, connections: beginAnew(found.brokerPool.connectionPoolBuilder) };
}

/** A cluster, and the connections that there have been to it. */
interface Connected {
  readonly cluster: Cluster;
  readonly connections: ReadonlySet<Connection>;
}

/** How many bytes tell how long an answer is. */
const LENGTH_OF_ANSWER = 4;

/**
 * Has connections forget what they were in the middle of. kafkajs keeps what has come of an answer when the connection breaks, and
 * takes what comes over the next one for the rest of it, from where it never finds back: https://github.com/tulios/kafkajs/issues/715
 */
function beginAnew(builder: Cluster["brokerPool"]["connectionPoolBuilder"]): ReadonlySet<Connection> {
  const { build } = builder;
  const connections = new Set<Connection>();
  builder.build = async (to) => {
    const made = await build(to);
    for (const connection of made.pool) {
      const { connect } = connection;
      connections.add(connection);
      connection.connect = () => {
        if (!connection.isConnected()) {
          Object.assign(connection, { chunks: [], bytesBuffered: 0, bytesNeeded: LENGTH_OF_ANSWER });
        }
        return connect.call(connection);
      };
    }
    return made;
  };
  return connections;
}

/** Does not wait for answers, which a broker may keep back until there are records, or for as long as it hangs. */
async function disconnect({ cluster, connections }: Connected): Promise<void> {
  for (const connection of connections) connection.rejectRequests(new Error("The connection is closed"));
  await cluster.disconnect().catch(() => {});
}

// ----------------------------------------------------------------------------------------------------------------- errors

/** The protocol's numbers of errors that are decided about here. https://kafka.apache.org/protocol#protocol_error_codes */
const CODES: Readonly<Record<number, string>> = {
  3: "UNKNOWN_TOPIC_OR_PARTITION",
  5: "LEADER_NOT_AVAILABLE",
  6: "NOT_LEADER_OR_FOLLOWER",
  7: "REQUEST_TIMED_OUT",
  10: "MESSAGE_TOO_LARGE",
  17: "INVALID_TOPIC_EXCEPTION",
  18: "RECORD_LIST_TOO_LARGE",
  19: "NOT_ENOUGH_REPLICAS",
  20: "NOT_ENOUGH_REPLICAS_AFTER_APPEND",
  29: "TOPIC_AUTHORIZATION_FAILED",
  45: "OUT_OF_ORDER_SEQUENCE_NUMBER",
  47: "INVALID_PRODUCER_EPOCH",
  48: "INVALID_TXN_STATE",
  49: "INVALID_PRODUCER_ID_MAPPING",
  53: "TRANSACTIONAL_ID_AUTHORIZATION_FAILED",
  56: "KAFKA_STORAGE_ERROR",
  59: "UNKNOWN_PRODUCER_ID",
  87: "INVALID_RECORD",
  90: "PRODUCER_FENCED",
};

/** The protocol's names of what went wrong, wherever kafkajs has put them. */
function typesOf(error: unknown): readonly string[] {
  if (typeof error !== "object" || error === null) return [];
  const { name, type, code, cause, originalError, errors } = error as Readonly<Record<string, unknown>>;
  return [
    ...name === "KafkaJSSASLAuthenticationError" ? ["SASL_AUTHENTICATION_FAILED"] : [],
    ...typeof type === "string" ? [type] : [],
    ...typeof code === "number" && code in CODES ? [CODES[code]!] : [],
    ...cause === error ? [] : typesOf(cause),
    ...originalError === error ? [] : typesOf(originalError),
    ...Array.isArray(errors) ? errors.flatMap(typesOf) : [],
  ];
}

const isOneOf = (error: unknown, types: readonly string[]): boolean => typesOf(error).some((type) => types.includes(type));

/** Whoever took the transactional id over, or the coordinator that gave a transaction up, has raised the epoch. */
const FENCED = ["INVALID_PRODUCER_EPOCH", "PRODUCER_FENCED", "INVALID_PRODUCER_ID_MAPPING"];
const FORBIDDEN = [
  "TRANSACTIONAL_ID_AUTHORIZATION_FAILED",
  "CLUSTER_AUTHORIZATION_FAILED",
  "TOPIC_AUTHORIZATION_FAILED",
  "GROUP_AUTHORIZATION_FAILED",
  "INVALID_GROUP_ID",
  "SASL_AUTHENTICATION_FAILED",
  "UNSUPPORTED_SASL_MECHANISM",
  "ILLEGAL_SASL_STATE",
];
const TOO_LARGE = ["MESSAGE_TOO_LARGE", "RECORD_LIST_TOO_LARGE"];
const unknownPartition = (topic: string): Error =>
  Object.assign(new Error(`Kafka knows no such partition of topic ${topic} yet`), { type: "UNKNOWN_TOPIC_OR_PARTITION" });
/** What a broker that is not the leader, or has too few followers, has not taken. */
const NOT_TAKEN = ["UNKNOWN_TOPIC_OR_PARTITION", "LEADER_NOT_AVAILABLE", "NOT_LEADER_OR_FOLLOWER", "NOT_ENOUGH_REPLICAS"];
/** What a coordinator has not done, and will do if it is asked again, or if the right one is asked. */
const NOT_DONE = [
  "CONCURRENT_TRANSACTIONS",
  "COORDINATOR_LOAD_IN_PROGRESS",
  "COORDINATOR_NOT_AVAILABLE",
  "NOT_COORDINATOR",
  // As kafkajs calls them.
  "GROUP_LOAD_IN_PROGRESS",
  "GROUP_COORDINATOR_NOT_AVAILABLE",
  "NOT_COORDINATOR_FOR_GROUP",
];

function explained(error: unknown): unknown {
  if (error instanceof EffectError) return error;
  const [type] = typesOf(error);
  const why = `${(error as Error).message}${type === undefined ? "" : ` (${type})`}`;
  if (isOneOf(error, FENCED)) {
    const who = "another relay of this name has taken over, or a transaction took longer than its time-out";
    return new EffectError("fenced", `Kafka takes no more records from this relay: ${who}`, { cause: error });
  }
  if (isOneOf(error, FORBIDDEN)) return new EffectError("sink_invalid", `Kafka refuses: ${why}`, { cause: error });
  return error;
}

// ---------------------------------------------------------------------------------------------------------------- records

const utf8 = new TextEncoder();

/**
 * CRC-32C (Castagnoli), reflected: RFC 3720, appendix B.4. Four tables, of bytes that 0 to 3 others follow, for four bytes at
 * a time: M. Kounavis and F. Berry, "Novel Table Lookup-Based Algorithms for High-Performance CRC Generation" (2008).
 */
const CRC_TABLES = new Int32Array(4 * 256);
for (let i = 0; i < CRC_TABLES.length; i++) {
  let crc = i < 256 ? i : CRC_TABLES[i - 256]!;
  for (let bit = 0; bit < 8; bit++) crc = crc & 1 ? crc >>> 1 ^ 0x82f63b78 : crc >>> 1;
  CRC_TABLES[i] = crc;
}

function crc32c(bytes: Uint8Array, from: number, to: number): number {
  const t = CRC_TABLES;
  let crc = -1;
  let i = from;
  for (; i + 4 <= to; i += 4) {
    const x = crc ^ (bytes[i]! | bytes[i + 1]! << 8 | bytes[i + 2]! << 16 | bytes[i + 3]! << 24);
    crc = t[768 + (x & 255)]! ^ t[512 + (x >>> 8 & 255)]! ^ t[256 + (x >>> 16 & 255)]! ^ t[x >>> 24]!;
  }
  for (; i < to; i++) crc = t[(crc ^ bytes[i]!) & 255]! ^ crc >>> 8;
  return ~crc >>> 0;
}

/** A buffer that grows. Numbers are big-endian; varints are zigzag, as in protocol buffers. */
class Writer {
  bytes: Buffer;
  at = 0;
  constructor(size: number) {
    this.bytes = Buffer.allocUnsafe(size);
  }

  reserve(size: number): void {
    if (this.at + size <= this.bytes.length) return;
    const grown = Buffer.allocUnsafe(Math.max(this.bytes.length * 2, this.at + size));
    this.bytes.copy(grown, 0, 0, this.at);
    this.bytes = grown;
  }
  int8(value: number): void {
    this.reserve(1);
    this.at = this.bytes.writeInt8(value, this.at);
  }
  int16(value: number): void {
    this.reserve(2);
    this.at = this.bytes.writeInt16BE(value, this.at);
  }
  int32(value: number): void {
    this.reserve(4);
    this.at = this.bytes.writeInt32BE(value, this.at);
  }
  int64(value: number | bigint): void {
    this.reserve(8);
    this.at = this.bytes.writeBigInt64BE(BigInt(value), this.at);
  }
  varint(value: number): void {
    this.reserve(5);
    let zigzag = (value << 1 ^ value >> 31) >>> 0;
    for (; zigzag > 0x7f; zigzag >>>= 7) this.bytes[this.at++] = zigzag & 0x7f | 0x80;
    this.bytes[this.at++] = zigzag;
  }
  raw(bytes: Uint8Array): void {
    this.reserve(bytes.length);
    this.bytes.set(bytes, this.at);
    this.at += bytes.length;
  }
  /** A length and bytes; null has length -1. */
  field(value: Uint8Array | string | null): void {
    if (value === null) return this.varint(-1);
    if (typeof value === "string") {
      // Most are short and ASCII: the length is the number of characters, and it is one byte.
      if (value.length < 64 && this.ascii(value)) return;
      value = utf8.encode(value);
    }
    this.varint(value.length);
    this.raw(value);
  }
  /** Writes a text shorter than 64 characters as a field; false, and nothing is written, if it is not ASCII. */
  ascii(text: string): boolean {
    const { length } = text;
    this.reserve(length + 1);
    const { bytes, at } = this;
    for (let i = 0; i < length; i++) {
      const code = text.charCodeAt(i);
      if (code > 0x7f) return false;
      bytes[at + 1 + i] = code;
    }
    bytes[at] = length << 1;
    this.at = at + 1 + length;
    return true;
  }
  string(text: string | null): void {
    if (text === null) return this.int16(-1);
    const bytes = utf8.encode(text);
    this.int16(bytes.length);
    this.raw(bytes);
  }
}

/** Where the record's length will be: a varint of a record below 256 MiB has 4 bytes at most. */
const LENGTH_BYTES = 4;

/** What most records take at most: those with long names or with texts that are not ASCII may take more. */
function usualSizeOf({ key, value, headers }: KafkaRecord): number {
  let size = 32 + (key?.length ?? 0) + (value?.length ?? 0);
  for (const [name, text] of headers) size += 4 + name.length + text.length;
  return size;
}

function writeRecord(to: Writer, { key, value, headers }: KafkaRecord, offsetDelta: number): void {
  to.reserve(LENGTH_BYTES + 1);
  const start = to.at;
  to.at += LENGTH_BYTES;
  const from = to.at;
  to.int8(0); // attributes
  to.varint(0); // timestampDelta
  to.varint(offsetDelta);
  to.field(key);
  to.field(value);
  to.varint(headers.length);
  for (const [name, text] of headers) {
    to.field(name);
    to.field(text);
  }
  const end = to.at;
  to.at = start;
  to.varint(end - from);
  to.bytes.copyWithin(to.at, from, end);
  to.at += end - from;
}

/** A batch of records for one partition. https://kafka.apache.org/documentation/#recordbatch */
function writeBatch(
  to: Writer,
  records: readonly KafkaRecord[],
  { producerId, producerEpoch }: Producer,
  sequence: number,
  transactional: boolean,
): void {
  const now = Date.now();
  const start = to.at;
  to.int64(0); // baseOffset
  to.int32(0); // batchLength, below
  to.int32(-1); // partitionLeaderEpoch
  to.int8(2); // magic
  to.int32(0); // crc, below
  const covered = to.at;
  to.int16(transactional ? 0x10 : 0); // attributes
  to.int32(records.length - 1); // lastOffsetDelta
  to.int64(now); // baseTimestamp
  to.int64(now); // maxTimestamp
  to.int64(BigInt(producerId));
  to.int16(producerEpoch);
  to.int32(sequence); // baseSequence
  to.int32(records.length);
  records.forEach((record, i) => writeRecord(to, record, i));
  to.bytes.writeInt32BE(to.at - start - 12, start + 8);
  to.bytes.writeUInt32BE(crc32c(to.bytes, covered, to.at), covered - 4);
}

/** Records of one request, by topic and partition. */
type ByPartition = ReadonlyMap<string, ReadonlyMap<number, readonly KafkaRecord[]>>;

const PRODUCE = 0;
/** The youngest without "flexible" fields that all brokers since 2.1 know. */
const PRODUCE_VERSION = 7;
const ALL_REPLICAS = -1;

function produceRequest(
  byPartition: ByPartition,
  transactionalId: string | null,
  timeoutMs: number,
  producer: Producer,
  sequenceOf: (topic: string, partition: number) => number,
): Request {
  const encode = () => {
    let size = 1024;
    for (const partitions of byPartition.values()) {
      for (const records of partitions.values()) {
        size += 128;
        for (const record of records) size += usualSizeOf(record);
      }
    }
    const to = new Writer(size);
    to.string(transactionalId);
    to.int16(ALL_REPLICAS);
    to.int32(timeoutMs);
    to.int32(byPartition.size);
    for (const [topic, partitions] of byPartition) {
      to.string(topic);
      to.int32(partitions.size);
      for (const [partition, records] of partitions) {
        to.int32(partition);
        const length = to.at;
        to.int32(0);
        writeBatch(to, records, producer, sequenceOf(topic, partition), transactionalId !== null);
        to.bytes.writeInt32BE(to.at - length - 4, length);
      }
    }
    const bytes = to.bytes.subarray(0, to.at);
    return Promise.resolve({ buf: bytes, buffer: bytes });
  };
  return {
    request: { apiKey: PRODUCE, apiVersion: PRODUCE_VERSION, apiName: "Produce", encode },
    response: {
      decode: (payload) => Promise.resolve(readProduceAnswer(payload)),
      parse: (answer) => Promise.resolve(answer),
    },
  };
}

function readProduceAnswer(payload: Buffer): ProduceAnswer & { readonly clientSideThrottleTime: number } {
  let at = 0;
  const int16 = () => payload.readInt16BE((at += 2) - 2);
  const int32 = () => payload.readInt32BE((at += 4) - 4);
  const int64 = () => Number(payload.readBigInt64BE((at += 8) - 8));
  const partitions = [];
  for (let topics = int32(); topics > 0; topics--) {
    const length = int16();
    const topic = payload.toString("utf8", at, at += length);
    for (let left = int32(); left > 0; left--) {
      const found = { topic, partition: int32(), errorCode: int16(), baseOffset: int64() };
      int64(); // log_append_time
      int64(); // log_start_offset
      partitions.push(found);
    }
  }
  return { partitions, clientSideThrottleTime: int32() };
}

// ----------------------------------------------------------------------------------------------------------- transactions

/** CoordinatorType of the protocol. */
const TRANSACTION_COORDINATOR = 1;
const MAX_SEQUENCE = 2 ** 31;

const pause = (ms: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, ms));

/**
 * Asks again for what was not done, at first soon: the next transaction has to wait until the markers of the last one are
 * written, which takes a few milliseconds.
 */
async function patiently<T>(untilMs: number, types: readonly string[], run: (again: boolean) => Promise<T>): Promise<T> {
  const deadline = performance.now() + untilMs;
  for (let tries = 0;; tries++) {
    try {
      return await run(tries > 0);
    } catch (error) {
      if (!isOneOf(error, types) || performance.now() > deadline) throw error;
      await pause(Math.min(100, 2 * 1.3 ** tries));
    }
  }
}

async function findCoordinator(cluster: Cluster, of: Parameters<Cluster["findGroupCoordinator"]>[0]): Promise<Broker> {
  return await cluster.findGroupCoordinator(of).catch(async (error) => {
    // kafkajs keeps to itself why no broker has answered: it may be that this user may not use the id, or the group.
    await (await cluster.findControllerBroker()).findGroupCoordinator(of);
    throw error;
  });
}

async function openTransactions(
  cluster: Cluster,
  transactionalId: string | null,
  timeoutMs: number,
): Promise<KafkaTransactions> {
  let known: Broker | undefined;
  const ask = <T>(run: (broker: Broker) => Promise<T>): Promise<T> =>
    patiently(timeoutMs, NOT_DONE, async (again) => {
      if (again) known = undefined;
      const of = { groupId: transactionalId!, coordinatorType: TRANSACTION_COORDINATOR };
      known ??= transactionalId === null ? await cluster.findControllerBroker() : await findCoordinator(cluster, of);
      return await run(known);
    });
  const init = { transactionalId: transactionalId ?? undefined, transactionTimeout: timeoutMs };
  const producer = await ask((broker) => broker.initProducerId(init));
  const sequences = new Map<string, number>();
  const sequenceKey = (topic: string, partition: number) => `${partition} ${topic}`;
  const sequenceOf = (topic: string, partition: number) => sequences.get(sequenceKey(topic, partition)) ?? 0;
  let joined = new Set<string>();

  /** Tells the coordinator which partitions the transaction writes to, before it does. */
  async function join(byPartition: ByPartition): Promise<void> {
    if (transactionalId === null) return;
    const added: string[] = [];
    const topics = Array.from(byPartition, ([topic, partitions]) => ({
      topic,
      partitions: [...partitions.keys()].filter((partition) => {
        const key = sequenceKey(topic, partition);
        if (joined.has(key)) return false;
        added.push(key);
        return true;
      }),
    })).filter(({ partitions }) => partitions.length > 0);
    if (topics.length === 0) return;
    const add = (topics: readonly { topic: string; partitions: readonly number[] }[]) =>
      ask((broker) => broker.addPartitionsToTxn({ transactionalId, ...producer, topics }));
    try {
      await add(topics);
    } catch (error) {
      // Where one is refused, none is added, and it may be another one's answer that kafkajs throws: each alone tells.
      if (topics.length > 1 && isOneOf(error, ["OPERATION_NOT_ATTEMPTED"])) {
        for (const topic of topics) await add([topic]);
      }
      throw error;
    }
    for (const key of added) joined.add(key);
  }

  /** The leaders of the partitions, each with its own. */
  function byLeader(byPartition: ByPartition): ReadonlyMap<string, ByPartition> {
    const leaders = new Map<string, Map<string, Map<number, readonly KafkaRecord[]>>>();
    for (const [topic, partitions] of byPartition) {
      const found = cluster.findLeaderForPartitions(topic, [...partitions.keys()]);
      // A partition that kafkajs does not know, as of a topic that was made anew with fewer, it leaves out without a word.
      if (Object.values(found).flat().length < partitions.size) {
        throw new Error(`Kafka has no partition ${[...partitions.keys()].join(" or ")} of topic ${topic} any more`);
      }
      for (const [leader, numbers] of Object.entries(found)) {
        const topics = leaders.get(leader) ?? new Map<string, Map<number, readonly KafkaRecord[]>>();
        leaders.set(leader, topics);
        topics.set(topic, new Map(numbers.map((partition) => [partition, partitions.get(partition)!])));
      }
    }
    return leaders;
  }

  /** Sends each leader its records; answers those that leaders have not taken because they are none. */
  async function produce(byPartition: ByPartition, offsets: Map<string, number>) {
    const left = new Map<string, Map<number, readonly KafkaRecord[]>>();
    const tooLarge: KafkaPartition[] = [];
    await Promise.all(Array.from(byLeader(byPartition), async ([nodeId, mine]) => {
      const broker = await cluster.findBroker({ nodeId });
      const request = produceRequest(mine, transactionalId, timeoutMs, producer, sequenceOf);
      const { partitions } = await broker.connectionPool.send(request) as ProduceAnswer;
      for (const { topic, partition, errorCode, baseOffset } of partitions) {
        const type = errorCode === 0 ? undefined : CODES[errorCode] ?? `error ${errorCode}`;
        const records = mine.get(topic)!.get(partition)!;
        if (type !== undefined && NOT_TAKEN.includes(type)) {
          left.set(topic, (left.get(topic) ?? new Map<number, readonly KafkaRecord[]>()).set(partition, records));
        } else if (type !== undefined && TOO_LARGE.includes(type)) {
          tooLarge.push({ topic, partition });
        } else if (type !== undefined) {
          throw Object.assign(new Error(`Kafka did not take records for ${topic}: ${type}`), { type });
        } else {
          offsets.set(sequenceKey(topic, partition), baseOffset);
          sequences.set(sequenceKey(topic, partition), (sequenceOf(topic, partition) + records.length) % MAX_SEQUENCE);
        }
      }
    }));
    return { left, tooLarge };
  }

  return {
    async send(records) {
      const byPartition = new Map<string, Map<number, KafkaRecord[]>>();
      for (const record of records) {
        let partitions = byPartition.get(record.topic);
        if (!partitions) byPartition.set(record.topic, partitions = new Map());
        const list = partitions.get(record.partition);
        if (list) list.push(record);
        else partitions.set(record.partition, [record]);
      }
      try {
        for (const topic of byPartition.keys()) await cluster.addTargetTopic(topic);
        await join(byPartition);
        const offsets = new Map<string, number>();
        const deadline = performance.now() + timeoutMs;
        let rest: ByPartition = byPartition;
        for (let tries = 0;; tries++) {
          const { left, tooLarge } = await produce(rest, offsets);
          if (left.size === 0 || tooLarge.length > 0) {
            return { tooLarge, offsetOf: (topic, partition) => offsets.get(sequenceKey(topic, partition)) };
          }
          if (performance.now() > deadline) throw new Error(`Kafka has no leader for topic ${[...left.keys()].join(", ")}`);
          // The same sequence numbers again: should a leader have taken them all the same, the next one knows.
          rest = left;
          await pause(Math.min(200, 10 * 1.5 ** tries));
          await cluster.refreshMetadata();
        }
      } catch (error) {
        throw explained(error);
      }
    },
    async commit() {
      if (transactionalId === null || joined.size === 0) return;
      try {
        await ask((broker) => broker.endTxn({ transactionalId, ...producer, transactionResult: true }));
      } catch (error) {
        throw explained(error);
      }
      joined = new Set();
    },
  };
}

// ---------------------------------------------------------------------------------------------------------------- reading

/** Without the records of transactions that were given up, and the control records. */
function toFetched({ messages, abortedTransactions, lastStableOffset }: FetchedPartition, from: number): Fetched {
  const aborted = [...abortedTransactions ?? []].sort((a, b) => Number(a.firstOffset) - Number(b.firstOffset));
  const open = new Set<string>();
  const records: FetchedRecord[] = [];
  let next = from;
  for (const { offset: text, timestamp, key, value, headers = {}, isControlRecord, batchContext } of messages) {
    const offset = Number(text);
    while (aborted.length > 0 && Number(aborted[0]!.firstOffset) <= offset) open.add(aborted.shift()!.producerId);
    // The end of a transaction is a control record of its producer. https://kafka.apache.org/documentation/#controlbatch
    if (isControlRecord) open.delete(batchContext.producerId);
    if (offset < next) continue;
    next = offset + 1;
    if (isControlRecord || batchContext.inTransaction && open.has(batchContext.producerId)) continue;
    const all = Object.entries(headers).flatMap(([name, value]) =>
      (Array.isArray(value) ? value : [value]).map((one: Uint8Array | null) => [name, one] as const)
    );
    records.push({ offset, timestamp: Number(timestamp), key, value, headers: all });
  }
  // A batch that compaction has emptied has no records, but offsets. Of a partition that was asked for alone a batch is always there.
  if (next === from && Number(lastStableOffset) > from) next++;
  return { records, next, outOfRange: false };
}

// ------------------------------------------------------------------------------------------------------------------ groups

/** CoordinatorType of the protocol. */
const GROUP_COORDINATOR = 0;
/** The name by which members agree on how partitions are shared out: a group has no other members, and those read one topic. */
const assignorOf = (topic: string): string => `effectonce:${topic}`;

/** Asks the coordinator of a group, and again where it has moved. */
async function atCoordinator<T>(cluster: Cluster, groupId: string, run: (broker: Broker) => Promise<T>): Promise<T> {
  try {
    return await patiently(10_000, NOT_DONE, async () => {
      return await run(await findCoordinator(cluster, { groupId, coordinatorType: GROUP_COORDINATOR }));
    });
  } catch (error) {
    const refused = (why: string) =>
      new EffectError("source_invalid", `Cannot join group "${groupId}": ${why}`, { cause: error });
    if (isOneOf(error, ["INCONSISTENT_GROUP_PROTOCOL"])) {
      throw refused("it has consumers that read another topic, or are no effectonce. Give the relay a group of its own");
    }
    if (isOneOf(error, ["INVALID_SESSION_TIMEOUT"])) {
      const bounds = "group.min.session.timeout.ms to group.max.session.timeout.ms";
      throw refused(`brokers take no such lease, but one from their ${bounds}`);
    }
    if (isOneOf(error, FORBIDDEN)) throw refused(`Kafka refuses: ${(error as Error).message}`);
    throw explained(error);
  }
}

/** What a member says that it consumes: version, topics, nothing more. https://kafka.apache.org/protocol#The_Messages_JoinGroup */
function subscription(topic: string): Buffer {
  const to = new Writer(64);
  to.int16(0);
  to.int32(1);
  to.string(topic);
  to.int32(0);
  return to.bytes.subarray(0, to.at);
}

/** What a member is given: version, and by topic its partitions. */
function assignment(topic: string, partitions: readonly number[]): Buffer {
  const to = new Writer(64);
  to.int16(0);
  to.int32(1);
  to.string(topic);
  to.int32(partitions.length);
  for (const partition of partitions) to.int32(partition);
  to.int32(0);
  return to.bytes.subarray(0, to.at);
}

/** The partitions of an assignment for one topic. */
function assigned(bytes: Buffer): readonly number[] {
  if (bytes.length < 6 || bytes.readInt32BE(2) === 0) return [];
  const at = 8 + bytes.readInt16BE(6);
  return Array.from({ length: bytes.readInt32BE(at) }, (_, i) => bytes.readInt32BE(at + 4 + 4 * i));
}

/** What says that a member has to join anew. */
const OUTSIDE = ["REBALANCE_IN_PROGRESS", "UNKNOWN_MEMBER_ID", "ILLEGAL_GENERATION", "FENCED_INSTANCE_ID"];

function openMember(
  kafka: KafkajsKafka,
  cluster: Cluster,
  groupId: string,
  topic: string,
  sessionMs: number,
): KafkaMember {
  let me = { groupId, generationId: -1, memberId: "" };
  const named = ({ groupId, generationId, memberId }: Membership) => ({
    groupId,
    groupGenerationId: generationId,
    memberId,
  });
  const inside = async (run: (broker: Broker) => Promise<unknown>): Promise<boolean> => {
    try {
      await atCoordinator(cluster, groupId, run);
      return true;
    } catch (error) {
      if (isOneOf(error, ["UNKNOWN_MEMBER_ID", "FENCED_INSTANCE_ID"])) me = { ...me, memberId: "" };
      if (isOneOf(error, OUTSIDE)) return false;
      throw error;
    }
  };
  async function share(memberIds: readonly string[]): Promise<{ memberId: string; memberAssignment: Buffer }[]> {
    await cluster.addTargetTopic(topic);
    await cluster.refreshMetadata();
    const count = cluster.findTopicPartitionMetadata(topic).length;
    const all = Array.from({ length: count }, (_, partition) => partition);
    const { length } = memberIds;
    return memberIds.toSorted().map((memberId, i) => {
      const mine = all.slice(Math.floor(i * count / length), Math.floor((i + 1) * count / length));
      return { memberId, memberAssignment: assignment(topic, mine) };
    });
  }
  /** While the coordinator waits for others before it answers a join: of a connection brokers answer one request after the other. */
  async function leaveAside(): Promise<void> {
    if (me.memberId === "") return; // Not known yet: the join is to be waited for.
    const other = clusterOf(kafka);
    try {
      await other.cluster.connect();
      await atCoordinator(other.cluster, groupId, (broker) => broker.leaveGroup(me));
    } finally {
      await disconnect(other);
    }
  }
  return {
    async join(signal) {
      for (;;) {
        if (signal?.aborted) return [];
        let answer: Buffer | undefined;
        const quit = () => void leaveAside().catch(() => {}); // It is given up after a while.
        signal?.addEventListener("abort", quit);
        const done = await inside(async (broker) => {
          const { generationId, memberId, leaderId, members } = await broker.joinGroup({
            ...{ groupId, memberId: me.memberId, sessionTimeout: sessionMs, rebalanceTimeout: sessionMs },
            groupProtocols: [{ name: assignorOf(topic), metadata: subscription(topic) }],
          });
          me = { groupId, generationId, memberId };
          const groupAssignment = memberId === leaderId ? await share(members.map(({ memberId }) => memberId)) : [];
          answer = (await broker.syncGroup({ ...me, groupAssignment })).memberAssignment;
        }).finally(() => signal?.removeEventListener("abort", quit));
        if (done) return assigned(answer!);
      }
    },
    beat: () => inside((broker) => broker.heartbeat(named(me))),
    commit: (offsets) =>
      inside((broker) => {
        const partitions = Array.from(offsets, ([partition, { offset, note }]) => ({
          partition,
          offset: String(offset),
          metadata: note,
        }));
        return broker.offsetCommit({ ...named(me), topics: [{ topic, partitions }] });
      }),
    async leave() {
      if (me.memberId !== "") await inside((broker) => broker.leaveGroup(me));
    },
  };
}

// ------------------------------------------------------------------------------------------------------------- connection

/** Since which version of Kafka a request has had a version: https://kafka.apache.org/protocol#protocol_messages */
const VERSIONS: readonly (readonly [kafka: string, api: number, version: number])[] = [
  ["4.0", 26, 5],
  ["3.5", 24, 4],
  ["2.5", 22, 3],
  ["2.1", PRODUCE, PRODUCE_VERSION],
];

const READ_COMMITTED = 1;
/** How long it may take that a topic is created or grows, in milliseconds. */
const ADMIN_MS = 10_000;
/** How much of all partitions, and of one, is asked for at once: but for a first batch that is larger, which comes whole. */
const FETCH_BYTES = 1_048_576;
const PARTITION_BYTES = 262_144;
/** For how long it is nothing to be told of that a partition cannot be read: its leader moves. */
const UNREADABLE_MS = 5_000;
/** ConfigResource.Type of the protocol. */
const TOPIC_RESOURCE = 2;

async function openConnection(kafka: KafkajsKafka): Promise<KafkaSourceConnection> {
  const connected = clusterOf(kafka);
  const { cluster } = connected;
  const close = () => disconnect(connected);
  try {
    await cluster.connect();
  } catch (error) {
    close();
    throw explained(error);
  }

  let loaded = false;
  /** Learns of the brokers. Without a topic to ask for kafkajs asks for all that there are: only where none is known. */
  async function load(): Promise<void> {
    if (!loaded) await cluster.refreshMetadata();
    loaded = true;
  }
  async function partitions(topic: string): Promise<number> {
    try {
      await cluster.addTargetTopic(topic);
      loaded = true;
      return cluster.findTopicPartitionMetadata(topic).length;
    } catch (error) {
      if (isOneOf(error, ["INVALID_TOPIC_EXCEPTION"])) return 0;
      if (!isOneOf(error, ["UNKNOWN_TOPIC_OR_PARTITION"])) throw explained(error);
      // kafkajs has asked for all its topics: it may be another one that is gone.
      await cluster.refreshMetadata();
      return 0;
    }
  }
  async function offsetAt(
    topic: string,
    partition: number,
    at: { fromBeginning: boolean } | { fromTimestamp: number },
  ): Promise<number> {
    return await patiently(10_000, NOT_TAKEN, async (again) => {
      await cluster.addTargetTopic(topic);
      if (again) await cluster.refreshMetadata();
      const [found] = await cluster.fetchTopicsOffset([{ topic, partitions: [{ partition }], ...at }]);
      if (!found?.partitions[0]) throw unknownPartition(topic);
      return Number(found.partitions[0].offset);
    });
  }
  /** Has the controller change something, unless it is as it is to be. */
  async function atController(there: string, run: (broker: Broker) => Promise<unknown>): Promise<void> {
    try {
      await load();
      await patiently(ADMIN_MS, ["NOT_CONTROLLER"], async (again) => {
        if (again) await cluster.refreshMetadata();
        await run(await cluster.findControllerBroker());
      });
    } catch (error) {
      if (!isOneOf(error, [there])) throw explained(error);
    }
  }
  /** Waits until brokers have heard of what was changed. */
  async function untilThereAre(count: number, topic: string): Promise<void> {
    const deadline = performance.now() + ADMIN_MS;
    for (let tries = 0;; tries++) {
      const there = await partitions(topic);
      if (there >= count) return;
      if (performance.now() > deadline) {
        throw new Error(`Topic "${topic}" has ${count} partitions now, and no broker has heard of it yet`);
      }
      await pause(Math.min(100, 5 * 1.5 ** tries));
      if (there > 0) await cluster.refreshMetadata();
    }
  }
  /** One request for each leader. */
  async function fetch(topic: string, from: ReadonlyMap<number, number>, waitMs: number): Promise<FetchedPartition[]> {
    const leaders = Object.entries(cluster.findLeaderForPartitions(topic, [...from.keys()]));
    // One that was added since it has looked, kafkajs leaves out without a word.
    if (leaders.flatMap(([, numbers]) => numbers).length < from.size) throw unknownPartition(topic);
    const answers = await Promise.all(leaders.map(async ([nodeId, numbers]) => {
      const broker = await cluster.findBroker({ nodeId });
      const partitions = numbers.map((partition) => ({
        partition,
        fetchOffset: String(from.get(partition)!),
        maxBytes: PARTITION_BYTES,
      }));
      const { responses } = await broker.fetch({
        isolationLevel: READ_COMMITTED,
        maxWaitTime: waitMs,
        minBytes: 1,
        maxBytes: FETCH_BYTES,
        topics: [{ topic, partitions }],
      });
      return responses.flatMap(({ partitions }) => partitions);
    }));
    return answers.flat();
  }
  /** Since when partitions cannot be read, for a reason that passes. */
  const unreadable = new Map<string, number>();
  /** What can be read of partitions; where that of one cannot, each is asked for alone. */
  async function fetchAll(
    topic: string,
    from: ReadonlyMap<number, number>,
    waitMs: number,
  ): Promise<ReadonlyMap<number, Fetched>> {
    try {
      await cluster.addTargetTopic(topic);
      const all = new Map<number, Fetched>();
      for (const fetched of await fetch(topic, from, waitMs)) {
        const { partition } = fetched;
        const next = from.get(partition)!;
        unreadable.delete(`${partition} ${topic}`);
        // What there is has a place in the answer only if it is asked for alone: others may have filled it.
        const cut = from.size > 1 && fetched.messages.length === 0 && Number(fetched.lastStableOffset) > next;
        if (!cut) all.set(partition, toFetched(fetched, next));
        else for (const [, alone] of await fetchAll(topic, new Map([[partition, next]]), 0)) all.set(partition, alone);
      }
      return all;
    } catch (error) {
      if (isOneOf(error, FORBIDDEN)) throw explained(error);
      if (from.size > 1) {
        const each = Array.from(from, (one) => fetchAll(topic, new Map([one]), 0));
        return new Map((await Promise.all(each)).flatMap((one) => [...one]));
      }
      const [[partition, next]] = [...from] as [[number, number]];
      const failed = { records: [], next, outOfRange: isOneOf(error, ["OFFSET_OUT_OF_RANGE"]) };
      if (failed.outOfRange) return new Map([[partition, failed]]);
      await pause(50);
      const { retriable = false, message } = error as Error & { readonly retriable?: boolean };
      if (retriable) {
        await cluster.refreshMetadata();
        const place = `${partition} ${topic}`;
        const since = unreadable.get(place) ?? performance.now();
        unreadable.set(place, since);
        if (performance.now() < since + UNREADABLE_MS) return new Map();
      }
      const where = `partition ${partition} of topic ${topic} from offset ${next} on`;
      return new Map([[partition, { ...failed, failure: new Error(`${where}: ${message}`, { cause: error }) }]]);
    }
  }

  return {
    async brokers() {
      await load();
      return cluster.getNodeIds().length;
    },
    async version() {
      await load();
      const known = (api: number) => cluster.brokerPool.versions?.[api]?.maxVersion ?? -1;
      const [version] = VERSIONS.find(([, api, max]) => known(api) >= max) ?? ["0.11"];
      return version;
    },
    async copies(topic, partition) {
      await partitions(topic);
      return cluster.findTopicPartitionMetadata(topic)[partition]?.replicas.length ?? 0;
    },
    partitions,
    async refresh() {
      await cluster.refreshMetadata();
    },
    async setting(topic, name) {
      try {
        const broker = await cluster.findControllerBroker();
        const resources = [{ type: TOPIC_RESOURCE, name: topic, configNames: [name] }];
        const [described] = (await broker.describeConfigs({ resources })).resources;
        return described?.configEntries.find(({ configName }) => configName === name)?.configValue;
      } catch (error) {
        if (isOneOf(error, FORBIDDEN)) return undefined;
        throw explained(error);
      }
    },
    async create(topic, { partitions: numPartitions = -1, copies = -1, settings = {} }: TopicOptions) {
      const configEntries = Object.entries(settings).map(([name, value]) => ({ name, value }));
      const topics = [{ topic, numPartitions, replicationFactor: copies, configEntries }];
      await atController("TOPIC_ALREADY_EXISTS", (broker) => broker.createTopics({ topics, timeout: ADMIN_MS }));
      await untilThereAre(1, topic);
    },
    async grow(topic, count) {
      const topicPartitions = [{ topic, count }];
      await atController("INVALID_PARTITIONS", (broker) => broker.createPartitions({ topicPartitions, timeout: ADMIN_MS }));
      await untilThereAre(count, topic);
    },
    async clusterId() {
      await load();
      return cluster.brokerPool.metadata?.clusterId ?? "";
    },
    fetch: fetchAll,
    member: (group, topic, sessionMs) => openMember(kafka, cluster, group, topic, sessionMs),
    async kept(groupId, topic, partition) {
      const topics = [{ topic, partitions: [{ partition }] }];
      const [found] = (await atCoordinator(cluster, groupId, (broker) => broker.offsetFetch({ groupId, topics }))).responses;
      const { offset, metadata } = found!.partitions[0]!;
      return Number(offset) < 0 ? undefined : { offset: Number(offset), note: metadata ?? "" };
    },
    start: (topic, partition) => offsetAt(topic, partition, { fromBeginning: true }),
    async read(topic, partition, from) {
      const none: Fetched = { records: [], next: from, outOfRange: false };
      const found = (await fetchAll(topic, new Map([[partition, from]]), 20)).get(partition) ?? none;
      const { records, next, outOfRange, failure } = found;
      if (failure) throw failure;
      if (outOfRange) {
        return { records: [], next: Math.max(from, await offsetAt(topic, partition, { fromBeginning: true })) };
      }
      const texts = ({ headers }: FetchedRecord) =>
        Object.fromEntries(headers.map(([name, value]) => [name, String(value)]));
      return { records: records.map((record) => ({ ...record, headers: texts(record) })), next };
    },
    end: (topic, partition) => offsetAt(topic, partition, { fromBeginning: false }),
    async since(topic, partition, time) {
      const found = await offsetAt(topic, partition, { fromTimestamp: Math.max(0, time.getTime()) });
      // -1 stands for none.
      return found < 0 ? await offsetAt(topic, partition, { fromBeginning: false }) : found;
    },
    async begin(transactionalId, timeoutMs) {
      try {
        await load();
        return await openTransactions(cluster, transactionalId, timeoutMs);
      } catch (error) {
        throw explained(error);
      }
    },
    close,
  };
}

/** Makes a client for `kafkaSink` of kafkajs' own. Each relay has connections of its own. */
export function kafkajs(kafka: KafkajsKafka): KafkaSourceClient {
  return { open: () => openConnection(kafka) };
}
