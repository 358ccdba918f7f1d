import { assert, assertEquals } from "@std/assert";
import type { Run } from "../cli/demo.ts";

/** Runs the demo with a temporary folder of its own; answers what it left there as well. */
async function demo(...args: string[]) {
  const folder = await Deno.makeTempDir({ prefix: "effectonce-demo-test-" });
  try {
    const cli = new URL("../cli.ts", import.meta.url).pathname;
    const command = new Deno.Command(Deno.execPath(), {
      args: ["run", "-A", "--quiet", cli, "demo", ...args],
      env: { TMPDIR: folder, NO_COLOR: "1" },
      stdin: "null",
    });
    const { code, stdout, stderr } = await command.output();
    const left = Array.from(Deno.readDirSync(folder), ({ name }) => name);
    return { code, stdout: new TextDecoder().decode(stdout), stderr: new TextDecoder().decode(stderr), left };
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
}

Deno.test("demo --json: the naive loop charges twice, effectonce never, and nothing is lost", async () => {
  const { code, stdout, stderr, left } = await demo("--json");
  assertEquals([code, stderr], [0, ""]);
  assertEquals(stdout.trimEnd().split("\n").length, 1, "JSON is one line");
  const { runs, ...rest } = JSON.parse(stdout) as { runs: Run[] };
  assertEquals(rest, {});
  assertEquals(runs.length, 3);
  for (const run of runs) {
    const { name, orders, chargedOnce, chargedTwice, lost, kills } = run;
    assertEquals(Object.keys(run), ["name", "orders", "chargedOnce", "chargedTwice", "lost", "uncertain", "kills"]);
    assertEquals([orders, chargedOnce + chargedTwice + lost], [40, 40], name);
    assert(kills >= 4, `${name}: ${kills} kills`);
  }
  const [naive, honours, ignores] = runs as [Run, Run, Run];
  assert(/naive/.test(naive.name), naive.name);
  assert(naive.chargedTwice > 0, "the naive loop did not charge twice: the demo shows nothing");
  for (const { name, orders, chargedOnce, chargedTwice, lost } of [honours, ignores]) {
    assert(/effectonce/.test(name), name);
    assertEquals([chargedOnce, chargedTwice, lost], [orders, 0, 0], name);
  }
  assertEquals(honours.uncertain, 0, "a target that honours the key leaves no doubt");
  assert(ignores.uncertain > 0, "no order was in doubt: the kills came too late or too early");
  assertEquals(left, [], "the temporary folder is removed");
});

Deno.test("demo prints a table and a sentence that say the same, with as many orders as asked for", async () => {
  const { code, stdout, stderr, left } = await demo("--orders", "24");
  assertEquals([code, stderr, left], [0, "", []]);
  const rows = stdout.split("\n").filter((line) => /^(naive|effectonce)/.test(line)).map((line) => line.split(/\s{2,}/));
  assertEquals(rows.length, 3);
  const numbers = rows.map((row) => row.slice(-6).map(Number));
  for (const [orders, once, twice, lost] of numbers) assertEquals([orders, once! + twice! + lost!], [24, 24]);
  for (const [, once, twice, lost] of numbers.slice(1)) assertEquals([once, twice, lost], [24, 0, 0]);
  const twice = numbers[0]![2]!;
  assert(twice > 0 && new RegExp(`The naive loop charged ${twice} customers? twice`).test(stdout), stdout);
  assert(stdout.split("\n").every((line) => line.length <= 130), "a line is too long for a terminal");
});
