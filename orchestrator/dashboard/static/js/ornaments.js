// What a chart shows beside its lines: stacks and bands behind them; references, marks, the strip
// of the schedule and the names of the lines in front. And, for files, the lines themselves.

import { plain } from "./format.js";
import { colour } from "./palette.js";
import { measure } from "./pen.js";
import { tickWords } from "./ticks.js";

export const STRIP = 52;
const LABEL_GAP = 13;
const MOST_LABELS = 9;

const last = (values) => values.findLastIndex((x) => x !== null && Number.isFinite(x));

const drawn = (spec) => spec.lines.filter((line) => line.show !== false);

function names(spec) {
  const lines = drawn(spec);
  return lines.filter((line) => line.label && (line.strong || lines.length <= MOST_LABELS));
}

const refWords = (spec, ref) => `${ref.label} ${spec.value(ref.value)}`;

const lineWords = (spec, line) => {
  const at = last(line.values);
  return line.strong && at >= 0 ? `${line.label} ${spec.value(line.values[at])}` : line.label;
};

/** Room at the right for the names of the lines. */
export function gutter(spec) {
  if (!spec.labels) return 10;
  const strong = names(spec).map((line) =>
    measure(lineWords(spec, line), 11.5, line.strong ? 600 : 400),
  );
  const refs = (spec.references ?? []).map((ref) => measure(refWords(spec, ref), 11.5));
  const parts = (spec.stack ?? []).map(({ name }) => measure(name, 11));
  return Math.ceil(Math.max(10, ...strong, ...refs, ...parts)) + 14;
}

// ------------------------------------------------------------------------------------- behind

export function behind(pen, plot) {
  const { area, spec } = plot;
  pen.clip(area.left, area.top, area.width, area.height, (inner) => {
    if (spec.stack) stack(inner, plot);
    if (spec.band) band(inner, plot);
  });
}

function stack(pen, plot) {
  const { spec, area } = plot;
  const xs = spec.x.values;
  const centre = spec.x.kind === "round";
  const left = (n) => plot.px(centre ? xs[n] - 0.5 : (xs[n - 1] ?? 0));
  const right = (n) => plot.px(centre ? xs[n] + 0.5 : xs[n]);
  // More rounds than pixels: draw every k-th, so that the picture costs no more than its width.
  const every = Math.max(1, Math.ceil(xs.length / area.width));
  const gap = xs.length && (area.width / xs.length) * every > 6 ? 1.5 : 0;
  let below = xs.map(() => 0);
  for (const { values, tint } of spec.stack) {
    const rects = [];
    const top = below.map((y, n) => y + (values[n] ?? 0));
    for (let n = 0; n < xs.length; n += every) {
      if (top[n] <= below[n]) continue;
      const x = left(n) + gap / 2;
      const width = Math.max(0.5, right(Math.min(xs.length - 1, n + every - 1)) - x - gap / 2);
      rects.push([x, plot.py(top[n]), width, plot.py(below[n]) - plot.py(top[n])]);
    }
    pen.rects(rects, { fill: colour("ink"), alpha: tint });
    below = top;
  }
}

function band(pen, plot) {
  const { spec } = plot;
  const [low, high] = spec.band.map((k) => spec.lines[k].values);
  const there = spec.x.values.map((x, n) => [x, low[n], high[n]]).filter((p) => p[1] !== null);
  const up = there.map(([x, , y]) => [plot.px(x), plot.py(y)]);
  const down = there.map(([x, y]) => [plot.px(x), plot.py(y)]).reverse();
  if (there.length > 1)
    pen.path([...up, ...down], { fill: colour("ink"), alpha: 0.1, close: true });
}

// ----------------------------------------------------------------------------------- in front

