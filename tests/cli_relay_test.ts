import { assert, assertEquals, assertMatch, assertNotEquals, assertRejects, assertStringIncludes } from "@std/assert";
import { DatabaseSync } from "node:sqlite";
import { sqliteStore } from "../adapters/sqlite.ts";
import { once, type OnceOptions } from "../mod.ts";
import {
  assertFailure,
  assertNothingLost,
  assertSays,
  assertUsage,
  type Box,
  box,
  DB,
  deadUrl,
  drainTo,
  type Ended,
  eventsOf,
  has,
  INSTANT,
  type Listed,
  listOf,
  NO_EFFECTS,
  QUICK,
  RawTarget,
  relayTo,
  sqlOn,
  Target,
  until,
} from "./cli_run.ts";

// ------------------------------------------------------------------------------------------------------ targets that fail

Deno.test("a target that is not listening: retried, nothing is sent or lost, and parked only after --attempts", async () => {
  await using at = await box();
  await at.enqueue({ id: "1", value: 1 }, { id: "2", key: "k", value: 2 }, { id: "3", key: "k", value: 3 });
  const url = deadUrl();
  const running = at.start(relayTo(url, "--json", "--attempts", "1000000", ...QUICK));
  for (let i = 0; i < 5; i++) {
    const { reason } = await running.event("retried");
    assertSays(String(reason), [url, "nothing was sent"]);
  }
  assertEquals((await running.stop()).code, 0);
  assertNothingLost(at, 3);
  assertEquals((await at.status()).outbox.pending, 3);

  await at.enqueue({ id: "4", topic: "others", value: 4 });
  const ran = await at.run(drainTo(url, "--topics", "others", "--attempts", "3", ...QUICK));
  assertEquals([ran.code, ran.stderr], [1, ""]);
  assertSays(ran.stdout, ["parked: 4", url, "nothing was sent", "1 parked"]);
  assertNothingLost(at, 4);
  assertEquals((await listOf(at, "--state", "rejected")).map(({ key, attempts }) => [key, attempts]), [["4", 3]]);

  await using target = new Target();
  await at.ok(["effects", "retry", "4", "--store", DB]);
  assertEquals((await at.run(drainTo(target.url))).code, 0);
  assertEquals(target.asked.map(({ body }) => body).toSorted(), ["1", "2", "3", "4"]);
  assertNothingLost(at, 4);
});

Deno.test("a message that was never sent is not in doubt because a later run allows fewer --attempts", async () => {
  await using at = await box();
  await at.enqueue({ id: "1", value: 1 });
  const url = deadUrl();
  const running = at.start(relayTo(url, "--json", ...QUICK));
  for (let i = 0; i < 3; i++) await running.event("retried");
  await running.stop();
  const ran = await at.run(drainTo(url, "--attempts", "2", ...QUICK));
  assertEquals((await at.status()).effects, { ...NO_EFFECTS, rejected: 1 }, ran.stdout);
  assertSays(ran.stdout, ["parked: 1"]);
});

Deno.test("a target that is too slow: in doubt, and never asked twice; with --idempotent asked again under the same key", async () => {
  await using target = new Target();
  await using at = await box();
  target.answer = (_, nth) => nth === 1 ? target.hold() : Response.json({ paid: true });
  await at.enqueue({ id: "plain", value: 1 });
  const plain = await at.run(drainTo(target.url, "--timeout-ms", "150"));
  assertEquals([plain.code, plain.stderr], [1, ""]);
  assertSays(plain.stdout, ["in doubt: plain", "150 ms", "1 in doubt"]);
  assertEquals((await at.run(drainTo(target.url, "--timeout-ms", "150"))).code, 0, "nothing deliverable is left");
  assertEquals(target.keys(), ["plain"]);
  assertNothingLost(at, 1);

  await at.enqueue({ id: "same", value: 1 });
  const idempotent = await at.run(drainTo(target.url, "--timeout-ms", "150", "--idempotent", ...QUICK));
  assertEquals([idempotent.code, idempotent.stderr], [0, ""]);
  assertEquals(target.keys(), ["plain", "same", "same"]);
  assertNothingLost(at, 2);
});

/** What comes over the wire instead of an answer, and where the message then stands. */
const ANSWERS: readonly (readonly [what: string, bytes: string, state: "done" | "uncertain"])[] = [
  ["nothing", "", "uncertain"],
  ["another protocol", "SSH-2.0-OpenSSH_9.6\r\n", "uncertain"],
  ["half a status line", "HTTP/1.1 200", "uncertain"],
  ["half a head", "HTTP/1.1 200 OK\r\nContent-Le", "uncertain"],
  ["half a body", "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf", "done"],
  ["half of a 500's body", "HTTP/1.1 500 Oops\r\nContent-Length: 100\r\n\r\nhalf", "uncertain"],
  ["a head that cannot be", "HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n", "uncertain"],
];

Deno.test("half an answer, or none that is HTTP: in doubt for a plain target, sent once", async (t) => {
  await using at = await box();
  await at.enqueue(...ANSWERS.map((_, i) => ({ id: `${i}`, topic: `t${i}`, value: i })));
  for (const [i, [what, bytes, state]] of ANSWERS.entries()) {
    await t.step(what, async () => {
      await using target = new RawTarget(bytes);
      const ran = await at.run(drainTo(target.url, "--topics", `t${i}`));
      assertEquals([ran.code, ran.stderr], [state === "done" ? 0 : 1, ""]);
      assertEquals(target.connections, 1, "it was sent more than once");
      assertEquals(at.sql(`select state from effectonce_effects where key = '${i}'`), [{ state }]);
      if (state === "uncertain") assertSays(ran.stdout, [`in doubt: ${i}`, /not known whether it happened/]);
      assertNothingLost(at, ANSWERS.length);
    });
  }
});

Deno.test("what a target answers decides: refused is parked, 5xx is in doubt, 429 is tried again; exit codes, nothing lost", async (t) => {
  type Case = readonly [status: number, headers: Record<string, string>, asked: number];
  const once = (status: number): Case => [status, {}, 1];
  const groups: [state: "done" | "rejected" | "uncertain", code: number, cases: Case[]][] = [
    ["done", 0, [200, 201, 204].map(once)],
    // The second time it answers 200.
    ["done", 0, [[409, {}, 2], [429, {}, 2], [429, { "retry-after": "0" }, 2], [503, { "retry-after": "0" }, 2]]],
    ["rejected", 1, [...[400, 401, 402, 403, 404, 410, 422].map(once), [301, { location: "/elsewhere?token=hush" }, 1]]],
    ["uncertain", 1, [408, 500, 502, 503, 504].map(once)],
  ];
  for (const [state, code, cases] of groups) {
    await t.step(`${cases.map(([status]) => status)}: ${state}`, async () => {
      await using target = new Target();
      await using at = await box();
      target.answer = ({ key }, nth) => {
        const [status, headers] = cases[Number(key)]!;
        return nth > 1 ? new Response() : new Response(status === 204 ? null : "why", { status, headers });
      };
      await at.enqueue(...cases.map((_, i) => ({ id: `${i}`, value: i })));
      const ran = await at.run(drainTo(target.url, ...QUICK));
      assertEquals([ran.code, ran.stderr], [code, ""]);
      const listed = await listOf(at);
      for (const [i, [status, , asked]] of cases.entries()) {
        assertEquals(target.keys().filter((key) => key === `${i}`).length, asked, `${status} was asked`);
        const effect = listed.find(({ key }) => key === `${i}`)!;
        assertEquals(effect.state, state, `after ${status}`);
        if (code === 0) continue;
        assertSays(String(effect.error), [`answered ${status}`]);
        assertSays(ran.stdout, [`${state === "rejected" ? "parked" : "in doubt"}: ${i} (orders): ${effect.error}`]);
      }
      assert(!(ran.stdout + JSON.stringify(listed)).includes("hush"), "a redirect's query may hold a secret");
      assertNothingLost(at, cases.length);
    });
  }
});

