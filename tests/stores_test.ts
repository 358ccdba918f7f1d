/** The requirements of stores, on memory and on SQLite by both drivers; then what is SQLite's own. */
import { assert, assertEquals, assertMatch, assertRejects, assertStringIncludes } from "@std/assert";
import BetterSqlite3 from "better-sqlite3";
import { DatabaseSync } from "node:sqlite";
import {
  migrateSqlite,
  type SqliteClient,
  sqliteOutbox,
  sqliteSchema,
  sqliteStore,
  type SqliteValue,
} from "../adapters/sqlite.ts";
import { storeCases, type StoreHarness } from "../conformance.ts";
import { EffectError, once, realRuntime, type RunSql } from "../mod.ts";
import { memory } from "./runtime/suite.ts";
import { type Client, type Driver, sqliteEnds } from "./runtime/suite_sqlite.ts";

/** No wait of the driver's own: it would block the thread, and with it the transaction that it waits for. */
const drivers: Readonly<Record<string, Driver>> = {
  "better-sqlite3": (path) => new BetterSqlite3(path, { timeout: 0 }) as Client,
  "node:sqlite": (path) => new DatabaseSync(path) as unknown as Client,
};

interface Files {
  readonly path: string;
  /** Opens a connection that is closed at the end. */
  open(driver: Driver, path?: string): Client;
  close(): Promise<void>;
}

async function temporary(): Promise<Files> {
  const folder = await Deno.makeTempDir({ prefix: "effectonce-stores-" });
  const clients: Client[] = [];
  return {
    path: `${folder}/app.db`,
    open(driver, path = `${folder}/app.db`) {
      const client = driver(path);
      clients.push(client);
      return client;
    },
    async close() {
      for (const client of clients) client.close();
      await Deno.remove(folder, { recursive: true });
    },
  };
}

const harnesses: Readonly<Record<string, StoreHarness>> = {
  memoryStore: memory.store,
  ...Object.fromEntries(Object.entries(drivers).map(([name, driver]) => [`sqliteStore ${name}`, sqliteEnds(driver).store])),
};

/** Which case is which acceptance test of the correctness notes. */
const acceptance: Readonly<Record<string, number>> = {
  "claim() is given to one of 50 callers at once, over both handles": 10,
  "claim() compares keys byte for byte": 14,
  "complete() that comes too late leaves its outcome as evidence": 16,
  "an interrupted effect is uncertain without repeatWithinMs, and stays so": 17,
  "an interrupted effect is uncertain past repeatWithinMs from its first attempt": 18,
  "claim() takes a request with its members in another order for the same, and hands out the first bytes": 19,
};

for (const [name, harness] of Object.entries(harnesses)) {
  for (const { name: requirement, run } of storeCases) {
    const reason = harness.skip?.[requirement];
    const number = name.startsWith("sqlite") ? acceptance[requirement] : undefined;
    Deno.test({
      name: `${name} ${requirement}${number ? ` (acceptance ${number})` : ""}${reason ? ` (skipped: ${reason})` : ""}`,
      ignore: reason !== undefined,
      fn: () => run(harness),
    });
  }
}

Deno.test("every acceptance test and skipped requirement is a case", () => {
  const names = new Set(storeCases.map(({ name }) => name));
  const skipped = Object.values(harnesses).flatMap(({ skip }) => Object.keys(skip ?? {}));
  assertEquals([...Object.keys(acceptance), ...skipped].filter((name) => !names.has(name)), []);
});

// ----------------------------------------------------------------------------------------------------------------- SQLite

/** One test for each driver, on a fresh file with tables. */
function sqliteTest(name: string, run: (open: () => Client, files: Files, driver: Driver) => Promise<void>): void {
  for (const [of, driver] of Object.entries(drivers)) {
    Deno.test(`sqliteStore ${of} ${name}`, async () => {
      const files = await temporary();
      try {
        await migrateSqlite(files.open(driver));
        await run(() => files.open(driver), files, driver);
      } finally {
        await files.close();
      }
    });
  }
}

const KEY = { scope: "charge", key: "order-1" };
const codeOf = async (run: () => Promise<unknown>): Promise<string> => (await assertRejects(run, EffectError)).code;
const all = (client: Client, sql: string, ...values: SqliteValue[]): Record<string, SqliteValue>[] =>
  client.prepare(sql).all(...values).map((row) => ({ ...row as Record<string, SqliteValue> }));

