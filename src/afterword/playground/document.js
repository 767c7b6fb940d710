// The working document, where it hangs in the tree, and how it came there. Owner of all three: whatever changes the
// text goes through here, so whatever changes it can be undone. Nothing that a model wrote is ever lost from the tree.

import { History } from "./history.js";
import { MODEL, YOU, difference, piece, slice, splice, textOf } from "./pieces.js";
import { Tree } from "./tree.js";

export class WorkingDocument {
  constructor() {
    this.history = new History();
    this.open(new Tree());
  }

  /** Another tree, at one of its nodes. */
  open(tree, id) {
    this.tree = tree;
    this.history.clear();
    this.node = tree.get(id) ?? tree.get(tree.roots[0]) ?? tree.add(null, []);
    this.pieces = tree.draft ?? this.node.pieces;
    this.caret = this.text.length;
  }

  /** All of it as plain data. */
  told() {
    const draft = this.pieces === this.node.pieces ? null : this.pieces;
    return { tree: this.tree.told(draft), current: this.node.id };
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

  /** The person changed the text between two offsets. */
  edit(start, end, text, caret) {
    const added = end === start && text.length === 1 && text !== "\n";
    this.history.keep(this.state, added ? "typing" : start < end && !text ? "deleting" : "");
    this.pieces = splice(this.pieces, start, end, [piece(text, YOU)]);
    this.caret = caret;
  }

  /** The same text with other numbers. */
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

  /** The node whose text is the working text: this one, or a branch beside it where it has become another text. */
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

  /** To another node of the tree. */
  go(node) {
    if (!node) return false;
    this.history.keep(this.state);
    this.commit();
    const above = this.tree.parent(node);
    if (above) above.last = node.id;
    this.node = node;
    this.pieces = node.pieces;
    this.caret = this.text.length;
    return true;
  }

  /** Where an answer goes that begins at an offset of the working text, and at `resume` that goes on. */
  place(start, resume) {
    const node = this.commit();
    return { before: slice(this.pieces, 0, start), after: slice(this.pieces, resume), parent: node };
  }
}

/** Where an answer begins and ends, when text before or within it has changed; forgotten where that cannot be said. */
function move(facts, start, end, length) {
  const more = length - (end - start);
  if (facts.start === undefined || start >= facts.end) return;
  if (end > facts.start && start < facts.start) facts.start = undefined;
  else if (end <= facts.start && start < facts.start) facts.start += more;
  facts.end += more;
}
