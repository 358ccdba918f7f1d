/**
 * A table as a target: the fields of a message's JSON go into the columns of their names.
 *
 * @module
 */
import { Buffer } from "node:buffer";
import { type Handler, type Json, type Message, rejected } from "../mod.ts";
import { reason } from "./errors.ts";
import { isRaw, parseExactly } from "./exact.ts";

/** Which table, and what becomes of what is there or is no column. */
export interface TableOptions {
  readonly table: string;
  /** Whether a row takes the place of the one with its primary key. */
  readonly upsert: boolean;
  /** Whether fields that are no columns are passed over. */
  readonly ignoresUnknown: boolean;
}

interface Column {
  readonly name: string;
  readonly isKey: boolean;
  /** As the server names it, in lower case. */
  readonly type: string;
}

interface Learnt {
  readonly columns: readonly Column[];
  /** Unique keys besides the primary one, where a row would be replaced by any of them. */
  readonly uniques: readonly string[];
}

/** What a message is as a row. */
interface Row {
  /** Its JSON. */
  readonly text: string;
  /** The columns that it has a field for, in the order of the table's. */
  readonly used: readonly Column[];
  /** Their values, as the statement has them. */
  readonly values: readonly unknown[];
  /** Its primary key. */
  readonly key: string;
}

/** How a kind of database is told. */
interface Dialect {
  quote(name: string): string;
  learn(client: unknown, table: string): Promise<Learnt>;
  /** The value of a field that is not null. It throws as {@linkcode rejected} what the column would change. */
  value(column: Column, field: NonNullable<Json>): unknown;
  /** Inserts rows of the same columns. */
  insert(client: unknown, into: string, rows: readonly [Row, ...Row[]], end: string): Promise<unknown>;
  /** What replaces the row that is there. */
  replacing(keys: readonly string[], others: readonly string[]): string;
  /**
   * Whether this is said of a row that will never be taken: data of the wrong kind, too long or missing, one that breaks a check,
   * or is there. Not a foreign key: that row may be on its way.
   */
  isForGood(error: Readonly<Record<string, unknown>>): boolean;
}

const doubled = (name: string): string => `"${name.replaceAll('"', '""')}"`;
const onConflict: Dialect["replacing"] = (keys, others) => {
  const set = others.map((name) => `${name} = excluded.${name}`).join(", ");
  return ` on conflict (${keys.join(", ")}) do ${set === "" ? "nothing" : `update set ${set}`}`;
};

// ----------------------------------------------------------------------------------------------------------------- numbers

/** The digits of a number. */
function digitsOf(column: Column, field: Json): string | undefined {
  if (typeof field !== "number" && !isRaw(field)) return undefined;
  const digits = isRaw(field) ? field.rawJSON : String(field);
  if (Number.isFinite(Number(digits))) return digits;
  throw rejected(`its field "${column.name}" is a number that is too large`);
}

function checkText(column: Column, text: string): string {
  if (text.isWellFormed()) return text;
  throw rejected(`its field "${column.name}" has half of a character in it (a lone surrogate)`);
}

// ------------------------------------------------------------------------------------------------------------- PostgreSQL

interface PostgresClient {
  query(sql: string, values: readonly unknown[]): Promise<{ readonly rows: readonly Record<string, unknown>[] }>;
}

const postgres: Dialect = {
  quote: doubled,
  async learn(client, table) {
    const { rows } = await (client as PostgresClient).query(
      `select a.attname as name, format_type(a.atttypid, a.atttypmod) as type, coalesce(a.attnum = any(i.indkey), false) as key
        from pg_attribute a left join pg_index i on i.indrelid = a.attrelid and i.indisprimary
        where a.attrelid = to_regclass($1) and a.attnum > 0 and not a.attisdropped order by a.attnum`,
      [doubled(table)],
    );
    const columns = rows.map(({ name, type, key }) => ({ name: String(name), type: String(type), isKey: key === true }));
    return { columns, uniques: [] };
  },
  value: (_, field) => field,
  // It reads JSON faster than as many parameters, and makes of it what each column takes.
  insert(client, into, rows, end) {
    const { used } = rows[0];
    const names = used.map(({ name }) => doubled(name)).join(", ");
    const typed = used.map(({ name, type }) => `${doubled(name)} ${type}`).join(", ");
    const sql = `${into} (${names}) select ${names} from json_to_recordset($1::json) as r (${typed})${end}`;
    return (client as PostgresClient).query(sql, [`[${rows.map(({ text }) => text).join()}]`]);
  },
  replacing: onConflict,
  // https://www.postgresql.org/docs/current/errcodes-appendix.html
  isForGood: ({ code }) => /^(22...|23502|23505|23514|23P01|428C9)$/.test(String(code)),
};

