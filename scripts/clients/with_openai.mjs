// openai's client for npm.
import * as trial from "./scenarios.mjs";

const { default: OpenAI } = await trial.load("openai");
const { FEW, FUNCTION, MANY, MESSAGES, NO_KEY, NO_MODEL, QUESTION, SCHEMA, TEXT, THINKING, TOOL } = trial;

const client = (at) => new OpenAI({ baseURL: at.url, apiKey: at.key, maxRetries: 0 });
const fields = (at, options) => ({ model: at.model, messages: MESSAGES, max_tokens: MANY, temperature: 0, ...options });
const ask = (at, options) => client(at).chat.completions.create(fields(at, options));
const text = async (at, options) => (await ask(at, options)).choices[0].message.content;
const named = { type: "function", function: { name: FUNCTION.name } };
const format = { name: "answer", schema: SCHEMA, strict: true };

async function list(stream) {
  const found = [];
  for await (const item of await stream) found.push(item);
  return found;
}

await trial.play({
  async chat(at) {
    const answer = await ask(at);
    trial.said(answer.choices[0].message.content);
    trial.expect(answer.usage.completion_tokens > 0, "usage");
  },
  async stream(at) {
    const chunks = await list(ask(at, { stream: true, stream_options: { include_usage: true } }));
    trial.streamed(chunks.map((chunk) => chunk.choices[0]?.delta.content), await text(at));
    trial.expect(chunks.at(-1).usage.completion_tokens > 0, "usage in the last chunk");
  },
  async completions(at) {
    const answer = await client(at).completions.create({ model: at.model, prompt: TEXT, max_tokens: FEW });
    trial.said(answer.choices[0].text);
  },
  async seed(at) {
    await trial.repeats((seed) => text(at, { seed, temperature: 1, max_tokens: FEW }));
  },
  async json_schema(at) {
    trial.fits(await text(at, { response_format: { type: "json_schema", json_schema: format } }));
  },
  async tools(at) {
    for (const tool_choice of ["required", named]) {
      const call = (await ask(at, { tools: [TOOL], tool_choice })).choices[0].message.tool_calls[0].function;
      trial.called(call.name, call.arguments);
    }
  },
  async tools_stream(at) {
    const stream = client(at).chat.completions.stream(fields(at, { tools: [TOOL], tool_choice: named }));
    const call = (await stream.finalChatCompletion()).choices[0].message.tool_calls[0].function;
    trial.called(call.name, call.arguments);
  },
  async reasoning(at) {
    const options = { max_tokens: FEW, ...THINKING };
    const whole = trial.said((await ask(at, options)).choices[0].message.reasoning_content);
    const chunks = await list(ask(at, { ...options, stream: true }));
    trial.streamed(chunks.map((chunk) => chunk.choices[0].delta.reasoning_content), whole);
  },
  async logprobs(at) {
    const answer = await ask(at, { logprobs: true, top_logprobs: 2, max_tokens: FEW });
    const entries = answer.choices[0].logprobs.content;
    trial.likely(entries.map((entry) => entry.logprob), answer.usage.completion_tokens);
  },
  async embeddings(at) {
    // The client asks for base64, and decodes it.
    const answer = await client(at).embeddings.create({ model: at.model, input: [QUESTION, TEXT] });
    trial.embedded(answer.data.map((entry) => entry.embedding));
  },
  async responses(at) {
    const request = { model: at.model, input: QUESTION, max_output_tokens: MANY, temperature: 0 };
    const answer = await client(at).responses.create(request);
    trial.said(answer.output_text);
    const events = await list(client(at).responses.create({ ...request, stream: true }));
    const deltas = events.filter((event) => event.type === "response.output_text.delta");
    trial.streamed(deltas.map((event) => event.delta), answer.output_text);
    const tools = [{ type: "function", ...FUNCTION, strict: true }];
    const [call] = (await client(at).responses.create({ ...request, tools, tool_choice: "required" })).output;
    trial.called(call.name, call.arguments);
    const asked = { ...request, text: { format: { type: "json_schema", ...format } } };
    trial.fits((await client(at).responses.create(asked)).output_text);
  },
  async bad_model(at) {
    await trial.refused(() => ask({ ...at, model: NO_MODEL }), "NotFoundError", NO_MODEL);
  },
  async wrong_key(at) {
    await trial.refused(() => ask({ ...at, key: NO_KEY }), "AuthenticationError", "key");
  },
});
