/** What a relay answers over HTTP: whether it is alive, whether it is ready, and its metrics. */
import { assert, assertEquals, assertMatch } from "@std/assert";
import { DatabaseSync } from "node:sqlite";
import { exposition, Metrics } from "../cli/metrics.ts";
import { Progress } from "../cli/progress.ts";
import type { RelayEvent } from "../mod.ts";
import {
  assertFailure,
  assertSays,
  assertUsage,
  type Box,
  box,
  DB,
  deadUrl,
  drainTo,
  QUICK,
  relayTo,
  type Running,
  Target,
  until,
} from "./cli_run.ts";

const LISTEN = ["--listen", "127.0.0.1:0"];

/** Starts a relay that listens. */
async function listening(at: Box, args: readonly string[]): Promise<{ readonly running: Running; readonly url: string }> {
  const running = at.start([...args, ...LISTEN]);
  return { running, url: await running.listening() };
}

interface Answer {
  readonly status: number;
  readonly text: string;
  readonly headers: Headers;
}
async function get(url: string, method = "GET"): Promise<Answer> {
  const response = await fetch(url, { method });
  return { status: response.status, text: await response.text(), headers: response.headers };
}
/** Asks whether it is ready until it says what is expected; answers what else it says. */
async function untilReady(url: string, expected: 200 | 503): Promise<string> {
  let answer: Answer | undefined;
  await until(async () => (answer = await get(`${url}/ready`)).status === expected);
  return answer!.text;
}

// ------------------------------------------------------------------------------------------------- the exposition format

/** The samples of a family, by their names and labels as they are written. */
interface Family {
  readonly help: string;
  readonly type: string;
  readonly samples: ReadonlyMap<string, number>;
}

/**
 * Reads the text format 0.0.4 and accepts nothing that any reader could refuse: each family in one piece with HELP and TYPE, each
 * sample once, names and label values as they must be, whole histograms.
 */
function parse(text: string): ReadonlyMap<string, Family> {
  assert(text.endsWith("\n") && !text.includes("\r"), "lines end with a line feed");
  const families = new Map<string, { help: string; type: string; samples: Map<string, number> }>();
  let name = "";
  for (const line of text.slice(0, -1).split("\n")) {
    const help = /^# HELP ([a-zA-Z_:][a-zA-Z0-9_:]*) (\S.*)$/.exec(line);
    if (help) {
      name = help[1]!;
      assert(!families.has(name), `${name} is in two pieces`);
      families.set(name, { help: help[2]!, type: "", samples: new Map() });
      continue;
    }
    const family = families.get(name);
    const type = /^# TYPE (\S+) (counter|gauge|histogram)$/.exec(line);
    if (type) {
      assertEquals([type[1], family?.type, family?.samples.size], [name, "", 0], line);
      family!.type = type[2]!;
      continue;
    }
    const sample = /^([a-zA-Z_:][a-zA-Z0-9_:]*)\{((?:[a-z_]\w*="(?:[^"\\\n]|\\["\\n])*"(?:,(?!\})|(?=\})))+)\} (\S+)$/.exec(
      line,
    );
    assert(sample && family && family.type !== "", `not a sample of a family: ${line}`);
    const [, full, labels, value] = sample;
    const suffix = full!.slice(name.length);
    assert(full!.startsWith(name) && (family.type === "histogram" ? /^_(bucket|sum|count)$/ : /^$/).test(suffix), line);
    assertMatch(value!, /^(\d+(\.\d+)?(e-\d+)?)$/, "neither below 0 nor without a value");
    const key = `${full}{${labels}}`;
    assert(!family.samples.has(key), `${key} is there twice`);
    family.samples.set(key, Number(value));
  }
  for (const [name, { help, type, samples }] of families) {
    assert(help.length > 10 && samples.size > 0, name);
    assertEquals(/_total$/.test(name), type === "counter", `${name} is a ${type}`);
    assertMatch(name, /^effectonce_[a-z_]+$/);
    if (type === "histogram") assertHistogram(name, samples);
  }
  const plain = [...families.keys()].map((name) => name.replace(/_total$/, ""));
  assertEquals(new Set(plain).size, plain.length, "in OpenMetrics a counter and a gauge of one name are the same family");
  return families;
}

