/** Bundles workers as their users' tools do, and runs them in workerd. */
import { join } from "node:path";
import { installPackage, installTools, programs, runWell } from "./install.ts";

/** What a step of `miniflare.mjs` came to. */
export type StepAnswer = { readonly status: number; readonly text: string } | {
  readonly outcome: string;
  readonly noRetry: boolean;
};

/** A worker in the package's project: one of its files, or files of its own. */
export interface Worker {
  readonly entry: string;
  readonly files?: Readonly<Record<string, string>>;
}

/** Bundles a worker, runs it, and takes the steps. */
export async function runWorker(
  { entry, files = {} }: Worker,
  steps: readonly string[],
  options: object,
): Promise<StepAnswer[]> {
  const [tools, project] = [await installTools(), await installPackage()];
  // In the project, so that the package's name means the installed one.
  const folder = await Deno.makeTempDir({ dir: project, prefix: "worker-" });
  try {
    for (const [name, text] of Object.entries(files)) await Deno.writeTextFile(join(folder, name), text);
    const bundle = join(folder, "bundle.mjs");
    const flags = ["--bundle", "--format=esm", "--platform=neutral", "--conditions=workerd,worker", "--external:node:*"];
    await runWell(join(tools, programs.esbuild), [
      join(entry in files ? folder : project, entry),
      ...flags,
      `--outfile=${bundle}`,
    ]);
    const program = ["miniflare.mjs", JSON.stringify({ bundle, steps, ...options })];
    const { stdout } = await runWell(join(tools, programs.node24), program, { cwd: project });
    return JSON.parse(stdout.trimEnd().split("\n").at(-1)!);
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
}
