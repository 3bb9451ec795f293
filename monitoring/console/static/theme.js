// Colours: the system's, light or dark; remembered if the browser allows it.

const KINDS = ["system", "light", "dark"], SIGNS = { system: "◐", light: "○", dark: "●" };
const KEY = "driftkeel-theme";

export function startTheme(button, changed) {
  let kind = KINDS.includes(remembered()) ? remembered() : "system";
  const apply = () => {
    if (kind === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = kind;
    button.textContent = SIGNS[kind];
    button.setAttribute("aria-label", `Colours: ${kind === "system" ? "as the system" : kind}`);
    changed();
  };
  button.addEventListener("click", () => {
    kind = KINDS[(KINDS.indexOf(kind) + 1) % KINDS.length];
    try { localStorage.setItem(KEY, kind); } catch { /* Then it holds until the page is closed. */ }
    apply();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", changed);
  apply();
}

function remembered() {
  try { return localStorage.getItem(KEY); } catch { return null; }
}
