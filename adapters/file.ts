/**
 * A file of JSON lines as a sink that commits its position together with the records, and standard output as one that cannot.
 *
 * For Deno only: it needs `Deno.FsFile.tryLock`. A relay holds a lock on the file, so a second one is refused. Each message is
 * one line, {@linkcode formatLine}; after each batch comes a position line, `{"effectonce":{"n":…,"uid":…,"prev":…,"rows":…,
 * "bytes":…,"sha256":…,"source":…,"relay":…}}`, and the file begins with one for batch 0. Readers skip them.
 *
 * ```ts
 * import { relay } from "@effectonce/effectonce";
 * import { memoryOutbox, memoryStore } from "@effectonce/effectonce/memory";
 * import { fileSink, parseLine } from "@effectonce/effectonce/file";
 * import { deepEqual } from "node:assert/strict";
 *
 * const store = memoryStore();
 * await store.enqueue({ topic: "orders", key: "order-1", value: { amount: 5 } }, { topic: "notes", value: "hello" });
 * const path = `${await Deno.makeTempDir()}/events.jsonl`;
 * await relay({ from: memoryOutbox(store), to: fileSink(path), drain: true });
 *
 * const lines = (await Deno.readTextFile(path)).split("\n");
 * const messages = lines.map(parseLine).filter((message) => message !== null);
 * deepEqual(messages.map(({ value }) => value), [{ amount: 5 }, "hello"]);
 * ```
 *
 * @module
 */
import { createHash } from "node:crypto";
import {
  type AtomicSession,
  type AtomicSink,
  type CallSink,
  EffectError,
  type Json,
  type Message,
  type NewMessage,
  type Position,
  type PositionOwner,
  refusedMessage,
  rejected,
  START,
} from "../mod.ts";
import { chainText, checkAdvance } from "./shared.ts";

const encoder = new TextEncoder();
const utf8 = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
/** One character per byte, whatever the bytes: for searching. https://encoding.spec.whatwg.org/#names-and-labels */
const bytewise = new TextDecoder("latin1");

// ------------------------------------------------------------------------------------------------------------------ lines

/**
 * The line of a message, without a line break: `{"id","topic","key","value"|"valueBase64","headers","time"}`.
 *
 * `value` is null for a tombstone, JSON where the headers say `application/json` and the bytes are the compact text of it,
 * else the UTF-8 text as a string; bytes that are not UTF-8 are `valueBase64`. {@linkcode parseLine} is the exact inverse.
 *
 * @throws {RangeError} If the line would be longer than a string can be (about 512 MiB), or the time is not valid.
 */
export function formatLine(message: Message): string {
  const { id, topic, key, value, headers, time } = message;
  const start = JSON.stringify({ id, topic, key }).slice(0, -1);
  return `${start},${formatValue(value, headers)},${JSON.stringify({ headers, time: time.toISOString() }).slice(1)}`;
}

function formatValue(value: Uint8Array | null, headers: Message["headers"]): string {
  if (value === null) return `"value":null`;
  let text: string;
  try {
    text = utf8.decode(value);
  } catch {
    return `"valueBase64":"${value.toBase64()}"`;
  }
  return `"value":${isCompactJson(text, headers) ? text : JSON.stringify(text)}`;
}

/** Whether the text comes back byte for byte, under the same headers, if it is read as JSON and enqueued as such. */
function isCompactJson(text: string, headers: Message["headers"]): boolean {
  const types = Object.entries(headers).filter(([name]) => name.toLowerCase() === "content-type");
  if (!types.some(([, type]) => /^\s*application\/json\s*(;|$)/i.test(type))) return false;
  try {
    const value: Json = JSON.parse(text);
    // A string would come back without its quotation marks, and null as a tombstone.
    return value !== null && typeof value !== "string" && JSON.stringify(value) === text;
  } catch {
    return false;
  }
}

/** As JSON.parse, but numbers that JavaScript would round keep their digits. */
function parseJson(text: string): unknown {
  try {
    return JSON.parse(text, exactNumber);
  } catch (error) {
    if (error instanceof RangeError) return JSON.parse(text); // Nested too deeply to be visited member by member.
    throw error;
  }
}

