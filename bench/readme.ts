/**
 * Writes the README's figures from the raw results that were measured last.
 *
 * @module
 */
import { dedupeChart, growthChart, relayChart } from "./chart.ts";
import type { DedupeRow } from "./dedupe.ts";
import type { GrowthRow } from "./growth.ts";
import type { KafkaRow } from "./kafka.ts";
import type { KafkaFromRow } from "./kafka_from.ts";
import type { RelayRow } from "./relay.ts";

interface Result<Row> {
  readonly at: string;
  readonly machine: string;
  readonly versions: Readonly<Record<string, string>>;
  readonly rows: readonly Row[];
}

const [START, END] = ["<!-- figures: written by `deno task bench readme` -->", "<!-- end of figures -->"];

async function last<Row>(name: string): Promise<Result<Row>> {
  const lines = (await Deno.readTextFile(new URL(`results/${name}.jsonl`, import.meta.url))).trimEnd().split("\n");
  return JSON.parse(lines.at(-1)!);
}

function table(head: readonly string[], rows: readonly (readonly (string | number)[])[]): string {
  const all = [head.map(String), head.map((_, i) => i === 0 ? "---" : "--:"), ...rows.map((row) => row.map(String))];
  return all.map((row) => `| ${row.join(" | ")} |`).join("\n");
}

interface Peer {
  readonly name: string;
  readonly rowsPerSecond: number | null;
  readonly peakMb: number | null;
  readonly p50Ms: number;
  readonly p99Ms: number;
  readonly duplicates: string;
}

/** Out of Kafka: each beside the case that it is compared with. */
async function kafkaFromFigures(): Promise<readonly string[]> {
  const { rows } = await last<KafkaFromRow>("kafka-from");
  return [
    `A topic of ${
      grouped(rows[0]!.rows)
    } messages (200 bytes, 6 partitions) into PostgreSQL, or through into another topic, all in one ` +
    "run: the median of three rounds, but for the large backlog, which runs once. By hand six partitions are written at the same " +
    "time, on a connection each. The ratio is to the case that is named beside it:",
    "",
    table(
      ["", "rows/s", "ratio", "to", "peak memory"],
      rows.map(({ case: name, rowsPerSecond, ratio, against, peakMb }) => [
        ...[name, grouped(rowsPerSecond), against === name ? "" : `${ratio.toFixed(2)} ×`],
        ...[against === name ? "" : against.replace(/^kafka -> \w+, /, ""), `${peakMb} MB`],
      ]),
    ),
    "",
  ];
}

/** Ours beside what others do, as they were measured on a machine of the same kind. */
async function kafkaFigures(): Promise<readonly string[]> {
  const { rows, versions } = await last<KafkaRow>("kafka");
  const peers: { readonly rows: readonly Peer[] } = JSON.parse(
    await Deno.readTextFile(new URL("results/peers.json", import.meta.url)),
  );
  const some = (value: number | null, unit = "") => value === null ? "" : `${grouped(value)}${unit}`;
  const times = (from: number | null, to: number | null) => from === null ? "" : `${from} / ${to}`;
  return [
    `An outbox in PostgreSQL into Kafka (200 bytes a value, 1,000 keys, 6 partitions), all in one run under Deno; kafkajs ` +
    `${
      versions["kafkajs"]
    }. Beside rows a second: the ratio to the loop by hand of the same round. The latency is from the INSERT until a ` +
    "reader at `read_committed` has the record:",
    "",
    table(
      ["", "rows", "rows/s", "by hand = 1", "p50 / p99 ms", "peak memory"],
      rows.map(({ case: name, rows, rowsPerSecond, ratio, p50Ms, p99Ms, peakMb }) => [
        ...[name, grouped(rows), some(rowsPerSecond), ratio === null ? "" : `${ratio.toFixed(2)} ×`],
        ...[times(p50Ms, p99Ms), `${peakMb} MB`],
      ]),
    ),
    "",
    "Others, measured once on a machine of the same kind under Node 22 and not in the same run. What they double when they are " +
    "killed is their nature: they are at-least-once. Of ours the tests kill two relays 20 times under load, and count none twice and none lost:",
    "",
    table(
      ["", "rows/s", "p50 / p99 ms", "peak memory", "duplicates after SIGKILL"],
      peers.rows.map(({ name, rowsPerSecond, p50Ms, p99Ms, peakMb, duplicates }) => [
        ...[name, some(rowsPerSecond), times(p50Ms, p99Ms), some(peakMb, " MB"), duplicates],
      ]),
    ),
    "",
  ];
}

