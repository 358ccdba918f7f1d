/**
 * Real servers for tests, benchmarks and demos, each started as a private instance in a temporary folder or a container, on
 * 127.0.0.1 and a free port. Who only needs one asks `./mod.ts`, which shares it between test files; who kills, stops or
 * restores one starts its own here.
 *
 * @module
 */
import mysql from "mysql2/promise";
// @ts-types="@types/pg"
import pg from "pg";
import { bring, CACHE, type Command, install, type Origin, run, whereIs } from "./install.ts";
import { freePort, type Recipe, serve, type Server } from "./process.ts";

export type { Server };

/** A server's own settings, by name, such as `max_connections`. */
export type Settings = Readonly<Record<string, string>>;

/** A kind of database server. */
export type Kind = "postgres" | "mariadb" | "mysql";

/** How a program that comes with a server is called, by its name. */
type Programs = (name: string) => Command;

/** Such as on PATH, where not all of Debian's users have it. */
const SYSTEM = "/usr/sbin";

function programsIn(...folders: readonly string[]): Programs {
  return (name) => {
    const path = whereIs(name, ...folders);
    if (path === undefined) throw new Error(`${name} is missing, though its server is there`);
    return [path];
  };
}

/** Where Debian puts PostgreSQL, which is on nobody's PATH: the newest first. */
function postgresFolders(): readonly string[] {
  try {
    const versions = Array.from(Deno.readDirSync("/usr/lib/postgresql"), ({ name }) => name);
    return versions.sort((a, b) => Number(b) - Number(a)).map((version) => `/usr/lib/postgresql/${version}/bin`);
  } catch {
    return [];
  }
}

/**
 * A Debian of its own, since MySQL is in the unstable branch only, and in conflict with MariaDB. It comes here whole, by a rename.
 * The number grows when what is in it changes: an older tree may have servers that run.
 */
const MYSQL_TREE = `${CACHE}/mysql-2`;
const MYSQL_PACKAGES = ["mysql-server-core", "mysql-client-core"];

async function isMysql(path: string): Promise<boolean> {
  return !(await run([path, "--version"])).includes("MariaDB");
}

async function unpackMysql(): Promise<void> {
  const packages = ["debootstrap", "debian-archive-keyring"];
  if (!whereIs("debootstrap", SYSTEM)) await install(packages);
  // What interrupted runs have left.
  for await (const { name } of Deno.readDir(CACHE)) {
    if (name.startsWith("mysql-new-")) await Deno.remove(`${CACHE}/${name}`, { recursive: true });
  }
  const tree = await Deno.makeTempDir({ dir: CACHE, prefix: "mysql-new-" });
  await run([whereIs("debootstrap", SYSTEM)!, "--variant=minbase", `--include=${MYSQL_PACKAGES.join(",")}`, "sid", tree]);
  await Deno.chmod(tree, 0o755);
  await Deno.rename(tree, MYSQL_TREE);
}

const ORIGINS: Readonly<Record<Kind, Origin<Programs> & { readonly image: string }>> = {
  postgres: {
    what: "PostgreSQL",
    variable: "EFFECTONCE_POSTGRES_URL",
    packages: ["postgresql"],
    image: "postgres:17",
    find: () => whereIs("initdb", ...postgresFolders()) ? programsIn(...postgresFolders()) : undefined,
  },
  mariadb: {
    what: "MariaDB",
    variable: "EFFECTONCE_MARIADB_URL",
    packages: ["mariadb-server"],
    image: "mariadb:11",
    find: () => whereIs("mariadbd", SYSTEM) ? programsIn(SYSTEM) : undefined,
  },
  mysql: {
    what: "MySQL",
    variable: "EFFECTONCE_MYSQL_URL",
    packages: MYSQL_PACKAGES,
    image: "mysql:9",
    async find() {
      const own = whereIs("mysqld", SYSTEM);
      if (own !== undefined && await isMysql(own)) return programsIn(SYSTEM);
      if (await Deno.stat(MYSQL_TREE).catch(() => undefined)) return (name) => ["chroot", MYSQL_TREE, name];
    },
    fetch: unpackMysql,
    rootOnly: true,
  },
};

/**
 * How to call a program that comes with a server, such as `pg_dump`, `psql`, `mariadb-dump`, `mysqldump` or `mysql`. It may run
 * in another tree of files or in a container: give it stdin and stdout, and no paths.
 */
export async function tool(kind: Kind, name: string): Promise<Command> {
  const origin = ORIGINS[kind];
  const programs = await bring(origin);
  return programs?.(name) ?? ["docker", "run", "--rm", "--interactive", "--network=host", origin.image, name];
}

