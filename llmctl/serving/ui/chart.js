// A line chart of the last 15 minutes in SVG, with a legend that says the values at the pointer, or the newest.

import { h, refill, s } from './dom.js';
import { HISTORY_SECONDS } from './metrics.js';

const HEIGHT = 150;
const LEFT = 56;
const TOP = 8;
const BOTTOM = 18;
const MARKS = 5; // minutes between marks of the time axis

/** The smallest of 1, 2, 4, 6 and 8 times a power of ten that is not below a value: their halves are round, too. */
export function ceiling(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 4, 6, 8, 10].map((step) => step * power).find((edge) => edge >= value * 0.999999);
}

export class Chart {
  /**
   * series: [{ field, name, css }], a field of a point each. format: of values. most: the axis ends there. least: not
   * before there.
   */
  constructor({ title, series, format, most, least = 0 }) {
    Object.assign(this, { series, format, most, least, points: [], now: 0, cursor: null, gap: Infinity });
    this.legend = h('figcaption', null);
    this.drawing = s('svg', { role: 'img', tabindex: 0, 'aria-label': title, height: HEIGHT });
    this.title = title;
    this.element = h('figure', { class: 'chart' }, this.legend, this.drawing);
    this.drawing.addEventListener('pointermove', (event) => this.pointAt(event.offsetX));
    this.drawing.addEventListener('pointerleave', () => this.moveTo(null));
    this.drawing.addEventListener('blur', () => this.moveTo(null));
    this.drawing.addEventListener('keydown', (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step || !this.points.length) return;
      event.preventDefault();
      const at = this.cursor ?? this.points.length - 1;
      this.moveTo(Math.min(this.points.length - 1, Math.max(0, at + step)));
    });
    new ResizeObserver(() => this.draw()).observe(this.element);
  }

  /** Show points as of a time. `gap`: seconds without one that break the line. */
  update(points, now, gap) {
    if (this.cursor !== null) { // the cursor stays at its time, not at its place
      const held = this.points[this.cursor];
      this.cursor = points.includes(held) ? points.indexOf(held) : null;
    }
    Object.assign(this, { points: [...points], now, gap });
    this.draw();
  }

  pointAt(x) {
    if (!this.points.length) return;
    const at = this.now - HISTORY_SECONDS * (1 - (x - LEFT) / this.width);
    let best = 0;
    this.points.forEach((point, i) => {
      if (Math.abs(point.at - at) < Math.abs(this.points[best].at - at)) best = i;
    });
    this.moveTo(best);
  }

  moveTo(cursor) {
    if (this.cursor === cursor) return;
    this.cursor = cursor;
    this.draw();
  }

  draw() {
    const whole = this.element.clientWidth;
    if (!whole) return;
    this.width = Math.max(40, whole - LEFT - 6);
    const tall = HEIGHT - TOP - BOTTOM;
    const values = this.points.flatMap((point) => this.series.map(({ field }) => point[field] ?? 0));
    const top = this.most ?? ceiling(Math.max(this.least, ...values));
    const x = (at) => LEFT + this.width * (1 - (this.now - at) / HISTORY_SECONDS);
    const y = (value) => TOP + tall * (1 - Math.min(value, top) / top);
    this.drawing.setAttribute('width', whole);
    this.drawing.setAttribute('viewBox', `0 0 ${whole} ${HEIGHT}`);
    refill(this.drawing, this.grid(top, y), this.marks(tall),
      this.series.map(({ field, css }) => this.line(field, css, x, y)), this.pointer(x, y, tall));
    this.say();
  }

  grid(top, y) {
    return [0, 0.5, 1].map((share) => [
      s('line', { class: 'grid', x1: LEFT, x2: LEFT + this.width, y1: y(share * top), y2: y(share * top) }),
      s('text', { x: LEFT - 6, y: y(share * top) + 4, 'text-anchor': 'end' }, this.format(share * top)),
    ]);
  }

  marks(tall) {
    const minutes = [15, 10, 5, 0].filter((minute) => minute % MARKS === 0);
    return minutes.map((minute) => s('text', {
      x: LEFT + this.width * (1 - minute / (HISTORY_SECONDS / 60)),
      y: TOP + tall + 14,
      'text-anchor': minute === 15 ? 'start' : minute ? 'middle' : 'end',
    }, minute ? `−${minute} min` : 'now'));
  }

  line(field, css, x, y) {
    let path = '';
    let last = null;
    const alone = [];
    this.points.forEach((point, i) => {
      const value = point[field];
      if (value === null || value === undefined) { last = null; return; }
      const joined = last !== null && point.at - last.at <= this.gap;
      path += `${joined ? 'L' : 'M'}${x(point.at).toFixed(1)} ${y(value).toFixed(1)}`;
      const next = this.points[i + 1];
      const goesOn = next && next[field] !== null && next.at - point.at <= this.gap;
      if (!joined && !goesOn) alone.push(s('circle', { class: `dot ${css}`, cx: x(point.at), cy: y(value), r: 1.5 }));
      last = point;
    });
    return [s('path', { class: `line ${css}`, d: path || 'M0 0' }), alone];
  }

  pointer(x, y, tall) {
    const point = this.points[this.cursor];
    if (!point) return [];
    const dots = this.series.filter(({ field }) => point[field] !== null)
      .map(({ field, css }) => s('circle', { class: `dot ${css}`, cx: x(point.at), cy: y(point[field]), r: 3.5 }));
    return [s('line', { class: 'cursor', x1: x(point.at), x2: x(point.at), y1: TOP, y2: TOP + tall }), dots];
  }

  say() {
    const point = this.cursor === null ? this.points.at(-1) : this.points[this.cursor];
    const ago = point ? Math.round(this.now - point.at) : 0;
    const when = this.cursor === null || !point ? '' : `${Math.floor(ago / 60)}:${String(ago % 60).padStart(2, '0')} ago`;
    const said = this.series.map(({ field, name, css }) => [css, name, point ? this.format(point[field]) : '–']);
    refill(this.legend, h('span', { class: 'title' }, this.title), when && h('span', { class: 'when' }, when),
      said.map(([css, name, value]) => h('span', { class: 'key' }, h('i', { class: css }), name, ' ', h('b', null, value))));
    this.drawing.setAttribute('aria-label', `${this.title}, the last 15 minutes. ${when} ${said.map(([, name, value]) => `${name} ${value}`).join(', ')}`);
  }
}
