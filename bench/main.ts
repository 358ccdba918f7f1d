/**
 * Benchmarks, as ratios taken side by side in one run: `deno task bench dedupe|growth|kafka|kafka-from|relay|size [--json] [--adapters a,b]`. Each
 * run appends its raw results to `bench/results/`; `deno task bench readme` writes the README's figures from the last ones.
 *
 * @module
 */
import { parseArgs as parse } from "node:util";
import { dedupe } from "./dedupe.ts";
import { growth } from "./growth.ts";
import { kafka } from "./kafka.ts";
import { kafkaFrom } from "./kafka_from.ts";
import { writeFigures } from "./readme.ts";
import { relays } from "./relay.ts";
import { size } from "./size.ts";

type Bench = (adapters: readonly string[] | undefined, rows: number | undefined) => Promise<readonly object[]>;
const BENCHES: Readonly<Record<string, Bench>> = {
  dedupe,
  growth,
  kafka,
  "kafka-from": kafkaFrom,
  relay: relays,
  size,
};

/** The machine, as far as it can be told. */
function machineOf(): string {
  let processor = "";
  try {
    processor = /^model name\s*: (.+)$/m.exec(Deno.readTextFileSync("/proc/cpuinfo"))?.[1] ?? "";
  } catch {
    // Not Linux.
  }
  const memory = `${Math.round(Deno.systemMemoryInfo().total / 2 ** 30)} GiB`;
  return [Deno.build.os, Deno.build.arch, processor, `${navigator.hardwareConcurrency} cores`, memory].filter(Boolean).join(
    ", ",
  );
}

function versionsOf(): Readonly<Record<string, string>> {
  const { deno, v8 } = Deno.version;
  const driver = (name: string) =>
    JSON.parse(Deno.readTextFileSync(new URL(`../node_modules/${name}/package.json`, import.meta.url))).version;
  const drivers = ["better-sqlite3", "pg", "mysql2", "kafkajs"].map((name) => [name, driver(name)]);
  return { deno, v8, ...Object.fromEntries(drivers) };
}

/** @throws {RangeError} If they are not understood. */
function parseArgs(args: readonly string[]) {
  const { values } = parse({
    args: [...args],
    options: { json: { type: "boolean", default: false }, adapters: { type: "string" }, rows: { type: "string" } },
  });
  if (!bench || values.rows !== undefined && !/^[1-9]\d*$/.test(values.rows)) throw new RangeError("not understood");
  return values;
}

const [name = "dedupe", ...rest] = Deno.args;
if (name === "readme" && rest.length === 0) {
  await writeFigures();
  Deno.exit(0);
}
const bench = BENCHES[name];
let flags: { readonly json: boolean; readonly adapters?: string; readonly rows?: string };
try {
  flags = parseArgs(rest);
} catch {
  console.error(`bench: use ${Object.keys(BENCHES).join(", ")}, with --json, --adapters A,B and --rows N; or readme`);
  Deno.exit(2);
}
const rows = await bench!(flags.adapters?.split(","), flags.rows === undefined ? undefined : Number(flags.rows));
await Deno.writeTextFile(
  new URL(`./results/${name}.jsonl`, import.meta.url),
  JSON.stringify({ at: new Date().toISOString(), machine: machineOf(), versions: versionsOf(), rows }) + "\n",
  { append: true },
);
if (flags.json) console.log(JSON.stringify(rows));
else console.table(rows);
Deno.exit(0); // The connection that keeps the servers.
