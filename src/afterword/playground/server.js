// All communication with the server. No other module calls fetch; only the page's own origin is contacted.

/** An error with the server's message. `status` is 0 if there was no response. */
export class Problem extends Error {
  constructor(message, { status = 0, id = "", param = null } = {}) {
    super(message);
    Object.assign(this, { status, id, param });
  }
}

export class Server {
  /** `key()` returns the API key; it is called for each request. */
  constructor(key) {
    this.key = key;
  }

  url(path) {
    return new URL(path, document.baseURI).href;
  }

  async get(path) {
    return (await this.#send(path, {})).json();
  }

  async post(path, body, signal) {
    const headers = { "Content-Type": "application/json" };
    return this.#send(path, { method: "POST", headers, body: JSON.stringify(body), signal });
  }

  /** The chunks of a streamed completion, or one object for a whole one. Throws `Problem`. */
  async *complete(body, signal) {
    const response = await this.post("v1/completions", body, signal);
    if (!body.stream) {
      yield await response.json();
      return;
    }
    const id = response.headers.get("x-request-id") ?? "";
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      const value = JSON.parse(data);
      if (value.error) throw new Problem(value.error.message, { id, param: value.error.param });
      yield value;
    }
    throw new Problem("The connection closed before the response was complete.", { id });
  }

  async #send(path, options) {
    const key = this.key();
    const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
    let response;
    try {
      response = await fetch(this.url(path), { ...options, headers });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Problem("The server cannot be reached.");
    }
    if (!response.ok) throw await problemOf(response);
    return response;
  }
}

async function problemOf(response) {
  const text = await response.text();
  const facts = { status: response.status, id: response.headers.get("x-request-id") ?? "" };
  try {
    const { message, param } = JSON.parse(text).error;
    return new Problem(message, { ...facts, param });
  } catch {
    return new Problem(text || response.statusText, facts);
  }
}

/** The data lines of server-sent events. */
export async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) if (line.startsWith("data: ")) yield line.slice(6);
    }
  } finally {
    reader.cancel().catch(() => {}); // closing the connection ends the work on the server
  }
}
