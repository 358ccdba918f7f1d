/**
 * The commands `relays …`: which relays an outbox knows, and how one of them is given up.
 *
 * @module
 */
import type { RegisteredRelay } from "../mod.ts";
import { type Command, JSON_OUT, STORE, using } from "./command.ts";
import { print } from "./print.ts";

/** What is to be said of relays, a line for all processes of which the same is to be said. */
export function linesOf(relays: readonly RegisteredRelay[]): readonly string[] {
  const lines = relays.map(({ relay, protocol, topics, live, sealed }) => {
    const what = topics ? `topics ${topics.join(", ")}` : "all topics";
    const left = sealed > 0
      ? `${sealed} messages in sealed batches`
      : "messages that are parked, or that it may have called and not settled";
    const how = live ? "runs, or has died within its lease" : `has ended, and left behind: ${left}`;
    return `"${relay}" (${protocol}, ${what}) ${how}`;
  });
  return Array.from(
    Map.groupBy(lines, (line) => line),
    ([line, { length }]) => length > 1 ? `${line} (${length} times)` : line,
  );
}

/** The commands by name. */
export const RELAYS: Readonly<Record<string, Command>> = {
  "relays": {
    summary: "which relays run on an outbox, or keep its topics because they left something behind",
    flags: {
      store: { ...STORE, help: "the outbox: sqlite:app.db, postgres:…, mysql:…" },
      json: JSON_OUT,
    },
    example: "relays --store sqlite:app.db",
    run: (flags) =>
      using(flags, async ({ outbox }) => {
        const relays = await outbox({}).relays();
        print(flags, relays, linesOf(relays).join("\n") || "none");
      }),
  },
  "relays forget": {
    summary: "give up a relay's name: another may have its topics, and sends anew what it did not settle",
    words: ["NAME"],
    flags: {
      store: { ...STORE, help: "the outbox: sqlite:app.db, postgres:…, mysql:…" },
      json: JSON_OUT,
    },
    example: "relays forget default --store sqlite:app.db",
    run: (flags) =>
      using(flags, async ({ outbox, name: database }) => {
        const [name] = flags.words;
        if (!await outbox({}).forget(name!)) throw new Error(`${database} knows no relay "${name}"`);
        print(flags, { relay: name, forgotten: true }, `relay "${name}" is forgotten`);
      }),
  },
};
