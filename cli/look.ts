/**
 * The commands `doctor` and `status`: what can be said of relays without running them.
 *
 * @module
 */
import { type EffectState, guarantee, type Outbox } from "../mod.ts";
import { kafkaLag, type KafkaSourceClient } from "../adapters/kafka_source.ts";
import { type Command, JSON_OUT, STORE, using } from "./command.ts";
import { relaysOf } from "./config.ts";
import type { Database } from "./database.ts";
import { STATES } from "./effects.ts";
import { blaming, isFromKafka, openEnds, openTarget, planOf } from "./ends.ts";
import type { Flags } from "./flags.ts";
import { readKafkaFrom } from "./kafka.ts";
import { print, seconds } from "./print.ts";
import { checksOfTarget, openDatabase } from "./open.ts";
import { RELAY_FLAGS } from "./relay_flags.ts";
import { linesOf } from "./relays.ts";

/** What is found out about each relay: with `--config` by name, without it of the one. */
async function eachRelay(command: Flags, look: (flags: Flags) => Promise<Found>): Promise<number> {
  const relays = relaysOf(command);
  const found = [];
  for (const flags of relays) {
    const name = flags.text("name")!;
    found.push({ name, ...await blaming(relays, name, () => look(flags)) });
  }
  const only = command.has("config") ? undefined : found[0]!;
  print(
    command,
    only ? only.value : { relays: Object.fromEntries(found.map(({ name, value }) => [name, value])) },
    only
      ? only.text
      : found.map(({ name, text }) => `relay "${name}"\n${text.trimEnd().replaceAll(/^/gm, "  ")}\n`).join(""),
  );
  return found.every(({ ok }) => ok) ? 0 : 1;
}

interface Found {
  readonly value: unknown;
  readonly text: string;
  readonly ok: boolean;
}

async function diagnose(flags: Flags): Promise<Found> {
  await using closing = new AsyncDisposableStack();
  const plan = planOf(flags);
  const { source, outbox, store, databases } = await openEnds(flags, closing);
  const sink = await openTarget(plan, closing);
  const promise = guarantee(source, sink, flags.on("allow-duplicates") ? undefined : store);
  const found = await Promise.all([
    ...databases.map((database) => database.checks()),
    outbox ? checksOfTarget(flags, outbox) : [],
  ]);
  const checks = found.flat();
  const { level, protocol, reasons, conditions, stronger } = promise;
  const lines = (title: string, texts: readonly string[]) =>
    texts.length ? `${title}\n${texts.map((t) => `  ${t}\n`).join("")}` : "";
  return {
    value: { from: source.name, to: sink.name, ...promise, checks },
    text: `${source.name} -> ${sink.name}: ${level} (protocol: ${protocol})\n` +
      lines("because", reasons) + lines("on condition that", conditions) + lines("stronger", stronger) +
      lines("checks", checks.map(({ what, ok, found }) => `${ok ? "ok " : "NO "} ${what}: ${found}`)),
    ok: checks.every(({ ok }) => ok),
  };
}

/** The command `doctor`. */
export const DOCTOR: Command = {
  summary: "which guarantee a relay would give, why, and what would make it stronger",
  flags: RELAY_FLAGS,
  example: "doctor --from sqlite:app.db --to http://127.0.0.1:8080/charge",
  run: (command) => eachRelay(command, diagnose),
};

async function standing(outbox: Outbox, { count }: Database["store"], only: string | undefined): Promise<Found> {
  const { pending, heldBack, parked, oldestMs } = await outbox.status();
  const effects = await count(only);
  const relays = (await outbox.relays()).filter(({ relay }) => (only ?? relay) === relay);
  const oldest = oldestMs === null ? "" : `, the oldest for ${seconds(oldestMs)}`;
  return {
    value: { outbox: { pending, heldBack, parked, oldestMs }, effects, relays },
    text: `outbox   ${pending} pending${oldest}, ${heldBack} of them held back; ${parked} parked\n` +
      `effects  ${STATES.map((state) => `${effects[state]} ${state}`).join(", ")}\n` +
      `relays   ${linesOf(relays).join("\n         ") || "none runs"}`,
    ok: true,
  };
}

/** How far a consumer group is, by partition, and what is set aside. */
async function lagging(flags: Flags): Promise<Found> {
  const { topic, group, deadLetter, client } = readKafkaFrom(flags.label("from"), flags.url("from")!);
  const partitions = await kafkaLag(client, group, topic);
  if (partitions.length === 0) throw new Error(`topic "${topic}" does not exist in Kafka`);
  const lag = partitions.reduce((sum, { lag }) => sum + lag, 0);
  const dead = deadLetter === undefined ? undefined : await recordsIn(client, deadLetter);
  const name = flags.layer.has("name") ? flags.text("name")! : group;
  const effects = flags.has("store") ? await effectsOf(flags, name) : undefined;
  const lines = partitions.map(({ partition, offset, end, lag }) =>
    `partition ${partition}  ${lag} behind: at ${offset ?? "no offset yet"} of ${end}\n`
  );
  return {
    value: { topic, group, lag, partitions, ...deadLetter && { deadLetter, parked: dead }, ...effects && { effects } },
    text: `topic ${topic}, group ${group}: ${lag} behind\n${lines.join("")}` +
      (deadLetter === undefined ? "" : `dead letters  ${dead} in topic ${deadLetter}\n`) +
      (effects ? `effects  ${STATES.map((state) => `${effects[state]} ${state}`).join(", ")}\n` : ""),
    ok: true,
  };
}

/** How many offsets a topic has, of which some may be no records. */
async function recordsIn(client: KafkaSourceClient, topic: string): Promise<number> {
  const connection = await client.open();
  try {
    const count = await connection.partitions(topic);
    const each = Array.from(
      { length: count },
      async (_, partition) => await connection.end(topic, partition) - await connection.start(topic, partition),
    );
    return (await Promise.all(each)).reduce((sum, n) => sum + n, 0);
  } finally {
    await connection.close();
  }
}

/** How many claims of a relay stand where. */
async function effectsOf(flags: Flags, relay: string): Promise<Readonly<Record<EffectState, number>>> {
  const { store, close } = await openDatabase(flags.label("store"), flags.url("store")!);
  try {
    return await store.count(relay);
  } finally {
    await close();
  }
}

/** The command `status`. */
export const STATUS: Command = {
  summary: "what is pending, parked and in doubt, and which relays run; of a topic how far a group is",
  flags: {
    store: { ...STORE, required: false },
    from: { kind: "url", help: "a topic and a group, kafka://…/topic?group=…; with --store its claims as well" },
    config: RELAY_FLAGS.config!,
    name: RELAY_FLAGS.name!,
    json: JSON_OUT,
  },
  example: "status --store sqlite:app.db --json",
  run: async (flags) => {
    if (!flags.has("from") || !isFromKafka(flags) || flags.has("config")) return await ofDatabase(flags);
    const { value, text } = await lagging(flags);
    print(flags, value, text);
    return 0;
  },
};

const ofDatabase = (flags: Flags) =>
  flags.has("config")
    ? eachRelay(flags, async (flags) => {
      await using closing = new AsyncDisposableStack();
      if (isFromKafka(flags)) return await lagging(flags);
      const { outbox, databases } = await openEnds(flags, closing);
      return await standing(outbox!, databases.at(-1)!.store, flags.text("name"));
    })
    : using(flags, async ({ store, outbox }) => {
      const only = flags.has("name") ? flags.text("name") : undefined;
      const { value, text } = await standing(outbox({}), store, only);
      print(flags, value, text);
    });
