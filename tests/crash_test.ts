import { DatabaseSync } from "node:sqlite";
import { assert, assertEquals } from "@std/assert";
import { relay } from "../mod.ts";
import { httpSink } from "../adapters/http.ts";
import { migrateSqlite, sqliteOutbox, sqliteStore } from "../adapters/sqlite.ts";
import { type Plan, STEPS } from "./crash_child.ts";

const LONG = Deno.env.get("EFFECTONCE_LONG") === "1";

/** The outside world: counts what was asked of it, and dedupes if it is that kind. */
class Payments implements AsyncDisposable {
  /** Requests by idempotency key: what a target that does not dedupe would have charged. */
  readonly requests = new Map<string, number>();
  /** Charges by idempotency key where the target dedupes. */
  readonly charges = new Map<string, number>();
  readonly order: string[] = [];
  /** Set to hold answers back, or to change them. */
  answer: (key: string, nth: number) => Response | Promise<Response> = () => Response.json({ paid: true });
  readonly #server = Deno.serve({ hostname: "127.0.0.1", port: 0, onListen: () => {} }, async (request) => {
    const key = request.headers.get("idempotency-key")!;
    await request.body?.cancel();
    const nth = (this.requests.get(key) ?? 0) + 1;
    this.requests.set(key, nth);
    const response = await this.answer(key, nth);
    if (response.ok && !this.charges.has(key)) {
      this.charges.set(key, 1);
      this.order.push(key);
    }
    return response;
  });
  readonly url: string = `http://127.0.0.1:${this.#server.addr.port}/charge`;
  async [Symbol.asyncDispose](): Promise<void> {
    await this.#server.shutdown();
  }
}

class Child {
  readonly #process: Deno.ChildProcess;
  readonly #lines: ReadableStreamDefaultReader<string>;
  #rest = "";
  constructor(plan: Plan) {
    const args = ["run", "-A", "--quiet", new URL("./crash_child.ts", import.meta.url).pathname, JSON.stringify(plan)];
    this.#process = new Deno.Command(Deno.execPath(), { args, stdout: "piped", stderr: "inherit" }).spawn();
    this.#lines = this.#process.stdout.pipeThrough(new TextDecoderStream()).getReader();
  }
  get pid(): number {
    return this.#process.pid;
  }
  /** The next line; undefined at the end. */
  async line(): Promise<string | undefined> {
    for (;;) {
      const [line, ...rest] = this.#rest.split("\n");
      if (rest.length > 0) {
        this.#rest = rest.join("\n");
        return line;
      }
      const { value, done } = await this.#lines.read();
      if (done) return undefined;
      this.#rest += value;
    }
  }
  /** Reads on until a line that fits; undefined if none comes. */
  async until(fits: (line: string) => boolean): Promise<string | undefined> {
    for (let line; (line = await this.line()) !== undefined;) if (fits(line)) return line;
    return undefined;
  }
  signal(signal: Deno.Signal): void {
    this.#process.kill(signal);
  }
  async kill(): Promise<void> {
    this.#process.kill("SIGKILL");
    const { signal } = await this.end();
    assertEquals(signal, "SIGKILL");
  }
  async end(): Promise<Deno.CommandStatus> {
    await this.until(() => false);
    await this.#lines.cancel();
    return await this.#process.status;
  }
}

/** An outbox with messages in a folder that is removed in the end. */
async function outbox(messages: number) {
  const folder = await Deno.makeTempDir({ prefix: "effectonce-crash-" });
  const path = `${folder}/app.db`;
  const client = new DatabaseSync(path);
  await migrateSqlite(client);
  const store = sqliteStore(client);
  const enqueue = (from: number, to: number) =>
    store.transaction(async (effects) => {
      for (let i = from; i <= to; i++) {
        await effects.enqueue({ id: `order-${i}`, topic: "orders", key: `order-${i % 5}`, value: { i } });
      }
    });
  await enqueue(1, messages);
  const remove = async () => {
    client.close();
    await Deno.remove(folder, { recursive: true });
  };
  const ids = () => Array.from({ length: messages }, (_, i) => `order-${i + 1}`);
  return { folder, path, client, store, enqueue, ids, [Symbol.asyncDispose]: remove };
}

/** Asserts that each key's messages came in order. */
function assertOrder(ids: readonly string[]): void {
  const last = new Map<number, number>();
  for (const i of ids.map((id) => Number(id.slice(6)))) {
    assert((last.get(i % 5) ?? 0) < i, `order-${i} came after order-${last.get(i % 5)}`);
    last.set(i % 5, i);
  }
}

