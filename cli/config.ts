/**
 * The file with relays: `relay --config effectonce.json`.
 *
 * ```json
 * {
 *   "$schema": "./effectonce.schema.json",
 *   "listen": "127.0.0.1:9464",
 *   "relays": {
 *     "billing": {
 *       "from": "sqlite:app.db",
 *       "to": "https://pay.example/charge",
 *       "idempotent": true,
 *       "headerTo": { "Authorization": "env:PAYMENT_TOKEN" }
 *     }
 *   }
 * }
 * ```
 *
 * @module
 */
import { reason, UsageError } from "./errors.ts";
import {
  checkedNames,
  checkedNumber,
  checkedPairs,
  checkedText,
  type Flag,
  Flags,
  type Given,
  type Layer,
  readEnvironment,
  type Value,
} from "./flags.ts";
import { type JsonObject, type JsonValue, parseJson } from "./json.ts";
import { maskedHeader, maskedUrl } from "./mask.ts";
import { need } from "./permissions.ts";
import { RELAY_FLAGS } from "./relay_flags.ts";

/** A flag's name in the file. */
export function memberOf(flag: string): string {
  return flag.replace(/-(.)/g, (_, letter: string) => letter.toUpperCase());
}

/** The flags that stand with each relay, or once at the top. */
export function flagsAt(place: "relay" | "top"): readonly (readonly [name: string, flag: Flag])[] {
  return Object.entries(RELAY_FLAGS).filter(([, { file = "relay" }]) => file === place);
}

/** The relays that a command is about: that of its own flags, or with `--config` those of the file, or the one by `--name`. */
export function relaysOf(command: Flags): readonly Flags[] {
  const path = command.text("config");
  if (path === undefined) return [command];
  const { top, relays } = readConfig(path);
  const picked = command.has("name") ? command.text("name")! : undefined;
  if (picked !== undefined && !relays.has(picked)) {
    const known = Array.from(relays.keys(), (name) => `"${name}"`).join(" and ");
    throw new UsageError(`${command.label("name")}: ${path} has no relay "${picked}", only ${known}`);
  }
  const above = new Map([...readEnvironment(RELAY_FLAGS), ...command.layer]);
  const names = picked === undefined ? [...relays.keys()] : [picked];
  return names.map((name) => {
    const place = placeOf(path, name);
    const own: Given = { value: name, source: "file", label: place };
    const layer = new Map([...top, ...relays.get(name)!, ["name", own] as const, ...above]);
    return new Flags(RELAY_FLAGS, [], layer, (flag) => `${place}.${memberOf(flag)}`).complete();
  });
}

function placeOf(path: string, relay: string): string {
  return `${path}: relays${/^[A-Za-z_][\w-]*$/.test(relay) ? `.${relay}` : `[${JSON.stringify(relay)}]`}`;
}

function readConfig(path: string): { readonly top: Layer; readonly relays: ReadonlyMap<string, Layer> } {
  need(`Reading ${path}`, { name: "read", path });
  let text: string;
  try {
    text = Deno.readTextFileSync(path);
  } catch (error) {
    throw new Error(`Cannot read ${path}: ${error instanceof Deno.errors.NotFound ? "it does not exist" : reason(error)}`);
  }
  let json: JsonValue;
  try {
    json = parseJson(text);
  } catch (error) {
    throw new UsageError(`${path}, ${reason(error)}`);
  }
  const { $schema, relays: listed, ...rest } = Object.fromEntries(members(path, json));
  if ($schema !== undefined && typeof $schema !== "string") throw new UsageError(`${path}: $schema must be a text`);
  const top = layerOf(`${path}: `, new Map(Object.entries(rest)), flagsAt("top"), ["relays"]);
  if (listed === undefined) throw new UsageError(`${path}: relays is missing`);
  const relays = new Map<string, Layer>();
  for (const [name, json] of members(`${path}: relays`, listed)) {
    const place = placeOf(path, name);
    checkedText(`${place}: the name`, name, RELAY_FLAGS.name!);
    relays.set(name, layerOf(`${place}.`, members(place, json), flagsAt("relay"), []));
  }
  if (relays.size === 0) throw new UsageError(`${path}: relays must have at least one relay`);
  return { top, relays };
}

