// The playground: conversations, the composer, what is being generated.

import { button, copier, h, labelled, refill } from './dom.js';
import { curl, python } from './export.js';
import { facts } from './facts.js';
import { whole } from './format.js';
import { grow, MessageView } from './message.js';
import { events, json } from './server.js';
import { chatOf, pane, requestOf, SettingError } from './settings.js';
import * as store from './store.js';

const NEAR_END = 80; // pixels from the end within which a growing answer is followed

let conversation = null;
let screen = null; // the elements, while the view is shown
const generating = new Map(); // of conversations: how to stop, and the message that grows

/** Fills an element with the view; what it returns ends it. Answers go on being generated. */
export function show(place) {
  conversation ??= store.all()[0] ?? store.fresh();
  screen = elements();
  refill(place, screen.root);
  drawAll();
  if (matchMedia('(min-width: 900px)').matches) screen.composer.focus();
  return () => { screen = null; };
}

function elements() {
  const made = {
    list: h('ul', { class: 'conversations' }),
    pane: h('div', { class: 'pane' }),
    log: h('div', { class: 'log', role: 'log', 'aria-live': 'off', 'aria-label': 'Conversation', tabindex: 0 }),
    notice: h('p', { class: 'error', role: 'alert' }),
    composer: h('textarea', { rows: 3, 'aria-label': 'Message', placeholder: 'Message. Enter sends, Shift+Enter is a new line.' }),
    send: button('Send', send, { class: 'primary' }),
    stop: button('Stop', stop, { class: 'stop' }),
    bar: h('div', { class: 'bar' }),
  };
  made.composer.addEventListener('keydown', (event) => {
    if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      send();
    }
  });
  const side = (name, label, ...children) => h('aside', { class: `side ${name}`, id: `side-${name}`, 'aria-label': label }, children);
  made.root = h('div', {
    class: 'chat',
    onkeydown: (event) => { if (event.key === 'Escape') stop(); },
  },
  made.bar, side('left', 'Conversations', button('New conversation', begin, { class: 'wide' }), made.list),
  h('section', { class: 'talk', 'aria-label': 'Chat' }, made.log, made.notice,
    h('div', { class: 'composer' }, made.composer, h('div', { class: 'buttons' }, made.stop, made.send))),
  side('right', 'Settings', made.pane));
  refill(made.bar, toggle(made.root, 'left', 'Conversations'), modelChoice(), button('Prompt', showPrompt, { class: 'quiet' }),
    copier(() => exported((path, body) => curl(path, 'post', body)), 'curl'), copier(() => exported(python), 'Python'),
    toggle(made.root, 'right', 'Settings'));
  return made;
}

/** On a narrow window, shows a side over the rest. */
function toggle(root, name, label) {
  const made = button(label, () => {
    const open = root.classList.toggle(`show-${name}`);
    root.classList.remove(name === 'left' ? 'show-right' : 'show-left');
    for (const other of root.querySelectorAll('.toggle')) other.setAttribute('aria-expanded', 'false');
    made.setAttribute('aria-expanded', String(open));
    if (open) root.querySelector(`#side-${name} :is(button, textarea, input)`)?.focus();
  }, { class: `quiet toggle ${name}`, 'aria-expanded': 'false', 'aria-controls': `side-${name}` });
  return made;
}

function modelChoice() {
  const choice = h('select', { 'aria-label': 'Model', onchange: () => { facts.model = choice.value; } },
    facts.models.map((name) => h('option', { value: name }, name)));
  choice.value = facts.model;
  return choice;
}

// The conversation on the screen

function drawAll() {
  refill(screen.pane, pane(conversation, { defaults: facts.defaults, chat: facts.chat, changed: keep }));
  screen.notice.textContent = '';
  drawList();
  drawLog();
}

function drawList() {
  const known = store.all();
  if (!known.includes(conversation)) known.unshift(conversation);
  refill(screen.list, known.map((one) => h('li', { class: one === conversation ? 'current' : '' },
    button(store.title(one), () => choose(one), { class: 'title', 'aria-current': one === conversation ? 'true' : undefined }),
    button('×', () => drop(one), { class: 'quiet', 'aria-label': `Delete ${store.title(one)}` }))));
}

function drawLog() {
  const { messages } = conversation;
  const grows = generating.get(conversation.id)?.message;
  screen.views = new Map(messages.map((message, i) => [message, new MessageView(message, actions(message, i), message === grows)]));
  refill(screen.log, messages.length ? [...screen.views.values()].map((view) => view.element)
    : h('p', { class: 'empty' }, facts.chat ? `Say something to ${facts.model}.` : `${facts.model} has no chat template: it continues your text.`), results());
  drawState();
  screen.log.scrollTop = screen.log.scrollHeight;
}

function drawState() {
  const busy = generating.has(conversation.id);
  screen.stop.hidden = !busy;
  screen.send.disabled = busy;
  screen.log.setAttribute('aria-busy', String(busy));
}

function actions(message, i) {
  const idle = (work) => () => { if (!generating.has(conversation.id)) work(); };
  const cut = (count) => { conversation.messages.length = count; };
  if (message.role === 'user') {
    return [button('Edit', idle(() => {
      screen.composer.value = message.content;
      cut(i);
      drawLog();
      keep();
      screen.composer.focus();
    }), { class: 'quiet' })];
  }
  if (message.role !== 'assistant' || i !== conversation.messages.length - 1) return [];
  return [button('Again', idle(() => { cut(i); answer(conversation); }), { class: 'quiet' })];
}