function assertHistogram(name: string, samples: ReadonlyMap<string, number>): void {
  const series = Map.groupBy(samples, ([key]) => /relay="(?:[^"\\]|\\.)*"/.exec(key)![0]);
  for (const [label, own] of series) {
    const buckets = own.filter(([key]) => key.startsWith(`${name}_bucket{`));
    const bounds = buckets.map(([key]) => /,le="([^"]+)"\}$/.exec(key)![1]!);
    assertEquals(bounds.at(-1), "+Inf");
    const numbers = bounds.map((bound) => bound === "+Inf" ? Infinity : Number(bound));
    assertEquals(numbers, numbers.toSorted((a, b) => a - b));
    const counts = buckets.map(([, count]) => count);
    assertEquals(counts, counts.toSorted((a, b) => a - b), "buckets add up");
    assertEquals(samples.get(`${name}_count{${label}}`), counts.at(-1));
    assert(samples.has(`${name}_sum{${label}}`));
    assertEquals(own.length, buckets.length + 2);
  }
}

/** Asks for the metrics; answers how to look one up, of the only relay or by its name. */
async function scrape(url: string): Promise<(name: string, relay?: string) => number | undefined> {
  const { status, text, headers } = await get(`${url}/metrics`);
  assertEquals([status, headers.get("content-type")], [200, "text/plain; version=0.0.4; charset=utf-8"]);
  const families = parse(text);
  return (name, relay = "default") => {
    const family = [...families].find(([family]) => name === family || name.startsWith(`${family}_`));
    return family?.[1].samples.get(`${name}{relay="${relay}"}`);
  };
}

// ------------------------------------------------------------------------------------------------------------- the server

Deno.test("/live, /ready and /metrics; else 404, another method 405; the server stops with the relay", async (t) => {
  await using target = new Target();
  await using at = await box();
  const { running, url } = await listening(at, relayTo(target.url));
  await untilReady(url, 200);
  for (const [path, text] of [["/live", "live\n"], ["/ready", "ready\n"], ["/ready?probe=1", "ready\n"]]) {
    await t.step(path!, async () => {
      const { status, text: said, headers } = await get(url + path);
      assertEquals([status, said, headers.get("content-type")], [200, text, "text/plain; charset=utf-8"]);
      assertEquals((await get(url + path, "HEAD")).status, 200);
    });
  }
  for (const path of ["/", "/live/", "/metric", "/constructor", "//ready"]) {
    await t.step(`404 ${path}`, async () => assertEquals((await get(url + path)).status, 404));
  }
  for (const method of ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"]) {
    await t.step(`405 ${method}`, async () => {
      for (const path of ["/live", "/ready", "/metrics"]) {
        const { status, headers } = await get(url + path, method);
        assertEquals([status, headers.get("allow")], [405, "GET, HEAD"]);
      }
    });
  }
  await t.step("somebody who does not finish asking does not keep it from stopping", async () => {
    using half = await Deno.connect({ hostname: "127.0.0.1", port: Number(new URL(url).port) });
    await half.write(new TextEncoder().encode("GET /metrics HTTP/1.1\r\nHost: x\r\n"));
    const { code, stderr } = await running.stop("SIGTERM");
    assertEquals([code, stderr], [0, `listening on ${url}\n`]);
  });
  await t.step("it is gone", async () => {
    assert(await fetch(`${url}/live`).then(() => false, () => true));
  });
});

Deno.test("where to listen: a host and a port, or a port of this machine alone", async (t) => {
  await using at = await box();
  const bad = [
    "",
    "x",
    "localhost",
    "1.2.3.4",
    "localhost:",
    ":",
    "65536",
    ":99999",
    "-1",
    "http://127.0.0.1:80",
    "::1:80",
    "a b:80",
    "[::1]",
    "80:",
  ];
  for (const [i, ran] of (await at.many(bad.map((text) => drainTo("stdout:", "--listen", text)))).entries()) {
    await t.step(JSON.stringify(bad[i]), () => assertUsage(ran, "--listen must be HOST:PORT"));
  }
  for (
    const [text, host] of [["0", "127.0.0.1"], [":0", "127.0.0.1"], ["localhost:0", "localhost"], ["0.0.0.0:0", "0.0.0.0"]]
  ) {
    await t.step(text!, async () => {
      const running = at.start(relayTo("stdout:", "--listen", text!));
      const url = new URL(await running.listening());
      assertEquals(url.hostname, host);
      assertEquals((await get(`http://127.0.0.1:${url.port}/live`)).status, 200);
      await running.stop();
    });
  }
  await t.step("with --json the address is an event", async () => {
    const { running, url } = await listening(at, relayTo("stdout:", "--json"));
    const { stderr } = await running.stop();
    const [first, ...rest] = stderr.trimEnd().split("\n").map((line) => JSON.parse(line));
    assertEquals(first, { type: "listening", url });
    assertEquals(rest[0].type, "started");
  });
});

