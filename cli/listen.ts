/**
 * What a relay answers over HTTP: `/live`, `/ready` and `/metrics`.
 *
 * @module
 */
import { reason, UsageError } from "./errors.ts";
import { CONTENT_TYPE, exposition } from "./metrics.ts";
import { need } from "./permissions.ts";
import type { Watch } from "./watch.ts";

/** Where to listen. */
export interface Address {
  readonly hostname: string;
  readonly port: number;
}

/** A server that listens, until it is disposed of. */
export interface Listening extends AsyncDisposable {
  /** Where it can be asked. */
  readonly url: string;
}

/**
 * Reads `HOST:PORT`, `:PORT` or `PORT`; without a host it is for this machine only.
 *
 * @throws {UsageError} If it is none of these.
 */
export function parseAddress(label: string, text: string): Address {
  const [, hostname, port] = /^(?:(\[[\da-f:.]+\]|[^\s:/@[\]]*):)?(\d{1,5})$/i.exec(text) ?? [];
  if (port === undefined || Number(port) > 65_535) {
    throw new UsageError(`${label} must be HOST:PORT, :PORT or PORT up to 65535`);
  }
  return { hostname: (hostname || "127.0.0.1").replace(/^\[(.*)\]$/, "$1"), port: Number(port) };
}

/**
 * Answers for relays.
 *
 * @param stopping Whether they were told to stop.
 * @throws {Error} If it cannot listen there.
 */
export function listen({ hostname, port }: Address, relays: readonly Watch[], stopping: () => boolean): Listening {
  const host = hostname.includes(":") ? `[${hostname}]` : hostname;
  need(`Listening on ${host}:${port}`, { name: "net", host: `${host}:${port}` });
  const pages: Readonly<Record<string, () => Response | Promise<Response>>> = {
    "/live": () => text(200, "live"),
    "/ready"() {
      const complaints = stopping() ? ["the relay is stopping"] : relays.map((relay) => relay.complaint() ?? []).flat();
      return complaints.length > 0 ? text(503, complaints.join("\n")) : text(200, "ready");
    },
    async "/metrics"() {
      const body = exposition(await Promise.all(relays.map((relay) => relay.scrape())));
      return new Response(body, { headers: { "content-type": CONTENT_TYPE } });
    },
  };
  const answer = (request: Request) => {
    const { pathname } = new URL(request.url);
    if (!Object.hasOwn(pages, pathname)) return text(404, `there are ${Object.keys(pages).join(", ")}`);
    if (request.method === "GET" || request.method === "HEAD") return pages[pathname]!();
    return text(405, "only GET", { allow: "GET, HEAD" });
  };
  const stop = new AbortController();
  let server: Deno.HttpServer<Deno.NetAddr>;
  try {
    server = Deno.serve({
      hostname,
      port,
      signal: stop.signal,
      onListen: () => {},
      onError: (error) => text(500, reason(error)),
    }, answer);
  } catch (error) {
    const why = error instanceof Deno.errors.AddrInUse ? "the port is in use" : reason(error);
    throw new Error(`Cannot listen on ${host}:${port}: ${why}`, { cause: error });
  }
  return {
    url: `http://${host}:${server.addr.port}`,
    async [Symbol.asyncDispose]() {
      stop.abort();
      await server.finished;
    },
  };
}

function text(status: number, line: string, headers: Readonly<Record<string, string>> = {}): Response {
  return new Response(`${line}\n`, { status, headers: { "content-type": "text/plain; charset=utf-8", ...headers } });
}
