/**
 * What happens while a relay runs: its disk gets full, its database is removed or replaced, its clock jumps. Each time the real
 * command line, or real relays, on real files; afterwards everything that was sent is counted.
 */
import { assert, assertEquals, assertMatch, assertRejects, assertStringIncludes } from "@std/assert";
import { fileSink } from "../adapters/file.ts";
import { httpSink } from "../adapters/http.ts";
import { migrateSqlite, sqliteOutbox, sqliteStore } from "../adapters/sqlite.ts";
import { relay, type RelayEvent } from "../mod.ts";
import { type Client, type Driver, drivers } from "./acceptance_child.ts";
import {
  assertFailure,
  assertNothingLost,
  assertSentence,
  Box,
  DB,
  drainTo,
  type Given,
  QUICK,
  relayTo,
  Running,
  Target,
  until,
} from "./cli_run.ts";

/** A folder with an initialised database. */
async function box(): Promise<Box> {
  const made = new Box(await Deno.makeTempDir({ prefix: "effectonce-faults-" }));
  const client = drivers["node:sqlite"](made.path("app.db"));
  await migrateSqlite(client);
  client.close();
  return made;
}

/** Runs SQL as another program would, which waits for its turn; answers all rows. */
function sql(at: Box, statement: string): Record<string, unknown>[] {
  const client = drivers["node:sqlite"](at.path("app.db"));
  try {
    client.exec("pragma busy_timeout = 5000");
    return client.prepare(statement).all().map((row) => ({ ...row as Record<string, unknown> }));
  } finally {
    client.close();
  }
}

/** Puts messages into the outbox, as another program would; `key`: the order in which they must go. */
function put(at: Box, ids: readonly string[], valueBytes = 10, key: string | null = null): void {
  const value = `'"${"x".repeat(valueBytes - 2)}"'`;
  const rows = ids.map((id) => `('${id}', 'orders', ${key === null ? "null" : `'${key}'`}, ${value})`);
  sql(at, `insert into effectonce_outbox (id, topic, key, value) values ${rows.join(", ")}`);
}

/** How a relay ended by itself; one that runs on is killed. */
async function endOf(running: Running): Promise<Awaited<ReturnType<Running["ended"]>>> {
  const late = setTimeout(() => running.kill("SIGKILL"), 20_000);
  try {
    return await running.ended();
  } finally {
    clearTimeout(late);
  }
}

const numbered = (from: number, to: number) => Array.from({ length: to - from }, (_, i) => `m${from + i}`);

/** The ids in a file of ours, in its order; every line must be whole. */
async function idsIn(path: string): Promise<string[]> {
  const text = await Deno.readTextFile(path);
  assert(text.endsWith("\n"), "its last line is torn");
  return text.trimEnd().split("\n").map((line) => JSON.parse(line)).filter((line) => "id" in line).map(({ id }) => id);
}

/** No message was sent twice, and each that was sent is known as done or in doubt. */
function assertSentOnce(at: Box, target: Target): void {
  const keys = target.keys();
  assertEquals(keys.length, new Set(keys).size, `sent twice: ${keys.filter((key, i) => keys.indexOf(key) !== i)}`);
  const known = sql(at, "select key from effectonce_effects where state in ('done', 'uncertain')").map(({ key }) => key);
  assertEquals(keys.filter((key) => !known.includes(key)), [], "sent, and nobody knows of it");
}

// -------------------------------------------------------------------------------------------------------------- full disk

const setFull = (client: Client, full: boolean) => client.exec(`pragma max_page_count = ${full ? 1 : 1_000_000}`);

