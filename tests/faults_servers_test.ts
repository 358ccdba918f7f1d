/**
 * What happens to stores and relays on database servers while connections break, servers go down and come back, a pooler is in
 * between, and backups are restored. Afterwards everything that was delivered is counted.
 */
import { assert, assertEquals, assertRejects } from "@std/assert";
import {
  type CallSink,
  type EffectError,
  rejected,
  relay,
  type RelayEvent,
  type RelayOptions,
  retryable,
  type Sink,
} from "@effectonce/effectonce";
import { until } from "./cli_run.ts";
import { connect, type Connected, ledgerOf, ledgerSink, makeLedger, type Opened, opened } from "./crash_servers_child.ts";
import { database } from "./services/mod.ts";
import { type Direction, type Proxy, startProxy } from "./services/proxy.ts";
import { type Kind } from "./services/servers.ts";

const LONG = Deno.env.get("EFFECTONCE_LONG") === "1";
const KINDS = ["postgres", "mariadb", "mysql"] as const;
const DIRECTIONS = ["toServer", "toClient"] as const;

/** One test on each server, on a fresh database with tables. */
function onEach(name: string, run: (db: Opened) => Promise<void>, kinds: readonly Kind[] = KINDS): void {
  for (const kind of kinds) {
    Deno.test(`${kind}: ${name}`, async () => {
      await using db = await opened(kind, database(kind));
      await run(db);
    });
  }
}

// ------------------------------------------------------------------------------------------------------- connections break

/** A way to a database that breaks where it is told to. */
interface Breaking extends AsyncDisposable {
  readonly proxy: Proxy;
  readonly url: string;
  /** Breaks at the n-th message in a direction from now on, or at the first that has a text in it. */
  arm(direction: Direction, at: number | RegExp): void;
  /** Whether it has broken since; disarms it. */
  broke(): boolean;
}

const decoder = new TextDecoder();
/** The message that is a COMMIT, in either protocol; not one that has "autocommit" in it. */
const COMMIT = /(^|\W)commit\0?$/;
function breaking(url: string): Breaking {
  const { hostname, port } = new URL(url);
  let armed: { readonly direction: Direction; readonly at: number | RegExp } | undefined;
  let [messages, broken] = [0, false];
  // The answer to a message that fits, once the server has given it.
  let answer = false;
  const proxy = startProxy({ hostname, port: Number(port) }, {
    observe(direction, bytes) {
      if (!armed || broken) return "pass";
      if (typeof armed.at === "number") {
        broken = direction === armed.direction && ++messages === armed.at;
      } else if (direction === "toServer") {
        answer = armed.at.test(decoder.decode(bytes));
        broken = answer && armed.direction === "toServer";
      } else {
        broken = answer;
      }
      return broken ? "cut" : "pass";
    },
  });
  return {
    proxy,
    url: proxy.url(url),
    arm(direction, at) {
      armed = { direction, at };
      [messages, broken, answer] = [0, false, false];
    },
    broke() {
      armed = undefined;
      return broken;
    },
    [Symbol.asyncDispose]: () => proxy[Symbol.asyncDispose](),
  };
}

/** Runs it again and again, each time with the connection broken one message later, until it ends before that. */
async function breakAtEach(way: Breaking, run: (name: string) => Promise<void>, step = 1, first = 1): Promise<void> {
  for (const direction of DIRECTIONS) {
    for (let n = first;; n += step) {
      way.arm(direction, n);
      const name = `${direction} ${n}`;
      try {
        await run(name);
      } catch (error) {
        throw new Error(`The connection broke at message ${name}: ${error}`, { cause: error });
      }
      if (!way.broke()) break;
      assert(n < 1_000, "it never ends");
    }
  }
}

