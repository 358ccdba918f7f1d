/**
 * A relay in a process of its own, that stops dead at a named step until it is killed. Its one argument is a {@linkcode Plan}.
 *
 * @module
 */
import { DatabaseSync } from "node:sqlite";
import { type AtomicSink, type CallSink, type ClaimStore, handler, once, relay, type Sink, type Source } from "../mod.ts";
import { fileSink } from "../adapters/file.ts";
import { httpSink } from "../adapters/http.ts";
import { type SqliteClient, sqliteOutbox, sqliteStore } from "../adapters/sqlite.ts";
import { say, stopping } from "./stopping.ts";

/** What the child does, and where it stops. */
export interface Plan {
  /** Which ends. */
  readonly kind: "http" | "http-idempotent" | "plain" | "file" | "handler" | "once";
  /** The database with the outbox and the claims. */
  readonly path: string;
  /** URL, file or database of the target. */
  readonly target: string;
  /** Such as `before store.claimAll` or `after sink.deliver`; empty: nowhere. */
  readonly step: string;
  /** At the so-manieth time that it gets there, from 1. */
  readonly time: number;
  /** Lease in milliseconds. */
  readonly leaseMs: number;
  /** Until nothing is left, or until killed. */
  readonly drain: boolean;
  /** Whether calls go on although their signal has fired. */
  readonly deaf?: boolean;
}

const CALLS = ["source.open", "source.read", "store.claimAll", "sink.deliver", "store.completeAll", "source.settle"];

/** Every step of each protocol that touches one of the systems. */
export const STEPS: Readonly<Record<Plan["kind"], readonly string[]>> = {
  "http": [...CALLS, "source.close"],
  "http-idempotent": [...CALLS, "source.close", "store.fail", "source.park"],
  "plain": ["sink.deliver"],
  "file": [
    ...["source.open", "source.settled", "sink.open", "source.seal", "sink.commit", "sink.close", "source.close"],
  ],
  "handler": [
    ...["source.open", "source.settled", "sink.open", "source.seal", "sink.commit", "source.unseal", "sink.close"],
    ...["sink.handle", "source.close"],
  ],
  "once": ["store.claim", "sink.deliver", "store.complete"],
};

if (import.meta.main) {
  const plan: Plan = JSON.parse(Deno.args[0]!);
  const stop = stopping(plan);

  const connect = (path: string): SqliteClient => {
    const client = new DatabaseSync(path);
    client.prepare("pragma busy_timeout = 20").get();
    return client;
  };
  const client = connect(plan.path);
  const store: ClaimStore = stop("store", sqliteStore(client));
  const source: Source = stop("source", sqliteOutbox(client));

  if (plan.kind === "once") {
    const { deliver } = stop("sink", {
      async deliver(key: string): Promise<string> {
        const response = await fetch(plan.target, { method: "POST", headers: { "idempotency-key": key } });
        return await response.text();
      },
    });
    for (let i = 1; i <= 6; i++) {
      const key = { scope: "charge", key: `order-${i}` };
      await once(store, key, ({ idempotencyKey }) => deliver(idempotencyKey), {
        leaseMs: plan.leaseMs,
        repeat: "same-key",
        dedupeWindowMs: 86_400_000,
        waitMs: 60_000,
      });
    }
  } else {
    const sink = (): CallSink | AtomicSink => {
      switch (plan.kind) {
        case "file":
          return fileSink(plan.target);
        case "handler": {
          const failed = new Set<string>();
          const { handle } = stop("sink", { handle: (id: string) => Promise.resolve(id) });
          return handler(sqliteStore(connect(plan.target)), async (message, _, client) => {
            client.prepare("insert into charges (id, pid) values (?, ?)").run(message.id, Deno.pid);
            await handle(message.id);
            // Once in a while a message fails alone, so that batches are taken apart.
            if (Number(message.key!.slice(6)) % 7 === 3 && !failed.has(message.id)) {
              failed.add(message.id);
              throw new Error("not yet");
            }
          });
        }
        default: {
          const sink = httpSink(plan.target, { repeat: plan.kind === "http-idempotent" ? "same-key" : "never" });
          const { signal } = new AbortController();
          return plan.deaf ? { ...sink, deliver: (message, call) => sink.deliver(message, { ...call, signal }) } : sink;
        }
      }
    };
    const to: Sink = stop("sink", sink());
    const { leaseMs, drain } = plan;
    const observe = (event: object) => say(JSON.stringify(event));
    const times = { minRetryMs: 1, maxRetryMs: 20, pollMs: 5 };
    const claims = plan.kind === "plain" ? { allowDuplicates: true } : { store };
    await relay({ from: source, to, ...claims, leaseMs, drain, lanes: 3, batch: 5, ...times, observe });
  }
  say("drained");
}