// ---------------------------------------------------------------------------------------------------------------- secrets

Deno.test("no secret of the command line shows: not in what is printed, not in the database", async (t) => {
  await using target = new Target();
  await using at = await box();
  const env = { TOKEN: "hush-token-1", OTHER: "hush-other-2" };
  const secret = (url: string) => url.replace("//", "//user:hush-password-3@") + "?api_key=hush-query-4#hush-hash-5";
  const flags = [
    "--header-to",
    "Authorization2=env:TOKEN",
    "--header-to",
    "X-Other=Bearer hush-literal-6",
    "--header-to",
    "Z=env:OTHER",
  ];
  const reconcile = ["--reconcile", `${secret(target.url).split("?")[0]}/{id}?key=hush-query-7`, "--settle-ms", "0"];
  const secrets = [/hush/, new RegExp(btoa("user:hush-password-3").slice(0, 16))];
  const check = ({ stdout, stderr }: Ended) => {
    for (const text of [stdout, stderr]) for (const word of secrets) assert(!word.test(text), `${word} shows in ${text}`);
  };
  const tries: [what: string, url: string, code: number, ...more: string[]][] = [
    ["delivered", target.url, 0],
    ["refused", `${target.url}/400`, 1],
    ["in doubt", `${target.url}/500`, 1],
    ["too slow", `${target.url}/slow`, 1, "--timeout-ms", "100"],
    ["not listening", deadUrl(), 1, "--attempts", "2", ...QUICK],
    ["in doubt, and asked for", `${target.url}/500`, 1, ...reconcile, "--attempts", "2", ...QUICK],
    ["at-least-once", `${target.url}/400`, 1, "--allow-duplicates"],
  ];
  target.answer = ({ method, path }) => {
    if (method === "GET") return new Response("busy", { status: 503 });
    if (path.endsWith("/slow")) return target.hold();
    return new Response("why", { status: Number(/\d+$/.exec(path)?.[0] ?? 200) });
  };
  const serials = Array.from(tries, (_, i) => [2 * i, 2 * i + 1]);
  await at.enqueue(...serials.flat().map((n) => ({ id: `m${n}`, topic: `t${n}`, value: n })));
  for (const [i, [what, url, code, ...more]] of tries.entries()) {
    for (const [j, json] of [[], ["--json"]].entries()) {
      await t.step(`${what} ${json}`, async () => {
        const topic = ["--topics", `t${serials[i]![j]}`];
        const ran = await at.run(drainTo(secret(url), ...flags, ...more, ...json, ...topic), { env });
        check(ran);
        assertEquals(ran.code, code, ran.stderr);
      });
    }
  }
  await t.step("doctor", async () => {
    const lines = tries.map(([, url, , ...more]) => ["doctor", "--from", DB, "--to", secret(url), ...flags, ...more]);
    for (const ended of await at.many([...lines, ...lines.map((line) => [...line, "--json"])], env)) {
      assertEquals(ended.code, 0, ended.stderr);
      check(ended);
    }
  });
  await t.step("they reached the target", () => {
    const { headers } = target.asked[0]!;
    assertEquals(headers.get("authorization"), `Basic ${btoa("user:hush-password-3")}`);
    assertEquals(headers.get("authorization2"), "hush-token-1");
    assertEquals(headers.get("x-other"), "Bearer hush-literal-6");
  });
  await t.step("effects list and show", async () => {
    check(await at.run(["effects", "list", "--store", DB]));
    check(await at.run(["effects", "list", "--store", DB, "--state", "parked", "--json"]));
    const shows = serials.flat().map((n) => ["effects", "show", `m${n}`, "--store", DB, "--json"]);
    for (const ended of await at.many(shows)) check(ended);
  });
  await t.step("the database's files", async () => {
    for (const { name } of Deno.readDirSync(at.folder)) {
      const text = new TextDecoder("latin1").decode(await Deno.readFile(at.path(name)));
      for (const word of secrets) assert(!word.test(text), `${word} is in ${name}`);
    }
  });
  const bad = [
    "http://user:hush%zz@127.0.0.1/",
    "http://user:hush@127.0.0.1:99999/",
    "http://user:hush@/",
    "//user:hush@host/",
    "user:hush@host",
  ];
  for (const url of [...bad, "htp://user:hush@host/"]) {
    await t.step(`a mistyped URL is not repeated whole: ${url}`, async () => {
      const ran = await at.run(drainTo(url));
      assertUsage(ran, "--to");
      check(ran);
    });
  }
  await t.step("a mistyped header is not repeated", async () => {
    for (const header of ["X: hush", "X=hush\nY", "=hush", "A B=hush"]) {
      const ran = await at.run(drainTo(target.url, "--header-to", header));
      assertEquals(ran.code, 2);
      check(ran);
    }
  });
});

// ------------------------------------------------------------------------------------------------------- the person's path

/** A database where message 1 of key k is in doubt or refused, and 2 and 3 wait behind it. */
async function stuckBox(target: Target, status: number): Promise<Box> {
  const at = await box();
  target.answer = (_, nth) =>
    nth === 1 && target.keys().length === 1 ? new Response("why", { status }) : new Response("paid");
  await at.enqueue(...["1", "2", "3"].map((id) => ({ id, key: "k", value: Number(id) })));
  const ran = await at.run(drainTo(target.url));
  assertEquals(ran.code, 1);
  assertEquals(target.keys(), ["1"], "what is behind it waits");
  return at;
}

Deno.test("a doubt, found out to be done: not sent again, its result kept, what was behind it is delivered in order", async () => {
  await using target = new Target();
  await using at = await stuckBox(target, 500);
  const { since, ...shown } = await at.json(["effects", "show", "1", "--store", DB]) as Record<string, unknown>;
  assertMatch(String(since), INSTANT);
  const error = `POST ${target.url} answered 500, so it is not known whether it happened: why`;
  const state = { scope: "default", key: "1", state: "uncertain", attempts: 1 };
  assertEquals(shown, {
    ...state,
    error,
    generation: 1,
    idempotencyKey: "1",
    result: null,
    evidence: null,
    parked: error,
    message: { state: "parked", topic: "orders", key: "k" },
  });
  const people = await at.ok(["effects", "show", "1", "--store", DB]);
  assertSays(people, [
    /^scope +default$/m,
    /^key +1$/m,
    /^state +uncertain$/m,
    /^generation +1$/m,
    /^idempotencyKey +1$/m,
    /^attempts +1$/m,
    /^error +POST/m,
    /^parked +POST/m,
    /^message +parked, topic orders, key k$/m,
  ]);
  assertSays(await at.ok(["effects", "list", "--store", DB]), [/^uncertain +default +1 +1 attempts? +/]);
  const parked = await listOf(at, "--state", "parked");
  assertEquals(parked.map(({ since: _, ...rest }) => rest), [{
    scope: null,
    key: "1",
    state: "parked",
    attempts: null,
    error,
  }]);

  const resolved = await at.json(["effects", "resolve", "1", "--store", DB, "--as", "done", "--result", '{"id":7}']);
  assertEquals(resolved, { scope: "default", key: "1", resolved: "done" });
  assertEquals((await at.run(drainTo(target.url))).code, 0);
  assertEquals(target.keys(), ["1", "2", "3"]);
  const after = await at.json(["effects", "show", "1", "--store", DB]) as Record<string, unknown>;
  assertEquals([after.state, after.result, after.error, after.parked], ["done", { id: 7 }, null, null]);
  assertFailure(await at.run(["effects", "resolve", "1", "--store", DB, "--as", "absent"]), `"1"`, "is done");
  assertFailure(await at.run(["effects", "retry", "1", "--store", DB]), `"1"`, "is done");
  assertFailure(await at.run(["effects", "discard", "1", "--store", DB]), `"1"`, "is done");
  assertNothingLost(at, 3);
});

