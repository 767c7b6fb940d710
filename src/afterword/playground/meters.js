// The figures below the text: context used, tokens per second, and statistics of a text's log probabilities.

import { find, make, number } from "./dom.js";
import { measure, piecesWithOffsets } from "./pieces.js";

const BARS = 120;

/** Tokens used, of the model's context. */
export function showContext(used, most) {
  const share = most ? Math.min(1, used / most) : 0;
  const bar = find("context");
  bar.setAttribute("aria-valuenow", used);
  bar.setAttribute("aria-valuemax", most || 1);
  bar.setAttribute("aria-valuetext", `${number(used)} of ${number(most)} tokens`);
  bar.classList.toggle("full", share > 0.9);
  bar.firstElementChild.style.width = `${share * 100}%`;
  find("context-text").textContent = most ? `${number(used)} / ${number(most)}` : "";
}

/** Time and rate of the last generation. */
export function showUsage({ rate, wait, usage }) {
  const read = usage && `${number(usage.prompt_tokens)} read`;
  const cached = usage?.prompt_tokens_details?.cached_tokens;
  const items = [
    ["rate", rate ? `${number(rate, rate < 10 ? 1 : 0)} tokens/s` : null],
    ["wait", wait ? `first after ${number(wait)} ms` : null],
    ["prompt-tokens", read && (cached ? `${read} (${number(cached)} cached)` : read)],
    ["completion-tokens", usage?.completion_tokens ? `${number(usage.completion_tokens)} written` : null],
  ];
  find("usage").replaceChildren(
    ...items.filter(([, text]) => text).map(([id, text]) => make("span", { id: `usage-${id}` }, text)),
  );
}

/** Totals over the text's tokens, or over the selected ones. */
export function showNumbers(pieces, seed, from, to) {
  const selected = to > from;
  const sum = selected ? measure(pieces, seed, from, to) : measure(pieces, seed);
  const strip = find("numbers");
  strip.hidden = sum.scored === 0;
  if (strip.hidden) return;
  const mean = sum.logprob / sum.scored;
  const items = [
    [selected ? "selected tokens" : "tokens", number(sum.tokens)],
    ["log probability", `${number(sum.logprob, 2)} nats`],
    ["mean", number(mean, 3)],
    ["perplexity", -mean < 14 ? number(Math.exp(-mean), 2) : "> 10⁶"],
    ["bits per byte", number(-sum.logprob / Math.LN2 / sum.bytes, 3)],
  ];
  find("sums").replaceChildren(
    ...items.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))),
  );
  const stale = `${number(sum.stale)} tokens have numbers of another text or model: score again.`;
  find("sums-note").textContent = sum.stale ? stale : sum.plain ? "Some of the text has no numbers." : "";
}

/** The surprisal along the text as bars, and the offset of each bar. */
export function showCourse(pieces) {
  const svg = find("course");
  const length = pieces.reduce((sum, p) => sum + p.text.length, 0);
  const bars = Array.from({ length: BARS }, () => ({ sum: 0, count: 0 }));
  for (const { piece, start } of piecesWithOffsets(pieces)) {
    if (!piece.token || piece.token.logprob === null) continue;
    const bar = bars[Math.min(BARS - 1, Math.floor((start / length) * BARS))];
    bar.sum -= piece.token.logprob;
    bar.count += piece.token.parts.length;
  }
  const path = bars.map(({ sum, count }, i) => {
    if (!count) return "";
    const height = Math.max(0.6, Math.min(20, (sum / count) * 2));
    return `M${i * 2 + 1} 20v${-height.toFixed(2)}`;
  });
  svg.firstElementChild.setAttribute("d", path.join(""));
}
