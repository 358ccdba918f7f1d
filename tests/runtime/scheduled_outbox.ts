/** The `outbox.js` that the README's scheduled worker imports: in memory, and with more messages than a deadline allows. */
import type { Source } from "@effectonce/effectonce";
import { memoryOutbox, memoryStore } from "@effectonce/effectonce/memory";

const store = memoryStore();
const deadlines: number[] = [];
let serial = 0;
let events = 0;
const enqueue = () => store.enqueue({ id: `m${serial++}`, topic: "payments", key: `k${serial % 3}`, value: { serial } });

// The first event's deadline is over at its third read, so that no test waits for it.
const { timeout } = AbortSignal;
let early: AbortController; // Made in an event: workerd refuses it before.
AbortSignal.timeout = (ms) => {
  deadlines.push(ms);
  return AbortSignal.any([timeout(ms), early.signal]);
};

/** The outbox never runs dry in the first event. */
export async function openOutbox() {
  const endless = events++ === 0;
  early = new AbortController();
  for (let i = 0; i < 10; i++) await enqueue();
  const outbox = memoryOutbox(store);
  let reads = 0;
  const from: Source = {
    ...outbox,
    async open(options) {
      const session = await outbox.open(options);
      return {
        ...session,
        async read(limits) {
          // More than a relay takes at once.
          while (endless && store.outbox().length < 150) await enqueue();
          if (endless && ++reads === 3) early.abort();
          return await session.read(limits);
        },
      };
    },
  };
  return { from, store };
}

/** What came of the events up to now. */
export function progress(): { readonly deadlines: readonly number[]; readonly enqueued: number; readonly left: number } {
  return { deadlines, enqueued: serial, left: store.outbox().length };
}
