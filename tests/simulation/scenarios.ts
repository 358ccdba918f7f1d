/**
 * One seed, one story: which protocol, how many relays, what goes wrong and when; then the faults end, an operator clears up,
 * and the books are compared.
 *
 * @module
 */
import { DatabaseSync } from "node:sqlite";
import {
  type AtomicSink,
  type Batch,
  type ClaimStore,
  claimStore,
  EffectError,
  type EffectKey,
  handler,
  type NewMessage,
  once,
  type Outbox,
  type Position,
  refusedMessage,
  rejected,
  relay,
  type Sink,
  type Source,
} from "../../mod.ts";
import { fileSink, parseLine } from "../../adapters/file.ts";
import { kafkaSink } from "../../adapters/kafka.ts";
import { memoryOutbox, memoryStore } from "../../adapters/memory.ts";
import { checkAdvance } from "../../adapters/shared.ts";
import { migrateSqlite, type SqliteClient, sqliteOutbox, sqliteStore } from "../../adapters/sqlite.ts";
import { chooseFaults, finish, isZombie, paceOf, reach, remoteSink, supervise, TIGHT, TIMES } from "./fleet.ts";
import { FROM_KAFKA, type FromKafka, playFromKafka } from "./from_kafka.ts";
import { Cluster, modelClient } from "./kafka.ts";
import { type Faults, type Process, Simulation, tameCrypto } from "./scheduler.ts";
import { callSink, remoteStore, Rows, type RowView, Target, wrongChange } from "./world.ts";

const SCOPE = "relay";
interface Planned {
  readonly id: string;
  readonly key: string | null;
  /** Refused by whoever gets it, always. */
  readonly poison: boolean;
}

interface Row {
  readonly id: string;
  readonly key: string | null;
  readonly state: string;
}

/** A database: an outbox, claims, and a view of both that disturbs nothing. */
interface Storage {
  readonly outbox: Outbox;
  readonly claims: ClaimStore;
  enqueue(message: NewMessage): Promise<void>;
  rows(): readonly Row[];
  effects(): readonly RowView[];
  /** Undefined where it cannot be seen in the middle of a call. */
  effect(key: EffectKey): RowView | undefined;
  snapshot(): () => Promise<void>;
}

function memoryStorage(simulation: Simulation): Storage {
  const store = memoryStore({ now: () => simulation.now });
  const rows = new Rows(simulation);
  return {
    outbox: memoryOutbox(store),
    claims: claimStore(rows),
    enqueue: (message) => store.enqueue(message),
    rows: () => store.outbox(),
    effects: () => [...rows.rows.values()],
    effect: (key) => rows.get(key),
    snapshot: () => store.snapshot(),
  };
}

const TABLES = ["outbox", "effects", "shards", "batches", "relays"].map((name) => `effectonce_${name}`);

async function sqliteStorage(simulation: Simulation): Promise<Storage> {
  const client = new DatabaseSync(":memory:");
  const options = { now: () => simulation.now };
  await migrateSqlite(client as SqliteClient, options);
  const store = sqliteStore(client as SqliteClient, options);
  const statements = new Map<string, ReturnType<typeof client.prepare>>();
  const all = (sql: string) => {
    const statement = statements.get(sql) ?? client.prepare(sql);
    statements.set(sql, statement);
    return statement.all() as Record<string, string | number | null>[];
  };
  return {
    outbox: sqliteOutbox(client as SqliteClient, options),
    claims: store,
    enqueue: (message) => store.transaction((effects) => effects.enqueue(message)),
    rows: () => all("select id, key, state from effectonce_outbox order by seq") as unknown as readonly Row[],
    effects: () =>
      all(
        `select key, state, fence, generation, attempt, result, until_ms as "untilMs" from effectonce_effects order by key`,
      ) as unknown as readonly RowView[],
    effect: () => undefined,
    snapshot() {
      const kept = [...TABLES, "sqlite_sequence"].map((table) => ({ table, rows: all(`select * from ${table}`) }));
      return () => {
        client.exec("begin");
        for (const { table, rows } of kept) {
          client.exec(`delete from ${table}`);
          for (const row of rows) {
            const names = Object.keys(row);
            client.prepare(`insert into ${table} (${names.join(", ")}) values (${names.map(() => "?").join(", ")})`)
              .run(...Object.values(row));
          }
        }
        client.exec("commit");
        return Promise.resolve();
      };
    },
  };
}

