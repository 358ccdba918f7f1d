/**
 * In which order, and how soon, relays deliver what transactions on a database server commit: numbers are handed out at the
 * INSERT and seen after the COMMIT. Beside what must hold, a naive reader shows a fault in the same run.
 */
import { assert, assertEquals, assertNotEquals } from "@std/assert";
import { type CallSink, type EffectError, relay, type RelayEvent, type RelayOptions } from "@effectonce/effectonce";
import { memorySink } from "@effectonce/effectonce/memory";
import { until } from "./cli_run.ts";
import {
  connect,
  type Connected,
  type ConnectOptions,
  ledgerOf,
  ledgerSink,
  makeLedger,
  type Opened,
  opened,
  type Options,
  type Sql,
} from "./crash_servers_child.ts";
import { database } from "./services/mod.ts";
import { startProxy } from "./services/proxy.ts";
import type { Kind } from "./services/servers.ts";

const LONG = Deno.env.get("EFFECTONCE_LONG") === "1";
const KINDS = ["postgres", "mariadb", "mysql"] as const;

/** One test on each server, on a fresh database with tables. */
function onEach(name: string, run: (db: Opened) => Promise<void>, kinds: readonly Kind[] = KINDS): void {
  for (const kind of kinds) {
    Deno.test(`${kind}: ${name}`, async () => {
      await using db = await opened(kind, database(kind));
      await run(db);
    });
  }
}

/** A relay that runs on until it is disposed of. */
function running(options: Omit<RelayOptions, "signal">): AsyncDisposable {
  const stop = new AbortController();
  const ended = relay({ pollMs: 5, ...options, signal: stop.signal });
  return {
    async [Symbol.asyncDispose]() {
      stop.abort();
      await ended;
    },
  };
}

/** Puts a row into the outbox, as an application of any language would. */
async function insert(sql: Sql, id: string, topic: string, key: string | null, value = "{}"): Promise<void> {
  const row = [id, topic, key, new TextEncoder().encode(value)];
  await sql(`insert into effectonce_outbox (id, topic, "key", value) values (?, ?, ?, ?)`, row);
}
/** The same into the topics of both relays and the naive reader's. */
async function insertAll(sql: Sql, id: string, key: string | null, value = "{}"): Promise<void> {
  const bytes = new TextEncoder().encode(value);
  const rows = ["calls", "rows", "naive"].map((topic) => [`${topic} ${id}`, topic, key, bytes]);
  await sql(`insert into effectonce_outbox (id, topic, "key", value) values ${rows.map(() => "(?, ?, ?, ?)")}`, rows.flat());
}
const numberOf = async (sql: Sql, id: string): Promise<number> =>
  Number((await sql("select seq from effectonce_outbox where id = ?", [id]))[0]!.seq);

/** The usual way: what comes after the last number that was seen. Nobody delivers its topic, so its rows stay. */
function naiveReader({ sql }: Pick<Connected, "sql">) {
  const seen: string[] = [];
  let last = 0;
  return {
    seen,
    get last() {
      return last;
    },
    async read(): Promise<void> {
      const next = "select seq, id from effectonce_outbox where topic = 'naive' and seq > ? order by seq limit 100";
      for (const { seq, id } of await sql(next, [last])) {
        last = Number(seq);
        seen.push(String(id).slice("naive ".length));
      }
    },
  };
}

/** A relay of calls, and one of sealed batches into the ledger, both of this database. */
async function bothRelays(db: Opened, options: Partial<RelayOptions> = {}) {
  await makeLedger(db);
  const calls = memorySink();
  const stack = new AsyncDisposableStack();
  const common = { store: db.store(), ...options };
  stack.use(running({ ...common, name: "calls", from: db.outbox({ topics: ["calls"] }), to: calls }));
  stack.use(running({ ...common, name: "rows", from: db.outbox({ topics: ["rows"] }), to: ledgerSink(db) }));
  return {
    /** How many came out of both. */
    count: async () => calls.messages.length + Number((await db.sql("select count(*) as n from ledger"))[0]!.n),
    /** What came out of either. */
    got: async () => ({
      calls: calls.messages.map(({ id }) => id.slice("calls ".length)),
      rows: (await ledgerOf(db)).map((id) => id.slice("rows ".length)),
    }),
    [Symbol.asyncDispose]: () => stack.disposeAsync(),
  };
}

