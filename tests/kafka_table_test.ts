/** Topics into tables without code: what goes in as it is, and what is refused because it would not. */
import { assert, assertEquals, assertMatch } from "@std/assert";
import { assertFailure, type Box, emptyBox } from "./cli_run.ts";
import { freshName, kafkaOf, makeTopic, readTopic } from "./kafka/topics.ts";
import { testDatabase } from "./servers/servers.ts";
import { service } from "./services/mod.ts";

const BROKERS = await service("kafka");
const QUICK = ["--lease-ms", "6000", "--min-retry-ms", "1", "--max-retry-ms", "20", "--poll-ms", "5", "--attempts", "3"];
const KINDS = ["postgres", "mysql", "mariadb", "sqlite", "node:sqlite"] as const;
type Kind = (typeof KINDS)[number];

/** A database, a topic, and a topic for what is refused. */
async function openTable(kind: Kind) {
  await using stack = new AsyncDisposableStack();
  const at: Box = stack.use(await emptyBox());
  const isFile = kind === "sqlite" || kind === "node:sqlite";
  const db = isFile ? undefined : stack.use(await testDatabase(kind));
  const file = kind === "sqlite" ? "sqlite:app.db" : "sqlite:app.db?driver=node";
  const url = db === undefined ? file : db.url.replace(/^mysql:/, `${kind}:`);
  await at.ok(["init", "--store", url.split("?")[0]!]);
  const [topic, dead] = [await makeTopic(BROKERS), await makeTopic(BROKERS)];
  const source = `kafka://${BROKERS}/${topic}?group=${freshName("g")}&dead-letter=${dead}`;
  const rest = stack.move();
  return {
    sql: async (text: string): Promise<Record<string, unknown>[]> => db ? await db.sql(text) : at.sql(text),
    relay: (
      table: string,
    ) => ["relay", "--from", source, "--to", `${url}${url.includes("?") ? "&" : "?"}table=${table}`, ...QUICK],
    at,
    dead,
    /** Each value is the text of a record. */
    async produce(...values: readonly string[]) {
      const producer = kafkaOf(BROKERS).producer({ idempotent: true, maxInFlightRequests: 1 });
      await producer.connect();
      await producer.send({ topic, messages: values.map((value) => ({ key: "k", value })) });
      await producer.disconnect();
    },
    /** What was refused, and why; each at its first attempt. */
    async refused(): Promise<readonly string[]> {
      return (await readTopic(BROKERS, dead)).map(({ value, headers }) => {
        assertEquals(headers["effectonce-attempts"], "1", headers["effectonce-error"]);
        return `${value}: ${headers["effectonce-error"]}`;
      });
    },
    [Symbol.asyncDispose]: () => rest.disposeAsync(),
  };
}

