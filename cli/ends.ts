/**
 * What a relay is between: its flags taken together, its target, its databases.
 *
 * @module
 */
import type { AtomicSink, CallSink, ClaimStore, Outbox, Source } from "../mod.ts";
import { kafkaLag, type KafkaMessage, type KafkaSource, kafkaSource } from "../adapters/kafka_source.ts";
import type { Database } from "./database.ts";
import { pageOf, reason, UsageError } from "./errors.ts";
import { isRaw, parseExactly } from "./exact.ts";
import type { Flags } from "./flags.ts";
import { checkDatabaseSink, isDatabase, loadTransform, openDatabaseSink } from "./handlers.ts";
import { type KafkaFrom, type KafkaUrl, openKafkaSink, permitKafka, readKafka, readKafkaFrom } from "./kafka.ts";
import { shellUrl } from "./mask.ts";
import { openDatabase, openSink } from "./open.ts";
import type { Advice } from "./show.ts";
import { parts } from "./url.ts";

/** A relay whose flags make sense together; nothing is open yet. */
export interface Plan {
  /** Its name. */
  readonly name: string;
  /** Its flags. */
  readonly flags: Flags;
  /** Its target; undefined if that is a database, which is yet to be opened. */
  readonly target: ReturnType<typeof openSink> | undefined;
}

/** Whether a relay reads a topic. */
export const isFromKafka = (flags: Flags): boolean => parts(flags.label("from"), flags.url("from")!).scheme === "kafka";

/** @throws {UsageError} If they do not. */
export function planOf(flags: Flags): Plan {
  const [min, max] = [flags.number("min-retry-ms")!, flags.number("max-retry-ms")!];
  if (min > max) {
    throw new UsageError(`${flags.label("min-retry-ms")} must be at most ${flags.label("max-retry-ms")}, which is ${max}`);
  }
  flags.given("from");
  flags.given("to");
  const database = isDatabase(flags);
  if (database) checkDatabaseSink(flags);
  const scheme = parts(flags.label("to"), flags.url("to")!).scheme;
  if (!database && scheme !== "kafka" && flags.layer.get("handler")?.source === "flag") {
    throw new UsageError(`${flags.label("handler")} is for targets that are databases, or kafka:`);
  }
  if (scheme === "kafka" && flags.has("handler") && !readKafka(flags.label("to"), flags.url("to")!).transactions) {
    const how = "leave transactions=off out";
    throw new UsageError(`${flags.label("handler")} makes records in transactions, together with the position: ${how}`);
  }
  const sink = database ? undefined : openSink(flags);
  const repeats = sink?.kind === "call" && sink.repeat === "same-key";
  for (const other of [...flags.has("store") ? ["store"] : [], ...repeats ? ["idempotent"] : []]) {
    if (!flags.on("allow-duplicates")) continue;
    throw new UsageError(`${flags.label("allow-duplicates")} makes no claims: it excludes ${flags.label(other)}`);
  }
  if (!isFromKafka(flags)) {
    if (flags.layer.get("effect-key")?.source === "flag") {
      throw new UsageError(`${flags.label("effect-key")} is for kafka: sources: a message of an outbox has an id`);
    }
    return { name: flags.text("name")!, flags, target: sink };
  }
  keyOf(flags);
  if (sink?.kind !== "call" && flags.layer.get("effect-key")?.source === "flag") {
    throw new UsageError(`${flags.label("effect-key")} is for targets that are called: others keep the position`);
  }
  const { group } = readKafkaFrom(flags.label("from"), flags.url("from")!);
  for (const other of ["topics", "keep"]) {
    if (flags.layer.get(other)?.source === "flag") {
      throw new UsageError(`${flags.label(other)} is for outboxes, not for kafka:`);
    }
  }
  if (flags.has("on-park") && flags.layer.get("on-park") && flags.text("on-park") === "block") {
    throw new UsageError(`${flags.label("on-park")}: a topic cannot hold back what comes behind a parked record: only skip`);
  }
  if (scheme === "kafka") checkThrough(flags);
  if (scheme === "file") {
    throw new UsageError(`${flags.label("to")}: a file takes one relay, and each partition of a topic has its own`);
  }
  if (sink?.kind === "call" && sink.repeat !== "always" && !flags.has("store") && !flags.on("allow-duplicates")) {
    const why = "where are calls claimed? Give --store with a database, or --allow-duplicates";
    throw new UsageError(`${flags.label("store")} is missing: ${why}`);
  }
  return { name: flags.layer.has("name") ? flags.text("name")! : group, flags, target: sink };
}

