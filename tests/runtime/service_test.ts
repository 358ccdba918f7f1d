/**
 * The README's ways to run a relay as a service, as far as they can be tried without systemd and Docker: their commands are
 * taken from the README and run, on this repository's files in place of those from the registry.
 */
import { assertEquals } from "@std/assert";
import { DatabaseSync } from "node:sqlite";
import { dirname, join } from "node:path";
import { pathToFileURL } from "node:url";
import { migrateSqlite, sqliteStore } from "../../adapters/sqlite.ts";
import { root, runWell } from "./install.ts";
import { readmeCode } from "./readme.ts";

const PACKAGE = "jsr:@effectonce/effectonce@0.1/cli";
const TARGET = "https://pay.example/charge";
const ID = "message-1";

interface Place extends AsyncDisposable {
  /** Where the service runs; it has `app.db`, with one message. */
  readonly folder: string;
  /** The README's text, with this place's names. */
  here(text: string): string;
  /** What a user of the installed package has: no cache and no settings of this repository. */
  readonly env: Readonly<Record<string, string>>;
  /** The idempotency key of the first request. */
  readonly asked: Promise<string>;
}

async function place(): Promise<Place> {
  const folder = await Deno.makeTempDir({ prefix: "effectonce-service-" });
  const source = join(folder, "source");
  // A copy, since this repository's settings put npm's packages beside the files.
  for (const part of ["", "cli", "adapters", "links/cli"]) {
    await Deno.mkdir(join(source, part), { recursive: true });
    for await (const { name } of Deno.readDir(join(root, part))) {
      if (name.endsWith(".ts")) await Deno.copyFile(join(root, part, name), join(source, part, name));
    }
  }
  const parser = pathToFileURL(join(source, "links/cli/parse_args.ts")).href;
  await Deno.writeTextFile(join(source, "deno.json"), JSON.stringify({ imports: { "@std/cli/parse-args": parser } }));

  const db = new DatabaseSync(join(folder, "app.db"));
  await migrateSqlite(db);
  await sqliteStore(db).transaction((effects) => effects.enqueue({ id: ID, topic: "payments", value: { amount: 5 } }));
  db.close();

  const asked = Promise.withResolvers<string>();
  const server = Deno.serve({ hostname: "127.0.0.1", port: 0, onListen: () => {} }, (request) => {
    asked.resolve(request.headers.get("idempotency-key")!);
    return new Response("paid");
  });
  const host = `127.0.0.1:${server.addr.port}`;
  return {
    folder,
    env: { DENO_DIR: join(folder, "deno"), PATH: `${dirname(Deno.execPath())}:${Deno.env.get("PATH")}` },
    asked: asked.promise,
    here: (text) =>
      text.replaceAll(TARGET, `http://${host}/charge`).replaceAll("pay.example", host).replaceAll(
        PACKAGE,
        join(source, "cli.ts"),
      ),
    async [Symbol.asyncDispose]() {
      await server.shutdown();
      await Deno.remove(folder, { recursive: true });
    },
  };
}

/** Starts a relay, and stops it by SIGTERM once its message has come. */
async function serve({ folder, env, asked }: Place, program: string, args: readonly string[]): Promise<void> {
  const signal = AbortSignal.timeout(60_000); // Kills one that neither delivers nor ends.
  const options = { cwd: folder, env: { ...env, NO_COLOR: "1" }, stdin: "null", stdout: "null", signal } as const;
  const child = new Deno.Command(program, { ...options, args: [...args], stderr: "piped" }).spawn();
  const stderr = new Response(child.stderr).text();
  const early = child.status.then(async ({ code }) => `ended with code ${code}: ${await stderr}`);
  const outcome = await Promise.race([asked, early]);
  if (outcome === ID) child.kill("SIGTERM");
  const { code } = await child.status;
  assertEquals([outcome, code], [ID, 0], await stderr);
  const db = new DatabaseSync(join(folder, "app.db"));
  const left = db.prepare("select count(*) as n from effectonce_outbox").get();
  const effect = db.prepare("select key, state from effectonce_effects").get();
  db.close();
  assertEquals([{ ...left }, { ...effect }], [{ n: 0 }, { key: ID, state: "done" }]);
}

/** One line, where the README breaks it by backslashes. */
const lines = (text: string): readonly string[] => text.replaceAll(/\\\n\s*/g, "").split("\n");
const words = (line: string): readonly string[] => line.trim().split(/\s+/);

Deno.test("the README's deno install makes a command that relays and stops at SIGTERM", async () => {
  await using here = await place();
  const [program, ...args] = words(here.here(await readmeCode("service: install")));
  assertEquals([program, args[0]], ["deno", "install"]);
  // From a file it needs the settings beside it; and nothing goes outside of this folder.
  const local = ["--config", join(here.folder, "source/deno.json"), "--root", join(here.folder, "installed")];
  await runWell(Deno.execPath(), ["install", ...local, ...args.slice(1)], { cwd: here.folder, env: here.env });
  const relay = ["relay", "--from", "sqlite:app.db?driver=node", "--to", here.here(TARGET), "--idempotent"];
  await serve(here, join(here.folder, "installed/bin/effectonce"), relay);
});

Deno.test("the README's systemd unit starts a relay that stops at SIGTERM", async () => {
  await using here = await place();
  const unit = lines(here.here(await readmeCode("service: systemd unit")));
  const commands = (name: string) =>
    unit.filter((line) => line.startsWith(`${name}=`)).map((line) => words(line.slice(name.length + 1)));
  const [[before, ...prepare], [start, ...args]] = [commands("ExecStartPre")[0]!, commands("ExecStart")[0]!];
  assertEquals([before, start], ["/usr/local/bin/deno", "/usr/local/bin/deno"]);
  await runWell(Deno.execPath(), prepare, { cwd: here.folder, env: here.env });
  await serve(here, Deno.execPath(), args);
});

Deno.test("the README's Dockerfile caches what its command needs, and that stops at SIGTERM", async () => {
  await using here = await place();
  const file = lines(here.here(await readmeCode("service: Dockerfile")));
  const cache = file.find((line) => line.startsWith("RUN deno cache "))!;
  const command: readonly string[] = JSON.parse(file.find((line) => line.startsWith("CMD "))!.slice("CMD ".length));
  await runWell(Deno.execPath(), words(cache).slice(2), { cwd: here.folder, env: here.env });
  await serve(here, Deno.execPath(), command);
});