for (const driver of Object.keys(drivers) as Driver[]) {
  Deno.test(`${driver}: a full database ends a draining relay with a sentence; nothing is lost or sent twice, and it goes on once there is room`, async () => {
    await using target = new Target();
    // Large answers, so that recording them needs room.
    target.answer = () => new Response("paid ".repeat(600));
    await using at = await box();
    const client = drivers[driver](at.path("app.db"));
    try {
      put(at, numbered(0, 60));
      const run = (observe?: (event: RelayEvent) => void) =>
        relay({
          ...{
            from: sqliteOutbox(client, { name: "sqlite:app.db" }),
            store: sqliteStore(client, { name: "sqlite:app.db" }),
          },
          ...{ to: httpSink(target.url), drain: true, leaseMs: 300, attempts: 3, minRetryMs: 1, maxRetryMs: 5, observe },
        });
      let delivered = 0;
      const error = await assertRejects(() =>
        run(({ type }) => {
          if (type === "delivered" && ++delivered === 10) setFull(client, true);
        })
      ) as Error;
      assertEquals(error.message, "Cannot use sqlite:app.db: database or disk is full. Make room on its disk");
      const sent = target.asked.length;
      assert(sent >= 10 && sent < 60, `${sent} were sent`);
      setFull(client, false);
      await run();
      assertSentOnce(at, target);
      assertNothingLost(at, 60);
      assertEquals([target.asked.length, (await sqliteOutbox(client).status()).pending], [60, 0]);
    } finally {
      client.close();
    }
  });
}

Deno.test("a full database holds up a relay into a file, which tells it and goes on once there is room", async () => {
  await using at = await box();
  const client = drivers["node:sqlite"](at.path("app.db"));
  try {
    const ids = numbered(0, 400);
    put(at, ids, 500);
    setFull(client, true);
    const failures: string[] = [];
    const report = await relay({
      ...{ from: sqliteOutbox(client, { name: "sqlite:app.db" }), to: fileSink(at.path("out.jsonl")), drain: true },
      ...{ batch: 200, minRetryMs: 1, maxRetryMs: 5 },
      observe(event) {
        if (event.type === "failed" && failures.push(event.reason) === 3) setFull(client, false);
      },
    });
    assertEquals(failures, Array(3).fill("Cannot use sqlite:app.db: database or disk is full. Make room on its disk"));
    assertEquals([report.delivered, await idsIn(at.path("out.jsonl"))], [400, ids]);
  } finally {
    client.close();
  }
});

const CLI = new URL("../cli.ts", import.meta.url).pathname;
// For any user what a full disk is: no file can grow beyond so much. SIGXFSZ is ignored, so that the write fails instead.
const SCRIPT = `trap '' XFSZ; ulimit -S -f "$1"; shift; exec "$@"`;

/** Starts a command in which no file can grow beyond so many bytes. */
function startLimited(at: Box, bytes: number, args: readonly string[]): Running & AsyncDisposable {
  const command = new Deno.Command("sh", {
    args: ["-c", SCRIPT, "sh", `${Math.ceil(bytes / 512)}`, Deno.execPath(), "run", "-A", "--quiet", CLI, ...args],
    ...{ cwd: at.folder, env: { NO_COLOR: "1" }, stdin: "null", stdout: "piped", stderr: "piped" },
  });
  const running = new Running(command.spawn());
  return Object.assign(running, {
    async [Symbol.asyncDispose]() {
      try {
        running.kill("SIGKILL");
      } catch {
        // It has ended.
      }
      await running.ended();
    },
  });
}

/** Makes room: nothing limits it any more. */
async function lift(running: Running): Promise<void> {
  const args = ["--pid", `${running.pid}`, "--fsize=unlimited:"];
  const { success, stderr } = await new Deno.Command("prlimit", { args }).output();
  assert(success, `prlimit (of util-linux) is needed to lift a limit: ${new TextDecoder().decode(stderr)}`);
}

/** A box whose file already holds much more than its database ever does, so that a limit hits the file alone. */
async function boxWithLargeFile(): Promise<{ readonly at: Box; readonly bytes: number }> {
  const at = await box();
  for (let round = 0; round < 3; round++) {
    put(at, numbered(round * 4, round * 4 + 4), 60_000);
    await at.ok(drainTo("file:out.jsonl"));
  }
  return { at, bytes: (await Deno.stat(at.path("out.jsonl"))).size };
}
const LINUX = Deno.build.os === "linux";