Deno.test("a doubt, found out to be absent: sent again under a new Idempotency-Key, then what was behind it, in order", async () => {
  await using target = new Target();
  await using at = await stuckBox(target, 500);
  assertEquals(await at.ok(["effects", "resolve", "1", "--store", DB, "--as", "absent"]), `"1" is resolved as absent\n`);
  assertEquals((await at.run(drainTo(target.url))).code, 0);
  const [first, again, ...rest] = target.keys();
  assertEquals([first, rest], ["1", ["2", "3"]]);
  assertNotEquals(again, "1", "under the old key the target would answer what it has stored");
  assertEquals(target.asked.map(({ body }) => body), ["1", "1", "2", "3"]);
  assertNothingLost(at, 3);
});

Deno.test("a refusal: effects retry sends it anew, then what was behind it, in order", async () => {
  await using target = new Target();
  await using at = await stuckBox(target, 422);
  const shown = await at.json(["effects", "show", "1", "--store", DB]) as Record<string, unknown>;
  assertEquals([shown.state, shown.result], ["rejected", { status: 422, body: "why" }]);
  assertEquals(await at.json(["effects", "retry", "1", "--store", DB]), { key: "1", retried: true });
  assertEquals((await at.run(drainTo(target.url))).code, 0);
  assertEquals(target.asked.map(({ body }) => body), ["1", "1", "2", "3"]);
  assertNotEquals(target.keys()[1], "1", "under the old key the target would refuse again");
  assertNothingLost(at, 3);
});

/** What `effects show` knows of message 1. */
const shown = async (at: Box, key = "1"): Promise<Record<string, unknown>> =>
  await at.json(["effects", "show", key, "--store", DB]) as Record<string, unknown>;

Deno.test("effects retry of a doubt: what becomes of it is the relay's to say, and none sends it twice that must not", async (t) => {
  const cases: readonly (readonly [what: string, flags: readonly string[], answer: number, code: number, keys: string[]])[] =
    [
      ["a relay for a target that dedupes repeats it under the same key", ["--idempotent"], 200, 0, ["1", "1", "2", "3"]],
      ["not past the target's memory", ["--idempotent", "--dedupe-window-ms", "1"], 200, 1, ["1"]],
      ["one that asks is told that it happened", ["--reconcile", "URL", "--settle-ms", "0"], 200, 0, ["1", "2", "3"]],
      ["or that the target cannot tell", ["--reconcile", "URL", "--settle-ms", "0"], 403, 1, ["1"]],
      ["any other finds it in doubt again", [], 200, 1, ["1"]],
    ];
  for (const [what, flags, answer, code, keys] of cases) {
    await t.step(what, async () => {
      await using target = new Target();
      await using at = await stuckBox(target, 500);
      target.answer = ({ method }) => new Response("paid", { status: method === "GET" ? answer : 200 });
      const said = await at.ok(["effects", "retry", "1", "--store", DB]);
      assertMatch(said, /^"1" goes to its relay again, and may have happened: [^\n]+\n$/);
      assertSays(said, ["--idempotent repeats it under the same Idempotency-Key", "--reconcile asks", "in doubt again"]);
      const { state, generation, parked } = await shown(at);
      assertEquals([state, generation, parked], ["waiting", 1, null]);
      const more = flags.map((flag) => flag === "URL" ? `${target.url}/{idempotencyKey}` : flag);
      assertEquals((await at.run(drainTo(target.url, ...more))).code, code);
      const sent = target.asked.filter(({ method }) => method === "POST");
      assertEquals(sent.map(({ key }) => key), keys);
      assertEquals((await shown(at)).state, code === 0 ? "done" : "uncertain");
      const questions = target.asked.filter(({ method }) => method === "GET").map(({ path }) => path);
      assertEquals(questions, flags.includes("URL") ? ["/charge/1"] : []);
      assertNothingLost(at, 3);
    });
  }
});

Deno.test("effects show tells the Idempotency-Key of the next call, or of the last one", async () => {
  await using target = new Target();
  await using at = await stuckBox(target, 422);
  assertEquals((await shown(at)).idempotencyKey, target.keys()[0]);
  for (const generation of [2, 3]) {
    await at.ok(["effects", "retry", "1", "--store", DB]);
    const { idempotencyKey, ...more } = await shown(at);
    assertEquals([more.state, more.generation], ["waiting", generation]);
    target.answer = () => new Response("why", { status: 422 });
    await at.run(drainTo(target.url));
    assertEquals([target.keys().length, target.keys().at(-1)], [generation, idempotencyKey]);
  }
});

Deno.test("effects retry without a message in the outbox does not say that one is sent", async (t) => {
  await using target = new Target();
  await t.step("a refused one that was discarded", async () => {
    await using at = await stuckBox(target, 422);
    await at.ok(["effects", "discard", "1", "--store", DB]);
    assertEquals(
      await at.ok(["effects", "retry", "1", "--store", DB]),
      `"1" may run anew: no message for it is in this outbox, so whoever asks for it next runs it\n`,
    );
    assertSays(await at.ok(["effects", "show", "1", "--store", DB]), [/^message +not in the outbox$/m]);
    await at.run(drainTo(target.url));
    assertEquals(target.keys(), ["1", "2", "3"]);
    // The one who asks for it next.
    await at.enqueue({ id: "1", key: "k", value: 1 });
    assertEquals((await at.run(drainTo(target.url))).code, 0);
    assertEquals(target.asked.map(({ body }) => body), ["1", "2", "3", "1"]);
  });
  await t.step("an effect of once() that is in doubt", async () => {
    await using at = await box();
    const client = new DatabaseSync(at.path("app.db"));
    try {
      const store = sqliteStore(client);
      const keys: string[] = [];
      const charge = (options: OnceOptions<string, null>, fails = false) =>
        once(store, { scope: "charge", key: "order-1" }, ({ idempotencyKey }) => {
          keys.push(idempotencyKey);
          return fails ? Promise.reject(new Error("broken")) : Promise.resolve("paid");
        }, options);
      await assertRejects(() => charge({}, true), Error, "may have happened");
      assertSays(await at.ok(["effects", "show", "order-1", "--store", DB]), [
        /^idempotencyKey order-1 of a relay, charge:order-1 of once\(\)$/m,
      ]);
      const said = await at.ok(["effects", "retry", "order-1", "--store", DB]);
      assertMatch(
        said,
        /^"order-1" may have happened: no message for it is in this outbox, so whoever asks for it next [^\n]+\n$/,
      );
      await assertRejects(() => charge({}), Error, "may have happened");
      await at.ok(["effects", "retry", "order-1", "--store", DB]);
      assertEquals(await charge({ repeat: "same-key", dedupeWindowMs: 86_400_000 }), "paid");
      assertEquals(keys, ["charge:order-1", "charge:order-1"]);
    } finally {
      client.close();
    }
  });
});

