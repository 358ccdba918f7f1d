/** The package's types as npm's users see them: by `tsc`, in both ways to resolve modules that packages like this one have. */
import { assertEquals } from "@std/assert";
import { join } from "node:path";
import { installPackage, installTools, programs, run, versions } from "./install.ts";

const compilers = { typescript5: versions.typescript5, typescript7: versions.typescript7 };
const resolutions = { nodenext: "nodenext", bundler: "esnext" }; // and the `module` that goes with it
const strict = {
  noEmit: true,
  strict: true,
  exactOptionalPropertyTypes: true,
  noUncheckedIndexedAccess: true,
  target: "es2023",
  lib: ["es2023"],
};

/** What the compiler complains of in these programs. They expect some errors, so types that are lost are complained of too. */
async function complaints(compiler: string, files: readonly string[], compilerOptions: object): Promise<string> {
  const [tools, project] = [await installTools(), await installPackage()];
  const folder = await Deno.makeTempDir({ dir: project, prefix: "types-" });
  try {
    const config = { compilerOptions: { ...strict, ...compilerOptions }, files: files.map((name) => `../${name}`) };
    await Deno.writeTextFile(join(folder, "tsconfig.json"), JSON.stringify(config));
    const tsc = join(tools, "node_modules", compiler, "bin/tsc");
    const listed = await run(join(tools, programs.node24), [tsc, "--project", folder, "--listFiles"], { cwd: project });
    for (const name of [...files, "node_modules/@effectonce/effectonce/mod.d.ts"]) {
      if (!listed.stdout.includes(`${join(project, name)}\n`)) return `${name} was not checked: ${listed.stdout}`;
    }
    return listed.stdout.split("\n").filter((line) => line.includes("error TS")).join("\n") +
      (listed.code === 0 ? "" : `code ${listed.code}`);
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
}

for (const [compiler, version] of Object.entries(compilers)) {
  for (const [moduleResolution, module] of Object.entries(resolutions)) {
    Deno.test(`tsc ${version} with moduleResolution ${moduleResolution} checks a program with every entry point`, async () => {
      const options = { module, moduleResolution, types: ["node"], skipLibCheck: false };
      assertEquals(await complaints(compiler, ["user.ts", "user_better_sqlite3.ts"], options), "");
    });
  }
  Deno.test(`tsc ${version} takes bun:sqlite for a client`, async () => {
    // Bun's own types do not pass without skipLibCheck.
    const options = { module: "esnext", moduleResolution: "bundler", types: ["bun"], skipLibCheck: true };
    assertEquals(await complaints(compiler, ["user_bun.ts"], options), "");
  });
}
