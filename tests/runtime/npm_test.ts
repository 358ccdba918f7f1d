/** The package as npm's users get it, in Node and Bun: `once`, `relay` and every requirement, on memory and SQLite. */
import { assertEquals } from "@std/assert";
import { join } from "node:path";
import { installPackage, installTools, programs, runWell, versions } from "./install.ts";
import { checkOutcomes, serveTarget } from "./outcomes.ts";

const runtimes = [
  {
    name: `node ${versions.node22}`,
    program: programs.node22,
    args: ["node.mjs"],
    storages: ["memory", "node:sqlite", "better-sqlite3"],
  },
  {
    name: `node ${versions.node24}`,
    program: programs.node24,
    args: ["node.mjs"],
    storages: ["memory", "node:sqlite", "better-sqlite3"],
  },
  { name: `bun ${versions.bun}`, program: programs.bun, args: ["bun.mjs"], storages: ["memory", "bun:sqlite"] },
];

for (const { name, program, args, storages } of runtimes) {
  Deno.test(`${name} meets every requirement`, async (t) => {
    const tools = await installTools();
    const project = await installPackage();
    await using target = serveTarget();
    const { stdout } = await runWell(join(tools, program), [...args, target.url], { cwd: project });
    const { runtime, outcomes } = JSON.parse(stdout.trimEnd().split("\n").at(-1)!);
    assertEquals(runtime, name);
    await checkOutcomes(t, outcomes, storages);
  });
}

Deno.test("the npm package needs no other", async () => {
  const project = await installPackage();
  const text = await Deno.readTextFile(join(project, "node_modules/@effectonce/effectonce/package.json"));
  const { dependencies = {}, peerDependencies = {}, optionalDependencies = {} } = JSON.parse(text);
  assertEquals({ ...dependencies, ...peerDependencies, ...optionalDependencies }, {});
});
