/** The README's tables of permissions: ends and options run with these flags, and with none of them missing. */
import { assertEquals, assertStringIncludes } from "@std/assert";
import { DatabaseSync } from "node:sqlite";
import { join } from "node:path";
import { migrateSqlite, sqliteStore } from "../../adapters/sqlite.ts";
import { type Answer, root, run } from "./install.ts";
import { readmeTable } from "./readme.ts";

const TARGET = "127.0.0.1:8080";
const LISTEN = "127.0.0.1:9464";
const ID = "message-1";

interface Run extends Answer {
  /** Ids that came to the target. */
  readonly delivered: readonly string[];
}

/** Relays one message, with these flags of Deno and of `relay`, in a folder of its own. */
async function relayOne(flags: readonly string[], relay: readonly string[], env: Record<string, string> = {}): Promise<Run> {
  const folder = await Deno.makeTempDir({ prefix: "effectonce-permissions-" });
  const delivered: string[] = [];
  await using server = Deno.serve({ hostname: "127.0.0.1", port: 0, onListen: () => {} }, (request) => {
    delivered.push(request.headers.get("idempotency-key")!);
    return new Response("paid");
  });
  const here = (text: string) => text.replace(TARGET, `127.0.0.1:${server.addr.port}`).replace(LISTEN, "127.0.0.1:0");
  try {
    const db = new DatabaseSync(join(folder, "app.db"));
    await migrateSqlite(db);
    await sqliteStore(db).transaction((effects) => effects.enqueue({ id: ID, topic: "payments", value: 1 }));
    db.close();
    const relays = { relays: { default: { from: "sqlite:app.db?driver=node", to: "stdout:" } } };
    await Deno.writeTextFile(join(folder, "effectonce.json"), JSON.stringify(relays));
    const args = [
      "run",
      "--no-prompt",
      "--quiet",
      ...flags,
      join(root, "cli.ts"),
      "relay",
      ...relay,
      "--drain",
      "--attempts",
      "1",
    ];
    const answer = await run(Deno.execPath(), args.map(here), { cwd: folder, env });
    const file = await Deno.readTextFile(join(folder, "events.jsonl")).catch(() => "");
    if (`${answer.stdout}\n${file}`.includes(`"id":"${ID}"`)) delivered.push(ID);
    return { ...answer, delivered };
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
}

/** A flag without paths stands for all of them, but not beside the same with a path, which narrows it. */
function together(...flags: readonly string[]): readonly string[] {
  return flags.filter((flag) => !flags.includes(flag.split("=")[0]!) || !flag.includes("="));
}

/** The flags of Deno by what needs them, from the README. */
async function table(name: string): Promise<Readonly<Record<string, readonly string[]>>> {
  const code = (cell: string) => cell.replaceAll("`", "");
  const rows = await readmeTable(name);
  return Object.fromEntries(
    rows.map(([what, flags]) => [code(what!), code(flags!).split(" ").filter((flag) => flag !== "")]),
  );
}

const NODE = "sqlite:app.db?driver=node";
const STDOUT = "stdout:";
const HTTP = `http://${TARGET}/charge`;
const FILE = "file:events.jsonl";
const SOURCES = [NODE, "sqlite:app.db"];
const TARGETS = [HTTP, FILE, STDOUT];
const between = (from: string, to: string) => ["--from", from, "--to", to];

/** Runs without each of the flags in turn: the message must stay, and the complaint say why. */
async function allNeeded(t: Deno.TestContext, flags: readonly string[], try_: (missing: string) => Promise<Run>) {
  for (const missing of flags) {
    await t.step(`not without ${missing}`, async () => {
      const { code, stdout, stderr, delivered } = await try_(missing);
      assertEquals([code, delivered], [1, []], stderr);
      assertStringIncludes(stdout + stderr, /^--(allow-\w+)/.exec(missing)![1]!, "the complaint must name the flag");
    });
  }
}

Deno.test("the README's permissions suffice for each pair of ends", async (t) => {
  const ends = await table("permissions");
  assertEquals(Object.keys(ends), [...SOURCES, ...TARGETS]);
  for (const from of SOURCES) {
    for (const to of TARGETS) {
      await t.step(`${from} to ${to}`, async () => {
        const { code, stderr, delivered } = await relayOne(together(...ends[from]!, ...ends[to]!), between(from, to));
        assertEquals([code, delivered], [0, [ID]], stderr);
      });
    }
  }
});

Deno.test("the README's permissions of ends are all needed", async (t) => {
  const ends = await table("permissions");
  for (const [end, flags] of Object.entries(ends)) {
    const [from, to] = SOURCES.includes(end) ? [end, STDOUT] : [NODE, end];
    const both = together(...ends[from]!, ...ends[to]!);
    await t.step(end, async (t) => {
      await allNeeded(t, flags, (missing) => relayOne(both.filter((flag) => flag !== missing), between(from, to)));
    });
  }
});

Deno.test("the README's permissions of options suffice, and are all needed", async (t) => {
  const ends = await table("permissions");
  const options = await table("permissions of options");
  const runs: Readonly<Record<string, readonly [to: string, relay: readonly string[], env?: Record<string, string>]>> = {
    [`--listen ${LISTEN}`]: [STDOUT, [...between(NODE, STDOUT), "--listen", LISTEN]],
    "--config effectonce.json": [STDOUT, ["--config", "effectonce.json"]],
    "--header-to authorization=env:TOKEN": [
      HTTP,
      [...between(NODE, HTTP), "--header-to", "authorization=env:TOKEN"],
      { TOKEN: "secret" },
    ],
  };
  const [variable, ...more] = Object.keys(options).filter((option) => !(option in runs));
  assertEquals([Object.keys(options).length, more], [Object.keys(runs).length + 1, []]);
  for (const [option, [to, relay, env]] of Object.entries(runs)) {
    const flags = [...ends[NODE]!, ...ends[to]!];
    await t.step(option, async (t) => {
      const { code, stderr, delivered } = await relayOne(together(...flags, ...options[option]!), relay, env);
      assertEquals([code, delivered], [0, [ID]], stderr);
      await allNeeded(t, options[option]!, () => relayOne(flags, relay, env));
    });
  }
  await t.step(variable!, async () => {
    const env = { EFFECTONCE_TO: STDOUT };
    const given = await relayOne([...ends[NODE]!, ...options[variable!]!], ["--from", NODE], env);
    assertEquals([given.code, given.delivered], [0, [ID]], given.stderr);
    const ignored = await relayOne(ends[NODE]!, ["--from", NODE], env);
    assertEquals([ignored.code, ignored.delivered], [2, []], ignored.stderr);
  });
});