Deno.test("effects retry --all: everything parked goes to its relay again, each as by itself", async (t) => {
  await using target = new Target();
  /** Messages of two relays: refused and in doubt. */
  const parkedBox = async (): Promise<Box> => {
    const at = await box();
    target.answer = ({ body }) => new Response("why", { status: Number(body) });
    target.asked.length = 0;
    for (const topic of ["a", "b"]) {
      await at.enqueue({ id: `${topic}1`, topic, value: 422 }, { id: `${topic}2`, topic, value: 500 });
      assertEquals((await at.run(drainTo(target.url, "--name", topic, "--topics", topic))).code, 1);
    }
    assertEquals((await at.status()).outbox.parked, 4);
    target.answer = () => new Response("paid");
    target.asked.length = 0;
    return at;
  };
  const retryAll = ["effects", "retry", "--all", "--store", DB];
  await t.step("all of them", async () => {
    await using at = await parkedBox();
    const said = await at.ok(retryAll);
    assertMatch(said, /^retried 4 messages, 2 of which may have happened: [^\n]+\n$/);
    assertEquals((await at.status()).outbox.parked, 0);
    for (const topic of ["a", "b"]) {
      assertEquals((await at.run(drainTo(target.url, "--name", topic, "--topics", topic, "--idempotent"))).code, 0);
    }
    assertEquals(target.keys().toSorted(), ["a1;generation=2", "a2", "b1;generation=2", "b2"]);
    assertEquals(await at.json(retryAll), { retried: 0 });
    assertEquals(await at.ok(retryAll), "retried 0 messages\n");
  });
  await t.step("--scope: those of one relay", async () => {
    await using at = await parkedBox();
    assertEquals(await at.json([...retryAll, "--scope", "b"]), { retried: 2 });
    assertEquals((await listOf(at, "--state", "parked")).map(({ key }) => key).toSorted(), ["a1", "a2"]);
    assertEquals(await at.json([...retryAll, "--scope", "nope"]), { retried: 0 });
  });
  await t.step("what a relay parks again meanwhile is not retried for ever", async () => {
    await using at = await parkedBox();
    target.answer = () => new Response("why", { status: 422 });
    const running = at.start(
      relayTo(target.url, "--name", "a", "--topics", "a", "--json", "--idempotent", "--poll-ms", "1"),
    );
    await running.event("idle");
    assertEquals(await at.json(retryAll), { retried: 4 });
    await running.stop();
  });
  await t.step("in another database than its effects", async () => {
    await using at = await box();
    await at.ok(["init", "--store", "sqlite:claims.db"]);
    await at.enqueue({ id: "1", value: 422 }, { id: "2", value: 500 });
    target.answer = ({ body }) => new Response("why", { status: Number(body) });
    const claims = ["--store", "sqlite:claims.db"];
    assertEquals((await at.run(drainTo(target.url, ...claims))).code, 1);
    assertEquals(await at.json(["effects", "retry", "--all", ...claims]), { retried: 0 });
    const listed = await at.json(["effects", "list", "--state", "parked", ...claims, "--from", DB]) as Listed[];
    assertEquals(listed.map(({ key }) => key).toSorted(), ["1", "2"]);
    assertEquals(await at.json(["effects", "retry", "--all", ...claims, "--from", DB]), { retried: 2 });
  });
  await t.step("more than a page of those that cannot be, and others behind them", async () => {
    await using at = await box();
    const rows = "with recursive n(i) as (select 1 union all select i + 1 from n where i < 1100)";
    at.sql(
      `insert into effectonce_effects (scope, key, changed_ms) ${rows} select 'default', 'done-' || i, 0 from n`,
      `insert into effectonce_outbox (id, topic, value, state, until_ms, reason)
        ${rows} select 'done-' || i, 't', '1', 'parked', i, 'used before' from n`,
      `insert into effectonce_outbox (id, topic, value, state, until_ms, reason)
        ${rows} select 'odd-' || i, 't', '1', 'parked', 2000 + i, 'why' from n`,
      "insert into effectonce_relays (instance, relay, protocol, until_ms) values ('1', 'default', 'claimed', 0)",
    );
    const ran = await at.run([...retryAll, "--json"]);
    assertEquals([ran.code, ran.stdout], [1, '{"retried":1100}\n']);
    assertEquals(
      ran.stderr,
      'effectonce: 1100 messages not retried, the first since "done-1" is done, and its id cannot be used again: effects discard done-1\n',
    );
    const { parked, pending } = (await at.status()).outbox;
    assertEquals([parked, pending], [1100, 1100]);
  });
  await t.step("not what an application has under the same key, which is no message's", async () => {
    await using at = await box();
    await at.enqueue({ id: "order-1", value: 1 });
    at.sql(
      `update effectonce_outbox set state = 'parked', until_ms = 1, reason = 'bad'`,
      `insert into effectonce_effects (scope, key, state, changed_ms) values ('charge', 'order-1', 'rejected', 0)`,
    );
    const unknown = await at.run(retryAll);
    assertEquals([unknown.code, unknown.stdout], [1, "retried 0 messages\n"]);
    assertSays(unknown.stderr, [`no relay is registered for topic "orders"`, "--scope NAME"]);
    at.sql("insert into effectonce_relays (instance, relay, protocol, until_ms) values ('1', 'archive', 'sealed', 0)");
    assertEquals(await at.json([...retryAll, "--scope", "archive"]), { retried: 1 });
    at.sql(`update effectonce_outbox set state = 'parked'`);
    assertEquals(await at.ok(["effects", "retry", "order-1", "--store", DB]), `"order-1" will be sent anew\n`);
    const [row] = at.sql("select state, generation from effectonce_effects");
    assertEquals(row, { state: "rejected", generation: 1 });
  });
});

Deno.test("effects discard: never sent again, and what was behind it is delivered", async () => {
  for (const status of [422, 500]) {
    await using target = new Target();
    await using at = await stuckBox(target, status);
    assertEquals(await at.ok(["effects", "discard", "1", "--store", DB]), `"1" is discarded\n`);
    assertEquals((await at.run(drainTo(target.url))).code, 0);
    assertEquals(target.keys(), ["1", "2", "3"]);
    const shown = await at.json(["effects", "show", "1", "--store", DB]) as Record<string, unknown>;
    assertEquals([shown.state, shown.parked], ["rejected", null]);
    assertEquals((await at.status()).effects, { ...NO_EFFECTS, done: 2, rejected: 1 });
    assertEquals(Object.values((await at.status()).outbox), [0, 0, 0, null]);
  }
});

Deno.test("whoever sees a doubt or a parked message is told what to do about it", async () => {
  await using target = new Target();
  for (const status of [500, 422]) {
    await using at = await box();
    target.answer = () => new Response("why", { status });
    await at.enqueue({ id: "1", value: 1 });
    const { stdout } = await at.run(drainTo(target.url));
    assertSays(stdout, [/effects (list|show|resolve|retry)/]);
    assertSays(stdout, [
      `stopped: 0 delivered, ${status === 422 ? 1 : 0} parked meanwhile, ${status === 500 ? 1 : 0} in doubt`,
    ]);
  }
});

