/**
 * Variables of the environment: of flags, and of values that are kept out of the command line.
 *
 * @module
 */
import { UsageError } from "./errors.ts";
import { need, permitted } from "./permissions.ts";

/** The variable that stands in for a flag. */
export function variableOf(flag: string): string {
  return `EFFECTONCE_${flag.toUpperCase().replaceAll("-", "_")}`;
}

/** A variable's text; undefined if it is not set, is empty (as an unset one often is in a compose file), or may not be read. */
export function variable(name: string): string | undefined {
  return permitted({ name: "env", variable: name }) ? Deno.env.get(name) || undefined : undefined;
}

/** Whether a text is the name of a variable that has the value. */
export function isReference(text: string): boolean {
  return text.startsWith("env:");
}

/**
 * A value: the text itself, or with `env:NAME` what that variable holds.
 *
 * @param label Names the value in a sentence.
 * @throws {UsageError} If there is no such variable.
 */
export function dereference(label: string, text: string): string {
  if (!isReference(text)) return text;
  const name = text.slice(4);
  // Not repeated if it is none: it may be the secret itself.
  if (!/^[A-Za-z_]\w*$/.test(name)) throw new UsageError(`${label}: behind env: there must be the name of a variable`);
  need(`${label}: env:${name}`, { name: "env", variable: name });
  const value = Deno.env.get(name);
  if (value === undefined) throw new UsageError(`${label}: the environment has no variable ${name}`);
  return value;
}
