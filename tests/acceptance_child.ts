/**
 * A worker in a process of its own, for what needs several. Its one argument is a {@linkcode Job}; it prints one line of JSON.
 *
 * @module
 */
import BetterSqlite3 from "better-sqlite3";
import { DatabaseSync } from "node:sqlite";
import { type EffectError, type EffectStore, once, realRuntime } from "../mod.ts";
import { type SqliteClient, sqliteStore } from "../adapters/sqlite.ts";

/** What the tests call of a client. */
export type Client = SqliteClient & { exec(sql: string): unknown; close(): unknown };
/** A driver's name. */
export type Driver = "better-sqlite3" | "node:sqlite";

/** No wait of the driver's own: it would block the thread, and with it the transaction that it waits for. */
export const drivers: Readonly<Record<Driver, (path: string) => Client>> = {
  "better-sqlite3": (path) => new BetterSqlite3(path, { timeout: 0 }) as Client,
  "node:sqlite": (path) => new DatabaseSync(path) as unknown as Client,
};

/** How a claim can be made: by itself, in a transaction of the store's, or in one of the caller's. */
export const WAYS = ["claim", "transaction", "begin", "begin immediate"] as const;

/** What a worker does. */
export type Job =
  & { readonly path: string; readonly driver: Driver }
  & (
    /** Claims one key in each way, `times` at once; asks the gate before each. */
    | { readonly does: "claim"; readonly gate: string; readonly times: number }
    /** Pays an order, and stops dead before or after its COMMIT, until it is killed. */
    | { readonly does: "pay"; readonly stop: "before" | "after" }
    /** Runs one effect, which asks the target. */
    | {
      readonly does: "once";
      readonly target: string;
      readonly leaseMs: number;
      readonly waitMs: number;
      /** How far this worker's own clocks are wrong. */
      readonly skewMs: number;
      /** Whose clock the store goes by. */
      readonly clock: "machine" | "worker";
      /** Whether the call goes on although its signal has fired. */
      readonly deaf?: boolean;
    }
    /** Several connections that write as fast as they can. */
    | {
      readonly does: "write";
      readonly name: string;
      readonly writers: number;
      readonly each: number;
      readonly waitMs: number;
    }
  );

/** What the job `claim` prints for each way: how often it was told what, and errors other than to be tried again. */
export type Claimed = Readonly<Record<string, number>>;

/** What the job `write` prints. */
export interface Written {
  /** How long each call of the store took, in milliseconds. */
  readonly tookMs: readonly number[];
  /** How often the wait ended in `busy`. */
  readonly busy: number;
  /** All other errors. */
  readonly errors: readonly string[];
}

/** The effect that several fight for. */
export const KEY = { scope: "charge", key: "order-1" };
const codeOf = (error: unknown): string => (error as EffectError).code ?? String(error);
const anyMoment = () => realRuntime.sleep(1 + Math.random() * 10);

/** An effect in the same database: the order is in the ledger once, whatever becomes of the answer. */
export async function pay(store: EffectStore<Client>, order: string): Promise<string> {
  return await store.transaction(async (effects, client) => {
    const { state } = await effects.claim({ scope: "orders", key: order });
    if (state === "claimed") client.prepare("insert into ledger (id) values (?)").run(order);
    return state;
  });
}

/** A claim in a transaction of the caller's own, who tries it again as a whole when the database says so. */
export async function claimJoined(client: Client, begin: string, key: string): Promise<string> {
  const store = sqliteStore(client);
  for (;;) {
    try {
      client.exec(begin);
      const { state } = await store.join(client).claim({ scope: "charge", key });
      client.exec("commit");
      return state;
    } catch (error) {
      try {
        client.exec("rollback");
      } catch {
        // Nothing was begun, or the error has ended it.
      }
      if (!store.isDatabaseFailure(error)) throw error;
      await anyMoment();
    }
  }
}

