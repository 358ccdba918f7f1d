/**
 * The JSON Schema of the file with relays, made of the flags; as a program it writes `effectonce.schema.json`.
 *
 * @module
 */
import { flagsAt, memberOf } from "./config.ts";
import type { Flag } from "./flags.ts";

type Schema = Readonly<Record<string, unknown>>;

const TEXT: Schema = { type: "string" };

function typeOf({ kind, min = 0, max = 2_147_483_647, oneOf }: Flag): Schema {
  switch (kind) {
    case "number":
      return { type: "integer", minimum: min, maximum: max };
    case "switch":
      return { type: "boolean" };
    case "names":
      return { type: "array", items: { type: "string", minLength: 1 }, minItems: 1 };
    case "pairs":
      return { type: "object", additionalProperties: TEXT };
    default:
      return oneOf ? { enum: oneOf } : TEXT;
  }
}

function members(place: "relay" | "top"): Schema {
  return Object.fromEntries(
    flagsAt(place).map(([name, flag]) => {
      const preset = flag.kind === "switch" ? false : flag.default;
      return [memberOf(name), {
        description: flag.help,
        ...typeOf(flag),
        ...preset === undefined ? {} : { default: preset },
      }];
    }),
  );
}

/** The schema. What is required may come from a flag or the environment, so that the file need not have it. */
export function configSchema(): Schema {
  return {
    $schema: "http://json-schema.org/draft-07/schema#",
    title: "Relays of effectonce",
    description: "What `relay --config FILE` runs. A URL or the value of a header may be `env:NAME`, a variable.",
    type: "object",
    properties: {
      $schema: TEXT,
      ...members("top"),
      relays: {
        description: "The relays by name, which is the scope of their effects.",
        type: "object",
        minProperties: 1,
        propertyNames: { minLength: 1, maxLength: 1024 },
        additionalProperties: { type: "object", properties: members("relay"), additionalProperties: false },
      },
    },
    required: ["relays"],
    additionalProperties: false,
  };
}

/** The schema as its file has it. */
export function schemaText(): string {
  return JSON.stringify(configSchema(), null, 2) + "\n";
}

if (import.meta.main) await Deno.writeTextFile(new URL("../effectonce.schema.json", import.meta.url), schemaText());