/** A source as one process reaches it. */
function remoteSource(process: Process, source: Source, faults: () => Faults, onParked: () => void): Source {
  return {
    name: source.name,
    seals: source.seals,
    open: (options) =>
      process.call("open source", faults(), async () => {
        const session = await source.open(options);
        const call = <T>(what: string, run: () => Promise<T>) => process.call(what, faults(), run);
        return {
          ...session,
          read: (limits) => call("read", () => session.read(limits)),
          settle: (messages) => call(`settle ${messages.map(({ id }) => id).join(" ")}`, () => session.settle(messages)),
          park: (parks) => {
            if (parks.some(({ retryMs }) => retryMs === null)) onParked();
            return call(
              parks.map(({ message, retryMs }) => `park ${message.id} ${retryMs === null ? "for good" : `${retryMs} ms`}`)
                .join(", "),
              () => session.park(parks),
            );
          },
          settled: () => call("settled", () => session.settled()),
          seal: (ring, limits) => call(`seal behind ${ring.at(-1)?.n ?? 0}`, () => session.seal(ring, limits)),
          unseal: (ring, parks) => {
            if (parks.some(({ retryMs }) => retryMs === null)) onParked();
            return call("unseal", () => session.unseal(ring, parks));
          },
          renew: () => call("renew source", () => session.renew()),
          close: (settled) => call("close source", () => session.close(settled)),
        };
      }),
  };
}

/** A log that commits its position with its records, and fences by position, or by position and epoch as Kafka does. */
function logSink(simulation: Simulation, records: string[], refuses: (id: string) => unknown, epochs: boolean): AtomicSink {
  const ring: Position[] = [];
  let epoch = 0;
  return {
    kind: "atomic",
    name: "log",
    open() {
      const mine = ++epoch;
      return Promise.resolve({
        ring: [...ring],
        // deno-lint-ignore require-await -- what throws here must reject
        async commit({ messages, n, uid, prev, rows }: Batch) {
          if (epochs && mine !== epoch) throw new EffectError("fenced", "a later epoch has begun");
          checkAdvance(ring.at(-1), { n, uid, prev, rows });
          for (const message of messages) {
            const why = refuses(message.id);
            if (why) throw refusedMessage(message, why);
          }
          ring.push({ n, uid, prev, rows });
          for (const { id } of messages) {
            records.push(id);
            simulation.log(() => `RECORD ${id} in batch ${n}`);
          }
        },
        close: () => Promise.resolve(),
      });
    },
  };
}

const KINDS = {
  "claimed never": 16,
  "claimed never, asking": 14,
  "claimed same-key": 20,
  "plain": 6,
  "once never": 7,
  "once never, asking": 6,
  "once same-key": 8,
  "sealed": 16,
  "handler": 6,
  "kafka": 16,
  "sqlite claimed never": 1,
  "sqlite claimed same-key": 1,
  "sqlite sealed": 4,
  "sqlite sealed into a file": 2,
  "sqlite kafka": 2,
  ...FROM_KAFKA,
} as const;

/** What a seed is about. */
export type Kind = keyof typeof KINDS;

const isFromKafka = (kind: Kind): kind is FromKafka => kind in FROM_KAFKA;

function kindOf(simulation: Simulation): Kind {
  let left = simulation.random() * Object.values<number>(KINDS).reduce((sum, weight) => sum + weight);
  return (Object.keys(KINDS) as Kind[]).find((kind) => (left -= KINDS[kind]) < 0)!;
}

