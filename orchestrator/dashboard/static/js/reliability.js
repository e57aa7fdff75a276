// A reliability diagram: how often the model is right, against how sure it says that it is; and
// how many answers each bin stands for. On the diagonal, its word can be taken.

import { count, percent } from "./format.js";
import { colour } from "./palette.js";

const LEFT = 44;
const BELOW = 64;

/** @param curve views.Reliability */
export function diagram(pen, size, curve, title) {
  const side = size - LEFT - 12;
  const top = 26;
  const x = (share) => LEFT + share * side;
  const y = (share) => top + (1 - share) * side;
  const hair = { stroke: colour("hair") };
  const grey = { fill: colour("soft") };
  pen.text(LEFT, 13, title, { fill: colour("ink"), weight: 600, size: 12 });
  for (const share of [0, 0.5, 1]) {
    pen.path(
      [
        [x(0), y(share)],
        [x(1), y(share)],
      ],
      hair,
    );
    pen.text(LEFT - 8, y(share) + 4, percent(share, 0), { ...grey, anchor: "end" });
    pen.text(x(share), y(0) + BELOW + 12, percent(share, 0), {
      ...grey,
      anchor: share === 0 ? "start" : share === 1 ? "end" : "middle",
    });
  }
  pen.path(
    [
      [x(0), y(0)],
      [x(1), y(1)],
    ],
    { stroke: colour("soft"), dash: [5, 4] },
  );
  const bins = curve.count.map((n, k) => ({ n, c: curve.confidence[k], a: curve.accuracy[k] }));
  const there = bins.filter(({ n, c, a }) => n > 0 && c !== null && a !== null);
  // The gap to the diagonal is what the calibration error sums up, so it is what is drawn.
  for (const { c, a } of there)
    pen.path(
      [
        [x(c), y(c)],
        [x(c), y(a)],
      ],
      { stroke: colour("ink"), width: 5, alpha: 0.16 },
    );
  pen.path(
    there.map(({ c, a }) => [x(c), y(a)]),
    { stroke: colour("ink"), width: 1.5 },
  );
  for (const { c, a } of there) pen.circle(x(c), y(a), 3.2, { fill: colour("ink") });
  const most = Math.max(1, ...curve.count);
  const width = side / curve.count.length;
  const floor = y(0) + BELOW - 4;
  const bars = curve.count.map((n, k) => {
    const height = (BELOW - 22) * (n / most);
    return [x(0) + k * width + 1, floor - height, width - 2, height];
  });
  pen.rects(bars, { fill: colour("ink"), alpha: 0.3 });
  pen.path(
    [
      [x(0), floor + 0.5],
      [x(1), floor + 0.5],
    ],
    hair,
  );
  pen.text(LEFT - 8, floor, "0", { ...grey, anchor: "end" });
  pen.text(LEFT - 8, floor - (BELOW - 22) + 8, count(most), { ...grey, anchor: "end" });
  pen.text(x(0.5), y(0) + BELOW + 28, "confidence", { ...grey, anchor: "middle" });
  pen.text(x(0) + 6, y(1) + 13, "accuracy", grey);
}

export const diagramHeight = (size) => size - LEFT - 12 + 26 + BELOW + 34;