/**
 * A folder that a server may write to. Not in /tmp, which is memory on many systems: there is little of it, and a commit that
 * goes nowhere proves nothing.
 */
export async function dataFolder(kind: string, dir = Deno.env.get("TMPDIR") ?? "/var/tmp"): Promise<string> {
  const folder = await Deno.makeTempDir({ dir, prefix: `effectonce-${kind}-` });
  if (Deno.uid() === 0) await run(["chown", "nobody:nogroup", folder]);
  return folder;
}

/** Runs as somebody who is not root, whom these servers refuse. */
const asNobody = (command: Command): Command =>
  Deno.uid() === 0 ? ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", ...command] : command;

/** What runs a server in a container; exported for the test, which has no Docker. */
export async function contained(
  kind: Kind,
  port: number,
  innerPort: number,
  env: Readonly<Record<string, string>>,
  args: readonly string[],
): Promise<Pick<Recipe, "container" | "folder" | "prepare" | "command">> {
  const { image } = ORIGINS[kind];
  const folder = await dataFolder(kind);
  const container = folder.slice(folder.lastIndexOf("/") + 1);
  const variables = Object.entries(env).flatMap(([name, value]) => ["--env", `${name}=${value}`]);
  return {
    container,
    folder,
    // Apart from the start, which has a deadline.
    prepare: [["sh", "-c", 'docker image inspect "$1" >/dev/null || docker pull --quiet "$1"', "sh", image]],
    // Not detached, for the log; and no --rm, which would take the data away when it is stopped.
    command: [
      ...["docker", "run", "--name", container, "--sig-proxy=false", "--publish", `127.0.0.1:${port}:${innerPort}`] as const,
      ...variables,
      image,
      ...args,
    ],
  };
}

async function probePostgres(url: string): Promise<string> {
  const client = new pg.Client({ connectionString: url, connectionTimeoutMillis: 5_000 });
  client.on("error", () => {}); // It also rejects what is under way.
  await client.connect();
  try {
    return (await client.query<{ server_version: string }>("show server_version")).rows[0]!.server_version;
  } finally {
    await client.end();
  }
}

/** Starts PostgreSQL. */
export async function startPostgres(settings: Settings = {}): Promise<Server> {
  const programs = await bring(ORIGINS.postgres);
  const port = freePort();
  const url = `postgres://postgres@127.0.0.1:${port}/postgres`;
  const options = Object.entries({
    wal_level: "logical",
    max_replication_slots: "20",
    max_wal_senders: "20",
    max_connections: "200",
    max_prepared_transactions: "20",
    ...settings,
  }).flatMap(([name, value]) => ["-c", `${name}=${value}`]);
  const common = {
    name: "PostgreSQL",
    url,
    probe: () => probePostgres(url),
    stopSignal: "SIGINT", // Fast: ends sessions, and does not wait for them.
    discardSignal: "SIGQUIT", // Immediate; SIGKILL would leave shared memory behind.
  } as const;
  if (!programs) {
    return await serve({
      ...common,
      ...await contained("postgres", port, 5432, { POSTGRES_HOST_AUTH_METHOD: "trust" }, options),
    });
  }
  const folder = await dataFolder("postgres");
  const initdb = [...programs("initdb"), "-D", `${folder}/data`, "-A", "trust", "-U", "postgres"] as const;
  return await serve({
    ...common,
    folder,
    prepare: [asNobody([...initdb, "--encoding=UTF8", "--locale=C.UTF-8", "--no-sync"])],
    command: asNobody([
      ...[...programs("postgres"), "-D", `${folder}/data`, "-h", "127.0.0.1", "-p", String(port), "-k", folder] as const,
      ...options,
    ]),
  });
}

async function probeMysql(url: string): Promise<string> {
  const connection = await mysql.createConnection({ uri: url, connectTimeout: 5_000 });
  try {
    const [rows] = await connection.query<mysql.RowDataPacket[]>("select version() as version");
    return rows[0]!.version;
  } finally {
    await connection.end();
  }
}

const mysqlOptions = (settings: Settings): readonly string[] =>
  Object.entries(settings).map(([name, value]) => `--${name.replaceAll("_", "-")}=${value}`);

