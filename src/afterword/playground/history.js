// What was, and what was undone: states of the desk, one line of time. Edits of one go are one step.

const MOST = 300;
const PAUSE = 900; // milliseconds after which typing is a new step

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

  /** Keep a state that is about to change. Typing that goes on where it was is one step with what came before. */
  keep(state, kind = "") {
    const now = performance.now();
    const goesOn = kind !== "" && kind === this.kind && now - this.time < PAUSE;
    if (!goesOn) this.past.push(state);
    if (this.past.length > MOST) this.past.shift();
    Object.assign(this, { kind, time: now, future: [] });
  }

  /** Take back the last `keep`: nothing came of it. */
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