/** Runs a child to its step, kills it there, and lets a second one finish. */
async function killAt(plan: Omit<Plan, "drain" | "leaseMs">): Promise<void> {
  const settings = { ...plan, leaseMs: 300, drain: true };
  const first = new Child(settings);
  const reached = await first.until((line) => line.startsWith("at "));
  assertEquals(reached, `at ${first.pid}`, `${plan.step} was never reached`);
  await first.kill();
  const second = new Child({ ...settings, step: "" });
  assertEquals(await second.until((line) => line === "drained"), "drained");
  assertEquals((await second.end()).code, 0);
}

const when = ["before", "after"];
const steps = (kind: Plan["kind"]) => STEPS[kind].flatMap((step) => when.map((when) => `${when} ${step}`));
/** What happens only once a run is caught the first time, everything else the second. */
const timeOf = (step: string) => /open|close|settled|unseal|fail|park/.test(step) ? 1 : 2;

for (const step of steps("http-idempotent")) {
  Deno.test(`SIGKILL ${step}: a target that dedupes charges each order once`, async () => {
    await using payments = new Payments();
    await using box = await outbox(12);
    // Two orders are refused for the moment, so that every step is reached.
    payments.answer = (key, nth) =>
      nth === 1 && ["order-2", "order-4"].includes(key)
        ? new Response(null, { status: 429, headers: { "retry-after": "0" } })
        : Response.json({ paid: key });
    await killAt({ kind: "http-idempotent", path: box.path, target: payments.url, step, time: timeOf(step) });
    assertEquals([...payments.charges.keys()].toSorted(), box.ids().toSorted());
    assertOrder(payments.order);
    assertEquals(await box.store.count(), { claimed: 0, waiting: 0, done: 12, rejected: 0, uncertain: 0 });
    assertEquals((await sqliteOutbox(box.client).status()).pending, 0);
  });
}

for (const step of steps("http")) {
  Deno.test(`SIGKILL ${step}: a target that does not dedupe is never asked twice, and every doubt shows (acceptance 17)`, async () => {
    await using payments = new Payments();
    await using box = await outbox(12);
    await killAt({ kind: "http", path: box.path, target: payments.url, step, time: timeOf(step) });
    for (const [key, count] of payments.requests) assertEquals(count, 1, `${key} was sent ${count} times`);
    const { done, uncertain, claimed, waiting } = await box.store.count();
    assertEquals([claimed, waiting], [0, 0]);
    const { pending, parked } = await sqliteOutbox(box.client).status();
    // What is in doubt holds back the later messages of its key, unsent.
    assertEquals(done + uncertain + pending, 12);
    assertEquals(parked, uncertain);
    const sent = [...payments.requests.keys()];
    const known = (await box.store.list()).map(({ key }) => key);
    assertEquals(sent.filter((key) => !known.includes(key)), []);
    assertOrder(payments.order);
    const inCall = ["after store.claimAll", "before sink.deliver", "after sink.deliver", "before store.completeAll"];
    if (inCall.includes(step)) assert(uncertain > 0, "killed between claim and completion, and nothing is in doubt");
  });
}

for (const step of steps("file")) {
  Deno.test(`SIGKILL ${step}: a file has each message once`, async () => {
    await using box = await outbox(12);
    const target = `${box.folder}/out.jsonl`;
    await killAt({ kind: "file", path: box.path, target, step, time: timeOf(step) });
    const lines = (await Deno.readTextFile(target)).trimEnd().split("\n").map((line) => JSON.parse(line));
    const ids = lines.filter((line) => !("effectonce" in line)).map(({ id }) => id);
    assertEquals(ids, box.ids());
    assertEquals((await sqliteOutbox(box.client).status()).pending, 0);
  });
}

for (const step of steps("handler")) {
  Deno.test(`SIGKILL ${step}: a database has each message once, by its handler`, async () => {
    await using box = await outbox(24);
    const target = `${box.folder}/target.db`;
    const db = new DatabaseSync(target);
    try {
      await migrateSqlite(db);
      db.exec("create table charges (id text, pid integer)");
      await killAt({ kind: "handler", path: box.path, target, step, time: timeOf(step) });
      const ids = db.prepare("select id from charges order by rowid").all().map((row) => String(row.id));
      assertEquals(ids.toSorted(), box.ids().toSorted());
      assertOrder(ids);
      assertEquals((await sqliteOutbox(box.client).status()).pending, 0);
    } finally {
      db.close();
    }
  });
}

