/**
 * Claims, outbox and positions in MySQL and MariaDB, on a pool of `mysql2/promise` that is open already.
 *
 * ```ts ignore
 * import mysql from "mysql2/promise";
 * import { relay } from "@effectonce/effectonce";
 * import { httpSink } from "@effectonce/effectonce/http";
 * import { migrateMysql, mysqlOutbox, mysqlStore } from "@effectonce/effectonce/mysql";
 *
 * const pool = mysql.createPool("mysql://root@127.0.0.1:3306/app");
 * await migrateMysql(pool);
 * const store = mysqlStore(pool);
 * await store.transaction(async (effects, connection) => {
 *   await connection.query("update orders set state = 'paid' where id = 1");
 *   await effects.enqueue({ topic: "payments", key: "order-1", value: { amount: 5 } });
 * });
 * await relay({ from: mysqlOutbox(pool), to: httpSink("https://pay.example/charge", { repeat: "same-key" }), store });
 * ```
 *
 * @module
 */
import { Buffer } from "node:buffer";
import { EffectError, type EffectStore, realRuntime, type RunSql } from "../mod.ts";
import {
  acceptPlace,
  Broken,
  causesOf,
  checkOutbox,
  checkVersion,
  commitUnknown,
  createNetworkErrors,
  type Dialect,
  EFFECT_COLUMNS,
  type ExistingOutbox,
  inPortions,
  notePlace,
  outboxName,
  patiently,
  type Row,
  type Run,
  setShards,
  type ShardedOutbox,
  sqlOutbox,
  type SqlOutboxOptions,
  type SqlServer,
  sqlStore,
  type SqlValue,
  type TableOptions,
  type Tables,
  tablesOf,
  takeWithin,
  VERSION,
} from "./sql.ts";
export type { ExistingOutbox, ShardedOutbox, TableOptions };

/** A statement as `mysql2` takes it, with what would change the shape of its rows switched off. */
export interface MysqlQuery {
  /** The text. */
  sql: string;
  /** What is bound to `?`. */
  values?: unknown[];
  /** Rows as objects. */
  rowsAsArray?: boolean;
  /** Not by table. */
  nestTables?: boolean;
  /** By the driver's own rules: a function of the pool's would be asked where the query has none. */
  typeCast?: (field: unknown, next: () => unknown) => unknown;
}

/** What this adapter calls of a connection. */
export interface MysqlConnection {
  /** Runs one statement; the first member of the answer are the rows. */
  query(options: MysqlQuery): Promise<readonly unknown[]>;
}

/** What this adapter calls of a pool of connections: that of `npm:mysql2/promise` fits. */
export interface MysqlPool {
  /** Takes a connection from the pool. */
  getConnection(): Promise<MysqlConnection & { release(): void; destroy(): void }>;
}

/** What a store hands over in its transactions: the pool's own connection, with all that its driver can. */
export type MysqlConnectionOf<Pool extends MysqlPool> = Awaited<ReturnType<Pool["getConnection"]>>;

/** How the adapter behaves. */
export interface MysqlOptions extends TableOptions {
  /** A name for people; without secrets. */
  readonly name?: string;
  /**
   * How long to wait for locks, connections and a server that is away before the error `busy`, in milliseconds. In the
   * application's own transactions a lock is waited for as its `innodb_lock_wait_timeout` says.
   *
   * @default {5_000}
   */
  readonly waitMs?: number;
}

/** What of an outbox to read, and how. */
export interface MysqlOutboxOptions extends SqlOutboxOptions, MysqlOptions {}

/** How to make the tables. */
export interface MysqlMigration extends MysqlOptions {
  /**
   * Over how many relays at once the messages can be shared out, from 1 to 256. A key's messages stay together.
   *
   * @default {undefined} As it is; at first 1.
   */
  readonly shards?: number;
  /**
   * Takes the tables as they are after a restore, or in a copy, for those that claims were made in: nothing was done since
   * that they do not know.
   *
   * @default {false}
   */
  readonly accept?: boolean;
}

/** The servers that this adapter knows. */
export type MysqlFlavor = "mysql" | "mariadb";

// ------------------------------------------------------------------------------------------------------------------ texts

/** `"name"` as MySQL quotes it, whatever its sql_mode. */
const quoted = (sql: string): string => sql.replaceAll(`"`, "`");
const hex = (bytes: Uint8Array): string => Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength).toString("hex");

