// The browser's local storage: sessions, preferences and, if the user chooses so, the API key. Only this module uses it.

const PREFIX = "afterword.";
const KEY = `${PREFIX}key`;

function read(name, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(PREFIX + name)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

/** Returns false if the storage is full or disabled. */
function write(name, value) {
  try {
    localStorage.setItem(PREFIX + name, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

export const preferences = {
  get: (name, otherwise) => read(`preference.${name}`, otherwise),
  set: (name, value) => write(`preference.${name}`, value),
};

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? localStorage.getItem(KEY) ?? "",
  get kept() {
    return localStorage.getItem(KEY) !== null;
  },
  /** Kept until the tab is closed or the key is removed. */
  set(text, keep) {
    localStorage.removeItem(KEY);
    sessionStorage.removeItem(KEY);
    if (text) (keep ? localStorage : sessionStorage).setItem(KEY, text);
  },
};

/** The session that this tab shows. A new tab begins with the one that was shown last. */
export const shownSession = {
  get: () => sessionStorage.getItem(`${PREFIX}session`) ?? preferences.get("session", ""),
  set(id) {
    sessionStorage.setItem(`${PREFIX}session`, id);
    preferences.set("session", id);
  },
};

/** Call `list()` when another tab changes the list of sessions, `session(id)` when it changes or deletes one. */
export function onOtherTab({ list, session }) {
  addEventListener("storage", ({ key }) => {
    if (key === `${PREFIX}sessions`) list();
    else if (key?.startsWith(`${PREFIX}session.`)) session(key.slice(`${PREFIX}session.`.length));
  });
}

export const sessions = {
  /** {id, name, time} of each session, the newest first. */
  list: () => read("sessions", []),
  get: (id) => read(`session.${id}`, null),
  /** A session as it is stored, to compare; null if it is not stored. */
  raw: (id) => localStorage.getItem(`${PREFIX}session.${id}`),
  /** Returns "whole", "bare" if only the version without alternatives fitted, or "none". */
  put(id, name, session) {
    const others = this.list().filter((one) => one.id !== id);
    write("sessions", [{ id, name, time: Date.now() }, ...others]);
    if (write(`session.${id}`, rounded(session))) return "whole";
    return write(`session.${id}`, bare(session)) ? "bare" : "none";
  },
  remove(id) {
    localStorage.removeItem(`${PREFIX}session.${id}`);
    write("sessions", this.list().filter((one) => one.id !== id));
  },
};

const round = (value) => (value === null ? null : Math.round(value * 1e4) / 1e4);

function mapParts(session, change) {
  const pieces = session.tree.pieces.map((p) => {
    return p.token ? { ...p, token: { ...p.token, parts: p.token.parts.map(change) } } : p;
  });
  return { ...session, tree: { ...session.tree, pieces } };
}

const rounded = (session) => mapParts(session, (part) => {
  return { ...part, logprob: round(part.logprob), top: part.top.map(([raw, value]) => [raw, round(value)]) };
});

const bare = (session) => mapParts(session, (part) => ({ ...part, top: [] }));
