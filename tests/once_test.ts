/** What `once()` promises, on a clock that jumps from one waiting call to the next. */
import { assert, assertEquals, assertRejects, assertStringIncludes } from "@std/assert";
import {
  type Attempt,
  type EffectError,
  type EffectEvent,
  type Json,
  once,
  type OnceOptions,
  rejected,
  retryable,
  type Runtime,
} from "../mod.ts";
import { memoryStore } from "../adapters/memory.ts";

/** Time passes only when everybody waits for it. */
class Clock implements Runtime {
  time = 1_000_000;
  readonly #waiting: { at: number; wake(): void }[] = [];
  now = (): number => this.time;
  random = (): number => 0.5;
  sleep = (ms: number, signal?: AbortSignal): Promise<void> =>
    new Promise((resolve) => {
      if (signal?.aborted) return resolve();
      const waiter = { at: this.time + ms, wake: resolve };
      signal?.addEventListener("abort", () => {
        this.#waiting.splice(this.#waiting.indexOf(waiter) >>> 0, 1);
        resolve();
      });
      this.#waiting.push(waiter);
      setTimeout(() => this.#pass());
    });
  #pass(): void {
    const next = this.#waiting.toSorted((a, b) => a.at - b.at)[0];
    if (!next) return;
    this.#waiting.splice(this.#waiting.indexOf(next), 1);
    this.time = Math.max(this.time, next.at);
    next.wake();
    setTimeout(() => this.#pass());
  }
}

const KEY = { scope: "charge", key: "order-1" };
const DAY = 86_400_000;
const SAME_KEY = { repeat: "same-key", dedupeWindowMs: DAY } as const;

function world() {
  const clock = new Clock();
  const store = memoryStore({ now: clock.now, runtime: clock });
  const events: EffectEvent["type"][] = [];
  const calls: Attempt<Json>[] = [];
  /** Calls once() with this clock; counts the calls of the effect. */
  const run = <R extends Json>(
    effect: (attempt: Attempt<Json>) => Promise<R>,
    options: OnceOptions<R, Json> = {},
    key = KEY,
  ): Promise<R> =>
    once<R, Json>(
      store,
      key,
      (attempt) => {
        calls.push(attempt);
        return effect(attempt);
      },
      { runtime: clock, observe: ({ type }) => events.push(type), waitMs: 0, ...options },
    );
  return { clock, store, events, calls, run };
}

async function fails(code: string, run: () => Promise<unknown>): Promise<EffectError> {
  const error = await assertRejects(run) as EffectError;
  assertEquals(error.code, code, error.message);
  return error;
}

const pay = () => Promise.resolve("paid");
const reset = () => Promise.reject(new Error("connection reset"));

Deno.test("once() gives a repeated key the stored result, and runs the effect once", async () => {
  const { run, calls, events } = world();
  assertEquals([await run(pay), await run(() => Promise.resolve("again"))], ["paid", "paid"]);
  assertEquals([calls.length, events], [1, ["claimed"]]);
});

Deno.test("once() waits for another owner up to waitMs, then says busy", async () => {
  const { run, store, clock } = world();
  const claim = await store.claim(KEY, { leaseMs: 30_000 });
  assert(claim.state === "claimed");
  const start = clock.time;
  await fails("busy", () => run(pay, { waitMs: 2_000 }));
  assertEquals(clock.time - start, 2_000);
  clock.sleep(500).then(() => store.complete(KEY, claim.fence, "by another"));
  assertEquals(await run(pay, { waitMs: 2_000 }), "by another");
});

Deno.test("once() gives up waiting when its signal fires", async () => {
  const { run, store, calls } = world();
  await store.claim(KEY, { leaseMs: 30_000 });
  const stop = new AbortController();
  const running = run(pay, { waitMs: 20_000, signal: stop.signal });
  stop.abort(new Error("enough"));
  assertStringIncludes((await assertRejects(() => running) as Error).message, "enough");
  assertEquals(calls.length, 0);
});

Deno.test("once() refuses another request under the same key", async () => {
  const { run, calls } = world();
  await run(pay, { request: { amount: 5 } });
  await fails("mismatch", () => run(pay, { request: { amount: 6 } }));
  assertEquals(calls.length, 1);
});

Deno.test("once() hands the stored request to every attempt, whatever the order of its members (acceptance 19)", async () => {
  const { run, calls } = world();
  await assertRejects(() => run(reset, { request: { amount: 5, currency: "eur" }, ...SAME_KEY }));
  await run(pay, { request: { currency: "eur", amount: 5 }, ...SAME_KEY });
  assertEquals(calls.map(({ request }) => JSON.stringify(request)), Array(2).fill('{"amount":5,"currency":"eur"}'));
  // A new default is another request: it is not sent.
  await fails("mismatch", () => run(pay, { request: { currency: "eur", amount: 5, capture: true }, ...SAME_KEY }));
});

Deno.test("once() hands bytes as they were given", async () => {
  const { clock, store } = world();
  const request = new Uint8Array([1, 0, 255]);
  const options = { request, runtime: clock };
  assertEquals(await once(store, KEY, ({ request }) => Promise.resolve([...request]), options), [1, 0, 255]);
});

Deno.test("once() leaves an unknown outcome in doubt, and never repeats it (acceptance 17)", async () => {
  const { run, calls, events } = world();
  const error = await fails("uncertain", () => run(reset));
  assertStringIncludes(String(error.cause), "connection reset");
  await fails("uncertain", () => run(pay, { waitMs: 60_000 }));
  assertEquals([calls.length, events], [1, ["claimed", "uncertain", "uncertain"]]);
});

Deno.test("once() leaves an interrupted effect in doubt when its lease is over", async () => {
  const { run, store, calls } = world();
  await store.claim(KEY, { leaseMs: 30_000 }); // Whoever claimed it is gone.
  await fails("uncertain", () => run(pay, { waitMs: 60_000 }));
  assertEquals(calls.length, 0);
});

Deno.test("once() repeats under the same key where the destination dedupes", async () => {
  const { run, calls } = world();
  assertStringIncludes((await assertRejects(() => run(reset, SAME_KEY)) as Error).message, "connection reset");
  assertEquals(await run(pay, SAME_KEY), "paid");
  assertEquals(calls.map(({ idempotencyKey, number }) => [idempotencyKey, number]), [
    ["charge:order-1", 1],
    ["charge:order-1", 2],
  ]);
});

Deno.test("once() never repeats past 80 % of the dedupe window, counted from the first attempt (acceptance 18)", async () => {
  const { run, calls, clock } = world();
  const first = clock.time;
  await assertRejects(() => run(reset, SAME_KEY));
  clock.time = first + DAY / 2;
  await assertRejects(() => run(reset, SAME_KEY));
  clock.time = first + 0.8 * DAY + 1;
  await fails("uncertain", () => run(pay, SAME_KEY));
  assertEquals(calls.length, 2);
});

Deno.test("once() needs dedupeWindowMs to repeat", async () => {
  const { run } = world();
  await assertRejects(() => run(pay, { repeat: "same-key", dedupeWindowMs: 0 }), RangeError, "dedupeWindowMs");
});

Deno.test("once() replays a refusal for ever, until a person allows it anew under a new idempotency key", async () => {
  const { run, store, calls } = world();
  const declined = () => Promise.reject(rejected("card declined", { code: 51 }));
  const error = await fails("rejected", () => run(declined));
  assertEquals(error.result, { code: 51 });
  assertEquals((await fails("rejected", () => run(pay))).result, { code: 51 });
  assertEquals(calls.length, 1);
  await store.resolve(KEY, { as: "absent" });
  assertEquals(await run(pay), "paid");
  assertEquals(calls.map(({ idempotencyKey }) => idempotencyKey), ["charge:order-1", "charge:order-1;generation=2"]);
});

Deno.test("once() lets an effect be tried again that is known not to have happened, after its time", async () => {
  const { run, calls, clock } = world();
  await assertRejects(
    () => run(() => Promise.reject(retryable("too many requests", { afterMs: 5_000 }))),
    Error,
    "too many",
  );
  await fails("busy", () => run(pay));
  clock.time += 5_000;
  assertEquals(await run(pay), "paid");
  assertEquals(calls.map(({ idempotencyKey }) => idempotencyKey), ["charge:order-1", "charge:order-1"]);
});

Deno.test("once() asks the destination about a doubt, but not before what was sent last has arrived", async () => {
  for (const found of ["done", "absent", "unknown"] as const) {
    const { run, calls, clock, store } = world();
    await fails("uncertain", () => run(reset));
    const doubtAt = clock.time;
    const asked: [number, string][] = [];
    const reconcile = (_: unknown, idempotencyKey: string) => {
      asked.push([clock.time - doubtAt, idempotencyKey]);
      return Promise.resolve(found === "done" ? { state: found, result: "found" } : { state: found });
    };
    const options = { waitMs: 60_000, settleMs: 4_000, reconcile };
    if (found === "unknown") await fails("uncertain", () => run(pay, options));
    else assertEquals(await run(pay, options), found === "done" ? "found" : "paid");
    assertEquals(asked, [[4_000, "charge:order-1"]]);
    assertEquals(calls.length, found === "absent" ? 2 : 1);
    assertEquals((await store.list())[0]!.state, found === "unknown" ? "uncertain" : "done");
  }
});

Deno.test("once() completes an effect whose result cannot be kept, and says so", async () => {
  for (const result of ["x".repeat(65_536), 10n as unknown as string, (() => {}) as unknown as string]) {
    const { run, calls, events, store } = world();
    assertEquals(await run(() => Promise.resolve(result)), result);
    assertEquals(await run<Json>(pay), null);
    assertEquals([calls.length, events], [1, ["claimed", "result_omitted"]]);
    const claim = await store.claim(KEY, { leaseMs: 1 });
    assert(claim.state === "done" && claim.resultOmitted);
  }
});

Deno.test("once() renews its lease while the effect runs", async () => {
  const { run, store, clock } = world();
  const rivals: string[] = [];
  const slow = async ({ signal }: Attempt<Json>) => {
    for (let i = 0; i < 10; i++) {
      await clock.sleep(20_000);
      rivals.push((await store.claim(KEY, { leaseMs: 1_000 })).state);
    }
    assert(!signal.aborted, "The signal fired although the lease was renewed");
    return "paid";
  };
  assertEquals(await run(slow, { leaseMs: 30_000 }), "paid");
  assertEquals(rivals, Array(10).fill("busy"));
});

Deno.test("once() fires the signal before the lease ends where it cannot be renewed", async () => {
  const { clock, store, events } = world();
  const deaf = { ...store, renew: () => Promise.reject(new Error("the database is away")) };
  const start = clock.time;
  let firedAt = 0;
  const effect = ({ signal }: Attempt<null>) =>
    new Promise<string>((_, reject) =>
      signal.addEventListener("abort", () => {
        firedAt = clock.time - start;
        reject(new Error("stopped"));
      })
    );
  const options = { leaseMs: 30_000, runtime: clock, observe: ({ type }: EffectEvent) => events.push(type) };
  await fails("uncertain", () => once(deaf, KEY, effect, options));
  assert(firedAt > 20_000 && firedAt < 30_000, `The signal fired after ${firedAt} ms`);
});

Deno.test("once() that comes too late answers what the newer owner recorded, and leaves its own as evidence", async () => {
  const { run, store, events } = world();
  const slow = async () => {
    // While this one stood still, its lease ended, and a person found out and decided.
    await store.fail(KEY, 1, { as: "unknown", reason: "silent" });
    await store.resolve(KEY, { as: "done", result: "the truth" });
    return "too late";
  };
  assertEquals(await run(slow), "the truth");
  assertEquals(events, ["claimed", "lease_lost"]);
  assertStringIncludes(JSON.stringify((await store.list())[0]!.evidence), "too late");
});

Deno.test("once() writes down what has happened though the store fails for a moment", async () => {
  const { clock, store } = world();
  let failures = 0;
  const shaky: typeof store = {
    ...store,
    complete: (...args) => failures++ < 3 ? Promise.reject(new Error("connection lost")) : store.complete(...args),
  };
  assertEquals(await once(shaky, KEY, pay, { runtime: clock }), "paid");
  assertEquals((await store.list())[0]!.state, "done");
});

Deno.test("once() makes different idempotency keys of different effects", async () => {
  const { run, calls } = world();
  for (const key of [{ scope: "a", key: "b:c" }, { scope: "a:b", key: "c" }, { scope: "a%3Ab", key: "c" }]) {
    await run(pay, {}, key);
  }
  assertEquals(new Set(calls.map(({ idempotencyKey }) => idempotencyKey)).size, 3);
});

Deno.test("once() refuses a key that is missing, empty or too long", async () => {
  const { run, calls } = world();
  for (const key of ["", "x".repeat(1025), undefined as unknown as string, "a\0b", "\ud800"]) {
    const error = await assertRejects(() => run(pay, {}, { scope: "charge", key }));
    assert(error instanceof RangeError || error instanceof TypeError, String(error));
  }
  assertEquals(calls.length, 0);
});
