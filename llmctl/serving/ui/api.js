// The API's description, read from /openapi.json of this server and shown as it stands; requests can be tried.

import { append, button, copier, h, labelled, refill } from './dom.js';
import { curl } from './export.js';
import { inline, markdown } from './markdown.js';
import { address, ask, json, keyed } from './server.js';

const DEEPEST = 6;
const SHOWN_CHARS = 20000;

/** Fills an element with the view. */
export async function show(place) {
  const body = h('div', null, h('p', null, 'Reading the description …'));
  refill(place, h('section', { class: 'api', 'aria-label': 'API' }, h('h1', null, 'API'), body));
  try {
    refill(body, page(await json('openapi.json')));
  } catch (error) {
    refill(body, h('p', { class: 'error', role: 'alert' }, error.message));
  }
}

function page(document) {
  const operations = Object.entries(document.paths).flatMap(([path, item]) => Object.entries(item)
    .map(([method, operation]) => ({ path, method, ...operation })));
  return [
    h('p', null, `${document.info.title} ${document.info.version}, OpenAPI ${document.openapi}. `,
      keyed() ? copier(() => JSON.stringify(document, null, 2), 'Copy openapi.json') : h('a', { href: address('openapi.json') }, 'openapi.json')),
    h('details', null, h('summary', null, 'What holds for all of it'), h('div', { class: 'prose' }, markdown(document.info.description ?? ''))),
    (document.tags ?? []).map((tag) => h('section', { 'aria-label': tag.name }, h('h2', null, tag.name), h('p', null, tag.description),
      operations.filter((operation) => operation.tags.includes(tag.name)).map((operation) => entry(operation, document)))),
  ];
}

/** One operation, filled when it is opened: a description has thousands of fields. */
function entry(operation, document) {
  const { method, path, summary } = operation;
  const made = h('details', { class: 'operation' },
    h('summary', null, h('span', { class: `method ${method}` }, method.toUpperCase()), h('code', null, path), h('span', null, inline(summary))));
  made.addEventListener('toggle', () => append(made, [content(operation, document)]), { once: true });
  return made;
}

function content(operation, document) {
  const resolve = (node) => (node?.$ref ? node.$ref.slice(2).split('/').reduce((at, part) => at[part], document) : node);
  const media = operation.requestBody?.content?.['application/json'];
  return h('div', { class: 'operation-body' },
    attempt(operation, media, resolve),
    media && [h('h3', null, 'Body'), schemaTree(media.schema, resolve)],
    h('h3', null, 'Answers'),
    Object.entries(operation.responses).map(([status, given]) => answer(status, resolve(given), resolve)));
}

function answer(status, response, resolve) {
  const kinds = Object.entries(response.content ?? {});
  return h('details', { class: 'answer' }, h('summary', null, h('b', null, status), ' ', inline(response.description)),
    h('p', null, 'Headers: ', Object.keys(response.headers ?? {}).flatMap((name, i) => [i ? ', ' : '', h('code', null, name)])),
    kinds.map(([type, { schema, itemSchema }]) => [h('h4', null, type), schemaTree(schema ?? itemSchema, resolve)]));
}

/** A schema as nested lists; what it refers to is followed as it is opened. */
function schemaTree(given, resolve, depth = 0) {
  const schema = resolve(given) ?? {};
  const options = schema.oneOf ?? schema.anyOf ?? [];
  const objects = options.map(resolve).filter((option) => option.properties || option.contentSchema);
  if (schema.properties) return fields(schema, resolve, depth);
  if (schema.contentSchema) return schemaTree(schema.contentSchema, resolve, depth);
  if (objects.length) return objects.map((option, i) => [objects.length > 1 && h('p', null, i ? 'or' : 'either'), schemaTree(option, resolve, depth)]);
  if (schema.items) return [h('p', null, 'a list of'), schemaTree(schema.items, resolve, depth)];
  return h('p', null, h('code', null, typeName(schema, resolve)), ' ', inline(schema.description ?? ''));
}

function fields(schema, resolve, depth) {
  const required = new Set(schema.required ?? []);
  return h('dl', { class: 'schema' }, Object.entries(schema.properties).map(([name, property]) => h('div', null,
    h('dt', null, h('code', null, name), required.has(name) && h('em', null, ' required')),
    h('dd', null, h('span', { class: 'type' }, typeName(property, resolve)), ' ', inline(property.description ?? ''),
      depth < DEEPEST && inner(property, resolve) && opened(property, resolve, depth)))));
}

