/** Into Kafka and out of it with the package as npm's users get it. */
import { assertEquals } from "@std/assert";
import { join } from "node:path";
import { makeTopic, readTopic } from "../kafka/topics.ts";
import { service } from "../services/mod.ts";
import { installPackage, installTools, programs, root, runWell, versions } from "./install.ts";

const brokers = await service("kafka");

for (const name of ["node22", "bun"] as const) {
  Deno.test(`${name} ${versions[name]} relays into Kafka and out of it, exactly once`, async () => {
    const tools = await installTools();
    const project = await installPackage();
    const [topic, other] = [await makeTopic(brokers), await makeTopic(brokers)];
    const args = ["kafka.mjs", brokers, topic, other, join(root, "package.json")];
    const { stdout } = await runWell(join(tools, programs[name]), args, { cwd: project });
    const report = { delivered: 2, parked: 0, uncertain: 0 };
    assertEquals(JSON.parse(stdout), { report, handled: ['{"n":1}', "ü"] });
    for (const read of [topic, other]) {
      const seen = await readTopic(brokers, read);
      const found = seen.map(({ key, value, headers }) => [key, value, headers["a"]]);
      assertEquals(found, [["k", '{"n":1}', undefined], ["k", "ü", "b"]]);
    }
  });
}