Deno.test("a port in use: exit code 1 and one sentence, before anything is delivered", async () => {
  await using target = new Target();
  await using at = await box();
  await at.enqueue({ id: "1", value: 1 });
  const before = at.content();
  using other = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const ran = await at.run(drainTo(target.url, "--listen", `${other.addr.port}`));
  assertFailure(ran, `Cannot listen on 127.0.0.1:${other.addr.port}: the port is in use`);
  assertEquals([target.asked, at.content()], [[], before]);
  assertFailure(await at.run(drainTo(target.url, "--listen", "192.0.2.1:80")), "Cannot listen on 192.0.2.1:80");
  assertEquals([target.asked, at.content()], [[], before]);
});

// ---------------------------------------------------------------------------------------------------------------- metrics

Deno.test("the counters, gauges and histograms are right after deliveries, retries, refusals and doubts", async () => {
  await using target = new Target();
  await using at = await box();
  target.answer = ({ key }, nth) => {
    if (key.startsWith("bad")) return new Response("why", { status: 400 });
    if (key.startsWith("doubt")) return new Response("why", { status: 500 });
    return new Response("", { status: key.startsWith("slow") && nth < 3 ? 429 : 200 });
  };
  // Enqueued two hours ago, as far as its row tells.
  at.sql(`insert into effectonce_outbox (id, topic, value, created_at)
    values ('old', 'orders', 'x', strftime('%Y-%m-%dT%H:%M:%fZ', 'now', '-7200 seconds'))`);
  at.sql(`insert into effectonce_outbox (id, topic, value, created_at) values ('timeless', 'orders', 'x', 'yesterday')`);
  const ids = [...Array.from({ length: 20 }, (_, i) => `good${i}`), "slow1", "slow2", "bad1", "bad2", "bad3", "doubt1"];
  await at.enqueue(...ids.map((id) => ({ id, value: 1 })), { id: "bad4", key: "k", value: 1 }, {
    id: "held",
    key: "k",
    value: 2,
  });
  const { url } = await listening(at, relayTo(target.url, ...QUICK));
  // 24 are delivered, and what is held back behind a parked one stays.
  await until(async () => (await scrape(url))("effectonce_pending") === 1);
  await untilReady(url, 200);
  const of = await scrape(url);
  const counts = [
    "delivered",
    "attempts",
    "retries",
    "parkings",
    "doubts",
    "lease_losses",
    "failures",
    "fenced",
    "repaired_batches",
  ];
  assertEquals(counts.map((name) => [name, of(`effectonce_${name}_total`)]), [
    ["delivered", 24],
    ["attempts", 24 + 4 + 4 + 1],
    ["retries", 4],
    ["parkings", 4],
    ["doubts", 1],
    ["lease_losses", 0],
    ["failures", 0],
    ["fenced", 0],
    ["repaired_batches", 0],
  ]);
  assertEquals(["pending", "parked", "in_doubt", "ready"].map((name) => of(`effectonce_${name}`)), [1, 5, 1, 1]);
  const age = of("effectonce_oldest_pending_age_seconds")!;
  assert(age > 0 && age < 60, `${age} s`);
  assertEquals([of("effectonce_attempt_seconds_count"), of("effectonce_delivery_seconds_count")], [24, 23]);
  const [attempt, delivery] = [of("effectonce_attempt_seconds_sum")!, of("effectonce_delivery_seconds_sum")!];
  assert(attempt > 0 && attempt < 24, `${attempt} s in calls`);
  assert(delivery > 7200 && delivery < 7200 + 24 * 60, `${delivery} s from enqueueing`);
});

