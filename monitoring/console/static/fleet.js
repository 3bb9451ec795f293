// The first page: all cameras, those that need attention first.

import { Grid } from "./grid.js";
import { LEVELS, LEVEL_WORDS, isUpset } from "./fleet-data.js";
import { h, text } from "./dom.js";
import { keepPictures } from "./pictures.js";

const SORT_EVERY_MS = 2000;
const choice = { level: null, words: "", sort: "need" }; // kept while other pages are open

export class FleetPage {
  #sorted = 0;

  constructor(data) {
    this.data = data;
    this.grid = new Grid(data);
    this.headline = h("h1", { class: "headline" });
    this.chips = new Map(LEVELS.map((level) => [level, this.#chip(level)]));
    this.search = h("input", {
      type: "search", placeholder: "Filter  /", "aria-label": "Filter by name, class or reason", autocomplete: "off", spellcheck: "false", maxlength: 100,
      oninput: () => { choice.words = this.search.value.trim().toLowerCase(); this.sort(); },
    });
    this.search.value = choice.words;
    this.sorting = h("select", { "aria-label": "Order", onchange: () => { choice.sort = this.sorting.value; this.sort(); } },
      h("option", { value: "need" }, "by need"), h("option", { value: "accuracy" }, "by accuracy"), h("option", { value: "name" }, "by name"));
    this.sorting.value = choice.sort;
    this.empty = h("p", { class: "empty", hidden: true });
    const tools = h("div", { class: "tools" },
      h("div", { class: "chips", role: "group", "aria-label": "Show" }, ...[...this.chips.values()].map((chip) => chip.node)),
      this.search, this.sorting);
    this.node = h("section", { class: "fleet" }, this.headline, tools, this.empty, this.grid.node);
    this.onkey = (event) => this.#key(event);
    addEventListener("keydown", this.onkey);
    this.stopPictures = keepPictures(() => this.grid.shown, data);
    this.later = null;
  }

  get title() {
    const { act } = this.data.counts();
    return act > 0 ? `(${act}) Driftkeel` : "Driftkeel";
  }

  close() {
    this.grid.close();
    this.stopPictures();
    clearTimeout(this.later);
    removeEventListener("keydown", this.onkey);
  }

  // New data has come. Tiles change at once, their order at most every two seconds (at once if a level changed), and not
  // while a tile has the pointer or the focus.
  update() {
    this.#count();
    const due = performance.now() - this.#sorted > SORT_EVERY_MS
      || (choice.sort === "need" && isUpset(this.grid.order, this.data.tiles));
    if (due && !this.grid.list.matches(":hover, :focus-within")) {
      this.sort();
      return;
    }
    this.grid.draw();
    this.later ??= setTimeout(() => { this.later = null; this.update(); }, SORT_EVERY_MS); // No further data may come for long.
  }

  sort() {
    this.#sorted = performance.now();
    const order = this.data.order(choice);
    this.grid.setOrder(order);
    this.empty.hidden = order.length > 0;
    text(this.empty, this.data.tiles.size === 0 ? "Waiting for the first predictions." : "No camera fits the filter.");
    this.grid.draw();
  }

  #count() {
    const counts = this.data.counts();
    for (const [level, chip] of this.chips) {
      text(chip.count, String(counts[level]));
      chip.node.setAttribute("aria-pressed", String(choice.level === level));
    }
    const total = this.data.tiles.size, plural = (n) => `${n} camera${n === 1 ? "" : "s"}`;
    text(this.headline, total === 0 ? "No cameras yet"
      : counts.act > 0 ? `${plural(counts.act)} of ${total} ${counts.act === 1 ? "needs" : "need"} you`
      : counts.watch > 0 ? `${plural(counts.watch)} of ${total} to watch, nothing needs you`
      : counts.good === total ? `All ${plural(total)} on course` : `${counts.good} of ${plural(total)} on course`);
  }

  #chip(level) {
    const count = h("b", {}, "0");
    const node = h("button", { type: "button", class: "chip", "data-level": level, "aria-pressed": "false", onclick: () => {
      choice.level = choice.level === level ? null : level;
      this.#count();
      this.sort();
    } }, h("i", { class: "dot", "aria-hidden": "true" }), count, ` ${LEVEL_WORDS[level]}`);
    return { node, count };
  }

  #key(event) {
    if (event.target.matches("input, select, textarea") || event.ctrlKey || event.metaKey || event.altKey) {
      if (event.key === "Escape" && event.target === this.search) { this.search.value = ""; this.search.dispatchEvent(new Event("input")); this.grid.focus(0); }
      if (event.key === "ArrowDown" && event.target === this.search) { event.preventDefault(); this.grid.focus(0); }
      return;
    }
    if (event.key === "/") { event.preventDefault(); this.search.focus(); }
    if (event.key === "ArrowDown" && document.activeElement === document.body) { event.preventDefault(); this.grid.focus(0); }
  }
}
