import {
  assert,
  assertEquals,
  assertMatch,
  assertNotEquals,
  assertRejects,
  assertStringIncludes,
  assertThrows,
} from "@std/assert";
import {
  type CallSink,
  createMessage,
  type Json,
  type Message,
  type MessageFields,
  type NewMessage,
  relay,
  type RelayEvent,
  type RelayOptions,
} from "@effectonce/effectonce";
import { memoryOutbox, memoryStore } from "@effectonce/effectonce/memory";
import { httpSink, type HttpSinkOptions } from "@effectonce/effectonce/http";

/** Deno 2.9 looks for leaks only when told to: what is left of a request here would be left of every message. */
function test(name: string, fn: () => void | Promise<void>): void {
  Deno.test({ name, fn, sanitizeOps: true, sanitizeResources: true });
}

// ---------------------------------------------------------------------------------------------------------------- servers

interface Seen {
  readonly method: string;
  readonly url: string;
  readonly headers: Headers;
  readonly body: Uint8Array;
}

interface Server extends AsyncDisposable {
  readonly url: string;
}

/** A server that keeps what it was asked. */
function serve(answer: (seen: Seen, n: number) => Response | Promise<Response>): Server & { readonly seen: Seen[] } {
  const seen: Seen[] = [];
  const server = Deno.serve({ hostname: "127.0.0.1", port: 0, onListen() {} }, async (request) => {
    const { method, url, headers } = request;
    const one = { method, url, headers, body: await request.bytes() };
    return await answer(one, seen.push(one));
  });
  return { url: `http://127.0.0.1:${server.addr.port}`, seen, [Symbol.asyncDispose]: () => server.shutdown() };
}

/** A TCP server that talks as it likes; the connection is closed when `talk` is over. */
function listen(talk: (conn: Deno.TcpConn) => Promise<void>): Server {
  const listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const open = new Set<Deno.TcpConn>();
  const talks: Promise<void>[] = [];
  const close = (conn: Deno.TcpConn) => {
    if (open.delete(conn)) conn.close();
  };
  const accepting = (async () => {
    for await (const conn of listener) {
      open.add(conn);
      talks.push(talk(conn).catch(() => {}).finally(() => close(conn)));
    }
  })();
  return {
    url: `http://127.0.0.1:${listener.addr.port}`,
    async [Symbol.asyncDispose]() {
      listener.close();
      await accepting;
      for (const conn of open) close(conn);
      await Promise.all(talks);
    },
  };
}

const encode = (text: string) => new TextEncoder().encode(text);
const write = async (conn: Deno.TcpConn, text: string) => {
  for (let bytes = encode(text); bytes.length > 0;) bytes = bytes.subarray(await conn.write(bytes));
};

/** One request with its body; null where the client has hung up. */
async function readRequest(conn: Deno.TcpConn): Promise<string | null> {
  const buffer = new Uint8Array(65_536);
  for (let text = "";;) {
    const n = await conn.read(buffer);
    if (n === null) return null;
    text += new TextDecoder("latin1").decode(buffer.subarray(0, n));
    const [head, body] = text.split("\r\n\r\n", 2);
    if (body === undefined) continue;
    const length = Number(/^content-length: (\d+)/im.exec(head!)?.[1] ?? 0);
    const chunked = /^transfer-encoding: chunked/im.test(head!);
    if (chunked ? text.endsWith("0\r\n\r\n") : text.length >= head!.length + 4 + length) return text;
  }
}

const untilHungUp = async (conn: Deno.TcpConn) => {
  while (await conn.read(new Uint8Array(65_536)) !== null);
};

/** A port on which nobody listens. */
function closedPort(): number {
  const listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  listener.close();
  return listener.addr.port;
}

// --------------------------------------------------------------------------------------------------------------- outcomes

const messageOf = (fields: Partial<MessageFields> = {}): Message =>
  createMessage({
    id: "order-1",
    topic: "payments",
    key: null,
    value: encode('{"amount":5}'),
    headers: { "content-type": "application/json" },
    time: new Date("2026-01-02T03:04:05.678Z"),
    ...fields,
  });

const deliveryOf = (message: Message, signal: AbortSignal = new AbortController().signal) => ({
  idempotencyKey: message.id,
  number: 1,
  signal,
});

interface Outcome {
  readonly as: "delivered" | "retryable" | "rejected" | "unknown";
  readonly reason: string;
  readonly result: Json | undefined;
  readonly afterMs: number | undefined;
  readonly error: unknown;
}

async function deliver(sink: CallSink, message: Message = messageOf(), signal?: AbortSignal): Promise<Outcome> {
  try {
    const result = await sink.deliver(message, deliveryOf(message, signal));
    return { as: "delivered", reason: "", result, afterMs: undefined, error: undefined };
  } catch (error) {
    assert(error instanceof Error);
    const known = Reflect.get(error, Symbol.for("effectonce.outcome")) as Partial<Outcome> | undefined;
    return { as: "unknown", result: undefined, afterMs: undefined, ...known, reason: error.message, error };
  }
}

const reconcile = (sink: CallSink, message: Message = messageOf()) => sink.reconcile!(message, deliveryOf(message));

const order: NewMessage = { id: "order-1", topic: "payments", key: "customer-1", value: { amount: 5 } };

/** Relays messages until nothing deliverable is left, or an event comes, without waiting between attempts. */
async function run(
  to: CallSink,
  messages: readonly NewMessage[] = [order],
  options: Partial<RelayOptions> = {},
  until?: RelayEvent["type"],
) {
  const store = memoryStore();
  await store.enqueue(...messages);
  const events: RelayEvent[] = [];
  const stop = new AbortController();
  await relay({
    from: memoryOutbox(store),
    to,
    store,
    drain: true,
    attempts: 4,
    minRetryMs: 0,
    maxRetryMs: 0,
    settleMs: 0,
    pollMs: 1,
    signal: stop.signal,
    observe(event) {
      events.push(event);
      if (event.type === until) stop.abort();
    },
    ...options,
  });
  const types = events.map(({ type }) => type).filter((type) => !["started", "claimed", "idle", "stopped"].includes(type));
  return { store, events, types, effects: await store.list() };
}

/** A fetch that answers so, whatever it is asked. */
const answering = (status: number, headers: Record<string, string> = {}, body: string | null = null): HttpSinkOptions => ({
  fetch: () => Promise.resolve(new Response(body, { status, headers })),
});
const failing = (error: unknown): HttpSinkOptions => ({ fetch: () => Promise.reject(error) });

// --------------------------------------------------------------------------------------------------------- what it is given

