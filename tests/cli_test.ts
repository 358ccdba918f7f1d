import { assert, assertEquals, assertMatch, assertNotEquals, assertStringIncludes } from "@std/assert";
import {
  assertFailure,
  assertNothingLost,
  assertSays,
  assertSentence,
  assertUsage,
  Box,
  box,
  DB,
  drainTo,
  has,
  INSTANT,
  type Listed,
  listOf,
  NO_EFFECTS,
  QUICK,
  relayTo,
  sqlOn,
  Target,
  UUID,
} from "./cli_run.ts";

// ------------------------------------------------------------------------------------------ the lines that scripts rely on

Deno.test("init, enqueue, status, effects list, relay, doctor: the lines of the issue work exactly", async () => {
  await using target = new Target();
  await using at = await box();
  assertEquals(await at.ok(["init", "--store", DB]), "sqlite:app.db is ready\n");
  assertEquals(await at.json(["init", "--store", DB]), { store: DB, ready: true });

  const line = ["enqueue", "--store", DB, "--topic", "payments", "--key", "order-1", "--value", '{"amount":5}'];
  assertMatch(await at.ok(line), /^enqueued 1 message: [0-9a-f-]{36}\n$/);
  const full = [...line, "--id", "payment-2", "--header", "k=v"];
  assertEquals(await at.json(full), { enqueued: 1, ids: ["payment-2"] });
  const rows = at.sql(
    `select id, topic, key, cast(value as text) as value, headers, state from effectonce_outbox order by seq`,
  );
  const sent = { topic: "payments", key: "order-1", value: '{"amount":5}', state: "pending" };
  const [first] = rows;
  assertMatch(String(first!.id), UUID);
  assertEquals(rows, [
    { id: first!.id, ...sent, headers: '{"content-type":"application/json"}' },
    { id: "payment-2", ...sent, headers: '{"k":"v","content-type":"application/json"}' },
  ]);

  const { outbox, effects } = await at.status();
  assertEquals(Object.keys(outbox), ["pending", "heldBack", "parked", "oldestMs"]);
  assertEquals([outbox.pending, outbox.parked], [2, 0]);
  assert(outbox.oldestMs !== null && outbox.oldestMs >= 0 && outbox.oldestMs < 60_000, `oldestMs ${outbox.oldestMs}`);
  assertEquals(effects, NO_EFFECTS);
  assertEquals(await at.json(["effects", "list", "--store", DB, "--state", "uncertain"]), []);
  const people = await at.ok(["status", "--store", DB]);
  assertMatch(
    people,
    /^outbox +2 pending, the oldest for \d+ m?s, 0 of them held back; 0 parked\neffects +0 claimed, .*0 uncertain\nrelays +none runs\n$/,
  );

  // One is delivered, the other stays in doubt.
  target.answer = ({ key }) => key === "payment-2" ? new Response("oops", { status: 500 }) : Response.json({ paid: true });
  const ran = await at.run(drainTo(target.url));
  assertEquals([ran.code, ran.stderr], [1, ""]);
  assertEquals(target.keys(), [first!.id, "payment-2"]);
  assertEquals(target.asked.map(({ method, body }) => [method, body]), [["POST", '{"amount":5}'], ["POST", '{"amount":5}']]);
  assertEquals((await at.status()).effects, { ...NO_EFFECTS, done: 1, uncertain: 1 });
  const doubtful = await listOf(at, "--state", "uncertain");
  const { since, error, ...rest } = doubtful[0]!;
  assertEquals([doubtful.length, rest], [1, { scope: "default", key: "payment-2", state: "uncertain", attempts: 1 }]);
  assertMatch(since, INSTANT);
  assertStringIncludes(String(error), "answered 500");

  assertEquals(
    await at.ok(["effects", "resolve", "payment-2", "--store", DB, "--as", "done"]),
    `"payment-2" is resolved as done\n`,
  );
  assertEquals(await at.json(["effects", "list", "--store", DB, "--state", "uncertain"]), []);

  const said = await at.ok(["doctor", "--from", DB, "--to", target.url]);
  for (const part of ["at-most-once", "because", "stronger", "--idempotent", "synchronous = FULL", "journal_mode = wal"]) {
    assertStringIncludes(said, part);
  }
  const asJson = await at.json(["doctor", "--from", DB, "--to", target.url]) as Record<string, unknown>;
  assertEquals(
    Object.keys(asJson),
    ["from", "to", "level", "protocol", "reasons", "conditions", "stronger", "checks"],
  );
  assertEquals([asJson.from, asJson.to, asJson.level], [DB, `POST ${target.url}`, "at-most-once"]);
  assertEquals(target.keys().length, 2, "doctor sends nothing");
});

Deno.test("relay takes every flag of the issue in one line", async () => {
  await using target = new Target();
  await using at = await box();
  await at.ok(["init", "--store", "sqlite:claims.db"]);
  await at.enqueue({ id: "1", topic: "a", value: 1 }, { id: "2", topic: "b", value: 2 }, { id: "3", topic: "c", value: 3 });
  const line = drainTo(
    target.url,
    ...["--idempotent", "--name", "billing", "--topics", "a,b", "--lanes", "2", "--batch", "10", "--lease-ms", "5000"],
    ...["--attempts", "3", "--on-park", "skip", "--store", "sqlite:claims.db", "--json"],
  );
  const ran = await at.run(line);
  assertEquals([ran.code, ran.stderr], [0, ""]);
  assertEquals(target.keys().toSorted(), ["1", "2"]);
  const { outbox, effects } = await at.status();
  assertEquals([outbox.pending, effects.done], [1, 0], "the claims are in the other database");
  const other = await at.json(["effects", "list", "--store", "sqlite:claims.db"]) as Listed[];
  assertEquals(other.map(({ scope, key, state }) => [scope, key, state]), [["billing", "1", "done"], [
    "billing",
    "2",
    "done",
  ]]);

  const more = await at.run(drainTo(target.url, "--name", "billing", "--allow-duplicates", "--json"));
  assertEquals([more.code, more.stderr], [0, ""]);
  assertEquals(target.keys().at(-1), "3");
});

Deno.test("--name=value works like --name value, and a value may begin with a dash, be empty or hold an equals sign", async () => {
  await using at = await box();
  await at.ok(["enqueue", `--store=${DB}`, "--topic=t", "--value=--json", "--id=1", "--header=a=b=c"]);
  await at.ok(["enqueue", "--store", DB, "--topic", "t", "--value", "-5", "--id", "2", "--header", "empty="]);
  await at.ok(["enqueue", "--store", DB, "--topic", "t", "--value", "", "--id", "3"]);
  await at.ok(["enqueue", "--store", DB, "--topic", "t", "--tombstone", "--id", "4"]);
  await at.ok([
    "enqueue",
    "--store",
    DB,
    "--topic",
    "t",
    "--value",
    " {} ",
    "--id",
    "5",
    "--header",
    "Content-Type=text/plain",
  ]);
  const rows = at.sql(
    `select cast(value as text) as value, typeof(value) as type, headers from effectonce_outbox order by seq`,
  );
  assertEquals(rows.map(({ value, type, headers }) => [value, type, JSON.parse(String(headers))]), [
    ["--json", "blob", { a: "b=c" }],
    ["-5", "blob", { empty: "", "content-type": "application/json" }],
    ["", "blob", {}],
    [null, "null", {}],
    [" {} ", "blob", { "Content-Type": "text/plain" }],
  ]);
});

Deno.test("enqueue --jsonl reads a file, and - reads stdin; all or none; blank lines, CRLF and a missing last line break are fine", async () => {
  await using at = await box();
  await Deno.writeTextFile(
    at.path("events.jsonl"),
    `{"topic":"a","value":{"n":1},"id":"1"}\r\n\n{"topic":"a","key":"k","value":"text","headers":{"h":"v"}}`,
  );
  const { enqueued, ids } = await at.json(["enqueue", "--store", DB, "--jsonl", "events.jsonl"]) as {
    enqueued: number;
    ids: string[];
  };
  assertEquals([enqueued, ids[0]], [2, "1"]);
  assertMatch(ids[1]!, UUID);
  const stdin = `{"topic":"a","value":null,"id":"3"}\n{"topic":"a","valueBase64":"/w==","id":"4"}\n`;
  assertEquals(await at.ok(["enqueue", "--store", DB, "--jsonl", "-"], { stdin }), "enqueued 2 messages\n");
  const rows = at.sql(`select id, topic, key, hex(value) as value, headers from effectonce_outbox order by seq`);
  const json = '{"content-type":"application/json"}';
  assertEquals(rows, [
    { id: "1", topic: "a", key: null, value: "7B226E223A317D", headers: json },
    { id: ids[1], topic: "a", key: "k", value: "74657874", headers: '{"h":"v"}' },
    { id: "3", topic: "a", key: null, value: "", headers: "{}" },
    { id: "4", topic: "a", key: null, value: "FF", headers: "{}" },
  ]);
  // No message is no error: a script's input may be empty.
  assertEquals(await at.json(["enqueue", "--store", DB, "--jsonl", "-"], { stdin: "" }), { enqueued: 0, ids: [] });
});

