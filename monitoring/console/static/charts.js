// The charts of one stream, drawn by uPlot on a shared time axis.

import uPlot from "./vendor/uPlot.esm.js";
import { clock, h, number, percent, text } from "./dom.js";

const HEIGHT = 150, STRIP_HEIGHT = 64;
const SYNC = uPlot.sync("stream");

// Lines are [column, label, colour variable, dash]; `band` names two columns to fill the area between.
const CHARTS = [
  { title: "Estimated accuracy", wide: true, show: (v) => percent(v, 1), range: accuracyRange, band: ["high", "low"], lines: [
    ["accuracy", "adapted", "--adapted"], ["source", "source", "--source", [5, 4]], ["clean", "clean frames", "--faint", [2, 4]]] },
  { title: "Gradient norm", show: number, log: true, lines: [["raw", "raw", "--source"], ["generated", "generated", "--adapted"]] },
  { title: "Prediction entropy", unit: "nats", show: number, range: fromZero, lines: [["entropy", "entropy", "--adapted"]] },
  { title: "Distance from source", show: number, range: fromZero, lines: [["distance", "distance", "--adapted"]] },
  { title: "Answers that source does not share", show: (v) => percent(v, 1), range: fromZero, lines: [["flips", "differ", "--adapted"]] },
];

export class Charts {
  #plots = [];
  #columns = null;
  #decisions;

