/**
 * How large `mod.ts` is, minified and compressed.
 *
 * @module
 */

/** Measures the core. */
export async function size(): Promise<readonly object[]> {
  const specifier = "npm:esbuild@^0.25.0";
  const { transform, stop } = await import(specifier);
  const source = await Deno.readTextFile(new URL("../mod.ts", import.meta.url));
  const { code } = await transform(source, { loader: "ts", minify: true, format: "esm" });
  await stop();
  const compressed = new Blob([code]).stream().pipeThrough(new CompressionStream("gzip"));
  return [{ file: "mod.ts", minifiedBytes: code.length, gzipBytes: (await new Response(compressed).bytes()).length }];
}