type Headers = Record<string, string>;

/** Messages whose bytes are easy to lose on the way. */
function trickyMessages(): { id: string; key: string | null; value: Uint8Array | null; headers: Headers }[] {
  const texts = [
    ...["", " ", "text", "null", '"quoted"', "{}", '{"a":1}', '{"a": 1}', '{"a":1,"a":2}', "[1,2]", "1.0", "1e3", "-0"],
    ...["12345678901234567890", "true", "line\nbreak\r\n", "\u2028\u2029", "ключ 🔑", "\ufeffbom", "\0nul", '{"b":1,"a":2}'],
    ...['{"effectonce":{}}', '{"__proto__":1}', "\\u0041", '{"2":1,"1":2}', "1e400"],
  ];
  const json: Headers = { "content-type": "application/json" };
  const types: Headers[] = [{}, json, { "Content-Type": "application/json; charset=utf-8" }, {
    "content-type": "text/plain",
  }];
  const made: [key: string | null, value: Uint8Array | null, headers: Headers][] = [
    ...texts.flatMap((text) =>
      types.map((headers): [null, Uint8Array, Headers] => [null, new TextEncoder().encode(text), headers])
    ),
    ["k", null, {}],
    ["k", null, { ...json, empty: "" }],
    ["ключ 🔑\n", Uint8Array.of(0xff, 0, 0xfe), { ü: "ö\n\t", ["__proto__"]: "x", time: "y" }],
    ["k", Uint8Array.of(0xed, 0xa0, 0x80), json],
    [" ", Uint8Array.of(0xef, 0xbb, 0xbf, 0x7b, 0x7d), json],
  ];
  return made.map(([key, value, headers], i) => ({ id: `m${i} "\\ü🔑`, key, value, headers }));
}

