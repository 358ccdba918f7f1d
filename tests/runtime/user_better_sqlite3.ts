/** better-sqlite3 fits by its own types. */
import { sqliteStore } from "@effectonce/effectonce/sqlite";
import Database from "better-sqlite3";

export const store = sqliteStore(new Database("app.db"));
