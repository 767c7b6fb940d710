// The page as a whole: connects the modules' events. Decisions that a single module can make are made there.

import { Actions } from "./actions.js";
import { showBranches } from "./branches.js";
import { ChoiceCards } from "./choices.js";
import { WorkingDocument } from "./document.js";
import { find, make } from "./dom.js";
import { Editor } from "./editor.js";
import { fieldsOf, initial } from "./fields.js";
import { listen } from "./keyboard.js";
import { showContext, showCourse, showNumbers, showUsage } from "./meters.js";
import { HighlightLayer } from "./highlight.js";
import { Settings } from "./panel.js";
import { YOU, difference, piece, pieceAt, seedOf } from "./pieces.js";
import { Popover } from "./popover.js";
import { asCurl, asPython, bodyOf } from "./requests.js";
import { Problem, Server } from "./server.js";
import { SessionList } from "./sessions.js";
import { key, preferences } from "./storage.js";
import { dress } from "./view.js";

const FIRST_TEXT = "Once upon a time, there was a little";
const RAW = 60_000; // characters of the last response that are kept for the raw view

const workspace = new WorkingDocument();
const server = new Server(key.get);
const page = { fields: [], values: {}, models: [], counted: { text: null, count: 0 }, from: null, raw: [] };
const area = find("area");
const looks = dress();

const editor = new Editor(area, new HighlightLayer(find("mirror")), {
  edit(start, end, text, caret) {
    const { busy } = actions;
    const shown = workspace.text;
    actions.stop("Stopped: the text was changed.");
    const last = difference(shown, workspace.text); // text that had arrived and was not drawn yet
    const shift = start > last.start ? last.text.length : 0;
    popover.hide();
    workspace.edit(start + shift, end + shift, text, caret + shift);
    draw(busy ? workspace.caret : null);
    soon();
  },
  move() {
    workspace.caret = editor.end;
    showNumbers(workspace.pieces, seed(), editor.start, editor.end);
    find("insert").disabled = !canInsert();
  },
  point(piece, clicked) {
    if (document.body.matches('[data-colour="off"]:not(.boundaries)')) return;
    const details = piece && { stale: isStale(piece) };
    if (clicked && piece) popover.show(piece, details);
    else popover.point(piece, details);
  },
});

const popover = new Popover(find("popover"), {
  boxOf: (piece) => editor.mirror.boxOf(piece) ?? cards.cards.map(({ mirror }) => mirror.boxOf(piece)).find(Boolean),
  closed: () => area.focus(),
  choose(piece, part, raw, logprob) {
    popover.hide();
    const card = cards.cards.find(({ answer }) => answer.grown.includes(piece));
    if (card) use(card.answer);
    area.focus();
    actions.pick(piece, part, raw, logprob);
  },
});

const cards = new ChoiceCards(find("cards"), {
  pick: (answer) => use(answer),
  closed: () => area.focus(),
  point: (piece) => popover.point(piece, {}),
});

const settings = new Settings(find("fields"), {
  changed: () => soon(),
  async tokenize(prompt) {
    try {
      const answer = await server.post("tokenize", { prompt, add_special_tokens: false, model: find("model").value });
      return (await answer.json()).tokens;
    } catch (problem) {
      return fail(problem);
    }
  },
});

const actions = new Actions({
  workspace,
  server,
  ask: () => ({ fields: page.fields, values: page.values, model: find("model").value }),
  view: {
    cards,
    fail,
    say,
    clear,
    usage: showUsage,
    busy(busy) {
      document.body.classList.toggle("busy", busy);
      find("go").textContent = busy ? "Stop" : "Continue";
      find("go").title = busy ? "Esc" : "Ctrl+Enter";
    },
    draw(caret = null, follow = false) {
      draw(caret, follow);
      if (caret !== null) page.from = caret;
      if (caret === workspace.text.length) find("page").scrollTop = find("page").scrollHeight;
      soon(250);
    },
    settled() {
      const left = editor.start !== page.from || editor.end !== page.from;
      if (cards.root.hidden) draw(left ? null : workspace.caret);
      soon();
    },
    asked() {
      page.raw = [];
    },
    heard(value) {
      if (page.raw.length * 400 < RAW) page.raw.push(value);
    },
  },
});

const sessionList = new SessionList({
  fail: (text) => fail(new Problem(text)),
  read: () => ({ ...workspace.serialize(), settings: page.values }),
  lay(session) {
    actions.stop();
    cards.close();
    workspace.open(session?.tree ?? emptyTree(), session?.current);
    page.values = { ...initial(page.fields), ...session?.settings };
    settings.show(page.fields, page.values);
    draw(workspace.text.length);
    soon();
  },
});

