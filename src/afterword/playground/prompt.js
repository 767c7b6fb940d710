// What is sent for a text, and which part of the document each part of it is. Pure functions.

import { YOU, extend, piece, slice } from "./pieces.js";

/** What is sent: the memory, then the text from `start` on, in which the note stands before the last `depth` lines.
 * `parts`: the document's text from `from` to `to` begins in the sent text at `at`. */
export function compose(text, start = 0, { memory = "", note = "", depth = 1 } = {}) {
  const before = lined(memory);
  const between = lined(note);
  const split = note ? lastLines(text, start, depth) : text.length;
  const parts = [
    { from: start, to: split, at: before.length },
    { from: split, to: text.length, at: before.length + split - start + between.length },
  ];
  const sent = before + text.slice(start, split) + between + text.slice(split);
  return { sent, parts: parts.filter(({ from, to }) => from < to) };
}

/** All that is sent besides the document. */
export const besides = ({ memory, note }) => lined(memory) + lined(note);

const lined = (text) => (!text || text.endsWith("\n") ? text : `${text}\n`);

/** Where the last lines of a text begin, not before `start`. */
function lastLines(text, start, depth) {
  let at = text.length + 1;
  for (let i = 0; i < depth && at > start; i++) at = at > 0 ? text.lastIndexOf("\n", at - 2) + 1 : 0;
  return Math.max(start, Math.min(at, text.length));
}

/** The document's pieces with the numbers of the pieces of the sent text. `hash`: of the model. */
export function renumbered(old, read, parts, hash) {
  const found = [];
  let done = 0;
  for (const { from, to, at } of parts) {
    found.push(...slice(old, done, from));
    const before = found.reduce((all, { text }) => extend(text, all), hash);
    found.push(...credited(rebased(slice(read, at, at + to - from), before), slice(old, from, to)));
    done = to;
  }
  return [...found, ...slice(old, done)];
}

/** The scored pieces with the authors of the pieces that they replace. */
function credited(read, old) {
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

/** The pieces with numbers that belong to the document's text before them instead of the sent text. */
function rebased(pieces, hash) {
  return pieces.map((p) => {
    const context = hash;
    hash = extend(p.text, hash);
    return p.token ? piece(p.text, p.by, Object.freeze({ ...p.token, context })) : p;
  });
}
