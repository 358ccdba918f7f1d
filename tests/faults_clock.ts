/**
 * Runs before the command line in a test: its wall clock is wrong by as many milliseconds as a file says, whenever it is asked.
 *
 * @module
 */
const path = Deno.env.get("FAULTS_CLOCK")!;
const now = Date.now;
Date.now = () => now() + Number(Deno.readTextFileSync(path));
