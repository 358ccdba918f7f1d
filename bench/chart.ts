/**
 * Charts of the figures, as SVG.
 *
 * @module
 */
import { parse, View } from "vega";
import { compile, type TopLevelSpec } from "vega-lite";
import type { DedupeRow } from "./dedupe.ts";
import type { GrowthRow } from "./growth.ts";
import type { RelayRow } from "./relay.ts";

const LOOK = {
  background: "white",
  config: { font: "sans-serif", axis: { titleFontWeight: "normal" }, legend: { orient: "top" } },
} as const;
const COLORS = ["#b8c4ce", "#1f6f8b", "#d9822b"];

async function draw(spec: object): Promise<string> {
  const view = new View(parse(compile({ ...LOOK, ...spec } as TopLevelSpec).spec), { renderer: "none" });
  const svg = await view.toSVG();
  view.finalize();
  return svg + "\n";
}

/** Bars, a group for each `of`, a facet for each `adapter`. */
const bars = (
  title: string,
  values: readonly { readonly adapter: string; readonly of: string; readonly side: string; readonly value: number }[],
  line?: number,
): object => ({
  data: { values: [...values] },
  facet: {
    row: {
      field: "adapter",
      title: null,
      header: { labelOrient: "top", labelAnchor: "start", labelFontWeight: "bold" },
      sort: null,
    },
  },
  spec: {
    width: 420,
    layer: [
      {
        mark: { type: "bar" },
        encoding: {
          y: { field: "of", title: null, sort: null, axis: { labelLimit: 0 } },
          yOffset: { field: "side", sort: null },
          x: { field: "value", type: "quantitative", title },
          color: { field: "side", title: null, sort: null, scale: { range: COLORS } },
        },
      },
      ...line === undefined ? [] : [{ mark: { type: "rule", strokeDash: [4, 3] }, encoding: { x: { datum: line } } }],
    ],
  },
});

/** What a claim costs: each transaction against the one without. */
export function dedupeChart(rows: readonly DedupeRow[]): Promise<string> {
  const values = rows.flatMap(({ adapter, case: of, ratio, handRatio }) => [
    ...handRatio === null ? [] : [{ adapter, of, side: "dedupe row by hand", value: handRatio }],
    { adapter, of, side: "effects.claim", value: ratio },
  ]);
  return draw(bars("times the transaction without it", values, 1));
}

/** What more rows cost. */
export function growthChart(rows: readonly GrowthRow[]): Promise<string> {
  const values = rows.map(({ adapter, case: of, rows, ratio }) => {
    return { adapter, of, side: `at ${rows.toLocaleString("en")} rows`, value: ratio };
  });
  return draw(bars("times the same at 10,000 rows", values, 1));
}

/** How fast outboxes are drained. */
export function relayChart(rows: readonly RelayRow[]): Promise<string> {
  const values = rows.map(({ adapter, case: of, rowsPerSecond }) => ({
    adapter,
    of,
    side: "rows a second",
    value: rowsPerSecond,
  }));
  return draw(bars("rows a second", values));
}
