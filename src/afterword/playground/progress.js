// Shows that something runs: a bar above the commands, and the seconds that it has taken so far.

import { find } from "./dom.js";

const SHORT = 1000; // milliseconds, below which no time is shown

export class Progress {
  constructor() {
    this.timer = 0;
  }

  /** Begin, or begin anew. */
  begin() {
    this.end();
    const began = performance.now();
    find("progress").hidden = false;
    this.timer = setInterval(() => {
      const seconds = Math.floor((performance.now() - began) / 1000);
      find("elapsed").textContent = seconds * 1000 >= SHORT ? `${seconds} s` : "";
    }, 200);
  }

  end() {
    clearInterval(this.timer);
    find("elapsed").textContent = "";
    find("progress").hidden = true;
  }
}
