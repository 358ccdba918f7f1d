/**
 * Command lines: what flags a command has, how they are read, and its help.
 *
 * @module
 */
import { parseArgs } from "@std/cli/parse-args";

/** An error of whoever typed the command: exit code 2. */
export class UsageError extends Error {
  /** Always `UsageError`. */
  override readonly name = "UsageError";
}

/** One flag. */
export interface Flag {
  /** `name` is a text of 1 to 1024 bytes; `switch` takes no value; `list` may be given several times. */
  readonly kind: "text" | "name" | "number" | "switch" | "list";
  /** Shown in the help, in one line. */
  readonly help: string;
  /** What stands for the value in the help. */
  readonly value?: string;
  /** Smallest number. */
  readonly min?: number;
  /** Largest number. */
  readonly max?: number;
  /** The texts allowed. */
  readonly oneOf?: readonly string[];
  /** Whether the command cannot do without. */
  readonly required?: boolean;
}

/** The values of flags by name, and the words that are no flags. */
export class Flags {
  /** The words behind the command. */
  readonly words: readonly string[];
  readonly #values: ReadonlyMap<string, string | number | boolean | readonly string[]>;

  /** Holds values that were read and checked. */
  constructor(words: readonly string[], values: ReadonlyMap<string, string | number | boolean | readonly string[]>) {
    this.words = words;
    this.#values = values;
  }

  /** A text, or undefined. */
  text(name: string): string | undefined {
    const value = this.#values.get(name);
    return typeof value === "string" ? value : undefined;
  }

  /** A text that the command requires. */
  given(name: string): string {
    const value = this.text(name);
    if (value === undefined) throw new UsageError(`--${name} is missing`);
    return value;
  }

  /** A number, or undefined. */
  number(name: string): number | undefined {
    const value = this.#values.get(name);
    return typeof value === "number" ? value : undefined;
  }

  /** Whether a switch was given. */
  on(name: string): boolean {
    return this.#values.get(name) === true;
  }

  /** The texts of a flag that may be given several times. */
  list(name: string): readonly string[] {
    const value = this.#values.get(name);
    return Array.isArray(value) ? value : [];
  }
}

/** Stands for an empty value: no argument can contain it. */
const EMPTY = "\0";

/**
 * Reads the arguments of one command.
 *
 * @throws {UsageError} If a flag is unknown, lacks its value, or has a bad one; if there are too many or few words.
 */
export function readFlags(args: readonly string[], flags: Readonly<Record<string, Flag>>, words: readonly string[]): Flags {
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
  const collect = texts.filter((name) => flags[name]!.kind === "list");
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
  const values = new Map<string, string | number | boolean | readonly string[]>();
  for (const [name, flag] of Object.entries(flags)) {
    const value = (parsed as Record<string, unknown>)[name];
    if (flag.kind === "switch") {
      values.set(name, value === true);
    } else if (Array.isArray(value)) {
      values.set(name, value.map((text) => String(text).replace(EMPTY, "")));
    } else if (value !== undefined) {
      values.set(name, checked(name, String(value).replace(EMPTY, ""), flag));
    } else if (flag.required) {
      throw new UsageError(`--${name} is missing`);
    }
  }
  const given = parsed._.map(String);
  if (given.length > words.length) throw new UsageError(`"${given[words.length]}" is one word too many`);
  if (given.length < words.length) throw new UsageError(`${words[given.length]} is missing`);
  return new Flags(given, values);
}

function isFlag(arg: string, flags: Readonly<Record<string, Flag>>): boolean {
  const name = /^--([^=]+)/.exec(arg)?.[1];
  return name !== undefined && name in flags;
}

function checked(name: string, text: string, { kind, min = 0, max = 2_147_483_647, oneOf }: Flag): string | number {
  if (kind === "number") {
    const number = Number(text);
    if (/^\d+$/.test(text) && number >= min && number <= max) return number;
    throw new UsageError(`--${name} must be a whole number from ${min} to ${max}, not "${text}"`);
  }
  if (kind === "name") {
    const bytes = new TextEncoder().encode(text).length;
    if (bytes < 1 || bytes > 1024) throw new UsageError(`--${name} must be 1 to 1024 bytes of UTF-8, not ${bytes}`);
  }
  if (oneOf && !oneOf.includes(text)) throw new UsageError(`--${name} must be ${oneOf.join(" or ")}, not "${text}"`);
  return text;
}

/** The flags of a command as lines of help. */
export function helpOf(flags: Readonly<Record<string, Flag>>): string {
  const lines = Object.entries(flags).map(([name, { kind, value, oneOf, required, help }]) => {
    const what = kind === "switch" ? "" : ` ${value ?? oneOf?.join("|") ?? (kind === "number" ? "N" : "TEXT")}`;
    return [`  --${name}${what}`, required ? `${help} (required)` : help] as const;
  });
  const width = Math.max(...lines.map(([left]) => left.length)) + 2;
  return lines.map(([left, help]) => `${left.padEnd(width)}${help}\n`).join("");
}
