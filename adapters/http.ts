/**
 * Delivers messages to an HTTP endpoint: one request a message, with an `Idempotency-Key` and as a CloudEvent in binary mode.
 *
 * ```ts
 * import { relay } from "@effectonce/effectonce";
 * import { memoryOutbox, memoryStore } from "@effectonce/effectonce/memory";
 * import { httpSink, type HttpSinkOptions } from "@effectonce/effectonce/http";
 * import { deepEqual } from "node:assert/strict";
 *
 * const charged: unknown[] = [];
 * const options: HttpSinkOptions = {
 *   headers: { authorization: "Bearer token" },
 *   repeat: "same-key", // pay.example promises to act once per Idempotency-Key
 *   // Stands in for pay.example; left out, it is the real fetch.
 *   async fetch(url, init) {
 *     const request = new Request(url, init);
 *     charged.push([request.headers.get("idempotency-key"), await request.json()]);
 *     return new Response("paid");
 *   },
 * };
 *
 * const store = memoryStore();
 * await store.enqueue({ id: "order-1", topic: "payments", value: { amount: 5 } });
 * await relay({ from: memoryOutbox(store), to: httpSink("https://pay.example/charge", options), store, drain: true });
 * deepEqual(charged, [["order-1", { amount: 5 }]]);
 * deepEqual((await store.list())[0]!.result, { status: 200, body: "paid" });
 * ```
 *
 * What an answer means:
 *
 * | Answer | Outcome |
 * | --- | --- |
 * | 2xx | delivered; kept are the status and up to 64 KiB of text (null if the text broke off) |
 * | 409, 425, 429; 503 with Retry-After; not reached | did not happen: tried again, after Retry-After at the earliest |
 * | other 3xx (not followed); other 4xx | refused for good; kept are the status, and the text of a 4xx |
 * | 302 and 303 (often: it is done); 408; other 5xx; time-out; broken off; not HTTP | not known: repeated only with `repeat: "same-key"` |
 *
 * What a request carries, the first of these that sets a name winning:
 *
 * 1. `idempotency-key` and the CloudEvents attributes `ce-specversion`, `ce-id` (the message's id), `ce-source`, `ce-type` (its
 *    topic), `ce-time` and `ce-partitionkey` (its key). An `Idempotency-Key` of visible ASCII goes as it is, any other (and one
 *    that looks percent-encoded itself) percent-encoded, so that two keys never become one.
 * 2. The option `headers`.
 * 3. The message's own headers, such as `content-type`, `traceparent` and `tracestate`; a text that is not printable ASCII is
 *    percent-encoded. Left out are names that HTTP cannot carry, `ce-*` and `ce_*`, and what belongs to the connection or says
 *    who is asking (`host`, `connection`, `content-length`, `authorization`, `cookie`, `proxy-*` …).
 * 4. `content-type: application/octet-stream`, but none for a tombstone, whose body is empty.
 *
 * @module
 */
import {
  type CallSink,
  type Delivery,
  encodeResult,
  type Found,
  type Json,
  type Message,
  rejected,
  retryable,
} from "../mod.ts";

/** How {@linkcode httpSink} asks. */
export interface HttpSinkOptions {
  /**
   * The method. A PUT is not taken for repeatable either: sent late, it would bring an old state back.
   *
   * @default {"POST"}
   */
  readonly method?: "POST" | "PUT";
  /**
   * Sent with every request, and with that of `reconcile`. Not `idempotency-key`, not `ce-*`, and nothing that belongs to the
   * connection. They win over a message's own headers, `content-type` included.
   *
   * @default {{}}
   */
  readonly headers?: Readonly<Record<string, string>>;
  /**
   * `same-key`: the target promises to act once per `Idempotency-Key`, so a request is repeated when its outcome is not known.
   * `never`: such a message is in doubt.
   *
   * @default {"never"}
   */
  readonly repeat?: "never" | "same-key";
  /**
   * With `same-key`: how long the target remembers a key, in milliseconds, from 1. Nothing is repeated past 80 % of it.
   *
   * @default {86_400_000}
   */
  readonly dedupeWindowMs?: number;
  /**
   * How long a request may take, the answer's text included, in milliseconds, from 1. Running out of it while connecting
   * cannot be told from running out of it later, and leaves the outcome unknown as well.
   *
   * @default {10_000}
   */
  readonly timeoutMs?: number;
  /**
   * Where to ask about a message in doubt, by GET: a URL in which `{id}`, `{key}` and `{topic}` stand for those of the message,
   * and `{idempotencyKey}` for what it was sent under, which is its id and, when it was sent anew, a suffix. Such as
   * `https://pay.example/charges/{idempotencyKey}`. It must hold one of these but `{topic}`, behind the host.
   *
   * An answer 2xx means that it happened. 404 means that it did not, **and it is then sent again under a new idempotency
   * key**: try the URL by hand first, as a mistyped path answers 404 too. 408, 425, 429, 5xx and no answer: asked again. All
   * else, and a message without the key that the URL needs: the target cannot tell.
   *
   * @default {undefined} A message in doubt waits for a person.
   */
  readonly reconcile?: string;
  /**
   * The CloudEvents source: a URI-reference that says where the messages come from.
   *
   * @default {"effectonce"}
   */
  readonly source?: string;
  /**
   * Sends the requests: for a client of your own, or a test. It must heed `signal` and never send a request twice.
   *
   * @default {globalThis.fetch}
   */
  fetch?(url: string, init: RequestInit): Promise<Response>;
}

