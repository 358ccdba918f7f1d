/**
 * Makes and drops databases on a server.
 *
 * @module
 */
import mysql from "mysql2/promise";
// @ts-types="@types/pg"
import pg from "pg";
import type { Kind } from "./servers.ts";

/** Who may make databases on a server. Names are taken as they are: not from outside. */
export interface Administrator {
  create(name: string): Promise<void>;
  /** Drops a database, whoever still uses it. */
  drop(name: string): Promise<void>;
}

/** How many connections an administrator has at most. */
const CONNECTIONS = 4;

function administerPostgres(url: string): Administrator {
  const pool = new pg.Pool({ connectionString: url, max: CONNECTIONS });
  pool.on("error", () => {}); // The server has gone: the next query says so.
  return {
    async create(name) {
      // Nobody can be connected to template0, so it can always be copied.
      await pool.query(`create database ${name} template template0 encoding 'UTF8'`);
    },
    async drop(name) {
      // `force` ends sessions, but a database whose changes somebody is reading is refused all the same.
      const readers = `select pg_terminate_backend(active_pid, 5000) from pg_replication_slots
        where database = $1 and active_pid is not null`;
      await pool.query(readers, [name]);
      await pool.query(`drop database if exists ${name} with (force)`);
    },
  };
}

function administerMysql(url: string): Administrator {
  const pool = mysql.createPool({ uri: url, connectionLimit: CONNECTIONS });
  return {
    async create(name) {
      await pool.query(`create database ${name}`);
    },
    async drop(name) {
      // A transaction that a test has left open would have the drop wait for ever.
      const users = "select id from information_schema.processlist where db = ?";
      const [rows] = await pool.query<mysql.RowDataPacket[]>(users, [name]);
      for (const { id } of rows) await pool.query("kill ?", [id]).catch(() => {}); // It may have gone by itself.
      await pool.query(`drop database if exists ${name}`);
    },
  };
}

/** Opens a few connections to a server, which stay open. */
export function administer(kind: Kind, url: string): Administrator {
  return kind === "postgres" ? administerPostgres(url) : administerMysql(url);
}