/** A connection of its own, closed in the end. */
async function session(db: Connected): Promise<AsyncDisposable & { readonly sql: Sql }> {
  const { sql, close } = await db.session();
  return { sql, [Symbol.asyncDispose]: close };
}

// ------------------------------------------------------------------------------------------------------- inverted commits

onEach("a row whose transaction commits after a later one was delivered is not skipped (acceptance 1)", async (db) => {
  await using relays = await bothRelays(db);
  await using a = await session(db);
  await using b = await session(db);
  const naive = naiveReader(db);
  await a.sql("begin");
  await insertAll(a.sql, "a", "key-a");
  await b.sql("begin");
  await insertAll(b.sql, "b", "key-b");
  const [first, second] = [await numberOf(a.sql, "naive a"), await numberOf(b.sql, "naive b")];
  assert(first < second, "a has the lower number");
  await b.sql("commit");
  await until(async () => Object.values(await relays.got()).every((ids) => ids.length === 1));
  await naive.read();
  await a.sql("commit");
  await until(async () => Object.values(await relays.got()).every((ids) => ids.length === 2));
  assertEquals(await relays.got(), { calls: ["b", "a"], rows: ["b", "a"] });
  await naive.read();
  assertEquals(naive.seen, ["b"], "the naive way shows no fault");
});

onEach(
  "16 writers that lock their key first, with rollbacks and pauses: none lost, none twice, per key in the order of commits (acceptance 1)",
  async (db) => {
    const rows = LONG ? 20_000 : 2_000;
    await db.sql(`create table versions ("key" varchar(10) primary key, version integer not null)`);
    await db.sql("create table elsewhere (n integer)");
    const keys = Array.from({ length: 20 }, (_, i) => `k${i}`);
    for (const key of keys) await db.sql("insert into versions values (?, 0)", [key]);
    await using relays = await bothRelays(db);
    await using pauses = connect(db.kind, db.url, { connections: 16 });
    const naive = naiveReader(db);
    let [begun, writing, held] = [0, 16, 0];
    let lastHeld = 0;

    async function write({ sql }: { readonly sql: Sql }, n: number): Promise<void> {
      const key = keys[Math.floor(Math.random() * keys.length)]!;
      await sql("begin");
      if (n % 3 === 0) await sql("insert into elsewhere values (?)", [n]); // Takes its transaction id here.
      await sql(`update versions set version = version + 1 where "key" = ?`, [key]);
      const [{ version }] = await sql(`select version from versions where "key" = ?`, [key]) as [{ version: number }];
      await insertAll(sql, `${key} ${version} ${n}`, key, JSON.stringify({ version }));
      // A pause is a number of other statements' round trips.
      for (let i = Math.floor(Math.random() * 6); i > 0; i--) await pauses.sql("select 1");
      if (n - lastHeld >= 100) { // One in a while commits only when the naive reader is beyond it.
        lastHeld = n;
        const seq = await numberOf(sql, `naive ${key} ${version} ${n}`);
        await until(() => naive.last > seq || writing === 1);
        held++;
      }
      await sql(n % 5 === 0 ? "rollback" : "commit");
    }
    async function writer(): Promise<void> {
      await using own = await session(db);
      while (begun < rows * 1.25) {
        const n = ++begun;
        await write(own, n).catch(async (error) => {
          // A deadlock, as any application meets it: this one leaves it at that.
          if (!db.store().isDatabaseFailure(error)) throw error;
          await own.sql("rollback");
        });
      }
      writing--;
    }
    async function readNaively(): Promise<void> {
      while (writing > 0) await naive.read();
      await naive.read();
    }
    await Promise.all([readNaively(), ...Array.from({ length: 16 }, writer)]);

    const committed = await db.sql(`select "key", version from versions order by "key"`);
    const expected = committed.flatMap(({ key, version }) =>
      Array.from({ length: Number(version) }, (_, i) => `${key} ${i + 1}`)
    );
    assert(expected.length > rows * 0.9, `${expected.length} of ${rows} committed`);
    // However far behind they are, they go on.
    for (let before = -1, now = 0; now < 2 * expected.length; before = now) {
      await until(async () => (now = await relays.count()) > before);
    }
    for (const [which, ids] of Object.entries(await relays.got())) {
      const byKey = new Map<string, string[]>(keys.toSorted().map((key) => [key, []]));
      for (const id of ids) byKey.get(id.split(" ")[0]!)!.push(id.split(" ").slice(0, 2).join(" "));
      assertEquals([...byKey.values()].flat(), expected, `${which}: lost, twice, or out of order`);
    }
    const lost = expected.length - naive.seen.length;
    assert(lost > 0, `the naive way shows no fault, though ${held} commits waited for it`);
  },
);

