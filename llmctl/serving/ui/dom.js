// Elements out of data. Text becomes text nodes, never markup; nothing here takes HTML.

const SVG = 'http://www.w3.org/2000/svg';

function filled(node, props, children) {
  for (const [name, value] of Object.entries(props ?? {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith('on')) node.addEventListener(name.slice(2), value);
    else if (name === 'value' || name === 'checked' || name === 'open') node[name] = value;
    else node.setAttribute(name, value === true ? '' : String(value));
  }
  append(node, children);
  return node;
}

export function append(node, children) {
  for (const child of children.flat(Infinity)) {
    if (child !== undefined && child !== null && child !== false) node.append(child);
  }
}

/** An element. Properties that begin with `on` are listeners. */
export const h = (tag, props, ...children) => filled(document.createElement(tag), props, children);

/** An element of SVG. */
export const s = (tag, props, ...children) => filled(document.createElementNS(SVG, tag), props, children);

/** The same element with other children. */
export function refill(node, ...children) {
  node.replaceChildren();
  append(node, children);
  return node;
}

/** A button with words. */
export const button = (text, onclick, props) => h('button', { type: 'button', onclick, ...props }, text);

let fields = 0;

/** A control under its label. `hint` says more, and is read with it. */
export function labelled(text, control, hint) {
  control.id ||= `field-${(fields += 1)}`;
  const parts = [h('label', { for: control.id }, text), control];
  if (hint) {
    control.setAttribute('aria-describedby', `${control.id}-hint`);
    parts.push(h('small', { id: `${control.id}-hint` }, hint));
  }
  return h('div', { class: 'field' }, parts);
}

/** A table whose first row is a heading; it scrolls by itself where it is too wide. */
export function table(heading, rows, props) {
  return h('div', { class: 'scroll', tabindex: 0, role: 'group', 'aria-label': props?.label },
    h('table', { class: props?.class },
      h('thead', null, h('tr', null, heading.map((cell) => h('th', { scope: 'col' }, cell)))),
      h('tbody', null, rows.map((row) => h('tr', null, row.map((cell) => h('td', null, cell)))))));
}

/** Copies a text, unless there is none; says so on the button for a moment. */
export function copier(text, label = 'Copy') {
  const made = button(label, async () => {
    const wanted = text();
    if (!wanted) return;
    try {
      await navigator.clipboard.writeText(wanted);
      made.textContent = 'Copied';
    } catch {
      made.textContent = 'Not allowed by the browser';
    }
    setTimeout(() => { made.textContent = label; }, 1500);
  }, { class: 'quiet' });
  return made;
}
