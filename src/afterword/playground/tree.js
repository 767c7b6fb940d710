// A tree of texts: each generation is a node below the text that it continued. Owns the nodes; draws nothing.

import { textOf } from "./pieces.js";

export class Tree {
  constructor() {
    this.nodes = new Map();
    this.roots = [];
    this.next = 1;
    this.draft = null;
  }

  /** Add a node. `facts`: how its text was generated. */
  add(parent, pieces, facts = {}) {
    const node = { id: this.next++, parent, children: [], pieces, facts, last: null };
    this.nodes.set(node.id, node);
    this.#row(node).push(node.id);
    return node;
  }

  /** Remove an empty node, which must have no children. */
  remove(node) {
    const row = this.#row(node);
    row.splice(row.indexOf(node.id), 1);
    this.nodes.delete(node.id);
  }

  /** Remove a node and all nodes below it. Returns a function that puts them back. */
  prune(node) {
    const row = this.#row(node);
    const at = row.indexOf(node.id);
    const nodes = [...this.walk([node.id])].map((found) => found.node);
    row.splice(at, 1);
    for (const { id } of nodes) this.nodes.delete(id);
    return () => {
      row.splice(at, 0, node.id);
      for (const one of nodes) this.nodes.set(one.id, one);
    };
  }

  get(id) {
    return this.nodes.get(id);
  }

  parent(node) {
    return this.nodes.get(node.parent) ?? null;
  }

  /** The child that was shown last, else the newest one. */
  child(node) {
    return this.nodes.get(node.last) ?? this.nodes.get(node.children.at(-1)) ?? null;
  }

  /** The sibling at a distance; null beyond the ends. */
  sibling(node, step) {
    const row = this.#row(node);
    return this.nodes.get(row[row.indexOf(node.id) + step]) ?? null;
  }

  /** The position of a node among its siblings, from 1, and their number. */
  position(node) {
    const row = this.#row(node);
    return [row.indexOf(node.id) + 1, row.length];
  }

  /** The nearest node, itself or an ancestor, with a text that is a prefix of `text`; null if there is none. */
  under(node, text) {
    for (let at = node; at; at = this.parent(at)) if (text.startsWith(textOf(at.pieces))) return at;
    return null;
  }

  /** The nodes from a root to a node. */
  path(node) {
    const found = [];
    for (let at = node; at; at = this.parent(at)) found.unshift(at);
    return found;
  }

  /** The beginning of the text that a node adds to its parent's. */
  label(node) {
    return line(this.#added(node)) || "(empty)";
  }

  /** The label of a node in two parts: whole words that a sibling has too, and what only this node has. */
  parting(node) {
    const own = this.#added(node);
    const others = this.#row(node).filter((id) => id !== node.id).map((id) => this.#added(this.nodes.get(id)));
    const most = Math.max(0, ...others.map((other) => common(own, other)));
    const word = own.slice(0, most).search(/\S*$/);
    const same = own.slice(word).trim() ? word : 0;
    return { shared: line(own.slice(Math.max(0, same - 80), same)), own: line(own.slice(same)) || "(empty)" };
  }

  /** The text that a node adds to its parent's. */
  #added({ pieces, parent }) {
    const above = this.nodes.get(parent)?.pieces ?? null;
    const known = this.#additions.get(pieces);
    if (known && known.above === above) return known.text;
    const text = textOf(pieces);
    const added = text.slice(above ? common(textOf(above), text) : 0);
    this.#additions.set(pieces, { above, text: added });
    return added;
  }

  #additions = new WeakMap(); // by a node's pieces, which are another list after a change

  /** Every node with its depth, parents first. `into(node)`: whether to go below a node. */
  *walk(ids = this.roots, depth = 0, into = () => true) {
    for (const id of ids) {
      const node = this.nodes.get(id);
      yield { node, depth };
      if (into(node)) yield* this.walk(node.children, depth + 1, into);
    }
  }

  /** The tree as plain data; a piece that several nodes share is stored once. `draft`: a text without a node, or null. */
  serialize(draft) {
    const seen = new Map();
    const number = (p) => seen.get(p) ?? (seen.set(p, seen.size), seen.size - 1);
    const nodes = [...this.walk()].map(({ node }) => {
      const { id, parent, last, facts } = node;
      return { id, parent, last, facts, pieces: ranges(node.pieces.map(number)) };
    });
    const loose = draft && ranges(draft.map(number));
    return { pieces: [...seen.keys()], nodes, draft: loose };
  }

  /** The tree and the draft that `serialize` returned as plain data. */
  static from({ pieces, nodes, draft }) {
    const tree = new Tree();
    const frozen = pieces.map((p) => Object.freeze({ ...p, token: p.token && Object.freeze(p.token) }));
    const listed = (own) => own.flatMap(([start, count]) => frozen.slice(start, start + count));
    for (const { id, parent, last, facts, pieces: own } of nodes) {
      tree.next = id;
      tree.add(tree.nodes.has(parent) ? parent : null, listed(own), facts).last = last;
    }
    tree.draft = draft ? listed(draft) : null;
    tree.next = Math.max(0, ...tree.nodes.keys()) + 1;
    return tree;
  }

  #row(node) {
    return this.nodes.get(node.parent)?.children ?? this.roots;
  }
}

/** The number of characters with which both texts begin. */
function common(one, other) {
  let same = 0;
  while (same < one.length && one[same] === other[same]) same++;
  return same;
}

/** The beginning of a text as one line. */
const line = (text) => text.slice(0, 80).replace(/\s+/g, " ").trimStart();

function ranges(numbers) {
  const found = [];
  for (const n of numbers) {
    const last = found.at(-1);
    if (last && last[0] + last[1] === n) last[1]++;
    else found.push([n, 1]);
  }
  return found;
}
