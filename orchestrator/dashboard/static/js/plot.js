// A chart over rounds: lines by uPlot, which also follows the pointer; what lies behind and beside
// the lines by ornaments.js. What it shows is a plain value, the spec:
//   { x, rounds, lines: [{ label, values, colour, width, dash, alpha, strong, show }], y: { share,
//     zero }, value, stack, band, references, marks, strip, labels, choose }
// Lines are complete; uPlot thins what lies in one pixel column, for the drawing only.

import uPlot from "../vendor/uplot/uPlot.esm.js";
import { colour, font } from "./palette.js";
import { CanvasPen } from "./pen.js";
import { behind, curves, frame, gutter, inFront, STRIP } from "./ornaments.js";
import { ticks, tickWords } from "./ticks.js";

const LEFT = 52;
const AXIS = 24;
const TOP = 10;

const shape = (spec) =>
  JSON.stringify([
    spec.lines.map((l) => [l.label, l.dash, l.width]),
    Boolean(spec.strip),
    Boolean(spec.labels),
  ]);

export class Plot {
  constructor(host, group, { height, hovered = () => {} }) {
    Object.assign(this, { host, group, height, hovered, u: null, spec: null, index: null });
    host.tabIndex = 0;
    host.addEventListener("keydown", (event) => this.onKey(event));
    this.observer = new ResizeObserver(() => this.resize());
    this.observer.observe(host);
    group.plots.add(this);
  }

  update(spec) {
    const same = this.spec && shape(this.spec) === shape(spec);
    this.spec = spec;
    if (!this.host.clientWidth) return;
    if (!this.u || !same) this.build();
    else this.refill();
    this.hovered(this.index);
  }

  refill() {
    this.u.setData(this.data(), false);
    this.rescale();
  }

  data() {
    return [this.spec.x.values, ...this.spec.lines.map((line) => line.values)];
  }

  build() {
    this.u?.destroy();
    this.host.replaceChildren();
    this.right = gutter(this.spec);
    this.u = new uPlot(this.options(), this.data(), this.host);
  }

  options() {
    const { spec, group } = this;
    const soft = () => colour("soft");
    const hair = { stroke: () => colour("hair"), width: 1 };
    const text = { stroke: soft, font: font(11), gap: 5 };
    return {
      width: this.host.clientWidth,
      height: this.height(),
      padding: [TOP, this.right, spec.strip ? STRIP : 0, 0],
      legend: { show: false },
      cursor: {
        y: false,
        drag: { x: true, y: false, setScale: false, dist: 6 },
        // Only the crosshair is shared: a brush would be read again on every chart's new scale.
        sync: {
          key: group.key,
          setSeries: false,
          filters: { pub: (type) => /move|leave/.test(type) },
        },
        bind: { dblclick: () => () => group.zoomTo(null), click: () => () => this.chosen() },
        points: {
          size: 6,
          width: 1.5,
          stroke: (_, k) => this.spec.lines[k - 1].colour(),
          fill: () => colour("paper"),
          show: (_, k) => (this.dotted(k - 1) ? document.createElement("div") : null),
        },
      },
      scales: {
        x: { time: false, range: () => group.range() },
        y: { range: () => this.yRange() },
      },
      axes: [
        {
          ...text,
          size: AXIS,
          grid: { show: false },
          ticks: { ...hair, size: 4 },
          border: { show: true, ...hair },
          splits: (u, _, low, high) => this.xTicks(low, high),
          values: (u, at) => at.map(this.spec.x.format),
        },
        {
          ...text,
          size: LEFT,
          grid: hair,
          ticks: { show: false },
          splits: (u, _, low, high) => this.yTicks(low, high),
          values: (u, at) => tickWords(at, this.spec.y),
        },
      ],
      series: [{}, ...spec.lines.map((line, k) => this.series(line, k))],
      hooks: {
        drawClear: [(u) => this.paint(u, behind)],
        draw: [(u) => this.paint(u, inFront)],
        setCursor: [(u) => this.onCursor(u)],
        setSelect: [(u) => this.onSelect(u)],
      },
    };
  }

