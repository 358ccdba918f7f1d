/** The command line from a real Kafka: into databases, by a function or a table; over HTTP; into Kafka. */
import { assert, assertEquals, assertMatch } from "@std/assert";
import { assertFailure, assertUsage, type Box, emptyBox, eventsOf, Running, Target, until } from "./cli_run.ts";
import type { Plan } from "./kafka/source_child.ts";
import { deleteRecords, freshName, kafkaOf, makeTopic, produceInJava, readTopic } from "./kafka/topics.ts";
import { testDatabase } from "./servers/servers.ts";
import { service } from "./services/mod.ts";

const LONG = Deno.env.get("EFFECTONCE_LONG") === "1";
const BROKERS = await service("kafka");
const QUICK = ["--lease-ms", "6000", "--min-retry-ms", "1", "--max-retry-ms", "20", "--poll-ms", "5"];

async function produce(topic: string, ...values: readonly (Record<string, unknown> | string)[]): Promise<void> {
  const producer = kafkaOf(BROKERS).producer({ idempotent: true, maxInFlightRequests: 1 });
  await producer.connect();
  const text = (value: Record<string, unknown> | string) => typeof value === "string" ? value : JSON.stringify(value);
  const key = (value: Record<string, unknown> | string) =>
    typeof value === "string" ? "none" : `k${Number(value["id"]) % 5}`;
  await producer.send({ topic, messages: values.map((value) => ({ key: key(value), value: text(value) })) });
  await producer.disconnect();
}
const from = (topic: string, group: string, more = "") => `kafka://${BROKERS}/${topic}?group=${group}${more}`;
const payments = (start: number, end: number) =>
  Array.from({ length: end - start }, (_, i) => ({ id: start + i, total: (start + i) * 10 }));
const SUM = "select count(*) as n, sum(total) as total from payments";

Deno.test("by a function in a file, and by defineHandler with claims: each record once, in the client's own SQL", async () => {
  await using db = await testDatabase("postgres");
  await using at = await emptyBox();
  await at.ok(["init", "--store", db.url]);
  await db.sql("create table payments (id bigint not null, total bigint not null)");
  await db.sql("create table orders (id text primary key)");
  await Deno.writeTextFile(
    `${at.folder}/charge.ts`,
    `export default async (message: { json(): any }, client: any) => {
    const { id, total } = message.json();
    await client.query("insert into payments (id, total) values ($1, $2)", [id, total]);
  };`,
  );
  const mod = new URL("../mod.ts", import.meta.url).href;
  await Deno.writeTextFile(
    `${at.folder}/once.ts`,
    `import { defineHandler } from "${mod}";
  export default defineHandler<any>(async (message, effects, client) => {
    const { total } = message.json<any>();
    const claim = await effects.claim({ scope: "orders", key: "total-" + total % 100 });
    if (claim.state === "done") return;
    await client.query("insert into orders (id) values ($1)", [total % 100]);
  });`,
  );
  const topic = await makeTopic(BROKERS, { partitions: 3 });
  await produce(topic, ...payments(0, 100));
  const run = (group: string, file: string) =>
    at.ok(["relay", "--from", from(topic, group), "--to", db.url, "--handler", file, "--drain", "--json", ...QUICK]);
  const [billing, orders] = [freshName("billing"), freshName("orders")];
  const stdout = await run(billing, "charge.ts");
  const [started] = stdout.split("\n").map((line) => line && JSON.parse(line));
  assertEquals([started.type, started.relay, started.guarantee.level], ["started", billing, "exactly-once"]);
  assertEquals(await db.sql(SUM), [{ n: "100", total: "49500" }]);
  await run(billing, `${at.folder}/charge.ts`);
  await produce(topic, ...payments(100, 120));
  await run(billing, "charge.ts");
  assertEquals(await db.sql(SUM), [{ n: "120", total: String(119 * 120 * 5) }]);
  await run(orders, "once.ts");
  assertEquals((await db.sql("select count(*) as n from orders"))[0], { n: "10" });
});

