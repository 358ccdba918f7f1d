// @ts-nocheck
import pg from "pg";
import mysql from "mysql2/promise";
export async function database(kind: string): Promise<{ url: string; [Symbol.asyncDispose](): Promise<void> }> {
  const name = "t_" + crypto.randomUUID().replaceAll("-", "").slice(0, 16);
  const env = Deno.env.get(`EFFECTONCE_${kind.toUpperCase()}_URL`)!;
  const url = new URL(env);
  url.pathname = "/" + name;
  async function admin(sql: string) {
    if (kind === "postgres") {
      const c = new pg.Client({ connectionString: env });
      await c.connect();
      try {
        await c.query(sql);
      } finally {
        await c.end();
      }
    } else {
      const c = await mysql.createConnection(env);
      try {
        await c.query(sql);
      } finally {
        await c.end();
      }
    }
  }
  await admin(
    kind === "postgres" ? `create database ${name} template template0 encoding 'UTF8'` : `create database ${name}`,
  );
  return {
    url: url.href,
    [Symbol.asyncDispose]: () => admin(kind === "postgres" ? `drop database ${name} with (force)` : `drop database ${name}`),
  };
}