/**
 * Runs one seed to its end; answers its kind and how many events it had.
 *
 * @throws {Violation} If anything was seen that must not be.
 */
export async function simulate(
  seed: number,
  trace?: (line: string) => void,
): Promise<{ readonly kind: Kind; readonly steps: number }> {
  const simulation = new Simulation(seed, trace);
  tameCrypto(() => simulation.random());
  const kind = kindOf(simulation);
  simulation.log(() => `seed ${seed}: ${kind}`);
  const folder = kind.endsWith("file")
    ? Deno.makeTempDirSync({ dir: Deno.build.os === "linux" ? "/dev/shm" : undefined })
    : "";
  try {
    if (isFromKafka(kind)) await playFromKafka(simulation, kind);
    else await (kind.startsWith("once") ? playOnce(simulation, kind) : playRelays(simulation, kind, folder));
    simulation.check();
  } finally {
    if (folder) Deno.removeSync(folder, { recursive: true });
  }
  return { kind, steps: simulation.steps };
}

function plan(simulation: Simulation): readonly Planned[] {
  const keys = simulation.pick([["a"], ["a", "b"], ["a", null], [null]]);
  const poisonous = simulation.pick([0, 0, 0.2]);
  return Array.from({ length: simulation.between(2, 6) }, (_, i) => {
    return { id: `m${i + 1}`, key: simulation.pick(keys), poison: simulation.chance(poisonous) };
  });
}

