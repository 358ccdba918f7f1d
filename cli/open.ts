/**
 * Opens the ends that URLs name: the one place that knows schemes and drivers. Drivers load when their scheme is used.
 *
 * @module
 */
import type { AtomicSink, CallSink, EffectStore, Outbox } from "../mod.ts";
import { fileSink, stdoutSink } from "../adapters/file.ts";
import { httpSink } from "../adapters/http.ts";
import { migrateSqlite, type SqliteClient, sqliteOutbox, sqliteSchema, sqliteStore } from "../adapters/sqlite.ts";
import { type Flags, UsageError } from "./flags.ts";

/** A database that is open. */
export interface Database {
  /** Its URL, without secrets. */
  readonly name: string;
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
    const specifier = "npm:better-sqlite3@^13.2.0";
    const { default: Database } = await import(specifier) as { default: new (path: string) => OpenClient };
    return new Database(path);
  },
  async node(path) {
    const { DatabaseSync } = await import("node:sqlite");
    return new DatabaseSync(path);
  },
};

/** The scheme of a URL, its rest, and its parameters. */
function parts(
  flag: string,
  url: string,
): { readonly scheme: string; readonly rest: string; readonly parameters: URLSearchParams } {
  const match = /^([a-z][a-z0-9+.-]*):(.*)$/is.exec(url);
  // Not repeated: it may hold a password.
  if (!match) {
    throw new UsageError(`--${flag} is not a URL: it should begin with a scheme, such as sqlite:, https:, file: or stdout:`);
  }
  const [rest, query] = match[2]!.split(/\?(.*)/s);
  return { scheme: match[1]!.toLowerCase(), rest: rest!, parameters: new URLSearchParams(query ?? "") };
}

function onlyParameters(flag: string, scheme: string, parameters: URLSearchParams, known: readonly string[]): void {
  for (const name of parameters.keys()) {
    if (known.includes(name)) continue;
    const help = known.length > 0 ? `it knows ${known.join(", ")}` : "it has none";
    throw new UsageError(`--${flag}: "${name}" is not a parameter of ${scheme}: URLs: ${help}`);
  }
}

/** The SQL of the tables for the databases of a scheme. */
export function schemaOf(url: string): string {
  const { scheme } = parts("store", url);
  if (scheme === "sqlite") return sqliteSchema();
  throw new UsageError(`"${scheme}:" is not a database that effectonce knows: use sqlite:`);
}

/**
 * Opens a database with claims and an outbox.
 *
 * @param create Whether the database may be new.
 */
