/**
 * Opens databases on PostgreSQL, by `npm:pg`.
 *
 * @module
 */
import {
  migratePostgres,
  type PostgresClient,
  postgresOutbox,
  type PostgresPool,
  postgresSchema,
  postgresStore,
} from "../adapters/postgres.ts";
import { type Tables, tablesOf, VERSION } from "../adapters/sql.ts";
import type { Check, Database, OpenOptions } from "./database.ts";
import { reason, UsageError } from "./errors.ts";
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
import { choice, parts } from "./url.ts";
import { dereference } from "./variables.ts";

const SCHEME: ServerScheme = {
  scheme: "postgres",
  port: 5432,
  parameters: ["listen", "listen-url"],
  users: ["PGUSER", "USER"],
};
/** What pg reads whatever it is told; all else it is told. */
const VARIABLES = ["PGBINARY", "PGOPTIONS", "PGREPLICATION"];

interface OpenPool extends PostgresPool {
  connect(): Promise<OpenClient>;
  on(event: "error", listener: () => void): unknown;
  end(): Promise<void>;
}

type OpenClient = PostgresClient & {
  release(destroy?: boolean): void;
  on(event: "notification", listener: (message: { readonly channel: string }) => void): unknown;
};

/** The SQL of the tables. */
export function postgresSchemaOf(label: string, url: string): string {
  return postgresSchema(readTables(label, url, SCHEME.parameters).tables);
}

async function makePool({ host, port, user, password, database, tls }: ServerUrl, max: number): Promise<OpenPool> {
  const specifier = "npm:pg@^8.16.0"; // Computed, so that only its users install it.
  const { default: pg } = await import(specifier) as { default: { Pool: new (options: unknown) => OpenPool } };
  const pool = new pg.Pool({
    host,
    port,
    user,
    password: () => password, // If it is empty as well: it would look into PGPASSWORD and ~/.pgpass.
    database,
    ssl: tls ? { rejectUnauthorized: tls.verify, ca: tls.ca } : false,
    sslnegotiation: "postgres",
    client_encoding: "UTF8",
    application_name: "effectonce",
    max,
    connectionTimeoutMillis: CONNECT_MS,
    keepAlive: true,
    keepAliveInitialDelayMillis: 10_000,
  });
  pool.on("error", () => {}); // Of one that nobody uses: it has left the pool.
  return pool;
}

/** Says it in words, as errors of the driver end in the terminal and in the log. */
function explaining(pool: OpenPool, name: string): OpenPool {
  return {
    connect: () =>
      pool.connect().catch((error: unknown) => {
        throw cannotOpen(name, error, failure(error));
      }),
    on: (event, listener) => pool.on(event, listener),
    end: () => pool.end(),
  };
}

const failure = (error: unknown): Failure =>
  failureOf(error, (code, message) => {
    const said = (why: string, away = false) => ({ why, away });
    if (/^SASL: .*password must be/.test(message)) return said("it asks for a password, and the URL has none");
    if (/does not support SSL/.test(message)) return said("the server is not set up for TLS: leave sslmode out");
    if (/^timeout exceeded when trying to connect/.test(message)) {
      return said("all connections of its pool are in use", true);
    }
    switch (code) {
      case "28P01":
        return said(`${message}: check user and password`);
      case "28000":
        return said(message + (/no encryption/.test(message) ? ": it may want sslmode=require" : ""));
      case "3D000":
        return said(`${message}: create it first`);
      case "53300":
      case "57P01":
      case "57P02":
      case "57P03":
        return said(message, true);
    }
  });

