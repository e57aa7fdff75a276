// Condensed examples, as the sites sent them: small pictures by class.

import { colour } from "./palette.js";

const TONES = 12;
const LABEL = 62;
const GAP = 3;
const MOST = 120;

const shade = (pixel) => Math.round((pixel / 255) * TONES);

/** Which site each example is from: they stand site by site, in the order of the sites' names. */
function origins(facts) {
  return Object.entries(facts.sites)
    .sort(([a], [b]) => (a < b ? -1 : 1))
    .flatMap(([site, counts]) =>
      Array(Object.values(counts).reduce((sum, n) => sum + n, 0)).fill(site),
    );
}

function laidOut(facts, width) {
  const from = origins(facts);
  const classes = [...new Set(facts.classes)].sort((a, b) => a - b);
  const rows = classes.map((label) => ({
    label,
    members: facts.classes
      .map((own, k) => ({ own, k, site: from[k] }))
      .filter(({ own }) => own === label),
  }));
  const most = Math.max(1, ...rows.map((row) => row.members.length));
  const side = Math.max(14, Math.min(46, (width - LABEL) / most - GAP));
  const perLine = Math.max(1, Math.floor((width - LABEL) / (side + GAP)));
  let y = 4;
  for (const row of rows) {
    row.y = y;
    y += Math.ceil(row.members.length / perLine) * (side + GAP) + 5;
  }
  return { rows, side, perLine, height: y + 4 };
}

export const examplesHeight = (facts, width) => laidOut(facts, width).height;

function one(pen, x, y, side, pixels, [channels, rows, columns]) {
  const cell = side / Math.max(rows, columns);
  const size = rows * columns;
  const tones = Array.from({ length: TONES + 1 }, () => []);
  for (let k = 0; k < size; k += 1) {
    let sum = 0;
    for (let c = 0; c < channels; c += 1) sum += pixels[c * size + k];
    const at = [x + (k % columns) * cell, y + Math.floor(k / columns) * cell];
    tones[shade(sum / channels)].push([...at, cell + 0.2, cell + 0.2]);
  }
  pen.rects([[x, y, cell * columns, cell * rows]], { fill: colour("picture-dark") });
  tones.forEach((cells, tone) => {
    if (tone && cells.length)
      pen.rects(cells, { fill: colour("picture-light"), alpha: tone / TONES });
  });
}

/** @param facts the file condensed.json that `fyi` keeps */
export function drawExamples(pen, width, facts) {
  const { rows, side, perLine } = laidOut(facts, width);
  let drawn = 0;
  for (const { label, members, y } of rows) {
    pen.text(0, y + side / 2 + 4, `class ${label}`, { fill: colour("soft") });
    members.forEach(({ k }, n) => {
      if (drawn >= MOST) return;
      const x = LABEL + (n % perLine) * (side + GAP);
      one(pen, x, y + Math.floor(n / perLine) * (side + GAP), side, facts.pixels[k], facts.shape);
      drawn += 1;
    });
  }
}

/** The same in words: how many of each class came from where. */
export function examplesTable(facts) {
  const rows = Object.entries(facts.sites).flatMap(([site, counts]) =>
    Object.entries(counts).map(([label, n]) => [site, label, n]),
  );
  return { columns: ["site", "class", "examples"], rows };
}

export function examplesWords(facts) {
  const sites = Object.entries(facts.sites).map(([site, counts]) => {
    const n = Object.values(counts).reduce((sum, x) => sum + x, 0);
    return `${n} from ${site}`;
  });
  return `Made at the sites from their own data, sent in round ${facts.round}: ${sites.join(", ")}. They may resemble single samples: treat them as you would the data.`;
}
