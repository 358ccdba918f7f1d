/**
 * Kafka as a source: the partitions of a topic, shared out over relays of one name as over the members of a consumer group, which
 * they are.
 *
 * A partition is a log: nothing needs to be written to fix what is in a batch. What was the last record taken is kept by the sink,
 * with what it made of the records, where it can (a database, another topic), so that each record counts once; by the group where
 * it cannot (an HTTP target), beside claims of a store.
 *
 * ```ts ignore
 * import { handler } from "@effectonce/effectonce";
 * import { kafkaSource } from "@effectonce/effectonce/kafka-source";
 * import { kafkajs } from "@effectonce/effectonce/kafkajs";
 * import { postgresStore } from "@effectonce/effectonce/postgres";
 * import { relayShards } from "@effectonce/effectonce/shards";
 * import { Kafka, logLevel } from "kafkajs";
 * import pg from "pg";
 *
 * const kafka = new Kafka({ brokers: ["127.0.0.1:9092"], logLevel: logLevel.NOTHING });
 * const store = postgresStore(new pg.Pool({ connectionString: "postgres://app@127.0.0.1/app" }));
 * await using from = kafkaSource(kafkajs(kafka), { topic: "orders" });
 * await relayShards({
 *   name: "billing", // The consumer group.
 *   from,
 *   to: handler(store, async (message, effects, client) => {
 *     await client.query("insert into payments (id, amount) values ($1, $2)", [message.id, message.json<{ total: number }>().total]);
 *   }),
 * });
 * ```
 *
 * @module
 */
import {
  type Batch,
  createMessage,
  EffectError,
  type Message,
  type MessageFields,
  type Park,
  type Position,
  type ReadLimits,
  realRuntime,
  type Runtime,
  type SourceOptions,
  type SourceSession,
  START,
} from "../mod.ts";
import { type KafkaConnection, type KafkaPartition, partitionOf } from "./kafka.ts";
import { chainText, sha256 } from "./shared.ts";
import type { SharedSource } from "./shards.ts";

// ----------------------------------------------------------------------------------------------------------------- client

/** A record that was read. */
export interface FetchedRecord {
  /** Its offset. */
  readonly offset: number;
  /** Its time, in milliseconds since 1970. */
  readonly timestamp: number;
  /** Null: none. */
  readonly key: Uint8Array | null;
  /** Null: a tombstone. */
  readonly value: Uint8Array | null;
  /** Names and values; a name may come twice. */
  readonly headers: readonly (readonly [name: string, value: Uint8Array | null])[];
}

/** What there was in a partition behind an offset. */
export interface Fetched {
  /** Committed records, in order. */
  readonly records: readonly FetchedRecord[];
  /** Where to go on: behind records that were given up, or that compaction has removed. */
  readonly next: number;
  /** There is no such offset: it is before the partition's first one, or behind its end. */
  readonly outOfRange: boolean;
  /** Why it cannot be read, and will not be soon. */
  readonly failure?: Error;
}

/** A place in a partition that a consumer group keeps. */
export interface GroupOffset {
  /** The offset of the next record. */
  readonly offset: number;
  /** What was noted with it; empty if nothing was. */
  readonly note: string;
}

/** A member of a consumer group, which shares the partitions of a topic out over its members. */
export interface KafkaMember {
  /**
   * Joins, or joins anew: waits for the others, and answers which partitions are this member's. None, and it is a member no more, if
   * the signal fires meanwhile.
   */
  join(signal?: AbortSignal): Promise<readonly number[]>;
  /** Says that it is alive. False if it has to join anew. */
  beat(): Promise<boolean>;
  /** Keeps places, by partition. False, and nothing is kept, if it has to join anew. */
  commit(offsets: ReadonlyMap<number, GroupOffset>): Promise<boolean>;
  /** The others get its partitions. */
  leave(): Promise<void>;
}

/** A cluster that is connected, for those who consume as well. */
export interface KafkaSourceConnection extends KafkaConnection {
  /**
   * Reads committed records of partitions of a topic, each from an offset on. Waits until there are some, for so long at most.
   * Partitions that cannot be read at the moment are left out.
   */
  fetch(topic: string, from: ReadonlyMap<number, number>, waitMs: number): Promise<ReadonlyMap<number, Fetched>>;
  /** A member of a consumer group for a topic; it has not joined yet. `sessionMs`: after so long a silence it is given up. */
  member(group: string, topic: string, sessionMs: number): KafkaMember;
  /** The place that a group keeps in a partition. */
  kept(group: string, topic: string, partition: number): Promise<GroupOffset | undefined>;
  /** Where a partition begins: what was before it was deleted. */
  start(topic: string, partition: number): Promise<number>;
}

