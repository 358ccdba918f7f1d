/**
 * What flags a command has, and their values: from the command line, else from the environment, else from a file, else the
 * default.
 *
 * @module
 */
import { parseArgs } from "@std/cli/parse-args";
import { UsageError } from "./errors.ts";
import { maskedWord } from "./mask.ts";
import { dereference, variable, variableOf } from "./variables.ts";

/** One flag. */
export interface Flag {
  /**
   * `name` is a text of 1 to 1024 bytes. `url` may be `env:NAME`. `switch` takes no value. `names` have commas between them.
   * `pairs` are NAME=VALUE, given several times.
   */
  readonly kind: "text" | "name" | "url" | "number" | "switch" | "names" | "pairs";
  /** Shown in the help, in one line. */
  readonly help: string;
  /** What stands for the value in the help. */
  readonly value?: string;
  /** What holds if it is not given. */
  readonly default?: string | number;
  /** Smallest number. */
  readonly min?: number;
  /** Largest number. */
  readonly max?: number;
  /** The texts allowed. */
  readonly oneOf?: readonly string[];
  /** Whether the command cannot do without. */
  readonly required?: boolean;
  /** Where in a file: `relay` (the default) with each relay, `top` once for all of them, `none` not at all. */
  readonly file?: "relay" | "top" | "none";
}

/** The flags of a command by name. */
export type FlagTable = Readonly<Record<string, Flag>>;

/** What a flag holds, read and checked. */
export type Value = string | number | boolean | readonly string[] | ReadonlyMap<string, string>;

/** A value that was given. */
export interface Given {
  /** The value. */
  readonly value: Value;
  /** Where it comes from. */
  readonly source: "flag" | "environment" | "file";
  /** How a sentence names that place: `--lanes`, `EFFECTONCE_LANES`, `effectonce.json: relays.billing.lanes`. */
  readonly label: string;
}

/** Values that were given, by flag. */
export type Layer = ReadonlyMap<string, Given>;

/** The values of flags by name, and the words that are no flags. */
export class Flags {
  /** The flags that there are. */
  readonly table: FlagTable;
  /** The words behind the command. */
  readonly words: readonly string[];
  /** What was given. */
  readonly layer: Layer;
  readonly #place: (name: string) => string;

  /** Holds values that were read and checked; `place` names a flag that was not given, and where it belongs. */
  constructor(
    table: FlagTable,
    words: readonly string[],
    layer: Layer,
    place: (name: string) => string = (name) => `--${name}`,
  ) {
    this.table = table;
    this.words = words;
    this.layer = layer;
    this.#place = place;
  }

  /** A value, given or by default. */
  value(name: string): Value | undefined {
    return this.layer.get(name)?.value ?? this.table[name]?.default;
  }

  /** Whether a value was given; that of a switch: whether it is on. */
  has(name: string): boolean {
    return (this.layer.get(name)?.value ?? false) !== false;
  }

  /** How a sentence names a flag: by the place where its value comes from, or belongs. */
  label(name: string): string {
    return this.layer.get(name)?.label ?? this.#place(name);
  }

  /** A text, or undefined. */
  text(name: string): string | undefined {
    const value = this.value(name);
    return typeof value === "string" ? value : undefined;
  }

  /** A text that the command requires. */
  given(name: string): string {
    const value = this.text(name);
    if (value === undefined) throw new UsageError(`${this.label(name)} is missing`);
    return value;
  }

  /** A URL, that of the variable if it is `env:NAME`; or undefined. */
  url(name: string): string | undefined {
    const value = this.text(name);
    return value === undefined ? undefined : dereference(this.label(name), value);
  }

  /** A number, or undefined. */
  number(name: string): number | undefined {
    const value = this.value(name);
    return typeof value === "number" ? value : undefined;
  }

  /** Whether a switch is on. */
  on(name: string): boolean {
    return this.value(name) === true;
  }

  /** Names, or undefined. */
  names(name: string): readonly string[] | undefined {
    const value = this.value(name);
    return Array.isArray(value) ? value : undefined;
  }