Deno.test({
  name: "a file that cannot grow holds up its relay, which tells it, writes no half batch, and goes on once there is room",
  ignore: !LINUX,
  async fn() {
    const { at, bytes } = await boxWithLargeFile();
    await using _ = at;
    await using running = startLimited(at, bytes + 1_000, relayTo("file:out.jsonl", "--json", ...QUICK));
    await running.event("idle");
    const whole = await Deno.readTextFile(at.path("out.jsonl"));
    put(at, ["late-1", "late-2"], 60_000, "one");
    const failed = await running.event("failed");
    assertMatch(String(failed.reason), /^Cannot write file:out\.jsonl: File too large/);
    await running.event("failed");
    await lift(running);
    await running.event("delivered");
    assertEquals((await running.stop()).code, 0);
    assert((await Deno.readTextFile(at.path("out.jsonl"))).startsWith(whole));
    assertEquals(await idsIn(at.path("out.jsonl")), [...numbered(0, 12), "late-1", "late-2"]);
    assertEquals((await at.status()).outbox.pending, 0);
  },
});

Deno.test({
  name: "a file that cannot grow ends a draining relay with a sentence and exit code 1, and leaves whole batches only",
  ignore: !LINUX,
  async fn() {
    const { at, bytes } = await boxWithLargeFile();
    await using _ = at;
    put(at, ["late-1", "late-2"], 60_000, "one");
    const whole = await Deno.readTextFile(at.path("out.jsonl"));
    await using running = startLimited(at, bytes + 1_000, drainTo("file:out.jsonl", "--attempts", "3", "--json", ...QUICK));
    const { code, stdout, stderr } = await endOf(running);
    assertEquals([code, stdout.match(/"failed"/g)?.length], [1, 3]);
    assertSentence(stderr);
    assertStringIncludes(stderr, "Cannot write file:out.jsonl: File too large");
    assertEquals(await Deno.readTextFile(at.path("out.jsonl")), whole);
    assertEquals((await at.status()).outbox.pending, 2);
    await at.ok(drainTo("file:out.jsonl"));
    assertEquals(await idsIn(at.path("out.jsonl")), [...numbered(0, 12), "late-1", "late-2"]);
  },
});

for (const driver of Object.keys(drivers) as Driver[]) {
  Deno.test({
    name:
      `${driver}: a database whose files cannot grow ends the relay with a sentence and exit code 1; every call is known`,
    ignore: !LINUX,
    async fn() {
      await using target = new Target();
      await using at = await box();
      put(at, numbered(0, 100), 100);
      const url = `${DB}?driver=${driver === "node:sqlite" ? "node" : driver}`;
      const relayed = [
        "relay",
        "--from",
        url,
        "--to",
        target.url,
        "--drain",
        "--lease-ms",
        "300",
        "--attempts",
        "3",
        ...QUICK,
      ];
      await using running = startLimited(at, 150_000, relayed);
      const { code, stderr } = await endOf(running);
      assertEquals([code, stderr], [
        1,
        "effectonce: Cannot use sqlite:app.db: disk I/O error. Look at its disk, and at the quota there\n",
      ]);
      const sent = target.asked.length;
      assert(sent > 0 && sent < 100, `${sent} were sent`);
      // What could not be recorded any more is in doubt, and seen; everything else is delivered.
      const { code: again } = await at.run(relayed);
      assertSentOnce(at, target);
      assertNothingLost(at, 100);
      const { outbox, effects } = await at.status();
      assertEquals([target.asked.length, outbox.pending, again], [100, 0, effects.uncertain > 0 ? 1 : 0]);
    },
  });
}

// ------------------------------------------------------------------------------------------------------- files exchanged

/** What somebody does to the files of a database while a relay has it open, and how it is put right. */
interface Exchange {
  readonly does: (at: Box) => void | Promise<void>;
  readonly says: RegExp;
  readonly undoes: (at: Box) => void | Promise<void>;
}

const MAIN = /its file was removed, moved or replaced while it was open/;
/** A copy as a backup makes it, in the place of the database. */
async function restore(at: Box): Promise<void> {
  for (const end of ["", "-wal", "-shm"]) await Deno.remove(at.path(`app.db${end}`)).catch(() => {});
  await Deno.copyFile(at.path("copy.db"), at.path("app.db"));
}
/** Puts a file in the place of the database, as `mv` does. */
async function replace(at: Box, content: Uint8Array): Promise<void> {
  await Deno.writeFile(at.path("new.db"), content);
  await Deno.rename(at.path("new.db"), at.path("app.db"));
}

