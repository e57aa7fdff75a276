// The small multiples: one question each, over the same rounds as the wide chart.

import { h } from "./dom.js";
import { isShare, number, percent, plain, score, scoreName, seconds } from "./format.js";
import { chosen, metricLines } from "./convergence.js";
import { colour, PHASES } from "./palette.js";
import { Panel } from "./panel.js";
import { bySite, named, phaseSeconds, pick, scoreNames, spread, tellsApart } from "./series.js";

export const small = () => (innerWidth < 640 ? 150 : 152);

const ink = () => colour("ink");
const soft = () => colour("soft");

export const one = (label, values, more = {}) => ({
  label,
  values,
  colour: ink,
  width: 2,
  strong: true,
  ...more,
});

function lossSpec({ run, rounds, x }) {
  return { x, rounds, lines: metricLines(run, rounds, "loss"), y: {}, value: (v) => number(v) };
}

function nllSpec({ run, rounds, x }) {
  const lines = metricLines(run, rounds, named(rounds, "nll"));
  return { x, rounds, lines, y: {}, value: (v) => number(v) };
}

/** Before and after calibration, where a set has both; else what there is. */
function eceNames(rounds) {
  const names = scoreNames(rounds);
  const after = names.find((name) => name.endsWith("_calibrated.ece")) ?? "";
  const before = after.replace("_calibrated", "");
  return { after, before: names.includes(before) ? before : named(rounds, "ece") };
}

export function eceSpec({ rounds, x }) {
  const { before, after } = eceNames(rounds);
  const lines = after
    ? [
        one("before", pick(rounds, before), {
          colour: soft,
          width: 1.25,
          dash: [4, 3],
          strong: false,
        }),
        one("after", pick(rounds, after)),
      ]
    : [one("global", pick(rounds, before))];
  return { x, rounds, lines, y: { share: true, zero: true }, value: (v) => percent(v) };
}

/** The score in which the sites are compared: the chosen one, or its like in which they differ. */
function compared(rounds) {
  const { name } = chosen(rounds);
  if (name === "loss" || tellsApart(rounds, name)) return name;
  return named(rounds, scoreName(name).key) || name;
}

function spreadSpec({ run, rounds, x }) {
  const name = compared(rounds);
  const of = (row) => (name === "loss" ? row.loss : row.scores[name]);
  const { low, middle, high } = spread(bySite(rounds, run.sites, of));
  const edge = { colour: soft, width: 0.75, strong: false };
  return {
    x,
    rounds,
    lines: [
      one("lowest", low, edge),
      one("median", middle, { width: 1.5 }),
      one("highest", high, edge),
    ],
    band: [0, 2],
    y: { share: isShare(name) },
    value: (v) => score(name, v),
  };
}

function changeSpec({ run, rounds, x }) {
  const values = rounds.map((round) => round.relative_change);
  return {
    x,
    rounds,
    lines: [one("", values)],
    references: run.epsilon === null ? [] : [{ label: "ε", value: run.epsilon }],
    y: { zero: true },
    value: (v) => plain(v),
    labels: true,
  };
}

function secondsSpec({ rounds, x }) {
  const values = phaseSeconds(rounds, PHASES);
  const stack = PHASES.map(({ name, tint }, k) => ({ name, tint, values: values[k] }));
  const total = rounds.map((_, n) => values.reduce((sum, line) => sum + (line[n] ?? 0), 0) || null);
  const parts = PHASES.map(({ name, tint }, k) => ({
    ...one(name, values[k], { strong: false }),
    show: false,
    tint,
  }));
  const lines = [{ ...one("total", total), show: false }, ...parts];
  return { x, rounds, stack, lines, y: {}, value: seconds, labels: true };
}

export class Multiples {
  constructor(group) {
    const make = (id, title, spec) => ({
      spec,
      panel: new Panel(group, { id, title, height: small }),
    });
    this.all = [
      make("loss", "Training loss", lossSpec),
      make("nll", "NLL", nllSpec),
      make("ece", "ECE, calibration error", eceSpec),
      make("spread", "Score, spread over the sites", spreadSpec),
      make("change", "Change of the model, |Δ| / |w|", changeSpec),
      make("seconds", "Seconds per round", secondsSpec),
    ];
    this.node = h(
      "div",
      { class: "multiples" },
      this.all.map(({ panel }) => panel.node),
    );
  }

  update(run, rounds, x) {
    const name = compared(rounds);
    const metric = name === "loss" ? "Loss" : scoreName(name).metric;
    for (const { spec, panel } of this.all) {
      if (panel.id === "spread") panel.retitle(`${metric}, spread over the sites`);
      panel.update(spec({ run, rounds, x }));
    }
  }
}
