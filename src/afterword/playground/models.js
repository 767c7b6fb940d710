// The served models: which one is selected, what the server says about it, and the wait until it is loaded.

import { find, make } from "./dom.js";
import { preferences } from "./storage.js";

const PAUSE = 1000; // milliseconds between two questions whether the model is loaded

export class ModelList {
  /** `busy()`: an action runs, which shows its own progress. */
  constructor({ server, progress, say, busy }) {
    Object.assign(this, { server, progress, say, busy, all: [], timer: 0 });
  }

  get name() {
    return find("model").value;
  }

  /** The model object of the selected model. */
  get current() {
    return this.all.find(({ id }) => id === this.name);
  }

  /** The selected model, and the second one that answers beside it. */
  get names() {
    const second = find("beside").value;
    return second && second !== this.name ? [this.name, second] : [this.name];
  }

  get loading() {
    return !["ready", undefined].includes(this.current?.status);
  }

  /** Ask for the list and show it. Throws `Problem`. */
  async load() {
    this.all = (await this.server.get("v1/models")).data;
    const wanted = preferences.get("model", "");
    find("model").replaceChildren(...this.all.map(({ id }) => make("option", { value: id }, id)));
    if (this.all.some(({ id }) => id === wanted)) find("model").value = wanted;
    this.#offerSecond();
    if (this.current?.status === "starting" && !this.timer) this.#await();
  }

  /** With several models, a second one can be selected. */
  #offerSecond() {
    const options = this.all.map(({ id }) => make("option", { value: id }, id));
    find("beside").replaceChildren(make("option", { value: "" }, "none"), ...options);
    find("beside-field").hidden = this.all.length < 2;
    const wanted = preferences.get("beside", "");
    if (this.all.some(({ id }) => id === wanted)) find("beside").value = wanted;
    find("beside").onchange = () => preferences.set("beside", find("beside").value);
  }

  /** Ask again after a request that may have loaded a model. */
  async refresh() {
    const { data } = await this.server.get("v1/models").catch(() => ({ data: this.all }));
    this.all = data;
  }

  #await() {
    if (!this.busy()) {
      if (!this.timer) this.progress.begin();
      this.say("Loading the model…");
    }
    this.timer = setTimeout(async () => {
      await this.refresh();
      if (this.current?.status === "starting") return this.#await();
      this.timer = 0;
      if (this.busy()) return undefined;
      this.progress.end();
      return this.say(this.loading ? "" : "The model is loaded.");
    }, PAUSE);
  }
}