export function inFront(pen, plot) {
  const { area, spec } = plot;
  const right = area.left + area.width;
  for (const ref of spec.references ?? []) {
    const y = plot.py(ref.value);
    if (y < area.top || y > area.top + area.height) continue;
    pen.path(
      [
        [area.left, y],
        [right, y],
      ],
      { stroke: colour("soft"), dash: [5, 4] },
    );
    // Where there is no room beside the plot, a reference is named on its own line.
    const style = { fill: colour("soft"), size: 10.5, anchor: "end", halo: colour("paper") };
    const lines = spec.lines.map((line) => line.values[last(line.values)]);
    const under = lines.some((end) => end > ref.value);
    if (!spec.labels) pen.text(right - 2, under ? y + 13 : y - 4, refWords(spec, ref), style);
  }
  if (spec.marks)
    pen.clip(area.left - 8, area.top - 8, area.width + 16, area.height + 16, (p) => marks(p, plot));
  if (spec.labels) labels(pen, plot);
  if (spec.strip) strip(pen, plot);
  const bottom = area.top + area.height;
  pen.text(area.left - 10, bottom + 17, spec.x.label, { fill: colour("faint"), anchor: "end" });
}

function marks(pen, plot) {
  const { spec, area } = plot;
  const { values } = spec.lines[spec.marks.line];
  const xs = spec.x.values;
  const [from, to] = plot.group.range();
  const shown = xs.filter((x) => x >= from && x <= to).length;
  const dense = shown * 7 > area.width;
  let y = null;
  spec.rounds.forEach((round, n) => {
    y = values[n] ?? y;
    if (xs[n] < from || xs[n] > to || y === null) return;
    const at = [plot.px(xs[n]), plot.py(y)];
    if (round.state !== "committed")
      pen.circle(...at, 4, { fill: colour("paper"), stroke: colour("ink"), width: 1.5 });
    else if (!dense) pen.circle(...at, 3.2, { fill: colour("ink") });
    if (round.attempt > 1 && !dense) pen.circle(...at, 6.5, { stroke: colour("soft"), width: 1 });
  });
}

function labels(pen, plot) {
  const { spec, area } = plot;
  const [, to] = plot.group.range();
  const right = area.left + area.width;
  const inside = spec.x.values.findLastIndex((x) => x <= to);
  const ends = names(spec).flatMap((line) => {
    const at = last(line.values.slice(0, inside + 1));
    if (at < 0) return [];
    const words = lineWords(spec, line);
    const style = {
      fill: line.strong ? colour("ink") : line.colour(),
      weight: line.strong ? 600 : 400,
    };
    return [{ x: plot.px(spec.x.values[at]) + 9, y: plot.py(line.values[at]), words, ...style }];
  });
  const refs = (spec.references ?? []).map((ref) => ({
    x: right + 9,
    y: plot.py(ref.value),
    words: refWords(spec, ref),
    fill: colour("soft"),
    weight: 400,
  }));
  const widest = Math.max(0, ...ends.map((e) => e.x + measure(e.words, 11.5, e.weight)));
  const parts = (spec.stack ?? []).length ? stackNames(plot) : [];
  const columns = parts.length
    ? [parts]
    : widest + 12 > right
      ? [[...ends, ...refs]]
      : [ends, refs];
  for (const column of columns) {
    for (const { x, y, words, fill, weight } of apart(column, area))
      pen.text(x, y + 4, words, { fill, weight, size: 11.5, halo: colour("paper") });
  }
}

/** The parts of a stack are named beside its last bar. */
function stackNames(plot) {
  const { spec, group } = plot;
  const xs = spec.x.values;
  const n = xs.findLastIndex((x) => x <= group.range()[1]);
  if (n < 0) return [];
  const x = plot.px(Math.min(group.range()[1], spec.x.kind === "round" ? xs[n] + 0.5 : xs[n])) + 7;
  let below = 0;
  return spec.stack.flatMap(({ name, values }) => {
    const middle = below + (values[n] ?? 0) / 2;
    below += values[n] ?? 0;
    return values[n]
      ? [{ x, y: plot.py(middle), words: name, fill: colour("soft"), weight: 400 }]
      : [];
  });
}

