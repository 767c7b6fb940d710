// The tree of texts drawn as a list, in which the user moves between branches, names, collapses and deletes them.

import { find, icon, make } from "./dom.js";

const SHARED = 24; // characters shown of what a branch has in common with its siblings

export class BranchList {
  /** `go(node)` moves to a branch; `changed()`: its name or what is collapsed; `remove()` deletes the current branch. */
  constructor({ go, changed, remove }) {
    Object.assign(this, { go, changed, tree: null, current: null });
    find("branch-name").addEventListener("input", (event) => this.#name(event.target.value));
    find("branch-fold").addEventListener("click", () => this.#foldOthers());
    find("branch-delete").addEventListener("click", remove);
  }

  show(tree, current) {
    Object.assign(this, { tree, current });
    const name = find("branch-name");
    if (document.activeElement !== name) name.value = current.facts.name ?? "";
    const shown = [...tree.walk(tree.roots, 0, ({ facts }) => !facts.folded)];
    find("branches").replaceChildren(...shown.map(({ node, depth }) => this.#row(node, depth)));
    find("branches").querySelector("[aria-current]")?.scrollIntoView({ block: "nearest" });
  }

  #row(node, depth) {
    const { name, folded } = node.facts;
    const within = folded && this.tree.path(this.current).includes(node);
    const row = make("li", {}, this.#fold(node), make("button", {
      type: "button",
      className: "branch",
      "aria-current": node === this.current ? "true" : (within ? "location" : null),
      onclick: () => this.go(node),
    }, name ? make("strong", { dir: "auto" }, name) : label(this.tree, node), make("small", {}, stateOf(node))));
    row.style.setProperty("--depth", Math.min(depth, 12));
    return row;
  }

  /** The button that collapses the branches below a node. */
  #fold(node) {
    if (!node.children.length) return make("span", { className: "fold" });
    const { folded } = node.facts;
    return make("button", {
      type: "button",
      className: "fold plain",
      "aria-expanded": `${!folded}`,
      "aria-label": `Branches below ${node.facts.name ?? this.tree.label(node)}`,
      onclick: () => this.#set(node, !folded),
    }, icon("down"));
  }

  #set(node, folded) {
    const at = [...find("branches").children].findIndex((row) => row.contains(document.activeElement));
    if (folded) node.facts.folded = true;
    else delete node.facts.folded;
    this.show(this.tree, this.current);
    find("branches").children[at]?.querySelector(".fold").focus();
    this.changed();
  }

  /** Collapse everything that is not above the current branch. */
  #foldOthers() {
    const path = this.tree.path(this.current);
    for (const { node } of this.tree.walk()) {
      if (path.includes(node)) delete node.facts.folded;
      else if (node.children.length) node.facts.folded = true;
    }
    this.show(this.tree, this.current);
    this.changed();
  }

  #name(text) {
    if (text.trim()) this.current.facts.name = text;
    else delete this.current.facts.name;
    this.show(this.tree, this.current);
    this.changed();
  }
}

/** The text of a branch from where it parts from its siblings, after the end of what they share. */
function label(tree, node) {
  const { shared, own } = tree.parting(node);
  const before = shared.length > SHARED ? `…${shared.slice(-SHARED)}` : shared;
  return make("span", { dir: "auto" }, before ? make("i", {}, before) : null, own);
}

function stateOf({ facts, children }) {
  const { edited, unfinished, model, finish, folded } = facts;
  if (folded) return `+${children.length}`;
  const generated = unfinished ? "unfinished" : (finish ?? "stopped");
  return edited ? "edited" : (model ? generated : "beginning");
}
