/**
 * The command `relay`: runs one relay, or those of a file, in one process.
 *
 * @module
 */
import {
  type AtomicSink,
  type CallSink,
  type Outbox,
  relay,
  type RelayEvent,
  type RelayOptions,
  type RelayReport,
} from "../mod.ts";
import { relayShards, type ShardedOutbox, type ShardsOptions } from "../adapters/shards.ts";
import type { Command } from "./command.ts";
import { effectiveConfig, relaysOf } from "./config.ts";
import { confirmed } from "./cursor.ts";
import { blaming, checkGroups, type Ends, openEnds, openTarget, type Plan, planOf } from "./ends.ts";
import { codeOf, reason, UsageError } from "./errors.ts";
import type { Flags } from "./flags.ts";
import { listen, parseAddress } from "./listen.ts";
import { permitTarget } from "./open.ts";
import { write } from "./print.ts";
import { RELAY_FLAGS } from "./relay_flags.ts";
import { showRelays } from "./show.ts";
import { Watch } from "./watch.ts";

/** Fires the signal that stops relays when the process is told to end; asked twice it ends at once. */
function onSignals(stop: AbortController): Disposable {
  const signals: readonly Deno.Signal[] = Deno.build.os === "windows" ? ["SIGINT"] : ["SIGINT", "SIGTERM"];
  const onSignal = () => {
    if (stop.signal.aborted) Deno.exit(130); // The effects under way stay in doubt.
    if (Deno.stderr.isTerminal()) console.error("finishing the calls under way; once more leaves them in doubt");
    stop.abort();
  };
  for (const signal of signals) Deno.addSignalListener(signal, onSignal);
  return {
    [Symbol.dispose]() {
      for (const signal of signals) Deno.removeSignalListener(signal, onSignal);
    },
  };
}

/** Says on stderr, since stdout is for events, where the relays can be asked. */
function tellAddress(url: string, json: boolean): void {
  console.error(json ? JSON.stringify({ type: "listening", url }) : `listening on ${url}`);
}

type Opened = Plan & Ends & { readonly sink: AtomicSink | CallSink };

/** Hears of a relay: `whole` as of one, whatever its parts are; `part` of each. */
interface Hearers {
  whole(event: RelayEvent): void;
  part(event: RelayEvent): void;
}

function runOne(
  { name, flags, outbox, topic, sink, store }: Opened,
  signal: AbortSignal,
  hearers: Hearers,
): Promise<RelayReport> {
  const observe = (event: RelayEvent) => {
    hearers.part(event);
    hearers.whole(event);
  };
  const allowDuplicates = flags.on("allow-duplicates");
  const options: Omit<RelayOptions, "from"> = {
    name,
    to: sink,
    store: allowDuplicates ? undefined : store,
    allowDuplicates,
    drain: flags.on("drain"),
    signal,
    observe,
    lanes: flags.number("lanes"),
    batch: flags.number("batch"),
    leaseMs: flags.number("lease-ms"),
    attempts: flags.number("attempts"),
    minRetryMs: flags.number("min-retry-ms"),
    maxRetryMs: flags.number("max-retry-ms"),
    settleMs: flags.number("settle-ms"),
    pollMs: flags.number("poll-ms"),
    onPark: topic ? "skip" : flags.text("on-park") as "block" | "skip" | undefined,
    acceptSource: flags.on("accept-source")
      ? (reason) =>
        confirmed(
          flags,
          `${reason} What was delivered and is ${topic ? "there" : "in the outbox"} again will be delivered again`,
        )
      : undefined,
  };
  if (topic) return relayShared({ ...options, from: topic }, hearers);
  return isSharded(outbox!)
    ? runShards({ ...options, from: outbox }, outbox, hearers)
    : relay({ ...options, from: outbox! });
}

const isSharded = (outbox: Outbox): outbox is ShardedOutbox => "shards" in outbox;

/** Runs the shards of an outbox that are this process's share, and tells of them as of one relay. */
async function runShards(
  options: RelayOptions,
  from: ShardedOutbox,
  hearers: Hearers,
): Promise<RelayReport> {
  const { name = "default", drain, signal, observe } = options;
  let count: number | undefined;
  while (count === undefined) {
    try {
      count = await from.shards();
    } catch (error) {
      // As `relay` waits for a database that is away.
      if (drain || signal?.aborted || codeOf(error) !== "busy") throw error;
      observe?.({ type: "failed", relay: name, reason: reason(error), afterMs: 0 });
    }
  }
  // A sink that lets in whoever comes last is one relay's at a time: the others stand by.
  const leased = options.to.kind === "atomic" && options.to.fences === true;
  if (count === 1 && !leased) return await relay(options);
  if (options.to.kind === "atomic" && !leased) {
    const how = "set it to 1 by init --shards 1, or relay into kafka: or into a target that is called";
    throw new Error(`${options.to.name} takes one shard of an outbox, and ${from.name} has ${count}: ${how}`);
  }
  return await relayShared({ ...options, from }, hearers);
}

