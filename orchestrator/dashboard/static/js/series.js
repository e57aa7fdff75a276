// From rounds to lines: everything that a chart shows, as plain arrays over the same rounds.

import { bytes, plain, scoreName } from "./format.js";

const DECIDED = new Set(["committed", "held", "abandoned"]);

/** Rounds that have an outcome, and so a place on an axis. */
export const decided = (rounds) => rounds.filter((round) => DECIDED.has(round.state));

const ended = (round) => round.committed ?? round.closed ?? round.started;

/** Where each round lies on the axis that was chosen, and how the axis is labelled. */
export function axis(kind, run, rounds) {
  if (kind === "bytes") {
    let sum = 0;
    const values = rounds.map((round) => (sum += round.wire_bytes));
    return { kind, label: "sent", values, domain: [0, sum || 1], format: bytes, whole: false };
  }
  if (kind === "hours") {
    const start = run.started ?? run.created;
    const values = rounds.map((round) => Math.max(0, (ended(round) - start) / 3600));
    const last = values.at(-1) || 1;
    const minutes = last < 2;
    const format = minutes ? (x) => plain(x * 60) : plain;
    return {
      kind,
      label: minutes ? "minutes" : "hours",
      values,
      domain: [0, last],
      format,
      unit: minutes ? 60 : 1,
    };
  }
  const values = rounds.map((round) => round.round);
  const last = values.at(-1) ?? 0;
  // What is still to come has its place on the axis, unless it would squeeze what is there.
  const end = Math.max(1, Math.min(run.rounds, Math.max(last * 2.5, 8)));
  const domain = [0, Math.max(end, last) + 0.5];
  return { kind: "round", label: "round", values, domain, format: plain, whole: true };
}

export const starts = (xs) => xs.map((_, k) => (k ? xs[k - 1] : 0));

export const pick = (rounds, key) => rounds.map((round) => round.scores[key] ?? null);

/** One line per site: `of(row)` of the site's row in each round. */
export function bySite(rounds, sites, of) {
  const at = new Map(sites.map((name, k) => [name, k]));
  const lines = sites.map(() => new Array(rounds.length).fill(null));
  rounds.forEach((round, n) => {
    for (const row of round.sites) {
      const k = at.get(row.site);
      if (k !== undefined) lines[k][n] = of(row) ?? null;
    }
  });
  return lines;
}

const finite = (values) => values.filter((x) => x !== null && Number.isFinite(x));

export function mean(lines) {
  if (!lines.length) return [];
  return lines[0].map((_, n) => {
    const there = finite(lines.map((line) => line[n]));
    return there.length ? there.reduce((a, b) => a + b, 0) / there.length : null;
  });
}

/** Lowest, middle and highest of the sites, round by round. */
export function spread(lines) {
  const found = { low: [], middle: [], high: [] };
  if (!lines.length) return found;
  lines[0].forEach((_, n) => {
    const there = finite(lines.map((line) => line[n])).sort((a, b) => a - b);
    const half = (there.length - 1) / 2;
    found.low.push(there[0] ?? null);
    found.high.push(there.at(-1) ?? null);
    found.middle.push(there.length ? (there[Math.floor(half)] + there[Math.ceil(half)]) / 2 : null);
  });
  return found;
}

// The first is also the one that the status line speaks of.
const ORDER = ["test.accuracy", "val.accuracy", "test.nll", "val.nll", "test.ece", "val.ece"];

/** Names of the scores there are, those that people look at first in front. */
export function scoreNames(rounds) {
  const names = new Set(rounds.flatMap((round) => Object.keys(round.scores)));
  const rank = (name) => (ORDER.includes(name) ? ORDER.indexOf(name) : ORDER.length);
  return [...names].sort((a, b) => rank(a) - rank(b) || a.localeCompare(b));
}

/** Whether the sites' scores tell them apart; on one test set for all, they are all the same. */
export function tellsApart(rounds, name) {
  const last = rounds.findLast((round) => name in round.scores);
  const sites = last?.sites.map((row) => row.scores[name]).filter((x) => x !== undefined) ?? [];
  return sites.some((x) => Math.abs(x - last.scores[name]) > 1e-9);
}

/** Which score of a metric to show: one in which the sites differ, if there is one. */
export function named(rounds, metric, sets = ["test", "val", ""]) {
  const names = scoreNames(rounds);
  const there = sets
    .map((set) => (set ? `${set}.${metric}` : metric))
    .filter((n) => names.includes(n));
  return there.find((name) => tellsApart(rounds, name)) ?? there[0] ?? "";
}

/** References that belong to a score: "centralised", or "centralised.test.accuracy". */
export function references(run, score) {
  const { key } = scoreName(score);
  const found = [];
  for (const [name, value] of Object.entries(run.references)) {
    const [label, ...rest] = name.split(".");
    const fits =
      rest.length === 0 ? key === "accuracy" : rest.join(".") === score || rest.join(".") === key;
    if (fits) found.push({ label: label.replaceAll("_", " "), value });
  }
  return found;
}

/** Seconds of each drawn phase, from the ledger's finer ones. */
export function phaseSeconds(rounds, phases) {
  return phases.map(({ parts }) =>
    rounds.map((round) => {
      const there = parts.filter((part) => part in round.seconds);
      return there.length ? there.reduce((sum, part) => sum + round.seconds[part], 0) : null;
    }),
  );
}

export function workWords(work) {
  const words = Object.entries(work).map(([unit, n]) => `${plain(n)} ${unit}`);
  return words.join(", ") || "–";
}

/** Remembers what a drawing was made from, so that it is not made again from the same. */
export class Memory {
  constructor() {
    this.items = [];
  }

  /** Whether any item is another object, or another value, than the last time. */
  changed(...items) {
    const same = items.length === this.items.length && items.every((x, k) => x === this.items[k]);
    this.items = items;
    return !same;
  }
}

/** What of a run its charts show; progress alone changes none of it. */
export const shownOf = (run) =>
  JSON.stringify([
    run.id,
    run.rounds,
    run.current,
    run.best,
    run.epsilon,
    run.references,
    run.sites,
    location.hash,
  ]);
