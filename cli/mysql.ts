/**
 * Opens databases on MySQL and MariaDB, by `npm:mysql2`.
 *
 * @module
 */
import { migrateMysql, type MysqlFlavor, mysqlOutbox, type MysqlPool, mysqlSchema, mysqlStore } from "../adapters/mysql.ts";
import { type Tables, tablesOf, VERSION } from "../adapters/sql.ts";
import type { Check, Database, OpenOptions } from "./database.ts";
import { reason } from "./errors.ts";
import { need } from "./permissions.ts";
import {
  allTables,
  cannotOpen,
  check,
  columnsOf,
  CONNECT_MS,
  endWithin,
  existingChecks,
  type Failure,
  failureOf,
  makeTables,
  reach,
  readServer,
  readTables,
  type ServerScheme,
  type ServerUrl,
  storedCheck,
  WAIT_MS,
} from "./server.ts";
import { parts } from "./url.ts";

const schemeOf = (scheme: string): ServerScheme => ({ scheme, port: 3306, parameters: [], users: ["USER"] });

interface OpenPool extends MysqlPool {
  on(event: "connection", listener: (connection: NewConnection) => void): unknown;
  end(): Promise<void>;
}

interface NewConnection {
  on(event: "error", listener: () => void): unknown;
  query(sql: string, done: () => void): unknown;
}

/** The SQL of the tables. */
export function mysqlSchemaOf(label: string, url: string): string {
  const { tables, read } = readTables(label, url, []);
  return mysqlSchema(read.scheme as MysqlFlavor, tables);
}

async function makePool(
  { host, port, user, password, database, tls, pool: connectionLimit }: ServerUrl,
  strict: boolean,
): Promise<OpenPool> {
  const specifier = "npm:mysql2@^3.15.0/promise"; // Computed, so that only its users install it.
  const { default: mysql } = await import(specifier) as { default: { createPool(options: unknown): OpenPool } };
  const pool = mysql.createPool({
    host,
    port,
    user,
    password,
    database,
    ssl: tls && { rejectUnauthorized: tls.verify, verifyIdentity: tls.verify, ca: tls.ca },
    charset: "utf8mb4",
    connectionLimit,
    connectTimeout: CONNECT_MS,
    enableKeepAlive: true,
    keepAliveInitialDelay: 10_000,
  });
  pool.on("connection", (connection) => {
    connection.on("error", () => {}); // Of one that nobody uses: it has left the pool.
    connection.query("set session innodb_lock_wait_timeout = 5", () => {});
    if (strict) connection.query("set session sql_mode = concat(@@session.sql_mode, ',STRICT_ALL_TABLES')", () => {});
  });
  return pool;
}

const failure = (error: unknown): Failure =>
  failureOf(error, (code, message) => {
    const said = (why: string, away = false) => ({ why, away });
    switch (code) {
      case "HANDSHAKE_NO_SSL_SUPPORT":
        return said("the server is not set up for TLS: leave sslmode out");
      case "ER_ACCESS_DENIED_ERROR":
      case "ER_ACCESS_DENIED_NO_PASSWORD_ERROR":
      case "ER_DBACCESS_DENIED_ERROR":
        return said(`${message}: check user, password and their rights`);
      case "ER_BAD_DB_ERROR":
        return said(`${message}: create it first`);
      case "ER_SECURE_TRANSPORT_REQUIRED":
        return said(`${message}: it wants sslmode=require`);
      case "ER_CON_COUNT_ERROR":
      case "ER_SERVER_SHUTDOWN":
      case "ER_TOO_MANY_USER_CONNECTIONS":
        return said(message, true);
    }
  });

/** Opens one. */
export async function openMysql(
  label: string,
  url: string,
  { mayBeAway = false, strict = false }: OpenOptions,
): Promise<Database> {
  const server = readServer(label, url, schemeOf(parts(label, url).scheme));
  const { name, tables } = server;
  need(`Opening ${name}`, server.net);
  const pool = await makePool(server, strict);
  const end = () => endWithin(1_000, [pool.end()]);
  try {
    const away = await reach(name, mayBeAway, async () => (await pool.getConnection()).release(), failure);
    const explained: MysqlPool = {
      getConnection: () =>
        pool.getConnection().catch((error: unknown) => {
          throw cannotOpen(name, error, failure(error));
        }),
    };
    const known = tablesOf(tables);
    const options = { ...tables, name, waitMs: WAIT_MS };
    const rows: Rows = async (sql, values = []) => {
      const connection = await explained.getConnection();
      try {
        return (await connection.query({ sql, values: [...values] }))[0] as Row[];
      } finally {
        connection.release();
      }
    };
    return {
      name,
      identity: () => identityOf(rows, known),
      away,
      store: mysqlStore(explained, options),
      outbox: (outbox) => mysqlOutbox(explained, { ...options, ...outbox }),
      migrate: ({ shards } = {}) =>
        makeTables(
          name,
          known,
          () => migrateMysql(explained, { ...options, shards }),
          () => rows(inTicks(columnsOf(known))),
        ),
      accept: () => migrateMysql(explained, { ...options, accept: true }),
      checks: () => checksOf(name, known, rows),
      close: end,
    };
  } catch (error) {
    await end();
    throw error;
  }
}

type Row = Readonly<Record<string, unknown>>;
type Rows = (sql: string, values?: readonly unknown[]) => Promise<readonly Row[]>;

/** Names as it quotes them. */
const inTicks = (sql: string): string => sql.replaceAll(`"`, "`");

