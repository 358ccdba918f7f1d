/** Runs all suites in Bun, with its own SQLite; the last line of output is the outcome as JSON. */
import { Database } from "bun:sqlite";
import process from "node:process";
import { runCore } from "./suite.ts";
import { runSqlite } from "./suite_sqlite.ts";

const outcomes = {
  ...await runCore(process.argv[2]),
  ...await runSqlite("bun:sqlite", (path) => new Database(path)),
};
console.log(JSON.stringify({ runtime: `bun ${process.versions.bun}`, outcomes }));