/** A value as a literal that means the same under every sql_mode and character set. */
function literal(value: SqlValue): string {
  if (value === null) return "null";
  if (typeof value === "number" || typeof value === "boolean") return String(value);
  if (typeof value !== "string") return `x'${hex(value)}'`;
  return /^[\w .:,;@/+=-]*$/.test(value) ? `'${value}'` : `_utf8mb4 x'${Buffer.from(value).toString("hex")}'`;
}
function inlined(sql: string, values: readonly SqlValue[]): string {
  let n = 0;
  return quoted(sql).replace(/\?/g, () => literal(values[n++]!));
}

const CLOCK = "(timestampdiff(microsecond, '1970-01-01', utc_timestamp(6)) div 1000)";

/** Identifiers and texts of an outbox may have so many characters; their columns have room for one more, to be refused. */
const LONGEST = 255;

/** Ends a connection that is silent for half a minute, as that of a relay that is stopped in the middle of a transaction. */
const END_SILENCE = "set @effectonce_idle = @@session.wait_timeout, session wait_timeout = 30";
const UNLIMIT_SILENCE = "set session wait_timeout = @effectonce_idle";

const dialect: Dialect = {
  endSilence: END_SILENCE,
  clock: CLOCK,
  text: (expression) => `cast(${expression} as char)`,
  time: (expression) => `date_format(${expression}, '%Y-%m-%dT%H:%i:%s.%fZ')`,
  bytes: (expression, stored) => stored === "bytes" ? expression : `cast(convert(${expression} using utf8mb4) as binary)`,
  // A restored dump has made another table, at another time.
  place: ({ prefix, schema }) => ({
    sql: `select (select unix_timestamp(create_time) from information_schema.tables
      where table_schema = ${schema === undefined ? "database()" : literal(schema)} and table_name = ?) as place`,
    values: [`${prefix}meta`],
  }),
  json: "?",
  name: (text) => Buffer.from(text),
  bucket: (expression) => `conv(left(sha2(convert(${expression} using utf8mb4), 256), 2), 16, 10)`,
  // Its optimizer reads an index from its start for a comparison of rows.
  after({ scope, key }) {
    const [first, second] = [Buffer.from(scope), Buffer.from(key)];
    return { condition: `(scope > ? or (scope = ? and "key" > ?))`, values: [first, first, second] };
  },
  lazyValues: false,
  messages: (run, select) => run(select),
  among: inPortions,
  // With values(): the newer alias is not known to MariaDB.
  replace: ` on duplicate key update ${
    [...EFFECT_COLUMNS, "token"].map((column) => `${column} = values(${column})`).join(", ")
  }`,
  literal,
  // By one search for each: for several conditions its optimizer reads, and locks, all rows of a small table.
  only: (table, keys) => ({
    sql: `(select ? as s, ? as k${" union all select ?, ?".repeat(keys.length - 1)}) w
      straight_join ${table} force index (primary) on scope = w.s and "key" = w.k where true`,
    values: keys.flatMap(({ scope, key }) => [Buffer.from(scope), Buffer.from(key)]),
  }),
  deleteFrom: (table) => `delete ${table} from`,
  latest: " lock in share mode",
  checkText(text) {
    const { length } = [...text];
    if (length <= LONGEST) return;
    throw new RangeError(`Cannot enqueue: MySQL keeps ids, topics and keys of ${LONGEST} characters, not of ${length}`);
  },
  async insertNew(run, sql, values) {
    try {
      await run(sql, values);
      return true;
    } catch (error) {
      if (numbersOf(error).includes(DUPLICATE)) return false;
      throw error;
    }
  },
  async insertAbsent(run, effects, keys, token) {
    // The number of affected rows does not tell: by default drivers have one that was there counted as well.
    const row = `(?, ?, ${token}, ${CLOCK})`;
    const values = keys.flatMap(({ scope, key }) => [Buffer.from(scope), Buffer.from(key)]);
    await run(
      `insert into ${effects} (scope, "key", token, changed_ms) values ${keys.map(() => row).join(", ")}
        on duplicate key update token = token`,
      values,
    );
    const only = dialect.only(effects, keys);
    const rows = await run(`select scope, "key" from ${only.sql} and token = ${token}`, only.values);
    return rows.map((row) => ({ scope: String(row["scope"]), key: String(row["key"]) }));
  },
};

// ------------------------------------------------------------------------------------------------------------ connections

