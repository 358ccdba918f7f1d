/** What every runtime has to do: `once`, `relay`, and the requirements of the conformance suites, on the ends that it brings. */
import { createMessage, type EffectStore, handler, type Message, once, realRuntime, relay } from "@effectonce/effectonce";
import {
  atomicSinkCases,
  type AtomicSinkHarness,
  type Case,
  type Harness,
  relayCases,
  sourceCases,
  type SourceHarness,
  storeCases,
  type StoreHarness,
} from "@effectonce/effectonce/conformance";
import { httpSink } from "@effectonce/effectonce/http";
import { memoryOutbox, memorySink, memoryStore } from "@effectonce/effectonce/memory";

/** What came of one suite. */
export interface Outcome {
  /** How many requirements there are. */
  readonly cases: number;
  /** How many of them were met. */
  readonly passed: number;
  /** Which were not tried, and why. */
  readonly skipped: Readonly<Record<string, string>>;
  /** Which were not met, and the error. */
  readonly failed: Readonly<Record<string, string>>;
}

/** Outcomes by the name of the suite. */
export type Outcomes = Record<string, Outcome>;

/** The ends of one kind of storage. */
export interface Ends {
  readonly store: StoreHarness;
  readonly source: SourceHarness;
  readonly sink: AtomicSinkHarness;
}

/** Runs all cases of one suite, one after the other. */
export async function runCases<H extends Harness>(cases: readonly Case<H>[], harness: H): Promise<Outcome> {
  const failed: Record<string, string> = {};
  const skipped: Record<string, string> = {};
  let passed = 0;
  for (const { name, run } of cases) {
    const reason = harness.skip?.[name];
    if (reason !== undefined) {
      skipped[name] = reason;
      continue;
    }
    try {
      await run(harness);
      passed++;
    } catch (error) {
      failed[name] = error instanceof Error ? error.stack ?? error.message : String(error);
    }
  }
  return { cases: cases.length, passed, skipped, failed };
}

/** Runs the suites of one kind of storage. */
export async function runEnds(name: string, { store, source, sink }: Ends): Promise<Outcomes> {
  return {
    [`store: ${name}`]: await runCases(storeCases, store),
    [`source: ${name}`]: await runCases(sourceCases, source),
    [`atomic sink: ${name}`]: await runCases(atomicSinkCases, sink),
  };
}

// ----------------------------------------------------------------------------------------------------------------- memory

/** A message that such a handler takes, or refuses if the id is `bad`. */
export const refused = (id: string): Message =>
  createMessage({ id, topic: "orders", key: null, value: null, headers: {}, time: new Date() });

let serial = 0;

/** A handler that keeps messages as effects, whose results tell the order. */
export function handlerOn<C>(store: EffectStore<C>): ReturnType<typeof handler> {
  return handler(store, async ({ id }, effects) => {
    if (id === "bad") throw new Error("refused");
    await effects.claim({ scope: "content", key: id });
    await effects.complete({ scope: "content", key: id }, ++serial);
  });
}

/** What such a handler has kept, in order. */
export async function contentsOf<C>(store: EffectStore<C>): Promise<string[]> {
  const found = (await store.list({ scope: "content" })).map(({ key, result }) => ({ key, order: Number(result) }));
  return found.sort((a, b) => a.order - b.order).map(({ key }) => key);
}

const noDeath = "relays on memory end with their process, and the memory with them";

/** Everything in memory. */
export const memory: Ends = {
  store: {
    open() {
      let now = Date.now();
      // Its waits are 50 times shorter.
      const runtime = { ...realRuntime, sleep: (ms: number, signal?: AbortSignal) => realRuntime.sleep(ms / 50, signal) };
      const store = memoryStore({ now: () => now, runtime }) as EffectStore<unknown>;
      const advance = (ms: number) => Promise.resolve(void (now += ms));
      return Promise.resolve({ store, again: store, waitMs: 100, advance, close: () => Promise.resolve() });
    },
  },
  source: {
    open() {
      let now = Date.now();
      const store = memoryStore({ now: () => now });
      return Promise.resolve({
        source: (options) => memoryOutbox(store, options),
        again: (options) => memoryOutbox(store, options),
        enqueue: store.enqueue,
        advance: (ms) => Promise.resolve(void (now += ms)),
        release: memoryOutbox(store).release,
        discard: memoryOutbox(store).discard,
        snapshot: () => Promise.resolve(store.snapshot()),
        close: () => Promise.resolve(),
      });
    },
    skip: {
      "close() of a relay that leaves something behind keeps the topics for its name": noDeath,
      "a relay that fell silent keeps its topics for its name, but for the plain protocol": noDeath,
      "a relay that fell silent keeps no topics of which nothing is left": noDeath,
      "a relay that wakes after its topics went to another name delivers nothing more": noDeath,
    },
  },
  sink: {
    open() {
      const store = memoryStore();
      return Promise.resolve({
        sink: handlerOn(store),
        again: () => handlerOn(store),
        contents: () => contentsOf(store),
        refused,
        close: () => Promise.resolve(),
      });
    },
  },
};