test("httpSink declares what it is, and its name has no credentials, query or fragment", () => {
  const sink = httpSink("https://user:pass@host.example:8443/charge?token=hush#part");
  assertEquals(
    { ...sink, deliver: undefined },
    {
      kind: "call",
      name: "POST https://host.example:8443/charge",
      repeat: "never",
      dedupeWindowMs: undefined,
      deliver: undefined,
      reconcile: undefined,
    },
  );
  assertEquals(httpSink(new URL("http://host.example"), { method: "PUT" }).name, "PUT http://host.example/");
  assertEquals(httpSink("http://host.example", { repeat: "same-key" }).dedupeWindowMs, 86_400_000);
  assertEquals(httpSink("http://host.example", { repeat: "same-key", dedupeWindowMs: 1000 }).dedupeWindowMs, 1000);
});

test("httpSink refuses a target that is not an absolute http: or https: URL, without quoting it", () => {
  const urls = [
    "",
    "host/path",
    "/path",
    "ftp://user:hush@host/",
    "http://",
    "http://user:hush@",
    "hush@host/x",
    "http://h:99999/",
  ];
  for (const url of urls) {
    const error = assertThrows(() => httpSink(url), TypeError, "it must be an absolute http: or https: URL");
    assert(!Deno.inspect(error).includes("hush"));
  }
  for (const url of ["http://us%ZZer:hush@host/", "http://user:hush%FF@host/", "http://us%3Aer:hush@host/"]) {
    const error = assertThrows(() => httpSink(url), TypeError, "Cannot use the credentials in the target URL");
    assert(!Deno.inspect(error).includes("hush"));
  }
});

test("httpSink refuses options that it cannot use, in one sentence", () => {
  const refused = (options: object, part: string, kind: typeof TypeError | typeof RangeError = TypeError) =>
    assertThrows(() => httpSink("http://host/", options as HttpSinkOptions), kind, part);
  refused({ method: "GET" }, "it must be POST or PUT");
  refused({ repeat: "always" }, "it must be never or same-key");
  refused({ source: "" }, "Cannot use this source");
  for (const ms of [0, -1, 1.5, NaN, Infinity, 2 ** 31]) {
    refused({ timeoutMs: ms }, `Cannot use timeoutMs ${ms}`, RangeError);
  }
  refused({ repeat: "same-key", dedupeWindowMs: 0 }, "Cannot use dedupeWindowMs 0", RangeError);
});

test("httpSink refuses headers that HTTP or the message does not allow, naming the header and never its value", () => {
  const refused = (name: string, value: unknown, part: string) => {
    const headers = { [name]: value as string };
    const error = assertThrows(() => httpSink("http://host/", { headers }), TypeError, part);
    assertStringIncludes(error.message, name);
    assert(!Deno.inspect(error).includes("hush"));
  };
  for (const name of ["Idempotency-Key", "ce-id", "Ce-Type", "ce_source", "Host", "content-length", "Transfer-Encoding"]) {
    refused(name, "hush", "it is taken from the message, or belongs to the connection");
  }
  refused("a b", "hush", "HTTP does not allow its name or its value");
  refused("x-token", "hush\r\nx-injected: 1", "HTTP does not allow its name or its value");
  refused("x-token", "hush→", "HTTP does not allow its name or its value");
  refused("x-token", undefined, "HTTP does not allow its name or its value");
  assertThrows(() => httpSink("http://host/", { headers: { "": "x" } }), TypeError, "HTTP does not allow");
  assertThrows(
    () => httpSink("http://user:hush@host/", { headers: { Authorization: "Bearer x" } }),
    TypeError,
    "give one of them",
  );
});

test("httpSink refuses a reconcile URL that could not tell messages apart, or lets a message choose the host", () => {
  const refused = (reconcile: string, part: string) => {
    const error = assertThrows(() => httpSink("http://host/", { reconcile }), TypeError, part);
    assert(!Deno.inspect(error).includes("hush"));
  };
  refused("/charges/{id}", "it must be an absolute http: or https: URL");
  refused("ftp://host/{id}", "it must be an absolute http: or https: URL");
  refused("http://host/charges", "it needs {id}, {idempotencyKey} or {key}");
  refused("http://host/charges/{topic}", "it needs {id}, {idempotencyKey} or {key}");
  refused("http://host/charges#{id}", "it needs {id}, {idempotencyKey} or {key}");
  refused("http://host/charges/{hush}", "its placeholders must be {id}, {idempotencyKey}, {key} or {topic}");
  refused("http://host/charges/{id}?{}", "its placeholders must be {id}, {idempotencyKey}, {key} or {topic}");
  refused("http://{id}/charges/", "its placeholders must come after the host");
  refused("http://{topic}.host/charges/{id}", "its placeholders must come after the host");
  refused("http://user:{topic}@host/charges/{id}", "its placeholders must come after the host");
  refused("http://user:hush%FF@host/{id}", "Cannot use the credentials in the reconcile URL");
});

// ------------------------------------------------------------------------------------------------------------- the request

test("httpSink sends the bytes with Idempotency-Key, CloudEvents attributes and content type", async () => {
  await using server = serve(() => new Response("paid", { status: 201 }));
  const sink = httpSink(`${server.url}/charge?tenant=1#part`, { source: "https://shop.example/orders" });
  const { result } = await deliver(sink, messageOf({ key: "customer-1" }));
  assertEquals(result, { status: 201, body: "paid" });
  const { method, url, headers, body } = server.seen[0]!;
  assertEquals([method, url], ["POST", `${server.url}/charge?tenant=1`]);
  assertEquals(new TextDecoder().decode(body), '{"amount":5}');
  const sent = Object.fromEntries(headers);
  for (const name of ["accept", "accept-encoding", "accept-language", "user-agent", "host"]) delete sent[name];
  assertEquals(sent, {
    "content-length": "12",
    "content-type": "application/json",
    "idempotency-key": "order-1",
    "ce-specversion": "1.0",
    "ce-id": "order-1",
    "ce-source": "https://shop.example/orders",
    "ce-type": "payments",
    "ce-time": "2026-01-02T03:04:05.678Z",
    "ce-partitionkey": "customer-1",
  });
});

test("httpSink sends a PUT, any bytes, and application/octet-stream where the message does not say what it is", async () => {
  await using server = serve(() => new Response());
  const value = Uint8Array.from({ length: 300_000 }, (_, i) => i % 256);
  const { as, result } = await deliver(httpSink(server.url, { method: "PUT" }), messageOf({ value, headers: {} }));
  assertEquals([as, result], ["delivered", { status: 200, body: "" }]);
  const { method, headers, body } = server.seen[0]!;
  assertEquals([method, headers.get("content-type"), headers.get("ce-source")], [
    "PUT",
    "application/octet-stream",
    "effectonce",
  ]);
  assertEquals(headers.has("ce-partitionkey"), false);
  assertEquals(body, value);
});