async function playRelays(simulation: Simulation, kind: Kind, folder: string): Promise<void> {
  const onFile = kind.endsWith("file");
  const onKafka = kind.includes("kafka");
  const atomic = kind.includes("sealed") || kind === "handler" || onKafka;
  const storage = kind.startsWith("sqlite") ? await sqliteStorage(simulation) : memoryStorage(simulation);
  const times = kind.endsWith("same-key") ? TIGHT : TIMES;
  const faults = chooseFaults(simulation, times.pauseMs, kind === "plain" && simulation.chance(0.5));
  const messages = plan(simulation);
  const poison = new Set(messages.filter((message) => message.poison && !onFile).map(({ id }) => id));
  const flaky = simulation.pick([0, 0, 0.1]);
  const onPark = simulation.pick(["block", "block", "skip"] as const);
  const repeat = kind === "plain" ? "always" : kind.endsWith("same-key") ? "same-key" : "never";
  const reconciles = kind.endsWith("asking");
  const deduping = repeat === "same-key";
  const target = new Target(simulation, {
    dedupeWindowMs: times.windowMs,
    refuses: (id) => poison.has(id),
    maxLateMs: times.lateMs,
  });
  /** What came out of an atomic sink, in order. */
  const records: string[] = [];
  const shared = {
    name: SCOPE,
    ...paceOf(simulation, times),
    onPark,
  };

  let raging = true;
  const refuses = (id: string): unknown =>
    poison.has(id)
      ? rejected("refused for good")
      : raging && simulation.chance(flaky)
      ? new Error("a passing fault")
      : undefined;
  const path = `${folder}/events.jsonl`;
  const table = memoryStore({ now: () => simulation.now });
  const log = logSink(simulation, records, refuses, simulation.chance(0.5));
  const writes = handler(
    table,
    async ({ id }, effects) => {
      await effects.enqueue({ id, topic: "written", value: null });
      const why = refuses(id);
      if (why) throw why;
    },
    simulation.chance(0.5) ? { key: ({ id }) => id } : {},
  );
  const cluster = new Cluster(simulation, { orders: 1 }, ({ topic, value }) => {
    if (topic !== "orders") return;
    const id = new TextDecoder().decode(value ?? undefined);
    records.push(id);
    simulation.log(() => `RECORD ${id}`);
  });
  const transactionTimeoutMs = simulation.between(1000, 4000);
  const delivered = (): readonly string[] => {
    if (kind === "handler") return table.outbox().map(({ id }) => id);
    if (onFile) return committed(path);
    return atomic ? records : target.ledger.map(({ id }) => id);
  };

  function sinkOf(process: Process): Sink {
    if (onFile) return fileOf(simulation, process, path, recount);
    if (onKafka) {
      return kafkaSink(modelClient(simulation, process, cluster, faults.calls), {
        transactionTimeoutMs,
        runtime: process.runtime,
      });
    }
    if (kind === "handler") return remoteSink(process, writes, faults.calls);
    if (atomic) return remoteSink(process, log, faults.calls);
    return callSink(
      process,
      target,
      { repeat, dedupeWindowMs: deduping ? times.windowMs : undefined, reconciles },
      faults.target,
      faults.calls,
      (id, idempotencyKey, attempt) =>
        isZombie(simulation, storage.effect({ scope: SCOPE, key: id }), idempotencyKey, attempt),
    );
  }
  /** Where a parked message lets the later ones pass, there is no order any more. */
  let parkings = 0;
  const places = kind === "plain" ? simulation.pick([1, 1, 2]) : simulation.pick([1, 2, 2, 3]);
  const fleet = supervise(simulation, places, (process, signal) =>
    relay({
      ...shared,
      from: remoteSource(process, storage.outbox, faults.calls, () => parkings++),
      to: sinkOf(process),
      store: kind === "plain" ? undefined : remoteStore(simulation, process, storage.claims, faults.calls, storage.effect),
      signal,
      runtime: process.runtime,
    }));

  const enqueued: string[] = [];
  /** Rows that the database forgot when it went back in time, before anybody had them. */
  const forgotten = new Set<string>();
  let wentBack = false;
  function recount(): void {
    if (!wentBack) return;
    const left = new Set([...storage.rows().map(({ id }) => id), ...delivered()]);
    for (const id of enqueued) if (!left.has(id)) forgotten.add(id);
    for (const id of left) forgotten.delete(id);
  }
  for (const { id, key } of messages) {
    simulation.at(simulation.between(0, 4000), () => {
      enqueued.push(id);
      simulation.log(() => `enqueued ${id} of key ${key}`);
      // What Kafka has no topic for is refused.
      const topic = onKafka && poison.has(id) ? "nowhere" : "orders";
      simulation.outside(() => storage.enqueue({ id, topic, key, value: id }));
    });
  }
  if (onKafka) {
    for (let times = simulation.between(0, 3); times > 0; times--) {
      simulation.at(simulation.between(0, 8000), () => {
        for (const place of cluster.places()) {
          if (simulation.chance(0.5)) cluster.compact(place);
          else cluster.disturb(place, simulation.between(100, 1500));
        }
      });
    }
  }
  if (atomic && simulation.chance(0.5)) {
    // Each return abandons what happened since its snapshot, and the snapshots of that time with it.
    const abandoned: { readonly from: number; readonly to: number }[] = [];
    for (let times = simulation.between(1, 3); times > 0; times--) {
      const from = simulation.between(0, 5000);
      simulation.at(from, () => {
        simulation.log(() => "a snapshot of the database");
        const restore = storage.snapshot();
        simulation.at(simulation.between(from, 8000), () => {
          if (!raging || abandoned.some((span) => span.from < from && from <= span.to)) return;
          abandoned.push({ from, to: simulation.now });
          simulation.log(() => "THE DATABASE GOES BACK IN TIME");
          simulation.outside(async () => {
            await restore();
            wentBack = true;
            recount();
          });
        });
      });
    }
  }
  watchRows(simulation, storage);
  await simulation.until(() => false, simulation.between(4000, deduping ? 25_000 : 12_000));
  faults.end();
  raging = false;

  /** Whether no relay has anything to do: what is left is parked, or held back by what is. */
  const atRest = () => {
    const rows = storage.rows();
    const stuck = (row: Row, at: number) =>
      row.state === "parked" || onPark === "block" && row.key !== null &&
        rows.slice(0, at).some(({ key, state }) => key === row.key && state === "parked");
    return target.underWay === 0 && enqueued.length === messages.length && rows.every(stuck) &&
      storage.effects().every(({ state, key, untilMs }) =>
        // A claim whose answer was lost, after another relay had parked the message: a person sees it as parked.
        state !== "claimed" || untilMs <= simulation.now && rows.some((row) => row.id === key && row.state === "parked")
      );
  };
  // Who is paused wakes, and what is late arrives. A plain relay's call is no claim that could be seen: it must have given up
  // (after 1000 ms of pause and 3000 of hanging), for what it says may set aside anew what another relay has parked.
  await simulation.until(() => false, simulation.now + (kind === "plain" ? 4500 : 2500));
  await reach(simulation, "rest after the faults ended", atRest);
  for (let round = 0; storage.rows().some(({ id, state }) => state === "parked" && !poison.has(id)); round++) {
    if (round > 10) simulation.violate("an operator cannot get what is parked to go");
    await simulation.outside(() => operate(simulation, storage, target, poison, round));
    await reach(simulation, "rest after an operator has cleared up", atRest);
  }
  await finish(simulation, fleet);

  // The books.
  const out = delivered();
  const left = storage.rows();
  const parked = new Set(left.filter(({ state }) => state === "parked").map(({ id }) => id));
  for (const { id, key } of messages) {
    const happened = out.filter((other) => other === id).length;
    const inOutbox = left.some((row) => row.id === id);
    const zombie = target.ledger.some((execution) => execution.id === id && execution.zombie);
    // Said in the README: a process that is paused before its call and wakes after the target was asked can still send.
    const allowed = kind === "plain" ? simulation.harmed || places > 1 : reconciles && zombie;
    if (happened > 1 && !allowed) simulation.violate(`${id} happened ${happened} times`);
    if (poison.has(id) && happened > 0) simulation.violate(`${id} was refused, and happened`);
    if (poison.has(id) || inOutbox && behindParked(id, key)) continue;
    if (inOutbox) simulation.violate(`${id} is still in the outbox`);
    if (happened === 0 && !forgotten.has(id)) simulation.violate(`${id} is lost`);
  }
  function behindParked(id: string, key: string | null): boolean {
    const at = left.findIndex((row) => row.id === id);
    return onPark === "block" && key !== null && left.slice(0, at).some((row) => row.key === key && parked.has(row.id));
  }
  for (const { key, state } of storage.effects()) {
    if (state !== "done" && state !== "rejected" && !poison.has(key)) simulation.violate(`${key} is left behind, ${state}`);
  }
  checkOrder();
  /** The first time that each happened, by key, in the order of enqueueing. */
  function checkOrder(): void {
    const last = new Map<string, number>();
    for (const id of new Set(out)) {
      const { key } = messages.find((message) => message.id === id)!;
      if (key === null || onPark === "skip" && parkings > 0) continue;
      const at = enqueued.indexOf(id);
      if (at < (last.get(key) ?? -1)) simulation.violate(`${id} of key ${key} was overtaken: ${out.join(" ")}`);
      last.set(key, at);
    }
  }
}

