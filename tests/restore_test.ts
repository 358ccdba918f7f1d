/** A database that was restored, or copied: what it does not know any more must not be done again unnoticed. */
import { assertEquals, assertRejects } from "@std/assert";
import { memorySink } from "../adapters/memory.ts";
import { type AtomicSink, EffectError, type Position, relay } from "../mod.ts";
import { onServers, type TestDatabase } from "./servers/servers.ts";

/** Puts other tables with the same rows in the place of all, as an older dump does. */
async function restored(db: TestDatabase, kind: string): Promise<void> {
  if (kind === "postgres") {
    await db.sql("create table copied as table effectonce_effects");
    await db.sql("drop table effectonce_effects");
    await db.sql("create table effectonce_effects (like copied)");
    await db.sql("insert into effectonce_effects select * from copied");
    return;
  }
  // Tables know the time of their making to the second.
  const [made] = await db.sql(
    "select unix_timestamp(create_time) as at from information_schema.tables where table_schema = database() and table_name = 'effectonce_meta'",
  );
  for (;;) {
    await db.sql("create table copied as select * from effectonce_meta");
    await db.sql("drop table effectonce_meta");
    await db.sql("create table effectonce_meta (name varchar(64) primary key, value varchar(255) not null)");
    await db.sql("insert into effectonce_meta select * from copied");
    await db.sql("drop table copied");
    const [now] = await db.sql(
      "select unix_timestamp(create_time) as at from information_schema.tables where table_schema = database() and table_name = 'effectonce_meta'",
    );
    if (Number(now!["at"]) !== Number(made!["at"])) return;
  }
}

onServers("a restored database is noticed before anything is done that must not be repeated", async (db, kind) => {
  const { store, outbox, migrate } = db.program();
  await store().transaction((effects) => effects.enqueue({ id: "m1", topic: "orders", value: 1 }));
  await relay({ from: outbox(), to: memorySink(), store: store(), drain: true });

  await restored(db, kind);
  await store().transaction((effects) => effects.enqueue({ id: "m1", topic: "orders", value: 1 }));
  const to = memorySink();
  const error = await assertRejects(() => relay({ from: outbox(), to, store: store(), drain: true }), EffectError);
  assertEquals([error.code, to.messages.length], ["diverged", 0]);
  const key = { scope: "charge", key: "order-1" };
  assertEquals((await assertRejects(() => store().claim(key, { leaseMs: 1000 }), EffectError)).code, "diverged");

  const again = store();
  assertEquals((await again.claim(key, { leaseMs: 1000, repeatWithinMs: 1000 })).state, "claimed", "the target dedupes");
  await assertRejects(() => again.claim({ ...key, key: "order-2" }, { leaseMs: 1000 }), EffectError);
  await migrate({ accept: true });
  assertEquals((await again.claim({ ...key, key: "order-2" }, { leaseMs: 1000 })).state, "claimed");
  await relay({ from: outbox(), to, store: store(), drain: true });
});

onServers("a copied database is refused by a relay into a sink that would shut out the original's", async (db, kind) => {
  const { outbox, migrate, store } = db.program();
  await store().transaction((effects) => effects.enqueue({ id: "m1", topic: "orders", value: 1 }));
  let opened = 0;
  const ring: Position[] = [];
  const to: AtomicSink = {
    ...{ kind: "atomic", name: "a log", fences: true },
    open() {
      opened++;
      const commit = ({ n, uid, prev, rows }: Position) => (ring.push({ n, uid, prev, rows }), Promise.resolve());
      return Promise.resolve({ ring: [...ring], commit, close: () => Promise.resolve() });
    },
  };
  assertEquals((await relay({ from: outbox(), to, drain: true })).delivered, 1);
  await restored(db, kind);
  await store().transaction((effects) => effects.enqueue({ id: "m2", topic: "orders", value: 2 }));
  opened = 0;
  const error = await assertRejects(() => relay({ from: outbox(), to, drain: true }), EffectError);
  assertEquals([error.code, opened], ["diverged", 0]);
  await migrate({ accept: true });
  assertEquals((await relay({ from: outbox(), to, drain: true })).delivered, 1);
});
