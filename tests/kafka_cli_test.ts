/** The command line from outboxes into a real Kafka. */
import { assert, assertEquals, assertMatch, assertStringIncludes } from "@std/assert";
// @ts-types="@types/pg"
import pg from "pg";
import { type KafkaClient, kafkaSink } from "@effectonce/effectonce/kafka";
import { kafkajs } from "@effectonce/effectonce/kafkajs";
import { postgresOutbox } from "@effectonce/effectonce/postgres";
import { maskedUrl } from "../cli/mask.ts";
import { assertFailure, assertUsage, emptyBox, type Event, until } from "./cli_run.ts";
import { freshName, kafkaOf, makeTopic, readTopic } from "./kafka/topics.ts";
import { startKafka } from "./services/kafka.ts";
import { database, service } from "./services/mod.ts";
import { freePort } from "./services/process.ts";

const BROKERS = await service("kafka");
const KAFKA = `kafka://${BROKERS}`;
const QUICK = ["--lease-ms", "600", "--min-retry-ms", "1", "--max-retry-ms", "20", "--poll-ms", "5"];

async function place(kind: "postgres" | "mysql" | "mariadb" | "sqlite" = "postgres") {
  await using stack = new AsyncDisposableStack();
  const at = stack.use(await emptyBox());
  const topic = await makeTopic(BROKERS, { partitions: 3 });
  const made = kind === "sqlite" ? undefined : stack.use(await database(kind));
  const url = made === undefined ? "sqlite:app.db" : made.url.replace(/^mysql:/, `${kind}:`);
  await at.ok(["init", "--store", url]);
  const kept = stack.move();
  return {
    at,
    url,
    topic,
    async enqueue(...ids: readonly string[]) {
      const lines = ids.map((id) => JSON.stringify({ id, topic, key: id.split("-")[0], value: { id } }));
      await at.ok(["enqueue", "--store", url, "--jsonl", "-"], { stdin: `${lines.join("\n")}\n` });
    },
    ids: async (name = topic) => (await readTopic(BROKERS, name)).map(({ headers }) => headers["ce_id"]!),
    relay: (...more: readonly string[]) => ["relay", "--from", url, "--to", KAFKA, ...QUICK, ...more],
    cursor: (...more: readonly string[]) => ["cursor", more[0]!, "--from", url, "--to", KAFKA, ...more.slice(1)],
    [Symbol.asyncDispose]: () => kept.disposeAsync(),
  };
}

const eventsOf = (stdout: string): Event[] => stdout.trimEnd().split("\n").map((line) => JSON.parse(line));
const ids = (from: number, to: number) => Array.from({ length: to - from + 1 }, (_, i) => `k${(from + i) % 3}-${from + i}`);

for (const kind of ["sqlite", "postgres", "mysql", "mariadb"] as const) {
  Deno.test(`${kind}: rows go to the topics that they name, once each, and a second run goes on behind them`, async () => {
    await using shop = await place(kind);
    await shop.enqueue(...ids(1, 20));
    const stdout = await shop.at.ok(shop.relay("--drain", "--batch", "7", "--json"));
    assertEquals((eventsOf(stdout)[0] as unknown as { guarantee: { level: string } }).guarantee.level, "exactly-once");
    await shop.enqueue(...ids(21, 25));
    await shop.at.ok(shop.relay("--drain"));
    const seen = await shop.ids();
    assertEquals(seen.toSorted(), ids(1, 25).toSorted());
    for (const key of ["k0", "k1", "k2"]) {
      const mine = seen.filter((id) => id.startsWith(key)).map((id) => Number(id.slice(3)));
      assertEquals(mine, mine.toSorted((a, b) => a - b));
    }
    const [shown] = await shop.at.json(shop.cursor("show")) as { verdict: string; kafka: { records: number } }[];
    assertEquals([shown!.verdict, shown!.kafka.records], ["fits", 25]);
  });
}

