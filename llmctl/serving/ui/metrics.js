// What /metrics says, as points over time: rates and quantiles between one reading and another.

const SERIES = /^[A-Za-z_]\w*:(\w+)$/;
const QUANTILE_READINGS = 3; // a quantile is of what happened over so many readings
export const HISTORY_SECONDS = 15 * 60;

/** The value of every series with a prefix, summed over its labels; of histograms, counts by bucket. */
export function parse(text) {
  const values = new Map();
  const buckets = new Map();
  for (const line of text.split('\n')) {
    if (!line || line[0] === '#') continue;
    const brace = line.indexOf('{');
    const space = line.lastIndexOf(' ');
    const name = SERIES.exec(line.slice(0, brace < 0 ? space : brace))?.[1];
    if (!name) continue;
    const value = Number(line.slice(space + 1));
    if (name.endsWith('_bucket')) {
      const edge = /[{,]le="([^"]+)"/.exec(line)?.[1];
      const of = name.slice(0, -7);
      if (!buckets.has(of)) buckets.set(of, new Map());
      const found = buckets.get(of);
      const at = edge === '+Inf' ? Infinity : Number(edge);
      found.set(at, (found.get(at) ?? 0) + value);
    } else {
      values.set(name, (values.get(name) ?? 0) + value);
    }
  }
  return { values, buckets };
}

/** The value below which a share of what came between two readings of a histogram lies; null: nothing came. */
export function quantile(share, before, after) {
  const edges = [...(after ?? [])].sort(([a], [b]) => a - b);
  const counts = edges.map(([edge, count]) => [edge, count - (before?.get(edge) ?? 0)]);
  const total = counts.at(-1)?.[1] ?? 0;
  if (!(total > 0) || counts.some(([, count]) => count < 0)) return null;
  const wanted = share * total;
  let low = 0;
  let below = 0;
  for (const [edge, count] of counts) {
    if (count >= wanted) {
      if (edge === Infinity) return low;
      return count === below ? edge : low + ((edge - low) * (wanted - below)) / (count - below);
    }
    low = edge;
    below = count;
  }
  return low;
}

/** Readings of the last 15 minutes, and the points that they make. */
export class History {
  constructor() {
    this.points = [];
    this.readings = [];
  }

  /** A reading at a time in seconds. Returns its point. */
  add(at, { values, buckets }) {
    const before = this.readings.at(-1);
    this.readings.push({ at, values, buckets });
    if (this.readings.length > QUANTILE_READINGS + 1) this.readings.shift();
    const rate = (name) => {
      const grown = values.get(name) - before?.values.get(name);
      return grown >= 0 ? grown / (at - before.at) : null; // less than before: another worker counts from zero
    };
    const share = (name, total) => { // since the oldest reading that is kept: prompts come in bursts
      const grown = (counter) => values.get(counter) - this.readings[0].values.get(counter);
      return grown(total) > 0 && grown(name) >= 0 ? (100 * grown(name)) / grown(total) : null;
    };
    const of = (name, share) => quantile(share, this.readings[0].buckets.get(name), buckets.get(name));
    const fresh = this.readings.length > 1;
    const point = {
      at,
      running: values.get('num_requests_running') ?? null,
      waiting: values.get('num_requests_waiting') ?? null,
      kv: values.has('kv_cache_usage_perc') ? 100 * values.get('kv_cache_usage_perc') : null,
      output: rate('generation_tokens_total'),
      prompt: rate('prompt_tokens_total'),
      cached: share('prefix_cache_hits_total', 'prefix_cache_queries_total'),
      ttft50: fresh ? of('time_to_first_token_seconds', 0.5) : null,
      ttft95: fresh ? of('time_to_first_token_seconds', 0.95) : null,
      itl50: fresh ? of('inter_token_latency_seconds', 0.5) : null,
      itl95: fresh ? of('inter_token_latency_seconds', 0.95) : null,
    };
    this.points.push(point);
    while (this.points[0].at < at - HISTORY_SECONDS) this.points.shift();
    return point;
  }
}