Deno.test("what file: writes, enqueue --jsonl reads back byte for byte", async () => {
  await using at = await box();
  const tricky = trickyMessages();
  const lines = tricky.map(({ id, key, value, headers }) => {
    const bytes = value === null ? { value: null } : { valueBase64: value.toBase64() };
    return JSON.stringify({ id, topic: "t ü", key, ...bytes, headers });
  });
  await at.ok(["enqueue", "--store", DB, "--jsonl", "-"], { stdin: lines.join("\n") });
  await at.ok(["init", "--store", "sqlite:copy.db"]);
  const columns =
    `select id, topic, key, hex(value) as value, typeof(value) as type, headers from effectonce_outbox order by seq`;
  const before = at.sql(columns);
  assertEquals(before.length, tricky.length);
  assertEquals((await at.run(drainTo("file:events.jsonl", "--batch", "7"))).code, 0);
  const said = await at.ok(["enqueue", "--store", "sqlite:copy.db", "--jsonl", "events.jsonl"]);
  assertEquals(said, `enqueued ${tricky.length} messages\n`);
  const after = sqlOn(at.path("copy.db"), columns);
  const sorted = (rows: Record<string, unknown>[]) =>
    rows.map(({ headers, ...row }) => ({ ...row, headers: Object.entries(JSON.parse(String(headers))).toSorted() }));
  assertEquals(sorted(after), sorted(before));
  // And stdout: writes the same lines.
  const copied = await at.run(["relay", "--from", "sqlite:copy.db", "--to", "stdout:", "--drain", "--lanes", "1"]);
  const written = (await Deno.readTextFile(at.path("events.jsonl"))).split("\n").filter((line) =>
    !line.startsWith('{"effectonce"')
  );
  const withoutTime = (lines: string[]) => lines.map((line) => line.replace(/"time":"[^"]*"\}$/, "")).toSorted();
  assertEquals(withoutTime(copied.stdout.split("\n")), withoutTime(written));
});

// -------------------------------------------------------------------------------------------------------- usage: exit code 2

/** What a person may mistype, and what the answer must say. */
const USAGE: readonly (readonly [args: readonly string[], ...says: (string | RegExp)[]])[] = [
  // Commands and words.
  [["frobnicate"], `"frobnicate"`],
  [["Init"], `"Init"`],
  [[""], `""`],
  [["constructor"], `"constructor"`],
  [["__proto__"], `"__proto__"`],
  [["--store", DB], "--store"],
  [["effects"], /list, show, retry, resolve or discard/],
  [["effects", "--store", DB], /list, show, retry, resolve or discard/],
  [["effects", "frobnicate", "--store", DB], `"effects frobnicate"`, /list, show, retry, resolve or discard/],
  [["status", "extra", "--store", DB], `"extra"`],
  [["relay", "extra", "--from", DB, "--to", "stdout:"], `"extra"`],
  [["init", "--store", "sqlite:new.db", "--", "--json"], `"--json"`],
  [["effects", "show", "--store", DB], "KEY"],
  [["effects", "retry", "--store", DB], "KEY is missing", "--all"],
  [["effects", "retry", "k", "--all", "--store", DB], "KEY and --all exclude each other"],
  [["effects", "retry", "k", "l", "--store", DB], `"l"`],
  [["effects", "resolve", "--store", DB, "--as", "done"], "KEY"],
  [["effects", "discard", "--store", DB], "KEY"],
  [["effects", "show", "a", "b", "--store", DB], `"b"`],
  // Flags.
  [["init"], "--store is missing"],
  [["relay", "--to", "stdout:"], "--from is missing"],
  [["relay", "--from", DB], "--to is missing"],
  [["doctor", "--from", DB], "--to is missing"],
  [["schema"], "--store is missing"],
  [["init", "--frobnicate", "--store", DB], "--frobnicate"],
  [["init", "--frobnicate=1", "--store", DB], "--frobnicate"],
  [["init", "-s", DB], "-s"],
  [["init", "--STORE", DB], "--STORE"],
  [["init", "--no-json", "--store", DB], "--no-json"],
  [["init", "--__proto__", "--store", DB], "--__proto__"],
  [["init", "--store"], "--store needs a value"],
  [["init", "--store", "--json"], "--store needs a value"],
  [["enqueue", "--store", DB, "--topic", "t", "--value"], "--value needs a value"],
  [["enqueue", "--store", DB, "--topic", "t", "--value", "--json"], "--value needs a value"],
  [drainTo("http://127.0.0.1:1/", "--header-to"), "--header-to needs a value"],
  [["init", "--store", "sqlite:new.db", "--store", DB], "--store is given twice"],
  [["init", "--store", DB, "--store=sqlite:new.db"], "--store is given twice"],
  [["init", "--json", "--json", "--store", DB], "--json is given twice"],
  [drainTo("stdout:", "--lanes", "1", "--lanes", "2"), "--lanes is given twice"],
  [["init", "--store", DB, "--json=perhaps"], "--json"],
  // Choices.
  [drainTo("stdout:", "--on-park", "wait"), "--on-park", "block or skip", `"wait"`],
  [drainTo("stdout:", "--on-park", ""), "--on-park", "block or skip"],
  [drainTo("http://127.0.0.1:1/", "--method", "GET"), "--method", "POST or PUT", `"GET"`],
  [drainTo("http://127.0.0.1:1/", "--method", "post"), "--method", "POST or PUT"],
  [["effects", "list", "--store", DB, "--state", "broken"], "--state", "uncertain", `"broken"`],
  [["effects", "resolve", "k", "--store", DB], "--as is missing"],
  [["effects", "resolve", "k", "--store", DB, "--as", "maybe"], "--as", "done or absent", `"maybe"`],
  [["effects", "resolve", "k", "--store", DB, "--as", "absent", "--result", "1"], "--result", "--as done"],
  [["effects", "resolve", "k", "--store", DB, "--as", "done", "--result", "{bad"], "--result", "JSON"],
  [["effects", "resolve", "k", "--store", DB, "--as", "done", "--result", ""], "--result", "JSON"],
  // Numbers that belong together.
  [drainTo("stdout:", "--min-retry-ms", "500", "--max-retry-ms", "100"), "--min-retry-ms", "--max-retry-ms", "100"],
  [drainTo("stdout:", "--min-retry-ms", "70000"), "--min-retry-ms", "--max-retry-ms", "60000"],
  [drainTo("http://127.0.0.1:1/", "--dedupe-window-ms", "5"), "--dedupe-window-ms", "--idempotent"],
  [drainTo("stdout:", "--topics", ""), "--topics"],
  [drainTo("stdout:", "--topics", "a,,b"), "--topics"],
  [drainTo("stdout:", "--name", ""), "--name"],
  [drainTo("stdout:", "--name", "x".repeat(1025)), "--name"],
  // Databases.
  ...["", "app.db", "/app.db", ":", "sqlite", " sqlite:app.db"].map((
    url,
  ): [string[], RegExp] => [["init", "--store", url], /URL/]),
  [["init", "--store", "oracle://u:hush@host/db"], "--store", "oracle:", "sqlite:, postgres:, mysql: or mariadb:"],
  [["init", "--store", "sqlite:"], "--store", "sqlite:app.db"],
  [["init", "--store", "sqlite::memory:"], "--store", "no file"],
  [["init", "--store", "sqlite://host/app.db"], "--store", "no file"],
  [["init", "--store", "sqlite:new.db?driver=foo"], "--store", "driver=foo", "better-sqlite3 or node"],
  [["init", "--store", "sqlite:new.db?driver="], "--store", "better-sqlite3 or node"],
  [["init", "--store", "sqlite:new.db?driver=constructor"], "--store", "driver=constructor", "better-sqlite3 or node"],
  [["init", "--store", "sqlite:new.db?driver=node&driver=foo"], "--store", "driver"],
  [["init", "--store", "sqlite:new.db?mode=ro"], "--store", `"mode"`, "driver"],
  [drainTo("stdout:", "--store", "sqlite:app.db?x=1"), "--store", `"x"`],
  [["relay", "--from", "sqlite:app.db?x=1", "--to", "stdout:"], "--from", `"x"`],
  [["relay", "--from", "app.db", "--to", "stdout:"], "--from", "URL"],
  [["relay", "--from", "http://127.0.0.1:1/", "--to", "stdout:"], "--from", "http:"],
  [["effects", "show", "k", "--store", DB, "--from", "http://127.0.0.1:1/"], "--from", "http:"],
  [["schema", "--store", "oracle:"], "oracle:", "sqlite:, postgres:, mysql: or mariadb:"],
  [["schema", "--store", "sqlite"], "URL"],
  // Targets.
  [drainTo(""), "--to", "URL"],
  [drainTo("127.0.0.1:80/charge"), "--to", "URL"],
  [drainTo("example.com"), "--to", "http"],
  ...["http:", "http://", "https://:", "http://a b/", "http://host:99999/"].map((url): [string[], ...string[]] => [
    drainTo(url),
    "--to",
    "http",
  ]),
  [drainTo("ftp://host/"), "--to", "ftp:", "stdout:"],
  [drainTo("sqlite:other.db"), "--to", "--handler FILE", "?table=NAME"],
  [drainTo("file:"), "--to", "file:events.jsonl"],
  [drainTo("file://events.jsonl"), "--to", "file:events.jsonl"],
  [drainTo("file:events.jsonl?mode=w"), "--to", `"mode"`],
  [drainTo("stdout:now"), "--to", "stdout:"],
  [drainTo("stdout:?x=1"), "--to", `"x"`],
  [drainTo("stdout"), "--to", "stdout:"],
  ...[
    "--idempotent",
    "--dedupe-window-ms=5",
    "--header-to=a=b",
    "--method=PUT",
    "--timeout-ms=5",
    "--reconcile=http://h/{id}",
  ]
    .flatMap((flag) =>
      ["stdout:", "file:new.jsonl"].map((url): [string[], string, string] => [
        drainTo(url, flag),
        flag.split("=")[0]!,
        url.split(":")[0]!,
      ])
    ),
  // Headers for the target.
  ...["nothing", "=value", ""].map((text): [string[], string, string] => [
    drainTo("http://127.0.0.1:1/", "--header-to", text),
    "--header-to",
    "NAME=VALUE",
  ]),
  [drainTo("http://127.0.0.1:1/", "--header-to", "a b=c"), "--header-to", `"a b"`],
  [drainTo("http://127.0.0.1:1/", "--header-to", "X=line\nbreak"), "--header-to", `"X"`],
  [drainTo("http://127.0.0.1:1/", "--header-to", "X=✓"), "--header-to", `"X"`],
  ...["Host", "content-length", "Idempotency-Key", "ce-id", "Connection"].map((name): [string[], string, string] => [
    drainTo("http://127.0.0.1:1/", "--header-to", `${name}=1`),
    "--header-to",
    `"${name}"`,
  ]),
  [
    drainTo("http://127.0.0.1:1/", "--header-to", "X=env:EFFECTONCE_NO_SUCH_VARIABLE"),
    "--header-to",
    "EFFECTONCE_NO_SUCH_VARIABLE",
  ],
  [drainTo("http://127.0.0.1:1/", "--header-to", "X=env:"), "--header-to", "variable"],
  [drainTo("http://127.0.0.1:1/", "--header-to", "X=env:A=B"), "--header-to", "variable"],
  [drainTo("http://127.0.0.1:1/", "--header-to", "X=1", "--header-to", "X=2"), "--header-to", "X twice"],
  [drainTo("http://127.0.0.1:1/", "--header-to", "X=1", "--header-to", "x=2"), "--header-to", "twice"],
  [drainTo("http://u:hush@127.0.0.1:1/", "--header-to", "Authorization=x"), "credentials", "authorization"],
  // The question about a message in doubt.
  ...["h/{id}", "ftp://h/{id}", "http://h/", "http://{id}/", "http://h/{order}"].map((url): [string[], string] => [
    drainTo("http://127.0.0.1:1/", "--reconcile", url),
    "--reconcile",
  ]),
  // What to enqueue.
  [["enqueue", "--store", DB], /--value is missing|--topic is missing/],
  [["enqueue", "--store", DB, "--topic", "t"], "--value is missing", "--jsonl"],
  [["enqueue", "--store", DB, "--value", "1"], "--topic is missing"],
  [["enqueue", "--store", DB, "--topic", "t", "--value", "1", "--tombstone"], "--value and --tombstone"],
  [["enqueue", "--store", DB, "--topic", "", "--value", "1"], "--topic"],
  [["enqueue", "--store", DB, "--topic", "t", "--key", "", "--value", "1"], "--key"],
  [["enqueue", "--store", DB, "--topic", "t", "--id", "", "--value", "1"], "--id"],
  [["enqueue", "--store", DB, "--topic", "t", "--id", "x".repeat(1025), "--value", "1"], "--id", "1024"],
  [["enqueue", "--store", DB, "--topic", "t", "--value", "1", "--header", "nothing"], "--header", "NAME=VALUE"],
  [["enqueue", "--store", DB, "--topic", "t", "--value", "1", "--header", "=x"], "--header", "NAME=VALUE"],
  [["enqueue", "--store", DB, "--topic", "t", "--value", "1", "--header", "a=1", "--header", "a=2"], "--header", "a twice"],
  [["enqueue", "--store", DB, "--jsonl"], "--jsonl needs a value"],
  [["enqueue", "--store", DB, "--jsonl", ""], "--jsonl"],
  ...["--topic=t", "--key=k", "--value=1", "--id=1", "--tombstone", "--header=a=b"].map((
    flag,
  ): [string[], string, string] => [
    ["enqueue", "--store", DB, "--jsonl", "events.jsonl", flag],
    "--jsonl",
    flag.split("=")[0]!,
  ]),
];

Deno.test("usage errors: exit code 2, one clear sentence that names the flag, nothing written", async (t) => {
  await using at = await box();
  const before = at.content();
  const ended = await at.many(USAGE.map(([args]) => args));
  for (const [i, [args, ...says]] of USAGE.entries()) {
    const name = args.join(" ").replaceAll(/x{9,}/g, "xxx…").replaceAll("\n", "\\n");
    await t.step(name || "(empty)", () => assertUsage(ended[i]!, ...says));
  }
  await t.step("nothing was written, and no file was made", () => {
    assertEquals(at.content(), before);
    const files = Array.from(Deno.readDirSync(at.folder), ({ name }) => name).filter((name) => !/^app\.db/.test(name));
    assertEquals(files, []);
  });
  await t.step("the same as a process", async () => {
    for (const i of [0, 2, 10, 20, 30]) assertEquals(await at.run(USAGE[i]![0]), ended[i]!);
  });
});

/** Flags that are numbers: command line before it, and from where on. */
const NUMBERS: readonly (readonly [args: readonly string[], flag: string, min: number])[] = [
  [drainTo("stdout:"), "lanes", 1],
  [drainTo("stdout:"), "batch", 1],
  [drainTo("stdout:"), "lease-ms", 10],
  [drainTo("stdout:"), "attempts", 1],
  [drainTo("stdout:"), "min-retry-ms", 0],
  [drainTo("stdout:"), "max-retry-ms", 0],
  [drainTo("stdout:"), "poll-ms", 1],
  [drainTo("http://127.0.0.1:1/"), "settle-ms", 0],
  [drainTo("http://127.0.0.1:1/"), "timeout-ms", 1],
  [drainTo("http://127.0.0.1:1/", "--idempotent"), "dedupe-window-ms", 1],
  [["effects", "list", "--store", DB], "limit", 1],
  [["prune", "--store", DB], "older-than-ms", 0],
  [["demo"], "orders", 1],
];

Deno.test("bad numbers: exit code 2, and the sentence says which flag, what is allowed, and what was given", async (t) => {
  await using at = await box();
  const texts = ["-1", "1.5", "abc", "1e3", "99999999999999999999", "", " 5", "0x10", "+5", "٣", "NaN", "Infinity", "5 "];
  const cases = NUMBERS.flatMap(([args, flag, min]) =>
    [...new Set([String(min - 1), ...texts])].map((text) => ({ line: [...args, `--${flag}`, text], flag, min, text }))
  );
  const ended = await at.many(cases.map(({ line }) => line));
  for (const [i, { line, flag, min, text }] of cases.entries()) {
    await t.step(`${line[0]} --${flag} ${JSON.stringify(text)}`, () => {
      assertUsage(ended[i]!, `--${flag}`, "whole number", `from ${min}`, JSON.stringify(text));
    });
  }
  for (const flag of ["lease-ms", "poll-ms", "max-retry-ms", "settle-ms"]) {
    // A lease that ends in 285,000 years is a slip; in a database it stays, and no other relay ever takes over.
    await t.step(`--${flag} 9007199254740991 is refused`, async () => {
      const ran = await at.run(drainTo("http://127.0.0.1:1/", `--${flag}`, "9007199254740991"));
      assertUsage(ran, `--${flag}`, "9007199254740991");
    });
  }
});

// ------------------------------------------------------------------------------------------------ failures: exit code 1

/** A file that should be a database, what makes it, and what every command must say about it. */
const BROKEN: readonly (readonly [name: string, make: (path: string) => void, ...says: (string | RegExp)[]])[] = [
  [
    "missing.db",
    () => {},
    "sqlite:missing.db",
    "does not exist",
    /init --store (sqlite:missing\.db|'sqlite:missing\.db\?driver=node')/,
  ],
  ["folder.db", (path) => Deno.mkdirSync(path), "sqlite:folder.db", "not a file"],
  [
    "random.db",
    (path) => Deno.writeFileSync(path, crypto.getRandomValues(new Uint8Array(5000))),
    "sqlite:random.db",
    "not a database",
  ],
  ["text.db", (path) => Deno.writeTextFileSync(path, "name,amount\norder-1,5\n"), "sqlite:text.db", "not a database"],
  ["empty.db", (path) => Deno.writeTextFileSync(path, ""), "sqlite:empty.db", "no effectonce tables", "init"],
  [
    "foreign.db",
    (path) => sqlOn(path, "create table orders (id text)"),
    "sqlite:foreign.db",
    "no effectonce tables",
    "init",
  ],
  [
    "newer.db",
    (path) => sqlOn(path, ...META, `insert into effectonce_meta values ('schema_version', '2')`),
    "sqlite:newer.db",
    "version 2",
    "upgrade",
  ],
];
const META = ["create table effectonce_meta (name text primary key, value text not null) without rowid"];

/** Every command that opens a database. */
const opening = (url: string): string[][] => [
  ["status", "--store", url],
  ["enqueue", "--store", url, "--topic", "t", "--value", "1"],
  ["effects", "list", "--store", url],
  ["effects", "show", "k", "--store", url],
  ["effects", "retry", "k", "--store", url],
  ["effects", "resolve", "k", "--store", url, "--as", "done"],
  ["effects", "discard", "k", "--store", url],
  ["prune", "--store", url],
  ["relay", "--from", url, "--to", "stdout:", "--drain"],
  ["relay", "--from", url, "--to", "file:out.jsonl", "--drain"],
  ["relay", "--from", DB, "--store", url, "--to", "http://127.0.0.1:1/", "--drain"],
  ["doctor", "--from", url, "--to", "stdout:"],
];

Deno.test("a file that is no database of ours: exit code 1, its name, what is wrong, and it is left as it was", async (t) => {
  await using at = await box();
  for (const [name, make, ...says] of BROKEN) {
    make(at.path(name));
    const read = () => Deno.statSync(at.path(name)).isFile ? Deno.readFileSync(at.path(name)).toBase64() : "folder";
    const before = name === "missing.db" ? "" : read();
    // The driver says itself what is wrong, so each is asked.
    const lines = ["", "?driver=node"].flatMap((driver) => opening(`sqlite:${name}${driver}`));
    const ended = await at.many(lines);
    for (const [i, line] of lines.entries()) await t.step(line.join(" "), () => assertFailure(ended[i]!, ...says));
    await t.step(`${name} is as it was`, () => {
      if (name === "missing.db") assert(!Array.from(Deno.readDirSync(at.folder)).some((file) => file.name === name));
      else assertEquals(read(), before);
      assert(!Array.from(Deno.readDirSync(at.folder)).some((file) => file.name === "out.jsonl"), "out.jsonl was made");
    });
  }
});

Deno.test("init makes no database of what is none, and leaves a newer one and other tables alone", async (t) => {
  await using at = await box();
  for (const [name, make, ...says] of BROKEN) {
    if (["missing.db", "empty.db", "foreign.db"].includes(name)) continue;
    make(at.path(name));
    await t.step(name, async () => {
      const read = () => name === "folder.db" ? "" : Deno.readFileSync(at.path(name)).toBase64();
      const before = read();
      for (const driver of ["", "?driver=node"]) {
        assertFailure(await at.run(["init", "--store", `sqlite:${name}${driver}`]), ...says);
      }
      assertEquals(read(), before);
    });
  }
  await t.step("a database with other tables", async () => {
    sqlOn(at.path("shop.db"), "create table orders (id text)", "insert into orders values ('o1')");
    await at.ok(["init", "--store", "sqlite:shop.db"]);
    assertEquals(sqlOn(at.path("shop.db"), "select id from orders"), [{ id: "o1" }]);
    await at.ok(["enqueue", "--store", "sqlite:shop.db", "--topic", "t", "--value", "1"]);
  });
  await t.step("a folder that does not exist", async () => {
    for (const driver of ["", "?driver=node"]) {
      const ran = await at.run(["init", "--store", `sqlite:nowhere/new.db${driver}`]);
      assertFailure(ran, "sqlite:nowhere/new.db", /director|folder|unable to open/);
    }
  });
  await t.step("a database whose tables somebody took away", async () => {
    // The version says that they are there: no command may say "ready", or name nothing but a table.
    sqlOn(at.path("gone.db"), ...META, `insert into effectonce_meta values ('schema_version', '1')`);
    assertFailure(await at.run(["init", "--store", "sqlite:gone.db"]), "sqlite:gone.db", "effectonce_outbox");
    assertFailure(await at.run(["status", "--store", "sqlite:gone.db"]), "sqlite:gone.db", "effectonce_outbox");
  });
  await t.step("a table of that name that is somebody else's", async () => {
    sqlOn(at.path("theirs.db"), "create table effectonce_meta (a)");
    assertFailure(await at.run(["init", "--store", "sqlite:theirs.db"]), "sqlite:theirs.db");
    assertFailure(await at.run(["status", "--store", "sqlite:theirs.db"]), "sqlite:theirs.db");
  });
});

Deno.test("a database that another process keeps locked: writers wait 5 s and then say so, readers go on, nothing is lost", async () => {
  await using target = new Target();
  await using at = await box();
  await at.enqueue({ id: "1", value: 1 });
  const { DatabaseSync } = await import("node:sqlite");
  const holder = new DatabaseSync(at.path("app.db"));
  try {
    holder.prepare("begin immediate").run();
    const start = performance.now();
    const writers = [
      ["enqueue", "--store", DB, "--topic", "t", "--value", "1"],
      ["enqueue", "--store", `${DB}?driver=node`, "--topic", "t", "--value", "1"],
      ["init", "--store", DB],
      ["prune", "--store", DB],
      drainTo(target.url),
    ].map(async (args) => [args, await at.run(args), performance.now() - start] as const);
    assertEquals((await at.status()).outbox.pending, 1, "a reader goes on");
    for (const [args, ran, ms] of await Promise.all(writers)) {
      assertFailure(ran, DB, "locked", "5000 ms");
      assert(ms > 4_900, `${args.join(" ")} gave up after ${ms} ms`);
    }
    holder.prepare("rollback").run();
  } finally {
    holder.close();
  }
  assertEquals(target.keys(), []);
  assertEquals((await at.run(drainTo(target.url))).code, 0);
  assertEquals(target.keys(), ["1"]);
});

Deno.test("a relay that runs while the database is locked for a moment tries again, and says so", async () => {
  await using target = new Target();
  await using at = await box();
  await at.enqueue({ id: "1", value: 1 });
  const answered = Promise.withResolvers<void>();
  const release = Promise.withResolvers<void>();
  target.answer = async () => {
    answered.resolve();
    await release.promise;
    return Response.json({ paid: true });
  };
  const running = at.start(relayTo(target.url, "--json"));
  await answered.promise;
  const { DatabaseSync } = await import("node:sqlite");
  const holder = new DatabaseSync(at.path("app.db"));
  try {
    holder.prepare("begin immediate").run();
    release.resolve();
    // The outcome of the call cannot be written down for the moment. It waits on, and is then recorded.
    await new Promise((resolve) => setTimeout(resolve, 200)); // Nothing is waited for: the lock is held for a while.
    holder.prepare("rollback").run();
  } finally {
    holder.close();
  }
  await running.event("delivered");
  assertEquals((await running.stop()).code, 0);
  assertEquals((await at.status()).effects, { ...NO_EFFECTS, done: 1 });
  assertEquals(target.keys(), ["1"]);
});

Deno.test("a database, a folder and an output file that may only be read: exit code 1, their name, nothing changed", async (t) => {
  await using at = await box();
  await at.enqueue({ id: "1", value: 1 });
  await Deno.writeTextFile(at.path("out.jsonl"), "");
  await Deno.mkdir(at.path("deno"), { mode: 0o777 });
  await Deno.chmod(at.path("deno"), 0o777);
  const nobody = Deno.uid() === 0;
  if (nobody && !await has("setpriv")) return;
  const run = (...args: string[]) =>
    at.run(args, { nobody, env: nobody ? { DENO_DIR: at.path("deno"), HOME: at.path("deno") } : {} });
  const modes = async (folder: number, file: number) => {
    for (const { name, isFile } of Deno.readDirSync(at.folder)) if (isFile) await Deno.chmod(at.path(name), file);
    await Deno.chmod(at.folder, folder);
  };
  await modes(0o777, 0o666);
  const first = await run("status", "--store", DB);
  if (first.code !== 0) return console.log(`skipped, since nobody else can run ${Deno.execPath()} here: ${first.stderr}`);
  const before = at.content();
  try {
    for (const [what, folder] of [["the file", 0o777], ["the folder and the file", 0o555]] as const) {
      await modes(folder, 0o444);
      for (const driver of ["", "?driver=node"]) {
        await t.step(`${what} ${driver}`, async () => {
          const url = `${DB}${driver}`;
          const enqueue = await run("enqueue", "--store", url, "--topic", "t", "--value", "1");
          assertFailure(enqueue, DB, /read-?only/);
          assertFailure(await run("relay", "--from", url, "--to", "stdout:", "--drain"), DB, /read-?only/);
          assertFailure(await run("init", "--store", url), DB, /read-?only/);
          if (folder === 0o777) assertEquals((await run("status", "--store", url)).code, 0);
        });
      }
    }
    await t.step("a new database in a folder that may only be read", async () => {
      assertFailure(await run("init", "--store", "sqlite:new.db"), "sqlite:new.db");
    });
    await modes(0o777, 0o666);
    await Deno.chmod(at.path("out.jsonl"), 0o444);
    await t.step("the output file", async () => {
      const ran = await run(...drainTo("file:out.jsonl"));
      assertEquals(ran.code, 1);
      assertSentence(ran.stderr);
      assertSays(ran.stderr, ["file:out.jsonl", /[Pp]ermission denied/]);
    });
    await Deno.chmod(at.path("app.db"), 0o000);
    await t.step("a database that may not even be read", async () => {
      assertFailure(await run("status", "--store", DB), DB);
    });
    await Deno.writeTextFile(at.path("in.jsonl"), `{"topic":"t","value":1}`, { mode: 0o000 });
    await Deno.chmod(at.path("in.jsonl"), 0o000);
    await Deno.chmod(at.path("app.db"), 0o666);
    await t.step("a JSONL file that may not be read", async () => {
      assertFailure(await run("enqueue", "--store", DB, "--jsonl", "in.jsonl"), "in.jsonl", /[Pp]ermission denied/);
    });
  } finally {
    await modes(0o777, 0o666);
  }
  const pending = (content: string) => content.replaceAll(/\["effectonce_(relays|shards|batches)",\[[^\]]*\]\]/g, "");
  assertEquals(pending(at.content()), pending(before));
});