Deno.test("a measured time is in the bucket whose upper bound it does not exceed", () => {
  const metrics = new Metrics("r", () => 100_000);
  const of = { relay: "r", id: "1", topic: "t", key: null, attempt: 1, found: false } as const;
  for (const [ms, waitedMs] of [[5, 10], [6, 11], [60_000, 60_000], [60_001, 99_000], [0, -5000]] as const) {
    metrics.event({ type: "delivered", ...of, ms, time: new Date(100_000 - waitedMs) });
  }
  const families = parse(exposition([{ metrics, ready: true, gauges: undefined }]));
  const buckets = (name: string, ...bounds: readonly string[]) =>
    bounds.map((bound) => families.get(name)!.samples.get(`${name}_bucket{relay="r",le="${bound}"}`));
  assertEquals(buckets("effectonce_attempt_seconds", "0.005", "0.01", "30", "60", "+Inf"), [2, 3, 3, 4, 5]);
  assertEquals(buckets("effectonce_delivery_seconds", "0.01", "0.025", "30", "60", "300", "+Inf"), [2, 3, 3, 4, 5, 5]);
  assertEquals(
    families.get("effectonce_attempt_seconds")!.samples.get('effectonce_attempt_seconds_sum{relay="r"}'),
    120.012,
  );
  assert(!families.has("effectonce_pending"), "what could not be counted is left out");
});

Deno.test("a delivery that an earlier run made is counted, but not measured as an attempt", async () => {
  await using target = new Target();
  await using at = await box();
  await at.enqueue({ id: "1", value: 1 });
  await at.run(drainTo(target.url, "--keep"));
  at.sql("update effectonce_outbox set state = 'pending'"); // As if it had been killed before it could settle.
  const { url } = await listening(at, relayTo(target.url));
  await until(async () => (await scrape(url))("effectonce_delivered_total") === 1);
  const of = await scrape(url);
  assertEquals([of("effectonce_attempts_total"), of("effectonce_attempt_seconds_count")], [0, 0]);
  assertEquals([of("effectonce_delivery_seconds_count"), target.keys()], [1, ["1"]]);
});

Deno.test("several relays: each has its label, escaped; one that is not ready is named; a sealed one counts attempts as well", async () => {
  await using target = new Target();
  await using at = await box();
  target.answer = () => new Response("", { status: 429 });
  const odd = 'we"ird\\na\nme é';
  await Deno.writeTextFile(
    at.path("effectonce.json"),
    JSON.stringify({
      listen: "127.0.0.1:0",
      relays: {
        [odd]: { from: DB, to: "file:out.jsonl", topics: ["a"] },
        billing: { from: DB, to: target.url, topics: ["b"], minRetryMs: 1, maxRetryMs: 5, attempts: 100_000, readyMs: 300 },
      },
    }),
  );
  const running = at.start(["relay", "--config", "effectonce.json"]);
  const url = await running.listening();
  assertEquals(await untilReady(url, 200), "ready\n");
  await at.enqueue(...Array.from({ length: 5 }, (_, i) => ({ id: `a${i}`, topic: "a", value: i })), {
    id: "b",
    topic: "b",
    value: 1,
  });
  const label = 'we\\"ird\\\\na\\nme é';
  await until(async () => (await scrape(url))("effectonce_delivered_total", label) === 5);
  const complaint = await untilReady(url, 503);
  assertMatch(
    complaint,
    /^relay "billing" has delivered nothing for \d+ m?s although there is work; the last error: POST .* answered 429\n$/,
  );
  // A gauge is as old as its cache.
  await until(async () => (await scrape(url))("effectonce_pending", label) === 0);
  const of = await scrape(url);
  assertEquals([of("effectonce_attempts_total", label), of("effectonce_delivery_seconds_count", label)], [5, 5]);
  assertEquals([of("effectonce_ready", label), of("effectonce_ready", "billing")], [1, 0]);
  assertEquals([of("effectonce_pending", "billing"), of("effectonce_delivered_total", "billing")], [1, 0]);
  assert(of("effectonce_retries_total", "billing")! > 0);
  target.answer = () => new Response("paid");
  assertEquals(await untilReady(url, 200), "ready\n");
  assertEquals((await running.stop()).code, 0);
});

Deno.test("effects in doubt are counted by relay, however many there are", async () => {
  await using at = await box();
  at.sql(`with recursive n(i) as (select 1 union all select i + 1 from n where i < 2500)
    insert into effectonce_effects (scope, key, state, until_ms, changed_ms)
    select case when i <= 2100 then 'default' else 'other' end, 'k' || i, 'uncertain', 1, 1 from n`);
  const { url } = await listening(at, relayTo("stdout:"));
  await until(async () => (await scrape(url))("effectonce_in_doubt") === 2100);
});

