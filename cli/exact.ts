/**
 * JSON of messages, whose numbers may have more digits than one here keeps.
 *
 * @module
 */
import type { Json } from "../mod.ts";

/** Is in every text that has a number of more digits than one here keeps. */
const LONG_NUMBER = /[\d.eE+-]{16}/;
/** A number as its text. */
export interface RawNumber {
  readonly rawJSON: string;
}
/** https://github.com/tc39/proposal-json-parse-with-source */
const { rawJSON } = JSON as typeof JSON & { rawJSON(text: string): RawNumber };
/** Whether a value is one. */
export const isRaw = (value: unknown): value is RawNumber =>
  typeof value === "object" && value !== null && "rawJSON" in value;

/** Parses JSON; numbers of more than 15 digits keep them, as {@linkcode RawNumber}, which `JSON.stringify` knows. */
export function parseExactly(text: string): Json {
  if (!LONG_NUMBER.test(text)) return JSON.parse(text);
  return JSON.parse(text, (_key: string, value: unknown, context?: { readonly source?: string }) => {
    const source = context?.source;
    const isLong = typeof value === "number" && source !== undefined && source.replace(/\D/g, "").length > 15;
    return isLong ? rawJSON(source) : value;
  });
}
