/**
 * What the URLs of database servers have in common: where the server is, whose tables, how many connections; and what to say when
 * it cannot be reached.
 *
 * @module
 */
import { type ExistingOutbox, type TableOptions, type Tables, tablesOf } from "../adapters/sql.ts";
import type { Check } from "./database.ts";
import { codeOf, reason, UsageError } from "./errors.ts";
import { need } from "./permissions.ts";
import { choice, numberOf, onlyParameters, parts, type UrlParts } from "./url.ts";
import { variable } from "./variables.ts";

/** For how long to try before a server counts as away, and for how long the adapters wait. */
export const WAIT_MS = 5_000;
/** Less than {@linkcode WAIT_MS}: what is told when that ends is then why there is no connection. */
export const CONNECT_MS = 4_500;

/** How connections are encrypted. */
export interface Tls {
  /** Whether the server's certificate must be good, and its own. */
  readonly verify: boolean;
  /** The certificates to trust, as PEM; without it those that Deno trusts. */
  readonly ca: string | undefined;
}

/** A server's URL, read. */
export interface ServerUrl {
  /** For people: without user, password, and what does not tell which tables are meant. */
  readonly name: string;
  /** Without the brackets of IPv6. */
  readonly host: string;
  readonly port: number;
  /** As `need` takes it. */
  readonly net: Deno.NetPermissionDescriptor;
  readonly user: string;
  /** Empty if there is none. */
  readonly password: string;
  readonly database: string;
  readonly tables: TableOptions;
  /** How many connections at most. */
  readonly pool: number;
  readonly tls: Tls | undefined;
  readonly read: UrlParts;
}

/** The parameters that tell which tables are meant. */
const TABLES = ["schema", "prefix", "outbox", "columns", "layout", "stored"];
/** The parameters of servers' URLs. */
const COMMON = [...TABLES, "pool", "sslmode", "sslrootcert"];

/** What a scheme knows besides. */
export interface ServerScheme {
  /** As its URLs are shown. */
  readonly scheme: string;
  readonly port: number;
  /** Parameters of its own. */
  readonly parameters: readonly string[];
  /** The variables that name the user of a URL without one, as its own programs have it. */
  readonly users: readonly string[];
}

/** What the tables are called, by the parameters of a URL. */
export function readTables(label: string, url: string, own: readonly string[]): { tables: TableOptions; read: UrlParts } {
  const read = parts(label, url);
  const { parameters } = read;
  onlyParameters(label, read, [...COMMON, ...own]);
  const tables: TableOptions = {
    schema: parameters.get("schema") ?? undefined,
    prefix: parameters.get("prefix") ?? undefined,
    outbox: existingOutbox(label, read),
  };
  try {
    tablesOf(tables);
  } catch (error) {
    throw new UsageError(`${label}: ${reason(error)}`);
  }
  return { tables, read };
}

/** What Debezium's outbox event router reads: https://debezium.io/documentation/reference/stable/transformations/outbox-event-router.html */
const DEBEZIUM = {
  topic: "aggregatetype",
  key: "aggregateid",
  value: "payload",
  headerColumns: { eventType: "type" },
} as const;
const MEMBERS = {
  topic: "topic",
  key: "key",
  value: "value",
  id: "id",
  seq: "seq",
  headers: "headers",
  "created-at": "createdAt",
} as const;

function existingOutbox(label: string, read: UrlParts): ExistingOutbox | undefined {
  const { parameters } = read;
  const table = parameters.get("outbox");
  const columns = parameters.get("columns");
  const layout = choice(label, read, "layout", ["debezium"]);
  const stored = choice(label, read, "stored", ["text", "bytes"]);
  if (table === null) {
    const alone = ["columns", "layout", "stored"].find((name) => parameters.has(name));
    if (alone === undefined) return undefined;
    throw new UsageError(`${label}: ${alone} is of a table that is there already: name it by outbox=TABLE`);
  }
  const members: Record<string, string> = {};
  const headers: Record<string, string> = {};
  for (const pair of columns?.split(",") ?? []) {
    const [what, column, more] = pair.split(":");
    if (column === undefined || more !== undefined || column === "") {
      throw new UsageError(`${label}: columns must be NAME:COLUMN with commas between them, such as topic:aggregatetype`);
    }
    const header = /^header\.(.+)$/.exec(what!)?.[1];
    if (header === undefined && !Object.hasOwn(MEMBERS, what!)) {
      const known = [...Object.keys(MEMBERS), "header.NAME"].join(", ");
      throw new UsageError(`${label}: columns: ${JSON.stringify(what)} is not known: it knows ${known}`);
    }
    const [target, name] = header === undefined ? [members, MEMBERS[what as keyof typeof MEMBERS]] : [headers, header];
    if (Object.hasOwn(target, name)) throw new UsageError(`${label}: columns has ${what} twice`);
    target[name] = column;
  }
  const { topic, key, value, ...more } = { ...layout && DEBEZIUM, ...members };
  if (topic === undefined || key === undefined || value === undefined) {
    const how = "columns=topic:…,key:…,value:… or layout=debezium";
    throw new UsageError(`${label}: outbox=${table} needs the columns of topic, key and value: ${how}`);
  }
  const headerColumns = { ...layout && DEBEZIUM.headerColumns, ...headers };
  return { table, topic, key, value, ...more, headerColumns, ...stored && { stored } };
}