onEach("the order of a key is that of its commits, not of transaction ids (acceptance 28)", async (db) => {
  await db.sql("create table elsewhere (n integer)");
  await db.sql(`create table versions ("key" varchar(10) primary key, version integer not null)`);
  await db.sql("insert into versions values ('k', 0)");
  await db.sql("create table naive (id text, xid xid8 not null default pg_current_xact_id())");
  await using relays = await bothRelays(db);
  await using first = await session(db);
  await using second = await session(db);
  const write = async ({ sql }: { readonly sql: Sql }, id: string) => {
    await sql(`update versions set version = version + 1 where "key" = 'k'`);
    await insertAll(sql, id, "k");
    await sql("insert into naive (id) values (?)", [id]);
    await sql("commit");
  };
  await first.sql("begin");
  await first.sql("insert into elsewhere values (1)");
  await second.sql("begin");
  await write(second, "second");
  await write(first, "first");
  await until(async () => Object.values(await relays.got()).every((ids) => ids.length === 2));
  assertEquals(await relays.got(), { calls: ["second", "first"], rows: ["second", "first"] });
  // Both are behind the horizon by now, or soon: it is the order that is wrong.
  const naive = await db.sql("select id from naive order by xid, id");
  assertEquals(naive.map(({ id }) => id), ["first", "second"], "the naive way shows no fault");
}, ["postgres"]);

onEach("transactions that stay open elsewhere, and a prepared one, stall no relay (acceptance 35)", async (db) => {
  await using elsewhere = await opened(db.kind, database(db.kind));
  const postgres = db.kind === "postgres";
  await elsewhere.sql("create table ledger (id varchar(100))");
  const prepared = `p${crypto.randomUUID()}`;
  const write = async (sql: Sql) => void await sql("insert into ledger values ('x')");
  await using open = await session(elsewhere);
  await using second = await session(elsewhere);
  await using here = await session(db);
  await open.sql("begin");
  await write(open.sql);
  await here.sql("begin");
  await insert(here.sql, "never", "calls", null);
  const xa = async (...statements: readonly string[]) => {
    for (const text of statements) await second.sql(text);
  };
  await xa(postgres ? "begin" : `xa start '${prepared}'`);
  await write(second.sql);
  await xa(...postgres ? [`prepare transaction '${prepared}'`] : [`xa end '${prepared}'`, `xa prepare '${prepared}'`]);
  try {
    if (postgres) await db.sql("create table naive (id text, xid xid8 not null default pg_current_xact_id())");
    await using relays = await bothRelays(db);
    const took: number[] = [];
    for (let i = 1; i <= 10; i++) {
      const since = performance.now();
      await insertAll(db.sql, `${i}`, "k");
      if (postgres) await db.sql("insert into naive (id) values (?)", [i]);
      await until(async () => Object.values(await relays.got()).every((ids) => ids.length === i));
      took.push(performance.now() - since);
    }
    const median = took.toSorted((a, b) => a - b)[5]!;
    assert(median < 1_000, `delivered after ${Math.round(median)} ms`);
    if (!postgres) return;
    const naive = async () => await db.sql("select id from naive where xid < pg_snapshot_xmin(pg_current_snapshot())");
    assertEquals(await naive(), [], "the naive way shows no fault");
    await here.sql("rollback");
    await open.sql("rollback");
    assertEquals(await naive(), [], "a prepared transaction alone holds it back");
  } finally {
    await xa(postgres ? `rollback prepared '${prepared}'` : `xa rollback '${prepared}'`);
  }
});

// ------------------------------------------------------------------------------------------------------------ many at once

