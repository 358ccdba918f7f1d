/**
 * The command `enqueue`: messages from flags, or from lines of JSON.
 *
 * @module
 */
import { encodeMessage, type NewMessage } from "../mod.ts";
import { parseLine } from "../adapters/file.ts";
import { type Command, JSON_OUT, STORE, using } from "./command.ts";
import { reason, UsageError } from "./errors.ts";
import type { Flags } from "./flags.ts";
import { need } from "./permissions.ts";
import { print } from "./print.ts";

/** The command. */
export const ENQUEUE: Command = {
  summary: "put messages into the outbox, all or none",
  flags: {
    store: STORE,
    topic: { kind: "name", value: "TEXT", help: "the message's topic (required unless --jsonl)" },
    key: { kind: "name", value: "TEXT", help: "its ordering key (none: no order)" },
    value: { kind: "text", help: "its value, byte for byte; JSON is marked as such (required unless --tombstone, --jsonl)" },
    tombstone: { kind: "switch", help: "no value" },
    id: { kind: "name", value: "TEXT", help: "its id (a UUID)" },
    header: { kind: "pairs", help: "one of its headers" },
    jsonl: { kind: "name", value: "FILE", help: "many: {id?,topic,key?,value|valueBase64,headers?} a line; - for stdin" },
    json: JSON_OUT,
  },
  example: `enqueue --store sqlite:app.db --topic payments --key order-1 --value '{"amount":5}'`,
  run: async (flags) => {
    const messages = flags.has("jsonl") ? await fromLines(flags) : [{ message: single(flags), where: "" }];
    return await using(flags, async ({ store }) => {
      await store.transaction(async ({ enqueue }) => {
        for (const { message, where } of messages) {
          await enqueue(message).catch((error: unknown) => {
            throw where ? new Error(`${where}: ${reason(error)}. Nothing was enqueued`, { cause: error }) : error;
          });
        }
      });
      const ids = messages.map(({ message: { id } }) => id!);
      const text = ids.length === 1 ? `enqueued 1 message: ${ids[0]}` : `enqueued ${ids.length} messages`;
      print(flags, { enqueued: ids.length, ids }, text);
    });
  },
};

function single(flags: Flags): NewMessage {
  const text = flags.text("value");
  if (text === undefined && !flags.on("tombstone")) throw new UsageError("--value is missing (or --tombstone, or --jsonl)");
  if (text !== undefined && flags.on("tombstone")) {
    throw new UsageError(`${flags.label("value")} and ${flags.label("tombstone")} exclude each other`);
  }
  const headers = flags.pairs("header");
  const typed = Object.keys(headers).some((name) => name.toLowerCase() === "content-type");
  return {
    id: flags.text("id") ?? crypto.randomUUID(),
    topic: flags.given("topic"),
    key: flags.text("key") ?? null,
    value: text === undefined ? null : new TextEncoder().encode(text),
    headers: text === undefined || typed || !isJson(text) ? headers : { ...headers, "content-type": "application/json" },
  };
}

async function fromLines(flags: Flags): Promise<readonly { readonly message: NewMessage; readonly where: string }[]> {
  for (const name of ["topic", "key", "value", "id", "tombstone", "header"]) {
    if (flags.has(name)) throw new UsageError(`${flags.label(name)} and ${flags.label("jsonl")} exclude each other`);
  }
  const path = flags.given("jsonl");
  if (path !== "-") need(`Reading ${path}`, { name: "read", path });
  let bytes: Uint8Array;
  try {
    bytes = path === "-" ? await new Response(Deno.stdin.readable).bytes() : await Deno.readFile(path);
  } catch (error) {
    throw new Error(`Cannot read ${path}: ${reason(error)}`);
  }
  const name = path === "-" ? "stdin" : path;
  let text: string;
  try {
    text = new TextDecoder("utf-8", { fatal: true }).decode(bytes);
  } catch {
    throw new Error(`Cannot read ${name}: it is not UTF-8`);
  }
  const messages = [];
  for (const [i, line] of text.split("\n").entries()) {
    const where = `${name}, line ${i + 1}`;
    try {
      const parsed = parseLine(line);
      if (!parsed) continue;
      const message = { ...parsed, id: parsed.id ?? crypto.randomUUID() };
      encodeMessage(message); // Before anything is written.
      messages.push({ message, where });
    } catch (error) {
      throw new Error(`${where}: ${reason(error)}. Nothing was enqueued`);
    }
  }
  return messages;
}

function isJson(text: string): boolean {
  try {
    JSON.parse(text);
    return true;
  } catch {
    return false;
  }
}
