/**
 * What a relay is between: its flags taken together, its target, its databases.
 *
 * @module
 */
import type { Outbox } from "../mod.ts";
import type { Database } from "./database.ts";
import { reason, UsageError } from "./errors.ts";
import type { Flags } from "./flags.ts";
import { shellUrl } from "./mask.ts";
import { openDatabase, openSink } from "./open.ts";

/** A relay whose flags make sense together; nothing is open yet. */
export interface Plan {
  /** Its name. */
  readonly name: string;
  /** Its flags. */
  readonly flags: Flags;
  /** Its target. */
  readonly sink: ReturnType<typeof openSink>;
}

/** @throws {UsageError} If they do not. */
export function planOf(flags: Flags): Plan {
  const [min, max] = [flags.number("min-retry-ms")!, flags.number("max-retry-ms")!];
  if (min > max) {
    throw new UsageError(`${flags.label("min-retry-ms")} must be at most ${flags.label("max-retry-ms")}, which is ${max}`);
  }
  const sink = openSink(flags);
  const repeats = sink.kind === "call" && sink.repeat === "same-key";
  for (const other of [...flags.has("store") ? ["store"] : [], ...repeats ? ["idempotent"] : []]) {
    if (!flags.on("allow-duplicates")) continue;
    throw new UsageError(`${flags.label("allow-duplicates")} makes no claims: it excludes ${flags.label(other)}`);
  }
  return { name: flags.text("name")!, flags, sink };
}

/** Where a relay's messages and claims are, open. */
export interface Ends {
  /** Its outbox. */
  readonly source: Outbox;
  /** The store of its claims. */
  readonly store: Database["store"];
  /** The database of its outbox, and that of its claims if it is another one. */
  readonly databases: readonly Database[];
  /** The flags with which `effects` finds them, without secrets. */
  readonly advice: string;
}

/**
 * Opens the databases of a relay, each on connections of its own, and has them closed at the end.
 *
 * @param mayBeAway Whether their servers may be away: the relay waits for them.
 */
export async function openEnds(flags: Flags, closing: AsyncDisposableStack, mayBeAway = false): Promise<Ends> {
  const databases: Database[] = [];
  const open = async (name: "from" | "store") => {
    const database = await openDatabase(flags.label(name), flags.url(name)!, { mayBeAway });
    closing.defer(() => database.close());
    // A store that is not one should not be found out only with the first message.
    if (!database.away) await database.store.list({ limit: 1 });
    databases.push(database);
    return database;
  };
  const from = await open("from");
  const apart = flags.has("store") && flags.url("store") !== flags.url("from");
  const store = apart ? await open("store") : from;
  const outbox = shellUrl(flags.text("from")!);
  return {
    source: from.outbox({ topics: flags.names("topics"), keep: flags.on("keep") }),
    store: store.store,
    databases,
    advice: apart ? `--store ${shellUrl(flags.text("store")!)} --from ${outbox}` : `--store ${outbox}`,
  };
}

/** Says which one of several relays has failed. */
export async function blaming<T>(relays: readonly unknown[], name: string, run: () => Promise<T>): Promise<T> {
  try {
    return await run();
  } catch (error) {
    // A wrong value has its place in its sentence.
    if (relays.length === 1 || error instanceof UsageError) throw error;
    throw new Error(`relay "${name}": ${reason(error)}`, { cause: error });
  }
}
