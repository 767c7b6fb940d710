// Fills a gap as Continue's "llamastack" provider does: the request comes on standard input, the pieces go to standard output.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

// Modules are not looked up in NODE_PATH, so the library is found by hand.
const find = createRequire(join(process.env.NODE_PATH, "here.js"));
const { constructLlmApi } = await import(pathToFileURL(find.resolve("@continuedev/openai-adapters")));

const { baseURL, apiKey, fields } = JSON.parse(readFileSync(0));
const api = constructLlmApi({ provider: "llamastack", apiBase: `${baseURL}/`, apiKey });
const pieces = [];
for await (const chunk of api.fimStream(fields, new AbortController().signal)) {
  pieces.push(chunk.choices[0]?.delta?.content ?? "");
}
console.log(JSON.stringify(pieces));
