/** A program as an npm user writes it, for `tsc`; it is checked, not run. */
import {
  type Claim,
  EffectError,
  type EffectErrorCode,
  guarantee,
  handler,
  type Message,
  once,
  type Outbox,
  rejected,
  relay,
  type RelayReport,
  retryable,
  type Sink,
} from "@effectonce/effectonce";
import { settledShard, settlePlan } from "@effectonce/effectonce/adapter";
import { main } from "@effectonce/effectonce/cli";
import { storeCases, type StoreHarness } from "@effectonce/effectonce/conformance";
import { fileSink, stdoutSink } from "@effectonce/effectonce/file";
import { httpSink, type HttpSinkOptions } from "@effectonce/effectonce/http";
import { memoryOutbox, memorySink, memoryStore } from "@effectonce/effectonce/memory";
import { migrateSqlite, type SqliteClient, sqliteOutbox, sqliteStore } from "@effectonce/effectonce/sqlite";
import type { DatabaseSync } from "node:sqlite";

const store = memoryStore();

/** `once`: the result has the effect's type, and the request comes back as it was given. */
export async function charge(amount: number): Promise<string> {
  const { id } = await once(store, { scope: "charge", key: "order-1" }, async ({ request, idempotencyKey, signal }) => {
    if (request.amount <= 0) throw rejected("nothing to charge", { amount: request.amount });
    if (signal.aborted) throw retryable("later", { afterMs: 1_000 });
    return await Promise.resolve({ id: `payment-${idempotencyKey}` });
  }, { request: { amount }, repeat: "same-key", dedupeWindowMs: 86_400_000 });
  // @ts-expect-error Who repeats must say for how long the target dedupes.
  await once(store, { scope: "charge", key: "order-1" }, () => Promise.resolve(1), { repeat: "same-key" });
  // @ts-expect-error A result is JSON.
  await once(store, { scope: "charge", key: "order-1" }, () => Promise.resolve(new Map()));
  return id;
}

/** A claim is narrowed by its state, an error by its code. */
export function explain(claim: Claim, error: unknown): string {
  if (error instanceof EffectError) {
    const code: EffectErrorCode = error.code;
    return code;
  }
  if (claim.state === "busy") return `${claim.retryMs} ms`;
  // @ts-expect-error Only a busy claim tells how long.
  return claim.retryMs;
}

/** `relay` from SQLite into each of the sinks. */
export async function deliver(db: DatabaseSync): Promise<readonly RelayReport[]> {
  const client: SqliteClient = db;
  await migrateSqlite(db);
  const store = sqliteStore(db, { waitMs: 1_000 });
  await store.transaction(async (effects, database) => {
    database.exec("insert into orders values (1)");
    await effects.enqueue({ topic: "payments", key: "order-1", value: { amount: 5 }, headers: { trace: "1" } });
  });
  const from: Outbox = sqliteOutbox(client, { topics: ["payments"], keep: true });
  const options: HttpSinkOptions = { repeat: "same-key", headers: { authorization: "Bearer token" } };
  const sinks: readonly Sink[] = [
    httpSink(new URL("https://pay.example/charge"), options),
    fileSink("events.jsonl"),
    stdoutSink(() => Promise.resolve()),
    memorySink(),
    handler(store, async (message: Message, effects, database) => {
      database.exec("insert into seen values (1)");
      await effects.claim({ scope: "seen", key: message.id });
    }, { key: (message) => message.json<{ order: string }>().order }),
  ];
  const reports: RelayReport[] = [];
  for (const to of sinks) {
    console.log(guarantee(from, to, store).protocol);
    const signal = AbortSignal.timeout(10_000);
    reports.push(
      await relay({ name: "payments", from, to, store, drain: true, signal, observe: ({ type }) => console.log(type) }),
    );
  }
  // @ts-expect-error There is no such sink.
  await relay({ from, to: "stdout" });
  // @ts-expect-error That is no SQLite client.
  sqliteStore({});
  return reports;
}

/** What authors of adapters use. */
export async function adapter(): Promise<number> {
  const harness: StoreHarness = {
    open: () => Promise.resolve({ store, again: store, advance: () => Promise.resolve(), close: () => Promise.resolve() }),
  };
  for (const { name, run } of storeCases) if (!(name in (harness.skip ?? {}))) await run(harness);
  console.log(settlePlan(settledShard({ n: 0, uid: "", prev: "", rows: [] }), [], []).settle, memoryOutbox(store).name);
  return await main(["help"]);
}