function inner(given, resolve) {
  const schema = resolve(given);
  return Boolean(schema.properties || (schema.items && inner(schema.items, resolve))
    || [...(schema.anyOf ?? []), ...(schema.oneOf ?? [])].some((option) => resolve(option).properties || (resolve(option).items && inner(resolve(option).items, resolve))));
}

function opened(property, resolve, depth) {
  const made = h('details', null, h('summary', null, 'fields'));
  const schema = resolve(property);
  const list = [schema, ...(schema.anyOf ?? []), ...(schema.oneOf ?? [])].map(resolve).map((option) => option.items).find((items) => items && inner(items, resolve));
  made.addEventListener('toggle', () => append(made, [schemaTree(list ?? property, resolve, depth + 1)]), { once: true });
  return made;
}

function typeName(given, resolve) {
  const schema = resolve(given) ?? {};
  const options = schema.anyOf ?? schema.oneOf;
  if (options) return [...new Set(options.map((option) => typeName(option, resolve)))].join(' or ');
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(', ');
  if (schema.items) return `list of ${typeName(schema.items, resolve)}`;
  const low = schema.minimum ?? schema.exclusiveMinimum;
  const range = [
    low === undefined ? '' : `${schema.minimum === undefined ? '> ' : '≥ '}${low}`,
    schema.maximum === undefined || schema.maximum > 1e300 ? '' : `≤ ${schema.maximum}`,
  ].filter(Boolean).join(', ');
  const known = schema.default === undefined ? '' : `, default ${JSON.stringify(schema.default)}`;
  return `${schema.type ?? (schema.properties ? 'object' : 'any')}${range && ` ${range}`}${known}`;
}

/** A request that can be sent from here: its examples, its body, and what came. */
function attempt(operation, media, resolve) {
  const { method, path, parameters = [] } = operation;
  const named = parameters.map(resolve).filter((parameter) => parameter.in === 'path')
    .map((parameter) => [parameter.name, h('input', { type: 'text', value: parameter.example ?? '' })]);
  const examples = Object.entries(media?.examples ?? {});
  const body = media && h('textarea', { rows: 8, spellcheck: 'false', class: 'code', 'aria-label': 'Body' });
  const choose = examples.length > 0 && h('select', {
    'aria-label': 'Example',
    onchange: (event) => { body.value = JSON.stringify(examples[event.target.value][1].value, null, 2); },
  }, examples.map(([name], i) => h('option', { value: String(i) }, name)));
  if (body && examples.length) body.value = JSON.stringify(examples[0][1].value, null, 2);
  const target = () => named.reduce((at, [name, input]) => at.replace(`{${name}}`, encodeURIComponent(input.value)), path);
  const result = h('div', { class: 'result', 'aria-live': 'polite' });
  const given = () => (body ? JSON.parse(body.value) : undefined);
  const failed = (error) => refill(result, h('p', { class: 'error' }, `${error.status || ''} ${error.message}`));
  const send = async () => {
    refill(result, h('p', null, 'Waiting …'));
    try {
      const came = await ask(target(), { body: given(), method: method.toUpperCase() });
      const said = await came.text();
      refill(result, h('p', null, h('b', null, `${came.status} ${came.statusText}`)), pre(said));
    } catch (error) {
      failed(error);
    }
  };
  const command = () => {
    try {
      return curl(target(), method, given());
    } catch (error) {
      failed(error);
      return '';
    }
  };
  return h('div', { class: 'try' }, named.map(([name, input]) => labelled(name, input)),
    choose && labelled('Example', choose), body && labelled('Body', body),
    h('p', { class: 'buttons' }, button('Send', send, { class: 'primary' }), copier(command, 'Copy as curl')), result);
}

function pre(said) {
  let shown = said;
  try { shown = JSON.stringify(JSON.parse(said), null, 2); } catch { /* events, or plain text */ }
  return h('pre', { tabindex: 0 }, shown.length > SHOWN_CHARS ? `${shown.slice(0, SHOWN_CHARS)}\n… ${shown.length - SHOWN_CHARS} more characters` : shown);
}
