/**
 * Wrong changes of the code, each of which the simulation must notice. They are made in a copy, by text: a mutant whose text
 * is no longer there is an error, not a success.
 *
 * `deno task mutants` writes `docs/mutants.md`.
 *
 * @module
 */
import type { Outcome } from "./main.ts";

/** One wrong change. */
export interface Mutant {
  /** What the code does wrong then. */
  readonly name: string;
  /** The file. */
  readonly file: string;
  /** What stands there, exactly once. */
  readonly from: string;
  /** What stands there then. */
  readonly to: string;
  /** Why nothing comes of it, where that is so. */
  readonly harmless?: string;
  /**
   * Within so many seeds it is to be noticed.
   *
   * @default {LIMIT}
   */
  readonly limit?: number;
}

const core = (name: string, from: string, to: string, harmless?: string): Mutant => {
  return { name, file: "mod.ts", from, to, harmless };
};
const shared = (name: string, from: string, to: string): Mutant => ({ name, file: "adapters/shared.ts", from, to });
const memory = (name: string, from: string, to: string): Mutant => ({ name, file: "adapters/memory.ts", from, to });
const sqlite = (name: string, from: string, to: string): Mutant => ({ name, file: "adapters/sqlite.ts", from, to });
const kafka = (name: string, from: string, to: string, harmless?: string): Mutant => {
  return { name, file: "adapters/kafka.ts", from, to, harmless };
};
const source = (name: string, from: string, to: string, harmless?: string): Mutant => {
  return { name, file: "adapters/kafka_source.ts", from, to, harmless };
};
const shards = (name: string, from: string, to: string): Mutant => ({ name, file: "adapters/shards.ts", from, to });
const file = (name: string, from: string, to: string): Mutant => ({ name, file: "adapters/file.ts", from, to });

