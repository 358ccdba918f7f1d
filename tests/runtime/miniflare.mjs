/**
 * Runs a bundled worker in workerd: `node miniflare.mjs OPTIONS`, with OPTIONS as JSON: the options of Miniflare, `bundle` as
 * the path of the worker, and `steps`: paths to fetch, or `scheduled:CRON`. Prints one JSON array of what came back.
 */
import { readFileSync } from "node:fs";
import process from "node:process";

// Not a literal: this is a dependency of the test's own project, and not of this repository.
const name = "miniflare";
const { Miniflare } = await import(`${name}`);

const { bundle, steps, ...options } = JSON.parse(process.argv[2]);
const miniflare = new Miniflare({
  // Contents, so that it does not matter where the bundle lies.
  modules: [{ type: "ESModule", path: "worker.mjs", contents: readFileSync(bundle, "utf8") }],
  compatibilityDate: "2026-07-30",
  ...options,
});
try {
  const answers = [];
  for (const step of steps) {
    const [, cron] = /^scheduled:(.*)$/.exec(step) ?? [];
    if (cron) answers.push(await (await miniflare.getWorker()).scheduled({ cron }));
    else {
      const response = await miniflare.dispatchFetch(`http://worker.example${step}`);
      answers.push({ status: response.status, text: await response.text() });
    }
  }
  console.log(JSON.stringify(answers));
} finally {
  await miniflare.dispose();
}
