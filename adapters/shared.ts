/**
 * What adapters have in common: the settle-and-repair rule of sealed batches, turns on one connection, guards of a
 * transaction. For authors of stores, sources and sinks.
 *
 * ```ts
 * import { START } from "@effectonce/effectonce";
 * import { settledShard, settlePlan } from "@effectonce/effectonce/adapter";
 * import { deepEqual } from "node:assert/strict";
 *
 * // Nothing was sealed and nothing committed: nothing is to be settled.
 * deepEqual(settlePlan(settledShard(START), [], []).settle, []);
 * ```
 *
 * @module
 */
import {
  EffectError,
  type EffectKey,
  type EffectRows,
  type Position,
  type PruneOptions,
  realRuntime,
  type Runtime,
  START,
} from "../mod.ts";

// ------------------------------------------------------------------------------------------------------------------ prune

/** Old effects of a portion of a store. */
export interface OldEffects {
  /** Their keys. */
  readonly keys: readonly EffectKey[];
  /** The last key that was looked at; undefined if none is behind it. */
  readonly last: EffectKey | undefined;
}

/** What {@linkcode createPrune} needs of a store. */
export interface PruneRows {
  /** Looks at the next `limit` effects behind a key, in order of scope and key, for those to be forgotten. */
  old(after: EffectKey, options: Required<PruneOptions>): Promise<OldEffects>;
  /** Forgets, in one transaction, those that still are to be; answers how many. */
  forget(keys: readonly EffectKey[], options: Required<PruneOptions>): Promise<number>;
}

const FIRST: EffectKey = { scope: "", key: "" };

/**
 * Prunes effects by walking along their keys, a portion at a time: an index by time would cost every claim a page.
 * The next call goes on where the last one stopped.
 */
export function createPrune(rows: PruneRows): EffectRows["prune"] {
  let after = FIRST;
  return async (options) => {
    const isNeeded = async (id: string) => {
      for (const outbox of options.outboxes) {
        const message = await outbox.find(id);
        if (message && message.state !== "delivered") return true;
      }
      return false;
    };
    for (;;) {
      const { keys, last } = await rows.old(after, options);
      const unneeded: EffectKey[] = [];
      for (const key of keys) {
        if (!await isNeeded(key.key)) unneeded.push(key);
      }
      const forgotten = unneeded.length > 0 ? await rows.forget(unneeded, options) : 0;
      if (last) after = last;
      else if (forgotten === 0) after = FIRST;
      if (forgotten > 0 || !last) return forgotten;
      await realRuntime.sleep(0); // Lets timers run.
    }
  };
}

// ---------------------------------------------------------------------------------------------------------------- batches

