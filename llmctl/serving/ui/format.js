// Numbers as people read them.

export const whole = (value) => Math.round(value).toLocaleString('en-US');

export function short(value) {
  if (value === null || value === undefined) return '–';
  const size = Math.abs(value);
  if (size >= 1e6) return `${(value / 1e6).toFixed(1)} M`;
  if (size >= 1e4) return `${(value / 1e3).toFixed(0)} k`;
  return size >= 100 ? whole(value) : String(Number(value.toFixed(size >= 10 ? 1 : 2)));
}

export function seconds(value) {
  if (value === null || value === undefined) return '–';
  if (value === 0) return '0';
  if (value < 0.001) return `${(value * 1e6).toFixed(0)} µs`;
  if (value < 0.01) return `${(value * 1e3).toFixed(1)} ms`;
  if (value < 1) return `${(value * 1e3).toFixed(0)} ms`;
  if (value < 100) return `${value.toFixed(1)} s`;
  if (value < 600) return `${value.toFixed(0)} s`;
  return value < 3600 ? `${Math.floor(value / 60)} min ${Math.round(value % 60)} s` : `${(value / 3600).toFixed(1)} h`;
}

export const percent = (value) => (value === null || value === undefined ? '–' : `${Number(value.toFixed(value < 10 ? 1 : 0))} %`);

export function bytes(value) {
  const units = ['B', 'KiB', 'MiB', 'GiB', 'TiB'];
  let unit = 0;
  let left = value;
  while (left >= 1024 && unit < units.length - 1) { left /= 1024; unit += 1; }
  return `${left.toFixed(unit ? 1 : 0)} ${units[unit]}`;
}
