// A line above the commands with a question or an offer and its buttons. It never takes the keyboard from the text.

import { find, make } from "./dom.js";

export class Offer {
  /** `closed()`: the user chose a button or dismissed the offer. */
  constructor({ closed }) {
    Object.assign(this, { topic: null, closed });
    find("offer-close").addEventListener("click", () => this.#choose(() => {}));
  }

  /** Show an offer. `choices`: [label, action] pairs. `firm`: it stays, before any other, until the user chooses. */
  show(topic, text, choices, firm = false) {
    if (this.firm && topic !== this.topic) return;
    Object.assign(this, { topic, firm });
    find("offer-text").textContent = text;
    const buttons = choices.map(([label, act]) => make("button", { type: "button", onclick: () => this.#choose(act) }, label));
    find("offer-choices").replaceChildren(...buttons);
    find("offer-close").hidden = firm;
    find("offer").hidden = false;
  }

  /** Take back the offer about a topic; without a topic, any that is not firm. */
  hide(topic = null) {
    if (topic ? topic !== this.topic : this.firm) return;
    Object.assign(this, { topic: null, firm: false });
    find("offer").hidden = true;
  }

  #choose(act) {
    this.hide(this.topic);
    this.closed();
    act();
  }
}
