/**
 * A TCP proxy in front of a server, for what networks do: connections that break before or after the server has heard, that hang,
 * and that are refused.
 *
 * @module
 */
import { listenAnywhere } from "./process.ts";

/** Which way a chunk goes. */
export type Direction = "toServer" | "toClient";

/**
 * What becomes of a chunk: `pass` hands it on, `cut` closes both sides at once and drops it, `hold` keeps it, and what comes
 * after it that way, until `release()`.
 */
export type Verdict = "pass" | "cut" | "hold";

/** How a proxy is started. */
export interface ProxyOptions {
  /**
   * Sees each chunk before it goes on. To break a connection after the server has heard but before the client has, answer `pass`
   * to the server's chunk, and `cut` to the next one to the client. Connections are numbered from 1.
   *
   * @default passes everything
   */
  readonly observe?: (direction: Direction, bytes: Uint8Array, connection: number) => Verdict;
}

/** A proxy that runs. */
export interface Proxy {
  readonly port: number;
  /** The same URL through the proxy. */
  url(url: string): string;
  /** Hands on what is held. */
  release(): void;
  /** Closes all connections that there are. */
  cutAll(): void;
  /** Whether new connections are refused, as by a server that is down; those that there are stay. */
  refuse(refusing: boolean): Promise<void>;
  /** Closes everything. Rejects with what `observe` has thrown, if it has: such a chunk was cut. */
  [Symbol.asyncDispose](): Promise<void>;
}

/** A connection through the proxy. */
interface Link {
  readonly number: number;
  readonly ends: Deno.TcpConn[];
  /** Fulfilled when it is cut. */
  readonly cut: PromiseWithResolvers<void>;
  closed: boolean;
}

/** Starts a proxy. */
export function startProxy(
  target: { readonly hostname: string; readonly port: number },
  options: ProxyOptions = {},
): Proxy {
  const { observe = () => "pass" } = options;
  let listener: Deno.TcpListener | undefined = listenAnywhere();
  const { port } = listener.addr;
  const links = new Set<Link>();
  const carried = new Set<Promise<void>>();
  const failures: unknown[] = [];
  let numbers = 0;
  let gate = Promise.withResolvers<void>();
  let accepting: Promise<void> = Promise.resolve();

  function look(...chunk: Parameters<typeof observe>): Verdict {
    try {
      return observe(...chunk);
    } catch (error) {
      failures.push(error);
      return "cut";
    }
  }

  function close(link: Link): void {
    if (link.closed) return;
    link.closed = true;
    for (const end of link.ends) end.close();
    link.cut.resolve();
  }

  async function pump(link: Link, from: Deno.TcpConn, to: Deno.TcpConn, direction: Direction): Promise<void> {
    const buffer = new Uint8Array(65_536);
    try {
      for (;;) {
        const count = await from.read(buffer);
        if (count === null) return await to.closeWrite();
        const bytes = buffer.slice(0, count);
        const verdict = look(direction, bytes, link.number);
        if (verdict === "cut") close(link);
        if (verdict === "hold") await Promise.race([gate.promise, link.cut.promise]);
        if (link.closed) return;
        for (let sent = 0; sent < bytes.length;) sent += await to.write(bytes.subarray(sent));
      }
    } catch {
      close(link); // One end has broken, or both have been closed here.
    }
  }

  async function carry(client: Deno.TcpConn): Promise<void> {
    const link: Link = { number: ++numbers, ends: [client], cut: Promise.withResolvers(), closed: false };
    links.add(link);
    const server = await Deno.connect(target).catch(() => undefined);
    if (server && !link.closed) {
      link.ends.push(server);
      for (const end of link.ends) end.setNoDelay(true);
      await Promise.all([pump(link, client, server, "toServer"), pump(link, server, client, "toClient")]);
    } else server?.close();
    close(link);
    links.delete(link);
  }

  async function accept(from: Deno.TcpListener): Promise<void> {
    for await (const client of from) {
      const carrying = carry(client).finally(() => carried.delete(carrying));
      carried.add(carrying);
    }
  }

  async function refuse(refusing: boolean): Promise<void> {
    if (refusing) {
      listener?.close();
      listener = undefined;
      await accepting;
    } else if (!listener) {
      listener = Deno.listen({ hostname: "127.0.0.1", port });
      accepting = accept(listener);
    }
  }

  function cutAll(): void {
    for (const link of links) close(link);
  }

  accepting = accept(listener);
  return {
    port,
    url(url) {
      const through = new URL(url);
      through.host = `127.0.0.1:${port}`;
      return through.href;
    },
    release() {
      gate.resolve();
      gate = Promise.withResolvers();
    },
    cutAll,
    refuse,
    async [Symbol.asyncDispose]() {
      await refuse(true);
      cutAll();
      await Promise.all(carried);
      if (failures.length > 0) throw failures[0];
    },
  };
}