for (const step of steps("once")) {
  Deno.test(`SIGKILL ${step}: once() does each effect once at a target that dedupes`, async () => {
    await using payments = new Payments();
    await using box = await outbox(0);
    await killAt({ kind: "once", path: box.path, target: payments.url, step, time: 2 });
    assertEquals(payments.charges.size, 6);
    assertEquals((await box.store.count()).done, 6);
  });
}

Deno.test(`${LONG ? 200 : 20} SIGKILLs at random moments, two relays, a writer: each order charged once, in order`, async () => {
  const kills = LONG ? 200 : 20;
  await using payments = new Payments();
  await using box = await outbox(50);
  payments.answer = async () => {
    await new Promise((resolve) => setTimeout(resolve, Math.random() * 4));
    return Response.json({ paid: true });
  };
  const plan: Plan = {
    ...{
      kind: "http-idempotent",
      path: box.path,
      target: payments.url,
      step: "",
      time: 1,
      leaseMs: 300,
      drain: false,
    } as const,
  };
  const children = [new Child(plan), new Child(plan)];
  let total = 50;
  for (let kill = 0; kill < kills; kill++) {
    await box.enqueue(total + 1, total + 20);
    total += 20;
    const i = kill % 2;
    const victim = children[i]!;
    // The moment is random; nothing waits for it to have passed.
    await new Promise((resolve) => setTimeout(resolve, 50 + Math.random() * 250));
    await victim.kill();
    children[i] = new Child(plan);
  }
  for (const child of children) await child.kill();
  const last = new Child({ ...plan, drain: true });
  assertEquals(await last.until((line) => line === "drained"), "drained");
  await last.end();
  assertEquals(payments.charges.size, total);
  assertOrder(payments.order);
  assertEquals((await box.store.count()).done, total);
});

Deno.test("a relay stopped (SIGSTOP) past its lease and woken does not overwrite the newer owner's result (acceptance 16)", async () => {
  await using payments = new Payments();
  await using box = await outbox(1);
  const arrived = Promise.withResolvers<void>();
  const release = Promise.withResolvers<void>();
  payments.answer = async (_, nth) => {
    if (nth > 1) return Response.json({ owner: "second" });
    arrived.resolve();
    await release.promise;
    return Response.json({ owner: "first" });
  };
  const first = new Child({
    ...{ kind: "http-idempotent", path: box.path, target: payments.url, step: "", time: 1, leaseMs: 300, drain: false },
    deaf: true,
  });
  await arrived.promise;
  first.signal("SIGSTOP");
  const to = httpSink(payments.url, { repeat: "same-key" });
  // Waits for the lease's end, takes over and finishes.
  await relay({ from: sqliteOutbox(box.client), to, store: box.store, leaseMs: 300, drain: true, maxRetryMs: 300 });
  release.resolve();
  first.signal("SIGCONT");
  const lost = await first.until((line) => line.includes("lease_lost"));
  assert(lost !== undefined, "the first owner never heard that it lost its lease");
  await first.kill();
  const [effect] = await box.store.list();
  const { state, result, evidence } = effect!;
  assertEquals([state, JSON.parse((result as { body: string }).body)], ["done", { owner: "second" }]);
  assert(JSON.stringify(evidence).includes("first"), "the late outcome is kept as evidence");
});

Deno.test("two relays on one database at once deliver each message once, in order", async () => {
  await using payments = new Payments();
  await using box = await outbox(200);
  const plan: Plan = {
    ...{ kind: "http", path: box.path, target: payments.url, step: "", time: 1, leaseMs: 5_000, drain: true } as const,
  };
  const children = [new Child(plan), new Child(plan)];
  for (const child of children) {
    assertEquals(await child.until((line) => line === "drained"), "drained");
    assertEquals((await child.end()).code, 0);
  }
  assertEquals(payments.requests.size, 200);
  assertEquals([...payments.requests.values()].filter((count) => count !== 1), []);
  assertOrder(payments.order);
});

Deno.test("the loop without claims as a control: the same kill makes it charge twice", async () => {
  await using payments = new Payments();
  await using box = await outbox(12);
  await killAt({ kind: "plain", path: box.path, target: payments.url, step: "after sink.deliver", time: 2 });
  assertEquals(payments.requests.size, 12);
  assert([...payments.requests.values()].some((count) => count > 1), "no duplicate: these kills prove nothing");
});