for (const kind of ["postgres", "mysql", "mariadb", "sqlite", "node:sqlite"] as const) {
  Deno.test(`${kind}: fields of JSON go into columns: inserted, or put in the place of what has the primary key`, async () => {
    await using stack = new AsyncDisposableStack();
    const at: Box = stack.use(await emptyBox());
    const isFile = kind === "sqlite" || kind === "node:sqlite";
    const db = isFile ? undefined : stack.use(await testDatabase(kind));
    const file = kind === "sqlite" ? "sqlite:app.db" : "sqlite:app.db?driver=node";
    const url = db === undefined ? file : db.url.replace(/^mysql:/, `${kind}:`);
    const sql = async (text: string) => db ? await db.sql(text) : at.sql(text);
    await at.ok(["init", "--store", url.split("?")[0]!]);
    await sql("create table payments (id bigint primary key, total bigint, note varchar(99) check (length(note) < 1000))");
    const [topic, dead] = [await makeTopic(BROKERS, { partitions: 2 }), await makeTopic(BROKERS)];
    const group = freshName("g");
    const parameter = url.includes("?") ? "&" : "?";
    const run = (more: string, where = from(topic, group, `&dead-letter=${dead}`)) =>
      at.run([
        "relay",
        "--from",
        where,
        "--to",
        `${url}${parameter}table=payments${more}`,
        "--drain",
        ...QUICK,
      ]);
    await produce(topic, ...payments(0, 30), { id: 30, total: 300, note: { deep: [1, "ü"] } });
    assertEquals((await run("")).code, 0);
    const count = async () => (await sql(SUM)).map(({ n, total }) => [Number(n), Number(total)])[0];
    assertEquals(await count(), [31, 4650]);
    assertEquals((await sql("select note from payments where id = 30"))[0]!["note"], '{"deep":[1,"ü"]}');

    await produce(topic, { id: 1, total: 5 }, { id: 99, total: 1, colour: "red" }, "no JSON", "[1]");
    await produce(topic, { id: 100, total: 1 }, { id: 101, total: 1, note: "x".repeat(isFile ? 1001 : 100) });
    const refused = await run("");
    assertEquals(refused.code, 1, "some went to the dead-letter topic");
    assertEquals(await count(), [32, 4651]);
    const letters = await readTopic(BROKERS, dead);
    const reasons = letters.map(({ headers }) => headers["effectonce-error"]!);
    assertEquals(letters.map(({ headers }) => headers["effectonce-attempts"]), Array(5).fill("1"), reasons.join("; "));
    for (const [i, part] of ["1", 'its field "colour" is no column of payments', "no JSON", "no JSON object"].entries()) {
      assert(i === 0 || reasons.some((reason) => reason.includes(part)), `${part}: ${reasons}`);
    }
    await produce(topic, { id: 1, total: 5 }, { id: 1, total: 6, colour: "red" }, { id: 2 });
    await produce(topic, '{"id":9007199254740993,"total":0,"note":7}');
    assertEquals((await run("&mode=upsert&unknown=ignore")).code, 0);
    assertEquals(await count(), [33, 4651 - 10 + 6]);
    const [exact] = await sql("select cast(id as char(20)) as id, note from payments where note = '7'");
    assertEquals([String(exact?.["id"]).trim(), exact?.["note"]], ["9007199254740993", "7"]);
    assertFailure(await run("x"), "there is no table paymentsx: create it");
  });
}

Deno.test("over HTTP each record is called once, by claims in a store", async () => {
  await using target = new Target();
  await using at = await emptyBox();
  await at.ok(["init", "--store", "sqlite:claims.db"]);
  const [topic, dead] = [await makeTopic(BROKERS, { partitions: 2 }), await makeTopic(BROKERS)];
  await produce(topic, ...payments(0, 12));
  await produce(dead, "of another group");
  const group = freshName("mail");
  const run = () =>
    at.ok(["relay", "--from", from(topic, group), "--to", target.url, "--store", "sqlite:claims.db", "--drain", ...QUICK]);
  await run();
  await run();
  assertEquals([target.keys().length, new Set(target.keys()).size], [12, 12]);
  await produce(topic, ...payments(12, 15));
  const shown = await at.json(["status", "--from", from(topic, group)]) as { lag: number; partitions: { lag: number }[] };
  assertEquals([shown.lag, shown.partitions.length, shown.partitions.reduce((sum, { lag }) => sum + lag, 0)], [3, 2, 3]);
  const withStore = ["status", "--from", from(topic, group, `&dead-letter=${dead}`), "--store", "sqlite:claims.db"];
  assertMatch(await at.ok(withStore), new RegExp(`\\ndead letters {2}1 in topic ${dead}\\neffects .*12 done, 0 rejected`));
  const all = await at.json(withStore) as { parked: number; effects: { done: number } };
  assertEquals([all.parked, all.effects.done], [1, 12]);
  assertMatch(
    await at.ok(["status", "--from", from(topic, group)]),
    /^topic .*: 3 behind\npartition 0 {2}\d behind: at \d+ of \d+\n/,
  );
  const told = await at.ok(["doctor", "--from", from(topic, group), "--to", target.url, "--store", "sqlite:claims.db"]);
  assertMatch(told, /at-most-once \(protocol: claimed\)/);
});

