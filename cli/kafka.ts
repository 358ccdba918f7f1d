/**
 * Opens Kafka, by kafkajs.
 *
 * @module
 */
import { Buffer } from "node:buffer";
import process from "node:process";
import { promisify } from "node:util";
import { zstdDecompress } from "node:zlib";
import type { AtomicSink, CallSink, PositionOwner } from "../mod.ts";
import { kafkaCursorPlace, kafkaPlainSink, kafkaSink, type Transform } from "../adapters/kafka.ts";
import type { KafkaSourceClient, KafkaSourceConnection } from "../adapters/kafka_source.ts";
import { kafkajs, type KafkajsKafka } from "../adapters/kafkajs.ts";
import type { Check } from "./database.ts";
import { codeOf, reason, UsageError } from "./errors.ts";
import { need } from "./permissions.ts";
import { check, CONNECT_MS, tlsOf } from "./server.ts";
import { choice, numberOf, onlyParameters, parts, type UrlParts } from "./url.ts";
import { dereference } from "./variables.ts";

/** A URL of Kafka, read. */
export interface KafkaUrl {
  /** For people: without user, password and parameters. */
  readonly name: string;
  /** `host:port`. */
  readonly brokers: readonly string[];
  readonly topic: string | undefined;
  /** Whether records and the relay's position are one transaction. */
  readonly transactions: boolean;
  readonly client: KafkaSourceClient;
  /** kafkajs itself, with what the URL says. */
  kafka(): Promise<Kafkajs>;
  readonly cursorTopic: string | undefined;
  readonly copies: number | undefined;
  readonly minInsyncReplicas: number | undefined;
  readonly transactionTimeoutMs: number | undefined;
}

const EXAMPLE = "kafka://host:9092, kafka://host:9092,host2:9092 or kafka://host:9092/topic";
const PORT = 9092;
const LOGIN = ["sasl", "user", "password", "sslmode", "sslrootcert"];
const PARAMETERS = ["transactions", "cursor", "copies", "min-insync", "transaction-timeout-ms", ...LOGIN];
const MECHANISMS = ["plain", "scram-sha-256", "scram-sha-512"] as const;

function brokersOf(label: string, authority: string): readonly string[] {
  return authority.split(",").map((text) => {
    const read = URL.parse(`server://${text}`);
    if (!read || read.hostname === "" || read.pathname !== "") throw new UsageError(`${label}: write ${EXAMPLE}`);
    if (read.hostname.startsWith("[")) {
      throw new UsageError(`${label}: kafkajs knows no IPv6 addresses: give the broker a name`);
    }
    return `${read.hostname}:${read.port || PORT}`;
  });
}

interface Login {
  readonly mechanism: (typeof MECHANISMS)[number];
  readonly username: string;
  readonly password: string;
}

function loginOf(label: string, read: UrlParts, credentials: string | undefined): Login | undefined {
  const { parameters } = read;
  const [user, password] = credentials === undefined
    ? ["user", "password"].map((name) => {
      const text = parameters.get(name);
      return text === null ? undefined : dereference(`${label}: ${name}`, text);
    })
    : credentials.split(/:(.*)/s).map((text) => {
      try {
        return decodeURIComponent(text);
      } catch {
        throw new UsageError(`${label}: a % must be followed by two hexadecimal digits; one that stands for itself is %25`);
      }
    });
  const mechanism = choice(label, read, "sasl", MECHANISMS);
  if (mechanism === undefined && user === undefined && password === undefined) return undefined;
  if (!user || !password) {
    throw new UsageError(
      `${label}: to log in it needs user and password: kafka://user:password@host:9092, or as parameters`,
    );
  }
  return { mechanism: mechanism ?? "plain", username: user, password };
}

/** Where a cluster is, and how to log in. */
interface ClusterUrl extends Pick<KafkaUrl, "name" | "brokers" | "topic" | "client" | "kafka"> {
  readonly read: UrlParts;
}

function readCluster(label: string, url: string, known: readonly string[]): ClusterUrl {
  const read = parts(label, url);
  onlyParameters(label, read, known);
  const { rest, parameters } = read;
  const coded = "in user and password the characters / ? # @ : , % must be written as %2F %3F %23 %40 %3A %2C %25";
  const [, credentials, authority, path = ""] = /^\/\/(?:([^@/]*)@)?([^@/]+)(?:\/([^/]*))?$/.exec(rest) ?? [];
  // A slash in a password would make a path of its end: no topic has an @ in its name.
  if (authority === undefined || path.includes("@")) {
    throw new UsageError(`${label}: write ${EXAMPLE}${rest.includes("@") ? `; ${coded}` : ""}`);
  }
  if (credentials !== undefined && (parameters.has("user") || parameters.has("password"))) {
    throw new UsageError(`${label}: user and password are given twice`);
  }
  const brokers = brokersOf(label, authority);
  let topic: string;
  try {
    topic = decodeURIComponent(path);
  } catch {
    throw new UsageError(`${label}: the topic has a % that is not followed by two hexadecimal digits`);
  }
  const tls = tlsOf(label, read);
  const sasl = loginOf(label, read, credentials);
  const kafka = () => {
    const ssl = tls && {
      ...{ rejectUnauthorized: tls.verify, ca: tls.ca },
      ...tls.verify ? {} : { checkServerIdentity: () => undefined },
    };
    return loadKafka(brokers, { ssl, sasl });
  };
  return {
    name: `kafka://${brokers.join(",")}${topic && `/${topic}`}`,
    brokers,
    topic: topic || undefined,
    client: { open: async () => await connect(await kafka(), brokers) },
    kafka,
    read,
  };
}

