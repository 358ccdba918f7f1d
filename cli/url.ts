/**
 * Reads URLs: what they name, and the parameters behind the question mark. Nothing that may be a password is repeated.
 *
 * @module
 */
import { UsageError } from "./errors.ts";

/** A URL in parts. */
export interface UrlParts {
  /** In small letters. */
  readonly scheme: string;
  /** What is between the scheme and the parameters. */
  readonly rest: string;
  /** What is behind the question mark. */
  readonly parameters: URLSearchParams;
}

/**
 * Takes a URL apart.
 *
 * @param label How a sentence names where the URL was given.
 */
export function parts(label: string, url: string): UrlParts {
  const match = /^([a-z][a-z0-9+.-]*):(.*)$/is.exec(url);
  if (!match) {
    const schemes = "sqlite:, postgres:, mysql:, kafka:, https:, file: or stdout:";
    throw new UsageError(`${label} is not a URL: it should begin with a scheme, such as ${schemes}`);
  }
  const [rest, query] = match[2]!.split(/\?(.*)/s);
  return { scheme: match[1]!.toLowerCase(), rest: rest!, parameters: new URLSearchParams(query ?? "") };
}

/** @throws {UsageError} If there is a parameter that is not known, or one twice. */
export function onlyParameters(label: string, { scheme, parameters }: UrlParts, known: readonly string[]): void {
  for (const name of parameters.keys()) {
    if (!known.includes(name)) {
      const help = known.length > 0 ? `it knows ${known.join(", ")}` : "it has none";
      // What is no name may be the rest of a password that a question mark has cut in two.
      const shown = /^[\w.-]*$/.test(name) ? `"${name}"` : "what is behind the question mark";
      throw new UsageError(`${label}: ${shown} is not a parameter of ${scheme}: URLs: ${help}`);
    }
    if (parameters.getAll(name).length > 1) throw new UsageError(`${label}: ${name} is given twice`);
  }
}

/** A parameter that is a whole number. */
export function numberOf(
  label: string,
  { parameters }: UrlParts,
  name: string,
  min: number,
  max: number,
): number | undefined {
  const text = parameters.get(name);
  if (text === null) return undefined;
  const number = /^\d{1,15}$/.test(text) ? Number(text) : NaN;
  if (number >= min && number <= max) return number;
  throw new UsageError(`${label}: ${name} must be a whole number from ${min} to ${max}`);
}

/** A parameter that is one of a few. */
export function choice<T extends string>(
  label: string,
  { parameters }: UrlParts,
  name: string,
  known: readonly T[],
): T | undefined {
  const value = parameters.get(name);
  if (value === null) return undefined;
  const found = known.find((other) => other === value);
  if (found !== undefined) return found;
  const listed = [known.slice(0, -1).join(", "), ...known.slice(-1)].filter((part) => part !== "").join(" or ");
  const shown = /^[\w.-]*$/.test(value) ? `${name}=${value}` : `this ${name}`;
  throw new UsageError(`${label}: ${shown} is not known: use ${listed}`);
}
