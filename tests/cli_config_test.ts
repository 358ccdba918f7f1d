/** Where a command's values come from: flags, the environment, a file; and what is shown of them. */
import { assert, assertEquals, assertMatch } from "@std/assert";
import { createMessage } from "../mod.ts";
import { Flags } from "../cli/flags.ts";
import { openSink } from "../cli/open.ts";
import { RELAY_FLAGS } from "../cli/relay_flags.ts";
import { configSchema, schemaText } from "../cli/schema.ts";
import { maskedUrl } from "../cli/mask.ts";
import { parseJson } from "../cli/json.ts";
import {
  assertFailure,
  assertSays,
  assertUsage,
  type Box,
  box,
  DB,
  drainTo,
  type Ended,
  eventsOf,
  has,
  type Line,
  NO_EFFECTS,
  relayTo,
  Target,
  until,
} from "./cli_run.ts";

const FILE = "effectonce.json";
const CONFIG = ["--config", FILE];

async function configure(at: Box, content: unknown): Promise<void> {
  await Deno.writeTextFile(at.path(FILE), typeof content === "string" ? content : JSON.stringify(content, null, 2));
}

/** What `--print-config` prints: at the top, and of one relay. */
interface Printed {
  readonly value: unknown;
  readonly source: string;
}
type PrintedRelay = Readonly<Record<string, Printed>>;
interface PrintedConfig {
  readonly relays: Readonly<Record<string, PrintedRelay>>;
}
const printed = ({ code, stdout, stderr }: Ended): PrintedConfig => {
  assertEquals([code, stderr], [0, ""]);
  return JSON.parse(stdout);
};

// ------------------------------------------------------------------------------------------------------- the environment

/** Each command with its flags, as its help has them. */
async function allFlags(at: Box): Promise<readonly (readonly [command: string, flag: string, help: string])[]> {
  const names = Array.from(
    (await at.ok(["help"])).matchAll(/^ {2}((?:effects |relays )?[a-z]+) {2,}\S/gm),
    ([, name]) => name!,
  );
  const helps = await at.many(names.map((name) => [...name.split(" "), "--help"]));
  return names.flatMap((name, i) =>
    Array.from(helps[i]!.stdout.matchAll(/^ {2}--(\S+)(.*)$/gm), ([, flag, help]) => [name, flag!, help!] as const)
  );
}
const variableOf = (flag: string) => `EFFECTONCE_${flag.toUpperCase().replaceAll("-", "_")}`;

Deno.test("every flag of every command is read from its variable, and a bad one is named", async (t) => {
  await using at = await box();
  const required: Record<string, string> = { store: DB, from: DB, to: "http://127.0.0.1:1/", as: "done" };
  /** A value that is wrong for a flag of its kind; undefined where any text will do. */
  const wrong = (help: string): string | undefined => {
    if (help.startsWith(" N ")) return "many";
    if (/^ (POST\|PUT|block\|skip|done\|absent|claimed\|)/.test(help)) return "other";
    if (help.startsWith(" A,B")) return "a,,b";
    if (help.startsWith(" NAME=VALUE")) return "nothing";
    return help.startsWith("  ") ? "perhaps" : undefined;
  };
  const flags = await allFlags(at);
  assert(flags.length > 80, `${flags.length} flags`);
  const lines = flags.map(([command, flag, help]): Line & { flag: string; bad: boolean } => {
    const bad = wrong(help);
    const others = flags.filter(([other, name]) => other === command && name !== flag && name in required);
    const words = /show|retry|resolve|discard|forget/.test(command) ? ["k"] : [];
    if (command === "enqueue" && flag === "store") words.push("--topic=t", "--value=v"); // These are looked at first.
    return {
      args: [...command.split(" "), ...words, ...others.flatMap(([, name]) => [`--${name}`, required[name]!])],
      // A text shows that it was read by what is said of it: no flag takes a name of this length, and no URL looks so.
      env: { [variableOf(flag)]: bad ?? "x".repeat(1025) },
      flag,
      bad: bad !== undefined,
    };
  });
  const silent = ["value", "scope", "listen", "result", "handler", "effect-key"]; // Texts of any kind, or looked at later.
  const told = lines.filter(({ flag, bad }) => bad || !silent.includes(flag));
  const ended = await at.many(told);
  for (const [i, { args, flag }] of told.entries()) {
    await t.step(`${args[0]} ${flag}`, () => assertUsage(ended[i]!, variableOf(flag)));
  }
});

Deno.test("the environment instead of flags: switches, numbers, lists by line, texts; empty is not given; flags come first", async (t) => {
  await using target = new Target();
  await using at = await box();
  await t.step("a relay without a flag", async () => {
    await at.enqueue({ id: "1", value: 1 });
    const env = {
      EFFECTONCE_FROM: DB,
      EFFECTONCE_TO: target.url,
      EFFECTONCE_DRAIN: "1",
      EFFECTONCE_JSON: "true",
      EFFECTONCE_NAME: "billing",
      EFFECTONCE_HEADER_TO: "X-One=1\nX-Two=a=b\n",
      EFFECTONCE_TOPICS: "orders, other",
      EFFECTONCE_METHOD: "",
      EFFECTONCE_KEEP: "false",
    };
    const ran = await at.run(["relay"], { env });
    assertEquals([ran.code, ran.stderr], [0, ""]);
    assertEquals(eventsOf(ran)[0]!.relay, "billing");
    const { method, headers } = target.asked[0]!;
    assertEquals([method, headers.get("x-one"), headers.get("x-two")], ["POST", "1", "a=b"]);
    const [off] = [await at.run(["relay"], { env: { ...env, EFFECTONCE_JSON: "0" } })];
    assertSays(off.stdout, [/^relay "billing": /]);
  });
  await t.step("enqueue and status", async () => {
    const env = { EFFECTONCE_STORE: DB, EFFECTONCE_TOPIC: "t", EFFECTONCE_VALUE: "v", EFFECTONCE_HEADER: "a=1\r\nb=2" };
    await at.ok(["enqueue", "--id", "e"], { env });
    const [row] = at.sql(`select topic, cast(value as text) as value, headers from effectonce_outbox where id = 'e'`);
    assertEquals(row, { topic: "t", value: "v", headers: '{"a":"1","b":"2"}' });
    assertEquals(JSON.parse(await at.ok(["status", "--json"], { env })).outbox.pending, 1);
  });
  await t.step("a flag outranks a variable, and a list is replaced as a whole", async () => {
    const env = { EFFECTONCE_LANES: "3", EFFECTONCE_HEADER_TO: "A=1\nB=2", EFFECTONCE_TO: "ftp://nowhere" };
    const line = relayTo(target.url, "--lanes", "2", "--header-to", "C=3", "--print-config");
    const { relays } = printed(await at.run(line, { env }));
    assertEquals(relays.default!.lanes, { value: 2, source: "flag" });
    assertEquals(relays.default!.headerTo, { value: { C: "***" }, source: "flag" });
  });
});