// -------------------------------------------------------------------------------------------------------------- readiness

Deno.test("a target that hangs: not ready after --ready-ms; ready again once it answers", async () => {
  await using target = new Target();
  await using at = await box();
  const release = Promise.withResolvers<void>();
  target.answer = async () => {
    await release.promise;
    return new Response("paid");
  };
  const { running, url } = await listening(at, relayTo(target.url, "--ready-ms", "400"));
  await untilReady(url, 200);
  await at.enqueue({ id: "1", value: 1 });
  assertMatch(await untilReady(url, 503), /^relay "default" has delivered nothing for \d+ m?s although there is work\n$/);
  assertEquals((await get(`${url}/live`)).status, 200, "it is alive all the same");
  release.resolve();
  assertEquals(await untilReady(url, 200), "ready\n");
  assertEquals((await running.stop()).code, 0);
});

Deno.test("a target that is down: not ready, with the last error; ready again once it is up", async () => {
  await using at = await box();
  const { hostname, port } = new URL(deadUrl());
  const flags = ["--ready-ms", "400", "--attempts", "100000", "--min-retry-ms", "20", "--max-retry-ms", "50"];
  const { running, url } = await listening(at, relayTo(`http://${hostname}:${port}/charge`, ...flags));
  await untilReady(url, 200);
  await at.enqueue({ id: "1", key: "k", value: 1 }, { id: "2", key: "k", value: 1 });
  const complaint = await untilReady(url, 503);
  assertMatch(
    complaint,
    /has delivered nothing for \d+ m?s although there is work; the last error: POST http.*could not be reached[^\n]*\n$/,
  );
  const server = Deno.serve({ hostname, port: Number(port), onListen: () => {} }, () => new Response("paid"));
  assertEquals(await untilReady(url, 200), "ready\n");
  assertEquals((await running.stop()).code, 0);
  await server.shutdown();
});

Deno.test("what is parked, and what waits behind it, is not the relay's work: it stays ready", async () => {
  await using target = new Target();
  await using at = await box();
  target.answer = () => new Response("why", { status: 400 });
  const { url } = await listening(at, relayTo(target.url, "--ready-ms", "1"));
  await at.enqueue({ id: "1", key: "k", value: 1 }, { id: "2", key: "k", value: 2 });
  await until(async () => (await scrape(url))("effectonce_parkings_total") === 1);
  await untilReady(url, 200);
  // For far longer than the limit.
  const from = performance.now();
  await until(async () => {
    assertEquals((await get(`${url}/ready`)).status, 200);
    return performance.now() - from > 200;
  });
  assertEquals((await at.status()).outbox.pending, 1);
});

Deno.test("not ready before the start has finished, nor while the relay is told to stop", async () => {
  await using target = new Target();
  await using at = await box();
  const release = Promise.withResolvers<void>();
  target.answer = async () => {
    await release.promise;
    return new Response("paid");
  };
  // Nobody can write, so the relay cannot register.
  const other = new DatabaseSync(at.path("app.db"));
  other.exec("begin immediate");
  const { running, url } = await listening(at, relayTo(target.url));
  assertEquals(await untilReady(url, 503), 'relay "default" has not started yet\n');
  parse((await get(`${url}/metrics`)).text);
  other.exec("commit");
  other.close();
  await untilReady(url, 200);
  await at.enqueue({ id: "1", value: 1 });
  await until(() => target.keys().length === 1);
  running.kill("SIGTERM");
  assertEquals(await untilReady(url, 503), "the relay is stopping\n");
  assertEquals((await get(`${url}/live`)).status, 200);
  release.resolve();
  assertEquals((await running.ended()).code, 0);
});

Deno.test("a relay that stands by is not ready until it takes over", async () => {
  await using at = await box();
  const line = relayTo("file:out.jsonl", ...QUICK);
  const first = await listening(at, line);
  await untilReady(first.url, 200);
  const second = await listening(at, line);
  let complaint = "";
  await until(async () => (complaint = (await get(`${second.url}/ready`)).text).includes("stands by"));
  assertSays(complaint, [/^relay "default" stands by: .*another relay has it\n$/]);
  const of = await scrape(second.url);
  assert(of("effectonce_fenced_total")! > 0);
  assertEquals(of("effectonce_ready"), 0);
  assertEquals((await first.running.stop()).code, 0);
  await untilReady(second.url, 200);
  await at.enqueue({ id: "1", value: 1 });
  await until(async () => (await scrape(second.url))("effectonce_delivered_total") === 1);
});

