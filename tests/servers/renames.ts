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
  const refused = async (name: string, to: string, code: string, why: string) => {
    const error = await assertRejects(() => outbox.rename(name, to), Error, why);
    assertEquals((error as { code?: string }).code, code);
  };
  assertEquals(await outbox.rename("none", "new"), false);
  await enqueue("a1", "a2", "b1");
  const session = await outbox.open({ ...OPTIONS, relay: "old", protocol: "sealed" });
  const { batches: [first] } = await session.seal([], { ...ALL, rows: 2 });
  await refused("old", "new", "busy", `Cannot rename relay "old"`);
  await session.close(false);
  assertEquals(await outbox.rename("old", "new"), true);
  assertEquals(await outbox.rename("old", "other"), false);
  const heir = await outbox.open({ ...OPTIONS, relay: "new", protocol: "sealed" });
  const { batches } = await heir.seal([], ALL);
  assertEquals(batches.map(({ n, uid, messages }) => [n, n === 1 ? uid : "", messages.map(({ id }) => id)]), [
    [1, first!.uid, first!.messages.map(({ id }) => id)],
    [2, "", ["b1"]],
  ]);
  assertEquals((await outbox.sealed("new")).map(({ settled, batches }) => [settled.n, batches.length]), [[0, 2]]);
  const ring = batches.map(({ n, uid, prev, rows }) => ({ n, uid, prev, rows }));
  assertEquals((await heir.seal(ring, ALL)).batches, []);
  await heir.close(true);
  await later();
  const claims = await outbox.open({ ...OPTIONS, relay: "claims", protocol: "claimed" });
  await refused("claims", "other", "busy", "it runs");
  await enqueue("c1");
  await later();
  await refused("claims", "other", "source_invalid", "its claims are made under its name");
  await refused("new", "claims", "source_invalid", "there is a relay of that name");
  await claims.close(true);
}
