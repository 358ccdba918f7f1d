/** Into Kafka with the package as npm's users get it. */
import { assertEquals } from "@std/assert";
import { join } from "node:path";
import { makeTopic, readTopic } from "../kafka/topics.ts";
import { service } from "../services/mod.ts";
import { installPackage, installTools, programs, root, runWell, versions } from "./install.ts";

const brokers = await service("kafka");

for (const name of ["node22", "bun"] as const) {
  Deno.test(`${name} ${versions[name]} relays into Kafka, exactly once`, async () => {
    const tools = await installTools();
    const project = await installPackage();
    const topic = await makeTopic(brokers);
    const args = ["kafka.mjs", brokers, topic, join(root, "package.json")];
    const { stdout } = await runWell(join(tools, programs[name]), args, { cwd: project });
    assertEquals(JSON.parse(stdout), { delivered: 2, parked: 0, uncertain: 0 });
    const seen = await readTopic(brokers, topic);
    assertEquals(seen.map(({ key, value, headers }) => [key, value, headers["a"]]), [["k", '{"n":1}', undefined], [
      "k",
      "ü",
      "b",
    ]]);
  });
}