/** A Kafka client that can consume: `kafkajs()` of `@effectonce/effectonce/kafkajs` makes one. */
export interface KafkaSourceClient {
  /** Connects to a cluster. */
  open(): Promise<KafkaSourceConnection>;
}

// ---------------------------------------------------------------------------------------------------------------- options

/** How {@linkcode kafkaSource} works. */
export interface KafkaSourceOptions {
  /** The topic. */
  readonly topic: string;
  /**
   * The consumer group.
   *
   * @default {undefined} The relay's name.
   */
  readonly group?: string;
  /**
   * A name for people, without secrets.
   *
   * @default {"kafka topic", and the topic}
   */
  readonly name?: string;
  /**
   * Where a relay begins of which neither its sink nor the group knows a place.
   *
   * @default {"earliest"}
   */
  readonly start?: "earliest" | "latest";
  /**
   * By what claims know a message; records of the same id have the same effect, once: one of another value is refused. Where it
   * throws, the relay ends.
   *
   * @default {topic, partition, offset and time of the record}
   */
  readonly id?: (message: KafkaMessage) => string;
  /**
   * A topic for records that were refused for good, or too often: with their own headers, and `effectonce-topic`, `-partition`,
   * `-offset`, `-group`, `-error` and, where it was tried, `-attempts`. At least once: one that was set aside just before a crash may come twice.
   *
   * @default {undefined} The relay ends with such a record, unless the store of its claims tells of it.
   */
  readonly deadLetter?: string;
  /** Time. */
  readonly runtime?: Pick<Runtime, "now" | "sleep">;
}

/**
 * A message that was a record. Its id is the topic, the partition, the offset and the time of the record: in a topic that was made
 * anew the same offset is another message. Its key is the record's as UTF-8; one that is no UTF-8 as `base64:` and its bytes.
 */
export interface KafkaMessage extends Message {
  /** The record as it was. */
  readonly kafka: FetchedRecord & KafkaPlace;
}

/** A partition of a cluster. */
export interface KafkaPlace extends KafkaPartition {
  /** The cluster's own id. */
  readonly cluster: string;
}

// ---------------------------------------------------------------------------------------------------------------- records

const utf8 = new TextDecoder();
const strict = new TextDecoder("utf-8", { fatal: true });

function textOf(key: Uint8Array): string {
  try {
    return strict.decode(key);
  } catch {
    let text = "";
    for (const byte of key) text += String.fromCharCode(byte);
    return `base64:${btoa(text)}`;
  }
}

const NO_HEADERS: MessageFields["headers"] = Object.freeze({});

function toMessage(
  { cluster, topic, partition }: KafkaPlace,
  record: FetchedRecord,
  idOf?: KafkaSourceOptions["id"],
): KafkaMessage {
  const { offset, timestamp, key, value, headers } = record;
  const fields = {
    id: `${topic}-${partition}-${offset}-${timestamp}`,
    topic,
    key: key && textOf(key),
    value,
    headers: headers.length === 0
      ? NO_HEADERS
      : Object.fromEntries(headers.map(([name, value]) => [name, value === null ? "" : utf8.decode(value)])),
    time: new Date(timestamp),
  };
  const kafka = { cluster, topic, partition, offset, timestamp, key, value, headers };
  const message = Object.assign(createMessage(fields), { kafka });
  if (!idOf) return message;
  try {
    return Object.assign(createMessage({ ...fields, id: idOf(message) }), { kafka });
  } catch (error) {
    const why = `record ${offset} of partition ${partition} of topic ${topic} has no id: ${(error as Error).message}`;
    throw new EffectError("source_invalid", `Cannot claim an effect: ${why}`, { cause: error });
  }
}

/** About what it takes in memory. */
const sizeOf = ({ key, value }: FetchedRecord): number => 300 + (key?.length ?? 0) + (value?.length ?? 0);

