/**
 * The command line: `deno run -A jsr:@effectonce/effectonce/cli help`.
 *
 * @module
 */
import {
  type EffectRecord,
  type EffectState,
  encodeMessage,
  guarantee,
  type NewMessage,
  type Outbox,
  relay,
  type RelayEvent,
  type RelayReport,
} from "./mod.ts";
import { parseLine } from "./adapters/file.ts";
import { demo } from "./cli/demo.ts";
import { type Flag, type Flags, helpOf, readFlags, UsageError } from "./cli/flags.ts";
import { type Database, openDatabase, openSink, pairs, reason, schemaOf } from "./cli/open.ts";
import { showRelay } from "./cli/show.ts";

interface Command {
  readonly summary: string;
  readonly words?: readonly string[];
  readonly flags: Readonly<Record<string, Flag>>;
  readonly example: string;
  /** Answers the exit code. */
  run(flags: Flags): Promise<number>;
}

const STORE: Flag = { kind: "text", value: "URL", required: true, help: "the database, such as sqlite:app.db" };
const JSON_OUT: Flag = { kind: "switch", help: "print JSON" };
const SCOPE: Flag = { kind: "text", value: "NAME", help: "the effect's scope, where several have the key: a relay's name" };
const OUTBOX: Flag = { kind: "text", value: "URL", help: "the outbox, where it is not in the store's database" };
const STATES: readonly EffectState[] = ["claimed", "waiting", "done", "rejected", "uncertain"];

const RELAY_FLAGS: Readonly<Record<string, Flag>> = {
  from: { kind: "text", value: "URL", required: true, help: "the outbox, such as sqlite:app.db" },
  to: { kind: "text", value: "URL", required: true, help: "the target: http(s)://…, file:events.jsonl or stdout:" },
  name: { kind: "name", value: "NAME", help: "scope of the relay's effects (default)" },
  topics: { kind: "text", value: "A,B", help: "only these topics (all)" },
  drain: { kind: "switch", help: "stop when nothing deliverable is left" },
  store: { kind: "text", value: "URL", help: "where calls are claimed (beside the outbox)" },
  idempotent: { kind: "switch", help: "the target dedupes by the Idempotency-Key header: repeat after an interruption" },
  "dedupe-window-ms": {
    kind: "number",
    min: 1,
    max: Number.MAX_SAFE_INTEGER,
    help: "how long the target remembers a key (86400000)",
  },
  reconcile: {
    kind: "text",
    value: "URL",
    help: "ask here about one in doubt; {id}, {idempotencyKey}, {key}, {topic} are filled in",
  },
  "settle-ms": { kind: "number", help: "ask only so long after the doubtful attempt (5000)" },
  "header-to": { kind: "list", value: "NAME=VALUE", help: "send this header too; VALUE may be env:VARIABLE" },
  method: { kind: "text", oneOf: ["POST", "PUT"], help: "HTTP method (POST)" },
  "timeout-ms": { kind: "number", min: 1, help: "for one HTTP call (10000)" },
  lanes: { kind: "number", min: 1, help: "calls at the same time (8)" },
  batch: { kind: "number", min: 1, help: "messages in hand, or in one commit (100)" },
  "lease-ms": { kind: "number", min: 10, help: "how long others wait for a silent relay (30000)" },
  attempts: { kind: "number", min: 1, help: "before a message is parked (10)" },
  "min-retry-ms": { kind: "number", help: "first bound of the back-off (200)" },
  "max-retry-ms": { kind: "number", help: "last bound of the back-off (60000)" },
  "on-park": { kind: "text", oneOf: ["block", "skip"], help: "a parked message holds back its key, or only itself (block)" },
  "poll-ms": { kind: "number", min: 1, help: "how often to look when idle (50)" },
  keep: { kind: "switch", help: "keep delivered rows until prune" },
  "allow-duplicates": { kind: "switch", help: "no claims: at-least-once" },
  json: { kind: "switch", help: "print the events as JSON lines" },
};

