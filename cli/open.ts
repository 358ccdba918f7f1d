/**
 * Opens the ends that URLs name: the one place that knows schemes and drivers. Drivers load when their scheme is used.
 *
 * @module
 */
import { type AtomicSink, type CallSink, EffectError, type EffectStore, type Outbox } from "../mod.ts";
import { fileSink, stdoutSink } from "../adapters/file.ts";
import { httpSink } from "../adapters/http.ts";
import { migrateSqlite, type SqliteClient, sqliteOutbox, sqliteSchema, sqliteStore } from "../adapters/sqlite.ts";
import { reason, UsageError } from "./errors.ts";
import type { Flags } from "./flags.ts";
import { maskedUrl, shellUrl } from "./mask.ts";
import { asks, need, permitted } from "./permissions.ts";

/** A database that is open. */
export interface Database {
  /** Its URL, without secrets. */
  readonly name: string;
  /** The same for every URL of the same database. */
  readonly identity: string;
  /** Its claims. */
  readonly store: EffectStore<unknown>;
  /** Its outbox, or some topics of it. */
  outbox(options: { readonly topics?: readonly string[]; readonly keep?: boolean }): Outbox;
  /** Creates or upgrades its tables. */
  migrate(): Promise<void>;
  /** What `doctor` finds. */
  checks(): Promise<readonly Check[]>;
  /** Lets go of it. */
  close(): void;
}

/** One thing that `doctor` looked at. */
export interface Check {
  /** What was looked at. */
  readonly what: string;
  /** Whether it is as it should be. */
  readonly ok: boolean;
  /** What was found. */
  readonly found: string;
}

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

/** The scheme of a URL, its rest, and its parameters. */
function parts(
  label: string,
  url: string,
): { readonly scheme: string; readonly rest: string; readonly parameters: URLSearchParams } {
  const match = /^([a-z][a-z0-9+.-]*):(.*)$/is.exec(url);
  // Not repeated: it may hold a password.
  if (!match) {
    throw new UsageError(`${label} is not a URL: it should begin with a scheme, such as sqlite:, https:, file: or stdout:`);
  }
  const [rest, query] = match[2]!.split(/\?(.*)/s);
  return { scheme: match[1]!.toLowerCase(), rest: rest!, parameters: new URLSearchParams(query ?? "") };
}

function onlyParameters(label: string, scheme: string, parameters: URLSearchParams, known: readonly string[]): void {
  for (const name of parameters.keys()) {
    if (known.includes(name)) continue;
    const help = known.length > 0 ? `it knows ${known.join(", ")}` : "it has none";
    throw new UsageError(`${label}: "${name}" is not a parameter of ${scheme}: URLs: ${help}`);
  }
}

/** The SQL of the tables for the databases of a scheme. */
export function schemaOf(label: string, url: string): string {
  const { scheme } = parts(label, url);
  if (scheme === "sqlite") return sqliteSchema();
  throw new UsageError(`${label}: "${scheme}:" is not a database that effectonce knows: use sqlite:`);
}

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

/**
 * Opens a database with claims and an outbox.
 *
 * @param label How a sentence names where the URL was given.
 * @param create Whether the database may be new.
 */
export async function openDatabase(label: string, url: string, create = false): Promise<Database> {
  const { scheme, rest: path, parameters } = parts(label, url);
  if (scheme !== "sqlite") {
    throw new UsageError(`${label}: "${scheme}:" is not a database that effectonce knows: use sqlite:`);
  }
  onlyParameters(label, "sqlite", parameters, ["driver"]);
  const driver = parameters.get("driver") ?? "better-sqlite3";
  if (parameters.getAll("driver").length > 1) throw new UsageError(`${label}: driver is given twice`);
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
    identity,
    store,
    outbox: (outbox) => sqliteOutbox(client, { ...options, ...outbox }),
    migrate: () => migrateSqlite(client, options),
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
    close: () => client.close(),
  };
}