/** Lines that cannot be enqueued, and what must be said; `line 2` is meant in each. */
const BAD_LINES: readonly (readonly [line: string, ...says: (string | RegExp)[]])[] = [
  ["hush", "not JSON"],
  [`{"topic":"t","value":1} {}`, "not JSON"],
  [`{"topic":"t","value":1`, "not JSON"],
  ["[1]", "object"],
  ["null", "object"],
  ["{}", "topic"],
  [`{"topic":"t"}`, "value"],
  [`{"topic":1,"value":1}`, "topic"],
  [`{"topic":"","value":1}`, "topic"],
  [`{"topic":"t\\u0000","value":1}`, "topic"],
  [`{"topic":"t","value":1,"id":5}`, "id"],
  [`{"topic":"t","value":1,"id":""}`, "id"],
  [`{"topic":"t","value":1,"id":null}`, "id"],
  [`{"topic":"t","value":1,"id":"${"x".repeat(1025)}"}`, "id", "1024"],
  [`{"topic":"t","value":1,"key":5}`, "key"],
  [`{"topic":"t","value":1,"key":""}`, "key"],
  [`{"topic":"t","value":1,"headers":[]}`, "headers"],
  [`{"topic":"t","value":1,"headers":{"a":1}}`, "headers"],
  [`{"topic":"t","value":1,"headers":{"":"x"}}`, "header"],
  [`{"topic":"t","value":1,"headers":{"a":"\\ud800"}}`, "header"],
  [`{"topic":"t","value":1,"time":5}`, "time"],
  [`{"topic":"t","value":1,"valueBase64":"AA=="}`, "both value and valueBase64"],
  [`{"topic":"t","valueBase64":"hush!"}`, "base64"],
  [`{"topic":"t","valueBase64":5}`, "valueBase64"],
  [`{"topic":"t","value":1,"Key":"k"}`, `"Key"`],
  // Text that has no UTF-8 would come out as another one.
  [`{"topic":"t","value":"\\ud800"}`, "value", "Unicode"],
  [`{"topic":"t","id":"first","value":1}`, `"first-`, /already|twice/],
];

