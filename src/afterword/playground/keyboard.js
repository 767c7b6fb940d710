// Keyboard shortcuts. Keys that text fields use themselves are shortcuts in the document's text field only.

const PLAIN = { KeyR: "again", KeyS: "score" };
const ARROWS = { ArrowUp: "previous", ArrowDown: "next", ArrowLeft: "parent", ArrowRight: "child" };

/** The command of a key event, or null. */
export function meaning(event, inDocument) {
  const { key, code, altKey, shiftKey } = event;
  const ctrl = event.ctrlKey || event.metaKey;
  const control = !inDocument && event.target.matches?.("input, select, textarea");
  if (key === "Escape") return "stop";
  if (ctrl && !altKey && key === "Enter") return shiftKey ? "insert" : "start";
  if (altKey && !ctrl && !control) return ARROWS[key] ?? PLAIN[code] ?? null;
  if (!ctrl || altKey || control) return null;
  if (code === "KeyZ") return shiftKey ? "redo" : "undo";
  if (code === "KeyY") return "redo";
  return inDocument && (code === "Space" || key === ".") ? "alternatives" : null;
}

export function listen(commands, area) {
  document.addEventListener("keydown", (event) => {
    if (document.querySelector("dialog[open]") || event.isComposing) return;
    const name = meaning(event, event.target === area);
    if (!name) return;
    if (name !== "stop") event.preventDefault();
    if (name === "start") document.body.classList.contains("busy") || commands.go();
    else commands[name]();
  });
  area.addEventListener("beforeinput", (event) => {
    const name = { historyUndo: "undo", historyRedo: "redo" }[event.inputType];
    if (!name) return;
    event.preventDefault();
    commands[name]();
  });
}
