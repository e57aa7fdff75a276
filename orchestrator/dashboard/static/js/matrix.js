// Every round of every site at once: how long each took and how it ended. It is also how a round
// is chosen: by click, or with the arrow keys.

import { h } from "./dom.js";
import { seconds } from "./format.js";
import { colour, siteColour } from "./palette.js";
import { files } from "./panel.js";
import { measure, moved, picture } from "./pen.js";
import { ticks } from "./ticks.js";
import { isBad, took } from "./timeline.js";

const AXIS = 22;
const TITLE = "Time of every site in every round";

const length = (row) => took(row, Date.now() / 1000) ?? 0;

export class Matrix {
  constructor(choose) {
    Object.assign(this, { choose, rounds: [], sites: [], selected: null });
    this.readout = h("div", { class: "readout" });
    this.host = h("div", {
      class: "matrix",
      tabindex: 0,
      role: "group",
      "aria-label": "Choose a round with the arrow keys",
    });
    this.node = h("figure", { class: "panel", "data-chart": "every-round" });
    const saves = files("every-round", TITLE, () => this.drawing(), this.node);
    this.node.append(
      h(
        "figcaption",
        {},
        h("div", { class: "caption" }, h("span", { class: "title" }, TITLE), saves),
        this.readout,
      ),
      this.host,
    );
    this.host.addEventListener("click", (event) => this.at(event, (n) => this.choose(n)));
    this.host.addEventListener("pointermove", (event) => this.at(event, (n) => this.show(n)));
    this.host.addEventListener("pointerleave", () => this.show(this.selected));
    this.host.addEventListener("keydown", (event) => this.onKey(event));
    this.observer = new ResizeObserver(() => this.draw());
    this.observer.observe(this.host);
  }

  update(run, rounds, selected) {
    Object.assign(this, { sites: run.sites, rounds, selected });
    this.draw();
    this.show(selected);
  }

  get left() {
    if (this.lane < 10) return 0;
    return Math.ceil(Math.max(0, ...this.sites.map((name) => measure(name, 12)))) + 18;
  }

  get lane() {
    return Math.max(4, Math.min(34, 340 / Math.max(1, this.sites.length)));
  }

  get cell() {
    return Math.max(
      0.5,
      Math.min(56, (this.host.clientWidth - this.left - 10) / Math.max(1, this.rounds.length)),
    );
  }

  at(event, does) {
    const box = this.host.getBoundingClientRect();
    const k = Math.floor((event.clientX - box.left - this.left) / this.cell);
    if (this.rounds[k]) does(this.rounds[k].round);
  }

  onKey(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const k = this.rounds.findIndex((round) => round.round === this.selected) + step;
    if (this.rounds[k]) this.choose(this.rounds[k].round);
  }

  show(n) {
    const round = this.rounds.find((r) => r.round === n);
    if (!round) return this.readout.replaceChildren();
    const rows =
      round.sites.length > 9 ? round.sites.filter((row) => isBad(row.state)) : round.sites;
    const value = (row) =>
      h(
        "span",
        { class: "value" },
        h("i", { class: "key", style: { "--c": siteColour(this.sites.indexOf(row.site)) } }),
        h("span", { class: "who" }, row.site),
        h("b", {}, seconds(length(row))),
        isBad(row.state) ? ` ${row.state}` : "",
      );
    this.readout.replaceChildren(h("span", { class: "when" }, `round ${n}`), ...rows.map(value));
  }

  draw() {
    const width = this.host.clientWidth;
    if (!width || !this.rounds.length) return;
    const height = this.sites.length * this.lane + AXIS;
    this.host.replaceChildren(picture(width, height, TITLE, (pen) => this.paint(pen, width)));
  }

  paint(pen, width) {
    const { rounds, sites, lane, cell, left } = this;
    // A round that hangs must not flatten all others: it is cut off instead.
    const longest = (some) =>
      Math.max(0, ...some.map((round) => Math.max(0, ...round.sites.map(length))));
    const most =
      1.15 * longest(rounds.filter((round) => round.closed !== null)) || longest(rounds) || 1;
    const gap = cell > 5 ? 2 : cell > 2 ? 0.5 : 0;
    const full = lane - (lane > 10 ? 6 : 1);
    const bottom = sites.length * lane;
    const at = rounds.findIndex((round) => round.round === this.selected);
    if (at >= 0)
      pen.rects([[left + at * cell - 1, 0, Math.max(2, cell + 1), bottom + 2]], {
        fill: colour("ink"),
        alpha: 0.1,
      });
    sites.forEach((site, k) => {
      const bars = [];
      const crosses = [];
      rounds.forEach((round, n) => {
        const row = round.sites.find((r) => r.site === site);
        if (!row) return;
        const x = left + n * cell;
        const h_ = Math.max(1, full * Math.min(1, length(row) / most));
        if (!isBad(row.state))
          return bars.push([x + gap / 2, (k + 1) * lane - h_, Math.max(0.5, cell - gap), h_]);
        const [cx, cy, r] = [
          x + cell / 2,
          (k + 1) * lane - full / 2,
          Math.min(4, cell / 2.5, full / 2),
        ];
        crosses.push(
          [cx - r, cy - r],
          [cx + r, cy + r],
          null,
          [cx - r, cy + r],
          [cx + r, cy - r],
          null,
        );
      });
      pen.rects(bars, { fill: siteColour(k), alpha: 0.85 });
      if (crosses.length) pen.path(crosses, { stroke: colour("ink"), width: lane > 10 ? 1.75 : 1 });
      if (lane >= 10)
        pen.text(0, (k + 1) * lane - Math.min(4, full / 4), site, {
          fill: colour("ink"),
          size: Math.min(12.5, lane - 1),
        });
    });
    pen.path(
      [
        [left, bottom + 0.5],
        [left + rounds.length * cell, bottom + 0.5],
      ],
      { stroke: colour("hair") },
    );
    const numbers = ticks(
      rounds[0].round,
      rounds.at(-1).round,
      Math.max(2, Math.min(16, width / 60)),
      { whole: true },
    );
    for (const n of numbers) {
      const k = rounds.findIndex((round) => round.round === n);
      if (k >= 0)
        pen.text(left + (k + 0.5) * cell, bottom + 16, String(n), {
          fill: colour("soft"),
          anchor: "middle",
        });
    }
  }

  drawing() {
    const width = this.host.clientWidth;
    return {
      title: TITLE,
      width,
      height: this.sites.length * this.lane + AXIS,
      draw: (pen) => moved(pen, 0, 0, (there) => this.paint(there, width)),
      table: () => ({
        title: "Seconds of every site in every round",
        columns: ["round", "site", "state", "seconds"],
        rows: this.rounds.flatMap((round) =>
          round.sites.map((row) => [round.round, row.site, row.state, length(row)]),
        ),
      }),
    };
  }

  destroy() {
    this.observer.disconnect();
  }
}