/** Opens the sink of a relay. */
export function openSink(flags: Flags): CallSink | AtomicSink {
  const to = flags.label("to");
  flags.given("to");
  const url = flags.url("to")!;
  const { scheme, rest, parameters } = parts(to, url);
  const web = scheme === "http" || scheme === "https";
  for (const name of ["idempotent", "dedupe-window-ms", "header-to", "method", "timeout-ms", "reconcile"]) {
    // A variable holds for all relays of a process, whatever their targets are.
    if (web || !flags.has(name) || flags.layer.get(name)?.source === "environment") continue;
    throw new UsageError(`${flags.label(name)} is for http: and https: targets, not for ${scheme}:`);
  }
  switch (scheme) {
    case "http":
    case "https": {
      if (flags.has("dedupe-window-ms") && !flags.on("idempotent")) {
        const needs = `${flags.label("dedupe-window-ms")} needs ${flags.label("idempotent")}`;
        throw new UsageError(`${needs}: it says how long the target remembers a key`);
      }
      if (!rest.startsWith("//")) throw new UsageError(`${to}: write ${scheme}://host/path`);
      if (flags.has("settle-ms") && !flags.has("reconcile")) {
        const needs = `${flags.label("settle-ms")} needs ${flags.label("reconcile")}`;
        throw new UsageError(`${needs}: it says how long after an attempt to ask`);
      }
      const headers = flags.headers("header-to");
      const reconcile = flags.url("reconcile");
      // One after the other, so that a complaint names its flag.
      blaming(to, () => httpSink(url));
      blaming(flags.label("header-to"), () => httpSink(url, { headers }));
      blaming(flags.label("reconcile"), () => httpSink(url, { reconcile }));
      return httpSink(url, {
        method: flags.text("method") as "POST" | "PUT" | undefined,
        headers,
        repeat: flags.on("idempotent") ? "same-key" : "never",
        dedupeWindowMs: flags.number("dedupe-window-ms"),
        timeoutMs: flags.number("timeout-ms"),
        reconcile,
      });
    }
    case "file":
      onlyParameters(to, "file", parameters, []);
      if (rest === "" || rest.startsWith("//")) {
        throw new UsageError(`${to}: "${maskedUrl(url)}" names no file: write file:events.jsonl`);
      }
      return fileSink(rest);
    case "stdout":
      onlyParameters(to, "stdout", parameters, []);
      if (rest !== "") throw new UsageError(`${to}: write stdout: with nothing behind it`);
      return stdoutSink(writeStdout);
    default:
      throw new UsageError(`${to}: "${scheme}:" is not a target that effectonce knows: use http:, https:, file: or stdout:`);
  }
}

function blaming(label: string, run: () => unknown): void {
  try {
    run();
  } catch (error) {
    throw new UsageError(`${label}: ${reason(error)}`);
  }
}

/** What sinks into stdout write: a line of one must not be in the middle of another's. */
let writing: Promise<void> = Promise.resolve();

function writeStdout(bytes: Uint8Array): Promise<void> {
  const mine = writing.then(async () => {
    try {
      for (let done = 0; done < bytes.length;) done += await Deno.stdout.write(bytes.subarray(done));
    } catch (error) {
      if (!(error instanceof Deno.errors.BrokenPipe)) throw error;
      // Nobody reads any more: that is no fault of the messages, which stay where they are.
      console.error("effectonce: stdout was closed");
      Deno.exit(1);
    }
  });
  writing = mine.catch(() => {});
  return mine;
}

/**
 * Makes sure that a relay may reach its target, before a message is claimed for it.
 *
 * @throws {Error} If a permission is missing.
 */
export function permitTarget(flags: Flags): void {
  const { scheme, rest: path } = parts(flags.label("to"), flags.url("to")!);
  const hostOf = (url: string) => {
    const { hostname, port, protocol } = new URL(url);
    return { name: "net", host: `${hostname}:${port || (protocol === "https:" ? 443 : 80)}` } as const;
  };
  if (scheme === "file") {
    // A new file's name is made durable through its folder. The sink does without where Deno does not let it; but not if
    // Deno would ask.
    const folder = asks() ? [{ name: "read", path: path.replace(/[^/]*$/, "") || "." } as const] : [];
    need(flags.label("to"), { name: "read", path }, { name: "write", path }, ...folder);
  } else if (scheme !== "stdout") {
    for (const name of ["to", "reconcile"]) {
      if (flags.has(name)) need(flags.label(name), hostOf(flags.url(name)!));
    }
  }
}
