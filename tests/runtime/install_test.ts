/** The shared folder of runtimes, when several ask for it and when filling it goes wrong. */
import { assertEquals, assertRejects } from "@std/assert";
import { join } from "node:path";
import { fillOnce } from "./install.ts";

Deno.test("a shared folder is filled by one of those who ask, and never seen half-filled", async () => {
  const parent = await Deno.makeTempDir({ prefix: "effectonce-install-" });
  try {
    const folder = join(parent, "shared");
    let fills = 0;
    const ask = (fail: boolean) =>
      fillOnce(folder, /never/, async (partial) => {
        fills++;
        await Deno.writeTextFile(join(partial, "first"), "");
        if (fail) throw new Error("interrupted");
        await Deno.writeTextFile(join(partial, "second"), "");
      });
    await assertRejects(() => ask(true), Error, "interrupted");
    const contents = await Promise.all(Array.from({ length: 5 }, async () => {
      const names = await Array.fromAsync(Deno.readDir(await ask(false)));
      return names.map(({ name }) => name).sort();
    }));
    assertEquals(contents, Array(5).fill(["first", "second"]));
    assertEquals(fills, 2);
    const left = (await Array.fromAsync(Deno.readDir(parent))).map(({ name }) => name).sort();
    assertEquals(left, ["shared", "shared.lock"]);
  } finally {
    await Deno.remove(parent, { recursive: true });
  }
});
