/**
 * The command `prune`: what is old enough to be forgotten.
 *
 * @module
 */
import type { Outbox, PruneOptions } from "../mod.ts";
import { type Command, JSON_OUT, STORE } from "./command.ts";
import { relaysOf } from "./config.ts";
import type { Flag, Flags } from "./flags.ts";
import { type Database, openDatabase } from "./open.ts";
import { print } from "./print.ts";
import { RELAY_FLAGS } from "./relay_flags.ts";

const OUTBOX: Flag = { kind: "url", help: "the outbox, where it is not in the store's database: what is in it is kept" };

/** The databases of relays, each opened once, and for each with claims the outboxes elsewhere whose messages it knows. */
async function databasesOf(relays: readonly Flags[], closing: DisposableStack) {
  const opened = new Map<string, { readonly database: Database; readonly outboxes: Set<Outbox> }>();
  const open = async (flags: Flags, flag: string) => {
    const url = flags.url(flag)!;
    let found = opened.get(url);
    if (!found) {
      const database = await openDatabase(flags.label(flag), url);
      closing.defer(() => database.close());
      opened.set(url, found = { database, outboxes: new Set() });
    }
    return found;
  };
  for (const flags of relays) {
    const from = flags.has("from") ? await open(flags, "from") : undefined;
    const store = flags.has("store") ? await open(flags, "store") : undefined;
    if (from && store && from !== store) store.outboxes.add(from.database.outbox({}));
  }
  return [...opened.values()];
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
    using closing = new DisposableStack();
    const databases = await databasesOf(relaysOf(flags), closing);
    const olderThanMs = flags.number("older-than-ms")!;
    const pruned = { effects: 0, messages: 0 };
    for (const { database, outboxes } of databases) {
      pruned.effects += await all(database.store.prune, { olderThanMs, outboxes: [...outboxes] });
      pruned.messages += await all(database.outbox({}).prune, { olderThanMs });
    }
    print(flags, pruned, `pruned ${pruned.effects} effects and ${pruned.messages} messages`);
    return 0;
  },
};
