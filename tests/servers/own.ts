/** Servers of a test's own, which it kills and starts again. */
import { connect } from "../crash_servers_child.ts";
import { type Kind, type Server, startMariadb, startMysql, startPostgres } from "../services/servers.ts";

/** Starts a server. */
export const START: Readonly<Record<Kind, () => Promise<Server>>> = {
  postgres: startPostgres,
  mariadb: startMariadb,
  mysql: startMysql,
};

/** A database on a server of a test's own. */
export async function databaseOn(kind: Kind, server: Server): Promise<{ readonly url: string } & AsyncDisposable> {
  await using operator = connect(kind, server.url);
  await operator.sql("create database app");
  const url = new URL(server.url);
  url.pathname = "/app";
  return { url: url.href, async [Symbol.asyncDispose]() {} }; // It goes with its server.
}