/** https://tc39.es/proposal-json-parse-with-source */
function exactNumber(_: string, value: unknown, context?: { readonly source?: string }): unknown {
  if (typeof value !== "number" || context?.source === undefined) return value;
  const { source } = context;
  const exact = Number.isFinite(value) && (source === String(value) || source.replaceAll(/\D/g, "").length <= 15);
  return exact ? value : (JSON as unknown as { rawJSON(text: string): unknown }).rawJSON(source);
}

const MEMBERS: ReadonlySet<string> = new Set(["id", "topic", "key", "value", "valueBase64", "headers", "time"]);

/**
 * The message of a line `{id?,topic,key?,value|valueBase64,headers?,time?}`; null for a position line or a blank one.
 *
 * `value` is as in {@linkcode NewMessage}: a string is its UTF-8 text, null a tombstone, other JSON its compact text. `time` is
 * not used: an outbox says itself when a message was enqueued.
 *
 * @throws {SyntaxError} If the line is not JSON, or `valueBase64` not base64 (RFC 4648, section 4).
 * @throws {TypeError} If a member is missing, unknown or of the wrong type.
 */
export function parseLine(line: string): NewMessage | null {
  if (line.trim() === "") return null;
  let json: unknown;
  try {
    json = parseJson(line);
  } catch (cause) {
    // The parser's own message quotes the line: it may hold what no log should.
    throw new SyntaxError("Cannot read the line: it is not JSON", { cause });
  }
  if (!isObject(json)) throw new TypeError("Cannot read the line: it is not a JSON object");
  if (isObject(json.effectonce) && Object.keys(json).length === 1) return null;
  const unknown = Object.keys(json).find((name) => !MEMBERS.has(name));
  if (unknown !== undefined) {
    throw new TypeError(`Cannot read the line: it has a member ${JSON.stringify(unknown)}, which means nothing here`);
  }
  const { id, topic, key, headers, time } = json;
  checkMember("topic", isText(topic), "a text");
  checkMember("id", id === undefined || isText(id), "a text");
  checkMember("key", key === undefined || key === null || isText(key), "a text or null");
  checkMember("time", time === undefined || isText(time), "a text");
  checkMember(
    "headers",
    headers === undefined || isObject(headers) && Object.values(headers).every(isText),
    "names and texts",
  );
  return { id, topic, key, value: parseValue(json), headers } as NewMessage;
}

function parseValue(json: Readonly<Record<string, unknown>>): NewMessage["value"] {
  const { value, valueBase64 } = json;
  if (value !== undefined && valueBase64 !== undefined) {
    throw new TypeError("Cannot read the line: it has both value and valueBase64");
  }
  if (value !== undefined) return value as Json;
  if (valueBase64 === undefined) throw new TypeError("Cannot read the line: it has neither value nor valueBase64");
  checkMember("valueBase64", isText(valueBase64), "a text");
  try {
    return Uint8Array.fromBase64(valueBase64 as string, { lastChunkHandling: "strict" });
  } catch (cause) {
    throw new SyntaxError("Cannot read the line: its valueBase64 is not base64", { cause });
  }
}

function checkMember(name: string, right: boolean, what: string): void {
  if (!right) throw new TypeError(`Cannot read the line: its ${name} must be ${what}`);
}

const isText = (value: unknown): value is string => typeof value === "string";

