/**
 * The demo: the crash between the payment and the commit, for real. Real processes, SIGKILL, and a ledger on disk.
 *
 * @module
 */
import { openDatabase } from "./open.ts";

/** How to run the demo. */
export interface DemoOptions {
  /** Orders in each run. */
  readonly orders: number;
  /** Print JSON. */
  readonly json: boolean;
  /** Prints. */
  write(text: string): void;
}

/** What a run came to: a count of orders each, but for `kills`. */
export interface Run {
  readonly name: string;
  readonly orders: number;
  readonly chargedOnce: number;
  readonly chargedTwice: number;
  readonly lost: number;
  /** In doubt after the crashes; the demo then asked the payment service. */
  readonly uncertain: number;
  readonly kills: number;
}

/** When the process that charges is killed: at the so-manieth time that the payment service says so. */
const KILLS: readonly (readonly [what: string, times: number])[] = [
  ["charged", 2],
  ["received", 6],
  ["charged", 9],
  ["answered", 13],
  ["charged", 16],
  ["received", 21],
];

/** The lines of a child's stdout. */
export async function* linesOf(child: Deno.ChildProcess): AsyncGenerator<string> {
  let rest = "";
  for await (const text of child.stdout.pipeThrough(new TextDecoderStream())) {
    const lines = (rest + text).split("\n");
    rest = lines.pop()!;
    yield* lines;
  }
}

/** Starts a script of the demo. */
export function start(
  script: string,
  args: readonly string[],
  stdout: "piped" | "null",
  env: Readonly<Record<string, string>> = {},
): Deno.ChildProcess {
  const url = new URL(script, import.meta.url);
  const path = url.protocol === "file:" ? decodeURIComponent(url.pathname) : url.href;
  // deno itself, and not a wrapper: a SIGKILL must hit the process that charges.
  return new Deno.Command(Deno.execPath(), { args: ["run", "-A", "--quiet", path, ...args], stdout, stderr: "null", env })
    .spawn();
}

/** One run: enqueue, start the process that charges, kill and restart it, count the ledger. */
async function run(
  folder: string,
  name: string,
  orders: number,
  mode: "honours" | "ignores",
  charging: (database: string, url: string) => Deno.ChildProcess,
): Promise<Run> {
  await Deno.mkdir(folder);
  const path = `${folder}/app.db`;
  const ledger = `${folder}/ledger.jsonl`;
  const database = await openDatabase("--store", `sqlite:${path}`, { create: true });
  const payments = start("./demo_payments.ts", [ledger, mode], "piped");
  try {
    await database.migrate();
    const names = Array.from({ length: orders }, (_, i) => `order-${i + 1}`);
    const messages = names.map((order) => ({ topic: "order_placed", key: order, value: { order, amount: 5 } }));
    await database.store.transaction((effects) => effects.enqueue(...messages));

    const lines = linesOf(payments);
    const { value: listening } = await lines.next();
    const url = `http://127.0.0.1:${String(listening).split(" ")[1]}`;
    let child = charging(path, `${url}/charges`);
    let kills = 0;
    const seen: Record<string, number> = {};
    const watch = (async () => {
      for await (const line of lines) {
        const what = line.split(" ")[0]!;
        seen[what] = (seen[what] ?? 0) + 1;
        const [when, times] = KILLS[kills] ?? [];
        if (when !== what || seen[what] < times!) continue;
        try {
          child.kill("SIGKILL");
          kills++;
        } catch {
          // It has ended: there is nothing left to charge.
        }
      }
    })();
    while ((await child.status).signal === "SIGKILL") child = charging(path, `${url}/charges`);

    const doubtful = await database.store.list({ state: "uncertain" });
    for (const effect of doubtful) {
      const answer = await fetch(`${url}/charges/${encodeURIComponent(effect.key)}`);
      await answer.body?.cancel();
      await database.store.resolve(effect, { as: answer.ok ? "done" : "absent" });
      await database.outbox({}).release(effect.key);
    }
    if (doubtful.length > 0) await charging(path, `${url}/charges`).status;
    payments.kill("SIGTERM");
    await payments.status;
    await watch;

    const charges = new Map<string, number>();
    for (const line of (await Deno.readTextFile(ledger)).trimEnd().split("\n")) {
      const { order } = JSON.parse(line) as { order: string };
      charges.set(order, (charges.get(order) ?? 0) + 1);
    }
    const times = (n: (count: number) => boolean) => names.filter((order) => n(charges.get(order) ?? 0)).length;
    return {
      name,
      orders,
      chargedOnce: times((n) => n === 1),
      chargedTwice: times((n) => n > 1),
      lost: times((n) => n === 0),
      uncertain: doubtful.length,
      kills,
    };
  } finally {
    await database.close();
    try {
      payments.kill("SIGKILL");
    } catch {
      // It has ended.
    }
  }
}

/** Runs the three ways to charge, side by side; answers the exit code. */
export async function demo({ orders, json, write }: DemoOptions): Promise<number> {
  const folder = await Deno.makeTempDir({ prefix: "effectonce-demo-" });
  const relay = (...more: string[]) => (path: string, url: string) =>
    start("../cli.ts", [
      "relay",
      "--from",
      `sqlite:${path}`,
      "--to",
      url,
      "--drain",
      "--lease-ms",
      "800",
      "--lanes",
      "2",
      ...more,
    ], "null");
  const say = (text: string) => json || write(text);
  try {
    say(`${orders} orders are placed, and a payment service charges them. The process that calls it is killed (kill -9)\n`);
    say(`${KILLS.length} times on its way and restarted: before the charge, after it, and after the answer.\n\n`);
    const runs: Run[] = [];
    const naive = (path: string, url: string) => start("./demo_naive.ts", [path, url], "null");
    const plans = [
      ["naive loop: charge, then mark as done", "ignores", naive],
      ["effectonce, target honours Idempotency-Key", "honours", relay("--idempotent")],
      ["effectonce, target does not", "ignores", relay()],
    ] as const;
    const header = ["orders", "charged once", "charged twice", "lost", "in doubt, then reconciled", "kills"];
    say(`${"".padEnd(44)}${header.join("  ")}\n`);
    for (const [i, [name, mode, charging]] of plans.entries()) {
      const result = await run(`${folder}/${i}`, name, orders, mode, charging);
      runs.push(result);
      const cells = [result.orders, result.chargedOnce, result.chargedTwice, result.lost, result.uncertain, result.kills];
      say(`${name.padEnd(44)}${cells.map((cell, i) => String(cell).padStart(header[i]!.length)).join("  ")}\n`);
    }
    const [bad, ...good] = runs;
    const right = good.every(({ chargedOnce }) => chargedOnce === orders);
    say(
      `\nThe naive loop charged ${
        bad!.chargedTwice
      } customers twice: it died between the payment and its own commit, and on ` +
        `restart could\nnot know. effectonce commits a claim before each call: where the target honours the key it repeats ` +
        `the call safely, where it\ndoes not the order is in doubt, visibly, until the payment service is asked.\n`,
    );
    if (json) write(`${JSON.stringify({ runs })}\n`);
    return right ? 0 : 1;
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
}
