/** What stands in the README and is tested as it stands there, found by comments: `<!-- NAME -->`. */
import { join } from "node:path";
import { root } from "./install.ts";

async function behind(name: string): Promise<string> {
  const text = await Deno.readTextFile(join(root, "README.md"));
  const [, after, ...more] = text.split(`<!-- ${name} -->\n`);
  if (after === undefined || more.length > 0) throw new Error(`README.md must have the comment <!-- ${name} --> once`);
  return after.trimStart();
}

/** The code of the block behind this comment. */
export async function readmeCode(name: string): Promise<string> {
  const code = /^```[^\n]*\n(.*?\n)```\n/s.exec(await behind(name))?.[1];
  if (code === undefined) throw new Error(`README.md must have a code block behind the comment <!-- ${name} -->`);
  return code;
}

/** The cells of the table behind this comment, without its head. */
export async function readmeTable(name: string): Promise<readonly (readonly string[])[]> {
  const [, , ...lines] = (await behind(name)).split("\n\n")[0]!.trimEnd().split("\n");
  if (lines.length === 0) throw new Error(`README.md must have a table behind the comment <!-- ${name} -->`);
  return lines.map((line) => line.split("|").slice(1, -1).map((cell) => cell.trim()));
}
