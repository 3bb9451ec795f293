// Calls to the console's server. An error answer becomes an Error with the server's message.

let csrf = "";

export async function openSession() {
  const session = await get("/api/session");
  csrf = session.csrf ?? "";
  return session;
}

export async function login(token) {
  const session = await post("/api/login", { token });
  csrf = session.csrf;
  return session;
}

export function sendCommand(command) {
  return post("/api/command", command);
}

export async function get(path) {
  return read(await fetch(path, { credentials: "same-origin" }));
}

async function post(path, content) {
  const headers = { "content-type": "application/json", "x-driftkeel-csrf": csrf };
  return read(await fetch(path, { method: "POST", credentials: "same-origin", headers, body: JSON.stringify(content) }));
}

async function read(answer) {
  const content = await answer.json().catch(() => ({ error: `the console answered ${answer.status}` }));
  if (answer.ok) return content;
  const error = new Error(content.error ?? `the console answered ${answer.status}`);
  error.login = content.login === true;
  throw error;
}
