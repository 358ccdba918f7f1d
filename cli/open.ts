/**
 * Opens the ends that URLs name: the one place that knows schemes. Drivers load when their scheme is used.
 *
 * @module
 */
import type { AtomicSink, CallSink, Outbox } from "../mod.ts";
import { fileSink, stdoutSink } from "../adapters/file.ts";
import { httpSink } from "../adapters/http.ts";
import { sqliteSchema } from "../adapters/sqlite.ts";
import type { Check, Database, OpenOptions } from "./database.ts";
import { reason, UsageError } from "./errors.ts";
import { checkKafka, openKafkaSink, permitKafka, readKafka } from "./kafka.ts";
import type { Flags } from "./flags.ts";
import { maskedUrl } from "./mask.ts";
import { mysqlSchemaOf, openMysql } from "./mysql.ts";
import { asks, need } from "./permissions.ts";
import { openPostgres, postgresSchemaOf } from "./postgres.ts";
import { openSqlite } from "./sqlite.ts";
import { onlyParameters, parts } from "./url.ts";

/** How databases of a scheme are opened, and what the SQL of their tables is. */
interface Scheme {
  open(label: string, url: string, options: OpenOptions): Promise<Database>;
  schema(label: string, url: string): string;
}

const SCHEMES: Readonly<Record<string, Scheme>> = {
  sqlite: { open: openSqlite, schema: () => sqliteSchema() },
  postgres: { open: openPostgres, schema: postgresSchemaOf },
  postgresql: { open: openPostgres, schema: postgresSchemaOf },
  mysql: { open: openMysql, schema: mysqlSchemaOf },
  mariadb: { open: openMysql, schema: mysqlSchemaOf },
};

function schemeOf(label: string, url: string): Scheme {
  const { scheme } = parts(label, url);
  if (Object.hasOwn(SCHEMES, scheme)) return SCHEMES[scheme]!;
  const known = "sqlite:, postgres:, mysql: or mariadb:";
  throw new UsageError(`${label}: "${scheme}:" is not a database that effectonce knows: use ${known}`);
}

/** The SQL of the tables for the databases of a scheme. */
export function schemaOf(label: string, url: string): string {
  return schemeOf(label, url).schema(label, url);
}

/**
 * Opens a database with claims and an outbox.
 *
 * @param label How a sentence names where the URL was given.
 */
export async function openDatabase(label: string, url: string, options: OpenOptions = {}): Promise<Database> {
  return await schemeOf(label, url).open(label, url, options);
}

/** Opens the sink of a relay. */
export function openSink(flags: Flags): CallSink | AtomicSink {
  const to = flags.label("to");
  flags.given("to");
  const url = flags.url("to")!;
  const read = parts(to, url);
  const { scheme, rest } = read;
  const web = scheme === "http" || scheme === "https";
  for (const name of ["idempotent", "dedupe-window-ms", "header-to", "method", "timeout-ms", "reconcile"]) {
    // A variable holds for all relays of a process, whatever their targets are.
    if (web || !flags.has(name) || flags.layer.get(name)?.source === "environment") continue;
    throw new UsageError(`${flags.label(name)} is for http: and https: targets, not for ${scheme}:`);
  }
  if (scheme !== "kafka" && flags.layer.get("create-topics")?.source === "flag") {
    throw new UsageError(`${flags.label("create-topics")} is for kafka: targets, not for ${scheme}:`);
  }
  switch (scheme) {
    case "kafka":
      return openKafkaSink(to, url, flags.on("create-topics"));
    case "http":
    case "https": {
      if (flags.has("dedupe-window-ms") && !flags.on("idempotent")) {
        const needs = `${flags.label("dedupe-window-ms")} needs ${flags.label("idempotent")}`;
        throw new UsageError(`${needs}: it says how long the target remembers a key`);
      }
      if (!rest.startsWith("//")) throw new UsageError(`${to}: write ${scheme}://host/path`);
      if (flags.has("settle-ms") && !flags.has("reconcile")) {
        const needs = `${flags.label("settle-ms")} needs ${flags.label("reconcile")}`;
        throw new UsageError(`${needs}: it says how long after an attempt to ask`);
      }
      const headers = flags.headers("header-to");
      const reconcile = flags.url("reconcile");
      // One after the other, so that a complaint names its flag.
      blaming(to, () => httpSink(url));
      blaming(flags.label("header-to"), () => httpSink(url, { headers }));
      blaming(flags.label("reconcile"), () => httpSink(url, { reconcile }));
      return httpSink(url, {
        method: flags.text("method") as "POST" | "PUT" | undefined,
        headers,
        repeat: flags.on("idempotent") ? "same-key" : "never",
        dedupeWindowMs: flags.number("dedupe-window-ms"),
        timeoutMs: flags.number("timeout-ms"),
        reconcile,
      });
    }
    case "file":
      onlyParameters(to, read, []);
      if (rest === "" || rest.startsWith("//")) {
        throw new UsageError(`${to}: "${maskedUrl(url)}" names no file: write file:events.jsonl`);
      }
      return fileSink(rest);
    case "stdout":
      onlyParameters(to, read, []);
      if (rest !== "") throw new UsageError(`${to}: write stdout: with nothing behind it`);
      return stdoutSink(writeStdout);
    default:
      throw new UsageError(
        `${to}: "${scheme}:" is not a target that effectonce knows: use kafka:, http:, https:, file: or stdout:`,
      );
  }
}

