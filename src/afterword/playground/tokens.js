// Turns the server's log probability columns (offsets in code points) into pieces, and formats tokens for display.
// A token that is no whole character arrives as `bytes:\xe2\x80`; the tokens of one character make one piece.

import { extend, piece } from "./pieces.js";

const NAMED = { " ": "␣", "\n": "↵", "\t": "⇥" };

export const isBytes = (raw) => raw.startsWith("bytes:") && raw.includes("\\x");

/** A token with its whitespace and control characters made visible. */
export function shown(raw) {
  if (!isBytes(raw)) return raw.replace(/^ +| +$|[\n\t]/g, (found) => [...found].map((c) => NAMED[c]).join(""));
  const bytes = raw.slice(6).replace(/\\x(..)|([^])/g, (_, hex, letter) => {
    return ` ${(hex ?? letter.charCodeAt(0).toString(16)).toUpperCase()}`;
  });
  return `⟨${bytes.trim()}⟩`;
}

/** A probability as text with two or three significant digits. */
export function percent(p) {
  if (p >= 0.9995) return "100 %";
  if (p >= 0.0995) return `${(p * 100).toFixed(1)} %`;
  if (p >= 0.0001) return `${(p * 100).toFixed(2)} %`;
  return "< 0.01 %";
}

/** The pieces of one part of a response. `hash`: of all text before it. The last piece ends where `text` ends. */
export function piecesOf(text, columns, by, hash, gap = 0) {
  text = text.replaceAll("\r", ""); // text fields have \n as their only line end
  if (!columns || !columns.tokens.length) return text ? [piece(text, by)] : [];
  const letters = [...text];
  const { tokens, text_offset: offsets } = columns;
  const base = offsets[0];
  const found = [];
  for (let i = 0, next; i < tokens.length; i = next) {
    for (next = i + 1; next < tokens.length && offsets[next] === offsets[i]; ) next++;
    const end = next < tokens.length ? offsets[next] - base : letters.length;
    const own = letters.slice(offsets[i] - base, end).join("");
    if (!own) continue; // the end token, which has no text
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
    const token = { raw: columns.tokens[i], logprob: columns.token_logprobs[i], top: alternatives };
    const more = columns.more?.[i];
    parts.push(Object.freeze(more ? { ...token, ...more } : token));
  }
  const known = parts.every((part) => part.logprob !== null);
  const logprob = known ? parts.reduce((sum, part) => sum + part.logprob, 0) : null;
  return Object.freeze({ parts, logprob, context, gap });
}

const BELOW = [0.5, 0.3, 0.1, 0.03, 0.01]; // probabilities below which another colour begins

/** The two colour scales with steps from 0 to 10. Improbability: five linear steps down to 50 %, then five down to 1 %.
 * Surprisal: nats up to 10. */
export function steps(logprob) {
  const p = Math.exp(logprob);
  const improbable = p >= BELOW[0] ? Math.round((1 - p) * 10) : 5 + BELOW.filter((limit) => p < limit).length;
  return { improbable, surprising: Math.min(10, Math.max(0, Math.round(-logprob))) };
}
