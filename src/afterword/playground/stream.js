// Runs one request: turns chunks into pieces and nodes, and measures times. It draws nothing; it calls back when there is
// new text, at most once per animation frame.

import { MODEL, YOU, extend, textOf } from "./pieces.js";
import { renumbered } from "./prompt.js";
import { piecesOf } from "./tokens.js";

const SHORTEST = 20; // milliseconds: below it a rate in tokens per second means nothing

/** One of the n choices while it streams. */
export class Answer {
  /** `before` and `after`: the document's pieces around the generated text. */
  constructor(node, before, after, { gap, seed }) {
    Object.assign(this, { node, before, after, gap, seed });
    this.grown = [];
    this.begun = this.hash = extend(textOf(before), seed);
    this.prompt = null;
    this.echoed = null;
    this.finish = null;
    this.tokens = 0;
  }

  /** Add a choice of a chunk or of a whole response. `echo`: the first text begins with the prompt. */
  take({ text, logprobs, finish_reason: finish, token_ids: ids }, echo) {
    let columns = logprobs && { ...logprobs };
    if (columns && ids?.length === columns.tokens.length) columns.more = ids.map((id) => ({ id }));
    if (echo && this.echoed === null) {
      const { sent, parts } = this.prompt;
      const letters = [...sent].length;
      const read = columns ? piecesOf(sent, part(columns, 0, letters), YOU, this.seed) : [];
      this.echoed = read.length ? renumbered(this.before, read, parts, this.seed) : this.before;
      text = text.slice(sent.length);
      columns = columns && part(columns, letters, Infinity);
    }
    this.tokens += columns ? columns.tokens.length : text ? 1 : 0;
    const found = piecesOf(text, columns, MODEL, this.hash, this.gap);
    for (const { text } of found) this.hash = extend(text, this.hash);
    this.grown.push(...found);
    this.finish = finish ?? this.finish;
  }

  get pieces() {
    return [...(this.echoed ?? this.before), ...this.grown, ...this.after];
  }
}

/** The columns of the tokens with a text offset in [from, to). */
function part(columns, from, to) {
  const mine = columns.text_offset.map((at) => at >= from && at < to);
  const only = (list) => list && list.filter((_, i) => mine[i]);
  const { tokens, token_logprobs, top_logprobs, text_offset, more } = columns;
  return {
    tokens: only(tokens),
    token_logprobs: only(token_logprobs),
    top_logprobs: only(top_logprobs),
    text_offset: only(text_offset),
    more: only(more),
  };
}

/** The pieces of the sent text in a response to a scoring request. */
export function readingOf(answer, sent, seed) {
  const [choice] = answer.choices;
  const columns = { ...choice.logprobs };
  const scores = choice.prompt_logprobs?.slice(-columns.tokens.length); // without added tokens
  columns.more = scores?.map((entry) => {
    const [first] = Object.entries(entry ?? {});
    return first && { id: Number(first[0]), rank: first[1].rank };
  });
  return piecesOf(sent, columns, YOU, seed);
}

export class Clock {
  constructor() {
    this.began = performance.now();
    this.first = null;
    this.last = null;
  }

  tick() {
    this.last = performance.now();
    this.first ??= this.last;
  }

  /** Milliseconds to the first token. */
  get wait() {
    return this.first === null ? null : this.first - this.began;
  }

  /** Tokens per second since the first token; for a whole response, since the request. */
  rate(tokens) {
    const streamed = this.last - this.first >= SHORTEST;
    const seconds = (this.last - (streamed ? this.first : this.began)) / 1000;
    const counted = streamed ? tokens - 1 : tokens;
    return this.first === null || counted < 1 || seconds <= 0 ? null : counted / seconds;
  }
}
