/** The README's worker, with a page that tells how far it came. */
// @ts-ignore The test writes both files beside this one; the first is from the README.
import example from "./example.ts";
// @ts-ignore See above.
import { progress } from "./outbox.ts";

export default { scheduled: example.scheduled, fetch: () => Response.json(progress()) };
