// The session's memory and author's note: their fields in the panel. prompt.js puts them into the prompt.

import { find } from "./dom.js";

const EMPTY = { memory: "", note: "", depth: 3 };
const FIELDS = { memory: "memory", note: "note", depth: "note-depth" };

export class Notes {
  /** `changed()`: the user changed a field. */
  constructor({ changed }) {
    this.values = { ...EMPTY };
    for (const [name, id] of Object.entries(FIELDS)) {
      find(id).addEventListener("input", (event) => {
        const { value } = event.target;
        this.values = { ...this.values, [name]: name === "depth" ? Math.max(1, Math.floor(Number(value)) || EMPTY.depth) : value };
        changed();
      });
    }
  }

  /** Show a session's values. */
  show(values) {
    this.values = { ...EMPTY, ...values };
    for (const [name, id] of Object.entries(FIELDS)) find(id).value = this.values[name];
    find("notes").open = Boolean(this.values.memory || this.values.note);
  }

  /** A text that differs if and only if the model reads something else around the document. */
  get around() {
    const { memory, note, depth } = this.values;
    return memory || note ? JSON.stringify([memory, note, note ? depth : 0]) : "";
  }
}
