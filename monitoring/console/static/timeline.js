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
      const newest = this.list.firstElementChild, kind = routineKind(event);
      // Routine events of one kind share a row with a count. A healthy stream would otherwise bury its one refusal.
      if (kind !== null && newest?.routine === kind) repeat(newest, event);
      else this.list.prepend(entry(event, kind));
    }
    while (this.list.childElementCount > MOST) this.list.lastElementChild.remove();
  }
}

// What consecutive routine events must agree in to share a row; null for every other event.
function routineKind(event) {
  return event.command === null && QUIET.has(event.decision) ? `${event.decision} ${event.reason} ${event.parameters}` : null;
}

function entry(event, kind) {
  const count = h("span", { class: "count" });
  const time = h("time", { datetime: new Date(1000 * event.time).toISOString() }, clock(event.time));
  const facts = h("dl", {});
  const word = h("span", { class: "decision", "data-decision": event.decision }, WORDS[event.decision] ?? event.decision);
  const node = h("li", { class: kind === null ? "" : "quiet" },
    h("details", {}, h("summary", {}, time, word, count, h("span", { class: "why" }, event.reason)), facts));
  node.routine = kind;
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
