/**
 * The commands `effects …`: what became of effects, and what a person can do about it.
 *
 * @module
 */
import { EffectError, type EffectRecord, type EffectState, type Json, type Outbox } from "../mod.ts";
import { type Command, JSON_OUT, STORE, using } from "./command.ts";
import { UsageError } from "./errors.ts";
import type { Flag, Flags } from "./flags.ts";
import { type Database, openDatabase } from "./open.ts";
import { print } from "./print.ts";

const SCOPE: Flag = { kind: "text", value: "NAME", help: "the effect's scope, where several have the key: a relay's name" };
const OUTBOX: Flag = { kind: "url", help: "the outbox, where it is not in the store's database" };
/** The states of effects, in the order of a life. */
export const STATES: readonly EffectState[] = ["claimed", "waiting", "done", "rejected", "uncertain"];

/** The commands by name. */
export const EFFECTS: Readonly<Record<string, Command>> = {
  "effects list": {
    summary: "effects by state, in order of scope and key",
    flags: {
      store: STORE,
      state: { kind: "text", oneOf: [...STATES, "parked"], help: "only these; parked: messages set aside in the outbox" },
      scope: SCOPE,
      limit: { kind: "number", min: 1, default: 1000, help: "at most so many" },
      json: JSON_OUT,
    },
    example: "effects list --store sqlite:app.db --state uncertain",
    run: (flags) => using(flags, (database) => listEffects(database, flags)),
  },
  "effects show": {
    summary: "all that is known of one effect",
    words: ["KEY"],
    flags: { store: STORE, from: OUTBOX, scope: SCOPE, json: JSON_OUT },
    example: "effects show order-1 --store sqlite:app.db",
    run: (flags) =>
      withEffect(flags, async (effect, _, parked, outbox) => {
        const shown = effect ? record(effect) : {};
        const message = await outbox.find(flags.words[0]!);
        const { state, topic, key } = message ?? {};
        print(
          flags,
          {
            ...shown,
            ...effect && { result: effect.result, evidence: effect.evidence },
            parked: parked ?? null,
            message: message ? { state, topic, key } : null,
          },
          [
            ...effect ? Object.entries({ ...shown, result: JSON.stringify(effect.result) }) : [],
            ...effect?.evidence ? [["evidence", JSON.stringify(effect.evidence)]] : [],
            ["message", message ? `${state}, topic ${topic}${key === null ? "" : `, key ${key}`}` : "not in the outbox"],
            ["parked", parked ?? "no"],
          ].map(([name, value]) => `${String(name).padEnd(9)} ${value}`).join("\n"),
        );
      }),
  },
  "effects retry": {
    summary: "let a refused or parked message be sent anew",
    words: ["KEY"],
    flags: { store: STORE, from: OUTBOX, scope: SCOPE, json: JSON_OUT },
    example: "effects retry order-1 --store sqlite:app.db",
    run: (flags) =>
      withEffect(flags, async (effect, { store }, parked, outbox) => {
        if (effect?.doubt && effect.state !== "waiting") {
          const how = `find out, then: effects resolve ${effect.key} --as done, or --as absent`;
          throw new EffectError("uncertain", `"${effect.key}" may have happened: ${how}`);
        }
        if (effect?.state === "done") {
          const why = parked
            ? `, and its id cannot be used again: effects discard ${effect.key}`
            : ": there is nothing to retry";
          throw new Error(`"${effect.key}" is done${why}`);
        }
        if (effect?.state === "waiting") await store.resolve(effect, { as: "retry" });
        else if (effect) await store.resolve(effect, { as: "absent" });
        await outbox.release(flags.words[0]!);
        print(flags, { key: flags.words[0]!, retried: true }, `"${flags.words[0]}" will be sent anew`);
      }),
  },
  "effects resolve": {
    summary: "say what became of an effect in doubt",
    words: ["KEY"],
    flags: {
      store: STORE,
      from: OUTBOX,
      scope: SCOPE,
      as: { kind: "text", oneOf: ["done", "absent"], required: true, help: "it happened; or it did not, and may run anew" },
      result: { kind: "text", value: "JSON", help: "with --as done: its result" },
      json: JSON_OUT,
    },
    example: "effects resolve order-1 --store sqlite:app.db --as done",
    run: (flags) => {
      const as = flags.given("as") as "done" | "absent";
      const text = flags.text("result");
      if (as === "absent" && text !== undefined) throw new UsageError(`${flags.label("result")} goes with --as done`);
      const result = text === undefined ? null : parseJson(flags.label("result"), text);
      return withEffect(flags, async (effect, { store }, parked, outbox) => {
        if (!effect) throw new Error(`"${flags.words[0]}" was never claimed: use "effects retry" or "effects discard"`);
        // Done but parked: a resolve that was interrupted half-way goes on.
        if (!(effect.state === "done" && as === "done" && parked)) await store.resolve(effect, { as, result });
        await outbox.release(effect.key);
        print(flags, { scope: effect.scope, key: effect.key, resolved: as }, `"${effect.key}" is resolved as ${as}`);
      });
    },
  },
  "effects discard": {
    summary: "never send a parked message, nor run its effect",
    words: ["KEY"],
    flags: { store: STORE, from: OUTBOX, scope: SCOPE, json: JSON_OUT },
    example: "effects discard order-1 --store sqlite:app.db",
    run: (flags) =>
      withEffect(flags, async (effect, { store }, parked, outbox) => {
        if (effect?.state === "done" && !parked) throw new Error(`"${effect.key}" is done: there is nothing to discard`);
        const state = (await outbox.find(flags.words[0]!))?.state;
        if (state === "pending" || state === "blocked") {
          throw new Error(`"${flags.words[0]}" is ${state} in the outbox: it can be discarded when it is parked`);
        }
        if (effect && effect.state !== "done") {
          await store.resolve(effect, { as: "rejected", reason: "discarded by a person" });
        }
        await outbox.discard(flags.words[0]!);
        print(flags, { key: flags.words[0]!, discarded: true }, `"${flags.words[0]}" is discarded`);
      }),
  },
};

