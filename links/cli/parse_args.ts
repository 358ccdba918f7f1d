/**
 * Stands in for `jsr:@std/cli/parse-args` where JSR cannot be reached: the few options that this project uses, with the
 * same answers.
 *
 * @module
 */

/** The options of `parseArgs` that this project uses. */
export interface ParseOptions {
  /** Flags without a value. */
  boolean?: readonly string[];
  /** Flags with a text; `_` keeps the words as texts. */
  string?: readonly string[];
  /** Flags that may be given several times. */
  collect?: readonly string[];
  /** Called for what is not declared; false leaves it out. */
  unknown?(arg: string, key?: string, value?: unknown): unknown;
}

/** Flags by name, and under `_` the words. */
export interface Args {
  /** The words. */
  _: (string | number)[];
  /** The flags. */
  [name: string]: unknown;
}

/** Reads a command line. */
export function parseArgs(args: readonly string[], options: ParseOptions = {}): Args {
  const { boolean = [], string = [], collect = [], unknown } = options;
  const parsed: Args = { _: [] };
  for (const name of boolean) parsed[name] = false;
  for (const name of collect) parsed[name] = [];
  for (let i = 0; i < args.length; i++) {
    const arg = args[i]!;
    if (arg === "--") {
      parsed._.push(...args.slice(i + 1));
      break;
    }
    const match = /^--?([^=-][^=]*)(?:=(.*))?$/s.exec(arg);
    if (!match || arg === "-") {
      if (unknown?.(arg) !== false) parsed._.push(arg);
      continue;
    }
    const name = match[1]!;
    let value: unknown = match[2];
    if (boolean.includes(name)) {
      value = value === undefined || value !== "false";
    } else if (string.includes(name)) {
      const next = args[i + 1];
      if (value === undefined && next !== undefined && !/^-[^-]*[a-z]|^--/i.test(next)) value = args[++i];
      value ??= "";
    } else if (unknown?.(arg, name, value) === false) {
      continue;
    }
    if (collect.includes(name)) (parsed[name] as unknown[]).push(value);
    else parsed[name] = value;
  }
  return parsed;
}
