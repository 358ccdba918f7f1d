/**
 * Stories of Kafka as a source: relays of a group share the partitions of a topic, into a database, into another topic, or by
 * calls; then the faults end, all is waited for, and the books are compared.
 *
 * @module
 */
import { DatabaseSync } from "node:sqlite";
import {
  type AtomicSink,
  claimStore,
  type EffectStore,
  handler,
  type Message,
  rejected,
  type RelayEvent,
  type Sink,
} from "../../mod.ts";
import { type KafkaRecord, kafkaSink, type KafkaSinkOptions } from "../../adapters/kafka.ts";
import { type GroupOffset, type KafkaMessage, kafkaSource } from "../../adapters/kafka_source.ts";
import { memoryStore } from "../../adapters/memory.ts";
import { relayShards } from "../../adapters/shards.ts";
import { migrateSqlite, type SqliteClient, sqliteStore } from "../../adapters/sqlite.ts";
import { chooseFaults, finish, isZombie, paceOf, reach, remoteSink, supervise } from "./fleet.ts";
import { Cluster, modelClient, placeOf } from "./kafka.ts";
import type { Process, Simulation } from "./scheduler.ts";
import { callSink, remoteStore, Rows, Target } from "./world.ts";

/** What these stories are about, and how often. */
export const FROM_KAFKA = {
  "from kafka to handler": 12,
  "from kafka to sqlite": 2,
  "from kafka to kafka": 9,
  "from kafka claimed never": 4,
  "from kafka claimed never, asking": 4,
  "from kafka claimed same-key": 5,
} as const;

/** One of them. */
export type FromKafka = keyof typeof FROM_KAFKA;

const GROUP = "relay";
const [FROM, TO, DEAD] = ["orders", "out", "dead"];
/** A member is given up after 6 seconds of silence: some pauses are longer. A target remembers for longer than five of them. */
const TIMES = { leaseMs: [300, 1500], pauseMs: 9000, lateMs: 800, settleMs: 900, windowMs: 60_000 } as const;

/** What a group keeps with a place that was chosen to begin with. */
const CHOSEN = '{"effectonce":{"n":0}}';

/** A record that readers may see. */
interface Visible {
  readonly id: string;
  readonly key: string | null;
  readonly partition: number;
  readonly offset: number;
}

/** A database that a handler writes to: in its outbox are the keys of the effects. */
interface Table {
  readonly store: EffectStore<unknown>;
  written(): readonly string[];
  snapshot?(): () => Promise<void>;
}

function memoryTable(simulation: Simulation): Table {
  const store = memoryStore({ now: () => simulation.now });
  return { store, written: () => store.outbox().map(({ key }) => key!), snapshot: () => store.snapshot() };
}

async function sqliteTable(simulation: Simulation): Promise<Table> {
  const client = new DatabaseSync(":memory:");
  const options = { now: () => simulation.now };
  await migrateSqlite(client as SqliteClient, options);
  const keys = client.prepare("select key from effectonce_outbox order by seq");
  return {
    store: sqliteStore(client as SqliteClient, options),
    written: () => keys.all().map(({ key }) => String(key)),
  };
}

const decoder = new TextDecoder();
const encoder = new TextEncoder();
const textOf = ({ value }: { readonly value: Uint8Array | null }): string => decoder.decode(value ?? undefined);