Deno.test("what an API has refused is called anew when a person says so and the group is set back, and nothing else is", async () => {
  await using target = new Target();
  await using at = await emptyBox();
  await at.ok(["init", "--store", "sqlite:claims.db"]);
  const topic = await makeTopic(BROKERS);
  await produce(topic, ...payments(0, 10));
  const group = freshName("mail");
  let refuses = true;
  target.answer = ({ body }) => new Response(null, { status: refuses && JSON.parse(body).id === 4 ? 422 : 200 });
  const ends = ["--from", from(topic, group), "--to", target.url, "--store", "sqlite:claims.db"];
  const line = ["relay", ...ends, "--drain", ...QUICK];
  assertEquals((await at.run(line)).code, 1, "one was refused");
  const [refused] = await at.json(["effects", "list", "--store", "sqlite:claims.db", "--state", "rejected"]) as {
    key: string;
  }[];
  await at.ok(["effects", "retry", refused!.key, "--store", "sqlite:claims.db"]);
  refuses = false;
  await at.ok(line);
  assertEquals(target.asked.length, 10, "the group is past it");
  const admin = kafkaOf(BROKERS).admin();
  await admin.connect();
  await admin.setOffsets({ groupId: group, topic, partitions: [{ partition: 0, offset: "0" }] });
  await admin.disconnect();
  await at.ok(line);
  assertEquals(target.asked.slice(10).map(({ body }) => JSON.parse(body).id), [4]);
});

Deno.test("the README's way from a topic to rows can be gone as it stands there", async () => {
  await using db = await testDatabase("postgres");
  await using target = new Target();
  await using at = await emptyBox();
  const readme = await Deno.readTextFile(new URL("../README.md", import.meta.url));
  const section = /\n## From a topic to rows\n(.*?)\n## /s.exec(readme)![1]!;
  const docs = await Deno.readTextFile(new URL("../docs/kafka.md", import.meta.url));
  const mod = new URL("../adapters/kafka.ts", import.meta.url).href;
  const fileOf = (text: string, name: string) => new RegExp(`// ${name}\n(.*?)\n\`\`\``, "s").exec(text)![1]!;
  await Deno.writeTextFile(at.path("charge.ts"), fileOf(section, "charge.ts"));
  const transform = fileOf(docs, "transform.ts").replace("@effectonce/effectonce/kafka", mod);
  const end = freshName("end");
  await Deno.writeTextFile(at.path("transform.ts"), transform.replace(`"payments"`, `"large-orders-${end}"`));
  const lines = [...section.matchAll(/^```sh\n(.*?)^```/gms)].flatMap(([, block]) => block!.trim().split("\n")).map((line) =>
    line.replaceAll("127.0.0.1:9092", BROKERS).replaceAll("postgres://app@127.0.0.1/app", db.url)
      .replaceAll("https://mail.example/send", target.url).replaceAll(/\b(orders-dead|large-orders|orders)\b/g, `$1-${end}`)
  );
  await makeTopic(BROKERS, { name: `large-orders-${end}` });
  for (const line of lines) {
    const words = line.split(" ").map((word) => word.replaceAll("'", ""));
    if (words[0] === "kafka-topics.sh") {
      const after = (flag: string) => words[words.indexOf(flag) + 1]!;
      await makeTopic(BROKERS, { name: after("--topic"), partitions: Number(after("--partitions")) || 1 });
    } else if (words[0] === "psql") await db.sql(/"(.*)"/.exec(line)![1]!);
    else if (words[0] === "echo") await produce(words.at(-1)!, words[1]!);
    else {
      assertEquals(words.slice(0, 4).join(" "), "deno run -A cli.ts");
      const args = words.slice(4);
      await at.ok(args[0] === "relay" ? [...args, "--drain", ...QUICK] : args);
    }
  }
  assertEquals(await db.sql("select * from payments"), [{ id: "1", total: "5" }]);
  assertEquals(await db.sql("select * from charges"), [{ id: "1", cents: "500" }]);
  assertEquals(target.asked.map(({ body }) => body), [`{"id":1,"total":5}`]);
  assertEquals((await readTopic(BROKERS, `large-orders-${end}`)).map(({ value }) => value), [`{"amount":5}`]);
});

Deno.test("an effect is known by a header or a field of its record: what comes twice in a topic happens once", async () => {
  await using target = new Target();
  await using at = await emptyBox();
  await at.ok(["init", "--store", "sqlite:claims.db"]);
  const topic = await makeTopic(BROKERS);
  await produce(topic, { id: 1, order: { number: "a" } }, { id: 1, order: { number: "a" } }, {
    id: 3,
    order: { number: 7 },
  });
  const relay = (group: string, key: string) =>
    at.run([
      ...["relay", "--from", from(topic, group), "--to", target.url, "--store", "sqlite:claims.db", "--drain"],
      ...["--effect-key", key, "--idempotent", ...QUICK],
    ]);
  const { code, stderr } = await relay(freshName("g"), "json:order.number");
  assertEquals([code, stderr], [0, ""]);
  assertEquals(target.asked.map(({ body }) => JSON.parse(body).id).toSorted(), [1, 3]);
  const missing = await relay(freshName("g"), "header:order-id");
  assertEquals(missing.code, 1);
  assertMatch(
    missing.stderr,
    /Cannot claim an effect: record 0 of partition 0 of topic .* has no id: it has no header "order-id"/,
  );
  assertUsage(await relay("g", "offset"), "--effect-key must be header:NAME or json:FIELD.FIELD");
});

