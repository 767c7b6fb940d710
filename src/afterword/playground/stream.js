// Runs one request: turns chunks into pieces and nodes, and measures times. It draws nothing; it calls back when there is
// new text, at most once per animation frame.

import { MODEL, YOU, extend, textOf } from "./pieces.js";
import { piecesOf } from "./tokens.js";

const SHORTEST = 20; // milliseconds: below it a rate in tokens per second means nothing

/** One of the n choices while it streams. */
export class Answer {
  constructor(node, before, after, { prompt, gap, seed }) {
    Object.assign(this, { node, before, after, prompt, gap, seed });
    this.grown = [];
    this.begun = this.hash = extend(textOf(before), seed);
    this.letters = [...prompt].length;
    this.echoed = null;
    this.finish = null;
    this.tokens = 0;
  }

  /** Add a choice of a chunk or of a whole response. `echo`: the first text begins with the prompt. */
  take({ text, logprobs, finish_reason: finish, token_ids: ids }, echo) {
    let columns = logprobs && { ...logprobs };
    if (columns && ids?.length === columns.tokens.length) columns.more = ids.map((id) => ({ id }));
    if (echo && this.echoed === null) {
      this.echoed = columns ? piecesOf(this.prompt, part(columns, 0, this.letters), YOU, this.seed) : [];
      text = text.slice(this.prompt.length);
      columns = columns && part(columns, this.letters, Infinity);
    }
    this.tokens += columns ? columns.tokens.length : text ? 1 : 0;
    const found = piecesOf(text, columns, MODEL, this.hash, this.gap);
    for (const { text } of found) this.hash = extend(text, this.hash);
    this.grown.push(...found);
    this.finish = finish ?? this.finish;
  }

  get pieces() {
    const before = this.echoed?.length ? credited(this.echoed, this.before) : this.before;
    return [...before, ...this.grown, ...this.after];
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

/** The scored pieces with the authors of the pieces that they replace. */
export function credited(read, old) {
  let at = 0;
  let i = 0;
  let end = old[0]?.text.length ?? 0;
  return read.map((p) => {
    while (at >= end && i < old.length - 1) end += old[++i].text.length;
    at += p.text.length;
    const by = old[i]?.by ?? YOU;
    return p.by === by ? p : Object.freeze({ ...p, by });
  });
}

/** The pieces of a response to a scoring request. */
export function readingOf(answer, prompt, old, seed) {
  const [choice] = answer.choices;
  const columns = { ...choice.logprobs };
  const scores = choice.prompt_logprobs?.slice(-columns.tokens.length); // without added tokens
  columns.more = scores?.map((entry) => {
    const [first] = Object.entries(entry ?? {});
    return first && { id: Number(first[0]), rank: first[1].rank };
  });
  return credited(piecesOf(prompt, columns, YOU, seed), old);
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
