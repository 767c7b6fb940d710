// The tree of texts drawn as a list with which the user moves between branches.

import { make } from "./dom.js";

export function showBranches(root, tree, current, go) {
  const rows = [...tree.walk()].map(({ node, depth }) => {
    const label = tree.label(node);
    const facts = node.facts.edited ? "edited" : (node.facts.model ? (node.facts.finish ?? "stopped") : "beginning");
    const row = make("button", {
      type: "button",
      className: "branch",
      "aria-current": node === current ? "true" : null,
      onclick: () => go(node),
    }, make("span", {}, label), make("small", {}, facts));
    row.style.setProperty("--depth", Math.min(depth, 12));
    return make("li", {}, row);
  });
  root.replaceChildren(...rows);
  root.querySelector("[aria-current]")?.scrollIntoView({ block: "nearest" });
}
