// The actions on a stream. Each asks for confirmation, and then shows its outcome.

import { h, text } from "./dom.js";
import { sendCommand } from "./api.js";

const PATIENCE_MS = 20000;
const ACTIONS = [
  { name: "Freeze", action: "freeze", ask: "No more updates; the adapted parameters go on answering." },
  { name: "Unfreeze", action: "unfreeze", ask: "Updates begin again where they stopped." },
  { name: "Shadow", action: "policy", policy: { mode: "shadow" }, ask: "The source model answers; adaptation goes on and only reports." },
  { name: "Automatic", action: "policy", policy: { mode: "auto" }, ask: "The adapted parameters answer while the guard trusts them." },
  { name: "Roll back", action: "rollback", ask: "Back to an earlier snapshot of this stream.", snapshots: true, danger: true },
  { name: "Reset", action: "reset", ask: "Back to the source model. What the stream has learned is gone; snapshots stay.", danger: true },
];

export class Actions {
  #waiting = new Map(); // names of the actions by command id
  #snapshots = 0;

  constructor(stream) {
    this.stream = stream;
    this.result = h("p", { class: "result", role: "status" });
    this.node = h("section", { class: "actions", "aria-label": "Actions" },
      ...ACTIONS.map((entry) => h("button", { type: "button", class: entry.danger ? "danger" : "", onclick: () => this.#confirm(entry) }, `${entry.name}…`)),
      this.result);
  }

  setSnapshots(count) {
    this.#snapshots = count;
  }

  // Update events that answer commands, also those of other pages.
  answered(events) {
    for (const event of events) {
      const name = this.#waiting.get(event.command);
      if (name === undefined) continue;
      this.#waiting.delete(event.command);
      this.#say(`${name}: ${event.decision === "skipped" ? "not done" : event.decision.replace("_", " ")}, ${event.reason || "done"} (step ${event.step})`, event.decision === "skipped" ? "act" : "good");
    }
  }

  #confirm(entry) {
    const reason = h("textarea", { rows: 2, maxlength: 1000, placeholder: "goes into the record" });
    const back = h("input", { type: "number", min: 1, max: Math.max(1, this.#snapshots), value: 1, required: true });
    const go = h("button", { type: "submit", class: entry.danger ? "danger" : "primary", value: "go" }, entry.name);
    const form = h("form", { method: "dialog" },
      h("h2", { id: "ask" }, `${entry.name}: `, h("span", { class: "name" }, this.stream)), h("p", {}, entry.ask),
      entry.snapshots ? h("label", {}, `How many snapshots back (${this.#snapshots} kept)`, back) : null,
      h("label", {}, "Reason", reason),
      h("div", { class: "buttons" }, h("button", { type: "submit", value: "", formnovalidate: true }, "Cancel"), go));
    const dialog = h("dialog", { "aria-labelledby": "ask" }, form);
    dialog.addEventListener("close", () => {
      dialog.remove();
      if (dialog.returnValue === "go") this.#send(entry, reason.value.trim(), Number(back.value));
    });
    document.body.append(dialog);
    dialog.showModal();
    (entry.danger ? form.querySelector("button[value='']") : go).focus();
  }

  async #send(entry, reason, snapshot) {
    this.#say(`${entry.name}: asking…`, "");
    try {
      const command = { stream: this.stream, action: entry.action, reason, policy: entry.policy ?? null, snapshot: entry.snapshots ? snapshot : 1 };
      const { id } = await sendCommand(command);
      this.#waiting.set(id, entry.name);
      this.#say(`${entry.name}: sent, waiting for the worker…`, "");
      setTimeout(() => this.#giveUp(id), PATIENCE_MS);
    } catch (error) {
      this.#say(`${entry.name}: ${error.message}`, "act");
    }
  }

  #giveUp(id) {
    const name = this.#waiting.get(id);
    if (name !== undefined) this.#say(`${name}: no worker has answered yet; the command waits in its topic`, "watch");
  }

  #say(words, level) {
    text(this.result, words);
    this.result.dataset.level = level;
  }
}
