/**
 * Relays from every outbox into Kafka, in processes of their own, that are killed or stopped. Afterwards a reader at
 * read_committed, which is not ours, counts what is in the topic.
 */
import { assert, assertEquals } from "@std/assert";
import { DatabaseSync } from "node:sqlite";
// @ts-types="@types/pg"
import pg from "pg";
import { migratePostgres } from "@effectonce/effectonce/postgres";
import { migrateSqlite, sqliteOutbox, sqliteStore } from "@effectonce/effectonce/sqlite";
import { Running } from "./cli_run.ts";
import { connect } from "./crash_servers_child.ts";
import type { Plan } from "./kafka/crash_child.ts";
import { makeTopic, readTopic, readTopicInJava } from "./kafka/topics.ts";
import { database, service } from "./services/mod.ts";

const LONG = Deno.env.get("EFFECTONCE_LONG") === "1";
const BROKERS = await service("kafka");
type Server = Plan["server"];
const SERVERS: readonly Server[] = ["sqlite", "postgres", "mariadb", "mysql"];

interface Outbox {
  enqueue(ids: readonly string[]): Promise<void>;
  pending(): Promise<number>;
}

/** A fresh outbox, a topic, and the processes that a test starts between them. */
class Place implements AsyncDisposable {
  readonly #disposed = new AsyncDisposableStack();
  readonly server: Server;
  readonly url: string;
  readonly topic: string;
  readonly outbox: Outbox;
  private constructor(server: Server, url: string, topic: string, outbox: Outbox, disposed: AsyncDisposableStack) {
    this.server = server;
    this.url = url;
    this.topic = topic;
    this.outbox = outbox;
    this.#disposed = disposed;
  }
  static async make(server: Server, partitions = 3): Promise<Place> {
    const disposed = new AsyncDisposableStack();
    const topic = await makeTopic(BROKERS, { partitions });
    const messages = (ids: readonly string[]) => ids.map((id) => ({ id, topic, key: keyOf(id), value: { id } }));
    if (server === "sqlite") {
      const folder = await Deno.makeTempDir({ prefix: "effectonce-kafka-" });
      disposed.defer(() => Deno.remove(folder, { recursive: true }));
      const url = `${folder}/app.db`;
      const client = disposed.adopt(new DatabaseSync(url), (client) => Promise.resolve(client.close()));
      await migrateSqlite(client);
      const store = sqliteStore(client);
      return new Place(server, url, topic, {
        enqueue: (ids) => store.transaction((effects) => effects.enqueue(...messages(ids))),
        pending: async () => (await sqliteOutbox(client).status()).pending,
      }, disposed);
    }
    const { url } = disposed.use(await database(server));
    const db = disposed.use(connect(server, url));
    await db.migrate();
    const store = db.store();
    return new Place(server, url, topic, {
      enqueue: (ids) => store.transaction((effects) => effects.enqueue(...messages(ids))),
      pending: async () => (await db.outbox().status()).pending,
    }, disposed);
  }
  /** A relay in a process of its own. */
  relay(plan: Partial<Plan> = {}): Running {
    const whole: Plan = {
      ...{
        server: this.server,
        url: this.url,
        brokers: BROKERS,
        topic: this.topic,
        step: "",
        time: 1,
        leaseMs: 300,
        drain: false,
      },
      batch: 5,
      ...plan,
    };
    const script = new URL("./kafka/crash_child.ts", import.meta.url).pathname;
    const args = ["run", "-A", "--quiet", script, JSON.stringify(whole)];
    const command = new Deno.Command(Deno.execPath(), { args, stdin: "null", stdout: "piped", stderr: "piped" });
    const running = new Running(command.spawn());
    this.#disposed.defer(async () => {
      try {
        running.kill("SIGKILL");
      } catch {
        // It has ended.
      }
      await running.ended();
    });
    return running;
  }
  /** Lets a fresh process finish. */
  async drain(plan: Partial<Plan> = {}): Promise<void> {
    const { code, stdout } = await this.relay({ ...plan, drain: true }).ended();
    assertEquals([code, stdout.trimEnd().split("\n").at(-1)], [0, "drained"]);
    assertEquals(await this.outbox.pending(), 0);
  }
  /** The ids in the topic, partition by partition. */
  async ids(): Promise<string[]> {
    return (await readTopic(BROKERS, this.topic)).map(({ headers }) => headers["ce_id"]!);
  }
  async [Symbol.asyncDispose](): Promise<void> {
    await this.#disposed.disposeAsync();
  }
}

