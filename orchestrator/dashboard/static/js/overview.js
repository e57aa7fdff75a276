// The first screen of a run: convergence, what lies behind it, and the round that is under way.

import { read } from "./address.js";
import { Convergence } from "./convergence.js";
import { h } from "./dom.js";
import { sketch } from "./empty.js";
import { clock } from "./format.js";
import { Group } from "./group.js";
import { Multiples } from "./multiples.js";
import { axis, decided, Memory, shownOf } from "./series.js";
import { WorkTable } from "./worktable.js";

const MOST_LINES = 8;

export class Overview {
  constructor(root) {
    this.group = new Group();
    this.convergence = new Convergence(this.group);
    this.multiples = new Multiples(this.group);
    this.now = new WorkTable("now", "The round now");
    this.log = h("section", { class: "log", hidden: true });
    this.charts = h("div", {}, this.convergence.node, this.multiples.node);
    this.memory = new Memory();
    this.soon = h("p", { class: "soft" });
    this.first = h(
      "section",
      { class: "empty below", hidden: true },
      this.soon,
      h("div", { class: "sketch" }, sketch()),
    );
    root.append(this.charts, this.now.node, this.first, this.log);
  }

  update({ run, rounds, lines }) {
    const done = decided(rounds);
    this.charts.hidden = !done.length;
    this.first.hidden = done.length > 0;
    this.soon.textContent = run.current
      ? `The charts begin when round ${run.current} is committed, with a dot for it here:`
      : "No round has ended. The charts will begin with the first one:";
    if (done.length && this.memory.changed(shownOf(run), ...done)) this.showCharts(run, done);
    this.showNow(run, rounds);
    this.showLog(lines);
  }

  showCharts(run, done) {
    const x = axis(read().x, run, done);
    this.group.domain = x.domain;
    this.convergence.update(run, done, x);
    this.multiples.update(run, done, x);
  }

  showNow(run, rounds) {
    const round = rounds.at(-1);
    this.now.node.hidden = !round;
    if (!round) return;
    const open = run.current === round.round;
    const title = open ? `Round ${round.round}, now` : `Round ${round.round}, the last`;
    this.now.update(round, run.sites, title, open);
  }

  showLog(lines) {
    this.log.hidden = !lines.length;
    this.log.replaceChildren(
      h("h2", {}, "What happened"),
      h(
        "ol",
        {},
        lines
          .slice(0, MOST_LINES)
          .map(({ time, text, level }) =>
            h("li", { class: level }, h("time", {}, clock(time)), " ", text),
          ),
      ),
    );
  }

  destroy() {
    this.convergence.panel.destroy();
    for (const { panel } of this.multiples.all) panel.destroy();
    this.now.destroy();
  }
}