/** Looks at a database's rows as they change, where they cannot be seen in the middle of a call. */
function watchRows(simulation: Simulation, storage: Storage): void {
  let before = new Map<string, RowView>();
  const look = () => {
    const now = new Map(storage.effects().map((row) => [row.key, row]));
    for (const [key, row] of before) {
      const wrong = wrongChange(row, now.get(key));
      if (wrong) simulation.violate(wrong);
    }
    before = now;
    simulation.at(simulation.now + 100, look);
  };
  look();
}

/** What a person does about parked messages, as the command line does it. */
async function operate(
  simulation: Simulation,
  storage: Storage,
  target: Target,
  poison: ReadonlySet<string>,
  round: number,
): Promise<void> {
  for (const { id, reason } of await storage.outbox.parked()) {
    const [effect] = await storage.claims.list({ key: id });
    const key = { scope: SCOPE, key: id };
    simulation.log(() => `an operator looks at ${id}: ${effect?.state ?? "never claimed"}, ${reason}`);
    if (poison.has(id)) {
      if (effect?.state === "uncertain") await storage.claims.resolve(key, { as: "rejected", reason: "by a person" });
      continue;
    }
    if (effect?.state === "uncertain" && round === 0 && simulation.chance(0.5)) {
      await storage.claims.resolve(key, { as: "retry" }); // Whether that repeats it is up to the relay.
    } else if (effect?.state === "uncertain" || effect?.state === "claimed") {
      await storage.claims.resolve(key, { as: target.count(id) > 0 ? "done" : "absent" });
    } else if (effect?.state === "rejected") {
      if (target.count(id) > 0) simulation.violate(`${id} is called refused, and happened`);
      await storage.claims.resolve(key, { as: "absent" });
    } else if (effect?.state === "waiting") {
      await storage.claims.resolve(key, { as: "retry" });
    }
    await storage.outbox.release(id);
  }
}

