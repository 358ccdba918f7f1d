/**
 * Relays two messages into Kafka and out of it again, in Node or Bun. Arguments: brokers, topic, another one, where kafkajs is found.
 */
import { handler, relay } from "@effectonce/effectonce";
import { kafkaSink } from "@effectonce/effectonce/kafka";
import { kafkaSource } from "@effectonce/effectonce/kafka-source";
import { kafkajs } from "@effectonce/effectonce/kafkajs";
import { memoryOutbox, memoryStore } from "@effectonce/effectonce/memory";
import { relayShards } from "@effectonce/effectonce/shards";
import { createRequire } from "node:module";
import process from "node:process";

const [brokers, topic, other, place] = process.argv.slice(2);
const { Kafka, logLevel } = createRequire(place)("kafkajs");
const store = memoryStore();
await store.enqueue({ id: "m1", topic, key: "k", value: { n: 1 } }, {
  id: "m2",
  topic,
  key: "k",
  value: "ü",
  headers: { a: "b" },
});
const client = kafkajs(new Kafka({ brokers: [brokers], logLevel: logLevel.NOTHING }));
const to = kafkaSink(client);
// Every outbox in memory has the same identity: the name is what tells the position of this one.
const report = await relay({ name: topic, from: memoryOutbox(store), to, drain: true });
const from = kafkaSource(client, { topic });
const handled = [];
const into = handler(memoryStore(), (message) => Promise.resolve(void handled.push(message.text())));
await relayShards({ name: `${topic}-handled`, from, to: into, drain: true });
await relayShards({ name: `${topic}-through`, from, to: kafkaSink(client, { topic: other }), drain: true });
console.log(JSON.stringify({ report, handled }));
process.exit(0);