const grouped = (value: number): string => value.toLocaleString("en");

/** The figures, in Markdown. */
export async function figures(): Promise<string> {
  const dedupe = await last<DedupeRow>("dedupe");
  const growth = await last<GrowthRow>("growth");
  const relay = await last<RelayRow>("relay");
  const size = await last<{ readonly gzipBytes: number }>("size");
  const us = (value: number | null) => value === null ? "" : `${grouped(value)} µs`;
  const times = (value: number | null) => value === null ? "" : `${value.toFixed(2)} ×`;
  const { deno, ...drivers } = dedupe.versions;
  const versions = Object.entries(drivers).filter(([name]) => name !== "v8").map(([name, version]) => `${name} ${version}`);
  const servers = new Map(dedupe.rows.map(({ adapter, version }) => [adapter.split("/")[0], version]));
  return [
    `Measured on ${dedupe.machine}; deno ${deno}, ${versions.join(", ")}; ` +
    `${Array.from(servers, ([name, version]) => `${name} ${version}`).join(", ")}, each as it comes, on the same machine.`,
    "",
    "What the dedupe row costs: one transaction with an insert of the application, without a claim, with a dedupe row written " +
    "by hand (a key and a time; for a batch all in one statement on the servers), and with `effects.claim`. Commits are durable in all three.",
    "",
    "![What a claim costs, by database](docs/figures/dedupe.svg)",
    "",
    table(
      ["adapter, case", "without", "by hand", "with a claim", "by hand / without", "claim / without"],
      dedupe.rows.map((row) => [
        `${row.adapter}, ${row.case}`,
        us(row.baseUs),
        us(row.handUs),
        us(row.dedupeUs),
        times(row.handRatio),
        times(row.ratio),
      ]),
    ),
    "",
    "Whether it costs more where there is more, against 10,000 rows:",
    "",
    "![What more rows cost, by database](docs/figures/growth.svg)",
    "",
    table(
      ["adapter, case", "rows", "at 10,000", "at so many", ""],
      growth.rows.map((row) => [
        `${row.adapter}, ${row.case}`,
        grouped(row.rows),
        us(row.fewUs),
        us(row.manyUs),
        times(row.ratio),
      ]),
    ),
    "",
    "A relay that drains an outbox (200 bytes a value), one process each; the target is a local HTTP server that does nothing:",
    "",
    "![How fast a relay drains an outbox](docs/figures/relay.svg)",
    "",
    table(
      ["", "rows", "rows/s", "peak memory"],
      relay.rows.map((
        row,
      ) => [`${row.adapter}, ${row.case}`, grouped(row.rows), grouped(row.rowsPerSecond), `${row.peakMb} MB`]),
    ),
    "",
    ...await kafkaFigures(),
    ...await kafkaFromFigures(),
    `\`mod.ts\`, minified and compressed: ${(size.rows[0]!.gzipBytes / 1000).toFixed(1)} kB.`,
  ].join("\n");
}

/** Draws the charts that the README shows. */
async function drawCharts(): Promise<void> {
  const charts = {
    dedupe: dedupeChart((await last<DedupeRow>("dedupe")).rows),
    growth: growthChart((await last<GrowthRow>("growth")).rows),
    relay: relayChart((await last<RelayRow>("relay")).rows),
  };
  await Deno.mkdir(new URL("../docs/figures", import.meta.url), { recursive: true });
  for (const [name, svg] of Object.entries(charts)) {
    await Deno.writeTextFile(new URL(`../docs/figures/${name}.svg`, import.meta.url), await svg);
  }
}

/** The README with its figures as they should be. */
export async function withFigures(readme: string): Promise<string> {
  const [before, after] = [readme.indexOf(START), readme.indexOf(END)];
  if (before < 0 || after < before) throw new Error("The README has no place for figures");
  return `${readme.slice(0, before + START.length)}\n\n${await figures()}\n\n${readme.slice(after)}`;
}

/** Puts the figures into the README. */
export async function writeFigures(): Promise<void> {
  await drawCharts();
  const path = new URL("../README.md", import.meta.url);
  await Deno.writeTextFile(path, await withFigures(await Deno.readTextFile(path)));
  await new Deno.Command(Deno.execPath(), { args: ["fmt", "-q", path.pathname] }).output();
}
