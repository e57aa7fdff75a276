// One site's time in one round, as a bar that can be read without its colour: a thread is
// waiting, a rising wedge fetches, a full bar trains, a low one prepares or encodes, a falling
// wedge sends.

import { colour } from "./palette.js";
import { ticks } from "./ticks.js";

export const BAR = 22;
const FULL = 14;

const HEIGHTS = {
  asked: [0.08, 0.08],
  waiting: [0.08, 0.08],
  preparing: [0.36, 0.36],
  fetching: [0.16, 1],
  training: [1, 1],
  encoding: [0.5, 0.5],
  sending: [1, 0.16],
};

/** A shape for what is done with a stretch of time, between two x. */
export function stretch(pen, state, x0, x1, fill) {
  const [a, b] = HEIGHTS[state] ?? [0.3, 0.3];
  const middle = BAR / 2;
  const [h0, h1] = [Math.max(1.5, a * FULL) / 2, Math.max(1.5, b * FULL) / 2];
  const x = Math.max(x1, x0 + 0.75);
  const corners = [
    [x0, middle - h0],
    [x, middle - h1],
    [x, middle + h1],
    [x0, middle + h0],
  ];
  const alpha =
    { training: 1, asked: 0.5, waiting: 0.6, preparing: 0.45, encoding: 0.7 }[state] ?? 0.75;
  pen.path(corners, { fill, alpha, close: true });
}

const BAD = new Set(["refused", "failed", "gone", "late", "left"]);

export const isBad = (state) => BAD.has(state);

/** What a site did with its time: the stretches before its answer was final. */
export const spans = (row) => row.phases.filter((phase) => phase.state in HEIGHTS);

/** Whether the site is still at it. */
export const isOpen = (row) =>
  row.phases.at(-1)?.end === null && row.phases.at(-1).state in HEIGHTS;

/** From the first stretch to the end of the last, in seconds; null before there is any. */
export function took(row, now) {
  const work = spans(row);
  return work.length ? (work.at(-1).end ?? now) - work[0].start : null;
}

/** Examples per second: the last that was heard, or what the whole training comes to. */
export function speed(row) {
  if (row.examples_per_s !== null) return row.examples_per_s;
  const training = row.phases.find((phase) => phase.state === "training");
  if (row.unit !== "epochs" || !row.planned || !row.examples || !training?.end) return null;
  return (row.examples * row.planned) / Math.max(1e-3, training.end - training.start);
}

/** The bar of a row; `domain` is [start, end] in seconds since the epoch. */
export function bar(pen, width, row, domain, fill, now) {
  const [start, end] = domain;
  const x = (t) => (width - 10) * Math.min(1, Math.max(0, (t - start) / (end - start || 1)));
  let last = start;
  for (const { state, start: from, end: to } of spans(row)) {
    last = to ?? Math.max(now, from);
    stretch(pen, state, x(from), x(last), fill);
  }
  if (isOpen(row) && row.eta_s) {
    // What is still to come is outlined, as far as it can be foreseen.
    const [a, b, middle] = [x(last), x(last + row.eta_s), BAR / 2];
    pen.path(
      [
        [a, middle - FULL / 2],
        [b, middle - FULL / 2],
        [b, middle + FULL / 2],
        [a, middle + FULL / 2],
      ],
      { stroke: fill, alpha: 0.7 },
    );
  }
  if (isBad(row.state)) {
    const [cx, cy, r] = [x(last) + 6, BAR / 2, 4];
    const cross = [[cx - r, cy - r], [cx + r, cy + r], null, [cx - r, cy + r], [cx + r, cy - r]];
    pen.path(cross, { stroke: colour("ink"), width: 1.75 });
  }
}

const SERVER = [
  ["reducing", 1],
  ["refining", 0.6],
  ["assessing", 0.35],
  ["committing", 1],
];

/** What the orchestrator does after the round has closed. */
export function serverBar(pen, width, round, domain) {
  if (round.closed === null) return;
  const x = (t) =>
    (width - 10) * Math.min(1, Math.max(0, (t - domain[0]) / (domain[1] - domain[0] || 1)));
  let at = round.closed;
  for (const [phase, share] of SERVER) {
    const length = round.seconds[phase] ?? 0;
    const h = FULL * share;
    if (length)
      pen.rects([[x(at), (BAR - h) / 2, Math.max(1, x(at + length) - x(at) - 0.5), h]], {
        fill: colour("ink"),
        alpha: 0.75,
      });
    at += length;
  }
}

/** Seconds under the bars. */
export function scale(pen, width, domain) {
  const span = domain[1] - domain[0];
  const unit = span > 300 ? 1 / 60 : 1;
  pen.path(
    [
      [0, 0.5],
      [width - 10, 0.5],
    ],
    { stroke: colour("hair") },
  );
  for (const t of ticks(0, span, Math.max(2, width / 90), { unit })) {
    const x = ((width - 10) * t) / span;
    if (x > width - 24) continue;
    pen.path(
      [
        [x, 0],
        [x, 4],
      ],
      { stroke: colour("hair") },
    );
    const words = `${Math.round(t * unit * 10) / 10}\u202f${unit === 1 ? "s" : "min"}`;
    pen.text(Math.max(x, 0), 16, words, {
      fill: colour("soft"),
      anchor: x < 12 ? "start" : "middle",
    });
  }
}
