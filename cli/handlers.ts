/**
 * Databases as targets: by a function in a file of the user's, or by a table into which the fields of JSON go.
 *
 * @module
 */
import { type AtomicSink, type Handler, handler, type Message } from "../mod.ts";
import type { Transform } from "../adapters/kafka.ts";
import type { Database } from "./database.ts";
import { reason, UsageError } from "./errors.ts";
import type { Flags } from "./flags.ts";
import { openDatabase } from "./open.ts";
import { need } from "./permissions.ts";
import { intoTable, type TableHandler } from "./table.ts";
import { choice, parts, type UrlParts } from "./url.ts";

/** The parameters of a database's URL that say what becomes of messages there. */
const OWN = ["table", "mode", "unknown"];
const SCHEMES = ["sqlite", "postgres", "postgresql", "mysql", "mariadb"];

/** Whether a target is a database. */
export const isDatabase = (flags: Flags): boolean => SCHEMES.includes(parts(flags.label("to"), flags.url("to")!).scheme);

/** Looks whether it is said what becomes of messages, before anything is opened. */
export function checkDatabaseSink(flags: Flags): void {
  const label = flags.label("to");
  const read = parts(label, flags.url("to")!);
  const table = read.parameters.get("table");
  if (flags.has("handler") === (table !== null)) {
    const how = "give --handler FILE, or ?table=NAME in the URL";
    throw new UsageError(
      `${label}: what is to become of messages in a database? ${how}${table === null ? "" : ", not both"}`,
    );
  }
  if (table !== null && !/^[A-Za-z_][\w$]{0,62}$/.test(table)) {
    throw new UsageError(`${label}: table must be a name of 1 to 63 letters, digits, _ and $`);
  }
  for (const name of ["mode", "unknown"]) {
    if (table === null && read.parameters.has(name)) throw new UsageError(`${label}: ${name}= is of ?table=NAME`);
  }
  modeOf(label, read);
}

const modeOf = (label: string, read: UrlParts) => ({
  upsert: choice(label, read, "mode", ["insert", "upsert"]) === "upsert",
  ignoresUnknown: choice(label, read, "unknown", ["error", "ignore"]) === "ignore",
});

/** Opens a database as a target. */
export async function openDatabaseSink(flags: Flags): Promise<{ readonly sink: AtomicSink; readonly database: Database }> {
  const label = flags.label("to");
  const url = flags.url("to")!;
  const read = parts(label, url);
  const rest = new URLSearchParams(read.parameters);
  for (const name of OWN) rest.delete(name);
  const plain = url.split("?")[0]! + (rest.size > 0 ? `?${rest}` : "");
  const given = flags.has("handler") ? await load(flags.label("handler"), flags.text("handler")!) : undefined;
  const database = await openDatabase(label, plain, { strict: !given });
  try {
    await database.store.list({ limit: 1 });
    const table = read.parameters.get("table");
    const found = given ?? intoTable(read.scheme, { table: table!, ...modeOf(label, read) });
    // A table that is not there is no message's fault.
    const { learn } = found as Partial<TableHandler>;
    if (learn) await database.store.transaction((_, client) => learn(client));
    const { handle, key, all, batch } = found;
    const options = { ...key && { key }, ...all && { all }, ...batch !== undefined && { batch } };
    const sink = handler(database.store, handle, options);
    return {
      sink: { ...sink, name: given ? `${flags.text("handler")} on ${database.name}` : `${database.name}, table ${table}` },
      database,
    };
  } catch (error) {
    await database.close();
    throw error;
  }
}

// -------------------------------------------------------------------------------------------------------------- functions

type AnyHandler = Handler<unknown>;

/** Loads a file's default export. */
async function exportOf(label: string, file: string): Promise<unknown> {
  const isUrl = /^[a-z][a-z0-9+.-]+:/i.test(file);
  if (!isUrl) need(label, { name: "read", path: file });
  const url = isUrl ? file : new URL(file, `file://${Deno.cwd()}/`).href;
  try {
    return (await import(url)).default;
  } catch (error) {
    throw new Error(`${label}: ${file} could not be loaded: ${reason(error)}`, { cause: error });
  }
}

/** A function of a message and a client, or what `defineHandler` makes. */
async function load(label: string, file: string): Promise<AnyHandler> {
  const found = await exportOf(label, file);
  if (typeof found === "function") {
    const run = found as (message: Message, client: unknown) => unknown;
    return { handle: async (message, _, client) => void await run(message, client) };
  }
  const handler = found as Partial<AnyHandler> | undefined | null;
  if (typeof handler?.handle === "function") return handler as AnyHandler;
  const what = "a function (message, client) => …, or what defineHandler() makes";
  throw new Error(`${label}: the default export of ${file} must be ${what}`);
}

/** A function of a message, or what `defineTransform` makes. */
export async function loadTransform(label: string, file: string): Promise<Transform> {
  const found = await exportOf(label, file);
  const transform = typeof found === "function"
    ? found
    : (found as { readonly transform?: unknown } | undefined | null)?.transform;
  if (typeof transform === "function") return transform as Transform;
  const what = "a function (message) => …, or what defineTransform() makes";
  throw new Error(`${label}: the default export of ${file} must be ${what}`);
}