const DUPLICATE = 1062;
const DUPLICATE_COLUMN = 1060;
// Lock wait time-out, deadlock, record changed since the snapshot (MariaDB), no wait.
const ENDED = [1205, 1213, 1020, 3572];
// Too many connections, shut down, read only, gone, lost; the server's own codes for a broken connection.
const AWAY = [1040, 1053, 1203, 1290, 1836, 1927, 4031, 2006, 2013];
const BROKEN = ["PROTOCOL_CONNECTION_LOST", "PROTOCOL_SEQUENCE_TIMEOUT", "ER_CLIENT_INTERACTION_TIMEOUT"];

/** The server's numbers of an error; https://dev.mysql.com/doc/mysql-errors/9.4/en/server-error-reference.html */
const numbersOf = (error: unknown): readonly number[] =>
  [...causesOf(error)].flatMap(({ errno }) => typeof errno === "number" ? [errno] : []);

const network = createNetworkErrors(({ code, message }) =>
  BROKEN.includes(String(code)) || /closed state/.test(String(message))
);

const failures = {
  isBusy: (error: unknown) => numbersOf(error).some((number) => ENDED.includes(number)),
  isAway: (error: unknown) => network.has(error) || numbersOf(error).some((number) => AWAY.includes(number)),
};
// Besides: disk full, table full, out of memory, engine errors.
const OURS = [1021, 1037, 1038, 1041, 1114, 1030, 1180, 1181];
const isDatabaseFailure = (error: unknown): boolean =>
  failures.isAway(error) || failures.isBusy(error) || numbersOf(error).some((number) => OURS.includes(number));

type Taken = Awaited<ReturnType<MysqlPool["getConnection"]>>;

const runOn = (connection: MysqlConnection): Run => async (sql, values = []) => {
  const [rows] = await connection.query({ sql: inlined(sql, values), ...PLAIN });
  return Array.isArray(rows) ? rows as readonly Row[] : [];
};

interface Connection {
  readonly connection: Taken;
  readonly run: Run;
}

/**
 * Remembers the first error of a transaction that ended it, or should: after a deadlock MySQL has rolled back, and what a
 * function goes on to write would commit by itself.
 */
function watch(connection: Taken): { check(): void; unhook(): void } {
  let ended: unknown;
  type Calls = Record<string, (...args: unknown[]) => Promise<unknown>>;
  const target = connection as unknown as Calls;
  const calls: Calls = {};
  for (const name of ["query", "execute"]) {
    const call = target[name];
    if (!call) continue;
    calls[name] = call;
    target[name] = (...args) => {
      if (ended !== undefined) return Promise.reject(ended);
      const answer = call.apply(connection, args);
      answer.then(undefined, (error: unknown) => {
        if (failures.isBusy(error)) ended ??= error;
      });
      return answer;
    };
  }
  return {
    check() {
      if (ended !== undefined) throw ended;
    },
    // Not deleted: an object that has lost a property is slow from then on.
    unhook: () => void Object.assign(target, calls),
  };
}

