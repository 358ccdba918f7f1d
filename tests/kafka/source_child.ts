/** A relay from a topic into PostgreSQL, or into another topic, that stops for ever at one of its steps; whoever started it kills it there. */
import { handler, type Message } from "@effectonce/effectonce";
import { kafkaSink } from "@effectonce/effectonce/kafka";
import { kafkaSource } from "@effectonce/effectonce/kafka-source";
import { kafkajs } from "@effectonce/effectonce/kafkajs";
import { postgresStore } from "@effectonce/effectonce/postgres";
import { relayShards } from "@effectonce/effectonce/shards";
// @ts-types="@types/pg"
import pg from "pg";
import { say, type Stop, stopping } from "../stopping.ts";
import { kafkaOf } from "./topics.ts";

/** What a child is to do; with an empty step it goes on to the end. */
export interface Plan extends Stop {
  readonly brokers: string;
  readonly topic: string;
  /** The database. */
  readonly url: string;
  /** The other topic, if it is to go there. */
  readonly out?: string;
}

if (import.meta.main) {
  const plan: Plan = JSON.parse(Deno.args[0]!);
  const { brokers, topic, url, out } = plan;
  const stop = stopping(plan);
  const pool = new pg.Pool({ connectionString: url });
  const source = kafkaSource(kafkajs(kafkaOf(brokers)), { topic });
  const part = stop("handler", { run: (id: number) => Promise.resolve(id) });
  const transform = async (message: Message) => {
    await part.run(message.json<{ id: number }>().id);
    return { value: message.value };
  };
  const rows = handler(postgresStore(pool), async (message, _, client) => {
    const { id } = message.json<{ id: number }>();
    await part.run(id);
    await client.query("insert into payments (topic, id) values ($1, $2)", [topic, id]);
  });
  await relayShards({
    ...{ name: topic, drain: true, batch: 5, leaseMs: 6_000, minRetryMs: 1, maxRetryMs: 20, pollMs: 5 },
    from: { ...source, shard: (shard, member) => stop("source", source.shard(shard, member)) },
    to: stop("sink", out === undefined ? rows : kafkaSink(kafkajs(kafkaOf(brokers)), { topic: out, transform })),
  });
  say("drained");
  Deno.exit(0);
}