function claimBy(way: typeof WAYS[number], client: Client): Promise<string> {
  const key = { scope: "charge", key: way };
  switch (way) {
    case "claim":
      return sqliteStore(client).claim(key, { leaseMs: 60_000 }).then(({ state }) => state);
    case "transaction":
      return sqliteStore(client).transaction((effects) => effects.claim(key)).then(({ state }) => state);
    default:
      return claimJoined(client, way, way);
  }
}

async function write(client: Client, name: string, each: number, waitMs: number): Promise<Written> {
  const store = sqliteStore(client, { waitMs });
  const tookMs: number[] = [];
  const errors: string[] = [];
  let busy = 0;
  async function persistently<T>(call: () => Promise<T>): Promise<T | undefined> {
    for (;;) {
      const start = performance.now();
      try {
        const answer = await call();
        tookMs.push(performance.now() - start);
        return answer;
      } catch (error) {
        if (codeOf(error) !== "busy") return void errors.push(String(error));
        busy++;
      }
    }
  }
  for (let i = 0; i < each; i++) {
    await persistently(() => pay(store, `${name}-${i}`));
    await persistently(() => pay(store, `shared-${i}`));
    const key = { scope: "calls", key: `${name}-${i}` };
    const claim = await persistently(() => store.claim(key, { leaseMs: 60_000 }));
    if (claim?.state === "claimed") await persistently(() => store.complete(key, claim.fence, i));
  }
  return { tookMs, busy, errors };
}

if (import.meta.main) {
  const job: Job = JSON.parse(Deno.args[0]!);
  const say = (value: unknown) => Deno.stdout.writeSync(new TextEncoder().encode(`${JSON.stringify(value)}\n`));
  const open = () => drivers[job.driver](job.path);

  if (job.does === "claim") {
    const clients = Array.from({ length: job.times }, open);
    const told: Record<string, Claimed> = {};
    for (const way of WAYS) {
      await (await fetch(job.gate)).body?.cancel();
      const answers = await Promise.all(clients.map((client) => claimBy(way, client).catch(codeOf)));
      told[way] = Object.fromEntries([...new Set(answers)].map((one) => [one, answers.filter((it) => it === one).length]));
    }
    say(told);
  } else if (job.does === "pay") {
    const client = open();
    const stopping: SqliteClient = {
      prepare(sql) {
        const statement = client.prepare(sql);
        if (sql !== "commit") return statement;
        const run = (...values: unknown[]) => {
          if (job.stop === "after") statement.run(...values);
          say({ stopped: job.stop });
          Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0); // For ever: nothing goes on until the SIGKILL.
        };
        return Object.create(statement, { run: { value: run } });
      },
    };
    await pay(sqliteStore(stopping) as EffectStore<Client>, "order-1");
  } else if (job.does === "once") {
    const machine = Date.now;
    Date.now = () => machine() + job.skewMs;
    const store = sqliteStore(open(), { now: job.clock === "machine" ? machine : Date.now });
    const runtime = { ...realRuntime, now: () => realRuntime.now() + job.skewMs };
    const { leaseMs, waitMs } = job;
    const options = { leaseMs, waitMs, repeat: "same-key", dedupeWindowMs: 86_400_000, runtime } as const;
    try {
      const result = await once(store, KEY, async ({ idempotencyKey, signal }) => {
        const headers = { "idempotency-key": idempotencyKey };
        const response = await fetch(job.target, { method: "POST", headers, signal: job.deaf ? undefined : signal });
        return await response.text();
      }, options);
      say({ result });
    } catch (error) {
      say({ error: codeOf(error) });
    }
  } else {
    const all = await Promise.all(
      Array.from({ length: job.writers }, (_, i) => write(open(), `${job.name}-${i}`, job.each, job.waitMs)),
    );
    const written: Written = {
      tookMs: all.flatMap(({ tookMs }) => tookMs),
      busy: all.reduce((sum, { busy }) => sum + busy, 0),
      errors: all.flatMap(({ errors }) => errors),
    };
    say(written);
  }
}
