// The page as a whole: connects the modules' events. Decisions that a single module can make are made there.

import { Actions } from "./actions.js";
import { BranchList } from "./branches.js";
import { ChoiceCards } from "./choices.js";
import { WorkingDocument } from "./document.js";
import { find } from "./dom.js";
import { Editor } from "./editor.js";
import { FILES } from "./exports.js";
import { changedOf, fieldsOf, initial } from "./fields.js";
import { listen } from "./keyboard.js";
import { KeyDialog } from "./keys.js";
import { ContextMeter } from "./context_meter.js";
import { showCourse, showNumbers, showUsage } from "./meters.js";
import { HighlightLayer } from "./highlight.js";
import { ModelList } from "./models.js";
import { hideNotice, showNotice } from "./notice.js";
import { Notes } from "./notes.js";
import { Offer } from "./offer.js";
import { Settings } from "./panel.js";
import { YOU, difference, piece, pieceAt, seedOf } from "./pieces.js";
import { OtherTabs } from "./other_tabs.js";
import { Presets } from "./presets.js";
import { Popover } from "./popover.js";
import { Progress } from "./progress.js";
import { compose } from "./prompt.js";
import { asCurl, asPython, bodyOf } from "./requests.js";
import { Problem, Server } from "./server.js";
import { SessionList } from "./sessions.js";
import { key, preferences } from "./storage.js";
import { Unsent } from "./unsent.js";
import { dress } from "./view.js";

const FIRST_TEXT = "Once upon a time, there was a little";
const RAW = 60_000; // characters of the last response that are kept for the raw view

const workspace = new WorkingDocument();
const server = new Server(key.get);
const page = { fields: [], values: {}, from: null, raw: [] };
const area = find("area");
const looks = dress();
const progress = new Progress();
const offer = new Offer({ closed: () => area.focus({ preventScroll: true }) });
const keys = new KeyDialog({ changed: () => load() });
const models = new ModelList({ server, progress, say, busy: () => actions.busy });

const notes = new Notes({
  changed() {
    context.forget();
    draw();
    soon();
  },
});