/** Reads the URL of Kafka as a target. */
export function readKafka(label: string, url: string): KafkaUrl {
  const { read, ...cluster } = readCluster(label, url, PARAMETERS);
  const { parameters } = read;
  const transactions = choice(label, read, "transactions", ["on", "off"]) !== "off";
  const own = ["cursor", "copies", "min-insync", "transaction-timeout-ms"].find((name) => parameters.has(name));
  if (!transactions && own !== undefined) throw new UsageError(`${label}: ${own} is of transactions, and they are off`);
  return {
    ...cluster,
    transactions,
    cursorTopic: parameters.get("cursor") || undefined,
    copies: numberOf(label, read, "copies", 1, 32_767),
    minInsyncReplicas: numberOf(label, read, "min-insync", 1, 32_767),
    transactionTimeoutMs: numberOf(label, read, "transaction-timeout-ms", 1_000, 900_000),
  };
}

/** A topic that is read, by a consumer group. */
export interface KafkaFrom extends Pick<KafkaUrl, "name" | "brokers" | "client"> {
  readonly topic: string;
  readonly group: string;
  readonly start: "earliest" | "latest" | undefined;
  readonly deadLetter: string | undefined;
}

/** Reads the URL of Kafka as a source. */
export function readKafkaFrom(label: string, url: string): KafkaFrom {
  const known = ["group", "start", "dead-letter", ...LOGIN];
  const { read, name, brokers, topic, client } = readCluster(label, url, known);
  const group = read.parameters.get("group") ?? "";
  const example = "kafka://host:9092/orders?group=billing";
  if (topic === undefined) throw new UsageError(`${label}: it names no topic to read: write ${example}`);
  if (group === "") throw new UsageError(`${label}: it names no consumer group: write ${example}`);
  const start = choice(label, read, "start", ["earliest", "latest"]);
  if (read.parameters.get("dead-letter") === topic) {
    throw new UsageError(`${label}: the dead-letter topic is the one that is read: name another`);
  }
  return { name, brokers, client, topic, group, start, deadLetter: read.parameters.get("dead-letter") || undefined };
}

/** Says in words why there is no connection. */
async function connect(kafka: KafkajsKafka, brokers: readonly string[]): Promise<KafkaSourceConnection> {
  try {
    return await kafkajs(kafka).open();
  } catch (error) {
    if (codeOf(error) !== undefined) throw error;
    const where = brokers.join(" or ");
    throw new Error(`no broker can be reached at ${where}: ${reason(error).replace(/^Connection error: /, "")}`, {
      cause: error,
    });
  }
}

let quiet = false;

/** kafkajs' own client, as far as the demo uses it. */
interface Kafkajs extends KafkajsKafka {
  admin(): {
    connect(): Promise<void>;
    disconnect(): Promise<void>;
    listTopics(): Promise<string[]>;
    deleteTopics(options: { topics: string[] }): Promise<void>;
  };
  producer(options: { idempotent: boolean; createPartitioner: () => () => number }): {
    connect(): Promise<void>;
    send(options: {
      topic: string;
      messages: { key: string; value: string; headers: Record<string, string> }[];
    }): Promise<unknown>;
  };
}

interface Codec {
  compress(encoder: unknown): Promise<Uint8Array>;
  decompress(bytes: Uint8Array): Promise<Uint8Array>;
}

/** Nothing is written compressed here. */
const reader = (decompress: Codec["decompress"]) => (): Codec => ({
  compress: () => Promise.reject(new Error("effectonce does not compress")),
  decompress,
});
/**
 * What kafkajs cannot read by itself, by the protocol's numbers of compressions. Their packages are loaded, and installed, by those
 * who meet such records.
 */
const CODECS: Readonly<Record<number, () => Codec>> = {
  2: reader(async (bytes) => {
    const specifier = "npm:kafkajs-snappy@^1.1.0";
    const { default: codec } = await import(specifier) as { default: () => Codec };
    return await codec().decompress(bytes);
  }),
  3: reader(async (bytes) => {
    const specifier = "npm:lz4js@^0.2.0";
    const { default: lz4 } = await import(specifier) as { default: { decompress(bytes: Uint8Array): Uint8Array } };
    return Buffer.from(lz4.decompress(bytes));
  }),
  4: reader((bytes) => promisify(zstdDecompress)(bytes)),
};

