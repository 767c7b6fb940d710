// A document is a list of frozen pieces. A piece is text by one author (user or model), perhaps a token with its log
// probability. Pure functions, without access to the page. Offsets are in UTF-16 code units, as browsers count.

export const YOU = "you";
export const MODEL = "model";
const START = 2166136261; // the offset basis of the FNV-1a hash
const UTF8 = new TextEncoder();

/** `token`: null or {parts, logprob, context, gap}; `context` is the hash of all text that stood before it. */
export const piece = (text, by, token = null) => Object.freeze({ text, by, token });

export const textOf = (pieces) => pieces.map((p) => p.text).join("");

export const lengthOf = (pieces) => pieces.reduce((sum, p) => sum + p.text.length, 0);

/** The pieces between two offsets. A token that is cut becomes plain text. */
export function slice(pieces, start, end = Infinity) {
  const found = [];
  let at = 0;
  for (const p of pieces) {
    const stop = at + p.text.length;
    if (at >= start && stop <= end) found.push(p);
    else if (stop > start && at < end) {
      found.push(piece(p.text.slice(Math.max(0, start - at), end - at), p.by));
    }
    at = stop;
  }
  return found;
}

/** Concatenate lists of pieces; plain neighbours by one author are merged. */
export function join(...lists) {
  const all = [];
  for (const list of lists) {
    for (const p of list) {
      const last = all.at(-1);
      if (!p.text) continue;
      if (last && !last.token && !p.token && last.by === p.by) all[all.length - 1] = piece(last.text + p.text, p.by);
      else all.push(p);
    }
  }
  return all;
}

/** Replace the text between two offsets. Unchanged pieces stay the same objects. */
export function splice(pieces, start, end, inserted) {
  const before = slice(pieces, 0, start);
  const after = slice(pieces, end);
  // Only pieces beside an inserted range can have a plain neighbour, so only they are joined.
  const seam = join(before.slice(-1), inserted, after.slice(0, 1));
  return [...before.slice(0, -1), ...seam, ...after.slice(1)];
}

/** The one changed range: old[start, end) became `text`. `caret` decides between repeated characters. */
export function difference(old, now, caret = now.length) {
  let tail = now.length - caret;
  if (!old.endsWith(now.slice(caret))) tail = 0;
  const most = Math.min(old.length, now.length) - tail;
  let head = 0;
  while (head < most && old[head] === now[head]) head++;
  const rest = Math.min(old.length, now.length) - head;
  while (tail < rest && old[old.length - 1 - tail] === now[now.length - 1 - tail]) tail++;
  return { start: head, end: old.length - tail, text: now.slice(head, now.length - tail) };
}

/** The hash of a text; with `hash`, of a text that continues a hashed one. */
export function extend(text, hash = START) {
  for (let i = 0; i < text.length; i++) hash = Math.imul(hash ^ text.charCodeAt(i), 16777619);
  return hash;
}

/** The initial hash for a model and for what it reads besides the document: their log probabilities differ. */
export const seedOf = (model, around = "") => extend(around, extend(`${model}\n`));

/** Each piece with its offset, and whether its numbers still belong to the text before it. `hash`: of the model's seed and
 * of any text before the first piece. */
export function* piecesWithOffsets(pieces, hash = START) {
  let at = 0;
  for (const p of pieces) {
    yield { piece: p, start: at, end: at + p.text.length, stale: p.token !== null && p.token.context !== hash };
    at += p.text.length;
    hash = extend(p.text, hash);
  }
}

/** The index of the piece with the character at an offset; at the end, the last piece. */
export function pieceAt(pieces, offset) {
  let last = null;
  for (const located of piecesWithOffsets(pieces)) {
    last = located;
    if (offset < located.end) return located;
  }
  return last;
}

/** Statistics of the tokens that lie completely between two offsets. Log probabilities in nats. */
export function measure(pieces, seed, from = 0, to = Infinity) {
  const sum = { tokens: 0, scored: 0, logprob: 0, bytes: 0, plain: 0, stale: 0 };
  for (const { piece: p, start, end, stale } of piecesWithOffsets(pieces, seed)) {
    if (start < from || end > to) continue;
    if (!p.token) {
      sum.plain += p.text.length;
      continue;
    }
    sum.tokens += p.token.parts.length;
    if (p.token.logprob === null) continue;
    sum.scored += p.token.parts.length;
    sum.logprob += p.token.logprob;
    sum.bytes += UTF8.encode(p.text).length;
    if (stale) sum.stale += p.token.parts.length;
  }
  return sum;
}
