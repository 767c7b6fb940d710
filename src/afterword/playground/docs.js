// The API page: draws openapi.json as sections, each with a form that sends a real request to this server.

import { find, make } from "./dom.js";
import { key, preferences } from "./storage.js";

const METHODS = ["get", "post", "put", "patch", "delete"];
const HUGE = 2 ** 31 - 1;
const SHOWN = 2 ** 20; // characters of a response that are shown at most
let whole; // the OpenAPI document

// ---- schemas as text

const resolved = (schema) => (schema.$ref ? whole.components.schemas[nameOf(schema)] : schema);
const nameOf = (schema) => schema.$ref.split("/").at(-1);
const isNull = (schema) => schema.type === "null";

/** A schema as text: `integer, 0 to 20`, `array of string or null`. */
function inWords(schema) {
  if (schema.$ref) return nameOf(schema);
  if (schema.anyOf) return [...new Set(schema.anyOf.map(inWords))].join(" or ");
  if ("const" in schema) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" or ");
  if (schema.format === "binary") return "file";
  const type = [schema.type ?? "any"].flat().join(" or ");
  if (type === "array") return `array of ${inWords(schema.items ?? {})}${most(schema.maxItems, "", ", at most ")}`;
  if (type === "object" && schema.additionalProperties?.type) return `object of ${inWords(schema.additionalProperties)}`;
  return type + range(schema) + most(schema.maxLength, " characters", ", at most ");
}

const most = (limit, unit, before) => (limit === undefined ? "" : `${before}${limit}${unit}`);

function range({ minimum, maximum }) {
  if (minimum === undefined && maximum === undefined) return "";
  if (maximum === undefined || maximum >= HUGE) return minimum > -HUGE ? `, at least ${minimum}` : "";
  return `, ${minimum} to ${maximum}`;
}

/** The properties of a schema: those of an object, or of the objects in an array. */
function membersOf(schema) {
  const plain = resolved(schema);
  if (plain.properties) return { properties: plain.properties, required: plain.required ?? [] };
  const inner = [plain.items, ...(plain.anyOf ?? []).filter((each) => !isNull(each)), plain.additionalProperties];
  for (const each of inner) {
    const found = each && typeof each === "object" ? membersOf(each) : null;
    if (found) return found;
  }
  return null;
}

/** Table rows for the properties of a request or a response. */
function members(schema, sent, depth = 0, seen = []) {
  const found = membersOf(schema);
  if (!found) return [];
  return Object.entries(found.properties).flatMap(([name, each]) => {
    const nothing = each.default !== undefined && each.anyOf; // null means that the field is absent: it is not listed as a value
    const facts = [inWords(nothing ? { anyOf: each.anyOf.filter((one) => !isNull(one)) } : each)];
    const required = found.required.includes(name);
    if (required === sent) facts.push(sent ? "required" : "not always present");
    if (each.default !== undefined && each.default !== null) facts.push(`default ${JSON.stringify(each.default)}`);
    const place = ["", "inner", "innermost"][Math.min(depth, 2)];
    const meaning = make("dd", { className: place }, ...prose(each.description ?? ""));
    if (each.examples?.some((value) => typeof value !== "boolean")) meaning.append(make("span", { className: "quiet" }, " For example "), ...samples(each));
    const term = make("dt", { className: place }, make("code", {}, name), " ", make("span", { className: "quiet" }, facts.join(" · ")));
    const known = JSON.stringify(each);
    return [term, meaning, ...(seen.includes(known) ? [] : members(each, sent, depth + 1, [...seen, known]))];
  });
}

const samples = ({ examples }) =>
  examples.flatMap((value, at) => [...(at ? [" or "] : []), make("code", {}, JSON.stringify(value))]);

/** A text in which `code` is marked. */
const prose = (text) => text.split("`").map((part, at) => (at % 2 ? make("code", {}, part) : part));

// ---- an operation

function operation(path, method, described) {
  const id = `${method}${path.replace(/[^a-z0-9]+/gi, "-")}`.replace(/-$/, "");
  const title = make("h2", {}, make("span", { className: "method" }, method.toUpperCase()), " ", make("code", {}, path));
  const text = make("div", {}, ...parameters(described), ...asked(described), ...answered(described));
  const section = make(
    "section",
    { className: "operation", id, "aria-label": `${method.toUpperCase()} ${path}` },
    title,
    make("p", { className: "quiet" }, sentence(described.summary ?? "")),
    ...(described.description ? [make("p", {}, ...prose(described.description))] : []),
    make("div", { className: "both" }, text, trial(path, method, described)),
  );
  const link = make("a", { href: `#${id}` }, make("span", { className: "method" }, method.toUpperCase()), " ", path);
  return { section, entry: make("li", {}, link) };
}

const sentence = (text) => text && `${text[0].toUpperCase()}${text.slice(1)}.`;

