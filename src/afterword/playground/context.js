// How much of the text fits into the model's context. Finds where the request begins when the oldest text is left out.

const FILLED = 0.875; // of the room is filled after a cut: the next cut is far away, and the server's prefix cache fits
const TRIES = 8;
const BORDERS = [/\n\s*\n/g, /\n/g, /[.!?…。！？]["'”’»)]*\s+/g, /\s+/g]; // in the order in which they are preferred

export class ContextWindow {
  /** `count(text)`: a promise of the number of its tokens. */
  constructor({ count }) {
    Object.assign(this, { count, start: 0, used: 0, letters: 3 });
  }

  /** Find the first character of a text that is sent, so that the rest has at most `room` tokens. */
  async fit(text, room) {
    const kept = this.start && this.start < text.length ? text.slice(this.start) : null;
    if (kept !== null && (await this.#tokens(kept)) <= room && this.#serves(room)) return this.start;
    this.start = (await this.#fits(text, room)) ? 0 : await this.#search(text, room);
    return this.start;
  }

  /** Whether the beginning that was found before still serves: not much is left out that would fit. */
  #serves(room) {
    const hidden = this.start / this.letters;
    return this.used > room / 2 && this.used + hidden * 0.8 > room;
  }

  /** Whether the whole text fits. A text that is certainly too long is not sent to the tokenizer. */
  async #fits(text, room) {
    return text.length <= room * this.letters * 2 && (await this.#tokens(text)) <= room;
  }

  async #search(text, room) {
    const wanted = Math.max(1, Math.floor(room * FILLED));
    let length = Math.min(text.length, Math.ceil(wanted * this.letters));
    let start = text.length;
    for (let i = 0; i < TRIES; i++) {
      const tokens = await this.#tokens(text.slice(-length));
      const fits = tokens <= wanted;
      if (fits) start = Math.min(start, text.length - length);
      if (fits && tokens > wanted * 0.92) break;
      length = Math.min(text.length, Math.max(1, Math.floor(length * (wanted / Math.max(1, tokens)) * 0.98)));
    }
    start = borderFrom(text, start);
    await this.#tokens(text.slice(start));
    return start;
  }

  async #tokens(text) {
    this.used = await this.count(text);
    if (this.used > 8) this.letters = text.length / this.used;
    return this.used;
  }
}

/** The best place to cut at or behind an offset, within an eighth of the rest. */
export function borderFrom(text, start) {
  const rest = text.slice(start, start + Math.floor((text.length - start) / 8));
  for (const border of BORDERS) {
    border.lastIndex = 0;
    const found = border.exec(rest);
    if (found) return start + found.index + found[0].length;
  }
  return start;
}
