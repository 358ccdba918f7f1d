/**
 * A model of a Kafka cluster, as far as exactly-once goes: transactional ids and epochs, transactions that are open, markers that
 * are written later than the commit is answered, the last stable offset, sequence numbers, compaction, deletion of what is old,
 * consumer groups. The sink and the source under test run on it as they are.
 *
 * @module
 */
import { EffectError } from "../../mod.ts";
import type { KafkaRecord, KafkaTransactions } from "../../adapters/kafka.ts";
import type {
  Fetched,
  FetchedRecord,
  KafkaMember,
  KafkaSourceClient,
  KafkaSourceConnection,
} from "../../adapters/kafka_source.ts";
import { Group, type GroupAnswer, type GroupOptions, type Shares } from "./group.ts";
import type { Faults, Process, Simulation } from "./scheduler.ts";

interface Entry {
  readonly offset: number;
  readonly timestamp: number;
  /** Whose transaction it is; it may have ended. */
  readonly owner: Coordinated | undefined;
  state: "open" | "committed" | "aborted";
  readonly record: KafkaRecord | undefined;
}

/** What the coordinator knows of a transactional id. */
interface Coordinated {
  readonly id: string;
  epoch: number;
  state: "empty" | "ongoing" | "committing" | "aborting";
  readonly joined: Set<string>;
  /** What is expected next, by partition; of this epoch. */
  readonly sequences: Map<string, number>;
}

type Answer<T> = { readonly done: true; readonly value: T } | {
  readonly done: false;
  readonly why: "fenced" | "concurrent" | "invalid";
};
const done = <T>(value: T): Answer<T> => ({ done: true, value });
const not = (why: "fenced" | "concurrent" | "invalid"): Answer<never> => ({ done: false, why });

/** The cluster, which no process takes down with it. */
export class Cluster {
  /** By topic and partition. */
  readonly #logs: Map<string, Entry[]> = new Map();
  readonly #ids: Map<string, Coordinated> = new Map();
  readonly #next: Map<string, number> = new Map();
  readonly #simulation: Simulation;
  /** Where partitions begin, if what was old has been deleted. */
  readonly #starts: Map<string, number> = new Map();
  /** By name, how many partitions. */
  readonly #topics: Map<string, number>;
  readonly #groups: Map<string, Group> = new Map();
  readonly #onRecord: (record: KafkaRecord, offset: number) => void;
  readonly #groupOptions: GroupOptions;

  /** `topics`: that exist, with how many partitions. `onRecord` hears of each record when it is visible to readers. */
  constructor(
    simulation: Simulation,
    topics: Readonly<Record<string, number>>,
    onRecord: (record: KafkaRecord, offset: number) => void,
    groupOptions: GroupOptions = { initialMs: 0, expires: () => false, onKept: () => {} },
  ) {
    this.#simulation = simulation;
    this.#topics = new Map(Object.entries(topics));
    this.#onRecord = onRecord;
    this.#groupOptions = groupOptions;
  }

