// The one wide chart: how the global model gets better, each site behind it, what it is held
// against, and the schedule that made it so.

import { go, read } from "./address.js";
import { h } from "./dom.js";
import { isShare, plain, score, scoreName } from "./format.js";
import { colour, siteColour, siteDash } from "./palette.js";
import { Panel } from "./panel.js";
import {
  bySite,
  mean,
  named,
  pick,
  references,
  scoreNames,
  tellsApart,
  workWords,
} from "./series.js";

const height = () => (innerWidth < 640 ? 290 : 336);

/** Lines of one metric: the global model, and the same at every site. "loss" is the training loss. */
export function metricLines(run, rounds, name) {
  const many = run.sites.length > 9;
  const training = name === "loss";
  const sites = bySite(rounds, run.sites, (row) => (training ? row.loss : row.scores[name]));
  const global = training ? mean(sites) : pick(rounds, name);
  const thin = sites.map((values, k) => ({
    label: run.sites[k],
    values,
    colour: () => siteColour(k),
    dash: siteDash(k),
    width: many ? 0.75 : 1.25,
    alpha: many ? 0.5 : 0.9,
  }));
  const strong = {
    label: training ? "mean" : "global",
    values: global,
    colour: () => colour("ink"),
    width: 2.25,
    strong: true,
  };
  // The strong line is drawn last, over the others.
  return training || tellsApart(rounds, name) ? [...thin, strong] : [strong];
}

/** The score that is shown: the one that was chosen, or the first there is. */
export function chosen(rounds) {
  const names = [...scoreNames(rounds), "loss"];
  const { metric } = read();
  return { names, name: names.includes(metric) ? metric : named(rounds, "accuracy") || names[0] };
}

function title(name) {
  if (name === "loss") return "Training loss";
  const { set, metric } = scoreName(name);
  return set ? `${metric}, ${set}` : metric;
}

function steps() {
  const words = ["round", "bytes", "hours"].map((x) => {
    const node = h("button", { type: "button", class: "word option", onclick: () => go({ x }) }, x);
    return [x, node];
  });
  const node = h(
    "span",
    { class: "switch", role: "group", "aria-label": "Axis" },
    h("span", {}, "by "),
    words.map(([, w]) => w),
  );
  const update = (x) =>
    words.forEach(([name, w]) => w.setAttribute("aria-pressed", String(name === x)));
  return { node, update };
}

export class Convergence {
  constructor(group) {
    this.select = h("select", {
      class: "metric",
      "aria-label": "Score",
      onchange: () => go({ metric: this.select.value }),
    });
    this.axis = steps();
    const head = h("span", { class: "controls" }, this.select, this.axis.node);
    this.panel = new Panel(group, { id: "convergence", title: "Convergence", height, head });
    this.panel.node.classList.add("wide");
    this.node = this.panel.node;
  }

  update(run, rounds, x) {
    const { names, name } = chosen(rounds);
    this.options(names, name);
    this.axis.update(x.kind);
    this.panel.retitle(title(name));
    const lines = metricLines(run, rounds, name);
    this.panel.update({
      x,
      rounds,
      lines,
      y: { share: isShare(name) },
      value: (v) => score(name, v),
      references: references(run, name),
      marks: { line: lines.length - 1 },
      strip: true,
      labels: innerWidth >= 520,
      more: (round) => this.more(run, round),
      choose: (round) => go({ view: "rounds", round }),
    });
  }

  options(names, name) {
    const known = [...this.select.options].map((option) => option.value);
    if (known.join() !== names.join())
      this.select.replaceChildren(...names.map((n) => h("option", { value: n }, title(n))));
    this.select.value = name;
  }

  more(run, round) {
    const words = [];
    if (round.state !== "committed") words.push(round.state);
    if (round.round === run.best) words.push("best so far");
    if (round.attempt > 1) words.push(`attempt ${round.attempt}`);
    if (round.learning_rate) words.push(`rate ${round.learning_rate.map(plain).join(" → ")}`);
    words.push(workWords(round.work));
    return words.join(" · ");
  }
}