Deno.test("a bad line in a JSONL file: exit code 1, the file and the line, and nothing is enqueued", async (t) => {
  await using at = await box();
  // Each in a file of its own, with a first line that is good.
  for (const [i, [line]] of BAD_LINES.entries()) {
    const text = `{"topic":"t","id":"first","value":${i}}\n${line}\n`;
    await Deno.writeTextFile(at.path(`in-${i}.jsonl`), text.replaceAll(`"first"`, `"first-${i}"`));
  }
  const ended = await at.many(BAD_LINES.map((_, i) => ["enqueue", "--store", DB, "--jsonl", `in-${i}.jsonl`]));
  const enqueued = at.sql("select id from effectonce_outbox").map(({ id }) => id);
  for (const [i, [line, ...says]] of BAD_LINES.entries()) {
    await t.step(line.replaceAll(/x{9,}/g, "xxx…"), () => {
      assert(!enqueued.includes(`first-${i}`), "it was enqueued");
      assertFailure(ended[i]!, `in-${i}.jsonl`, ...says);
      assertFailure(ended[i]!, "line 2", /[Nn]othing was enqueued/);
      assert(!ended[i]!.stderr.includes("hush"), "a line may hold what no log should");
    });
  }
  at.sql("delete from effectonce_outbox");
  await t.step("stdin has no name but is called so", async () => {
    assertFailure(await at.run(["enqueue", "--store", DB, "--jsonl", "-"], { stdin: "\n\nx" }), "stdin", "line 3");
  });
  await t.step("an id that is in the outbox already", async () => {
    at.sql("delete from effectonce_outbox");
    await at.enqueue({ id: "taken", value: 1 });
    const stdin = `{"topic":"t","value":1}\n{"topic":"t","value":1,"id":"taken"}\n`;
    const ran = await at.run(["enqueue", "--store", DB, "--jsonl", "-"], { stdin });
    assertEquals(at.sql("select id from effectonce_outbox"), [{ id: "taken" }]);
    assertFailure(ran, `"taken"`, "already");
    assertFailure(
      await at.run(["enqueue", "--store", DB, "--topic", "t", "--value", "1", "--id", "taken"]),
      `"taken"`,
      "already",
    );
  });
  await t.step("bytes that are not UTF-8", async () => {
    const stdin = Uint8Array.of(...new TextEncoder().encode(`{"topic":"t","value":"`), 0xff, 0x22, 0x7d, 0x0a);
    assertFailure(await at.run(["enqueue", "--store", DB, "--jsonl", "-"], { stdin }), "stdin", "UTF-8");
    await Deno.writeFile(at.path("in.jsonl"), stdin);
    assertFailure(await at.run(["enqueue", "--store", DB, "--jsonl", "in.jsonl"]), "in.jsonl", "UTF-8");
  });
  await t.step("a file that is missing, and a folder", async () => {
    assertFailure(
      await at.run(["enqueue", "--store", DB, "--jsonl", "missing.jsonl"]),
      "missing.jsonl",
      /[Nn]o such file|does not exist/,
    );
    assertFailure(await at.run(["enqueue", "--store", DB, "--jsonl", "."]), /directory|folder/);
  });
  assertEquals((await at.status()).outbox.pending, 1);
});

