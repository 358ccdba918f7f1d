/** The package as its texts describe it. */
import { assertEquals } from "@std/assert";
import config from "../../deno.json" with { type: "json" };

const ROOT = new URL("../../", import.meta.url);

Deno.test("each module that README and docs name is exported, and can be imported here by that name", async () => {
  const docs = [...Deno.readDirSync(new URL("docs", ROOT))].map(({ name }) => `docs/${name}`);
  const texts = ["README.md", ...docs.filter((name) => name.endsWith(".md"))];
  const named = new Set<string>();
  for (const text of texts) {
    const found = (await Deno.readTextFile(new URL(text, ROOT))).matchAll(/@effectonce\/effectonce((?:\/[a-z]+)*)/g);
    for (const [, path] of found) named.add(`.${path}`);
  }
  const { exports, imports } = config as { exports: Record<string, string>; imports: Record<string, string> };
  assertEquals([...named].filter((path) => !(path in exports)), []);
  const importable = Object.entries(imports).filter(([name]) => name.startsWith(config.name));
  assertEquals(
    importable.map(([name, path]) => [name.replace(config.name, "."), path]),
    Object.entries(exports).filter(([name]) => name !== "./cli"),
  );
});