function parameters({ parameters: given = [] }) {
  return ["path", "query"].flatMap((place) => {
    const rows = given
      .filter((each) => each.in === place)
      .flatMap(({ name, schema, description }) => [
        make("dt", {}, make("code", {}, name), " ", make("span", { className: "quiet" }, inWords(schema))),
        make("dd", {}, description ?? ""),
      ]);
    return rows.length ? [make("h3", {}, `In the ${place}`), make("dl", {}, ...rows)] : [];
  });
}

function asked({ requestBody }) {
  return Object.entries(requestBody?.content ?? {}).flatMap(([kind, { schema }]) => [
    make("h3", {}, "Body ", make("span", { className: "quiet" }, kind)),
    make("dl", {}, ...members(schema, true)),
  ]);
}

function answered({ responses }) {
  const good = Object.entries(responses).filter(([status]) => status < 400);
  const bad = Object.entries(responses).filter(([status]) => status >= 400);
  const parts = good.flatMap(([status, { content = {} }]) =>
    Object.entries(content).map(([kind, { schema, "x-event": event }]) => {
      const shape = schema ?? event;
      const name = shape?.$ref ? ` · ${event ? "events: " : ""}${nameOf(shape)}` : "";
      const rows = shape ? members(shape, false) : [];
      return make("details", {}, make("summary", {}, `${status} · ${kind}${name}`), make("dl", {}, ...rows));
    }),
  );
  const rows = bad.flatMap(([status, { description }]) => [
    make("dt", {}, make("code", {}, status)),
    make("dd", {}, ...prose(description)),
  ]);
  if (rows.length) parts.push(make("details", {}, make("summary", {}, "Errors"), make("dl", {}, ...rows)));
  return [make("h3", {}, "Answer"), ...parts];
}

// ---- sending a request

function example(schema) {
  const plain = resolved(schema);
  return plain.examples?.[0] ?? {};
}

/** One form row for a parameter in the path, in the query or in a multipart body. */
function blank(name, schema, required) {
  const file = schema.format === "binary";
  const looks = file ? { type: "file" } : { value: required ? (schema.const ?? "") : "", placeholder: inWords(schema) };
  return make("input", { name, required, spellcheck: false, autocomplete: "off", ...looks });
}

/** The URL of a request, from the form's values. */
function addressOf(path, inputs) {
  const inPath = (text, { name, value }) => text.replace(`{${name}}`, value.split("/").map(encodeURIComponent).join("/"));
  const url = new URL(inputs.path.reduce(inPath, path.slice(1)), document.baseURI);
  for (const { name, value } of inputs.query) if (value) url.searchParams.set(name, value);
  return url;
}

function formOf(inputs) {
  const form = new FormData();
  for (const { name, files, value } of inputs) if (files?.length || (!files && value)) form.append(name, files?.[0] ?? value);
  return form;
}

function trial(path, method, { parameters: given = [], requestBody }) {
  const schema = requestBody?.content?.["application/json"]?.schema;
  const { properties: parts = {}, required = [] } = requestBody?.content?.["multipart/form-data"]?.schema ?? {};
  const inputs = { parts: Object.entries(parts).map(([name, part]) => blank(name, part, required.includes(name))) };
  for (const place of ["path", "query"]) {
    const here = given.filter((each) => each.in === place);
    inputs[place] = here.map((each) => blank(each.name, each.schema, Boolean(each.required)));
  }
  const all = [...inputs.path, ...inputs.query, ...inputs.parts];
  const begun = schema ? JSON.stringify(example(schema), null, 2) : "";
  const rows = begun.split("\n").length + 1;
  const body = schema && make("textarea", { rows, spellcheck: false, value: begun });
  const send = make("button", { className: "primary", type: "submit" }, "Send");
  const stop = make("button", { type: "button", disabled: true }, "Stop");
  const curl = make("pre", { tabIndex: 0 });
  const copy = make("button", { type: "button", onclick: () => copied(copy, curl.textContent) }, "Copy");
  const status = make("p", { role: "status", className: "quiet" });
  const headers = make("pre", { tabIndex: 0 });
  const more = make("details", { hidden: true }, make("summary", {}, "Headers"), headers);
  const answer = make("pre", { className: "answer", tabIndex: 0, hidden: true, "aria-label": "Answer" });

  const request = () => ({
    url: addressOf(path, inputs),
    method: method.toUpperCase(),
    headers: { ...(key.get() && { Authorization: `Bearer ${key.get()}` }), ...(body && { "Content-Type": "application/json" }) },
    body: body?.value ?? (inputs.parts.length ? formOf(inputs.parts) : undefined),
  });
  const refresh = () => {
    curl.textContent = asCurl(request());
    body?.setAttribute("aria-invalid", String(!isJson(body.value)));
  };
  const form = make(
    "form",
    { "aria-label": `Try ${method.toUpperCase()} ${path}`, oninput: refresh },
    make("h3", {}, "Try it"),
    ...all.map((input) => make("label", {}, input.name, input)),
    ...(body ? [make("label", {}, "Body", body)] : []),
    make("div", { className: "row" }, send, stop),
    make("details", { open: Boolean(body) }, make("summary", {}, "curl"), curl, copy),
    status,
    more,
    answer,
  );
  let running = null;
  stop.addEventListener("click", () => running?.abort());
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    running?.abort();
    const mine = (running = new AbortController());
    stop.disabled = false;
    await tried(request(), { status, headers, more, answer }, mine.signal);
    if (running === mine) stop.disabled = true;
  });
  refresh();
  find("key").addEventListener("input", refresh);
  return form;
}

