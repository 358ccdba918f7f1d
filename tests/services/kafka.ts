/**
 * Real Kafka brokers for tests, benchmarks and demos: KRaft nodes on 127.0.0.1 and free ports. Who only needs a broker asks
 * `./mod.ts`, which shares one between test files; who kills or stops one starts its own here.
 *
 * @module
 */
import { Kafka, logLevel } from "kafkajs";
import { bring, CACHE, type Command, install, type Origin, run, whereIs } from "./install.ts";
import { freePort, type Recipe, serve, type Server } from "./process.ts";
import { dataFolder } from "./servers.ts";

const VERSION = "4.3.1";
const IMAGE = `apache/kafka:${VERSION}`;
/** It comes here whole, by a rename. */
const JARS = `${CACHE}/kafka-${VERSION}-tools`;

const POM = `<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>effectonce</groupId>
  <artifactId>kafka</artifactId>
  <version>1</version>
  <dependencies>
    <dependency>
      <groupId>org.apache.kafka</groupId>
      <artifactId>kafka_2.13</artifactId>
      <version>${VERSION}</version>
    </dependency>
    <dependency>
      <groupId>org.apache.kafka</groupId>
      <artifactId>kafka-tools</artifactId>
      <version>${VERSION}</version>
    </dependency>
  </dependencies>
</project>
`;

async function downloadJars(): Promise<void> {
  const packages = ["default-jre-headless", "maven"];
  if (!whereIs("java") || !whereIs("mvn")) await install(packages);
  const folder = await Deno.makeTempDir({ dir: CACHE, prefix: "kafka-new-" });
  try {
    await Deno.writeTextFile(`${folder}/pom.xml`, POM);
    const goal = "org.apache.maven.plugins:maven-dependency-plugin:3.8.1:copy-dependencies";
    await run(["mvn", "-q", "-B", "-f", `${folder}/pom.xml`, goal, `-DoutputDirectory=${folder}/lib`]);
    await Deno.chmod(folder, 0o755);
    await Deno.rename(folder, JARS);
  } catch (error) {
    await Deno.remove(folder, { recursive: true });
    throw error;
  }
}

const ORIGIN: Origin<string> = {
  what: "Kafka",
  variable: "EFFECTONCE_KAFKA_BROKERS",
  packages: ["default-jre-headless", "maven"],
  image: IMAGE,
  find() {
    try {
      return whereIs("java") && Deno.statSync(`${JARS}/lib`).isDirectory ? `${JARS}/lib/*` : undefined;
    } catch {
      return undefined;
    }
  },
  fetch: downloadJars,
};

/** Where the programs that come with Kafka are: a class path for `java -cp`; for tests that want a client other than ours. */
export async function kafkaClassPath(): Promise<string> {
  const found = await bring({ ...ORIGIN, image: undefined });
  return found!;
}

/** Brokers that run, as one cluster. */
export interface Cluster {
  /** `host:port,host:port`. */
  readonly brokers: string;
  /** The node that is also the controller comes first. Their `url` is `host:port`. */
  readonly nodes: readonly Server[];
  /** Ends them, and removes their data. */
  [Symbol.asyncDispose](): Promise<void>;
}

/** A broker's own settings, such as `transaction.max.timeout.ms`. */
export type BrokerSettings = Readonly<Record<string, string>>;

/** How brokers are started. */
export interface ClusterOptions {
  /**
   * How many.
   *
   * @default {1}
   */
  readonly nodes?: number;
  /** The same for all. */
  readonly settings?: BrokerSettings;
  /** One more listener, for clients that log in: as `SASL_PLAINTEXT` or `SSL`, with settings of its own by short names. */
  readonly client?: { readonly port: number; readonly protocol: string; readonly settings: BrokerSettings };
  /**
   * What clients are told to connect to, by node from 0: a proxy's `host:port`, for one.
   *
   * @default each node itself
   */
  readonly advertised?: (node: number, address: string) => string;
}

async function probe(address: string, nodeId: number): Promise<string> {
  const kafka = new Kafka({
    brokers: [address],
    logLevel: logLevel.NOTHING,
    connectionTimeout: 1000,
    retry: { retries: 0 },
  });
  const admin = kafka.admin();
  await admin.connect();
  try {
    const { brokers } = await admin.describeCluster();
    if (!brokers.some((broker) => broker.nodeId === nodeId)) {
      throw new Error(`broker ${nodeId} has not joined its cluster yet`);
    }
    return VERSION;
  } finally {
    await admin.disconnect();
  }
}