/** Loads kafkajs, and makes a client. */
async function loadKafka(brokers: readonly string[], options: object = {}): Promise<Kafkajs> {
  if (!quiet) {
    quiet = true;
    // kafkajs asks for timers that lie in the past (its requestQueue), about which Deno and Node warn.
    const emit = process.emitWarning;
    process.emitWarning = ((...args: unknown[]) => {
      const [warning] = args as readonly { readonly name?: unknown; readonly type?: unknown }[];
      // Who writes on a connection that is not there yet, waits for it.
      const waits = warning?.name === "MaxListenersExceededWarning" && warning.type === "connect";
      if (!waits && !args.includes("TimeoutNegativeWarning")) Reflect.apply(emit, process, args);
    }) as typeof emit;
  }
  const specifier = "npm:kafkajs@^2.2.4"; // Computed, so that only its users install it.
  const { Kafka, CompressionCodecs } = await import(specifier) as {
    Kafka: new (options: unknown) => Kafkajs;
    CompressionCodecs: Record<number, () => Codec>;
  };
  Object.assign(CompressionCodecs, CODECS);
  return new Kafka({
    clientId: "effectonce",
    brokers,
    connectionTimeout: CONNECT_MS,
    retry: { initialRetryTime: 100, retries: 2 },
    logLevel: 0, // It says on stderr what it throws as well.
    ...options,
  });
}

/** Makes the sink of a relay. */
export function openKafkaSink(
  label: string,
  url: string,
  createTopics: boolean,
  transform?: Transform,
): AtomicSink | CallSink {
  const { name, topic, transactions, client, ...cursor } = readKafka(label, url);
  const options = { name, topic, createTopics, ...transform && { transform } };
  return transactions ? kafkaSink(client, { ...options, ...cursor }) : kafkaPlainSink(client, options);
}

/** What `doctor` finds of a relay's brokers and of its position. */
export async function checkKafka(
  kafka: KafkaUrl,
  owners: readonly PositionOwner[],
  leaseMs: number,
): Promise<readonly Check[]> {
  const { name, client, transactions, transactionTimeoutMs = 30_000 } = kafka;
  const connection = await client.open();
  try {
    const brokers = await connection.brokers();
    const version = await connection.version();
    const able = `${brokers} broker${brokers === 1 ? "" : "s"}, whose protocol is that of Kafka ${version} or younger`;
    const checks = [check(`${name} is a cluster that effectonce knows`, able, Number.parseFloat(version) >= 2.1)];
    if (!transactions) return checks;
    const what = `a transaction may take ${transactionTimeoutMs} ms, a silent relay's lease ${leaseMs} ms`;
    const late = transactionTimeoutMs < leaseMs / 3 ? ": one that is slow loses its transaction before its lease" : "";
    checks.push(check(`${name} ends what a dead relay has left open`, what + late, late === ""));
    for (const owner of owners) {
      const { topic, partition } = await kafkaCursorPlace(owner, kafka);
      const which = `${name} keeps the position of ${
        owner.shard && owner.shard.count > 1 ? `shard ${owner.shard.index}` : "the relay"
      }`;
      if (await connection.partitions(topic) <= partition) {
        const copies = kafka.copies ?? Math.min(3, brokers);
        checks.push(
          check(
            which,
            `${topic} will be created, with ${copies} cop${copies === 1 ? "y" : "ies"}`,
            copies > 1 || brokers === 1,
          ),
        );
        continue;
      }
      const copies = await connection.copies(topic, partition);
      const policy = await connection.setting(topic, "cleanup.policy") ?? "not to be seen by this user";
      const inSync = await connection.setting(topic, "min.insync.replicas") ?? "?";
      const unclean = await connection.setting(topic, "unclean.leader.election.enable");
      const settings = `cleanup.policy = ${policy}, copies = ${copies}, min.insync.replicas = ${inSync}`;
      const lossy = unclean === "true" ? ", unclean.leader.election.enable = true" : "";
      const safe = !policy.includes("delete") && lossy === "" &&
        (brokers === 1 || copies > 1 && Number(inSync) > 1 || brokers < 3 && copies > 1);
      const alone = copies === 1 ? ": it is lost with its one broker" : "";
      checks.push(check(which, `${topic}: ${settings}${lossy}${alone}`, safe));
    }
    return checks;
  } finally {
    await connection.close();
  }
}

/** What kafkajs reads, whatever it is told. */
const VARIABLES = [
  ...["NODE_ENV", "KAFKAJS_LOG_LEVEL", "KAFKAJS_DEBUG_PROTOCOL_BUFFERS", "KAFKAJS_DEBUG_EXTENDED_PROTOCOL_BUFFERS"],
];

/** Makes sure that a relay may reach its brokers: those that it is told of, as the others are not known yet. */
export function permitKafka(label: string, { brokers }: Pick<KafkaUrl, "brokers">): void {
  const net = brokers.map((host) => ({ name: "net", host }) as const);
  need(label, ...net, ...VARIABLES.map((variable) => ({ name: "env", variable }) as const));
}
