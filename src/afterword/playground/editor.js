// The text field and the mirror under it: the field has the text, the caret and the keyboard, the mirror has the looks.
// Both break lines alike. It tells what the person did; it decides nothing.

import { difference } from "./pieces.js";

const LONG = 12_000; // letters from which on the field costs too much to be set for every token of a stream
const LATER = 400; // milliseconds that it may then be behind what is drawn
const BEFORE_EDITS = ["keydown", "pointerdown", "beforeinput", "compositionstart", "drop"];

export class Editor {
  /** `told`: {edit(start, end, text, caret), move(), point(piece or null, clicked)}. */
  constructor(area, mirror, told) {
    Object.assign(this, { area, mirror, told, text: "", selected: [0, 0], late: null, timer: 0 });
    for (const name of BEFORE_EDITS) area.addEventListener(name, () => this.#catchUp(), { capture: true });
    area.addEventListener("input", () => this.#changed());
    document.addEventListener("selectionchange", () => this.#moved());
    for (const name of ["keyup", "pointerup", "focus"]) area.addEventListener(name, () => this.#moved());
    area.addEventListener("pointermove", (event) => event.buttons || this.#pointed(event));
    area.addEventListener("pointerleave", () => told.point(null, false));
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

  /** Show pieces, without colour what is not of the seed's model. The caret stays where it is unless it is given.
   * `growing`: more will come at once. */
  show(pieces, text, seed, caret = null, growing = false) {
    this.late = text;
    if (!growing || text.length < LONG) this.#catchUp();
    else this.timer ||= setTimeout(() => this.#catchUp(), LATER);
    if (caret !== null) this.area.setSelectionRange(caret, caret);
    this.mirror.render(pieces, seed);
  }

  /** Give the field the text that is drawn; a selection that lies behind what is new moves with its text. */
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
    this.told.edit(start, end, text, selectionEnd);
  }

  #moved() {
    const now = [this.start, this.end];
    if (document.activeElement !== this.area || `${now}` === `${this.selected}`) return;
    this.selected = now;
    this.told.move();
  }

  #pointed({ clientX, clientY }, clicked = false) {
    this.told.point(this.mirror.pieceAt(clientX, clientY), clicked);
  }
}
