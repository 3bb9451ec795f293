// Requests pictures of the tiles on screen once a second, in one request; a hidden page requests none.

import { get } from "./api.js";

const EVERY_MS = 1000, MOST = 60;

// `shown` gives the tiles that exist, by stream number; `data` says how many frames each stream has had.
export function keepPictures(shown, data) {
  let stopped = false;
  let timer = 0;
  const round = async () => {
    try {
      if (document.visibilityState === "visible") await ask(shown(), data);
    } catch { /* The page shows that the connection is lost. */ }
    if (!stopped) timer = setTimeout(round, EVERY_MS);
  };
  timer = setTimeout(round, 50);
  return () => { stopped = true; clearTimeout(timer); };
}

async function ask(shown, data) {
  const wanted = [];
  for (const [index, tile] of shown) {
    const frames = data.tiles.get(index)?.frames ?? 0;
    if (frames > 0 && frames !== tile.pictured) wanted.push(`${index}.${tile.pictured}`);
  }
  if (wanted.length === 0) return;
  for (const row of await get(`/api/thumbnails?s=${wanted.slice(0, MOST).join(",")}`)) shown.get(row.i)?.picture(row);
}
