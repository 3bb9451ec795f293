// A grid of many tiles, of which only those on screen exist. All rows have one height; a transform places each tile.

import { Tile } from "./tile.js";
import { h } from "./dom.js";

const TILE_HEIGHT = 158, GAP = 10, LEAST_WIDTH = 216, SPARE_ROWS = 1;

export class Grid {
  #tiles = new Map(); // by stream number, those that exist
  #order = [];
  #columns = 1;

  constructor(data) {
    this.data = data;
    this.list = h("ul", { class: "grid", "aria-label": "Cameras", onkeydown: (event) => this.#key(event) });
    this.node = h("div", { class: "gridbox" }, this.list);
    this.resized = new ResizeObserver(() => this.draw());
    this.resized.observe(this.node);
    this.onscroll = () => this.draw();
    addEventListener("scroll", this.onscroll, { passive: true });
  }

  close() {
    this.resized.disconnect();
    removeEventListener("scroll", this.onscroll);
  }

  setOrder(order) {
    this.#order = order;
  }

  get order() {
    return this.#order;
  }

  get shown() {
    return this.#tiles;
  }

  // Update the tiles on screen; others have no element and cost nothing.
  draw() {
    const width = this.node.clientWidth;
    if (width === 0) return;
    this.#columns = Math.max(1, Math.floor((width + GAP) / (LEAST_WIDTH + GAP)));
    const tileWidth = (width - GAP * (this.#columns - 1)) / this.#columns;
    const rowHeight = TILE_HEIGHT + GAP;
    const rows = Math.ceil(this.#order.length / this.#columns);
    this.list.style.height = `${Math.max(0, rows * rowHeight - GAP)}px`;
    const top = -this.node.getBoundingClientRect().top;
    const first = Math.max(0, Math.floor(top / rowHeight) - SPARE_ROWS);
    const last = Math.min(rows, Math.ceil((top + innerHeight) / rowHeight) + SPARE_ROWS);
    const wanted = this.#order.slice(first * this.#columns, last * this.#columns);
    this.#keepOnly(new Set(wanted));
    wanted.forEach((index, i) => this.#place(index, first * this.#columns + i, tileWidth, rowHeight, i === 0));
    this.#arrange(wanted);
  }

  // Move the focus to the tile at `place` in the order, scrolling where needed.
  focus(place) {
    const target = Math.max(0, Math.min(this.#order.length - 1, place));
    if (!this.#tiles.has(this.#order[target])) {
      const row = Math.floor(target / this.#columns);
      const top = this.node.getBoundingClientRect().top + scrollY + row * (TILE_HEIGHT + GAP);
      scrollTo({ top: top - innerHeight / 2 });
      this.draw();
    }
    this.#tiles.get(this.#order[target])?.link.focus();
  }

  #keepOnly(wanted) {
    for (const [index, tile] of this.#tiles) {
      // Keep the tile with the focus, so that sorting does not take it from a keyboard user.
      if (wanted.has(index) || tile.link === document.activeElement) continue;
      tile.node.remove();
      this.#tiles.delete(index);
    }
  }

  // Keep elements in visible order, for screen readers. Moving the element with the focus would lose the focus.
  #arrange(wanted) {
    const focused = document.activeElement;
    let next = this.list.firstChild;
    for (const index of wanted) {
      const { node } = this.#tiles.get(index);
      if (node === next) next = next.nextSibling;
      else this.list.insertBefore(node, next);
    }
    if (focused !== document.activeElement && this.list.contains(focused)) focused.focus({ preventScroll: true });
  }

  #place(index, place, width, rowHeight, reachable) {
    let tile = this.#tiles.get(index);
    if (tile === undefined) {
      tile = new Tile();
      this.#tiles.set(index, tile);
      this.list.append(tile.node);
    }
    tile.show(this.data.tiles.get(index));
    const x = (place % this.#columns) * (width + GAP), y = Math.floor(place / this.#columns) * rowHeight;
    const where = `${x},${y},${width},${this.#order.length},${reachable}`;
    if (tile.where === where) return;
    tile.where = where;
    tile.node.style.transform = `translate(${x}px, ${y}px)`;
    tile.node.style.width = `${width}px`;
    tile.node.setAttribute("aria-posinset", place + 1);
    tile.node.setAttribute("aria-setsize", this.#order.length);
    tile.link.tabIndex = reachable ? 0 : -1;
  }

  #key(event) {
    const moves = {
      ArrowRight: 1, ArrowLeft: -1, ArrowDown: this.#columns, ArrowUp: -this.#columns,
      Home: -Infinity, End: Infinity, PageDown: 3 * this.#columns, PageUp: -3 * this.#columns,
    };
    const link = event.target.closest("a.tile");
    if (link === null || !(event.key in moves) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    this.focus(this.#order.indexOf(Number(link.dataset.index)) + moves[event.key]);
  }
}