export async function openDatabase(flag: string, url: string, create = false): Promise<Database> {
  const { scheme, rest: path, parameters } = parts(flag, url);
  if (scheme !== "sqlite") {
    throw new UsageError(`--${flag}: "${scheme}:" is not a database that effectonce knows: use sqlite:`);
  }
  onlyParameters(flag, "sqlite", parameters, ["driver"]);
  const driver = parameters.get("driver") ?? "better-sqlite3";
  if (parameters.getAll("driver").length > 1) throw new UsageError(`--${flag}: driver is given twice`);
  const connect = Object.hasOwn(DRIVERS, driver) ? DRIVERS[driver] : undefined;
  if (!connect) throw new UsageError(`--${flag}: driver=${driver} is not known: use ${Object.keys(DRIVERS).join(" or ")}`);
  if (path === "" || path === ":memory:" || path.startsWith("//")) {
    throw new UsageError(`--${flag}: "${url}" names no file: write sqlite:app.db or sqlite:/folder/app.db`);
  }
  const name = `sqlite:${path}`;
  const found = await Deno.stat(path).catch((error: unknown) => {
    if (error instanceof Deno.errors.NotFound) return undefined;
    throw new Error(`Cannot open ${name}: ${reason(error)}`);
  });
  if (!found && !create) {
    throw new Error(`Cannot open ${name}: the file does not exist. Create it with: init --store ${name}`);
  }
  if (found && !found.isFile) throw new Error(`Cannot open ${name}: it is not a file`);
  let client: OpenClient;
  try {
    client = await connect(path);
    // Waiting in SQLite blocks the thread, and with it the renewal of leases: the adapter waits instead.
    client.prepare("pragma busy_timeout = 20").get();
    client.prepare("select count(*) from sqlite_master").get();
  } catch (error) {
    throw new Error(`Cannot open ${name}: ${reason(error)}`, { cause: error });
  }
  const options = { name };
  const store = sqliteStore(client, options);
  return {
    name,
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
          found: `synchronous = ${synchronous >= 2 ? "FULL" : "NORMAL"}`,
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

/** Opens a sink; the flags are those of `relay`. */
export function openSink(url: string, flags: Flags): CallSink | AtomicSink {
  const { scheme, rest, parameters } = parts("to", url);
  const web = scheme === "http" || scheme === "https";
  for (const name of ["idempotent", "dedupe-window-ms", "header-to", "method", "timeout-ms", "reconcile"]) {
    if (web || !(flags.on(name) || flags.text(name) || flags.number(name) !== undefined || flags.list(name).length)) {
      continue;
    }
    throw new UsageError(`--${name} is for http: and https: targets, not for ${scheme}:`);
  }
  switch (scheme) {
    case "http":
    case "https": {
      if (flags.number("dedupe-window-ms") !== undefined && !flags.on("idempotent")) {
        throw new UsageError("--dedupe-window-ms needs --idempotent: it says how long the target remembers a key");
      }
      if (!rest.startsWith("//")) throw new UsageError(`--to: write ${scheme}://host/path`);
      if (flags.number("settle-ms") !== undefined && flags.text("reconcile") === undefined) {
        throw new UsageError("--settle-ms needs --reconcile: it says how long after an attempt to ask");
      }
      const headers = pairs("header-to", flags.list("header-to"), fromEnvironment);
      const reconcile = flags.text("reconcile");
      // One after the other, so that a complaint names its flag.
      blaming("to", () => httpSink(url));
      blaming("header-to", () => httpSink(url, { headers }));
      blaming("reconcile", () => httpSink(url, { reconcile }));
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
      onlyParameters("to", "file", parameters, []);
      if (rest === "" || rest.startsWith("//")) {
        throw new UsageError(`--to: "${url}" names no file: write file:events.jsonl`);
      }
      return fileSink(rest);
    case "stdout":
      onlyParameters("to", "stdout", parameters, []);
      if (rest !== "") throw new UsageError(`--to: write stdout: with nothing behind it, not "${url}"`);
      return stdoutSink(async (bytes) => {
        try {
          for (let done = 0; done < bytes.length;) done += await Deno.stdout.write(bytes.subarray(done));
        } catch (error) {
          if (!(error instanceof Deno.errors.BrokenPipe)) throw error;
          // Nobody reads any more: that is no fault of the messages, which stay where they are.
          console.error("effectonce: stdout was closed");
          Deno.exit(1);
        }
      });
    default:
      throw new UsageError(`--to: "${scheme}:" is not a target that effectonce knows: use http:, https:, file: or stdout:`);
  }
}

function blaming(flag: string, run: () => unknown): void {
  try {
    run();
  } catch (error) {
    throw new UsageError(`--${flag}: ${reason(error)}`);
  }
}

/** Reads texts of the form `name=value`. */
export function pairs(
  flag: string,
  texts: readonly string[],
  convert: (text: string, flag: string) => string = (text) => text,
): Record<string, string> {
  const found: Record<string, string> = {};
  for (const text of texts) {
    const at = text.indexOf("=");
    // The value may be a secret, so a message shows none of it.
    if (at < 1) throw new UsageError(`--${flag} must be of the form NAME=VALUE`);
    const name = text.slice(0, at);
    if (Object.keys(found).some((other) => other.toLowerCase() === name.toLowerCase())) {
      throw new UsageError(`--${flag} has ${name} twice`);
    }
    found[name] = convert(text.slice(at + 1), flag);
  }
  return found;
}

function fromEnvironment(text: string, flag: string): string {
  if (!text.startsWith("env:")) return text;
  const name = text.slice(4);
  if (!/^[^=\0]+$/.test(name)) throw new UsageError(`--${flag}: behind env: there must be the name of a variable`);
  const value = Deno.env.get(name);
  if (value === undefined) throw new UsageError(`--${flag}: the environment has no variable ${name}`);
  return value;
}

/** An error's text for a person. */
export function reason(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}
