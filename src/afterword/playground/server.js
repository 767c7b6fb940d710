// All that is said to the server and heard from it. Nothing else fetches; it speaks to its own origin only.

/** What went wrong, in the server's words. `status` is 0 where there was no answer at all. */
export class Problem extends Error {
  constructor(message, { status = 0, id = "", param = null } = {}) {
    super(message);
    Object.assign(this, { status, id, param });
  }
}

export class Server {
  /** `key` is asked for the API key at each request. */
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

  /** A completion as it comes: objects of the API, one for a whole answer. Raises `Problem`. */
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
    throw new Problem("The answer broke off before its end.", { id });
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

/** The data of server-sent events, one line each. */
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
    reader.cancel().catch(() => {}); // whoever stops listening closes the connection, and the work ends
  }
}
