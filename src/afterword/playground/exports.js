// The document as files for other programs: text, Markdown, and a table of its tokens. Pure functions.

import { piecesWithOffsets } from "./pieces.js";

const MANY = 2; // spaces at the end of a line, which Markdown reads as a line end

/** Each kind: the file's ending, its media type and its content, from {name, text, pieces, seed, model, settings}. */
export const FILES = {
  text: { ending: "txt", type: "text/plain", content: ({ text }) => `${text.replace(/\n$/, "")}\n` },
  markdown: { ending: "md", type: "text/markdown", content: markdown },
  table: { ending: "csv", type: "text/csv", content: table },
};

/** The text under its name, with the lines as they are, and the model and the settings below it. */
function markdown({ name, text, model, settings }) {
  const fields = Object.entries(settings).map(([field, value]) => `${field} ${JSON.stringify(value)}`);
  return [`# ${name}`, "", lined(text.trim()), "", "---", "", `Written with ${[model, ...fields].join(", ")}.`, ""].join("\n");
}

/** Single line ends, outside of code blocks, as line ends of Markdown. */
function lined(text) {
  let code = false;
  const lines = text.split("\n");
  return lines.map((line, i) => {
    if (/^\s*(```|~~~)/.test(line)) code = !code;
    const ends = !line.trim() || !lines[i + 1]?.trim();
    return code || ends ? line : line.trimEnd() + " ".repeat(MANY);
  }).join("\n");
}

/** One row for each token, and one for each piece of text that has no numbers. */
function table({ pieces, seed }) {
  const rows = [];
  let offset = 0; // in code points, as in the API
  for (const { piece: p, stale } of piecesWithOffsets(pieces, seed)) {
    if (!p.token) rows.push({ offset, text: p.text, author: p.by, top: [] });
    for (const part of p.token?.parts ?? []) {
      const { id, rank, logprob, top } = part;
      const probability = logprob === null ? null : Math.exp(logprob);
      rows.push({ offset, text: part.raw, author: p.by, id, logprob, probability, rank, stale, top });
    }
    offset += [...p.text].length;
  }
  const most = Math.max(0, ...rows.map(({ top }) => top.length));
  const names = ["offset", "text", "author", "token_id", "log_probability", "probability", "rank", "stale"];
  for (let i = 1; i <= most; i++) names.push(`alternative_${i}`, `alternative_${i}_log_probability`);
  const lines = rows.map(({ offset, text, author, id, logprob, probability, rank, stale, top }) =>
    [offset, text, author, id, logprob, probability, rank, stale, ...top.flat()]);
  return [names, ...lines].map((cells) => `${cells.map(cell).join(",")}\r\n`).join("");
}

/** A cell as in RFC 4180. */
function cell(value) {
  const text = String(value ?? "");
  return /[",\r\n]|^\s|\s$/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}
