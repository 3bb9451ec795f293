// Chooses the page, and passes it what the server sends.

import { FleetData } from "./fleet-data.js";
import { FleetPage } from "./fleet.js";
import { Live } from "./live.js";
import { StreamPage } from "./stream.js";
import { askToken } from "./login.js";
import { h, text } from "./dom.js";
import { openSession } from "./api.js";
import { startTheme } from "./theme.js";

const main = document.getElementById("main");
const data = new FleetData();
const live = new Live();
const MEASURED = 300; // updates whose times are kept as performance entries
let page = null;
let measured = 0;

live.addEventListener("fleet", ({ detail }) => {
  const began = performance.now();
  data.apply(detail);
  showSite(detail.site);
  page.update(detail);
  document.title = page.title;
  measure(began);
});
live.addEventListener("stream", ({ detail }) => page.show?.(detail));
live.addEventListener("site", ({ detail }) => showSite(detail));
live.addEventListener("link", ({ detail }) => {
  const link = document.getElementById("link");
  link.dataset.up = detail.up;
  text(link, detail.up ? "live" : "connection lost, trying again");
  if (detail.ended) setTimeout(start, 3000); // The server refused, perhaps as it was restarted and the login is void.
});

function showSite(site) {
  const lag = site.lag > 0 ? ` · ${Math.round(site.lag).toLocaleString("en")} waiting` : "";
  const words = site.up === 0 ? "no worker answers"
    : `${site.up}/${site.workers} worker${site.workers === 1 ? "" : "s"} · ${Math.round(site.per_second).toLocaleString("en")} frames/s${lag}`;
  text(document.getElementById("site"), site.topics ? words : `topics cannot be read · ${words}`);
}

function route() {
  const found = /^#\/stream\/(.+)$/.exec(location.hash);
  let name = null;
  try { name = found && decodeURIComponent(found[1]); } catch { /* A malformed address: show the fleet. */ }
  page?.close();
  page = name === null ? new FleetPage(data) : new StreamPage(data, name);
  main.replaceChildren(page.node);
  document.title = page.title;
  if (name === null) page.sort();
  else page.update(null);
  scrollTo(0, 0);
  main.focus({ preventScroll: true });
  live.open(name);
}

// Measure from the message to the end of drawing.
function measure(began) {
  performance.measure("apply", { start: began, end: performance.now() });
  requestAnimationFrame(() => {
    const channel = new MessageChannel();
    channel.port1.onmessage = () => {
      if (++measured % MEASURED === 0) performance.clearMeasures();
      performance.measure("update", { start: began, end: performance.now() });
    };
    channel.port2.postMessage(null);
  });
}

async function start() {
  try {
    const session = await openSession();
    if (session.login) await askToken(main);
  } catch (error) {
    main.replaceChildren(h("p", { class: "empty" }, `The console does not answer: ${error.message}`));
    setTimeout(start, 3000);
    return;
  }
  route();
}

startTheme(document.getElementById("theme"), () => page?.restyle?.());
addEventListener("hashchange", route);
addEventListener("pagehide", () => live.close());
start();