function isObject(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

// --------------------------------------------------------------------------------------------------------- position lines

/** How many positions are handed back: as many as a relay keeps. */
const RING = 1000;
/** A message line begins with `{"id":`, and JSON has no raw line break: a line that begins so is a position line. */
const MARK = '{"effectonce":';

interface Entry extends Position, PositionOwner {
  /** Length of the batch's message lines, which end where the position line begins. */
  readonly bytes: number;
  /** Their SHA-256, in hex. */
  readonly sha256: string;
}

function sha256(bytes: Uint8Array): string {
  return createHash("sha256").update(bytes).digest("hex");
}

function uidOf({ n, prev, rows }: Position): string {
  return n === 0 ? "" : sha256(encoder.encode(chainText(prev, rows)));
}

function formatEntry({ n, uid, prev, rows }: Position, lines: Uint8Array, { source, relay }: PositionOwner): Uint8Array {
  const entry: Entry = { n, uid, prev, rows, bytes: lines.length, sha256: sha256(lines), source, relay };
  return encoder.encode(`${JSON.stringify({ effectonce: entry })}\n`);
}

/** The entry of a position line; null if it is torn or damaged. */
function parseEntry(line: Uint8Array): Entry | null {
  try {
    const entry: unknown = JSON.parse(utf8.decode(line)).effectonce;
    return isEntry(entry) && entry.uid === uidOf(entry) ? entry : null;
  } catch {
    return null;
  }
}

function isEntry(entry: unknown): entry is Entry {
  if (!isObject(entry)) return false;
  const { n, uid, prev, rows, bytes, sha256, source, relay } = entry;
  return [n, bytes].every((count) => Number.isSafeInteger(count) && Number(count) >= 0) &&
    [uid, prev, sha256, source, relay].every(isText) &&
    Array.isArray(rows) && rows.every((row) => Array.isArray(row) && row.length === 2 && row.every(isText));
}

const CHUNK = 262_144;
const STEP = 8_192;

/** Reads a file backwards: what is wanted next lies just before, so a chunk is kept. */
function backwards(file: Deno.FsFile) {
  let at = 0;
  let chunk = new Uint8Array(0);
  async function read(from: number, to: number): Promise<Uint8Array> {
    if (from < at || to > at + chunk.length) {
      at = Math.max(0, Math.min(from, to - CHUNK));
      chunk = new Uint8Array(to - at);
      await file.seek(at, Deno.SeekMode.Start);
      for (let have = 0; have < chunk.length;) {
        const count = await file.read(chunk.subarray(have));
        if (count === null) throw new Error(`The file ended at byte ${at + have} while it was read`);
        have += count;
      }
    }
    return chunk.subarray(from - at, to - at);
  }
  return {
    read,
    /** Where the last line before `end` begins that has the mark of a position line; -1 if there is none. */
    async lastMark(end: number): Promise<number> {
      for (let to = end; to > 0;) {
        const from = Math.max(0, to - STEP);
        const text = bytewise.decode(await read(from, to));
        const found = text.lastIndexOf(`\n${MARK}`);
        if (found >= 0) return from + found + 1;
        if (from === 0) return text.startsWith(MARK) ? 0 : -1;
        to = from + MARK.length; // The mark may lie across the border.
      }
      return -1;
    },
    /** The line that begins at `from`, without its line break; null if it has none before `end`. */
    async lineAt(from: number, end: number): Promise<Uint8Array | null> {
      for (let size = STEP;; size *= 2) {
        const to = Math.min(from + size, end);
        const bytes = await read(from, to);
        const found = bytes.indexOf(10);
        if (found >= 0) return bytes.subarray(0, found);
        if (to === end) return null;
      }
    },
    /** Whether a batch's lines are what its position line, which begins at `end`, says. */
    async verify({ bytes, sha256 }: Entry, end: number): Promise<boolean> {
      if (bytes > end) return false;
      const hash = createHash("sha256");
      for (let from = end - bytes; from < end; from += CHUNK) hash.update(await read(from, Math.min(from + CHUNK, end)));
      return hash.digest("hex") === sha256;
    },
  };
}

/** What a file holds. */
interface Content {
  /** The positions committed last, oldest first. */
  readonly ring: readonly Position[];
  /** Where the last good batch ends; 0 in an empty file. */
  readonly end: number;
  /** Whether what follows was once a whole batch, and may have been committed; else it is a torn write. */
  readonly spoilt: boolean;
}

/** Finds the last good batch and the positions before it; changes nothing. Of a large file it reads only the end. */
async function inspect(file: Deno.FsFile, size: number, owner: PositionOwner, name: string): Promise<Content> {
  const { read, lastMark, lineAt, verify } = backwards(file);
  const damaged = (at: number, why: string): EffectError =>
    unusable(name, `it is damaged at byte ${at}: ${why}. It was left as it is: repair it, or put a copy back`);
  function checkOwner({ relay, source }: Entry): void {
    if (relay === owner.relay && source === owner.source) return;
    throw unusable(
      name,
      `it belongs to relay "${relay}" from source "${source}", not to relay "${owner.relay}" from source "${owner.source}"`,
    );
  }

  async function walk(last: Entry, lastAt: number): Promise<Position[]> {
    const ring: Position[] = [];
    if (last.n === 0 && lastAt > 0) throw damaged(lastAt, "a second file begins here");
    for (let entry = last, entryAt = lastAt; entry.n > 0 && ring.length < RING;) {
      const { n, uid, prev, rows, bytes } = entry;
      ring.unshift({ n, uid, prev, rows });
      const end = entryAt - bytes;
      const at = await lastMark(end);
      const line = at < 0 ? null : await lineAt(at, end);
      const before = line && parseEntry(line);
      if (before) checkOwner(before);
      const follows = before?.n === n - 1 && before.uid === prev && at + line!.length + 1 === end;
      if (!follows || (before.n === 0) !== (at === 0)) {
        throw damaged(entryAt, `the position line of batch ${n} does not follow on that of batch ${n - 1}`);
      }
      entry = before;
      entryAt = at;
    }
    return ring;
  }

  // Our files begin with a position line: without one this is somebody's own file, in which nothing may be cut off.
  const header = formatHeader(owner);
  const head = await read(0, Math.min(size, header.length));
  if (size < header.length && head.every((byte, at) => byte === header[at])) return { ring: [], end: 0, spoilt: false };
  const first = bytewise.decode(head).startsWith(MARK) ? await lineAt(0, size) : null;
  const start = first && parseEntry(first);
  if (start) checkOwner(start);
  if (start?.n !== 0 || !await verify(start, 0)) {
    throw unusable(
      name,
      "it does not begin with a position line of this sink, so it is another kind of file. It was left as it is",
    );
  }

  let spoilt = 0;
  for (let limit = size;;) {
    const at = await lastMark(limit);
    const line = await lineAt(at, limit);
    const last = line && parseEntry(line);
    if (last) checkOwner(last);
    if (line && last && await verify(last, at)) {
      return { ring: await walk(last, at), end: at + line.length + 1, spoilt: spoilt > 0 };
    }
    // A batch is written only when the one before is on the disk: no crash spoils two.
    if (line && ++spoilt > 1) throw damaged(at, "the last two batches are not what their position lines say");
    limit = at;
  }
}

function formatHeader(owner: PositionOwner): Uint8Array {
  return formatEntry(START, new Uint8Array(0), owner);
}

// ------------------------------------------------------------------------------------------------------------------- file

function unusable(name: string, why: string, cause?: unknown): EffectError {
  return new EffectError("sink_invalid", `Cannot use ${name}: ${why}`, { cause });
}

function needDeno(what: string, why: string): void {
  if (typeof Deno === "undefined") throw new TypeError(`Cannot use ${what} here: it is for Deno, ${why}`);
}

async function writeAll(to: { write(bytes: Uint8Array): Promise<number> }, bytes: Uint8Array): Promise<void> {
  for (let done = 0; done < bytes.length;) done += await to.write(bytes.subarray(done));
}

/** What the path names now; null if nothing. */
async function statOf(path: string): Promise<Deno.FileInfo | null> {
  try {
    return await Deno.stat(path);
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) return null;
    throw error;
  }
}