Deno.test("what a relay advises at its end can be typed as it is: the URL as it was given, and where its messages are", async (t) => {
  await using target = new Target();
  target.answer = ({ body }) => new Response("why", { status: Number(body) });
  const cases: readonly (readonly [string[], string, Record<string, string>])[] = [
    [["--from", `${DB}?driver=node`], `--store '${DB}?driver=node'`, {}],
    [["--from", "env:APP_DB"], "--store env:APP_DB", { APP_DB: `${DB}?driver=node` }],
    [["--from", DB, "--store", "sqlite:claims.db?driver=node"], `--store 'sqlite:claims.db?driver=node' --from ${DB}`, {}],
  ];
  for (const [ends, flags, env] of cases) {
    await t.step(ends.join(" "), async () => {
      await using at = await box();
      await at.ok(["init", "--store", "sqlite:claims.db"]);
      await at.enqueue({ id: "1", value: 422 }, { id: "2", value: 500 });
      const { code, stdout } = await at.run(["relay", ...ends, "--to", target.url, "--drain"], { env });
      assertEquals(code, 1);
      for (const [state, key] of [["parked", "1"], ["uncertain", "2"]]) {
        assertSays(stdout, [`effects list ${flags} --state ${state} (`]);
        const listed = await at.ok(["effects", "list", ...flags.replaceAll("'", "").split(" "), "--state", state!], { env });
        assertSays(listed, [new RegExp(`^${state} .*\\b${key} `, "m")]);
      }
    });
  }
});

Deno.test("an id that was delivered before, enqueued anew with another value: never sent, and no command promises that it will be", async () => {
  await using target = new Target();
  await using at = await box();
  await at.enqueue({ id: "1", value: 1 });
  assertEquals((await at.run(drainTo(target.url))).code, 0);
  await at.enqueue({ id: "1", value: 2 });
  const ran = await at.run(drainTo(target.url));
  assertEquals(ran.code, 1);
  assertSays(ran.stdout, ["parked: 1", "id was used before"]);
  assertFailure(await at.run(["effects", "retry", "1", "--store", DB]), `"1"`, "discard");
  assertEquals(await at.ok(["effects", "discard", "1", "--store", DB]), `"1" is discarded\n`);
  assertEquals(target.asked.map(({ body }) => body), ["1"]);
  assertEquals(Object.values((await at.status()).outbox), [0, 0, 0, null]);
  // The same once more is no error: it is what a producer that is unsure does.
  await at.enqueue({ id: "1", value: 1 });
  assertEquals((await at.run(drainTo(target.url))).code, 0);
  assertEquals(target.asked.map(({ body }) => body), ["1"]);
});

Deno.test("--store: effects live there, and --from says where the message is", async () => {
  await using target = new Target();
  await using at = await box();
  await at.ok(["init", "--store", "sqlite:claims.db"]);
  target.answer = (_, nth) => new Response("why", { status: nth === 1 ? 500 : 200 });
  await at.enqueue({ id: "1", key: "k", value: 1 }, { id: "2", key: "k", value: 2 });
  const claims = ["--store", "sqlite:claims.db"];
  assertEquals((await at.run(drainTo(target.url, ...claims))).code, 1);
  const shown = await at.json(["effects", "show", "1", ...claims, "--from", DB]) as Record<string, unknown>;
  assertEquals(shown.state, "uncertain");
  assertSays(String(shown.parked), ["answered 500"]);
  assertFailure(await at.run(["effects", "resolve", "1", "--store", DB, "--as", "done"]), `"1"`);
  // Without --from the message stays parked: said at once, or made good by saying it again.
  await at.run(["effects", "resolve", "1", ...claims, "--as", "done"]);
  await at.ok(["effects", "resolve", "1", ...claims, "--from", DB, "--as", "done"]);
  target.answer = () => new Response("paid");
  assertEquals((await at.run(drainTo(target.url, ...claims))).code, 0);
  assertEquals(target.keys(), ["1", "2"]);
});

Deno.test("--on-park skip: a parked message holds back only itself", async () => {
  await using target = new Target();
  await using at = await box();
  target.answer = ({ key }) => key === "1" ? new Response("why", { status: 400 }) : new Response("paid");
  await at.enqueue(...["1", "2", "3"].map((id) => ({ id, key: "k", value: Number(id) })));
  assertEquals((await at.run(drainTo(target.url, "--on-park", "skip"))).code, 1);
  assertEquals(target.keys(), ["1", "2", "3"]);
  assertNothingLost(at, 3);
});

Deno.test("--reconcile: the target is asked about a doubt, and its answer decides", async () => {
  await using target = new Target();
  await using at = await box();
  const charged = new Set<string>();
  target.answer = ({ method, path, key }) => {
    if (method === "GET") return new Response("asked", { status: charged.has(path.split("/").at(-1)!) ? 200 : 404 });
    if (key === "1") charged.add(key); // Charged, and the answer is lost.
    return new Response("paid", { status: ["1", "2"].includes(key) ? 500 : 200 });
  };
  await at.enqueue(...["1", "2"].map((id) => ({ id, value: Number(id) })));
  const ran = await at.run(drainTo(target.url, "--reconcile", `${target.url}/{id}`, "--settle-ms", "0", "--lanes", "1"));
  assertEquals([ran.code, ran.stderr], [0, ""]);
  assertEquals(target.asked.filter(({ method }) => method === "POST").map(({ body }) => body), ["1", "2", "2"]);
  assertNothingLost(at, 2);
});

/** A relay that is killed while the target holds its call; its lease is over then. */
async function killedBox(target: Target, ...more: string[]): Promise<Box> {
  const at = await box();
  target.answer = (_, nth) => nth === 1 && target.keys().length === 1 ? target.hold() : new Response("paid");
  await at.enqueue(...["1", "2"].map((id) => ({ id, key: "k", value: Number(id) })));
  const running = at.start(relayTo(target.url, "--lease-ms", "300", ...more));
  await until(() => target.keys().length === 1);
  assertEquals((await running.stop("SIGKILL")).code, 137);
  const over = `select max(until_ms) as until from effectonce_effects`;
  await until(() => Number(at.sql(over)[0]!.until) < Date.now());
  return at;
}

Deno.test("effects retry after a relay was killed in its call: it may have happened, so a person must say so", async () => {
  await using target = new Target();
  await using at = await killedBox(target);
  const ran = await at.run(["effects", "retry", "1", "--store", DB]);
  await at.run(drainTo(target.url));
  assertEquals(target.asked.filter(({ body }) => body === "1").length, 1, "a call that may have happened was sent again");
  assertFailure(ran, "may have happened", "--as done", "--as absent");
});

Deno.test("effects retry while an idempotent relay waits to repeat a call that may have happened: the same Idempotency-Key", async () => {
  await using target = new Target();
  await using at = await box();
  target.answer = (_, nth) => nth === 1 ? new Response("oops", { status: 500 }) : new Response("paid");
  await at.enqueue({ id: "1", value: 1 });
  const running = at.start(relayTo(target.url, "--idempotent", "--json", "--min-retry-ms", "60000"));
  await running.event("retried");
  await running.stop();
  await at.run(["effects", "retry", "1", "--store", DB]);
  // The wait is over.
  at.sql("update effectonce_outbox set until_ms = 0", "update effectonce_effects set until_ms = 0 where state = 'waiting'");
  assertEquals((await at.run(drainTo(target.url, "--idempotent"))).code, 0);
  assertEquals(target.keys(), ["1", "1"], "a target that honours the key has charged twice");
});