sqliteTest("refuses tables of a newer version, and leaves them as they are", async (open) => {
  const client = open();
  client.exec("update effectonce_meta set value = '2' where name = 'schema_version'");
  const before = all(client, "select sql from sqlite_master order by name");
  for (
    const use of [
      () => migrateSqlite(open()),
      () => sqliteStore(open()).claim(KEY, { leaseMs: 1 }),
      () => sqliteStore(open()).transaction((effects) => effects.claim(KEY)),
      () => sqliteOutbox(open()).status(),
      () => sqliteOutbox(open()).open({ relay: "r", protocol: "claimed", onPark: "block", leaseMs: 1 }),
    ]
  ) assertEquals(await codeOf(use), "schema_newer");
  assertEquals(all(client, "select sql from sqlite_master order by name"), before);
  assertEquals(all(client, "select value from effectonce_meta where name = 'schema_version'")[0]?.value, "2");
  assertEquals(all(client, "select count(*) as n from effectonce_effects")[0]?.n, 0);
});

sqliteTest("says that there are no tables, in another file", async (_, files, driver) => {
  const other = () => files.open(driver, `${files.path}.other`);
  for (
    const use of [
      () => sqliteStore(other()).claim(KEY, { leaseMs: 1 }),
      () => sqliteStore(other()).list(),
      () => sqliteOutbox(other()).open({ relay: "r", protocol: "claimed", onPark: "block", leaseMs: 1 }),
    ]
  ) assertEquals(await codeOf(use), "schema_missing");
  const client = other();
  client.exec("create table effectonce_meta (name text primary key, value text not null)");
  assertEquals(await codeOf(() => sqliteStore(client).count()), "schema_missing");
});

sqliteTest("works once tables are there that were missing at first", async (_, files, driver) => {
  const client = files.open(driver, `${files.path}.other`);
  const store = sqliteStore(client);
  assertEquals(await codeOf(() => store.count()), "schema_missing");
  await migrateSqlite(client);
  assertEquals((await store.count()).done, 0);
});

sqliteTest("migrates by several connections at once, and again", async (_, files, driver) => {
  const path = `${files.path}.other`;
  const clients = Array.from({ length: 4 }, () => files.open(driver, path));
  await Promise.all(clients.map((client) => migrateSqlite(client)));
  const meta = all(clients[0]!, "select name, value from effectonce_meta order by name");
  await migrateSqlite(clients[1]!);
  assertEquals(all(clients[2]!, "select name, value from effectonce_meta order by name"), meta);
  assertEquals(meta.map(({ name }) => name), ["outbox_id", "schema_version"]);
  assertEquals((await sqliteStore(clients[3]!).claim(KEY, { leaseMs: 1 })).state, "claimed");
});

Deno.test("migrateSqlite() by several processes at once", async () => {
  const files = await temporary();
  const adapter = new URL("../adapters/sqlite.ts", import.meta.url).href;
  const code = `import { DatabaseSync } from "node:sqlite";
    import { migrateSqlite, sqliteStore } from ${JSON.stringify(adapter)};
    const db = new DatabaseSync(${JSON.stringify(files.path)});
    await migrateSqlite(db);
    console.log((await sqliteStore(db).claim({ scope: "s", key: "k" }, { leaseMs: 60_000 })).state);`;
  try {
    const runs = Array.from(
      { length: 3 },
      () => new Deno.Command(Deno.execPath(), { args: ["eval", "--no-check", code] }).output(),
    );
    const outputs = await Promise.all(runs);
    const texts = outputs.map(({ stdout, stderr }) => new TextDecoder().decode(stdout) + new TextDecoder().decode(stderr));
    assertEquals(texts.sort(), ["busy\n", "busy\n", "claimed\n"]);
  } finally {
    await files.close();
  }
});

sqliteTest("has the tables that sqliteSchema() prints", async (open, files, driver) => {
  const byHand = files.open(driver, `${files.path}.other`);
  byHand.exec(sqliteSchema());
  const tables = (client: Client) => all(client, "select type, name, sql from sqlite_master order by type, name");
  assertEquals(tables(byHand), tables(open()));
  await migrateSqlite(byHand);
  assertEquals((await sqliteStore(byHand).claim(KEY, { leaseMs: 1 })).state, "claimed");
});