onEach(
  "a connection that breaks at any message of a transaction with a claim: written once, and its value is that of the run that committed (acceptance 15)",
  async (db) => {
    await db.sql("create table paid (id varchar(30) not null, run integer not null)");
    await using way = breaking(db.url);
    await using own = connect(db.kind, way.url, { connections: 1 });
    const store = own.store();
    await own.sql("select 1");
    await breakAtEach(way, async (id) => {
      let runs = 0;
      const value = await store.transaction(async (effects, client) => {
        const run = ++runs;
        const { state } = await effects.claim({ scope: "charge", key: id });
        assertEquals(state, "claimed");
        await own.on(client)("insert into paid values (?, ?)", [id, run]);
        await effects.enqueue({ id, topic: "paid", value: run });
        await effects.complete({ scope: "charge", key: id }, run);
        return run;
      });
      const rows = await db.sql("select run from paid where id = ?", [id]);
      assertEquals(rows.map(({ run }) => Number(run)), [value]);
      const claim = await db.store().claim({ scope: "charge", key: id }, { leaseMs: 1 });
      assertEquals(claim, { state: "done", result: value, resultOmitted: false });
      assertEquals(Number((await db.sql("select count(*) as n from effectonce_outbox where id = ?", [id]))[0]!.n), 1);
    });
  },
);

onEach(
  "a COMMIT whose answer is lost is found out though the function wrote before it claimed, or claims many (acceptance 15)",
  async (db) => {
    await db.sql("create table paid (id varchar(30) primary key)");
    await using way = breaking(db.url);
    await using own = connect(db.kind, way.url, { connections: 1 });
    await own.sql("select 1");
    for (const direction of DIRECTIONS) {
      for (const first of ["claim", "claims", "write"]) {
        const id = `${direction} ${first}`;
        way.arm(direction, COMMIT);
        let runs = 0;
        const value = await own.store().transaction(async (effects, client) => {
          const write = () => own.on(client)("insert into paid values (?)", [id]);
          if (first === "write") await write();
          const keys = [id, `${id} too`].map((key) => ({ scope: "charge", key }));
          if (first === "claims") await effects.claimAll(keys);
          else await effects.claim(keys[0]!);
          if (first !== "write") await write();
          return ++runs;
        });
        assert(way.broke());
        assertEquals(value, direction === "toServer" ? 2 : 1, id);
        assertEquals((await db.sql("select id from paid where id = ?", [id])).length, 1, id);
      }
    }
  },
);

onEach("a COMMIT that breaks without a claim in its transaction is uncertain (acceptance 15)", async (db) => {
  await db.sql("create table paid (id varchar(30) not null)");
  await using way = breaking(db.url);
  await using own = connect(db.kind, way.url, { connections: 1 });
  await own.sql("select 1");
  for (const direction of DIRECTIONS) {
    way.arm(direction, COMMIT);
    let runs = 0;
    const error = await assertRejects(() =>
      own.store().transaction(async (_, client) => {
        runs++;
        await own.on(client)("insert into paid values (?)", [direction]);
      })
    ) as EffectError;
    assert(way.broke());
    assertEquals([error.code, runs], ["uncertain", 1]);
    const written = await db.sql("select id from paid where id = ?", [direction]);
    assertEquals(written.length, direction === "toServer" ? 0 : 1);
  }
});

onEach(
  "a connection that breaks at any message of claim(), renew(), fail() or complete(): the caller has its claim, and is told the truth (acceptance 15)",
  async (db) => {
    await using way = breaking(db.url);
    await using own = connect(db.kind, way.url, { connections: 1 });
    const store = own.store();
    await own.sql("select 1");
    const lease = { leaseMs: 60_000, repeatWithinMs: 1_000_000 };
    let fences = new Map<string, number>();
    const calls: Record<string, (name: string) => Promise<unknown>> = {
      async claim(name) {
        const claims = await store.claimAll(["a", "b"].map((key) => ({ key: { scope: name, key }, ...lease })));
        assertEquals(claims.map(({ state }) => state), ["claimed", "claimed"], name);
        fences.set(name, 1);
      },
      async renew(name) {
        await store.renew({ scope: name, key: "a" }, 1, 120_000);
      },
      async fail(name) {
        assertEquals(
          await store.fail({ scope: name, key: "a" }, 1, { as: "retryable", reason: "r", retryMs: 0 }),
          "waiting",
        );
        const again = await db.store().claim({ scope: name, key: "a" }, lease);
        assert(again.state === "claimed" && again.fence === 2 && again.attempt === 2, JSON.stringify(again));
        fences.set(name, 2);
      },
      async complete(name) {
        await store.complete({ scope: name, key: "a" }, fences.get(name)!, "paid");
        const [record] = await db.store().list({ scope: name, key: "a" });
        assertEquals([record!.state, record!.result, record!.evidence], ["done", "paid", null]);
      },
    };
    for (const call of Object.keys(calls)) {
      fences = new Map();
      await breakAtEach(way, async (at) => {
        const name = `${call} ${at}`;
        if (call !== "claim") {
          await db.store().claim({ scope: name, key: "a" }, lease);
          fences.set(name, 1);
        }
        await calls[call]!(name);
      });
    }
  },
);