/** What `doctor` finds of a relay's target. */
export async function checksOfTarget(flags: Flags, outbox: Outbox): Promise<readonly Check[]> {
  const url = flags.url("to")!;
  if (parts(flags.label("to"), url).scheme !== "kafka") return [];
  permitTarget(flags);
  const owners = (await outbox.sealed(flags.text("name")!)).map(({ owner }) => owner);
  return await checkKafka(readKafka(flags.label("to"), url), owners, flags.number("lease-ms")!);
}

function blaming(label: string, run: () => unknown): void {
  try {
    run();
  } catch (error) {
    throw new UsageError(`${label}: ${reason(error)}`);
  }
}

/** What sinks into stdout write: a line of one must not be in the middle of another's. */
let writing: Promise<void> = Promise.resolve();

function writeStdout(bytes: Uint8Array): Promise<void> {
  const mine = writing.then(async () => {
    try {
      for (let done = 0; done < bytes.length;) done += await Deno.stdout.write(bytes.subarray(done));
    } catch (error) {
      if (!(error instanceof Deno.errors.BrokenPipe)) throw error;
      // Nobody reads any more: that is no fault of the messages, which stay where they are.
      console.error("effectonce: stdout was closed");
      Deno.exit(1);
    }
  });
  writing = mine.catch(() => {});
  return mine;
}

/**
 * Makes sure that a relay may reach its target, before a message is claimed for it.
 *
 * @throws {Error} If a permission is missing.
 */
export function permitTarget(flags: Flags): void {
  const { scheme, rest: path } = parts(flags.label("to"), flags.url("to")!);
  const hostOf = (url: string) => {
    const { hostname, port, protocol } = new URL(url);
    return { name: "net", host: `${hostname}:${port || (protocol === "https:" ? 443 : 80)}` } as const;
  };
  if (scheme === "file") {
    // A new file's name is made durable through its folder. The sink does without where Deno does not let it; but not if
    // Deno would ask.
    const folder = asks() ? [{ name: "read", path: path.replace(/[^/]*$/, "") || "." } as const] : [];
    need(flags.label("to"), { name: "read", path }, { name: "write", path }, ...folder);
  } else if (scheme === "kafka") {
    permitKafka(flags.label("to"), readKafka(flags.label("to"), flags.url("to")!));
  } else if (scheme === "http" || scheme === "https") {
    for (const name of ["to", "reconcile"]) {
      if (flags.has(name)) need(flags.label(name), hostOf(flags.url(name)!));
    }
  }
}
