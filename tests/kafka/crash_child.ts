/**
 * A relay from an outbox into Kafka in a process of its own, that stops dead at a named step until it is killed; or, as a control,
 * the loop that most people write. Its one argument is a {@linkcode Plan}.
 *
 * @module
 */
import { DatabaseSync } from "node:sqlite";
// @ts-types="@types/pg"
import pg from "pg";
import { type AtomicSink, relay, type Source } from "@effectonce/effectonce";
import { kafkaSink } from "@effectonce/effectonce/kafka";
import { kafkajs } from "@effectonce/effectonce/kafkajs";
import { relayShards } from "@effectonce/effectonce/shards";
import { sqliteOutbox } from "@effectonce/effectonce/sqlite";
import { connect } from "../crash_servers_child.ts";
import type { Kind } from "../services/servers.ts";
import { kafkaOf } from "./topics.ts";
import { say, stopping } from "../stopping.ts";

/** What the child does, and where it stops. */
export interface Plan {
  /** Which server has the outbox. */
  readonly server: Kind | "sqlite";
  /** Its database, or the file. */
  readonly url: string;
  /** The brokers. */
  readonly brokers: string;
  /** The topic. */
  readonly topic: string;
  /** Such as `before sink.commit` or `after client.send`; empty: nowhere. */
  readonly step: string;
  /** At the so-manieth time that it gets there, from 1. */
  readonly time: number;
  /** Lease in milliseconds. */
  readonly leaseMs: number;
  /** Until nothing is left, or until killed. */
  readonly drain: boolean;
  /** Messages in a batch. */
  readonly batch: number;
  /** The loop that most people write, instead of a relay. */
  readonly naive?: boolean;
  /** How long a transaction may stay open, in milliseconds. */
  readonly transactionTimeoutMs?: number;
}

/** Reads rows, sends them, deletes them: what a process that dies in between does again. */
async function naive({ url, brokers, topic, batch }: Plan): Promise<void> {
  const pool = new pg.Pool({ connectionString: url });
  const producer = kafkaOf(brokers).producer({ idempotent: true, createPartitioner: () => () => 0 });
  await producer.connect();
  say("started");
  for (;;) {
    const client = await pool.connect();
    await client.query("begin");
    const { rows } = await client.query(
      `select seq, id, key, value from effectonce_outbox order by seq limit ${batch} for update skip locked`,
    );
    if (rows.length > 0) {
      await producer.send({ topic, messages: rows.map(({ id, key, value }) => ({ key, value, headers: { ce_id: id } })) });
      await client.query("delete from effectonce_outbox where seq = any($1)", [rows.map(({ seq }) => seq)]);
    }
    await client.query("commit");
    client.release();
    if (rows.length === 0) await new Promise((resolve) => setTimeout(resolve, 5));
  }
}

if (import.meta.main) {
  const plan: Plan = JSON.parse(Deno.args[0]!);
  if (plan.naive) await naive(plan);
  const stop = stopping(plan);
  const { brokers, topic, leaseMs, drain, batch, transactionTimeoutMs } = plan;
  const client = stop("client", kafkajs(kafkaOf(brokers)));
  const to: AtomicSink = stop("sink", kafkaSink(client, { topic, transactionTimeoutMs }));
  const observe = (event: object) => say(JSON.stringify(event));
  const options = { to, leaseMs, drain, batch, minRetryMs: 1, maxRetryMs: 20, pollMs: 5, observe };
  if (plan.server === "sqlite") {
    const database = new DatabaseSync(plan.url);
    database.prepare("pragma busy_timeout = 20").get();
    const source: Source = stop("source", sqliteOutbox(database));
    await relay({ ...options, from: source });
  } else {
    const outbox = connect(plan.server, plan.url).outbox();
    await relayShards({
      ...options,
      from: { ...outbox, shard: (shard, member) => stop("source", outbox.shard(shard, member)) },
    });
  }
  say("drained");
  Deno.exit(0); // Pools and connections keep a process alive.
}
