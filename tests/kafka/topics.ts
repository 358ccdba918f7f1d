/** Topics for tests, and what readers see in them. */
import { type IHeaders, Kafka, logLevel } from "kafkajs";
import { kafkaClassPath } from "../services/kafka.ts";

/** kafkajs itself, for what a test does besides the relay. */
export function kafkaOf(brokers: string): Kafka {
  return new Kafka({
    brokers: brokers.split(","),
    logLevel: logLevel.NOTHING,
    retry: { initialRetryTime: 50, retries: 10 },
  });
}

/** A name that no other test has. */
export const freshName = (what: string): string => `${what}-${crypto.randomUUID().slice(0, 8)}`;

/** Makes a topic. */
export async function makeTopic(
  brokers: string,
  { name = freshName("topic"), partitions = 1, copies = 1, settings = {} }: {
    readonly name?: string;
    readonly partitions?: number;
    readonly copies?: number;
    readonly settings?: Readonly<Record<string, string>>;
  } = {},
): Promise<string> {
  const admin = kafkaOf(brokers).admin();
  await admin.connect();
  try {
    await admin.createTopics({
      waitForLeaders: false,
      topics: [{
        topic: name,
        numPartitions: partitions,
        replicationFactor: copies,
        configEntries: Object.entries(settings).map(([name, value]) => ({ name, value })),
      }],
    });
    for (;;) {
      const found = await admin.fetchTopicMetadata({ topics: [name] }).catch(() => undefined);
      if (found?.topics[0]?.partitions.every(({ leader }) => leader >= 0)) return name;
      await new Promise((resolve) => setTimeout(resolve, 50));
    }
  } finally {
    await admin.disconnect();
  }
}

/** Deletes a topic, and makes it anew. */
export async function remakeTopic(brokers: string, topic: string): Promise<void> {
  const admin = kafkaOf(brokers).admin();
  await admin.connect();
  await admin.deleteTopics({ topics: [topic] });
  while ((await admin.listTopics()).includes(topic)) await new Promise((resolve) => setTimeout(resolve, 50));
  await admin.disconnect();
  await makeTopic(brokers, { name: topic });
}

/** Deletes the records of the first partition before an offset. */
export async function deleteRecords(brokers: string, topic: string, offset: number): Promise<void> {
  const admin = kafkaOf(brokers).admin();
  await admin.connect();
  await admin.fetchTopicOffsets(topic); // Else it does not know the topic.
  await admin.deleteTopicRecords({ topic, partitions: [{ partition: 0, offset: String(offset) }] });
  await admin.disconnect();
}

/** A record as a reader sees it. */
export interface Seen {
  readonly partition: number;
  readonly offset: number;
  readonly key: string | null;
  readonly value: string | null;
  readonly headers: Readonly<Record<string, string>>;
}

const textOf = (value: IHeaders[string]): string => Array.isArray(value) ? value.map(textOf).join() : String(value ?? "");

interface Ends {
  connect(): Promise<void>;
  disconnect(): Promise<void>;
  addTargetTopic(topic: string): Promise<void>;
  findTopicPartitionMetadata(topic: string): { partitionId: number }[];
  fetchTopicsOffset(
    topics: { topic: string; partitions: { partition: number }[]; fromBeginning: boolean }[],
  ): Promise<{ partitions: { partition: number; offset: string }[] }[]>;
}

/**
 * Where partitions end, with what is not committed yet: a commit is answered before its markers are written, and until they are
 * the last stable offset is an older one. kafkajs' admin tells that one only.
 */
async function endsOf(kafka: Kafka, topic: string): Promise<ReadonlyMap<number, number>> {
  let found: Ends | undefined;
  const assigner = ({ cluster }: { cluster: unknown }) => {
    found = cluster as Ends;
    return { name: "unused", version: 0 };
  };
  // deno-lint-ignore no-explicit-any -- not an assigner, and never used as one
  kafka.consumer({ groupId: "unused", readUncommitted: true, partitionAssigners: [assigner as any] });
  const cluster = found!;
  await cluster.connect();
  await cluster.addTargetTopic(topic);
  const partitions = cluster.findTopicPartitionMetadata(topic).map(({ partitionId }) => ({ partition: partitionId }));
  const [ends] = await cluster.fetchTopicsOffset([{ topic, partitions, fromBeginning: false }]);
  await cluster.disconnect();
  return new Map(ends!.partitions.map(({ partition, offset }) => [partition, Number(offset)]));
}