Deno.test("a topic in the URL takes all rows; with create-topics it is made", async () => {
  await using shop = await place();
  await shop.enqueue(...ids(1, 3));
  const topic = freshName("all");
  await shop.at.ok(["relay", "--from", shop.url, "--to", `${KAFKA}/${topic}`, "--create-topics", "--drain"]);
  assertEquals((await shop.ids(topic)).toSorted(), ids(1, 3).toSorted());
  assertEquals(await shop.ids(), []);
});

Deno.test("a second relay stands by, and takes over when the first is killed", async () => {
  await using shop = await place();
  const first = shop.at.start(shop.relay("--json"));
  await first.event("idle");
  const second = shop.at.start(shop.relay("--json"));
  await shop.enqueue(...ids(1, 6));
  for (let n = 0; n < 6; n++) await first.event("delivered");
  first.kill("SIGKILL");
  assertEquals((await first.ended()).signal, "SIGKILL");
  await shop.enqueue(...ids(7, 9));
  for (let n = 0; n < 3; n++) await second.event("delivered");
  const { code, stdout } = await second.stop();
  assertEquals(code, 0);
  assertEquals(eventsOf(stdout).filter(({ type }) => type === "fenced" || type === "failed"), []);
  assertEquals((await shop.ids()).toSorted(), ids(1, 9).toSorted());
});

Deno.test("the shards of an outbox share a cursor topic, and their relays the work; each key in order", async () => {
  await using shop = await place();
  await shop.at.ok(["init", "--store", shop.url, "--shards", "4"]);
  const relays = [shop.at.start(shop.relay("--json")), shop.at.start(shop.relay("--json"))];
  const all = Array.from({ length: 200 }, (_, i) => `k${i % 20}-${i}`);
  await shop.enqueue(...all);
  let seen: string[] = [];
  while (seen.length < all.length) seen = await shop.ids();
  for (const relay of relays) assertEquals((await relay.stop()).code, 0);
  assertEquals(seen.toSorted(), all.toSorted());
  for (let k = 0; k < 20; k++) {
    const mine = seen.filter((id) => id.startsWith(`k${k}-`)).map((id) => Number(id.split("-")[1]));
    assertEquals(mine, mine.toSorted((a, b) => a - b));
  }
  const shown = await shop.at.json(shop.cursor("show")) as {
    kafka: { topic: string; partition: number; records: number };
  }[];
  assertEquals(shown.map(({ kafka }) => kafka.partition), [0, 1, 2, 3]);
  assertEquals(new Set(shown.map(({ kafka }) => kafka.topic)).size, 1);
  assertEquals(shown.reduce((sum, { kafka }) => sum + kafka.records, 0), 200);
});

async function deleteTopic(name: string): Promise<void> {
  const admin = kafkaOf(BROKERS).admin();
  await admin.connect();
  try {
    await admin.deleteTopics({ topics: [name] });
    // Until every request knows.
    while ((await admin.listTopics()).includes(name)) await new Promise((resolve) => setTimeout(resolve, 50));
  } finally {
    await admin.disconnect();
  }
}