const example = ({ scheme, port }: ServerScheme) => `${scheme}://user:password@host:${port}/database`;

/** Reads the URL of a server. */
export function readServer(label: string, url: string, known: ServerScheme): ServerUrl {
  const { tables, read } = readTables(label, url, known.parameters);
  const { hostname, port: portText, username, password, pathname } = authority(label, read, known);
  const [given, secret, database] = [username, password, pathname.slice(1)].map((text) => {
    try {
      return decodeURIComponent(text);
    } catch {
      throw new UsageError(`${label}: a % must be followed by two hexadecimal digits; one that stands for itself is %25`);
    }
  }) as [string, string, string];
  const user = given || (known.users.map(variable).find((name) => name !== undefined) ?? "");
  for (const [text, what] of [[hostname, "host"], [user, "user"], [database, "database"]] as const) {
    if (text === "") throw new UsageError(`${label} names no ${what}: write ${example(known)}`);
  }
  if (pathname.slice(1).includes("/")) {
    throw new UsageError(`${label}: behind the host must be the name of one database: write ${example(known)}`);
  }
  const port = portText === "" ? known.port : Number(portText);
  const { parameters } = read;
  const shown = ["schema", "prefix", "outbox"].filter((name) => parameters.has(name));
  const which = shown.map((name) => `${name}=${parameters.get(name)}`).join("&");
  return {
    name: `${known.scheme}://${hostname}:${port}${pathname}${which && `?${which}`}`,
    host: hostname.replace(/^\[(.*)\]$/, "$1"),
    port,
    net: { name: "net", host: `${hostname}:${port}` },
    user,
    password: secret,
    database,
    tables,
    pool: numberOf(label, read, "pool", 1, 1000) ?? 10,
    tls: tlsOf(label, read),
    read,
  };
}

/** Whoever forgets to encode a slash of the password would see part of it as host or path: nothing of it is shown. */
function authority(label: string, { rest }: UrlParts, known: ServerScheme): URL {
  if (!rest.startsWith("//")) throw new UsageError(`${label}: write ${example(known)}`);
  const coded = "in user and password the characters / ? # [ ] @ : % must be written as %2F %3F %23 %5B %5D %40 %3A %25";
  if (rest.includes("#")) throw new UsageError(`${label}: no # can be in it: ${coded}`);
  // By a scheme that has no rules of its own.
  const read = URL.parse(`server:${rest}`);
  if (!read || read.pathname.includes("@")) {
    throw new UsageError(`${label} cannot be read: write ${example(known)}; ${coded}`);
  }
  return read;
}

/** How connections are encrypted, by the parameters of a URL. */
export function tlsOf(label: string, read: UrlParts): Tls | undefined {
  const mode = choice(label, read, "sslmode", ["disable", "require", "verify-full"]) ?? "disable";
  const path = read.parameters.get("sslrootcert");
  if (path === null) return mode === "disable" ? undefined : { verify: mode === "verify-full", ca: undefined };
  if (mode !== "verify-full") throw new UsageError(`${label}: sslrootcert is for sslmode=verify-full`);
  need(`Reading ${path}`, { name: "read", path });
  try {
    return { verify: true, ca: Deno.readTextFileSync(path) };
  } catch (error) {
    const why = error instanceof Deno.errors.NotFound ? "it does not exist" : reason(error);
    throw new Error(`Cannot read ${path}: ${why}`);
  }
}

// ------------------------------------------------------------------------------------------------------- being there, or not

/** Why there is no connection. */
export interface Failure {
  /** In words. */
  readonly why: string;
  /** Whether the same may work a moment later. */
  readonly away: boolean;
}

/** What networks do, whatever the driver; undefined for what a server says. */
function networkFailure(code: unknown, message: string): Failure | undefined {
  const away = (why: string) => ({ why, away: true });
  switch (code) {
    case "ECONNREFUSED":
      return away("nothing listens there (connection refused): is the server running?");
    case "EHOSTUNREACH":
    case "ENETUNREACH":
      return away("no way leads to the host");
    case "EAI_AGAIN":
      return away("the name of the host cannot be looked up now");
    case "ETIMEDOUT":
      return away(`no answer within ${CONNECT_MS} ms: is it the right host and port?`);
    case "ECONNRESET":
    case "EPIPE":
    case "PROTOCOL_CONNECTION_LOST":
      return away("the connection was closed: is it the right port, and is the server starting or stopping?");
    case "ENOTFOUND":
      return { why: "there is no such host", away: false };
  }
  if (/^(timeout expired|Connection terminated due to connection timeout)/.test(message)) {
    return networkFailure("ETIMEDOUT", "");
  }
  if (/^Connection terminated/.test(message)) return networkFailure("ECONNRESET", "");
  if (/altnames/.test(message)) return { why: `its certificate is that of another host (${message})`, away: false };
  if (/certificate/i.test(message)) {
    const how = "give sslrootcert=PATH of the authority that signed it, or encrypt without a check by sslmode=require";
    return { why: `its certificate is not trusted (${message}): ${how}`, away: false };
  }
}

