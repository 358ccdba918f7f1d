/** The requirements of the conformance suites as tests, for the ends of a database. */
import { atomicSinkCases, type Case, type Harness, sourceCases, storeCases } from "@effectonce/effectonce/conformance";
import type { Ends } from "../runtime/suite.ts";

/** Which case is which acceptance test of the correctness notes. */
const acceptance: Readonly<Record<string, number>> = {
  "claim() is given to one of 50 callers at once, over both handles": 10,
  "claim() compares keys byte for byte": 14,
};

/** One test for each requirement. */
export function suites(name: string, { store, source, sink }: Ends): void {
  run(`${name}Store`, storeCases, store);
  run(`${name}Outbox`, sourceCases, source);
  run(`handler on ${name}Store`, atomicSinkCases, sink);
}

function run<H extends Harness>(of: string, cases: readonly Case<H>[], harness: H): void {
  for (const { name, run } of cases) {
    const reason = harness.skip?.[name];
    const number = name in acceptance ? ` (acceptance ${acceptance[name]})` : "";
    Deno.test({
      name: `${of} ${name}${number}${reason ? ` (skipped: ${reason})` : ""}`,
      ignore: reason !== undefined,
      fn: () => run(harness),
    });
  }
}