/** Runs a source that is shared out, and tells of its parts as of one relay. */
async function relayShared(options: ShardsOptions, { whole, part }: Hearers): Promise<RelayReport> {
  const { name = "default" } = options;
  let started = false;
  const told = { delivered: 0, parked: 0, uncertain: 0 };
  let failed = true;
  try {
    const report = await relayShards({
      ...options,
      observe(event) {
        part(event);
        if (event.type === "stopped") {
          for (const what of ["delivered", "parked", "uncertain"] as const) told[what] += event[what];
        } else if (event.type !== "started") whole(event);
        else if (!started) {
          const { shard: _, ...all } = event;
          whole({ ...all, from: options.from.name });
        }
        started ||= event.type === "started";
      },
    });
    failed = false;
    return report;
  } finally {
    // All shards may have been others'.
    if (started || !failed) {
      const stopped = { type: "stopped", relay: name, ...told } as const;
      part(stopped);
      whole(stopped);
    }
  }
}

/** A person says that a store that was restored, or copied, knows all that was done. */
async function accept(flags: Flags, { databases, sink, topic }: Opened): Promise<void> {
  if (databases.length === 0) return;
  // Of the one that the relay's work is known by: the claims, or with a sink that has a position the outbox.
  const store = sink.kind === "atomic" ? databases[0]! : databases.at(-1)!;
  // A topic, and a sink with a position, are asked about when it is known what differs.
  if (store.accept) await store.accept();
  else if (sink.kind === "atomic" || topic) return;
  // A variable holds for all relays of a process, whatever their databases are.
  else if (flags.layer.get("accept-source")?.source === "flag") {
    throw new UsageError(`${flags.label("accept-source")} is for postgres:, mysql: and mariadb: databases`);
  }
}

async function runRelays(command: Flags): Promise<number> {
  const relays = relaysOf(command);
  const all = relays[0]!; // What concerns the process is the same in each.
  const json = all.on("json");
  if (command.on("print-config")) {
    write(JSON.stringify(effectiveConfig(relays), null, json ? undefined : 2) + "\n");
    return 0;
  }
  const plans = relays.map(planOf).map((plan) => ({ ...plan, watch: new Watch(plan.name, plan.flags.number("ready-ms")!) }));
  checkGroups(plans);
  const address = all.has("listen") ? parseAddress(all.label("listen"), all.text("listen")!) : undefined;
  for (const { flags } of plans) permitTarget(flags);

  const drain = all.on("drain");
  const stop = new AbortController();
  await using closing = new AsyncDisposableStack();
  closing.use(onSignals(stop));
  const databases = closing.use(new AsyncDisposableStack());
  // Closed before the databases, which it asks.
  if (address) {
    const server = closing.use(listen(address, plans.map(({ watch }) => watch), () => stop.signal.aborted));
    tellAddress(server.url, json);
  }
  const opened: ((typeof plans)[number] & Opened)[] = [];
  for (const plan of plans) {
    const ends = await blaming(plans, plan.name, async () => ({
      ...await openEnds(plan.flags, databases, !drain),
      sink: await openTarget(plan, databases),
    }));
    if (plan.flags.on("accept-source")) await blaming(plans, plan.name, () => accept(plan.flags, { ...plan, ...ends }));
    plan.watch.open(ends);
    opened.push({ ...plan, ...ends });
  }
  let unread = false;
  const show = showRelays({
    relays: opened,
    json,
    messagesOnStdout: opened.some(({ sink }) => sink.name === "stdout"),
    drain,
    gone() {
      unread = true;
      stop.abort();
    },
  });
  closing.defer(() => show.end());

  const running = opened.map(async (one): Promise<RelayReport> => {
    let started = false;
    try {
      return await blaming(opened, one.name, () =>
        runOne(one, stop.signal, {
          part: (event) => one.watch.event(event),
          whole(event) {
            started ||= event.type === "started";
            show.event(event);
          },
        }));
    } catch (error) {
      // Told to stop while it still waited for its database: there is nothing to finish.
      if (stop.signal.aborted && !started && codeOf(error) === "busy") return { delivered: 0, parked: 0, uncertain: 0 };
      stop.abort(); // Better none than some of them: whoever restarts the process starts all.
      throw error;
    }
  });
  const outcomes = await Promise.allSettled(running);
  const errors = outcomes.flatMap((outcome) => outcome.status === "rejected" ? [outcome.reason as unknown] : []);
  if (errors.length > 0) throw errors.length > 1 ? new AggregateError(errors) : errors[0];
  if (unread) throw new Error("nobody reads what the relay prints: it has stopped");
  const left = outcomes.some((outcome) =>
    outcome.status === "fulfilled" && outcome.value.parked + outcome.value.uncertain > 0
  );
  return drain && left ? 1 : 0;
}

/** The command `relay`. */
export const RELAY: Command = {
  summary: "deliver outboxes into targets",
  flags: {
    ...RELAY_FLAGS,
    "print-config": { kind: "switch", help: "run nothing: print what would hold, and where each value comes from" },
  },
  example: "relay --from sqlite:app.db --to http://127.0.0.1:8080/charge --idempotent",
  run: runRelays,
};