test("httpSink sends a tombstone with an empty body and without a content type of its own", async () => {
  await using server = serve(() => new Response());
  const sink = httpSink(server.url);
  assertEquals((await deliver(sink, messageOf({ value: null, headers: {} }))).as, "delivered");
  assertEquals((await deliver(sink, messageOf({ value: null }))).as, "delivered");
  assertEquals((await deliver(sink, messageOf({ value: new Uint8Array(), headers: {} }))).as, "delivered");
  assertEquals(server.seen.map(({ body }) => body.length), [0, 0, 0]);
  const types = server.seen.map(({ headers }) => headers.get("content-type"));
  assertEquals(types, [null, "application/json", "application/octet-stream"]);
});

test("httpSink takes the content type of a message whatever the case of its name, or the one of its own headers", async () => {
  await using server = serve(() => new Response());
  const message = messageOf({ headers: { "Content-TYPE": "text/csv" } });
  await deliver(httpSink(server.url), message);
  await deliver(httpSink(server.url, { headers: { "content-type": "text/plain" } }), message);
  assertEquals(server.seen.map(({ headers }) => headers.get("content-type")), ["text/csv", "text/plain"]);
});

test("httpSink percent-encodes what is not visible ASCII in the CloudEvents attributes and in the key", async () => {
  await using server = serve(() => new Response());
  const id = "Euro € 😀"; // The example of CloudEvents HTTP binding 1.0.2, 3.1.3.2.
  await deliver(httpSink(server.url, { source: "/über" }), messageOf({ id, topic: 'a "b" 100%', key: "\x7f\u00e9~!" }));
  const { headers } = server.seen[0]!;
  assertEquals(headers.get("ce-id"), "Euro%20%E2%82%AC%20%F0%9F%98%80");
  assertEquals(headers.get("idempotency-key"), "Euro%20%E2%82%AC%20%F0%9F%98%80");
  assertEquals(headers.get("ce-type"), "a%20%22b%22%20100%25");
  assertEquals(headers.get("ce-partitionkey"), "%7F%C3%A9~!");
  assertEquals(headers.get("ce-source"), "/%C3%BCber");
});

test("httpSink sends a visible ASCII key as it is, and never the same key for two ids", async () => {
  await using server = serve(() => new Response());
  const sink = httpSink(server.url);
  const ids = ['order-1;"x"', "50%off", "a%2f", "a b", "a%20b", "a%2520b", "é", "%C3%A9", "a%b"];
  for (const id of ids) await deliver(sink, messageOf({ id }));
  const keys = server.seen.map(({ headers }) => headers.get("idempotency-key"));
  assertEquals(new Set(keys).size, ids.length);
  assertEquals(keys.slice(0, 4), ['order-1;"x"', "50%off", "a%2f", "a%20b"]);
  assertEquals(keys[4], "a%2520b");
});

test("httpSink passes on traceparent, tracestate and other headers of the message, but not who it is or how it connects", async () => {
  await using server = serve(() => new Response());
  const kept = {
    traceparent: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    tracestate: "vendor=opaque",
    "X-Tenant": "acme 100%",
    "x-name": "Jürgen 1",
    "content-encoding": "identity",
  };
  const dropped = {
    Host: "evil.example",
    "content-length": "1",
    connection: "close",
    "transfer-encoding": "chunked",
    "Idempotency-Key": "other",
    authorization: "Bearer forged",
    Cookie: "a=b",
    "proxy-authorization": "Basic forged",
    "CE-Id": "other",
    "ce-tenant": "other",
    ce_type: "other",
    "bad name": "x",
    "bäd": "x",
  };
  const message = messageOf({ headers: { ...dropped, ...kept } });
  await deliver(httpSink(server.url, { headers: { authorization: "Bearer own" } }), message);
  const { headers, body } = server.seen[0]!;
  assertEquals(headers.get("traceparent"), kept.traceparent);
  assertEquals(headers.get("tracestate"), kept.tracestate);
  assertEquals(headers.get("x-tenant"), "acme 100%");
  assertEquals(headers.get("x-name"), "J%C3%BCrgen%201");
  assertEquals(headers.get("content-encoding"), "identity");
  assertEquals(headers.get("host"), new URL(server.url).host);
  assertEquals(headers.get("content-length"), String(body.length));
  assertEquals(headers.get("idempotency-key"), "order-1");
  assertEquals(headers.get("authorization"), "Bearer own");
  assertEquals([headers.get("ce-id"), headers.get("ce-type")], ["order-1", "payments"]);
  for (const name of ["cookie", "proxy-authorization", "ce-tenant", "ce_type"]) assertEquals(headers.has(name), false, name);
});

test("httpSink lets its own headers win over the message's", async () => {
  await using server = serve(() => new Response());
  const message = messageOf({ headers: { "x-a": "message", "x-b": "message" } });
  await deliver(httpSink(server.url, { headers: { "X-A": "option", "x-c": "option" } }), message);
  const { headers } = server.seen[0]!;
  assertEquals(["x-a", "x-b", "x-c"].map((name) => headers.get(name)), ["option", "message", "option"]);
});

test("httpSink can send each message that an outbox takes, and none can inject a header", async () => {
  await using server = serve(() => new Response());
  const odd = "a\r\nx-injected: 1\t\u0001\u0085\u2028\ufeff";
  const { types } = await run(httpSink(server.url), [
    { id: odd, topic: odd, key: odd, value: "x", headers: { [odd]: odd, "x-odd": odd } },
    { id: "€".repeat(341), topic: "t".repeat(1024), key: "😀".repeat(256), value: new Uint8Array([0, 255]) },
  ]);
  assertEquals(types, ["delivered", "delivered"]);
  for (const { headers } of server.seen) assertEquals(headers.has("x-injected"), false);
  const { headers } = server.seen.find(({ headers }) => headers.has("x-odd"))!;
  assertEquals(decodeURIComponent(headers.get("ce-id")!), odd);
  assertEquals(decodeURIComponent(headers.get("x-odd")!), odd);
});

test("httpSink repeats a request under the same key with the same headers and bytes", async () => {
  await using server = serve((_, n) => new Response("", { status: n < 3 ? 500 : 200 }));
  const { types, effects } = await run(httpSink(server.url, { repeat: "same-key" }));
  assertEquals(types, ["retried", "retried", "delivered"]);
  assertEquals(effects[0]!.attempts, 3);
  const [first, ...others] = server.seen.map(({ headers, body }) => ({ headers: [...headers], body }));
  assertEquals(others, [first, first]);
});

// ------------------------------------------------------------------------------------------------------------- credentials