function createServer<Client>(pool: MysqlPool, options: MysqlOptions): SqlServer<Client> {
  const { name = "mysql", waitMs = 5_000 } = options;
  const tables = tablesOf(options);
  let checked = false;
  async function connected<T>(use: (connection: Connection) => Promise<T>): Promise<T> {
    const connection = await takeWithin(name, waitMs, pool.getConnection(), (connection) => connection.release());
    let broken = false;
    try {
      const run = runOn(connection);
      if (!checked) await checkCharacters(name, run);
      checked = true;
      return await use({ connection, run });
    } catch (error) {
      broken = error instanceof Broken || failures.isAway(error);
      throw error instanceof Broken ? error.cause : error;
    } finally {
      if (broken) connection.destroy();
      else connection.release();
    }
  }
  const seconds = Math.max(1, Math.ceil(waitMs / 1000));
  const limit = `set @effectonce_lock = @@session.innodb_lock_wait_timeout, @effectonce_idle = @@session.wait_timeout,
    session innodb_lock_wait_timeout = ${seconds}, session wait_timeout = 10`;
  const unlimit = "set session innodb_lock_wait_timeout = @effectonce_lock, session wait_timeout = @effectonce_idle";
  const again = <T>(run: () => Promise<T>): Promise<T> => named(name, tables, patiently(name, waitMs, failures, run));
  async function rollback({ run }: Connection, cause: unknown, after?: string): Promise<never> {
    try {
      const ofNetwork = network.has(cause);
      if (ofNetwork || !(cause instanceof Broken || failures.isAway(cause))) {
        await run("rollback");
        if (ofNetwork) network.disown(cause); // Our connection is well.
        if (after) await run(after);
      }
    } catch {
      throw new Broken("rollback failed", { cause });
    }
    throw cause;
  }
  return {
    name,
    dialect,
    tables,
    run: (sql, values) => again(() => connected(({ run }) => run(sql, values))),
    write: (change, first = []) =>
      again(() =>
        connected(async (connection) => {
          const { run } = connection;
          try {
            // A relay that is stopped in here would keep its shard locked.
            await run(limit);
            await run("set transaction isolation level read committed");
            await run("start transaction");
            const answers = [];
            for (const { sql, values } of first) answers.push(await run(sql, values));
            const [row] = await run(`select ${CLOCK} as now_ms`);
            const [clock, since] = [Number(row!["now_ms"]), realRuntime.now()];
            const answer = await change({
              first: answers,
              run,
              later: async (sql, values) => void await run(sql, values),
              now: () => clock + realRuntime.now() - since,
            });
            await run("commit");
            // It is committed, whatever becomes of the connection.
            await run(unlimit).catch(() => connection.connection.destroy());
            return answer;
          } catch (error) {
            return await rollback(connection, error, unlimit);
          }
        })
      ),
    transaction: (run, mayAgain) =>
      again(() =>
        connected(async (connection) => {
          await connection.run("start transaction");
          const { check, unhook } = watch(connection.connection);
          let after: string | undefined;
          const sql = (text: string, values?: readonly SqlValue[]) => {
            if (text === END_SILENCE) after = UNLIMIT_SILENCE;
            return connection.run(text, values);
          };
          try {
            const answer = await run(sql as RunSql, connection.connection as Client);
            check();
            unhook();
            await commit(connection, mayAgain);
            if (after) await connection.run(after).catch(() => connection.connection.destroy());
            return answer;
          } catch (error) {
            unhook();
            return await rollback(connection, error, after);
          }
        })
      ),
    join(open) {
      if (typeof open === "function") {
        const run = open as RunSql;
        return (sql, values) => run(quoted(sql), values);
      }
      return runOn(open as MysqlConnection) as RunSql;
    },
    isDatabaseFailure,
  };

  async function commit({ run }: Connection, mayAgain: () => boolean): Promise<void> {
    try {
      await run("commit");
    } catch (error) {
      if (!failures.isAway(error) || mayAgain()) throw error;
      throw commitUnknown(name, error);
    }
  }
}

/** Rows as objects of plain values, whatever the pool was told. */
const PLAIN = { rowsAsArray: false, nestTables: false, typeCast: (_field: unknown, next: () => unknown) => next() };

async function checkCharacters(name: string, run: Run): Promise<void> {
  const [row] = await run("select @@character_set_results as results, @@autocommit as autocommit");
  if (Number(row!["autocommit"]) !== 1) {
    const why = "its connections do not commit by themselves";
    throw new EffectError("source_invalid", `Cannot use ${name}: ${why}. Let the pool leave autocommit at 1`);
  }
  if (row!["results"] === null || row!["results"] === "utf8mb4") return;
  const why = `its connections are of the character set ${row!["results"]}, and texts would come out changed`;
  throw new EffectError("source_invalid", `Cannot use ${name}: ${why}. Let the pool use utf8mb4, which is its default`);
}

/** Says whose tables are missing, and what to do. */
async function named<T>(name: string, tables: Tables, answer: Promise<T>): Promise<T> {
  try {
    return await answer;
  } catch (error) {
    const [first] = [...causesOf(error)];
    const { errno, message } = first ?? {};
    if (errno === 1146 && String(message).includes(tables.existing?.table ?? tables.prefix)) {
      const missing = `${name} has no effectonce tables of version ${VERSION}: run "init" (or migrateMysql) first`;
      throw new EffectError("schema_missing", missing, { cause: error });
    }
    throw error;
  }
}

// -------------------------------------------------------------------------------------------------------------- the ends

/** Claims and positions in the tables that {@linkcode migrateMysql} made. */
export function mysqlStore<Pool extends MysqlPool>(
  pool: Pool,
  options: MysqlOptions = {},
): EffectStore<MysqlConnectionOf<Pool>> {
  return sqlStore(createServer<MysqlConnectionOf<Pool>>(pool, options));
}

