/** The suites on SQLite files, for any driver that fits `SqliteClient`. */
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { EffectStore } from "@effectonce/effectonce";
import {
  migrateSqlite,
  type SqliteClient,
  sqliteOutbox,
  type SqliteOutboxOptions,
  sqliteStore,
  type SqliteValue,
} from "@effectonce/effectonce/sqlite";
import { contentsOf, type Ends, handlerOn, type Outcomes, refused, runEnds } from "./suite.ts";

/** A client that a test can open and close. */
export type Client = SqliteClient & { exec(sql: string): unknown; close(): unknown };

/** Opens a file, without a wait of the driver's own: it would block the thread, and with it what it waits for. */
export type Driver = (path: string) => Client;

const WAIT_MS = 2_000;

async function temporary(driver: Driver) {
  const folder = await mkdtemp(join(tmpdir(), "effectonce-runtime-"));
  const clients: Client[] = [];
  return {
    open() {
      const client = driver(join(folder, "app.db"));
      clients.push(client);
      return client;
    },
    async close() {
      for (const client of clients) client.close();
      await rm(folder, { recursive: true });
    },
  };
}

/** Keeps the rows of all tables; the function that comes back puts them in again, as a restored copy of the file has them. */
function snapshot(client: Client): () => Promise<void> {
  const tables = (client.prepare(`select name from sqlite_master where type = 'table'`).all() as { name: string }[])
    .map(({ name }) => name);
  const rows = tables.map((name) => client.prepare(`select * from ${name}`).all() as Record<string, SqliteValue>[]);
  // deno-lint-ignore require-await -- what throws here must reject
  return async () => {
    client.exec("begin immediate");
    tables.forEach((name, i) => {
      client.prepare(`delete from ${name}`).run();
      for (const row of rows[i]!) {
        const columns = Object.keys(row);
        client.prepare(`insert into ${name} (${columns.join(", ")}) values (${columns.map(() => "?").join(", ")})`)
          .run(...Object.values(row));
      }
    });
    client.exec("commit");
  };
}

/** Ends in SQLite files; `more`: what its sources do beyond the usual. */
export function sqliteEnds(driver: Driver, more: SqliteOutboxOptions = {}): Ends {
  return {
    store: {
      async open() {
        const files = await temporary(driver);
        let offset = 0;
        const options = { waitMs: WAIT_MS, now: () => Date.now() + offset };
        const [first, second] = [files.open(), files.open()];
        await migrateSqlite(files.open());
        return {
          store: sqliteStore(first, options) as EffectStore<unknown>,
          again: sqliteStore(second, options) as EffectStore<unknown>,
          waitMs: WAIT_MS,
          advance: (ms) => Promise.resolve(void (offset += ms)),
          close: files.close,
        };
      },
    },
    source: {
      async open() {
        const files = await temporary(driver);
        let offset = 0;
        const options = { ...more, now: () => Date.now() + offset };
        const [first, second, operator] = [files.open(), files.open(), files.open()];
        await migrateSqlite(first);
        const store = sqliteStore(operator, options);
        const outbox = sqliteOutbox(operator, options);
        return {
          source: ({ topics } = {}) => sqliteOutbox(first, { ...options, topics }),
          again: ({ topics } = {}) => sqliteOutbox(second, { ...options, topics }),
          enqueue: (...messages) => store.transaction((effects) => effects.enqueue(...messages)),
          advance: (ms) => Promise.resolve(void (offset += ms)),
          release: outbox.release,
          discard: outbox.discard,
          snapshot: () => Promise.resolve(snapshot(operator)),
          close: files.close,
        };
      },
    },
    sink: {
      async open() {
        const files = await temporary(driver);
        const [first, second] = [files.open(), files.open()];
        await migrateSqlite(first);
        const stores = [sqliteStore(first), sqliteStore(second)] as const;
        return {
          sink: handlerOn(stores[0]),
          again: () => handlerOn(stores[1]),
          contents: () => contentsOf(stores[1]),
          refused,
          close: files.close,
        };
      },
    },
  };
}

/** Runs the suites on this driver. */
export const runSqlite = (name: string, driver: Driver): Promise<Outcomes> => runEnds(name, sqliteEnds(driver));
