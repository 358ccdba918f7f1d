/**
 * The commands `effects …`: what became of effects, and what a person can do about it.
 *
 * @module
 */
import { EffectError, type EffectRecord, type EffectState, type Json, type Outbox, type RegisteredRelay } from "../mod.ts";
import { type Command, JSON_OUT, STORE, using } from "./command.ts";
import type { Database } from "./database.ts";
import { reason, UsageError } from "./errors.ts";
import type { Flag, Flags } from "./flags.ts";
import { openDatabase } from "./open.ts";
import { print } from "./print.ts";

const SCOPE: Flag = { kind: "text", value: "NAME", help: "the effect's scope, where several have the key: a relay's name" };
const OUTBOX: Flag = { kind: "url", help: "the outbox, where it is not in the store's database" };
/** Parked messages that are looked at together. */
const PAGE = 1000;
/** What becomes of one that may have happened, and is handed to its relay again. */
const IN_DOUBT = "a relay with --idempotent repeats it under the same Idempotency-Key within the target's window, " +
  "one with --reconcile asks the target again, any other finds it in doubt again";
/** The states of effects, in the order of a life. */
export const STATES: readonly EffectState[] = ["claimed", "waiting", "done", "rejected", "uncertain"];

/** The commands by name. */
export const EFFECTS: Readonly<Record<string, Command>> = {
  "effects list": {
    summary: "effects by state, in order of scope and key",
    flags: {
      store: STORE,
      from: OUTBOX,
      state: { kind: "text", oneOf: [...STATES, "parked"], help: "only these; parked: messages set aside in the outbox" },
      scope: SCOPE,
      limit: { kind: "number", min: 1, default: 1000, help: "at most so many" },
      json: JSON_OUT,
    },
    example: "effects list --store sqlite:app.db --state uncertain",
    run: (flags) => withOutbox(flags, (database, outbox) => listEffects(database, outbox, flags)),
  },
  "effects show": {
    summary: "all that is known of one effect",
    words: ["KEY"],
    flags: { store: STORE, from: OUTBOX, scope: SCOPE, json: JSON_OUT },
    example: "effects show order-1 --store sqlite:app.db",
    run: (flags) =>
      withEffect(flags, async (effect, _, parked, outbox) => {
        const message = await outbox.find(flags.words[0]!);
        const { state, topic, key } = message ?? {};
        const idempotencyKey = effect && idempotencyKeyOf(effect);
        const shown = effect && { ...record(effect), generation: effect.generation, idempotencyKey };
        // Nothing else tells whose effect it is.
        const keys = effect && !message
          ? `${idempotencyKey} of a relay, ${encodeURIComponent(effect.scope)}:${idempotencyKey} of once()`
          : idempotencyKey;
        print(
          flags,
          {
            ...shown,
            ...effect && { result: effect.result, evidence: effect.evidence },
            parked: parked ?? null,
            message: message ? { state, topic, key } : null,
          },
          [
            ...effect ? Object.entries({ ...shown, idempotencyKey: keys, result: JSON.stringify(effect.result) }) : [],
            ...effect?.evidence ? [["evidence", JSON.stringify(effect.evidence)]] : [],
            ["message", message ? `${state}, topic ${topic}${key === null ? "" : `, key ${key}`}` : "not in the outbox"],
            ["parked", parked ?? "no"],
          ].map(([name, value]) => `${String(name).padEnd(14)} ${value}`).join("\n"),
        );
      }),
  },
  "effects retry": {
    summary: "let a parked message go to its relay again, or all of them",
    words: ["[KEY]"],
    flags: {
      store: STORE,
      from: OUTBOX,
      all: { kind: "switch", help: "instead of KEY: all that is parked, with --scope only that relay's" },
      scope: SCOPE,
      json: JSON_OUT,
    },
    example: "effects retry order-1 --store sqlite:app.db",
    run: (flags) => {
      const key = flags.words[0];
      if (key !== undefined && flags.on("all")) throw new UsageError(`KEY and ${flags.label("all")} exclude each other`);
      if (key === undefined && !flags.on("all")) throw new UsageError("KEY is missing (or --all)");
      if (key === undefined) return withOutbox(flags, (database, outbox) => retryAll(flags, database.store, outbox));
      return withEffect(flags, async (found, { store }, parked, outbox) => {
        const message = await outbox.find(key);
        const relay = message && relayOf(await outbox.relays(), message.topic);
        // That of another scope, such as an application's once(), is none of the message's.
        const others = relay && found && !flags.has("scope") &&
          (relay.protocol !== "claimed" || relay.relay !== found.scope);
        const effect = others ? undefined : found;
        const refused = refusalOf(effect, parked !== undefined);
        if (refused) throw refused;
        const state = message?.state;
        await letAgain(key, effect, store, outbox);
        const sent = state !== undefined && state !== "delivered";
        const absent = "no message for it is in this outbox, so whoever asks for it next";
        const becomes = effect?.doubt
          ? sent
            ? `goes to its relay again, and may have happened: ${IN_DOUBT}`
            : `may have happened: ${absent} repeats it under the same idempotency key if the target dedupes, ` +
              "asks the target if that can tell, or finds it in doubt again"
          : sent
          ? "will be sent anew"
          : `may run anew: ${absent} runs it`;
        print(flags, { key, retried: true }, `"${key}" ${becomes}`);
      });
    },
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

/** Opens the database of `--store`, and finds the outbox: that of `--from`, or the one in the same database. */
async function withOutbox(
  flags: Flags,
  run: (database: Database, outbox: Outbox) => Promise<number | void>,
): Promise<number> {
  const from = flags.url("from");
  const other = from === undefined || from === flags.url("store")
    ? undefined
    : await openDatabase(flags.label("from"), from);
  try {
    return await using(flags, (database) => run(database, (other ?? database).outbox({})));
  } finally {
    await other?.close();
  }
}

/** Finds the effect with a key in any scope, and why its message is parked. */
function withEffect(
  flags: Flags,
  run: (effect: EffectRecord | undefined, database: Database, parked: string | undefined, outbox: Outbox) => Promise<void>,
): Promise<number> {
  const key = flags.words[0]!;
  return withOutbox(flags, async (database, outbox) => {
    const scope = flags.text("scope");
    const everywhere = await database.store.list({ key });
    const found = everywhere.filter((effect) => scope === undefined || effect.scope === scope);
    if (found.length === 0 && everywhere.length > 0) {
      const scopes = everywhere.map(({ scope }) => `"${scope}"`).join(" and ");
      throw new UsageError(`${flags.label("scope")}: "${key}" is not in scope "${scope}", but in ${scopes}`);
    }
    if (found.length > 1) throw ambiguous(found);
    const message = await outbox.find(key);
    const parked = message?.state === "parked" ? message.reason : undefined;
    if (found.length === 0 && parked === undefined) {
      if (!message) throw new Error(`${database.name} knows no effect "${key}"`);
      throw new Error(`"${key}" was never claimed and is not parked: it is ${message.state} in the outbox`);
    }
    await run(found[0], database, parked, outbox);
  });
}

function ambiguous(found: readonly EffectRecord[]): UsageError {
  const scopes = found.map(({ scope }) => scope).join(" or ");
  return new UsageError(`"${found[0]!.key}" is in several scopes: say --scope ${scopes}`);
}

/** Why an effect cannot be tried again; undefined if it can. */
function refusalOf(effect: EffectRecord | undefined, parked: boolean): Error | undefined {
  if (effect?.state === "done") {
    const why = parked ? `, and its id cannot be used again: effects discard ${effect.key}` : ": there is nothing to retry";
    return new Error(`"${effect.key}" is done${why}`);
  }
  // Its owner died and nobody has looked since, or a person has discarded it.
  if (effect?.doubt && (effect.state === "claimed" || effect.state === "rejected")) {
    const how = `find out, then: effects resolve ${effect.key} --as done, or --as absent`;
    return new EffectError("uncertain", `"${effect.key}" may have happened: ${how}`);
  }
}

async function letAgain(
  key: string,
  effect: EffectRecord | undefined,
  store: Database["store"],
  outbox: Outbox,
): Promise<void> {
  if (effect) await store.resolve(effect, { as: effect.state === "rejected" ? "absent" : "retry" });
  await outbox.release(key);
}

/** Whose messages of a topic are: while one is parked, its relay keeps the topic. */
const relayOf = (relays: readonly RegisteredRelay[], topic: string): RegisteredRelay | undefined =>
  relays.find(({ topics }) => topics === null || topics.includes(topic));

/** Retries what is parked now: each message once, though a relay that runs may park it again meanwhile. */
async function retryAll(flags: Flags, store: Database["store"], outbox: Outbox): Promise<number> {
  const only = flags.text("scope");
  const relays = await outbox.relays();
  const { parked } = await outbox.status();
  const seen = new Set<string>();
  const refused: Error[] = [];
  let retried = 0;
  let doubtful = 0;
  for (let limit = PAGE; seen.size < parked;) {
    const listed = await outbox.parked(limit);
    const fresh = listed.filter(({ id }) => !seen.has(id)).slice(0, parked - seen.size);
    if (fresh.length === 0 && listed.length < limit) break;
    const before = retried;
    for (const { id, topic } of fresh) {
      seen.add(id);
      const relay = relayOf(relays, topic);
      if (only !== undefined && relay?.relay !== only) continue;
      // Whatever else has this key, in the scope of an application's once(), is none of the message's.
      const [effect] = relay?.protocol === "claimed" ? await store.list({ scope: relay.relay, key: id }) : [];
      const why = relay
        ? refusalOf(effect, true)
        : new Error(`no relay is registered for topic "${topic}": effects retry ${id} --scope NAME`);
      if (why) {
        refused.push(why);
        continue;
      }
      try {
        await letAgain(id, effect, store, outbox);
      } catch (error) {
        refused.push(error as Error); // Somebody works on it, or has decided meanwhile.
        continue;
      }
      retried++;
      if (effect?.doubt) doubtful++;
    }
    // What was left stays in front of the list.
    limit = PAGE + listed.length - (retried - before);
  }
  const doubt = doubtful === 0 ? "" : `, ${doubtful} of which may have happened: ${IN_DOUBT}`;
  print(flags, { retried }, `retried ${messages(retried)}${doubt}`);
  if (refused.length === 0) return 0;
  const because = refused.length === 1 ? "since" : "the first since";
  console.error(`effectonce: ${messages(refused.length)} not retried, ${because} ${reason(refused[0])}`);
  return 1;
}

const messages = (count: number): string => `${count} message${count === 1 ? "" : "s"}`;

/** Under which key a relay calls: the rule is that of mod.ts. */
const idempotencyKeyOf = ({ key, generation }: EffectRecord): string =>
  generation === 1 ? key : `${key};generation=${generation}`;

async function listEffects({ store }: Database, outbox: Outbox, flags: Flags): Promise<void> {
  const limit = flags.number("limit")!;
  const state = flags.text("state");
  // One more than is shown, to know whether there are more.
  const found = state === "parked"
    ? (await outbox.parked(limit + 1)).map(({ id, since, reason }) => {
      return { scope: null, key: id, state, attempts: null, since: since.toISOString(), error: reason };
    })
    : (await store.list({ state: state as EffectState, scope: flags.text("scope"), limit: limit + 1 })).map(record);
  const rows = found.slice(0, limit);
  const text = rows.map(({ scope, key, state, attempts, since, error }) =>
    [state, scope, key, attempts === null ? null : `${attempts} attempts`, since, error].filter((part) => part).join("  ")
  );
  print(flags, rows, text.join("\n") || "none");
  if (found.length > limit) console.error(`only the first ${limit} are shown: ${flags.label("limit")} N shows more`);
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
