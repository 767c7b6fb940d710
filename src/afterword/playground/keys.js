// The API key: its field in the panel, and the dialog that asks for one when the server refuses a request.

import { find } from "./dom.js";
import { key } from "./storage.js";

export class KeyDialog {
  /** `changed()`: another key was given. */
  constructor({ changed }) {
    this.changed = changed;
    this.#show();
    for (const id of ["key", "key-keep"]) {
      find(id).addEventListener("change", () => this.#take(find("key").value, find("key-keep").checked));
    }
    find("key-save").addEventListener("click", () => {
      this.#take(find("key-given").value, find("key-given-keep").checked);
      find("key-dialog").close();
    });
    find("key-given").addEventListener("keydown", (event) => event.key === "Enter" && find("key-save").click());
    find("key-cancel").addEventListener("click", () => find("key-dialog").close());
  }

  /** `message`: why the server refused the request. */
  ask(message) {
    find("key-message").textContent = message;
    find("key-given").value = "";
    find("key-given-keep").checked = key.kept;
    if (!find("key-dialog").open) find("key-dialog").showModal();
  }

  #take(text, keep) {
    key.set(text, keep);
    this.#show();
    this.changed();
  }

  #show() {
    find("key").value = key.get();
    find("key-keep").checked = key.kept;
  }
}
