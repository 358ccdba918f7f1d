/** Bun's SQLite fits by its own types. */
import type { EffectStore } from "@effectonce/effectonce";
import { sqliteStore } from "@effectonce/effectonce/sqlite";
import { Database } from "bun:sqlite";

export const store: EffectStore<Database> = sqliteStore(new Database("app.db"));