/** Each order of a round is paid once, whoever claimed it; nothing that was counted is missing. */
onEach(
  "20 writers claim one set of keys against each other, with deadlocks and locks that do not come in time: no effect lost, none done twice (acceptance 38)",
  async (db) => {
    const postgres = db.kind === "postgres";
    const orders = Array.from({ length: 8 }, (_, i) => `${i}`);
    const rounds = LONG ? 100 : 8;
    await db.sql("create table paid (id varchar(20) not null)");
    await db.sql("create table stock (id varchar(20) primary key, n integer not null)");
    for (const id of orders) await db.sql("insert into stock values (?, 0)", [id]);
    // It looks for deadlocks after a second: there would be time for a few only.
    if (postgres) await db.sql(`alter database "${new URL(db.url).pathname.slice(1)}" set deadlock_timeout = '20ms'`);
    // With time enough, and with too little of it on PostgreSQL; MySQL's own limit is a second at least.
    for (const waitMs of [5_000, 150]) {
      await db.sql("delete from paid");
      await db.sql("update stock set n = 0");
      await using own = connect(db.kind, db.url, { connections: 20 });
      const store = own.store({ waitMs });
      let [runs, committed, busy] = [0, 0, 0];
      const shuffled = () => orders.toSorted(() => Math.random() - 0.5);
      const pay = async (round: string, way: number): Promise<void> => {
        await store.transaction(async (effects, client) => {
          runs++;
          const sql = own.on(client);
          const mine = shuffled();
          const keys = mine.map((id) => ({ scope: `round ${round}`, key: id }));
          const claimAll = async () =>
            way === 0 ? await effects.claimAll(keys) : await Array.fromAsync(keys, (key) => effects.claim(key));
          const lockTwo = async () => {
            for (const id of shuffled().slice(0, 2)) await sql("update stock set n = n + 1 where id = ?", [id]);
          };
          if (way === 2) await lockTwo();
          const claims = await claimAll();
          if (way !== 2) await lockTwo();
          for (const [i, { state }] of claims.entries()) {
            if (state === "claimed") await sql("insert into paid values (?)", [`${round} ${mine[i]}`]);
            else assertEquals(state, "done");
          }
        });
        committed++;
      };
      const write = async (writer: number): Promise<void> => {
        for (let n = 0; n < rounds; n++) {
          for (let done = false; !done;) {
            done = await pay(`${waitMs} ${n}`, writer % 3).then(() => true, (error: EffectError) => {
              if (error.code !== "busy") throw error;
              busy++;
              return false;
            });
          }
        }
      };
      await Promise.all(Array.from({ length: 20 }, (_, i) => write(i)));
      const paid = (await db.sql("select id from paid")).map(({ id }) => String(id));
      const all = Array.from({ length: rounds }, (_, n) => orders.map((id) => `${waitMs} ${n} ${id}`)).flat();
      assertEquals(paid.toSorted(), all.toSorted());
      assertEquals(committed, 20 * rounds);
      const [stock] = await db.sql("select sum(n) as n from stock");
      assertEquals(Number(stock!.n), 2 * committed, "a write was lost, or done twice");
      assert(runs > committed, "nothing was run again: there was no deadlock");
      if (waitMs < 1_000 && postgres) assert(busy > 0, "no lock came too late");

      // What was set for a while is as it was, on every connection of the pool.
      const settings = postgres
        ? "select current_setting('lock_timeout') || current_setting('idle_in_transaction_session_timeout') as own"
        : `select concat(@@session.innodb_lock_wait_timeout = @@global.innodb_lock_wait_timeout,
            @@session.wait_timeout = @@global.wait_timeout, @@session.autocommit + 0) as own`;
      const gate = Promise.withResolvers<void>();
      let asked = 0;
      const sessions = await Promise.all(Array.from({ length: 20 }, () =>
        store.transaction(async (_, client) => {
          if (++asked === 20) gate.resolve();
          await gate.promise;
          return (await own.on(client)(settings.replace("lock_timeout", "statement_timeout")))[0]!.own;
        })));
      assertEquals(new Set(sessions), new Set([postgres ? "00" : "111"]));
    }
  },
);

