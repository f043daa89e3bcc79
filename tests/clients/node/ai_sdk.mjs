// Vercel's AI SDK: `node ai_sdk.mjs SCENARIO URL PROVIDER` does one ordinary thing and prints as JSON what came of it.
// PROVIDER is compatible, which is for servers like ours, or openai with its base URL changed.
import { createOpenAI } from '@ai-sdk/openai';
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { generateObject, generateText, jsonSchema, Output, stepCountIs, streamObject, streamText, tool } from 'ai';
import { z } from 'zod';

const [scenario, baseURL, providerName] = process.argv.slice(2);
const compatible = { name: 'polylora', baseURL, includeUsage: true, supportsStructuredOutputs: true };
const provider =
  providerName === 'openai' ? createOpenAI({ baseURL, apiKey: 'none' }) : createOpenAICompatible(compatible);
const chat = (model) => (provider.chatModel ?? provider.chat)(model);
const completion = (model) => (provider.completionModel ?? provider.completion)(model);
const City = z.object({ name: z.string(), population: z.number() });
const hi = { model: chat('lora0'), prompt: 'hi', maxRetries: 0 };
const collect = async (parts) => {
  const all = [];
  for await (const part of parts) all.push(part);
  return all;
};

const cities = () => {
  const called = [];
  const execute = async (city) => { called.push(city); return 'big'; };
  return { called, tools: { City: tool({ description: 'Of a city.', inputSchema: City, execute }) } };
};

const scenarios = {
  async text() {
    const { text, usage, finishReason } = await generateText({ ...hi, maxOutputTokens: 9, temperature: 0 });
    return { text, tokens: usage.outputTokens, finishReason };
  },

  async stream() {
    const result = streamText({ ...hi, maxOutputTokens: 20, onError: ({ error }) => { throw error; } });
    const text = (await collect(result.textStream)).join('');
    return { text, tokens: (await result.usage).outputTokens, finishReason: await result.finishReason };
  },

  async completion() {
    const model = completion('lora0');
    const { text } = await generateText({ ...hi, model, maxOutputTokens: 5 });
    const result = streamText({ ...hi, model, maxOutputTokens: 5 });
    return { text, streamed: (await collect(result.textStream)).join('') };
  },

  async object() {
    const { object } = await generateObject({ ...hi, schema: City });
    const partial = streamObject({ ...hi, schema: City });
    const pieces = await collect(partial.partialObjectStream);
    const { output } = await generateText({ ...hi, output: Output.object({ schema: jsonSchema(z.toJSONSchema(City)) }) });
    return { object, streamed: await partial.object, pieces: pieces.length, output };
  },

  async tools() {
    const { called, tools } = cities();
    const { text, steps } = await generateText({ ...hi, tools, stopWhen: stepCountIs(3) });
    return { text, called, steps: steps.length };
  },

  async streamed_tools() {
    const { called, tools } = cities();
    const result = streamText({ ...hi, tools, toolChoice: 'required', stopWhen: stepCountIs(2) });
    const types = (await collect(result.fullStream)).map((part) => part.type);
    return { text: await result.text, called, deltas: types.filter((type) => type === 'tool-input-delta').length };
  },

  async errors() {
    const error = await generateText({ ...hi, model: chat('nope') }).catch((error) => error);
    return { name: error.name, status: error.statusCode, retryable: error.isRetryable };
  },
};

console.log(JSON.stringify(await scenarios[scenario]()));