Deno.test("an effect is known by all digits of a number, whatever headers say; another value under its key is told of", async () => {
  await using target = new Target();
  await using at = await emptyBox();
  await at.ok(["init", "--store", "sqlite:claims.db"]);
  const [topic, dead] = [await makeTopic(BROKERS), await makeTopic(BROKERS)];
  const producer = kafkaOf(BROKERS).producer({ idempotent: true, maxInFlightRequests: 1 });
  await producer.connect();
  const send = (value: string, sent: string) => producer.send({ topic, messages: [{ value, headers: { sent } }] });
  for (const [i, id] of ["9007199254740992", "9007199254740993", "9007199254740993"].entries()) {
    await send(`{"order":{"id":${id}}}`, String(i));
  }
  const run = (more = "") =>
    at.run([
      ...["relay", "--from", from(topic, group, more), "--to", target.url, "--store", "sqlite:claims.db", "--drain"],
      ...["--effect-key", "json:order.id", ...QUICK],
    ]);
  const group = freshName("g");
  assertEquals(await run().then(({ code, stderr }) => [code, stderr]), [0, ""]);
  assertEquals(target.asked.map(({ body }) => body).toSorted(), [ // Without a key there is no order.
    `{"order":{"id":9007199254740992}}`,
    `{"order":{"id":9007199254740993}}`,
  ]);
  await send('{"order":{"id":9007199254740993},"total":1}', "3");
  await send('{"order":{"id":7}}', "4");
  await producer.disconnect();
  const { code, stderr } = await run();
  const why = "the id was used before, with another value";
  assertEquals(
    [code, stderr.includes(`no way past record 3 of partition 0 of kafka://${BROKERS}/${topic}: ${why}`)],
    [1, true],
    stderr,
  );
  assertEquals((await run(`&dead-letter=${dead}`)).code, 1, "one was set aside");
  assertEquals((await readTopic(BROKERS, dead)).map(({ headers }) => headers["effectonce-error"]), [why]);
  assertEquals(target.asked.length, 3);
});

Deno.test("over HTTP records that were deleted before they were taken end the relay; with --accept-source it goes on behind them (acceptance 26)", async () => {
  await using target = new Target();
  await using at = await emptyBox();
  await at.ok(["init", "--store", "sqlite:claims.db"]);
  const topic = await makeTopic(BROKERS);
  await produce(topic, ...payments(0, 5));
  const ends = ["--from", from(topic, freshName("mail")), "--to", target.url, "--store", "sqlite:claims.db"];
  const line = ["relay", ...ends, "--drain", ...QUICK];
  await at.ok(line);
  await produce(topic, ...payments(5, 12));
  await deleteRecords(BROKERS, topic, 8);
  const refused = await at.run(line);
  assertEquals(refused.code, 1);
  assertMatch(refused.stderr, /records 5 to 7 were deleted before they were taken/);
  assertEquals(target.asked.length, 5);
  const ended = await at.run([...line, "--accept-source", "--yes", "--json"]);
  assertEquals([ended.code, ended.stderr], [0, ""]);
  assertEquals(eventsOf(ended).filter(({ type }) => type === "accepted").length, 1);
  await at.ok(line);
  assertEquals(
    target.asked.map(({ body }) => JSON.parse(body).id).toSorted((a, b) => a - b),
    [...payments(0, 5), ...payments(8, 12)].map(({ id }) => id),
  );
});

Deno.test("into Kafka each record goes once, with its own bytes, whatever is killed on the way", async () => {
  await using at = await emptyBox();
  const [topic, out] = [await makeTopic(BROKERS, { partitions: 3 }), await makeTopic(BROKERS, { partitions: 3 })];
  const group = freshName("through");
  const line = (
    ...more: string[]
  ) => ["relay", "--from", from(topic, group), "--to", `kafka://${BROKERS}/${out}`, ...QUICK, ...more];
  await produce(topic, ...payments(0, 200));
  const first = at.start(line("--json", "--batch", "5"));
  for (let n = 0; n < 20; n++) await first.event("delivered");
  first.kill("SIGKILL");
  assertEquals((await first.ended()).signal, "SIGKILL");
  await produce(topic, ...payments(200, 300));
  await at.ok(line("--drain"));
  const seen = await readTopic(BROKERS, out);
  assertEquals(
    seen.map(({ value }) => JSON.parse(value!).id).toSorted((a, b) => a - b),
    payments(0, 300).map(({ id }) => id),
  );
  for (const [key, mine] of Map.groupBy(seen, ({ key }) => key)) {
    const numbers = mine.map(({ value }) => JSON.parse(value!).id as number);
    assertEquals(numbers, numbers.toSorted((a, b) => a - b), String(key));
  }
});

