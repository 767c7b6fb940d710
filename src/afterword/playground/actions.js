// What a person can have the model do: continue, fill a gap, take an alternative, write again, score. One at a time;
// whatever has come when it ends, however it ends, stays.

import { MODEL, lengthOf, piece, places, seedOf, slice, textOf } from "./pieces.js";
import { bodyOf, scoringOf } from "./requests.js";
import { Answer, Clock, readingOf } from "./stream.js";

const ALTERNATIVES = 5; // for scored text, if fewer are asked for

export class Actions {
  /** `ask()` gives {fields, values, model}; `view` is told what to show: see main.js. */
  constructor({ desk, server, ask, view }) {
    Object.assign(this, { desk, server, ask, view, run: null });
  }

  get busy() {
    return this.run !== null;
  }

  /** End what is under way. What has come is kept. */
  stop(why = "Stopped.") {
    if (!this.run) return;
    this.run.controller.abort();
    this.run.settle(why);
  }

  /** Go on at the end of the text. */
  continue() {
    this.stop();
    const end = this.desk.text.length;
    return this.#write(this.desk.place(end, end));
  }

  /** Write what belongs between the text before a place and the text after it. */
  insert(at) {
    this.stop();
    return this.#write({ ...this.desk.place(at, at), gap: true });
  }

  /** Cut the text at a token, put another one there (or leave it) and go on. Within a gap, up to its end. */
  pick(chosen, part, raw, logprob) {
    this.stop();
    const all = [...places(this.desk.pieces)];
    const at = all.findIndex(({ piece: p }) => p === chosen);
    if (at < 0) return undefined;
    const { gap, context } = chosen.token;
    let end = at;
    while (gap && all[end]?.piece.token?.gap === gap) end++;
    const kept = raw === part.raw;
    const parts = [{ raw, logprob, top: part.top }];
    const token = Object.freeze({ parts, logprob, context, gap });
    const put = kept ? chosen : piece(raw.replaceAll("\r", ""), MODEL, token);
    const place = this.desk.place(all[at].start, gap && end < all.length ? all[end].start : Infinity);
    const above = gap ? this.#before(gap, place.parent) : this.desk.tree.under(place.parent, textOf(place.before));
    return this.#write({ ...place, before: [...place.before, put], parent: above, gap: Boolean(gap), put });
  }

  /** Another answer to what this node answers. */
  again() {
    this.stop();
    const node = this.desk.commit();
    const { start, end, gap } = node.facts;
    if (start === undefined) return this.view.say("Nothing was written here that could be written again.");
    const after = gap ? slice(node.pieces, end) : [];
    const parent = this.desk.tree.parent(node);
    return this.#write({ before: slice(node.pieces, 0, start), after, parent, gap: Boolean(gap) });
  }

  /** The probabilities of the text's own tokens. */
  async score() {
    this.stop();
    const { desk, view } = this;
    const text = desk.text;
    if (!text) return view.say("There is no text to score yet.");
    const { fields, values, model } = this.ask();
    const most = fields.find(({ name }) => name === "logprobs")?.maximum ?? ALTERNATIVES;
    const alternatives = Math.min(most, Math.max(values.logprobs ?? 0, ALTERNATIVES));
    const body = scoringOf(fields, values, { model, prompt: text }, alternatives);
    const run = this.#begin("Reading the text…", () => {});
    const clock = new Clock();
    return this.#hear(run, body, (answer) => {
      desk.renumber(readingOf(answer, text, desk.pieces, seedOf(model)));
      view.usage({ rate: null, wait: null, usage: answer.usage });
      view.draw();
      clock.tick();
      run.settle(`Scored ${answer.usage.prompt_tokens} tokens in ${Math.round(clock.wait)} ms.`);
    });
  }

  /** The node above the one that filled a gap. */
  #before(gap, from) {
    for (let node = from; node; node = this.desk.tree.parent(node)) {
      if (node.facts.gap === gap) return this.desk.tree.parent(node);
    }
    return this.desk.tree.parent(from);
  }

  async #write({ before, after, parent, gap = false, put = null }) {
    const { desk, view } = this;
    const { fields, values, model } = this.ask();
    const prompt = textOf(before);
    const body = bodyOf(fields, values, { model, prompt, suffix: gap ? textOf(after) : "" });
    const state = desk.state;
    const name = gap ? `${Date.now()}` : 0;
    const answers = Array.from({ length: body.n ?? 1 }, () => {
      const facts = { model, start: prompt.length, gap: name };
      const node = desk.tree.add(parent?.id ?? null, [...before, ...after], facts);
      return new Answer(node, before, after, { prompt, gap: name, seed: seedOf(model) });
    });
    const alone = answers.length === 1;
    if (alone) desk.history.keep(state);
    const clock = new Clock();
    let usage = null;
    const told = () => view.usage({ rate: clock.rate(sum(answers)), wait: clock.wait, usage });

    const draw = () => {
      for (const answer of answers) answer.node.pieces = answer.pieces;
      if (alone) this.#follow(answers[0]);
      else view.cards.render();
      told();
    };
    const run = this.#begin("Writing…", () => {
      const empty = answers.filter(({ grown }) => !grown.length && !put);
      for (const answer of answers) keep(answer, body);
      draw();
      for (const { node } of empty) desk.tree.remove(node);
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

  /** The working text follows an answer that grows. */
  #follow({ node, before, grown }) {
    this.desk.node = node;
    this.desk.pieces = node.pieces;
    this.desk.caret = lengthOf(before) + lengthOf(grown);
    this.view.draw(null, true);
  }

  /** Nothing came of it: as if it had not been. */
  #nothing({ id, pieces, caret }, alone) {
    const { desk, view } = this;
    Object.assign(desk, { node: desk.tree.get(id), pieces, caret });
    if (alone) desk.history.forget();
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

/** What is known of an answer, in its node. */
function keep({ node, before, grown, finish }, { prompt, suffix, ...request }) {
  const end = lengthOf(before) + lengthOf(grown);
  Object.assign(node.facts, { finish, end, request });
}
