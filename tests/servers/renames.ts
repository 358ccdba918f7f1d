/** What renaming a relay does, in every outbox. */
import { assertEquals, assertRejects } from "@std/assert";
import type { Outbox, SourceOptions } from "@effectonce/effectonce";

const OPTIONS: Pick<SourceOptions, "onPark" | "leaseMs"> = { onPark: "block", leaseMs: 1_000 };
const ALL = { rows: 100, bytes: 1_000_000 };

/** `later`: a lease is over then. The outbox is empty at first. */
export async function renames(
  outbox: Outbox,
  later: () => unknown,
  enqueue: (...ids: readonly string[]) => Promise<unknown>,
): Promise<void> {
  const moved: string[] = [];
  const rename = (name: string, to: string) =>
    outbox.rename(name, to, () => Promise.resolve(void moved.push(`${name}->${to}`)));
  const refused = async (run: () => Promise<unknown>, code: string, why: string) => {
    const error = await assertRejects(run, Error, why);
    assertEquals((error as { code?: string }).code, code);
  };
  const open = (relay: string, protocol: "sealed" | "claimed" = "sealed") => outbox.open({ ...OPTIONS, relay, protocol });
  assertEquals(await rename("none", "new"), false);
  await enqueue("a1", "a2", "b1");
  const session = await open("old");
  const { batches: [first] } = await session.seal([], { ...ALL, rows: 2 });
  await refused(() => rename("old", "new"), "busy", `Cannot rename relay "old"`);
  await later(); // It sleeps, for longer than its lease.
  await assertRejects(
    () => outbox.rename("old", "new", () => Promise.reject(new Error("the sink is away"))),
    Error,
    "the sink is away",
  );
  // In between both names are refused, also to the one that sleeps.
  await refused(() => open("new"), "source_invalid", `is just being renamed from "old". If that has failed, do it again`);
  await refused(() => open("old"), "source_invalid", `is called "new" now`);
  await refused(() => session.seal([], ALL), "source_invalid", `is called "new" now`);
  await refused(() => rename("old", "other"), "source_invalid", `it is called "new" now`);
  assertEquals([await rename("old", "new"), await rename("old", "new")], [true, true]);
  assertEquals(moved, ["old->new"]);
  await refused(() => open("old"), "source_invalid", `is called "new" now`);

  const heir = await open("new");
  const { batches } = await heir.seal([], ALL);
  assertEquals(batches.map(({ n, uid, messages }) => [n, n === 1 ? uid : "", messages.map(({ id }) => id)]), [
    [1, first!.uid, first!.messages.map(({ id }) => id)],
    [2, "", ["b1"]],
  ]);
  assertEquals((await outbox.sealed("new")).map(({ settled, batches }) => [settled.n, batches.length]), [[0, 2]]);
  const ring = batches.map(({ n, uid, prev, rows }) => ({ n, uid, prev, rows }));
  assertEquals((await heir.seal(ring, ALL)).batches, []);
  await heir.close(true);

  const claims = await open("claims", "claimed");
  await refused(() => rename("claims", "other"), "busy", "it runs");
  await enqueue("c1");
  await later();
  await refused(() => rename("claims", "other"), "source_invalid", "its claims are made under its name");
  await claims.close(true);
  await later();
  assertEquals(await rename("new", "old"), true, "back again");
  await refused(() => open("new"), "source_invalid", `is called "old" now`);
  const last = await open("old");
  const { batches: [third] } = await last.seal(ring, ALL);
  assertEquals([third!.n, third!.prev], [3, batches[1]!.uid]);
  await refused(() => rename("old", "new"), "busy", "it runs");
  await last.close(false);
}