test("httpSink sends a URL's credentials as an Authorization header", async () => {
  await using server = serve(() => new Response());
  const { host } = new URL(server.url);
  await deliver(httpSink(`http://us%20er:p%C3%A4ss%3A@${host}/`));
  await deliver(httpSink(`http://token@${host}/`));
  const [both, user] = server.seen.map(({ headers }) => atob(headers.get("authorization")!.replace("Basic ", "")));
  assertEquals(new TextDecoder().decode(Uint8Array.from(both!, (c) => c.charCodeAt(0))), "us er:päss:");
  assertEquals(user, "token:");
  assert(!server.seen[0]!.url.includes("@"));
});

test("httpSink shows credentials, query and header values in no name, error, event or record", async () => {
  await using server = serve(({ url }) => {
    const status = Number(new URL(url).pathname.slice(1));
    return new Response("no", { status, headers: { location: "http://hush:hush@127.0.0.1/next?token=hush#hush" } });
  });
  await using broken = listen(async (conn) => void await readRequest(conn));
  await using silent = listen(untilHungUp);
  const at = (url: string, path = "") => `${url.replace("://", "://hush-user:hush-pass@")}${path}?token=hush#hush`;
  const urls = [200, 302, 307, 401, 409, 429, 500].map((status) => at(server.url, `/${status}`));
  urls.push(
    at(broken.url),
    at(silent.url),
    at(silent.url.replace("http:", "https:")),
    at(`http://127.0.0.1:${closedPort()}`),
  );
  for (const url of urls) {
    for (const repeat of ["never", "same-key"] as const) {
      const sink = httpSink(url, { repeat, timeoutMs: 100, headers: { "x-api-key": "hush-key" } });
      const { error } = await deliver(sink);
      const { events, effects } = await run(sink, [order], { attempts: 2 });
      const shown = Deno.inspect([sink.name, error, events, effects], { depth: 20, showHidden: true });
      assert(!shown.includes("hush"), shown);
      assert(!shown.includes(btoa("hush-user:hush-pass")), shown);
    }
  }
});

test("httpSink shows nothing of what an error of fetch says about the URL", async () => {
  const url = "http://host.example/x?token=hush";
  const cause = new Error(
    `error sending request for url (${url}): client error (SendRequest): proxy http://u:hush@p refused`,
  );
  for (const error of [cause, new TypeError(`fetch failed: ${url}`, { cause }), `failed: ${url}`, undefined]) {
    const outcome = await deliver(httpSink(url, failing(error)));
    assertEquals(outcome.as, "unknown");
    assertEquals(
      outcome.reason,
      "POST http://host.example/x broke off without an answer: it is not known whether it happened",
    );
    assert(!Deno.inspect(outcome.error).includes("hush"));
  }
});

// ----------------------------------------------------------------------------------------------------------------- answers

const classes: readonly [as: Outcome["as"], statuses: readonly number[]][] = [
  ["delivered", [200, 201, 202, 204, 206, 299]],
  ["retryable", [409, 425, 429]],
  ["rejected", [300, 301, 304, 307, 308, 400, 401, 402, 403, 404, 405, 410, 413, 415, 421, 422, 431, 451, 499]],
  ["unknown", [302, 303, 408, 500, 501, 502, 503, 504, 507, 599]],
];
for (const [as, statuses] of classes) {
  test(`httpSink takes ${statuses.join(", ")} for ${as}`, async () => {
    await using server = serve(({ url }) => {
      const status = Number(new URL(url).pathname.slice(1));
      return new Response([204, 304].includes(status) ? null : `because\n of  ${status}`, { status });
    });
    for (const status of statuses) {
      const outcome = await deliver(httpSink(`${server.url}/${status}`));
      const redirect = status < 400 && status >= 300;
      const body = redirect ? null : status === 204 ? "" : `because\n of  ${status}`;
      assertEquals([status, outcome.as], [status, as]);
      if (as === "delivered" || as === "rejected") assertEquals(outcome.result, { status, body });
      if (as !== "delivered") assertStringIncludes(outcome.reason, `POST ${server.url}/${status} answered ${status}`);
      if (as !== "delivered" && !redirect) assertStringIncludes(outcome.reason, `: because of ${status}`);
    }
    assertEquals(server.seen.length, statuses.length);
  });
}

test("httpSink takes a status outside of HTTP, or an upgrade, for unknown", async () => {
  for (const status of [101, 600, 999]) {
    await using server = listen(async (conn) => {
      await readRequest(conn);
      await write(conn, `HTTP/1.1 ${status} Odd\r\n${status === 101 ? "" : "content-length: 2\r\n"}\r\nhi`);
    });
    assertEquals((await deliver(httpSink(server.url))).as, "unknown");
  }
});

test("httpSink ends as its outcome says: done, parked as refused, in doubt, or tried again", async () => {
  const ends: Record<number, string[][]> = {
    200: [["delivered"], ["done"]],
    402: [["parked"], ["rejected"]],
    500: [["uncertain"], ["uncertain"]],
    429: [["retried", "retried", "retried", "parked"], ["rejected"]],
  };
  for (const [status, [types, states]] of Object.entries(ends)) {
    await using server = serve(() => new Response("text", { status: Number(status) }));
    const ended = await run(httpSink(server.url));
    assertEquals([ended.types, ended.effects.map(({ state }) => state)], [types, states]);
    assertEquals(server.seen.length, status === "429" ? 4 : 1);
    assertEquals(ended.store.outbox().length, status === "200" ? 0 : 1);
  }
});

test("httpSink keeps the status and text of a delivery, and of a refusal", async () => {
  await using server = serve(({ url }) => new Response(`{"charge":"€ 5"}`, { status: url.endsWith("/no") ? 402 : 200 }));
  for (const [path, status] of [["/yes", 200], ["/no", 402]] as const) {
    const { effects } = await run(httpSink(server.url + path));
    assertEquals(effects[0]!.result, { status, body: `{"charge":"€ 5"}` });
  }
});

test("httpSink begins a reason with the answer's text on one line, at most 200 characters of it", async () => {
  await using server = serve(() => new Response(`  a\r\n\t\u0000b\u0085${"😀".repeat(300)}`, { status: 422 }));
  const { as, reason } = await deliver(httpSink(server.url));
  assertEquals(as, "rejected");
  assertEquals(reason, `POST ${server.url}/ answered 422: a b ${"😀".repeat(196)}`);
  assert(reason.isWellFormed());
});

test("httpSink does not follow a redirect, and says where it points to without the query", async () => {
  await using other = serve(() => new Response("gold"));
  const locations: Record<string, string> = {
    [`${other.url}/next?token=hush#hush`]: `: ${other.url}/next`,
    "/login?back=hush": ": {url}/login",
    "mailto:hush": "",
    "http://[": "",
    "": "",
  };
  for (const [location, shown] of Object.entries(locations)) {
    await using server = serve(() =>
      new Response(`<a href="${location}">`, { status: 307, headers: location ? { location } : {} })
    );
    const { as, reason, result } = await deliver(httpSink(`${server.url}/pay`));
    const to = shown.replace("{url}", server.url);
    assertEquals([as, result], ["rejected", { status: 307, body: null }]);
    assertEquals(reason, `POST ${server.url}/pay answered 307, and redirects are not followed${to}`);
  }
  assertEquals(other.seen, []);
});