sqliteTest("makes commits durable: synchronous is FULL after the first use, in WAL", async (open) => {
  const client = open();
  assertEquals(all(client, "pragma journal_mode"), [{ journal_mode: "wal" }]);
  client.exec("pragma synchronous = normal");
  await sqliteStore(client).count();
  assertEquals(all(client, "pragma synchronous"), [{ synchronous: 2 }]);
  const other = open();
  other.exec("pragma synchronous = off");
  await sqliteOutbox(other).status();
  assertEquals(all(other, "pragma synchronous"), [{ synchronous: 2 }]);
});

Deno.test("better-sqlite3 opens WAL files with less than FULL, which the store must not keep", async () => {
  const files = await temporary();
  try {
    await migrateSqlite(files.open(drivers["better-sqlite3"]!));
    const client = files.open(drivers["better-sqlite3"]!);
    all(client, "select 1 from effectonce_meta"); // The default holds once the file is known to be WAL.
    assertEquals(all(client, "pragma synchronous"), [{ synchronous: 1 }]);
    await sqliteStore(client).claim(KEY, { leaseMs: 1 });
    assertEquals(all(client, "pragma synchronous"), [{ synchronous: 2 }]);
  } finally {
    await files.close();
  }
});

sqliteTest("joins the caller's own transaction, by client and by function", async (open) => {
  const client = open();
  const store = sqliteStore(client);
  client.exec("create table orders (id text)");
  // deno-lint-ignore require-await -- as an asynchronous driver's
  const run: RunSql = async (sql, values) => all(client, sql, ...values as SqliteValue[]);
  for (const [i, joined] of [client, run].entries()) {
    for (const end of ["rollback", "commit"]) {
      client.exec("begin");
      const effects = store.join(joined);
      client.prepare("insert into orders values (?)").run(`order-${i}`);
      assertEquals((await effects.claim({ scope: "orders", key: `${i}` })).state, "claimed");
      assertEquals((await effects.claimAll([{ scope: "orders", key: `${i}` }])).map(({ state }) => state), ["done"]);
      await effects.complete({ scope: "orders", key: `${i}` }, { order: i });
      await effects.enqueue({ id: `m-${i}`, topic: "orders", value: { order: i } });
      client.exec(end);
      const kept = end === "commit" ? 1 : 0;
      assertEquals((await store.list({ key: `${i}` })).length, kept);
      assertEquals(all(client, "select id from orders where id = ?", `order-${i}`).length, kept);
      assertEquals(all(client, "select id from effectonce_outbox where id = ?", `m-${i}`).length, kept);
    }
    const claim = await store.claim({ scope: "orders", key: `${i}` }, { leaseMs: 1 });
    assertEquals(claim, { state: "done", result: { order: i }, resultOmitted: false });
  }
});

sqliteTest("refuses to join where no transaction is open", async (open) => {
  const client = open();
  const store = sqliteStore(client);
  const claim = async () => await store.join(client).claim(KEY);
  await assertRejects(claim, RangeError, "no transaction is open");
  assertEquals(await store.list(), []);
});

sqliteTest("rolls back what the application wrote in a transaction that fails", async (open) => {
  const client = open();
  client.exec("create table orders (id text unique)");
  const store = sqliteStore(client);
  const order = (id: string) =>
    store.transaction(async (effects, client) => {
      await effects.claim({ scope: "orders", key: id });
      client.prepare("insert into orders values (?)").run("the only one");
    });
  await order("1");
  await assertRejects(() => order("2"), Error, "UNIQUE");
  assertEquals((await store.list()).map(({ key }) => key), ["1"]);
});

sqliteTest("is busy, and says so in time, while another connection holds the lock", async (open) => {
  const [client, other] = [open(), open()];
  const store = sqliteStore(client, { waitMs: 50, name: "app.db" });
  await store.count();
  other.exec("begin immediate");
  const error = await assertRejects(() => store.claim(KEY, { leaseMs: 1 }), EffectError, "app.db");
  assertEquals(error.code, "busy");
  assert(store.isDatabaseFailure(error.cause), "the driver's error is the cause");
  assertEquals((await store.count()).claimed, 0); // Readers do not wait.
  other.exec("commit");
  assertEquals((await store.claim(KEY, { leaseMs: 1 })).state, "claimed");
});

sqliteTest("waits as long as its own options say, whatever used the connection before", async (open) => {
  const client = open();
  await migrateSqlite(client);
  const store = sqliteStore(client, { waitMs: 50 });
  const start = realRuntime.now();
  assertEquals(await codeOf(() => store.transaction(() => store.count())), "busy");
  assert(realRuntime.now() - start < 2_500, `It waited for ${Math.round(realRuntime.now() - start)} ms`);
});

