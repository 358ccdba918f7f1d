/**
 * Stops a process at a step of a relay, for ever: whoever started it kills it there.
 *
 * @module
 */

/** Where a process stops. */
export interface Stop {
  /** `before` or `after`, a part of the relay and what is called of it: `after sink.commit`. None if empty. */
  readonly step: string;
  /** At which time it comes there, from 1. */
  readonly time: number;
}

/** What a child process writes: a line. */
export const say = (text: string): number => Deno.stdout.writeSync(new TextEncoder().encode(`${text}\n`));

/** Puts a proxy around each part, so that what the relay calls is what is stopped, whatever it calls. */
export function stopping({ step, time }: Stop): <T extends object>(name: string, part: T) => T {
  let times = 0;
  function reach(here: string): void {
    if (here !== step || ++times !== time) return;
    say(`at ${Deno.pid}`);
    Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0); // For ever: nothing goes on until the SIGKILL.
  }
  return function wrap<T extends object>(name: string, part: T): T {
    return new Proxy(part, {
      get(object, property, receiver) {
        const value: unknown = Reflect.get(object, property, receiver);
        if (typeof value !== "function") return value;
        const opens = property === "open" || property === "begin";
        return async (...args: unknown[]) => {
          reach(`before ${name}.${String(property)}`);
          const answer: unknown = await value.apply(object, args);
          reach(`after ${name}.${String(property)}`);
          return answer !== null && typeof answer === "object" && opens ? wrap(name, answer) : answer;
        };
      },
    });
  };
}