/** Opens one. */
export async function openPostgres(label: string, url: string, { mayBeAway = false }: OpenOptions): Promise<Database> {
  const server = readServer(label, url, SCHEME);
  const { name, tables } = server;
  const direct = directUrl(label, server);
  const variables = VARIABLES.map((variable) => ({ name: "env", variable }) as const);
  need(`Opening ${name}`, server.net, ...direct && direct.net.host !== server.net.host ? [direct.net] : [], ...variables);
  const pools: OpenPool[] = [];
  const make = async (to: ServerUrl, max: number) => {
    const pool = await makePool(to, max);
    pools.push(pool);
    return pool;
  };
  const end = () => endWithin(1_000, pools.map((pool) => pool.end()));
  try {
    const first = await make(server, server.pool);
    // Beside the others: one is held for as long as a relay runs, or a shard of it. Nothing connects before that.
    const second = direct && await make(direct, 256);
    const away = await reach(name, mayBeAway, async () => (await first.connect()).release(), failure);
    const pool = explaining(first, name);
    const listen = second && explaining(second, direct.name);
    const known = tablesOf(tables);
    const options = { ...tables, name, waitMs: WAIT_MS };
    const rows = async (sql: string, values: unknown[] = []) => {
      const client = await pool.connect();
      try {
        return (await client.query(sql, values)).rows as Readonly<Record<string, unknown>>[];
      } finally {
        client.release();
      }
    };
    return {
      name,
      identity: () => identityOf(rows, known, name),
      away,
      store: postgresStore(pool, options),
      outbox: (outbox) => postgresOutbox(pool, { ...options, ...outbox, ...listen && { listen } }),
      migrate: ({ notify, shards } = {}) =>
        makeTables(name, known, () => migratePostgres(pool, { ...options, notify, shards }), () => rows(columnsOf(known))),
      accept: async () => migratePostgres(pool, { ...options, accept: true, notify: await notifies(rows, known) }),
      checks: () => checksOf(name, known, rows, listen),
      close: end,
    };
  } catch (error) {
    await end();
    throw error;
  }
}

/** Where to listen: at the same place, or past a pooler; undefined if not at all. */
function directUrl(label: string, server: ServerUrl): ServerUrl | undefined {
  const listen = choice(label, server.read, "listen", ["on", "off"]) ?? "on";
  const other = server.read.parameters.get("listen-url");
  if (other === null) return listen === "on" ? server : undefined;
  if (listen === "off") throw new UsageError(`${label}: listen-url and listen=off exclude each other`);
  const place = `${label}: listen-url`;
  const url = dereference(place, other);
  const { scheme, parameters } = parts(place, url);
  if (scheme !== "postgres" && scheme !== "postgresql") throw new UsageError(`${place} must be a postgres: URL`);
  for (const name of parameters.keys()) {
    if (name === "sslmode" || name === "sslrootcert") continue;
    throw new UsageError(`${place} may have the parameters sslmode and sslrootcert only`);
  }
  return readServer(place, url, SCHEME);
}

type Rows = (sql: string, values?: unknown[]) => Promise<readonly Readonly<Record<string, unknown>>[]>;

async function identityOf(rows: Rows, { meta, outbox }: Tables, name: string): Promise<string> {
  const [row] = await rows(
    `select (select oid from pg_database where datname = current_database())::text as database,
      to_regclass($1)::oid::text as meta, to_regclass($2)::oid::text as outbox`,
    [meta, outbox],
  );
  // Not everybody may read it.
  const system = await rows("select system_identifier::text as system from pg_control_system()").then(
    ([row]) => row!["system"],
    () => name,
  );
  return ["postgres", system, row!["database"], row!["meta"], row!["outbox"]].join(":");
}

/** Whether an INSERT wakes relays. */
async function notifies(rows: Rows, { outbox, prefix }: Tables): Promise<boolean> {
  const sql = "select tgenabled from pg_trigger where tgrelid = to_regclass($1) and tgname = $2";
  const [trigger] = await rows(sql, [outbox, `${prefix}notify`]);
  return trigger !== undefined && trigger["tgenabled"] !== "D";
}