  constructor(decisions) {
    this.#decisions = decisions;
    this.node = h("div", { class: "charts" });
    this.resized = new ResizeObserver(() => this.#fit());
    this.resized.observe(this.node);
  }

  // `columns`: arrays of one length, by name.
  show(columns) {
    this.#columns = columns;
    if (this.#plots.length === 0) this.#build();
    for (const plot of this.#plots) plot.update(columns);
  }

  // Colours have changed.
  restyle() {
    if (this.#columns === null) return;
    this.close(false);
    this.show(this.#columns);
  }

  close(forGood = true) {
    for (const plot of this.#plots) plot.close();
    this.#plots = [];
    if (forGood) this.resized.disconnect();
  }

  #build() {
    const colour = (name) => getComputedStyle(this.node).getPropertyValue(name).trim();
    this.#plots = [line(CHARTS[0], colour), strip(this.#decisions, colour), ...CHARTS.slice(1).map((chart) => line(chart, colour))];
    this.node.replaceChildren(...this.#plots.map((plot) => plot.node));
    this.#fit();
  }

  #fit() {
    for (const plot of this.#plots) plot.fit();
  }
}

function line(chart, colour) {
  const values = chart.lines.map(([, label, variable, dash]) => {
    const value = h("b", {}, "–");
    const key = h("span", { class: "key" }, h("i", { class: dash ? "dashed" : "solid", "data-colour": variable.slice(2), "aria-hidden": "true" }), `${label} `, value);
    return { key, value };
  });
  const when = h("time", {});
  const caption = h("figcaption", {}, h("strong", {}, chart.title), chart.unit ? h("span", { class: "unit" }, chart.unit) : null,
    h("span", { class: "keys" }, ...values.map((v) => v.key)), when);
  const box = h("div", { class: "plot" });
  const node = h("figure", { class: chart.wide ? "wide" : "" }, caption, box);
  const band = chart.band ?? [];
  const series = [{},
    ...band.map(() => ({ stroke: "transparent", points: { show: false }, spanGaps: true })),
    ...chart.lines.map(([, , variable, dash]) => ({
      stroke: colour(variable), width: dash ? 1.25 : 1.75, dash, spanGaps: true, points: { show: false } }))];
  const options = {
    ...common(HEIGHT), series,
    bands: band.length ? [{ series: [1, 2], fill: colour("--band") }] : [],
    scales: { x: { time: true }, y: chart.log ? { distr: 3 } : { range: chart.range } },
    axes: [timeAxis(colour), { ...axis(colour), ...(chart.log ? decades(colour) : {}), size: 46, values: (_, ticks) => ticks.map((t) => (t === null ? "" : chart.show(t).replace(".0%", "%"))) }],
    hooks: { setCursor: [(plot) => read(plot)] },
  };
  const plot = new uPlot(options, [[], ...series.slice(1).map(() => [])], box);
  function read(of) {
    const times = of.data[0], at = of.cursor.idx ?? null;
    values.forEach(({ key, value }, i) => {
      const data = of.data[1 + band.length + i];
      const shown = at === null ? newest(data) : data[at];
      key.hidden = newest(data) === null;
      text(value, shown === null || shown === undefined ? "–" : chart.show(shown));
    });
    text(when, at === null || !times[at] ? "" : clock(times[at]));
  }
  const names = [...band, ...chart.lines.map(([column]) => column)];
  return {
    node,
    update(columns) {
      const positive = (column) => (chart.log ? column.map((v) => (v > 0 ? v : null)) : column);
      plot.setData([columns.time, ...names.map((name) => positive(columns[name]))]);
      node.hidden = names.every((name) => name === "clean" || newest(columns[name]) === null);
      read(plot);
    },
    fit() { if (box.clientWidth > 0) plot.setSize({ width: box.clientWidth, height: HEIGHT }); },
    close() { plot.destroy(); },
  };
}

// A tick per decision. Kinds differ in height as well as in colour.
function strip(decisions, colour) {
  const KINDS = { applied: ["--good", 0], partial: ["--good", 0], skipped: ["--faint", 1], refused: ["--watch", 1] };
  const box = h("div", { class: "plot" });
  const label = h("span", { class: "keys" });
  const node = h("figure", { class: "wide" }, h("figcaption", {}, h("strong", {}, "Decisions"),
    h("span", { class: "keys legend" }, ...[["good", "applied"], ["faint", "left out"], ["watch", "refused"], ["act", "undone, or a command"]].map(
      ([name, word]) => h("span", { class: "key" }, h("i", { class: "solid", "data-colour": name, "aria-hidden": "true" }), word))), label), box);
  const drawTicks = (plot) => {
    const { ctx, bbox } = plot, ratio = devicePixelRatio;
    ctx.save();
    plot.data[0].forEach((time, i) => {
      const [name, row] = KINDS[decisions[plot.data[1][i]]] ?? ["--act", 2];
      const x = plot.valToPos(time, "x", true);
      ctx.fillStyle = colour(name);
      if (row === 2) ctx.fillRect(x - ratio, bbox.top, 2 * ratio, bbox.height);
      else ctx.fillRect(x - ratio / 2, bbox.top + bbox.height * (row ? 0.15 : 0.55), Math.max(1, ratio), bbox.height * 0.4);
    });
    ctx.restore();
  };
  const options = {
    ...common(STRIP_HEIGHT), series: [{}, { show: true, stroke: "transparent", points: { show: false }, paths: () => null }],
    scales: { x: { time: true }, y: { range: [0, 1] } },
    axes: [timeAxis(colour), { size: 46, stroke: "transparent", grid: { show: false }, ticks: { show: false }, values: (_, ticks) => ticks.map(() => "") }],
    hooks: { draw: [drawTicks], setCursor: [(plot) => {
      const at = plot.cursor.idx ?? null;
      text(label, at === null || plot.data[0][at] === undefined ? "" : `${decisions[plot.data[1][at]]} ${clock(plot.data[0][at])}`);
    }] },
  };
  const plot = new uPlot(options, [[], []], box);
  return {
    node,
    update(columns) { plot.setData([columns.time, columns.decision]); },
    fit() { if (box.clientWidth > 0) plot.setSize({ width: box.clientWidth, height: STRIP_HEIGHT }); },
    close() { plot.destroy(); },
  };
}

function common(height) {
  return {
    width: 300, height, legend: { show: false }, padding: [8, 8, 0, 0],
    cursor: { sync: { key: SYNC.key }, y: false, points: { size: 6 }, drag: { setScale: false, x: false, y: false } },
  };
}

function axis(colour) {
  return { stroke: colour("--faint"), font: "11px system-ui, sans-serif", grid: { stroke: colour("--rule"), width: 1 }, ticks: { show: false } };
}

function timeAxis(colour) {
  return { ...axis(colour), size: 26, space: 70, grid: { show: false }, values: (_, ticks) => ticks.map(clock) };
}

// Ticks of a logarithmic axis at powers of ten only.
function decades(colour) {
  const whole = (_, ticks) => ticks.map((tick) => (Math.abs(Math.log10(tick) % 1) < 1e-6 ? tick : null));
  return { grid: { stroke: colour("--rule"), width: 1, filter: whole }, filter: whole };
}

function accuracyRange(_, low, high) {
  return low === null ? [0, 1] : [Math.max(0, Math.floor(10 * low - 0.5) / 10), Math.min(1, Math.ceil(10 * high + 0.5) / 10)];
}

function fromZero(_, low, high) {
  return [0, high > 0 ? 1.1 * high : 1];
}

function newest(values) {
  for (let i = values.length - 1; i >= 0; i--) if (values[i] !== null && values[i] !== undefined) return values[i];
  return null;
}