Deno.test("numbers that JavaScript cannot hold go through enqueue --jsonl digit by digit, or are refused", async () => {
  await using at = await box();
  for (const [i, text] of ["12345678901234567890", "1e400", "0.1234567890123456789"].entries()) {
    const ran = await at.run(["enqueue", "--store", DB, "--jsonl", "-"], {
      stdin: `{"topic":"t","id":"${i}","value":{"n":${text}}}`,
    });
    const [stored] = at.sql(`select cast(value as text) as value from effectonce_outbox where id = '${i}'`);
    if (ran.code === 0) assertEquals(stored?.value, `{"n":${text}}`, "another number was enqueued than was given");
    else assertFailure(ran, "stdin", "line 1");
  }
});

Deno.test("an output file that another relay has is left alone: exit code 1 once the lease is over", async () => {
  await using at = await box();
  await at.ok(["init", "--store", "sqlite:other.db"]);
  await at.enqueue({ id: "1", value: 1 });
  await at.ok(["enqueue", "--store", "sqlite:other.db", "--topic", "t", "--value", "1", "--id", "theirs"]);
  const owner = at.start(relayTo("file:out.jsonl", "--json"));
  await owner.event("idle");
  const before = await Deno.readTextFile(at.path("out.jsonl"));
  const ran = await at.run(["relay", "--from", "sqlite:other.db", "--to", "file:out.jsonl", "--drain", "--lease-ms", "300"]);
  assertEquals(ran.code, 1);
  assertSentence(ran.stderr);
  assertSays(ran.stderr, ["file:out.jsonl", "another relay has it"]);
  assertEquals(await Deno.readTextFile(at.path("out.jsonl")), before);
  const [{ n }] = sqlOn(at.path("other.db"), "select count(*) as n from effectonce_outbox") as [{ n: number }];
  assertEquals(n, 1, "the message that could not be written is still there");
  await at.enqueue({ id: "2", value: 2 });
  await owner.event("delivered");
  assertEquals((await owner.stop()).code, 0);
});

Deno.test("a relay that runs on does not fill the screen while it waits for an output file that another one has", async () => {
  await using at = await box();
  await at.enqueue({ id: "1", value: 1 });
  const owner = at.start(relayTo("file:out.jsonl", "--json"));
  await owner.event("idle");
  const second = at.start(relayTo("file:out.jsonl"));
  await second.until((line) => line.startsWith("fenced"));
  await owner.stop();
  await at.enqueue({ id: "2", value: 2 });
  // The second takes over and goes on.
  while (!(await Deno.readTextFile(at.path("out.jsonl"))).includes(`"id":"2"`)) await at.status();
  const { code, stdout } = await second.stop();
  assertEquals(code, 0);
  assert(stdout.split("\n").length < 15, `it said too much:\n${stdout}`);
});

/** What may be in the way where the output file should be. */
const FOREIGN: readonly (readonly [what: string, content: string | null, ...says: (string | RegExp)[]])[] = [
  ["somebody's text", "dear diary\n", "file:out.jsonl", "another kind of file"],
  ["somebody's JSON lines", `{"id":"1","topic":"t","value":1}\n`, "file:out.jsonl", "another kind of file"],
  ["a position line that is broken", `{"effectonce":{"n":0}}\n`, "file:out.jsonl"],
  ["a folder", null, "file:out.jsonl", /directory|folder|regular file/],
];

Deno.test("an output file that is not ours is refused, untouched, and nothing is lost", async (t) => {
  await using at = await box();
  await at.enqueue({ id: "1", value: 1 });
  for (const [what, content, ...says] of FOREIGN) {
    await t.step(what, async () => {
      const path = at.path("out.jsonl");
      if (content === null) await Deno.mkdir(path);
      else await Deno.writeTextFile(path, content);
      const ran = await at.run(drainTo("file:out.jsonl"));
      assertEquals(ran.code, 1);
      assertSentence(ran.stderr);
      assertSays(ran.stderr, says);
      if (content !== null) assertEquals(await Deno.readTextFile(path), content);
      assertEquals((await at.status()).outbox.pending, 1);
      await Deno.remove(path);
    });
  }
  await t.step("a folder that does not exist", async () => {
    const ran = await at.run(drainTo("file:nowhere/out.jsonl"));
    assertEquals(ran.code, 1);
    assertSentence(ran.stderr);
    assertSays(ran.stderr, ["file:nowhere/out.jsonl"]);
    assertEquals((await at.status()).outbox.pending, 1);
  });
  await t.step("a device", async () => {
    const ran = await at.run(drainTo("file:/dev/full"));
    assertEquals(ran.code, 1);
    assertSays(ran.stderr, ["file:/dev/full"]);
    assertEquals((await at.status()).outbox.pending, 1);
  });
  await t.step("the file of a relay of another name", async () => {
    assertEquals((await at.run(drainTo("file:out.jsonl"))).code, 0);
    await at.enqueue({ id: "2", value: 2 });
    const before = await Deno.readTextFile(at.path("out.jsonl"));
    const ran = await at.run(drainTo("file:out.jsonl", "--name", "second"));
    assertEquals(ran.code, 1);
    assertSentence(ran.stderr);
    assertSays(ran.stderr, ["file:out.jsonl", `"default"`, `"second"`]);
    assertEquals(await Deno.readTextFile(at.path("out.jsonl")), before);
    assertEquals((await at.status()).outbox.pending, 1);
  });
  await t.step("a file of ours that was removed", async () => {
    await Deno.rename(at.path("out.jsonl"), at.path("away.jsonl"));
    const ran = await at.run(drainTo("file:out.jsonl"));
    assertEquals(ran.code, 1);
    assertSentence(ran.stderr);
    assertSays(ran.stderr, ["file:out.jsonl", "Put it back"]);
    assertEquals((await at.status()).outbox.pending, 1);
    await Deno.rename(at.path("away.jsonl"), at.path("out.jsonl"));
    assertEquals((await at.run(drainTo("file:out.jsonl"))).code, 0);
    assertEquals((await at.status()).outbox.pending, 0);
  });
});