test("httpSink takes a redirect for unknown where fetch hides its status, as a browser's does", async () => {
  const response = Object.defineProperties(new Response(null), { status: { value: 0 }, type: { value: "opaqueredirect" } });
  const { as, reason } = await deliver(httpSink("http://host/", { fetch: () => Promise.resolve(response) }));
  assertEquals(as, "unknown");
  assertStringIncludes(reason, "redirects are not followed");
});

test("httpSink waits as long as Retry-After says, in seconds or until a date, for a day at most", async () => {
  const date = "Sun, 06 Nov 1994 08:49:37 GMT";
  const pauses: [value: string, afterMs: number | undefined][] = [
    ["0", 0],
    ["120", 120_000],
    [" 7 ", 7_000],
    ["86401", 86_400_000],
    ["99999999999999999999999999", 86_400_000],
    ["Sun, 06 Nov 1994 08:51:07 GMT", 90_000],
    ["Sunday, 06-Nov-94 08:51:07 GMT", 90_000],
    ["Sun Nov  6 08:51:07 1994", 90_000],
    ["Sun, 06 Nov 1994 08:00:00 GMT", 0],
    ["Sun, 06 Nov 2094 08:00:00 GMT", 86_400_000],
    ["-5", undefined],
    ["1.5", undefined],
    ["5, 10", undefined],
    ["soon", undefined],
    ["Someday, soon", undefined],
    ["", undefined],
  ];
  for (const [value, afterMs] of pauses) {
    for (const status of [409, 425, 429, 503]) {
      const outcome = await deliver(httpSink("http://host/", answering(status, { date, "retry-after": value })));
      const as = status === 503 && afterMs === undefined ? "unknown" : "retryable";
      assertEquals([value, status, outcome.as, outcome.afterMs], [
        value,
        status,
        as,
        as === "unknown" ? undefined : afterMs,
      ]);
    }
  }
});

test("httpSink counts a Retry-After date from the present where the answer has no date", async () => {
  const until = new Date(Date.now() + 3_600_000).toUTCString();
  const { as, afterMs } = await deliver(httpSink("http://host/", answering(503, { "retry-after": until })));
  assertEquals(as, "retryable");
  assert(afterMs! > 3_500_000 && afterMs! <= 3_600_000, String(afterMs));
});

test("httpSink has its Retry-After honoured by the relay", async () => {
  await using server = serve(() => new Response("slow down", { status: 503, headers: { "retry-after": "120" } }));
  const { events, effects, store } = await run(httpSink(server.url), [order], {}, "retried");
  const retried = events.find(({ type }) => type === "retried");
  assert(retried?.type === "retried");
  assertEquals([retried.afterMs, retried.reason], [120_000, `POST ${server.url}/ answered 503: slow down`]);
  assertEquals([effects[0]!.state, store.outbox()[0]!.state, server.seen.length], ["waiting", "waiting", 1]);
});

// ------------------------------------------------------------------------------------------------------- the answer's text

const jsonBytes = (value: Json | undefined) => encode(JSON.stringify(value)).length;

test("httpSink keeps as much of an answer's text as a store keeps, and says where it has cut it", async () => {
  const room = 65_536 - jsonBytes({ status: 200, body: "" });
  const texts: Record<string, [text: string, cut: boolean]> = {
    "fits just so": ["x".repeat(room), false],
    "one byte over": ["x".repeat(room + 1), true],
    "64 KiB": ["x".repeat(65_536), true],
    "two bytes a character": ["ä".repeat(100_000), true],
    "surrogate pairs": ["a" + "😀".repeat(50_000), true],
    "surrogate pairs, shifted": ["ab" + "😀".repeat(50_000), true],
    "control characters, which JSON writes with six": ["\u0001".repeat(20_000), true],
    "quotes, which JSON writes with two": ['"'.repeat(40_000), true],
  };
  await using server = serve(({ url }) => new Response(texts[decodeURIComponent(new URL(url).pathname.slice(1))]![0]));
  for (const [name, [text, cut]] of Object.entries(texts)) {
    const sink = httpSink(`${server.url}/${name}`);
    const { result } = await deliver(sink);
    const { body, truncated } = result as { readonly body: string; readonly truncated?: boolean };
    assertEquals([name, truncated], [name, cut ? true : undefined]);
    assert(text.startsWith(body) && body.isWellFormed(), name);
    assert(jsonBytes(result) <= 65_536 && (!cut || jsonBytes(result) > 65_520), `${name}: ${jsonBytes(result)}`);
    const { types, effects } = await run(sink);
    assertEquals([types, effects[0]!.result], [["delivered"], result]);
  }
});

test("httpSink cuts the text of a refusal as well", async () => {
  await using server = serve(() => new Response("é".repeat(100_000), { status: 400 }));
  const { effects } = await run(httpSink(server.url));
  const { body, truncated } = effects[0]!.result as { readonly body: string; readonly truncated: boolean };
  assertEquals([effects[0]!.state, truncated], ["rejected", true]);
  assert(body.length > 32_000);
});

for (const status of [200, 402, 500]) {
  test(`httpSink reads an endless answer ${status} no further than it needs`, async () => {
    const cancelled = Promise.withResolvers<void>();
    const endless = new ReadableStream({
      pull: (controller) => controller.enqueue(new Uint8Array(16_384).fill(97)),
      cancel: () => cancelled.resolve(),
    });
    await using server = serve(() => new Response(endless, { status }));
    const { as } = await deliver(httpSink(server.url));
    assertEquals(as, { 200: "delivered", 402: "rejected", 500: "unknown" }[status]);
    await cancelled.promise;
  });
}

test("httpSink takes text that is not UTF-8, with replacement characters, and a character in two pieces", async () => {
  await using server = serve((_, n) => new Response(n === 1 ? new Uint8Array([0xff, 97]) : pieces()));
  const pieces = () =>
    new ReadableStream({
      start(controller) {
        controller.enqueue(encode("€").subarray(0, 1));
        controller.enqueue(encode("€").subarray(1));
        controller.close();
      },
    });
  assertEquals((await deliver(httpSink(server.url))).result, { status: 200, body: "\ufffda" });
  assertEquals((await deliver(httpSink(server.url))).result, { status: 200, body: "€" });
});