Deno.test("a function makes of each record one, several or none, into topics that it names; what it refuses is set aside", async () => {
  await using at = await emptyBox();
  const [topic, small, large, dead] = [
    await makeTopic(BROKERS),
    await makeTopic(BROKERS),
    await makeTopic(BROKERS),
    await makeTopic(BROKERS),
  ];
  const mod = new URL("../adapters/kafka.ts", import.meta.url).href;
  await Deno.writeTextFile(
    `${at.folder}/split.ts`,
    `import { defineTransform } from "${mod}";
  export default defineTransform((message) => {
    const { id, total } = message.json<any>();
    if (id === 3) throw new Error("not that one");
    if (id === 4) return null;
    if (id === 6) return;
    if (id === 7) return { topic: "${large}" };
    if (id === 8) return [null];
    const large = { topic: "${large}", key: "by-" + id, value: { total } };
    return id % 2 ? large : [{ topic: "${small}", value: String(total), headers: { h: "1" } }, large];
  });`,
  );
  await produce(topic, ...payments(0, 9));
  const line = ["relay", "--from", from(topic, freshName("split"), `&dead-letter=${dead}`), "--to", `kafka://${BROKERS}`];
  const { code, stdout } = await at.run([...line, "--handler", "split.ts", "--attempts", "1", "--drain", ...QUICK]);
  assertEquals(code, 1, "some were set aside");
  assertMatch(stdout, new RegExp(`\\nsee why: they are in topic ${dead}, with the reason in their headers\\n$`));
  const [inSmall, inLarge] = [await readTopic(BROKERS, small), await readTopic(BROKERS, large)];
  assertEquals(inSmall.map(({ key, value, headers }) => [key, value, headers["h"]]), [["k0", "0", "1"], ["k2", "20", "1"]]);
  assertEquals(
    inLarge.map(({ key, value }) => [key, value]),
    [0, 1, 2, 5].map((id) => [`by-${id}`, `{"total":${id * 10}}`]),
  );
  assertEquals(inLarge.map(({ headers }) => headers["effectonce-position"]), ["1", "2", "4", "5"]);
  const nothing = "the function has answered neither an object, nor a list of some, nor null";
  assertEquals(
    (await readTopic(BROKERS, dead)).map(({ value, headers }) => [
      JSON.parse(value!).id,
      headers["effectonce-error"]!.split(": ").at(-1),
    ]),
    [[3, "not that one"], [6, nothing], [7, "its value must be JSON, a text or bytes"], [8, nothing]],
  );
});

Deno.test("a topic that is given more partitions goes on into Kafka, and the topic of positions grows with it", async () => {
  await using at = await emptyBox();
  const [topic, out] = [await makeTopic(BROKERS), await makeTopic(BROKERS)];
  const line = [
    "relay",
    "--from",
    from(topic, freshName("through")),
    "--to",
    `kafka://${BROKERS}/${out}`,
    "--drain",
    ...QUICK,
  ];
  await produce(topic, ...payments(0, 10));
  await at.ok(line);
  const admin = kafkaOf(BROKERS).admin();
  await admin.connect();
  await admin.createPartitions({ topicPartitions: [{ topic, count: 3 }] });
  await admin.disconnect();
  await produce(topic, ...payments(10, 30));
  await at.ok(line);
  const ids = (await readTopic(BROKERS, out)).map(({ value }) => JSON.parse(value!).id as number);
  assertEquals(ids.toSorted((a, b) => a - b), payments(0, 30).map(({ id }) => id));
});

Deno.test("a function that writes into the topic that it is given is refused: it would go round and round", async () => {
  await using at = await emptyBox();
  await Deno.writeTextFile(`${at.folder}/echo.ts`, "export default ({ value }: { value: Uint8Array }) => ({ value });");
  const topic = await makeTopic(BROKERS);
  await produce(topic, ...payments(0, 3));
  const line = ["relay", "--from", from(topic, freshName("echo")), "--to", `kafka://${BROKERS}`, "--handler", "echo.ts"];
  const { code, stderr } = await at.run([...line, "--drain", ...QUICK]);
  assertEquals(code, 1);
  assertMatch(stderr, /no way past record 0 .*: what is made of it goes into topic-.*, the topic that is read/);
  assertEquals((await readTopic(BROKERS, topic)).length, 3);
});

Deno.test("a relay that would read what it writes is refused, however the cluster is spelt", async () => {
  await using at = await emptyBox();
  const topic = await makeTopic(BROKERS);
  await produce(topic, ...payments(0, 3));
  await Deno.writeTextFile(at.path("echo.ts"), "export default ({ value }: { value: Uint8Array }) => ({ value });");
  const other = `kafka://${BROKERS.replaceAll("127.0.0.1", "127.1")}`;
  const run = (to: string, ...more: string[]) =>
    at.run(["relay", "--from", from(topic, freshName("loop")), "--to", to, ...more, "--drain", ...QUICK]);
  const why = `goes into ${topic}, the topic that is read: the relay would go round and round`;
  const ends = async (to: string, says: string, ...more: string[]) => {
    const { code, stderr } = await run(to, ...more);
    assertEquals([code, stderr.includes(says)], [1, true], stderr);
  };
  await ends(`${other}/${topic}`, `Cannot relay into ${other}/${topic}: what it gets ${why}`);
  await ends(other, `what is made of it ${why}`, "--handler", "echo.ts");
  assertUsage(await run(`${other}?transactions=off`, "--handler", "echo.ts"), "--handler makes records in transactions");
  assertEquals((await readTopic(BROKERS, topic)).length, 3);
});