sqliteTest("goes on by itself when the lock is free again", async (open) => {
  const [client, other] = [open(), open()];
  const store = sqliteStore(client);
  await store.count();
  other.exec("begin immediate");
  const claim = store.claim(KEY, { leaseMs: 60_000 });
  await realRuntime.sleep(1); // Asked for, and refused, by now; if not, the test is easier, not wrong.
  other.exec("commit");
  assertEquals((await claim).state, "claimed");
});

Deno.test("sqliteStore better-sqlite3 waits for a lock without blocking the thread, also with the driver's own time-out", async () => {
  const files = await temporary();
  try {
    const withTimeout: Driver = (path) => new BetterSqlite3(path) as Client; // Its default: 5 s, blocking.
    const [first, second] = [files.open(withTimeout), files.open(withTimeout)];
    await migrateSqlite(first);
    let release!: () => void;
    const held = new Promise<void>((resolve) => release = resolve);
    const store = sqliteStore(first);
    const holding = store.transaction(async (effects) => {
      await effects.claim({ scope: "s", key: "first" });
      await held;
    });
    const waiting = sqliteStore(second).claim(KEY, { leaseMs: 60_000 });
    waiting.catch(() => {}); // Looked at below.
    const start = realRuntime.now();
    await realRuntime.sleep(1); // Comes back late where the thread is blocked.
    release();
    await holding;
    assertEquals((await waiting).state, "claimed");
    assert(realRuntime.now() - start < 2_500, `The thread was blocked for ${Math.round(realRuntime.now() - start)} ms`);
  } finally {
    await files.close();
  }
});

sqliteTest("tells the database's own failures from others", async (open) => {
  const client = open();
  const store = sqliteStore(client);
  const duplicate = await assertRejects(async () => {
    await store.count();
    client.exec("insert into effectonce_meta (name, value) values ('outbox_id', 'x')");
  });
  assertEquals(store.isDatabaseFailure(duplicate), false);
  const other = open();
  other.exec("begin immediate");
  const busy = await assertRejects(async () => await client.prepare("begin immediate").run());
  assertEquals(store.isDatabaseFailure(busy), true);
  other.exec("rollback");
});

sqliteTest("keeps a result whose commit was done though its answer was lost", async (open) => {
  const client = open();
  let lose = false;
  const flaky: SqliteClient = {
    prepare(sql) {
      const statement = client.prepare(sql);
      if (sql !== "commit") return statement;
      return {
        get: (...values) => statement.get(...values),
        all: (...values) => statement.all(...values),
        iterate: (...values) => statement.iterate(...values),
        run(...values) {
          statement.run(...values);
          if (lose) throw new Error("connection lost");
        },
      };
    },
  };
  const store = sqliteStore(flaky);
  const claim = await store.claim(KEY, { leaseMs: 60_000 });
  assert(claim.state === "claimed");
  lose = true;
  await assertRejects(() => store.complete(KEY, claim.fence, "paid"), Error, "connection lost");
  await assertRejects(
    () => store.transaction((effects) => effects.claim({ scope: "s", key: "k" })),
    Error,
    "connection lost",
  );
  lose = false;
  await store.complete(KEY, claim.fence, "paid"); // Repeating it is harmless.
  assertEquals(await store.claim(KEY, { leaseMs: 1 }), { state: "done", result: "paid", resultOmitted: false });
  assertEquals((await store.transaction((effects) => effects.claim({ scope: "s", key: "k" }))).state, "done");
});

sqliteTest("sends the stored bytes again, whatever the request looks like by now (acceptance 19)", async (open) => {
  let now = Date.now();
  const options = { now: () => now };
  const [first, second] = [sqliteStore(open(), options), sqliteStore(open(), options)];
  const sent: unknown[] = [];
  const charge = (store: typeof first, request: { amount: number; currency: string }, fails: boolean) =>
    once(store, KEY, ({ request, idempotencyKey, number }) => {
      sent.push([JSON.stringify(request), idempotencyKey, number]);
      return fails ? Promise.reject(new Error("reset")) : Promise.resolve("paid");
    }, { request, repeat: "same-key", dedupeWindowMs: 86_400_000 });
  await assertRejects(() => charge(first, { amount: 5, currency: "eur" }, true), Error, "reset");
  now += 60_000;
  assertEquals(await charge(second, { currency: "eur", amount: 5 }, false), "paid");
  const bytes = '{"amount":5,"currency":"eur"}';
  assertEquals(sent, [[bytes, "charge:order-1", 1], [bytes, "charge:order-1", 2]]);
});

