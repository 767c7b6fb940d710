// Stored sessions: which one is open, the list of the others, and export and import as files.

import { find, icon, make } from "./dom.js";
import { sessions, shownSession } from "./storage.js";
import { Tree } from "./tree.js";

const KIND = "afterword session";

const shown = (time) => new Date(time).toLocaleString([], { dateStyle: "short", timeStyle: "short" });

const newId = () => crypto.getRandomValues(new Uint32Array(2)).join("-");

export class SessionList {
  /** `read()` returns the open session as plain data; `lay(session)` opens one, null for an empty one. `files`: kinds of
   * files besides sessions; `facts()` gives what they contain. */
  constructor({ read, lay, fail, files, facts }) {
    Object.assign(this, { read, lay, fail, files, facts, id: "", name: "", timer: 0 });
    this.state = null; // what was saved or opened last, to find changes of this tab
    this.stored = null; // what this tab read or wrote last, to find changes of other tabs
    this.paused = false; // nothing is saved until the user has chosen between two tabs' texts
    this.differs = () => {}; // called when another tab has saved something else
    find("session-new").addEventListener("click", () => this.begin());
    find("session-export").addEventListener("click", () => this.#export());
    find("session-import").addEventListener("click", () => find("session-file").click());
    find("session-file").addEventListener("change", (event) => this.#import(event.target));
    find("session-name").addEventListener("input", (event) => {
      this.name = event.target.value;
      this.later();
    });
    find("tab-sessions").addEventListener("click", () => this.save());
    addEventListener("pagehide", () => this.#leave());
  }

  /** Open the session that was open when the page was closed. */
  resume() {
    const id = shownSession.get();
    const found = sessions.get(id);
    if (found) this.#open(id, this.#listed(id), found);
    else this.begin();
  }

  /** Whether this browser has no stored session. */
  get none() {
    return !sessions.list().length;
  }

  /** Whether this tab has changes that are not saved. */
  get dirty() {
    return this.#now(this.read()) !== this.state;
  }

  begin(session = null, name = "") {
    if (this.id) this.#leave();
    this.#open(newId(), name, session);
  }

  /** Save after a short delay. */
  later() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.save(), 800);
  }

  save() {
    clearTimeout(this.timer);
    const session = this.read();
    const state = this.#now(session);
    const changed = session.tree.pieces.length > 0 && state !== this.state;
    if (changed && !this.paused) this.#put(session, state);
    this.#draw();
  }

  #put(session, state) {
    const raw = sessions.raw(this.id);
    if (raw !== null && raw !== this.stored) return this.differs();
    const kept = sessions.put(this.id, this.#title(session), session);
    if (kept === "none") this.fail("This browser's storage is full. Export the sessions that you want to keep.");
    else Object.assign(this, { state, stored: sessions.raw(this.id) });
    return shownSession.set(this.id);
  }

  /** Show what another tab has saved. */
  follow() {
    this.#open(this.id, this.#listed(this.id), sessions.get(this.id));
  }

  /** Save this tab's text instead of another tab's. */
  overwrite() {
    Object.assign(this, { state: null, stored: sessions.raw(this.id), paused: false });
    this.save();
  }

  /** Save this tab's text as another session. */
  split() {
    const name = `${this.#title(this.read())} (2)`;
    Object.assign(this, { id: newId(), name, state: null, stored: null, paused: false });
    find("session-name").value = name;
    this.save();
  }

  /** Another tab has changed the list. */
  renamed() {
    const name = this.#listed(this.id);
    if (name && !this.dirty && document.activeElement !== find("session-name")) {
      this.name = find("session-name").value = name;
      this.state = this.#now(this.read());
    }
    this.#draw();
  }

  /** Save before the session is left. A text whose tab was not chosen becomes a session of its own. */
  #leave() {
    this.save();
    if (this.paused) this.split();
  }

  #listed(id) {
    return sessions.list().find((one) => one.id === id)?.name ?? "";
  }

  #now(session) {
    return JSON.stringify([this.#title(session), session]);
  }

  #title({ tree }) {
    const text = tree.pieces.slice(0, 40).map((p) => p.text).join("");
    return this.name || text.trim().replace(/\s+/g, " ").slice(0, 40);
  }

  #open(id, name, session) {
    Object.assign(this, { id, name, paused: false, stored: sessions.raw(id) });
    find("session-name").value = name;
    this.lay(session && { ...session, tree: Tree.from(session.tree) });
    this.state = this.stored === null ? null : this.#now(this.read());
    shownSession.set(id);
    this.#draw();
  }

  #draw() {
    const rows = sessions.list().map(({ id, name, time }) => make("li", {},
      make("button", {
        type: "button",
        className: "branch",
        "aria-current": id === this.id ? "true" : null,
        onclick: () => {
          this.#leave();
          const found = sessions.get(id);
          if (found) this.#open(id, name, found);
        },
      }, make("span", { dir: "auto" }, name), make("small", {}, shown(time))),
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
    this.paused = false;
    this.id = "";
    return this.begin();
  }

  #export() {
    const session = this.read();
    const name = this.#title(session);
    const whole = () => JSON.stringify({ kind: KIND, version: 1, name, ...session });
    const file = this.files[find("export-kind").value] ?? { ending: "json", type: "application/json", content: whole };
    const url = URL.createObjectURL(new Blob([file.content({ name, ...this.facts() })], { type: file.type }));
    const stem = name.replace(/[^\p{L}\p{N}_ -]+/gu, "").trim() || "session";
    make("a", { href: url, download: `${stem}.${file.ending}` }).click();
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