test("httpSink takes a 2xx whose text breaks off, or never comes, for delivered", async () => {
  await using half = listen(async (conn) => {
    await readRequest(conn);
    await write(conn, "HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nabc");
  });
  await using stalled = listen(async (conn) => {
    await readRequest(conn);
    await write(conn, "HTTP/1.1 202 Accepted\r\ncontent-length: 100\r\n\r\nabc");
    await untilHungUp(conn);
  });
  const { types, effects } = await run(httpSink(half.url));
  assertEquals([types, effects[0]!.result], [["delivered"], { status: 200, body: null }]);
  const late = await deliver(httpSink(stalled.url, { timeoutMs: 100 }));
  assertEquals([late.as, late.result], ["delivered", { status: 202, body: null }]);
});

test("httpSink takes another answer for what its status says where its text breaks off", async () => {
  for (const [status, as] of [[402, "rejected"], [429, "retryable"], [500, "unknown"]] as const) {
    await using server = listen(async (conn) => {
      await readRequest(conn);
      await write(conn, `HTTP/1.1 ${status} No\r\ncontent-length: 100\r\n\r\nabc`);
    });
    assertEquals((await deliver(httpSink(server.url))).as, as);
  }
});

// -------------------------------------------------------------------------------------------------------------- no answer

const brokenTalks: Record<string, (conn: Deno.TcpConn) => Promise<void>> = {
  "hangs up after reading the request": async (conn) => void await readRequest(conn),
  "hangs up without reading": () => Promise.resolve(),
  "resets the connection with half of the request unread": async (conn) => void await conn.read(new Uint8Array(10)),
  "answers half a status line": async (conn) => {
    await readRequest(conn);
    await write(conn, "HTTP/1.1 200 O");
  },
  "answers half a header": async (conn) => {
    await readRequest(conn);
    await write(conn, "HTTP/1.1 200 OK\r\ncontent-le");
  },
  "does not speak HTTP": async (conn) => {
    await readRequest(conn);
    await write(conn, "SSH-2.0-OpenSSH_9.9\r\n\r\n");
  },
};
for (const [what, talk] of Object.entries(brokenTalks)) {
  test(`httpSink does not know the outcome when the target ${what}`, async () => {
    await using server = listen(talk);
    const { as, reason } = await deliver(httpSink(`${server.url}/charge?token=hush`));
    assertEquals(as, "unknown");
    assertMatch(
      reason,
      /^POST http:\/\/127\.0\.0\.1:\d+\/charge broke off without an answer.*: it is not known whether it happened$/,
    );
    const never = await run(httpSink(server.url));
    assertEquals([never.types, never.effects[0]!.state], [["uncertain"], "uncertain"]);
    const sameKey = await run(httpSink(server.url, { repeat: "same-key" }), [order], { attempts: 3 });
    assertEquals([sameKey.types, sameKey.effects[0]!.state], [["retried", "retried", "uncertain"], "uncertain"]);
  });
}

test("httpSink does not know the outcome when no answer comes in time", async () => {
  await using server = listen(untilHungUp);
  const sink = httpSink(server.url, { timeoutMs: 50 });
  const { as, reason } = await deliver(sink);
  assertEquals([as, reason], [
    "unknown",
    `POST ${server.url}/ did not answer within 50 ms: it is not known whether it happened`,
  ]);
  const { types, effects } = await run(sink);
  assertEquals([types, effects[0]!.error], [["uncertain"], reason]);
});

test("httpSink does not know the outcome when it is stopped under way, whatever it is stopped for", async () => {
  // The reason is an error of somebody else's connection: it must not be taken for one of this request.
  for (const reason of [undefined, Object.assign(new Error("database"), { code: "ECONNREFUSED", syscall: "connect" })]) {
    const stop = new AbortController();
    await using server = listen(async (conn) => {
      await readRequest(conn);
      stop.abort(reason);
      await untilHungUp(conn);
    });
    const outcome = await deliver(httpSink(server.url), messageOf(), stop.signal);
    assertEquals(outcome.as, "unknown");
    assertStringIncludes(outcome.reason, "was stopped before it answered");
  }
});

test("httpSink sends nothing when it is stopped before", async () => {
  await using server = serve(() => new Response());
  const { as, reason } = await deliver(httpSink(server.url), messageOf(), AbortSignal.abort());
  assertEquals([as, reason], ["retryable", `POST ${server.url}/ was not sent: the call was stopped before`]);
  assertEquals(server.seen, []);
});

test("httpSink knows that nothing happened where nobody listens, and tries again", async () => {
  const url = `http://127.0.0.1:${closedPort()}/charge?token=hush`;
  const { as, reason } = await deliver(httpSink(url));
  assertEquals(as, "retryable");
  assertMatch(reason, /^POST http:\/\/127\.0\.0\.1:\d+\/charge could not be reached, nothing was sent: .*refused/);
  const { types, effects } = await run(httpSink(url));
  assertEquals([types, effects[0]!.state], [["retried", "retried", "retried", "parked"], "rejected"]);
});

test("httpSink delivers once the target is up, without any doubt", async () => {
  await using server = serve(() => new Response("paid"));
  const down = `http://127.0.0.1:${closedPort()}`;
  let calls = 0;
  const sink = httpSink(server.url, { fetch: (url, init) => fetch(++calls < 3 ? down : url, init) });
  const { types, effects } = await run(sink);
  assertEquals([types, effects[0]!.state, server.seen.length], [["retried", "retried", "delivered"], "done", 1]);
});

test("httpSink knows that nothing was sent where TLS fails", async () => {
  for (const text of ["", "HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n"]) {
    await using server = listen(async (conn) => {
      await conn.read(new Uint8Array(4096));
      await write(conn, text);
    });
    const { as, reason } = await deliver(httpSink(server.url.replace("http:", "https:")));
    assertEquals(as, "retryable");
    assertStringIncludes(reason, "could not be reached, nothing was sent");
  }
});

test("httpSink knows that nothing was sent where fetch blocks the port", async () => {
  const { as, reason } = await deliver(httpSink("http://127.0.0.1:1/"));
  assertEquals([as, reason], [
    "retryable",
    "POST http://127.0.0.1:1/ could not be reached, nothing was sent: fetch blocks this port",
  ]);
});

Deno.test({
  name: "httpSink knows that nothing was sent where Deno does not let it",
  permissions: { net: false }, // No sanitizers: Deno 2.9.6 itself forgets the body of a request that it does not let through.
  async fn() {
    const { as, reason } = await deliver(httpSink("http://127.0.0.1:8080/"));
    assertEquals(as, "retryable");
    assertStringIncludes(reason, "nothing was sent: this program has no permission to (Deno: --allow-net)");
  },
});

