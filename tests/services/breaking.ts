/**
 * A way to a database that breaks at a message of choice: for commits whose answers are lost.
 *
 * @module
 */
import { type Direction, type Proxy, startProxy } from "./proxy.ts";

/** A way to a database that breaks where it is told to. */
export interface Breaking extends AsyncDisposable {
  /** What is in between. */
  readonly proxy: Proxy;
  /** Where the database is to be reached through it. */
  readonly url: string;
  /**
   * Breaks at the n-th message in a direction from now on, or at the first that has a text in it; `away`: and cannot be made
   * again until the proxy is told so.
   */
  arm(direction: Direction, at: number | RegExp, away?: boolean): void;
  /** Whether it has broken since; disarms it. */
  broke(): boolean;
}

const decoder = new TextDecoder();
/** The message that is a COMMIT, in either protocol; not one that has "autocommit" in it. */
export const COMMIT: RegExp = /(^|\W)commit\0?$/;

/** Starts it in front of a server. */
export function breaking(url: string): Breaking {
  const { hostname, port } = new URL(url);
  let armed: { readonly direction: Direction; readonly at: number | RegExp; readonly away: boolean } | undefined;
  let [messages, broken] = [0, false];
  // The answer to a message that fits, once the server has given it.
  let answer = false;
  const proxy: Proxy = startProxy({ hostname, port: Number(port) }, {
    observe(direction, bytes) {
      if (!armed || broken) return "pass";
      if (typeof armed.at === "number") {
        broken = direction === armed.direction && ++messages === armed.at;
      } else if (direction === "toServer") {
        answer = armed.at.test(decoder.decode(bytes));
        broken = answer && armed.direction === "toServer";
      } else {
        broken = answer;
      }
      if (broken && armed.away) proxy.refuse(true);
      return broken ? "cut" : "pass";
    },
  });
  return {
    proxy,
    url: proxy.url(url),
    arm(direction, at, away = false) {
      armed = { direction, at, away };
      [messages, broken, answer] = [0, false, false];
    },
    broke() {
      armed = undefined;
      return broken;
    },
    [Symbol.asyncDispose]: () => proxy[Symbol.asyncDispose](),
  };
}