Deno.test("two relays of one group do not share what each is to have: of two topics, and in one file", async () => {
  await using at = await emptyBox();
  await at.ok(["init", "--store", "sqlite:app.db"]);
  at.sql("create table orders (id int)");
  at.sql("create table refunds (id int)");
  const [orders, refunds] = [await makeTopic(BROKERS, { partitions: 2 }), await makeTopic(BROKERS, { partitions: 2 })];
  const group = freshName("billing");
  await produce(orders, { id: 1 }, { id: 2 });
  await produce(refunds, { id: 3 });
  const line = (topic: string, table: string) => [
    ...["relay", "--from", from(topic, group), "--to", `sqlite:app.db?table=${table}&unknown=ignore`, ...QUICK],
  ];
  const first = at.start([...line(orders, "orders"), "--json"]);
  await first.event("delivered");
  const says = `Cannot join group "${group}": it has consumers that read another topic, or are no effectonce.`;
  assertFailure(await at.run([...line(refunds, "refunds"), "--drain"]), `${says} Give the relay a group of its own`);
  await first.stop();
  assertEquals((await at.run([...line(refunds, "refunds"), "--drain"])).code, 0);
  assertEquals(at.sql("select id from refunds"), [{ id: 3 }]);
  const relays = Object.fromEntries(
    ["orders", "refunds"].map((to) => [to, { from: from(orders, group), to: `sqlite:app.db?table=${to}` }]),
  );
  await Deno.writeTextFile(at.path("effectonce.json"), JSON.stringify({ relays }));
  assertUsage(
    await at.run(["relay", "--config", "effectonce.json"]),
    `effectonce.json: relays.refunds.from: group=${group}: relay "orders" has the same, and each of them would get a part`,
  );
});

Deno.test("a column that a table gets while a relay runs is used from then on", async () => {
  await using db = await testDatabase("postgres");
  await using at = await emptyBox();
  await at.ok(["init", "--store", db.url]);
  await db.sql("create table payments (id bigint primary key, total bigint)");
  const topic = await makeTopic(BROKERS);
  const one = at.start(["relay", "--from", from(topic, freshName("g")), "--to", `${db.url}?table=payments`, ...QUICK]);
  const count = async () => Number((await db.sql(SUM))[0]!["n"]);
  await produce(topic, ...payments(0, 3));
  await until(async () => await count() === 3, 30_000);
  await db.sql("alter table payments add column colour text");
  await produce(topic, { id: 3, total: 30, colour: "red" }, { id: 4, total: 40, colour: "blue" });
  await until(async () => await count() === 5, 30_000);
  await db.sql("alter table payments drop column total");
  await produce(topic, { id: 5, colour: "red" });
  await until(async () => (await db.sql("select id from payments")).length === 6, 30_000);
  assertEquals((await one.stop()).code, 0);
});

Deno.test("what does not go together is a sentence that names the flags", async () => {
  await using at = await emptyBox();
  const relay = (kafka: string, to: string, ...more: string[]) => at.run(["relay", "--from", kafka, "--to", to, ...more]);
  const good = from("t", "g");
  assertUsage(
    await relay(`kafka://${BROKERS}/t`, "stdout:"),
    "--from: it names no consumer group: write kafka://host:9092/orders?group=billing",
  );
  assertUsage(await relay(`kafka://${BROKERS}?group=g`, "stdout:"), "it names no topic to read");
  assertUsage(await relay(`${good}&cursor=x`, "stdout:"), `"cursor" is not a parameter of kafka: URLs`);
  assertUsage(await relay(good, "http://127.0.0.1:1/"), "--store is missing: where are calls claimed?");
  assertUsage(await relay(good, "sqlite:app.db"), "give --handler FILE, or ?table=NAME in the URL");
  assertUsage(await relay(good, "sqlite:app.db?table=x", "--handler", "x.ts"), "not both");
  assertUsage(await relay(good, "stdout:", "--handler", "x.ts"), "--handler is for targets that are databases, or kafka:");
  assertUsage(await relay(good, `kafka://${BROKERS}`), "it names no topic to write to");
  assertUsage(await relay(good, `kafka://${BROKERS}/t`), "it is the topic that is read");
  assertUsage(await relay(good, "file:x.jsonl"), "a file takes one relay");
  assertUsage(await relay(good, "stdout:", "--topics", "a"), "--topics is for outboxes");
  assertUsage(await relay(good, "stdout:", "--on-park", "block"), "only skip");
  await at.ok(["init", "--store", "sqlite:app.db"]);
  await Deno.writeTextFile(`${at.folder}/none.ts`, "export const x = 1;");
  assertFailure(
    await relay(good, "sqlite:app.db", "--handler", "none.ts"),
    "the default export of none.ts must be a function",
  );
  const missing = await relay(good, "sqlite:app.db", "--handler", "missing.ts");
  assertEquals(missing.code, 1);
  assertMatch(missing.stderr, /--handler: missing\.ts could not be loaded/);
  assertUsage(
    await at.run(["cursor", "show", "--from", good, "--to", `kafka://${BROKERS}`]),
    "only relays from an outbox have a cursor",
  );
});

