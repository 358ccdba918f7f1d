/** The consumer that most people write: inserts a row for each message; kafkajs commits the offsets. Arguments: brokers, topic, group, URL. */
import { Kafka, logLevel } from "kafkajs";
// @ts-types="@types/pg"
import pg from "pg";

const [brokers, topic, groupId, url] = Deno.args;
const pool = new pg.Pool({ connectionString: url });
const kafka = new Kafka({ brokers: brokers!.split(","), logLevel: logLevel.NOTHING });
const consumer = kafka.consumer({ groupId: groupId!, sessionTimeout: 6_000, heartbeatInterval: 500 });
await consumer.connect();
await consumer.subscribe({ topics: [topic!], fromBeginning: true });
await consumer.run({
  async eachMessage({ message }) {
    const { id, total } = JSON.parse(message.value!.toString());
    await pool.query("insert into payments (id, total) values ($1, $2)", [id, total]);
  },
});
