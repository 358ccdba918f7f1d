/**
 * Runs many command lines one after the other in one process, since each process costs a tenth of a second. Reads a JSON list
 * of argument lists from stdin, and prints one of {@linkcode Ended}.
 *
 * @module
 */
import { main } from "../cli.ts";
import type { Ended } from "./cli_run.ts";

if (import.meta.main) {
  const lines: string[][] = JSON.parse(await new Response(Deno.stdin.readable).text());
  const { stdout } = Deno;
  const writeSync = stdout.writeSync.bind(stdout);
  const decoder = new TextDecoder();
  const ended: Ended[] = [];
  for (const line of lines) {
    const said = { stdout: "", stderr: "" };
    stdout.writeSync = (bytes) => {
      said.stdout += decoder.decode(bytes);
      return bytes.length;
    };
    console.error = (text: string) => said.stderr += `${text}\n`;
    ended.push({ code: await main(line), ...said });
  }
  const bytes = new TextEncoder().encode(JSON.stringify(ended));
  for (let done = 0; done < bytes.length;) done += writeSync(bytes.subarray(done));
}
