// The card of the model and its engine: what it is, which kernels run it, what it takes of memory.

import { h, refill, table } from './dom.js';
import { bytes, whole } from './format.js';
import { json } from './server.js';

/** Fills an element with the view. */
export async function show(place) {
  const body = h('div', { 'aria-live': 'polite' }, h('p', null, 'Reading the engine …'));
  refill(place, h('section', { class: 'engine', 'aria-label': 'Engine' }, h('h1', null, 'Engine'), body));
  try {
    refill(body, card(await json('engine')));
  } catch (error) {
    refill(body, h('p', { class: 'error', role: 'alert' }, error.message));
  }
}

const facts = (rows) => h('dl', { class: 'facts' },
  rows.filter(([, value]) => value).map(([name, value]) => h('div', null, h('dt', null, name), h('dd', null, value))));

function card(engine) {
  const { graph, limits, options } = engine;
  return [
    h('h2', null, engine.models.join(', ')),
    facts([
      ['source', engine.source],
      ['family', `${graph.family}, ${graph.num_layers} layers, hidden ${whole(graph.hidden_size)}, vocabulary ${whole(graph.vocab_size)}`],
      ['parameters', `${(graph.parameters / 1e6).toFixed(1)} M`],
      ['weights', `${quantization(engine.quantization)}, ${bytes(engine.weight_bytes)}`],
      ['stored as', stored(engine.quantization.schemes)],
      ['target', engine.target],
      ['kernels', engine.kernel_build],
      ['context', `${whole(limits.max_model_len)} tokens`],
      ['batch', `up to ${whole(limits.max_num_seqs)} requests, ${whole(limits.max_num_batched_tokens)} tokens a step`],
      ['KV cache', `${whole(limits.kv_tokens)} tokens, ${bytes(engine.kv_cache_bytes)} of ${engine.kv_cache_dtype}`],
      ['sampling defaults', Object.entries(engine.sampling_defaults).map(([name, value]) => `${name} ${value}`).join(', ') || 'OpenAI’s'],
      ['chat template', engine.chat ? 'yes' : 'none: texts are continued'],
      ['built', `by llmctl ${engine.llmctl_version}, ${engine.size}; served by ${engine.version}`],
      ['checksum', h('code', null, engine.checksum.slice(0, 16), '…')],
    ]),
    h('h2', null, 'Memory'),
    table(engine.memory[0] ?? [], engine.memory.slice(1), { label: 'Memory plan', class: 'numbers' }),
    h('p', { class: 'note' }, engine.memory_note),
    h('h2', null, 'Graph'),
    h('p', null, `${whole(engine.ops.length)} ops in execution order; layers that are alike are shown once.`),
    h('ol', { class: 'graph' }, stages(engine.ops).map((part) => stage(part, graph.num_layers))),
    h('h2', null, 'Kernels'),
    table(['kernel', 'ops', 'serves', 'others refused because'], engine.kernels.map((row) => [
      h('code', null, row.kernel), `${whole(row.count)} ${row.kind}`, row.rows,
      row.refused.length ? h('details', null, h('summary', null, `${row.refused.length} refused`), h('ul', null, row.refused.map((why) => h('li', null, why)))) : '–',
    ]), { label: 'Kernels' }),
    h('details', null, h('summary', null, 'Build options'),
      facts(Object.entries(options).map(([name, value]) => [name.replaceAll('_', ' '), Array.isArray(value) ? value.join(', ') : String(value)]))),
  ];
}

function quantization({ method, bits, group_size: group }) {
  return method === 'none' ? 'not quantized' : `${method}, ${bits} bits${group > 0 ? `, groups of ${group}` : ''}`;
}

function stored(schemes) {
  const kinds = Object.entries(schemes ?? {});
  return kinds.length > 1 && kinds.map(([name, count]) => `${whole(count)} × ${name}`).join('; ');
}

/** Runs of layers with the same ops: [{ layers: [first, last], ops }]. */
export function stages(ops) {
  const made = [];
  for (const op of ops) {
    const last = made.at(-1);
    if (last && last.layer === op.layer) last.ops.push(op);
    else made.push({ layer: op.layer, ops: [op] });
  }
  const alike = (a, b) => a.ops.length === b.ops.length
    && a.ops.every((op, i) => op.kind === b.ops[i].kind && op.kernel === b.ops[i].kernel);
  const merged = [];
  for (const { layer, ops: own } of made) {
    const last = merged.at(-1);
    if (last && layer > 0 && last.layers[1] === layer - 1 && alike(last, { ops: own })) last.layers[1] = layer;
    else merged.push({ layers: [layer, layer], ops: own });
  }
  return merged;
}

// -1 is before the first layer, their number after the last.
function stage({ layers: [first, last], ops }, count) {
  const name = first < 0 ? 'before the layers' : first >= count ? 'after the layers' : first === last ? `layer ${first}` : `layers ${first}–${last}, each`;
  return h('li', null, h('h3', null, name),
    h('ol', null, ops.map((op) => h('li', null, h('b', null, op.kind), op.kernel !== op.kind && [' ', h('code', null, op.kernel)]))));
}
