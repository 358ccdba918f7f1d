/** A broker whose connections break where a test wants them to, and clients that do not wait long for it. */
import { Kafka, logLevel } from "kafkajs";
import type { KafkaSourceClient } from "@effectonce/effectonce/kafka-source";
import { kafkajs } from "@effectonce/effectonce/kafkajs";
import { type ClusterOptions, startKafka } from "../services/kafka.ts";
import { type Direction, type Proxy, startProxy, type Verdict } from "../services/proxy.ts";

/** A client whose requests are given up soon, so that a test need not wait for half a minute. */
export const clientOf = (brokers: string, requestTimeout = 1_000): KafkaSourceClient =>
  kafkajs(
    new Kafka({
      ...{ brokers: brokers.split(","), logLevel: logLevel.NOTHING, requestTimeout, connectionTimeout: 1_000 },
      retry: { initialRetryTime: 50, retries: 3 },
    }),
  );

/** Which request a chunk begins with. */
const requestOf = (bytes: Uint8Array): number | undefined =>
  bytes.length >= 8 ? new DataView(bytes.buffer, bytes.byteOffset).getInt16(4) : undefined;

/** Sees which request a chunk begins with. */
export type Observe = (direction: Direction, request: number | undefined, connection: number, bytes: Uint8Array) => Verdict;

/** A broker, and a proxy in front of it that clients are sent to. */
export interface Proxied extends AsyncDisposable {
  readonly brokers: string;
  readonly proxy: Proxy;
  /** Has another one look at what goes through. */
  watch(next: Observe): void;
}

/** Starts both. */
export async function proxied(options: ClusterOptions = {}): Promise<Proxied> {
  let observe: Observe = () => "pass";
  let proxy: Proxy | undefined;
  const cluster = await startKafka({
    ...options,
    advertised(_, address) {
      const port = Number(address.split(":")[1]);
      proxy = startProxy({ hostname: "127.0.0.1", port }, {
        observe: (direction, bytes, connection) => observe(direction, requestOf(bytes), connection, bytes),
      });
      return `127.0.0.1:${proxy.port}`;
    },
  });
  return {
    brokers: `127.0.0.1:${proxy!.port}`,
    proxy: proxy!,
    watch: (next: Observe) => observe = next,
    async [Symbol.asyncDispose]() {
      observe = () => "pass";
      await proxy![Symbol.asyncDispose]();
      await cluster[Symbol.asyncDispose]();
    },
  };
}