async function checksOf(name: string, tables: Tables, rows: Rows, listen: OpenPool | undefined): Promise<readonly Check[]> {
  const { outbox, columns, existing } = tables;
  const [server] = await rows(
    `select current_setting('server_version') as version, current_setting('server_version_num')::int as number,
      current_setting('fsync') as fsync, current_setting('synchronous_commit') as commit,
      current_setting('full_page_writes') as pages, pg_is_in_recovery() as standby,
      current_setting('transaction_read_only') as read_only,
      current_setting('default_transaction_isolation') as isolation`,
  );
  const { version, number, fsync, commit, pages, standby, read_only: readOnly, isolation } = server!;
  const found = await rows(
    `select t.name, c.relpersistence as persistence from unnest($1::text[]) t (name)
      left join pg_class c on c.oid = to_regclass(t.name) order by t.name`,
    [allTables(tables)],
  );
  const missing = found.filter(({ persistence }) => persistence === null).map(({ name }) => name);
  const volatile = found.filter(({ persistence }) => persistence !== null && persistence !== "p").map(({ name }) => name);
  const lacking = await rows(columnsOf(tables)).then(() => undefined, reason);
  const tablesSay = missing.length > 0 ? `there is no ${missing.join(", no ")} (init --store makes them)` : lacking ??
    (volatile.length > 0 ? `${volatile.join(", ")} would be emptied by a crash: set logged` : `version ${VERSION}`);
  const [sequence] = await rows(
    `select seqcache::int as cache, seqrelid::regclass::text as name from pg_sequence
      where seqrelid = pg_get_serial_sequence($1, $2)::regclass`,
    [outbox, columns.seq.slice(1, -1)],
  ).catch(() => []);
  const wakes = await notifies(rows, tables);
  const [value] = existing
    ? await rows(
      "select format_type(atttypid, null) as type from pg_attribute where attrelid = to_regclass($1) and attname = $2",
      [outbox, existing.value],
    )
    : [];
  const cached = Number(sequence?.["cache"] ?? 1);
  return [
    check(`${name} is a server that effectonce knows`, `PostgreSQL ${version}`, Number(number) >= 130_000),
    check(
      `${name} commits durably`,
      `synchronous_commit = ${commit}, fsync = ${fsync}, full_page_writes = ${pages}`,
      commit !== "off" && fsync === "on" && pages === "on",
    ),
    standby === false && readOnly === "off"
      ? check(`${name} can be written to`, "it is the primary")
      : check(`${name} can be written to`, standby ? "no: it is a standby" : "no: transactions are read-only", false),
    check(`${name} has its tables`, tablesSay, missing.length === 0 && lacking === undefined && volatile.length === 0),
    ...existingChecks(name, existing),
    ...storedCheck(name, existing, value?.["type"], (type) => type === "bytea"),
    sequence
      ? check(
        `${name} numbers messages as they are inserted`,
        `the sequence has CACHE ${cached}` + (cached === 1 ? "" : `: alter sequence ${sequence["name"]} cache 1`),
        cached === 1,
      )
      : check(
        `${name} numbers messages as they are inserted`,
        `${columns.seq} has no sequence: whoever inserts must see to it`,
      ),
    check(
      `${name} wakes relays`,
      wakes
        ? "an INSERT notifies them"
        : "no: relays look every --poll-ms (init --store without --no-notify has an INSERT notify them)",
    ),
    listen && wakes ? await hears(name, rows, listen) : check(
      `${name} is listened to`,
      listen ? "there is nothing to hear" : "no, by listen=off: relays look every --poll-ms",
    ),
    check(
      `${name} isolates transactions of the application`,
      `default_transaction_isolation = ${isolation}; effectonce's own are read committed`,
    ),
  ];
}

/** Whether a notification arrives where relays listen: through a pooler in transaction mode it does not. */
async function hears(name: string, rows: Rows, listen: OpenPool): Promise<Check> {
  const what = `${name} is listened to`;
  const channel = `effectonce_doctor_${crypto.randomUUID()}`;
  let client: OpenClient | undefined;
  let timer: ReturnType<typeof setTimeout> | undefined;
  try {
    client = await listen.connect();
    const heard = Promise.withResolvers<boolean>();
    client.on("notification", (message) => message.channel === channel && heard.resolve(true));
    await client.query(`listen "${channel}"`);
    await rows("select pg_notify($1, '')", [channel]);
    timer = setTimeout(() => heard.resolve(false), 2_000);
    if (await heard.promise) return check(what, "a NOTIFY arrives");
    const how = "listen-url=URL of a connection past it, or listen=off";
    return check(what, `a NOTIFY does not arrive, as behind PgBouncer in transaction mode: ${how}`, false);
  } catch (error) {
    return check(what, reason(error), false);
  } finally {
    clearTimeout(timer);
    client?.release(true);
  }
}