  #log(place: string): Entry[] {
    const log = this.#logs.get(place) ?? [];
    this.#logs.set(place, log);
    return log;
  }
  #append(place: string, owner: Coordinated | undefined, record: KafkaRecord | undefined, state: Entry["state"]): number {
    const offset = this.#next.get(place) ?? 0;
    this.#next.set(place, offset + 1);
    this.#log(place).push({ offset, timestamp: Math.floor(this.#simulation.now), owner, state, record });
    return offset;
  }
  #coordinated(id: string): Coordinated {
    const found = this.#ids.get(id) ?? { id, epoch: -1, state: "empty", joined: new Set(), sequences: new Map() };
    this.#ids.set(id, found);
    return found;
  }

  /** How many partitions a topic has; 0 if it does not exist. */
  partitions(topic: string): number {
    return this.#topics.get(topic) ?? 0;
  }
  /** Creates a topic, or adds partitions to it. */
  grow(topic: string, partitions: number): void {
    this.#topics.set(topic, Math.max(partitions, this.partitions(topic)));
  }
  /** A consumer group. */
  group(id: string): Group {
    const group = this.#groups.get(id) ?? new Group(this.#simulation, this.#groupOptions);
    this.#groups.set(id, group);
    return group;
  }

  /** The coordinator has decided; each partition hears of it a little later, and only then the id is free again. */
  #end(of: Coordinated, state: "committing" | "aborting"): void {
    of.state = state;
    const left = [...of.joined];
    const next = (): void => {
      const place = left.shift();
      if (place === undefined) {
        of.state = "empty";
        of.joined.clear();
        return;
      }
      const mine = this.#log(place).filter((entry) => entry.owner === of && entry.state === "open");
      this.#mark(place, mine, state === "committing" ? "committed" : "aborted");
      this.#simulation.at(this.#simulation.now + this.#simulation.between(0, 30), next);
    };
    this.#simulation.at(this.#simulation.now + this.#simulation.between(0, 60), next);
  }

  /** A transaction ends in a partition: a record says so, which readers do not see. */
  #mark(place: string, entries: readonly Entry[], state: "committed" | "aborted"): void {
    for (const entry of entries) entry.state = state;
    this.#append(place, undefined, undefined, "committed");
    for (const { record, offset } of entries) if (state === "committed" && record) this.#onRecord(record, offset);
  }

  /** Somebody takes an id over. */
  init(id: string): Answer<number> {
    const of = this.#coordinated(id);
    if (of.state === "committing" || of.state === "aborting") return not("concurrent");
    of.epoch++;
    of.sequences.clear();
    if (of.state === "ongoing") {
      this.#simulation.log(() => `the broker aborts what is open of ${id}`);
      this.#end(of, "aborting");
      return not("concurrent");
    }
    return done(of.epoch);
  }
  #own<T>(id: string, epoch: number, run: (of: Coordinated) => Answer<T>): Answer<T> {
    const of = this.#coordinated(id);
    return of.epoch === epoch ? run(of) : not("fenced");
  }
  /** Partitions join a transaction, which begins with the first. */
  join(id: string, epoch: number, places: readonly string[], timeoutMs: number): Answer<null> {
    return this.#own(id, epoch, (of) => {
      if (of.state === "committing" || of.state === "aborting") return not("concurrent");
      if (of.state === "empty") {
        of.state = "ongoing";
        // One that is forgotten is given up, and with it the epoch.
        this.#simulation.at(this.#simulation.now + timeoutMs, () => {
          if (of.state !== "ongoing" || of.epoch !== epoch) return;
          this.#simulation.log(() => `the broker gives up the transaction of ${id}`);
          of.epoch++;
          this.#end(of, "aborting");
        });
      }
      for (const place of places) of.joined.add(place);
      return done(null);
    });
  }
  /** Appends; a sequence number that was there before is answered, and not appended. */
  produce(id: string, epoch: number, place: string, sequence: number, records: readonly KafkaRecord[]): Answer<number> {
    return this.#own(id, epoch, (of) => {
      if (of.state !== "ongoing" || !of.joined.has(place)) return not("invalid");
      const expected = of.sequences.get(place) ?? 0;
      if (sequence < expected) return done(this.#log(place).find((entry) => entry.owner === of)?.offset ?? 0);
      if (sequence > expected) return not("invalid");
      of.sequences.set(place, expected + records.length);
      const offsets = records.map((record) => this.#append(place, of, record, "open"));
      return done(offsets[0]!);
    });
  }
  /** Ends a transaction, if there is one. */
  commit(id: string, epoch: number): Answer<null> {
    return this.#own(id, epoch, (of) => {
      if (of.state === "ongoing") this.#end(of, "committing");
      return of.state === "aborting" ? not("invalid") : done(null);
    });
  }
  /** Somebody else's records, in a transaction that ends after a while; or, if it does not say how, in none. */
  publish(records: readonly KafkaRecord[], ends?: { readonly afterMs: number; readonly as: "committed" | "aborted" }): void {
    for (const [place, some] of Map.groupBy(records, placeOf)) {
      const from = this.#next.get(place) ?? 0;
      for (const record of some) this.#append(place, undefined, record, ends ? "open" : "committed");
      const entries = this.#log(place).filter(({ offset }) => offset >= from);
      if (!ends) { for (const { record, offset } of entries) this.#onRecord(record!, offset); }
      else {
        const afterMs = ends.afterMs + this.#simulation.between(0, 60);
        this.#simulation.at(this.#simulation.now + afterMs, () => this.#mark(place, entries, ends.as));
      }
    }
  }
  /** Somebody else's transaction in a partition, which holds up its readers for a while. */
  disturb(place: string, ms: number): void {
    const offset = this.#append(place, undefined, undefined, "open");
    this.#simulation.at(this.#simulation.now + ms, () => {
      for (const entry of this.#log(place)) if (entry.offset === offset) entry.state = "aborted";
    });
  }
  /** Of each key the last stays, of what every reader may see; answers the offsets of the records that are gone. */
  compact(place: string): readonly number[] {
    const log = this.#log(place);
    const stable = this.end(place);
    const last = new Map<string, number>();
    const keyOf = ({ record }: Entry) => record?.key ? new TextDecoder().decode(record.key) : undefined;
    for (const entry of log) {
      const key = keyOf(entry);
      if (entry.offset < stable && entry.state === "committed" && key !== undefined) last.set(key, entry.offset);
    }
    const stays = (entry: Entry) => {
      const key = keyOf(entry);
      return entry.offset >= stable || entry.state === "committed" && (key === undefined || last.get(key) === entry.offset);
    };
    this.#logs.set(place, log.filter(stays));
    return log.filter((entry) => !stays(entry)).map(({ offset }) => offset);
  }
  /** Deletes what is before an offset. */
  truncate(place: string, offset: number): void {
    this.#starts.set(place, offset);
    this.#logs.set(place, this.#log(place).filter((entry) => entry.offset >= offset));
  }
  /** Where a partition begins. */
  start(place: string): number {
    return this.#starts.get(place) ?? 0;
  }
  /** Where what is committed ends: the last stable offset. */
  end(place: string): number {
    return this.#log(place).find(({ state }) => state === "open")?.offset ?? this.#next.get(place) ?? 0;
  }
  /** Where the positions of a topic are; empty before the first. */
  places(): readonly string[] {
    return [...this.#logs.keys()].filter((place) => place.includes("effectonce-cursor-"));
  }
  /** Records of transactions that are committed, and whose end is not written there yet. */
  decided(topic: string): readonly KafkaRecord[] {
    return [...this.#logs.values()].flat().flatMap(({ owner, state, record }) =>
      state === "open" && owner?.state === "committing" && record?.topic === topic ? [record] : []
    );
  }
  /** Committed records from an offset on, up to the last stable one: those among so many entries of the log. */
  fetch(place: string, from: number, most: number): Fetched {
    const stable = this.end(place);
    if (from < this.start(place) || from > (this.#next.get(place) ?? 0)) {
      return { records: [], next: from, outOfRange: true };
    }
    const found = this.#log(place).filter(({ offset }) => offset >= from && offset < stable).slice(0, most);
    const records = found.flatMap(({ record, state, ...rest }) =>
      record && state === "committed" ? [fetchedOf(record, rest)] : []
    );
    // Of batches that compaction has emptied only their offsets are left.
    const next = found.at(-1)?.offset ?? (stable > from ? from : from - 1);
    return { records, next: next + 1, outOfRange: false };
  }
}

const encoder = new TextEncoder();
const fetchedOf = (
  { key, value, headers }: KafkaRecord,
  { offset, timestamp }: Pick<Entry, "offset" | "timestamp">,
): FetchedRecord => {
  const bytes = (text: string | Uint8Array) => typeof text === "string" ? encoder.encode(text) : text;
  return { offset, timestamp, key, value, headers: headers.map(([name, text]) => [name, bytes(text)]) };
};

/** The place of a partition, by which the cluster knows it. */
export const placeOf = ({ topic, partition }: Pick<KafkaRecord, "topic" | "partition">): string => `${partition} ${topic}`;

/** How many entries of a log an answer has: a takeover must not take longer the more there were. */
const MOST = 100;

/** The cluster as one process reaches it. */
export function modelClient(
  simulation: Simulation,
  process: Process,
  cluster: Cluster,
  faults: () => Faults,
): KafkaSourceClient {
  const call = <T>(what: string, run: () => T | Promise<T>): Promise<T> =>
    process.call(what, faults(), () => Promise.resolve(run()));
  /** As clients do: asks again for what was not done. */
  async function patiently<T>(what: string, run: () => Answer<T>): Promise<T> {
    for (let tries = 0;; tries++) {
      const answer = await call(what, run);
      if (answer.done) return answer.value;
      if (answer.why === "fenced") throw new EffectError("fenced", `fenced at ${what}`);
      if (answer.why === "invalid" || tries > 100) throw new Error(`${answer.why} at ${what}`);
      await process.runtime.sleep(10);
    }
  }
  async function begin(id: string, timeoutMs: number): Promise<KafkaTransactions> {
    const epoch = await patiently(`take over ${id}`, () => cluster.init(id));
    const sequences = new Map<string, number>();
    let joined = new Set<string>();
    return {
      async send(records) {
        const byPlace = Map.groupBy(records, placeOf);
        const fresh = [...byPlace.keys()].filter((place) => !joined.has(place));
        if (fresh.length > 0) {
          await patiently("join the transaction", () => cluster.join(id, epoch, fresh, timeoutMs));
        }
        for (const place of fresh) joined.add(place);
        const offsets = new Map<string, number>();
        for (const [place, all] of byPlace) {
          const sequence = sequences.get(place) ?? 0;
          const what = `produce ${all.length} to ${place}`;
          offsets.set(place, await patiently(what, () => cluster.produce(id, epoch, place, sequence, all)));
          sequences.set(place, sequence + all.length);
        }
        return { tooLarge: [], offsetOf: (topic, partition) => offsets.get(placeOf({ topic, partition })) };
      },
      async commit() {
        await patiently(`commit in Kafka`, () => cluster.commit(id, epoch));
        joined = new Set();
      },
    };
  }
  /** Without transactions. */
  const plain: KafkaTransactions = {
    async send(records) {
      let sent = false;
      await call(`produce ${records.length} to ${records[0]!.topic}`, () => {
        // What is sent again after a broken connection has the sequence number that it had.
        if (!sent) cluster.publish(records);
        sent = true;
      });
      return { tooLarge: [], offsetOf: () => undefined };
    },
    commit: () => Promise.resolve(),
  };
  return {
    open: () =>
      call("connect to Kafka", (): KafkaSourceConnection => {
        /** Partitions of topics, as it has heard last. */
        const known = new Map<string, number>();
        const look = async (topic: string) => {
          const count = await call(`look for topic ${topic}`, () => cluster.partitions(topic));
          if (count > 0) known.set(topic, count);
          return count;
        };
        return {
          brokers: () => Promise.resolve(1),
          version: () => Promise.resolve("4.0"),
          copies: () => Promise.resolve(1),
          partitions: async (topic) => known.get(topic) ?? await look(topic),
          async refresh() {
            for (const topic of known.keys()) await look(topic);
          },
          setting: (_, name) => Promise.resolve(name === "cleanup.policy" ? "compact" : undefined),
          create: (topic, { partitions = 1 }) => call(`create ${topic}`, () => cluster.grow(topic, partitions)),
          async grow(topic, partitions) {
            await call(`add partitions to ${topic}`, () => cluster.grow(topic, partitions));
            await look(topic);
          },
          async read(topic, partition, from) {
            const place = placeOf({ topic, partition });
            const { records, next } = await call(`read ${topic} from ${from}`, () => cluster.fetch(place, from, MOST));
            if (records.length === 0) await process.runtime.sleep(50);
            return { records: records.map((record) => ({ ...record, headers: {} })), next };
          },
          end: (topic, partition) =>
            call(`ask where ${topic} ${partition} ends`, () => cluster.end(placeOf({ topic, partition }))),
          start: (topic, partition) =>
            call(`ask where ${topic} ${partition} begins`, () => cluster.start(placeOf({ topic, partition }))),
          since: () => Promise.resolve(0),
          begin: (id, timeoutMs) => id === null ? Promise.resolve(plain) : begin(id, timeoutMs),
          clusterId: () => Promise.resolve("cluster"),
          async fetch(topic, from, waitMs) {
            const wanted = Array.from(from, ([partition, next]) => `${partition} from ${next}`).join(", ");
            try {
              const found = await call(`fetch ${topic} ${wanted}`, () => {
                // One whose leader is away, or for which there is no place in the answer, is left out.
                const some = [...from].filter(([partition]) =>
                  partition < cluster.partitions(topic) && !simulation.chance(0.1)
                );
                return new Map(some.map(([partition, next]) => [
                  partition,
                  cluster.fetch(placeOf({ topic, partition }), next, simulation.between(1, 6)),
                ]));
              });
              const isNew = [...found].some(([partition, { next, outOfRange }]) =>
                outOfRange || next > from.get(partition)!
              );
              if (!isNew) await process.runtime.sleep(waitMs);
              return found;
            } catch {
              await process.runtime.sleep(50);
              await look(topic);
              return new Map();
            }
          },
          member: (group, topic, sessionMs) => memberOf(cluster.group(group), sessionMs, call, () => look(topic)),
          kept: (group, _, partition) =>
            call(`ask where the group is in ${partition}`, () => cluster.group(group).kept.get(partition)),
          close: () => Promise.resolve(),
        };
      }),
  };
}

/** A member of a group, as `adapters/kafkajs.ts` has it. */
function memberOf(
  group: Group,
  sessionMs: number,
  call: <T>(what: string, run: () => T | Promise<T>) => Promise<T>,
  count: () => Promise<number>,
): KafkaMember {
  let me = { id: "", number: 0 };
  async function inside<T>(
    what: string,
    run: () => GroupAnswer<T> | Promise<GroupAnswer<T>>,
  ): Promise<GroupAnswer<T>> {
    const answer = await call(`${what} as ${me.id || "nobody"}`, run);
    if (!answer.done && answer.why === "unknown") me = { ...me, id: "" };
    return answer;
  }
  async function shares(members: readonly string[]): Promise<Shares> {
    const partitions = await count();
    const all = Array.from({ length: partitions }, (_, partition) => partition);
    const { length } = members;
    return new Map(
      members.toSorted().map((id, i) => {
        return [id, all.slice(Math.floor(i * partitions / length), Math.floor((i + 1) * partitions / length))];
      }),
    );
  }
  /** Undefined where it has to begin anew. */
  async function joinOnce(): Promise<readonly number[] | undefined> {
    const id = me.id || await call("ask for an id in the group", () => group.invite(sessionMs));
    const joined = await inside(`join the group with ${id}`, () => group.join(id, sessionMs));
    if (!joined.done) return undefined;
    const { number, members } = joined.value;
    me = { id, number };
    const made = members && await shares(members);
    const synced = await inside(`ask for a share of generation ${number}`, () => group.sync(id, number, made));
    return synced.done ? synced.value : undefined;
  }
  return {
    async join(signal) {
      while (!signal?.aborted) {
        // Who waits for the others need not, but only if it is known to them.
        const known = me.id;
        const quit = () => void (known && call(`leave aside as ${known}`, () => group.leave(known)).catch(() => {}));
        signal?.addEventListener("abort", quit);
        try {
          const share = await joinOnce();
          if (share) return share;
        } finally {
          signal?.removeEventListener("abort", quit);
        }
      }
      return [];
    },
    async beat() {
      const { id, number } = me; // As it is sent: it may arrive in a later generation.
      return (await inside("beat", () => group.beat(id, number))).done;
    },
    async commit(offsets) {
      const { id, number } = me;
      return (await inside("keep offsets", () => group.keep(id, number, offsets))).done;
    },
    async leave() {
      const { id } = me;
      if (id !== "") await inside("leave the group", () => group.leave(id));
    },
  };
}