test("httpSink tells what was never sent from what may have been, by the errors of each runtime", async () => {
  // As tried on Deno 2.9.6, Node 20.20 (undici) and Bun 1.4.5.
  const deno = (text: string) =>
    new TypeError("fetch failed", { cause: new TypeError(`error sending request for url (x): ${text}`) });
  const node = (code: string, syscall?: string) => {
    return new TypeError("fetch failed", { cause: Object.assign(new Error(`${syscall} ${code}`), { code, syscall }) });
  };
  const bun = (code: string) => Object.assign(new TypeError("Unable to connect"), { code });
  const unsent: unknown[] = [
    deno("client error (Connect): tcp connect error: Connection refused (os error 111)"),
    deno("client error (Connect): dns error: failed to lookup address information: Name or service not known"),
    deno("client error (Connect): invalid peer certificate: UnknownIssuer"),
    new TypeError("error sending request: client error (Connect)"),
    node("ECONNREFUSED", "connect"),
    node("ENOTFOUND", "getaddrinfo"),
    node("EAI_AGAIN", "getaddrinfo"),
    node("EHOSTUNREACH", "connect"),
    node("ENETUNREACH", "connect"),
    node("ETIMEDOUT", "connect"),
    node("EHOSTUNREACH"),
    node("UND_ERR_CONNECT_TIMEOUT"),
    node("DEPTH_ZERO_SELF_SIGNED_CERT"),
    node("CERT_HAS_EXPIRED"),
    node("ERR_TLS_CERT_ALTNAME_INVALID"),
    new TypeError("fetch failed", { cause: new AggregateError([node("ECONNREFUSED", "connect").cause]) }),
    new TypeError("fetch failed", { cause: new Error("bad port") }),
    bun("ECONNREFUSED"),
    bun("ENOTFOUND"),
    bun("ConnectionRefused"),
  ];
  const sent: unknown[] = [
    deno("client error (SendRequest): connection closed before message completed"),
    deno("client error (SendRequest): invalid HTTP version parsed"),
    new TypeError("fetch failed", { cause: new Error("Connection reset by peer (os error 104)") }),
    node("ECONNRESET", "read"),
    node("EPIPE", "write"),
    node("EHOSTUNREACH", "read"),
    node("ETIMEDOUT", "read"),
    node("UND_ERR_SOCKET"),
    node("UND_ERR_HEADERS_TIMEOUT"),
    node("HPE_INVALID_CONSTANT"),
    node("ERR_SSL_TLSV13_ALERT_CERTIFICATE_REQUIRED"),
    bun("ECONNRESET"),
    new DOMException("The operation was aborted", "AbortError"),
    new Error("anything"),
    "a text",
    null,
  ];
  for (const error of unsent) {
    assertEquals([error, (await deliver(httpSink("http://host/", failing(error)))).as], [error, "retryable"]);
  }
  for (const error of sent) {
    assertEquals([error, (await deliver(httpSink("http://host/", failing(error)))).as], [error, "unknown"]);
  }
});

for (const [what, value] of [["a value", encode("abc")], ["a tombstone", null]] as const) {
  test(`httpSink has ${what} sent once when a connection that was used before breaks`, async () => {
    const requests: string[] = [];
    await using server = listen(async (conn) => {
      // Only the first request of all is answered, and its connection kept open.
      for (let text: string | null; (text = await readRequest(conn)) !== null;) {
        if (requests.push(/^idempotency-key: (.*)$/im.exec(text)![1]!) > 1) return;
        await write(conn, "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok");
      }
    });
    const sink = httpSink(server.url);
    assertEquals((await deliver(sink, messageOf({ id: "first", value }))).as, "delivered");
    assertEquals((await deliver(sink, messageOf({ id: "second", value }))).as, "unknown");
    assertEquals(requests, ["first", "second"]);
  });
}

// -------------------------------------------------------------------------------------------------------------- reconcile

test("httpSink asks about a message in doubt with the same headers, at a URL of its parts", async () => {
  await using server = serve(() => new Response('{"charged":true}'));
  const { host } = new URL(server.url);
  const sink = httpSink(`http://user:pass@${host}/charge`, {
    headers: { "x-api-key": "k", "content-type": "text/plain" },
    reconcile: `${server.url}/{topic}/{key}/{id}?id={id}&all={id}{id}#{id}`,
  });
  const message = messageOf({ id: "é/?#%", topic: "a b", key: "..k" });
  assertEquals(await reconcile(sink, message), { state: "done", result: { status: 200, body: '{"charged":true}' } });
  const { method, url, headers, body } = server.seen[0]!;
  const id = "%C3%A9%2F%3F%23%25";
  assertEquals([method, url], ["GET", `${server.url}/a%20b/..k/${id}?id=${id}&all=${id}${id}`]);
  assertEquals([headers.get("x-api-key"), headers.get("authorization")], ["k", `Basic ${btoa("user:pass")}`]);
  assertEquals(headers.get("cache-control"), "no-cache");
  assertEquals(body.length, 0);
});

test("httpSink sends the target's credentials to no other origin, and those of the reconcile URL to it", async () => {
  await using server = serve(() => new Response(null, { status: 404 }));
  const { host } = new URL(server.url);
  const reconcileAt = (reconcile: string) => httpSink("http://user:pass@host.example/", { reconcile });
  assertEquals(await reconcile(reconcileAt(`${server.url}/{id}`)), { state: "absent" });
  assertEquals(await reconcile(reconcileAt(`http://other:secret@${host}/{id}`)), { state: "absent" });
  const sent = server.seen.map(({ headers }) => headers.get("authorization"));
  assertEquals(sent, [null, `Basic ${btoa("other:secret")}`]);
});

test("httpSink finds out whether a message in doubt happened, or that the target cannot tell", async () => {
  await using server = serve(({ url }) => {
    const status = Number(new URL(url).pathname.split("/")[1]);
    return new Response(status === 204 ? null : "text", { status, headers: { location: "/200/x" } });
  });
  const ask = (status: number) => reconcile(httpSink("http://host.example/", { reconcile: `${server.url}/${status}/{id}` }));
  assertEquals(await ask(200), { state: "done", result: { status: 200, body: "text" } });
  assertEquals(await ask(204), { state: "done", result: { status: 204, body: "" } });
  assertEquals(await ask(404), { state: "absent" });
  for (const status of [301, 304, 400, 401, 403, 405, 409, 410, 422]) {
    if (status !== 304) assertEquals([status, await ask(status)], [status, { state: "unknown" }]);
  }
  for (const status of [408, 425, 429, 500, 502, 503, 504]) {
    const error = await assertRejects(() => ask(status));
    assertEquals(error.message, `GET ${server.url}/${status}/order-1 answered ${status}: text`);
  }
});

test("httpSink cannot tell about a message whose parts make no URL of their own", async () => {
  await using server = serve(() => new Response("the list of all charges"));
  const sink = httpSink("http://host.example/", { reconcile: `${server.url}/charges/{id}?key={key}` });
  for (const fields of [{ key: null }, { id: ".." }, { id: "." }, { key: "" }, { id: "%2e%2e" }]) {
    const known = "id" in fields && fields.id === "%2e%2e"; // Becomes %252e%252e, which is a name like any other.
    const found = await reconcile(sink, messageOf({ key: "k", ...fields }));
    assertEquals([fields, found.state], [fields, known ? "done" : "unknown"]);
  }
  assertEquals(server.seen.map(({ url }) => url), [`${server.url}/charges/%252e%252e?key=k`]);
});