/** Kills a process, and waits until it is gone. */
async function kill(running: Running): Promise<void> {
  running.kill("SIGKILL");
  assertEquals((await running.ended()).signal, "SIGKILL");
}

/** The messages of a round: two keys, three messages each. */
const round = (n: number) => [1, 2, 3, 4, 5, 6].map((i) => `${n}-${i}`);
const keyOf = (id: string) => id.replace(/\d+$/, (i) => `key${Number(i) % 2}`);

/** Asserts that each key's messages came in order. */
function assertOrder(ids: readonly string[]): void {
  const last = new Map<string, string>();
  for (const id of ids) {
    const before = last.get(keyOf(id)) ?? "0-0";
    assert(Number(before.split("-")[1]) < Number(id.split("-")[1]), `${id} came after ${before}`);
    last.set(keyOf(id), id);
  }
}

// ------------------------------------------------------------------------------------------------ at every step, SIGKILL

/** Each step that touches one of the systems, and the times that it gets there: once at the start, then with each batch. */
const STEPS: readonly (readonly [step: string, times: readonly number[]])[] = [
  ["source.open", [1]],
  ["source.settled", [1]],
  ["sink.open", [1]],
  ["client.open", [1]],
  ["client.begin", [1]],
  ["client.send", [1, 2, 3]],
  ["client.commit", [1, 2, 3]],
  ["client.read", [2]],
  ["source.seal", [1, 2]],
  ["sink.commit", [1, 2]],
  ["sink.close", [1]],
  ["source.close", [1]],
];
const MOMENTS = STEPS.flatMap(([step, times]) =>
  times.flatMap((time) => [{ step: `before ${step}`, time }, { step: `after ${step}`, time }])
);

for (const [nth, server] of SERVERS.entries()) {
  Deno.test(`${server} into Kafka: SIGKILL at each step, each message once, in order (acceptance 2)`, async (t) => {
    await using place = await Place.make(server);
    // Each step on each server takes long: else on PostgreSQL, and on one of the others in turn.
    const moments = MOMENTS.filter((_, i) => LONG || server === "postgres" || i % 3 === nth % 3);
    for (const [n, moment] of moments.entries()) {
      await t.step(`SIGKILL ${moment.step}, the ${moment.time}. time`, async () => {
        await place.outbox.enqueue(round(n));
        const running = place.relay({ ...moment, drain: true });
        assertEquals(await running.until((line) => line.startsWith("at ")), `at ${running.pid}`);
        await kill(running);
      });
    }
    await t.step("a fresh process drains", () => place.drain());
    const ids = await place.ids();
    assertEquals(ids.toSorted(), moments.flatMap((_, n) => round(n)).toSorted());
    assertOrder(ids);
  });
}

// ------------------------------------------------------------------------------------------------------ at random moments

/** Four writers, whose transactions overlap, so that they commit in another order than they insert; each has keys of its own. */
async function writeWhile(place: Place, work: Promise<unknown>): Promise<string[]> {
  const db = connect(place.server as "postgres", place.url);
  let over = false;
  work.finally(() => over = true);
  const written: string[] = [];
  await Promise.all([0, 1, 2, 3].map(async (writer) => {
    const { sql, close } = await db.session();
    for (let n = 1; !over; n++) {
      const ids = Array.from({ length: 5 }, (_, i) => `w${writer}.${i}-${n}`);
      await sql("begin");
      for (const id of ids) {
        await sql(`insert into effectonce_outbox (id, topic, "key", value) values (?, ?, ?, ?)`, [
          id,
          place.topic,
          keyOf(id),
          "{}",
        ]);
      }
      await new Promise((resolve) => setTimeout(resolve, Math.random() * 30));
      await sql(n % 10 === 9 ? "rollback" : "commit");
      if (n % 10 !== 9) written.push(...ids);
    }
    await close();
  }));
  await db[Symbol.asyncDispose]();
  return written;
}

