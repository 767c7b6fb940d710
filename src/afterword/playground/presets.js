// Named sets of settings, which the user saves, applies and deletes.

import { find, icon, make } from "./dom.js";
import { preferences } from "./storage.js";

export class Presets {
  /** `read()` returns the settings; `apply(values)` sets them. */
  constructor({ read, apply }) {
    Object.assign(this, { read, apply });
    find("preset-save").addEventListener("click", () => this.#save());
    find("preset-name").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.ctrlKey && !event.metaKey) this.#save();
    });
  }

  get #all() {
    return preferences.get("presets", []);
  }

  #save() {
    const name = find("preset-name").value.trim();
    if (!name) return find("preset-name").focus();
    const others = this.#all.filter((one) => one.name !== name);
    preferences.set("presets", [...others, { name, values: this.read() }]);
    find("preset-name").value = "";
    return this.show();
  }

  /** Show the presets, with a mark at the one that is set. */
  show() {
    const now = JSON.stringify(this.read());
    const rows = this.#all.map(({ name, values }) => make("li", {},
      make("button", {
        type: "button",
        className: "branch",
        "aria-current": JSON.stringify(values) === now ? "true" : null,
        onclick: () => this.apply(values),
      }, make("span", { dir: "auto" }, name)),
      make("button", {
        type: "button", className: "plain", "aria-label": `Delete the preset ${name}`,
        onclick: () => {
          preferences.set("presets", this.#all.filter((one) => one.name !== name));
          this.show();
        },
      }, icon("close")),
    ));
    find("preset-list").replaceChildren(...rows);
  }
}