// ------------------------------------------------------------------------------------------------------- MySQL and MariaDB

interface MysqlClient {
  query(sql: string): Promise<readonly [readonly Record<string, unknown>[]]>;
}
const inTicks = (name: string): string => `\`${name.replaceAll("`", "``")}\``;
/** A text as a literal that means the same under every sql_mode and character set. */
const literal = (text: string): string =>
  /^[\w .:,;@/+=-]*$/.test(text) ? `'${text}'` : `_utf8mb4 x'${Buffer.from(text).toString("hex")}'`;

/** A time with a zone, as JSON has it: neither server takes its Z. */
const ZONED = /^(\d{4}-\d\d-\d\d)[T ](\d\d:\d\d(?::\d\d)?)(\.\d+)?(Z|[+-]\d\d:\d\d)$/;
/** The same in UTC. */
function toUtc(text: string): string | undefined {
  const [, date, time, fraction = "", zone] = ZONED.exec(text) ?? [];
  const at = Date.parse(`${date}T${time}${zone}`);
  return Number.isNaN(at) ? undefined : new Date(at).toISOString().slice(0, 19).replace("T", " ") + fraction;
}

const mysql: Dialect = {
  quote: inTicks,
  async learn(client, table) {
    const ask = async (sql: string) => (await (client as MysqlClient).query(sql))[0];
    const here = `table_schema = database() and table_name = ${literal(table)}`;
    const found = await ask(
      `select column_name as name, data_type as type from information_schema.columns where ${here} order by ordinal_position`,
    );
    const keys = await ask(
      `select index_name as name, column_name as col from information_schema.statistics where ${here} and non_unique = 0`,
    );
    const primary = new Set(keys.filter(({ name }) => name === "PRIMARY").map(({ col }) => col));
    const uniques = new Set(keys.map(({ name }) => String(name)).filter((name) => name !== "PRIMARY"));
    // MariaDB has JSON as a text that is checked: https://mariadb.com/docs/server/reference/data-types/string-data-types/json
    const isMariadb = /mariadb/i.test(String((await ask("select version() as version"))[0]!["version"]));
    const checks = isMariadb
      ? await ask(
        `select check_clause as text from information_schema.check_constraints
          where constraint_schema = database() and table_name = ${literal(table)}`,
      )
      : [];
    const json = new Set(checks.map(({ text }) => /^json_valid\(`(.*)`\)$/i.exec(String(text))?.[1]));
    const columns = found.map(({ name, type }) => ({
      name: String(name),
      type: json.has(String(name)) ? "json" : String(type).toLowerCase(),
      isKey: primary.has(name),
    }));
    return { columns, uniques: [...uniques] };
  },
  value(column, field) {
    const { name, type } = column;
    if (type === "json") return literal(JSON.stringify(field));
    const digits = digitsOf(column, field);
    // Of 1.5 it would make 2.
    const number = digits ?? (typeof field === "string" && /^\s*[+-]?[\d.]/.test(field) ? field : undefined);
    if (number !== undefined && type.endsWith("int") && !/^\s*[+-]?\d+\s*$/.test(number)) {
      if (!Number.isSafeInteger(Number(number))) throw rejected(`its field "${name}" is ${number}, and no integer`);
    }
    if (digits !== undefined) return digits;
    if (typeof field === "boolean") return String(field);
    if (typeof field !== "string") return literal(JSON.stringify(field));
    const utc = type === "datetime" || type === "timestamp" ? toUtc(field) : undefined;
    // A TIMESTAMP is read in the session's time zone.
    if (utc !== undefined && type === "timestamp") return `convert_tz('${utc}', '+00:00', @@session.time_zone)`;
    return literal(checkText(column, utc ?? field));
  },
  insert(client, into, rows, end) {
    const names = rows[0].used.map(({ name }) => inTicks(name)).join(", ");
    const values = rows.map(({ values }) => `(${values.map((value) => value ?? "null").join(", ")})`).join(", ");
    return (client as MysqlClient).query(`${into} (${names}) values ${values}${end}`);
  },
  // A row that has no other field stays as it is. With values(): the newer alias is not known to MariaDB.
  replacing(keys, others) {
    const set = others.length > 0 ? others.map((name) => `${name} = values(${name})`) : [`${keys[0]} = ${keys[0]}`];
    return ` on duplicate key update ${set.join(", ")}`;
  },
  // https://dev.mysql.com/doc/mysql-errors/en/server-error-reference.html and https://mariadb.com/docs/server/reference/error-codes
  isForGood: ({ errno }) =>
    /^(1048|1062|1264|1265|1292|1364|1366|1367|1406|1586|1906|3105|3140|3819|4025)$/.test(String(errno)),
};