Deno.test("a cursor topic that was deleted ends the relay; the cursor is rebuilt from the topics, and nothing goes out twice (acceptance 5, 26)", async () => {
  await using shop = await place();
  await shop.enqueue(...ids(1, 6));
  await shop.at.ok(shop.relay("--drain", "--batch", "6"));
  // Sealed and sent, but not settled: the connection to the database is cut after the commit into Kafka.
  await shop.enqueue(...ids(7, 12));
  const relay = shop.at.start(shop.relay("--json", "--batch", "3"));
  await relay.event("delivered");
  relay.kill("SIGKILL");
  await relay.ended();
  const [before] = await shop.at.json(shop.cursor("show")) as { kafka: { topic: string } }[];
  await deleteTopic(before!.kafka.topic);
  await makeTopic(BROKERS, { name: before!.kafka.topic, settings: { "cleanup.policy": "compact" } });
  assertMatch((await shop.at.run(shop.relay("--drain"))).stderr, /ends at batch 0, but \d were delivered/, "made anew");
  await deleteTopic(before!.kafka.topic);

  const ended = await shop.at.run(shop.relay("--drain"));
  assertEquals(ended.code, 1);
  assertMatch(ended.stderr, /kafka:.* ends at batch 0, but \d were delivered: it was removed, emptied, replaced or damaged/);
  assertStringIncludes(ended.stderr, "cursor rebuild");
  const shown = await shop.at.run(shop.cursor("show", "--json"));
  assertEquals([shown.code, JSON.parse(shown.stdout)[0].verdict], [1, "lost"]);
  assertUsage(await shop.at.run(shop.cursor("rebuild")), "Say --yes if that is what you want");
  const stdout = await shop.at.ok(shop.cursor("rebuild", "--yes"));
  assertMatch(stdout, /^the cursor is set to batch \d; \d batch/);
  await shop.at.ok(shop.relay("--drain"));
  assertEquals((await shop.ids()).toSorted(), ids(1, 12).toSorted());
  assertEquals(await shop.at.ok(shop.cursor("rebuild")), "nothing is to be done\n");
});

Deno.test("cursor set says where a relay goes on, and refuses a batch that the outbox does not know", async () => {
  await using shop = await place();
  await shop.enqueue(...ids(1, 3));
  await shop.at.ok(shop.relay("--drain"));
  const set = (n: string, ...more: string[]) => ["cursor", "set", n, ...shop.cursor("set").slice(2), ...more];
  const unknown = await shop.at.run(set("7", "--yes"));
  assertFailure(unknown, "the outbox knows batches 1 to 1 of this relay, and not 7");
  assertUsage(await shop.at.run(set("x", "--yes")), "N must be the number of a batch");
  assertUsage(await shop.at.run(set("1")), "Say --yes if that is what you want");
  await shop.at.ok(set("1", "--yes"));
  await shop.enqueue(...ids(4, 5));
  await shop.at.ok(shop.relay("--drain"));
  assertEquals((await shop.ids()).toSorted(), ids(1, 5).toSorted());
});

Deno.test("a relay is renamed while writers go on: nothing lost, nothing twice, positions without a gap", async () => {
  await using shop = await place();
  const rename = (name: string, ...more: string[]) => ["cursor", "rename", name, ...shop.cursor("rename").slice(2), ...more];
  let n = 0;
  let stopped = false;
  const writing = (async () => {
    while (!stopped) await shop.enqueue(...ids(++n, n += 4));
  })();
  writing.catch(() => {}); // Looked at in the end.
  // Longer than it takes to start a command, on a machine that is busy.
  const slowly = (line: readonly string[]) => line.map((word) => word === "600" ? "4000" : word);
  async function killed(...more: string[]): Promise<void> {
    const relay = shop.at.start(slowly(shop.relay("--json", "--batch", "2", ...more)));
    await relay.event("delivered");
    relay.kill("SIGKILL");
    await relay.ended();
  }
  await killed();
  assertFailure(await shop.at.run(rename("shop")), "it runs, or has died and is waited for");
  await until(async () =>
    !(await shop.at.json(["relays", "--store", shop.url]) as { live: boolean }[]).some(({ live }) => live)
  );
  const { kafka } = (await shop.at.json(shop.cursor("show")) as { kafka: { n: number; records: number } }[])[0]!;
  assert(kafka.n > 0 && kafka.records > 0);
  assertEquals(await shop.at.json(rename("shop")), { relay: "shop", was: "default" });
  assertFailure(await shop.at.run(rename("other")), `it is called "shop" now`);
  assertFailure(
    await shop.at.run(rename("other", "--name", "none")),
    `the outbox knows no relay "none" that has sealed anything`,
  );
  const old = await shop.at.run(shop.relay("--drain"));
  assertEquals(old.code, 1);
  assertMatch(old.stderr, /Relay "default" of .* is called "shop" now/);
  await killed("--name", "shop");
  stopped = true;
  await writing;
  await shop.at.ok(shop.relay("--drain", "--name", "shop"));
  const seen = await readTopic(BROKERS, shop.topic);
  assertEquals(seen.map(({ headers }) => headers["ce_id"]!).toSorted(), ids(1, n).toSorted());
  const positions = seen.map(({ headers }) => Number(headers["effectonce-position"])).toSorted((a, b) => a - b);
  assertEquals(positions, positions.map((_, i) => i));

  assertUsage(await shop.at.run(rename("shop", "--name", "shop")), `the relay's name is "shop" already`);
  const named = ["cursor", "rename", "x", "--from", shop.url, "--to", `${KAFKA}?cursor=mine`];
  assertUsage(await shop.at.run(named), `cursor= names a topic that is relay "default"'s alone`);
  // The number of shards changes only where nothing is left of the old ones; then all begins anew.
  await shop.enqueue(...ids(n + 1, n + 3));
  await killed("--name", "shop");
  assertFailure(await shop.at.run(["init", "--store", shop.url, "--shards", "2"]), "Cannot change the number of shards");
  await shop.at.ok(shop.relay("--drain", "--name", "shop"));
  await shop.at.ok(["init", "--store", shop.url, "--shards", "2"]);
  await shop.enqueue(...ids(n + 4, n + 9));
  await shop.at.ok(shop.relay("--drain", "--name", "shop"));
  assertEquals((await shop.ids()).toSorted(), ids(1, n + 9).toSorted());
});

