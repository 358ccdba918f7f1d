/**
 * What commands print on stdout.
 *
 * @module
 */
import type { Flags } from "./flags.ts";

/** Writes a text, all of it. */
export function write(text: string): void {
  const bytes = new TextEncoder().encode(text);
  for (let done = 0; done < bytes.length;) done += Deno.stdout.writeSync(bytes.subarray(done));
}

/** Prints a result: with `--json` as one line, else as a text for people. */
export function print(flags: Flags, value: unknown, text: string): void {
  write((flags.on("json") ? JSON.stringify(value) : text.trimEnd()) + "\n");
}

/** A span of time for people. */
export function seconds(ms: number): string {
  return ms < 1000 ? `${Math.round(ms)} ms` : `${Math.round(ms / 1000)} s`;
}