sqliteTest("makes no call past 80 % of the dedupe window (acceptance 18)", async (open) => {
  let now = Date.now();
  const store = sqliteStore(open(), { now: () => now });
  let calls = 0;
  const charge = () =>
    once(store, KEY, () => {
      calls++;
      return Promise.reject(new Error("reset"));
    }, { repeat: "same-key", dedupeWindowMs: 100_000 });
  await assertRejects(charge, Error, "reset");
  now += 79_000;
  await assertRejects(charge, Error, "reset");
  now += 2_000;
  assertEquals(await codeOf(charge), "uncertain");
  assertEquals(calls, 2);
});

sqliteTest("lets reconcile decide about an interrupted call that is not safe to repeat (acceptance 17)", async (open) => {
  let now = Date.now();
  const store = sqliteStore(open(), { now: () => now });
  let calls = 0;
  await store.claim(KEY, { leaseMs: 30_000 }); // Its owner dies.
  now += 40_000;
  const charge = (found?: "done" | "unknown") =>
    once(
      store,
      KEY,
      () => Promise.resolve(`call ${++calls}`),
      found && {
        reconcile: () => Promise.resolve(found === "done" ? { state: found, result: "found" } : { state: found }),
      },
    );
  assertEquals(await codeOf(() => charge()), "uncertain");
  assertEquals(await codeOf(() => charge("unknown")), "uncertain");
  assertEquals(await charge("done"), "found");
  assertEquals(await charge(), "found");
  assertEquals(calls, 0);
});

// What follows looks at the statements themselves.

/** A client that notes the statements it is given. */
function recording(client: Client): { readonly client: SqliteClient; readonly statements: Set<string> } {
  const statements = new Set<string>();
  return {
    client: {
      prepare(sql) {
        statements.add(sql);
        return client.prepare(sql);
      },
    },
    statements,
  };
}

function planOf(client: Client, sql: string): string[] {
  return all(client, `explain query plan ${sql}`).map(({ detail }) => String(detail));
}

Deno.test("sqliteStore finds effects by indexes, whatever their number", async () => {
  const db = drivers["node:sqlite"]!(":memory:");
  const { client, statements } = recording(db);
  await migrateSqlite(client);
  const store = sqliteStore(client);
  await store.count();
  statements.clear();
  const claim = await store.claim(KEY, { leaseMs: 60_000 });
  assert(claim.state === "claimed");
  await store.renew(KEY, claim.fence, 60_000);
  await store.complete(KEY, claim.fence);
  await store.transaction(async (effects) => {
    await effects.claim(KEY);
    await effects.claimAll([KEY, { scope: "s", key: "k" }]);
    await effects.complete({ scope: "s", key: "k" }, 1);
  });
  await store.prune({ olderThanMs: 0 });
  const after = KEY;
  for (const state of ["claimed", "waiting", "rejected", "uncertain"] as const) {
    for (const scope of [undefined, "charge"]) {
      await store.list({ state, scope });
      await store.list({ state, scope, after });
    }
  }
  for (const scope of [undefined, "charge"]) await store.list({ scope, after });
  await store.list(KEY);
  const plans = [...statements].filter((sql) => /effectonce_effects/.test(sql)).map((sql) =>
    [sql, planOf(db, sql)] as const
  );
  assert(plans.length > 10);
  for (const [sql, plan] of plans) {
    const scans = plan.filter((step) => /^SCAN (effectonce_effects|effectonce_outbox|o)\b/.test(step));
    assertEquals(scans, [], sql);
    const sorted = plan.filter((step) => step.includes("TEMP B-TREE"));
    assertEquals(sorted, [], sql);
  }
  const byState = plans.find(([sql]) => /state <> 'done' and state = \?.*order by/.test(sql));
  assertStringIncludes(byState?.[1].join("\n") ?? "", "effectonce_effects_open (state=?)");
  const prune = plans.find(([sql]) => /^select scope, key from effectonce_effects where .* state in/s.test(sql));
  assertMatch(prune?.[1].join("\n") ?? "", /SEARCH effectonce_effects USING PRIMARY KEY \(\(scope,key\)>\(\?,\?\)\)/);
  db.close();
});
