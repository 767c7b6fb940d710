// The text field and the mirror under it. The field holds text, caret and keyboard focus; the mirror draws the colours.
// Both break lines at the same places. The editor reports user input as events and decides nothing.

import { difference } from "./pieces.js";

const LONG = 12_000; // characters: above it, setting the field for every token of a stream is too slow
const LATER = 400; // milliseconds: the field's greatest delay behind the mirror for such a text
const BEFORE_EDITS = ["keydown", "pointerdown", "beforeinput", "compositionstart", "drop"];

export class Editor {
  /** `handlers`: {edit(start, end, text, caret), move(), point(piece or null, clicked)}. */
  constructor(area, mirror, handlers) {
    Object.assign(this, { area, mirror, handlers, text: "", selected: [0, 0], late: null, timer: 0 });
    for (const name of BEFORE_EDITS) area.addEventListener(name, () => this.#catchUp(), { capture: true });
    area.addEventListener("input", () => this.#changed());
    document.addEventListener("selectionchange", () => this.#moved());
    for (const name of ["keyup", "pointerup", "focus"]) area.addEventListener(name, () => this.#moved());
    area.addEventListener("pointermove", (event) => event.buttons || this.#pointed(event));
    area.addEventListener("pointerleave", () => handlers.point(null, false));
    area.addEventListener("click", (event) => {
      if (area.selectionStart === area.selectionEnd) this.#pointed(event, true);
    });
  }

  get start() {
    return this.area.selectionStart;
  }

  get end() {
    return this.area.selectionEnd;
  }

  /** Show pieces; tokens of other models than the seed's have no colour. The caret stays where it is unless it is given.
   * `growing`: the next call follows soon. */
  show(pieces, text, seed, caret = null, growing = false) {
    this.late = text;
    if (!growing || text.length < LONG) this.#catchUp();
    else this.timer ||= setTimeout(() => this.#catchUp(), LATER);
    if (caret !== null) this.area.setSelectionRange(caret, caret);
    this.mirror.render(pieces, seed);
  }

  /** Set the field to the drawn text. A selection behind the inserted text moves with it. */
  #catchUp() {
    clearTimeout(this.timer);
    this.timer = 0;
    const { area, late } = this;
    this.late = null;
    if (late === null || late === this.text) return;
    const { selectionStart, selectionEnd, selectionDirection } = area;
    const { start } = difference(this.text, late);
    const moved = (at) => (at > start ? Math.max(start, at + late.length - this.text.length) : at);
    const selection = [moved(selectionStart), moved(selectionEnd), selectionDirection];
    area.value = this.text = late;
    area.setSelectionRange(...selection);
  }

  #changed() {
    const { value, selectionEnd } = this.area;
    const { start, end, text } = difference(this.text, value, selectionEnd);
    this.text = value;
    this.handlers.edit(start, end, text, selectionEnd);
  }

  #moved() {
    const now = [this.start, this.end];
    if (document.activeElement !== this.area || `${now}` === `${this.selected}`) return;
    this.selected = now;
    this.handlers.move();
  }

  #pointed({ clientX, clientY }, clicked = false) {
    this.handlers.point(this.mirror.pieceAt(clientX, clientY), clicked);
  }
}
