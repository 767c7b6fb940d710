// The page's appearance: colours, theme, typeface, panel and tabs. Independent of texts and models.

import { find } from "./dom.js";
import { preferences } from "./storage.js";

const LEGENDS = { probability: ["100 %", "50 %", "< 1 %"], surprise: ["0", "", "10 nats"], off: ["", "", ""] };
const THEMES = ["auto", "light", "dark"];
const WIDE = matchMedia("(min-width: 1100px)");

export function dress() {
  const looks = { onTab: () => {} };

  looks.colour = (mode) => {
    document.body.dataset.colour = mode;
    document.querySelector(`[name="colour"][value="${mode}"]`).checked = true;
    find("legend").querySelectorAll("span").forEach((span, i) => (span.textContent = LEGENDS[mode][i]));
    preferences.set("colour", mode);
  };

  looks.boundaries = (on = !document.body.classList.contains("boundaries")) => {
    document.body.classList.toggle("boundaries", on);
    find("boundaries").setAttribute("aria-pressed", on);
  };

  looks.panel = (open) => {
    find("panel").hidden = !open;
    find("panel-button").setAttribute("aria-expanded", open);
    if (WIDE.matches) preferences.set("panel", open);
  };

  /** Close the panel if it covers the text. */
  looks.closeSheet = () => {
    if (WIDE.matches || find("panel").hidden) return;
    looks.panel(false);
    find("panel-button").focus();
  };

  function theme(name) {
    document.documentElement.dataset.theme = name;
    find("theme").title = `Theme: ${name}`;
    preferences.set("theme", name);
  }

  function face(name) {
    document.body.dataset.face = name;
    find("face").value = name;
    preferences.set("face", name);
  }

  function spelling(on) {
    find("area").spellcheck = on;
    find("spelling").checked = on;
    preferences.set("spelling", on);
  }

  find("colour").addEventListener("change", (event) => looks.colour(event.target.value));
  find("theme").addEventListener("click", () => {
    const now = THEMES.indexOf(document.documentElement.dataset.theme);
    theme(THEMES[(now + 1) % THEMES.length]);
  });
  find("face").addEventListener("change", (event) => face(event.target.value));
  find("spelling").addEventListener("change", (event) => spelling(event.target.checked));
  find("panel-button").addEventListener("click", () => looks.panel(find("panel").hidden));
  find("panel-close").addEventListener("click", () => {
    looks.panel(false);
    find("panel-button").focus();
  });
  find("help").addEventListener("click", () => find("help-dialog").showModal());
  find("help-close").addEventListener("click", () => find("help-dialog").close());
  for (const button of document.querySelectorAll("[data-copy]")) {
    button.addEventListener("click", () => copy(find(button.dataset.copy), button));
  }
  tabs(looks);
  looks.colour(preferences.get("colour", "probability"));
  theme(preferences.get("theme", "auto"));
  face(preferences.get("face", "serif"));
  spelling(preferences.get("spelling", false));
  looks.panel(WIDE.matches && preferences.get("panel", true));
  return looks;
}

function tabs(looks) {
  const all = [...document.querySelectorAll('[role="tab"]')];
  const choose = (chosen) => {
    for (const tab of all) {
      const mine = tab === chosen;
      tab.setAttribute("aria-selected", mine);
      tab.tabIndex = mine ? 0 : -1;
      find(tab.getAttribute("aria-controls")).hidden = !mine;
    }
    looks.onTab();
  };
  all.forEach((tab, i) => {
    tab.addEventListener("click", () => choose(tab));
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step || event.altKey) return;
      const next = all[(i + step + all.length) % all.length];
      next.focus();
      choose(next);
    });
  });
}

/** Copy to the clipboard; where the browser forbids that on unencrypted pages, select the text. */
async function copy(source, button) {
  try {
    await navigator.clipboard.writeText(source.textContent);
  } catch {
    getSelection().selectAllChildren(source);
    document.execCommand("copy");
  }
  button.textContent = "Copied";
  setTimeout(() => (button.textContent = "Copy"), 1500);
}
