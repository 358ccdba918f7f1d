/**
 * The payment service of the demo: one process, a ledger on disk, a little slow like a real one.
 *
 * Arguments: the ledger's file, and `honours` or `ignores`: what it does with an Idempotency-Key it has seen.
 *
 * @module
 */

if (import.meta.main) {
  const [path, mode] = Deno.args;
  const ledger = await Deno.open(path!, { create: true, append: true });
  const charged = new Map<string, string>();
  const say = (what: string) => console.log(what); // Whoever started the service may act on it.
  const pause = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms));

  const charge = async (request: Request): Promise<Response> => {
    const { order, amount } = await request.json() as { order: string; amount: number };
    const key = request.headers.get("idempotency-key") ?? "";
    say(`received ${order}`);
    await pause(10);
    if (mode === "ignores" || !charged.has(key)) {
      const id = crypto.randomUUID();
      charged.set(key, id);
      await ledger.write(new TextEncoder().encode(JSON.stringify({ id, key, order, amount }) + "\n"));
      await ledger.sync();
    }
    say(`charged ${order}`);
    await pause(20);
    say(`answered ${order}`);
    return Response.json({ id: charged.get(key) });
  };

  Deno.serve({
    hostname: "127.0.0.1",
    port: 0,
    onListen: ({ port }) => say(`listening ${port}`),
    handler(request) {
      const [, , key] = new URL(request.url).pathname.split("/");
      if (request.method === "POST") return charge(request);
      const id = charged.get(decodeURIComponent(key ?? ""));
      return id ? Response.json({ id }) : new Response("no such charge", { status: 404 });
    },
  });
}