Deno.test("a variable that does not concern a relay's kind of target is ignored for it; a flag and the file are not", async (t) => {
  await using target = new Target();
  await using at = await box();
  const env = {
    EFFECTONCE_TIMEOUT_MS: "5000",
    EFFECTONCE_IDEMPOTENT: "1",
    EFFECTONCE_DEDUPE_WINDOW_MS: "60000",
    EFFECTONCE_HEADER_TO: "X-One=1",
    EFFECTONCE_METHOD: "PUT",
    EFFECTONCE_RECONCILE: `${target.url}/{id}`,
  };
  await t.step("relays of both kinds in one process", async () => {
    await configure(at, {
      relays: {
        billing: { from: DB, to: target.url, topics: ["a"] },
        archive: { from: DB, to: "file:out.jsonl", topics: ["b"] },
      },
    });
    await at.enqueue({ id: "1", topic: "a", value: 1 }, { id: "2", topic: "b", value: 2 });
    const ran = await at.run(["relay", ...CONFIG, "--drain"], { env });
    assertEquals([ran.code, ran.stderr], [0, ""]);
    assertEquals(target.asked.map(({ method, headers }) => [method, headers.get("x-one")]), [["PUT", "1"]]);
    assertSays(ran.stdout, ["billing: effectively-once", "archive: exactly-once"]);
  });
  await t.step("stdout: without claims", async () => {
    const ran = await at.run(drainTo("stdout:", "--allow-duplicates"), { env });
    assertEquals([ran.code, ran.stdout], [0, ""], ran.stderr);
  });
  await t.step("what is wrong in itself is said all the same", async () => {
    assertUsage(await at.run(drainTo("stdout:"), { env: { EFFECTONCE_TIMEOUT_MS: "soon" } }), "EFFECTONCE_TIMEOUT_MS");
  });
  await t.step("a flag, beside a variable", async () => {
    const ran = await at.run(drainTo("file:out.jsonl", "--timeout-ms", "5"), { env });
    assertUsage(ran, "--timeout-ms", "not for file:");
  });
  await t.step("the file", async () => {
    await configure(at, { relays: { archive: { from: DB, to: "file:out.jsonl", timeoutMs: 5 } } });
    assertUsage(await at.run(["relay", ...CONFIG, "--drain"]), "relays.archive.timeoutMs", "not for file:");
  });
  await t.step("claims and none of them exclude each other as before", async () => {
    const line = drainTo(target.url, "--allow-duplicates");
    assertUsage(await at.run(line, { env: { EFFECTONCE_IDEMPOTENT: "1" } }), "--allow-duplicates", "EFFECTONCE_IDEMPOTENT");
    assertUsage(await at.run([...line, "--store", DB]), "--allow-duplicates", "--store");
  });
});

// -------------------------------------------------------------------------------------------------------------- the file

Deno.test("relay --config runs all relays of the file in one process; --name picks one; each says who it is", async (t) => {
  await using target = new Target();
  await using at = await box();
  const relays = {
    billing: {
      from: DB,
      to: target.url,
      topics: ["payments"],
      idempotent: true,
      headerTo: { "X-From": "file" },
      leaseMs: 5000,
    },
    archive: { from: `${DB}?driver=node`, to: "file:out.jsonl", topics: ["orders"] },
    first: { from: DB, to: "stdout:", topics: ["a"] },
    second: { from: DB, to: "stdout:", topics: ["b"] },
  };
  await configure(at, { $schema: "./effectonce.schema.json", relays });
  const fill = (n: number) =>
    at.enqueue(
      ...["payments", "orders", "a", "b"].flatMap((topic) =>
        Array.from({ length: 20 }, (_, i) => ({ id: `${topic}-${n}-${i}`, topic, value: "x".repeat(5000) }))
      ),
    );
  await fill(1);
  await t.step("people", async () => {
    const { code, stdout, stderr } = await at.run(["relay", ...CONFIG, "--drain"]);
    assertEquals(code, 0, stderr);
    const lines = stdout.trimEnd().split("\n").map((line) => JSON.parse(line).topic);
    assertEquals(lines.toSorted(), ["a", "b"].flatMap((topic) => Array(20).fill(topic)), "lines of two sinks are whole");
    for (const line of stderr.trimEnd().split("\n")) assertMatch(line, /^(billing|archive|first|second): /);
    assertSays(stderr, [
      `archive: ${DB} -> file:out.jsonl\n`,
      "archive: exactly-once (sealed), because",
      "billing: stopped: 20 delivered",
    ]);
    assertEquals([target.asked.length, target.asked[0]!.headers.get("x-from")], [20, "file"]);
    assertEquals((await at.status()).outbox.pending, 0);
    const scopes = at.sql("select scope, count(*) as n from effectonce_effects group by scope");
    assertEquals(scopes, [{ scope: "billing", n: 20 }]);
  });
  await fill(2);
  await t.step("--name and JSON: only that one, and a flag outranks the file", async () => {
    const ran = await at.run(["relay", ...CONFIG, "--drain", "--name", "billing", "--json", "--header-to", "X-From=flag"]);
    assertEquals([ran.code, ran.stderr], [0, ""]);
    assertEquals(new Set(eventsOf(ran).map(({ relay }) => relay)), new Set(["billing"]));
    assertEquals(target.asked.at(-1)!.headers.get("x-from"), "flag");
    assertEquals((await at.status()).outbox.pending, 60);
  });
  await t.step("several, until a signal", async () => {
    const running = at.start(["relay", ...CONFIG, "--json"]);
    let seen = 0;
    await running.until(() => ++seen === 40);
    await until(async () => (await at.status()).outbox.pending === 0);
    const { code, stderr } = await running.stop("SIGTERM");
    const events = stderr.trimEnd().split("\n").map((line) => JSON.parse(line));
    assertEquals(code, 0);
    assertEquals(
      events.filter(({ type }) => type === "stopped").map(({ relay }) => relay).toSorted(),
      Object.keys(relays).toSorted(),
    );
  });
});

