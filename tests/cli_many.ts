/**
 * Runs many command lines one after the other in one process, since each process costs a tenth of a second. Reads a JSON list
 * of {@linkcode Line} from stdin, and prints one of {@linkcode Ended}.
 *
 * @module
 */
import { main } from "../cli.ts";
import type { Ended, Line } from "./cli_run.ts";

if (import.meta.main) {
  const lines: Line[] = JSON.parse(await new Response(Deno.stdin.readable).text());
  const { stdout } = Deno;
  const writeSync = stdout.writeSync.bind(stdout);
  const decoder = new TextDecoder();
  const ended: Ended[] = [];
  for (const { args, env } of lines) {
    const said = { stdout: "", stderr: "" };
    stdout.writeSync = (bytes) => {
      said.stdout += decoder.decode(bytes);
      return bytes.length;
    };
    console.error = (text: string) => said.stderr += `${text}\n`;
    for (const [name, value] of Object.entries(env)) Deno.env.set(name, value);
    ended.push({ code: await main(args), ...said });
    for (const name of Object.keys(env)) Deno.env.delete(name);
  }
  const bytes = new TextEncoder().encode(JSON.stringify(ended));
  for (let done = 0; done < bytes.length;) done += writeSync(bytes.subarray(done));
}