// ------------------------------------------------------------------------------------------------------------------- plans

/** Every index of ours that a plan uses, and whether it reads a table of messages as a whole. */
async function planOf({ kind, sql }: Connected, text: string, values: readonly unknown[]) {
  const plan = await sql(`explain ${kind === "mysql" ? "format=traditional " : ""}${text.replace(/\$\d+/g, "?")}`, values);
  if (kind === "postgres") {
    const lines = plan.map((row) => String(row["QUERY PLAN"]));
    const used = lines.flatMap((line) => /effectonce_outbox_(?!pkey)(\w+) on effectonce_outbox/.exec(line)?.[1] ?? []);
    const bitmaps = lines.flatMap((line) => /Bitmap Index Scan on effectonce_outbox_(\w+)/.exec(line)?.[1] ?? []);
    return { used: [...used, ...bitmaps], whole: lines.some((line) => /Seq Scan on effectonce_outbox/.test(line)) };
  }
  const mine = plan.filter(({ table }) => table !== null && !/^<|effectonce_(?!outbox)|^s$|^p$/.test(String(table)));
  const used = mine.map(({ key }) => String(key).replace("effectonce_", "")).filter((key) => key !== "PRIMARY");
  return { used, whole: mine.some(({ type }) => type === "ALL" || type === "index") };
}

onEach("reads of 10,000 rows are searches of its indexes, not of the table (acceptance 39)", async (db) => {
  const states = ["parked", "blocked", "waiting", "delivered"];
  const value = new Uint8Array(500);
  for (let from = 0; from < 10_000; from += 500) {
    const rows = Array.from({ length: 500 }, (_, i) => from + i).map((i) => {
      const state = states[i % 50] ?? "pending";
      return [`m${i}`, `t${i % 1_000}`, `k${i % 2_000}`, value, state, state === "waiting" ? 9e12 : i];
    });
    const places = rows.map(() => "(?, ?, ?, ?, ?, ?)");
    await db.sql(
      `insert into effectonce_outbox (id, topic, "key", value, state, until_ms) values ${places}`,
      rows.flat(),
    );
  }
  await db.sql(db.kind === "postgres" ? "vacuum analyze effectonce_outbox" : "analyze table effectonce_outbox");
  const seen = new Map<string, readonly unknown[]>();
  const observe: ConnectOptions["observe"] = (text, values) => void seen.set(text, values);
  await using own = connect(db.kind, db.url, { observe });
  async function plans(which: RegExp, topics?: readonly string[], options: Options = {}) {
    // Some whose time has come, in each of the topics: else nobody looks for them.
    await db.sql("update effectonce_outbox set state = 'waiting', until_ms = 1 where id in ('m2', 'm4', 'm7')");
    seen.clear();
    const outbox = own.outbox({ topics, ...options });
    const session = await outbox.open({ relay: "r", protocol: "claimed", onPark: "block", leaseMs: 1_000 });
    const { messages } = await session.read({ rows: 100, bytes: 1_000_000 });
    assertEquals(messages.length, topics ? 10 * topics.length : 100);
    await session.seal([], { rows: 100, bytes: 1_000_000 });
    await db.sql("delete from effectonce_relays");
    await db.sql("delete from effectonce_batches");
    await db.sql("delete from effectonce_shards");
    await outbox.prune({ olderThanMs: 0, limit: 10 });
    const found = [...seen].filter(([text]) => which.test(text));
    assertNotEquals(found.length, 0, `no statement is ${which}`);
    return await Promise.all(found.map(([text, values]) => planOf(db, text, values)));
  }
  for (const { used, whole } of await plans(/ as lowest/)) {
    assertEquals([used.includes("held"), whole], [true, false], `${used}`);
  }
  for (const { used, whole } of await plans(/ as place/)) {
    assertEquals([used.includes("pending"), used.includes("held"), whole], [true, true, false], `${used}`);
  }
  for (const { used, whole } of await plans(/ as place/, ["t7", "t8"])) {
    assertEquals([used.includes("topic"), whole], [true, false], `${used}`);
  }
  for (const { used, whole } of await plans(/'waiting' and o.\S+ <= /)) assertEquals([used, whole], [["until"], false]);
  for (const { used, whole } of await plans(/for update skip locked/)) assertEquals([used, whole], [["until"], false]);

  // Two who skip what the other one has locked both find something.
  await db.sql("update effectonce_outbox set state = 'delivered', until_ms = 0 where seq % 2 = 0");
  const counts = await Promise.all([1, 2].map(() => own.outbox().prune({ olderThanMs: 0, limit: 100 })));
  assertEquals(counts, [100, 100]);

  const index = db.kind === "postgres" ? "effectonce_outbox_until" : "effectonce_until on effectonce_outbox";
  await db.sql(`drop index ${index}`);
  const [{ used }] = await plans(/'waiting' and o.\S+ <= /, ["t4"]) as unknown as [{ used: readonly string[] }];
  assertNotEquals(used, ["until"], "an index that is not there is not noticed");
});

