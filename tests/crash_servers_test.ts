/**
 * Relays from the outbox of a database server, in processes of their own, that are killed, stopped, or whose clocks are wrong.
 * Afterwards whatever went out is counted.
 */
import { assert, assertEquals } from "@std/assert";
import { Running, Target, until } from "./cli_run.ts";
import { connect, type Connected, ledgerOf, ledgerSink, makeLedger, type Plan, stepsOf } from "./crash_servers_child.ts";
import { relay } from "@effectonce/effectonce";
import { httpSink } from "@effectonce/effectonce/http";
import { database } from "./services/mod.ts";
import { startProxy } from "./services/proxy.ts";
import type { Kind } from "./services/servers.ts";

const LONG = Deno.env.get("EFFECTONCE_LONG") === "1";
const KINDS = ["postgres", "mariadb", "mysql"] as const;

/** A fresh database with tables, and the processes that a test starts on it. */
class Place implements AsyncDisposable {
  readonly #disposed = new AsyncDisposableStack();
  readonly server: Kind;
  readonly url: string;
  readonly db: Connected;
  readonly folder: string;
  private constructor(server: Kind, url: string, folder: string, disposed: AsyncDisposableStack) {
    this.server = server;
    this.url = url;
    this.folder = folder;
    this.#disposed = disposed;
    this.db = disposed.use(connect(server, url));
  }
  static async make(server: Kind): Promise<Place> {
    const disposed = new AsyncDisposableStack();
    const folder = await Deno.makeTempDir({ prefix: "effectonce-crash-" });
    disposed.defer(() => Deno.remove(folder, { recursive: true }));
    const { url } = disposed.use(await database(server));
    const place = new Place(server, url, folder, disposed);
    await place.db.migrate();
    return place;
  }
  /** A database of the same server, for a handler's ledger. */
  async ledger(): Promise<Connected & { readonly url: string }> {
    const { url } = this.#disposed.use(await database(this.server));
    const target = this.#disposed.use(connect(this.server, url));
    await target.migrate();
    await makeLedger(target);
    return Object.assign(target, { url });
  }
  /** A relay in a process of its own. */
  relay(plan: Pick<Plan, "kind" | "target"> & Partial<Plan>, deno: readonly string[] = [], env = {}): Running {
    const whole: Plan = { server: this.server, url: this.url, step: "", time: 1, leaseMs: 300, drain: false, ...plan };
    const script = new URL("./crash_servers_child.ts", import.meta.url).pathname;
    const args = ["run", "-A", "--quiet", ...deno, script, JSON.stringify(whole)];
    const command = new Deno.Command(Deno.execPath(), { args, env, stdin: "null", stdout: "piped", stderr: "piped" });
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
  async enqueue(topic: string, ids: readonly string[], keyOf: (id: string) => string): Promise<void> {
    const messages = ids.map((id) => ({ id, topic, key: keyOf(id), value: { id } }));
    await this.db.store().transaction((effects) => effects.enqueue(...messages));
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

/** Lets a fresh process finish. */
async function drain(place: Place, plan: Pick<Plan, "kind" | "target"> & Partial<Plan>): Promise<void> {
  const { code, stdout, stderr } = await place.relay({ ...plan, drain: true }).ended();
  assertEquals([code, stdout.trimEnd().split("\n").at(-1), stderr], [0, "drained", ""]);
}

// ------------------------------------------------------------------------------------------------ at every step, SIGKILL

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

/** What happens only once a run is caught the first time, everything else the second. */
const timeOf = (step: string) => /open|close|settled|unseal|fail|park/.test(step) ? 1 : 2;
/** Each step on each server takes long: else on PostgreSQL, and on one of the others in turn. */
const stepsOn = (server: Kind, kind: Plan["kind"]) =>
  stepsOf(kind).filter((_, i) => LONG || server === "postgres" || (i % 2 === 0) === (server === "mysql"));

/** A round of messages for each step; a process that gets there is killed, and the next has what it left behind. */
async function killAtEach(t: Deno.TestContext, place: Place, kind: Plan["kind"], target: string): Promise<string[]> {
  const steps = stepsOn(place.server, kind);
  for (const [n, step] of steps.entries()) {
    await t.step(`SIGKILL ${step}`, async () => {
      await place.enqueue("orders", round(n), keyOf);
      const running = place.relay({ kind, target, step, time: timeOf(step), drain: true });
      assertEquals(await running.until((line) => line.startsWith("at ")), `at ${running.pid}`);
      await kill(running);
    });
  }
  await t.step("a fresh process drains", () => drain(place, { kind, target }));
  assertEquals(
    (await place.db.outbox().status()).pending,
    kind === "http" ? (await place.db.outbox().status()).heldBack : 0,
  );
  return steps.flatMap((_, n) => round(n));
}

for (const server of KINDS) {
  Deno.test(`${server}: SIGKILL at each step of calls: a target that dedupes charges each order once`, async (t) => {
    await using payments = new Target();
    await using place = await Place.make(server);
    const charges: string[] = [];
    // Two orders of a round are refused for the moment, so that every step is reached.
    payments.answer = ({ key }, nth) => {
      if (nth === 1 && /-[24]$/.test(key)) return new Response(null, { status: 429, headers: { "retry-after": "0" } });
      if (!charges.includes(key)) charges.push(key);
      return Response.json({ paid: key });
    };
    const ids = await killAtEach(t, place, "http-idempotent", payments.url);
    assertEquals(charges.toSorted(), ids.toSorted());
    assertOrder(charges);
    const counts = { claimed: 0, waiting: 0, done: ids.length, rejected: 0, uncertain: 0 };
    assertEquals(await place.db.store().count(), counts);
  });

  Deno.test(`${server}: SIGKILL at each step of calls: a target that does not dedupe is never asked twice, and every doubt shows (acceptance 17)`, async (t) => {
    await using payments = new Target();
    await using place = await Place.make(server);
    const ids = await killAtEach(t, place, "http", payments.url);
    const sent = payments.keys();
    assertEquals(sent.length, new Set(sent).size, "sent twice");
    assertOrder(sent);
    const { done, uncertain, claimed, waiting } = await place.db.store().count();
    assertEquals([claimed, waiting], [0, 0]);
    const { pending, parked } = await place.db.outbox().status();
    // What is in doubt holds back the later messages of its key, unsent.
    assertEquals([done + uncertain + pending, parked], [ids.length, uncertain]);
    const known = (await place.db.store().list()).filter(({ state }) => state === "done" || state === "uncertain");
    assertEquals(sent.filter((id) => !known.some(({ key }) => key === id)), [], "sent, and nobody knows of it");
    // Killed between a claim and its completion: one at least is in doubt each time.
    const between = stepsOn(server, "http").filter((step) =>
      /after store.claimAll|sink.deliver|before store.completeAll/.test(step)
    );
    assert(uncertain >= between.length, `killed ${between.length} times during a call, and ${uncertain} are in doubt`);
  });

  Deno.test(`${server}: SIGKILL at each step of sealed batches: a file has each message once`, async (t) => {
    await using place = await Place.make(server);
    const target = `${place.folder}/out.jsonl`;
    const ids = await killAtEach(t, place, "file", target);
    const lines = (await Deno.readTextFile(target)).trimEnd().split("\n").map((line) => JSON.parse(line));
    assertEquals(lines.filter((line) => !("effectonce" in line)).map(({ id }) => id), ids);
  });

  Deno.test(`${server}: SIGKILL at each step of sealed batches: a database has each message once, by its handler`, async (t) => {
    await using place = await Place.make(server);
    const ledger = await place.ledger();
    const ids = await killAtEach(t, place, "handler", ledger.url);
    const got = await ledgerOf(ledger);
    assertEquals(got.toSorted(), ids.toSorted());
    assertOrder(got);
  });
}

// -------------------------------------------------------------------------------------------------- two relays, one killed

const IDS = round(0);
/** Charges of a target that dedupes, in their order. */
function chargesOf(target: Target): string[] {
  return target.keys().filter((key, i, all) => all.indexOf(key) === i);
}
for (const server of KINDS) {
  Deno.test(`${server}: of two relays one is killed in the middle: the other has the rest, nothing lost, nothing twice`, async () => {
    await using payments = new Target();
    await using place = await Place.make(server);
    const ledger = await place.ledger();
    await place.enqueue("calls", IDS, keyOf);
    await place.enqueue("rows", IDS.map((id) => `rows${id}`), keyOf);
    const calls = { kind: "http-idempotent", target: payments.url, name: "calls", topics: ["calls"] } as const;
    const rows = { kind: "handler", target: ledger.url, name: "rows", topics: ["rows"] } as const;
    const first = [
      place.relay({ ...calls, step: "after sink.deliver" }),
      place.relay({ ...rows, step: "after sink.handle" }),
    ];
    for (const one of first) assertEquals(await one.until((line) => line.startsWith("at ")), `at ${one.pid}`);
    // The second ones run into what the first ones hold: a lease, and a transaction, perhaps before they tell that they started.
    const second = [place.relay(calls), place.relay(rows)];
    await second[0]!.until((line) => line.includes('"started"'));
    for (const one of first) await kill(one);
    const delivered = async (one: Running) => {
      for (const _ of IDS) await one.until((line) => line.includes('"delivered"'));
      await kill(one);
    };
    await Promise.all(second.map(delivered));
    assertEquals(chargesOf(payments).toSorted(), IDS);
    assertOrder(chargesOf(payments));
    assertEquals((await ledgerOf(ledger)).map((id) => id.slice(4)).toSorted(), IDS);
  });

  const kills = LONG ? 100 : 10;
  Deno.test(`${server}: ${kills} SIGKILLs at random moments, two relays of calls and two of batches, a writer: each message once, in order`, async () => {
    await using payments = new Target();
    await using place = await Place.make(server);
    const ledger = await place.ledger();
    const plans = [
      { kind: "http-idempotent", target: payments.url, name: "calls", topics: ["calls"] },
      { kind: "handler", target: ledger.url, name: "rows", topics: ["rows"] },
    ] as const;
    const running = [0, 1, 0, 1].map((i) => place.relay(plans[i]!));
    const ids: string[] = [];
    for (let n = 0; n < kills; n++) {
      const more = Array.from({ length: 20 }, (_, i) => `${i % 5}-${ids.length + i + 1}`);
      ids.push(...more);
      await place.enqueue("calls", more, keyOf);
      await place.enqueue("rows", more.map((id) => `r${id}`), keyOf);
      // The moment is random; nothing waits for it to have passed.
      await new Promise((resolve) => setTimeout(resolve, 20 + Math.random() * 180));
      await kill(running[n % 4]!);
      running[n % 4] = place.relay(plans[n % 2]!);
    }
    for (const one of running) await kill(one);
    for (const plan of plans) await drain(place, plan);
    for (const got of [chargesOf(payments), (await ledgerOf(ledger)).map((id) => id.slice(1))]) {
      assertEquals(got.toSorted(), ids.toSorted());
      assertOrder(got);
    }
    const { pending, parked } = await place.db.outbox().status();
    assertEquals([pending, parked, (await place.db.store().count()).done], [0, 0, ids.length]);
  });
}

// ------------------------------------------------------------------------------------------------- stopped, and woken again

/** How long a session may be idle in a transaction of ours, and what a slow machine adds. */
const IDLE_MS = 10_000 + 5_000;

// All at once, since each waits for 10 seconds.
Deno.test("a relay stopped (SIGSTOP) within a transaction holds up its successor for 10 s at most, no writer, and does no harm when woken, on each server (acceptance 6)", async () => {
  async function stop(server: Kind, kind: "handler" | "http-idempotent"): Promise<void> {
    await using payments = new Target();
    await using place = await Place.make(server);
    const ledger = await place.ledger();
    const to = kind === "handler" ? ledgerSink(ledger) : httpSink(payments.url, { repeat: "same-key" });
    const got = async () => kind === "handler" ? await ledgerOf(ledger) : chargesOf(payments);
    await place.enqueue("orders", IDS, keyOf);
    const held = Promise.withResolvers<void>();
    const table = kind === "handler" ? "batches" : "effects";
    let holding = false;
    const { hostname, port } = new URL(place.url);
    await using proxy = startProxy({ hostname, port: Number(port) }, {
      observe(direction, bytes) {
        if (holding || direction === "toClient") return "pass";
        holding = new RegExp(`insert into .effectonce_${table}`).test(new TextDecoder().decode(bytes));
        if (holding) held.resolve();
        return holding ? "hold" : "pass";
      },
    });
    const target = kind === "handler" ? ledger.url : payments.url;
    const first = place.relay({ kind, target, url: proxy.url(place.url) });
    await held.promise;
    first.kill("SIGSTOP");
    const since = performance.now();
    await place.enqueue("orders", round(1), keyOf);
    assert(performance.now() - since < 5_000, `${server}: a writer waited ${performance.now() - since} ms`);
    const over = new AbortController();
    const store = place.db.store();
    const second = relay({ from: place.db.outbox(), to, store, leaseMs: 300, signal: over.signal, maxRetryMs: 300 });
    await until(async () => (await got()).length === 12);
    assert(performance.now() - since < IDLE_MS, `${server}: its successor waited ${performance.now() - since} ms`);
    over.abort();
    await second;
    // The first one finds that its transaction is gone, and what has been done meanwhile.
    first.kill("SIGCONT");
    proxy.release();
    await place.enqueue("orders", round(2), keyOf);
    await until(async () => (await got()).length === 18);
    await until(async () => (await place.db.outbox().status()).pending === 0);
    await kill(first);
    const all = await got();
    assertEquals(all.toSorted(), [...IDS, ...round(1), ...round(2)].toSorted());
    assertOrder(all);
    if (kind === "handler") return;
    assertEquals(payments.asked.length, 18);
    assertEquals((await store.count()).done, 18);
  }
  await Promise.all(KINDS.flatMap((server) => [stop(server, "handler"), stop(server, "http-idempotent")]));
});

// --------------------------------------------------------------------------------------------------------------- the clock

// All at once, since each waits for leases most of the time.
Deno.test("clocks of relays that are wrong by 10 minutes, either way, change no lease: the database's clock decides, on each server (acceptance 33)", async () => {
  const MINUTES = 60_000;
  async function skewed(server: Kind): Promise<void> {
    for (const skew of [10 * MINUTES, -10 * MINUTES]) {
      await using target = new Target();
      await using place = await Place.make(server);
      target.answer = (_, nth) => nth === 1 ? target.hold() : Response.json({ paid: true });
      await place.enqueue("orders", ["0-1"], keyOf);
      const preload = new URL("./faults_clock.ts", import.meta.url).pathname;
      const relayWith = async (ms: number) => {
        const path = `${place.folder}/clock${ms}`;
        await Deno.writeTextFile(path, `${ms}`);
        const plan = { kind: "http-idempotent", target: target.url, leaseMs: 600 } as const;
        return place.relay(plan, [`--preload=${preload}`], { FAULTS_CLOCK: path });
      };
      const row = async () => (await place.db.sql(`select fence, until_ms from effectonce_effects`))[0];
      const renewed = async () => {
        const before = Number((await row())!.until_ms);
        await until(async () => Number((await row())!.until_ms) > before);
      };
      const owner = await relayWith(skew);
      await until(() => target.asked.length === 1);
      const rival = await relayWith(-skew);
      await rival.until((line) => line.includes('"started"'));
      // The rival asks every few milliseconds; the owner renews twice meanwhile, and stays the owner.
      await renewed();
      await renewed();
      const { fence, until_ms } = (await row())!;
      assertEquals([Number(fence), target.asked.length], [1, 1]);
      const byClient = Date.now() + Math.abs(skew);
      assert(Number(until_ms) < byClient, "a lease by the client's clock would have ended: else this shows nothing");
      await kill(owner);
      const last = Number((await row())!.until_ms);
      await rival.until((line) => line.includes('"delivered"'));
      const claims = await place.db.sql("select fence, until_ms, changed_ms, state from effectonce_effects");
      assertEquals([Number(claims[0]!.fence), claims[0]!.state], [2, "done"]);
      assert(Number(claims[0]!.changed_ms) >= last, "taken over before the lease's end");
      assertEquals(chargesOf(target), ["0-1"]);
      await kill(rival);
    }
  }
  await Promise.all(KINDS.map(skewed));
});
