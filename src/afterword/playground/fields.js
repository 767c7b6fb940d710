// The request fields that the user can set: label, kind of control, and the API's default.
// openapi.json says which of them the server accepts, and their ranges.

const field = (name, kind, standard, help, more = {}) => ({ name, kind, standard, help, ...more });

export const FIELDS = [
  field("max_tokens", "integer", 16, "The largest number of tokens to generate.", { initial: 100 }),
  field("temperature", "slider", 1, "0 takes the most likely token; higher values vary more.", {
    low: 0, high: 2, initial: 0.7, // small models, such as the built-in one, write poor texts at the API's default
  }),
  field("top_p", "slider", 1, "Sample from the smallest set of tokens with this total probability.", {
    low: 0, high: 1,
  }),
  field("n", "integer", 1, "Number of choices, shown side by side."),
  field("stop", "texts", null, "Generation ends before the first of these texts. \\n is a line end."),
  field("seed", "integer", null, "The same seed gives the same text."),
  field("logprobs", "integer", null, "Number of alternatives to show for each token.", { initial: 5 }),

  field("best_of", "integer", null, "Generate this many candidates, return the n most likely. Not streamed.", {
    group: "More",
  }),
  field("presence_penalty", "slider", 0, "Above 0: makes tokens that were already generated less likely.", {
    group: "More", low: -2, high: 2,
  }),
  field("frequency_penalty", "slider", 0, "The same, once for each occurrence.", { group: "More", low: -2, high: 2 }),
  field("logit_bias", "bias", null, "Makes the tokens of a text more likely; −100 forbids them.", {
    group: "More",
  }),
  field("echo", "boolean", false, "Also return the probabilities of the prompt's tokens.", { group: "More" }),
  field("stream", "boolean", false, "Show tokens as they are generated.", { group: "More", initial: true }),
  field("user", "text", null, "An identifier of the end user.", { group: "More" }),

  field("top_k", "integer", 0, "Sample from this many of the most likely tokens; 0: from all.", {
    group: "Extensions",
  }),
  field("min_p", "slider", 0, "Sample from tokens with at least this fraction of the highest probability.", {
    group: "Extensions",
    low: 0,
    high: 1,
  }),
  field("repetition_penalty", "slider", 1, "Above 1: makes tokens of the prompt or the generated text less likely.", {
    group: "Extensions",
    low: 0.01,
    high: 2,
  }),
  field("min_tokens", "integer", 0, "Generate at least this many tokens.", { group: "Extensions" }),
  field("ignore_eos", "boolean", false, "Continue after the model's end token.", { group: "Extensions" }),
  field("stop_token_ids", "ids", null, "Token ids that end generation.", { group: "Extensions" }),
  field("add_special_tokens", "boolean", true, "Begin the prompt with BOS if the model expects it.", {
    group: "Extensions",
  }),
  field("cache_salt", "text", null, "Share cached prefixes only with requests of the same salt.", {
    group: "Extensions",
  }),
  field("grammar", "text", null, "A grammar that the text must match, in llama.cpp's or Lark's notation.", {
    group: "Extensions",
  }),
  field("return_token_ids", "boolean", false, "Return token ids.", { group: "Extensions" }),
  field("prompt_logprobs", "integer", null, "Alternatives for each prompt token, in the raw response. Not streamed.", {
    group: "Extensions",
  }),
  field("continuous_usage_stats", "boolean", false, "Report usage in every event.", {
    group: "Extensions",
    inside: "stream_options",
  }),

  field("allowed_token_ids", "ids", null, "Generate only these token ids.", { group: "Extensions" }),
  field("banned_strings", "texts", null, "Texts that the choice does not contain, in any case.", { group: "Extensions" }),
  field("bad_words", "texts", null, "Texts that the choice does not contain, in this case only.", { group: "Extensions" }),
  field("banned_tokens", "ids", null, "Never generate these token ids.", { group: "Extensions" }),
  field("priority", "integer", 0, "Of your waiting requests, the lowest number is first.", { group: "Extensions" }),
  field("token_healing", "boolean", false, "Let the first token complete the last token of the text.", {
    group: "Extensions",
  }),
  field("logprob_token_ids", "ids", null, "Token ids to report instead of the most likely ones.", { group: "Extensions" }),
  field("logprobs_mode", "text", "raw_logprobs", "processed_logprobs: after bias, penalties and filters.", {
    group: "Extensions",
  }),
  field("return_tokens_as_token_ids", "boolean", false, "Name tokens by their ids, in the raw response.", {
    group: "Extensions",
  }),
  field("truncate_prompt_tokens", "integer", null, "Read only this many tokens of the text; −1: as many as fit.", {
    group: "Extensions",
  }),
  field("truncation_side", "text", "left", "Which tokens are then left out: left or right.", { group: "Extensions" }),
  field("include_stop_str_in_output", "boolean", false, "Keep the stop text that ends generation.", {
    group: "Extensions",
  }),
  field("skip_special_tokens", "boolean", false, "Leave the names of control tokens out of the text.", {
    group: "Extensions",
  }),
  field("spaces_between_special_tokens", "boolean", true, "No effect; for clients of vLLM.", { group: "Extensions" }),

  field("dry_multiplier", "number", 0, "Penalty of a token that continues a repetition; 0: off.", { group: "Samplers" }),
  field("dry_base", "number", 1.75, "Factor of the penalty for each further repeated token.", { group: "Samplers" }),
  field("dry_allowed_length", "integer", 2, "Repetitions of this many tokens may be continued.", { group: "Samplers" }),
  field("dry_penalty_last_n", "integer", 64, "Tokens that are searched for repetitions; −1: all.", { group: "Samplers" }),
  field("dry_sequence_breakers", "texts", null, "Texts over which no repetition extends.", { group: "Samplers" }),
  field("xtc_probability", "slider", 0, "How often the most likely tokens are removed.", {
    group: "Samplers", low: 0, high: 1,
  }),
  field("xtc_threshold", "slider", 0.1, "Tokens with at least this probability are removed, but for one.", {
    group: "Samplers", low: 0, high: 1,
  }),
  field("top_n_sigma", "number", -1, "Sample from logits within this many standard deviations; below 0: off.", {
    group: "Samplers",
  }),
  field("typical_p", "slider", 1, "Sample from the tokens nearest to the entropy.", { group: "Samplers", low: 0, high: 1 }),
  field("dynatemp_range", "number", 0, "The temperature varies by this with the entropy.", { group: "Samplers" }),
  field("dynatemp_exponent", "number", 1, "How it follows the entropy.", { group: "Samplers" }),
  field("mirostat", "integer", 0, "Mirostat 1 or 2 draws the tokens; 0: off.", { group: "Samplers" }),
  field("mirostat_tau", "number", 5, "The mean surprise in bits that Mirostat aims at.", { group: "Samplers" }),
  field("mirostat_eta", "number", 0.1, "How fast Mirostat adapts.", { group: "Samplers" }),
  field("adaptive_target", "number", -1, "The mean probability of drawn tokens; below 0: off.", { group: "Samplers" }),
  field("adaptive_decay", "slider", 0.9, "How long adaptive_target remembers probabilities.", {
    group: "Samplers", low: 0, high: 0.99,
  }),
  field("min_keep", "integer", 0, "The fewest tokens that top_p, min_p, typical_p and XTC leave.", { group: "Samplers" }),
  field("repeat_last_n", "integer", null, "The last tokens that penalties count; −1: all.", { group: "Samplers" }),
  field("samplers", "texts", null, "The samplers that apply, in this order.", { group: "Samplers" }),
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
    return kind ? [field(name, kind, null, "", { group: "Extensions" })] : [];
  });
  return [...known, ...generic].map((one) => ({ ...one, ...taken[one.name] }));
}

/** The values that differ from the API's defaults. */
export const changedOf = (fields, values) => Object.fromEntries(
  fields.map(({ name, standard }) => [name, values[name] ?? null, standard]).filter(([, value, standard]) => value !== standard),
);

/** The page's initial values. */
export const initial = (fields) => Object.fromEntries(fields.map((f) => [f.name, f.initial ?? f.standard]));