Deno.test("effects retry sends a message that waits for its next attempt at once", async () => {
  await using target = new Target();
  await using at = await box();
  target.answer = (_, nth) =>
    nth === 1 ? new Response(null, { status: 429, headers: { "retry-after": "86400" } }) : new Response("paid");
  await at.enqueue({ id: "1", value: 1 });
  const running = at.start(relayTo(target.url, "--json"));
  await running.event("retried");
  await running.stop();
  assertEquals(await at.ok(["effects", "retry", "1", "--store", DB]), `"1" will be sent anew\n`);
  const again = at.start(relayTo(target.url, "--json"));
  // If it still waits for a day, the relay is idle first.
  const line = await again.until((line) => /"type":"(delivered|idle)"/.test(line));
  await again.stop();
  assertEquals(JSON.parse(line).type, "delivered");
});

Deno.test("effects discard of a message that is not parked: it is gone, or the sentence does not say so", async () => {
  await using target = new Target();
  await using at = await killedBox(target);
  const ran = await at.run(["effects", "discard", "1", "--store", DB]);
  assertEquals(at.sql("select id from effectonce_outbox where id = '1'").length, ran.code === 0 ? 0 : 1, ran.stdout);
});

// ---------------------------------------------------------------------------------------------------- the relay's running

for (const signal of ["SIGINT", "SIGTERM"] as const) {
  Deno.test(`${signal}: the call in hand is finished and recorded, nothing stays claimed, exit code 0`, async () => {
    await using target = new Target();
    await using at = await box();
    const release = Promise.withResolvers<void>();
    target.answer = async ({ key }) => {
      if (key === "0") await release.promise;
      return new Response("paid");
    };
    const messages = 200; // Of one key, so one after the other: the signal comes long before the last.
    await at.enqueue(...Array.from({ length: messages }, (_, i) => ({ id: `${i}`, key: "k", value: i })));
    const running = at.start(relayTo(target.url, "--json"));
    await running.event("claimed");
    running.kill(signal);
    release.resolve();
    const ended = await running.ended();
    assertEquals([ended.code, ended.stderr], [0, ""]);
    const { delivered, parked, uncertain } = eventsOf(ended).at(-1)!;
    assertEquals([delivered, parked, uncertain], [target.keys().length, 0, 0]);
    assert(target.keys().length >= 1 && target.keys().length < messages, `${target.keys().length} were sent`);
    assertEquals((await at.status()).effects, { ...NO_EFFECTS, done: target.keys().length });
    assertNothingLost(at, messages);
    assertEquals(at.sql("select * from effectonce_relays"), [], "nobody has to wait for its lease");
  });
}

