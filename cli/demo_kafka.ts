/**
 * The demo with a broker: orders from an outbox into Kafka, by processes that are killed between the send and the delete.
 *
 * @module
 */
import { linesOf, start } from "./demo.ts";
import { readKafka } from "./kafka.ts";
import { openDatabase } from "./open.ts";

/** How to run the demo. */
export interface KafkaDemoOptions {
  /** Orders in each run. */
  readonly orders: number;
  /** The broker's URL. */
  readonly url: string;
  /** How a sentence names where it was given. */
  readonly label: string;
  /** Print JSON. */
  readonly json: boolean;
  /** Prints. */
  write(text: string): void;
}

/** What a run came to: a count of orders each, but for `kills`. */
interface Run {
  readonly name: string;
  readonly orders: number;
  readonly once: number;
  readonly twice: number;
  readonly lost: number;
  readonly kills: number;
}

/** When a process is killed: when it has said so often that a batch is out. */
const KILLS: readonly number[] = [1, 2, 1, 3, 2, 1];

type Charging = (database: string, topic: string) => Deno.ChildProcess;

/** Runs both ways into Kafka, side by side; answers the exit code. */
export async function demoKafka({ orders, url, label, json, write }: KafkaDemoOptions): Promise<number> {
  const { client, kafka } = readKafka(label, url);
  const admin = (await kafka()).admin();
  await (await client.open()).close(); // Says it in words if nobody is there.
  await admin.connect();
  const folder = await Deno.makeTempDir({ prefix: "effectonce-demo-" });
  const topics: string[] = [];

  async function run(name: string, out: (line: string) => boolean, sending: Charging): Promise<Run> {
    const topic = `effectonce-demo-${crypto.randomUUID().slice(0, 8)}`;
    topics.push(topic);
    const connection = await client.open();
    await connection.create(topic, { partitions: 1, copies: 1 });
    const path = `${folder}/${topic}.db`;
    const database = await openDatabase("--store", `sqlite:${path}`, { create: true });
    await database.migrate();
    const names = Array.from({ length: orders }, (_, i) => `order-${i + 1}`);
    const messages = names.map((order) => ({ id: order, topic: "order_placed", key: order, value: { order } }));
    await database.store.transaction((effects) => effects.enqueue(...messages));
    let kills = 0;
    for (;;) {
      const child = sending(path, topic);
      let times = 0;
      for await (const line of linesOf(child)) {
        if (!out(line) || ++times !== KILLS[kills]) continue;
        try {
          child.kill("SIGKILL");
          kills++;
        } catch {
          // It has ended: there is nothing left to send.
        }
      }
      if ((await child.status).signal !== "SIGKILL") break;
    }
    for (const { owner } of await database.outbox({}).sealed("default")) {
      topics.push(`effectonce-cursor-${owner.source}-default`);
    }
    await database.close();

    const counts = new Map<string, number>();
    for (let next = 0, end = await connection.end(topic, 0); next < end;) {
      const answer = await connection.read(topic, 0, next);
      next = answer.next;
      for (const { headers } of answer.records) {
        const id = headers["ce_id"] ?? "";
        counts.set(id, (counts.get(id) ?? 0) + 1);
      }
    }
    await connection.close();
    const times = (fits: (count: number) => boolean) => names.filter((order) => fits(counts.get(order) ?? 0)).length;
    return { name, orders, once: times((n) => n === 1), twice: times((n) => n > 1), lost: times((n) => n === 0), kills };
  }

  const say = (text: string) => json || write(text);
  try {
    say(
      `${orders} orders are in an outbox, and go into Kafka. The process that sends them is killed (kill -9) ${KILLS.length}\n`,
    );
    say(`times, each time when a batch is in Kafka and not yet out of the outbox, and restarted.\n\n`);
    const header = ["orders", "in Kafka once", "in Kafka twice", "lost", "kills"];
    say(`${"".padEnd(44)}${header.join("  ")}\n`);
    // By a variable: others may see the arguments of a process, and the URL may have a password.
    const kept = (url: string) => ({ EFFECTONCE_DEMO_KAFKA: url });
    const naive: Charging = (path, topic) => start("./demo_naive_kafka.ts", [path, topic], "piped", kept(url));
    // Each batch tells of its five orders: the first of them says that it is out.
    let told = "";
    const committed = (line: string) => {
      const event = JSON.parse(line);
      if (event.type !== "delivered" || event.ms === told) return false;
      told = event.ms;
      return true;
    };
    const relay: Charging = (path, topic) => {
      const to = `${url.split("?")[0]!.replace(/\/+$/, "")}/${topic}${url.includes("?") ? `?${url.split("?")[1]}` : ""}`;
      const flags = ["--drain", "--json", "--batch", "5", "--lease-ms", "800", "--poll-ms", "10"];
      const ends = ["--from", `sqlite:${path}?driver=node`, "--to", "env:EFFECTONCE_DEMO_KAFKA"];
      return start("../cli.ts", ["relay", ...ends, ...flags], "piped", kept(to));
    };
    const runs: Run[] = [];
    for (
      const [name, out, sending] of [
        ["naive loop: send, then delete", (line: string) => line === "sent", naive],
        ["effectonce: sealed batches, transactions", committed, relay],
      ] as const
    ) {
      const result = await run(name, out, sending);
      runs.push(result);
      const cells = [result.orders, result.once, result.twice, result.lost, result.kills];
      say(`${name.padEnd(44)}${cells.map((cell, i) => String(cell).padStart(header[i]!.length)).join("  ")}\n`);
    }
    const [bad, good] = runs;
    say(
      `\nThe naive loop sent ${
        bad!.twice
      } orders twice. effectonce commits the batch and its number in one transaction, and asks\n` +
        `Kafka for the number when it starts again. Counted by a reader at read_committed.\n`,
    );
    if (json) write(`${JSON.stringify({ runs })}\n`);
    return good!.once === orders ? 0 : 1;
  } finally {
    await admin.deleteTopics({ topics: (await admin.listTopics()).filter((name) => topics.includes(name)) }).catch(() => {});
    await admin.disconnect();
    await Deno.remove(folder, { recursive: true });
  }
}
