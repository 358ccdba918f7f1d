/**
 * Stands in for `jsr:@std/assert` where JSR cannot be reached: the few assertions that this project uses.
 *
 * @module
 */
import nodeAssert from "node:assert/strict";

/** Fails unless the condition holds. */
export function assert(condition: unknown, message = "Expected a true condition"): asserts condition {
  nodeAssert.ok(condition, message);
}

/** Fails unless both are deeply equal. */
export function assertEquals<T>(actual: T, expected: T, message?: string): void {
  nodeAssert.deepEqual(actual, expected, message as string);
}

/** Fails if both are deeply equal. */
export function assertNotEquals<T>(actual: T, expected: T, message?: string): void {
  nodeAssert.notDeepEqual(actual, expected, message as string);
}

/** Fails unless the text has the part. */
export function assertStringIncludes(actual: string, expected: string, message?: string): void {
  nodeAssert.ok(actual.includes(expected), message ?? `Expected to find ${JSON.stringify(expected)} in:\n${actual}`);
}

/** Fails unless the text matches. */
export function assertMatch(actual: string, expected: RegExp, message?: string): void {
  nodeAssert.match(actual, expected, message as string);
}

// deno-lint-ignore no-explicit-any -- any constructor's arguments
type ErrorClass<E extends Error> = new (...args: any[]) => E;

function check<E extends Error>(error: unknown, kind: ErrorClass<E>, part: string): E {
  if (!(error instanceof kind)) throw new nodeAssert.AssertionError({ message: `Expected ${kind.name}, got ${error}` });
  assertStringIncludes(error.message, part);
  return error;
}

/** Fails unless the function throws such an error; returns it. */
export function assertThrows<E extends Error = Error>(run: () => unknown, kind?: ErrorClass<E>, part = ""): E {
  try {
    run();
  } catch (error) {
    return check(error, kind ?? Error as unknown as ErrorClass<E>, part);
  }
  throw new nodeAssert.AssertionError({ message: "Expected an error, got none" });
}

/** Fails unless the promise rejects with such an error; returns it. */
export async function assertRejects<E extends Error = Error>(
  run: () => PromiseLike<unknown>,
  kind?: ErrorClass<E>,
  part = "",
): Promise<E> {
  try {
    await run();
  } catch (error) {
    return check(error, kind ?? Error as unknown as ErrorClass<E>, part);
  }
  throw new nodeAssert.AssertionError({ message: "Expected an error, got none" });
}