Deno.test("a second SIGINT ends the relay at once: the call under way is in doubt, and its follower waits", async () => {
  await using target = new Target();
  await using at = await box();
  target.answer = () => target.hold();
  await at.enqueue({ id: "1", key: "k", value: 1 }, { id: "2", key: "k", value: 2 });
  const running = at.start(relayTo(target.url, "--lease-ms", "300"));
  await until(() => target.keys().length === 1);
  let over = false;
  const ended = running.ended().finally(() => over = true);
  while (!over) {
    try {
      running.kill("SIGINT"); // Two that come too fast are one.
    } catch {
      // It has ended.
    }
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
  assertEquals((await ended).code, 130);
  const ran = await at.run(drainTo(target.url, "--lease-ms", "300"));
  assertEquals(ran.code, 1);
  assertEquals(target.keys(), ["1"], "it was sent again");
  assertEquals((await at.status()).effects, { ...NO_EFFECTS, uncertain: 1 });
  assertNothingLost(at, 2);
});

Deno.test("a signal stops relays into a file and into stdout as well, with exit code 0", async () => {
  await using at = await box();
  for (const url of ["file:out.jsonl", "stdout:"]) {
    const running = at.start(relayTo(url));
    await at.enqueue({ value: "seen" });
    if (url === "stdout:") await running.until((line) => line.includes("seen"));
    else await until(async () => (await at.status()).outbox.pending === 0);
    const { code, stdout, stderr } = await running.stop("SIGTERM");
    assertEquals(code, 0);
    assertSays(stdout + stderr, ["stopped: 1 delivered"]);
    assertEquals((await at.status()).outbox.pending, 0);
  }
});

Deno.test("two relays on one outbox: refused under two names with overlapping topics, fine otherwise", async () => {
  await using target = new Target();
  await using at = await box();
  const first = at.start(relayTo(target.url, "--name", "first", "--topics", "a,b", "--json"));
  await first.event("started");
  for (const topics of [["--topics", "b,c"], []]) {
    const ran = await at.run(drainTo(target.url, "--name", "second", ...topics));
    assertFailure(ran, DB, `"first"`, `"second"`);
  }
  const others = [
    at.start(relayTo(target.url, "--name", "second", "--topics", "c", "--json")),
    at.start(relayTo(target.url, "--name", "first", "--topics", "a,b", "--json")),
  ];
  for (const other of others) await other.event("started");
  await at.enqueue(...Array.from({ length: 30 }, (_, i) => ({ id: `${i}`, topic: "abc"[i % 3]!, value: i })));
  await until(() => target.keys().length >= 30);
  for (const running of [first, ...others]) assertEquals((await running.stop()).code, 0);
  assertEquals(target.keys().toSorted(), Array.from({ length: 30 }, (_, i) => `${i}`).toSorted());
  const scopes = at.sql("select scope, count(*) as n from effectonce_effects group by scope order by scope");
  assertEquals(scopes, [{ scope: "first", n: 20 }, { scope: "second", n: 10 }]);
  // Once it has ended, and left nothing behind, another name may follow.
  assertEquals((await at.run(drainTo(target.url, "--name", "third"))).code, 0);
});

Deno.test("a relay that was refused by its target leaves nothing behind: a mistyped --name does not lock the right one out", async () => {
  await using at = await box();
  await at.enqueue({ id: "1", value: 1 });
  assertEquals((await at.run(drainTo("file:out.jsonl"))).code, 0);
  await at.enqueue({ id: "2", value: 2 });
  const mistyped = await at.run(drainTo("file:out.jsonl", "--name", "defualt"));
  assertEquals(mistyped.code, 1);
  assertSays(mistyped.stderr, ["file:out.jsonl", `"default"`, `"defualt"`]);
  const right = await at.run(drainTo("file:out.jsonl"));
  assertEquals([right.code, right.stderr], [0, ""]);
  assertStringIncludes(await Deno.readTextFile(at.path("out.jsonl")), `"id":"2"`);
});

Deno.test("relay --json prints one event a line and nothing else: started first, stopped last", async (t) => {
  await using target = new Target();
  const types = [
    "started",
    "claimed",
    "delivered",
    "retried",
    "parked",
    "uncertain",
    "lease_lost",
    "result_omitted",
    "fenced",
  ];
  const known = [...types, "repaired", "failed", "idle", "stopped"];
  for (const url of [target.url, "file:out.jsonl", "stdout:"]) {
    await t.step(url, async () => {
      await using at = await box();
      await at.enqueue({ id: "1", key: "k", value: 1 });
      const ran = await at.run(drainTo(url, "--json"));
      assertEquals(ran.code, 0);
      // The messages themselves have stdout: their events are on stderr.
      const [said, other] = url === "stdout:" ? [ran.stderr, ran.stdout] : [ran.stdout, ran.stderr];
      assertEquals(other === "", url !== "stdout:");
      const events = eventsOf({ ...ran, stdout: said });
      for (const { type, relay } of events) assertEquals([known.includes(type), relay], [true, "default"], type);
      const [started, stopped] = [events[0]!, events.at(-1)!];
      assertEquals([started.type, started.relay, started.from], ["started", "default", DB]);
      assertEquals(Object.keys(started.guarantee as object).slice(0, 3), ["level", "protocol", "reasons"]);
      assertEquals(stopped, { type: "stopped", relay: "default", delivered: 1, parked: 0, uncertain: 0 });
      const { type, id, topic, key, attempt, ms, found } = events.find(({ type }) => type === "delivered")!;
      assertEquals([type, id, topic, key, attempt, found], ["delivered", "1", "orders", "k", 1, false]);
      assertEquals(typeof ms, "number");
      assertEquals(events.filter(({ type }) => type === "claimed").length, url === "stdout:" || url === target.url ? 1 : 0);
    });
  }
});

Deno.test("exit codes: a parked message is 1 with --drain for the run that parked it, and 0 for the next and for a relay that runs on", async () => {
  await using target = new Target();
  await using at = await box();
  target.answer = () => new Response("why", { status: 400 });
  await at.enqueue({ id: "1", value: 1 });
  assertEquals((await at.run(drainTo(target.url))).code, 1);
  assertEquals((await at.run(drainTo(target.url))).code, 0);
  await at.enqueue({ id: "2", value: 2 });
  const running = at.start(relayTo(target.url, "--json"));
  await running.event("parked");
  assertEquals((await running.stop()).code, 0);
});

Deno.test("--topics takes only these, and each message once, even if a topic is named twice or with a space", async (t) => {
  for (const topics of ["a,b", "a,a,b", "a, b"]) {
    for (const url of ["file:out.jsonl", "stdout:"]) {
      await t.step(`${topics} into ${url}`, async () => {
        await using at = await box();
        await at.enqueue(...["a", "b", "c", "a", "b", "c"].map((topic, i) => ({ id: `${i}`, topic, value: i })));
        const ran = await at.run(drainTo(url, "--topics", topics, "--lanes", "1"));
        // A space may also be refused: what it must not do is to wait for a topic " b" without a word.
        if (ran.code === 2) return assertUsage(ran, "--topics");
        const text = url === "stdout:" ? ran.stdout : await Deno.readTextFile(at.path("out.jsonl"));
        const ids = text.trimEnd().split("\n").map((line) => JSON.parse(line)).filter(({ id }) => id !== undefined).map((
          { id },
        ) => id);
        assertEquals(ids.toSorted(), ["0", "1", "3", "4"]);
        assertEquals((await at.status()).outbox.pending, 2);
      });
    }
  }
});

Deno.test("prune keeps effects of messages in an outbox elsewhere: that of --from, or those of the file's relays", async () => {
  await using target = new Target();
  await using at = await box();
  target.answer = ({ key }) => new Response("why", { status: key.startsWith("bad") ? 400 : 200 });
  for (const store of ["sqlite:claims.db", "sqlite:second.db"]) await at.ok(["init", "--store", store]);
  const claims = ["--store", "sqlite:claims.db"];
  await at.enqueue({ id: "good", value: 1 }, { id: "bad", value: 1 });
  assertEquals((await at.run(drainTo(target.url, ...claims))).code, 1);
  await at.ok(["enqueue", "--store", "sqlite:second.db", "--topic", "t", "--id", "bad-2", "--value", "1"]);
  const second = ["relay", "--from", "sqlite:second.db", "--to", target.url, "--drain", "--name", "second"];
  assertEquals((await at.run([...second, ...claims])).code, 1);
  const file = { relays: { default: {}, second: { from: "sqlite:second.db" } } };
  const shared = { from: DB, to: target.url, store: "sqlite:claims.db" };
  for (const relay of Object.values(file.relays)) Object.assign(relay, { ...shared, ...relay });
  await Deno.writeTextFile(at.path("relays.json"), JSON.stringify(file));
  const left = async () => (await at.json(["effects", "list", ...claims]) as { key: string }[]).map(({ key }) => key);
  const old = ["--older-than-ms", "0"];

  assertEquals(await at.json(["prune", "--config", "relays.json"]), { effects: 0, messages: 0 }, "not within a week");
  assertEquals(await at.json(["prune", "--config", "relays.json", ...old]), { effects: 1, messages: 0 });
  assertEquals(await left(), ["bad", "bad-2"]);
  assertEquals(await at.json(["prune", ...claims, "--from", "sqlite:second.db", ...old]), { effects: 1, messages: 0 });
  assertEquals(await left(), ["bad-2"]);
  assertEquals(await at.json(["prune", ...claims, ...old]), { effects: 1, messages: 0 }, "the naive way shows no fault");
  // However the file spells it, it is one database; and that of --from is only looked into.
  await Deno.mkdir(at.path("w"));
  file.relays.second = { ...file.relays.second, store: "sqlite:w/../claims.db?driver=node" } as typeof file.relays.second;
  await Deno.writeTextFile(at.path("relays.json"), JSON.stringify(file));
  for (const key of ["bad", "bad-2", "old"]) {
    const insert = `insert into effectonce_effects (scope, key, changed_ms) values ('x', '${key}', 0)`;
    sqlOn(at.path("claims.db"), insert);
    sqlOn(at.path("second.db"), insert.replace("'bad-2'", "'own'"));
  }
  assertEquals(await at.json(["prune", "--config", "relays.json", ...old]), { effects: 1, messages: 0 });
  assertEquals(await left(), ["bad", "bad-2"]);
  assertEquals(await at.json(["prune", ...claims, "--from", "sqlite:second.db", ...old]), { effects: 1, messages: 0 });
  assertEquals(sqlOn(at.path("second.db"), "select key from effectonce_effects").length, 3);
  assertUsage(await at.run(["prune", "--config", "relays.json", ...claims]), "--config", "excludes --store");
  for (const wrong of [["--from", "sqlite:none.db", ...claims], ["--config", "none.json"]]) {
    assertFailure(await at.run(["prune", ...wrong]), wrong[1]!, "does not exist");
  }
});

Deno.test("--keep keeps delivered rows until prune, and prune forgets what is old enough and ended", async () => {
  await using target = new Target();
  await using at = await box();
  target.answer = ({ key }) => new Response("why", { status: key === "bad" ? 400 : key === "doubt" ? 500 : 200 });
  await at.enqueue(...["1", "2", "bad", "doubt"].map((id) => ({ id, value: id })));
  assertEquals((await at.run(drainTo(target.url, "--keep"))).code, 1);
  const states = () =>
    at.sql("select id, state from effectonce_outbox order by seq").map(({ id, state }) => `${id} ${state}`);
  assertEquals(states(), ["1 delivered", "2 delivered", "bad parked", "doubt parked"]);
  assertEquals(Object.values((await at.status()).outbox), [0, 0, 2, null]);
  assertEquals(await at.json(["prune", "--store", DB]), { effects: 0, messages: 0 }, "not within a week");
  // A refusal is kept as long as its message is there: else it would be sent anew.
  assertEquals(await at.json(["prune", "--store", DB, "--older-than-ms", "0"]), { effects: 2, messages: 2 });
  assertEquals(await at.ok(["prune", "--store", DB, "--older-than-ms", "0"]), "pruned 0 effects and 0 messages\n");
  assertEquals(states(), ["bad parked", "doubt parked"]);
  assertEquals((await at.status()).effects, { ...NO_EFFECTS, rejected: 1, uncertain: 1 });
  await at.enqueue({ id: "3", value: 3 });
  assertEquals(
    (await at.run(drainTo("file:out.jsonl", "--keep", "--name", "file"))).code,
    1,
    "the other relay left something behind",
  );
});

Deno.test("the guarantee is printed at the start, with its reason, and doctor says the same", async (t) => {
  await using target = new Target();
  await using at = await box();
  const cases: [string[], string, string][] = [
    [[target.url], "at-most-once (claimed)", "not declared to dedupe"],
    [[target.url, "--idempotent"], "effectively-once (claimed)", "dedupe by idempotency key"],
    [[target.url, "--reconcile", `${target.url}/{id}`], "at-most-once (claimed)", "the target is asked"],
    [["file:out.jsonl"], "exactly-once (sealed)", "commits its position"],
    [["stdout:"], "at-least-once (plain)", "sent again"],
    [[target.url, "--allow-duplicates"], "at-least-once (plain)", "sent again"],
  ];
  for (const [[url, ...flags], level, reason] of cases) {
    await t.step([url, ...flags].join(" "), async () => {
      const { stdout, stderr } = await at.run(drainTo(url!, ...flags));
      const [first, second] = (url === "stdout:" ? stderr : stdout).split("\n");
      assertSays(first!, [`relay "default": ${DB} -> `]);
      assert(second!.startsWith(`${level}, because `), second);
      assertSays(second!, [reason]);
      const doctor = await at.ok(["doctor", "--from", DB, "--to", url!, ...flags]);
      assertSays(doctor, [level.replace("(", "(protocol: "), reason]);
      const { level: said, protocol } = await at.json(["doctor", "--from", DB, "--to", url!, ...flags]) as Record<
        string,
        string
      >;
      assertEquals(`${said} (${protocol})`, level);
    });
  }
});

Deno.test(
  "on a terminal the relay shows a live line, and with --drain a bar",
  { ignore: !await has("script") },
  async () => {
    await using target = new Target();
    await using at = await box();
    await at.enqueue(...Array.from({ length: 4 }, (_, i) => ({ id: `${i}`, key: "k", value: i })));
    const cli = new URL("../cli.ts", import.meta.url).pathname;
    const line = [Deno.execPath(), "run", "-A", "--quiet", cli, ...drainTo(target.url)].join(" ");
    const release = Promise.withResolvers<void>();
    target.answer = async ({ key }) => {
      if (key === "2") await release.promise;
      return new Response("paid");
    };
    const args = ["-q", "-f", "-e", "-c", line, "/dev/null"];
    const child = new Deno.Command("script", { args, cwd: at.folder, stdin: "null", stdout: "piped", stderr: "null" })
      .spawn();
    let text = "";
    for await (const part of child.stdout.pipeThrough(new TextDecoderStream())) {
      text += part;
      if (/2 pending/.test(text)) release.resolve();
    }
    assertEquals((await child.status).code, 0);
    assertMatch(text, /\[#{10}\.{10}\] 50 % · \d+\/s · 2 pending · 0 parked · 0 in doubt · oldest \d+ s/);
    assertMatch(text, /stopped: 4 delivered, 0 parked meanwhile, 0 in doubt meanwhile\r?\n/);
  },
);

// ------------------------------------------------------------------------------------------ the outbox as a public contract

/** Rows that another program may insert, and that this package would not. */
const ROWS: readonly (readonly [what: string, sql: string])[] = [
  ["an id of 1100 bytes", `insert into effectonce_outbox (id, topic, value) values ('${"x".repeat(1100)}', 't', 'odd')`],
  ["an id with a zero byte", `insert into effectonce_outbox (id, topic, value) values ('a' || char(0) || 'b', 't', 'odd')`],
  ["an id of bytes", `insert into effectonce_outbox (id, topic, value) values (x'ff00', 't', 'odd')`],
  ["an id that is a number", `insert into effectonce_outbox (id, topic, value) values (7, 't', 'odd')`],
  ["a topic of 5000 bytes", `insert into effectonce_outbox (topic, value) values ('${"t".repeat(5000)}', 'odd')`],
  ["an empty key", `insert into effectonce_outbox (topic, key, value) values ('t', '', 'odd')`],
  ["a key with a zero byte", `insert into effectonce_outbox (topic, key, value) values ('t', 'a' || char(0), 'odd')`],
  ["a key of bytes", `insert into effectonce_outbox (topic, key, value) values ('t', x'ff', 'odd')`],
  ["a number as value", `insert into effectonce_outbox (topic, value) values ('t', 5.5)`],
  [
    "headers that are no texts",
    `insert into effectonce_outbox (topic, value, headers) values ('t', 'odd', '{"a":5,"b":null,"c":{"d":1}}')`,
  ],
  ["a time that is none", `insert into effectonce_outbox (topic, value, created_at) values ('t', 'odd', 'yesterday')`],
];

Deno.test("a plain INSERT: the database refuses the row, or the relay delivers or parks it, and goes on with the others", async (t) => {
  for (const [what, insert] of ROWS) {
    await t.step(what, async () => {
      await using target = new Target();
      await using at = await box();
      try {
        at.sql(insert);
      } catch {
        return; // Refused: whoever writes it hears of it.
      }
      await at.enqueue({ id: "good", value: 1 });
      const ran = await at.run(drainTo(target.url, ...QUICK, "--attempts", "3"));
      assert(ran.code === 0 || ran.code === 1, ran.stderr);
      assertEquals(target.keys().filter((key) => key === "good").length, 1, `the row stops the relay: ${ran.stderr}`);
      assertEquals(ran.stderr, "");
      assertEquals((await at.status()).outbox.pending, 0);
      assertNothingLost(at, 2);
    });
  }
  for (const [what, insert] of ROWS) {
    await t.step(`${what}, into a file by node:sqlite`, async () => {
      await using at = await box();
      try {
        at.sql(insert);
      } catch {
        return;
      }
      await at.enqueue({ id: "good", value: 1 });
      const line = ["relay", "--from", `${DB}?driver=node`, "--to", "file:out.jsonl", "--drain"];
      const ran = await at.run(line, { deadlineMs: 2_000 });
      assertSays(await Deno.readTextFile(at.path("out.jsonl")).catch(() => ""), [`"id":"good"`]);
      const { pending, parked } = (await at.status()).outbox;
      assertEquals(
        [pending, ran.code],
        [0, parked],
        `exit code ${ran.code}, ${ran.stdout.split("\n").length} lines, ${ran.stderr}`,
      );
    });
  }
});

Deno.test("a value that another program inserted as text arrives byte for byte, a zero byte included", async (t) => {
  for (const driver of ["", "?driver=node"]) {
    await t.step(driver || "?driver=better-sqlite3", async () => {
      await using at = await box();
      at.sql(`insert into effectonce_outbox (id, topic, value) values ('1', 't', 'a' || char(0) || 'ü')`);
      const { stdout } = await at.run(["relay", "--from", `${DB}${driver}`, "--to", "stdout:", "--drain"]);
      assertEquals(JSON.parse(stdout).value, "a\0ü");
    });
  }
});
