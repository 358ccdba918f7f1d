/**
 * The commands `cursor …`: where a relay into Kafka stands, on both sides, and ways out where they do not fit together.
 *
 * @module
 */
import { type Outbox, type Position, type PositionOwner, type SealedBatches, START } from "../mod.ts";
import { settlePlan } from "../adapters/shared.ts";
import { findInKafka, type KafkaCursor, moveKafkaCursor, readKafkaCursor, writeKafkaCursor } from "../adapters/kafka.ts";
import type { Command } from "./command.ts";
import { openEnds } from "./ends.ts";
import { codeOf, reason, UsageError } from "./errors.ts";
import { checkedText, type Flags, type FlagTable } from "./flags.ts";
import { type KafkaUrl, readKafka } from "./kafka.ts";
import { parts } from "./url.ts";
import { permitTarget } from "./open.ts";
import { asks } from "./permissions.ts";
import { print } from "./print.ts";
import { RELAY_FLAGS } from "./relay_flags.ts";

/** How both sides stand: `fits`; Kafka has lost what was delivered; the database went back in time, a little or too far. */
type Verdict = "fits" | "lost" | "repairable" | "diverged";

interface Standing extends SealedBatches {
  readonly cursor: KafkaCursor;
  readonly verdict: Verdict;
  readonly found: string;
}

function judge({ settled, batches }: SealedBatches, { ring }: KafkaCursor): Pick<Standing, "verdict" | "found"> {
  const last = batches.at(-1) ?? settled;
  const cursor = ring.at(-1) ?? START;
  const shard = { settled: settled.n, settledUid: settled.uid, sealed: last.n, sealedUid: last.uid };
  try {
    const { repaired } = settlePlan(shard, batches, ring);
    if (repaired.length === 0) return { verdict: "fits", found: "both sides fit together" };
    const found = `the outbox went back in time: the next relay repairs batches ${repaired[0]!.n} to ${cursor.n}`;
    return { verdict: "repairable", found };
  } catch (error) {
    const code = codeOf(error);
    if (code === "diverged") {
      return { verdict: "diverged", found: `${reason(error)} To go on all the same: relay --accept-source` };
    }
    if (code !== "fenced") throw error;
    const found = `Kafka ends at batch ${cursor.n}, and the outbox knows that ${settled.n} were delivered: cursor rebuild`;
    return { verdict: "lost", found };
  }
}

/** What a command about cursors works on. */
interface Sides {
  readonly kafka: KafkaUrl;
  readonly outbox: Outbox;
  readonly shards: readonly SealedBatches[];
}

async function withSides<T>(flags: Flags, run: (sides: Sides) => Promise<T>): Promise<T> {
  flags.given("to");
  const label = flags.label("to");
  const url = flags.url("to")!;
  if (parts(label, url).scheme !== "kafka") throw new UsageError(`${label}: only kafka: targets have a cursor`);
  const kafka = readKafka(label, url);
  if (!kafka.transactions) throw new UsageError(`${label}: without transactions there is no cursor`);
  permitTarget(flags);
  await using closing = new AsyncDisposableStack();
  const { outbox } = await openEnds(flags, closing);
  if (!outbox) throw new UsageError(`${flags.label("from")}: only relays from an outbox have a cursor to look at`);
  return await run({ kafka, outbox, shards: await outbox.sealed(flags.text("name")!) });
}

const look = (kafka: KafkaUrl, owner: PositionOwner): Promise<KafkaCursor> => readKafkaCursor(kafka.client, owner, kafka);

const show = (flags: Flags) =>
  withSides(flags, async ({ kafka, shards }) => {
    const all: Standing[] = [];
    for (const shard of shards) {
      const cursor = await look(kafka, shard.owner);
      all.push({ ...shard, cursor, ...judge(shard, cursor) });
    }
    print(
      flags,
      all.map(({ owner, settled, batches, cursor, verdict, found }) => ({
        ...{ relay: owner.relay, source: owner.source, shard: owner.shard?.index ?? 0 },
        kafka: { topic: cursor.topic, partition: cursor.partition, n: cursor.ring.at(-1)?.n ?? 0, records: cursor.records },
        outbox: { settled: settled.n, sealed: batches.at(-1)?.n ?? settled.n },
        ...{ verdict, found },
      })),
      all.map(({ owner, settled, batches, cursor: { topic, partition, ring, records }, found }) =>
        `shard ${owner.shard?.index ?? 0}: topic ${topic}, partition ${partition}\n` +
        `  kafka   batch ${ring.at(-1)?.n ?? 0}, ${records} records; remembers batches from ${ring[0]?.n ?? 0} on\n` +
        `  outbox  settled ${settled.n}, sealed ${batches.at(-1)?.n ?? settled.n}\n` +
        `  ${found}`
      ).join("\n"),
    );
    return all.every(({ verdict }) => verdict === "fits" || verdict === "repairable") ? 0 : 1;
  });

/** Asks a person; who runs a program says it by `--yes`. */
export function confirmed(flags: Flags, what: string): boolean {
  if (flags.on("yes")) return true;
  if (asks()) return confirm(`${what}\nGo on?`);
  throw new UsageError(`${what}. Say --yes if that is what you want`);
}

interface Change {
  readonly shard: SealedBatches;
  readonly position: Position;
  readonly records: number;
}