Deno.test("stdout that is closed early: the relay ends with exit code 1, and what was not written is still there", async () => {
  await using at = await box();
  await at.enqueue(...Array.from({ length: 3000 }, (_, i) => ({ id: `${i}`, value: "x".repeat(200) })));
  const script =
    `"$0" run -A --quiet "$1" relay --from ${DB} --to stdout: --drain | head -n 1 >/dev/null; echo "\${PIPESTATUS[0]}"`;
  const args = ["-c", script, Deno.execPath(), new URL("../cli.ts", import.meta.url).pathname];
  const { stdout, stderr } = await new Deno.Command("bash", { args, cwd: at.folder }).output();
  const said = new TextDecoder().decode(stderr);
  assertNotEquals(new TextDecoder().decode(stdout).trim(), "0");
  assert(!said.includes("    at "), said);
  assert((await at.status()).outbox.pending > 0, "nothing is left");
});

Deno.test("the reader of relay's own lines goes away: the calls in hand are finished and recorded, none is left in doubt", async (t) => {
  for (const json of ["", "--json"]) {
    await t.step(json || "without --json", async () => {
      await using target = new Target();
      await using at = await box();
      // Refused ones, since each of these is a line.
      target.answer = () => new Response("why", { status: 400 });
      await at.enqueue(...Array.from({ length: 300 }, (_, i) => ({ id: `${i}`, value: i })));
      const relay = `"$0" run -A --quiet "$1" relay --from ${DB} --to ${target.url} --drain ${json}`;
      const script = `${relay} | head -n 1 >/dev/null; echo "\${PIPESTATUS[0]}"`;
      const args = ["-c", script, Deno.execPath(), new URL("../cli.ts", import.meta.url).pathname];
      const { stdout, stderr } = await new Deno.Command("bash", { args, cwd: at.folder }).output();
      const said = new TextDecoder().decode(stderr);
      assertNotEquals(new TextDecoder().decode(stdout).trim(), "0");
      assert(!said.includes("    at "), said);
      assertNothingLost(at, 300);
      const sent = new Set(target.keys());
      assertEquals(at.sql("select key from effectonce_effects where state = 'rejected'").length, sent.size);
    });
  }
});

Deno.test("nobody reads what a command prints, or the disk is full: no stack trace", async (t) => {
  await using at = await box();
  const cli = new URL("../cli.ts", import.meta.url).pathname;
  for (const command of ["help", "init --help", `status --store ${DB}`, `schema --store ${DB}`, "relay"]) {
    for (const end of ["| true", "> /dev/full", "2> /dev/full"]) {
      await t.step(`${command} ${end}`, async () => {
        const args = ["-c", `"$0" run -A --quiet "$1" ${command} ${end}`, Deno.execPath(), cli];
        const { stderr } = await new Deno.Command("bash", { args, cwd: at.folder, env: { NO_COLOR: "1" } }).output();
        const said = new TextDecoder().decode(stderr);
        for (const part of ["    at ", "Uncaught", "file:///"]) assert(!said.includes(part), said);
      });
    }
  }
});

Deno.test("an effect that is not known, or known in several scopes", async (t) => {
  await using target = new Target();
  await using at = await box();
  for (const name of ["first", "second"]) {
    // Delivered rows go, so an id can be used again; the claims of each relay stay.
    await at.enqueue({ id: "1", value: 1 });
    assertEquals((await at.run(drainTo(target.url, "--name", name))).code, 0);
  }
  const commands = [["show"], ["retry"], ["discard"], ["resolve", "--as", "done"]];
  for (const [command, ...more] of commands) {
    await t.step(`effects ${command}`, async () => {
      assertFailure(await at.run(["effects", command!, "nope", "--store", DB, ...more]), DB, `"nope"`);
      const elsewhere = await at.run(["effects", command!, "1", "--store", DB, "--scope", "third", ...more]);
      assertUsage(elsewhere, "--scope", `"1" is not in scope "third", but in "first" and "second"`);
      assertFailure(await at.run(["effects", command!, "nope", "--store", DB, "--scope", "third", ...more]), DB, `"nope"`);
      const ran = await at.run(["effects", command!, "1", "--store", DB, ...more]);
      assertUsage(ran, `"1"`, "--scope", "first", "second");
    });
  }
  assertEquals((await at.json(["effects", "show", "1", "--store", DB, "--scope", "second"]) as Listed).scope, "second");
  await t.step("a message that waits for an earlier one of its key is not unknown", async () => {
    target.answer = () => new Response("no", { status: 500 });
    await at.enqueue({ id: "a", key: "k", value: 1 }, { id: "b", key: "k", value: 2 });
    assertEquals((await at.run(drainTo(target.url, "--name", "first"))).code, 1);
    const ran = await at.run(["effects", "show", "b", "--store", DB]);
    assertSays(ran.stdout + ran.stderr, [/outbox|pending|waits|held back/]);
  });
});

Deno.test("effects list that is cut by --limit says so on stderr", async (t) => {
  await using target = new Target();
  await using at = await box();
  target.answer = ({ key }) => new Response("why", { status: key === "0" ? 200 : 400 });
  await at.enqueue(...Array.from({ length: 4 }, (_, i) => ({ id: `${i}`, value: i })));
  await at.run(drainTo(target.url, "--lanes", "1"));
  const cases: [more: string[], limit: number, shown: number][] = [
    [[], 2, 2],
    [[], 4, 4],
    [["--state", "rejected"], 2, 2],
    [["--state", "rejected"], 3, 3],
    [["--state", "parked"], 1, 1],
    [["--state", "parked"], 3, 3],
  ];
  const all = { "": 4, "--state rejected": 3, "--state parked": 3 };
  for (const [more, limit, shown] of cases) {
    await t.step(`${more.join(" ")} --limit ${limit}`, async () => {
      const cut = shown < all[more.join(" ") as keyof typeof all];
      for (const json of [[], ["--json"]]) {
        const ran = await at.run(["effects", "list", "--store", DB, ...more, "--limit", `${limit}`, ...json]);
        assertEquals(ran.code, 0);
        assertEquals(ran.stderr, cut ? `only the first ${limit} are shown: --limit N shows more\n` : "");
        const rows = json.length ? JSON.parse(ran.stdout) : ran.stdout.trimEnd().split("\n");
        assertEquals(rows.length, shown);
      }
    });
  }
  await t.step("what is not known of a parked message is left out", async () => {
    const text = await at.ok(["effects", "list", "--store", DB, "--state", "parked"]);
    assertMatch(text.split("\n")[0]!, /^parked {2}1 {2}\d{4}-\S+Z {2}POST http:\S+ answered 400: why$/);
  });
});

// ---------------------------------------------------------------------------------------------------------- help, schema

Deno.test("help lists every command; --help of each has all its flags and an example that works", async (t) => {
  await using target = new Target();
  const shop = new Box(await Deno.makeTempDir({ prefix: "effectonce-cli-" }));
  await using at = shop;
  const help = await at.ok(["help"]);
  for (const same of ["--help", "-h"]) assertEquals(await at.ok([same]), help);
  const names = Array.from(help.matchAll(/^ {2}((?:effects |relays )?[a-z]+) {2,}\S/gm), ([, name]) => name!);
  const issue = ["init", "enqueue", "relay", "status", "effects list", "effects show", "effects retry", "effects resolve"];
  assertEquals(names, [...issue, "effects discard", "relays", "relays forget", "prune", "schema", "doctor", "demo"]);
  assertSays(help, [/Exit codes: 0 .*1 .*2 /]);
  target.answer = () => new Response("why", { status: 500 });
  for (const name of names) {
    await t.step(`${name} --help`, async () => {
      const text = await at.ok([...name.split(" "), "--help"]);
      assertEquals(await at.ok([...name.split(" "), "-h"]), text);
      assertEquals(await at.ok([...name.split(" "), "--frobnicate", "--help"]), text, "help comes before any complaint");
      assertMatch(
        text,
        /^[^\n]+: [^\n]+\n\n([A-Z]+ is [^\n]+\.\n\n)?( {2}--[^\n]+\n)+\nExample:\n {2}deno run -A cli\.ts [^\n]+\n$/,
      );
      if (/^effects (?!list)/.test(name)) assertSays(text, ["KEY is the message's id"]);
      assert(text.split("\n").every((line) => line.length <= 120), "a line is too long for a terminal");
      const example = /cli\.ts ([^\n]+)/.exec(text)![1]!;
      if (name === "demo") return;
      if (name === "effects show") {
        // The order of the commands is a story: in doubt, looked at, resolved; each has an effect to work on.
        for (const id of ["order-1"]) await at.ok(["enqueue", "--store", DB, "--topic", "t", "--value", "1", "--id", id]);
      }
      if (name === "effects show") await at.run(drainTo(target.url));
      if (name === "effects retry") {
        at.sql("update effectonce_effects set state = 'rejected', first_ms = null where key = 'order-1'");
      }
      if (name === "effects resolve") {
        at.sql("update effectonce_effects set state = 'uncertain', first_ms = 1 where key = 'order-1'");
      }
      if (name === "effects discard") {
        at.sql("delete from effectonce_effects", "delete from effectonce_outbox");
        await at.ok(["enqueue", "--store", DB, "--topic", "t", "--value", "1", "--id", "order-1"]);
        await at.run(drainTo(target.url));
      }
      // As a shell would read it.
      const args = Array.from(example.matchAll(/'([^']*)'|(\S+)/g), ([, quoted, plain]) => quoted ?? plain!);
      const line = args.map((arg) => arg.startsWith("http://127.0.0.1:8080/") ? target.url : arg);
      const ran = await at.run(name === "relay" ? [...line, "--drain", ...QUICK, "--attempts", "1"] : line);
      assertEquals(ran.stderr, "");
      assertEquals(ran.code, name === "relay" ? 1 : 0);
    });
  }
  await t.step(
    "effects --help",
    async () => assertSays(await at.ok(["effects", "--help"]), ["list", "show", "retry", "resolve", "discard"]),
  );
  await t.step("help relay", async () => assertEquals(await at.ok(["help", "relay"]), await at.ok(["relay", "--help"])));
  await t.step("required flags can be told from the others", async () => {
    assertMatch(await at.ok(["relay", "--help"]), /--to URL .*(required|needed)|needs|usage: .*--from/i);
    assertMatch(await at.ok(["enqueue", "--help"]), /--topic TEXT .*\(required unless --jsonl\)/);
  });
});

