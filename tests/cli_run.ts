/**
 * Runs the real command line as child processes in a folder of its own, against targets that answer as a test says.
 *
 * @module
 */
import { DatabaseSync } from "node:sqlite";
import { assert, assertEquals, assertMatch } from "@std/assert";

const CLI = new URL("../cli.ts", import.meta.url).pathname;
const MANY = new URL("./cli_many.ts", import.meta.url).pathname;
const decoder = new TextDecoder();

/** How a command ended. */
export interface Ended {
  readonly code: number;
  readonly stdout: string;
  readonly stderr: string;
}

/** What a child is given besides its arguments. */
export interface Given {
  readonly stdin?: string | Uint8Array;
  readonly env?: Readonly<Record<string, string>>;
  /** When it is killed, so that one that runs on where it should have ended fails its test and does not stop the others. */
  readonly deadlineMs?: number;
  /** Runs as somebody who may only do what the file modes say: root may do all. */
  readonly nobody?: boolean;
  /** Deno's own flags, such as permissions; by default everything is allowed. */
  readonly deno?: readonly string[];
}

/** A command line, and what the environment holds for it alone. */
export interface Line {
  readonly args: readonly string[];
  readonly env: Readonly<Record<string, string>>;
}

/** A command that runs on, until it is told to stop. */
export class Running {
  readonly #child: Deno.ChildProcess;
  readonly #ended: Promise<void>;
  #stderr = "";
  readonly #reader: ReadableStreamDefaultReader<string>;
  /** The lines of stdout so far. */
  readonly lines: string[] = [];
  #rest = "";
  constructor(child: Deno.ChildProcess) {
    this.#child = child;
    this.#ended = (async () => {
      for await (const text of child.stderr.pipeThrough(new TextDecoderStream())) this.#stderr += text;
    })();
    this.#reader = child.stdout.pipeThrough(new TextDecoderStream()).getReader();
  }
  get pid(): number {
    return this.#child.pid;
  }
  async #line(): Promise<string | undefined> {
    for (;;) {
      const end = this.#rest.indexOf("\n");
      if (end >= 0) {
        const line = this.#rest.slice(0, end);
        this.#rest = this.#rest.slice(end + 1);
        this.lines.push(line);
        return line;
      }
      const { value, done } = await this.#reader.read();
      if (done) return undefined;
      this.#rest += value;
    }
  }
  /** Reads on until a line that fits. */
  async until(fits: (line: string) => boolean): Promise<string> {
    for (let line; (line = await this.#line()) !== undefined;) if (fits(line)) return line;
    await this.#ended;
    throw new Error(`The command ended early. stdout:\n${this.lines.join("\n")}\nstderr:\n${this.#stderr}`);
  }
  /** Waits until stderr says something. */
  async said(pattern: RegExp): Promise<RegExpExecArray> {
    let over = false;
    this.#ended.then(() => over = true);
    await until(() => pattern.test(this.#stderr) || over);
    const found = pattern.exec(this.#stderr);
    assert(found, `It should say ${pattern}, but says: ${this.#stderr}`);
    return found;
  }
  /** Waits until it listens; answers where. */
  async listening(): Promise<string> {
    return (await this.said(/listening.*(http:\/\/[^"\s]+)/))[1]!;
  }
  /** Reads on until a JSON event of a type. */
  async event(type: string): Promise<Record<string, unknown>> {
    return JSON.parse(await this.until((line) => JSON.parse(line).type === type));
  }
  kill(signal: Deno.Signal): void {
    this.#child.kill(signal);
  }
  /** Waits for its end. */
  async ended(): Promise<Ended & { readonly signal: Deno.Signal | null }> {
    while (await this.#line() !== undefined);
    const { code, signal } = await this.#child.status;
    await this.#ended;
    return { code, signal, stdout: this.lines.map((line) => `${line}\n`).join("") + this.#rest, stderr: this.#stderr };
  }
  async stop(signal: Deno.Signal = "SIGINT"): Promise<Ended> {
    this.kill(signal);
    return await this.ended();
  }
}

/** A folder with a database `app.db` in it, where commands run. */
export class Box implements AsyncDisposable {
  readonly folder: string;
  readonly #running: Running[] = [];
  constructor(folder: string) {
    this.folder = folder;
  }
  path(name: string): string {
    return `${this.folder}/${name}`;
  }
  #command(
    args: readonly string[],
    { env, nobody, deno = ["-A"] }: Given,
    stdin: "piped" | "null",
    script = CLI,
  ): Deno.Command {
    const command = nobody
      ? ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", Deno.execPath()]
      : [Deno.execPath()];
    return new Deno.Command(command[0]!, {
      args: [...command.slice(1), "run", ...deno, "--quiet", script, ...args],
      cwd: this.folder,
      // No colours, whatever started the tests.
      env: { NO_COLOR: "1", ...env },
      stdin,
      stdout: "piped",
      stderr: "piped",
    });
  }
  /** Runs a command to its end. */
  async run(args: readonly string[], given: Given = {}): Promise<Ended> {
    return await this.#run(args, given, CLI);
  }
  /** Runs command lines one after the other, in one process: for those that only say something. */
  async many(lines: readonly (readonly string[] | Line)[], env: Given["env"] = {}): Promise<Ended[]> {
    const stdin = JSON.stringify(lines.map((line) => "args" in line ? line : { args: line, env: {} }));
    const { code, stdout, stderr } = await this.#run([], { stdin, env, deadlineMs: 60_000 }, MANY);
    assertEquals([code, stderr], [0, ""]);
    return JSON.parse(stdout);
  }
  async #run(args: readonly string[], given: Given, script: string): Promise<Ended> {
    const { stdin, deadlineMs = 20_000 } = given;
    const child = this.#command(args, given, stdin === undefined ? "null" : "piped", script).spawn();
    if (stdin !== undefined) {
      const writer = child.stdin.getWriter();
      // A child that does not read its stdin to the end is no failure of the test.
      await writer.write(typeof stdin === "string" ? new TextEncoder().encode(stdin) : stdin).catch(() => {});
      await writer.close().catch(() => {});
    }
    const late = setTimeout(() => child.kill("SIGKILL"), deadlineMs);
    const { code, stdout, stderr } = await child.output();
    clearTimeout(late);
    return { code, stdout: decoder.decode(stdout), stderr: decoder.decode(stderr) };
  }
  /** Runs a command that must succeed; answers its stdout. */
  async ok(args: readonly string[], given?: Given): Promise<string> {
    const { code, stdout, stderr } = await this.run(args, given);
    assertEquals([code, stderr], [0, ""], `${args.join(" ")} answered ${code}: ${stderr}`);
    return stdout;
  }
  /** The same; its stdout is one line of JSON. */
  async json(args: readonly string[], given?: Given): Promise<unknown> {
    const stdout = await this.ok([...args, "--json"], given);
    assertMatch(stdout, /^[^\n]+\n$/, "JSON is one line");
    return JSON.parse(stdout);
  }
  /** Starts a command that runs on. */
  start(args: readonly string[], given: Given = {}): Running {
    const running = new Running(this.#command(args, given, "null").spawn());
    this.#running.push(running);
    return running;
  }
  async enqueue(...messages: readonly Readonly<Record<string, unknown>>[]): Promise<void> {
    const stdin = messages.map((message) => `${JSON.stringify({ topic: "orders", ...message })}\n`).join("");
    await this.ok(["enqueue", "--store", DB, "--jsonl", "-"], { stdin });
  }
  /** Runs SQL as another program would, and answers all rows of the last statement. */
  sql(...statements: readonly string[]): Record<string, unknown>[] {
    return sqlOn(this.path("app.db"), ...statements);
  }
  async status(): Promise<Status> {
    return await this.json(["status", "--store", DB]) as Status;
  }
  /** Every row of every table: what a command that failed must not have changed. */
  content(): string {
    const tables = this.sql(`select name from sqlite_master where type = 'table' order by name`);
    return JSON.stringify(tables.map(({ name }) => [name, this.sql(`select * from ${name}`)]));
  }
  async [Symbol.asyncDispose](): Promise<void> {
    for (const running of this.#running) {
      try {
        running.kill("SIGKILL");
      } catch {
        // It has ended.
      }
      await running.ended();
    }
    await Deno.remove(this.folder, { recursive: true });
  }
}

/** Runs SQL on a database file; answers all rows of the last statement. */
export function sqlOn(path: string, ...statements: readonly string[]): Record<string, unknown>[] {
  const client = new DatabaseSync(path);
  try {
    let rows: Record<string, unknown>[] = [];
    // Copies: node:sqlite's rows have no prototype, and are then not equal to a literal.
    for (const statement of statements) rows = client.prepare(statement).all().map((row) => ({ ...row }));
    return rows;
  } finally {
    client.close();
  }
}

/** What `status --json` prints. */
export interface Status {
  readonly outbox: {
    readonly pending: number;
    readonly heldBack: number;
    readonly parked: number;
    readonly oldestMs: number | null;
  };
  readonly effects: Readonly<Record<"claimed" | "waiting" | "done" | "rejected" | "uncertain", number>>;
}

/** The URL of the box's database. */
export const DB = "sqlite:app.db";

/** A folder with nothing in it. */
export async function emptyBox(): Promise<Box> {
  return new Box(await Deno.makeTempDir({ prefix: "effectonce-cli-" }));
}

/** A folder with an initialised database. */
export async function box(): Promise<Box> {
  const made = await emptyBox();
  try {
    await made.ok(["init", "--store", DB]);
    return made;
  } catch (error) {
    await made[Symbol.asyncDispose]();
    throw error;
  }
}

/** One clear sentence for a person: no stack, no paths of our own source, nothing that only a programmer understands. */
export function assertSentence(stderr: string): void {
  for (const part of ["    at ", "Stack backtrace", "file:///", "[object", "undefined", "is not a function", "Uncaught"]) {
    assert(!stderr.includes(part), `${JSON.stringify(part)} is not for a person to read: ${stderr}`);
  }
  assertMatch(
    stderr,
    /^effectonce: \S[^\n]*\S\n(See: [^\n]+\n|See docs\/operations\.md#[a-z_]+\n)?$/,
    `not one clear sentence: ${stderr}`,
  );
}

/** A usage error: exit code 2, one sentence that says what is meant, where help is, and nothing on stdout. */
export function assertUsage({ code, stdout, stderr }: Ended, ...says: readonly (string | RegExp)[]): void {
  assertSentence(stderr);
  assertSays(stderr, says);
  assertEquals([code, stdout], [2, ""], `exit code ${code}, stdout ${JSON.stringify(stdout)}, stderr ${stderr}`);
  assertMatch(stderr, /\nSee: ([a-z ]+)?--help\n$/, "it does not say where help is");
}

/** A failure: exit code 1, one sentence that says what is meant, and nothing on stdout. */
export function assertFailure({ code, stdout, stderr }: Ended, ...says: readonly (string | RegExp)[]): void {
  assertSentence(stderr);
  assertSays(stderr, says);
  assertEquals([code, stdout], [1, ""], `exit code ${code}, stdout ${JSON.stringify(stdout)}, stderr ${stderr}`);
}

/** Each part is in the text, or fits it. */
export function assertSays(text: string, says: readonly (string | RegExp)[]): void {
  for (const part of says) {
    const found = typeof part === "string" ? text.includes(part) : part.test(text);
    assert(found, `It should say ${part}, but says: ${text}`);
  }
}

/** One request that a target was sent. */
export interface Asked {
  readonly method: string;
  readonly path: string;
  /** The Idempotency-Key. */
  readonly key: string;
  readonly body: string;
  readonly headers: Headers;
}

/** An HTTP target in the test's own process. */
export class Target implements AsyncDisposable {
  readonly asked: Asked[] = [];
  /** What it answers; `nth` counts the requests with this key from 1. */
  answer: (asked: Asked, nth: number) => Response | Promise<Response> = () => Response.json({ paid: true });
  /** Fires when the test ends: requests held until then are let go. */
  readonly over: AbortController = new AbortController();
  readonly #server = Deno.serve({ hostname: "127.0.0.1", port: 0, onListen: () => {} }, async (request) => {
    const { method, url, headers } = request;
    const key = headers.get("idempotency-key") ?? "";
    const asked = { method, path: new URL(url).pathname, key, body: await request.text(), headers };
    this.asked.push(asked);
    return await this.answer(asked, this.keys().filter((other) => other === key).length);
  });
  readonly url: string = `http://127.0.0.1:${this.#server.addr.port}/charge`;
  /** The idempotency keys asked for, in order. */
  keys(): string[] {
    return this.asked.map(({ key }) => key);
  }
  /** Never answers. */
  hold(): Promise<Response> {
    return new Promise((resolve) => {
      const end = () => resolve(new Response(null, { status: 500 }));
      if (this.over.signal.aborted) end();
      else this.over.signal.addEventListener("abort", end);
    });
  }
  async [Symbol.asyncDispose](): Promise<void> {
    this.over.abort();
    await this.#server.shutdown();
  }
}

/** A TCP target that does to each connection what it likes, and counts them. */
export class RawTarget implements AsyncDisposable {
  readonly #listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  readonly url: string = `http://127.0.0.1:${this.#listener.addr.port}/charge`;
  readonly #work: Promise<void>;
  connections = 0;
  /** Answers each connection, once the head of a request has been read, with these bytes and closes it. */
  constructor(answer: string) {
    this.#work = (async () => {
      for await (const connection of this.#listener) {
        this.connections++;
        try {
          const buffer = new Uint8Array(65_536);
          for (let head = ""; !head.includes("\r\n\r\n");) {
            const count = await connection.read(buffer);
            if (count === null) break;
            head += decoder.decode(buffer.subarray(0, count));
          }
          await connection.write(new TextEncoder().encode(answer));
        } catch {
          // The client has gone.
        } finally {
          connection.close();
        }
      }
    })();
  }
  async [Symbol.asyncDispose](): Promise<void> {
    this.#listener.close();
    await this.#work;
  }
}

/** A URL where nothing listens. */
export function deadUrl(): string {
  const listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const { port } = listener.addr;
  listener.close();
  return `http://127.0.0.1:${port}/charge`;
}

/** Waits for a condition, without a guess how long it takes. */
export async function until(condition: () => boolean | Promise<boolean>, limitMs = 20_000): Promise<void> {
  const start = performance.now();
  while (!await condition()) {
    // Far longer than it ever takes: a test that fails is better than one that hangs.
    if (performance.now() - start > limitMs) throw new Error(`Not within ${limitMs / 1000} s: ${condition}`);
    await new Promise((resolve) => setTimeout(resolve, 5));
  }
}

/** A version 4 UUID. */
export const UUID: RegExp = /^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$/;
/** What toISOString writes. */
export const INSTANT: RegExp = /^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$/;
/** Counts of none. */
export const NO_EFFECTS: Status["effects"] = { claimed: 0, waiting: 0, done: 0, rejected: 0, uncertain: 0 };

/** The command line of a relay from the box's database. */
export const relayTo = (url: string, ...more: string[]): string[] => ["relay", "--from", DB, "--to", url, ...more];
/** The same, until nothing deliverable is left. */
export const drainTo = (url: string, ...more: string[]): string[] => relayTo(url, "--drain", ...more);

/** A relay event. */
export interface Event {
  readonly type: string;
  readonly [name: string]: unknown;
}
/** The events that a relay printed. */
export const eventsOf = ({ stdout }: Ended): Event[] => stdout.trimEnd().split("\n").map((line) => JSON.parse(line));

/** What `effects list --json` prints of one. */
export interface Listed {
  readonly scope: string | null;
  readonly key: string;
  readonly state: string;
  readonly attempts: number | null;
  readonly since: string;
  readonly error: string | null;
}
/** Runs `effects list`. */
export async function listOf(from: Box, ...more: string[]): Promise<Listed[]> {
  return await from.json(["effects", "list", "--store", DB, ...more]) as Listed[];
}

/** Retries without a wait. */
export const QUICK: readonly string[] = ["--min-retry-ms", "1", "--max-retry-ms", "5"];

/** Asserts that each message is in exactly one place: delivered, waiting its turn, or set aside where a person sees it. */
export function assertNothingLost(at: Box, messages: number): void {
  const count = (table: string, state: string) =>
    Number(at.sql(`select count(*) as n from ${table} where state in (${state})`)[0]!.n);
  const pending = count("effectonce_outbox", "'pending', 'waiting', 'blocked'");
  const parked = count("effectonce_outbox", "'parked'");
  const done = count("effectonce_effects", "'done'");
  assertEquals(done + pending + parked, messages, `${done} done, ${pending} pending, ${parked} parked`);
  assertEquals(count("effectonce_effects", "'uncertain', 'rejected'"), parked, "what is parked has its effect");
  assertEquals(count("effectonce_effects", "'claimed'"), 0, "something is still claimed");
}

/** Whether a program is installed; says so if not. */
export async function has(command: string): Promise<boolean> {
  try {
    await new Deno.Command(command, { args: ["--version"], stdout: "null", stderr: "null" }).output();
    return true;
  } catch {
    console.log(`skipped, since ${command} is not installed`);
    return false;
  }
}
