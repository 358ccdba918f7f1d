/**
 * The command line: `deno run -A jsr:@effectonce/effectonce/cli help`.
 *
 * @module
 */
import { type Command, JSON_OUT, STORE, using } from "./cli/command.ts";
import { CURSOR } from "./cli/cursor.ts";
import { demo } from "./cli/demo.ts";
import { demoKafka } from "./cli/demo_kafka.ts";
import { EFFECTS } from "./cli/effects.ts";
import { ENQUEUE } from "./cli/enqueue.ts";
import { sentencesOf, UsageError } from "./cli/errors.ts";
import { helpOf, readFlags } from "./cli/flags.ts";
import { DOCTOR, STATUS } from "./cli/look.ts";
import { maskedWord } from "./cli/mask.ts";
import { schemaOf } from "./cli/open.ts";
import { need } from "./cli/permissions.ts";
import { print, write } from "./cli/print.ts";
import { PRUNE } from "./cli/prune.ts";
import { RELAY } from "./cli/relay.ts";
import { RELAYS } from "./cli/relays.ts";

const COMMANDS: Readonly<Record<string, Command>> = {
  init: {
    summary: "create or upgrade the tables; harmless to repeat",
    flags: {
      store: STORE,
      shards: { kind: "number", min: 1, max: 256, help: "over how many relays to share the messages out (as it is; 1)" },
      "no-notify": { kind: "switch", help: "of postgres: an INSERT does not wake relays, which look every --poll-ms" },
      json: JSON_OUT,
    },
    example: "init --store sqlite:app.db",
    run(flags) {
      flags.given("store");
      const url = flags.url("store")!;
      for (
        const [name, schemes, what] of [
          ["no-notify", /^postgres(ql)?:/i, "postgres:"],
          ["shards", /^(postgres(ql)?|mysql|mariadb):/i, "postgres:, mysql: and mariadb:"],
        ] as const
      ) {
        // A variable holds for all commands of a process, whatever their databases are.
        if (flags.layer.get(name)?.source !== "flag" || schemes.test(url)) continue;
        throw new UsageError(`${flags.label(name)} is for ${what} databases`);
      }
      const options = { notify: !flags.on("no-notify"), shards: flags.number("shards") };
      return using(flags, async (database) => {
        await database.migrate(options);
        print(flags, { store: database.name, ready: true }, `${database.name} is ready`);
      }, { create: true });
    },
  },
  enqueue: ENQUEUE,
  relay: RELAY,
  status: STATUS,
  ...EFFECTS,
  ...RELAYS,
  ...CURSOR,
  prune: PRUNE,
  schema: {
    summary: "the SQL of the tables, for your own migrations",
    flags: { store: { ...STORE, help: "the kind of database: sqlite:, postgres:, mysql: or mariadb:" } },
    example: "schema --store sqlite:",
    run: (flags) => {
      write(schemaOf(flags.label("store"), flags.url("store")!));
      return Promise.resolve(0);
    },
  },
  doctor: DOCTOR,
  demo: {
    summary: "the crash between the payment and the commit, with and without effectonce",
    flags: {
      orders: { kind: "number", min: 1, default: 40, help: "orders in each run" },
      kafka: {
        kind: "url",
        help: "into Kafka, instead of a payment service: kafka://127.0.0.1:9092, for topics of its own",
      },
      json: JSON_OUT,
    },
    example: "demo",
    run: (flags) => {
      need("The demo", { name: "read" }, { name: "write" }, { name: "run" }, { name: "net" }, { name: "env" });
      const options = { orders: flags.number("orders")!, json: flags.on("json"), write };
      return flags.has("kafka")
        ? demoKafka({ ...options, url: flags.url("kafka")!, label: flags.label("kafka") })
        : demo(options);
    },
  },
};

/** What the words of commands are. */
const WORDS: Readonly<Record<string, string>> = {
  KEY: "KEY is the message's id, or the key that once() was given.",
  NAME: "NAME is the relay's name.",
  N: "N is the number of a batch.",
};

function usage(prefix = ""): string {
  const names = Object.keys(COMMANDS).filter((name) => name.startsWith(prefix));
  const width = Math.max(...names.map((name) => name.length)) + 2;
  return `effectonce: exactly-once effects between a log and the outside world\n\n` +
    names.map((name) => `  ${name.padEnd(width)}${COMMANDS[name]!.summary}\n`).join("") +
    `\nHelp for one: COMMAND --help; the version: --version\n` +
    `Databases: sqlite:app.db, postgres://user:password@host:5432/database, mysql://… or mariadb://…\n` +
    `Flags are read from the environment too: --lease-ms is EFFECTONCE_LEASE_MS\n` +
    `Exit codes: 0 done, 1 failed, 2 usage\n`;
}

/** Commands that only have subcommands. */
const GROUPS: Readonly<Record<string, Readonly<Record<string, Command>>>> = { effects: EFFECTS, cursor: CURSOR };

function subcommands(group: string): string {
  const words = Object.keys(GROUPS[group]!).map((name) => name.split(" ")[1]!);
  return `${words.slice(0, -1).join(", ")} or ${words.at(-1)}`;
}

/** Runs one command line; answers the exit code: 0 done, 1 failed, 2 usage. */
export async function main(args: readonly string[]): Promise<number> {
  const help = (arg: string | undefined) => arg === "--help" || arg === "-h";
  const [first, second] = args;
  const both = `${first} ${second}`;
  const group = first !== undefined && Object.hasOwn(GROUPS, first) ? first : undefined;
  const two = Object.hasOwn(COMMANDS, both) || group !== undefined && second !== undefined && !second.startsWith("-");
  const name = two ? both : first ?? "";
  const command = Object.hasOwn(COMMANDS, name) ? COMMANDS[name] : undefined;
  try {
    if (first === undefined) {
      console.error(usage().trimEnd());
      return 2;
    }
    if (first === "help" && second !== undefined) return await main([...args.slice(1), "--help"]);
    if (first === "help" || help(first) || group !== undefined && help(second)) {
      write(usage(group === undefined ? "" : `${group} `));
      return 0;
    }
    if (first === "--version") {
      const { default: { version } } = await import("./deno.json", { with: { type: "json" } });
      write(`effectonce ${version}\n`);
      return 0;
    }
    const rest = args.slice(name.split(" ").length);
    if (!command) {
      if (name === group) throw new UsageError(`${group} needs a subcommand: ${subcommands(group)}`);
      const how = group === undefined ? "see: help" : `use ${group} ${subcommands(group)}`;
      throw new UsageError(`there is no command "${maskedWord(name)}": ${how}`);
    }
    if (rest.some(help)) {
      const { words = [], summary, flags, example } = command;
      const meanings = words.map((word) => `${WORDS[word.replaceAll(/[[\]]/g, "")]}\n`).join("");
      write(
        `${[name, ...words].join(" ")}: ${summary}\n\n${meanings && `${meanings}\n`}${helpOf(flags)}\n` +
          `Example:\n  deno run -A cli.ts ${example}\n`,
      );
      return 0;
    }
    const flags = readFlags(rest, command.flags, command.words ?? []);
    // What a file has is not known yet.
    return await command.run(flags.has("config") ? flags : flags.complete());
  } catch (error) {
    const topic = command ? `${name} ` : group === undefined ? "" : `${group} `;
    console.error(sentencesOf(error, `${topic}--help`));
    return error instanceof UsageError ? 2 : 1;
  }
}

if (import.meta.main) Deno.exit(await main(Deno.args));