const editor = new Editor(area, new HighlightLayer(find("mirror")), {
  edit(start, end, text, caret) {
    const { busy } = actions;
    const shown = workspace.text;
    actions.stop("Stopped: the text was changed.");
    const last = difference(shown, workspace.text); // text that had arrived and was not drawn yet
    const shift = start > last.start ? last.text.length : 0;
    popover.hide();
    offer.hide();
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
  changed: () => (presets.show(), soon()),
  async tokenize(prompt) {
    try {
      return (await server.post("tokenize", { prompt, add_special_tokens: false, model: models.name })).tokens;
    } catch (problem) {
      return fail(problem);
    }
  },
});

const presets = new Presets({
  read: () => page.values,
  apply: (values) => setAll({ ...initial(page.fields), ...structuredClone(values) }),
});

const actions = new Actions({
  workspace,
  server,
  ask: () => ({ fields: page.fields, values: page.values, models: models.names, around: notes.around }),
  view: {
    cards,
    fail,
    say,
    clear,
    progress,
    offer: (...given) => offer.show(...given),
    loading: () => models.loading,
    compose: (text, room) => context.compose(text, room),
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
      if (models.loading) models.refresh();
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
  files: FILES,
  facts: () => ({
    text: workspace.text,
    pieces: workspace.pieces,
    seed: seed(),
    model: models.name,
    settings: changedOf(page.fields, page.values),
  }),
  read: () => ({ ...workspace.serialize(), settings: page.values, notes: notes.values }),
  lay(session) {
    actions.stop();
    cards.close();
    offer.hide("tabs");
    workspace.open(session?.tree ?? emptyTree(), session?.current);
    notes.show(session?.notes);
    setAll({ ...initial(page.fields), ...session?.settings });
    draw(workspace.text.length);
    soon();
  },
});

const unsent = new Unsent(editor.mirror);

const context = new ContextMeter({
  server,
  models,
  unsent,
  text: () => workspace.text,
  notes: () => notes.values,
  most: () => page.values.max_tokens,
  busy: () => actions.busy,
  changed: () => (draw(), soon()),
});

new OtherTabs({ list: sessionList, offer, busy: () => actions.busy });

// ---- drawing

/** Draw the document. `follow`: keep the end of the text in view if it was in view. */
function draw(caret = null, follow = false) {
  const scroller = find("page");
  const atEnd = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 160;
  editor.show(workspace.pieces, workspace.text, seed(), caret, follow);
  const broken = workspace.brokenAt;
  editor.mirror.mark(broken === null ? null : pieceAt(workspace.pieces, broken - 1)?.piece);
  unsent.show(context.start);
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
  context.update();
  const { tree, node } = workspace;
  const [place, all] = tree.position(node);
  find("position").textContent = `${place} / ${all}`;
  find("previous").disabled = place === 1;
  find("next").disabled = place === all;
  find("undo").disabled = !workspace.history.past.length;
  find("redo").disabled = !workspace.history.future.length;
  find("again").disabled = node.facts.start === undefined;
  find("insert").disabled = !canInsert();
  if (!find("pane-branches").hidden) branches.show(tree, node);
  if (!find("pane-request").hidden) showRequest();
  if (!actions.busy) sessionList.later();
}

function canInsert() {
  return models.current?.infill !== false && editor.end < workspace.text.length;
}

function showRequest() {
  const here = new URL(".", document.baseURI).href;
  const where = { model: models.name, prompt: compose(workspace.text, context.start, notes.values).sent };
  const body = bodyOf(page.fields, page.values, where);
  find("curl").textContent = asCurl(here, body, Boolean(key.get()));
  find("python").textContent = asPython(here, body, Boolean(key.get()));
  find("answer").textContent = page.raw.map((value) => JSON.stringify(value)).join("\n").slice(0, RAW);
}

const isStale = (p) => editor.mirror.nodes.get(p)?.classList.contains("stale") ?? false;

const seed = () => seedOf(models.name, notes.around);

function say(text) {
  find("status").textContent = text;
}

function clear() {
  hideNotice();
  offer.hide();
}

function fail(problem) {
  if (!(problem instanceof Problem)) throw problem;
  if (problem.status === 401) return keys.ask(problem.message);
  showNotice(problem);
  if (/maximum context length/.test(problem.message) && !context.leavesOut) {
    const choices = [["Leave out the oldest text", () => context.leaveOut(true)]];
    offer.show("context", "The text is too long for the context.", choices);
  }
  return undefined;
}

function setAll(values) {
  page.values = values;
  settings.show(page.fields, values);
  presets.show();
  soon(0);
}

// ---- moving in the tree

const branches = new BranchList({
  go: (node) => travel(node),
  changed: () => sessionList.later(),
  remove() {
    actions.stop();
    const count = [...workspace.tree.walk([workspace.node.id])].length;
    let restore;
    rewind(() => (restore = workspace.remove()));
    const text = count > 1 ? `Deleted ${count} branches.` : "Deleted the branch.";
    offer.show("deleted", text, [["Take it back", () => rewind(() => (restore(), true))]]);
  },
});

function travel(node) {
  actions.stop();
  popover.hide();
  offer.hide();
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
  offer.hide();
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
  preferences.set("model", models.name);
  context.forget();
  draw();
  soon(0);
});
find("boundaries").addEventListener("click", () => {
  looks.boundaries();
  const unknown = workspace.pieces.some(({ token }) => !token);
  if (document.body.classList.contains("boundaries") && unknown) actions.score();
});
find("reset").addEventListener("click", () => setAll(initial(page.fields)));
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

/** Load the model list and the API description. While there is no server, retry. */
async function load() {
  try {
    page.fields = fieldsOf(await server.get("playground/fields.json"));
    await models.load();
  } catch (problem) {
    fail(problem);
    if (problem.status === 503 || problem.status === 0) setTimeout(load, 2000);
    if (!sessionList.id) resume(); // texts are stored in the browser, so the session opens without a server too
    return;
  }
  hideNotice();
  setAll({ ...initial(page.fields), ...page.values });
  if (sessionList.id) draw();
  else resume();
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