/** Starts MariaDB. */
export async function startMariadb(settings: Settings = {}): Promise<Server> {
  const programs = await bring(ORIGINS.mariadb);
  const port = freePort();
  const url = `mysql://root@127.0.0.1:${port}/mysql`;
  const options = [
    ...["--log-bin", "--binlog-format=ROW", "--server-id=1", "--sync-binlog=1"],
    ...mysqlOptions({ max_connections: "400", ...settings }),
  ];
  const common = {
    name: "MariaDB",
    url,
    probe: () => probeMysql(url),
    stopSignal: "SIGTERM",
    discardSignal: "SIGKILL",
  } as const;
  if (!programs) {
    return await serve({
      ...common,
      ...await contained("mariadb", port, 3306, { MARIADB_ALLOW_EMPTY_ROOT_PASSWORD: "1" }, options),
    });
  }
  const folder = await dataFolder("mariadb");
  const data = ["--no-defaults", `--datadir=${folder}/data`];
  const prepare = [...programs("mariadb-install-db"), ...data, "--auth-root-authentication-method=normal"] as const;
  return await serve({
    ...common,
    folder,
    prepare: [asNobody([...prepare, "--skip-name-resolve"])],
    command: asNobody([
      ...[
        ...programs("mariadbd"),
        ...data,
        `--socket=${folder}/m.sock`,
        "--bind-address=127.0.0.1",
        `--port=${port}`,
      ] as const,
      ...options,
    ]),
  });
}

/** Starts MySQL. */
export async function startMysql(settings: Settings = {}): Promise<Server> {
  const programs = await bring(ORIGINS.mysql);
  const port = freePort();
  const url = `mysql://root@127.0.0.1:${port}/mysql`;
  const options = [
    ...["--mysqlx=OFF", "--secure-file-priv=", "--log-bin", "--gtid-mode=ON", "--enforce-gtid-consistency", "--server-id=2"],
    ...mysqlOptions({ max_connections: "400", ...settings }),
  ];
  const common = {
    name: "MySQL",
    url,
    probe: () => probeMysql(url),
    stopSignal: "SIGTERM",
    discardSignal: "SIGKILL",
  } as const;
  if (!programs) {
    return await serve({ ...common, ...await contained("mysql", port, 3306, { MYSQL_ALLOW_EMPTY_PASSWORD: "1" }, options) });
  }
  const mysqld = programs("mysqld");
  // In the tree it is root who runs it, and the data are in the tree too.
  const inTree = mysqld[0] === "chroot";
  const folder = await dataFolder("mysql", inTree ? `${MYSQL_TREE}/var/tmp` : undefined);
  const inside = inTree ? folder.slice(MYSQL_TREE.length) : folder;
  const base = [...mysqld, "--no-defaults", `--datadir=${inside}/data`, ...(inTree ? ["--user=root"] : [])] as const;
  const command = inTree ? base : asNobody(base);
  return await serve({
    ...common,
    folder,
    prepare: [[...command, "--initialize-insecure"]],
    command: [...command, `--port=${port}`, "--bind-address=127.0.0.1", `--socket=${inside}/m.sock`, ...options],
  });
}

/**
 * Starts PgBouncer in front of a PostgreSQL, in transaction mode. All databases of the server are behind it, whoever asks as the
 * user of `postgresUrl`.
 */
export async function startPgbouncer(postgresUrl: string, settings: Settings = {}): Promise<Server> {
  const find = () => whereIs("pgbouncer", SYSTEM);
  const program = await bring({ what: "PgBouncer", packages: ["pgbouncer"], find });
  const port = freePort();
  const { hostname, port: behind, username, password, pathname } = new URL(postgresUrl);
  const url = `postgres://${username}@127.0.0.1:${port}${pathname}`;
  const folder = await dataFolder("pgbouncer");
  const target = { host: hostname, port: behind || "5432", user: username, ...(password ? { password } : {}) };
  const lines = Object.entries({
    listen_addr: "127.0.0.1",
    listen_port: String(port),
    unix_socket_dir: "",
    pool_mode: "transaction",
    auth_type: "any",
    max_client_conn: "500",
    ...settings,
  }).map(([name, value]) => `${name} = ${value}`);
  const to = Object.entries(target).map(([name, value]) => `${name}=${decodeURIComponent(value)}`).join(" ");
  await Deno.writeTextFile(`${folder}/pgbouncer.ini`, ["[databases]", `* = ${to}`, "[pgbouncer]", ...lines, ""].join("\n"));
  return await serve({
    name: "PgBouncer",
    url,
    folder,
    probe: () => probePostgres(url),
    prepare: [],
    command: asNobody([program!, `${folder}/pgbouncer.ini`]),
    stopSignal: "SIGKILL", // It keeps nothing, and the signals that end it in order mean other things from version to version.
    discardSignal: "SIGKILL",
  });
}
