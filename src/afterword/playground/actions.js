// The actions that call the model: continue, fill a gap, take an alternative, rewrite, score. One action runs at a time.
// Text that has arrived stays when an action ends, also after an error or a cancel.

import { renumbered } from "./prompt.js";
import { MODEL, lengthOf, piece, piecesWithOffsets, seedOf, slice, textOf } from "./pieces.js";
import { bodyOf, scoringOf } from "./requests.js";
import { Answer, Clock, readingOf } from "./stream.js";

const ALTERNATIVES = 5; // of each token of scored text, at least
const FEWEST = 16; // tokens that the model writes where it would have ended the text at once

export class Actions {
  /** `ask()` gives {fields, values, models, around}; `view` draws; see main.js. */
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
    const { fields, values, around, models: [model] } = this.ask();
    const seed = seedOf(model, around);
    const most = fields.find(({ name }) => name === "logprobs")?.maximum ?? ALTERNATIVES;
    const alternatives = Math.min(most, Math.max(values.logprobs ?? 0, ALTERNATIVES));
    const run = this.#begin("Scoring the text…", () => {});
    const prompt = await this.#fitted(run, text, { most: 0 });
    if (run.over) return undefined;
    const body = scoringOf(fields, values, { model, prompt: prompt.sent }, alternatives);
    const clock = new Clock();
    return this.#hear(run, [body], (answer) => {
      workspace.renumber(renumbered(workspace.pieces, readingOf(answer, prompt.sent, seed), prompt.parts, seed));
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

  /** `more`: further fields of this one request. Several models answer side by side, but not after a chosen token. */
  async #write({ more = null, ...place }) {
    const { before, after, parent, gap = false, put = null } = place;
    const { workspace, view } = this;
    const { fields, values, models, around } = this.ask();
    const prompt = textOf(before);
    const suffix = gap ? textOf(after) : "";
    const bodies = models.slice(0, put ? 1 : models.length).map((model) => {
      return { ...bodyOf(fields, values, { model, prompt, suffix }), ...more };
    });
    const state = workspace.state;
    const name = gap ? `${Date.now()}` : 0;
    const answers = bodies.flatMap(({ model, n = 1 }) => Array.from({ length: n }, () => {
      const facts = { model, start: prompt.length, gap: name };
      const node = workspace.tree.add(parent?.id ?? null, [...before, ...after], facts);
      return new Answer(node, before, after, { gap: name, seed: seedOf(model, around) });
    }));
    const alone = answers.length === 1;
    if (alone) workspace.history.keep(state);
    let clock = new Clock();
    const usages = new Map();
    const usage = () => total([...usages.values()]);
    const reportUsage = () => view.usage({ rate: clock.rate(sum(answers)), wait: clock.wait, usage: usage() });

    const draw = () => {
      for (const answer of answers) answer.node.pieces = answer.pieces;
      if (alone) this.#follow(answers[0]);
      else view.cards.render();
      reportUsage();
    };
    const run = this.#begin(view.loading() ? "Loading the model…" : "Writing…", (problem) => {
      const empty = answers.filter(({ grown }) => !grown.length && !put);
      for (const answer of answers) keep(answer, bodies.find(({ model }) => model === answer.node.facts.model), problem);
      draw();
      for (const { node } of empty) workspace.tree.remove(node);
      if (empty.length === answers.length) this.#nothing(state, alone);
      if (!alone) view.cards.render(true);
      return answers.some(({ node }) => node.facts.unfinished);
    });
    if (!alone) view.cards.open(answers, bodies.length > 1);
    draw();
    view.draw(alone ? prompt.length : null);

    const fitted = await this.#fitted(run, prompt, { suffix, most: bodies[0].max_tokens });
    if (run.over) return;
    for (const body of bodies) body.prompt = fitted.sent;
    for (const answer of answers) answer.prompt = fitted;
    clock = new Clock();
    await this.#hear(run, bodies, (chunk, body) => {
      if (chunk.usage) usages.set(body, chunk.usage);
      const first = bodies.indexOf(body) * (body.n ?? 1);
      for (const choice of chunk.choices) answers[first + choice.index].take(choice, body.echo === true);
      if (chunk.choices.length) clock.tick();
      if (clock.first !== null) run.began();
      run.frame(draw);
    }, () => `${usage() ? `${usage().completion_tokens} tokens` : "Done"}, ended by ${reasons(answers)}.`);
    const ended = answers.every(({ finish, grown }) => finish === "stop" && !grown.length);
    if (!more && ended) this.#offer(fields, place, bodies[0]);
  }

  /** The prompt, without the oldest text if it is too long and the user wants that. An error ends the run. */
  async #fitted(run, text, room) {
    try {
      return await this.view.compose(text, room);
    } catch (problem) {
      run.settle("", problem);
      return null;
    }
  }

  /** The model ended the text at once: offer to go on, with the field by which it cannot end there. */
  #offer(fields, place, body) {
    const known = new Set(fields.map(({ name }) => name));
    const fewest = { min_tokens: Math.min(FEWEST, body.max_tokens ?? FEWEST) };
    const more = known.has("min_tokens") ? fewest : known.has("ignore_eos") ? { ignore_eos: true } : null;
    const choices = more ? [["Go on", () => this.#write({ ...place, more })]] : [];
    this.view.offer("end", `The model ends the text here.${more ? "" : " Write a few words, then continue."}`, choices);
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
    run.began = () => {
      run.began = () => {};
      view.progress.end();
      view.say("Writing…");
    };
    run.settle = (why, problem = null) => {
      if (run.over) return;
      run.over = true;
      cancelAnimationFrame(run.waiting);
      const unfinished = settled(problem);
      this.run = null;
      view.busy(false);
      view.progress.end();
      view.say(unfinished ? "Unfinished. The text that arrived is kept." : why);
      view.settled();
      if (problem) view.fail(problem);
    };
    this.run = run;
    view.clear();
    view.busy(true);
    view.progress.begin();
    view.say(said);
    return run;
  }

  /** Send requests and take their chunks: `take(chunk, body)`. A problem of one does not end the others. */
  async #hear(run, bodies, take, end = () => "") {
    this.view.asked();
    const ends = await Promise.allSettled(bodies.map(async (body) => {
      for await (const value of this.server.complete(body, run.controller.signal)) {
        if (run.over) return;
        this.view.heard(value);
        take(value, body);
      }
    }));
    if (run.over) return;
    const failed = ends.find(({ status }) => status === "rejected");
    if (failed) run.settle("", failed.reason);
    else run.settle(end());
  }
}

/** The usage of several requests together; null if there is none. */
function total(usages) {
  if (usages.length < 2) return usages[0] ?? null;
  const added = (name) => usages.reduce((all, usage) => all + (usage[name] ?? 0), 0);
  return { prompt_tokens: added("prompt_tokens"), completion_tokens: added("completion_tokens") };
}

const sum = (answers) => answers.reduce((total, { tokens }) => total + tokens, 0);

const reasons = (answers) => [...new Set(answers.map(({ finish }) => finish ?? "nothing"))].join(", ");

/** The facts about a generation that its node keeps. */
function keep({ node, before, grown, finish }, { prompt, suffix, ...request }, problem) {
  const end = lengthOf(before) + lengthOf(grown);
  if (problem && !finish && grown.length) node.facts.unfinished = true;
  Object.assign(node.facts, { finish, end, request });
}