/** Bytes of an answer that are read at most; what is kept of them must fit into a store's 64 KiB of JSON. */
const ANSWER_BYTES = 65_536;
/** The longest pause that a Retry-After can impose. */
const MAX_PAUSE_MS = 86_400_000;
// Who sets what: the message's identity is ours (CloudEvents HTTP binding 3.1.3), the connection is fetch's (RFC 9110, 7.6.1).
const RESERVED =
  /^(connection|content-length|expect|host|idempotency-key|keep-alive|te|trailer|transfer-encoding|upgrade|ce[-_].*)$/i;
// A message must not decide who is asking, nor what else https://fetch.spec.whatwg.org/#forbidden-request-header keeps back.
const NOT_FROM_MESSAGE =
  /^(accept-encoding|authorization|cookie2?|date|origin|referer|set-cookie|via|x-http-method(-override)?|x-method-override|(proxy|sec)-.*)$/i;
/** RFC 9110, 5.6.2. */
const TOKEN = /^[!#$%&'*+.^_`|~0-9a-z-]+$/i;
// What Node, undici and Bun call a failure to connect. A broken connection can be "unreachable" too, but says which call it was.
const UNSENT =
  /^(ECONNREFUSED|EHOSTUNREACH|ENETUNREACH|ENOTFOUND|EAI_AGAIN|UND_ERR_CONNECT_TIMEOUT|ConnectionRefused|FailedToOpenSocket|UNABLE_TO_VERIFY_LEAF_SIGNATURE|(?!ERR_SSL_)\w*CERT\w*)$/;

const encoder = new TextEncoder();

/** CloudEvents HTTP binding 1.0.2, 3.1.3.2: all but visible ASCII, and `"` and `%`. */
function percentEncode(text: string): string {
  const hex = (byte: number) => "%" + byte.toString(16).toUpperCase().padStart(2, "0");
  return text.replace(/[^!#$&-~]/gu, (character) => Array.from(encoder.encode(character), hex).join(""));
}

function idempotencyHeader(key: string): string {
  // "a b" and "a%20b" must stay two keys: the target would take the second for done.
  return /^[!-~]+$/.test(key) && !/%[0-9A-F]{2}/.test(key) ? key : percentEncode(key);
}

function whole(name: string, value: number, max: number): number {
  if (Number.isSafeInteger(value) && value >= 1 && value <= max) return value;
  throw new RangeError(`Cannot use ${name} ${value}: it must be a whole number from 1 to ${max}`);
}

interface Target {
  readonly url: URL;
  readonly authorization?: string;
}

/** Takes the credentials out of a URL: fetch refuses them there, and a URL is shown to people. No message quotes it before. */
function parseTarget(what: string, text: string | URL): Target {
  const url = URL.canParse(text) ? new URL(text) : undefined;
  if (url?.protocol !== "http:" && url?.protocol !== "https:") {
    throw new TypeError(`Cannot use the ${what}: it must be an absolute http: or https: URL`);
  }
  const { username, password } = url;
  url.username = url.password = url.hash = "";
  if (username === "" && password === "") return { url };
  try {
    const [user, secret] = [decodeURIComponent(username), decodeURIComponent(password)];
    // RFC 7617, 2: with a colon it would be read as another user with another password.
    if (user.includes(":")) throw new TypeError();
    return { url, authorization: `Basic ${btoa(String.fromCharCode(...encoder.encode(`${user}:${secret}`)))}` };
  } catch {
    throw new TypeError(
      `Cannot use the credentials in the ${what}: they must be percent-encoded UTF-8, the user without colon`,
    );
  }
}

function parseHeaders(headers: Readonly<Record<string, string>>): Headers {
  const parsed = new Headers();
  for (const [name, value] of Object.entries(headers)) {
    if (RESERVED.test(name)) {
      throw new TypeError(`Cannot set header "${name}": it is taken from the message, or belongs to the connection`);
    }
    try {
      if (typeof value !== "string") throw new TypeError();
      parsed.append(name, value);
    } catch {
      throw new TypeError(`Cannot use header ${JSON.stringify(name)}: HTTP does not allow its name or its value`);
    }
  }
  return parsed;
}

/** Answers what makes a message's URL of a template; null where the message has no such URL. */
function parseTemplate(template: string): (message: Message, idempotencyKey: string) => Target | null {
  const what = "reconcile URL";
  const placeholders = /\{([^{}]*)\}/g;
  const names = Array.from(template.matchAll(placeholders), ([, name]) => name!);
  const insert = (values: Readonly<Record<string, string>>) =>
    parseTarget(what, template.replace(placeholders, (_, name) => encodeURIComponent(values[name]!)));
  if (names.some((name) => !["id", "idempotencyKey", "key", "topic"].includes(name))) {
    throw new TypeError(`Cannot use the ${what}: its placeholders must be {id}, {idempotencyKey}, {key} or {topic}`);
  }
  const model = insert({ id: "a", idempotencyKey: "a", key: "a", topic: "a" });
  const others = [
    insert({ id: "b", idempotencyKey: "b", key: "b", topic: "a" }),
    insert({ id: "a", idempotencyKey: "a", key: "a", topic: "b" }),
  ];
  if (others[0]!.url.href === model.url.href) {
    throw new TypeError(`Cannot use the ${what}: it needs {id}, {idempotencyKey} or {key}, to tell messages apart`);
  }
  // Else a message could choose who is asked, and sees our headers.
  if (others.some(({ url, authorization }) => url.origin !== model.url.origin || authorization !== model.authorization)) {
    throw new TypeError(`Cannot use the ${what}: its placeholders must come after the host`);
  }
  return ({ id, key, topic }, idempotencyKey) => {
    const values: Readonly<Record<string, string>> = { id, idempotencyKey, key: key ?? "", topic };
    // No encoding keeps "." and ".." from climbing to another resource (https://url.spec.whatwg.org/#double-dot-path-segment).
    return names.some((name) => /^\.{0,2}$/.test(values[name]!)) ? null : insert(values);
  };
}

/** RFC 9110, 10.2.3: seconds, or a date, which counts from the answer's own where it has one, as clocks differ. */
function retryAfterMs(headers: Headers): number | undefined {
  const text = headers.get("retry-after")?.trim() ?? "";
  const date = (text: string) =>
    /^[A-Z][a-z]+,? /.test(text) ? Date.parse(text.endsWith("GMT") ? text : `${text} GMT`) : NaN;
  const sentMs = date(headers.get("date") ?? "");
  const ms = /^\d+$/.test(text) ? Number(text) * 1000 : date(text) - (Number.isNaN(sentMs) ? Date.now() : sentMs);
  return Number.isNaN(ms) ? undefined : Math.min(Math.max(ms, 0), MAX_PAUSE_MS);
}

/** The first bytes of an answer as text; null if they broke off. Leaves nothing unread behind. */
async function textOf({ body }: Response): Promise<string | null> {
  if (!body) return "";
  const reader = body.getReader();
  const decoder = new TextDecoder();
  try {
    let text = "";
    for (let left = ANSWER_BYTES; left > 0;) {
      const { done, value } = await reader.read();
      if (done) return text + decoder.decode();
      text += decoder.decode(value.subarray(0, left), { stream: true });
      left -= value.length;
    }
    return text;
  } catch {
    return null;
  } finally {
    await reader.cancel().catch(() => {});
  }
}

/** What is kept of an answer: its text is cut where the whole would be too large to be kept. */
function resultOf(status: number, body: string | null): Json {
  const fits = (result: Json) => !encodeResult(result).omitted;
  if (body === null || fits({ status, body })) return { status, body };
  // Not between the halves of a surrogate pair.
  const cut = (length: number) => ({ status, body: body.slice(0, length).replace(/[\ud800-\udbff]$/, ""), truncated: true });
  let low = 0;
  for (let high = body.length; low < high;) {
    const middle = Math.ceil((low + high) / 2);
    if (fits(cut(middle))) low = middle;
    else high = middle - 1;
  }
  return cut(low);
}

/** The beginning of an answer's text, on one line. */
function excerpt(text: string | null): string {
  const line = Array.from((text ?? "").slice(0, 1000).replace(/[\s\p{Cc}]+/gu, " ").trim()).slice(0, 200).join("");
  return line && `: ${line}`;
}

/**
 * Whether a failed fetch is known to have sent nothing, and why it failed. Its own text is not passed on: it quotes the URL,
 * with the query and what may be secret there.
 */
function failureOf(error: unknown): { readonly unsent: boolean; readonly why: string } {
  type Layer = Partial<Record<"name" | "message" | "code" | "syscall" | "cause" | "errors", unknown>>;
  for (let layer = error, depth = 0; typeof layer === "object" && layer !== null && depth < 4; depth++) {
    const { name, message, code, syscall, cause, errors } = layer as Layer;
    if (name === "NotCapable") return { unsent: true, why: "this program has no permission to (Deno: --allow-net)" };
    if (typeof message === "string") {
      // Deno (hyper). A URL has no space in it, so this is not from the URL.
      const hyper = /client error \((\w+)\)(?:: (.*))?$/s.exec(message);
      if (hyper) return { unsent: hyper[1] === "Connect", why: /:\/\/|@/.test(hyper[2] ?? "") ? "" : hyper[2] ?? "" };
      if (/^bad port$|Requests to port \d+ are blocked$/.test(message)) {
        return { unsent: true, why: "fetch blocks this port" };
      }
    }
    if (typeof code === "string") {
      const connecting = syscall === "connect" || syscall === "getaddrinfo";
      return { unsent: connecting || UNSENT.test(code) && syscall !== "read" && syscall !== "write", why: code };
    }
    layer = cause ?? (Array.isArray(errors) ? errors[0] : undefined);
  }
  return { unsent: false, why: "" };
}

/** Where a redirect points to, without its query. */
function destinationOf({ headers }: Response, base: URL): string {
  const location = headers.get("location");
  if (location === null || !URL.canParse(location, base)) return "";
  const { protocol, host, pathname } = new URL(location, base);
  return /^https?:$/.test(protocol) ? `: ${protocol}//${host}${pathname}` : "";
}

/**
 * A sink that sends each message as one HTTP request; see the module for what is sent and what an answer means.
 *
 * @param url Absolute, http: or https:. A user and password in it become an `Authorization` header (Basic), and appear
 * nowhere else; a fragment is dropped.
 * @throws {TypeError} If the URL, a header or another option cannot be used.
 * @throws {RangeError} If a number is out of range.
 */
export function httpSink(url: string | URL, options: HttpSinkOptions = {}): CallSink {
  const { method = "POST", repeat = "never", dedupeWindowMs = 86_400_000, timeoutMs = 10_000 } = options;
  const { source = "effectonce", fetch = globalThis.fetch } = options;
  if (method !== "POST" && method !== "PUT") throw new TypeError("Cannot use this method: it must be POST or PUT");
  if (repeat !== "never" && repeat !== "same-key") {
    throw new TypeError("Cannot use this repeat: it must be never or same-key");
  }
  if (typeof source !== "string" || source === "") {
    throw new TypeError("Cannot use this source: it must be a text, not empty");
  }
  whole("dedupeWindowMs", dedupeWindowMs, Number.MAX_SAFE_INTEGER);
  whole("timeoutMs", timeoutMs, 0x7fff_ffff);
  const target = parseTarget("target URL", url);
  const headers = parseHeaders(options.headers ?? {});
  if (target.authorization !== undefined && headers.has("authorization")) {
    throw new TypeError("Cannot use credentials in the target URL and an authorization header: give one of them");
  }
  const question = options.reconcile === undefined ? undefined : parseTemplate(`${options.reconcile}`);
  const nameOf = (method: string, { origin, pathname }: URL) => `${method} ${origin}${pathname}`;

  async function call(url: URL, init: RequestInit & { readonly method: string }, signal: AbortSignal) {
    const name = nameOf(init.method, url);
    if (signal.aborted) throw retryable(`${name} was not sent: the call was stopped before`);
    const late = new AbortController();
    const timer = setTimeout(() => late.abort(), timeoutMs);
    const either = AbortSignal.any([signal, late.signal]);
    try {
      const response = await fetch(url.href, { ...init, redirect: "manual", signal: either });
      return { name, response, status: response.status, text: await textOf(response) };
    } catch (error) {
      const { unsent, why } = failureOf(error);
      // An abort rejects with the signal's own reason, which says nothing about this request.
      if (unsent && !either.aborted) throw retryable(`${name} could not be reached, nothing was sent${why && `: ${why}`}`);
      const doubt = init.method === "GET" ? "" : ": it is not known whether it happened";
      if (late.signal.aborted) throw new Error(`${name} did not answer within ${timeoutMs} ms${doubt}`);
      if (signal.aborted) throw new Error(`${name} was stopped before it answered${doubt}`);
      throw new Error(`${name} broke off without an answer${why && ` (${why})`}${doubt}`);
    } finally {
      clearTimeout(timer);
    }
  }

  function headersOf({ id, topic, key, time, value, headers: own }: Message, idempotencyKey: string): Headers {
    const all = new Headers();
    if (value !== null) all.set("content-type", "application/octet-stream");
    for (const [name, text] of Object.entries(own)) {
      if (!TOKEN.test(name) || RESERVED.test(name) || NOT_FROM_MESSAGE.test(name)) continue;
      all.set(name, /^[\t -~]*$/.test(text) ? text : percentEncode(text));
    }
    for (const [name, text] of headers) all.set(name, text);
    if (target.authorization !== undefined) all.set("authorization", target.authorization);
    all.set("idempotency-key", idempotencyHeader(idempotencyKey));
    all.set("ce-specversion", "1.0");
    all.set("ce-id", percentEncode(id));
    all.set("ce-source", percentEncode(source));
    all.set("ce-type", percentEncode(topic));
    if (!Number.isNaN(time.getTime())) all.set("ce-time", time.toISOString());
    if (key) all.set("ce-partitionkey", percentEncode(key));
    return all;
  }

  async function deliver(message: Message, { idempotencyKey, signal }: Delivery): Promise<Json> {
    // Not the bytes as they are: Deno's fetch sends a request anew, on its own, when a connection that it has used before
    // breaks, even after the target has read it (denoland/deno#32566, #36415); not one whose body is a stream or a Blob.
    // A Blob has a length, a stream has none.
    const body = new Blob(message.value === null ? [] : [message.value as Uint8Array<ArrayBuffer>]);
    const init = { method, headers: headersOf(message, idempotencyKey), body };
    const { name, response, status, text } = await call(target.url, init, signal);
    if (status >= 200 && status <= 299) return resultOf(status, text);
    const answered = `${name} answered ${status}`;
    const afterMs = retryAfterMs(response.headers);
    // IETF draft on the Idempotency-Key header, 2.6: the first request with this key is still being processed.
    if (status === 409) {
      throw retryable(`${answered}, as if another request with this key were under way${excerpt(text)}`, { afterMs });
    }
    // RFC 8470, 5.2, on 425: not processed, because it might be a replay.
    if (status === 425 || status === 429 || status === 503 && afterMs !== undefined) {
      throw retryable(answered + excerpt(text), { afterMs });
    }
    // A browser's fetch hides the status of a redirect. Its text often quotes the location, query and all: not kept.
    if (status >= 300 && status <= 399 || response.type === "opaqueredirect") {
      const to = destinationOf(response, target.url);
      // RFC 9110, 15.4.4: "see other" answers a POST that was carried out, and in practice so does 302.
      if (status === 302 || status === 303 || status === 0) {
        throw new Error(`${answered}, so it is not known whether it happened; redirects are not followed${to}`);
      }
      throw rejected(`${answered}, and redirects are not followed${to}`, { status, body: null });
    }
    // Servers also answer 408 when their own handler, begun already, takes too long (tower-http's TimeoutLayer).
    if (status >= 400 && status <= 499 && status !== 408) throw rejected(answered + excerpt(text), resultOf(status, text));
    throw new Error(`${answered}, so it is not known whether it happened${excerpt(text)}`);
  }

  const reconcile = question &&
    async function (message: Message, { idempotencyKey, signal }: Delivery): Promise<Found<Json>> {
      const asked = question(message, idempotencyKey);
      if (!asked) return { state: "unknown" };
      const all = new Headers(headers);
      // RFC 9111, 5.2.1.4: a 404 that a cache remembers from earlier would have the message sent twice.
      all.set("cache-control", "no-cache");
      // Credentials from the target's URL are for its own origin only.
      const { authorization } = asked.authorization === undefined && asked.url.origin === target.url.origin ? target : asked;
      if (authorization !== undefined) all.set("authorization", authorization);
      const { name, status, text } = await call(asked.url, { method: "GET", headers: all }, signal);
      if (status >= 200 && status <= 299) return { state: "done", result: resultOf(status, text) };
      if (status === 404) return { state: "absent" };
      if (status >= 500 || [408, 425, 429].includes(status)) throw new Error(`${name} answered ${status}${excerpt(text)}`);
      return { state: "unknown" };
    };

  return {
    kind: "call",
    name: nameOf(method, target.url),
    repeat,
    dedupeWindowMs: repeat === "same-key" ? dedupeWindowMs : undefined,
    deliver,
    reconcile,
  };
}