/** Moves labels up and down until none lies on another. */
function apart(labels_, area) {
  const sorted = [...labels_].sort((a, b) => a.y - b.y).map((label) => ({ ...label }));
  const bottom = area.top + area.height;
  const run = (order, sign, edge) => {
    let before = edge;
    for (const label of order) {
      label.y = sign > 0 ? Math.max(label.y, before) : Math.min(label.y, before);
      before = label.y + sign * LABEL_GAP;
    }
  };
  run(sorted, 1, area.top);
  run([...sorted].reverse(), -1, bottom - 5);
  return sorted;
}

/** The schedule under the same axis: how the learning rate falls in each round, how long it is. */
function strip(pen, plot) {
  const { spec, area } = plot;
  const top = area.top + area.height + 28;
  const xs = spec.x.values;
  const { rounds } = spec;
  const most = Math.max(...rounds.map((r) => r.learning_rate?.[0] ?? 0), 0);
  const unit = Object.keys(rounds.at(-1)?.work ?? {})[0] ?? "epochs";
  const grey = { fill: colour("faint"), anchor: "end" };
  pen.text(area.left - 10, top + 13, "rate", grey);
  pen.text(area.left - 10, top + 33, unit, grey);
  pen.clip(area.left, top - 2, area.width, 48, (inner) => {
    const edge = [];
    const rests = [];
    let before = null;
    let free = -Infinity;
    rounds.forEach((round, n) => {
      const [a, b] = [plot.px(xs[n - 1] ?? 0), plot.px(xs[n])];
      if (round.learning_rate && most > 0) {
        const y = (rate) => top + 16 - 15 * (rate / most);
        const [high, low] = round.learning_rate;
        edge.push([a, top + 16], [a, y(high)], [b, y(low)], [b, top + 16], null);
        rests.push([a, top + 16, b - a, 0.6]);
      }
      const work = round.work[unit];
      if (work !== undefined && a >= free && (b - a > 22 || work !== before)) {
        inner.text(Math.max((a + b) / 2, area.left + 8), top + 33, plain(work), {
          fill: colour("soft"),
          anchor: "middle",
        });
        free = b - a > 22 ? a : a + 22;
        before = work;
      }
    });
    inner.path(edge, { fill: colour("ink"), alpha: 0.14 });
    inner.path(edge, { stroke: colour("soft"), width: rounds.length > 120 ? 0.5 : 1 });
    inner.rects(rests, { fill: colour("hair") });
  });
}

// ----------------------------------------------------------------- for files, not for the page

/** Axes and their numbers. */
export function frame(pen, plot) {
  const { area, spec, u } = plot;
  const { x, y } = u.scales;
  const bottom = area.top + area.height;
  const values = plot.yTicks(y.min, y.max);
  const words = tickWords(values, spec.y);
  for (const [k, value] of values.entries()) {
    const at = plot.py(value);
    pen.path(
      [
        [area.left, at],
        [area.left + area.width, at],
      ],
      { stroke: colour("hair") },
    );
    pen.text(area.left - 10, at + 4, words[k], { fill: colour("soft"), anchor: "end" });
  }
  for (const value of plot.xTicks(x.min, x.max)) {
    const at = plot.px(value);
    pen.path(
      [
        [at, bottom],
        [at, bottom + 4],
      ],
      { stroke: colour("hair") },
    );
    pen.text(at, bottom + 17, spec.x.format(value), { fill: colour("soft"), anchor: "middle" });
  }
}

/** The lines. */
export function curves(pen, plot) {
  const { area, spec } = plot;
  pen.clip(area.left, area.top, area.width, area.height, (inner) => {
    for (const line of drawn(spec)) {
      const points = line.values.map((y, n) =>
        y === null ? null : [plot.px(spec.x.values[n]), plot.py(y)],
      );
      const { width, dash, alpha } = line;
      inner.path(points, { stroke: line.colour(), width, dash, alpha });
    }
  });
}