/** Sends a request and shows the response while it arrives. */
async function tried({ url, ...options }, { status, headers, more, answer }, signal) {
  const began = performance.now();
  const took = () => `${Math.round(performance.now() - began).toLocaleString("en")} ms`;
  answer.hidden = more.hidden = true;
  answer.textContent = "";
  status.className = "quiet";
  status.textContent = "Waiting …";
  try {
    const response = await fetch(url, { ...options, signal });
    const kind = response.headers.get("content-type") ?? "";
    status.className = response.ok ? "" : "bad";
    status.textContent = `${response.status} ${response.statusText}`;
    headers.textContent = [...response.headers].map(([name, value]) => `${name}: ${value}`).join("\n");
    answer.hidden = more.hidden = false;
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let part = await reader.read(); !part.done; part = await reader.read()) {
      if (answer.textContent.length < SHOWN) answer.append(part.value);
    }
    if (kind.startsWith("application/json")) answer.textContent = pretty(answer.textContent);
    status.textContent = `${response.status} ${response.statusText} · ${took()}`;
  } catch (error) {
    const stopped = error.name === "AbortError";
    status.className = stopped ? "quiet" : "bad";
    status.textContent = stopped ? `Stopped after ${took()}` : "The server cannot be reached.";
  }
}

function isJson(text) {
  try {
    JSON.parse(text);
    return true;
  } catch {
    return false;
  }
}

const pretty = (text) => (isJson(text) ? JSON.stringify(JSON.parse(text), null, 2) : text);

/** The request as a shell command. It does not contain the API key. */
function asCurl({ url, method, headers, body }) {
  const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;
  const streams = typeof body === "string" && isJson(body) && JSON.parse(body)?.stream;
  const words = [`curl ${streams ? "-N " : ""}${quoted(url.href)}`];
  if (method !== (body ? "POST" : "GET")) words.push(`-X ${method}`);
  if (headers.Authorization) words.push('-H "Authorization: Bearer $AFTERWORD_API_KEY"');
  if (typeof body === "string") words.push("-H 'Content-Type: application/json'", `-d ${quoted(body)}`);
  else for (const [name, value] of body ?? []) words.push(`-F ${quoted(`${name}=${value.name ? `@${value.name}` : value}`)}`);
  return words.join(" \\\n  ");
}

async function copied(button, text) {
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Not allowed"; // browsers allow the clipboard on localhost and HTTPS only
  }
  setTimeout(() => (button.textContent = "Copy"), 2000);
}

// ---- the page

async function load() {
  const headers = key.get() ? { Authorization: `Bearer ${key.get()}` } : {};
  let response;
  try {
    response = await fetch(new URL("openapi.json", document.baseURI), { headers });
  } catch {
    return notice("The server cannot be reached.");
  }
  if (response.status === 401) return notice("This server requires an API key. Enter it above.");
  const answer = await response.json();
  if (!response.ok) return notice(answer.error.message);
  whole = answer;
  find("version").textContent = whole.info.version;
  const drawn = Object.entries(whole.paths).flatMap(([path, item]) =>
    METHODS.filter((method) => item[method]).map((method) => operation(path, method, item[method])),
  );
  find("contents").replaceChildren(make("ul", {}, ...drawn.map(({ entry }) => entry)));
  find("operations").replaceChildren(...drawn.map(({ section }) => section));
  if (location.hash) find(location.hash.slice(1))?.scrollIntoView();
}

function notice(text) {
  whole = undefined;
  find("contents").replaceChildren();
  find("operations").replaceChildren(make("p", { id: "notice", role: "status" }, text));
}

const THEMES = ["auto", "light", "dark"];

function theme(name) {
  document.documentElement.dataset.theme = name;
  find("theme").title = `Theme: ${name}`;
  preferences.set("theme", name);
}

theme(preferences.get("theme", "auto"));
find("theme").addEventListener("click", () => {
  theme(THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length]);
});
find("key").value = key.get();
find("key").addEventListener("input", () => key.set(find("key").value, key.kept));
find("key").addEventListener("change", () => whole || load());
load();
