// Several choices of one request side by side while they stream, until the user picks one. All of them stay in the tree.

import { find, make, number } from "./dom.js";
import { HighlightLayer } from "./highlight.js";

export class ChoiceCards {
  /** `pick(answer)`: the user chose one; `closed()`: the list was closed; `point(piece, mirror)`: pointer position. */
  constructor(root, { pick, closed, point }) {
    Object.assign(this, { root, pick, closed, point, cards: [] });
    root.querySelector("[data-close]").addEventListener("click", () => {
      this.close();
      closed();
    });
  }

  /** `named`: say which model wrote an answer. */
  open(answers, named = false) {
    const list = find("card-list");
    this.cards = answers.map((answer, i) => {
      const text = make("div", { className: "mirror", dir: "auto" });
      const facts = make("small", {});
      const name = `Answer ${i + 1} of ${answers.length}`;
      const pick = { "aria-label": `Use answer ${i + 1}`, onclick: () => this.pick(answer) };
      const button = make("button", { type: "button", ...pick }, "Use this");
      const mirror = new HighlightLayer(text);
      text.addEventListener("pointermove", (event) => this.point(mirror.pieceAt(event.clientX, event.clientY), mirror));
      text.addEventListener("pointerleave", () => this.point(null, mirror));
      const head = make("h3", {}, named ? answer.node.facts.model : `${i + 1}`);
      const element = make("article", { "aria-label": name }, head, text, make("footer", {}, facts, button));
      return { answer, element, facts, mirror, button };
    });
    list.replaceChildren(...this.cards.map(({ element }) => element));
    this.root.hidden = false;
    this.root.scrollIntoView({ block: "nearest" });
  }

  /** Draw new text. `all`: the last choice has ended, so scroll the list into view. */
  render(all = false) {
    for (const { answer, facts, mirror, button } of this.cards) {
      mirror.render(answer.grown, answer.begun);
      facts.textContent = factsOf(answer);
      button.disabled = all && !answer.grown.length; // it ended without text, so it has no node in the tree
    }
    if (all) this.root.scrollIntoView({ block: "nearest" });
  }

  close() {
    this.root.hidden = true;
    this.cards = [];
    find("card-list").replaceChildren();
  }
}

function factsOf({ grown, tokens, finish, node }) {
  const known = grown.filter((p) => p.token && p.token.logprob !== null);
  const sum = known.reduce((total, p) => total + p.token.logprob, 0);
  const count = known.reduce((total, p) => total + p.token.parts.length, 0);
  const mean = count ? `mean ${number(sum / count, 2)}` : null;
  return [`${number(tokens)} tokens`, mean, node.facts.unfinished ? "unfinished" : finish].filter(Boolean).join(" · ");
}