onEach("claims among many that no statistics know of search for their keys alone", async (db) => {
  const many = db.kind === "postgres" ? 60_000 : 5_000; // Of fewer PostgreSQL rightly reads all.
  for (let from = 0; from < many; from += 500) {
    const rows = Array.from({ length: 500 }, (_, i) => ["s", `k${from + i}`, 1]);
    await db.sql(
      `insert into effectonce_effects (scope, "key", changed_ms) values ${rows.map(() => "(?, ?, ?)")}`,
      rows.flat(),
    );
  }
  const seen = new Map<string, readonly unknown[]>();
  await using own = connect(db.kind, db.url, { observe: (text, values) => void seen.set(text, values) });
  const keys = Array.from({ length: 100 }, (_, i) => ({ scope: "s", key: `k${i * 50}` }));
  const store = own.store();
  const joined = await store.transaction((effects) => effects.claimAll(keys));
  const claims = await store.claimAll(keys.map((key) => ({ key, leaseMs: 1_000, repeatWithinMs: 0 })));
  assertEquals(new Set([...joined, ...claims].map(({ state }) => state)), new Set(["done"]));
  // Some travel in one message with others.
  const reads = [...seen].flatMap(([text, values]) => text.split("; ").map((text) => [text, values] as const))
    .filter(([text]) => /^select [^]*effectonce_effects/.test(text));
  assertEquals(reads.length, db.kind === "postgres" ? 2 : 3, reads.map(([text]) => text.slice(0, 80)).join("\n"));
  for (const [text, values] of reads) {
    const plan = await db.sql(
      `explain ${db.kind === "mysql" ? "format=traditional " : ""}${text.replace(/\$\d+/g, "?")}`,
      values,
    );
    const of = plan.map((row) => row["QUERY PLAN"] ?? `${row["table"]} ${row["type"]} ${row["key"]}`).join("\n");
    assert(/effectonce_effects (eq_ref|ref) PRIMARY|Index Cond: .*scope = .* AND .*key = /.test(of), of);
  }
});

// --------------------------------------------------------------------------------------------------------------- idle load

// All at once: each is idle.
Deno.test("a relay with nothing to do sends at most 20 queries a second, by either protocol, on each server", async () => {
  async function idle(kind: Kind, sealed: boolean): Promise<void> {
    await using db = await opened(kind, database(kind));
    await makeLedger(db);
    let queries = 0;
    const { hostname, port } = new URL(db.url);
    await using proxy = startProxy({ hostname, port: Number(port) }, {
      observe(direction) {
        if (direction === "toServer") queries++;
        return "pass";
      },
    });
    await using through = connect(kind, proxy.url(db.url));
    const to: CallSink | ReturnType<typeof ledgerSink> = sealed ? ledgerSink(db) : memorySink();
    const started = Promise.withResolvers<void>();
    const observe = ({ type }: RelayEvent) => type === "idle" && started.resolve();
    await using _ = running({ from: through.outbox(), to, store: through.store(), pollMs: 50, observe });
    await started.promise;
    const [since, before] = [performance.now(), queries];
    await until(() => queries - before >= 40);
    const perSecond = 40_000 / (performance.now() - since);
    assert(perSecond <= 20, `${kind}, ${sealed ? "sealed" : "claimed"}: ${perSecond.toFixed(1)} queries a second`);
  }
  await Promise.all(KINDS.flatMap((kind) => [idle(kind, false), idle(kind, true)]));
});
