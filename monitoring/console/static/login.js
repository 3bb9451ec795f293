// Asks for the token, if the console needs one.

import { h, text } from "./dom.js";
import { login } from "./api.js";

export function askToken(main) {
  return new Promise((done) => {
    const wrong = h("p", { class: "result", role: "alert", "data-level": "act" });
    const token = h("input", { type: "password", autocomplete: "current-password", required: true, maxlength: 1000 });
    const form = h("form", { class: "login", onsubmit: async (event) => {
      event.preventDefault();
      try {
        await login(token.value);
        done();
      } catch (error) {
        text(wrong, error.message);
        token.select();
      }
    } }, h("h1", {}, "Driftkeel"), h("label", {}, "The console's token", token), h("button", { type: "submit", class: "primary" }, "Show"), wrong);
    main.replaceChildren(form);
    token.focus();
  });
}
