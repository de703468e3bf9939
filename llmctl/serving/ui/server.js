// Everything the page asks its server. The API key lives in this module's memory and nowhere else.

const ROOT = new URL('..', import.meta.url); // whatever a proxy serves the page under

let key = '';
let asking = null;
let declined = false;
let askForKey = async () => '';

/** How the user is asked: an async function of what is wrong with the last key, which gives a key or ''. */
export function onKeyNeeded(ask) { askForKey = ask; }

/** Whether requests bear a key. A link cannot. */
export const keyed = () => key !== '';

export const address = (path) => new URL(path.replace(/^\//, ''), ROOT).href;

/** What the server refused, or why there was no answer. */
export class ServerError extends Error {
  constructor(message, status = 0, code = null) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

async function wantKey() {
  asking ??= askForKey(key ? 'The server does not know this key.' : '').finally(() => { asking = null; });
  const given = await asking;
  declined = !given;
  if (!given) throw new ServerError('This server needs an API key.', 401, 'invalid_api_key');
  key = given;
}

async function refusal(answer) {
  let said = `${answer.status} ${answer.statusText}`;
  let code = null;
  try {
    const { error, reason } = await answer.json();
    said = reason ?? (typeof error === 'string' ? error : error.message);
    code = error?.code ?? null;
  } catch { /* not one of the API's documents: a proxy's */ }
  return new ServerError(said, answer.status, code);
}

/**
 * One request. `body` is sent as JSON. A 401 asks the user for the key, once for all requests that wait; one in the
 * `background` does not ask again what was declined.
 */
export async function ask(path, { body, signal, background = false, method } = {}) {
  for (;;) {
    const used = key;
    const headers = {};
    if (used) headers.Authorization = `Bearer ${used}`;
    if (body !== undefined) headers['Content-Type'] = 'application/json';
    let answer;
    try {
      answer = await fetch(address(path), {
        method: method ?? (body === undefined ? 'GET' : 'POST'),
        headers,
        body: body === undefined ? undefined : JSON.stringify(body),
        signal,
        cache: 'no-store',
        credentials: 'same-origin',
      });
    } catch (error) {
      if (error.name === 'AbortError') throw error;
      throw new ServerError('The server does not answer.');
    }
    if (answer.status === 401) {
      if (used !== key) continue; // another request has just got one
      if (background && declined) throw await refusal(answer);
      await wantKey();
      continue;
    }
    if (!answer.ok) throw await refusal(answer);
    return answer;
  }
}

export const json = async (path, options) => (await ask(path, options)).json();
export const text = async (path, options) => (await ask(path, options)).text();

/** What a stream sends: the JSON of each event up to `[DONE]`. An event that is an error is thrown. */
export async function* events(path, body, signal) {
  const answer = await ask(path, { body, signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) throw new ServerError('The stream ended early.');
      const parts = (rest + value).split('\n\n');
      rest = parts.pop();
      for (const part of parts) {
        const data = part.split('\n').filter((line) => line.startsWith('data: ')).map((line) => line.slice(6)).join('\n');
        if (data === '[DONE]') return;
        if (!data) continue; // a comment, which keeps the connection
        const event = JSON.parse(data);
        if (event.error) throw new ServerError(event.error.message, 0, event.error.code);
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/**
 * Calls `work` now and every so many seconds after it is done, while the page is visible and until the returned
 * function is called. A hidden page asks nothing.
 */
export function every(seconds, work) {
  let timer = 0;
  let stopped = false;
  let running = false;
  const turn = async () => {
    clearTimeout(timer);
    if (stopped || running || document.hidden) return;
    running = true;
    try {
      await work();
    } finally {
      running = false;
      if (!stopped && !document.hidden) timer = setTimeout(turn, seconds * 1000);
    }
  };
  document.addEventListener('visibilitychange', turn);
  turn();
  return () => {
    stopped = true;
    clearTimeout(timer);
    document.removeEventListener('visibilitychange', turn);
  };
}