for (const kind of KINDS) {
  const isMysql = kind === "mysql" || kind === "mariadb";
  const isFile = kind === "sqlite" || kind === "node:sqlite";

  Deno.test(`${kind}: texts, numbers of many digits, JSON and times are in the table what they were in the topic`, async () => {
    await using t = await openTable(kind);
    const time = kind === "postgres" ? "timestamptz" : isMysql ? "datetime(3)" : "text";
    await t.sql(
      `create table things (id bigint primary key, note varchar(200)${isMysql ? " character set utf8mb4" : ""}, data ${
        isFile ? "text" : "json"
      }, at ${time})`,
    );
    const quotes = [`o'clock`, `"a"`, "back\\slash", "a\\', (select 1)) -- ", "?", "$1", "ü 😀", "tab\tline\n"];
    await t.produce(...quotes.map((note, id) => JSON.stringify({ id, note })));
    await t.produce('{"id":9007199254740993,"data":{"n":12345678901234567890,"d":[0.12345678901234567890]}}');
    await t.produce('{"id":100,"at":"2026-01-02T03:04:05.678Z"}', '{"id":101,"at":"2026-01-02T03:04:05.678+02:00"}');
    if (isMysql) {
      await t.produce(
        '{"id":102,"data":"a \\"text\\""}',
        '{"id":103,"data":12345678901234567890}',
        '{"id":104,"data":true}',
      );
    }
    const run = await t.at.run([...t.relay("things"), "--drain", "--json"]);
    assertEquals([run.code, run.stderr, await t.refused()], [0, "", []]);
    const notes = await t.sql("select note from things where note is not null order by id");
    assertEquals(notes.map(({ note }) => note), quotes);
    const [long] = await t.sql(
      `select cast(data as ${isMysql ? "char(99)" : "text"}) as data from things where id = 9007199254740993`,
    );
    // MySQL keeps JSON's numbers as doubles, and integers of 64 bits.
    const digits = kind === "mysql" ? "0.12345678901234568" : "0.12345678901234567890";
    assertEquals(
      String(long!["data"]).replaceAll(" ", ""),
      `{"n":12345678901234567890,"d":[${digits}]}`.replace(
        /^\{(.*?),("d".*)\}$/,
        (all, n, d) => kind === "mysql" ? `{${d},${n}}` : all,
      ),
    );
    const times = kind === "postgres"
      ? await t.sql(
        `select to_char(at at time zone 'UTC', 'HH24:MI:SS.MS') as at from things where at is not null order by id`,
      )
      : await t.sql(
        `select ${
          isFile ? "substr(at, 12, 12)" : "cast(time(at) as char)"
        } as at from things where at is not null order by id`,
      );
    assertEquals(times.map(({ at }) => at), ["03:04:05.678", isFile ? "03:04:05.678" : "01:04:05.678"]);
    if (!isMysql) return;
    const typed = await t.sql(
      "select json_type(data) as type, cast(data as char(99)) as data from things where id in (102, 103, 104) order by id",
    );
    assertEquals(typed.map(({ data }) => data), ['"a \\"text\\""', "12345678901234567890", "true"]);
    assertEquals(
      typed.map(({ type }) => String(type).split(" ")[0]!.slice(0, 3)),
      kind === "mysql" ? ["STR", "UNS", "BOO"] : ["STR", "INT", "BOO"],
    );
  });

  Deno.test(`${kind}: what a table would change or can never take is refused at once, and the others go on`, async () => {
    await using t = await openTable(kind);
    await t.sql(
      "create table things (id integer primary key, n integer, note varchar(5) check (length(note) < 6), twice int generated always as (n * 2) stored)",
    );
    const bad: Record<string, string> = {
      '{"id":1,"note":"too long"}': "",
      '{"id":2,"twice":3}': "",
      '{"id":3,"note":"\\ud800"}': "",
      ...!isFile &&
        { '{"id":4,"n":1.5}': "", '{"id":5,"n":"1.5"}': "", '{"id":6,"n":99999999999}': "", '{"id":7,"n":"x"}': "" },
      '{"id":8,"n":1e400}': "",
    };
    const good = ['{"id":20,"n":1}', '{"id":21,"n":"7"}', '{"id":22,"n":null,"note":"five5"}'];
    await t.produce(good[0]!, ...Object.keys(bad), ...good.slice(1));
    assertEquals((await t.at.run([...t.relay("things"), "--drain"])).code, 1);
    const refused = await t.refused();
    assertEquals(
      refused.map((line) => line.slice(0, line.indexOf("}") + 1)).toSorted(),
      Object.keys(bad).toSorted(),
      refused.join("\n"),
    );
    assertEquals((await t.sql("select id from things order by id")).map(({ id }) => Number(id)), [20, 21, 22]);
  });

  Deno.test(`${kind}: with unknown=ignore a column that is added while the relay runs is filled`, async () => {
    await using t = await openTable(kind);
    await t.sql("create table things (id integer primary key)");
    const relay = t.at.start([...t.relay("things&unknown=ignore"), "--json"]);
    await t.produce('{"id":1,"note":"a"}');
    await relay.event("delivered");
    await t.sql("alter table things add column note varchar(99)");
    for (let id = 2;; id++) {
      await t.produce(`{"id":${id},"note":"a"}`);
      await relay.event("delivered");
      const [found] = await t.sql("select count(*) as n from things where note = 'a'");
      if (Number(found!["n"]) > 0) break;
      assert(id < 10_000, "never filled");
    }
    await relay.stop();
  });

  Deno.test(`${kind}: upserts by keys of several columns and of large numbers go in many at once`, async () => {
    await using t = await openTable(kind);
    await t.sql("create table things (shop bigint, id varchar(9), n int, primary key (shop, id))");
    const shop = "9007199254740993";
    await t.produce(...Array.from({ length: 300 }, (_, n) => `{"shop":${n % 2 ? shop : 1},"id":"${n % 50}","n":${n}}`));
    await t.at.ok([...t.relay("things&mode=upsert"), "--drain"]);
    const [sum] = await t.sql("select count(*) as c, sum(n) as n from things");
    // Those of an odd number are of one shop, those of an even one of the other.
    assertEquals([Number(sum!["c"]), Number(sum!["n"])], [
      50,
      Array.from({ length: 50 }, (_, i) => 250 + i).reduce((a, b) => a + b),
    ]);
  });
}

