// The server-sent events as DOM events, and the state of the connection.

export class Live extends EventTarget {
  #source = null;

  // Listen to the fleet, and to one stream in depth where `stream` names one.
  open(stream) {
    this.close();
    const query = stream === null ? "" : `?stream=${encodeURIComponent(stream)}`;
    const source = new EventSource(`/api/live${query}`);
    this.#source = source;
    source.onopen = () => this.#say("link", { up: true });
    source.onerror = () => this.#say("link", { up: false, ended: source.readyState === EventSource.CLOSED });
    for (const kind of ["fleet", "stream", "site"]) {
      source.addEventListener(kind, (event) => this.#say(kind, JSON.parse(event.data)));
    }
  }

  close() {
    this.#source?.close();
    this.#source = null;
  }

  #say(kind, detail) {
    this.dispatchEvent(new CustomEvent(kind, { detail }));
  }
}