  /** Pairs by their names. */
  pairs(name: string): Readonly<Record<string, string>> {
    const value = this.value(name);
    return Object.fromEntries(value instanceof Map ? value : []);
  }

  /** Headers by their names, with the texts of variables for `env:NAME`. */
  headers(name: string): Readonly<Record<string, string>> {
    const label = this.label(name);
    return Object.fromEntries(
      Object.entries(this.pairs(name)).map(([name, text]) => [name, dereference(`${label} ${name}`, text)]),
    );
  }

  /** @throws {UsageError} If a flag is missing that the command cannot do without. */
  complete(): this {
    for (const [name, { required }] of Object.entries(this.table)) if (required) this.given(name);
    return this;
  }
}

/** Stands for an empty value: no argument can contain it. */
const EMPTY = "\0";

/**
 * Reads the arguments of one command, and the environment for what they leave out.
 *
 * @throws {UsageError} If a flag is unknown, lacks its value, or has a bad one; if there are too many or few words.
 */
export function readFlags(args: readonly string[], flags: FlagTable, words: readonly string[]): Flags {
  const texts = Object.keys(flags).filter((name) => flags[name]!.kind !== "switch");
  const switches = Object.keys(flags).filter((name) => flags[name]!.kind === "switch");
  // A value may begin with "-" or be empty, so each is tied to its flag before the flags are read.
  const tied: string[] = [];
  for (let i = 0; i < args.length; i++) {
    const arg = args[i]!;
    const [, name, value] = /^--([^=]+)(?:=(.*))?$/s.exec(arg) ?? [];
    if (arg === "--") {
      tied.push(...args.slice(i));
      break;
    }
    if (name !== undefined && value !== undefined && switches.includes(name)) {
      throw new UsageError(`--${name} takes no value`);
    }
    if (name === undefined || !texts.includes(name)) tied.push(arg);
    else if (value !== undefined) tied.push(`--${name}=${value || EMPTY}`);
    else if (i + 1 < args.length && !isFlag(args[i + 1]!, flags)) tied.push(`--${name}=${args[++i] || EMPTY}`);
    else throw new UsageError(`--${name} needs a value`);
  }
  const collect = texts.filter((name) => flags[name]!.kind === "pairs");
  const seen = new Set<string>();
  const parsed = parseArgs(tied, {
    boolean: switches,
    string: [...texts, "_"],
    collect,
    unknown(arg, name) {
      if (name !== undefined || arg.startsWith("-")) {
        throw new UsageError(`${arg.split("=")[0]} is not a flag of this command`);
      }
    },
  });
  for (const arg of tied) {
    const name = /^--([^=]+)/.exec(arg)?.[1];
    if (name === undefined || collect.includes(name)) continue;
    if (seen.has(name)) throw new UsageError(`--${name} is given twice`);
    seen.add(name);
  }
  const layer = new Map<string, Given>();
  for (const [name, flag] of Object.entries(flags)) {
    const value = (parsed as Record<string, unknown>)[name];
    const label = `--${name}`;
    const give = (value: Value) => layer.set(name, { value, source: "flag", label });
    if (value === true) give(true);
    else if (Array.isArray(value) && value.length > 0) {
      give(pairsOf(label, value.map((text) => String(text).replace(EMPTY, ""))));
    } else if (typeof value === "string") give(fromText(label, value.replace(EMPTY, ""), flag));
  }
  const given = parsed._.map(String);
  if (given.length > words.length) throw new UsageError(`"${maskedWord(given[words.length]!)}" is one word too many`);
  // One in brackets may be left out.
  if (given.length < words.filter((word) => !word.startsWith("[")).length) {
    throw new UsageError(`${words[given.length]} is missing`);
  }
  return new Flags(flags, given, new Map([...readEnvironment(flags), ...layer]));
}