/** The messages of a file's whole batches: behind them there may be a torn one. */
function committed(path: string): readonly string[] {
  const ids: string[] = [];
  const batch: string[] = [];
  try {
    for (const line of Deno.readTextFileSync(path).split("\n")) {
      const message = parseLine(line);
      if (message) batch.push(message.id!);
      else ids.push(...batch.splice(0));
    }
  } catch (error) {
    if (!(error instanceof Deno.errors.NotFound || error instanceof SyntaxError)) throw error;
  }
  return ids;
}

/** A file as a sink: it dies with its process, at worst in the middle of a write. */
function fileOf(simulation: Simulation, process: Process, path: string, onTorn: () => void): AtomicSink {
  const sink = fileSink(path);
  return {
    ...sink,
    open: (owner) =>
      process.call("open file", {}, () =>
        simulation.outside(async () => {
          const session = await sink.open(owner);
          let writing: { readonly before: number } | undefined;
          process.onKill(() => {
            simulation.outside(async () => {
              await session.close();
              if (!writing) return;
              const { size } = await Deno.stat(path);
              const torn = simulation.between(writing.before, size);
              simulation.log(() => `the file is torn at byte ${torn} of ${size}`);
              // The header of a new file is on the disk before its first batch is written.
              if (writing.before === 0 || simulation.chance(0.5)) {
                await Deno.truncate(path, torn);
              } else {
                // The pages of a write reach the disk in any order.
                using file = await Deno.open(path, { write: true });
                await file.seek(torn, Deno.SeekMode.Start);
                await file.write(new Uint8Array(Math.min(size - torn, simulation.between(1, 50))));
              }
              // What is nowhere now was in a database that went back, and in a batch that nobody was told of.
              onTorn();
            });
          });
          return {
            ring: session.ring,
            async commit(batch) {
              await process.call(`commit ${batch.n} to the file`, {}, () =>
                simulation.outside(async () => {
                  const before = await Deno.stat(path);
                  await session.commit(batch);
                  writing = { before: before.size };
                }));
              writing = undefined;
            },
            close: () => simulation.outside(() => session.close()),
          };
        })),
  };
}

