// The settings panel: one control for each request field. A value that differs from the default is marked.

import { icon, make } from "./dom.js";
import { shown } from "./tokens.js";

export class Settings {
  /** `changed()` after each change; `tokenize(text)` gives ids. */
  constructor(root, { changed, tokenize }) {
    Object.assign(this, { root, changed, tokenize, fields: [], values: {} });
  }

  show(fields, values) {
    this.fields = fields;
    this.values = values;
    const groups = new Map();
    for (const field of fields) groups.set(field.group ?? "", [...(groups.get(field.group ?? "") ?? []), field]);
    this.root.replaceChildren(
      ...[...groups].flatMap(([name, members]) => {
        const rows = members.map((field) => this.#row(field));
        if (!name) return rows;
        const used = members.some((field) => this.#differs(field));
        return [make("details", { open: used }, make("summary", {}, name), ...rows)];
      }),
    );
  }

  #differs({ name, standard, initial }) {
    const value = this.values[name] ?? null;
    if (Array.isArray(value)) return value.length > 0;
    return value !== null && value !== standard && value !== initial;
  }

  #set(field, value, row) {
    this.values[field.name] = value;
    row.classList.toggle("set", this.#differs(field));
    this.changed();
  }

  #row(field) {
    const id = `field-${field.name}`;
    const row = make("div", { className: `field ${field.kind}` });
    const set = (value) => this.#set(field, value, row);
    const value = this.values[field.name] ?? null;
    const controls = CONTROLS[field.kind]({ ...field, id, value, set, tokenize: this.tokenize });
    const label = make("label", { htmlFor: id }, field.name);
    row.append(label, ...controls, make("small", { id: `${id}-help` }, field.help));
    row.querySelector(`[id="${id}"]`).setAttribute("aria-describedby", `${id}-help`);
    row.classList.toggle("set", this.#differs(field));
    return row;
  }
}

/** Show a range only if its limit is near usual values. */
const bound = (limit) => (limit === undefined || Math.abs(limit) > 1e9 ? "" : limit);

function numeric({ id, value, standard, minimum, maximum, set }, more) {
  return make("input", {
    id,
    type: "number",
    value: value ?? "",
    placeholder: standard ?? "none",
    min: bound(minimum),
    max: bound(maximum),
    oninput: (event) => set(event.target.value === "" ? null : Number(event.target.value)),
    ...more,
  });
}

const CONTROLS = {
  integer: (field) => [numeric(field, { step: 1, inputMode: "numeric" })],
  number: (field) => [numeric(field, { step: "any" })],

  slider(field) {
    const { name, low, high, standard, value, set } = field;
    const box = numeric({ ...field, set: (value) => {
      range.value = value ?? standard;
      set(value);
    } }, { step: 0.05 });
    const range = make("input", {
      type: "range", min: low, max: high, step: 0.01, "aria-label": `${name}, slider`,
      oninput: () => {
        box.value = range.value;
        set(Number(range.value));
      },
    });
    range.value = value ?? standard;
    return [box, range];
  },

  boolean: ({ id, value, standard, set }) => [
    make("input", {
      id,
      type: "checkbox",
      checked: value ?? standard ?? false,
      onchange: (event) => set(event.target.checked),
    }),
  ],

  text: ({ id, value, set }) => [
    make("input", {
      id,
      type: "text",
      value: value ?? "",
      autocomplete: "off",
      oninput: (event) => set(event.target.value || null),
    }),
  ],

  ids: ({ id, value, set }) => [
    make("input", {
      id,
      type: "text",
      value: (value ?? []).join(", "),
      placeholder: "13, 198",
      inputMode: "numeric",
      autocomplete: "off",
      oninput: (event) => set((event.target.value.match(/\d+/g) ?? []).map(Number)),
    }),
  ],

  texts({ id, value, set, name }) {
    const list = make("ul", { className: "chips" });
    let texts = value ?? [];
    const draw = () => list.replaceChildren(...texts.map((text, i) => make("li", {},
      make("span", {}, shown(text)),
      make("button", {
        type: "button", className: "plain", "aria-label": `Remove ${name} ${shown(text)}`,
        onclick: () => change(texts.filter((_, other) => other !== i)),
      }, icon("close")))));
    const change = (now) => {
      texts = now;
      set(texts);
      draw();
    };
    const add = (input) => {
      const text = input.value.replace(/\\([nt\\])/g, (_, letter) => ({ n: "\n", t: "\t", "\\": "\\" })[letter]);
      if (text) change([...texts.filter((other) => other !== text), text]);
      input.value = "";
    };
    draw();
    return [adding(id, "Add a text", add), list];
  },

  bias({ id, value, set, tokenize }) {
    const list = make("ul", { className: "biases" });
    let entries = value ?? [];
    const change = (now) => {
      entries = now;
      set(entries);
    };
    const draw = () => list.replaceChildren(...entries.map((entry, i) => make("li", {},
      make("span", {}, shown(entry.text), make("small", {}, entry.ids.join(" "))),
      make("input", {
        type: "number", min: -100, max: 100, step: 1, value: entry.bias, "aria-label": `Bias for ${shown(entry.text)}`,
        oninput: (e) => change(entries.map((one, at) => (at === i ? { ...one, bias: Number(e.target.value) } : one))),
      }),
      make("button", {
        type: "button", className: "plain", "aria-label": `Remove the bias for ${shown(entry.text)}`,
        onclick: () => (change(entries.filter((_, at) => at !== i)), draw()),
      }, icon("close")))));
    const add = async (input) => {
      const text = input.value;
      if (!text) return;
      const ids = /^#\d+$/.test(text) ? [Number(text.slice(1))] : await tokenize(text);
      if (!ids) return;
      input.value = "";
      change([...entries, { text, ids, bias: -100 }]);
      draw();
    };
    draw();
    return [adding(id, "A text, or #id", add), list];
  },
};

/** A text field that adds its value with Enter or its button. */
function adding(id, placeholder, add) {
  const input = make("input", {
    id, type: "text", placeholder, autocomplete: "off",
    onkeydown: (event) => {
      if (event.key !== "Enter" || event.ctrlKey || event.metaKey) return;
      event.preventDefault();
      add(input);
    },
  });
  const named = { className: "plain", "aria-label": placeholder, onclick: () => add(input) };
  const button = make("button", { type: "button", ...named }, icon("plus"));
  return make("span", { className: "adding" }, input, button);
}
