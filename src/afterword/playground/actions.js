// The actions that call the model: continue, fill a gap, take an alternative, rewrite, score. One action runs at a time.
// Text that has arrived stays when an action ends, also after an error or a cancel.

import { MODEL, lengthOf, piece, piecesWithOffsets, seedOf, slice, textOf } from "./pieces.js";
import { bodyOf, scoringOf } from "./requests.js";
import { Answer, Clock, readingOf } from "./stream.js";

const ALTERNATIVES = 5; // of each token of scored text, at least

export class Actions {
  /** `ask()` gives {fields, values, model}; `view` draws; see main.js. */
  constructor({ workspace, server, ask, view }) {
    Object.assign(this, { workspace, server, ask, view, run: null });
  }

  get busy() {
    return this.run !== null;
  }

  /** Stop the running action. Text that has arrived is kept. */
  stop(why = "Stopped.") {
    if (!this.run) return;
    this.run.controller.abort();
    this.run.settle(why);
  }

  /** Continue at the end of the text. */
  continue() {
    this.stop();
    const end = this.workspace.text.length;
    return this.#write(this.workspace.place(end, end));
  }

  /** Fill the gap between the text before and after an offset. */
  insert(at) {
    this.stop();
    return this.#write({ ...this.workspace.place(at, at), gap: true });
  }

  /** Cut the text at a token, replace the token if another is given, and continue. Within a filled gap, up to its end. */
  pick(chosen, part, raw, logprob) {
    this.stop();
    const all = [...piecesWithOffsets(this.workspace.pieces)];
    const at = all.findIndex(({ piece: p }) => p === chosen);
    if (at < 0) return undefined;
    const { gap, context } = chosen.token;
    let end = at;
    while (gap && all[end]?.piece.token?.gap === gap) end++;
    const kept = raw === part.raw;
    const parts = [{ raw, logprob, top: part.top }];
    const token = Object.freeze({ parts, logprob, context, gap });
    const put = kept ? chosen : piece(raw.replaceAll("\r", ""), MODEL, token);
    const place = this.workspace.place(all[at].start, gap && end < all.length ? all[end].start : Infinity);
    const above = gap ? this.#before(gap, place.parent) : this.workspace.tree.under(place.parent, textOf(place.before));
    return this.#write({ ...place, before: [...place.before, put], parent: above, gap: Boolean(gap), put });
  }

  /** Generate another text for the same prompt as this node. */
  again() {
    this.stop();
    const node = this.workspace.commit();
    const { start, end, gap } = node.facts;
    if (start === undefined) return this.view.say("There is no generated text here to write again.");
    const after = gap ? slice(node.pieces, end) : [];
    const parent = this.workspace.tree.parent(node);
    return this.#write({ before: slice(node.pieces, 0, start), after, parent, gap: Boolean(gap) });
  }