const kills = LONG ? 200 : 20;
for (const server of ["postgres", ...LONG ? ["mariadb", "mysql"] as const : []] as const) {
  Deno.test(`${server} into Kafka: ${kills} SIGKILLs at random moments of two relays, four writers: each message once, in order`, async () => {
    await using place = await Place.make(server);
    const killing = (async () => {
      const running = [place.relay({ batch: 50 }), place.relay({ batch: 50 })];
      for (let n = 0; n < kills; n++) {
        const victim = running[n % 2]!;
        await victim.until((line) => line.includes(`"started"`) || line.includes(`"delivered"`) || n > 2);
        // The moment is random; nothing waits for it to have passed.
        await new Promise((resolve) => setTimeout(resolve, 200 + Math.random() * 800));
        await kill(victim);
        running[n % 2] = place.relay({ batch: 50 });
      }
      for (const one of running) await kill(one);
    })();
    const written = await writeWhile(place, killing);
    await killing;
    await place.drain({ batch: 500 });
    const ids = (await readTopicInJava(BROKERS, place.topic)).map(({ headers }) => headers["ce_id"]!);
    assert(written.length > 500, `only ${written.length} were written`);
    assertEquals(ids.toSorted(), written.toSorted());
    assertOrder(ids);
  });
}

const moves = LONG ? 60 : 8;
Deno.test("postgres into Kafka: eight shards move between relays that come and go under load: each message once, in order (acceptance 29)", async () => {
  await using place = await Place.make("postgres");
  const pool = new pg.Pool({ connectionString: place.url });
  await migratePostgres(pool, { shards: 8 });
  await pool.end();
  const moving = (async () => {
    const running = [place.relay({ batch: 50 }), place.relay({ batch: 50 })];
    for (let n = 0; n < moves; n++) {
      await new Promise((resolve) => setTimeout(resolve, 300 + Math.random() * 700));
      // One more, one less: in order, or by force.
      if (running.length < 3) running.push(place.relay({ batch: 50 }));
      else if (n % 2 === 0) await kill(running.shift()!);
      else {
        const [one] = running.splice(0, 1);
        one!.kill("SIGTERM");
        await one!.ended();
      }
    }
    for (const one of running) await kill(one);
  })();
  const written = await writeWhile(place, moving);
  await moving;
  await place.drain({ batch: 500 });
  const seen = await readTopicInJava(BROKERS, place.topic);
  const ids = seen.map(({ headers }) => headers["ce_id"]!);
  assertEquals(ids.toSorted(), written.toSorted());
  assertOrder(ids);
  // Of each shard the positions are there without a gap: who reads all partitions can tell.
  const shards = Map.groupBy(seen, ({ headers }) => headers["effectonce-shard"]!);
  assert(shards.size > 1, "the keys went to several shards");
  for (const [shard, records] of shards) {
    const positions = records.map(({ headers }) => Number(headers["effectonce-position"])).toSorted((a, b) => a - b);
    assertEquals(positions, positions.map((_, i) => i), `positions of shard ${shard}`);
  }
});

Deno.test("the loop that most people write doubles messages under the same kills: else the tests above would prove nothing", async () => {
  await using place = await Place.make("postgres", 1);
  let doubled = 0;
  const killing = (async () => {
    for (let n = 0; n < 100 && doubled === 0; n++) {
      const victim = place.relay({ naive: true, batch: 50 });
      await victim.until((line) => line === "started");
      await new Promise((resolve) => setTimeout(resolve, 200 + Math.random() * 300));
      await kill(victim);
      const sent = await place.ids();
      doubled = sent.length - new Set(sent).size;
    }
  })();
  await writeWhile(place, killing);
  await killing;
  assert(doubled > 0, "none came twice: the kills did not hit");
});