/** The last record that was taken: its offset, and what tells it from another one at the same offset. */
interface Place {
  readonly offset: number;
  readonly stamp: string;
}

async function placeOf({ offset, timestamp, key, value }: FetchedRecord): Promise<Place> {
  const [keySize, valueSize] = [key?.length ?? 0, value?.length ?? 0];
  const content = new Uint8Array(keySize + valueSize);
  content.set(key ?? [], 0);
  content.set(value ?? [], keySize);
  return { offset, stamp: `${timestamp}/${keySize}/${(await sha256(content)).slice(0, 16)}` };
}

/** The place of a position: a batch's only row. */
function placeIn({ n, rows }: Position): Place | undefined {
  const [row] = rows;
  if (n === 0) return undefined;
  if (!row || !/^\d+$/.test(row[0])) {
    throw new EffectError("source_invalid", `Batch ${n} of the sink is none of a Kafka topic`);
  }
  return { offset: Number(row[0]), stamp: row[1] };
}

/** What a group keeps with an offset: the last record taken; `n`: the last batch, where a sink keeps the position. */
interface Note {
  readonly n: number;
  readonly place?: Place;
}

function groupOffset(offset: number, note: Note): GroupOffset {
  return { offset, note: JSON.stringify({ effectonce: note }) };
}

function parseNote(note: string): Note | undefined {
  try {
    return (JSON.parse(note) as { readonly effectonce?: Note }).effectonce;
  } catch {
    return undefined; // An ordinary consumer's.
  }
}

// ----------------------------------------------------------------------------------------------------------------- reading

/** How much is kept ready of all partitions together, in bytes, if there are not too many of them. */
const READY_BYTES = 4_194_304;
/** How much is kept ready of each at least. */
const LEAST_READY_BYTES = 65_536;
/** How long the number of partitions is taken for true, in milliseconds. */
const METADATA_MS = 60_000;
/** How long brokers may be without a leader for a record that is set aside, in milliseconds. */
const BURY_MS = 30_000;
/** How much of a reason is noted with a record that is set aside, in characters. */
const REASON_LENGTH = 1_000;
/** How long a broker may wait for records. */
const WAIT_MS = 250;

/** A partition that is read ahead. */
class Reader {
  /** Records that are not taken for good, in order. */
  records: FetchedRecord[] = [];
  /** Where to read on. */
  next = -1;
  outOfRange = false;
  #bytes = 0;
  #failure: { readonly error: unknown } | undefined;
  #wake = Promise.withResolvers<void>();

  /** Whether it is to be read on, where it may have so much ready. */
  wants(bytes: number): boolean {
    return this.next >= 0 && !this.outOfRange && !this.#failure && this.#bytes < bytes;
  }
  /** Begins at another place. */
  begin(offset: number): void {
    this.records = [];
    this.next = offset;
    this.outOfRange = false;
    this.#bytes = 0;
  }
  add({ records, next, outOfRange, failure }: Fetched): void {
    if (failure) this.#failure = { error: failure };
    for (const record of records) {
      this.records.push(record);
      this.#bytes += sizeOf(record);
    }
    this.next = next;
    this.outOfRange = outOfRange;
  }
  /** The first ones are taken for good. */
  drop(count: number): void {
    for (const record of this.records.splice(0, count)) this.#bytes -= sizeOf(record);
  }
  fail(error: unknown): void {
    this.#failure = { error };
    this.ring();
  }
  ring(): void {
    this.#wake.resolve();
    this.#wake = Promise.withResolvers();
  }
  /** Resolves when there may be news. */
  get news(): Promise<void> {
    return this.#wake.promise;
  }
  /** Throws what went wrong while it was read ahead, once. */
  check(): void {
    const failure = this.#failure;
    this.#failure = undefined;
    if (!failure) return;
    if (failure.error instanceof EffectError) throw failure.error;
    throw new EffectError("busy", `Kafka could not be read: ${(failure.error as Error).message}`, { cause: failure.error });
  }
}

/** How far a consumer group is in a partition. */
export interface KafkaLag {
  /** The partition. */
  readonly partition: number;
  /** The offset of the next record that the group takes; null if it has none yet. */
  readonly offset: number | null;
  /** Where the partition ends. */
  readonly end: number;
  /** How many offsets are in between, of which some may be no records. */
  readonly lag: number;
}