function members(place: string, json: JsonValue): JsonObject {
  if (json instanceof Map) return json;
  throw new UsageError(`${place} must be an object`);
}

function layerOf(
  prefix: string,
  object: JsonObject,
  flags: ReturnType<typeof flagsAt>,
  others: readonly string[],
): Layer {
  const known = new Map(flags.map(([name, flag]) => [memberOf(name), { name, flag }]));
  const layer = new Map<string, Given>();
  for (const [member, json] of object) {
    const label = prefix + member;
    const found = known.get(member);
    if (!found) throw new UsageError(`${label} is not known${meant(member, [...known.keys(), ...others])}`);
    layer.set(found.name, { value: fromJson(label, json, found.flag), source: "file", label });
  }
  return layer;
}

/** What a person who wrote `lease-ms` or `Leasems` had in mind. */
function meant(member: string, known: readonly string[]): string {
  const plain = (text: string) => text.toLowerCase().replaceAll(/[^a-z]/g, "");
  const found = known.find((other) => plain(other) === plain(member));
  return found === undefined ? "" : `: write ${found}`;
}

/** Reads a member's value; nothing that could be a secret is repeated. */
function fromJson(label: string, json: JsonValue, flag: Flag): Value {
  const must = (what: string) => new UsageError(`${label} must be ${what}, not ${kindOf(json)}`);
  switch (flag.kind) {
    case "number":
      return checkedNumber(label, typeof json === "number" ? json : NaN, flag, kindOf(json));
    case "switch":
      if (typeof json === "boolean") return json;
      throw must("true or false");
    case "names": {
      const what = "a list of texts, none of them empty";
      if (!isList(json) || !json.every((item) => typeof item === "string")) throw must(what);
      return checkedNames(label, json, what);
    }
    case "pairs": {
      if (!(json instanceof Map)) throw must("an object of texts");
      const pairs = Array.from(json as JsonObject, ([name, value]): [string, string] => {
        if (typeof value === "string") return [name, value];
        throw new UsageError(`${label}.${name} must be a text, not ${kindOf(value)}`);
      });
      return checkedPairs(label, pairs);
    }
    default:
      if (typeof json !== "string") throw must("a text");
      return checkedText(label, json, flag);
  }
}

const isList = (json: JsonValue): json is readonly JsonValue[] => Array.isArray(json);

function kindOf(json: JsonValue): string {
  if (typeof json === "string") return "a text";
  if (isList(json)) return "a list";
  return json instanceof Map ? "an object" : String(json);
}

// --------------------------------------------------------------------------------------------------------- print the config

/** One value of the effective configuration, without secrets. */
interface Shown {
  readonly value: string | number | boolean | readonly string[] | Readonly<Record<string, string>> | null;
  readonly source: Given["source"] | "default";
}

/** What relays would run with, in the form of the file: each value, and where it came from. */
export function effectiveConfig(relays: readonly Flags[]): Readonly<Record<string, unknown>> {
  const at = (place: "relay" | "top", flags: Flags) =>
    Object.fromEntries(flagsAt(place).map(([name]) => [memberOf(name), shown(name, flags)]));
  return {
    ...at("top", relays[0]!),
    relays: Object.fromEntries(relays.map((flags) => [flags.text("name"), at("relay", flags)])),
  };
}

function shown(name: string, flags: Flags): Shown {
  const { kind } = flags.table[name]!;
  const source = flags.layer.get(name)?.source ?? "default";
  const value = flags.value(name);
  if (value === undefined) return { value: kind === "switch" ? false : null, source };
  if (value instanceof Map) {
    return { value: Object.fromEntries(Array.from(value, ([name, text]) => [name, maskedHeader(text)])), source };
  }
  const plain = value as Exclude<Value, ReadonlyMap<string, string>>;
  return { value: kind === "url" ? maskedUrl(plain as string) : plain, source };
}
