/**
 * The command `prune`: what is old enough to be forgotten.
 *
 * @module
 */
import type { Outbox, PruneOptions } from "../mod.ts";
import { type Command, JSON_OUT, STORE } from "./command.ts";
import { relaysOf } from "./config.ts";
import type { Database } from "./database.ts";
import { UsageError } from "./errors.ts";
import type { Flag, Flags } from "./flags.ts";
import { openDatabase } from "./open.ts";
import { print } from "./print.ts";
import { RELAY_FLAGS } from "./relay_flags.ts";

const OUTBOX: Flag = { kind: "url", help: "the outbox, where it is not in the store's database: what is in it is kept" };

interface Pruned {
  readonly database: Database;
  /** Whether claims are here. */
  claims: boolean;
  /** Whether a relay's outbox is here. */
  messages: boolean;
  /** Outboxes elsewhere whose messages have their claims here. */
  readonly outboxes: Outbox[];
}

/** The databases of relays, each once however its URL is written: what one knows to be needed, another must not forget. */
async function databasesOf(relays: readonly Flags[], closing: AsyncDisposableStack): Promise<readonly Pruned[]> {
  const opened = new Map<string, Pruned>();
  const open = async (flags: Flags, flag: string) => {
    const database = await openDatabase(flags.label(flag), flags.url(flag)!);
    closing.defer(() => database.close());
    const identity = await database.identity();
    const found = opened.get(identity) ?? { database, claims: false, messages: false, outboxes: [] };
    opened.set(identity, found);
    return found;
  };
  for (const flags of relays) {
    const from = await open(flags, "from");
    const store = flags.has("store") ? await open(flags, "store") : from;
    from.messages = true;
    store.claims = true;
    if (from !== store) store.outboxes.push(from.database.outbox({}));
  }
  return [...opened.values()];
}

/** The database of `--store`; the outbox of `--from` is only looked into. */
async function databaseOf(flags: Flags, closing: AsyncDisposableStack): Promise<readonly Pruned[]> {
  const open = async (flag: string) => {
    const database = await openDatabase(flags.label(flag), flags.url(flag)!);
    closing.defer(() => database.close());
    return database;
  };
  flags.given("store");
  const database = await open("store");
  const outboxes = flags.has("from") ? [(await open("from")).outbox({})] : [];
  return [{ database, claims: true, messages: true, outboxes }];
}

async function all(prune: (options: PruneOptions) => Promise<number>, options: PruneOptions): Promise<number> {
  let total = 0;
  for (let n = 1; n > 0; total += n) n = await prune(options);
  return total;
}

/** The command `prune`. */
export const PRUNE: Command = {
  summary: "forget effects that ended, and kept rows, when they are old",
  flags: {
    store: STORE,
    from: OUTBOX,
    config: { ...RELAY_FLAGS.config!, help: "prune the databases of all relays of this JSON file instead" },
    "older-than-ms": {
      kind: "number",
      max: Number.MAX_SAFE_INTEGER,
      default: 7 * 86_400_000,
      help: "their age: longer than a message can come again",
    },
    json: JSON_OUT,
  },
  example: "prune --store sqlite:app.db --older-than-ms 2592000000",
  async run(flags) {
    await using closing = new AsyncDisposableStack();
    for (const flag of ["store", "from"]) {
      if (!flags.has("config") || flags.layer.get(flag)?.source !== "flag") continue;
      throw new UsageError(`${flags.label("config")} names the databases: it excludes ${flags.label(flag)}`);
    }
    const databases = flags.has("config") ? await databasesOf(relaysOf(flags), closing) : await databaseOf(flags, closing);
    const olderThanMs = flags.number("older-than-ms")!;
    const pruned = { effects: 0, messages: 0 };
    for (const { database, claims, messages, outboxes } of databases) {
      if (claims) pruned.effects += await all(database.store.prune, { olderThanMs, outboxes });
      if (messages) pruned.messages += await all(database.outbox({}).prune, { olderThanMs });
    }
    print(flags, pruned, `pruned ${pruned.effects} effects and ${pruned.messages} messages`);
    return 0;
  },
};
