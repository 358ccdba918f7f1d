/**
 * Opens SQLite files, by one of two drivers.
 *
 * @module
 */
import { EffectError } from "../mod.ts";
import { migrateSqlite, type SqliteClient, sqliteOutbox, sqliteStore } from "../adapters/sqlite.ts";
import type { Database, OpenOptions } from "./database.ts";
import { reason, UsageError } from "./errors.ts";
import { maskedUrl, shellUrl } from "./mask.ts";
import { asks, need, permitted } from "./permissions.ts";
import { onlyParameters, parts } from "./url.ts";

interface OpenClient extends SqliteClient {
  close(): void;
}

/** The drivers of `sqlite:`; computed specifiers, so that only their users install them. */
const DRIVERS: Readonly<Record<string, (path: string) => Promise<OpenClient>>> = {
  async "better-sqlite3"(path) {
    const kinds = ["cpus", "networkInterfaces", "hostname"] as const;
    // It looks for its native part in more places than can be known here.
    const anywhere = asks() ? [{ name: "read" } as const] : [];
    need("better-sqlite3", ...anywhere, { name: "ffi" }, ...kinds.map((kind) => ({ name: "sys", kind }) as const));
    const specifier = "npm:better-sqlite3@^13.2.0";
    const { default: Database } = await import(specifier) as { default: new (path: string) => OpenClient };
    return new Database(path);
  },
  async node(path) {
    need("node:sqlite", { name: "read", path }, { name: "write", path });
    const { DatabaseSync } = await import("node:sqlite");
    return new DatabaseSync(path);
  },
};

/** Which file a path names; undefined if none, or an empty one that should not be. */
function identityOf(path: string, mayBeEmpty: boolean): string | undefined {
  try {
    const { dev, ino, size } = Deno.statSync(path);
    return size > 0 || mayBeEmpty ? `${dev}:${ino}` : undefined;
  } catch {
    return undefined;
  }
}

/**
 * A client that looks, before each transaction, whether its files are still the ones that it opened. A file that was removed
 * stays writable for whoever has it open, and what is committed there is lost: https://sqlite.org/howtocorrupt.html
 */
function watched(client: OpenClient, path: string, name: string): OpenClient {
  const { file } = client.prepare("pragma database_list").get() as { file: string }; // Without symbolic links.
  const again = "was removed, moved or replaced while it was open. Stop every program that uses the database";
  const files = [
    { path, what: `its file ${again}, put the file back`, mayBeEmpty: false },
    // SQLite removes these only when nobody has the database open any more.
    ...["-wal", "-shm"].map((end) => ({ path: file + end, what: `its ${end} file ${again}`, mayBeEmpty: true })),
  ].filter(({ path }) => permitted({ name: "read", path }));
  const known = new Map<string, string>();
  function check(): void {
    for (const { path, what, mayBeEmpty } of files) {
      const [before, now] = [known.get(path), identityOf(path, mayBeEmpty)];
      if (before !== undefined && now !== before) {
        throw new EffectError("source_invalid", `Cannot use ${name}: ${what} and start again`);
      }
      if (now !== undefined) known.set(path, now);
    }
  }
  check();
  return {
    prepare(sql) {
      const statement = client.prepare(sql);
      if (!/^begin\b/.test(sql)) return statement; // The adapter begins each of its transactions so.
      return {
        run(...values) {
          check();
          return statement.run(...values);
        },
        get: (...values) => statement.get(...values),
        all: (...values) => statement.all(...values),
        iterate: (...values) => statement.iterate(...values),
      };
    },
    close: () => client.close(),
  };
}

/** Opens a file. */
export async function openSqlite(label: string, url: string, { create = false }: OpenOptions): Promise<Database> {
  const read = parts(label, url);
  const { rest: path, parameters } = read;
  onlyParameters(label, read, ["driver"]);
  const driver = parameters.get("driver") ?? "better-sqlite3";
  const connect = Object.hasOwn(DRIVERS, driver) ? DRIVERS[driver] : undefined;
  if (!connect) throw new UsageError(`${label}: driver=${driver} is not known: use ${Object.keys(DRIVERS).join(" or ")}`);
  if (path === "" || path === ":memory:" || path.startsWith("//")) {
    throw new UsageError(`${label}: "${maskedUrl(url)}" names no file: write sqlite:app.db or sqlite:/folder/app.db`);
  }
  const name = `sqlite:${path}`;
  need(`Opening ${name}`, { name: "read", path });
  const found = await Deno.stat(path).catch((error: unknown) => {
    if (error instanceof Deno.errors.NotFound) return undefined;
    throw new Error(`Cannot open ${name}: ${reason(error)}`);
  });
  if (!found && !create) {
    throw new Error(`Cannot open ${name}: the file does not exist. Create it with: init --store ${shellUrl(url)}`);
  }
  if (found && !found.isFile) throw new Error(`Cannot open ${name}: it is not a file`);
  let client: OpenClient;
  let identity: string;
  try {
    client = await connect(path);
    // Whoever closes it last, or recovers it, locks it as a whole for a moment.
    client.prepare("pragma busy_timeout = 5000").get();
    client.prepare("select count(*) from sqlite_master").get();
    // From now on waiting in SQLite would block the renewal of leases: the adapter waits instead.
    client.prepare("pragma busy_timeout = 20").get();
    identity = (client.prepare("pragma database_list").get() as { file: string }).file; // Without symbolic links.
    client = watched(client, path, name);
  } catch (error) {
    throw new Error(`Cannot open ${name}: ${reason(error)}`, { cause: error });
  }
  const options = { name };
  const store = sqliteStore(client, options);
  return {
    name,
    identity: () => Promise.resolve(identity),
    away: false,
    store,
    outbox: (outbox) => sqliteOutbox(client, { ...options, ...outbox }),
    migrate: () => migrateSqlite(client, options),
    accept: undefined,
    async checks() {
      await store.count(); // Sets what the first use sets.
      const pragma = (name: string) => Object.values(client.prepare(`pragma ${name}`).get() as Record<string, unknown>)[0];
      const synchronous = Number(pragma("synchronous"));
      const journal = String(pragma("journal_mode"));
      return [
        {
          what: `${name} commits durably`,
          ok: synchronous >= 2,
          found: `synchronous = ${["OFF", "NORMAL", "FULL", "EXTRA"][synchronous]}`,
        },
        {
          what: `${name} lets readers and a writer work at once`,
          ok: journal === "wal",
          found: `journal_mode = ${journal}${journal === "wal" ? "" : " (init --store sets it)"}`,
        },
      ];
    },
    close() {
      client.close();
      return Promise.resolve();
    },
  };
}