async function playOnce(simulation: Simulation, kind: Kind): Promise<void> {
  const times = kind.endsWith("same-key") ? TIGHT : TIMES;
  const faults = chooseFaults(simulation, times.pauseMs);
  const rows = new Rows(simulation);
  const store = claimStore(rows);
  const deduping = kind.endsWith("same-key");
  const reconciles = kind.endsWith("asking");
  const keys = Array.from({ length: simulation.between(1, 3) }, (_, i) => `k${i + 1}`);
  const refused = new Set(keys.filter(() => simulation.chance(0.1)));
  const target = new Target(simulation, {
    dedupeWindowMs: times.windowMs,
    refuses: (id) => refused.has(id),
    maxLateMs: times.lateMs,
  });
  const leaseMs = simulation.between(times.leaseMs[0], times.leaseMs[1]);
  const results = new Map<string, Set<string>>();
  /** Ended for the callers: done or refused, or in doubt with nobody to ask. */
  const isOver = (key: string) => ["done", "rejected", "uncertain"].includes(rows.get({ scope: "once", key })?.state ?? "");

  const fleet = supervise(simulation, simulation.between(1, 3), async (process, signal) => {
    const remote = remoteStore(simulation, process, store, faults.calls, (key) => rows.get(key));
    while (!signal.aborted) {
      const key = simulation.pick(keys);
      try {
        const result = await once(
          remote,
          { scope: "once", key },
          ({ idempotencyKey, number, request, signal }) => {
            if (request.amount !== 5) simulation.violate("an attempt was given another request");
            const zombie = () => isZombie(simulation, rows.get({ scope: "once", key }), idempotencyKey, number);
            return target.send(process, faults.target(), key, idempotencyKey, signal, zombie);
          },
          {
            request: { amount: 5 },
            leaseMs,
            settleMs: times.settleMs,
            waitMs: simulation.between(0, 2000),
            runtime: process.runtime,
            ...deduping ? { repeat: "same-key", dedupeWindowMs: times.windowMs } as const : { repeat: "never" } as const,
            ...reconciles
              ? { reconcile: (_: EffectKey, idempotencyKey: string) => target.find(process, faults.calls(), idempotencyKey) }
              : {},
          },
        );
        if (refused.has(key)) simulation.violate(`${key} was refused, and answered as done`);
        const seen = results.get(key) ?? new Set();
        results.set(key, seen.add(JSON.stringify(result)));
        if (rows.get({ scope: "once", key })?.state !== "done") {
          simulation.violate(`${key} was answered before it was recorded`);
        }
        if (target.count(key) === 0) simulation.violate(`${key} was answered before it happened`);
      } catch (error) {
        const code = error instanceof EffectError ? error.code : "";
        if (code === "mismatch" || error instanceof TypeError) simulation.violate(`${key}: ${error}`);
        if (code === "rejected" && target.count(key) > 0 && !refused.has(key)) {
          simulation.violate(`${key} happened, and was answered as refused`);
        }
        simulation.log(() => `${process.name} has ${key}: ${code || error}`);
      }
      await process.runtime.sleep(simulation.between(0, 500), signal);
    }
  });
  await simulation.until(() => false, simulation.between(3000, deduping ? 25_000 : 10_000));
  faults.end();
  const settledBy = (states: readonly string[]) => () =>
    target.underWay === 0 && keys.every((key) => states.includes(rows.get({ scope: "once", key })?.state ?? ""));
  await reach(simulation, "an end of all effects", () => target.underWay === 0 && keys.every(isOver));
  if (reconciles) await reach(simulation, "an end of all doubts", settledBy(["done", "rejected"]));
  // More than once: a claim that was long on its way may come after a resolution, with nobody behind it.
  for (let round = 0; !settledBy(["done", "rejected"])(); round++) {
    if (round > 10) simulation.violate("an operator cannot end the doubts");
    for (const row of rows.rows.values()) {
      if (row.state !== "uncertain") continue;
      const happened = target.count(row.key) > 0;
      const refuse = !happened && refused.has(row.key);
      await store.resolve(
        row,
        happened ? { as: "done" } : refuse ? { as: "rejected", reason: "by a person" } : { as: "absent" },
      );
      results.delete(row.key);
    }
    await reach(simulation, "an end of all effects, after an operator", () => target.underWay === 0 && keys.every(isOver));
  }
  await finish(simulation, fleet);
  for (const key of keys) {
    const happened = target.count(key);
    const zombie = target.ledger.some((execution) => execution.id === key && execution.zombie);
    if (happened > 1 && !(reconciles && zombie)) simulation.violate(`${key} happened ${happened} times`);
    if (happened === 0 && !refused.has(key)) simulation.violate(`${key} is lost`);
    if ((results.get(key)?.size ?? 0) > 1 && happened === 1 && !zombie) {
      simulation.violate(`callers of ${key} were told different results: ${[...results.get(key)!].join(" ")}`);
    }
  }
}