// The server ends the transaction that it keeps open after half a minute: where there is time for that, on each.
for (const kind of LONG ? ["postgres", "mariadb", "mysql"] as const : ["postgres"] as const) {
  Deno.test(`${kind}: a relay that sleeps past its session is shut out by the database when it wakes, and commits nothing (acceptance 20)`, async () => {
    await using db = await testDatabase(kind);
    await using at = await emptyBox();
    await at.ok(["init", "--store", db.url.replace(/^mysql:/, `${kind}:`)]);
    await db.sql("create table payments (id bigint not null, total bigint not null)");
    const topic = await makeTopic(BROKERS, { partitions: 2 });
    await Deno.writeTextFile(
      `${at.folder}/slow.ts`,
      `export default async (message: { json(): any }, client: any) => {
    const { id, total } = message.json();
    await client.query("insert into payments (id, total) values (${kind === "postgres" ? "$1, $2" : "?, ?"})", [id, total]);
    if (id === 5 && Deno.env.get("SLEEPS")) {
      Deno.kill(Deno.pid, "SIGSTOP");
    }
  };`,
    );
    const line = [
      "relay",
      "--from",
      from(topic, freshName("billing")),
      "--to",
      db.url.replace(/^mysql:/, `${kind}:`),
      "--handler",
      "slow.ts",
      "--batch",
      "10",
      ...QUICK,
    ];
    await produce(topic, ...payments(0, 20));
    const count = async () => Number((await db.sql(SUM))[0]!["n"]);
    const sleeper = at.start(line, { env: { SLEEPS: "1" } });
    await until(async () => (await stateOf(sleeper.pid)) === "T", 30_000);
    const heir = at.start(line);
    await until(async () => await count() === 20, 60_000);
    sleeper.kill("SIGCONT");
    await produce(topic, ...payments(20, 40));
    await until(async () => await count() >= 40, 60_000);
    assertEquals((await heir.stop()).code, 0);
    const { code } = await sleeper.stop();
    assertEquals(code, 0, "it goes on as a member like others");
    const rows = await db.sql("select id from payments order by id");
    assertEquals(rows.map(({ id }) => Number(id)), payments(0, 40).map(({ id }) => id));
  });
}

/** The state of a process: `T` is stopped. */
async function stateOf(pid: number): Promise<string | undefined> {
  return /^State:\s+(\S)/m.exec(await Deno.readTextFile(`/proc/${pid}/status`))?.[1];
}

Deno.test("the consumer that most people write doubles rows under the same kills: else the tests above would prove nothing", async () => {
  await using db = await testDatabase("postgres");
  await db.sql("create table payments (id bigint not null, total bigint not null)");
  const topic = await makeTopic(BROKERS);
  await produce(topic, ...payments(0, 20_000));
  const group = freshName("naive");
  const script = new URL("kafka/naive_consumer.ts", import.meta.url).pathname;
  const numbers = async () => {
    const [row] = await db.sql("select count(*) as n, count(distinct id) as once from payments");
    return { rows: Number(row!["n"]), once: Number(row!["once"]) };
  };
  let twice = 0;
  for (let n = 0; n < 20 && twice === 0; n++) {
    const before = (await numbers()).rows;
    const child = new Deno.Command(Deno.execPath(), {
      args: ["run", "-A", "--quiet", script, BROKERS, topic, group, db.url],
      ...{ stdout: "null", stderr: "null" },
    }).spawn();
    await until(async () => (await numbers()).rows > before + 50, 60_000);
    child.kill("SIGKILL");
    assertEquals((await child.status).signal, "SIGKILL");
    const { rows, once } = await numbers();
    twice = rows - once;
  }
  assert(twice > 0, "none came twice: the kills did not hit");
});