/** The outbox of {@linkcode migrateMysql}, or one that was there before, as a source for the relays and for operators. */
export function mysqlOutbox(pool: MysqlPool, options: MysqlOutboxOptions = {}): ShardedOutbox {
  return sqlOutbox(createServer<never>(pool, options), options);
}

// -------------------------------------------------------------------------------------------------------------- the tables

const STATES = "'pending', 'waiting', 'parked', 'blocked', 'delivered'";
/** Compares byte for byte, trailing blanks as well. */
const COLLATION = { mysql: "utf8mb4_0900_bin", mariadb: "utf8mb4_nopad_bin" } as const;

/** One list a version, forward only. Everything here is a contract with other languages; see the README. */
function migrations(tables: Tables, flavor: MysqlFlavor): readonly (readonly string[])[] {
  const { meta, outbox, effects, shards, batches, positions, relays, members, existing, columns: c } = tables;
  const end = ") engine=InnoDB default character set utf8mb4 collate utf8mb4_bin";
  const create = (table: string) => `create table if not exists ${table}`;
  const ascii = (length: number) => `varchar(${length}) character set ascii collate ascii_bin`;
  // One character more than is taken: what is too long is refused, also where sql_mode would cut it.
  const text = `varchar(${LONGEST + 1}) character set utf8mb4 collate ${COLLATION[flavor]}`;
  const length = (column: string) => `check (char_length(${column}) between 1 and ${LONGEST})`;
  const name = "varbinary(1025) not null";
  const bytes = (column: string) => `check (length(${column}) between 1 and 1024)`;
  const state = `${ascii(9)} not null default 'pending'`;
  const indexes = [
    `key effectonce_pending (${c.state}, ${c.seq})`,
    `key effectonce_topic (${c.state}, ${c.topic}, ${c.seq})`,
    `key effectonce_held (${c.key}, ${c.state}, ${c.seq})`,
    `key effectonce_until (${c.state}, ${c.untilMs})`,
  ];
  const ofOutbox = existing
    ? [
      `alter table ${outbox} ${
        [
          ...existing.seq ? [] : [`${c.seq} bigint not null auto_increment unique`],
          ...existing.createdAt ? [] : [`${c.createdAt} datetime(6) not null default (utc_timestamp(6))`],
          `${c.state} ${state}`,
          `${c.untilMs} bigint not null default 0`,
          `${c.reason} text`,
          ...indexes,
        ].map((what) => `add ${what}`).join(", ")
      }`,
    ]
    : [`${create(outbox)} (
  seq bigint not null auto_increment primary key,
  id ${text} not null default (uuid()) unique ${length("id")},
  topic ${text} not null ${length("topic")},
  "key" ${text} ${length(`"key"`)},
  value longblob,
  headers json not null default ('{}') check (json_valid(headers) and json_type(headers) = 'OBJECT'),
  created_at datetime(6) not null default (utc_timestamp(6)),
  state ${state} check (state in (${STATES})),
  until_ms bigint not null default 0,
  reason text,
  ${indexes.join(",\n  ")}
${end}`];
  return [[
    `${create(meta)} (name ${ascii(64)} primary key, value text character set utf8mb4 collate utf8mb4_bin not null${end}`,
    ...ofOutbox,
    `${create(effects)} (
  scope ${name} ${bytes("scope")},
  "key" ${name} ${bytes(`"key"`)},
  state ${ascii(9)} not null default 'done' check (state in ('claimed', 'waiting', 'done', 'rejected', 'uncertain')),
  fence bigint not null default 1,
  attempt bigint not null default 1,
  generation bigint not null default 1,
  until_ms bigint not null default 0,
  first_ms bigint,
  doubt boolean not null default false,
  fingerprint text,
  request longblob,
  result longtext,
  result_omitted boolean not null default false,
  reason text,
  evidence longtext,
  token bigint,
  changed_ms bigint not null,
  primary key (scope, "key"),
  key effectonce_state (state)
${end}`,
    `${create(shards)} (
  relay ${name} ${bytes("relay")},
  shard integer not null default 0,
  sealed bigint not null default 0,
  sealed_uid ${ascii(64)} not null default '',
  settled bigint not null default 0,
  settled_uid ${ascii(64)} not null default '',
  member ${ascii(36)},
  primary key (relay, shard)
${end}`,
    `${create(batches)} (
  relay ${name},
  shard integer not null default 0,
  n bigint not null,
  uid ${ascii(64)} not null,
  prev ${ascii(64)} not null,
  "rows" longtext not null,
  primary key (relay, shard, n)
${end}`,
    `${create(positions)} (
  relay ${name},
  source ${name},
  n bigint not null,
  uid ${ascii(64)} not null,
  prev ${ascii(64)} not null,
  "rows" longtext not null,
  primary key (relay, source, n)
${end}`,
    `${create(relays)} (
  instance ${ascii(36)} primary key,
  relay ${name},
  protocol ${ascii(16)} not null,
  topics longtext,
  until_ms bigint not null
${end}`,
    `${create(members)} (
  relay ${name},
  member ${ascii(36)} not null,
  until_ms bigint not null,
  primary key (relay, member)
${end}`,
  ]];
}

