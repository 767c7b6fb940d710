// The popover of a token: its alternatives with their probabilities, one of which the user can choose.

import { icon, make, number } from "./dom.js";
import { isBytes, percent, shown } from "./tokens.js";

const DWELL = 140; // milliseconds that the pointer rests on a token before its popover opens
const GRACE = 280; // milliseconds that the pointer may be outside before the popover closes

export class Popover {
  /** `choose(piece, raw)`: replace the piece by that token and continue. `boxOf(piece)`: its bounding box. */
  constructor(element, { choose, boxOf, closed }) {
    Object.assign(this, { element, choose, boxOf, closed, piece: null, timer: 0 });
    element.addEventListener("pointerenter", () => clearTimeout(this.timer));
    element.addEventListener("pointerleave", () => this.point(null));
    element.addEventListener("keydown", (event) => this.#key(event));
  }

  get open() {
    return this.piece !== null;
  }

  /** The pointer moved to a token, or away from tokens (null). */
  point(piece, details) {
    if (piece === this.piece && piece) return clearTimeout(this.timer);
    if (!piece && !this.open) return clearTimeout(this.timer);
    if (!piece && this.element.contains(document.activeElement)) return undefined;
    clearTimeout(this.timer);
    this.timer = setTimeout(() => (piece ? this.show(piece, details) : this.hide()), piece ? DWELL : GRACE);
    return undefined;
  }

  /** `details`: {stale}. `focus`: move keyboard focus to the alternatives. */
  show(piece, { stale = false } = {}, focus = false) {
    const box = piece.token && this.boxOf(piece);
    if (!box) return this.hide();
    clearTimeout(this.timer);
    this.piece = piece;
    this.element.setAttribute("aria-label", `Alternatives to ${shown(piece.text)}`);
    this.element.replaceChildren(...this.#content(piece, stale));
    this.element.hidden = false;
    this.#place(box);
    if (focus) (this.#buttons()[0] ?? this.element).focus();
    return undefined;
  }

  hide() {
    clearTimeout(this.timer);
    if (!this.open) return;
    const held = this.element.contains(document.activeElement);
    this.piece = null;
    this.element.hidden = true;
    if (held) this.closed();
  }

  #content(piece, stale) {
    const { parts, logprob, gap } = piece.token;
    const numbers = logprob === null ? "the first token: nothing stands before it" : `${number(logprob, 3)} nats`;
    const head = make("header", {},
      make("strong", { className: "spelled" }, shown(piece.text)),
      make("span", {}, logprob === null ? "" : percent(Math.exp(logprob))),
      make("small", {}, numbers),
    );
    const notes = [
      stale ? "Of another text or another model: score again." : null,
      gap ? "Written into a gap: the model had read what follows." : null,
      parts.length > 1 ? `One character from ${parts.length} tokens.` : null,
    ];
    const facts = parts.length === 1 ? factsOf(parts[0]) : "";
    return [
      head,
      ...parts.flatMap((part, i) => this.#list(piece, part, i, parts.length > 1)),
      ...notes.filter(Boolean).map((text) => make("p", {}, text)),
      ...(facts ? [make("p", {}, facts)] : []),
    ];
  }

  #list(piece, part, index, several) {
    const rows = part.top.map(([raw, logprob]) => this.#row(piece, part, raw, logprob, index));
    const rest = 1 - part.top.reduce((sum, [, logprob]) => sum + Math.exp(logprob), 0);
    if (rows.length && rest > 0.0005) {
      rows.push(make("li", { className: "rest" }, make("span", { className: "spelled" }, "all others"), bar(rest)));
    }
    const title = several ? [make("p", {}, `${shown(part.raw)} ${percent(Math.exp(part.logprob))}`)] : [];
    return [...title, make("ul", {}, ...rows)];
  }

  #row(piece, part, raw, logprob, index) {
    const chosen = raw === part.raw;
    const partial = isBytes(raw) || index > 0;
    const cut = "Cut the text here and go on with this.";
    const why = partial ? "A part of a character cannot be put into a text alone." : cut;
    const button = make("button", {
      type: "button",
      disabled: partial && !chosen,
      title: chosen ? "Go on from here with this token." : why,
      "aria-current": chosen ? "true" : null,
      onclick: () => this.choose(piece, part, raw, logprob),
    }, make("span", { className: "spelled" }, shown(raw)), bar(Math.exp(logprob)));
    if (chosen) button.prepend(icon("dot"));
    if (chosen && partial) button.disabled = true;
    return make("li", {}, button);
  }

  #buttons() {
    return [...this.element.querySelectorAll("button:not(:disabled)")];
  }

  #key(event) {
    const buttons = this.#buttons();
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (event.altKey || !step || !buttons.length) return;
    event.preventDefault();
    const at = buttons.indexOf(document.activeElement);
    buttons[(at + step + buttons.length) % buttons.length].focus();
  }

  #place(box) {
    const { offsetWidth: width, offsetHeight: height, style } = this.element;
    const below = box.bottom + 6;
    const fits = below + height < innerHeight - 8;
    style.left = `${Math.max(8, Math.min(box.left - 12, innerWidth - width - 8))}px`;
    style.top = `${fits ? below : Math.max(8, box.top - height - 6)}px`;
  }
}

function factsOf({ id, rank, raw, top }) {
  const place = rank ?? top.findIndex(([other]) => other === raw) + 1;
  const known = [place > 0 ? `rank ${number(place)}` : null, id === undefined ? null : `token ${id}`];
  return known.filter(Boolean).join(" · ");
}

function bar(share) {
  const fill = make("i", {});
  fill.style.width = `${Math.min(100, share * 100)}%`;
  const drawn = make("span", { className: "bar" }, fill);
  return make("span", { className: "share" }, drawn, make("span", {}, percent(share)));
}
