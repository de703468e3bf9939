// Markdown as DOM nodes. What a model writes is text: HTML in it is shown as it stands, images are links, and only
// http and https addresses become links. There is no way from a string to markup here.

import { h } from './dom.js';

const DEEPEST = 8; // of quotes, lists and emphasis in one another; beyond it, text
// Each of these is linear in its line: a model can write any line.
const FENCE = /^ {0,3}(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})\s(.*)$/;
const RULE = /^ {0,3}([-*_])\s*(?:\1\s*){2,}$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])(?:\s+(.*))?$/;
const COLUMN = /^:?-+:?$/;
const ADDRESS = /https?:\/\/[^\s<>"'`]{1,2000}/y;
const WORD = /[\p{L}\p{N}]/u;

/** The nodes of a text. */
export function markdown(text) {
  return blocks(text.replace(/\r\n?/g, '\n').split('\n'), 0);
}

function blocks(lines, depth) {
  if (depth > DEEPEST) return [h('p', null, lines.join('\n'))];
  const made = [];
  let at = 0;
  while (at < lines.length) {
    const line = lines[at];
    if (!line.trim()) { at += 1; continue; }
    const read = fence(lines, at) ?? heading(line, at) ?? rule(line, at) ?? quote(lines, at, depth)
      ?? list(lines, at, depth) ?? grid(lines, at) ?? paragraph(lines, at);
    made.push(read.node);
    at = read.next;
  }
  return made;
}

function fence(lines, at) {
  const open = FENCE.exec(lines[at]);
  if (!open) return null;
  const closes = (line) => line.trim().startsWith(open[1]) && !line.trim().slice(open[1].length).replaceAll(open[1][0], '').trim();
  let end = at + 1;
  while (end < lines.length && !closes(lines[end])) end += 1;
  const name = open[2].trim().split(/\s/)[0];
  const code = h('code', null, lines.slice(at + 1, end).join('\n'));
  return { node: h('pre', { tabindex: 0, 'data-language': name || undefined }, code), next: end + 1 };
}

function heading(line, at) {
  const found = HEADING.exec(line);
  return found && { node: h(`h${Math.min(6, found[1].length + 2)}`, null, inline(found[2].trim().replace(/ #{1,6}$/, ''), 0)), next: at + 1 };
}

function rule(line, at) {
  return RULE.test(line) ? { node: h('hr'), next: at + 1 } : null;
}

function quote(lines, at, depth) {
  if (!/^ {0,3}>/.test(lines[at])) return null;
  let end = at;
  while (end < lines.length && /^ {0,3}>/.test(lines[end])) end += 1;
  const inner = lines.slice(at, end).map((line) => line.replace(/^ {0,3}> ?/, ''));
  return { node: h('blockquote', null, blocks(inner, depth + 1)), next: end };
}

function list(lines, at, depth) {
  const first = ITEM.exec(lines[at]);
  if (!first || first[1].length > 3) return null;
  const ordered = /\d/.test(first[2]);
  const margin = first[1].length;
  const items = [];
  while (at < lines.length) {
    const found = ITEM.exec(lines[at]);
    if (!found || found[1].length > margin + 1 || /\d/.test(found[2]) !== ordered) break;
    const inner = [found[3] ?? ''];
    const indent = margin + found[2].length + 1;
    at += 1;
    while (at < lines.length) {
      const line = lines[at];
      const blank = !line.trim();
      const within = line.search(/\S/) >= Math.min(indent, margin + 2);
      if (blank ? !(lines[at + 1]?.search(/\S/) >= margin + 2) : !within && (ITEM.test(line) || !lines[at - 1].trim() || starts(line))) break;
      inner.push(line.slice(Math.min(indent, Math.max(0, line.search(/\S/)))));
      at += 1;
    }
    const nodes = blocks(inner, depth + 1);
    const alone = nodes.length > 0 && nodes[0].tagName === 'P' ? [[...nodes[0].childNodes], nodes.slice(1)] : nodes;
    items.push(h('li', null, alone));
    if (at < lines.length && !lines[at].trim()) { // a loose list: its next item may follow a blank line
      const next = ITEM.exec(lines[at + 1] ?? '');
      if (!next || next[1].length > margin + 1) break;
      at += 1;
    }
  }
  const start = ordered && parseInt(first[2], 10) !== 1 ? parseInt(first[2], 10) : undefined;
  return { node: h(ordered ? 'ol' : 'ul', { start }, items), next: at };
}

function cells(line) {
  return line.trim().replace(/^\||\|$/g, '').split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll('\\|', '|'));
}

function grid(lines, at) {
  if (!lines[at].includes('|') || !lines[at + 1]?.includes('-')) return null;
  const names = cells(lines[at]);
  const divider = cells(lines[at + 1]);
  if (divider.length !== names.length || !divider.every((cell) => COLUMN.test(cell))) return null;
  let end = at + 2;
  while (end < lines.length && lines[end].includes('|')) end += 1;
  const rows = lines.slice(at + 2, end).map(cells).map((row) => names.map((_, column) => row[column] ?? ''));
  const node = h('div', { class: 'scroll' }, h('table', null,
    h('thead', null, h('tr', null, names.map((name) => h('th', null, inline(name, 0))))),
    h('tbody', null, rows.map((row) => h('tr', null, row.map((cell) => h('td', null, inline(cell, 0))))))));
  return { node, next: end };
}

const starts = (line) => FENCE.test(line) || HEADING.test(line) || RULE.test(line) || /^ {0,3}>/.test(line);

function paragraph(lines, at) {
  let end = at + 1;
  while (end < lines.length && lines[end].trim() && !starts(lines[end]) && !ITEM.test(lines[end])) end += 1;
  const nodes = lines.slice(at, end).flatMap((line, i) => (i ? [h('br'), ...inline(line, 0)] : inline(line, 0)));
  return { node: h('p', null, nodes), next: end };
}

/** A link; text where the address is of another kind. */
function link(url, children) {
  let parsed;
  try { parsed = new URL(url); } catch { return null; }
  if (parsed.protocol !== 'http:' && parsed.protocol !== 'https:') return null;
  return h('a', { href: parsed.href, target: '_blank', rel: 'noopener noreferrer nofollow' }, children);
}

const MARKS = [['***', 'strong', 'em'], ['**', 'strong'], ['__', 'strong'], ['~~', 'del'], ['*', 'em'], ['_', 'em']];

/** The nodes of a text within a line. */
export function inline(text, depth = 0) {
  if (depth > DEEPEST) return [text];
  const nodes = [];
  const absent = new Set(); // delimiters of which no more come: each is looked for once
  let plain = '';
  let at = 0;
  const put = (node, next) => {
    if (plain) nodes.push(plain);
    plain = '';
    nodes.push(node);
    at = next;
  };
  while (at < text.length) {
    const c = text[at];
    if (c === '\\' && /[!-/:-@[-`{-~]/.test(text[at + 1] ?? '')) {
      plain += text[at + 1];
      at += 2;
      continue;
    }
    const found = c === '`' ? code(text, at, absent)
      : c === '[' || (c === '!' && text[at + 1] === '[') ? reference(text, at, depth, absent)
        : c === 'h' ? bare(text, at)
          : c === '*' || c === '_' || c === '~' ? emphasis(text, at, depth, absent) : null;
    if (found) put(found.node, found.next);
    else { plain += c; at += 1; }
  }
  if (plain) nodes.push(plain);
  return nodes;
}

function code(text, at, absent) {
  const run = /^`+/.exec(text.slice(at, at + 64))[0];
  if (absent.has(run)) return null;
  for (let end = text.indexOf(run, at + run.length); end >= 0; end = text.indexOf(run, end)) {
    let after = end + run.length;
    if (text[after] !== '`') {
      const inner = text.slice(at + run.length, end);
      return { node: h('code', null, /^ .*\S.* $/.test(inner) ? inner.slice(1, -1) : inner), next: after };
    }
    while (text[after] === '`') after += 1;
    end = after;
  }
  absent.add(run);
  return null;
}

function reference(text, at, depth, absent) {
  if (absent.has('](')) return null;
  const open = text[at] === '!' ? at + 2 : at + 1;
  const middle = text.indexOf('](', open);
  if (middle < 0) { absent.add(']('); return null; }
  if (text.slice(open, middle).includes('[')) return null; // the inner one is the link
  const end = text.indexOf(')', middle);
  if (end < 0) { absent.add(']('); return null; }
  const node = link(text.slice(middle + 2, end).trim().split(/\s/)[0], inline(text.slice(open, middle) || 'image', depth + 1));
  return node && { node, next: end + 1 };
}

function bare(text, at) {
  if (WORD.test(text[at - 1] ?? '')) return null;
  ADDRESS.lastIndex = at;
  const found = ADDRESS.exec(text);
  if (!found) return null;
  let url = found[0].replace(/[.,;:!?*_~]+$/, '');
  if (url.endsWith(')') && !url.includes('(')) url = url.slice(0, -1);
  const node = link(url, [url]);
  return node && { node, next: at + url.length };
}

function emphasis(text, at, depth, absent) {
  for (const [mark, tag, inner] of MARKS) {
    if (!text.startsWith(mark, at) || absent.has(mark)) continue;
    const open = at + mark.length;
    if (/\s/.test(text[open] ?? ' ') || (mark.length === 1 && text[open] === mark) || (mark[0] === '_' && WORD.test(text[at - 1] ?? ''))) continue;
    let end = text.indexOf(mark, open);
    while (end >= 0 && (/[\s\\]/.test(text[end - 1]) || end === open || (mark.length === 1 && (text[end + 1] === mark || text[end - 1] === mark))
      || (mark[0] === '_' && WORD.test(text[end + mark.length] ?? '')))) {
      end = text.indexOf(mark, end + mark.length);
    }
    if (end < 0) { absent.add(mark); continue; }
    const nodes = inline(text.slice(open, end), depth + 1);
    return { node: h(tag, null, inner ? h(inner, null, nodes) : nodes), next: end + mark.length };
  }
  return null;
}