Deno.test("no arguments: exit code 2, and the commands on stderr", async () => {
  await using at = await box();
  const { code, stdout, stderr } = await at.run([]);
  assertEquals([code, stdout, stderr], [2, "", await at.ok(["help"])]);
});

Deno.test("--version says the version of the package", async () => {
  await using at = await box();
  const { version } = JSON.parse(await Deno.readTextFile(new URL("../deno.json", import.meta.url)));
  assertEquals(await at.ok(["--version"]), `effectonce ${version}\n`);
  // Without a permission too.
  assertEquals(await at.ok(["--version"], { deno: ["--no-prompt"] }), `effectonce ${version}\n`);
});

Deno.test("schema prints SQL that makes what init makes, and every command takes it", async () => {
  await using target = new Target();
  await using at = await box();
  const schema = await at.ok(["schema", "--store", "sqlite:"]);
  assertEquals(await at.ok(["schema", "--store", "sqlite:app.db"]), schema);
  const { DatabaseSync } = await import("node:sqlite");
  const own = new DatabaseSync(at.path("own.db"));
  own.exec(schema);
  own.close();
  const objects = `select type, name, tbl_name, sql from sqlite_master where name not like 'sqlite_%' order by type, name`;
  assertEquals(sqlOn(at.path("own.db"), objects), at.sql(objects));
  const url = "sqlite:own.db";
  await at.ok(["enqueue", "--store", url, "--topic", "t", "--value", "1", "--id", "1"]);
  target.answer = () => new Response("why", { status: 400 });
  assertEquals((await at.run(["relay", "--from", url, "--to", target.url, "--drain"])).code, 1);
  for (
    const args of [["status"], ["effects", "list"], ["effects", "show", "1"], ["effects", "retry", "1"], ["prune"], ["init"]]
  ) {
    await at.ok([...args, "--store", url]);
  }
  assertEquals(
    (await at.run(["relay", "--from", url, "--to", "file:out.jsonl", "--drain"])).code,
    1,
    "the claimed relay goes first",
  );
  target.answer = () => new Response("paid");
  assertEquals((await at.run(["relay", "--from", url, "--to", target.url, "--drain"])).code, 0);
  await at.ok(["enqueue", "--store", url, "--topic", "t", "--value", "1", "--id", "2"]);
  assertEquals((await at.run(["relay", "--from", url, "--to", "file:out.jsonl", "--drain"])).code, 0);
  await at.ok(["doctor", "--from", url, "--to", "stdout:"]);
});

Deno.test("init twice changes nothing, also by two at once", async () => {
  await using at = await box();
  const before = at.content();
  await at.ok(["init", "--store", DB]);
  await at.ok(["init", "--store", `${DB}?driver=node`]);
  assertEquals(at.content(), before);
  const both = await Promise.all(
    ["", "?driver=node"].map((driver) => at.run(["init", "--store", `sqlite:fresh.db${driver}`])),
  );
  assertEquals(both.map(({ code, stderr }) => [code, stderr]), [[0, ""], [0, ""]]);
});

// ------------------------------------------------------------------------------------------------------------ both drivers

Deno.test("driver=node does the same as the default driver, on the same file, step by step", async () => {
  const transcript = async (driverOf: (step: number) => string): Promise<string> => {
    await using target = new Target();
    await using at = await box();
    // What is sent anew comes under another key.
    target.answer = ({ key }) => new Response("why", { status: { "2": 500, "3": 422, "4": 500 }[key] ?? 200 });
    const lines: string[][] = [];
    const run = (...args: string[]) => {
      const url = `sqlite:own.db${driverOf(lines.length)}`;
      lines.push(args.map((arg) => arg === "DB" ? url : arg === "TARGET" ? target.url : arg));
    };
    run("init", "--store", "DB");
    for (const id of ["1", "2", "3", "4", "5"]) {
      run(
        "enqueue",
        "--store",
        "DB",
        "--topic",
        "t",
        "--value",
        `{"n":${id}}`,
        "--id",
        id,
        "--header",
        "h=ü",
        "--key",
        `k${id}`,
      );
    }
    run("enqueue", "--store", "DB", "--topic", "t", "--value", "1", "--id", "5");
    run("enqueue", "--store", "DB", "--topic", "t", "--tombstone", "--id", "6");
    run("status", "--store", "DB", "--json");
    run("relay", "--from", "DB", "--to", "TARGET", "--drain", "--lanes", "1", "--keep");
    run("status", "--store", "DB");
    run("effects", "list", "--store", "DB", "--json");
    run("effects", "list", "--store", "DB", "--state", "parked");
    run("effects", "show", "2", "--store", "DB", "--json");
    run("effects", "show", "3", "--store", "DB");
    run("effects", "show", "nope", "--store", "DB");
    run("effects", "retry", "2", "--store", "DB");
    run("effects", "resolve", "2", "--store", "DB", "--as", "done", "--result", '{"id":"ü"}');
    run("effects", "show", "2", "--store", "DB", "--json");
    run("effects", "retry", "3", "--store", "DB");
    run("effects", "discard", "4", "--store", "DB");
    run("relay", "--from", "DB", "--to", "TARGET", "--drain", "--lanes", "1", "--keep");
    run("status", "--store", "DB", "--json");
    run("prune", "--store", "DB", "--older-than-ms", "0");
    run("enqueue", "--store", "DB", "--topic", "t", "--value", "é", "--id", "7");
    run("relay", "--from", "DB", "--to", "file:out.jsonl", "--drain");
    run("doctor", "--from", "DB", "--to", "file:out.jsonl", "--json");
    const ended = await at.many(lines);
    const said: unknown[] = lines.map((line, i) => [line.map((arg) => arg.replace(/\?driver=.*/, "")), ended[i]]);
    said.push(
      target.asked.map(({ key, body, headers }) => [key, body, headers.get("h")]),
      await Deno.readTextFile(at.path("out.jsonl")),
    );
    return JSON.stringify(said, null, 1).replaceAll(target.url, "TARGET")
      .replaceAll(/\d{4}-\d\d-\d\dT[\d:.]+Z/g, "INSTANT").replaceAll(/\d+ m?s\b/g, "AGE").replaceAll(
        /(oldestMs\\":)\d+/g,
        "$1AGE",
      )
      .replaceAll(/'?(sqlite:own\.db)\?driver=[\w-]+'?/g, "$1")
      .replaceAll(/[0-9a-f]{8}-[0-9a-f-]{27}/g, "UUID").replaceAll(/[0-9a-f]{64}/g, "HASH");
  };
  const usual = await transcript(() => "");
  assertEquals(await transcript(() => "?driver=node"), usual);
  assertEquals(await transcript((step) => step % 2 === 0 ? "?driver=node" : "?driver=better-sqlite3"), usual);
});
