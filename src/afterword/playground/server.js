// All communication with the server. No other module calls fetch; only the page's own origin is contacted.

const BROKEN = "The connection closed before the response was complete.";

/** An error with the server's message. `status` is 0 if there was no response. */
export class Problem extends Error {
  constructor(message, { status = 0, id = "", param = null, code = null } = {}) {
    super(message);
    Object.assign(this, { status, id, param, code });
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
    return whole(await this.#send(path, {}));
  }

  async post(path, body) {
    return whole(await this.#post(path, body));
  }

  /** The chunks of a streamed completion, or one object for a whole one. Throws `Problem`. */
  async *complete(body, signal) {
    const response = await this.#post("v1/completions", body, signal);
    if (!body.stream) {
      yield await whole(response);
      return;
    }
    const id = idOf(response);
    try {
      for await (const data of events(response.body)) {
        if (data === "[DONE]") return;
        const value = JSON.parse(data);
        if (value.error) throw new Problem(value.error.message, { id, param: value.error.param });
        yield value;
      }
    } catch (error) {
      throw broken(error, id);
    }
    throw new Problem(BROKEN, { id });
  }

  #post(path, body, signal) {
    const headers = { "Content-Type": "application/json" };
    return this.#send(path, { method: "POST", headers, body: JSON.stringify(body), signal });
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

const idOf = (response) => response.headers.get("x-request-id") ?? "";

/** The object of a response that is not streamed. */
async function whole(response) {
  try {
    return await response.json();
  } catch (error) {
    throw broken(error, idOf(response));
  }
}

/** What reading a body threw, as a `Problem`: browsers throw a TypeError when the server dies within a body. */
const broken = (error, id) => (error instanceof Problem || error.name === "AbortError" ? error : new Problem(BROKEN, { id }));

async function problemOf(response) {
  const text = await response.text().catch(() => "");
  const facts = { status: response.status, id: idOf(response) };
  try {
    const { message, param, code } = JSON.parse(text).error;
    return new Problem(message, { ...facts, param, code });
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
