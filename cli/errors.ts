/**
 * How a command says what went wrong: one sentence, and where to read on.
 *
 * @module
 */

/** An error of whoever typed the command: exit code 2. */
export class UsageError extends Error {
  /** Always `UsageError`. */
  override readonly name = "UsageError";
}

/** An error's text for a person. */
export function reason(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

/** Where a person reads on about a code of `EffectError`, or about what is `parked`. */
export function pageOf(code: string): string {
  return `docs/operations.md#${code}`;
}

/** What a person reads of an error that ended a command; `help`: how to ask about its flags. */
export function sentencesOf(error: unknown, help: string): string {
  if (error instanceof AggregateError) return error.errors.map((one) => sentencesOf(one, help)).join("\n");
  const sentence = `effectonce: ${reason(error).trimEnd()}`;
  if (error instanceof UsageError) return `${sentence}\nSee: ${help}`;
  const code = codeOf(error);
  return code === undefined ? sentence : `${sentence}\nSee ${pageOf(code)}`;
}

/**
 * The code of an `EffectError`: by name, as two installed copies of a package make `instanceof` lie; the cause's too, where a
 * command said more.
 */
export function codeOf(error: unknown): string | undefined {
  for (let layer = error; layer instanceof Error; layer = layer.cause) {
    if (layer.name === "EffectError" && "code" in layer) return String(layer.code);
  }
}