// ------------------------------------------------------------------------------------------------------------ the program

function equal(actual: unknown, expected: unknown, what: string): void {
  const [got, wanted] = [JSON.stringify(actual), JSON.stringify(expected)];
  if (got !== wanted) throw new Error(`Expected ${what} to be ${wanted}, got ${got}`);
}

/** `once` and `relay` as a program uses them, on the platform's own clock and timers. */
const programs: readonly Case<Harness>[] = [
  {
    name: "once() runs its effect once, and hands out the kept result",
    async run() {
      const store = memoryStore();
      let charges = 0;
      const charge = () =>
        once(store, { scope: "charge", key: "order-1" }, ({ request, idempotencyKey, signal }) => {
          charges++;
          return Promise.resolve({ amount: request.amount, idempotencyKey, late: signal.aborted });
        }, { request: { amount: 5 }, repeat: "same-key", dedupeWindowMs: 86_400_000 });
      const expected = { amount: 5, idempotencyKey: "charge:order-1", late: false };
      equal(await charge(), expected, "the result");
      equal(await charge(), expected, "the kept result");
      equal(charges, 1, "the number of charges");
    },
  },
  {
    name: "relay() delivers in order by key, and drains",
    async run() {
      const store = memoryStore();
      for (let i = 0; i < 20; i++) await store.enqueue({ id: `m${i}`, topic: "orders", key: `k${i % 2}`, value: { i } });
      const to = memorySink();
      const report = await relay({ from: memoryOutbox(store), to, store, drain: true });
      equal(report, { delivered: 20, parked: 0, uncertain: 0 }, "the report");
      for (const rest of [0, 1]) {
        const order = to.messages.filter(({ key }) => key === `k${rest}`).map((message) => message.json<{ i: number }>().i);
        equal(order, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9].map((n) => 2 * n + rest), `the order of k${rest}`);
      }
    },
  },
  {
    name: "relay() that does not drain stops when its signal fires",
    async run() {
      const store = memoryStore();
      await store.enqueue({ topic: "orders", value: 1 });
      const stop = new AbortController();
      const to = memorySink({ deliver: () => Promise.resolve(null).finally(() => stop.abort()) });
      const report = await relay({ from: memoryOutbox(store), to, store, signal: stop.signal });
      equal(report, { delivered: 1, parked: 0, uncertain: 0 }, "the report");
    },
  },
];

/** `relay` into a real HTTP server that answers at this URL: 200 with the request's body and Idempotency-Key. */
const httpProgram = (url: string): Case<Harness> => ({
  name: "httpSink() asks a server, and keeps its answer",
  async run() {
    const store = memoryStore();
    await store.enqueue({ id: "order-1", topic: "payments", value: { amount: 5 } });
    await relay({ from: memoryOutbox(store), to: httpSink(url, { repeat: "same-key" }), store, drain: true });
    const [record] = await store.list();
    equal(record?.result, { status: 200, body: `order-1 {"amount":5}` }, "the kept answer");
  },
});

/** How many programs there are. */
export const programCount: number = programs.length + 1;

/** Runs what needs no storage of the runtime's own. @param url Of a server as {@linkcode httpProgram} needs it. */
export async function runCore(url: string): Promise<Outcomes> {
  return {
    "programs": await runCases([...programs, httpProgram(url)], {}),
    "relay": await runCases(relayCases, { relay, handler }),
    ...await runEnds("memory", memory),
  };
}
