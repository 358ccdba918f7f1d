/** Runs all suites in Node, with both of its SQLite drivers; the last line of output is the outcome as JSON. */
import Database from "better-sqlite3";
import process from "node:process";
import { DatabaseSync } from "node:sqlite";
import { runCore } from "./suite.ts";
import { runSqlite } from "./suite_sqlite.ts";

const outcomes = {
  ...await runCore(process.argv[2]),
  ...await runSqlite("node:sqlite", (path) => new DatabaseSync(path)),
  ...await runSqlite("better-sqlite3", (path) => new Database(path, { timeout: 0 })),
};
console.log(JSON.stringify({ runtime: `node ${process.versions.node}`, outcomes }));