/** The SHA-256, in hex, of bytes or of a text's UTF-8. */
export async function sha256(of: string | Uint8Array<ArrayBuffer>): Promise<string> {
  const bytes = typeof of === "string" ? new TextEncoder().encode(of) : of;
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** The text whose SHA-256, in hex, is a batch's uid. */
export function chainText(prev: string, rows: Position["rows"]): string {
  return prev + JSON.stringify(rows);
}

/** What a source remembers of the batches it has sealed. */
export interface Shard {
  /** Number of the last batch that was sealed. */
  readonly sealed: number;
  /** Its uid. */
  readonly sealedUid: string;
  /** Number of the last batch whose rows were deleted. */
  readonly settled: number;
  /** Its uid. */
  readonly settledUid: string;
}

/** What a source must do before it seals the next batch. */
export interface SettlePlan {
  /** Rows to delete from the outbox: those of every batch that the sink has committed. */
  readonly settle: Position["rows"];
  /** Batches that stay: sealed, not committed yet. Delete all others. */
  readonly remaining: readonly Position[];
  /** The shard's new row. */
  readonly shard: Shard;
  /** Batches that the sink has and the source had lost: its database went back in time. Empty otherwise. */
  readonly repaired: readonly Position[];
}

/**
 * Compares the batches of the source with those that the sink has committed.
 *
 * @param ring What the sink has committed, oldest first; the last is its cursor.
 * @throws {EffectError} `fenced` if another relay has settled more than the cursor tells: the cursor is old.
 * `diverged` if the database went back in time, further than the ring reaches.
 */
export function settlePlan(shard: Shard, batches: readonly Position[], ring: readonly Position[]): SettlePlan {
  const cursor = ring.at(-1) ?? START;
  if (shard.settled > cursor.n) {
    throw new EffectError(
      "fenced",
      `Another relay is ahead: it has settled batch ${shard.settled} of ${cursor.n} known here`,
    );
  }
  const uidOf = (n: number) => n === shard.settled ? shard.settledUid : batches.find((batch) => batch.n === n)?.uid;
  const settled = { settled: cursor.n, settledUid: cursor.uid };
  if (shard.sealed >= cursor.n && uidOf(cursor.n) === cursor.uid) {
    return {
      settle: batches.filter((batch) => batch.n <= cursor.n).flatMap((batch) => batch.rows),
      remaining: batches.filter((batch) => batch.n > cursor.n),
      shard: { ...shard, ...settled },
      repaired: [],
    };
  }
  // A number does not identify a batch: after a failover another one may carry it. The uid does.
  let fork = Math.min(shard.sealed, cursor.n);
  const ringUid = (n: number) => n === 0 ? "" : ring.find((position) => position.n === n)?.uid;
  while (fork >= shard.settled && uidOf(fork) !== ringUid(fork)) fork--;
  const repaired = ring.filter((position) => position.n > fork);
  if (fork < shard.settled || repaired.length !== cursor.n - fork) {
    throw new EffectError(
      "diverged",
      `The source has lost batches that were delivered: it knows ${shard.settled} to ${shard.sealed}, the sink has ` +
        `${cursor.n}, and the last ${ring.length} that the sink remembers do not reach back to where they agree. ` +
        `Was the database restored from a backup? Rows up to that batch may be in the sink already`,
    );
  }
  const kept = batches.filter((batch) => batch.n <= fork);
  return {
    settle: [...kept, ...repaired].flatMap((batch) => batch.rows),
    remaining: [],
    shard: { sealed: cursor.n, sealedUid: cursor.uid, ...settled },
    repaired,
  };
}

/** A shard in which all that was sealed is settled, up to this position. */
export function settledShard({ n, uid }: Position): Shard {
  return { sealed: n, sealedUid: uid, settled: n, settledUid: uid };
}

/**
 * Compares the stored position with a batch.
 *
 * @throws {EffectError} `fenced` if the batch does not come next.
 */
export function checkAdvance(stored: Position = START, next: Position): void {
  if (next.n !== stored.n + 1 || next.prev !== stored.uid) {
    throw new EffectError(
      "fenced",
      `Cannot commit batch ${next.n}: the last one committed is ${stored.n}, of another owner`,
    );
  }
}

// ----------------------------------------------------------------------------------------------------------- transactions

/**
 * Runs on one connection one after the other what must not mix on it. A turn that does not come within
 * `waitMs` is the error `busy`, which also ends the deadlock of a transaction that waits for itself.
 */
export function createTurns(name: string, runtime: Runtime = realRuntime): Turns {
  let last: Promise<void> = Promise.resolve();
  let taken = 0;
  return async (waitMs, run) => {
    const before = last;
    let done!: () => void;
    const mine = new Promise<void>((resolve) => done = resolve);
    last = before.then(() => mine);
    try {
      if (taken++ > 0) {
        const over = new AbortController();
        const late = runtime.sleep(waitMs, over.signal).then(() => !over.signal.aborted);
        const tooLate = await Promise.race([before.then(() => false), late]);
        over.abort();
        if (tooLate) {
          throw new EffectError(
            "busy",
            `${name} has been in a transaction for ${waitMs} ms: inside one, use its own handle, not the store`,
          );
        }
      }
      return await run();
    } finally {
      taken--;
      done();
    }
  };
}

/** See {@linkcode createTurns}. */
export type Turns = <T>(waitMs: number, run: () => T | Promise<T>) => Promise<T>;

/** Remembers the first failure of a transaction's handle. */
export interface TransactionGuard {
  /** Runs one of the handle's calls. */
  run<T>(call: () => T | Promise<T>): Promise<T>;
  /** Throws the first failure: a transaction in which a call failed must not commit, even if the error was caught. */
  check(): void;
}

/** See {@linkcode TransactionGuard}. */
export function createGuard(): TransactionGuard {
  let failure: { readonly error: unknown } | undefined;
  return {
    async run(call) {
      try {
        return await call();
      } catch (error) {
        failure ??= { error };
        throw error;
      }
    },
    check() {
      if (failure) throw failure.error;
    },
  };
}

/** The error of enqueueing an id for a second time. */
export function alreadyEnqueued(id: string): RangeError {
  return new RangeError(`Cannot enqueue "${id}": this id is in the outbox already`);
}

/** The error of completing what was not claimed in the same transaction. */
export function notClaimed({ scope, key }: EffectKey): RangeError {
  return new RangeError(`Cannot complete effect "${key}" of "${scope}": this transaction has not claimed it`);
}

/** The error of a second relay, of another name, on the same topics. */
export function overlapping(from: string, other: string, name: string, topics: readonly string[] | undefined): EffectError {
  const what = topics ? `topics ${topics.join(", ")}` : "all topics";
  return new EffectError(
    "source_invalid",
    `Cannot relay ${what} of ${from} as "${name}": relay "${other}" has them, or left something behind. Use its name`,
  );
}

/** A relay that has another name now; `moved`: in its sink as well. */
export interface Renamed {
  /** Its old name. */
  readonly from: string;
  /** Its new one. */
  readonly to: string;
  /** Whether its sink knows it by that. */
  readonly moved: boolean;
}

/** Under which name of the table of versions and identity it is kept that a relay was renamed. */
export async function renamedName(relay: string): Promise<string> {
  return `renamed:${(await sha256(relay)).slice(0, 32)}`;
}

/**
 * Whether a relay may have this name.
 *
 * @throws {EffectError} `source_invalid` if it was given up, or is not there yet.
 */
export function checkRenamed(source: string, relay: string, all: readonly Renamed[]): void {
  const gone = all.find(({ from }) => from === relay);
  if (gone) {
    throw new EffectError("source_invalid", `Relay "${relay}" of ${source} is called "${gone.to}" now: use that name`);
  }
  const half = all.find(({ to, moved }) => to === relay && !moved);
  if (!half) return;
  const how = `is just being renamed from "${half.from}". If that has failed, do it again`;
  throw new EffectError("source_invalid", `Relay "${relay}" of ${source} ${how}`);
}

/** What is known when a relay is to be renamed. */
export interface RenameState {
  /** How it is registered. */
  readonly theirs: readonly { readonly protocol: string; readonly live: boolean }[];
  /** Which relays were renamed. */
  readonly renamed: readonly Renamed[];
  /** Whether a relay has sealed anything. */
  isKnown(relay: string): boolean;
}

/**
 * What is to be done to rename a relay: all of it, the move in its sink alone, or nothing, where it was done before; undefined if
 * there is nothing of it.
 *
 * @throws {EffectError} As `Outbox.rename` says.
 */
export function renamePlan(
  source: string,
  [relay, name]: readonly [relay: string, name: string],
  { theirs, renamed, isKnown }: RenameState,
): "all" | "move" | "nothing" | undefined {
  const not = `Cannot rename relay "${relay}" of ${source} to "${name}"`;
  const before = renamed.find(({ from }) => from === relay);
  if (before && before.to !== name) throw new EffectError("source_invalid", `${not}: it is called "${before.to}" now`);
  if (before) return before.moved ? "nothing" : "move";
  if (theirs.some(({ live }) => live)) {
    throw new EffectError("busy", `${not}: it runs, or has died and is waited for. Stop it first`);
  }
  if (theirs.some(({ protocol }) => protocol === "claimed")) {
    throw new EffectError("source_invalid", `${not}: its claims are made under its name, and would be made again`);
  }
  if (isKnown(name)) throw new EffectError("source_invalid", `${not}: there is a relay of that name`);
  return isKnown(relay) ? "all" : undefined;
}

/** Which messages of an outbox a source hands out. */
export interface OutboxOptions {
  /**
   * Only these topics.
   *
   * @default {undefined} All.
   */
  readonly topics?: readonly string[];
}