// ----------------------------------------------------------------------------------------------------------------- SQLite

interface SqliteClient {
  prepare(sql: string): {
    all(...values: readonly unknown[]): readonly Record<string, unknown>[];
    run(...values: readonly unknown[]): unknown;
  };
}

const sqlite: Dialect = {
  quote: doubled,
  learn(client, table) {
    const rows = (client as SqliteClient).prepare("select name, type, pk > 0 as is_key from pragma_table_info(?)").all(
      table,
    );
    const columns = rows.map(({ name, type, is_key }) => ({
      name: String(name),
      type: String(type).toLowerCase(),
      isKey: Number(is_key) === 1,
    }));
    return Promise.resolve({ columns, uniques: [] });
  },
  value(column, field) {
    if (typeof field === "string") return checkText(column, field);
    // Numbers are bound as floating ones, but for integers of 64 bits.
    if (typeof field === "boolean") return BigInt(field);
    const digits = digitsOf(column, field);
    if (digits === undefined) return JSON.stringify(field);
    if (typeof field === "number") return Number.isSafeInteger(field) ? BigInt(field) : field;
    return /^-?\d{1,19}$/.test(digits) && BigInt.asIntN(64, BigInt(digits)) === BigInt(digits) ? BigInt(digits) : digits;
  },
  insert(client, into, rows, end) {
    const names = rows[0].used.map(({ name }) => doubled(name)).join(", ");
    const row = `(${rows[0].used.map(() => "?").join(", ")})`;
    const sql = `${into} (${names}) values ${rows.map(() => row).join(", ")}${end}`;
    return Promise.resolve((client as SqliteClient).prepare(sql).run(...rows.flatMap(({ values }) => values)));
  },
  replacing: onConflict,
  // Names of better-sqlite3, numbers of node:sqlite: https://www.sqlite.org/rescode.html
  isForGood: ({ code, errcode }) =>
    /^(18|20|275|1299|1555|2067|3091)$/.test(String(errcode)) ||
    /^SQLITE_(MISMATCH|TOOBIG|CONSTRAINT_(PRIMARYKEY|UNIQUE|NOTNULL|CHECK|DATATYPE))$/.test(String(code)),
};

const DIALECTS: Readonly<Record<string, Dialect>> = { postgres, postgresql: postgres, mysql, mariadb: mysql, sqlite };

// ----------------------------------------------------------------------------------------------------------------- handler

/** What is bound in one statement: SQLite takes 32,766 values. */
const MOST_VALUES = 30_000;
/** How much JSON is in one statement, in characters: MariaDB takes 16 MB of hexadecimal digits. */
const MOST_TEXT = 2_000_000;
/** After how long a table is looked at again of which fields were passed over, in milliseconds. */
const LOOK_AGAIN_MS = 5_000;

/** What puts messages into a table. */
export interface TableHandler extends Handler<unknown> {
  /** Looks at the table. */
  learn(client: unknown): Promise<void>;
}

