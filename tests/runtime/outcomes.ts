/** Checks what the suites report, requirement by requirement: a run that did nothing fails. */
import { assertEquals } from "@std/assert";
import { atomicSinkCases, relayCases, sourceCases, storeCases } from "../../conformance.ts";
import { memory, type Outcomes, programCount } from "./suite.ts";

/** A server as the suites need it, on a free port. */
export function serveTarget(): AsyncDisposable & { readonly url: string } {
  const server = Deno.serve({ hostname: "127.0.0.1", port: 0, onListen: () => {} }, async (request) => {
    return new Response(`${request.headers.get("idempotency-key")} ${await request.text()}`);
  });
  return { url: `http://127.0.0.1:${server.addr.port}/`, [Symbol.asyncDispose]: () => server.shutdown() };
}

/** One step a suite. */
export async function checkOutcomes(t: Deno.TestContext, outcomes: Outcomes, storages: readonly string[]): Promise<void> {
  const expected: Record<string, readonly [cases: number, skipped: readonly string[]]> = {
    "programs": [programCount, []],
    "relay": [relayCases.length, []],
  };
  for (const storage of storages) {
    expected[`store: ${storage}`] = [storeCases.length, []];
    expected[`source: ${storage}`] = [
      sourceCases.length,
      storage === "memory" ? Object.keys(memory.source.skip ?? {}) : [],
    ];
    expected[`atomic sink: ${storage}`] = [atomicSinkCases.length, []];
  }
  assertEquals(Object.keys(outcomes).sort(), Object.keys(expected).sort());
  for (const [suite, [cases, skips]] of Object.entries(expected)) {
    const { passed, skipped, failed } = outcomes[suite]!;
    await t.step(`${suite}: ${cases - skips.length} of ${cases} requirements`, () => {
      assertEquals(failed, {});
      assertEquals(Object.keys(skipped).sort(), [...skips].sort());
      assertEquals([outcomes[suite]!.cases, passed], [cases, cases - skips.length]);
    });
  }
}
