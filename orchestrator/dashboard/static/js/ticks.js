// Where an axis has its marks: round numbers, as many as there is room for.

import { plain } from "./format.js";

export function ticks(low, high, most, { whole = false, unit = 1 } = {}) {
  const span = (high - low) * unit;
  if (!(span > 0) || most < 1) return [low];
  const rough = span / most;
  const power = 10 ** Math.floor(Math.log10(rough));
  const fits = [1, 2, 5, 10].find((k) => k * power >= rough);
  const step = whole ? Math.max(1, fits * power) : fits * power;
  const first = Math.ceil((low * unit) / step - 1e-9);
  const last = Math.floor((high * unit) / step + 1e-9);
  const found = [];
  for (let k = first; k <= last; k += 1) found.push(Number((k * step).toPrecision(12)) / unit);
  return found;
}

/** The marks as words, all with the same number of decimals. */
export function tickWords(at, { share = false } = {}) {
  const values = share ? at.map((x) => x * 100) : at;
  const decimals = (x) => (/\.(\d+)$/.exec(String(Number(x.toPrecision(10))))?.[1] ?? "").length;
  const places = Math.min(6, Math.max(0, ...values.map(decimals)));
  const words = (x) =>
    Math.abs(x) >= 1e4 || (x && Math.abs(x) < 1e-4)
      ? plain(x)
      : x.toFixed(places).replace("-", "−");
  return values.map((x) => (share ? `${words(x)}\u202f%` : words(x)));
}