/** How far a consumer group is in a topic: as the group knows, which follows its sinks by a second or so. */
export async function kafkaLag(client: KafkaSourceClient, group: string, topic: string): Promise<readonly KafkaLag[]> {
  const connection = await client.open();
  try {
    const found: KafkaLag[] = [];
    const count = await connection.partitions(topic);
    for (let partition = 0; partition < count; partition++) {
      const end = await connection.end(topic, partition);
      const offset = (await connection.kept(group, topic, partition))?.offset ?? null;
      found.push({ partition, offset, end, lag: Math.max(0, end - (offset ?? await connection.start(topic, partition))) });
    }
    return found;
  } finally {
    await connection.close();
  }
}

// ------------------------------------------------------------------------------------------------------------------ source

/** A topic as a source, which is closed in the end. */
export type KafkaSource = SharedSource & AsyncDisposable;

/**
 * A topic as a source for `relayShards`, whose name is that of the consumer group. Records are read at `read_committed`, each
 * partition in order. A member that has to give a partition up finishes its batch first; one that was too slow is shut out by its
 * sink. Close it in the end.
 *
 * With claims (a sink that is called): what is parked is told by the store, and holds nothing back.
 */
export function kafkaSource(client: KafkaSourceClient, options: KafkaSourceOptions): KafkaSource {
  const { topic, name = `kafka topic ${options.topic}`, start = "earliest", deadLetter, runtime = realRuntime } = options;
  if (deadLetter === topic) throw new RangeError(`Cannot use ${topic} as its own dead-letter topic`);
  if (start !== "earliest" && start !== "latest") {
    throw new RangeError(`Cannot start at "${start}": it must be earliest or latest`);
  }
  const readers = new Map<number, Reader>();
  /** Places to be kept by the group. */
  const dirty = new Map<number, GroupOffset>();
  let opened: Promise<Opened> | undefined;
  let member: KafkaMember | undefined;
  /** The partitions of this member; undefined before it has joined. */
  let assigned: readonly number[] | undefined;
  /** Whether it has to join anew, once it has finished what it has in hand. */
  let over = false;
  let reading = false;
  /** Whether every partition but those that were added later has a place in the group, or needs none. */
  let begun = start === "earliest";

  async function open() {
    // Two: what waits for records keeps nothing else waiting.
    const both = await Promise.allSettled([client.open(), client.open()]);
    const made = both.flatMap((one) => one.status === "fulfilled" ? [one.value] : []);
    try {
      for (const one of both) if (one.status === "rejected") throw one.reason;
      const [connection, fetching] = made as [KafkaSourceConnection, KafkaSourceConnection];
      const count = await connection.partitions(topic);
      if (count === 0) throw new EffectError("source_invalid", `Topic "${topic}" does not exist in Kafka: create it`);
      return { connection, fetching, cluster: await connection.clusterId(), count, countedAt: runtime.now() };
    } catch (error) {
      await Promise.all(made.map((connection) => connection.close()));
      throw error;
    }
  }
  type Opened = Awaited<ReturnType<typeof open>>;
  const connected = (): Promise<Opened> =>
    opened ??= open().catch((error) => {
      opened = undefined;
      throw error;
    });

  /** What a broker that is away has said passes. */
  async function passing<T>(answer: Promise<T>): Promise<T> {
    try {
      return await answer;
    } catch (error) {
      if (error instanceof EffectError) throw error;
      throw new EffectError("busy", `${name} could not be reached: ${(error as Error).message}`, { cause: error });
    }
  }

  /** Whether there are other partitions than those that were shared out. */
  async function hasGrown(found: Opened): Promise<boolean> {
    if (runtime.now() < found.countedAt + METADATA_MS) return false;
    found.countedAt = runtime.now();
    const before = found.count;
    await Promise.all([found.connection.refresh(), found.fetching.refresh()]);
    found.count = await found.connection.partitions(topic);
    return found.count !== before;
  }

  /** Reads ahead, for as long as somebody reads. */
  async function readAhead(): Promise<void> {
    if (reading) return;
    reading = true;
    try {
      const { fetching } = await connected();
      for (;;) {
        const share = Math.max(LEAST_READY_BYTES, READY_BYTES / readers.size);
        const wanted = new Map(
          [...readers].filter(([, reader]) => reader.wants(share)).map(([partition, { next }]) => [partition, next]),
        );
        if (wanted.size === 0) return;
        const found = await fetching.fetch(topic, wanted, WAIT_MS);
        for (const [partition, reader] of readers) {
          const fetched = found.get(partition);
          if (fetched && reader.next === wanted.get(partition)) reader.add(fetched);
          reader.ring(); // Whoever waits looks whether it is to stop.
        }
      }
    } catch (error) {
      for (const reader of readers.values()) reader.fail(error);
    } finally {
      reading = false;
    }
  }

  /**
   * Whether it is settled where the group begins, if that is with what comes from now on: in all partitions at once, so that those
   * without a place are such as were added later. Whoever has the first one says so, and the others wait.
   */
  async function hasBegun({ connection }: Opened, group: string): Promise<boolean> {
    if (begun) return true;
    const all = Array.from({ length: await connection.partitions(topic) }, (_, partition) => partition);
    const kept = await Promise.all(all.map((partition) => connection.kept(group, topic, partition)));
    begun = kept.some((place) => place !== undefined);
    if (begun || !assigned?.includes(0)) return begun;
    const ends = await Promise.all(all.map((partition) => connection.end(topic, partition)));
    return begun = await member!.commit(new Map(ends.map((end, partition) => [partition, groupOffset(end, { n: 0 })])));
  }

  /** Has the group keep a place, before long. */
  function note(partition: number, offset: number, kept: Note): void {
    dirty.set(partition, groupOffset(offset, kept));
  }

  const noWayPast = ({ message, reason }: Pick<Park, "message" | "reason">): EffectError => {
    const { partition, offset } = (message as KafkaMessage).kafka;
    return new EffectError(
      "rejected",
      `There is no way past record ${offset} of partition ${partition} of ${name}: ${reason}`,
    );
  };
  const noLetters = ({ message, reason }: Park) =>
    noWayPast({ message, reason: `${reason}. Give it a dead-letter topic, to go on without what is refused` });
  /** Who writes into the dead-letter topic. */
  let producer: ReturnType<KafkaSourceConnection["begin"]> | undefined;
  let burying: Promise<void> = Promise.resolve();
  /** Puts a record into the dead-letter topic: one after the other, as their sequence numbers have it. */
  const bury = (group: string, park: Park): Promise<void> =>
    burying = burying.catch(() => {}).then(() => passing(buryNow(group, park)));
  async function buryNow(group: string, { message, reason, attempts }: Park): Promise<void> {
    const { connection } = await connected();
    const count = await connection.partitions(deadLetter!);
    if (count === 0) {
      throw new EffectError("source_invalid", `The dead-letter topic "${deadLetter}" does not exist in Kafka: create it`);
    }
    const { topic, partition, offset, key, value, headers } = (message as KafkaMessage).kafka;
    const error = reason.slice(0, REASON_LENGTH).toWellFormed();
    const origin = { topic, partition, offset, group, error, ...attempts !== undefined && { attempts } };
    const record = {
      topic: deadLetter!,
      partition: key ? partitionOf(key, count) : partition % count,
      ...{ key, value },
      headers: [
        ...headers.map(([name, value]) => [name, value ?? ""] as const),
        ...Object.entries(origin).map(([name, value]) => [`effectonce-${name}`, String(value)] as const),
      ],
    };
    producer ??= connection.begin(null, BURY_MS);
    try {
      const { tooLarge } = await (await producer).send([record]);
      if (tooLarge.length === 0) return;
    } catch (error) {
      producer = undefined;
      throw error;
    }
    const how = "with what is noted in its headers it is too large. Raise its max.message.bytes";
    throw noWayPast({ message, reason: `${reason}; and the dead-letter topic "${deadLetter}" does not take it: ${how}` });
  }

  /** Lets the group keep places, for monitors and for those who have no other: one after the other, so that it does not go back. */
  const keep = (): Promise<void> => keeping = keeping.catch(() => {}).then(keepNow);
  let keeping: Promise<void> = Promise.resolve();
  async function keepNow(): Promise<void> {
    if (dirty.size === 0 || !member || !assigned) return;
    const kept = new Map(dirty);
    if (!await member.commit(kept)) return;
    for (const [partition, place] of kept) if (dirty.get(partition) === place) dirty.delete(partition);
  }

  async function openPartition(partition: number, { relay, protocol, original }: SourceOptions): Promise<SourceSession> {
    const { connection, count, cluster } = await connected();
    const lost = () => new EffectError("fenced", `Partition ${partition} of ${name} is another member's now`);
    const reader = new Reader();
    readers.set(partition, reader);
    /** What there is at the start: whoever drains goes so far. */
    const target = await connection.end(topic, partition);
    const group = options.group ?? relay;
    const kept = await connection.kept(group, topic, partition);
    const noted = kept && parseNote(kept.note);
    const waiting = new Map<number, number>();
    const of = `${cluster}/${topic}`;
    const here = { cluster, topic, partition };
    /** The last batch that the sink has, as far as is known. */
    let base: Position | undefined;
    const sealed: Batch[] = [];
    /** How many records are in sealed batches. */
    let taken = 0;
    /** Offsets of what went to the dead-letter topic. */
    const parked = new Set<number>();
    let shownUpTo: number | undefined;
    let accepted = false;

    /** What is missing may be another member's by now, who has taken it. */
    const diverged = async (why: string) =>
      await passing(member!.beat())
        ? new EffectError("diverged", `Partition ${partition} of ${name} is not what it was: ${why}`)
        : lost();

    /** Where to go on behind a place, if it is still there. */
    async function behind({ offset, stamp }: Place): Promise<number> {
      const [first, end] = [await connection.start(topic, partition), await connection.end(topic, partition)];
      if (end <= offset) {
        if (accepted) return first;
        throw await diverged(`it ends at ${end}, and record ${offset} was taken. Was the topic made anew?`);
      }
      // What is behind the record may be none: the end of a transaction, for one, which the group has seen. It has seen more where
      // it speaks of another record: a database may have gone back.
      const isKept = noted?.place?.offset === offset && noted.place.stamp === stamp;
      const looked = isKept ? Math.max(kept!.offset, offset + 1) : offset + 1;
      if (first > looked && !accepted) {
        throw await diverged(`records ${looked} to ${first - 1} were deleted before they were taken`);
      }
      const found = (await connection.fetch(topic, new Map([[partition, offset]]), WAIT_MS)).get(partition);
      if (!found || found.failure) throw found?.failure ?? new Error(`record ${offset} cannot be read at the moment`);
      const [record] = found.records;
      // Compaction may have removed it.
      if (record?.offset === offset && (await placeOf(record)).stamp !== stamp) {
        if (accepted) return first;
        throw await diverged(`its record ${offset} is another one than that which was taken. Was the topic made anew?`);
      }
      return Math.max(first, looked);
    }
    /** Where to begin without a place in the sink: where the group is, which may have had another sink. */
    async function beginning(): Promise<number> {
      const isLost = protocol === "sealed" && noted !== undefined && noted.n > 0;
      if (isLost && !accepted) {
        throw await diverged(
          `the group is at ${kept!.offset}, behind batch ${noted.n}, and the target knows of no batch at all. Was it ` +
            "emptied, or is it another one? To begin where the group is, set its offset there with Kafka's own tools",
        );
      }
      if (!isLost && noted?.place) return await behind(noted.place);
      const [first, end] = [await connection.start(topic, partition), await connection.end(topic, partition)];
      if (kept && !isLost) {
        if (kept.offset > end && !accepted) throw await diverged(`it ends at ${end}, and the group is at ${kept.offset}`);
        if (kept.offset < first && !accepted) {
          throw await diverged(`records ${kept.offset} to ${first - 1} were deleted before they were taken`);
        }
        return Math.min(Math.max(kept.offset, first), end);
      }
      // Also where it is to begin with what comes from now on: then this partition was added after the group had begun.
      note(partition, first, { n: 0 });
      return first;
    }
    async function begin(cursor: Position): Promise<void> {
      sealed.length = 0;
      taken = 0;
      const place = placeIn(cursor);
      reader.begin(place ? await behind(place) : await beginning());
      base = cursor;
      readAhead();
    }
    /** Forgets what the sink has. */
    async function follow(cursor: Position): Promise<void> {
      if (base?.uid === cursor.uid) return;
      const i = base ? sealed.findIndex(({ uid }) => uid === cursor.uid) : -1;
      if (i < 0) return await begin(cursor);
      sealed.splice(0, i + 1);
      base = cursor;
      const last = placeIn(cursor)!;
      const { offset } = last;
      const past = reader.records.findIndex((record) => record.offset > offset);
      const count = past < 0 ? reader.records.length : past;
      reader.drop(count);
      taken -= count;
      note(partition, offset + 1, { n: cursor.n, place: last });
      for (const known of [parked, waiting]) for (const past of known.keys()) if (past <= offset) known.delete(past);
      readAhead();
    }
    async function check(): Promise<void> {
      if (!assigned?.includes(partition)) throw lost();
      reader.check();
      if (reader.outOfRange && reader.records.length === taken) {
        throw await diverged(`record ${reader.next} was deleted before it was taken`);
      }
      readAhead();
    }
    /** Waits a moment for what was there at the start; answers whether that is still to come. */
    async function lacks(from: number): Promise<boolean> {
      const yet = () => reader.records.length <= from && reader.next < target;
      await check();
      if (yet()) await reader.news;
      await check();
      return yet();
    }
    /** All that was read is taken: what comes behind the last record is none. */
    function seen(n: number, place?: Place): void {
      if (reader.records.length > 0 || sealed.length > 0 || reader.next <= (shownUpTo ?? -1)) return;
      shownUpTo = reader.next;
      note(partition, reader.next, { n, ...place && { place } });
    }
    /** Fixes the next batch. */
    async function seal({ rows, bytes }: ReadLimits): Promise<{ readonly batch?: Batch; readonly waitMs: number | null }> {
      if (await lacks(taken)) return { waitMs: 0 };
      const messages: Message[] = [];
      let size = 0;
      let waitMs: number | null = null;
      let i = taken;
      for (; i < reader.records.length && i - taken < rows; i++) {
        const record = reader.records[i]!;
        const until = waiting.get(record.offset);
        if (until !== undefined && until > runtime.now()) {
          waitMs = until - runtime.now();
          break;
        }
        size += record.value?.length ?? 0;
        if (i > taken && size > bytes) break;
        if (!parked.has(record.offset)) messages.push(toMessage(here, record));
      }
      if (i === taken) {
        seen(base!.n, placeIn(base!));
        return { waitMs };
      }
      const prev = sealed.at(-1) ?? base!;
      const { offset, stamp } = await placeOf(reader.records[i - 1]!);
      const place: Position["rows"] = [[String(offset), stamp]];
      const uid = await sha256(chainText(prev.uid, place));
      const batch = { n: prev.n + 1, uid, prev: prev.uid, rows: place, messages };
      taken = i;
      return { batch, waitMs };
    }
    const offsetOf = (message: Message): number => (message as KafkaMessage).kafka.offset;

    // By claims: the group keeps the place behind which all is done.
    const done = new Set<number>();
    let lastPlace = noted?.place;
    async function beginByGroup(): Promise<void> {
      if (reader.next >= 0) return;
      reader.begin(await beginning()); // All before the group's offset is done.
      readAhead();
    }
    async function settle(offsets: readonly number[]): Promise<void> {
      for (const offset of offsets) {
        done.add(offset);
        waiting.delete(offset);
      }
      let last: FetchedRecord | undefined;
      let count = 0;
      for (; done.delete(reader.records[count]?.offset ?? -1); count++) last = reader.records[count];
      if (!last) return;
      reader.drop(count); // Before anything is waited for: others settle at the same time.
      readAhead();
      const place = await placeOf(last);
      if (lastPlace && place.offset < lastPlace.offset) return; // One that settled later was quicker.
      lastPlace = place;
      note(partition, Math.max(place.offset + 1, dirty.get(partition)?.offset ?? 0), { n: 0, place });
    }

    return {
      id: `${of}.${partition}`,
      shard: { of, index: partition, count },
      inherited: true,
      exclusive: true,
      async read({ rows, bytes }) {
        await passing(beginByGroup());
        if (await lacks(0)) return { messages: [], waitMs: 0 };
        if (lastPlace) seen(0, lastPlace);
        const messages: Message[] = [];
        const held = new Set<string>();
        let [size, waitMs] = [0, null as number | null];
        for (const record of reader.records) {
          if (done.has(record.offset)) continue;
          const message = toMessage(here, record, options.id);
          const until = waiting.get(record.offset);
          if (until !== undefined && until > runtime.now()) {
            waitMs = Math.min(waitMs ?? Infinity, until - runtime.now());
            if (message.key !== null) held.add(message.key);
            continue;
          }
          if (message.key !== null && held.has(message.key)) continue;
          size += record.value?.length ?? 0;
          if (messages.length === rows || messages.length > 0 && size > bytes) break;
          messages.push(message);
        }
        return { messages, waitMs };
      },
      // Whoever sends something twice may give it another key of Kafka's, or other headers.
      ...options.id && { comparable: ({ topic, value }) => ({ topic, key: null, value, headers: {} }) },
      settle: (messages) => settle(messages.map(offsetOf)),
      async park(parks) {
        for (const park of parks) {
          const offset = offsetOf(park.message);
          if (park.retryMs !== null) waiting.set(offset, runtime.now() + park.retryMs);
          else {
            if (deadLetter !== undefined) await bury(group, park);
            else if (park.untold) throw noLetters(park);
            await settle([offset]);
          }
        }
      },
      // deno-lint-ignore require-await -- what throws here must reject
      async settled() {
        if (!assigned?.includes(partition)) throw lost();
        return original ? noted?.n ?? 0 : 0;
      },
      async seal(ring, limits) {
        await check();
        await follow(ring.at(-1) ?? START);
        let waitMs: number | null = null;
        if (sealed.length < 2) {
          const next = await seal(limits);
          ({ waitMs } = next);
          if (next.batch) sealed.push(next.batch);
        }
        return { batches: [...sealed], waitMs, repaired: [] };
      },
      async unseal(ring, parks) {
        await follow(ring.at(-1) ?? START);
        sealed.length = 0;
        taken = 0;
        for (const park of parks) {
          const offset = offsetOf(park.message);
          if (park.retryMs !== null) {
            waiting.set(offset, runtime.now() + park.retryMs);
            continue;
          }
          if (deadLetter === undefined) throw noLetters(park);
          await bury(group, park);
          parked.add(offset);
        }
      },
      async adopt(ring) {
        if (protocol === "sealed") {
          accepted = true; // This once.
          return await begin(ring.at(-1) ?? START).finally(() => accepted = false);
        }
        // Claims know what was done of what is still there.
        lastPlace = undefined;
        done.clear();
        waiting.clear();
        dirty.delete(partition);
        reader.begin(await connection.start(topic, partition));
        readAhead();
      },
      async wait(ms, signal) {
        const over = new AbortController();
        const stop = signal ? AbortSignal.any([signal, over.signal]) : over.signal;
        await Promise.race([reader.news, runtime.sleep(ms, stop)]);
        over.abort();
      },
      renew: () => Promise.resolve(),
      async close() {
        if (readers.get(partition) === reader) readers.delete(partition);
        await keep();
      },
    };
  }

  return {
    name,
    shards: async () => (await connected()).count,
    shard: (partition) => ({
      name: `${name}, partition ${partition}`,
      seals: true,
      open: (options) => passing(openPartition(partition, options)),
    }),
    async assign(relay, _, leaseMs, running, signal) {
      try {
        const found = await connected();
        const group = options.group ?? relay;
        member ??= found.connection.member(group, topic, Math.max(leaseMs, 6_000));
        if (assigned) {
          await keep();
          // Also while it finishes what it has in hand, so that it is not given up.
          over = !await member.beat() || over || await hasGrown(found);
          if (!over) return await hasBegun(found, group) ? assigned : [];
          // The others wait for it.
          if (running.length > 0) return [];
        }
        await keep();
        dirty.clear(); // What could not be kept is another member's by now.
        assigned = await member.join(signal);
        over = false;
        return await hasBegun(found, group) ? assigned : [];
      } catch (error) {
        return await passing(Promise.reject(error));
      }
    },
    async leave() {
      await keep();
      await member?.leave();
      member = undefined;
      assigned = undefined;
    },
    // Each partition that is drained is at the end that it had; what others have is theirs.
    left: () => Promise.resolve(assigned === undefined || over || !begun),
    async [Symbol.asyncDispose]() {
      const last = await opened?.catch(() => undefined);
      opened = undefined;
      await Promise.all([last?.connection.close(), last?.fetching.close()]);
    },
  };
}
