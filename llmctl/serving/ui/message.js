// One message as it is shown: Markdown, reasoning apart, calls of tools, tokens shaded by their probability.

import { copier, h, refill } from './dom.js';
import { short } from './format.js';
import { markdown } from './markdown.js';

const NAMES = { user: 'You', assistant: 'Model', tool: 'Tool result', system: 'System' };
const RENDERED_CHARS = 40000; // a longer text is shown plain while it grows
const SHADES = [0.9, 0.6, 0.3, 0.1]; // least probability of each but the last

/** Takes in one event of a stream. `message` grows. */
export function grow(message, choice) {
  const delta = choice.delta ?? { content: choice.text };
  if (delta.content) message.content += delta.content;
  if (delta.reasoning_content) message.reasoning = (message.reasoning ?? '') + delta.reasoning_content;
  for (const call of delta.tool_calls ?? []) addCall(message, call);
  const tokens = tokensOf(choice.logprobs);
  if (tokens.length) message.tokens = [...(message.tokens ?? []), ...tokens];
}

function addCall(message, { index, id, function: made }) {
  message.tool_calls ??= [];
  message.tool_calls[index] ??= { id: '', type: 'function', function: { name: '', arguments: '' } };
  const call = message.tool_calls[index];
  if (id) call.id = id;
  call.function.name += made?.name ?? '';
  call.function.arguments += made?.arguments ?? '';
}

/** [{ text, logprob, top: [{ text, logprob }] }] of either API's log-probabilities. */
function tokensOf(logprobs) {
  if (!logprobs) return [];
  if (logprobs.content) {
    return logprobs.content.map((entry) => ({
      text: entry.token, logprob: entry.logprob, top: entry.top_logprobs.map((other) => ({ text: other.token, logprob: other.logprob })),
    }));
  }
  return (logprobs.tokens ?? []).map((text, i) => ({
    text,
    logprob: logprobs.token_logprobs[i],
    top: Object.entries(logprobs.top_logprobs?.[i] ?? {}).map(([other, logprob]) => ({ text: other, logprob })),
  }));
}

/** The element of a message; `draw` shows what it has become. `actions` are its buttons. */
export class MessageView {
  constructor(message, actions = [], growing = false) {
    this.message = message;
    this.body = h('div', { class: 'body' });
    this.footer = h('p', { class: 'stats' });
    this.element = h('article', { class: `message ${message.role}`, 'aria-label': NAMES[message.role] },
      h('header', null, h('span', { class: 'who' }, NAMES[message.role]),
        h('span', { class: 'actions' }, copier(() => message.content), actions)),
      this.body, this.footer);
    this.draw(growing);
  }

  draw(growing) {
    const { role, content, reasoning, tool_calls: calls, tokens, stats, error } = this.message;
    const kept = this.body.querySelector('details.reasoning');
    const shown = role !== 'assistant' ? h('div', { class: 'plain' }, content)
      : tokens?.length ? shaded(tokens)
        : growing && content.length > RENDERED_CHARS ? h('div', { class: 'plain' }, content)
          : h('div', { class: 'prose' }, markdown(content));
    refill(this.body,
      reasoning && h('details', { class: 'reasoning', open: kept ? kept.open : growing && !content }, h('summary', null, 'Reasoning'), h('div', { class: 'plain' }, reasoning)),
      content || !growing ? shown : !reasoning && h('p', { class: 'waiting' }, 'Waiting for the first token …'),
      (calls ?? []).map((call) => h('div', { class: 'call' }, h('span', null, 'calls ', h('code', null, call.function.name)), h('pre', { tabindex: 0 }, pretty(call.function.arguments)))),
      error && h('p', { class: 'error', role: 'alert' }, error));
    this.footer.textContent = stats ? said(stats) : '';
  }
}

function pretty(text) {
  try { return JSON.stringify(JSON.parse(text), null, 2); } catch { return text; }
}

function said({ tokens, prompt, seconds, first, reason }) {
  if (!first) return `ended before the first token: ${reason}`;
  const speed = tokens > 1 && seconds > first ? `${short((tokens - 1) / (seconds - first))} tok/s` : '';
  return [
    `${tokens} tokens`, speed, `first after ${(first * 1000).toFixed(0)} ms`, `prompt ${prompt} tokens`,
    reason && reason !== 'stop' ? `ended: ${reason}` : '',
  ].filter(Boolean).join(' · ');
}

const probability = (logprob) => (logprob === null ? '?' : `${(100 * Math.exp(logprob)).toFixed(1)} %`);

/** A token of which a part of a character is all there is comes as `bytes:\xe2…`. */
const visible = (text) => text.replaceAll(' ', '␣').replaceAll('\n', '⏎');

/** Tokens as text, shaded; the arrow keys and the pointer go from one to another, and say what else was likely. */
function shaded(tokens) {
  const detail = h('div', { class: 'detail', 'aria-live': 'polite' }, 'Point at a token, or use the arrow keys.');
  const spans = tokens.map(({ text, logprob }) => {
    const share = Math.exp(logprob ?? 0);
    const level = SHADES.findIndex((least) => share >= least);
    return h('span', { class: `token p${level < 0 ? SHADES.length : level}` }, text);
  });
  let at = -1;
  const tell = (i) => {
    spans[at]?.classList.remove('current');
    at = i;
    spans[at].classList.add('current');
    const { text, logprob, top } = tokens[at];
    refill(detail, h('b', null, visible(text)), ` ${probability(logprob)}`, top.length > 0 && h('ol', null, top
      .map((other) => h('li', null, h('code', null, visible(other.text)), ` ${probability(other.logprob)}`))));
  };
  const text = h('div', {
    class: 'plain tokens',
    tabindex: 0,
    role: 'group',
    'aria-label': 'Tokens shaded by probability; arrow keys go from one to another',
    onkeydown: (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step) return;
      event.preventDefault();
      tell(Math.min(spans.length - 1, Math.max(0, at + step)));
    },
    onpointerover: (event) => {
      const i = spans.indexOf(event.target);
      if (i >= 0) tell(i);
    },
  }, spans);
  return h('div', null, text, detail);
}