const exchanges: Readonly<Record<string, Exchange>> = {
  "is removed": { does: (at) => Deno.remove(at.path("app.db")), says: MAIN, undoes: restore },
  "is moved away": {
    does: (at) => Deno.rename(at.path("app.db"), at.path("away.db")),
    says: MAIN,
    undoes: (at) => Deno.rename(at.path("away.db"), at.path("app.db")),
  },
  "is replaced by a copy": {
    does: async (at) => await replace(at, await Deno.readFile(at.path("copy.db"))),
    says: MAIN,
    undoes: restore,
  },
  "is replaced by an empty file": { does: (at) => replace(at, new Uint8Array()), says: MAIN, undoes: restore },
  "is replaced by another kind of file": {
    does: (at) => replace(at, new TextEncoder().encode("not a database\n".repeat(1_000))),
    says: MAIN,
    undoes: restore,
  },
  "is emptied": { does: (at) => Deno.truncate(at.path("app.db")), says: MAIN, undoes: restore },
  "loses its -wal file": {
    does: (at) => Deno.remove(at.path("app.db-wal")),
    says: /its -wal file was removed, moved or replaced while it was open/,
    undoes: () => {},
  },
  "loses its -shm file": {
    does: (at) => Deno.remove(at.path("app.db-shm")),
    says: /its -shm file was removed, moved or replaced while it was open/,
    undoes: () => {},
  },
};

for (const [what, { does, says, undoes }] of Object.entries(exchanges)) {
  for (const kind of ["http", "file"]) {
    Deno.test(`a database that ${what} ends its relay into ${kind}: with a sentence, and nothing goes out twice afterwards`, async () => {
      await using target = new Target();
      await using at = await box();
      const to = kind === "http" ? target.url : "file:out.jsonl";
      put(at, ["m0", "m1"]);
      const running = at.start(relayTo(to, "--json"));
      await running.event("idle");
      sql(at, `vacuum into '${at.path("copy.db")}'`);
      await does(at);
      const ended = await endOf(running);
      assertEquals(ended.code, 1);
      assertSentence(ended.stderr);
      assertMatch(ended.stderr, says);
      assertStringIncludes(ended.stderr, "sqlite:app.db");
      await undoes(at);
      put(at, ["m2"]);
      await at.ok(drainTo(to));
      const delivered = kind === "http" ? target.keys() : await idsIn(at.path("out.jsonl"));
      assertEquals(delivered.toSorted(), ["m0", "m1", "m2"]);
      assertEquals((await at.status()).outbox, { pending: 0, heldBack: 0, parked: 0, oldestMs: null });
    });
  }
}

Deno.test("a database that is moved away during a call and comes back: the call is not repeated, and its doubt is seen", async () => {
  await using target = new Target();
  await using at = await box();
  const answer = Promise.withResolvers<void>();
  target.answer = async () => {
    await answer.promise;
    return new Response("paid");
  };
  put(at, ["m0"]);
  const running = at.start(relayTo(target.url, "--lease-ms", "300"));
  await until(() => target.asked.length === 1);
  await Deno.rename(at.path("app.db"), at.path("away.db"));
  answer.resolve();
  const ended = await endOf(running);
  assertEquals(ended.code, 1);
  assertMatch(ended.stderr, MAIN);
  await Deno.rename(at.path("away.db"), at.path("app.db"));
  assertEquals((await at.run(drainTo(target.url, "--lease-ms", "300"))).code, 1);
  assertSentOnce(at, target);
  assertNothingLost(at, 1);
  assertEquals((await at.status()).effects.uncertain, 1);
});

Deno.test("a database is watched as far as the permissions reach, and no further is asked for", async () => {
  await using target = new Target();
  await using at = await box();
  put(at, ["m0"]);
  const deno = ["--allow-read=app.db", "--allow-write=app.db", "--allow-net", "--allow-env"];
  const relayed = ["relay", "--from", `${DB}?driver=node`, "--to", target.url];
  const running = at.start([...relayed, "--json"], { deno });
  await running.event("idle");
  await Deno.rename(at.path("app.db"), at.path("away.db"));
  assertFailure({ ...await endOf(running), stdout: "" }, MAIN);
});