/** Where the user gives what the tools that the model has called give back. */
function results() {
  const last = conversation.messages.at(-1);
  if (last?.role !== 'assistant' || !last.tool_calls?.length || generating.has(conversation.id)) return [];
  const fields = last.tool_calls.map((call) => [call, h('textarea', { rows: 2, class: 'code' })]);
  return h('div', { class: 'results' },
    fields.map(([call, field]) => labelled(`Result of ${call.function.name}`, field)),
    button('Send results', () => {
      conversation.messages.push(...fields.map(([call, field]) => ({ role: 'tool', content: field.value, tool_call_id: call.id })));
      answer(conversation);
    }, { class: 'primary' }));
}

function keep() {
  const said = store.save(conversation);
  if (screen) screen.notice.textContent = said;
}

function begin() {
  if (conversation.messages.length) {
    const { settings } = conversation;
    conversation = store.fresh();
    conversation.settings = structuredClone(settings);
  }
  screen.root.classList.remove('show-left');
  drawAll();
  screen.composer.focus();
}

function choose(one) {
  conversation = one;
  screen.root.classList.remove('show-left');
  drawAll();
}

function drop(one) {
  if (one.messages.length && !window.confirm(`Delete “${store.title(one)}”?`)) return;
  generating.get(one.id)?.control.abort();
  generating.delete(one.id); // its answer, once aborted, keeps nothing
  store.remove(one);
  if (one === conversation) conversation = store.all()[0] ?? store.fresh();
  drawAll();
}

// Generating

function send() {
  const text = screen.composer.value;
  if (!text.trim() || generating.has(conversation.id) || !facts.loaded) return;
  conversation.messages.push({ role: 'user', content: text });
  screen.composer.value = '';
  answer(conversation);
}

function stop() {
  generating.get(conversation.id)?.control.abort();
}

async function answer(one) {
  let request;
  try {
    request = requestOf(one, facts.model, facts.chat);
  } catch (error) {
    if (!(error instanceof SettingError)) throw error;
    drawAll();
    screen.notice.textContent = error.message;
    return;
  }
  const message = { role: 'assistant', content: '' };
  const control = new AbortController();
  one.messages.push(message);
  generating.set(one.id, { control, message });
  keepFor(one);
  if (one === conversation && screen) { drawList(); drawLog(); }
  const stats = { tokens: 0, prompt: 0, seconds: 0, first: 0, reason: null };
  const began = performance.now();
  const since = () => (performance.now() - began) / 1000;
  try {
    for await (const event of events(request.path, request.body, control.signal)) {
      if (event.usage) Object.assign(stats, { tokens: event.usage.completion_tokens, prompt: event.usage.prompt_tokens });
      const choice = event.choices[0];
      if (!choice) continue;
      stats.first ||= since();
      stats.seconds = since();
      stats.reason = choice.finish_reason ?? stats.reason;
      grow(message, choice);
      drawSoon(message);
    }
  } catch (error) {
    if (control.signal.aborted) stats.reason = 'stopped';
    else message.error = error.message;
  }
  if (generating.get(one.id)?.message !== message) return; // the conversation was deleted
  if (stats.first || stats.reason) message.stats = stats;
  generating.delete(one.id);
  keepFor(one);
  if (one === conversation && screen) { drawList(); drawLog(); }
}

function keepFor(one) {
  const said = store.save(one);
  if (one === conversation && screen) screen.notice.textContent = said;
}

let drawing = 0;

function drawSoon(message) {
  drawing ||= requestAnimationFrame(() => {
    drawing = 0;
    const view = screen?.views.get(message);
    if (!view || !generating.has(conversation.id)) return;
    const follow = screen.log.scrollHeight - screen.log.scrollTop - screen.log.clientHeight < NEAR_END;
    view.draw(true);
    if (follow) screen.log.scrollTop = screen.log.scrollHeight;
  });
}

// What is sent

/** The conversation with what stands in the composer; without, as it was asked for the last answer. */
function drafted() {
  const draft = screen.composer.value;
  const { messages } = conversation;
  if (draft.trim()) return { ...conversation, messages: [...messages, { role: 'user', content: draft }] };
  return { ...conversation, messages: messages.at(-1)?.role === 'assistant' ? messages.slice(0, -1) : messages };
}

function exported(write) {
  try {
    const asked = drafted();
    if (!asked.messages.length) throw new SettingError('There is no message yet.');
    const { path, body } = requestOf(asked, facts.model, facts.chat);
    delete body.stream_options;
    return write(path, body);
  } catch (error) {
    screen.notice.textContent = error.message;
    return '';
  }
}

/** The prompt as the chat template renders it, token by token. */
async function showPrompt() {
  const body = h('div', null, h('p', null, 'Rendering …'));
  const dialog = h('dialog', { class: 'large', 'aria-label': 'Rendered prompt', onclose: () => dialog.remove() },
    h('h2', null, 'Rendered prompt'), body, h('p', { class: 'buttons' }, button('Close', () => dialog.close(), { class: 'primary' })));
  document.body.append(dialog);
  dialog.showModal();
  try {
    const { messages, settings } = drafted();
    const asked = facts.chat ? chatOf({ messages, settings }) : { prompt: messages.map((message) => message.content).join('') };
    if (facts.chat && !asked.messages.length) throw new SettingError('There is no message yet.');
    const { tokens, count, max_model_len: most } = await json('tokenize', { body: { model: facts.model, ...asked } });
    const { prompt } = await json('detokenize', { body: { model: facts.model, tokens } });
    refill(body, h('p', null, `${whole(count)} tokens of ${whole(most)}`), h('pre', { tabindex: 0, class: 'rendered' }, prompt));
  } catch (error) {
    refill(body, h('p', { class: 'error', role: 'alert' }, error.message));
  }
}