/** What makes a node of a cluster: the settings of `server.properties`. */
function propertiesOf(node: number, ports: readonly number[], controller: number, folder: string, options: ClusterOptions) {
  const copies = String(Math.min(3, ports.length));
  const address = `127.0.0.1:${ports[node]}`;
  const { client } = options;
  const more = client === undefined ? "" : `,CLIENT://127.0.0.1:${client.port}`;
  const own = Object.entries(client?.settings ?? {}).map(([name, value]) => [`listener.name.client.${name}`, value]);
  return {
    "process.roles": node === 0 ? "broker,controller" : "broker",
    "node.id": String(node + 1),
    "controller.quorum.voters": `1@127.0.0.1:${controller}`,
    "listeners": `PLAINTEXT://${address}${more}` + (node === 0 ? `,CONTROLLER://127.0.0.1:${controller}` : ""),
    "advertised.listeners": `PLAINTEXT://${options.advertised?.(node, address) ?? address}${more}`,
    "controller.listener.names": "CONTROLLER",
    "listener.security.protocol.map": `CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,CLIENT:${client?.protocol ?? "PLAINTEXT"}`,
    "inter.broker.listener.name": "PLAINTEXT",
    "log.dirs": `${folder}/data`,
    "auto.create.topics.enable": "false",
    "group.initial.rebalance.delay.ms": "0",
    "offsets.topic.num.partitions": "4",
    "offsets.topic.replication.factor": copies,
    "transaction.state.log.num.partitions": "4",
    "transaction.state.log.replication.factor": copies,
    "transaction.state.log.min.isr": copies === "3" ? "2" : "1",
    "share.coordinator.state.topic.replication.factor": copies,
    "share.coordinator.state.topic.min.isr": "1",
    ...Object.fromEntries(own),
    ...options.settings,
  };
}

/** Starts brokers. */
export async function startKafka(options: ClusterOptions = {}): Promise<Cluster> {
  const { nodes = 1 } = options;
  const classPath = await bring(ORIGIN);
  const ports = Array.from({ length: nodes }, () => freePort());
  const controller = freePort();
  const cluster = new Uint8Array(16);
  crypto.getRandomValues(cluster.subarray(1)); // The first byte is 0: else its text may begin with what looks like an option.
  const clusterId = cluster.toBase64({ alphabet: "base64url", omitPadding: true });
  const recipe = async (node: number): Promise<Recipe> => {
    const address = `127.0.0.1:${ports[node]}`;
    const folder = await dataFolder("kafka");
    const inside = classPath === undefined ? "/var/lib/kafka" : folder;
    const properties = propertiesOf(node, ports, controller, inside, options);
    const common = {
      name: "Kafka",
      url: address,
      folder,
      probe: () => probe(address, node + 1),
      stopSignal: "SIGTERM",
      discardSignal: "SIGKILL",
    } as const;
    if (classPath === undefined) {
      const variables = Object.entries({ CLUSTER_ID: clusterId, ...properties }).flatMap(([name, value]) => [
        "--env",
        `${name === "CLUSTER_ID" ? name : `KAFKA_${name.toUpperCase().replaceAll(".", "_")}`}=${value}`,
      ]);
      const container = folder.slice(folder.lastIndexOf("/") + 1);
      const network = ["--network=host", "--sig-proxy=false"] as const;
      const command: Command = ["docker", "run", "--name", container, ...network, ...variables, IMAGE];
      return { ...common, container, prepare: [["docker", "pull", "--quiet", IMAGE]], command };
    }
    const path = `${folder}/server.properties`;
    await Deno.writeTextFile(path, Object.entries(properties).map(([name, value]) => `${name}=${value}\n`).join(""));
    const java = ["java", "-Xms64m", "-Xmx512m", "-cp", classPath] as const;
    return {
      ...common,
      // As whoever this is: others may not see the downloads.
      prepare: [[...java, "kafka.tools.StorageTool", "format", "-t", clusterId, "-c", path]],
      command: [...java, "kafka.Kafka", path],
    };
  };
  const started: Server[] = [];
  async function dispose(): Promise<void> {
    await Promise.all(started.map((server) => server[Symbol.asyncDispose]()));
  }
  try {
    for (let node = 0; node < nodes; node++) started.push(await serve(await recipe(node)));
  } catch (error) {
    await dispose();
    throw error;
  }
  return { brokers: started.map(({ url }) => url).join(","), nodes: started, [Symbol.asyncDispose]: dispose };
}
