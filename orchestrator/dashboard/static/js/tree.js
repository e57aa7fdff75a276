// A soft decision tree: at each inner node the filter that an input is held against, and at each leaf
// what the tree says there. A line is as strong as the share of samples that comes along it.

import { percent } from "./format.js";
import { colour } from "./palette.js";

const TOP = 22;
const LEVEL = 84;
const LARGEST = 52;
const NARROWEST = 26;
const TONES = 8;
const SHOWN = 0.002; // of the samples: what fewer of them reach is left out

const best = (p) => p.indexOf(Math.max(...p));

/** Levels of inner nodes that have room; what lies below is summed up in one leaf. */
export const levels = (tree, width) =>
  Math.max(1, Math.min(tree.depth, Math.floor(Math.log2(width / NARROWEST))));

export const treeHeight = (tree, width) => TOP + levels(tree, width) * LEVEL + 46;

/** What the tree says below a node: the leaves' distributions by the share that reaches each. */
function below(tree, node) {
  const inner = tree.inner.length;
  if (node >= inner) return tree.leaves[node - inner];
  const [a, b] = [below(tree, 2 * node + 1), below(tree, 2 * node + 2)];
  const reached = a.reached + b.reached;
  const p = a.p.map((x, k) => (x * a.reached + b.p[k] * b.reached) / Math.max(reached, 1e-12));
  return { p, reached };
}

function filter(pen, x, y, side, values, [rows, columns]) {
  const cell = side / Math.max(rows, columns);
  const left = x - (cell * columns) / 2;
  const tones = new Map();
  values.forEach((value, k) => {
    const tone = Math.round((Math.abs(value) / 100) * TONES);
    if (!tone) return;
    const key = `${value > 0 ? "plus" : "minus"} ${tone}`;
    if (!tones.has(key)) tones.set(key, []);
    tones
      .get(key)
      .push([
        left + (k % columns) * cell,
        y + Math.floor(k / columns) * cell,
        cell + 0.3,
        cell + 0.3,
      ]);
  });
  pen.rects([[left, y, cell * columns, cell * rows]], { fill: colour("paper") });
  for (const [key, cells] of tones) {
    const [sign, tone] = key.split(" ");
    pen.rects(cells, { fill: colour(sign), alpha: Number(tone) / TONES });
  }
  const [w, h] = [cell * columns, cell * rows];
  const corners = [
    [left, y],
    [left + w, y],
    [left + w, y + h],
    [left, y + h],
  ];
  pen.path(corners, { stroke: colour("soft"), width: 0.75, close: true });
  return h;
}

/** @param tree the file tree.json that `soft_tree` keeps */
export function drawTree(pen, width, tree) {
  const depth = levels(tree, width);
  const place = (node) => {
    const level = Math.floor(Math.log2(node + 1));
    const step = width / 2 ** level;
    return { level, x: (node + 1 - 2 ** level + 0.5) * step, y: TOP + level * LEVEL, step };
  };
  const side = ({ step }) => Math.max(10, Math.min(LARGEST, step - 8));
  const share = (node) => below(tree, node).reached;
  const visible = (node) => share(node) >= SHOWN;
  const all = [...Array(2 ** (depth + 1) - 1).keys()].filter(visible);
  for (const node of all.slice(1)) {
    const [from, to] = [place((node - 1) >> 1), place(node)];
    pen.path(
      [
        [from.x, from.y + side(from) / 2],
        [to.x, to.y],
      ],
      { stroke: colour("ink"), width: 0.75 + 5 * share(node), alpha: 0.35 },
    );
  }
  for (const node of all) {
    const at = place(node);
    if (at.level < depth) {
      filter(pen, at.x, at.y, side(at), tree.inner[node].filter, tree.shape);
      continue;
    }
    const { p, reached } = below(tree, node);
    const word = String(best(p));
    pen.text(at.x, at.y + 13, word, {
      fill: colour("ink"),
      size: 13,
      weight: 600,
      anchor: "middle",
    });
    if (at.step < 34) continue;
    pen.text(at.x, at.y + 27, percent(Math.max(...p) / 100, 0), {
      fill: colour("soft"),
      size: 10,
      anchor: "middle",
    });
    pen.text(at.x, at.y + 40, percent(reached, 0), {
      fill: colour("faint"),
      size: 10,
      anchor: "middle",
    });
  }
  const root = place(0);
  const beside = root.x + side(root) / 2 + 10;
  if (width > 420) {
    pen.text(beside, root.y + 12, "blue in the input sends it right,", { fill: colour("soft") });
    pen.text(beside, root.y + 26, "orange to the left", { fill: colour("soft") });
  }
}

/** The same as numbers: each leaf with its class. */
export function treeTable(tree) {
  const rows = tree.leaves.map(({ p, reached }, k) => {
    const path = k.toString(2).padStart(tree.depth, "0");
    return [path.replaceAll("0", "L").replaceAll("1", "R"), best(p), Math.max(...p), reached];
  });
  return { columns: ["path", "class", "per cent", "share of samples"], rows };
}
