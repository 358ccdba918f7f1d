/** What runs in workerd: the suites, and SQLite in a Durable Object as far as it goes. */
import { migrateSqlite, type SqliteClient, type SqliteValue } from "@effectonce/effectonce/sqlite";
import { runCore } from "./suite.ts";

/** What of a Durable Object's storage is used here: https://developers.cloudflare.com/durable-objects/api/sqlite-storage-api/ */
interface Storage {
  readonly sql: { exec(sql: string, ...values: readonly unknown[]): { toArray(): unknown[] } };
  transactionSync<T>(run: () => T): T;
}

/** The type fits by these few lines; the SQL that the adapter needs does not. */
function clientOf({ sql }: Storage): SqliteClient {
  return {
    prepare(text) {
      const all = (...values: SqliteValue[]) => sql.exec(text, ...values).toArray();
      return { run: all, all, get: (...values: SqliteValue[]) => all(...values)[0], iterate: all };
    },
  };
}

function messageOf(run: () => unknown): string {
  try {
    run();
    return "no error";
  } catch (error) {
    return (error as Error).message;
  }
}

/** A Durable Object with SQLite. */
export class SqliteObject {
  readonly #storage: Storage;

  constructor({ storage }: { readonly storage: Storage }) {
    this.#storage = storage;
  }

  /** Answers with what the adapter's first statements come to. */
  async fetch(): Promise<Response> {
    const client = clientOf(this.#storage);
    const statements = [
      "begin",
      "begin immediate",
      "commit",
      "rollback",
      "pragma busy_timeout",
      "pragma synchronous = full",
    ];
    const errors = statements.map((sql) => [sql, messageOf(() => client.prepare(sql).run())]);
    const migration = await migrateSqlite(client).then(() => "no error", (error: Error) => error.message);
    // What there is instead: it takes a function, so no statement of its own can stand for it.
    this.#storage.sql.exec("create table seen (n integer)");
    messageOf(() =>
      this.#storage.transactionSync(() => {
        this.#storage.sql.exec("insert into seen values (1)");
        throw new Error("rolled back");
      })
    );
    const [count] = this.#storage.sql.exec("select count(*) as n from seen").toArray();
    return Response.json({ errors: Object.fromEntries(errors), migration, count });
  }
}

interface Env {
  readonly OBJECT: { idFromName(name: string): unknown; get(id: unknown): { fetch(request: Request): Promise<Response> } };
}

export default {
  async fetch(request: Request, env: Env): Promise<Response> {
    const { pathname, searchParams } = new URL(request.url);
    if (pathname === "/object") return await env.OBJECT.get(env.OBJECT.idFromName("a")).fetch(request);
    return Response.json(await runCore(searchParams.get("target")!));
  },
};