// ---- drawing

/** Draw the document. `follow`: keep the end of the text in view if it was in view. */
function draw(caret = null, follow = false) {
  const scroller = find("page");
  const atEnd = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 160;
  editor.show(workspace.pieces, workspace.text, seed(), caret, follow);
  if (follow && atEnd) scroller.scrollTop = scroller.scrollHeight;
}

/** Draw everything else, in the next idle period. */
function soon(pause = 60) {
  page.timer ??= setTimeout(() => {
    page.timer = null;
    around();
  }, pause);
}

function around() {
  showNumbers(workspace.pieces, seed(), editor.start, editor.end);
  showCourse(workspace.pieces);
  count();
  const { tree, node } = workspace;
  const [place, all] = tree.position(node);
  find("position").textContent = `${place} / ${all}`;
  find("previous").disabled = place === 1;
  find("next").disabled = place === all;
  find("undo").disabled = !workspace.history.past.length;
  find("redo").disabled = !workspace.history.future.length;
  find("again").disabled = node.facts.start === undefined;
  find("insert").disabled = !canInsert();
  if (!find("pane-branches").hidden) showBranches(find("branches"), tree, node, (to) => travel(to));
  if (!find("pane-request").hidden) showRequest();
  if (!actions.busy) sessionList.later();
}

function canInsert() {
  const model = page.models.find(({ id }) => id === find("model").value);
  return model?.infill !== false && editor.end < workspace.text.length;
}

function showRequest() {
  const here = new URL(".", document.baseURI).href;
  const where = { model: find("model").value, prompt: workspace.text };
  const body = bodyOf(page.fields, page.values, where);
  find("curl").textContent = asCurl(here, body, Boolean(key.get()));
  find("python").textContent = asPython(here, body, Boolean(key.get()));
  find("answer").textContent = page.raw.map((value) => JSON.stringify(value)).join("\n").slice(0, RAW);
}

/** The context bar: the number of tokens by the server's tokenizer, updated when typing pauses. */
function count() {
  const model = page.models.find(({ id }) => id === find("model").value);
  const { text } = workspace;
  if (!text) page.counted = { text, count: 0 };
  const known = page.counted;
  showContext(known.count, model?.max_model_len ?? 0);
  if (known.text === text || known.asking || !model) return;
  known.asking = setTimeout(async () => {
    const asked = workspace.text;
    try {
      const answer = await server.post("tokenize", { prompt: asked, model: model.id });
      page.counted = { text: asked, count: (await answer.json()).count };
    } catch {
      page.counted = { text: asked, count: known.count }; // the next request will report the error
    }
    soon();
  }, actions.busy ? 600 : 250);
}

const isStale = (p) => editor.mirror.nodes.get(p)?.classList.contains("stale") ?? false;

/** Facts about the selected model. */
const seed = () => seedOf(find("model").value);

function say(text) {
  find("status").textContent = text;
}

function clear() {
  find("notice").hidden = true;
}

/** Show an error with the server's message. */
function fail(problem) {
  if (!(problem instanceof Problem)) throw problem;
  const { message, status, id } = problem;
  say("");
  if (status === 401) return askForKey(message);
  find("notice-title").textContent = [status || null, id].filter(Boolean).join(" · ");
  find("notice-text").textContent = message;
  find("notice").hidden = false;
  find("notice").scrollIntoView({ block: "nearest" });
  return null;
}

function askForKey(message) {
  find("key-message").textContent = message;
  find("key-given").value = "";
  find("key-given-keep").checked = key.kept;
  if (!find("key-dialog").open) find("key-dialog").showModal();
  return null;
}

// ---- moving in the tree

function travel(node) {
  actions.stop();
  popover.hide();
  if (!workspace.go(node)) return;
  cards.close();
  draw(workspace.caret);
  soon(0);
}

function use(answer) {
  actions.stop();
  travel(answer.node);
  area.focus();
}

function rewind(step) {
  actions.stop();
  popover.hide();
  if (!step()) return;
  cards.close();
  draw(workspace.caret);
  soon(0);
}

