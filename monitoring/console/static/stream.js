// The page of one stream.

import { Actions } from "./actions.js";
import { Charts } from "./charts.js";
import { LEVEL_WORDS } from "./fleet-data.js";
import { Timeline } from "./timeline.js";
import { get } from "./api.js";
import { h, number, percent, text } from "./dom.js";

const PICTURE_EVERY_MS = 1000, STORE_EVERY_MS = 5000;
const DECISIONS = ["applied", "partial", "skipped", "rolled_back", "reset", "imported", "approved", "frozen", "unfrozen", "policy", "carried", "deleted", "refused"];
const MOST_POINTS = 480;

export class StreamPage {
  #columns = null;
  #index = null;
  #pictured = -1;
  #stopped = false;

  constructor(data, name) {
    this.data = data;
    this.name = name;
    this.charts = new Charts(DECISIONS);
    this.timeline = new Timeline();
    this.actions = new Actions(name);
    this.image = h("img", { class: "frame", alt: "The newest frame" });
    this.answer = h("div", { class: "answer" });
    this.state = h("span", { class: "state" });
    this.reason = h("span", { class: "reason" });
    this.facts = h("dl", { class: "facts" });
    this.versus = versus();
    this.head = h("header", { class: "streamhead", "data-level": "silent" },
      h("a", { class: "back", href: "#/", "aria-label": "All cameras" }, "←"), h("h1", { class: "name" }, name), this.state, this.reason);
    this.node = h("section", { class: "stream" }, this.head,
      h("div", { class: "columns" },
        h("aside", {}, h("div", { class: "now" }, this.image, this.answer), this.versus.node, this.actions.node, this.facts),
        h("div", { class: "depth" }, this.charts.node, this.timeline.node)));
    this.onkey = (event) => { if (event.key === "Escape" && !document.querySelector("dialog[open]")) location.hash = "#/"; };
    addEventListener("keydown", this.onkey);
    this.#every(PICTURE_EVERY_MS, () => this.#picture());
    this.#every(STORE_EVERY_MS, () => this.#stored());
  }

  get title() {
    return `${this.name} · Driftkeel`;
  }

  close() {
    this.#stopped = true;
    removeEventListener("keydown", this.onkey);
    this.charts.close();
  }

  restyle() {
    this.charts.restyle();
  }

  update(changes) {
    if (changes !== null) this.actions.answered(changes.results);
    const tile = this.data.named(this.name);
    if (tile === null) return;
    this.head.dataset.level = tile.level;
    text(this.state, LEVEL_WORDS[tile.level]);
    text(this.reason, tile.reason);
  }

  // Points and events of this stream, all at first and new ones later.
  show(detail) {
    if (detail.index !== this.#index || detail.next_point < (this.#columns?.time.length ?? 0)) this.#columns = null;
    this.#index = detail.index;
    this.#columns = joined(this.#columns, detail.points, detail.clean);
    if (this.#columns.time.length > 0) this.charts.show(this.#columns);
    this.timeline.add(detail.events);
    this.versus.show(detail.proxies, detail.prediction, detail.compared);
    if (detail.prediction !== null && this.#pictured < 0) this.#answer(detail.prediction);
  }

  #answer(prediction) {
    const rows = prediction.top.slice(0, 3).map((score) => h("li", {},
      h("span", {}, score.label), h("meter", { min: 0, max: 1, value: score.confidence, "aria-hidden": "true" }), h("b", {}, percent(score.confidence))));
    this.answer.replaceChildren(h("p", { class: "label" }, prediction.label), h("ol", {}, ...rows));
  }

  async #picture() {
    const tile = this.data.named(this.name);
    if (tile === null || tile.frames === this.#pictured || document.visibilityState !== "visible") return;
    for (const row of await get(`/api/thumbnails?large=1&s=${tile.i}.${this.#pictured}`)) {
      this.#pictured = row.frames;
      this.#answer(row); // The answer must belong to the picture.
      this.image.src = row.src;
      this.image.onload = () => this.image.classList.toggle("crisp", this.image.naturalWidth <= 96);
    }
  }

  async #stored() {
    const stored = await get(`/api/stored?stream=${encodeURIComponent(this.name)}`);
    const rows = stored === null ? [["store", "nothing stored yet"]] : [
      ["frames", number(stored.frames)], ["updates", number(stored.step)], ["drift", stored.drift], ["snapshots", String(stored.snapshots)],
      ["state", `${(stored.bytes / 1024).toFixed(1)} KiB`], ["method", stored.method], ["worker", stored.owner], ["token", String(stored.token)], ["bundle", stored.bundle?.slice(0, 16)],
    ].filter(([, value]) => value !== null && value !== undefined);
    this.actions.setSnapshots(stored?.snapshots ?? 0);
    this.facts.replaceChildren(...rows.flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]));
  }

  async #every(pause, action) {
    while (!this.#stopped) {
      await action().catch(() => {}); // The page shows that the connection is lost.
      await new Promise((done) => setTimeout(done, pause));
    }
  }
}

// Source and adapted model side by side: which answers, their estimated accuracy, their labels of one frame, how often they differ.
function versus() {
  const side = (name, variable) => {
    const value = h("b", {}, "–"), said = h("span", { class: "said" }), note = h("span", { class: "note" });
    return { node: h("div", { class: "side", "data-side": variable }, h("span", {}, name), value, said, note), value, said, note };
  };
  const source = side("source model", "source"), adapted = side("adapted", "adapted");
  const differ = h("p", { class: "differ" });
  return {
    node: h("section", { class: "versus", "aria-label": "Source and adapted" }, source.node, adapted.node, differ),
    show(proxies, prediction, compared) {
      const answers = prediction?.parameters ?? null;
      text(source.value, percent(proxies?.source_accuracy, 1));
      text(adapted.value, percent(proxies?.estimated_accuracy, 1));
      text(source.note, answers === "source" ? "answers" : "");
      text(adapted.note, answers === "source" || answers === null ? "" : answers === "approved" ? "answers, as approved" : "answers");
      // Labels of the newest frame that both models have. If source answers, both labels would be its own.
      const both = compared !== null && compared.parameters !== "source";
      text(source.said, both ? `“${compared.source_label}”` : "");
      text(adapted.said, both ? `“${compared.label}”` : "");
      const rate = proxies?.flip_rate ?? null;
      text(differ, rate === null ? "estimated accuracy, without labels" : `they differ on ${percent(rate, 1)} of recent frames`);
    },
  };
}

function joined(old, fresh, clean) {
  const columns = {};
  for (const name of Object.keys(fresh)) columns[name] = [...(old?.[name] ?? []), ...fresh[name]].slice(-MOST_POINTS);
  // The time axis must not run backwards; events of two workers may.
  columns.time = columns.time.map((time, i, all) => (i > 0 && time < all[i - 1] ? all[i - 1] : time));
  columns.clean = columns.time.map(() => clean);
  return columns;
}