/** Finds the effect with a key in any scope, and why its message is parked. */
async function withEffect(
  flags: Flags,
  run: (effect: EffectRecord | undefined, database: Database, parked: string | undefined, outbox: Outbox) => Promise<void>,
): Promise<number> {
  const key = flags.words[0]!;
  const from = flags.url("from");
  const other = from === undefined || from === flags.url("store")
    ? undefined
    : await openDatabase(flags.label("from"), from);
  try {
    return await using(flags, async (database) => {
      const found = await database.store.list({ key, scope: flags.text("scope") });
      if (found.length > 1) {
        throw new UsageError(`"${key}" is in several scopes: say --scope ${found.map(({ scope }) => scope).join(" or ")}`);
      }
      const outbox = (other ?? database).outbox({});
      const message = await outbox.find(key);
      const parked = message?.state === "parked" ? message.reason : undefined;
      if (found.length === 0 && parked === undefined) {
        if (!message) throw new Error(`${database.name} knows no effect "${key}"`);
        throw new Error(`"${key}" was never claimed and is not parked: it is ${message.state} in the outbox`);
      }
      await run(found[0], database, parked, outbox);
    });
  } finally {
    other?.close();
  }
}

async function listEffects({ store, outbox }: Database, flags: Flags): Promise<void> {
  const limit = flags.number("limit")!;
  const state = flags.text("state");
  const rows = state === "parked"
    ? (await outbox({}).parked(limit)).map(({ id, since, reason }) => {
      return { scope: null, key: id, state, attempts: null, since: since.toISOString(), error: reason };
    })
    : (await store.list({ state: state as EffectState, scope: flags.text("scope"), limit })).map(record);
  const text = rows.map(({ scope, key, state, attempts, since, error }) =>
    `${state}  ${scope ?? "-"}  ${key}  ${attempts ?? "-"} attempts  ${since}  ${error ?? ""}`.trimEnd()
  );
  print(flags, rows, text.join("\n") || "none");
}

const record = ({ scope, key, state, attempts, since, error }: EffectRecord) => {
  return { scope, key, state, attempts, since: since.toISOString(), error };
};

function parseJson(label: string, text: string): Json {
  try {
    return JSON.parse(text);
  } catch {
    throw new UsageError(`${label} must be JSON, such as '{"id":7}' or '"text"'`);
  }
}