  /** Score the text: the log probabilities of its own tokens. */
  async score() {
    this.stop();
    const { workspace, view } = this;
    const text = workspace.text;
    if (!text) return view.say("There is no text to score yet.");
    const { fields, values, model } = this.ask();
    const most = fields.find(({ name }) => name === "logprobs")?.maximum ?? ALTERNATIVES;
    const alternatives = Math.min(most, Math.max(values.logprobs ?? 0, ALTERNATIVES));
    const body = scoringOf(fields, values, { model, prompt: text }, alternatives);
    const run = this.#begin("Scoring the text…", () => {});
    const clock = new Clock();
    return this.#hear(run, body, (answer) => {
      workspace.renumber(readingOf(answer, text, workspace.pieces, seedOf(model)));
      view.usage({ rate: null, wait: null, usage: answer.usage });
      view.draw();
      clock.tick();
      run.settle(`Scored ${answer.usage.prompt_tokens} tokens in ${Math.round(clock.wait)} ms.`);
    });
  }

  /** The node above the one that filled a gap. */
  #before(gap, from) {
    for (let node = from; node; node = this.workspace.tree.parent(node)) {
      if (node.facts.gap === gap) return this.workspace.tree.parent(node);
    }
    return this.workspace.tree.parent(from);
  }

  async #write({ before, after, parent, gap = false, put = null }) {
    const { workspace, view } = this;
    const { fields, values, model } = this.ask();
    const prompt = textOf(before);
    const body = bodyOf(fields, values, { model, prompt, suffix: gap ? textOf(after) : "" });
    const state = workspace.state;
    const name = gap ? `${Date.now()}` : 0;
    const answers = Array.from({ length: body.n ?? 1 }, () => {
      const facts = { model, start: prompt.length, gap: name };
      const node = workspace.tree.add(parent?.id ?? null, [...before, ...after], facts);
      return new Answer(node, before, after, { prompt, gap: name, seed: seedOf(model) });
    });
    const alone = answers.length === 1;
    if (alone) workspace.history.keep(state);
    const clock = new Clock();
    let usage = null;
    const reportUsage = () => view.usage({ rate: clock.rate(sum(answers)), wait: clock.wait, usage });

    const draw = () => {
      for (const answer of answers) answer.node.pieces = answer.pieces;
      if (alone) this.#follow(answers[0]);
      else view.cards.render();
      reportUsage();
    };
    const run = this.#begin("Writing…", () => {
      const empty = answers.filter(({ grown }) => !grown.length && !put);
      for (const answer of answers) keep(answer, body);
      draw();
      for (const { node } of empty) workspace.tree.remove(node);
      if (empty.length === answers.length) this.#nothing(state, alone);
      if (!alone) view.cards.render(true);
    });
    if (!alone) view.cards.open(answers);
    draw();
    view.draw(alone ? prompt.length : null);

    return this.#hear(run, body, (chunk) => {
      usage = chunk.usage ?? usage;
      for (const choice of chunk.choices) answers[choice.index].take(choice, body.echo === true);
      if (chunk.choices.length) clock.tick();
      run.frame(draw);
    }, () => `${usage ? `${usage.completion_tokens} tokens` : "Done"}, ended by ${reasons(answers)}.`);
  }

  /** Show a streaming choice as the document's text. */
  #follow({ node, before, grown }) {
    this.workspace.node = node;
    this.workspace.pieces = node.pieces;
    this.workspace.caret = lengthOf(before) + lengthOf(grown);
    this.view.draw(null, true);
  }

  /** The action generated nothing: restore the state before it. */
  #nothing({ id, pieces, caret }, alone) {
    const { workspace, view } = this;
    Object.assign(workspace, { node: workspace.tree.get(id), pieces, caret });
    if (alone) workspace.history.forget();
    view.cards.close();
    view.draw(caret);
  }

  #begin(said, settled) {
    const { view } = this;
    const run = { controller: new AbortController(), waiting: 0, over: false };
    run.frame = (draw) => {
      run.waiting ||= requestAnimationFrame(() => {
        run.waiting = 0;
        if (!run.over) draw();
      });
    };
    run.settle = (why) => {
      if (run.over) return;
      run.over = true;
      cancelAnimationFrame(run.waiting);
      settled();
      this.run = null;
      view.busy(false);
      view.say(why);
      view.settled();
    };
    this.run = run;
    view.clear();
    view.busy(true);
    view.say(said);
    return run;
  }

  async #hear(run, body, take, end = () => "") {
    this.view.asked();
    try {
      for await (const value of this.server.complete(body, run.controller.signal)) {
        if (run.over) return;
        this.view.heard(value);
        take(value);
      }
      run.settle(end());
    } catch (problem) {
      if (run.over) return;
      run.settle("");
      this.view.fail(problem);
    }
  }
}

const sum = (answers) => answers.reduce((total, { tokens }) => total + tokens, 0);

const reasons = (answers) => [...new Set(answers.map(({ finish }) => finish ?? "nothing"))].join(", ");

/** The facts about a generation that its node keeps. */
function keep({ node, before, grown, finish }, { prompt, suffix, ...request }) {
  const end = lengthOf(before) + lengthOf(grown);
  Object.assign(node.facts, { finish, end, request });
}
