// Tokens as the server tells them, columns and offsets in code points, made into pieces; and how a token is shown.
// A token that is no whole character comes as `bytes:\xe2\x80`; those of one character make one piece together.

import { extend, piece } from "./pieces.js";

const NAMED = { " ": "␣", "\n": "↵", "\t": "⇥" };

export const isBytes = (raw) => raw.startsWith("bytes:") && raw.includes("\\x");

/** A token so that a person sees all of it. */
export function shown(raw) {
  if (!isBytes(raw)) return raw.replace(/^ +| +$|[\n\t]/g, (found) => [...found].map((c) => NAMED[c]).join(""));
  const bytes = raw.slice(6).replace(/\\x(..)|([^])/g, (_, hex, letter) => {
    return ` ${(hex ?? letter.charCodeAt(0).toString(16)).toUpperCase()}`;
  });
  return `⟨${bytes.trim()}⟩`;
}

/** A probability for reading: two or three digits that count. */
export function percent(p) {
  if (p >= 0.9995) return "100 %";
  if (p >= 0.0995) return `${(p * 100).toFixed(1)} %`;
  if (p >= 0.0001) return `${(p * 100).toFixed(2)} %`;
  return "< 0.01 %";
}

/** Pieces of one stretch of an answer. `hash` is of all text before it; the last of them ends where `text` ends. */
export function piecesOf(text, columns, by, hash, gap = 0) {
  text = text.replaceAll("\r", ""); // the page's text field knows one kind of line end
  if (!columns || !columns.tokens.length) return text ? [piece(text, by)] : [];
  const letters = [...text];
  const { tokens, text_offset: offsets } = columns;
  const base = offsets[0];
  const found = [];
  for (let i = 0, next; i < tokens.length; i = next) {
    for (next = i + 1; next < tokens.length && offsets[next] === offsets[i]; ) next++;
    const end = next < tokens.length ? offsets[next] - base : letters.length;
    const own = letters.slice(offsets[i] - base, end).join("");
    if (!own) continue; // the end token, which has no place in the text
    found.push(piece(own, by, tokenOf(columns, i, next, hash, gap)));
    hash = extend(own, hash);
  }
  return found;
}

function tokenOf(columns, from, to, context, gap) {
  const parts = [];
  for (let i = from; i < to; i++) {
    const alternatives = Object.entries(columns.top_logprobs?.[i] ?? {});
    // In order of probability: an object puts keys that look like numbers first.
    alternatives.sort((a, b) => b[1] - a[1]);
    const told = { raw: columns.tokens[i], logprob: columns.token_logprobs[i], top: alternatives };
    const more = columns.more?.[i];
    parts.push(Object.freeze(more ? { ...told, ...more } : told));
  }
  const known = parts.every((part) => part.logprob !== null);
  const logprob = known ? parts.reduce((sum, part) => sum + part.logprob, 0) : null;
  return Object.freeze({ parts, logprob, context, gap });
}

/** Tenths of the two scales of colour: how improbable (linear), how surprising (nats, up to 10). */
export function steps(logprob) {
  const rounded = (share) => Math.min(10, Math.max(0, Math.round(share * 10)));
  return { improbable: rounded(1 - Math.exp(logprob)), surprising: rounded(-logprob / 10) };
}
