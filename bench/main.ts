/**
 * Benchmarks, as ratios taken side by side in one run: `deno task bench dedupe|relay|size [--json] [--adapters a,b]`.
 *
 * @module
 */
import { dedupe } from "./dedupe.ts";
import { relays } from "./relay.ts";
import { size } from "./size.ts";

const BENCHES: Readonly<Record<string, (adapters: readonly string[] | undefined) => Promise<readonly object[]>>> = {
  dedupe,
  relay: relays,
  size,
};

const [name = "dedupe", ...rest] = Deno.args;
const bench = BENCHES[name];
const at = rest.indexOf("--adapters");
const known = rest.every((arg, i) => arg === "--json" || arg === "--adapters" || i === at + 1 && at >= 0);
if (!bench || !known || at >= 0 && rest[at + 1] === undefined) {
  console.error(`bench: use ${Object.keys(BENCHES).join(", ")}, with --json and --adapters A,B`);
  Deno.exit(2);
}
const rows = await bench(at < 0 ? undefined : rest[at + 1]!.split(","));
const machine = `${Deno.build.os} ${Deno.build.arch}, ${navigator.hardwareConcurrency} cores, deno ${Deno.version.deno}`;
await Deno.writeTextFile(
  new URL(`./results/${name}.jsonl`, import.meta.url),
  JSON.stringify({ at: new Date().toISOString(), machine, rows }) + "\n",
  { append: true },
);
if (rest.includes("--json")) console.log(JSON.stringify(rows));
else console.table(rows);
