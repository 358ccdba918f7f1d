/**
 * Benchmarks, as ratios taken side by side in one run: `deno task bench dedupe|relay|size [--json] [--adapters a,b]`. Each run
 * appends its raw results to `bench/results/`; `deno task bench readme` writes the README's figures from the last ones.
 *
 * @module
 */
import { DatabaseSync } from "node:sqlite";
import { dedupe } from "./dedupe.ts";
import { writeFigures } from "./readme.ts";
import { relays } from "./relay.ts";
import { size } from "./size.ts";

const BENCHES: Readonly<Record<string, (adapters: readonly string[] | undefined) => Promise<readonly object[]>>> = {
  dedupe,
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
  const { version } = new DatabaseSync(":memory:").prepare("select sqlite_version() as version").get() as {
    version: string;
  };
  const driver = JSON.parse(Deno.readTextFileSync(new URL("../node_modules/better-sqlite3/package.json", import.meta.url)));
  return { deno, v8, "node:sqlite": version, "better-sqlite3": driver.version };
}

const [name = "dedupe", ...rest] = Deno.args;
if (name === "readme" && rest.length === 0) {
  await writeFigures();
  Deno.exit(0);
}
const bench = BENCHES[name];
const at = rest.indexOf("--adapters");
const known = rest.every((arg, i) => arg === "--json" || arg === "--adapters" || i === at + 1 && at >= 0);
if (!bench || !known || at >= 0 && rest[at + 1] === undefined) {
  console.error(`bench: use ${Object.keys(BENCHES).join(", ")}, with --json and --adapters A,B; or readme`);
  Deno.exit(2);
}
const rows = await bench(at < 0 ? undefined : rest[at + 1]!.split(","));
await Deno.writeTextFile(
  new URL(`./results/${name}.jsonl`, import.meta.url),
  JSON.stringify({ at: new Date().toISOString(), machine: machineOf(), versions: versionsOf(), rows }) + "\n",
  { append: true },
);
if (rest.includes("--json")) console.log(JSON.stringify(rows));
else console.table(rows);