/** The server's own variables; those that it does not have are left out. */
async function variablesOf(rows: Rows, ...names: readonly string[]): Promise<ReadonlyMap<string, string>> {
  const found = await rows("show variables where variable_name in (?)", [names]);
  return new Map(found.map((row) => [String(row["Variable_name"]).toLowerCase(), String(row["Value"])]));
}

async function identityOf(rows: Rows, { schema, meta, outbox }: Tables): Promise<string> {
  // MariaDB has had one of these for some versions only.
  const server = await variablesOf(rows, "server_uuid", "server_uid");
  const place = server.size > 0 ? server : await variablesOf(rows, "hostname", "port", "datadir");
  const [row] = await rows("select database() as name");
  const own = (table: string) => table.slice(table.lastIndexOf(".") + 1);
  return ["mysql", ...place.values(), schema ?? row!["name"], own(meta), own(outbox)].join(":");
}

/** The oldest versions that can do what the adapter needs. */
const OLDEST = { MySQL: [8, 0, 17], MariaDB: [10, 6, 0] } as const;

async function checksOf(name: string, tables: Tables, rows: Rows): Promise<readonly Check[]> {
  const { existing } = tables;
  const all = allTables(tables).map((table) => /[^"]*(?="$)/.exec(table)![0]); // Without the schema.
  const server = await variablesOf(
    rows,
    ...["version", "innodb_flush_log_at_trx_commit", "log_bin", "sync_binlog", "binlog_format", "read_only"],
    ...["super_read_only", "transaction_isolation", "tx_isolation", "innodb_autoinc_lock_mode", "auto_increment_increment"],
    ...["character_set_results", "innodb_doublewrite"],
  );
  const of = (variable: string) => server.get(variable) ?? "";
  const on = (variable: string) => /^(on|1)$/i.test(of(variable));
  const version = of("version");
  const product = /mariadb/i.test(version) ? "MariaDB" : "MySQL";
  const durable = ["innodb_flush_log_at_trx_commit", ...on("log_bin") ? ["sync_binlog"] : []];
  const doublewrite = !server.has("innodb_doublewrite") || !/^off$/i.test(of("innodb_doublewrite"));
  // To READ COMMITTED the server refuses every write where it logs statements.
  const statements = on("log_bin") && /^statement$/i.test(of("binlog_format"));
  const [place] = await rows("select database() as name");
  const schema = tables.schema ?? String(place!["name"]);
  const engines = await rows(
    "select table_name as name, engine as engine from information_schema.tables where table_schema = ? and table_name in (?)",
    [schema, all],
  );
  const engineOf = new Map(engines.map((row) => [String(row["name"]).toLowerCase(), String(row["engine"])]));
  const missing = all.filter((table) => !engineOf.has(table.toLowerCase()));
  const others = [...engineOf].filter(([, engine]) => engine !== "InnoDB").map(([table, engine]) => `${table} is ${engine}`);
  const lacking = await rows(inTicks(columnsOf(tables))).then(() => undefined, reason);
  const tablesSay = missing.length > 0
    ? `there is no ${missing.join(", no ")} (init --store makes them)`
    : lacking ?? (others.length > 0 ? `${others.join(", ")}, which has no transactions` : `version ${VERSION}, InnoDB`);
  const [value] = existing
    ? await rows(
      "select data_type as type from information_schema.columns where table_schema = ? and table_name = ? and column_name = ?",
      [schema, existing.table, existing.value],
    )
    : [];
  const step = Number(of("auto_increment_increment"));
  const isolation = of("transaction_isolation") || of("tx_isolation");
  return [
    check(`${name} is a server that effectonce knows`, `${product} ${version}`, isAtLeast(version, OLDEST[product])),
    check(
      `${name} commits durably`,
      [...durable, ...server.has("innodb_doublewrite") ? ["innodb_doublewrite"] : []]
        .map((variable) => `${variable} = ${of(variable)}`).join(", "),
      durable.every((variable) => of(variable) === "1") && doublewrite,
    ),
    check(
      `${name} can be written to`,
      on("read_only") || on("super_read_only") ? "no: read_only is on, as on a replica" : "it is the primary",
      !on("read_only") && !on("super_read_only"),
    ),
    check(`${name} has its tables`, tablesSay, missing.length === 0 && lacking === undefined && others.length === 0),
    ...existingChecks(name, existing),
    ...storedCheck(name, existing, value?.["type"], (type) => /blob|binary/i.test(type)),
    ...step === 1 ? [] : [check(
      `${name} numbers messages as they are inserted`,
      `auto_increment_increment = ${step}, as with several primaries: write the messages of a key through one of them`,
    )],
    check(
      `${name} takes texts as they are`,
      `character_set_results = ${of("character_set_results")}`,
      of("character_set_results") === "utf8mb4",
    ),
    check(
      `${name} isolates transactions`,
      statements
        ? "binlog_format = STATEMENT refuses read committed, which effectonce needs: set it to ROW"
        : `transaction_isolation = ${isolation} in the application's; effectonce's own are read committed`,
      !statements,
    ),
  ];
}

function isAtLeast(version: string, least: readonly number[]): boolean {
  const found = (/^(\d+)\.(\d+)\.(\d+)/.exec(version) ?? []).slice(1).map(Number);
  const at = least.findIndex((number, i) => found[i] !== number);
  return at < 0 || (found[at] ?? 0) > least[at]!;
}