for (const at of ["with a sealed batch in hand", "with all sent, and nothing but the commit to come"] as const) {
  Deno.test(`a relay that slept, ${at}, while it was renamed, is shut out when it wakes`, async () => {
    await using shop = await place();
    const pool = new pg.Pool({ connectionString: shop.url });
    const kafka = kafkajs(kafkaOf(BROKERS));
    let gate: Promise<void> | undefined;
    let reached = () => {};
    const client: KafkaClient = {
      async open() {
        const connection = await kafka.open();
        return {
          ...connection,
          async begin(...call) {
            const transactions = await connection.begin(...call);
            return {
              ...transactions,
              async commit() {
                reached();
                await gate;
                await transactions.commit();
              },
            };
          },
        };
      },
    };
    const limits = { rows: 1, bytes: 1_000_000 };
    await shop.enqueue("k0-1");
    const source = await postgresOutbox(pool).open({ relay: "old", protocol: "sealed", onPark: "block", leaseMs: 1_000 });
    const sink = await kafkaSink(client).open({ relay: "old", source: source.id, shard: source.shard! });
    const { batches: [first] } = await source.seal([], limits);
    await sink.commit(first!);
    await shop.enqueue("k0-2");
    const { batches: [second] } = await source.seal([first!], limits);
    const open = Promise.withResolvers<void>();
    let sent: Promise<unknown> | undefined;
    if (at.startsWith("with all")) {
      const sending = Promise.withResolvers<void>();
      [gate, reached] = [open.promise, sending.resolve];
      sent = sink.commit(second!).catch((error) => error);
      await sending.promise;
    }
    await pool.query("update effectonce_relays set until_ms = 0");
    await shop.at.ok(["cursor", "rename", "new", "--name", "old", "--from", shop.url, "--to", KAFKA]);
    await shop.at.ok(shop.relay("--drain", "--name", "new"));
    open.resolve();
    assertEquals((await (sent ?? sink.commit(second!).catch((error) => error)) as { code?: string }).code, "fenced");
    await pool.end();
    assertEquals(
      (await readTopic(BROKERS, shop.topic)).map(({ headers }) => [headers["ce_id"], headers["effectonce-position"]]),
      [["k0-1", "0"], ["k0-2", "1"]],
    );
  });
}

