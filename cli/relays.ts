/**
 * The commands `relays …`: which relays an outbox knows, and how one of them is given up.
 *
 * @module
 */
import type { RegisteredRelay } from "../mod.ts";
import { type Command, JSON_OUT, STORE, using } from "./command.ts";
import { print } from "./print.ts";

/** What is to be said of a relay, in one line. */
export function lineOf({ relay, protocol, topics, live, sealed }: RegisteredRelay): string {
  const what = topics ? `topics ${topics.join(", ")}` : "all topics";
  const left = sealed > 0 ? `${sealed} messages in sealed batches` : "what it may have called and not settled";
  return `"${relay}" (${protocol}, ${what}) ${live ? "runs" : `has ended, and left behind: ${left}`}`;
}

/** The commands by name. */
export const RELAYS: Readonly<Record<string, Command>> = {
  "relays": {
    summary: "which relays run on an outbox, or keep its topics because they left something behind",
    flags: { store: { ...STORE, help: "the outbox, such as sqlite:app.db" }, json: JSON_OUT },
    example: "relays --store sqlite:app.db",
    run: (flags) =>
      using(flags, async ({ outbox }) => {
        const relays = await outbox({}).relays();
        print(flags, relays, relays.map(lineOf).join("\n") || "none");
      }),
  },
  "relays forget": {
    summary: "give up a relay's name: another may have its topics, and sends anew what it did not settle",
    words: ["NAME"],
    flags: { store: { ...STORE, help: "the outbox, such as sqlite:app.db" }, json: JSON_OUT },
    example: "relays forget default --store sqlite:app.db",
    run: (flags) =>
      using(flags, async ({ outbox, name: database }) => {
        const [name] = flags.words;
        if (!await outbox({}).forget(name!)) throw new Error(`${database} knows no relay "${name}"`);
        print(flags, { relay: name, forgotten: true }, `relay "${name}" is forgotten`);
      }),
  },
};