/**
 * Closes a file and ends its lock. Closing alone would leave the lock with a child process that was forked meanwhile, until it
 * executes its program. https://man7.org/linux/man-pages/man2/flock.2.html
 */
async function release(file: Deno.FsFile): Promise<void> {
  await file.unlock().catch(() => {});
  file.close();
}

/** Errors that no waiting heals; by name, since elsewhere too the module is imported, and says what it needs. */
const HOPELESS: readonly string[] = ["NotFound", "PermissionDenied", "NotCapable", "IsADirectory", "NotADirectory"];

/** Opens the file under an exclusive lock, or says who is ahead; `created`: it was missing. */
async function acquire(path: string, name: string) {
  for (let attempt = 1;; attempt++) {
    let created = false;
    let file: Deno.FsFile;
    try {
      created = await statOf(path) === null;
      file = await Deno.open(path, { read: true, write: true, create: created });
    } catch (error) {
      if (created === false && error instanceof Deno.errors.NotFound && attempt < 10) continue; // Removed just now.
      if (error instanceof Error && HOPELESS.includes(error.name)) throw unusable(name, error.message, error);
      throw error;
    }
    try {
      const stat = await file.stat();
      if (!stat.isFile) throw unusable(name, "it is not a regular file");
      // Two opens in one process conflict as well: https://man7.org/linux/man-pages/man2/flock.2.html
      const locked = await file.tryLock(true);
      const now = locked ? await statOf(path) : null;
      if (now && now.ino === stat.ino && now.dev === stat.dev) return { file, created, stat: now };
      if (!locked || attempt === 10) {
        throw new EffectError("fenced", `Cannot open ${name}: another relay has it`);
      }
      // Its last owner removed it between our open and our lock: that lock keeps nobody out.
    } catch (error) {
      await release(file);
      throw error;
    }
    await release(file);
  }
}

