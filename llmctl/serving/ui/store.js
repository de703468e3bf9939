// Conversations, kept in this browser's local storage, each under a key of its own: two tabs do not undo each other.
// What a browser does not keep lives as long as the page.

const PREFIX = 'llmctl.conversation.';
const MOST_TITLE = 48;

const held = new Map();
let storage = null;
try {
  storage = window.localStorage;
} catch { /* forbidden: the page works without */ }

const NEW = {
  messages: [], // { role, content, reasoning?, tool_calls?, tool_call_id?, stats? }
  settings: {}, // of the request, as typed: see settings.js
};

export function fresh() {
  return { id: crypto.randomUUID?.() ?? `${Date.now()}-${Math.random().toString(36).slice(2)}`, changed: Date.now(), ...structuredClone(NEW) };
}

/** All of them, newest first. */
export function all() {
  for (let i = 0; storage && i < storage.length; i += 1) {
    const name = storage.key(i);
    if (!name.startsWith(PREFIX) || held.has(name.slice(PREFIX.length))) continue;
    try {
      const found = JSON.parse(storage.getItem(name));
      if (Array.isArray(found.messages) && typeof found.settings === 'object') held.set(found.id, found);
    } catch { /* not ours, or damaged: it is left as it is */ }
  }
  return [...held.values()].sort((a, b) => b.changed - a.changed);
}

/** Keeps one. Returns why it is not kept beyond this page, or ''. */
export function save(conversation) {
  conversation.changed = Date.now();
  held.set(conversation.id, conversation);
  if (!storage) return 'This browser keeps no data of this page: conversations end with it.';
  try {
    // Log-probabilities are many times the text.
    storage.setItem(PREFIX + conversation.id, JSON.stringify(conversation, (name, value) => (name === 'tokens' ? undefined : value)));
    return '';
  } catch {
    return 'This browser’s storage is full: this conversation ends with the page. Delete some others.';
  }
}

export function remove(conversation) {
  held.delete(conversation.id);
  storage?.removeItem(PREFIX + conversation.id);
}

export function title(conversation) {
  const first = conversation.messages.find((message) => message.role === 'user')?.content.trim().replace(/\s+/g, ' ');
  if (!first) return 'New conversation';
  return first.length > MOST_TITLE ? `${first.slice(0, MOST_TITLE - 1)}…` : first;
}
