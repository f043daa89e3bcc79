// openai for Node: `node openai.mjs SCENARIO URL` does one ordinary thing and prints as JSON what came of it.
import OpenAI from 'openai';
import { zodResponseFormat } from 'openai/helpers/zod';
import { z } from 'zod';

const [scenario, baseURL] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: 'none', maxRetries: 0 });
const City = z.object({ name: z.string(), population: z.number() });
const hi = { model: 'lora0', messages: [{ role: 'user', content: 'hi' }] };

const scenarios = {
  async models() {
    const ids = [];
    for await (const model of client.models.list()) ids.push(model.id);
    return { ids, id: (await client.models.retrieve('lora0')).id };
  },

  async chat() {
    const reply = await client.chat.completions.create({ ...hi, max_tokens: 9, seed: 3, n: 2 });
    return { texts: reply.choices.map((choice) => choice.message.content), usage: reply.usage };
  },

  async stream() {
    const stream = await client.chat.completions.create({
      ...hi, max_completion_tokens: 20, stream: true, stream_options: { include_usage: true },
    });
    let text = '';
    let usage = null;
    for await (const chunk of stream) {
      text += chunk.choices[0]?.delta.content ?? '';
      usage = chunk.usage ?? usage;
    }
    return { text, usage };
  },

  async leave() {
    const stream = await client.chat.completions.create({ ...hi, max_tokens: 3000, ignore_eos: true, stream: true });
    let chunks = 0;
    for await (const chunk of stream) {
      chunks += chunk.choices.length;
      if (chunks === 3) break; // closes the connection
    }
    return { chunks };
  },

  async completions() {
    const options = { model: 'lora0', prompt: ['a', 'b'], max_tokens: 5, echo: true, logprobs: 1 };
    const reply = await client.completions.create(options);
    let streamed = '';
    for await (const chunk of await client.completions.create({ ...options, prompt: 'a', stream: true }))
      streamed += chunk.choices[0].text;
    const { token_logprobs: logprobs } = reply.choices[0].logprobs;
    return { texts: reply.choices.map((choice) => choice.text), streamed, logprobs };
  },

  async parse() {
    const options = { ...hi, response_format: zodResponseFormat(City, 'City') };
    const reply = await client.chat.completions.parse(options);
    const streamed = await client.chat.completions.stream(options).finalChatCompletion();
    return { parsed: reply.choices[0].message.parsed, streamed: streamed.choices[0].message.parsed };
  },

  async tools() {
    const called = [];
    const tool = {
      type: 'function',
      function: {
        name: 'City',
        parameters: z.toJSONSchema(City),
        parse: (text) => City.parse(JSON.parse(text)),
        function: (city) => { called.push(city); return 'big'; },
      },
    };
    const runner = client.chat.completions.runTools({ ...hi, tools: [tool], stream: true });
    return { text: await runner.finalContent(), called, roles: runner.messages.map((message) => message.role) };
  },

  async errors() {
    const caught = [];
    const wrong = [{ ...hi, model: 'nope' }, { ...hi, temperature: 3, stream: true }];
    for (const body of wrong) {
      const error = await client.chat.completions.create(body).catch((error) => error);
      const { status, code, param, type } = error;
      caught.push({ class: error.constructor.name, status, code, param, type });
    }
    return caught;
  },
};

console.log(JSON.stringify(await scenarios[scenario]()));
