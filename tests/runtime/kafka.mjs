/** Relays two messages into Kafka, in Node or Bun. Arguments: brokers, topic, where kafkajs is found. */
import { relay } from "@effectonce/effectonce";
import { kafkaSink } from "@effectonce/effectonce/kafka";
import { kafkajs } from "@effectonce/effectonce/kafkajs";
import { memoryOutbox, memoryStore } from "@effectonce/effectonce/memory";
import { createRequire } from "node:module";
import process from "node:process";

const [brokers, topic, place] = process.argv.slice(2);
const { Kafka, logLevel } = createRequire(place)("kafkajs");
const store = memoryStore();
await store.enqueue({ id: "m1", topic, key: "k", value: { n: 1 } }, {
  id: "m2",
  topic,
  key: "k",
  value: "ü",
  headers: { a: "b" },
});
const to = kafkaSink(kafkajs(new Kafka({ brokers: [brokers], logLevel: logLevel.NOTHING })));
// Every outbox in memory has the same identity: the name is what tells the position of this one.
const report = await relay({ name: topic, from: memoryOutbox(store), to, drain: true });
console.log(JSON.stringify(report));
process.exit(0);
