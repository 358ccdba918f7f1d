/** The JSONL file and standard output as sinks: against real files, real locks and a real child process. */
import { assert, assertEquals, assertMatch, assertRejects, assertStringIncludes, assertThrows } from "@std/assert";
import {
  type AtomicSession,
  type AtomicSink,
  type Batch,
  createMessage,
  EffectError,
  encodeMessage,
  type Json,
  type Message,
  type NewMessage,
  type PositionOwner,
  relay,
  type RelayEvent,
  START,
} from "../mod.ts";
import { memoryOutbox, type MemoryStore, memoryStore } from "../adapters/memory.ts";
import { chainText } from "../adapters/shared.ts";
import { fileSink, formatLine, parseLine, stdoutSink } from "../adapters/file.ts";

const OWNER: PositionOwner = { relay: "orders", source: "outbox-1" };
const encoder = new TextEncoder();
const decoder = new TextDecoder();

async function inTemp(run: (path: string) => Promise<void>): Promise<void> {
  const folder = await Deno.makeTempDir({ prefix: "effectonce-file-" });
  try {
    await run(`${folder}/out.jsonl`);
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
}

async function sha256(bytes: Uint8Array): Promise<string> {
  return new Uint8Array(await crypto.subtle.digest("SHA-256", new Uint8Array(bytes))).toHex();
}

function messageOf(message: NewMessage): Message {
  return createMessage({ ...encodeMessage(message), time: new Date("2026-01-02T03:04:05.678Z") });
}

/** The batches 1 to `count`, of `size` messages each; batch n has the ids n-1, n-2 … */
async function batchesOf(count: number, size = 2): Promise<Batch[]> {
  const batches: Batch[] = [];
  for (let n = 1, prev = START.uid; n <= count; n++) {
    const messages = Array.from({ length: size }, (_, i) => messageOf({ id: `${n}-${i + 1}`, topic: "t", value: { n, i } }));
    const rows = messages.map(({ id }, i) => [String((n - 1) * size + i + 1), id] as const);
    const uid = await sha256(encoder.encode(chainText(prev, rows)));
    batches.push({ n, uid, prev, rows, messages });
    prev = uid;
  }
  return batches;
}

async function withSession<T>(path: string, run: (session: AtomicSession) => T | Promise<T>, owner = OWNER): Promise<T> {
  const session = await fileSink(path).open(owner);
  try {
    return await run(session);
  } finally {
    await session.close();
  }
}

async function commitAll(path: string, batches: readonly Batch[]): Promise<void> {
  await withSession(path, async (session) => {
    for (const batch of batches) await session.commit(batch);
  });
}

const ringOf = (path: string, owner = OWNER) => withSession(path, ({ ring }) => ring, owner);
const positions = (batches: readonly Batch[]) => batches.map(({ n, uid, prev, rows }) => ({ n, uid, prev, rows }));

async function exists(path: string): Promise<boolean> {
  return await Deno.stat(path).then(() => true, () => false);
}

async function linesOf(path: string): Promise<string[]> {
  return (await Deno.readTextFile(path)).split("\n").slice(0, -1);
}

async function messagesIn(path: string): Promise<NewMessage[]> {
  return (await linesOf(path)).map(parseLine).filter((message) => message !== null);
}

function drain(store: MemoryStore, to: AtomicSink, options: { batch?: number; observe?(event: RelayEvent): void } = {}) {
  return relay({ name: "orders", from: memoryOutbox(store), to, drain: true, minRetryMs: 0, maxRetryMs: 0, ...options });
}

async function refused(run: () => PromiseLike<unknown>, code: EffectError["code"], part: string): Promise<void> {
  const error = await assertRejects(run, EffectError, part);
  assertEquals(error.code, code, error.message);
}

/** A fixed sequence of numbers from 0 up to 1 (mulberry32). */
function seeded(seed: number): () => number {
  return () => {
    seed = seed + 0x6d2b79f5 | 0;
    let t = Math.imul(seed ^ seed >>> 15, 1 | seed);
    t = t + Math.imul(t ^ t >>> 7, 61 | t) ^ t;
    return ((t ^ t >>> 14) >>> 0) / 2 ** 32;
  };
}

// ------------------------------------------------------------------------------------------------------------------ relay

Deno.test("fileSink takes what a relay delivers, a line each, and after each batch its position", () =>
  inTemp(async (path) => {
    const store = memoryStore({ now: () => Date.UTC(2026, 0, 2) });
    await store.enqueue(
      { id: "a", topic: "orders", key: "k", value: { amount: 5 }, headers: { trace: "1" } },
      { id: "b", topic: "orders", value: "five" },
      { id: "c", topic: "orders", value: null },
    );
    assertEquals(await drain(store, fileSink(path), { batch: 2 }), { delivered: 3, parked: 0, uncertain: 0 });
    const [header, a, b, first, c, second, ...rest] = await linesOf(path);
    assertEquals(rest, []);
    const time = "2026-01-02T00:00:00.000Z";
    const headers = `{"trace":"1","content-type":"application/json"}`;
    assertEquals(a, `{"id":"a","topic":"orders","key":"k","value":{"amount":5},"headers":${headers},"time":"${time}"}`);
    assertEquals(b, `{"id":"b","topic":"orders","key":null,"value":"five","headers":{},"time":"${time}"}`);
    assertEquals(c, `{"id":"c","topic":"orders","key":null,"value":null,"headers":{},"time":"${time}"}`);
    const owner = { source: "memory", relay: "orders" };
    const entry = async (n: number, prev: string, rows: [string, string][], lines: string) => ({
      effectonce: {
        n,
        uid: n === 0 ? "" : await sha256(encoder.encode(chainText(prev, rows))),
        prev,
        rows,
        bytes: encoder.encode(lines).length,
        sha256: await sha256(encoder.encode(lines)),
        ...owner,
      },
    });
    assertEquals(header, JSON.stringify(await entry(0, "", [], "")));
    const one = await entry(1, "", [["1", "a"], ["2", "b"]], `${a}\n${b}\n`);
    assertEquals(first, JSON.stringify(one));
    assertEquals(second, JSON.stringify(await entry(2, one.effectonce.uid, [["3", "c"]], `${c}\n`)));
    assertEquals(fileSink(path).name, `file:${path}`);
  }));

Deno.test("fileSink goes on after reopening", () =>
  inTemp(async (path) => {
    const store = memoryStore();
    for (const id of ["a", "b", "c"]) {
      await store.enqueue({ id, topic: "t", value: id });
      await drain(store, fileSink(path));
    }
    assertEquals((await messagesIn(path)).map(({ id }) => id), ["a", "b", "c"]);
    assertEquals((await ringOf(path, { relay: "orders", source: "memory" })).map(({ n }) => n), [1, 2, 3]);
  }));

Deno.test("fileSink writes only the position of a batch whose rows were all deleted", () =>
  inTemp(async (path) => {
    const [one, two] = await batchesOf(2);
    await commitAll(path, [{ ...one!, messages: [] }, { ...two!, messages: two!.messages.slice(1) }]);
    assertEquals((await messagesIn(path)).map(({ id }) => id), ["2-2"]);
    assertEquals(await ringOf(path), positions([one!, two!]));
  }));

Deno.test("fileSink has each message once and in order, however its relay and its commits fail", () =>
  inTemp(async (path) => {
    const random = seeded(7);
    const store = memoryStore();
    const ids = Array.from({ length: 120 }, (_, i) => `m${i}`);
    await store.enqueue(...ids.map((id) => ({ id, topic: "t", key: "k", value: id })));
    const failed: string[] = [];
    const flaky: AtomicSink = {
      ...fileSink(path),
      async open(owner) {
        const session = await fileSink(path).open(owner);
        return {
          ...session,
          async commit(batch) {
            const how = Math.floor(random() * 5);
            if (how === 0) throw new Error("nothing was written");
            const { size } = await Deno.stat(path);
            await session.commit(batch);
            if (how === 1) throw new Error("the answer was lost");
            if (how === 2 && size > 0) {
              // As a crash leaves it: a part of the batch, of any length.
              const whole = (await Deno.stat(path)).size;
              await Deno.truncate(path, size + Math.floor(random() * (whole - size)));
              throw new Error("the write was torn");
            }
            if (how === 3 && size > 0) {
              // As a power failure may leave it: the position line is there, a part of what is before it is not.
              const file = await Deno.open(path, { write: true });
              await file.seek(size + 10, Deno.SeekMode.Start);
              await file.write(new Uint8Array(20));
              file.close();
              throw new Error("the write was spoilt");
            }
          },
        };
      },
    };
    const observe = (event: RelayEvent) => void (event.type === "failed" && failed.push(event.reason));
    await relay({
      name: "orders",
      from: memoryOutbox(store),
      to: flaky,
      drain: true,
      batch: 3,
      attempts: 1000,
      minRetryMs: 0,
      maxRetryMs: 0,
      observe,
    });
    assertEquals((await messagesIn(path)).map(({ id }) => id), ids);
    assertEquals([...new Set(failed)].length, 4, "Every kind of failure happened");
  }));

Deno.test("fileSink that is missing though its relay has run is cursor_lost, and leaves no file behind", () =>
  inTemp(async (path) => {
    const store = memoryStore();
    await store.enqueue({ topic: "t", value: 1 });
    await drain(store, fileSink(path));
    await Deno.remove(path);
    await store.enqueue({ topic: "t", value: 2 });
    await refused(() => drain(store, fileSink(path)), "cursor_lost", `file:${path} ends at batch 0`);
    assertEquals(await exists(path), false);
    assertEquals(store.outbox().length, 1);
  }));

Deno.test("fileSink leaves no file behind where nothing was committed, but an empty one of the user's", () =>
  inTemp(async (path) => {
    assertEquals(await ringOf(path), []);
    assertEquals(await exists(path), false);
    await withSession(path, () => Deno.writeTextFile(path, "somebody else's"));
    assertEquals(await Deno.readTextFile(path), "somebody else's");
    await Deno.remove(path);
    await withSession(path, async () => {
      await Deno.remove(path);
      await Deno.writeTextFile(path, "");
    });
    assertEquals(await ringOf(path), []);
    assertEquals(await Deno.readTextFile(path), "");
    const batches = await batchesOf(1);
    await commitAll(path, batches);
    assertEquals(await ringOf(path), positions(batches));
  }));

Deno.test("fileSink refuses a batch that does not come next, or is not what its uid says, and writes nothing", () =>
  inTemp(async (path) => {
    const [one, two, three] = await batchesOf(3);
    await withSession(path, async (session) => {
      await refused(() => session.commit(two!), "fenced", "Cannot commit batch 2");
      await session.commit(one!);
      const before = await Deno.readFile(path);
      await refused(() => session.commit(one!), "fenced", "Cannot commit batch 1");
      await refused(() => session.commit(three!), "fenced", "Cannot commit batch 3");
      await refused(() => session.commit({ ...two!, prev: "other" }), "fenced", "Cannot commit batch 2");
      await refused(() => session.commit({ ...two!, rows: [] }), "source_invalid", "its uid is not that of its rows");
      assertEquals(await Deno.readFile(path), before);
      await session.commit(two!);
    });
    assertEquals(await ringOf(path), positions([one!, two!]));
  }));

Deno.test("fileSink commits nothing of a batch with a message that cannot be a line, and says which one", () =>
  inTemp(async (path) => {
    const [one] = await batchesOf(1);
    const bad = createMessage({ ...one!.messages[1]!, time: new Date(NaN) });
    await withSession(path, async (session) => {
      const error = await assertRejects(
        () => session.commit({ ...one!, messages: [one!.messages[0]!, bad] }),
        Error,
        "a line",
      );
      assert(Object.getOwnPropertySymbols(error).some((symbol) => Reflect.get(error, symbol) === bad));
      assertEquals(await Deno.readTextFile(path), "");
      await session.commit(one!);
    });
  }));

// ------------------------------------------------------------------------------------------------------ what a crash leaves

Deno.test("fileSink cuts off a last batch that is torn at any byte", () =>
  inTemp(async (path) => {
    const batches = await batchesOf(3);
    await commitAll(path, batches.slice(0, 2));
    const good = await Deno.readFile(path);
    await commitAll(path, batches.slice(2));
    const whole = await Deno.readFile(path);
    assertEquals(whole.subarray(0, good.length), good);
    const torn = `${path}.torn`;
    for (let length = good.length; length <= whole.length; length++) {
      await Deno.writeFile(torn, whole.subarray(0, length));
      const all = length === whole.length;
      assertEquals(await ringOf(torn), positions(batches.slice(0, all ? 3 : 2)), `Torn after ${length} bytes`);
      assertEquals(await Deno.readFile(torn), all ? whole : good, `Torn after ${length} bytes`);
    }
    await commitAll(torn, []);
  }));

Deno.test("fileSink recovers from a first write that is torn at any byte, the header's included", () =>
  inTemp(async (path) => {
    const batches = await batchesOf(1);
    await commitAll(path, batches);
    const whole = await Deno.readFile(path);
    const header = whole.indexOf(10) + 1;
    for (let length = 0; length < whole.length; length++) {
      await Deno.writeFile(path, whole.subarray(0, length));
      assertEquals(await ringOf(path), [], `Torn after ${length} bytes`);
      assertEquals(await Deno.readFile(path), whole.subarray(0, length < header ? 0 : header));
      if (length % 50 > 0) continue;
      await commitAll(path, batches);
      assertEquals(await Deno.readFile(path), whole);
    }
  }));

Deno.test("fileSink cuts off garbage after the last position line, whatever it is", () =>
  inTemp(async (path) => {
    const batches = await batchesOf(2);
    await commitAll(path, batches);
    const good = await Deno.readFile(path);
    const big = encoder.encode(`${"x".repeat(99)}\n`.repeat(10_000));
    const tails = ["\n", "\0".repeat(5000), "no JSON\n", '{"effectonce":', formatLine(batches[0]!.messages[0]!) + "\n"];
    for (const tail of [...tails.map((text) => encoder.encode(text)), new Uint8Array([0xff, 0xfe]), big]) {
      await Deno.writeFile(path, tail, { append: true });
      assertEquals(await ringOf(path), positions(batches));
      assertEquals(await Deno.readFile(path), good);
    }
  }));

Deno.test("fileSink does not count a last batch with a flipped byte, and keeps it until it is committed anew", () =>
  inTemp(async (path) => {
    const batches = await batchesOf(3);
    await commitAll(path, batches.slice(0, 2));
    const good = (await Deno.readFile(path)).length;
    await commitAll(path, batches.slice(2));
    const whole = await Deno.readFile(path);
    for (let at = good; at < whole.length; at += 7) {
      const flipped = whole.slice();
      flipped[at]! ^= 1;
      await Deno.writeFile(path, flipped);
      const ring = await ringOf(path).catch((error: unknown) => error);
      if (ring instanceof EffectError) {
        // The owner's name in the position line: then it looks like somebody else's.
        assertEquals(ring.code, "sink_invalid");
        assertStringIncludes(ring.message, "it belongs to");
        assertEquals(await Deno.readFile(path), flipped);
        continue;
      }
      assertEquals(ring, positions(batches.slice(0, 2)), `Byte ${at}`);
      const left = await Deno.readFile(path);
      // A position line that is not recognisable as one makes it a torn write.
      if (left.length > good) assertEquals(left, flipped);
      await commitAll(path, batches.slice(2));
      assertEquals(await Deno.readFile(path), whole);
    }
  }));

Deno.test("fileSink leaves nothing of a damaged last batch behind when fewer of its rows are committed anew", () =>
  inTemp(async (path) => {
    const [one, two] = await batchesOf(2);
    const fewer = { ...two!, messages: two!.messages.slice(1) };
    await commitAll(path, [one!, fewer]);
    const expected = await Deno.readFile(path);
    await Deno.remove(path);
    await commitAll(path, [one!, two!]);
    await Deno.writeTextFile(path, (await Deno.readTextFile(path)).replace('"n":2,"i":0', '"n":2,"i":7'));
    await commitAll(path, [fewer]);
    assertEquals(await Deno.readFile(path), expected);
  }));

Deno.test("fileSink finds the last position line wherever it lies in what is read at once", () =>
  inTemp(async (path) => {
    const batches = await batchesOf(2);
    await commitAll(path, batches);
    const good = await Deno.readFile(path);
    const line = good.length - (good.lastIndexOf(10, good.length - 2) + 1);
    for (let across = -2; across <= 20; across++) {
      await Deno.writeFile(path, new Uint8Array(8192 - line + across), { append: true });
      assertEquals(await ringOf(path), positions(batches));
      assertEquals(await Deno.readFile(path), good);
    }
  }));

Deno.test("fileSink whose last batch is damaged after it was settled is cursor_lost, and left as it is", () =>
  inTemp(async (path) => {
    const store = memoryStore();
    await store.enqueue({ topic: "t", value: "first" }, { topic: "t", value: "second" });
    await drain(store, fileSink(path), { batch: 1 });
    const flipped = (await Deno.readTextFile(path)).replace("second", "sekond");
    await Deno.writeTextFile(path, flipped);
    await store.enqueue({ topic: "t", value: "third" });
    await refused(() => drain(store, fileSink(path)), "cursor_lost", "ends at batch 1, but 2 were delivered");
    assertEquals(await Deno.readTextFile(path), flipped);
  }));

Deno.test("fileSink refuses a file in which more than the last batch is damaged, and leaves it as it is", () =>
  inTemp(async (path) => {
    const batches = await batchesOf(4);
    await commitAll(path, batches);
    const text = await Deno.readTextFile(path);
    const lines = text.split("\n");
    const at = (n: number) => lines.findIndex((line) => line.startsWith(`{"effectonce":{"n":${n},`));
    const offset = (n: number) => encoder.encode(lines.slice(0, at(n)).join("\n") + "\n").length;
    const without = (line: number) => lines.toSpliced(line, 1).join("\n");
    const changed = (n: number, from: string, to: string) => {
      assertStringIncludes(lines[at(n)]!, from);
      return lines.with(at(n), lines[at(n)]!.replace(from, to)).join("\n");
    };
    // A batch 2 that is right in itself, but not the one that batch 3 follows.
    const rows = [["3", "x"], ["4", "y"]] as const;
    const uid = await sha256(encoder.encode(chainText(batches[0]!.uid, rows)));
    const other = { ...batches[1]!, rows, uid };
    await commitAll(`${path}.fork`, [batches[0]!, other]);
    const fork = await Deno.readTextFile(`${path}.fork`);
    const cases: Record<string, readonly [text: string, part: string]> = {
      "another history": [fork + lines.slice(at(2) + 1).join("\n"), "batch 3 does not follow on that of batch 2"],
      "a number is wrong": [changed(3, `"n":3`, `"n":9`), "batch 4 does not follow on that of batch 3"],
      "a line too many": [lines.toSpliced(at(2) + 1, 0, lines[1]!).join("\n"), "batch 3 does not follow on that of batch 2"],
      "the last two batches": [text.replaceAll(/"i":1/g, '"i":7'), `damaged at byte ${offset(3)}: the last two batches`],
      "a position line is missing": [without(at(2)), "does not follow on that of batch 2"],
      "a message line is missing": [without(at(2) + 1), "does not follow on that of batch 2"],
      "a length is wrong": [changed(3, `"bytes":`, `"bytes":1`), "the position line of batch 3 does not follow"],
      "a row is wrong": [changed(3, "3-1", "3-9"), `the position line of batch 4 does not follow`],
      "a uid is wrong": [changed(2, batches[1]!.uid, batches[2]!.uid), `damaged at byte ${offset(3)}`],
      "a batch is missing": [lines.toSpliced(at(1) + 1, 3).join("\n"), "the position line of batch 3 does not follow"],
      "the file is there twice": [text + text, "the position line of batch 1 does not follow on that of batch 0"],
      "another header": [text + lines[0] + "\n", "a second file begins here"],
      "the first half is missing": [lines.slice(at(2) + 1).join("\n"), "another kind of file"],
      "a damaged header": [changed(0, `"n":0`, `"n":9`), "another kind of file"],
    };
    for (const [what, [content, part]] of Object.entries(cases)) {
      await Deno.writeTextFile(path, content);
      const error = await assertRejects(() => ringOf(path), EffectError, part);
      assertEquals(error.code, "sink_invalid", what);
      assertEquals(await Deno.readTextFile(path), content, what);
    }
  }));

Deno.test("fileSink hands back the last 1000 positions of many, and reads only the end of the file", () =>
  inTemp(async (path) => {
    const batches = await batchesOf(1500, 1);
    await commitAll(path, batches);
    assertEquals(await ringOf(path), positions(batches.slice(500)));
    // Damage before them is not seen: that part is not read.
    const file = await Deno.open(path, { write: true });
    await file.seek(1000, Deno.SeekMode.Start);
    await file.write(new Uint8Array(1000));
    file.close();
    assertEquals((await ringOf(path)).length, 1000);
  }));

Deno.test("fileSink finds position lines and lines that are longer than what it reads at once", () =>
  inTemp(async (path) => {
    const batches = await batchesOf(3, 12_000);
    const long = messageOf({ id: "1-1", topic: "t", value: "é".repeat(400_000) });
    await commitAll(path, [{ ...batches[0]!, messages: [long] }, ...batches.slice(1)]);
    const size = (await Deno.stat(path)).size;
    assertEquals(await ringOf(path), positions(batches));
    await Deno.truncate(path, size - 1);
    assertEquals(await ringOf(path), positions(batches.slice(0, 2)));
  }));

Deno.test("fileSink does not resolve a commit before its fsync, and does not count a batch whose fsync failed", () =>
  inTemp(async (path) => {
    const { sync } = Deno.FsFile.prototype;
    const [one, two] = await batchesOf(2);
    const synced: number[] = [];
    let full = false;
    Deno.FsFile.prototype.sync = async function () {
      if (full) throw new Error("Input/output error");
      await sync.call(this);
      const { isFile, size } = await this.stat();
      if (isFile) synced.push(size);
    };
    try {
      await withSession(path, async (session) => {
        await session.commit(one!);
        const { size } = await Deno.stat(path);
        assertEquals(synced.at(-1), size);
        full = true;
        await assertRejects(() => session.commit(two!), Error, "Input/output error");
        full = false;
        assertEquals((await Deno.stat(path)).size, size, "The batch would verify without being on the disk");
      });
      // A killed relay may have written its last batch, but not synced it.
      synced.length = 0;
      assertEquals(await ringOf(path), positions([one!]));
      assertEquals(synced, [(await Deno.stat(path)).size]);
    } finally {
      Deno.FsFile.prototype.sync = sync;
    }
  }));

// ------------------------------------------------------------------------------------------------------------------ fences

Deno.test("fileSink never commits into a file that another session has just removed as empty", () =>
  inTemp(async (path) => {
    const batches = await batchesOf(1);
    const untilFree = async (run: (session: AtomicSession) => unknown): Promise<void> => {
      for (;;) {
        try {
          return void await withSession(path, run);
        } catch (error) {
          if (!(error instanceof EffectError && error.code === "fenced")) throw error;
        }
      }
    };
    for (let round = 0; round < 100; round++) {
      await Promise.all([
        untilFree(() => {}),
        untilFree(() => {}),
        untilFree(({ ring, commit }) => assertEquals(ring, []) ?? commit(batches[0]!)),
      ]);
      assertEquals(await ringOf(path), positions(batches));
      await Deno.remove(path);
    }
  }));

Deno.test("fileSink is fenced while another session of this process has it", () =>
  inTemp(async (path) => {
    const batches = await batchesOf(2);
    const first = await fileSink(path).open(OWNER);
    await refused(() => fileSink(path).open(OWNER), "fenced", "another relay has it");
    await first.commit(batches[0]!);
    await refused(() => fileSink(path).open(OWNER), "fenced", "another relay has it");
    await first.close();
    await first.close();
    await refused(() => first.commit(batches[1]!), "fenced", "is closed, open another");
    assertEquals(await ringOf(path), positions(batches.slice(0, 1)));
  }));

Deno.test("fileSink is fenced while another process has it, and free once that one is killed", () =>
  inTemp(async (path) => {
    const code = `
      import { fileSink } from ${JSON.stringify(import.meta.resolve("../adapters/file.ts"))};
      const session = await fileSink(Deno.args[0]).open(${JSON.stringify(OWNER)});
      await session.commit(${JSON.stringify({ ...(await batchesOf(1))[0]!, messages: [] })});
      console.log(Deno.pid);
      setInterval(() => {}, 1000);`;
    const child = new Deno.Command(Deno.execPath(), {
      args: ["eval", "--no-lock", code, path],
      cwd: new URL("..", import.meta.url),
      stdout: "piped",
    }).spawn();
    let text = "";
    for await (const part of child.stdout.pipeThrough(new TextDecoderStream())) {
      text += part;
      if (text.includes("\n")) break;
    }
    assertEquals(Number(text), child.pid, "The process to be killed is the one that has the lock");
    await refused(() => fileSink(path).open(OWNER), "fenced", "another relay has it");
    Deno.kill(child.pid, "SIGKILL");
    assertEquals((await child.status).signal, "SIGKILL");
    assertEquals((await ringOf(path)).map(({ n }) => n), [1]);
  }));

Deno.test("fileSink refuses a file that is not its own, and leaves it as it is", () =>
  inTemp(async (path) => {
    const [batch] = await batchesOf(1);
    const line = formatLine(batch!.messages[0]!);
    const long = `${"x".repeat(70_000)}\n`;
    const header = '{"effectonce":{"n":0,"uid":""';
    for (
      const content of [`${line}\n`, line, `{"id":"a","topic":"t"`, "text\n", "\n", long, `\n${header}`, `${header}x`, "\0"]
    ) {
      await Deno.writeTextFile(path, content);
      await refused(() => fileSink(path).open(OWNER), "sink_invalid", "another kind of file");
      assertEquals(await Deno.readTextFile(path), content);
    }
    // Not even position lines further down make it ours.
    await Deno.remove(path);
    await commitAll(path, [batch!]);
    const content = `${line}\n${await Deno.readTextFile(path)}`;
    await Deno.writeTextFile(path, content);
    await refused(() => fileSink(path).open(OWNER), "sink_invalid", "another kind of file");
    assertEquals(await Deno.readTextFile(path), content);
  }));

Deno.test("fileSink refuses a file of another relay or another source, names them, and leaves it as it is", () =>
  inTemp(async (path) => {
    const batches = await batchesOf(2);
    await commitAll(path, batches.slice(0, 1));
    await Deno.writeTextFile(path, "torn", { append: true });
    const content = await Deno.readTextFile(path);
    const belongs = 'it belongs to relay "orders" from source "outbox-1"';
    await refused(() => fileSink(path).open({ ...OWNER, relay: "other" }), "sink_invalid", belongs);
    await refused(() => fileSink(path).open({ ...OWNER, source: "outbox-2" }), "sink_invalid", belongs);
    assertEquals(await Deno.readTextFile(path), content);
    await commitAll(path, batches.slice(1));
    const other = `${path}.other`;
    await withSession(other, (session) => session.commit(batches[0]!), { ...OWNER, relay: "other" });
    const mixed = await Deno.readTextFile(path) + await Deno.readTextFile(other);
    await Deno.writeTextFile(path, mixed);
    await refused(() => fileSink(path).open(OWNER), "sink_invalid", 'it belongs to relay "other"');
    assertEquals(await Deno.readTextFile(path), mixed);
  }));

Deno.test("fileSink refuses what is not a file, and a folder that is missing", () =>
  inTemp(async (path) => {
    const folder = path.slice(0, path.lastIndexOf("/"));
    for (const wrong of [folder, `${folder}/missing/out.jsonl`, "/dev/null"]) {
      await refused(() => fileSink(wrong).open(OWNER), "sink_invalid", `Cannot use file:${wrong}: `);
    }
    await Deno.writeTextFile(path, "");
    await refused(() => fileSink(`${path}/out.jsonl`).open(OWNER), "sink_invalid", "Not a directory");
  }));

Deno.test("fileSink follows a link to a file, one that is missing too, and removes only the file", () =>
  inTemp(async (path) => {
    const batches = await batchesOf(1);
    await Deno.symlink(`${path}.real`, path);
    assertEquals(await ringOf(path), []);
    assertEquals(await exists(`${path}.real`), false);
    await commitAll(path, batches);
    assertEquals(await ringOf(`${path}.real`), positions(batches));
  }));

Deno.test("fileSink notices that its file was removed, moved, replaced, emptied or written, and writes nothing", () =>
  inTemp(async (path) => {
    const batches = await batchesOf(2);
    const moved = `${path}.1`;
    const events: Record<string, readonly [happens: () => Promise<void>, part: string]> = {
      removed: [() => Deno.remove(path), "it was removed, moved or replaced"],
      moved: [() => Deno.rename(path, moved), "it was removed, moved or replaced"],
      replaced: [async () => {
        await Deno.copyFile(path, moved);
        await Deno.rename(moved, path);
      }, "it was removed, moved or replaced"],
      emptied: [() => Deno.truncate(path), "it has 0 bytes, not"],
      written: [() => Deno.writeTextFile(path, "x", { append: true }), "somebody else wrote into it"],
    };
    for (const [happens, part] of Object.values(events)) {
      const session = await fileSink(path).open(OWNER);
      await session.commit(batches[0]!);
      await happens();
      const before = await exists(path) ? await Deno.readFile(path) : null;
      await refused(() => session.commit(batches[1]!), "sink_invalid", part);
      await session.close();
      assertEquals(await exists(path) ? await Deno.readFile(path) : null, before);
      await Deno.remove(path).catch(() => {});
      if (await exists(moved)) assertEquals(await ringOf(moved), positions(batches.slice(0, 1)));
    }
  }));

Deno.test("fileSink that is removed while a relay runs stops the relay", () =>
  inTemp(async (path) => {
    const store = memoryStore();
    await store.enqueue(...["a", "b", "c"].map((id) => ({ id, topic: "t", value: id })));
    const observe = ({ type }: RelayEvent) => {
      if (type === "delivered") Deno.removeSync(path);
    };
    await refused(() => drain(store, fileSink(path), { batch: 1, observe }), "sink_invalid", "it was removed");
  }));

// -------------------------------------------------------------------------------------------------------------- full disk

/** A file system of 64 KiB; null, with the reason printed, where none can be mounted. */
async function mountSmall(): Promise<string | null> {
  if (Deno.build.os !== "linux") return null;
  const folder = await Deno.makeTempDir({ prefix: "effectonce-full-" });
  const args = ["-t", "tmpfs", "-o", "size=64k", "effectonce-test", folder];
  const { success, stderr } = await new Deno.Command("mount", { args }).output().catch((error: Error) => {
    return { success: false, stderr: encoder.encode(error.message) };
  });
  if (success) return folder;
  console.log(`Skips the test of a full disk: ${decoder.decode(stderr).trim()}`);
  await Deno.remove(folder);
  return null;
}

const small = await mountSmall();
if (small) await unmount(small);

async function unmount(folder: string): Promise<void> {
  // Lazily: a test that failed may have left a file open in there.
  await new Deno.Command("umount", { args: ["-l", folder] }).output();
  await Deno.remove(folder);
}

Deno.test({
  name: "fileSink commits nothing on a full disk, ends its session, and goes on once there is room",
  ignore: small === null,
  async fn() {
    const folder = (await mountSmall())!;
    try {
      const path = `${folder}/out.jsonl`;
      const batches = await batchesOf(3);
      await commitAll(path, batches.slice(0, 1));
      const good = await Deno.readFile(path);
      await Deno.writeFile(`${folder}/ballast`, new Uint8Array(40_000));
      const big = { ...batches[1]!, messages: [messageOf({ id: "2-1", topic: "t", value: "x".repeat(40_000) })] };
      const session = await fileSink(path).open(OWNER);
      await assertRejects(() => session.commit(big), Error, "No space left");
      await refused(() => session.commit(batches[1]!), "fenced", "is broken, open another");
      await session.close();
      assertEquals(await ringOf(path), positions(batches.slice(0, 1)));
      assertEquals(await Deno.readFile(path), good);
      await Deno.remove(`${folder}/ballast`);
      await commitAll(path, [big, batches[2]!]);
      assertEquals(await ringOf(path), positions(batches));

      // The same by a relay that has to wait for room, in a file that does not exist yet.
      await Deno.remove(path);
      await Deno.writeFile(`${folder}/ballast`, new Uint8Array(65_536));
      const store = memoryStore();
      await store.enqueue({ id: "a", topic: "t", value: "x".repeat(30_000) });
      let failures = 0;
      const observe = ({ type }: RelayEvent) => {
        if (type === "failed" && ++failures === 3) Deno.removeSync(`${folder}/ballast`);
      };
      await drain(store, fileSink(path), { observe });
      assertEquals(failures, 3);
      assertEquals((await messagesIn(path)).map(({ id }) => id), ["a"]);
    } finally {
      await unmount(folder);
    }
  },
});

// ------------------------------------------------------------------------------------------------------------------- lines

const JSON_TYPE = { "content-type": "application/json" };
const bytes = (...values: number[]) => new Uint8Array(values);
const utf8 = (text: string) => encoder.encode(text);

/** Value and headers, and what the line says about the value. */
const values: readonly (readonly [value: Json | Uint8Array, headers: Record<string, string>, line: string])[] = [
  [null, {}, `"value":null`],
  [null, JSON_TYPE, `"value":null`],
  [bytes(), {}, `"value":""`],
  [bytes(), JSON_TYPE, `"value":""`],
  ["plain", {}, `"value":"plain"`],
  ["line\nbreak\r\n\t\0\u2028\u2029\u0085", {}, `"value":"line\\nbreak\\r\\n\\t\\u0000\u2028\u2029\u0085"`],
  ["\u{1f600} é \ufffe", {}, `"value":"\u{1f600} é \ufffe"`],
  ["\ufeffwith a BOM", {}, `"value":"\ufeffwith a BOM"`],
  [utf8('\ufeff{"a":1}'), JSON_TYPE, `"value":"\ufeff{\\"a\\":1}"`],
  [bytes(0xff, 0, 0xfe), {}, `"valueBase64":"/wD+"`],
  [bytes(0xff), JSON_TYPE, `"valueBase64":"/w=="`],
  [bytes(0xed, 0xa0, 0x80), JSON_TYPE, `"valueBase64":"7aCA"`],
  [bytes(0xc3), {}, `"valueBase64":"ww=="`],
  [{ a: [1, 2.5, true, null, "x"] }, {}, `"value":{"a":[1,2.5,true,null,"x"]}`],
  [utf8('{"a":1}'), {}, `"value":"{\\"a\\":1}"`],
  [utf8('{"a":1}'), { "Content-Type": "Application/JSON; charset=utf-8" }, `"value":{"a":1}`],
  [utf8('{"a":1}'), { "content-type": " application/json" }, `"value":{"a":1}`],
  [utf8('{"a":1}'), { "content-type": "application/jsonl" }, `"value":"{\\"a\\":1}"`],
  [utf8('{"a":1}'), { "content-type": "text/plain", "Content-type": "application/json" }, `"value":{"a":1}`],
  [utf8('{"a": 1}'), JSON_TYPE, `"value":"{\\"a\\": 1}"`],
  [utf8('{"a":1}\n'), JSON_TYPE, `"value":"{\\"a\\":1}\\n"`],
  [utf8('{"a":1,"a":2}'), JSON_TYPE, `"value":"{\\"a\\":1,\\"a\\":2}"`],
  [utf8('{"b":1,"1":2}'), JSON_TYPE, `"value":"{\\"b\\":1,\\"1\\":2}"`],
  [utf8('{"1":2,"b":1}'), JSON_TYPE, `"value":{"1":2,"b":1}`],
  [utf8('{"__proto__":{"a":1},"toJSON":1}'), JSON_TYPE, `"value":{"__proto__":{"a":1},"toJSON":1}`],
  [utf8('{"a":"\\u00e9"}'), JSON_TYPE, `"value":"{\\"a\\":\\"\\\\u00e9\\"}"`],
  [utf8('"\\ud800"'), JSON_TYPE, `"value":"\\"\\\\ud800\\""`],
  [utf8('["\\ud800"]'), JSON_TYPE, `"value":["\\ud800"]`],
  [utf8('["\u2028"]'), JSON_TYPE, `"value":["\u2028"]`],
  [utf8("1e400"), JSON_TYPE, `"value":"1e400"`],
  [utf8("-0"), JSON_TYPE, `"value":"-0"`],
  [utf8("1.0"), JSON_TYPE, `"value":"1.0"`],
  [utf8("12345678901234567890"), JSON_TYPE, `"value":"12345678901234567890"`],
  [utf8("1e+21"), JSON_TYPE, `"value":1e+21`],
  [utf8("0"), JSON_TYPE, `"value":0`],
  [utf8("false"), JSON_TYPE, `"value":false`],
  [utf8("null"), JSON_TYPE, `"value":"null"`],
  [utf8('"text"'), JSON_TYPE, `"value":"\\"text\\""`],
  [utf8("text"), JSON_TYPE, `"value":"text"`],
  [utf8("[]"), JSON_TYPE, `"value":[]`],
  [utf8("[".repeat(20_000) + "]".repeat(20_000)), JSON_TYPE, `"value":[[[[`],
  [{ effectonce: {} }, {}, `"value":{"effectonce":{}}`],
  ['{"effectonce":{}}', {}, `"value":"{\\"effectonce\\":{}}"`],
  ["x", JSON.parse('{"__proto__":"p","2":"","1":"\\n"}'), `"value":"x"`],
];

function assertRoundTrip(message: Message): void {
  const line = formatLine(message);
  assertEquals(line.includes("\n"), false);
  const { id, topic, key, value, headers } = message;
  assertEquals(encodeMessage(parseLine(line)!), { id, topic, key, value, headers }, line);
}

Deno.test("parseLine gives back what formatLine was given, byte for byte", () => {
  for (const [value, headers, part] of values) {
    const message = messageOf({ id: "a", topic: "t", key: null, value, headers });
    assertStringIncludes(formatLine(message), part);
    assertRoundTrip(message);
  }
  assertRoundTrip(messageOf({ id: '"\\\n\u2028', topic: "\ufeff", key: "\u{1f600}", value: "" }));
});

Deno.test("parseLine gives back 2,000 random messages", () => {
  const random = seeded(42);
  const pick = <T>(...from: readonly T[]): T => from[Math.floor(random() * from.length)]!;
  const parts = [
    "a",
    "é",
    "\u{1f600}",
    "\ufeff",
    "\n",
    '"',
    "\\",
    "{",
    "}",
    "[",
    "]",
    ":",
    ",",
    "1",
    "-0",
    "1.0",
    "e9",
    "null",
    " ",
  ];
  const text = (most: number) => Array.from({ length: Math.floor(random() * most) }, () => pick(...parts)).join("");
  function json(depth: number): Json {
    const many = <T>(make: () => T) => Array.from({ length: Math.floor(random() * 4) }, make);
    switch (Math.floor(random() * (depth > 3 ? 4 : 6))) {
      case 0:
        return null;
      case 1:
        return random() < 0.5;
      case 2:
        return pick(0, -1, 1e21, 5e-324, 2 ** 53, random() * 1e6);
      case 3:
        return text(6);
      case 4:
        return many(() => json(depth + 1));
      default:
        return Object.fromEntries(many(() => [text(4), json(depth + 1)]));
    }
  }
  for (let i = 0; i < 2000; i++) {
    const kinds: (() => Json | Uint8Array)[] = [
      () => null,
      () => json(0),
      () => text(12),
      () => utf8(JSON.stringify(json(0))),
      () => utf8(JSON.stringify(json(0), null, 1)),
      () => crypto.getRandomValues(new Uint8Array(Math.floor(random() * 20))),
    ];
    const headers: Record<string, string> = {};
    if (random() < 0.6) {
      headers[pick("content-type", "Content-Type")] = pick("application/json", "text/plain", "APPLICATION/JSON ;a");
    }
    if (random() < 0.3) headers[`x${text(3)}`] = text(5);
    const key = random() < 0.5 ? null : `k${text(5)}`;
    assertRoundTrip(messageOf({ id: `i${text(5)}`, topic: `t${text(5)}`, key, value: pick(...kinds)(), headers }));
  }
});

Deno.test("parseLine takes what people and other programs write", () => {
  assertEquals(encodeMessage(parseLine(' {"topic":"t","value":{"b":1.0, "a":2},"id":"a"}\r')!), {
    id: "a",
    topic: "t",
    key: null,
    value: utf8('{"b":1,"a":2}'),
    headers: JSON_TYPE,
  });
  const line = '{"topic":"t","key":null,"valueBase64":"AQI=","headers":{"a":"b"},"time":"yesterday"}';
  const { id, ...rest } = encodeMessage(parseLine(line)!);
  assertMatch(id, /^[0-9a-f-]{36}$/);
  assertEquals(rest, { topic: "t", key: null, value: bytes(1, 2), headers: { a: "b" } });
});

Deno.test("parseLine answers null for position lines and blank lines", () => {
  for (const line of ["", "  ", "\r", '{"effectonce":{}}', '{"effectonce":{"n":0,"more":[]}}']) {
    assertEquals(parseLine(line), null);
  }
});

Deno.test("parseLine says in one sentence what is wrong with a line", () => {
  const wrong: Record<string, readonly [ErrorConstructor | typeof SyntaxError | typeof TypeError, string]> = {
    "secret": [SyntaxError, "it is not JSON"],
    '{"topic":"t","value":1': [SyntaxError, "it is not JSON"],
    "5": [TypeError, "it is not a JSON object"],
    "null": [TypeError, "it is not a JSON object"],
    "[1]": [TypeError, "it is not a JSON object"],
    "{}": [TypeError, "its topic must be a text"],
    '{"value":1}': [TypeError, "its topic must be a text"],
    '{"topic":1,"value":1}': [TypeError, "its topic must be a text"],
    '{"topic":"t","id":1,"value":1}': [TypeError, "its id must be a text"],
    '{"topic":"t","id":null,"value":1}': [TypeError, "its id must be a text"],
    '{"topic":"t","key":1,"value":1}': [TypeError, "its key must be a text or null"],
    '{"topic":"t","time":1,"value":1}': [TypeError, "its time must be a text"],
    '{"topic":"t"}': [TypeError, "it has neither value nor valueBase64"],
    '{"topic":"t","value":1,"valueBase64":"AQ=="}': [TypeError, "it has both value and valueBase64"],
    '{"topic":"t","value":null,"valueBase64":"AQ=="}': [TypeError, "it has both value and valueBase64"],
    '{"topic":"t","valueBase64":null}': [TypeError, "its valueBase64 must be a text"],
    '{"topic":"t","valueBase64":"secret!"}': [SyntaxError, "its valueBase64 is not base64"],
    '{"topic":"t","valueBase64":"AQ"}': [SyntaxError, "its valueBase64 is not base64"],
    '{"topic":"t","valueBase64":"AR=="}': [SyntaxError, "its valueBase64 is not base64"],
    '{"topic":"t","value":1,"Key":"k"}': [TypeError, 'it has a member "Key", which means nothing here'],
    '{"topic":"t","value":1,"__proto__":"k"}': [TypeError, 'it has a member "__proto__"'],
    '{"topic":"t","value":1,"headers":null}': [TypeError, "its headers must be names and texts"],
    '{"topic":"t","value":1,"headers":["a"]}': [TypeError, "its headers must be names and texts"],
    '{"topic":"t","value":1,"headers":{"a":1}}': [TypeError, "its headers must be names and texts"],
    '{"effectonce":1}': [TypeError, 'it has a member "effectonce"'],
    '{"effectonce":{},"topic":"t","value":1}': [TypeError, 'it has a member "effectonce"'],
  };
  for (const [line, [kind, part]] of Object.entries(wrong)) {
    const error = assertThrows(() => parseLine(line), kind, `Cannot read the line: ${part}`);
    assertEquals(error.message.includes("secret"), false, "A line may hold what no log should");
    assertEquals(error.message.includes("\n"), false);
  }
});

Deno.test("outside of Deno fileSink and stdoutSink say in one sentence that they are for Deno", async () => {
  const code = `
    const { log } = console;
    await import("node:crypto"); // Deno's own needs it to load.
    delete globalThis.Deno;
    const { fileSink, parseLine, stdoutSink } = await import(${JSON.stringify(import.meta.resolve("../adapters/file.ts"))});
    for (const make of [() => fileSink("out.jsonl"), () => stdoutSink()]) {
      try {
        make();
      } catch (error) {
        log(error.name + ": " + error.message);
      }
    }
    log(stdoutSink(() => Promise.resolve()).name, parseLine('{"topic":"t","value":1}').value);`;
  const { success, stdout } = await new Deno.Command(Deno.execPath(), {
    args: ["eval", "--no-lock", code],
    cwd: new URL("..", import.meta.url),
    env: { NO_COLOR: "1" },
    stderr: "inherit",
  }).output();
  assert(success);
  assertEquals(decoder.decode(stdout).split("\n"), [
    "TypeError: Cannot use fileSink here: it is for Deno, since it locks its file",
    "TypeError: Cannot use stdoutSink here: it is for Deno, elsewhere give it a function that writes",
    "stdout 1",
    "",
  ]);
});

// ------------------------------------------------------------------------------------------------------------------ stdout

const DELIVERY = { idempotencyKey: "", number: 1, signal: new AbortController().signal };

Deno.test("stdoutSink writes a line a message, and calls that overlap do not mix", async () => {
  let written = "";
  let writing = 0;
  const sink = stdoutSink(async (part) => {
    assertEquals(++writing, 1);
    for (const byte of part) {
      written += String.fromCharCode(byte);
      await Promise.resolve();
    }
    writing--;
  });
  assertEquals([sink.kind, sink.name, sink.repeat], ["call", "stdout", "always"]);
  const messages = ["a", "b", "c"].map((id) => messageOf({ id, topic: "t", value: id }));
  assertEquals(await Promise.all(messages.map((message) => sink.deliver(message, DELIVERY))), [null, null, null]);
  assertEquals(written, messages.map((message) => `${formatLine(message)}\n`).join(""));
});

Deno.test("stdoutSink rejects what could not be written, and goes on", async () => {
  const written: string[] = [];
  const sink = stdoutSink((part) => {
    const text = decoder.decode(part);
    if (text.includes('"a"')) return Promise.reject(new Error("full"));
    written.push(text);
    return Promise.resolve();
  });
  const [a, b] = ["a", "b"].map((id) => messageOf({ id, topic: "t", value: id }));
  const first = assertRejects(() => sink.deliver(a!, DELIVERY), Error, "full");
  await sink.deliver(b!, DELIVERY);
  await first;
  assertEquals(written, [`${formatLine(b!)}\n`]);
});

Deno.test("stdoutSink writes to the process's own output, completely, under a relay", async () => {
  const code = `
    import { relay } from ${JSON.stringify(import.meta.resolve("../mod.ts"))};
    import { memoryOutbox, memoryStore } from ${JSON.stringify(import.meta.resolve("../adapters/memory.ts"))};
    import { stdoutSink } from ${JSON.stringify(import.meta.resolve("../adapters/file.ts"))};
    const store = memoryStore();
    for (let i = 0; i < 20; i++) await store.enqueue({ id: String(i), topic: "t", value: String(i).repeat(100_000) });
    await relay({ from: memoryOutbox(store), to: stdoutSink(), drain: true });`;
  const { success, stdout } = await new Deno.Command(Deno.execPath(), {
    args: ["eval", "--no-lock", code],
    cwd: new URL("..", import.meta.url),
    stderr: "inherit",
  }).output();
  assert(success);
  const messages = decoder.decode(stdout).trimEnd().split("\n").map((line) => parseLine(line)!);
  assertEquals(messages.length, 20);
  for (const { id, value } of messages) assertEquals(value, id!.repeat(100_000));
});