Deno.test("through into Kafka a relay that sleeps past its session is shut out when it wakes: each record once (acceptance 21)", async () => {
  await using at = await emptyBox();
  const [topic, out] = [await makeTopic(BROKERS, { partitions: 2 }), await makeTopic(BROKERS)];
  await Deno.writeTextFile(
    `${at.folder}/slow.ts`,
    `export default (message: { json(): any; value: Uint8Array }) => {
      if (message.json().id === 5 && Deno.env.get("SLEEPS")) Deno.kill(Deno.pid, "SIGSTOP");
      return { value: message.value };
    };`,
  );
  const ends = ["--from", from(topic, freshName("through")), "--to", `kafka://${BROKERS}/${out}`, "--handler", "slow.ts"];
  const line = ["relay", ...ends, "--batch", "10", ...QUICK];
  await produce(topic, ...payments(0, 20));
  const ids = async () => (await readTopic(BROKERS, out)).map(({ value }) => JSON.parse(value!).id as number);
  const sleeper = at.start(line, { env: { SLEEPS: "1" } });
  await until(async () => (await stateOf(sleeper.pid)) === "T", 30_000);
  const heir = at.start(line);
  await until(async () => (await ids()).length === 20, 60_000);
  sleeper.kill("SIGCONT");
  await produce(topic, ...payments(20, 40));
  await until(async () => (await ids()).length >= 40, 60_000);
  assertEquals((await heir.stop()).code, 0);
  assertEquals((await sleeper.stop()).code, 0);
  assertEquals((await ids()).toSorted((a, b) => a - b), payments(0, 40).map(({ id }) => id));
});

Deno.test("records that Kafka's own producer has compressed are read: gzip, Snappy, LZ4, zstd", async () => {
  await using at = await emptyBox();
  await at.ok(["init", "--store", "sqlite:app.db"]);
  at.sql("create table payments (id bigint primary key, total bigint, note text)");
  const topic = await makeTopic(BROKERS);
  let id = 0;
  for (const compression of ["gzip", "snappy", "lz4", "zstd"] as const) {
    const values = Array.from(
      { length: 200 },
      () => JSON.stringify({ id: id++, total: 10, note: `${compression} ü `.repeat(50) }),
    );
    await produceInJava(BROKERS, topic, compression, values);
  }
  const to = "sqlite:app.db?driver=node&table=payments";
  await at.ok(["relay", "--from", from(topic, freshName("g")), "--to", to, "--drain", ...QUICK]);
  const found = at.sql(
    "select substr(note, 1, 4) as what, count(*) as n, sum(length(note)) > 0 as full from payments group by 1 order by 1",
  );
  assertEquals(found.map(({ what, n }) => [what, n]), [["gzip", 200], ["lz4 ", 200], ["snap", 200], ["zstd", 200]]);
});

const STEPS: readonly (readonly [step: string, times: readonly number[]])[] = [
  ["source.open", [1]],
  ["source.settled", [1]],
  ["sink.open", [1]],
  ["source.seal", [1, 2, 4]],
  ["handler.run", [1, 7]],
  ["sink.commit", [1, 2, 3]],
  ["sink.close", [1]],
  ["source.close", [1]],
];

for (const [into, acceptance] of [["a database", 20], ["Kafka", 21]] as const) {
  // All at once, each with a topic and a group of its own: a member that was killed is waited for.
  Deno.test(`a relay into ${into} that is killed at any of its steps: each record once, in order (acceptance ${acceptance})`, async () => {
    await using db = await testDatabase("postgres");
    await db.program().migrate();
    await db.sql("create table payments (at bigserial, topic text not null, id bigint not null)");
    const script = new URL("kafka/source_child.ts", import.meta.url).pathname;
    const start = (plan: Plan) =>
      new Running(
        new Deno.Command(Deno.execPath(), {
          args: ["run", "-A", "--quiet", script, JSON.stringify(plan)],
          ...{ stdin: "null", stdout: "piped", stderr: "piped" },
        }).spawn(),
      );
    const moments = STEPS.flatMap(([step, times]) =>
      times.flatMap((time) => [{ step: `before ${step}`, time }, { step: `after ${step}`, time }])
    );
    await Promise.all(moments.map(async (stop) => {
      const topic = await makeTopic(BROKERS);
      const out = into === "Kafka" ? await makeTopic(BROKERS) : undefined;
      await produce(topic, ...payments(0, 20));
      const plan = { ...stop, brokers: BROKERS, topic, url: db.url, ...out && { out } };
      const first = start(plan);
      const line = await first.until((line) => line.startsWith("at "));
      assertEquals(line, `at ${first.pid}`);
      first.kill("SIGKILL");
      assertEquals((await first.ended()).signal, "SIGKILL");
      const { code, stdout, stderr } = await start({ ...plan, step: "" }).ended();
      assertEquals([code, stdout.trim()], [0, "drained"], `${stop.step}, the ${stop.time}. time: ${stderr}`);
      const ids = out
        ? (await readTopic(BROKERS, out)).map(({ value }) => JSON.parse(value!).id)
        : (await db.sql("select id from payments where topic = ? order by at", [topic])).map(({ id }) => Number(id));
      assertEquals(ids, payments(0, 20).map(({ id }) => id), `${stop.step}, the ${stop.time}. time`);
    }));
  });
}