test("httpSink reports in one sentence, without secrets, why it could not ask", async () => {
  await using broken = listen(async (conn) => void await readRequest(conn));
  await using silent = listen(untilHungUp);
  const urls: [url: string, part: string][] = [
    [`http://127.0.0.1:${closedPort()}`, "could not be reached, nothing was sent"],
    [broken.url, "broke off without an answer"],
    [silent.url, "did not answer within 50 ms"],
  ];
  for (const [url, part] of urls) {
    const template = `${url.replace("://", "://user:hush@")}/{id}?token=hush`;
    const sink = httpSink("http://host.example/", { reconcile: template, timeoutMs: 50 });
    const error = await assertRejects(() => reconcile(sink), Error, part);
    assertStringIncludes(error.message, `GET ${url}/order-1 `);
    assert(!Deno.inspect(error, { showHidden: true }).includes("hush"));
  }
});

test("httpSink, asked by the relay, delivers what was done and sends anew what was not", async () => {
  const charges = new Map<string, string>();
  const keys: string[] = [];
  let asked = 0;
  await using api = serve(({ url }) => {
    asked++;
    const charge = charges.get(decodeURIComponent(new URL(url).pathname.slice(1)));
    return charge === undefined ? new Response("none", { status: 404 }) : new Response(charge);
  });
  // Hangs up on every first request of an id: after the charge for "done", before it for "lost".
  await using flaky = listen(async (conn) => {
    const text = (await readRequest(conn))!;
    const id = /^ce-id: (.*)$/im.exec(text)![1]!;
    keys.push(/^idempotency-key: (.*)$/im.exec(text)![1]!);
    const first = keys.length <= 2;
    if (id === "done" || !first) charges.set(id, `charge of ${id}`);
    if (!first) await write(conn, "HTTP/1.1 200 OK\r\ncontent-length: 4\r\nconnection: close\r\n\r\npaid");
  });
  const sink = httpSink(flaky.url, { reconcile: `${api.url}/{id}` });
  const messages = ["done", "lost"].map((id) => ({ id, topic: "payments", key: "k", value: 1 }));
  const { effects, types } = await run(sink, messages);
  assertEquals(effects.map(({ state, result }) => [state, result]), [
    ["done", { status: 200, body: "charge of done" }],
    ["done", { status: 200, body: "paid" }],
  ]);
  assertEquals([types, asked], [["delivered", "delivered"], 2]);
  assertEquals(keys, ["done", "lost", "lost;generation=2"]);
});

test("httpSink, asked by the relay, leaves in doubt what the target cannot tell", async () => {
  await using server = serve(({ method }) => new Response("no", { status: method === "GET" ? 403 : 500 }));
  const { effects, types } = await run(httpSink(server.url, { reconcile: `${server.url}/{id}` }));
  assertEquals([types, effects[0]!.state], [["uncertain"], "uncertain"]);
});

// ------------------------------------------------------------------------------------------------------------- acceptance

test("httpSink meets a rival send, a mismatch and a saved 500 as it should (acceptance 32)", async () => {
  // A target that dedupes as the IETF draft says: 409 while the first send runs, afterwards always the same answer.
  const finish = Promise.withResolvers<void>();
  const answers = new Map<string, string | null>();
  const statuses: number[] = [];
  let charges = 0;
  await using rival = serve(async ({ headers }) => {
    const key = headers.get("idempotency-key")!;
    const answer = answers.get(key);
    if (answer === null) {
      statuses.push(409);
      finish.resolve();
      return new Response("in flight", { status: 409 });
    }
    if (answer === undefined) {
      answers.set(key, null);
      await finish.promise; // The caller's time runs out meanwhile.
      answers.set(key, `charge ${++charges}`);
    }
    statuses.push(200);
    return new Response(answers.get(key));
  });
  const once = await run(httpSink(rival.url, { repeat: "same-key", timeoutMs: 200 }), [order], { attempts: 10 });
  assertEquals(once.effects.map(({ state, result }) => [state, result]), [["done", { status: 200, body: "charge 1" }]]);
  assertEquals([charges, once.types.at(-1), once.store.outbox()], [1, "delivered", []]);
  assert(statuses.includes(409), String(statuses));
  assertEquals(new Set(rival.seen.map(({ headers }) => headers.get("idempotency-key"))), new Set(["order-1"]));
  for (const { body } of rival.seen) assertEquals(body, rival.seen[0]!.body);

  await using mismatch = serve(() => new Response("key used with another payload", { status: 422 }));
  const parked = await run(httpSink(mismatch.url, { repeat: "same-key" }));
  assertEquals([parked.types, parked.effects[0]!.state, mismatch.seen.length], [["parked"], "rejected", 1]);
  assertStringIncludes(parked.effects[0]!.error!, "answered 422: key used with another payload");

  // Stripe's API v1 saves a 500 and answers it ever after.
  await using saved = serve(() => new Response("saved", { status: 500 }));
  const doubt = await run(httpSink(saved.url, { repeat: "same-key" }));
  assertEquals([doubt.types, doubt.effects[0]!.state], [["retried", "retried", "retried", "uncertain"], "uncertain"]);
  assertEquals([saved.seen.length, doubt.store.outbox()[0]!.state], [4, "parked"]);
  assertNotEquals(doubt.effects[0]!.error, null);
});

test("httpSink asks under the idempotency key that was used last, once the attempts are used up", async () => {
  const asked: string[] = [];
  const sent: string[] = [];
  await using server = serve(({ method, url, headers }) => {
    if (method === "GET") {
      asked.push(decodeURIComponent(new URL(url).pathname.slice(1)));
      return new Response(null, { status: asked.length === 1 ? 404 : 200 });
    }
    sent.push(headers.get("idempotency-key")!);
    return new Response("saved", { status: 500 });
  });
  const store = memoryStore();
  await store.enqueue({ id: "m1", topic: "t", value: 1 });
  const to = httpSink(server.url, { repeat: "same-key", reconcile: `${server.url}/{idempotencyKey}` });
  const times = { attempts: 2, minRetryMs: 0, maxRetryMs: 1, settleMs: 0 };
  const report = await relay({ from: memoryOutbox(store), to, store, drain: true, ...times });
  assertEquals(report, { delivered: 1, parked: 0, uncertain: 0 });
  assertEquals(sent, ["m1", "m1", "m1;generation=2", "m1;generation=2"]);
  assertEquals(asked, ["m1", "m1;generation=2"]);
});
