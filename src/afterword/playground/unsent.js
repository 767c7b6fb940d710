// Shows which part of the document is not sent: dimmed, with a line below it that says why.

import { find } from "./dom.js";

const NAME = "unsent";

export class Unsent {
  /** `mirror`: the drawn text. */
  constructor(mirror) {
    Object.assign(this, { mirror, start: 0 });
    new ResizeObserver(() => this.#place()).observe(find("paper"));
  }

  /** The text before `start` is not sent. */
  show(start) {
    this.start = start;
    find("cut").hidden = start === 0;
    this.#dim();
    this.#place();
  }

  /** Browsers without the highlight interface show the line only. */
  #dim() {
    if (!globalThis.Highlight) return;
    CSS.highlights.delete(NAME);
    if (!this.start) return;
    const range = new Range();
    range.setStart(this.mirror.root, 0);
    range.setEnd(...this.mirror.pointAt(this.start));
    CSS.highlights.set(NAME, new Highlight(range));
  }

  #place() {
    if (!this.start) return;
    const range = new Range();
    const [node, offset] = this.mirror.pointAt(this.start);
    range.setStart(node, offset);
    range.setEnd(node, Math.min(offset + 1, node.length ?? offset));
    const box = range.getClientRects()[0] ?? node.getBoundingClientRect?.();
    if (box) find("cut").style.top = `${box.top - find("paper").getBoundingClientRect().top}px`;
  }
}
