/** Topics for tests, and what readers see in them. */
import { type IHeaders, Kafka, logLevel } from "kafkajs";

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

/** A record as a reader sees it. */
export interface Seen {
  readonly partition: number;
  readonly offset: number;
  readonly key: string | null;
  readonly value: string | null;
  readonly headers: Readonly<Record<string, string>>;
}

const textOf = (value: IHeaders[string]): string => Array.isArray(value) ? value.map(textOf).join() : String(value ?? "");

/** All that is in a topic at the moment, for a reader at read_committed that is kafkajs' own, partition by partition. */
export async function readTopic(brokers: string, topic: string): Promise<readonly Seen[]> {
  const kafka = kafkaOf(brokers);
  const admin = kafka.admin();
  await admin.connect();
  // What this answers at read_committed's isolation is the last stable offset, which a transaction that is open holds back.
  const ends = new Map((await admin.fetchTopicOffsets(topic)).map(({ partition, high }) => [partition, Number(high)]));
  await admin.disconnect();
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
