// Other tabs with the same session: this tab shows what another one saved, or asks if it has changes of its own.

import { onOtherTab, sessions } from "./storage.js";

export class OtherTabs {
  /** `list`: the `SessionList`; `busy()`: text is being generated. */
  constructor({ list, offer, busy }) {
    Object.assign(this, { list, offer, busy });
    list.differs = () => this.#ask();
    onOtherTab({ list: () => list.renamed(), session: (id) => id === list.id && this.#changed() });
  }

  #changed() {
    const { list } = this;
    const raw = sessions.raw(list.id);
    if (raw === list.stored) return;
    if (raw === null) this.#deleted();
    else if (this.busy() || list.dirty) this.#ask();
    else list.follow();
  }

  #ask() {
    const { list } = this;
    list.paused = true;
    this.offer.show("tabs", "Another tab has changed this session.", [
      ["Show its text", () => list.follow()],
      ["Keep this text", () => list.overwrite()],
      ["Keep both", () => list.split()],
    ], true);
  }

  #deleted() {
    const keep = ["Save it again", () => this.list.overwrite()];
    this.offer.show("tabs", "Another tab has deleted this session. Its text is still here.", [keep]);
  }
}
