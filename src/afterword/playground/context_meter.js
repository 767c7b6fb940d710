// The context bar: how many tokens the text has by the server's tokenizer, and, if the user wants that, which part of it
// does not fit and is not sent.

import { ContextWindow } from "./context.js";
import { find } from "./dom.js";
import { showContext } from "./meters.js";
import { besides, compose } from "./prompt.js";
import { preferences } from "./storage.js";

const PAUSE = { idle: 250, busy: 600 }; // milliseconds without a change, after which the text is counted
const MOST = 16; // tokens that are generated if the request does not say

export class ContextMeter {
  /** `text()`, `notes()` and `most()`: the document, its notes and `max_tokens`; `changed()`: the result is another one. */
  constructor({ server, models, unsent, text, notes, most, busy, changed }) {
    Object.assign(this, { models, unsent, text, notes, most, busy, changed, timer: 0 });
    const count = async (prompt) => (prompt ? (await server.post("tokenize", { prompt, model: models.name })).count : 0);
    this.count = count;
    this.window = new ContextWindow({ count });
    this.forget();
    find("leave-out").checked = this.leavesOut;
    find("leave-out").addEventListener("change", () => this.leaveOut(find("leave-out").checked));
  }

  /** Whether the user wants the oldest text to be left out when the context is full. */
  get leavesOut() {
    return preferences.get("leave-out", false);
  }

  leaveOut(on) {
    find("leave-out").checked = on;
    preferences.set("leave-out", on);
    this.forget();
    this.changed();
  }

  /** The text is counted anew, such as for another model. */
  forget() {
    Object.assign(this, { counted: null, tokens: 0 });
  }

  /** The first character of the document that is sent. */
  get start() {
    return this.leavesOut ? Math.min(this.window.start, this.text().length) : 0;
  }

  /** The prompt for a text, in which `most` tokens and a suffix fit too. Throws `Problem`. */
  async compose(text, { suffix = "", most = MOST }) {
    const notes = this.notes();
    if (!this.leavesOut) return compose(text, 0, notes);
    const others = await this.count(besides(notes) + suffix);
    const start = await this.window.fit(text, (this.models.current?.max_model_len ?? Infinity) - most - others);
    this.unsent.show(start);
    return compose(text, start, notes);
  }

  /** Show what is known, and count when typing pauses. */
  update() {
    const text = this.text();
    const { current } = this.models;
    if (!text) Object.assign(this, { counted: text, tokens: 0 });
    showContext(this.tokens, current?.max_model_len ?? 0);
    if (this.counted === text || this.timer || !current) return;
    this.timer = setTimeout(() => this.#measure(), this.busy() ? PAUSE.busy : PAUSE.idle);
  }

  async #measure() {
    const text = this.text();
    try {
      const { sent } = await this.compose(text, { most: this.most() ?? MOST });
      this.tokens = await this.count(sent);
    } catch {
      // the next request will report the error
    }
    Object.assign(this, { counted: text, timer: 0 });
    this.changed();
  }
}