/** @throws {UsageError} If relays of one process would share records that each is to have. */
export function checkGroups(plans: readonly Plan[]): void {
  const known: { readonly name: string; readonly from: KafkaFrom }[] = [];
  for (const { name, flags } of plans.filter(({ flags }) => isFromKafka(flags))) {
    const from = readKafkaFrom(flags.label("from"), flags.url("from")!);
    const other = known.find((one) => one.from.group === from.group && isSameCluster(one.from, from));
    if (other) {
      const why = `relay "${other.name}" has the same, and each of them would get a part of the records`;
      throw new UsageError(`${flags.label("from")}: group=${from.group}: ${why}. Give each relay a group of its own`);
    }
    known.push({ name, from });
  }
}

/** What `--effect-key` says an effect is known by. */
function keyOf(flags: Flags): ((message: KafkaMessage) => string) | undefined {
  const text = flags.text("effect-key");
  if (text === undefined) return undefined;
  const [, kind, name] = /^(header|json):(.+)$/s.exec(text) ?? [];
  if (name === undefined) throw new UsageError(`${flags.label("effect-key")} must be header:NAME or json:FIELD.FIELD`);
  if (kind === "header") {
    return ({ headers }) => {
      if (headers[name]) return headers[name];
      throw new Error(`it has no header "${name}"`);
    };
  }
  return (message) => {
    const found = name.split(".").reduce<unknown>(
      (value, field) => typeof value === "object" && value !== null ? (value as Record<string, unknown>)[field] : undefined,
      parseExactly(message.text()),
    );
    if (isRaw(found)) return found.rawJSON;
    if (typeof found === "string" && found !== "" || typeof found === "number") return String(found);
    throw new Error(`its field ${name} is no text and no number`);
  };
}

const isSameCluster = (a: Pick<KafkaUrl, "brokers">, b: Pick<KafkaUrl, "brokers">): boolean =>
  a.brokers.some((broker) => b.brokers.includes(broker));

/** A relay from Kafka into Kafka must not read what it has written: as far as the URLs tell, the sink knows the rest. */
function checkThrough(flags: Flags): void {
  const label = flags.label("to");
  const [from, to] = [readKafkaFrom(flags.label("from"), flags.url("from")!), readKafka(label, flags.url("to")!)];
  if (to.topic === undefined && !flags.has("handler")) {
    throw new UsageError(`${label}: it names no topic to write to: write kafka://host:9092/topic, or give --handler FILE`);
  }
  if (to.topic !== from.topic || !isSameCluster(from, to)) return;
  throw new UsageError(`${label}: it is the topic that is read: the relay would go round and round`);
}

const FIND_OUT = "find out what became of them";

/** Where a relay's messages and claims are, open. */
export interface Ends {
  /** Asked for its name and for what is pending. */
  readonly source: Source & Pick<Outbox, "status">;
  /** Its outbox, if it has one. */
  readonly outbox: Outbox | undefined;
  /** The topic that it reads, if it does. */
  readonly topic: KafkaSource | undefined;
  /** The store of its claims. */
  readonly store: ClaimStore | undefined;
  /** The database of its outbox, and that of its claims if it is another one. */
  readonly databases: readonly Database[];
  /** What a person does about messages that are set aside. */
  readonly advice: Advice;
}

