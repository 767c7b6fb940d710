// Asks with OpenAI's library for Node what the request on standard input says, and prints what the library made of it.
const { OpenAI } = require("openai");

async function main() {
  const { baseURL, apiKey, fields, leave } = JSON.parse(require("fs").readFileSync(0, "utf8"));
  const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
  try {
    const answer = await client.completions.create(fields);
    if (!fields.stream) return answer;
    const chunks = [];
    for await (const chunk of answer) {
      chunks.push(chunk);
      if (chunks.length === leave) break; // closes the connection
    }
    return { chunks };
  } catch (error) {
    const { status, code, param, type, requestID } = error;
    return { name: error.constructor.name, status, code, param, type, requestID };
  }
}

main().then((found) => console.log(JSON.stringify(found)));