const commands = {
  go: () => (actions.busy ? actions.stop() : (area.focus(), actions.continue())),
  insert: () => canInsert() && (area.focus(), actions.insert(editor.end)),
  score: async () => {
    if (document.body.dataset.colour === "off") looks.colour("probability");
    await actions.score();
  },
  again: () => (area.focus(), actions.again()),
  undo: () => rewind(() => workspace.undo()),
  redo: () => rewind(() => workspace.redo()),
  previous: () => travel(workspace.tree.sibling(workspace.commit(), -1)),
  next: () => travel(workspace.tree.sibling(workspace.commit(), 1)),
  parent: () => travel(workspace.tree.parent(workspace.commit())),
  child: () => travel(workspace.tree.child(workspace.commit())),
  stop: () => (popover.open ? popover.hide() : actions.busy ? actions.stop() : looks.closeSheet()),
  alternatives() {
    const around = [editor.end, editor.end - 1].map((at) => pieceAt(workspace.pieces, at)?.piece);
    const found = around.find((p) => p?.token);
    if (found) popover.show(found, { stale: isStale(found) }, true);
    else say("The token at the cursor has no numbers yet: score the text first.");
  },
};

function emptyTree() {
  return new WorkingDocument().tree;
}

// ---- start

for (const name of ["go", "insert", "score", "again", "undo", "redo", "previous", "next"]) {
  find(name).addEventListener("click", () => commands[name]());
}
listen(commands, area);
find("notice-close").addEventListener("click", clear);
find("model").addEventListener("change", () => {
  preferences.set("model", find("model").value);
  page.counted = { text: null, count: 0 };
  draw();
  soon(0);
});
find("boundaries").addEventListener("click", () => {
  looks.boundaries();
  const unknown = workspace.pieces.some(({ token }) => !token);
  if (document.body.classList.contains("boundaries") && unknown) actions.score();
});
find("reset").addEventListener("click", () => {
  page.values = initial(page.fields);
  settings.show(page.fields, page.values);
  soon(0);
});
find("course").addEventListener("click", (event) => {
  const { left, width } = find("course").getBoundingClientRect();
  const at = Math.floor(((event.clientX - left) / width) * workspace.text.length);
  const box = editor.mirror.boxOf(pieceAt(workspace.pieces, at)?.piece);
  area.focus({ preventScroll: true });
  area.setSelectionRange(at, at);
  if (box) find("page").scrollBy({ top: box.top - innerHeight / 2 });
});
find("page").addEventListener("scroll", () => popover.hide());
looks.onTab = () => soon(0);
find("key").value = key.get();
find("key-keep").checked = key.kept;
for (const id of ["key", "key-keep"]) {
  find(id).addEventListener("change", () => {
    key.set(find("key").value, find("key-keep").checked);
    load();
  });
}
find("key-save").addEventListener("click", () => {
  key.set(find("key-given").value, find("key-given-keep").checked);
  find("key").value = key.get();
  find("key-keep").checked = key.kept;
  find("key-dialog").close();
  load();
});
find("key-given").addEventListener("keydown", (event) => event.key === "Enter" && find("key-save").click());
find("key-cancel").addEventListener("click", () => find("key-dialog").close());

/** Load the model list and the API description. While the server loads its model, retry. */
async function load() {
  try {
    page.fields = fieldsOf(await server.get("playground/fields.json"));
    page.models = (await server.get("v1/models")).data;
  } catch (problem) {
    fail(problem);
    if (problem.status === 503 || problem.status === 0) setTimeout(load, 2000);
    if (!sessionList.id) resume(); // texts are stored in the browser, so the session opens without a server too
    return;
  }
  clear();
  const wanted = preferences.get("model", "");
  find("model").replaceChildren(...page.models.map(({ id }) => make("option", { value: id }, id)));
  if (page.models.some(({ id }) => id === wanted)) find("model").value = wanted;
  page.values = { ...initial(page.fields), ...page.values };
  if (sessionList.id) draw();
  else resume();
  settings.show(page.fields, page.values);
  document.body.classList.add("ready");
  soon(0);
}

/** Open the last session, or the text from the link, or in a browser without sessions a first text to continue. */
function resume() {
  sessionList.resume();
  const given = new URLSearchParams(location.hash.slice(1)).get("prompt");
  const prompt = given ?? (sessionList.none ? FIRST_TEXT : null);
  if (prompt === null) return;
  // A draft, not yet a node of the tree: a user who replaces it leaves no branch behind.
  sessionList.begin({ tree: emptyTree().serialize(prompt ? [piece(prompt, YOU)] : null) });
  history.replaceState(null, "", location.pathname);
}

load();
area.focus();