/** Opens the target of a relay, if that is yet to be done, and has it closed at the end. */
export async function openTarget({ flags, target }: Plan, closing: AsyncDisposableStack): Promise<AtomicSink | CallSink> {
  if (target && parts(flags.label("to"), flags.url("to")!).scheme === "kafka" && flags.has("handler")) {
    return openKafkaSink(
      flags.label("to"),
      flags.url("to")!,
      flags.on("create-topics"),
      await loadTransform(flags.label("handler"), flags.text("handler")!),
    );
  }
  if (target) return target;
  const { sink, database } = await openDatabaseSink(flags);
  closing.defer(() => database.close());
  return sink;
}

/**
 * Opens the databases of a relay, each on connections of its own, and has them closed at the end.
 *
 * @param mayBeAway Whether their servers may be away: the relay waits for them.
 */
export async function openEnds(flags: Flags, closing: AsyncDisposableStack, mayBeAway = false): Promise<Ends> {
  const databases: Database[] = [];
  const open = async (name: "from" | "store") => {
    const database = await openDatabase(flags.label(name), flags.url(name)!, { mayBeAway });
    closing.defer(() => database.close());
    // A store that is not one should not be found out only with the first message.
    if (!database.away) await database.store.list({ limit: 1 });
    databases.push(database);
    return database;
  };
  if (isFromKafka(flags)) {
    const store = flags.has("store") ? await open("store") : undefined;
    const { deadLetter } = readKafkaFrom(flags.label("from"), flags.url("from")!);
    const list = `effects list --store ${shellUrl(flags.text("store") ?? "")} --state`;
    return {
      ...openTopic(flags, closing),
      store: store?.store,
      databases,
      advice: {
        parked: `see why: ${
          store ? `${list} rejected` : `they are in topic ${deadLetter}, with the reason in their headers`
        }`,
        uncertain: `${FIND_OUT}: ${list} uncertain (see ${pageOf("uncertain")})`,
      },
    };
  }
  const from = await open("from");
  const apart = flags.has("store") && flags.url("store") !== flags.url("from");
  const store = apart ? await open("store") : from;
  const shown = shellUrl(flags.text("from")!);
  const where = apart ? `--store ${shellUrl(flags.text("store")!)} --from ${shown}` : `--store ${shown}`;
  const list = `effects list ${where} --state`;
  const outbox = from.outbox({ topics: flags.names("topics"), keep: flags.on("keep") });
  return {
    source: outbox,
    outbox,
    topic: undefined,
    store: store.store,
    databases,
    advice: {
      parked: `see why, then effects retry or discard them: ${list} parked (see ${pageOf("parked")})`,
      uncertain: `${FIND_OUT}: ${list} uncertain (see ${pageOf("uncertain")})`,
    },
  };
}

function openTopic(flags: Flags, closing: AsyncDisposableStack): Pick<Ends, "source" | "outbox" | "topic"> {
  const label = flags.label("from");
  const read = readKafkaFrom(label, flags.url("from")!);
  permitKafka(label, read);
  const { client, ...options } = read;
  const id = keyOf(flags);
  const topic = closing.use(kafkaSource(client, { ...options, ...id && { id } }));
  const pending = async () => (await kafkaLag(client, options.group, options.topic)).reduce((sum, { lag }) => sum + lag, 0);
  return {
    outbox: undefined,
    topic,
    source: {
      ...topic.shard(0, ""),
      name: topic.name,
      status: async () => ({ pending: await pending(), heldBack: 0, parked: 0, oldestMs: null }),
    },
  };
}

/** Says which one of several relays has failed. */
export async function blaming<T>(relays: readonly unknown[], name: string, run: () => Promise<T>): Promise<T> {
  try {
    return await run();
  } catch (error) {
    // A wrong value has its place in its sentence.
    if (relays.length === 1 || error instanceof UsageError) throw error;
    throw new Error(`relay "${name}": ${reason(error)}`, { cause: error });
  }
}