/** What the environment holds for flags. */
export function readEnvironment(flags: FlagTable): Layer {
  const layer = new Map<string, Given>();
  for (const [name, flag] of Object.entries(flags)) {
    const label = variableOf(name);
    const text = variable(label);
    if (text !== undefined) layer.set(name, { value: fromText(label, text, flag), source: "environment", label });
  }
  return layer;
}

function isFlag(arg: string, flags: FlagTable): boolean {
  const name = /^--([^=]+)/.exec(arg)?.[1];
  return name !== undefined && name in flags;
}

/** Reads the text of an argument or of a variable. */
function fromText(label: string, text: string, flag: Flag): Value {
  switch (flag.kind) {
    case "number":
      return checkedNumber(label, /^\d+$/.test(text) ? Number(text) : NaN, flag, `"${text}"`);
    case "names":
      return checkedNames(label, text.split(",").map((name) => name.trim()), "names with commas between them");
    case "pairs":
      return pairsOf(label, text.split(/\r?\n/).filter((line) => line !== ""));
    case "switch":
      if (/^(true|1)$/.test(text)) return true;
      if (/^(false|0)$/.test(text)) return false;
      throw new UsageError(`${label} must be true or false, 1 or 0, not "${text}"`);
    default:
      return checkedText(label, text, flag);
  }
}

/**
 * A number in its range.
 *
 * @param shown The value as the sentence shows it.
 */
export function checkedNumber(label: string, number: number, { min = 0, max = 2_147_483_647 }: Flag, shown: string): number {
  if (Number.isInteger(number) && number >= min && number <= max) return number;
  throw new UsageError(`${label} must be a whole number from ${min} to ${max}, not ${shown}`);
}

/** A text that may be one of a few, or is a name. */
export function checkedText(label: string, text: string, { kind, oneOf }: Flag): string {
  if (kind === "name") {
    const bytes = new TextEncoder().encode(text).length;
    if (bytes < 1 || bytes > 1024) throw new UsageError(`${label} must be 1 to 1024 bytes of UTF-8, not ${bytes}`);
  }
  if (oneOf && !oneOf.includes(text)) throw new UsageError(`${label} must be ${oneOf.join(" or ")}, not "${text}"`);
  return text;
}

/** Names, at least one and none of them empty; `what`: how they are written. */
export function checkedNames(label: string, names: readonly string[], what: string): readonly string[] {
  if (names.length > 0 && !names.includes("")) return names;
  throw new UsageError(`${label} must be ${what}`);
}

/** Pairs whose names differ in more than case, as those of headers must. */
export function checkedPairs(label: string, pairs: readonly (readonly [string, string])[]): ReadonlyMap<string, string> {
  const found = new Map<string, string>();
  for (const [name, value] of pairs) {
    if (found.keys().some((other) => other.toLowerCase() === name.toLowerCase())) {
      throw new UsageError(`${label} has ${name} twice`);
    }
    found.set(name, value);
  }
  return found;
}

function pairsOf(label: string, texts: readonly string[]): ReadonlyMap<string, string> {
  return checkedPairs(
    label,
    texts.map((text) => {
      const at = text.indexOf("=");
      // The value may be a secret, so a message shows none of it.
      if (at < 1) throw new UsageError(`${label} must be of the form NAME=VALUE`);
      return [text.slice(0, at), text.slice(at + 1)];
    }),
  );
}

/** The flags of a command as lines of help. */
export function helpOf(flags: FlagTable): string {
  const lines = Object.entries(flags).map(([name, { kind, value, oneOf, required, help, default: preset }]) => {
    const usual = {
      number: " N",
      switch: "",
      url: " URL",
      names: " A,B",
      pairs: " NAME=VALUE",
      name: " NAME",
      text: " TEXT",
    };
    const what = value ?? oneOf?.join("|");
    const more = required ? " (required)" : preset === undefined ? "" : ` (${preset})`;
    return [`  --${name}${what === undefined ? usual[kind] : ` ${what}`}`, help + more] as const;
  });
  const width = Math.max(...lines.map(([left]) => left.length)) + 2;
  return lines.map(([left, help]) => `${left.padEnd(width)}${help}\n`).join("");
}
