// The live view: what the engine does now, over the last 15 minutes, and with each request.

import { Chart } from './chart.js';
import { h, refill, table } from './dom.js';
import { percent, seconds, short, whole } from './format.js';
import { History, parse } from './metrics.js';
import { every, json, text } from './server.js';

const METRICS_SECONDS = 5; // a page of metrics takes the server some 15 ms
const REQUEST_SECONDS = 2;

const CHARTS = [
  { title: 'Requests', format: short, least: 2, series: [['running', 'running', 'one'], ['waiting', 'waiting', 'two']] },
  { title: 'KV cache in use', format: percent, most: 100, series: [['kv', 'blocks', 'one']] },
  { title: 'Prompts found in the prefix cache', format: percent, most: 100, series: [['cached', 'tokens', 'one']] },
  { title: 'Tokens per second', format: short, series: [['output', 'output', 'one'], ['prompt', 'prompt', 'two']] },
  { title: 'Time to first token (TTFT)', format: seconds, series: [['ttft50', 'p50', 'one'], ['ttft95', 'p95', 'two']] },
  { title: 'Between tokens (ITL)', format: seconds, series: [['itl50', 'p50', 'one'], ['itl95', 'p95', 'two']] },
];
const TILES = [
  ['running', 'running', short], ['waiting', 'waiting', short], ['kv', 'KV cache', percent],
  ['output', 'output tok/s', short], ['ttft50', 'TTFT p50', seconds], ['itl50', 'ITL p50', seconds],
];

const history = new History();
let failed = '';
let changed = () => {};

/** Reads the metrics from now on, whatever view is shown: so that there is something to see when this one is. */
export function watch() {
  every(METRICS_SECONDS, async () => {
    try {
      history.add(Date.now() / 1000, parse(await text('metrics', { background: true })));
      failed = '';
    } catch (error) {
      failed = error.message;
    }
    changed();
  });
}

/** Fills an element with the view; what it returns ends it. */
export function show(place) {
  const charts = CHARTS.map(({ series, ...rest }) => new Chart({
    ...rest, series: series.map(([field, name, css]) => ({ field, name, css })),
  }));
  const tiles = h('dl', { class: 'tiles' });
  const notice = h('p', { class: 'error', role: 'alert' });
  const requests = h('div', { class: 'requests' });
  refill(place, h('section', { class: 'live', 'aria-label': 'Live' },
    h('h1', null, 'Live'), notice, tiles, h('div', { class: 'charts' }, charts.map((chart) => chart.element)),
    h('h2', null, 'Requests'), requests,
    h('p', { class: 'note' }, `Read from /metrics every ${METRICS_SECONDS} s and /requests every ${REQUEST_SECONDS} s while this page is visible; a hidden page asks nothing.`)));

  changed = () => {
    const point = history.points.at(-1);
    notice.textContent = failed && `No metrics: ${failed}`;
    refill(tiles, TILES.map(([field, name, format]) => h('div', null, h('dt', null, name), h('dd', null, format(point?.[field])))));
    charts.forEach((chart) => chart.update(history.points, Date.now() / 1000, 3 * METRICS_SECONDS));
  };
  changed();
  const stop = every(REQUEST_SECONDS, async () => {
    try {
      replace(requests, list(await json('requests', { background: true })));
    } catch (error) {
      refill(requests, h('p', { class: 'error' }, error.message));
    }
  });
  return () => { stop(); changed = () => {}; };
}

/** Other contents, scrolled and focused as those before. */
function replace(place, contents) {
  const before = place.querySelector('.scroll');
  const [left, focused] = [before?.scrollLeft ?? 0, before !== null && before === document.activeElement];
  refill(place, contents);
  const after = place.querySelector('.scroll');
  if (!after) return;
  after.scrollLeft = left;
  if (focused) after.focus({ preventScroll: true });
}

function list({ running, queued, requests }) {
  if (!running && !queued) return h('p', { class: 'empty' }, 'No requests are being served.');
  const hidden = running + queued - requests.length;
  return [
    h('p', null, `${whole(running)} running, ${whole(queued)} queued${hidden ? `; ${whole(requests.length)} of them shown` : ''}`),
    !requests.length ? h('p', { class: 'empty' }, 'None of them is of this key.') : table(['request', 'state', 'prompt', 'output', 'for', 'first token'], requests.map((request) => [
      h('code', { class: 'id', title: request.id }, request.id.length > 18 ? `${request.id.slice(0, 16)}…` : request.id || '–',
        request.index ? ` #${request.index}` : '', request.adapter ? ` (${request.adapter})` : ''),
      h('span', { class: `state ${request.state}` }, request.state),
      whole(request.prompt_tokens),
      progress(request),
      seconds(request.seconds),
      seconds(request.ttft_seconds),
    ]), { label: 'Requests that are not finished', class: 'numbers' }),
  ];
}

function progress({ output_tokens: done, max_tokens: most }) {
  const said = most ? `${whole(done)} of ${whole(most)}` : whole(done);
  return [most ? h('progress', { max: most, value: done, 'aria-label': said }) : '', h('span', null, said)];
}