/** Makes a new file's name durable. https://man7.org/linux/man-pages/man2/fsync.2.html */
async function syncDirectory(path: string): Promise<void> {
  if (Deno.build.os === "windows") return; // A directory cannot be opened there.
  const directory = (await Deno.realPath(path)).replace(/[^/]*$/, "");
  let handle: Deno.FsFile;
  try {
    handle = await Deno.open(directory);
  } catch (error) {
    // It may be for writing only, or outside of --allow-read: then this is as good as it gets.
    if (error instanceof Deno.errors.PermissionDenied || error instanceof Deno.errors.NotCapable) return;
    throw error;
  }
  try {
    await handle.sync();
  } finally {
    handle.close();
  }
}

/**
 * A JSONL file as an atomic sink: exactly-once. A missing file is created by the first batch.
 *
 * Opening verifies the last batch and cuts off a torn write after it. What was a whole batch and is damaged stays until the
 * relay commits that batch anew, so a batch that exists nowhere else is not destroyed. A file that does not begin with a
 * position line, that belongs to another relay or source, or whose last 1000 positions do not fit together is refused with
 * `sink_invalid` and left as it is; a file that another relay has open, with `fenced`. Only the last batch's lines are
 * verified: the rest of the file is not read.
 *
 * While a relay runs the file must not be moved, replaced or written by others: the next commit is refused with
 * `sink_invalid`. To begin a new file, drain the relay and go on under a new relay name.
 *
 * @throws {TypeError} Outside of Deno.
 */
export function fileSink(path: string): AtomicSink {
  needDeno("fileSink", "since it locks its file");
  const name = `file:${path}`;
  return {
    kind: "atomic",
    name,
    async open(owner) {
      const acquired = await acquire(path, name);
      try {
        return await openSession(path, name, owner, acquired);
      } catch (error) {
        await release(acquired.file);
        throw error;
      }
    },
  };
}

