// What the page knows of all streams, and in which order it shows them.

export const LEVELS = ["act", "watch", "good", "silent"];
export const LEVEL_WORDS = { act: "needs you", watch: "watch", good: "fine", silent: "silent" };
const RANK = Object.fromEntries(LEVELS.map((level, rank) => [level, rank]));

export class FleetData {
  tiles = new Map();

  apply(changes) {
    if (changes.all) this.tiles.clear();
    for (const tile of changes.tiles) this.tiles.set(tile.i, tile);
    for (const index of changes.gone) this.tiles.delete(index);
  }

  named(name) {
    for (const tile of this.tiles.values()) if (tile.name === name) return tile;
    return null;
  }

  counts() {
    const counts = { act: 0, watch: 0, good: 0, silent: 0 };
    for (const tile of this.tiles.values()) counts[tile.level] += 1;
    return counts;
  }

  // Indices of the streams to show, in order. Need is rounded to tenths so that tiles do not swap for nothing; equal ones
  // are ordered by name.
  order({ level, words, sort }) {
    const shown = [];
    for (const tile of this.tiles.values()) {
      if (level !== null && tile.level !== level) continue;
      if (words !== "" && !`${tile.name} ${tile.label ?? ""} ${tile.reason}`.toLowerCase().includes(words)) continue;
      shown.push(tile);
    }
    shown.sort((a, b) => COMPARE[sort](a, b) || NAMES.compare(a.name, b.name));
    return shown.map((tile) => tile.i);
  }
}

// Whether a stream stands behind one of a less urgent level: then the order must change at once.
export function isUpset(order, tiles) {
  return order.some((index, i) => i > 0 && RANK[tiles.get(index)?.level] < RANK[tiles.get(order[i - 1])?.level]);
}

const NAMES = new Intl.Collator("en", { numeric: true });
const COMPARE = {
  need: (a, b) => RANK[a.level] - RANK[b.level] || Math.round(10 * b.need) - Math.round(10 * a.need),
  accuracy: (a, b) => Math.round(50 * (a.accuracy ?? 2)) - Math.round(50 * (b.accuracy ?? 2)),
  name: () => 0,
};
