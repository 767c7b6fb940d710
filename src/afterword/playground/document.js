// The current document, its node in the tree, and its undo history. Every change of the text is made through this module,
// so every change can be undone. Text that a model generated is never removed from the tree.

import { History } from "./history.js";
import { MODEL, YOU, difference, piece, slice, splice, textOf } from "./pieces.js";
import { Tree } from "./tree.js";

export class WorkingDocument {
  constructor() {
    this.history = new History();
    this.open(new Tree());
  }

  /** Open another tree at one of its nodes. */
  open(tree, id) {
    this.tree = tree;
    this.history.clear();
    this.node = tree.get(id) ?? tree.get(tree.roots[0]) ?? tree.add(null, []);
    this.pieces = tree.draft ?? this.node.pieces;
    this.caret = this.text.length;
  }

  /** The tree, draft and position as plain data. */
  serialize() {
    const draft = this.pieces === this.node.pieces ? null : this.pieces;
    return { tree: this.tree.serialize(draft), current: this.node.id };
  }

  get text() {
    if (this.#of !== this.pieces) [this.#of, this.#text] = [this.pieces, textOf(this.pieces)];
    return this.#text;
  }

  #of = null;
  #text = "";

  get state() {
    return { id: this.node.id, pieces: this.pieces, caret: this.caret };
  }

  /** The user replaced the text between two offsets. */
  edit(start, end, text, caret) {
    const added = end === start && text.length === 1 && text !== "\n";
    this.history.keep(this.state, added ? "typing" : start < end && !text ? "deleting" : "");
    this.pieces = splice(this.pieces, start, end, [piece(text, YOU)]);
    this.caret = caret;
  }

  /** The same text with new log probabilities. */
  renumber(pieces) {
    if (this.node.pieces === this.pieces) this.node.pieces = pieces;
    this.pieces = pieces;
  }

  undo() {
    return this.#apply(this.history.undo(this.state));
  }

  redo() {
    return this.#apply(this.history.redo(this.state));
  }

  #apply(state) {
    if (!state) return false;
    this.node = this.tree.get(state.id) ?? this.node;
    this.pieces = state.pieces;
    this.caret = state.caret;
    return true;
  }

  /** The node that holds the current text: the current node, or a new sibling if the text was edited. */
  commit() {
    const { node, pieces } = this;
    if (node.pieces === pieces) return node;
    const { start, end, text } = difference(textOf(node.pieces), this.text);
    const same = start === end && !text;
    const lost = !node.facts.edited && slice(node.pieces, start, end).some(({ by }) => by === MODEL);
    if (same || !(node.children.length || lost)) {
      move(node.facts, start, end, text.length);
      node.pieces = pieces;
      return node;
    }
    this.node = this.tree.add(node.parent, pieces, { edited: true });
    return this.node;
  }

  /** Move to another node of the tree. */
  go(node) {
    if (!node) return false;
    this.history.keep(this.state);
    this.commit();
    const above = this.tree.parent(node);
    if (above) above.last = node.id;
    this.#show(node);
    return true;
  }

  /** The offset at which a generation broke off; null if none did, or if the user edited the text there. */
  get brokenAt() {
    const { facts, pieces } = this.node;
    if (!facts.unfinished) return null;
    const { start, end, text } = difference(textOf(pieces), this.text);
    if (start === end && !text) return facts.end;
    return touches(facts, start, end) ? null : facts.end + (end < facts.end ? text.length - (end - start) : 0);
  }

  /** Delete the current node and all texts that continue it. Returns a function that takes that back. */
  remove() {
    const { tree, node, pieces, caret } = this;
    const other = tree.parent(node) ?? tree.sibling(node, 1) ?? tree.sibling(node, -1);
    const restore = tree.prune(node);
    const added = other ? null : tree.add(null, []);
    this.#show(other ?? added);
    return () => {
      restore();
      if (added) tree.remove(added);
      Object.assign(this, { node, pieces, caret });
    };
  }

  #show(node) {
    this.node = node;
    this.pieces = node.pieces;
    this.caret = this.text.length;
  }

  /** The place in the tree for a generation that begins at an offset of the text and continues at `resume`. */
  place(start, resume) {
    const node = this.commit();
    return { before: slice(this.pieces, 0, start), after: slice(this.pieces, resume), parent: node };
  }
}

const touches = (facts, start, end) => start <= facts.end && end >= facts.end;

/** Move the start and end of a generation after an edit; the start is forgotten if the edit crosses it. */
function move(facts, start, end, length) {
  const more = length - (end - start);
  if (touches(facts, start, end)) delete facts.unfinished;
  if (facts.start === undefined || start >= facts.end) return;
  if (end > facts.start && start < facts.start) facts.start = undefined;
  else if (end <= facts.start && start < facts.start) facts.start += more;
  facts.end += more;
}
