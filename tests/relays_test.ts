/** The requirements of relays, on the one that this package has. */
import { relayCases, type RelayHarness } from "../conformance.ts";
import { handler, relay } from "../mod.ts";

const harness: RelayHarness = { relay, handler };

for (const { name, run } of relayCases) Deno.test(`relay ${name}`, () => run(harness));