  series(line, k) {
    const lonely = (u, index, from, to) => {
      const there = u.data[index].slice(from, to + 1).filter((x) => x !== null);
      return there.length === 1 && line.show !== false;
    };
    return {
      label: line.label,
      scale: "y",
      stroke: () =>
        this.spec.lines[k].show === false ? "transparent" : this.spec.lines[k].colour(),
      width: line.width ?? 1,
      dash: line.dash?.length ? line.dash : undefined,
      alpha: line.alpha ?? 1,
      points: { show: lonely, size: 4 },
    };
  }

  dotted(k) {
    const { lines } = this.spec;
    return lines[k].show !== false && (lines[k].strong || lines.length <= 10);
  }

  // ------------------------------------------------------------------------------- geometry

  get area() {
    const { left, top, width, height } = this.u.bbox;
    const k = devicePixelRatio;
    return { left: left / k, top: top / k, width: width / k, height: height / k };
  }

  px(value) {
    return this.area.left + this.u.valToPos(value, "x");
  }

  py(value) {
    return this.area.top + this.u.valToPos(value, "y");
  }

  xTicks(low, high) {
    const { whole, unit } = this.spec.x;
    const most = Math.max(2, Math.min(14, this.host.clientWidth / 60));
    return ticks(low, high, most, { whole, unit }).filter((x) => x > 0);
  }

  yTicks(low, high) {
    return ticks(low, high, Math.max(2, this.height() / 35));
  }

  yRange() {
    const { lines, x, references = [], stack, y } = this.spec;
    const [from, to] = this.group.range();
    let low = Infinity;
    let high = -Infinity;
    const take = (value) => {
      if (value === null || !Number.isFinite(value)) return;
      low = Math.min(low, value);
      high = Math.max(high, value);
    };
    x.values.forEach((at, n) => {
      if (at < from || at > to) return;
      for (const line of lines) take(line.values[n]);
    });
    for (const { value } of references) take(value);
    if (high < low) return [0, 1];
    if (y.zero || stack) low = 0;
    const span = high - low || Math.abs(high) || 1;
    return [y.zero || stack ? 0 : low - 0.06 * span, high + 0.08 * span];
  }

  // -------------------------------------------------------------------------------- drawing

  paint(u, draw) {
    this.u ??= u;
    draw(new CanvasPen(u.ctx, devicePixelRatio), this);
  }

  /** The whole chart on another paper. */
  draw(pen) {
    frame(pen, this);
    behind(pen, this);
    curves(pen, this);
    inFront(pen, this);
  }

  // ---------------------------------------------------------------------------- interaction

  onCursor(u) {
    const index = u.cursor.left < 0 ? null : (u.cursor.idx ?? null);
    if (index === this.index) return;
    this.index = index;
    this.hovered(index);
  }

  onSelect(u) {
    const { left, width } = u.select;
    if (width < 2) return;
    this.group.zoomTo([u.posToVal(left, "x"), u.posToVal(left + width, "x")]);
    u.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
  }

  onKey(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const last = this.spec.x.values.length - 1;
    if (event.key === "Escape") this.group.zoomTo(null);
    if (event.key === "Enter") this.chosen();
    if (!step || last < 0) return;
    event.preventDefault();
    const index = Math.max(0, Math.min(last, (this.index ?? last + (step < 0 ? 1 : 0)) + step));
    const left = this.u.valToPos(this.spec.x.values[index], "x");
    this.u.setCursor({ left, top: 1 }, true, true);
  }

  chosen() {
    if (this.index !== null) this.spec.choose?.(this.spec.rounds[this.index].round);
  }

  rescale() {
    if (!this.u) return;
    const [min, max] = this.group.range();
    this.u.batch(() => {
      this.u.setScale("x", { min, max });
      this.u.setScale("y", { min: null, max: null });
    });
  }

  resize() {
    const width = this.host.clientWidth;
    if (!width || !this.spec) return;
    if (!this.u) {
      this.build();
      this.hovered(null);
    } else if (this.u.width !== width || this.u.height !== this.height())
      this.u.setSize({ width, height: this.height() });
  }

  destroy() {
    this.observer.disconnect();
    this.group.plots.delete(this);
    this.u?.destroy();
  }
}
