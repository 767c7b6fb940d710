// Stored sessions: which one is open, the list of the others, and export and import as files.

import { find, icon, make } from "./dom.js";
import { preferences, sessions } from "./storage.js";
import { Tree } from "./tree.js";

const KIND = "afterword session";

const shown = (time) => new Date(time).toLocaleString([], { dateStyle: "short", timeStyle: "short" });

export class SessionList {
  /** `read()` returns the open session as plain data; `lay(session)` opens one, null for an empty one. */
  constructor({ read, lay, fail }) {
    Object.assign(this, { read, lay, fail, id: "", name: "", timer: 0 });
    find("session-new").addEventListener("click", () => this.begin());
    find("session-export").addEventListener("click", () => this.#export());
    find("session-import").addEventListener("click", () => find("session-file").click());
    find("session-file").addEventListener("change", (event) => this.#import(event.target));
    find("session-name").addEventListener("input", (event) => {
      this.name = event.target.value;
      this.later();
    });
    find("tab-sessions").addEventListener("click", () => this.save());
    addEventListener("pagehide", () => this.save());
  }

  /** Open the session that was open when the page was closed. */
  resume() {
    const id = preferences.get("session", "");
    const found = sessions.get(id);
    if (found) this.#open(id, sessions.list().find((one) => one.id === id)?.name ?? "", found);
    else this.begin();
  }

  /** Whether this browser has no stored session. */
  get none() {
    return !sessions.list().length;
  }

  begin(session = null, name = "") {
    if (this.id) this.save();
    this.#open(crypto.getRandomValues(new Uint32Array(2)).join("-"), name, session);
  }

  /** Save after a short delay. */
  later() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.save(), 800);
  }

  save() {
    clearTimeout(this.timer);
    const session = this.read();
    if (!session.tree.pieces.length) return;
    const kept = sessions.put(this.id, this.#title(session), session);
    if (kept === "none") this.fail("This browser's storage is full. Export the sessions that you want to keep.");
    preferences.set("session", this.id);
    this.#draw();
  }

  #title({ tree }) {
    const text = tree.pieces.slice(0, 40).map((p) => p.text).join("");
    return this.name || text.trim().replace(/\s+/g, " ").slice(0, 40);
  }

  #open(id, name, session) {
    Object.assign(this, { id, name });
    find("session-name").value = name;
    this.lay(session && { ...session, tree: Tree.from(session.tree) });
    preferences.set("session", id);
    this.#draw();
  }

  #draw() {
    const rows = sessions.list().map(({ id, name, time }) => make("li", {},
      make("button", {
        type: "button",
        className: "branch",
        "aria-current": id === this.id ? "true" : null,
        onclick: () => {
          this.save();
          const found = sessions.get(id);
          if (found) this.#open(id, name, found);
        },
      }, make("span", {}, name), make("small", {}, shown(time))),
      make("button", {
        type: "button", className: "plain", "aria-label": `Delete ${name}`,
        onclick: () => this.#remove(id),
      }, icon("close")),
    ));
    find("sessions").replaceChildren(...rows);
  }

  #remove(id) {
    clearTimeout(this.timer);
    sessions.remove(id);
    if (id !== this.id) return this.#draw();
    this.id = "";
    return this.begin();
  }

  #export() {
    const session = this.read();
    const name = this.#title(session);
    const data = JSON.stringify({ kind: KIND, version: 1, name, ...session });
    const url = URL.createObjectURL(new Blob([data], { type: "application/json" }));
    make("a", { href: url, download: `${name.replace(/[^\w -]+/g, "").trim() || "session"}.json` }).click();
    setTimeout(() => URL.revokeObjectURL(url), 10_000);
  }

  async #import(input) {
    const [file] = input.files;
    input.value = "";
    if (!file) return;
    try {
      const { kind, version, name, ...session } = JSON.parse(await file.text());
      if (kind !== KIND || version !== 1) throw new Error("not a session");
      Tree.from(session.tree);
      this.begin(session, name);
      this.save();
    } catch {
      this.fail(`${file.name} is not a session of this playground.`);
    }
  }
}