/** Runs one story to its end. */
export async function playFromKafka(simulation: Simulation, kind: FromKafka): Promise<void> {
  const claimed = kind.includes("claimed");
  const toKafka = kind.endsWith("to kafka");
  const deduping = kind.endsWith("same-key");
  const reconciles = kind.endsWith("asking");
  const faults = chooseFaults(simulation, TIMES.pauseMs);
  const table = kind.endsWith("sqlite") ? await sqliteTable(simulation) : memoryTable(simulation);
  const rows = new Rows(simulation);
  const claims = claimStore(rows);
  const byKey = !claimed && !toKafka && simulation.chance(0.3);
  const byItself = !claimed && simulation.chance(0.3);
  const shared = {
    name: GROUP,
    ...paceOf(simulation, TIMES),
    onPark: simulation.pick(["block", "block", "skip"] as const),
  };
  let raging = true;
  let wentBack = false;

  // What is produced: some of it in transactions, some of which are given up.
  const partitions = simulation.between(1, 3);
  const keys = simulation.pick([["a"], ["a", "b"], ["a", null], [null]]);
  const poisonous = simulation.pick([0, 0, 0.2]);
  const flaky = simulation.pick([0, 0, 0.1]);
  const withDead = poisonous > 0 && !claimed || flaky > 0 || simulation.chance(0.5);
  const poison = new Set<string>();
  const visible: Visible[] = [];
  /** Records that were removed before they were taken, as far as is known. */
  const removed = new Set<string>();
  const buried = new Set<string>();
  const records: string[] = [];
  /** The last record of the last batch that a sink has, by source. */
  const positions = new Map<string, number>();
  /** How far the group was in each partition: what is late may take it back. */
  const reached = new Map<number, number>();
  /** Whose choice it is where the group begins, by partition; null once there was another place. */
  const chosen = new Map<number, string | null>();
  const target = new Target(simulation, {
    dedupeWindowMs: deduping ? TIMES.windowMs : 0,
    refuses: (id) => poison.has(id),
    maxLateMs: TIMES.lateMs,
  });
  /** Those that were set aside for good. */
  const parked = new Set<string>();

  const written = (): readonly string[] => claimed ? target.ledger.map(({ id }) => id) : toKafka ? records : table.written();
  /** What happened, or is decided. */
  const taken = (): readonly string[] => [...written(), ...cluster.decided(TO).map(textOf)];
  /** Whether nothing more is to be done for a record. */
  function isOver(id: string, done = taken()): boolean {
    const isDone = claimed ? rows.get({ scope: GROUP, key: id })?.state === "done" : done.includes(id);
    return isDone || buried.has(id) || parked.has(id);
  }
  function advanced(source: string, offset: number): void {
    const last = positions.get(source) ?? -1;
    if (offset <= last) simulation.violate(`the position of ${source} went back from ${last} to ${offset}`);
    positions.set(source, offset);
  }

  const initialMs = simulation.pick([0, 500]);
  /** Whether a group that knows no place begins with what comes from now on. */
  const latest = simulation.chance(0.15);
  const expires = latest ? 0 : simulation.pick([0, 0, 0.3]);
  const goesBack = table.snapshot && !claimed && !toKafka && !latest && simulation.chance(0.3);
  const cluster = new Cluster(
    simulation,
    { [FROM]: partitions, [TO]: simulation.between(1, 2), [DEAD]: 1 },
    onRecord,
    { initialMs, expires: () => raging && simulation.chance(expires), onKept },
  );
  function onRecord(record: KafkaRecord, offset: number): void {
    const { topic, partition, key } = record;
    const id = textOf(record);
    if (topic === FROM) {
      simulation.log(() => `record ${offset} of partition ${partition} is ${id}`);
      visible.push({ id, key: key && decoder.decode(key), partition, offset });
    } else if (topic === TO) {
      simulation.log(() => `RECORD ${id}`);
      records.push(id);
    } else if (topic === DEAD) {
      simulation.log(() => `${id} IS SET ASIDE`);
      buried.add(id);
    } else {
      const { uid, source, rows } = JSON.parse(id);
      if (uid) advanced(source, Number(rows[0][0]));
    }
  }
  function onKept(partition: number, { offset, note }: GroupOffset, member: string): void {
    if (offset > cluster.end(placeOf({ topic: FROM, partition }))) simulation.violate("the group keeps what is not there");
    // Here it has begun: what was there before is nothing to it. A choice of which a member has not heard it may make once more.
    const by = note === CHOSEN ? member : null;
    if (!chosen.has(partition)) chosen.set(partition, by);
    if (chosen.get(partition) !== by) chosen.set(partition, null);
    if (latest && (!reached.has(partition) || chosen.get(partition) !== null)) {
      for (const record of visible) if (record.partition === partition && record.offset < offset) removed.add(record.id);
    }
    reached.set(partition, Math.max(offset, reached.get(partition) ?? 0));
    if (wentBack) return;
    const done = taken();
    for (const record of visible) {
      if (record.partition !== partition || record.offset >= offset || removed.has(record.id)) continue;
      if (!isOver(record.id, done)) simulation.violate(`the group is at ${offset}, and ${record.id} is not done`);
    }
  }

  const isOld = (id: string) => id.startsWith("old");
  if (latest) {
    for (let partition = 0; partition < partitions; partition++) {
      const old = Array.from({ length: simulation.between(0, 2) }, (_, i) => encoder.encode(`old-${partition}-${i}`));
      cluster.publish(old.map((value) => ({ topic: FROM, partition, key: null, value, headers: [] })));
    }
  }
  /** Why a message is refused; it must be one that can be seen. */
  function refuses(message: Message): unknown {
    const id = textOf(message);
    const { partition, offset } = (message as KafkaMessage).kafka;
    const isVisible = visible.some((record) => {
      return record.id === id && record.partition === partition && record.offset === offset;
    });
    if (!isVisible) simulation.violate(`${id} was taken before it was committed, or was not`);
    if (isOld(id)) simulation.violate(`${id} was there before the group, and was taken`);
    if (poison.has(id)) return rejected("refused for good");
    return raging && simulation.chance(flaky) ? new Error("a passing fault") : undefined;
  }
  function check(message: Message): void {
    const why = refuses(message);
    if (why) throw why;
  }
  const newEffect = (message: Message) => ({ topic: "written", key: textOf(message), value: null });
  const writes = handler<unknown>(table.store, async (message, effects) => {
    await effects.enqueue(newEffect(message));
    check(message);
  }, {
    ...byKey ? { key: textOf } : {},
    ...!byKey && simulation.chance(0.5)
      ? {
        async all(messages, effects) {
          await effects.enqueue(...messages.map(newEffect));
          messages.forEach(check);
        },
      }
      : {},
  });
  /** Looks at the positions that a sink commits. */
  const watched = (sink: AtomicSink): AtomicSink => ({
    ...sink,
    async open(owner) {
      const session = await sink.open(owner);
      return {
        ...session,
        async commit(batch) {
          await session.commit(batch);
          advanced(owner.source, Number(batch.rows[0]![0]));
        },
      };
    },
  });
  const transactionTimeoutMs = simulation.between(1000, 4000);
  const through: KafkaSinkOptions = simulation.chance(0.3) && poisonous + flaky === 0 ? { topic: TO } : {
    transform(message) {
      check(message);
      return { topic: TO, value: message.value };
    },
  };
  function sinkOf(process: Process): Sink {
    if (toKafka) {
      return kafkaSink(modelClient(simulation, process, cluster, faults.calls), {
        ...through,
        transactionTimeoutMs,
        runtime: process.runtime,
      });
    }
    if (!claimed) return remoteSink(process, watched(writes), faults.calls);
    const sink = callSink(
      process,
      target,
      { repeat: deduping ? "same-key" : "never", dedupeWindowMs: deduping ? TIMES.windowMs : undefined, reconciles },
      faults.target,
      faults.calls,
      (id, idempotencyKey, attempt) => isZombie(simulation, rows.get({ scope: GROUP, key: id }), idempotencyKey, attempt),
    );
    return {
      ...sink,
      deliver(message, delivery) {
        const isVisible = visible.some(({ id }) => id === message.id);
        if (!isVisible) simulation.violate(`${message.id} was taken before it was committed`);
        if (isOld(message.id)) simulation.violate(`${message.id} was there before the group, and was taken`);
        return sink.deliver(message, delivery);
      },
    };
  }

  const places = simulation.pick([1, 1, 2, 2, 3]);
  const restless = simulation.pick([0, 0, 0.5]);
  const drains = simulation.chance(0.2);
  const fleet = supervise(simulation, places, async (process, signal) => {
    const leave = new AbortController();
    if (simulation.chance(restless)) process.later(simulation.between(500, 12_000), () => leave.abort());
    // Those that come and go all the time would keep the others from getting on.
    const drain = drains && (places === 1 || raging);
    const before = visible.filter(({ partition, offset }) => offset < cluster.end(placeOf({ topic: FROM, partition })));
    const client = modelClient(simulation, process, cluster, faults.calls);
    const { runtime } = process;
    const stop = AbortSignal.any([signal, leave.signal]);
    await using from = kafkaSource(client, {
      topic: FROM,
      start: latest ? "latest" : "earliest",
      ...withDead ? { deadLetter: DEAD } : {},
      ...claimed || byItself ? { id: (message) => textOf(message) } : {},
      runtime,
    });
    await relayShards({
      ...shared,
      from,
      to: sinkOf(process),
      store: claimed ? remoteStore(simulation, process, claims, faults.calls, (key) => rows.get(key)) : undefined,
      drain,
      signal: stop,
      runtime,
      acceptSource(reason) {
        // A database before its first batch is as if it were another one; and what is late may take the group back to what is deleted.
        const isBehind = [...cluster.group(GROUP).kept].some(([partition, { offset }]) => offset < reached.get(partition)!);
        if (!wentBack && !isBehind) simulation.violate(reason);
        return true;
      },
      observe(event: RelayEvent) {
        if (event.type === "parked" || event.type === "uncertain") parked.add(event.id);
      },
    });
    if (!drain || stop.aborted || places > 1 || wentBack || !cluster.group(GROUP).isEmpty) return;
    // It had all partitions: there is not even one that only the coordinator takes for a member.
    for (const { id } of before) if (!isOver(id) && !removed.has(id)) simulation.violate(`${id} was left by a drain`);
  });

  const aborted: string[] = [];
  let sent = 0;
  let total = simulation.between(3, 10);
  let left = total;
  while (left > 0) {
    const size = simulation.chance(0.5) ? 1 : Math.min(left, simulation.between(1, 3));
    left -= size;
    const batch = Array.from({ length: size }, (_, i) => ({
      id: `m${left + i + 1}`,
      key: simulation.pick(keys),
      turn: simulation.between(0, 5),
    }));
    for (const { id } of batch) if (simulation.chance(poisonous)) poison.add(id);
    const ends = size === 1 && simulation.chance(0.5) ? undefined : {
      afterMs: simulation.pick([10, 100, simulation.between(100, 2000)]),
      as: "committed",
    } as const;
    const twice = (claimed || byKey) && simulation.chance(0.1);
    const givesUp = simulation.chance(0.2);
    const publish = (prefix: string, how: typeof ends | { readonly afterMs: number; readonly as: "aborted" }) =>
      cluster.publish(
        batch.map(({ id, key, turn }) => ({
          topic: FROM,
          partition: turn % cluster.partitions(FROM),
          key: key === null ? null : encoder.encode(key),
          value: encoder.encode(`${prefix}${id}`),
          headers: [],
        })),
        how,
      );
    const at = simulation.between(0, 9000);
    if (givesUp) {
      aborted.push(...batch.map(({ id }) => `x${id}`));
      simulation.at(at, () => publish("x", { afterMs: simulation.between(10, 1500), as: "aborted" }));
    }
    simulation.at(at, () => {
      publish("", ends);
      sent += size;
    });
    if (twice) simulation.at(at + simulation.between(1, 3000), () => publish("", ends));
  }
  if (simulation.chance(0.1)) {
    simulation.at(simulation.between(500, 8000), () => {
      simulation.log(() => "a partition is added");
      cluster.grow(FROM, partitions + 1);
    });
  }
  for (let times = simulation.between(0, 3); times > 0; times--) {
    simulation.at(simulation.between(0, 10_000), () => {
      for (let partition = 0; partition < cluster.partitions(FROM); partition++) {
        tidy(placeOf({ topic: FROM, partition }), partition);
      }
      for (const place of cluster.places()) {
        if (simulation.chance(0.5)) cluster.compact(place);
        else cluster.disturb(place, simulation.between(100, 1500));
      }
    });
  }
  /** Compacts a partition, or deletes what was taken. */
  function tidy(place: string, partition: number): void {
    if (simulation.chance(0.5)) {
      simulation.log(() => `compaction of ${place}`);
      const gone = new Set(cluster.compact(place));
      for (const { id, partition: of, offset } of visible) {
        if (of === partition && gone.has(offset) && (goesBack || !isOver(id))) removed.add(id);
      }
    } else if (!goesBack) {
      const last = claimed
        ? cluster.group(GROUP).kept.get(partition)?.offset
        : positions.get(`cluster/${FROM}.${partition}`)! + 1;
      const to = simulation.between(cluster.start(place), Math.max(last || 0, cluster.start(place)));
      simulation.log(() => `what is before ${to} of ${place} is deleted`);
      cluster.truncate(place, to);
    }
  }
  if (goesBack) {
    const from = simulation.between(0, 8000);
    simulation.at(from, () => {
      simulation.log(() => "a snapshot of the database");
      const restore = table.snapshot!();
      simulation.at(simulation.between(from, 15_000), () => {
        simulation.log(() => "THE DATABASE GOES BACK IN TIME");
        simulation.outside(async () => {
          await restore();
          wentBack = true;
          positions.clear();
        });
        // A relay hears of it when it has something to write, or when it is started again.
        for (let partition = 0; partition < cluster.partitions(FROM); partition++) {
          total++;
          simulation.at(simulation.now + simulation.between(100, 3000), () => {
            const value = encoder.encode(`last-${partition}`);
            cluster.publish([{ topic: FROM, partition, key: null, value, headers: [] }]);
            sent++;
          });
        }
      });
    });
  }

  await simulation.until(() => false, simulation.between(8000, 30_000));
  faults.end();
  raging = false;
  const atRest = () => {
    if (sent < total || target.underWay > 0) return false;
    const done = written();
    if (!visible.every(({ id }) => removed.has(id) || isOver(id, done))) return false;
    return visible.every(({ partition, offset }) => offset < (reached.get(partition) ?? 0));
  };
  // Who is paused wakes, and what is late arrives.
  await simulation.until(() => false, simulation.now + TIMES.pauseMs + 2500);
  await reach(simulation, "rest after the faults ended", atRest);
  await finish(simulation, fleet);

  // The books.
  const out = written();
  for (const id of new Set(visible.map(({ id }) => id))) {
    const happened = out.filter((other) => other === id).length;
    const zombie = target.ledger.some((execution) => execution.id === id && execution.zombie);
    if (happened > 1 && !(reconciles && zombie)) simulation.violate(`${id} happened ${happened} times`);
    if (poison.has(id) && happened > 0) simulation.violate(`${id} was refused, and happened`);
    if (removed.has(id) || happened > 0) continue;
    if (!isOver(id)) simulation.violate(`${id} is lost`);
    const state = rows.get({ scope: GROUP, key: id })?.state;
    if (state === "done") simulation.violate(`${id} is called done, and did not happen`);
    if (withDead && !buried.has(id)) simulation.violate(`${id} was set aside, and is not in the dead-letter topic`);
  }
  for (const id of [...out, ...buried]) {
    if (aborted.includes(id)) simulation.violate(`${id} was never committed, and was taken`);
  }
  checkOrder(out);

  /** The first time that each happened, by partition; where not all goes through one hand, by key as well. */
  function checkOrder(out: readonly string[]): void {
    const last = new Map<string, number>();
    for (const id of new Set(out)) {
      const [record, again] = visible.filter((one) => one.id === id);
      // What compaction has removed only a member delivers that had read it before: late, if it was taken for dead meanwhile.
      if (!record || again || claimed && (isFree(record) || removed.has(id))) continue;
      const line = `${record.partition} ${claimed || toKafka ? record.key : ""}`;
      if (record.offset < (last.get(line) ?? -1)) simulation.violate(`${id} of ${line} was overtaken: ${out.join(" ")}`);
      last.set(line, record.offset);
    }
  }
  /** What is set aside holds nothing back. */
  function isFree({ key }: Visible): boolean {
    return key === null || visible.some((other) => other.key === key && parked.has(other.id));
  }
}