Deno.test("a database that somebody holds as a whole while a command starts is waited for", async () => {
  for (const driver of ["node", "better-sqlite3"]) {
    await using at = await box();
    const holder = drivers["node:sqlite"](at.path("app.db"));
    // As SQLite itself does while it closes or recovers the file.
    holder.exec("pragma locking_mode = exclusive; begin immediate; create table held (a); commit");
    const running = at.start(["status", "--store", `${DB}?driver=${driver}`]);
    let over = false;
    const ended = endOf(running).finally(() => over = true);
    // It is given long enough to have tried; if it has not by then, the test is easier, not wrong.
    await new Promise((resolve) => setTimeout(resolve, 300));
    assert(!over, `It did not wait: ${(await Promise.race([ended, undefined]))?.stderr}`);
    holder.close();
    assertEquals((await ended).code, 0);
  }
});

// -------------------------------------------------------------------------------------------------------------- the clock

const HOUR = 3_600_000;

/** Relays whose wall clock a test sets, all alike: it is the machine's. */
async function clockBox(): Promise<Box & { jump(ms: number): void; readonly clock: Given }> {
  const at = await box();
  const path = at.path("clock");
  const jump = (ms: number) => Deno.writeTextFileSync(path, `${ms}`);
  jump(0);
  const preload = new URL("./faults_clock.ts", import.meta.url).pathname;
  return Object.assign(at, { jump, clock: { deno: ["-A", `--preload=${preload}`], env: { FAULTS_CLOCK: path } } });
}

Deno.test("a clock that jumps hours ahead during a call ends its lease: in doubt, and not called again", async () => {
  await using target = new Target();
  await using at = await clockBox();
  target.answer = () => target.hold();
  put(at, ["m0"]);
  const owner = at.start(relayTo(target.url, "--lease-ms", "600", "--json"), at.clock);
  await until(() => target.asked.length === 1);
  at.jump(3 * HOUR);
  // A rival, as after a deployment: it finds the lease ended long ago.
  const rival = await at.run(drainTo(target.url, "--lease-ms", "600"), at.clock);
  // Whoever is first sees the end of the lease; where that was the owner, the rival finds nothing to do.
  assert(rival.code === 0 || rival.code === 1);
  await owner.until((line) => line.includes(`"uncertain"`) || line.includes(`"lease_lost"`));
  target.over.abort();
  assertEquals((await owner.stop()).code, 0);
  assertSentOnce(at, target);
  assertNothingLost(at, 1);
  assertEquals((await at.status()).effects.uncertain, 1);
});

Deno.test("a clock that jumps hours ahead during a call, to a target that dedupes: repeated under the same key, charged once", async () => {
  await using target = new Target();
  await using at = await clockBox();
  target.answer = (_, nth) => nth === 1 ? target.hold() : Response.json({ paid: true });
  put(at, ["m0"]);
  const line = ["--idempotent", "--lease-ms", "600", ...QUICK];
  const owner = at.start(relayTo(target.url, ...line, "--json"), at.clock);
  await until(() => target.asked.length === 1);
  at.jump(3 * HOUR);
  assertEquals((await at.run(drainTo(target.url, ...line), at.clock)).code, 0);
  assertEquals((await owner.stop()).code, 0);
  assertEquals(new Set(target.asked.map(({ key, body }) => `${key} ${body}`)).size, 1);
  assertNothingLost(at, 1);
  const { outbox, effects } = await at.status();
  assertEquals([outbox.pending, outbox.parked, effects.done], [0, 0, 1]);
});

Deno.test("a clock that jumps back during a call changes nothing for its owner", async () => {
  await using target = new Target();
  await using at = await clockBox();
  const answer = Promise.withResolvers<void>();
  target.answer = async () => {
    await answer.promise;
    return new Response("paid");
  };
  put(at, ["m0"]);
  const owner = at.start(relayTo(target.url, "--lease-ms", "300", "--json"), at.clock);
  await until(() => target.asked.length === 1);
  at.jump(-2 * HOUR);
  const until_ms = () => Number(sql(at, "select until_ms from effectonce_relays")[0]!.until_ms);
  // It has renewed since.
  await until(() => until_ms() < Date.now() - HOUR);
  answer.resolve();
  await owner.event("delivered");
  assertEquals((await owner.stop()).code, 0);
  assertSentOnce(at, target);
  assertNothingLost(at, 1);
});