/** All that is in a topic at the moment, for a reader at read_committed that is kafkajs' own, partition by partition. */
export async function readTopic(brokers: string, topic: string): Promise<readonly Seen[]> {
  const kafka = kafkaOf(brokers);
  const ends = await endsOf(kafka, topic);
  const left = new Map([...ends].filter(([, end]) => end > 0));
  const seen: Seen[] = [];
  if (left.size === 0) return seen;
  const consumer = kafka.consumer({ groupId: freshName("reader"), maxWaitTimeInMs: 50 });
  await consumer.connect();
  await consumer.subscribe({ topics: [topic], fromBeginning: true });
  const done = Promise.withResolvers<void>();
  const look = (partition: number, next: number) => {
    if (next >= (left.get(partition) ?? 0)) left.delete(partition);
    if (left.size === 0) done.resolve();
  };
  // Not by messages alone: what comes last may be the marker of a transaction.
  consumer.on("consumer.end_batch_process", ({ payload }) => look(payload.partition, Number(payload.lastOffset) + 1));
  await consumer.run({
    autoCommit: false,
    eachBatch({ batch }) {
      for (const { offset, key, value, headers = {} } of batch.messages) {
        if (Number(offset) >= ends.get(batch.partition)!) continue;
        seen.push({
          partition: batch.partition,
          offset: Number(offset),
          key: key?.toString() ?? null,
          value: value?.toString() ?? null,
          headers: Object.fromEntries(Object.entries(headers).map(([name, text]) => [name, textOf(text)])),
        });
      }
      look(batch.partition, Number(batch.lastOffset()) + 1);
      return Promise.resolve();
    },
  });
  await done.promise;
  await consumer.disconnect();
  return seen.sort((a, b) => a.partition - b.partition || a.offset - b.offset);
}

/**
 * All that is in a topic, for Kafka's own consumer in Java at read_committed, partition by partition. That of kafkajs takes aborted
 * records for committed ones where transactions of several producers overlap: it takes the list of aborted transactions for one in
 * order of their first offsets.
 */
export async function readTopicInJava(brokers: string, topic: string): Promise<readonly Seen[]> {
  const properties = ["headers", "partition", "offset", "key"].flatMap((
    what,
  ) => ["--formatter-property", `print.${what}=true`]);
  const { success, stdout, stderr } = await new Deno.Command("java", {
    args: [
      ...["-cp", await kafkaClassPath(), "org.apache.kafka.tools.consumer.ConsoleConsumer"],
      ...["--bootstrap-server", brokers, "--topic", topic, "--from-beginning", "--isolation-level", "read_committed"],
      ...["--timeout-ms", "5000", ...properties],
    ],
  }).output();
  const [out, err] = [stdout, stderr].map((bytes) => new TextDecoder().decode(bytes));
  if (!success) throw new Error(`Kafka's consumer failed: ${err}`);
  const seen = out!.trimEnd().split("\n").map((line): Seen => {
    const found = /^Partition:(\d+)\tOffset:(\d+)\t(.*)\t([^\t]*)\t([^\t]*)$/.exec(line);
    if (!found) throw new Error(`Kafka's consumer printed what is no record: ${line}`);
    const [, partition, offset, headers, key, value] = found;
    return {
      ...{ partition: Number(partition), offset: Number(offset), key: key!, value: value! },
      headers: Object.fromEntries(headers!.split(",").map((header) => header.split(/:(.*)/s).slice(0, 2))),
    };
  });
  return seen.sort((a, b) => a.partition - b.partition || a.offset - b.offset);
}

/** Produces by Kafka's own producer in Java, which compresses. */
export async function produceInJava(
  brokers: string,
  topic: string,
  compression: "gzip" | "snappy" | "lz4" | "zstd",
  values: readonly string[],
): Promise<void> {
  const child = new Deno.Command("java", {
    args: [
      ...["-cp", await kafkaClassPath(), "org.apache.kafka.tools.ConsoleProducer"],
      ...["--bootstrap-server", brokers, "--topic", topic, "--compression-codec", compression],
    ],
    ...{ stdin: "piped", stdout: "null", stderr: "piped" },
  }).spawn();
  const writer = child.stdin.getWriter();
  await writer.write(new TextEncoder().encode(values.map((value) => `${value}\n`).join("")));
  await writer.close();
  const { success, stderr } = await child.output();
  if (!success) throw new Error(`Kafka's producer failed: ${new TextDecoder().decode(stderr)}`);
}