/** The SQL of the tables, for people who run their own migrations; the last lines insert the version and the identity. */
export function mysqlSchema(flavor: MysqlFlavor, options: TableOptions = {}): string {
  const tables = tablesOf(options);
  const place = dialect.place(tables);
  const statements = [
    ...migrations(tables, flavor).flat(),
    `insert into ${tables.meta} (name, value) values ('schema_version', '${VERSION}')`,
    `insert into ${tables.meta} (name, value) values ('outbox_id', uuid())`,
    `insert into ${tables.meta} (name, value) values ('outbox', '${outboxName(tables)}')`,
    `insert into ${tables.meta} (name, value) values ('place', (${inlined(place.sql, place.values)}))`,
  ];
  return statements.map((sql) => `${quoted(sql)};\n`).join("");
}

/**
 * Creates or upgrades the tables. Repeating it is harmless, also by two processes at once.
 *
 * @throws {EffectError} `schema_newer` if the tables are of a newer version than this package.
 */
export async function migrateMysql(pool: MysqlPool, options: MysqlMigration = {}): Promise<void> {
  const { name = "mysql", waitMs = 5_000 } = options;
  const server = createServer<never>(pool, options);
  const { tables, write } = server;
  const connection = await takeWithin(name, waitMs, pool.getConnection(), (connection) => connection.release());
  const run = runOn(connection);
  try {
    // Its statements commit by themselves, so no transaction keeps two of these apart. The lock is this connection's.
    const lock = `effectonce ${tables.prefix}`.slice(0, 60);
    const [got] = await run("select get_lock(?, 60) as got", [lock]);
    if (Number(got!["got"]) !== 1) throw new EffectError("busy", `${name} is being migrated by another process`);
    try {
      await migrate();
    } finally {
      await run("select release_lock(?)", [lock]);
    }
  } finally {
    connection.release();
  }
  const { shards, accept = false } = options;
  await write(({ run }) => notePlace(server, run));
  if (accept) await write(({ run }) => acceptPlace(server, run));
  if (shards === undefined) return;
  const alone = [{ sql: `select value from ${tables.meta} where name = 'outbox_id' for update`, values: [] }];
  await write((transaction) => setShards(name, tables, transaction, shards), alone);

  async function migrate(): Promise<void> {
    const schema = tables.schema === undefined ? "database()" : literal(tables.schema);
    const [has] = await run(
      `select count(*) as n from information_schema.tables where table_schema = ${schema} and table_name = ?`,
      [`${tables.prefix}meta`],
    );
    const [stored] = Number(has!["n"]) === 0
      ? []
      : await run(`select value from ${tables.meta} where name = 'schema_version'`);
    const version = Number(stored?.["value"] ?? 0);
    if (version > VERSION) checkVersion(name, version);
    const [outbox] = version === 0 ? [] : await run(`select value from ${tables.meta} where name = 'outbox'`);
    checkOutbox(name, tables, outbox && String(outbox["value"]));
    const [server] = await run("select version() as version");
    const flavor = /mariadb/i.test(String(server!["version"])) ? "mariadb" : "mysql";
    for (const statement of migrations(tables, flavor).slice(version).flat()) {
      // One ALTER adds all columns of an outbox that was there: if it has one, a migration that was broken off did it.
      await run(statement).catch((error) => {
        if (!numbersOf(error).includes(DUPLICATE_COLUMN)) throw error;
      });
    }
    const insert = `insert into ${tables.meta} (name, value) values (?, ?) on duplicate key update value = `;
    await run(`${insert} value`, ["outbox_id", crypto.randomUUID()]);
    await run(`${insert} value`, ["outbox", outboxName(tables)]);
    await run(`${insert} values(value)`, ["schema_version", String(VERSION)]); // Last: what was broken off is repeated.
  }
}