Deno.test("a database that went back further than the ring ends the relay; --accept-source goes on with what it has", async () => {
  await using shop = await place();
  const client = new pg.Client({ connectionString: shop.url });
  client.on("error", () => {}); // The database goes before the connection where the test fails.
  await client.connect();
  await shop.enqueue(...ids(1, 4));
  await shop.at.ok(shop.relay("--drain", "--batch", "2"));
  // As an old backup has it: the shard's row is of a time before the last batches, with another history.
  await client.query("update effectonce_shards set sealed = 1, settled = 1, sealed_uid = 'other', settled_uid = 'other'");
  await shop.enqueue(...ids(5, 6));
  const ended = await shop.at.run(shop.relay("--drain"));
  assertEquals(ended.code, 1);
  assertMatch(ended.stderr, /The source has lost batches that were delivered/);
  assertMatch(ended.stderr, /docs\/operations\.md#diverged/);
  const unasked = await shop.at.run(shop.relay("--drain", "--accept-source"));
  assertEquals(unasked.code, 2);
  assertStringIncludes(unasked.stderr, "will be delivered again. Say --yes if that is what you want");
  const stdout = await shop.at.ok(shop.relay("--drain", "--accept-source", "--yes", "--json"));
  assertEquals(eventsOf(stdout).filter(({ type }) => type === "accepted").map(({ n }) => n), [2]);
  assertEquals((await shop.ids()).toSorted(), ids(1, 6).toSorted());
  await client.end();
});

Deno.test("a database that went back a little is repaired from the ring, by itself (acceptance 30)", async () => {
  await using shop = await place();
  const client = new pg.Client({ connectionString: shop.url });
  client.on("error", () => {}); // The database goes before the connection where the test fails.
  await client.connect();
  await shop.enqueue(...ids(1, 5));
  const rows = await client.query("select id, topic, key, value, seq from effectonce_outbox order by seq");
  const before = await client.query("select * from effectonce_shards");
  assertEquals(before.rows, []);
  await shop.at.ok(shop.relay("--drain", "--batch", "2"));
  // As a standby that had not heard of the last transactions: the rows are back, and what was sealed is not known.
  await client.query("delete from effectonce_shards");
  for (const { id, topic, key, value, seq } of rows.rows) {
    const sql =
      "insert into effectonce_outbox (id, topic, key, value, seq) overriding system value values ($1, $2, $3, $4, $5)";
    await client.query(sql, [id, topic, key, value, seq]);
  }
  await shop.enqueue("k0-99");
  const stdout = await shop.at.ok(shop.relay("--drain", "--json"));
  const [repaired] = eventsOf(stdout).filter(({ type }) => type === "repaired") as unknown as {
    batches: number;
    ids: string[];
  }[];
  assertEquals([repaired!.batches, repaired!.ids.toSorted()], [3, ids(1, 5).toSorted()]);
  assertEquals((await shop.ids()).toSorted(), [...ids(1, 5), "k0-99"].toSorted());
  await client.end();
});

Deno.test("without transactions a relay says that it is at least once", async () => {
  await using shop = await place();
  await shop.enqueue(...ids(1, 9));
  const to = `${KAFKA}?transactions=off`;
  const stdout = await shop.at.ok(["relay", "--from", shop.url, "--to", to, "--drain"]);
  assertStringIncludes(stdout, "at-least-once");
  assertEquals((await shop.ids()).toSorted(), ids(1, 9).toSorted());
  assertStringIncludes(await shop.at.ok(["doctor", "--from", shop.url, "--to", to]), "at-least-once");
});

Deno.test("what is wrong with a URL of Kafka is said in a sentence, and no password is shown", async () => {
  await using shop = await place("sqlite");
  const to = (url: string, ...more: string[]) => shop.at.run(["relay", "--from", shop.url, "--to", url, "--drain", ...more]);
  const wrong: readonly (readonly [string, RegExp | string])[] = [
    ["kafka:", "--to: write kafka://host:9092"],
    ["kafka://", "--to: write kafka://host:9092"],
    ["kafka://host:port", "--to: write kafka://host:9092"],
    ["kafka://host:9092/a/b", "--to: write kafka://host:9092"],
    ["kafka://host:9092?group=g", `"group" is not a parameter of kafka: URLs`],
    ["kafka://host:9092?transactions=maybe", "transactions=maybe is not known: use on or off"],
    ["kafka://host:9092?copies=0", "copies must be a whole number from 1 to 32767"],
    ["kafka://host:9092?transactions=off&cursor=x", "cursor is of transactions, and they are off"],
    ["kafka://host:9092?sasl=plain", "to log in it needs user and password"],
    ["kafka://app@host:9092", "to log in it needs user and password"],
    ["kafka://app:s3cret@host:9092?password=other", "user and password are given twice"],
    [
      "kafka://host:9092?sasl=digest&user=a&password=s3cret",
      "sasl=digest is not known: use plain, scram-sha-256 or scram-sha-512",
    ],
    ["kafka://host:9092?user=a&password=env:NO_SUCH_VARIABLE", "the environment has no variable NO_SUCH_VARIABLE"],
    ["kafka://a:s3/cret@host:9092", /in user and password the characters/],
  ];
  for (const [url, sentence] of wrong) {
    const ended = await to(url);
    assertUsage(ended, sentence);
    assert(!ended.stderr.includes("s3"), ended.stderr);
  }
  assertUsage(await to("http://127.0.0.1:1", "--create-topics"), "--create-topics is for kafka: targets, not for http:");
  const away = await to("kafka://app:s3cret@127.0.0.1:1", "--attempts", "1", "--min-retry-ms", "1");
  assertEquals(away.code, 1);
  assertStringIncludes(away.stderr, "no broker can be reached at 127.0.0.1:1: connect ECONNREFUSED");
  assert(!(away.stderr + away.stdout).includes("s3cret"));
});

Deno.test("of a URL of Kafka no user, no password and no unknown parameter is shown", () => {
  assertEquals(
    maskedUrl("kafka://app:s3cret@h1:9092,h2:9093/t?sasl=plain&x=y"),
    "kafka://***@h1:9092,h2:9093/t?sasl=plain&x=***",
  );
  assertEquals(maskedUrl("kafka://h1:9092?user=a&password=s3cret"), "kafka://h1:9092?user=***&password=***");
});

Deno.test("doctor tells of brokers and of where the position is, before and after the first relay", async () => {
  await using shop = await place("sqlite");
  const doctor = async () => {
    const { checks } = await shop.at.json(["doctor", "--from", shop.url, "--to", KAFKA]) as {
      checks: { what: string; ok: boolean; found: string }[];
    };
    return checks.filter(({ what }) => what.startsWith("kafka://")).map(({ ok, found }) => [ok, found] as const);
  };
  const [cluster, transactions, before] = await doctor();
  assertEquals(cluster![0], true);
  assertMatch(cluster![1], /^1 broker, whose protocol is that of Kafka 4\.0 or younger$/);
  assertMatch(transactions![1], /^a transaction may take 30000 ms, a silent relay's lease 30000 ms$/);
  assertMatch(before![1], /^effectonce-cursor-.* will be created, with 1 copy$/);
  await shop.enqueue("k0-1");
  await shop.at.ok(shop.relay("--drain"));
  const [, , after] = await doctor();
  assertMatch(
    after![1],
    /: cleanup\.policy = compact, copies = 1, min\.insync\.replicas = 1: it is lost with its one broker$/,
  );
});

Deno.test("a relay, and the demo, log in by SASL, with what the URL or a variable has; a wrong password ends it with a sentence", async () => {
  const port = freePort();
  const login = 'org.apache.kafka.common.security.plain.PlainLoginModule required user_app="s3cret&more";';
  const settings = { "sasl.enabled.mechanisms": "PLAIN", "plain.sasl.jaas.config": login };
  await using cluster = await startKafka({ client: { port, protocol: "SASL_PLAINTEXT", settings } });
  await using shop = await place("sqlite");
  const topic = await makeTopic(cluster.brokers);
  const relay = (to: string, env = {}) =>
    shop.at.run(["relay", "--from", shop.url, "--to", to, "--drain", ...QUICK], { env });
  await shop.enqueue("k0-1");
  const wrong = await relay(`kafka://app:wrong@127.0.0.1:${port}/${topic}`);
  assertEquals(wrong.code, 1);
  assertMatch(wrong.stderr, /Kafka refuses: .*SASL PLAIN authentication failed/);
  assert(!wrong.stderr.includes("wrong"), wrong.stderr);
  assertEquals((await relay(`kafka://app:s3cret%26more@127.0.0.1:${port}/${topic}`)).code, 0);
  await shop.enqueue("k0-2");
  const parameters = "user=app&password=env:KAFKA_PASSWORD&sasl=plain";
  const named = await relay(`kafka://127.0.0.1:${port}/${topic}?${parameters}`, { KAFKA_PASSWORD: "s3cret&more" });
  assertEquals([named.code, named.stderr], [0, ""]);
  assertEquals((await readTopic(cluster.brokers, topic)).map(({ headers }) => headers["ce_id"]), ["k0-1", "k0-2"]);

  // The demo: the naive loop sends twice, the relay does not, and the topics go again.
  const { runs } = await shop.at.json(["demo", "--kafka", "env:KAFKA_URL", "--orders", "20"], {
    deadlineMs: 60_000,
    env: { KAFKA_URL: `kafka://app:s3cret%26more@127.0.0.1:${port}` },
  }) as { runs: { once: number; twice: number; lost: number; kills: number }[] };
  const [naive, ours] = runs;
  assert(naive!.twice > 0 && naive!.kills > 0, JSON.stringify(naive));
  assertEquals([ours!.once, ours!.twice, ours!.lost], [20, 0, 0]);
  assert(ours!.kills > 0);
  const admin = kafkaOf(cluster.brokers).admin();
  await admin.connect();
  const topics = await admin.listTopics();
  await admin.disconnect();
  assertEquals(topics.filter((name) => name.startsWith("effectonce-demo-")), []);
});

Deno.test("a relay speaks TLS: with an authority of the URL's, with none and no check, and not with one that nobody knows", async () => {
  await using shop = await place("sqlite");
  const [store, pem] = ["broker.p12", "ca.pem"].map((name) => `${shop.at.folder}/${name}`);
  const keys = ["-alias", "broker", "-keystore", store!, "-storetype", "PKCS12", "-storepass", "password"];
  const subject = [
    "-dname",
    "CN=127.0.0.1",
    "-ext",
    "san=ip:127.0.0.1",
    "-ext",
    "bc:c",
    "-keyalg",
    "RSA",
    "-validity",
    "3650",
  ];
  for (const args of [["-genkeypair", ...keys, ...subject], ["-exportcert", "-rfc", ...keys, "-file", pem!]]) {
    const { success, stderr } = await new Deno.Command("keytool", { args }).output();
    assert(success, new TextDecoder().decode(stderr));
  }
  const port = freePort();
  const login = 'org.apache.kafka.common.security.plain.PlainLoginModule required user_app="s3cret";';
  const settings = {
    ...{ "ssl.keystore.location": store!, "ssl.keystore.type": "PKCS12", "ssl.keystore.password": "password" },
    ...{ "ssl.key.password": "password", "sasl.enabled.mechanisms": "PLAIN", "plain.sasl.jaas.config": login },
  };
  await using cluster = await startKafka({ client: { port, protocol: "SASL_SSL", settings } });
  const topic = await makeTopic(cluster.brokers);
  const relay = (parameters: string) =>
    shop.at.run([
      "relay",
      "--from",
      shop.url,
      "--to",
      `kafka://app:s3cret@127.0.0.1:${port}/${topic}${parameters}`,
      "--drain",
      ...QUICK,
    ]);
  await shop.enqueue("k0-1");
  const unknown = await relay("?sslmode=verify-full");
  assertEquals(unknown.code, 1);
  assertMatch(unknown.stderr, /no broker can be reached at .*: self-signed certificate/);
  for (const [i, parameters] of [`?sslmode=verify-full&sslrootcert=${pem}`, "?sslmode=require"].entries()) {
    const { code, stderr } = await relay(parameters);
    assertEquals([code, stderr], [0, ""], parameters);
    await shop.enqueue(`k0-${i + 2}`);
  }
  assertEquals((await readTopic(cluster.brokers, topic)).map(({ headers }) => headers["ce_id"]), ["k0-1", "k0-2"]);
});

Deno.test("rights that are missing end a relay with a sentence that names what Kafka said", async () => {
  const port = freePort();
  const login = 'org.apache.kafka.common.security.plain.PlainLoginModule required user_app="s3cret";';
  const settings = { "sasl.enabled.mechanisms": "PLAIN", "plain.sasl.jaas.config": login };
  await using cluster = await startKafka({
    client: { port, protocol: "SASL_PLAINTEXT", settings },
    settings: {
      "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
      "super.users": "User:ANONYMOUS",
    },
  });
  await using shop = await place("sqlite");
  await shop.enqueue("k0-1");
  const topic = await makeTopic(cluster.brokers);
  const to = `kafka://app:s3cret@127.0.0.1:${port}/${topic}?cursor=${await makeTopic(cluster.brokers, {
    name: freshName("cursor"),
    settings: { "cleanup.policy": "compact" },
  })}`;
  const relay = () => shop.at.run(["relay", "--from", shop.url, "--to", to, "--drain", ...QUICK]);
  const none = await relay();
  assertEquals(none.code, 1);
  assertMatch(none.stderr, /Kafka refuses: .*\(TOPIC_AUTHORIZATION_FAILED\)\nSee docs\/operations\.md#sink_invalid/);
  const admin = kafkaOf(cluster.brokers).admin();
  await admin.connect();
  // The numbers are those of the protocol: all operations, allowed.
  const may = (resourceType: number, resourceName: string, how = { permissionType: 3, operation: 2 }) =>
    admin.createAcls({
      acl: [{
        resourceType,
        resourceName,
        resourcePatternType: 3,
        principal: "User:app",
        host: "*",
        ...how,
      }],
    });
  const [TOPIC, TRANSACTIONAL_ID, DENY, WRITE] = [2, 5, 2, 4] as const;
  await may(TOPIC, "*");
  const noId = await relay();
  assertEquals(noId.code, 1);
  assertMatch(noId.stderr, /Kafka refuses: .*\(TRANSACTIONAL_ID_AUTHORIZATION_FAILED\)/);
  await may(TRANSACTIONAL_ID, "*");
  const all = await relay();
  assertEquals([all.code, all.stderr], [0, ""]);
  // Of several topics one may only be looked at.
  const shown = await makeTopic(cluster.brokers);
  await may(TOPIC, shown, { permissionType: DENY, operation: WRITE });
  await shop.enqueue("k0-2");
  await shop.at.ok(["enqueue", "--store", shop.url, "--topic", shown, "--key", "k", "--value", "1"]);
  const one = await shop.at.run(["relay", "--from", shop.url, "--to", to.replace(`/${topic}`, ""), "--drain", ...QUICK]);
  assertEquals(one.code, 1);
  assertMatch(one.stderr, /Kafka refuses: .*\(TOPIC_AUTHORIZATION_FAILED\)/);
  await admin.disconnect();
});
