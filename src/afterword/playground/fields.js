// The request fields that the user can set: label, kind of control, and the API's default.
// openapi.json says which of them the server accepts, and their ranges.

const field = (name, kind, standard, help, more = {}) => ({ name, kind, standard, help, ...more });

export const FIELDS = [
  field("max_tokens", "integer", 16, "The most tokens to write.", { initial: 100 }),
  field("temperature", "slider", 1, "0 takes the likeliest token, higher draws more freely.", { low: 0, high: 2 }),
  field("top_p", "slider", 1, "Draw from the smallest set of tokens with this much probability.", { low: 0, high: 1 }),
  field("n", "integer", 1, "How many answers, side by side."),
  field("stop", "texts", null, "The answer ends before the first of these. \\n is a line end."),
  field("seed", "integer", null, "The same seed, the same answer."),
  field("logprobs", "integer", null, "How many alternatives to show for each token.", { initial: 5 }),

  field("best_of", "integer", null, "Write so many, give the n likeliest. Not streamed.", { group: "More" }),
  field("presence_penalty", "slider", 0, "Against tokens written already.", { group: "More", low: -2, high: 2 }),
  field("frequency_penalty", "slider", 0, "The same, for each time.", { group: "More", low: -2, high: 2 }),
  field("logit_bias", "bias", null, "Make the tokens of a text likelier, or −100 to forbid them.", { group: "More" }),
  field("echo", "boolean", false, "Give the probabilities of the text before, too.", { group: "More" }),
  field("stream", "boolean", false, "Show tokens as they come.", { group: "More", initial: true }),
  field("user", "text", null, "Whom to count this for.", { group: "More" }),

  field("top_k", "integer", 0, "Draw from so many of the likeliest tokens; 0: from all.", { group: "Beyond the API" }),
  field("min_p", "slider", 0, "Draw from tokens with at least this share of the likeliest one's probability.", {
    group: "Beyond the API",
    low: 0,
    high: 1,
  }),
  field("repetition_penalty", "slider", 1, "Above 1: against tokens of the text or the answer.", {
    group: "Beyond the API",
    low: 0.01,
    high: 2,
  }),
  field("min_tokens", "integer", 0, "Do not end before so many tokens.", { group: "Beyond the API" }),
  field("ignore_eos", "boolean", false, "Go on where the model would end.", { group: "Beyond the API" }),
  field("stop_token_ids", "ids", null, "Token ids that end the answer.", { group: "Beyond the API" }),
  field("add_special_tokens", "boolean", true, "Begin as the model was taught to.", { group: "Beyond the API" }),
  field("cache_salt", "text", null, "Share computed beginnings only with the same salt.", { group: "Beyond the API" }),
  field("return_token_ids", "boolean", false, "Give token ids.", { group: "Beyond the API" }),
  field("prompt_logprobs", "integer", null, "Alternatives for the prompt's tokens, in the raw answer. Not streamed.", {
    group: "Beyond the API",
  }),
  field("continuous_usage_stats", "boolean", false, "Usage in every event.", {
    group: "Beyond the API",
    inside: "stream_options",
  }),
];

/** Fields that the document, the model selection or the page sets. */
const ELSEWHERE = new Set(["model", "prompt", "suffix", "stream_options"]);

/** The fields that the server accepts, with its ranges. A field that is not listed here gets a control for its type. */
export function fieldsOf(taken) {
  const known = FIELDS.filter(({ name, inside }) => (inside ? taken[inside]?.members.includes(name) : name in taken));
  const named = new Set(known.map(({ name }) => name));
  const others = Object.keys(taken).filter((name) => !named.has(name) && !ELSEWHERE.has(name));
  const generic = others.flatMap((name) => {
    const kind = { integer: "integer", number: "number", boolean: "boolean", string: "text" }[taken[name].type];
    return kind ? [field(name, kind, null, "", { group: "Beyond the API" })] : [];
  });
  return [...known, ...generic].map((one) => ({ ...one, ...taken[one.name] }));
}

/** The page's initial values. */
export const initial = (fields) => Object.fromEntries(fields.map((f) => [f.name, f.initial ?? f.standard]));