Deno.test("after a jump back a dead owner's lease lasts for the jump longer, or until a person ends it; nothing goes out twice", async () => {
  for (const ends of ["the clock", "a person"]) {
    await using target = new Target();
    await using at = await clockBox();
    target.answer = () => target.hold();
    put(at, ["m0"]);
    const owner = at.start(relayTo(target.url, "--lease-ms", "300"), at.clock);
    await until(() => target.asked.length === 1);
    owner.kill("SIGKILL");
    await owner.ended();
    at.jump(-2 * HOUR);
    const heir = at.start(relayTo(target.url, "--lease-ms", "300", "--json"), at.clock);
    await heir.event("started");
    const resolve = ["effects", "resolve", "m0", "--store", DB, "--as", "done"];
    assertFailure(await at.run(resolve, at.clock), /an owner works on it for 7\d{6} ms more/);
    if (ends === "the clock") {
      at.jump(0);
    } else {
      assertEquals((await heir.stop()).code, 0);
      sql(at, "update effectonce_effects set until_ms = 0 where state = 'claimed'");
      at.start(relayTo(target.url, "--lease-ms", "300", "--json"), at.clock);
    }
    await until(() => sql(at, "select state from effectonce_outbox")[0]!.state === "parked");
    assertSentOnce(at, target);
    assertNothingLost(at, 1);
    await at.ok(resolve, at.clock);
  }
});

Deno.test("after a jump back a message waits for the jump longer, or until a person lets it go", async () => {
  await using target = new Target();
  await using at = await clockBox();
  target.answer = (_, nth) =>
    nth === 1 ? new Response(null, { status: 429, headers: { "retry-after": "1" } }) : Response.json({ paid: true });
  put(at, ["m0"]);
  const running = at.start(relayTo(target.url, "--json"), at.clock);
  await running.event("retried");
  at.jump(-2 * HOUR);
  assertMatch(String((await at.status()).outbox.pending), /1/);
  await at.ok(["effects", "retry", "m0", "--store", DB], at.clock);
  await running.event("delivered");
  assertEquals((await running.stop()).code, 0);
  assertEquals(target.keys(), ["m0", "m0"]);
  assertNothingLost(at, 1);
});

Deno.test("a relay into a file does not mind its clock, whichever way it jumps, nor being killed meanwhile", async () => {
  await using at = await clockBox();
  let running = at.start(relayTo("file:out.jsonl", "--json", "--lease-ms", "300"), at.clock);
  for (const [i, hours] of [0, 5, -5, 0].entries()) {
    at.jump(hours * HOUR);
    put(at, numbered(i * 10, i * 10 + 10), 10, "one");
    await until(() => sql(at, "select count(*) as n from effectonce_outbox")[0]!.n === 0);
    running.kill("SIGKILL");
    await running.ended();
    running = at.start(relayTo("file:out.jsonl", "--json", "--lease-ms", "300"), at.clock);
  }
  await running.event("idle");
  assertEquals((await running.stop()).code, 0);
  assertEquals(await idsIn(at.path("out.jsonl")), numbered(0, 40));
});

Deno.test("after a jump back the name of a dead relay is taken for the jump longer, or until a person ends it", async () => {
  await using at = await clockBox();
  const first = at.start(relayTo("file:out.jsonl", "--json"), at.clock);
  await first.event("idle");
  first.kill("SIGKILL");
  await first.ended();
  at.jump(-2 * HOUR);
  const other = drainTo("file:other.jsonl", "--name", "other");
  assertFailure(await at.run(other, at.clock), `relay "default" has them, or left something behind`);
  // Its own name goes on at once, and leaves nothing behind.
  await at.ok(drainTo("file:out.jsonl"), at.clock);
  sql(at, "update effectonce_relays set until_ms = 0");
  await at.ok(drainTo("file:out.jsonl"), at.clock);
  await at.ok(other, at.clock);
});