async function openSession(
  path: string,
  name: string,
  owner: PositionOwner,
  { file, created, stat }: Awaited<ReturnType<typeof acquire>>,
): Promise<AtomicSession> {
  let { size } = stat;
  const content = await inspect(file, size, owner, name);
  const { ring } = content;
  let { end } = content;
  let last = ring.at(-1);
  let state: "open" | "broken" | "closed" = "open";
  let untouched = created;

  async function cut(): Promise<void> {
    if (size > end) await file.truncate(end);
    size = end;
    // Even if there was nothing to cut: the last batch may be one that a killed relay had written, but not synced.
    await file.sync();
  }
  async function append(bytes: Uint8Array): Promise<void> {
    try {
      await file.seek(end, Deno.SeekMode.Start);
      await writeAll(file, bytes);
      await file.sync();
    } catch (error) {
      // After a failed fsync the page cache still shows the bytes: they would verify without being on the disk.
      // https://wiki.postgresql.org/wiki/Fsync_Errors
      await file.truncate(end).catch(() => {});
      throw error;
    }
    size = end += bytes.length;
  }
  const isOurs = (now: Deno.FileInfo | null): now is Deno.FileInfo => now?.ino === stat.ino && now.dev === stat.dev;

  if (!content.spoilt) await cut();
  return {
    ring,
    async commit(batch) {
      if (state !== "open") {
        throw new EffectError("fenced", `Cannot commit batch ${batch.n}: this session of ${name} is ${state}, open another`);
      }
      checkAdvance(last, batch);
      if (batch.uid !== uidOf(batch)) {
        throw new EffectError("source_invalid", `Cannot commit batch ${batch.n}: its uid is not that of its rows`);
      }
      const lines = join(batch.messages.map((message) => {
        try {
          return encodeLine(message);
        } catch (error) {
          throw refusedMessage(message, error);
        }
      }));
      const position = formatEntry(batch, lines, owner);
      const now = await statOf(path);
      if (!isOurs(now)) throw unusable(name, "it was removed, moved or replaced while the relay ran. Put it back");
      if (now.size !== size) throw unusable(name, `it has ${now.size} bytes, not ${size}: somebody else wrote into it`);

      state = "broken";
      untouched = false;
      try {
        if (size > end) await cut();
        if (end === 0) {
          // In this order: a file with a header has a durable name, and one with a batch a durable header.
          await syncDirectory(path);
          await append(formatHeader(owner));
        }
        await append(join([lines, position]));
      } catch (error) {
        // Such as a full disk: it may pass.
        throw new Error(`Cannot write ${name}: ${(error as Error).message}`, { cause: error });
      }
      const { n, uid, prev, rows } = batch;
      last = { n, uid, prev, rows };
      state = "open";
    },
    async close() {
      if (state === "closed") return;
      state = "closed";
      try {
        const now = untouched ? await statOf(path) : null;
        if (isOurs(now) && now.size === 0) await Deno.remove(await Deno.realPath(path));
      } catch {
        // An empty file stays behind: it does no harm.
      }
      await release(file);
    },
  };
}

function encodeLine(message: Message): Uint8Array {
  try {
    return encoder.encode(`${formatLine(message)}\n`);
  } catch (error) {
    throw rejected(`it cannot be written as a line: ${(error as Error).message}`);
  }
}

function join(parts: readonly Uint8Array[]): Uint8Array {
  const whole = new Uint8Array(parts.reduce((size, part) => size + part.length, 0));
  let at = 0;
  for (const part of parts) {
    whole.set(part, at);
    at += part.length;
  }
  return whole;
}

// ----------------------------------------------------------------------------------------------------------------- stdout

function toStdout(): (bytes: Uint8Array) => Promise<void> {
  needDeno("stdoutSink", "elsewhere give it a function that writes");
  return (bytes) => writeAll(Deno.stdout, bytes);
}

/**
 * Standard output as a sink: one {@linkcode formatLine} a message, at-least-once.
 *
 * @param write Writes all bytes, or rejects; never called again before it has settled. By default to `Deno.stdout`.
 * @throws {TypeError} Outside of Deno, if there is no `write`.
 */
export function stdoutSink(write: (bytes: Uint8Array) => Promise<void> = toStdout()): CallSink {
  let last: Promise<void> = Promise.resolve();
  return {
    kind: "call",
    name: "stdout",
    repeat: "always",
    async deliver(message) {
      const bytes = encodeLine(message);
      // One after the other: a line that is written in parts must not have another one in its middle.
      const mine = last.then(() => write(bytes));
      last = mine.catch(() => {});
      await mine;
      return null;
    },
  };
}
