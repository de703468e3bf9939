// AI SDK, with its provider for OpenAI-compatible servers.
import * as trial from "./scenarios.mjs";

const { embedMany, generateText, jsonSchema, Output, streamText, tool } = await trial.load("ai");
const { createOpenAICompatible } = await trial.load("@ai-sdk/openai-compatible");
const { FEW, FUNCTION, MANY, NO_KEY, NO_MODEL, QUESTION, SCHEMA, TEXT, THINKING } = trial;

const provider = (at) =>
  createOpenAICompatible({
    name: "trial",
    baseURL: at.url,
    apiKey: at.key,
    includeUsage: true,
    supportsStructuredOutputs: true,
  });
const fields = (at, options) => ({
  model: provider(at)(at.model),
  prompt: QUESTION,
  maxOutputTokens: MANY,
  temperature: 0,
  maxRetries: 0,
  ...options,
});
const ask = (at, options) => generateText(fields(at, options));
const tools = {
  [FUNCTION.name]: tool({ description: FUNCTION.description, inputSchema: jsonSchema(FUNCTION.parameters) }),
};
const thinking = { maxOutputTokens: FEW, providerOptions: { trial: THINKING } };

async function list(stream) {
  const found = [];
  for await (const item of stream) found.push(item);
  return found;
}

await trial.play({
  async chat(at) {
    const answer = await ask(at);
    trial.said(answer.text);
    trial.expect(answer.usage.outputTokens > 0, "usage");
  },
  async stream(at) {
    const result = streamText(fields(at));
    trial.streamed(await list(result.textStream), (await ask(at)).text);
    trial.expect((await result.usage).outputTokens > 0, "usage");
  },
  async completions(at) {
    const model = provider(at).completionModel(at.model);
    trial.said((await ask(at, { model, prompt: TEXT, maxOutputTokens: FEW })).text);
  },
  async seed(at) {
    await trial.repeats(async (seed) => (await ask(at, { seed, temperature: 1, maxOutputTokens: FEW })).text);
  },
  async json_schema(at) {
    const answer = await ask(at, { output: Output.object({ schema: jsonSchema(SCHEMA) }) });
    trial.fits(answer.output);
  },
  async tools(at) {
    for (const toolChoice of ["required", { type: "tool", toolName: FUNCTION.name }]) {
      const [call] = (await ask(at, { tools, toolChoice })).toolCalls;
      trial.called(call.toolName, call.input);
    }
  },
  async tools_stream(at) {
    const [call] = await streamText(fields(at, { tools, toolChoice: "required" })).toolCalls;
    trial.called(call.toolName, call.input);
  },
  async reasoning(at) {
    const whole = trial.said((await ask(at, thinking)).reasoningText);
    const parts = await list(streamText(fields(at, thinking)).fullStream);
    trial.streamed(parts.filter((part) => part.type === "reasoning-delta").map((part) => part.text), whole);
  },
  async embeddings(at) {
    const model = provider(at).textEmbeddingModel(at.model);
    trial.embedded((await embedMany({ model, values: [QUESTION, TEXT], maxRetries: 0 })).embeddings);
  },
  async bad_model(at) {
    await trial.refused(() => ask({ ...at, model: NO_MODEL }), NO_MODEL);
  },
  async wrong_key(at) {
    await trial.refused(() => ask({ ...at, key: NO_KEY }), "key");
  },
});
