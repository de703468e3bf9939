// What a conversation asks for beside its messages: the pane, and the request that it makes.

import { h, labelled } from './dom.js';

// name, label, type of number, step, least, most
const NUMBERS = [
  ['temperature', 'Temperature', 0.1, 0, 2],
  ['top_p', 'Top p', 0.05, 0, 1],
  ['top_k', 'Top k', 1, 0],
  ['min_p', 'Min p', 0.01, 0, 1],
  ['max_tokens', 'Max tokens', 1, 1],
  ['repetition_penalty', 'Repetition penalty', 0.05, 0, 2],
  ['presence_penalty', 'Presence penalty', 0.1, -2, 2],
  ['frequency_penalty', 'Frequency penalty', 0.1, -2, 2],
  ['seed', 'Seed', 1],
];
const TOP_LOGPROBS = 5;
const TOOLS_EXAMPLE = `[
  {
    "type": "function",
    "function": {
      "name": "get_weather",
      "description": "Weather of a city.",
      "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"]
      }
    }
  }
]`;
const SCHEMA_EXAMPLE = `{
  "type": "object",
  "properties": {"answer": {"type": "string"}},
  "required": ["answer"]
}`;

/** What is wrong with the settings: the name of the pane's field, in the message. */
export class SettingError extends Error {}

function given(settings, name, label) {
  const text = settings[name]?.trim();
  if (!text) return undefined;
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new SettingError(`${label} is not JSON: ${error.message}`);
  }
}

/** The body of a chat (or of a completion of the texts, where the model has no chat template), and its path. */
export function requestOf(conversation, model, chat) {
  const { settings } = conversation;
  const body = { model, stream: true, stream_options: { include_usage: true, continuous_usage_stats: true } };
  for (const [name] of NUMBERS) {
    const value = settings[name];
    if (value !== undefined && value !== '') body[name] = Number(value);
  }
  const stop = (settings.stop ?? '').split('\n').filter(Boolean);
  if (stop.length) body.stop = stop;
  if (settings.use_schema) {
    const schema = given(settings, 'schema', 'The JSON schema');
    if (schema !== undefined) body.response_format = { type: 'json_schema', json_schema: { name: 'answer', schema } };
  }
  if (!chat) {
    body.prompt = conversation.messages.map((message) => message.content).join('');
    if (settings.logprobs) body.logprobs = TOP_LOGPROBS;
    body.max_tokens ??= 256; // a completion's default is 16
    return { path: 'v1/completions', body };
  }
  if (settings.logprobs) Object.assign(body, { logprobs: true, top_logprobs: TOP_LOGPROBS });
  Object.assign(body, chatOf(conversation));
  if (body.tools && settings.tool_choice && settings.tool_choice !== 'auto') body.tool_choice = settings.tool_choice;
  return { path: 'v1/chat/completions', body };
}

/** What renders to a prompt: messages, tools, the template's variables. */
export function chatOf({ messages, settings }) {
  const system = settings.system?.trim() ? [{ role: 'system', content: settings.system }] : [];
  const body = { messages: [...system, ...messages.filter(said).map(sent)] };
  if (settings.use_tools) {
    const tools = given(settings, 'tools', 'The list of tools');
    if (tools !== undefined && !Array.isArray(tools)) throw new SettingError('The tools are not a list.');
    if (tools?.length) body.tools = tools;
  }
  const variables = given(settings, 'template_variables', 'The template’s variables');
  if (variables) body.chat_template_kwargs = variables;
  return body;
}

// An answer that failed before it began is no part of the conversation.
const said = ({ role, content, tool_calls: calls }) => role !== 'assistant' || content || calls?.length;

function sent({ role, content, tool_calls: calls, tool_call_id: of }) {
  const message = { role, content };
  if (calls?.length) message.tool_calls = calls;
  if (of) message.tool_call_id = of;
  return message;
}

/** The pane. `changed` is called when something was typed. */
export function pane(conversation, { defaults, chat, changed }) {
  const { settings } = conversation;
  const bind = (name, control, event = 'input') => {
    if (control.type === 'checkbox') control.checked = Boolean(settings[name]);
    else control.value = settings[name] ?? '';
    control.dataset.setting = name;
    control.addEventListener(event, () => {
      settings[name] = control.type === 'checkbox' ? control.checked : control.value;
      if (settings[name] === '' || settings[name] === false) delete settings[name];
      changed();
    });
    return control;
  };
  const area = (name, rows, placeholder, code = true) => bind(name, h('textarea', { rows, placeholder, class: code ? 'code' : '', spellcheck: code ? 'false' : undefined }));
  const check = (name, text) => h('label', { class: 'check' }, bind(name, h('input', { type: 'checkbox' }), 'change'), text);
  const numbers = NUMBERS.map(([name, label, step, min, max]) => labelled(label,
    bind(name, h('input', { type: 'number', step, min, max, inputmode: 'decimal', placeholder: defaults[name] ?? 'default' }))));
  const choice = bind('tool_choice', h('select', null, ['auto', 'none', 'required'].map((value) => h('option', { value }, value))), 'change');
  if (!settings.tool_choice) choice.value = 'auto';
  return [
    chat && labelled('System prompt', area('system', 3, 'none', false)),
    h('fieldset', { class: 'numbers' }, h('legend', null, 'Sampling'), numbers),
    labelled('Stop strings', area('stop', 2, 'one a line')),
    check('logprobs', 'Shade tokens by probability'),
    h('details', { open: Boolean(settings.use_schema) }, h('summary', null, 'JSON schema'),
      check('use_schema', 'Answers must match it'), labelled('Schema', area('schema', 8, SCHEMA_EXAMPLE))),
    chat && h('details', { open: Boolean(settings.use_tools) }, h('summary', null, 'Tools'),
      check('use_tools', 'Offer these'), labelled('Tools', area('tools', 10, TOOLS_EXAMPLE)), labelled('Tool choice', choice)),
    chat && h('details', null, h('summary', null, 'Chat template'),
      labelled('Variables, JSON', area('template_variables', 2, '{"enable_thinking": false}'))),
  ];
}