const COMMANDS: Readonly<Record<string, Command>> = {
  init: {
    summary: "create or upgrade the tables; harmless to repeat",
    flags: { store: STORE, json: JSON_OUT },
    example: "init --store sqlite:app.db",
    run: (flags) =>
      using(flags.given("store"), async (database) => {
        await database.migrate();
        print(flags, { store: database.name, ready: true }, `${database.name} is ready`);
      }, true),
  },
  enqueue: {
    summary: "put messages into the outbox, all or none",
    flags: {
      store: STORE,
      topic: { kind: "name", value: "TEXT", help: "the message's topic" },
      key: { kind: "name", value: "TEXT", help: "its ordering key (none: no order)" },
      value: { kind: "text", help: "its value, byte for byte; JSON is marked as such" },
      tombstone: { kind: "switch", help: "no value" },
      id: { kind: "name", value: "TEXT", help: "its id (a UUID)" },
      header: { kind: "list", value: "NAME=VALUE", help: "one of its headers" },
      jsonl: { kind: "name", value: "FILE", help: "many: {id?,topic,key?,value|valueBase64,headers?} a line; - for stdin" },
      json: JSON_OUT,
    },
    example: `enqueue --store sqlite:app.db --topic payments --key order-1 --value '{"amount":5}'`,
    run: async (flags) => {
      const messages = flags.text("jsonl") === undefined ? [{ message: single(flags), where: "" }] : await fromLines(flags);
      return await using(flags.given("store"), async ({ store }) => {
        await store.transaction(async ({ enqueue }) => {
          for (const { message, where } of messages) {
            await enqueue(message).catch((error: unknown) => {
              throw where ? new Error(`${where}: ${reason(error)}. Nothing was enqueued`, { cause: error }) : error;
            });
          }
        });
        const ids = messages.map(({ message: { id } }) => id!);
        const text = ids.length === 1 ? `enqueued 1 message: ${ids[0]}` : `enqueued ${ids.length} messages`;
        print(flags, { enqueued: ids.length, ids }, text);
      });
    },
  },
  relay: {
    summary: "deliver an outbox into a target",
    flags: RELAY_FLAGS,
    example: "relay --from sqlite:app.db --to http://127.0.0.1:8080/charge --idempotent",
    run: runRelay,
  },
  status: {
    summary: "what is pending, parked and in doubt",
    flags: { store: STORE, json: JSON_OUT },
    example: "status --store sqlite:app.db --json",
    run: (flags) =>
      using(flags.given("store"), async ({ store, outbox }) => {
        const { pending, parked, oldestMs } = await outbox({}).status();
        const effects = await store.count();
        const oldest = oldestMs === null ? "" : `, the oldest for ${seconds(oldestMs)}`;
        print(
          flags,
          { outbox: { pending, parked, oldestMs }, effects },
          `outbox   ${pending} pending${oldest}, ${parked} parked\n` +
            `effects  ${STATES.map((state) => `${effects[state]} ${state}`).join(", ")}`,
        );
      }),
  },
  "effects list": {
    summary: "effects by state, in order of scope and key",
    flags: {
      store: STORE,
      state: { kind: "text", oneOf: [...STATES, "parked"], help: "only these; parked: messages set aside in the outbox" },
      scope: SCOPE,
      limit: { kind: "number", min: 1, help: "at most so many (1000)" },
      json: JSON_OUT,
    },
    example: "effects list --store sqlite:app.db --state uncertain",
    run: (flags) => using(flags.given("store"), (database) => listEffects(database, flags)),
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
          throw new Error(`"${effect.key}" may have happened: ${how}`);
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
      if (as === "absent" && text !== undefined) throw new UsageError("--result goes with --as done");
      const result = text === undefined ? null : parseJson("--result", text);
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
  prune: {
    summary: "forget effects that ended, and kept rows, when they are old",
    flags: {
      store: STORE,
      "older-than-ms": {
        kind: "number",
        max: Number.MAX_SAFE_INTEGER,
        help: "their age (604800000, a week): longer than a message can come again",
      },
      json: JSON_OUT,
    },
    example: "prune --store sqlite:app.db --older-than-ms 2592000000",
    run: (flags) =>
      using(flags.given("store"), async ({ store, outbox }) => {
        const olderThanMs = flags.number("older-than-ms") ?? 7 * 86_400_000;
        const all = async (prune: Outbox["prune"]) => {
          let total = 0;
          for (let n = 1000; n === 1000; total += n) n = await prune({ olderThanMs, limit: 1000 });
          return total;
        };
        const effects = await all(store.prune);
        const messages = await all(outbox({}).prune);
        print(flags, { effects, messages }, `pruned ${effects} effects and ${messages} messages`);
      }),
  },
  schema: {
    summary: "the SQL of the tables, for your own migrations",
    flags: { store: { ...STORE, help: "the kind of database, such as sqlite:" } },
    example: "schema --store sqlite:",
    run: (flags) => {
      write(schemaOf(flags.given("store")));
      return Promise.resolve(0);
    },
  },
  doctor: {
    summary: "which guarantee a relay would give, why, and what would make it stronger",
    flags: RELAY_FLAGS,
    example: "doctor --from sqlite:app.db --to http://127.0.0.1:8080/charge",
    run: runDoctor,
  },
  demo: {
    summary: "the crash between the payment and the commit, with and without effectonce",
    flags: {
      orders: { kind: "number", min: 1, help: "orders in each run (40)" },
      json: JSON_OUT,
    },
    example: "demo",
    run: (flags) => demo({ orders: flags.number("orders") ?? 40, json: flags.on("json"), write }),
  },
};

// -------------------------------------------------------------------------------------------------------------- commands

async function runRelay(flags: Flags): Promise<number> {
  return await withEnds(flags, async ({ source, sink, store, databases }) => {
    const stop = new AbortController();
    const signals: readonly Deno.Signal[] = Deno.build.os === "windows" ? ["SIGINT"] : ["SIGINT", "SIGTERM"];
    const onSignal = () => {
      if (stop.signal.aborted) Deno.exit(130); // Asked twice: the effect under way stays in doubt.
      if (Deno.stderr.isTerminal()) console.error("finishing the calls under way; once more leaves them in doubt");
      stop.abort();
    };
    for (const signal of signals) Deno.addSignalListener(signal, onSignal);
    const drain = flags.on("drain");
    let unread = false;
    const show = showRelay({
      json: flags.on("json"),
      messagesOnStdout: sink.name === "stdout",
      drain,
      outbox: source,
      advice: `--store ${databases.at(-1)!.name}`,
      gone() {
        unread = true;
        stop.abort();
      },
    });
    let report: RelayReport;
    try {
      report = await relay({
        name: flags.text("name"),
        from: source,
        to: sink,
        store: flags.on("allow-duplicates") ? undefined : store,
        allowDuplicates: flags.on("allow-duplicates"),
        drain,
        signal: stop.signal,
        observe: (event: RelayEvent) => show.event(event),
        lanes: flags.number("lanes"),
        batch: flags.number("batch"),
        leaseMs: flags.number("lease-ms"),
        attempts: flags.number("attempts"),
        minRetryMs: flags.number("min-retry-ms"),
        maxRetryMs: flags.number("max-retry-ms"),
        settleMs: flags.number("settle-ms"),
        pollMs: flags.number("poll-ms"),
        onPark: flags.text("on-park") as "block" | "skip" | undefined,
      });
    } finally {
      show.end();
      for (const signal of signals) Deno.removeSignalListener(signal, onSignal);
    }
    if (unread) throw new Error("nobody reads what the relay prints: it has stopped");
    return drain && report.parked + report.uncertain > 0 ? 1 : 0;
  });
}

async function runDoctor(flags: Flags): Promise<number> {
  return await withEnds(flags, async ({ source, sink, store, databases }) => {
    const promise = guarantee(source, sink, flags.on("allow-duplicates") ? undefined : store);
    const checks = (await Promise.all(databases.map((database) => database.checks()))).flat();
    const { level, protocol, reasons, conditions, stronger } = promise;
    const lines = (title: string, texts: readonly string[]) =>
      texts.length ? `${title}\n${texts.map((t) => `  ${t}\n`).join("")}` : "";
    print(
      flags,
      { from: source.name, to: sink.name, ...promise, checks },
      `${source.name} -> ${sink.name}: ${level} (protocol: ${protocol})\n` +
        lines("because", reasons) + lines("on condition that", conditions) + lines("stronger", stronger) +
        lines("checks", checks.map(({ what, ok, found }) => `${ok ? "ok " : "NO "} ${what}: ${found}`)),
    );
    return checks.every(({ ok }) => ok) ? 0 : 1;
  });
}

interface Ends {
  readonly source: Outbox;
  readonly sink: ReturnType<typeof openSink>;
  readonly store: Database["store"];
  readonly databases: readonly Database[];
}

async function withEnds(flags: Flags, run: (ends: Ends) => Promise<number>): Promise<number> {
  const [min, max] = [flags.number("min-retry-ms") ?? 200, flags.number("max-retry-ms") ?? 60_000];
  if (min > max) throw new UsageError(`--min-retry-ms must be at most --max-retry-ms, which is ${max}`);
  if (flags.on("allow-duplicates") && (flags.text("store") !== undefined || flags.on("idempotent"))) {
    throw new UsageError("--allow-duplicates makes no claims: it excludes --store and --idempotent");
  }
  const topics = flags.text("topics")?.split(",").map((topic) => topic.trim());
  if (topics?.includes("")) throw new UsageError("--topics must be names with commas between them");
  const from = flags.given("from");
  const sink = openSink(flags.given("to"), flags);
  const databases = [await openDatabase("from", from)];
  try {
    const other = flags.text("store");
    if (other !== undefined && other !== from) databases.push(await openDatabase("store", other));
    // A store that is not one should not be found out only with the first message.
    for (const { store } of databases) await store.list({ limit: 1 });
    const source = databases[0]!.outbox({ topics, keep: flags.on("keep") });
    return await run({ source, sink, store: databases.at(-1)!.store, databases });
  } finally {
    for (const database of databases) database.close();
  }
}

async function using(url: string, run: (database: Database) => Promise<number | void>, create = false): Promise<number> {
  const database = await openDatabase("store", url, create);
  try {
    return await run(database) ?? 0;
  } finally {
    database.close();
  }
}

/** Finds the effect with a key in any scope, and why its message is parked. */
async function withEffect(
  flags: Flags,
  run: (effect: EffectRecord | undefined, database: Database, parked: string | undefined, outbox: Outbox) => Promise<void>,
): Promise<number> {
  const key = flags.words[0]!;
  const from = flags.text("from");
  const other = from === undefined || from === flags.given("store") ? undefined : await openDatabase("from", from);
  try {
    return await using(flags.given("store"), async (database) => {
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
  const limit = flags.number("limit") ?? 1000;
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

// --------------------------------------------------------------------------------------------------------------- enqueue

function single(flags: Flags): NewMessage {
  const text = flags.text("value");
  if (text === undefined && !flags.on("tombstone")) throw new UsageError("--value is missing (or --tombstone, or --jsonl)");
  if (text !== undefined && flags.on("tombstone")) throw new UsageError("--value and --tombstone exclude each other");
  const headers = pairs("header", flags.list("header"));
  const typed = Object.keys(headers).some((name) => name.toLowerCase() === "content-type");
  return {
    id: flags.text("id") ?? crypto.randomUUID(),
    topic: flags.given("topic"),
    key: flags.text("key") ?? null,
    value: text === undefined ? null : new TextEncoder().encode(text),
    headers: text === undefined || typed || !isJson(text) ? headers : { ...headers, "content-type": "application/json" },
  };
}

async function fromLines(flags: Flags): Promise<readonly { readonly message: NewMessage; readonly where: string }[]> {
  for (const name of ["topic", "key", "value", "id"]) {
    if (flags.text(name) !== undefined) throw new UsageError(`--${name} and --jsonl exclude each other`);
  }
  if (flags.on("tombstone") || flags.list("header").length) {
    throw new UsageError("--jsonl excludes --tombstone and --header");
  }
  const path = flags.given("jsonl");
  let bytes: Uint8Array;
  try {
    bytes = path === "-" ? await new Response(Deno.stdin.readable).bytes() : await Deno.readFile(path);
  } catch (error) {
    throw new Error(`Cannot read ${path}: ${reason(error)}`);
  }
  const name = path === "-" ? "stdin" : path;
  let text: string;
  try {
    text = new TextDecoder("utf-8", { fatal: true }).decode(bytes);
  } catch {
    throw new Error(`Cannot read ${name}: it is not UTF-8`);
  }
  const messages = [];
  for (const [i, line] of text.split("\n").entries()) {
    const where = `${name}, line ${i + 1}`;
    try {
      const parsed = parseLine(line);
      if (!parsed) continue;
      const message = { ...parsed, id: parsed.id ?? crypto.randomUUID() };
      encodeMessage(message); // Before anything is written.
      messages.push({ message, where });
    } catch (error) {
      throw new Error(`${where}: ${reason(error)}. Nothing was enqueued`);
    }
  }
  return messages;
}

function isJson(text: string): boolean {
  try {
    JSON.parse(text);
    return true;
  } catch {
    return false;
  }
}

function parseJson(flag: string, text: string) {
  if (isJson(text)) return JSON.parse(text);
  throw new UsageError(`${flag} must be JSON, such as '{"id":7}' or '"text"'`);
}

// ---------------------------------------------------------------------------------------------------------------- output

function write(text: string): void {
  const bytes = new TextEncoder().encode(text);
  for (let done = 0; done < bytes.length;) done += Deno.stdout.writeSync(bytes.subarray(done));
}

function print(flags: Flags, value: unknown, text: string): void {
  write((flags.on("json") ? JSON.stringify(value) : text.trimEnd()) + "\n");
}

function seconds(ms: number): string {
  return ms < 1000 ? `${ms} ms` : `${Math.round(ms / 1000)} s`;
}

function usage(prefix = ""): string {
  const names = Object.keys(COMMANDS).filter((name) => name.startsWith(prefix));
  const width = Math.max(...names.map((name) => name.length)) + 2;
  return `effectonce: exactly-once effects between a log and the outside world\n\n` +
    names.map((name) => `  ${name.padEnd(width)}${COMMANDS[name]!.summary}\n`).join("") +
    `\nHelp for one: COMMAND --help\nExit codes: 0 done, 1 failed, 2 usage\n`;
}

/** Runs one command line; answers the exit code: 0 done, 1 failed, 2 usage. */
export async function main(args: readonly string[]): Promise<number> {
  const help = (arg: string | undefined) => arg === "--help" || arg === "-h";
  const [first, second] = args;
  const name = first === "effects" && second !== undefined && !second.startsWith("-") ? `effects ${second}` : first ?? "";
  const command = Object.hasOwn(COMMANDS, name) ? COMMANDS[name] : undefined;
  try {
    if (first === undefined) {
      console.error(usage().trimEnd());
      return 2;
    }
    if (first === "help" && second !== undefined) return await main([...args.slice(1), "--help"]);
    if (first === "help" || help(first) || first === "effects" && help(second)) {
      write(usage(first === "effects" ? "effects " : ""));
      return 0;
    }
    const rest = args.slice(name.split(" ").length);
    if (!command) {
      const how = first === "effects" ? "use effects list, show, retry, resolve or discard" : "see: help";
      throw new UsageError(`there is no command "${name}": ${how}`);
    }
    if (rest.some(help)) {
      const words = command.words?.map((word) => ` ${word}`).join("") ?? "";
      write(
        `${name}${words}: ${command.summary}\n\n${
          helpOf(command.flags)
        }\nExample:\n  deno run -A cli.ts ${command.example}\n`,
      );
      return 0;
    }
    return await command.run(readFlags(rest, command.flags, command.words ?? []));
  } catch (error) {
    const usage = error instanceof UsageError;
    console.error(`effectonce: ${reason(error).trimEnd()}${usage ? `\nSee: ${command ? `${name} ` : ""}--help` : ""}`);
    return usage ? 2 : 1;
  }
}

if (import.meta.main) Deno.exit(await main(Deno.args));