/** Puts the fields of JSON objects into the columns of a table. */
export function intoTable(scheme: string, { table, upsert, ignoresUnknown }: TableOptions): TableHandler {
  const dialect = DIALECTS[scheme]!;
  const into = `insert into ${dialect.quote(table)}`;
  let columns: readonly Column[] | undefined;
  let learntAt = 0;
  /** Whether fields were passed over, for which there may be columns meanwhile. */
  let passedOver = false;

  async function learn(client: unknown): Promise<void> {
    const learnt = await dialect.learn(client, table);
    if (learnt.columns.length === 0) throw new Error(`there is no table ${table}: create it`);
    if (upsert && !learnt.columns.some(({ isKey }) => isKey)) {
      throw new Error(`table ${table} has no primary key, which mode=upsert needs`);
    }
    if (upsert && learnt.uniques.length > 0) {
      const why = `has other unique keys than its primary key (${learnt.uniques.join(", ")})`;
      throw new Error(
        `table ${table} ${why}, by which the server would replace other rows: mode=upsert cannot be used there`,
      );
    }
    ({ columns } = learnt);
    learntAt = Date.now();
    passedOver = false;
  }
  async function look(client: unknown): Promise<void> {
    if (!columns || passedOver && Date.now() > learntAt + LOOK_AGAIN_MS) await learn(client);
  }
  function fieldsOf(text: string): Readonly<Record<string, Json>> {
    let value: Json;
    try {
      value = dialect === postgres ? JSON.parse(text) : parseExactly(text);
    } catch {
      throw rejected("its value is no JSON");
    }
    if (typeof value !== "object" || value === null || Array.isArray(value) || isRaw(value)) {
      throw rejected("its value is no JSON object");
    }
    return value as Readonly<Record<string, Json>>;
  }
  function rowOf(message: Message): Row {
    const text = message.text();
    const fields = fieldsOf(text);
    const used = columns!.filter(({ name }) => Object.hasOwn(fields, name));
    const names = Object.keys(fields);
    if (names.length > used.length) {
      const unknown = names.find((name) => !used.some((column) => column.name === name));
      if (!ignoresUnknown) throw rejected(`its field "${unknown}" is no column of ${table}`);
      passedOver = true;
    }
    if (used.length === 0) throw rejected(`none of its fields is a column of ${table}`);
    const values = used.map((column) => {
      const field = fields[column.name]!;
      return field === null ? null : dialect.value(column, field);
    });
    const key = upsert ? JSON.stringify(used.filter(({ isKey }) => isKey).map(({ name }) => fields[name])) : "";
    return { text, used, values, key };
  }
  /** The same, where the table may have got columns meanwhile. */
  async function newRowOf(client: unknown, message: Message): Promise<Row> {
    try {
      return rowOf(message);
    } catch {
      await learn(client);
      return rowOf(message);
    }
  }
  async function insert(client: unknown, rows: readonly Row[]): Promise<void> {
    const [first, ...rest] = rows;
    if (!first) return;
    const names = (of: readonly Column[]) => of.map(({ name }) => dialect.quote(name));
    const keys = names(columns!.filter(({ isKey }) => isKey));
    const end = upsert ? dialect.replacing(keys, names(first.used.filter(({ isKey }) => !isKey))) : "";
    await dialect.insert(client, into, [first, ...rest], end);
  }
  return {
    batch: 1000,
    learn,
    async handle(message, _, client) {
      await look(client);
      try {
        await insert(client, [await newRowOf(client, message)]);
      } catch (error) {
        columns = undefined; // The table may have changed.
        throw dialect.isForGood(error as Readonly<Record<string, unknown>>) ? rejected(reason(error)) : error;
      }
    },
    async all(messages, _, client) {
      await look(client);
      let rows: Row[] = [];
      let keys = new Set<string>();
      let size = 0;
      for (const message of messages) {
        const row = rowOf(message);
        const of = rows[0]?.used ?? row.used;
        // One statement for rows of the same columns, and none for the same row twice.
        const fits = row.used.length === of.length && row.used.every((column, i) => column === of[i]) &&
          (rows.length + 1) * of.length <= MOST_VALUES && size + row.text.length <= MOST_TEXT;
        if (!fits || upsert && keys.has(row.key)) {
          await insert(client, rows);
          rows = [];
          keys = new Set();
          size = 0;
        }
        rows.push(row);
        keys.add(row.key);
        size += row.text.length;
      }
      await insert(client, rows);
    },
  };
}
