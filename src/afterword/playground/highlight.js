// Draws a list of pieces: one block element per line, one span per token. Only this module creates these nodes, and only
// for lines that changed: appending a token costs one span, however long the document is.

import { MODEL, piecesWithOffsets } from "./pieces.js";
import { steps } from "./tokens.js";

export class HighlightLayer {
  constructor(root) {
    this.root = root;
    this.lines = [];
    this.marked = null;
    this.pieces = new WeakMap(); // span -> piece
    this.nodes = new WeakMap(); // piece -> its first span
  }

  /** `hash`: the hash of the text before the pieces, seeded by the model. */
  render(pieces, hash) {
    const old = this.lines;
    const now = linesOf(pieces, hash);
    const most = Math.min(old.length, now.length);
    let head = 0;
    let tail = 0;
    while (head < most && sameRow(old[head].row, now[head])) head++;
    while (tail < most - head && sameRow(old[old.length - 1 - tail].row, now[now.length - 1 - tail])) tail++;
    const before = old.slice(head, old.length - tail);
    const after = now.slice(head, now.length - tail);
    const lines = after.map((row, i) => (before[i] ? this.#patch(before[i], row) : this.#line(row)));
    const anchor = old[old.length - tail]?.element ?? null;
    lines.slice(before.length).forEach((line) => this.root.insertBefore(line.element, anchor));
    before.slice(after.length).forEach((line) => line.element.remove());
    this.lines = [...old.slice(0, head), ...lines, ...old.slice(old.length - tail)];
  }

  /** Mark the end of a piece, until the next call. null: no mark. */
  mark(piece) {
    this.marked?.classList.remove("unfinished");
    this.marked = piece && this.#endOf(piece);
    this.marked?.classList.add("unfinished");
  }

  /** The last span of a piece. */
  #endOf(piece) {
    for (const { row, nodes } of this.lines.toReversed()) {
      const at = row.findLastIndex((part) => part.piece === piece);
      if (at >= 0) return nodes[at].classList ? nodes[at] : null;
    }
    return null;
  }

  /** The piece at a point of the window, also under other elements. */
  pieceAt(x, y) {
    for (const element of document.elementsFromPoint(x, y)) {
      const found = this.root.contains(element) && this.pieces.get(element);
      if (found) return found;
    }
    return null;
  }

  /** The node and the offset in it at which a character of the text is drawn. */
  pointAt(offset) {
    for (const { element, row, nodes } of this.lines) {
      for (const [i, { text }] of row.entries()) {
        if (offset < text.length) return [nodes[i].firstChild ?? nodes[i], offset];
        offset -= text.length;
      }
      if (offset < 1) return [element, element.childNodes.length];
      offset -= 1; // the line end
    }
    return [this.root, this.root.childNodes.length];
  }

  /** The bounding box of a piece. */
  boxOf(piece) {
    const node = this.nodes.get(piece);
    return node?.isConnected ? (node.getClientRects()[0] ?? node.getBoundingClientRect()) : null;
  }

  #line(row) {
    const element = document.createElement("div");
    element.className = "line";
    const nodes = row.map((part) => this.#node(part));
    element.append(...nodes);
    return { element, row, nodes };
  }

  #patch(line, row) {
    const old = line.row;
    const most = Math.min(old.length, row.length);
    let head = 0;
    let tail = 0;
    while (head < most && samePart(old[head], row[head])) head++;
    while (tail < most - head && samePart(old[old.length - 1 - tail], row[row.length - 1 - tail])) tail++;
    const nodes = row.slice(head, row.length - tail).map((part) => this.#node(part));
    line.nodes.slice(head, old.length - tail).forEach((node) => node.remove());
    const anchor = line.nodes[old.length - tail] ?? null;
    nodes.forEach((node) => line.element.insertBefore(node, anchor));
    line.nodes.splice(head, old.length - tail - head, ...nodes);
    line.row = row;
    return line;
  }

  #node({ piece, text, stale, breaks, first }) {
    if (!piece.token && piece.by !== MODEL) return document.createTextNode(text);
    const span = document.createElement("span");
    span.textContent = text;
    span.className = classOf(piece, stale, breaks, first);
    if (piece.token) {
      this.pieces.set(span, piece);
      if (first) this.nodes.set(piece, span);
    }
    return span;
  }
}

function classOf({ by, token }, stale, breaks, first) {
  const names = [by === MODEL ? "model" : "you"];
  if (token) {
    names.push("token");
    if (token.logprob !== null) {
      const { improbable, surprising } = steps(token.logprob);
      names.push(`p${improbable}`, `s${surprising}`);
    }
    if (stale) names.push("stale");
    if (breaks) names.push("breaks");
    if (first) names.push("first");
  }
  return names.join(" ");
}

/** The rows of the text; a row is the list of piece parts between two line ends. */
function linesOf(pieces, hash) {
  let row = [];
  const rows = [row];
  for (const { piece, stale } of piecesWithOffsets(pieces, hash)) {
    const texts = piece.text.split("\n");
    texts.forEach((text, i) => {
      if (i > 0) rows.push((row = []));
      const breaks = i < texts.length - 1;
      if (text || (piece.token && breaks)) row.push({ piece, text, stale, breaks, first: i === 0 });
    });
  }
  return rows;
}

const sameRow = (a, b) => a.length === b.length && a.every((part, i) => samePart(part, b[i]));

function samePart(a, b) {
  if (a.text !== b.text || a.stale !== b.stale || a.breaks !== b.breaks || a.first !== b.first) return false;
  return a.piece === b.piece || (!a.piece.token && !b.piece.token && a.piece.by === b.piece.by);
}