async function write(flags: Flags, { kafka, shards }: Sides, changes: readonly Change[]): Promise<number> {
  const name = ({ owner }: SealedBatches) => shards.length > 1 ? `shard ${owner.shard?.index ?? 0}: ` : "";
  const what = changes.map(({ shard, position: { n } }) => {
    const after = (shard.batches.at(-1)?.n ?? shard.settled.n) - n;
    return `${name(shard)}the cursor is set to batch ${n}; ${after} batch${after === 1 ? " that is" : "es that are"} ` +
      `sealed after it will be sent`;
  });
  if (changes.length === 0) {
    print(flags, { changed: [] }, "nothing is to be done");
    return 0;
  }
  if (!confirmed(flags, what.join("\n"))) return 1;
  for (const { shard, position, records } of changes) {
    await writeKafkaCursor(kafka.client, shard.owner, position, records, kafka);
  }
  const changed = changes.map(({ shard, position, records }) => ({
    shard: shard.owner.shard?.index ?? 0,
    n: position.n,
    records,
  }));
  print(flags, { changed }, what.join("\n").replaceAll("will be sent", "will be sent by the next relay"));
  return 0;
}

/** A batch of the outbox as a position. */
function positionAt({ settled, batches }: SealedBatches, n: number): Position | undefined {
  const found = batches.find((batch) => batch.n === n);
  if (found) return { n, uid: found.uid, prev: found.prev, rows: found.rows };
  return n === settled.n ? { n, uid: settled.uid, prev: "", rows: [] } : undefined;
}

const rebuild = (flags: Flags) =>
  withSides(flags, async (sides) => {
    const { kafka, shards } = sides;
    const changes: Change[] = [];
    for (const shard of shards) {
      const cursor = await look(kafka, shard.owner);
      if (judge(shard, cursor).verdict !== "lost") continue;
      const found = await findInKafka(kafka.client, shard.batches, shard.owner, kafka);
      const position = positionAt(shard, found?.n ?? shard.settled.n)!;
      changes.push({ shard, position, records: found?.records ?? cursor.records });
    }
    return await write(flags, sides, changes);
  });

const set = (flags: Flags) =>
  withSides(flags, async (sides) => {
    const { kafka, shards } = sides;
    const [text] = flags.words;
    if (!/^\d{1,15}$/.test(text!)) throw new UsageError(`N must be the number of a batch`);
    const only = flags.number("shard") ?? (shards.length === 1 ? 0 : undefined);
    if (only === undefined) throw new UsageError(`the outbox has ${shards.length} shards: say which by --shard`);
    const shard = shards[only];
    if (!shard) throw new UsageError(`${flags.label("shard")}: the outbox has ${shards.length} shards, from 0`);
    const position = positionAt(shard, Number(text));
    if (!position) {
      const last = shard.batches.at(-1)?.n ?? shard.settled.n;
      throw new Error(`the outbox knows batches ${shard.settled.n} to ${last} of this relay, and not ${text}`);
    }
    const { records } = await look(kafka, shard.owner);
    return await write(flags, sides, [{ shard, position, records }]);
  });

const rename = (flags: Flags) =>
  withSides(flags, async ({ kafka, outbox, shards }) => {
    const [name] = flags.words;
    const old = flags.text("name")!;
    checkedText("NEW", name!, { kind: "name", help: "" });
    if (name === old) throw new UsageError(`the relay's name is "${name}" already`);
    if (kafka.cursorTopic !== undefined) {
      throw new UsageError(
        `${flags.label("to")}: cursor= names a topic that is relay "${old}"'s alone, and none for "${name}"`,
      );
    }
    for (const { owner } of shards) {
      const [mine, theirs] = [await look(kafka, owner), await look(kafka, { ...owner, relay: name! })];
      const there = theirs.ring.at(-1);
      if (there && !mine.ring.some(({ uid }) => uid === there.uid)) {
        throw new Error(`Kafka knows a relay "${name}" already, in topic ${theirs.topic}: take another name`);
      }
    }
    const renamed = await outbox.rename(old, name!, async () => {
      for (const { owner } of shards) await moveKafkaCursor(kafka.client, owner, name!, kafka);
    });
    if (!renamed) {
      throw new Error(`the outbox knows no relay "${old}" that has sealed anything: start the new one right away`);
    }
    print(flags, { relay: name, was: old }, `relay "${old}" is called "${name}" now: start it with --name ${name}`);
    return 0;
  });

const FLAGS: FlagTable = {
  from: RELAY_FLAGS.from!,
  to: { ...RELAY_FLAGS.to!, help: "the target: kafka://host:9092 as the relay has it" },
  name: RELAY_FLAGS.name!,
  json: { ...RELAY_FLAGS.json!, help: "print JSON" },
};
const YES = { kind: "switch", help: "do not ask" } as const;
const LINE = "--from postgres://app@127.0.0.1/app --to kafka://127.0.0.1:9092";

/** The commands by name. */
export const CURSOR: Readonly<Record<string, Command>> = {
  "cursor show": {
    summary: "where a relay into kafka: stands there, and whether the outbox fits",
    flags: FLAGS,
    example: `cursor show ${LINE}`,
    run: show,
  },
  "cursor rebuild": {
    summary: "find the last batch in the topics themselves, where the cursor was lost",
    flags: { ...FLAGS, yes: YES },
    example: `cursor rebuild ${LINE}`,
    run: rebuild,
  },
  "cursor set": {
    summary: "say which batch was the last: what is sealed after it is sent, what is before it is not",
    words: ["N"],
    flags: { ...FLAGS, shard: { kind: "number", help: "of which shard, from 0" }, yes: YES },
    example: `cursor set 17 ${LINE}`,
    run: set,
  },
  "cursor rename": {
    summary: "give a relay that was stopped another name: it goes on where it was",
    words: ["NEW"],
    flags: FLAGS,
    example: `cursor rename shop ${LINE}`,
    run: rename,
  },
};
