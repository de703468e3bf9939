// The page: its views, the server's state, and the question for the API key.

import * as api from './api.js';
import * as chat from './chat.js';
import { button, h, refill } from './dom.js';
import * as engine from './engine.js';
import { facts, load } from './facts.js';
import * as live from './live.js';
import { every, json, onKeyNeeded } from './server.js';

const STATUS_SECONDS = 5;
const VIEWS = { chat, live, engine, api };
const WITHOUT_ENGINE = new Set(['live', 'api']);

const main = document.getElementById('main');
const status = document.getElementById('status');
let shown = '';
let leave = () => {};
let watching = false;

function wanted() {
  const name = location.hash.slice(1);
  if (name in VIEWS) return name;
  return /\/docs\/?$/.test(location.pathname) ? 'api' : 'chat';
}

function show() {
  const name = wanted();
  if (name === shown) return;
  leave();
  leave = () => {};
  shown = name;
  for (const link of document.querySelectorAll('nav a')) {
    if (link.hash === `#${name}`) link.setAttribute('aria-current', 'page');
    else link.removeAttribute('aria-current');
  }
  document.title = `${name === 'api' ? 'API' : name[0].toUpperCase() + name.slice(1)} · llmctl`;
  if (!facts.loaded && !WITHOUT_ENGINE.has(name)) {
    refill(main, h('p', { class: 'empty' }, 'Waiting for the engine …'));
    shown = '';
    return;
  }
  const ended = VIEWS[name].show(main); // a promise, of views that end by themselves
  if (typeof ended === 'function') leave = ended;
}

function askForKey(problem) {
  const dialog = document.getElementById('key-dialog');
  const form = document.getElementById('key-form');
  const input = document.getElementById('key-input');
  document.getElementById('key-error').textContent = problem;
  input.value = '';
  dialog.showModal();
  input.focus();
  return new Promise((resolve) => {
    let given = '';
    form.onsubmit = (event) => {
      event.preventDefault();
      given = input.value.trim();
      dialog.close();
    };
    document.getElementById('key-cancel').onclick = () => dialog.close();
    dialog.onclose = () => {
      input.value = '';
      resolve(given);
    };
  });
}

function say(state, text, action) {
  if (status.textContent === text + (action?.textContent ?? '')) return; // it would be read aloud again
  status.className = `status ${state}`;
  refill(status, h('span', { class: 'text', title: text }, text), action);
}

/** For who has cancelled the question. */
async function askAgain() {
  try {
    await json('v1/models');
  } catch { /* cancelled again: check says it */ }
  check();
}

async function check() {
  try {
    await json('ready', { background: true });
    if (!facts.loaded) {
      await load({ background: true });
      if (!watching) live.watch();
      watching = true;
      show();
    }
    say('good', 'ready');
  } catch (error) {
    say('bad', error.message, error.status === 401 ? button('Enter the key', askAgain, { class: 'quiet' }) : null);
  }
}

onKeyNeeded(askForKey);
window.addEventListener('hashchange', show);
show();
every(STATUS_SECONDS, check);