for (const kind of ["mysql", "mariadb"] as const) {
  Deno.test(`${kind}: whatever the sql_mode of the server is, texts are texts and what is too long is refused`, async () => {
    await using t = await openTable(kind);
    const [before] = await t.sql("select @@global.sql_mode as mode");
    await t.sql("create table things (id int primary key, note varchar(30))");
    await t.sql("create table secrets (id int)");
    const injection = String.raw`\', (select 'x')), (2, 'taken`;
    await t.produce(JSON.stringify({ id: 1, note: injection }), JSON.stringify({ id: 3, note: "x".repeat(31) }));
    await t.sql("set global sql_mode = 'NO_BACKSLASH_ESCAPES'");
    try {
      assertEquals((await t.at.run([...t.relay("things"), "--drain"])).code, 1);
    } finally {
      await t.sql(`set global sql_mode = '${before!["mode"]}'`);
    }
    assertEquals(await t.sql("select id, note from things"), [{ id: 1, note: injection }]);
    assertMatch((await t.refused()).join(), /"id":3.*: Data too long/);
  });

  Deno.test(`${kind}: mode=upsert is refused where another unique key would have another row replaced`, async () => {
    await using t = await openTable(kind);
    await t.sql("create table things (id int primary key, email varchar(99) unique, n int)");
    assertFailure(
      await t.at.run([...t.relay("things&mode=upsert"), "--drain"]),
      "table things has other unique keys than its primary key (email)",
    );
  });
}

Deno.test("postgres: a domain that is not null and has a default, and names with ? and quotes", async () => {
  await using t = await openTable("postgres");
  await t.sql("create domain state as text not null default 'new'");
  await t.sql(`create table things (id int primary key, U&"what\\003f" text, "a""b" text, state state default 'new')`);
  await t.produce('{"id":1,"what?":"$1","a\\"b":"?"}', '{"id":2,"state":"old"}', '{"id":3,"state":null}');
  assertEquals((await t.at.run([...t.relay("things"), "--drain"])).code, 1);
  assertEquals(await t.sql("select * from things order by id"), [
    { id: 1, "what?": "$1", 'a"b': "?", state: "new" },
    { id: 2, "what?": null, 'a"b': null, state: "old" },
  ]);
  assertMatch((await t.refused()).join(), /^\{"id":3.*domain state does not allow null values$/);
});

Deno.test("postgres: what a deferred constraint refuses is found among the others, which go on", async () => {
  await using t = await openTable("postgres");
  await t.sql("create table shops (id int primary key)");
  await t.sql("insert into shops values (1)");
  await t.sql("create table things (id int primary key, shop int references shops deferrable initially deferred)");
  await t.produce(...Array.from({ length: 20 }, (_, id) => JSON.stringify({ id, shop: id === 5 || id === 11 ? 77 : 1 })));
  const { code, stderr } = await t.at.run([...t.relay("things"), "--drain"]);
  assertEquals([code, stderr], [1, ""]);
  const [found] = await t.sql("select count(*) as n from things");
  assertEquals(Number(found!["n"]), 18);
  const letters = await readTopic(BROKERS, t.dead);
  assertEquals(letters.map(({ value }) => JSON.parse(value!).id), [5, 11]);
  for (const { headers } of letters) assertMatch(headers["effectonce-error"]!, /violates foreign key constraint/);
});
