// What a strategy keeps beside the model, drawn where the page knows how: the newest of a run.

import { h } from "./dom.js";
import { percent } from "./format.js";
import { drawExamples, examplesHeight, examplesTable, examplesWords } from "./examples.js";
import { files } from "./panel.js";
import { picture } from "./pen.js";
import { drawTree, treeHeight, treeTable } from "./tree.js";

const treeWords = ({ report }) => {
  const said = [
    `It says what the model says of ${percent(report.fidelity)} of inputs that it has not seen`,
  ];
  if (report.accuracy !== undefined)
    said.push(`it is right on ${percent(report.accuracy)} of the test data`);
  return `${said.join("; ")}.`;
};

/** Files by name: what they are called on the page, and how they are drawn. */
const KNOWN = {
  "tree.json": {
    id: "tree",
    title: "The model as a tree",
    words: treeWords,
    height: treeHeight,
    draw: drawTree,
    table: treeTable,
    there: () => true,
  },
  "condensed.json": {
    id: "examples",
    title: "Condensed examples",
    words: examplesWords,
    height: examplesHeight,
    draw: drawExamples,
    table: examplesTable,
    there: (facts) => facts.pixels.length > 0,
  },
};

const PICTURE = 1100;

export class Kept {
  /** @param strategy whose files are drawn */
  constructor(strategy) {
    this.strategy = strategy;
    this.node = h("div", { class: "kept" });
    this.shown = new Map();
    this.observer = new ResizeObserver(() => this.redraw());
    this.observer.observe(this.node);
  }

  update(run, rounds) {
    for (const name of Object.keys(KNOWN)) {
      const made = rounds.findLast((round) =>
        round.plugins.some((p) => p.name === this.strategy && p.files?.[name]),
      );
      if (!made) continue;
      const digest = made.plugins.find((p) => p.name === this.strategy).files[name];
      if (this.shown.get(name)?.digest === digest) continue;
      this.shown.set(name, { digest });
      this.fetch(run, made.round, name, digest);
    }
  }

  async fetch(run, round, name, digest) {
    const path = ["runs", run.id, "rounds", round, "kept", this.strategy, name];
    let facts = null;
    try {
      const answer = await fetch(`/api/${path.map(encodeURIComponent).join("/")}`);
      if (answer.ok) facts = await answer.json();
    } catch {
      facts = null;
    }
    if (this.shown.get(name)?.digest !== digest) return;
    const known = KNOWN[name];
    const figure = h("figure", { class: "panel", "data-chart": known.id });
    const title = `${known.title}, round ${round}`;
    if (facts === null) {
      figure.append(h("p", { class: "note" }, `${title}: retention did not keep it.`));
    } else {
      const saves = files(known.id, title, () => this.drawing(known, facts, title), figure);
      figure.append(
        h(
          "figcaption",
          {},
          h("div", { class: "caption" }, h("span", { class: "title" }, title), saves),
          h("p", { class: "soft" }, known.words(facts)),
        ),
        h("div", { class: "paper" }),
      );
    }
    this.shown.get(name).figure?.remove();
    this.shown.set(name, { digest, facts, figure, known, title });
    this.node.append(figure);
    this.redraw();
  }

  drawing(known, facts, title) {
    const width = PICTURE;
    return {
      title,
      width,
      height: known.height(facts, width),
      draw: (pen) => known.draw(pen, width, facts),
      table: () => ({ title, ...known.table(facts) }),
    };
  }

  redraw() {
    const width = Math.min(PICTURE, this.node.clientWidth);
    if (!width) return;
    for (const { facts, figure, known, title } of this.shown.values()) {
      if (!facts || !known.there(facts)) continue;
      const paper = figure.querySelector(".paper");
      if (paper.dataset.width === String(width)) continue;
      paper.dataset.width = width;
      paper.replaceChildren(
        picture(width, known.height(facts, width), title, (pen) => known.draw(pen, width, facts)),
      );
    }
  }

  destroy() {
    this.observer.disconnect();
  }
}
