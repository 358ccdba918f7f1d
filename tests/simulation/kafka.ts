/**
 * A model of a Kafka cluster, as far as exactly-once goes: transactional ids and epochs, transactions that are open, markers that
 * are written later than the commit is answered, the last stable offset, sequence numbers, compaction. The sink under test runs on
 * it as it is.
 *
 * @module
 */
import { EffectError } from "../../mod.ts";
import type { KafkaClient, KafkaConnection, KafkaRecord } from "../../adapters/kafka.ts";
import type { Faults, Process, Simulation } from "./scheduler.ts";

interface Entry {
  readonly offset: number;
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
  readonly #topics: ReadonlySet<string>;
  readonly #onRecord: (record: KafkaRecord) => void;

  /** `topics`: that exist, beside those of positions. `onRecord` hears of each record when it is visible to readers. */
  constructor(simulation: Simulation, topics: readonly string[], onRecord: (record: KafkaRecord) => void) {
    this.#simulation = simulation;
    this.#topics = new Set(topics);
    this.#onRecord = onRecord;
  }

  #log(place: string): Entry[] {
    const log = this.#logs.get(place) ?? [];
    this.#logs.set(place, log);
    return log;
  }
  #append(place: string, owner: Coordinated | undefined, record: KafkaRecord | undefined, state: Entry["state"]): number {
    const offset = this.#next.get(place) ?? 0;
    this.#next.set(place, offset + 1);
    this.#log(place).push({ offset, owner, state, record });
    return offset;
  }
  #coordinated(id: string): Coordinated {
    const found = this.#ids.get(id) ?? { id, epoch: -1, state: "empty", joined: new Set(), sequences: new Map() };
    this.#ids.set(id, found);
    return found;
  }

  /** Whether a topic exists. */
  has(topic: string): boolean {
    return topic.startsWith("effectonce-cursor-") || this.#topics.has(topic);
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
      const committed: KafkaRecord[] = [];
      for (const entry of this.#log(place)) {
        if (entry.owner !== of || entry.state !== "open") continue;
        entry.state = state === "committing" ? "committed" : "aborted";
        if (state === "committing" && entry.record) committed.push(entry.record);
      }
      this.#append(place, undefined, undefined, "committed"); // The marker.
      for (const record of committed) this.#onRecord(record);
      this.#simulation.at(this.#simulation.now + this.#simulation.between(0, 30), next);
    };
    this.#simulation.at(this.#simulation.now + this.#simulation.between(0, 60), next);
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
  end(id: string, epoch: number): Answer<null> {
    return this.#own(id, epoch, (of) => {
      if (of.state === "ongoing") this.#end(of, "committing");
      return of.state === "aborting" ? not("invalid") : done(null);
    });
  }
  /** Somebody else's transaction in a partition, which holds up its readers for a while. */
  disturb(place: string, ms: number): void {
    const offset = this.#append(place, undefined, undefined, "open");
    this.#simulation.at(this.#simulation.now + ms, () => {
      for (const entry of this.#log(place)) if (entry.offset === offset) entry.state = "aborted";
    });
  }
  /** Of each key the last stays, of what every reader may see. */
  compact(place: string): void {
    const log = this.#log(place);
    const stable = this.#stable(place);
    const last = new Map<string, number>();
    const keyOf = ({ record }: Entry) => record?.key ? new TextDecoder().decode(record.key) : undefined;
    for (const entry of log) {
      const key = keyOf(entry);
      if (entry.offset < stable && entry.state === "committed" && key !== undefined) last.set(key, entry.offset);
    }
    this.#logs.set(
      place,
      log.filter((entry) => {
        const key = keyOf(entry);
        return entry.offset >= stable ||
          entry.state === "committed" && (key === undefined || last.get(key) === entry.offset);
      }),
    );
  }
  #stable(place: string): number {
    return this.#log(place).find(({ state }) => state === "open")?.offset ?? this.#next.get(place) ?? 0;
  }
  /** Where the positions of a topic are; empty before the first. */
  places(): readonly string[] {
    return [...this.#logs.keys()].filter((place) => place.includes("effectonce-cursor-"));
  }
  /** Committed records from an offset on, up to the last stable one. */
  read(place: string, from: number): Awaited<ReturnType<KafkaConnection["read"]>> {
    const stable = this.#stable(place);
    const found = this.#log(place).filter(({ offset }) => offset >= from && offset < stable).slice(0, 20);
    const records = found.flatMap(({ offset, record, state }) =>
      record && state === "committed" ? [{ offset, key: record.key, value: record.value, headers: {} }] : []
    );
    return { records, next: found.length < 20 ? Math.max(from, stable) : found.at(-1)!.offset + 1 };
  }
}

const placeOf = ({ topic, partition }: Pick<KafkaRecord, "topic" | "partition">) => `${partition} ${topic}`;

/** The cluster as one process reaches it. */
export function modelClient(process: Process, cluster: Cluster, faults: () => Faults): KafkaClient {
  const call = <T>(what: string, run: () => T): Promise<T> => process.call(what, faults(), () => Promise.resolve(run()));
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
  return {
    open: () =>
      call("connect to Kafka", (): KafkaConnection => ({
        brokers: () => Promise.resolve(1),
        version: () => Promise.resolve("4.0"),
        copies: () => Promise.resolve(1),
        partitions: (topic) => call(`look for topic ${topic}`, () => cluster.has(topic) ? 1 : 0),
        refresh: () => Promise.resolve(),
        setting: (_, name) => Promise.resolve(name === "cleanup.policy" ? "compact" : undefined),
        create: () => Promise.resolve(),
        grow: () => Promise.resolve(),
        async read(topic, partition, from) {
          const answer = await call(`read ${topic} from ${from}`, () => cluster.read(placeOf({ topic, partition }), from));
          if (answer.records.length === 0) await process.runtime.sleep(50);
          return answer;
        },
        end: () => Promise.resolve(0),
        since: () => Promise.resolve(0),
        async begin(id, timeoutMs) {
          const mine = id!;
          const epoch = await patiently(`take over ${mine}`, () => cluster.init(mine));
          const sequences = new Map<string, number>();
          let joined = new Set<string>();
          return {
            async send(records) {
              const byPlace = Map.groupBy(records, placeOf);
              const fresh = [...byPlace.keys()].filter((place) => !joined.has(place));
              if (fresh.length > 0) {
                await patiently("join the transaction", () => cluster.join(mine, epoch, fresh, timeoutMs));
              }
              for (const place of fresh) joined.add(place);
              const offsets = new Map<string, number>();
              for (const [place, all] of byPlace) {
                const sequence = sequences.get(place) ?? 0;
                const what = `produce ${all.length} to ${place}`;
                offsets.set(place, await patiently(what, () => cluster.produce(mine, epoch, place, sequence, all)));
                sequences.set(place, sequence + all.length);
              }
              return { tooLarge: [], offsetOf: (topic, partition) => offsets.get(placeOf({ topic, partition })) };
            },
            async commit() {
              await patiently(`commit in Kafka`, () => cluster.end(mine, epoch));
              joined = new Set();
            },
          };
        },
        close: () => Promise.resolve(),
      })),
  };
}
