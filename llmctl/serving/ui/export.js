// A request as a command of curl, and as Python with OpenAI's library. No key is in either: it comes from a variable.

import { address } from './server.js';

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** A command that sends a request. */
export function curl(path, method, body) {
  const lines = [`curl ${body?.stream ? '-N ' : ''}${quoted(address(path))}`];
  if (method !== 'get' && body === undefined) lines.push(`-X ${method.toUpperCase()}`);
  if (body !== undefined) lines.push("-H 'Content-Type: application/json'");
  lines.push('-H "Authorization: Bearer $LLMCTL_API_KEY"');
  if (body !== undefined) lines.push(`-d ${quoted(JSON.stringify(body, null, 2))}`);
  return lines.join(' \\\n  ');
}

/** JSON data as a Python literal. */
export function literal(value, indent = '') {
  const deeper = `${indent}    `;
  if (value === null || value === undefined) return 'None';
  if (value === true) return 'True';
  if (value === false) return 'False';
  if (typeof value === 'number') return String(value);
  if (typeof value === 'string') return JSON.stringify(value); // its escapes are Python's, too
  const list = Array.isArray(value);
  const items = list ? value.map((item) => literal(item, deeper))
    : Object.entries(value).map(([name, item]) => `${JSON.stringify(name)}: ${literal(item, deeper)}`);
  const [open, close] = list ? '[]' : '{}';
  return items.length ? `${open}\n${items.map((item) => `${deeper}${item},\n`).join('')}${indent}${close}` : open + close;
}

// What OpenAI's library has parameters for; the rest of a body goes through extra_body.
const BOTH = [
  'model', 'stream', 'stream_options', 'max_tokens', 'temperature', 'top_p', 'presence_penalty', 'frequency_penalty',
  'seed', 'stop', 'logprobs',
];
const PARAMETERS = {
  'chat.completions': new Set([...BOTH, 'messages', 'response_format', 'tools', 'tool_choice', 'top_logprobs']),
  completions: new Set([...BOTH, 'prompt']),
};

/** A Python program that sends a chat or a completion and prints the answer as it comes. */
export function python(path, body) {
  const method = path.endsWith('chat/completions') ? 'chat.completions' : 'completions';
  const known = PARAMETERS[method];
  const own = Object.entries(body).filter(([name]) => known.has(name));
  const extra = Object.fromEntries(Object.entries(body).filter(([name]) => !known.has(name)));
  const lines = own.map(([name, value]) => `    ${name}=${literal(value, '    ')},\n`);
  if (Object.keys(extra).length) lines.push(`    extra_body=${literal(extra, '    ')},\n`);
  const piece = method === 'completions' ? 'choice.text' : 'choice.delta.content';
  return `import os

from openai import OpenAI

client = OpenAI(base_url=${JSON.stringify(address('v1'))}, api_key=os.environ.get("LLMCTL_API_KEY", "none"))
stream = client.${method}.create(
${lines.join('')})
for chunk in stream:
    for choice in chunk.choices:
        print(${piece} or "", end="", flush=True)
print()
`;
}
