/**
 * Databases as targets: by a function in a file of the user's, or by a table into which the fields of JSON go.
 *
 * @module
 */
import { type AtomicSink, type Handler, handler, type Json, type Message, rejected } from "../mod.ts";
import type { Transform } from "../adapters/kafka.ts";
import type { Database } from "./database.ts";
import { reason, UsageError } from "./errors.ts";
import type { Flags } from "./flags.ts";
import { openDatabase } from "./open.ts";
import { need } from "./permissions.ts";
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
  const database = await openDatabase(label, plain);
  try {
    await database.store.list({ limit: 1 });
    const table = read.parameters.get("table");
    const found = given ?? intoTable(read.scheme, { table: table!, ...modeOf(label, read) });
    // A table that is not there is no message's fault.
    const { learn } = found as Partial<ReturnType<typeof intoTable>>;
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

// ------------------------------------------------------------------------------------------------------------------ tables

/** What is bound in one statement: SQLite takes 32,766 values, PostgreSQL and MySQL 65,535. */
const MOST_VALUES = 30_000;

interface IntoTable {
  readonly table: string;
  readonly upsert: boolean;
  readonly ignoresUnknown: boolean;
}

/** What a message is as a row. */
interface TableRow {
  /** Its JSON. */
  readonly text: string;
  /** The columns that it has a field for, in the order of the table's. */
  readonly used: readonly Column[];
  /** Their values. */
  readonly values: readonly unknown[];
}

interface Column {
  readonly name: string;
  readonly isKey: boolean;
}

type Run = (sql: string, values: readonly unknown[]) => Promise<readonly Readonly<Record<string, unknown>>[]>;

/** The statements of a client that is in the middle of a transaction, with `?` as placeholders. */
function runOn(scheme: string, client: unknown): Run {
  if (scheme.startsWith("postgres")) {
    const { query } = client as { query(sql: string, values: readonly unknown[]): Promise<{ rows: never[] }> };
    return async (sql, values) => {
      let n = 0;
      return (await query.call(client, sql.replace(/\?/g, () => `$${++n}`), values)).rows;
    };
  }
  if (scheme === "sqlite") {
    type Statement = { all(...values: readonly unknown[]): never[]; run(...values: readonly unknown[]): unknown };
    const { prepare } = client as { prepare(sql: string): Statement };
    return (sql, values) => {
      const statement = prepare.call(client, sql);
      if (sql.startsWith("select")) return Promise.resolve(statement.all(...values));
      statement.run(...values); // better-sqlite3 has no rows of what answers none.
      return Promise.resolve([]);
    };
  }
  const { query } = client as { query(options: { sql: string; values: readonly unknown[] }): Promise<readonly [never[]]> };
  return async (sql, values) => (await query.call(client, { sql, values }))[0];
}

const COLUMNS: Readonly<Record<string, string>> = {
  postgres: `select a.attname as name, coalesce(a.attnum = any(i.indkey), false) as is_key from pg_attribute a
    left join pg_index i on i.indrelid = a.attrelid and i.indisprimary
    where a.attrelid = to_regclass(?) and a.attnum > 0 and not a.attisdropped`,
  mysql: `select column_name as name, column_key = 'PRI' as is_key from information_schema.columns
    where table_schema = database() and table_name = ?`,
  sqlite: `select name, pk > 0 as is_key from pragma_table_info(?)`,
};

/**
 * What a server says of a row that it will never take: data of the wrong kind, too long or missing, one that breaks a check, or is
 * there. Not a foreign key: that row may be on its way. Class 22 and codes of 23 on PostgreSQL, numbers of MySQL and MariaDB, names of
 * better-sqlite3, and numbers of node:sqlite.
 * https://www.postgresql.org/docs/current/errcodes-appendix.html
 * https://dev.mysql.com/doc/mysql-errors/en/server-error-reference.html
 * https://www.sqlite.org/rescode.html
 */
const FOR_GOOD = [
  /^(22...|23502|23505|23514)$/,
  /^(1048|1062|1264|1265|1292|1364|1366|1406|3140|3819|4025)$/,
  /^SQLITE_(MISMATCH|TOOBIG|CONSTRAINT_(PRIMARYKEY|UNIQUE|NOTNULL|CHECK|DATATYPE))$/,
  /^(18|20|275|1299|1555|2067|3091)$/,
];
function isForGood(error: unknown): boolean {
  const { code, errno, errcode } = error as Readonly<Record<string, unknown>>;
  const [postgres, mysql, named, numbered] = FOR_GOOD as [RegExp, RegExp, RegExp, RegExp];
  if (typeof errcode === "number") return numbered.test(String(errcode));
  if (typeof errno === "number") return mysql.test(String(errno));
  return typeof code === "string" && (postgres.test(code) || named.test(code));
}

/** Is in every text that has a number which {@linkcode exactly} looks for. */
const LONG_NUMBER = /[\d.eE+-]{16}/;
/** A number that has more digits than a number here keeps goes on as its text. */
function exactly(_key: string, value: unknown, context?: { readonly source?: string }): unknown {
  const source = context?.source;
  return typeof value === "number" && source !== undefined && source.replace(/\D/g, "").length > 15 ? source : value;
}

/** Puts the fields of a JSON object into the columns of a table. */
function intoTable(
  scheme: string,
  { table, upsert, ignoresUnknown }: IntoTable,
): AnyHandler & { learn(client: unknown): Promise<void> } {
  const kind = scheme.startsWith("postgres") ? "postgres" : scheme === "mariadb" ? "mysql" : scheme;
  const quote = (name: string) => kind === "mysql" ? `\`${name.replaceAll("`", "``")}\`` : `"${name.replaceAll('"', '""')}"`;
  let columns: readonly Column[] | undefined;
  async function learn(run: Run): Promise<readonly Column[]> {
    const rows = await run(COLUMNS[kind]!, [kind === "postgres" ? quote(table) : table]);
    if (rows.length === 0) throw new Error(`there is no table ${table}: create it`);
    const found = rows.map((row) => ({
      name: String(row["name"]),
      isKey: row["is_key"] === true || Number(row["is_key"]) === 1,
    }));
    if (upsert && !found.some(({ isKey }) => isKey)) {
      throw new Error(`table ${table} has no primary key, which mode=upsert needs`);
    }
    return found;
  }
  function fieldsOf(text: string): Readonly<Record<string, Json>> {
    let value: Json;
    try {
      value = kind !== "postgres" && LONG_NUMBER.test(text) ? JSON.parse(text, exactly) : JSON.parse(text);
    } catch {
      throw rejected("its value is no JSON");
    }
    if (typeof value !== "object" || value === null || Array.isArray(value)) throw rejected("its value is no JSON object");
    return value as Readonly<Record<string, Json>>;
  }
  function bound(value: Json): unknown {
    if (typeof value === "object" && value !== null) return JSON.stringify(value);
    if (kind !== "sqlite") return value;
    // It takes numbers for floating ones, but for integers of 64 bits.
    if (typeof value === "boolean" || Number.isSafeInteger(value)) return BigInt(value as number);
    return value;
  }
  function rowOf(message: Message): TableRow {
    const text = message.text();
    const fields = fieldsOf(text);
    const unknown = Object.keys(fields).find((name) => !columns!.some((column) => column.name === name));
    if (unknown !== undefined && !ignoresUnknown) throw rejected(`its field "${unknown}" is no column of ${table}`);
    const used = columns!.filter(({ name }) => Object.hasOwn(fields, name));
    if (used.length === 0) throw rejected(`none of its fields is a column of ${table}`);
    return { text, used, values: used.map(({ name }) => bound(fields[name]!)) };
  }
  /** The same, where the table may have got columns meanwhile. */
  async function newRowOf(run: Run, message: Message): Promise<TableRow> {
    try {
      return rowOf(message);
    } catch {
      columns = await learn(run);
      return rowOf(message);
    }
  }
  /** Rows of the same columns. */
  const insert = (run: Run, rows: readonly TableRow[]) => {
    const { used } = rows[0]!;
    const names = used.map(({ name }) => quote(name)).join(", ");
    const into = `insert into ${quote(table)} (${names})`;
    const end = upsert ? replacing(used) : "";
    if (kind === "postgres") {
      // It reads JSON faster than as many parameters, and makes of it what each column takes.
      const read = `select ${names} from json_populate_recordset(null::${quote(table)}, ?::json)`;
      return run(`${into} ${read}${end}`, [`[${rows.map(({ text }) => text).join()}]`]);
    }
    const row = `(${used.map(() => "?").join(", ")})`;
    return run(`${into} values ${rows.map(() => row).join(", ")}${end}`, rows.flatMap(({ values }) => values));
  };
  return {
    batch: 1000,
    async learn(client) {
      columns = await learn(runOn(scheme, client));
    },
    async handle(message, _, client) {
      const run = runOn(scheme, client);
      columns ??= await learn(run);
      try {
        await insert(run, [await newRowOf(run, message)]);
      } catch (error) {
        columns = undefined; // The table may have changed.
        throw isForGood(error) ? rejected(reason(error)) : error;
      }
    },
    async all(messages, _, client) {
      const run = runOn(scheme, client);
      columns ??= await learn(run);
      let rows: TableRow[] = [];
      let keys = new Set<string>();
      for (const message of messages) {
        const row = rowOf(message);
        const of = rows[0]?.used ?? row.used;
        const key = upsert ? JSON.stringify(row.values.filter((_, i) => row.used[i]!.isKey)) : "";
        // One statement for rows of the same columns, and none for the same row twice.
        const fits = row.used.length === of.length && row.used.every((column, i) => column === of[i]) &&
          (rows.length + 1) * of.length <= MOST_VALUES;
        if (!fits || upsert && keys.has(key)) {
          await insert(run, rows);
          rows = [];
          keys = new Set();
        }
        rows.push(row);
        keys.add(key);
      }
      if (rows.length > 0) await insert(run, rows);
    },
  };

  function replacing(used: readonly Column[]): string {
    const others = used.filter(({ isKey }) => !isKey).map(({ name }) => quote(name));
    if (kind === "mysql") {
      // A row that has no other field stays as it is.
      const first = quote(used[0]!.name);
      const set = others.length > 0 ? others.map((name) => `${name} = values(${name})`).join(", ") : `${first} = ${first}`;
      return ` on duplicate key update ${set}`;
    }
    const keys = columns!.filter(({ isKey }) => isKey).map(({ name }) => quote(name)).join(", ");
    const set = others.map((name) => `${name} = excluded.${name}`).join(", ");
    return ` on conflict (${keys}) do ${set === "" ? "nothing" : `update set ${set}`}`;
  }
}
