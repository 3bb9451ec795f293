// One camera of the grid.

import { LEVEL_WORDS } from "./fleet-data.js";
import { h, percent, svg, text } from "./dom.js";

const WIDTH = 100, HEIGHT = 34; // of the line, in its own units
const FLOOR = 500; // thousandths of accuracy at its lower edge; the upper is 1,000, so that tiles can be compared

export class Tile {
  #last = null;
  pictured = -1; // count of frames when the picture shown was made

  constructor() {
    this.image = h("img", { alt: "", class: "thumb", width: 64, height: 64, draggable: "false" });
    this.name = h("span", { class: "name" });
    this.label = h("span", { class: "label" });
    this.reason = h("span", { class: "reason" });
    this.state = h("span", { class: "state" });
    this.accuracy = h("span", { class: "accuracy" });
    this.confidence = h("span", { class: "confidence" });
    this.line = svg("polyline", { class: "line", "vector-effect": "non-scaling-stroke" });
    this.area = svg("polygon", { class: "area" });
    this.spark = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", class: "spark", "aria-hidden": "true" }, this.area, this.line);
    this.link = h("a", { class: "tile", draggable: "false" },
      h("span", { class: "head" }, this.name, this.state),
      h("span", { class: "body" }, this.image,
        h("span", { class: "what" }, this.label, this.confidence),
        h("span", { class: "how" }, this.accuracy, h("span", { class: "unit" }, "est. accuracy"))),
      this.spark, this.reason);
    this.node = h("li", { class: "cell" }, this.link);
  }

  // Draw `tile`; the same object again costs nothing.
  show(tile) {
    const last = this.#last;
    if (last === tile) return;
    if (last === null || last.i !== tile.i) this.#become(tile);
    if (last?.level !== tile.level) this.link.dataset.level = tile.level;
    text(this.state, LEVEL_WORDS[tile.level]);
    if (this.pictured < 0) this.#answer(tile); // Later the answer must belong to the picture.
    text(this.accuracy, percent(tile.accuracy));
    text(this.reason, tile.reason);
    const points = sparkPoints(tile.spark);
    if (this.line.getAttribute("points") !== points) {
      this.line.setAttribute("points", points);
      this.area.setAttribute("points", points && `0,${HEIGHT} ${points} ${WIDTH},${HEIGHT}`);
    }
    this.#last = tile;
  }

  picture(row) {
    this.pictured = row.frames;
    this.#answer(row);
    this.image.src = row.src;
    this.image.classList.add("there");
    this.image.onload = () => this.image.classList.toggle("crisp", this.image.naturalWidth <= 96);
  }

  #answer({ label, confidence }) {
    text(this.label, label ?? "–");
    text(this.confidence, confidence === null ? "" : `${percent(confidence)} sure`);
  }

  #become(tile) {
    this.pictured = -1;
    this.image.removeAttribute("src");
    this.image.classList.remove("there");
    this.link.href = `#/stream/${encodeURIComponent(tile.name)}`;
    this.link.dataset.index = tile.i;
    text(this.name, tile.name);
    this.name.title = tile.name;
  }
}

// The points of a line across the box, from accuracies in thousandths; values below the floor are cut off.
export function sparkPoints(values) {
  if (values.length < 2) return "";
  const step = WIDTH / (values.length - 1);
  return values.map((value, i) => {
    const share = Math.max(0, (value - FLOOR) / (1000 - FLOOR));
    return `${(i * step).toFixed(1)},${(HEIGHT - 2 - share * (HEIGHT - 4)).toFixed(1)}`;
  }).join(" ");
}