/** Events of a relay, and what is said of it at times of a clock that stands still. */
class Story {
  #now = 1000;
  readonly #progress = new Progress(1000, () => this.#now);
  at(ms: number, ...events: readonly (string | readonly [type: string, more: object])[]): this {
    this.#now = 1000 + ms;
    for (const event of events) {
      const [type, more] = typeof event === "string" ? [event, {}] : event;
      const message = /^(started|idle|failed|fenced|stopped)$/.test(type) ? {} : { id: "1" };
      const rest = { relay: "r", reason: "why", afterMs: 100, ...message, ...more };
      this.#progress.event({ type, ...rest } as unknown as RelayEvent);
    }
    return this;
  }
  is(ready: boolean, ms: number): this {
    this.#now = 1000 + ms;
    const complaint = this.#progress.complaint();
    assertEquals(complaint === undefined, ready, `at ${ms} ms: ${complaint}`);
    return this;
  }
}

Deno.test("progress: what an operator expects", async (t) => {
  const story = () => new Story().at(0, "started", "idle");
  await t.step("starting: not before it has read something", () => {
    new Story().is(false, 0).at(0, "started").is(false, 5).at(6, "failed").is(false, 7).at(8, "idle").is(true, 9);
  });
  await t.step("nothing to do", () => {
    story().is(true, 1e9);
  });
  await t.step("deliveries, however long ago, and nothing left", () => {
    story().at(10, "claimed", "delivered", "idle").is(true, 1e9);
    // Nobody may have asked meanwhile.
    story().at(10, "claimed", "delivered", "idle").at(5000, "claimed").is(true, 5999).is(false, 6000);
  });
  await t.step("work that is never delivered", () => {
    story().at(10, "claimed").is(true, 1000).is(false, 1010);
  });
  await t.step("each delivery gives it time", () => {
    story().at(10, "claimed").at(900, "delivered").is(true, 1800).is(false, 1900);
  });
  await t.step("refusals are no progress while there is more", () => {
    const all = story();
    for (let ms = 0; ms < 2000; ms += 100) all.at(ms, ["claimed", { id: `${ms}` }], ["parked", { id: `${ms}` }]);
    all.is(false, 2000).at(2001, "idle").is(true, 2002);
  });
  await t.step("doubts are none either", () => {
    story().at(10, "claimed", "uncertain").is(false, 2000).at(2001, "idle").is(true, 2002);
  });
  await t.step("a message that waits is no work, unless its attempts go on failing", () => {
    story().at(10, "claimed", ["retried", { afterMs: 3_600_000 }], "idle").is(true, 3_000_000);
    story().at(10, "claimed", "retried", "idle").at(500, "claimed", "retried", "idle").is(true, 600)
      .at(1010, "claimed", "retried", "idle").is(false, 1011).at(1100, "claimed", "delivered", "idle").is(true, 1e9);
  });
  await t.step("one that is parked in the end was the work", () => {
    story().at(10, "claimed", "retried", "idle").at(1010, "claimed", "retried", "idle").is(false, 1050)
      .at(1100, "claimed", "parked", "idle").is(true, 1101);
  });
  await t.step("one that waited and is nobody's any more: another relay took it", () => {
    story().at(10, "claimed", "retried", "idle").at(1010, "claimed", "retried", "idle").is(false, 1050).is(true, 3000);
  });
  await t.step("many that wait: the rest counts while one is left", () => {
    const all = story();
    for (let i = 0; i < 20_000; i++) all.at(10, ["retried", { id: `${i}` }]);
    all.at(11, "idle").at(1500, ["claimed", { id: "19999" }], ["retried", { id: "19999" }], "idle").is(false, 1501);
  });
  await t.step("a database that is away", () => {
    story().at(10, "failed").is(true, 500).is(false, 1500).at(1600, "idle").is(true, 1601);
  });
  await t.step("standing by", () => {
    story().at(10, "fenced").is(false, 11).at(20, "idle").is(true, 21).at(30, "fenced").at(40, "delivered").is(true, 41);
  });
  await t.step("ended", () => {
    story().at(10, "claimed", "stopped").is(true, 1e9);
  });
});
