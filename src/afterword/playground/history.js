// Undo and redo: a linear list of the document's states. Edits without a pause between them are one step.

const MOST = 300;
const PAUSE = 900; // milliseconds without an edit, after which typing begins a new step

export class History {
  constructor() {
    this.clear();
  }

  clear() {
    this.past = [];
    this.future = [];
    this.kind = "";
    this.time = 0;
  }

  /** Record the state before a change. Typing that continues at the same place is one step. */
  keep(state, kind = "") {
    const now = performance.now();
    const goesOn = kind !== "" && kind === this.kind && now - this.time < PAUSE;
    if (!goesOn) this.past.push(state);
    if (this.past.length > MOST) this.past.shift();
    Object.assign(this, { kind, time: now, future: [] });
  }

  /** Remove the last recorded state: nothing was changed. */
  forget() {
    this.past.pop();
    this.kind = "";
  }

  undo(state) {
    return this.#step(this.past, this.future, state);
  }

  redo(state) {
    return this.#step(this.future, this.past, state);
  }

  #step(from, to, state) {
    this.kind = "";
    if (!from.length) return null;
    to.push(state);
    return from.pop();
  }
}