const QUICK = { drain: true, minRetryMs: 1, maxRetryMs: 5, leaseMs: 2_000, lanes: 2, batch: 2, pollMs: 2 } as const;

/** Where a relay's ends are, of which some are behind a connection that breaks. */
interface RelayEnds {
  readonly from: Connected;
  readonly store: Connected;
  readonly to: Sink;
  /** What came out of it. */
  got(): Promise<readonly string[]>;
}

/** Calls that count what they are called with; one is refused for the moment, and one for good. */
function calls(repeat: "never" | "same-key"): { readonly to: CallSink; readonly called: string[] } {
  const called: string[] = [];
  const refusals = new Set<string>();
  const to: CallSink = {
    kind: "call",
    name: "calls",
    repeat,
    dedupeWindowMs: 86_400_000,
    async deliver({ id }) {
      if (id.endsWith(" 2") && !refusals.has(id)) {
        refusals.add(id);
        throw retryable("not yet");
      }
      if (id.endsWith(" 4")) throw rejected("never");
      return await Promise.resolve(called.push(id));
    },
  };
  return { to, called };
}

/** The same by a handler of batches. */
function batches(target: Connected): Sink {
  const refusals = new Set<string>();
  return ledgerSink(target, (id) => {
    if (id.endsWith(" 4")) throw rejected("never");
    if (!id.endsWith(" 2") || refusals.has(id)) return Promise.resolve();
    refusals.add(id);
    throw retryable("not yet");
  });
}

const relays: Readonly<Record<string, (db: Opened, broken: Connected) => RelayEnds>> = {
  "calls that must not be repeated": (db, broken) => {
    const { to, called } = calls("never");
    return { from: broken, store: broken, to, got: () => Promise.resolve(called) };
  },
  "calls that are deduped": (db, broken) => {
    const { to, called } = calls("same-key");
    return { from: broken, store: broken, to, got: () => Promise.resolve(called) };
  },
  "batches, from their source": (db, broken) => ({ from: broken, store: db, to: batches(db), got: () => ledgerOf(db) }),
  "batches, at their handler": (db, broken) => ({ from: db, store: db, to: batches(broken), got: () => ledgerOf(db) }),
};

for (const [what, ends] of Object.entries(relays)) {
  onEach(
    `a relay of ${what} goes on by itself wherever its connection breaks: nothing lost, nothing twice (acceptance 15)`,
    async (db) => {
      await makeLedger(db);
      await using way = breaking(db.url);
      await using broken = connect(db.kind, way.url, { connections: 3 });
      const { from, store, to, got } = ends(db, broken);
      let before = 0;
      let runs = 0;
      await breakAtEach(way, async (name) => {
        runs++;
        const ids = [1, 2, 3, 4].map((i) => `${name} ${i}`);
        const messages = ids.map((id, i) => ({ id, topic: "orders", key: i === 3 ? "other" : "k", value: id }));
        await db.store().transaction((effects) => effects.enqueue(...messages));
        const report = await relay({ from: from.outbox(), store: store.store(), to, ...QUICK });
        const all = await got();
        assertEquals(all.slice(before), ids.slice(0, 3));
        before = all.length;
        assertEquals(report, { delivered: 3, parked: 1, uncertain: 0 });
        const outbox = db.outbox();
        assertEquals((await outbox.parked()).map(({ id }) => id), [ids[3]]);
        assert(await outbox.discard(ids[3]!));
        assertEquals((await outbox.relays()).filter(({ live }) => live), []);
      });
      console.log(db.kind, what, runs);
    },
  );
}
