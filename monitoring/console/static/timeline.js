// The update events of a stream, newest first, with their reasons.

import { clock, h, number, text } from "./dom.js";

const MOST = 200;
const WORDS = { applied: "applied", partial: "partly applied", skipped: "left out", refused: "refused", rolled_back: "rolled back" };
const QUIET = new Set(["applied", "skipped"]);

export class Timeline {
  constructor() {
    this.list = h("ol", { class: "events", tabindex: "0", "aria-label": "Update events, newest first" });
    this.only = h("input", { type: "checkbox", onchange: () => { this.list.classList.toggle("notable", this.only.checked); } });
    this.none = h("p", { class: "empty" }, "No update events yet.");
    this.node = h("section", { class: "timeline", "aria-label": "Timeline" },
      h("header", {}, h("h2", {}, "Timeline"), h("label", {}, this.only, " only what is out of the ordinary")), this.none, this.list);
  }

  add(events) {
    this.none.hidden = this.none.hidden || events.length > 0;
    for (const event of events) {
      const newest = this.list.firstElementChild;
      // A row of the same says it once, with a count: a healthy stream would bury its one refusal.
      if (newest?.same === sameness(event)) repeat(newest, event);
      else this.list.prepend(entry(event));
    }
    while (this.list.childElementCount > MOST) this.list.lastElementChild.remove();
  }
}

function sameness(event) {
  return event.command === null && QUIET.has(event.decision) ? `${event.decision} ${event.reason} ${event.parameters}` : null;
}

function entry(event) {
  const count = h("span", { class: "count" });
  const time = h("time", { datetime: new Date(1000 * event.time).toISOString() }, clock(event.time));
  const facts = h("dl", {});
  const word = h("span", { class: "decision", "data-decision": event.decision }, WORDS[event.decision] ?? event.decision);
  const node = h("li", { class: QUIET.has(event.decision) && event.command === null ? "quiet" : "" },
    h("details", {}, h("summary", {}, time, word, count, h("span", { class: "why" }, event.reason)), facts));
  node.same = sameness(event);
  node.parts = { count, time, facts, repeats: 1 };
  fill(facts, event);
  return node;
}

function repeat(node, event) {
  const { count, time, facts } = node.parts;
  node.parts.repeats += 1;
  text(count, `× ${node.parts.repeats}`);
  text(time, clock(event.time));
  fill(facts, event);
}

function fill(facts, event) {
  const layers = event.layers.map(([name, moved]) => `${name} ${number(moved)}`).join(", ");
  const rows = [
    ["event", event.id], ["step", String(event.step)], ["frames", event.frames ? `${event.frames}: ${event.first} … ${event.last}` : null],
    ["loss", event.loss === null ? null : number(event.loss)], ["source says otherwise", event.flipped === null ? null : `${event.flipped} of ${event.frames}`],
    ["layers moved", layers || null], ["answers now", event.parameters], ["command", event.command], ["worker", event.worker],
  ].filter(([, value]) => value !== null);
  facts.replaceChildren(...rows.flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]));
}
