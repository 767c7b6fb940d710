// Builds request bodies from settings and texts, and shows a request as curl and as Python. Pure functions.

const CLIENT = new Set(
  `model prompt best_of echo frequency_penalty logit_bias logprobs max_tokens n presence_penalty seed stop stream
   stream_options suffix temperature top_p user`.split(/\s+/),
);

/** The body contains only values that differ from the API's defaults. */
export function bodyOf(fields, settings, { model, prompt, suffix = "" }) {
  const body = { model, prompt, ...(suffix && { suffix }) };
  const options = { include_usage: true };
  for (const { name, kind, standard, inside } of fields) {
    const value = valueOf(kind, settings[name]);
    if (value === null || value === standard) continue;
    if (inside) options[name] = value;
    else body[name] = value;
  }
  const together = body.best_of > (body.n ?? 1) || body.prompt_logprobs !== undefined;
  if (together) delete body.stream;
  if (body.stream) body.stream_options = options;
  return body;
}

function valueOf(kind, value) {
  if (value === undefined || value === null || value === "") return null;
  if (kind === "bias") {
    const entries = value.flatMap(({ ids, bias }) => ids.map((id) => [id, bias]));
    return entries.length ? Object.fromEntries(entries) : null;
  }
  return Array.isArray(value) && !value.length ? null : value;
}

/** The body that scores a text without generating any. */
export function scoringOf(fields, settings, { model, prompt }, alternatives) {
  const known = new Set(fields.map(({ name }) => name));
  const body = { model, prompt, max_tokens: 0, echo: true, logprobs: alternatives };
  if (known.has("prompt_logprobs")) body.prompt_logprobs = 0; // for ranks and token ids
  if (settings.add_special_tokens === false) body.add_special_tokens = false;
  for (const name of ["cache_salt", "user"]) if (known.has(name) && settings[name]) body[name] = settings[name];
  return body;
}

export function asCurl(url, body, hasKey) {
  const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;
  const key = hasKey ? ` \\\n  -H "Authorization: Bearer $AFTERWORD_API_KEY"` : "";
  const data = quoted(JSON.stringify(body, null, 2));
  const json = "-H 'Content-Type: application/json'";
  return `curl ${body.stream ? "-N " : ""}${url}v1/completions \\\n  ${json}${key} \\\n  -d ${data}`;
}

export function asPython(url, body, hasKey) {
  const extra = Object.entries(body).filter(([name]) => !CLIENT.has(name));
  const lines = Object.entries(body)
    .filter(([name]) => CLIENT.has(name))
    .map(([name, value]) => `    ${name}=${python(value)},`);
  if (extra.length) lines.push(`    extra_body=${python(Object.fromEntries(extra))},`);
  const end = body.stream
    ? ["for chunk in answer:", "    for choice in chunk.choices:", '        print(choice.text, end="")']
    : ["for choice in answer.choices:", "    print(choice.text)"];
  return [
    ...(hasKey ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url="${url}v1", api_key=${hasKey ? 'os.environ["AFTERWORD_API_KEY"]' : '"none"'})`,
    "answer = client.completions.create(",
    ...lines,
    ")",
    ...end,
    "",
  ].join("\n");
}

function python(value) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) return `[${value.map(python).join(", ")}]`;
  if (typeof value === "object") {
    return `{${Object.entries(value).map(([name, item]) => `${JSON.stringify(name)}: ${python(item)}`).join(", ")}}`;
  }
  return JSON.stringify(value);
}