Deno.test("lines of several sinks into stdout stay whole where a write takes only a part, and after one that failed", async () => {
  const sinkOf = () => {
    const flags = new Flags(RELAY_FLAGS, [], new Map([["to", { value: "stdout:", source: "flag", label: "--to" }]]));
    const sink = openSink(flags);
    assert(sink.kind === "call");
    return (id: string) => {
      const message = createMessage({ id, topic: "t", key: null, value: null, headers: {}, time: new Date(0) });
      return sink.deliver(message, { idempotencyKey: id, number: 1, signal: new AbortController().signal });
    };
  };
  const write = Deno.stdout.write;
  let written = "";
  let fails = true;
  try {
    Deno.stdout.write = (bytes) => {
      if (fails) return Promise.reject(new Error("no space left"));
      written += new TextDecoder().decode(bytes.subarray(0, 5));
      return Promise.resolve(Math.min(bytes.length, 5));
    };
    const [one, other] = [sinkOf(), sinkOf()];
    assertEquals(await one("a").then(() => "written", (error) => error.message), "no space left");
    fails = false;
    await Promise.all([one("b"), other("c"), one("d"), other("e")]);
  } finally {
    Deno.stdout.write = write;
  }
  assertEquals(written.trimEnd().split("\n").map((line) => JSON.parse(line).id).toSorted(), ["b", "c", "d", "e"]);
});

Deno.test("with --drain, what one of the relays parked makes the exit code 1", async () => {
  await using target = new Target();
  await using at = await box();
  target.answer = ({ key }) => new Response("why", { status: key === "bad" ? 400 : 200 });
  await configure(at, {
    drain: true,
    relays: {
      a: { from: DB, to: target.url, topics: ["a"] },
      b: { from: DB, to: target.url, topics: ["b"] },
    },
  });
  await at.enqueue({ id: "good", topic: "a", value: 1 }, { id: "bad", topic: "b", value: 1 });
  const ran = await at.run(["relay", ...CONFIG]);
  assertEquals(ran.code, 1);
  assertSays(ran.stdout, ["a: stopped: 1 delivered, 0 parked", "b: parked: bad", "b: see why", "docs/operations.md#parked"]);
  assertEquals(target.keys().toSorted(), ["bad", "good"]);
});

Deno.test("one relay fails: the others finish the calls in hand and stop, and the sentence says which one it was", async () => {
  await using target = new Target();
  await using at = await box();
  await configure(at, {
    relays: {
      billing: { from: DB, to: target.url, topics: ["payments"], lanes: 1 },
      archive: { from: DB, to: "file:out.jsonl", topics: ["orders"] },
    },
  });
  const release = Promise.withResolvers<void>();
  target.answer = async () => {
    await release.promise;
    return new Response("paid");
  };
  await at.enqueue({ id: "o1", topic: "orders", value: 1 });
  const running = at.start(["relay", ...CONFIG, "--json"]);
  await running.event("delivered");
  await at.enqueue({ id: "p1", topic: "payments", value: 1 }, { id: "p2", topic: "payments", value: 2 });
  await until(() => target.keys().length === 1);
  // Somebody takes the file away, which a relay does not put up with.
  await Deno.rename(at.path("out.jsonl"), at.path("away.jsonl"));
  await at.enqueue({ id: "o2", topic: "orders", value: 2 });
  await running.until((line) => JSON.parse(line).type === "stopped" && JSON.parse(line).relay === "archive");
  release.resolve();
  const { code, stderr } = await running.ended();
  assertFailure({ code, stdout: "", stderr }, `relay "archive"`, "file:out.jsonl", "See docs/operations.md#sink_invalid");
  assertEquals(target.keys(), ["p1"]);
  assertEquals((await at.status()).effects, { ...NO_EFFECTS, done: 1 });
  assertEquals(at.sql("select id from effectonce_outbox order by seq").map(({ id }) => id), ["p2", "o2"]);
});

Deno.test("several relays fail at once: a sentence for each", async () => {
  await using at = await box();
  for (const name of ["a", "b"]) await Deno.writeTextFile(at.path(`${name}.txt`), "mine\n");
  const relays = Object.fromEntries(["a", "b"].map((name) => [name, { from: DB, to: `file:${name}.txt`, topics: [name] }]));
  await configure(at, { relays });
  const { code, stderr } = await at.run(["relay", ...CONFIG]);
  assertEquals(code, 1);
  for (const [i, part] of stderr.split(/(?<=sink_invalid\n)/).entries()) {
    assertFailure({ code, stdout: "", stderr: part }, `relay "${"ab"[i]}"`, `file:${"ab"[i]}.txt`);
  }
});