/** All of them. */
export const mutants: readonly Mutant[] = [
  // Claims.
  core(
    "a doubt that is to be tried again is forgotten",
    `return { write: { ...base, state: "waiting", attempt: 0 }, answer: undefined };`,
    `return { write: { ...base, state: "waiting", attempt: 0, firstMs: null }, answer: undefined };`,
  ),
  core("a claim takes what another owner holds", `row.state !== "uncertain" && row.untilMs > nowMs`, `false`),
  core(
    "a claim takes what is done",
    `if (row.state === "done") return {`,
    `if (row.state === "done" && row.attempt < 0) return {`,
  ),
  core("a claim takes what was refused", `if (row.state === "rejected") return {`, `if (row.attempt < 0) return {`),
  core("a claim takes what is in doubt", `if (row.state === "uncertain") return { answer: doubtful(row, now) };`, ``),
  core(
    "the fence does not grow with a claim",
    `state: "claimed",
        fence: row.fence + 1,`,
    `state: "claimed",
        fence: row.fence,`,
  ),
  core(
    "an interrupted call is repeated at a target that does not dedupe",
    `row.firstMs === null || repeatWithinMs !== undefined && now - row.firstMs <= repeatWithinMs`,
    `true`,
  ),
  core("a call is repeated after the target has forgotten its key", `now - row.firstMs <= repeatWithinMs`, `true`),
  core("the first attempt's time moves on with each claim", `firstMs: row.firstMs ?? now,`, `firstMs: now,`),
  core("whoever comes late overwrites", `if (row.fence === fence && states.includes(row.state)) {`, `if (true) {`),
  core(
    "whoever comes late overwrites what is not done yet",
    `if (row.fence === fence && states.includes(row.state)) {`,
    `if (states.includes(row.state) && (row.fence === fence || row.state === "claimed")) {`,
  ),
  core("a refusal hides that an earlier attempt may have happened", `as === "rejected" && !row.doubt`, `as === "rejected"`),
  core("a failure that passes hides an earlier doubt", `firstMs: row.doubt ? row.firstMs : null`, `firstMs: null`),
  core("a claim forgets that there was an attempt", `const doubt = row.firstMs !== null;`, `const doubt = false;`),
  core(
    "an unknown outcome counts as a failure that may be tried again",
    `: { ...base, state: "uncertain", untilMs: now };`,
    `: { ...base, state: "waiting", firstMs: null };`,
  ),
  core(
    "what a target has stored under a key is asked for again",
    `generation: row.generation + (sent ? 1 : 0),`,
    `generation: row.generation,`,
  ),
  core(
    "a resolution does not look whether anything has changed",
    `if (fence !== undefined && row.fence !== fence) {`,
    `if (false) {`,
  ),
  core("a lease is cut short by its renewal", `untilMs: Math.max(row.untilMs, now + leaseMs)`, `untilMs: now`),
  // once
  core(
    "once answers before it has recorded",
    `await insist(runtime, () => store.complete(key, fence, result as Json), fewTimes);`,
    `insist(runtime, () => store.complete(key, fence, result as Json), fewTimes).catch(() => {}); return result;`,
  ),
  core("once asks the target before the last request can have arrived", `if (claim.ageMs < settleMs) {`, `if (false) {`),
  core(
    "once takes an error that says nothing for one that may be repeated",
    `const retryMs = known?.afterMs ?? (known || repeatWithinMs !== undefined ? 0 : undefined);`,
    `const retryMs = 0;`,
    "the store remembers the attempt and refuses the next claim: two walls",
  ),
  core(
    "once takes a target that cannot tell for one that says no",
    `if (found.state === "unknown") throw inDoubt("the destination cannot tell");
        try {
          if (found.state === "absent")`,
    `try {
          if (found.state !== "done")`,
  ),
  core(
    "the key of a call changes with each attempt",
    `const idempotencyKeyOf = (generation: number) => generationKey(`,
    `const idempotencyKeyOf = (generation: number) => runtime.now() + generationKey(`,
  ),
  core(
    "a call goes on after its lease",
    `stop.abort(lost("go on with", key, "its lease is about to end"));`,
    ``,
  ),
  core(
    "a lease counts from its answer, not from its question",
    `let endsAt = lease.since + leaseMs;`,
    `let endsAt = runtime.now() + leaseMs;`,
  ),
  // The relay, by calls.
  core(
    "the relay settles before it delivers",
    `    o.emit({ type: "claimed", ...about(message), attempt });
    let result: Json;`,
    `    await settle(message);
    let result: Json;`,
  ),
  core(
    "the relay settles before it has recorded",
    `if (!await complete({ key, fence, result })) return leaseLost(message);`,
    `await settle(message);
    if (!await complete({ key, fence, result })) return leaseLost(message);`,
  ),
  core(
    "the relay does not claim",
    `const answer = await claim({ key: {`,
    `const answer: Claim = repeat === "never" ? { state: "claimed", fence: 1, attempt: 1, generation: 1, request: null } : await claim({ key: {`,
  ),
  core(
    "messages of one key are delivered side by side",
    "const key = message.key === null ? `i${message.id}` : `k${message.key}`;",
    "const key = `i${message.id}`;",
  ),
  core("the rest of a key goes on when its first message is held back", `next === "held" ? Infinity : 1`, `1`),
  core("an answer that was overtaken by a settlement counts", `stale ||= gone.has(message.id) || heldBack.has(key);`, ``),
  core(
    "a parked message is dropped",
    `await park({ message, reason, retryMs: null, ...more });`,
    `await settle(message);`,
  ),
  core(
    "a message that must wait is dropped",
    `await park({ message, reason, retryMs });
    o.emit({ type: "retried"`,
    `await settle(message);
    o.emit({ type: "retried"`,
  ),
  core(
    "the relay repeats after an unknown outcome, whatever the target",
    `&& (known !== undefined || repeat !== "never")`,
    ``,
    "the store remembers the attempt and refuses the next claim: two walls",
  ),
  core(
    "the relay takes an unknown outcome for none",
    `const as = known ? again ? "retryable" : "rejected" : "unknown";`,
    `const as = again ? "retryable" : "rejected";`,
  ),
  core(
    "the relay asks the target before the last request can have arrived",
    `if (claim.ageMs < o.settleMs) {`,
    `if (false) {`,
  ),
  core(
    "the relay takes a target that cannot tell for one that says no",
    `if (found.state === "unknown") return await`,
    `if (found.state === "nothing" as never) return await`,
  ),
  core(
    "the relay asks the target about another attempt's key",
    `const idempotencyKey = generationKey(message.id, claim.generation);`,
    `const idempotencyKey = generationKey(message.id, 1);`,
  ),
  core(
    "the relay believes a target that says yes, and does not record it",
    `const recorded = await complete({ key, fence: claim.fence, result: found.result });`,
    `const recorded = true;`,
  ),
  core("a group of calls gets the answer of its first", `resolve(answers[i]!)`, `resolve(answers[0]!)`),
  core(
    "the relay delivers what another relay has done",
    `case "done":
        return await delivered(message, 0, 0, true);`,
    `case "done":
        return await attempt(message, { state: "claimed", fence: 0, attempt: 1, generation: 1, request: null }, since);`,
  ),
  // The relay, by sealed batches.
  core(
    "a batch whose commit failed counts as committed",
    `if (committed.status === "rejected") {`,
    `if (committed.status === "rejected" && (committed.reason as Error).name === "nothing") {`,
  ),
  core("a handler does not move its position", `await effects.advance(owner, batch);`, ``),
  core(
    "what a sink refused is parked, but its batch stays",
    `await source.unseal(ring, [{ message, reason, retryMs, attempts: attempt }]);`,
    `await source.park([{ message, reason, retryMs }]);`,
  ),
  shared(
    "what was sealed is settled before it is committed",
    `batches.filter((batch) => batch.n <= cursor.n).flatMap((batch) => batch.rows),
      remaining`,
    `batches.flatMap((batch) => batch.rows),
      remaining`,
  ),
  shared(
    "a batch is known by its number alone",
    `shard.sealed >= cursor.n && uidOf(cursor.n) === cursor.uid`,
    `shard.sealed >= cursor.n`,
  ),
  shared(
    "batches that a source forgot are not repaired",
    `settle: [...kept, ...repaired].flatMap((batch) => batch.rows),`,
    `settle: kept.flatMap((batch) => batch.rows),`,
  ),
  shared(
    "a fork is looked for by number alone",
    `while (fork >= shard.settled && uidOf(fork) !== ringUid(fork)) fork--;`,
    ``,
  ),
  shared("an old cursor counts", `if (shard.settled > cursor.n) {`, `if (false) {`),
  shared("a position moves on whatever it is", `if (next.n !== stored.n + 1 || next.prev !== stored.uid) {`, `if (false) {`),
  memory("what is sealed is sealed again", `!except.has(row.seq) &&`, ``),
  memory(
    "unsealing does not settle what was committed",
    `const { settle } = settlePlan(shard(), shard().batches, ring);
            settleRows(settle);`,
    ``,
  ),
  memory("what comes after a parked message is handed out", `held.add(row.key);`, `{}`),
  memory("rows are settled by number alone", `if (memory!.state.outbox.get(Number(seq))?.id === id)`, `if (id)`),
  sqlite(
    "in SQLite, what is sealed is sealed again",
    `const stored = pendingNow(limits, SEALED, [relay]);`,
    `const stored = pendingNow(limits, " and ? <> ''", [relay]);`,
  ),
  sqlite(
    "in SQLite, rows are settled by number alone",
    "remove(`seq = cast(? as integer) and id = ?`, seq, id)",
    "remove(`seq = cast(? as integer) and ? <> ''`, seq, id)",
  ),
  sqlite("what comes after a held message is handed out", `if (row.behind) {`, `if (false) {`),
  sqlite(
    "what was held back is never freed",
    `state = 'blocked' and key = ?\${mine}\${before.join("")} order`,
    `state = 'nothing' and key = ?\${mine}\${before.join("")} order`,
  ),
  // Into Kafka.
  core(
    "a relay goes on with its old session after a commit whose outcome is not known",
    `if (!(error instanceof Error && REFUSED in error)) throw error;`,
    `if (!(error instanceof Error && REFUSED in error)) {
          await runtime.sleep(10);
          sealed = await seal();
          fresh = true;
          continue;
        }`,
  ),
  kafka(
    "a relay reads its cursor before it has shut out the one before",
    `  const transactions = await connection.begin(transactionalId(owner), transactionTimeoutMs);
  const opened = crypto.randomUUID();`,
    `  const early: CursorRecord[] = [];
  for (let at = 0, before = -1; at !== before;) {
    const { records, next } = await connection.read(topic, partition, before = at);
    at = next;
    for (const { value } of records) {
      const record = parseRecord(topic, value);
      if ("uid" in record) early.push(record);
    }
  }
  const transactions = await connection.begin(transactionalId(owner), transactionTimeoutMs);
  const opened = crypto.randomUUID();
  if (opened) {
    const value = encoder.encode(JSON.stringify({ opened, relay, source } satisfies Mark));
    await transactions.send([{ topic, partition, key: MARK, value, headers: [] }]);
    await transactions.commit();
    return { transactions, ring: early };
  }`,
  ),
  kafka(
    "a relay does not wait for its mark",
    `if (next > mark.offset) throw`,
    `if (answer.records.length === 0) return found; if (next > mark.offset) throw`,
  ),
  kafka(
    "the position is committed apart from its records, before them",
    `for (const portion of toSend) {`,
    `const cursor = toSend.at(-1)!.pop()!; await transactions.send([cursor]); await transactions.commit();
      for (const portion of toSend) {`,
  ),
  kafka(
    "the records are committed apart from their position, before it",
    `for (const portion of toSend) {`,
    `const cursor = toSend.at(-1)!.pop()!; toSend.push([cursor]); await transactions.send(toSend.shift()!); await transactions.commit();
      for (const portion of toSend) {`,
  ),
  kafka(
    "every relay has a transactional id of its own",
    "await connection.begin(transactionalId(owner), transactionTimeoutMs);\n  const opened",
    "await connection.begin(`${transactionalId(owner)}-${crypto.randomUUID()}`, transactionTimeoutMs);\n  const opened",
  ),
  // From Kafka.
  source(
    "a relay goes on with what it has read, though its sink is elsewhere",
    `if (i < 0) return await begin(cursor);`,
    `if (i < 0 && !base) return await begin(cursor);`,
  ),
  source(
    "the group's place counts where the sink has one",
    `reader.begin(place ? await behind(place) : await beginning());`,
    `reader.begin(place && !kept ? await behind(place) : await beginning());`,
  ),
  source(
    "the group's place counts whatever record it follows",
    `const isKept = noted?.place?.offset === offset && noted.place.stamp === stamp;`,
    `const isKept = kept !== undefined;`,
  ),
  source(
    "a sink that has lost its position is taken to be where the group is",
    `const isLost = protocol === "sealed" && noted !== undefined && noted.n > 0;`,
    `const isLost = false;`,
  ),
  source(
    "the last record that was taken is taken again",
    `return Math.max(first, looked);`,
    `return Math.max(first, offset);`,
  ),
  source(
    "who knows no place begins at the end",
    `note(partition, first, { n: 0 });
      return first;`,
    `return end;`,
  ),
  source(
    "the group hears of a batch when it is sealed",
    `taken = i;
      return { batch, waitMs };`,
    `taken = i;
      note(partition, offset + 1, { n: batch.n });
      return { batch, waitMs };`,
  ),
  source(
    "the group hears of what was read, not of what was taken",
    `if (reader.records.length > 0 || sealed.length > 0 || reader.next <= (shownUpTo ?? -1)) return;`,
    `if (reader.next <= (shownUpTo ?? -1)) return;`,
  ),
  source(
    "the group keeps the last that is done, whatever is before it",
    `for (; done.delete(reader.records[count]?.offset ?? -1); count++) last = reader.records[count];`,
    `for (; done.size > 0 && count < reader.records.length; count++) if (done.delete(reader.records[count]!.offset)) last = reader.records[count];`,
  ),
  source(
    "what is read for another place counts",
    `if (fetched && reader.next === wanted.get(partition)) reader.add(fetched);`,
    `if (fetched) reader.add(fetched);`,
  ),
  source(
    "what was read before stays when a relay begins elsewhere",
    `this.records = [];
    this.next = offset;`,
    `this.next = offset;`,
  ),
  source("what has not been read yet is taken for nothing", `if (await lacks(taken)) return { waitMs: 0 };`, `check();`),
  source(
    "what comes behind a record that waits is taken before it",
    `waitMs = until - runtime.now();
          break;`,
    `waitMs = until - runtime.now();
          continue;`,
  ),
  source("what comes behind a call that waits is handed out", `if (message.key !== null) held.add(message.key);`, ``),
  source("what was set aside is sealed again", `parked.add(offset);`, ``),
  source(
    "what a sink refused stays in its batch",
    `sealed.length = 0;
        taken = 0;
        for (const park of parks) {`,
    `for (const park of parks) {`,
  ),
  source(
    "what is refused counts as done before it is in the dead-letter topic",
    `if (deadLetter !== undefined) await bury(group, park);
            else if (park.untold) throw noLetters(park);
            await settle([offset]);`,
    `await settle([offset]);
            if (deadLetter !== undefined) await bury(group, park);`,
  ),
  source(
    "what is refused is dropped",
    `if (deadLetter !== undefined) await bury(group, park);
            else if`,
    `if`,
  ),
  source(
    "a place that is noted while others are kept is forgotten",
    `if (dirty.get(partition) === place) dirty.delete(partition);`,
    `dirty.delete(partition);`,
  ),
  source(
    "what could not be kept is kept by the next generation",
    `dirty.clear(); // What could not be kept is another member's by now.`,
    ``,
    "the group's place goes back: what comes again is known by its claim, or by the position in the sink",
  ),
  source(
    "a member joins anew before it has finished what it has in hand",
    `if (running.length > 0) return [];`,
    ``,
  ),
  source(
    "a member does not hear that it has to join anew",
    `over = !await member.beat() || over || await hasGrown(found);`,
    `await member.beat();`,
  ),
  source(
    "a member that has not joined anew goes on in the generation before",
    `over = !await member.beat() || over || await hasGrown(found);`,
    `over = !await member.beat() || await hasGrown(found);`,
  ),
  source("partitions that are added are not found", `return found.count !== before;`, `return false;`),
  source(
    "a member that has lost a partition reads on",
    `if (!assigned?.includes(partition)) throw lost();
      reader.check();`,
    `reader.check();`,
    "its relay is stopped when it says the next time that it is alive; until then the sink or the claims shut it out",
  ),
  source(
    "where a group begins is up to each partition",
    `begun = kept.some((place) => place !== undefined);`,
    `begun = true;`,
  ),
  source(
    "whoever comes first says where a group begins",
    `if (begun || !assigned?.includes(0)) return begun;`,
    `if (begun) return begun;`,
  ),
  source(
    "a drain ends before it is settled where the group begins",
    `assigned === undefined || over || !begun`,
    `assigned === undefined || over`,
  ),
  shards("a relay of a shard that is another's now is not stopped", `if (!mine.includes(shard)) stop.abort();`, ``),
  shards(
    "a shard has two relays",
    `if (running.has(shard) || drained.has(shard) || over()) continue;`,
    `if (drained.has(shard) || over()) continue;`,
  ),
  shards(
    "a relay that was stopped counts as drained",
    `if (drain && !stop.signal.aborted) drained.add(shard);`,
    `if (drain) drained.add(shard);`,
  ),
  shards("a drain does not look for what others have left", `if (!await from.left()) break;`, `break;`),
  file("a torn write stays where it is", `if (!content.spoilt) await cut();`, `end = size;`),
  // A torn write whose position line is whole is rare, and so are files.
  {
    ...file(
      "a batch counts by its position line alone",
      `if (line && last && await verify(last, at)) {`,
      `if (line && last) {`,
    ),
    limit: 40_000,
  },
];