/** Says why there is no connection; `said`: what the driver's servers say. */
export function failureOf(error: unknown, said: (code: unknown, message: string) => Failure | undefined): Failure {
  const { code } = error as { readonly code?: unknown };
  const message = reason(error).replaceAll(/\s+/g, " ").trim();
  return said(code, message) ?? networkFailure(code, message) ?? { why: message || String(code), away: false };
}

/** An error of a driver that could not connect, as a person reads it. */
export function cannotOpen(name: string, error: unknown, { why, away }: Failure): Error {
  // What passes is told by the adapter, which waits and says for how long.
  return new Error(away ? why : `Cannot open ${name}: ${why}`, { cause: error });
}

/**
 * Makes tables, and says it if that cannot be.
 *
 * @param look Reads the columns of the outbox.
 */
export async function makeTables(
  name: string,
  { existing, prefix }: Tables,
  make: () => Promise<void>,
  look: () => Promise<unknown>,
): Promise<void> {
  try {
    await make();
  } catch (error) {
    const code = codeOf(error);
    // What is missing here is the outbox that should be there: the server says which.
    const { cause } = error as Error;
    const why = code === "schema_missing" && cause !== undefined ? cause : error;
    if (code !== undefined && why === error) throw error;
    throw new Error(`Cannot make the tables of ${name}: ${reason(why)}`, { cause: why });
  }
  if (!existing) return;
  try {
    await look();
  } catch (error) {
    const why =
      `the tables ${prefix}… are there already, and are those of another outbox: give this one a prefix of its own`;
    throw new Error(`Cannot make the tables of ${name}: ${why} (${reason(error)})`, { cause: error });
  }
}

/**
 * Connects once, so that what is wrong is known from the start; tries for a while if that may pass.
 *
 * @returns Whether the server is away.
 */
export async function reach(
  name: string,
  mayBeAway: boolean,
  connect: () => Promise<unknown>,
  explain: (error: unknown) => Failure,
): Promise<boolean> {
  const until = performance.now() + WAIT_MS;
  for (let pauseMs = 250;; pauseMs = Math.min(1000, 2 * pauseMs)) {
    try {
      await connect();
      return false;
    } catch (error) {
      const { why, away } = explain(error);
      if (away && mayBeAway) return true;
      if (!away || performance.now() + pauseMs > until) {
        throw new Error(`Cannot open ${name}: ${why}`, { cause: error });
      }
      await new Promise((resolve) => setTimeout(resolve, pauseMs));
    }
  }
}

/** Ends pools; not one that the network has swallowed, which the process ends. */
export async function endWithin(ms: number, ends: readonly Promise<unknown>[]): Promise<void> {
  const { promise: late, resolve } = Promise.withResolvers<void>();
  const timer = setTimeout(resolve, ms);
  await Promise.race([Promise.allSettled(ends), late]);
  clearTimeout(timer);
}

// ---------------------------------------------------------------------------------------------------------- what doctor says

/** The names of all tables, quoted. */
export function allTables(
  { schema: _schema, prefix: _prefix, columns: _columns, existing: _existing, ...all }: Tables,
): string[] {
  return Object.values(all);
}

/** A statement that reads all columns of an outbox, and no row. */
export function columnsOf({ columns, outbox }: Tables): string {
  return `select ${Object.values(columns).filter((column) => column !== undefined).join(", ")} from ${outbox} limit 0`;
}

/** One thing that was looked at. */
export function check(what: string, found: string, ok = true): Check {
  return { what, ok, found };
}

/** What is to be known of an outbox that was there before. */
export function existingChecks(name: string, existing: ExistingOutbox | undefined): readonly Check[] {
  if (!existing) return [];
  const { table, seq, createdAt } = existing;
  const added = (column: string) => `by effectonce_${column}, which init has added`;
  return [
    check(
      `${name} orders what is in ${table}`,
      seq === undefined
        ? `${added("seq")}: as rows are inserted; those from before as the database found them`
        : `by ${seq}`,
    ),
    check(
      `${name} knows how old messages of ${table} are`,
      createdAt === undefined ? `${added("created_at")}; those from before count from then` : `by ${createdAt}`,
    ),
  ];
}

/** Whether values are read as what their column holds. */
export function storedCheck(
  name: string,
  existing: ExistingOutbox | undefined,
  type: unknown,
  isBytes: (type: string) => boolean,
): readonly Check[] {
  if (!existing || typeof type !== "string") return [];
  const { table, value, stored = "text" } = existing;
  const right = isBytes(type) ? "bytes" : "text";
  const how = stored === right ? "" : `, read as ${stored}: say stored=${right}`;
  return [check(`${name} holds values as they are read`, `${table}.${value} is ${type}${how}`, stored === right)];
}