Deno.test("flag, then environment, then file, then default: --print-config shows each value and its source, and runs nothing", async () => {
  await using target = new Target();
  await using at = await box();
  await at.enqueue({ id: "1", value: 1 });
  const before = at.content();
  const hush = target.url.replace("//", "//user:hush-1@") + "?api_key=hush-2&v=hush-3#hush-4";
  await configure(at, {
    listen: "127.0.0.1:0",
    relays: {
      billing: {
        from: DB,
        to: hush,
        reconcile: `${hush.split("?")[0]}/{id}?key=hush-5`,
        headerTo: { Authorization: "env:PAYMENT_TOKEN", "X-Key": "hush-6" },
        lanes: 5,
        batch: 6,
        leaseMs: 7000,
        onPark: "skip",
        topics: ["a", "b"],
        keep: true,
      },
      mail: { from: "env:MAIL_DB", to: "env:MAIL_URL" },
    },
  });
  const env = {
    EFFECTONCE_BATCH: "60",
    EFFECTONCE_LEASE_MS: "70000",
    EFFECTONCE_KEEP: "0",
    PAYMENT_TOKEN: "hush-7",
    MAIL_URL: "hush-8",
  };
  const ran = await at.run(["relay", ...CONFIG, "--print-config", "--lease-ms", "700000", "--drain"], { env });
  assert(!/hush/.test(ran.stdout), ran.stdout);
  const { relays, ...top } = printed(ran);
  assertEquals(top, {
    drain: { value: true, source: "flag" },
    listen: { value: "127.0.0.1:0", source: "file" },
    json: { value: false, source: "default" },
  });
  const billing = relays.billing!;
  const members = Object.entries(RELAY_FLAGS).filter(([, { file = "relay" }]) => file === "relay").map(([name]) =>
    name.replace(/-(.)/g, (_, letter) => letter.toUpperCase())
  );
  assertEquals(Object.keys(billing), members, "each flag, in the form of the file");
  const expected: PrintedRelay = {
    from: { value: DB, source: "file" },
    to: { value: `${target.url.replace("//", "//***@")}?api_key=***&v=***#***`, source: "file" },
    reconcile: { value: `${target.url.replace("//", "//***@")}/{id}?key=***`, source: "file" },
    headerTo: { value: { Authorization: "env:PAYMENT_TOKEN", "X-Key": "***" }, source: "file" },
    lanes: { value: 5, source: "file" },
    batch: { value: 60, source: "environment" },
    leaseMs: { value: 700_000, source: "flag" },
    onPark: { value: "skip", source: "file" },
    topics: { value: ["a", "b"], source: "file" },
    keep: { value: false, source: "environment" },
    attempts: { value: 10, source: "default" },
    store: { value: null, source: "default" },
    idempotent: { value: false, source: "default" },
    readyMs: { value: 30_000, source: "default" },
  };
  for (const [name, shown] of Object.entries(expected)) assertEquals([name, billing[name]], [name, shown]);
  assertEquals([relays.mail!.from!.value, relays.mail!.to!.value], ["env:MAIL_DB", "env:MAIL_URL"]);
  assertEquals([relays.mail!.batch, relays.mail!.lanes], [{ value: 60, source: "environment" }, {
    value: 8,
    source: "default",
  }]);

  const own = await at.run(relayTo("http://h/?k=hush", "--print-config", "--json"));
  assertMatch(own.stdout, /^\{[^\n]*"relays":\{"default":[^\n]*\n$/, "with --json one line");
  assert(!own.stdout.includes("hush"));
  assertEquals([target.asked, at.content()], [[], before], "nothing was sent or written");
});

Deno.test("what a URL shows", () => {
  for (
    const [url, shown] of [
      ["sqlite:app.db?driver=node", "sqlite:app.db?driver=node"],
      ["file:out.jsonl", "file:out.jsonl"],
      ["stdout:", "stdout:"],
      ["env:TARGET", "env:TARGET"],
      ["env:hush hush", "env:***"],
      ["https://pay.example/charge", "https://pay.example/charge"],
      ["https://u:hush@pay.example/a/{id}?x={id}&key=hush", "https://***@pay.example/a/{id}?x=***&key=***"],
      ["https://hush@pay.example", "https://***@pay.example"],
      ["https://u:hu/sh@pay.example/", "https:***"],
      ["https://u:hush@pay.example:99999/", "https:***"],
      ["https:u:hush@pay.example/", "https:***"],
      ["postgres://u:hush@db/x?password=hush", "postgres://***@db/x?password=***"],
      ["sqlite://u:hush@host/app.db", "sqlite://***@host/app.db"],
      ["user:hush@host", "user:***"],
      ["hush", "***"],
      ["//u:hush@host/", "***"],
    ] as const
  ) {
    assertEquals(maskedUrl(url), shown);
  }
});

/** A relay that could run. */
const GOOD = { from: DB, to: "stdout:" };
const one = (members: object) => ({ relays: { billing: { ...GOOD, ...members } } });
const PLACE = `${FILE}: relays.billing`;

/** What a person may write into the file; what the answer must say; whether the schema cannot see it. */
const FILES: readonly (readonly [content: unknown, ...says: (string | RegExp)[]])[] = [
  // Not JSON.
  ["", `${FILE}, line 1, column 1: `, "too early"],
  ['{\n  "relays": {\n    "a": {"from": hush}\n  }\n}', `${FILE}, line 3, column 19: `, "JSON"],
  ['{"relays": {"a": {}}', `${FILE}, line 1, column 21: `, "comma or }"],
  ['{"relays": {"a": {"topics": ["x" "hush"]}}}', `${FILE}, line 1, column 34: `, "comma or ]"],
  ['{"relays": {"a": {}},}', `${FILE}, line 1, column 22: `, "name of a member"],
  ['{"relays" {}}', `${FILE}, line 1, column 11: `, "colon"],
  ["{'relays': {}}", `${FILE}, line 1, column 2: `],
  ['{"relays": ,}', `${FILE}, line 1, column 12: `, "a value"],
  ['{"relays": {}} hush', `${FILE}, line 1, column 16: `, "end"],
  ['{"relays": {"a": {"to": "hush\n"}}}', `${FILE}, line 1, column 25: `, "JSON"],
  ['{"relays": {"a": {"lanes": 01}}}', `${FILE}, line 1, column 28: `, "JSON"],
  ['{"relays": {"a": {}, "a": {}}}', `${FILE}, line 1, column 22: `, `"a" is there twice`],
  ['{"relays": {"a": {"to": "hush", "to": "stdout:"}}}', `"to" is there twice`],
  // Not a file with relays.
  [[], FILE, "must be an object"],
  ["7", FILE, "must be an object"],
  [{}, `${FILE}: relays is missing`],
  [{ relays: [] }, `${FILE}: relays must be an object`],
  [{ relays: {} }, `${FILE}: relays must have at least one relay`],
  [{ relays: { a: "hush" } }, `${FILE}: relays.a must be an object`],
  [{ relays: { "": GOOD } }, `${FILE}: relays[""]`, "1 to 1024 bytes"],
  [{ $schema: 5, relays: { a: GOOD } }, `${FILE}: $schema must be a text`],
  [{ Relays: { a: GOOD } }, `${FILE}: Relays is not known`, "write relays"],
  [{ relays: { a: GOOD }, lanes: 5 }, `${FILE}: lanes is not known`],
  [{ relays: { a: GOOD }, listen: 9464 }, `${FILE}: listen must be a text`],
  // Members.
  [one({ hush: 1 }), `${PLACE}.hush is not known`],
  [one({ "lease-ms": 1 }), `${PLACE}.lease-ms is not known`, "write leaseMs"],
  [one({ leasems: 1 }), `${PLACE}.leasems is not known`, "write leaseMs"],
  [one({ name: "x" }), `${PLACE}.name is not known`],
  [one({ drain: true }), `${PLACE}.drain is not known`],
  [one({ __proto__x: 1 }), `${PLACE}.__proto__x is not known`],
  ['{"relays":{"billing":{"__proto__":{}}}}', `${PLACE}.__proto__ is not known`],
  [one({ leaseMs: "hush" }), `${PLACE}.leaseMs must be a whole number from 10 to 2147483647, not a text`],
  [one({ leaseMs: 9 }), `${PLACE}.leaseMs must be a whole number from 10`, "not 9"],
  [one({ leaseMs: 10.5 }), `${PLACE}.leaseMs must be a whole number`, "not 10.5"],
  [one({ leaseMs: 9007199254740991 }), `${PLACE}.leaseMs must be a whole number`],
  [one({ leaseMs: null }), `${PLACE}.leaseMs must be a whole number`, "not null"],
  [one({ idempotent: "true" }), `${PLACE}.idempotent must be true or false, not a text`],
  [one({ idempotent: 1 }), `${PLACE}.idempotent must be true or false, not 1`],
  [one({ topics: "a,b" }), `${PLACE}.topics must be a list of texts`],
  [one({ topics: [] }), `${PLACE}.topics must be a list of texts`],
  [one({ topics: ["a", ""] }), `${PLACE}.topics must be a list of texts`],
  [one({ topics: ["a", 5] }), `${PLACE}.topics must be a list of texts`],
  [one({ headerTo: ["X=hush"] }), `${PLACE}.headerTo must be an object of texts, not a list`],
  [one({ headerTo: { X: 5 } }), `${PLACE}.headerTo.X must be a text, not 5`],
  [one({ to: ["hush"] }), `${PLACE}.to must be a text, not a list`],
  [one({ to: null }), `${PLACE}.to must be a text, not null`],
  [one({ onPark: "wait" }), `${PLACE}.onPark must be block or skip, not "wait"`],
  [one({ method: "GET" }), `${PLACE}.method must be POST or PUT`],
];

/** Right in form, and wrong all the same. */
const WRONG: readonly (readonly [content: unknown, ...says: (string | RegExp)[]])[] = [
  [{ relays: { billing: { to: "stdout:" } } }, `${PLACE}.from is missing`],
  [{ relays: { billing: { from: DB } } }, `${PLACE}.to is missing`],
  [{ relays: { "a b": { from: DB } } }, `${FILE}: relays["a b"].to is missing`],
  [one({ to: "ftp://hush@h/" }), `${PLACE}.to: "ftp:"`],
  [one({ to: "hush" }), `${PLACE}.to is not a URL`],
  [one({ from: "sqlite:" }), `${PLACE}.from: "sqlite:" names no file`],
  [one({ from: "sqlite://u:hush@host/app.db" }), `${PLACE}.from: `, "names no file"],
  [one({ to: "file://u:hush@host/x" }), `${PLACE}.to: `, "names no file"],
  [one({ to: "stdout:hush" }), `${PLACE}.to: write stdout:`],
  [one({ store: "oracle://u:hush@host/db" }), `${PLACE}.store: "oracle:"`],
  [one({ idempotent: true }), `${PLACE}.idempotent is for http: and https: targets`],
  [one({ to: "http://h/", dedupeWindowMs: 5 }), `${PLACE}.dedupeWindowMs needs ${PLACE}.idempotent`],
  [one({ to: "http://h/", settleMs: 5 }), `${PLACE}.settleMs needs ${PLACE}.reconcile`],
  [one({ to: "http://h/", reconcile: "http://h/hush" }), `${PLACE}.reconcile: `],
  [one({ to: "http://h/", headerTo: { "a b": "hush" } }), `${PLACE}.headerTo: `, `"a b"`],
  [one({ to: "http://h/", headerTo: { a: "1", A: "hush" } }), `${PLACE}.headerTo has A twice`],
  [one({ minRetryMs: 500, maxRetryMs: 100 }), `${PLACE}.minRetryMs must be at most ${PLACE}.maxRetryMs, which is 100`],
  [one({ minRetryMs: 70000 }), `${PLACE}.minRetryMs must be at most ${PLACE}.maxRetryMs, which is 60000`],
  [one({ allowDuplicates: true, store: DB }), `${PLACE}.allowDuplicates`, `${PLACE}.store`],
  [one({ to: "env:NO_SUCH_VARIABLE_1" }), `${PLACE}.to: the environment has no variable NO_SUCH_VARIABLE_1`],
  [{ ...one({}), listen: "hush:x" }, `${FILE}: listen must be HOST:PORT`],
];

Deno.test("a wrong file: exit code 2, one sentence with the file and the place, and no secret", async (t) => {
  await using at = await box();
  const all = [...FILES, ...WRONG];
  const lines = await Promise.all(all.map(async ([content], i) => {
    await Deno.mkdir(at.path(`${i}`));
    await Deno.writeTextFile(at.path(`${i}/${FILE}`), typeof content === "string" ? content : JSON.stringify(content));
    return ["relay", "--config", `${i}/${FILE}`, "--drain"];
  }));
  const ended = await at.many(lines);
  for (const [i, [content, ...says]] of all.entries()) {
    await t.step(JSON.stringify(content).slice(0, 100), () => {
      const { code, stdout, stderr } = ended[i]!;
      assertUsage({ code, stdout, stderr: stderr.replaceAll(`${i}/${FILE}`, FILE) }, ...says);
      assert(!/hush(?! is not known)/.test(stderr), stderr);
    });
  }
  await t.step("no such file, and no such relay", async () => {
    assertFailure(await at.run(["relay", "--config", "none.json"]), "none.json", "does not exist");
    assertFailure(await at.run(["relay", "--config", "."]), "Cannot read .");
    await configure(at, { relays: { billing: GOOD, mail: GOOD } });
    assertUsage(await at.run(["relay", ...CONFIG, "--name", "bill"]), "--name", FILE, `"bill"`, `"billing" and "mail"`);
    const env = { EFFECTONCE_NAME: "bill" };
    assertUsage(await at.run(["doctor", ...CONFIG], { env }), "EFFECTONCE_NAME", FILE, `"bill"`);
  });
});

Deno.test("JSON is read as JSON.parse reads it", () => {
  const plain = (json: ReturnType<typeof parseJson>): unknown =>
    json instanceof Map
      ? Object.fromEntries(Array.from(json, ([name, value]) => [name, plain(value)]))
      : Array.isArray(json)
      ? json.map(plain)
      : json;
  const texts = [
    ' { "a" : [ 1 , -0.5e+3 , "\\u00e9\\n\\"\\\\" , null , true , false ] , "b" : { } , "" : [ ] } ',
    '"\u007f\u2028😀"',
    "\t\r\n-1E2",
    "[[[[1]]]]",
  ];
  for (const text of texts) assertEquals(plain(parseJson(text)), JSON.parse(text));
  assertEquals(parseJson("\ufeff1"), 1);
  const bad = [
    "tru",
    "TRUE",
    "+1",
    ".5",
    "1.",
    "0x1",
    "NaN",
    '"\\x"',
    '"\t"',
    "[1,]",
    "{,}",
    "[",
    "{",
    "1 2",
    "\u00a01",
    "/**/1",
    "'a'",
  ];
  for (const text of bad) {
    let message = "";
    try {
      parseJson(text);
    } catch (error) {
      message = (error as SyntaxError).message;
    }
    assertMatch(message, /^line 1, column \d+: /, text);
  }
});

// ------------------------------------------------------------------------------------------------------------ the schema

/** As much of JSON Schema as the schema uses. */
interface Schema {
  readonly type?: string;
  readonly enum?: readonly unknown[];
  readonly minimum?: number;
  readonly maximum?: number;
  readonly minLength?: number;
  readonly maxLength?: number;
  readonly minItems?: number;
  readonly minProperties?: number;
  readonly items?: Schema;
  readonly properties?: Readonly<Record<string, Schema>>;
  readonly propertyNames?: Schema;
  readonly additionalProperties?: Schema | false;
  readonly required?: readonly string[];
}

function fits(value: unknown, schema: Schema): boolean {
  const type = value === null ? "null" : Array.isArray(value) ? "array" : Number.isInteger(value) ? "integer" : typeof value;
  if (schema.type !== undefined && schema.type !== type) return false;
  if (schema.enum && !schema.enum.includes(value)) return false;
  const { minimum = -Infinity, maximum = Infinity, minLength = 0, maxLength = Infinity, minItems = 0, minProperties = 0 } =
    schema;
  if (typeof value === "number") return value >= minimum && value <= maximum;
  if (typeof value === "string") return value.length >= minLength && value.length <= maxLength;
  if (Array.isArray(value)) return value.length >= minItems && value.every((item) => fits(item, schema.items ?? {}));
  if (typeof value !== "object" || value === null) return true;
  const members = Object.entries(value);
  return members.length >= minProperties &&
    (schema.required ?? []).every((name) => Object.hasOwn(value, name)) &&
    members.every(([name, member]) => {
      if (!fits(name, schema.propertyNames ?? {})) return false;
      const own = schema.properties && Object.hasOwn(schema.properties, name) ? schema.properties[name] : undefined;
      const rule = own ?? schema.additionalProperties ?? {};
      return rule !== false && fits(member, rule);
    });
}

Deno.test("effectonce.schema.json is what the flags say, and accepts what the command accepts", async (t) => {
  const text = await Deno.readTextFile(new URL("../effectonce.schema.json", import.meta.url));
  assertEquals(text, schemaText(), "write it anew: deno task schema");
  const schema = configSchema() as Schema;
  for (const [content, ...says] of FILES) {
    let json: unknown;
    try {
      json = typeof content === "string" ? JSON.parse(content) : content;
    } catch {
      continue; // Not JSON: no schema sees it.
    }
    if (says.some((part) => /twice/.test(`${part}`))) continue; // JSON.parse takes the last one.
    await t.step(JSON.stringify(json).slice(0, 100), () => assertEquals(fits(json, schema), false));
  }
  for (const [content] of WRONG) assertEquals(fits(content, schema), true, JSON.stringify(content));
  const whole = {
    $schema: "./effectonce.schema.json",
    listen: ":9464",
    drain: true,
    json: true,
    relays: {
      billing: {
        ...GOOD,
        ...{ topics: ["a"], store: DB, idempotent: true, dedupeWindowMs: 5, reconcile: "https://h/{id}", settleMs: 0 },
        ...{ headerTo: { A: "env:B" }, method: "PUT", timeoutMs: 1, lanes: 1, batch: 1, leaseMs: 10, attempts: 1 },
        ...{ minRetryMs: 0, maxRetryMs: 0, onPark: "skip", pollMs: 1, keep: true, allowDuplicates: false, readyMs: 1 },
      },
    },
  };
  assertEquals(fits(whole, schema), true);
});

// ---------------------------------------------------------------------------------------------------- values by env:NAME

Deno.test("env:NAME: a URL or a header from a variable, in a flag, in the environment and in the file", async (t) => {
  await using target = new Target();
  await using at = await box();
  await at.ok(["init", "--store", "sqlite:claims.db"]);
  const env = {
    SOURCE: DB,
    CLAIMS: "sqlite:claims.db",
    TARGET: target.url.replace("//", "//user:hush@"),
    QUESTION: `${target.url}/{id}?key=hush`,
    TOKEN: "hush-token",
  };
  const values = { from: "env:SOURCE", store: "env:CLAIMS", to: "env:TARGET", reconcile: "env:QUESTION" };
  const flags = Object.entries(values).flatMap(([name, value]) => [`--${name}`, value]);
  const variables = Object.fromEntries(Object.entries(values).map(([name, value]) => [variableOf(name), value]));
  await configure(at, { relays: { default: { ...values, headerTo: { "X-Token": "env:TOKEN" } } } });
  const ways: readonly [string, string[], Record<string, string>][] = [
    ["flags", ["relay", ...flags, "--header-to", "X-Token=env:TOKEN"], env],
    ["environment", ["relay"], { ...env, ...variables, EFFECTONCE_HEADER_TO: "X-Token=env:TOKEN" }],
    ["file", ["relay", ...CONFIG], env],
  ];
  for (const [i, [what, args, given]] of ways.entries()) {
    await t.step(what, async () => {
      await at.enqueue({ id: `${i}`, value: i });
      const ran = await at.run([...args, "--drain"], { env: given });
      assertEquals([ran.code, ran.stderr], [0, ""]);
      assert(!ran.stdout.includes("hush"));
      const { key, headers } = target.asked.at(-1)!;
      assertEquals([key, headers.get("x-token")], [`${i}`, "hush-token"]);
      assertEquals(headers.get("authorization"), `Basic ${btoa("user:hush")}`);
      const show = ["effects", "show", `${i}`, "--store", "env:CLAIMS", "--from", "env:SOURCE", "--json"];
      assertEquals(JSON.parse(await at.ok(show, { env })).state, "done");
    });
  }
  await t.step("a variable that is not set, or is no variable", async () => {
    const lines: [Line, ...string[]][] = [
      [{ args: ["status", "--store", "env:NO_SUCH_1"], env: {} }, "--store", "NO_SUCH_1"],
      [{ args: ["status"], env: { EFFECTONCE_STORE: "env:NO_SUCH_2" } }, "EFFECTONCE_STORE", "NO_SUCH_2"],
      [{ args: ["relay", "--from", "env:NO_SUCH_3", "--to", "stdout:"], env: {} }, "--from", "NO_SUCH_3"],
      [{ args: drainTo("env:NO_SUCH_4"), env: {} }, "--to", "NO_SUCH_4"],
      [{ args: drainTo(target.url, "--store", "env:NO_SUCH_5"), env: {} }, "--store", "NO_SUCH_5"],
      [{ args: drainTo(target.url, "--reconcile", "env:NO_SUCH_6"), env: {} }, "--reconcile", "NO_SUCH_6"],
      [{ args: drainTo(target.url, "--header-to", "X=env:NO_SUCH_7"), env: {} }, "--header-to X", "NO_SUCH_7"],
      [{ args: drainTo("env:postgres://u:hush@h/"), env: {} }, "--to", "name of a variable"],
      [{ args: drainTo("env:CHAIN"), env: { CHAIN: "env:TARGET" } }, "--to", "env:"],
      [{ args: ["effects", "show", "k", "--store", DB, "--from", "env:NO_SUCH_8"], env: {} }, "--from", "NO_SUCH_8"],
      [{ args: ["doctor", ...CONFIG], env: {} }, FILE, "relays.default.to", "TARGET"],
    ];
    for (const [i, ran] of (await at.many(lines.map(([line]) => line))).entries()) {
      assertUsage(ran, ...lines[i]!.slice(1) as string[]);
      assert(!ran.stderr.includes("hush"));
    }
  });
  await t.step("no word of a command line that may be a URL with a password is repeated", async () => {
    const url = "https://user:hush@pay.example/?key=hush";
    const lines = [
      [url],
      ["effects", url, "--store", DB],
      ["relay", url, "--from", DB],
      ["status", url],
      drainTo(`stdout:${url}`),
    ];
    for (const ran of await at.many(lines)) {
      assertUsage(ran);
      assert(!ran.stderr.includes("hush"), ran.stderr);
    }
  });
});

// ------------------------------------------------------------------------------------------------------ doctor and status

Deno.test("doctor and status with --config: each relay, or the one by --name; text and JSON", async () => {
  await using target = new Target();
  await using at = await box();
  await at.ok(["init", "--store", "sqlite:claims.db"]);
  await configure(at, {
    json: true,
    relays: {
      billing: {
        from: DB,
        to: target.url,
        store: "sqlite:claims.db",
        topics: ["a"],
        headerTo: { X: "env:NO_SUCH_VARIABLE" },
      },
      archive: { from: DB, to: "file:out.jsonl", topics: ["b"] },
    },
  });
  await at.enqueue({ id: "1", topic: "a", value: 1 }, { id: "2", topic: "a", value: 1 }, { id: "3", topic: "b", value: 1 });
  const env = { NO_SUCH_VARIABLE: "token" };
  const { relays } = await at.json(["doctor", ...CONFIG], { env }) as {
    relays: Record<string, { level: string; checks: unknown[] }>;
  };
  assertEquals([relays.billing!.level, relays.billing!.checks.length], ["at-most-once", 4]);
  assertEquals([relays.archive!.level, relays.archive!.checks.length], ["exactly-once", 2]);
  const text = await at.ok(["doctor", ...CONFIG, "--name", "archive"], { env });
  assertMatch(
    text,
    /^relay "archive"\n {2}sqlite:app\.db -> file:out\.jsonl: exactly-once \(protocol: sealed\)\n {2}because\n/,
  );
  assert(!text.includes("billing"));
  // Whoever looks at the outbox need not have the target's token.
  const found = await at.json(["status", ...CONFIG]) as { relays: Record<string, { outbox: { pending: number } }> };
  assertEquals(Object.entries(found.relays).map(([name, { outbox }]) => [name, outbox.pending]), [["billing", 2], [
    "archive",
    1,
  ]]);
  assertMatch(
    await at.ok(["status", ...CONFIG, "--name", "billing"]),
    /^relay "billing"\n {2}outbox {3}2 pending.*\n {2}effects {2}/,
  );
  await configure(at, { relays: { a: GOOD, b: { ...GOOD, from: "sqlite:none.db" } } });
  assertFailure(await at.run(["doctor", ...CONFIG]), `relay "b"`, "sqlite:none.db", "does not exist");
  assertFailure(await at.run(["relay", ...CONFIG]), `relay "b"`, "sqlite:none.db", "does not exist");
});

Deno.test("effects without a subcommand says which there are", async () => {
  await using at = await box();
  for (const ran of await at.many([["effects"], ["effects", "--store", DB]])) {
    assertUsage(ran, "effects needs a subcommand: list, show, retry, resolve or discard", "See: effects --help");
  }
});

// ------------------------------------------------------------------------------------------------------------ permissions

const NODE_DB = `${DB}?driver=node`;
const FILES_ONLY = ["--allow-read=app.db", "--allow-write=app.db"];

Deno.test("without --allow-env the environment is ignored, with --allow-env=EFFECTONCE_* it is read, and env:NAME says what is missing", async (t) => {
  await using target = new Target();
  await using at = await box();
  await at.enqueue({ id: "1", value: 1 });
  const deno = ["--no-prompt", ...FILES_ONLY, `--allow-net=${new URL(target.url).host}`];
  const env = { EFFECTONCE_LANES: "many", TARGET: target.url };
  const line = ["relay", "--from", NODE_DB, "--to", target.url, "--drain"];
  await t.step("ignored", async () => {
    const ran = await at.run(line, { env, deno });
    assertEquals([ran.code, ran.stderr, target.keys()], [0, "", ["1"]]);
  });
  await t.step("read", async () => {
    const ran = await at.run(line, { env, deno: [...deno, "--allow-env=EFFECTONCE_*"] });
    assertUsage(ran, "EFFECTONCE_LANES", "whole number");
  });
  await t.step("env:NAME", async () => {
    const reference = ["relay", "--from", NODE_DB, "--to", "env:TARGET", "--drain"];
    const given = { env: { TARGET: target.url }, deno: [...deno, "--allow-env=EFFECTONCE_*"] };
    assertFailure(await at.run(reference, given), "--to", "env:TARGET", "--allow-env=TARGET");
    const ran = await at.run(reference, { ...given, deno: [...deno, "--allow-env=TARGET"] });
    assertEquals([ran.code, ran.stderr], [0, ""]);
  });
});

/** A command line, with which permissions, and which flag it must say is missing. */
const LACKING: readonly (readonly [args: readonly string[], deno: readonly string[], ...says: string[]])[] = [
  [["status", "--store", NODE_DB], [], "sqlite:app.db", "--allow-read=app.db"],
  [["status", "--store", NODE_DB], ["--allow-read"], "--allow-write=app.db"],
  [["status", "--store", DB], ["--allow-read"], "better-sqlite3", "--allow-ffi and --allow-sys"],
  [["enqueue", "--store", NODE_DB, "--jsonl", "in.jsonl"], FILES_ONLY, "in.jsonl", "--allow-read=in.jsonl"],
  [["relay", "--config", FILE], [], FILE, `--allow-read=${FILE}`],
  [["relay", "--from", NODE_DB, "--to", "https://pay.example/"], FILES_ONLY, "--to", "--allow-net=pay.example:443"],
  [["relay", "--from", NODE_DB, "--to", "http://[::1]/"], FILES_ONLY, "--to", "--allow-net=[::1]:80"],
  [
    ["relay", "--from", NODE_DB, "--to", "http://h:81/", "--reconcile", "http://r:82/{id}"],
    [...FILES_ONLY, "--allow-net=h:81"],
    "--reconcile",
    "--allow-net=r:82",
  ],
  [
    ["relay", "--from", NODE_DB, "--to", "file:out.jsonl"],
    FILES_ONLY,
    "--to",
    "--allow-read=out.jsonl",
    "--allow-write=out.jsonl",
  ],
  [
    ["relay", "--from", NODE_DB, "--to", "stdout:", "--listen", "9464"],
    FILES_ONLY,
    "127.0.0.1:9464",
    "--allow-net=127.0.0.1:9464",
  ],
  [["demo"], ["--allow-read"], "--allow-write and --allow-run and --allow-net"],
];

Deno.test("a missing permission: exit code 1 and a sentence with the flag", async (t) => {
  await using at = await box();
  for (const [args, deno, ...says] of LACKING) {
    await t.step(`${args.join(" ")} with ${deno.join(" ") || "nothing"}`, async () => {
      assertFailure(await at.run(args, { deno: ["--no-prompt", ...deno] }), ...says);
    });
  }
});

Deno.test(
  "a missing permission at a terminal: the same, and Deno never asks",
  { ignore: !await has("script") },
  async (t) => {
    await using at = await box();
    await configure(at, { relays: { a: { from: NODE_DB, to: "file:out.jsonl" } } });
    const cli = new URL("../cli.ts", import.meta.url).pathname;
    // What looks for the native part of a driver, or makes a file durable, is asked for as a whole here.
    const more: typeof LACKING = [
      [["status", "--store", DB], FILES_ONLY, "--allow-read and --allow-ffi"],
      [
        ["relay", "--config", FILE],
        [`--allow-read=app.db,out.jsonl,${FILE}`, "--allow-write=app.db,out.jsonl"],
        "--allow-read=.",
      ],
    ];
    for (const [args, deno, ...says] of [...LACKING.filter(([[command]]) => command !== "enqueue"), ...more]) {
      await t.step(`${args.join(" ")} with ${deno.join(" ") || "nothing"}`, async () => {
        const line = [Deno.execPath(), "run", ...deno, "--quiet", cli, ...args].map((arg) => `'${arg}'`).join(" ");
        const command = new Deno.Command("script", {
          args: ["-q", "-f", "-e", "-c", line, "/dev/null"],
          cwd: at.folder,
          env: { NO_COLOR: "1" },
          stdin: "null",
          signal: AbortSignal.timeout(20_000), // Where it asks it would wait for ever.
        });
        const { code, stdout } = await command.output();
        const said = new TextDecoder().decode(stdout).replaceAll("\r\n", "\n");
        assert(!/Deno requests|Allow\?/.test(said), said);
        // Before it the terminal shows that nobody types.
        assertFailure({ code, stdout: "", stderr: said.slice(said.indexOf("effectonce:")) }, ...says);
      });
    }
  },
);

// -------------------------------------------------------------------------------------------------------- pages of errors

Deno.test("an error with a code names its page, and so does what a person must see to", async (t) => {
  await using target = new Target();
  await using at = await box();
  target.answer = ({ key }) => new Response("why", { status: key === "refused" ? 400 : 500 });
  await at.enqueue({ id: "refused", value: 1 }, { id: "doubt", value: 2 });
  await t.step("parked and in doubt", async () => {
    const ran = await at.run(drainTo(target.url));
    assertEquals(ran.code, 1);
    assertSays(ran.stdout, [
      "--state uncertain (see docs/operations.md#uncertain)",
      "--state parked (see docs/operations.md#parked)",
    ]);
  });
  await t.step("uncertain", async () => {
    await at.ok(["effects", "discard", "doubt", "--store", DB]);
    assertFailure(await at.run(["effects", "retry", "doubt", "--store", DB]), "See docs/operations.md#uncertain");
  });
  await t.step("sink_invalid", async () => {
    await Deno.writeTextFile(at.path("mine.txt"), "mine\n");
    await at.ok(["init", "--store", "sqlite:other.db"]);
    const line = ["relay", "--from", "sqlite:other.db", "--to", "file:mine.txt", "--drain"];
    assertSays((await at.run(line)).stderr, [/^effectonce: .*file:mine\.txt.*\nSee docs\/operations\.md#sink_invalid\n$/]);
  });
  await t.step("source_invalid", async () => {
    const ran = await at.run(drainTo(target.url, "--name", "other"));
    assertFailure(ran, "See docs/operations.md#source_invalid");
  });
  await t.step("schema_missing, also for one of several lines", async () => {
    await Deno.writeTextFile(at.path("empty.db"), "");
    const line = ["enqueue", "--store", "sqlite:empty.db", "--topic", "t", "--value", "1"];
    assertFailure(await at.run(line), "See docs/operations.md#schema_missing");
  });
  await t.step("no page for what has no code", async () => {
    const ran = await at.run(["status", "--store", "sqlite:none.db"]);
    assertFailure(ran);
    assert(!ran.stderr.includes("See"), ran.stderr);
  });
  assertEquals((await at.status()).effects, { ...NO_EFFECTS, rejected: 2 });
});
