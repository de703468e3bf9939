// What the views know of the server, once its engine is ready.

import { json } from './server.js';

export const facts = { loaded: false, models: [], model: '', chat: true, defaults: {} };

/** Asks for them. A server whose engine is not there yet refuses. */
export async function load(options) {
  const [models, engine] = await Promise.all([json('v1/models', options), json('engine', options)]);
  facts.models = models.data.map(({ id }) => id);
  if (!facts.models.includes(facts.model)) [facts.model] = facts.models;
  Object.assign(facts, { loaded: true, chat: engine.chat, defaults: engine.sampling_defaults });
}