/** What became of one mutant. */
export interface Verdict extends Mutant {
  /** The first seed that noticed it; null if none did. */
  readonly seed: number | null;
  /** What was seen. */
  readonly seen: string;
}

const root = new URL("../../", import.meta.url);

/** Runs the simulation on a copy with one mutant, from seed `from` on, until a seed notices it. */
export async function hunt(mutant: Mutant, from: number, count: number): Promise<Verdict> {
  const folder = await Deno.makeTempDir({ prefix: "effectonce-mutant-" });
  try {
    for (const path of ["mod.ts", "adapters", "tests/simulation"]) await copy(new URL(path, root), `${folder}/${path}`);
    const path = `${folder}/${mutant.file}`;
    const parts = (await Deno.readTextFile(path)).split(mutant.from);
    if (parts.length !== 2) {
      throw new Error(`The mutant "${mutant.name}" does not fit: its text is ${parts.length - 1} times in ${mutant.file}`);
    }
    await Deno.writeTextFile(path, parts.join(mutant.to));
    const outcome = await runSeeds(`${folder}/tests/simulation/main.ts`, from, count);
    return { ...mutant, seed: outcome.failed?.seed ?? null, seen: outcome.failed?.what.split("\n")[0] ?? "" };
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
}

/** Runs seeds in a process of their own. */
export async function runSeeds(main: string, from: number, count: number): Promise<Outcome> {
  const { stdout, stderr } = await new Deno.Command(Deno.execPath(), {
    args: ["run", "-A", "--no-config", "--no-check", main, String(from), String(count)],
    env: { NO_COLOR: "1" },
  }).output();
  const line = new TextDecoder().decode(stdout).trimEnd().split("\n").at(-1)!;
  if (!line.startsWith("{")) throw new Error(`The simulation did not run: ${new TextDecoder().decode(stderr)}`);
  return JSON.parse(line);
}

async function copy(from: URL, to: string): Promise<void> {
  if (!(await Deno.stat(from)).isDirectory) return await Deno.copyFile(from, to);
  await Deno.mkdir(to, { recursive: true });
  for await (const { name } of Deno.readDir(from)) await copy(new URL(`${from}/${name}`), `${to}/${name}`);
}

/** Within so many seeds a mutant is to be noticed. */
export const LIMIT = 10_000;

/** The table of all mutants, in Markdown. */
function table(verdicts: readonly Verdict[]): string {
  const caught = verdicts.filter(({ seed }) => seed !== null);
  const lines = verdicts.map(({ file, name, seed, seen, harmless }) =>
    `| ${name} | \`${file}\` | ${seed ?? "-"} | ${
      seed === null ? `SURVIVES: ${harmless}` : seen.replaceAll("|", "\\|").slice(0, 120)
    } |`
  );
  return `# Mutants

Wrong changes of the code, made one at a time, and how many seeds of the simulation it took until one noticed. Generated by
\`deno task mutants\`; the simulation is \`tests/simulation/\`, the changes themselves are in its \`mutants.ts\`.

${caught.length} of ${verdicts.length} are noticed, in ${LIMIT} seeds or in as many as it took.

| what the code does wrong | in | seeds | what was seen |
| --- | --- | --- | --- |
${lines.join("\n")}
`;
}

/** The seeds of the table that was generated last, by name; null for a mutant that survived. */
export function readTable(text: string): ReadonlyMap<string, number | null> {
  const rows = text.matchAll(/^\| (.+?) +\| `.+?` +\| (\d+|-) +\|/gm);
  return new Map(Array.from(rows, ([, name, seed]) => [name!, seed === "-" ? null : Number(seed)]));
}

if (import.meta.main) {
  const verdicts: Verdict[] = [];
  for (const mutant of mutants) {
    if (!mutant.name.includes(Deno.args[0] ?? "")) continue;
    const verdict = await hunt(mutant, 1, mutant.limit ?? LIMIT);
    verdicts.push(verdict);
    console.log(`${String(verdict.seed ?? "SURVIVES").padStart(8)}  ${mutant.file}: ${mutant.name}  (${verdict.seen})`);
  }
  if (!Deno.args[0]) await Deno.writeTextFile(new URL("docs/mutants.md", root), table(verdicts));
}
