/**
 * What a command consists of, and what most of them have in common.
 *
 * @module
 */
import type { Database, OpenOptions } from "./database.ts";
import type { Flag, Flags, FlagTable } from "./flags.ts";
import { openDatabase } from "./open.ts";

/** One command. */
export interface Command {
  /** What it does, in one line. */
  readonly summary: string;
  /** The words behind it. */
  readonly words?: readonly string[];
  /** Its flags. */
  readonly flags: FlagTable;
  /** A command line that works. */
  readonly example: string;
  /** Answers the exit code. */
  run(flags: Flags): Promise<number>;
}

/** The database that a command is about. */
export const STORE: Flag = {
  kind: "url",
  required: true,
  help: "the database: sqlite:app.db, postgres:…, mysql:…",
};
/** Prints for programs. */
export const JSON_OUT: Flag = { kind: "switch", help: "print JSON" };

/** Opens the database of `--store`, and closes it after the run, which answers an exit code or nothing for 0. */
export async function using(
  flags: Flags,
  run: (database: Database) => Promise<number | void>,
  options: OpenOptions = {},
): Promise<number> {
  flags.given("store");
  const database = await openDatabase(flags.label("store"), flags.url("store")!, options);
  try {
    return await run(database) ?? 0;
  } finally {
    await database.close();
  }
}
