// Can the confidence be trusted: reliability before and after, for any round, and how it went.

import { go, read } from "./address.js";
import { h } from "./dom.js";
import { number, percent, scoreName } from "./format.js";
import { Group } from "./group.js";
import { judgement } from "./judgement.js";
import { eceSpec, one, small } from "./multiples.js";
import { siteColour, siteDash } from "./palette.js";
import { files, Panel } from "./panel.js";
import { moved, picture } from "./pen.js";
import { diagram, diagramHeight } from "./reliability.js";
import { axis, bySite, decided, Memory, named, pick, shownOf } from "./series.js";
import { nothing } from "./empty.js";

// What a map was asked for, and not what was fitted.
const SETTINGS = new Set(["alpha", "cell", "penalty", "free_ranks"]);

/** Every number inside a fitted map, by its path; of lists only how long they are. */
function flat(value, path = "") {
  if (typeof value === "number") return [[path, value]];
  if (Array.isArray(value)) return [[`${path} count`, value.length]];
  if (value === null || typeof value !== "object") return [];
  return Object.entries(value)
    .filter(([key]) => !SETTINGS.has(key))
    .flatMap(([key, inner]) => flat(inner, path ? `${path} ${key}` : key));
}

const words = (path) => [...new Set(path.replaceAll("_", " ").split(" "))].join(" ");

export class Calibration {
  constructor(root) {
    this.group = new Group();
    this.memory = new Memory();
    this.round = null;
    this.slider = h("input", {
      type: "range",
      step: 1,
      "aria-label": "Round",
      oninput: () => go({ round: this.rounds[this.slider.value].round }),
    });
    this.title = h("h2", { class: "big" });
    this.pictures = h("div", { class: "diagrams" });
    this.figure = h("figure", { class: "panel", "data-chart": "reliability" });
    this.fitted = h("p", { class: "soft" });
    this.table = h("div", { class: "scroll" });
    this.ece = new Panel(this.group, {
      id: "calibration-ece",
      title: "ECE, calibration error",
      height: small,
    });
    this.coverage = new Panel(this.group, {
      id: "calibration-coverage",
      title: "Coverage, conformal sets",
      height: small,
    });
    this.maps = new Panel(this.group, {
      id: "calibration-map",
      title: "Fitted map",
      height: small,
    });
    const saves = files("reliability", "Reliability", () => this.drawing(), this.figure);
    this.figure.append(
      h("figcaption", { class: "caption" }, this.title, saves),
      this.slider,
      this.fitted,
      this.pictures,
      this.table,
    );
    this.body = h(
      "div",
      { class: "calibration" },
      this.figure,
      h("div", { class: "multiples" }, this.ece.node, this.coverage.node, this.maps.node),
    );
    this.empty = nothing(
      "Here the model’s confidence will be held against how often it is right, before and after calibration, round by round. Add a calibration strategy to the run file, ",
      h("code", {}, '[[strategy]] name = "temperature"'),
      ", or wait for the first round that is assessed.",
    );
    root.append(this.body, this.empty);
    this.observer = new ResizeObserver(() => this.draw());
    this.observer.observe(this.pictures);
  }

  update({ run, rounds }) {
    const done = decided(rounds);
    if (!this.memory.changed(shownOf(run), ...done)) return;
    this.rounds = done.filter((round) => Object.keys(round.reliability).length);
    this.body.hidden = !this.rounds.length;
    this.empty.hidden = this.rounds.length > 0;
    if (!this.rounds.length) return;
    const wanted = this.rounds.findIndex((round) => round.round === read().round);
    const at = wanted < 0 ? this.rounds.length - 1 : wanted;
    this.round = this.rounds[at];
    this.slider.max = this.rounds.length - 1;
    this.slider.value = at;
    this.title.textContent = `Reliability after round ${this.round.round}`;
    const fitted = flat(this.round.calibration).map(([path, x]) => `${words(path)} ${number(x)}`);
    this.fitted.textContent = fitted.length ? `Fitted: ${fitted.join(" · ")}` : "";
    this.table.replaceChildren(judgement(this.round, run.sites));
    this.draw();
    const x = axis(read().x, run, done);
    this.group.domain = x.domain;
    const choose = (round) => go({ round });
    this.ece.update({ ...eceSpec({ rounds: done, x }), choose });
    this.cover(run, done, { x, choose });
    const paths = [
      ...new Set(done.flatMap((round) => flat(round.calibration).map(([path]) => path))),
    ];
    const lines = paths.map((path) => {
      const values = done.map(
        (round) => flat(round.calibration).find(([p]) => p === path)?.[1] ?? null,
      );
      return one(words(path), values, { width: 1.5 });
    });
    this.maps.node.hidden = !lines.length;
    if (lines.length)
      this.maps.update({ x, rounds: done, lines, y: {}, value: (v) => number(v), choose });
  }

  /** How often sets hold the right class: together, at each site, and as was asked for. */
  cover(run, done, { x, choose }) {
    const name = named(done, "coverage");
    this.coverage.node.hidden = !name;
    if (!name) return;
    const many = run.sites.length > 9;
    const sites = bySite(done, run.sites, (row) => row.scores[name]).map((values, k) => ({
      label: run.sites[k],
      values,
      colour: () => siteColour(k),
      dash: siteDash(k),
      width: many ? 0.5 : 1,
      alpha: many ? 0.5 : 0.8,
    }));
    const asked = this.round.calibration.conformal?.alpha;
    this.coverage.update({
      x,
      rounds: done,
      lines: [...sites, one("all", pick(done, name))],
      references: asked === undefined ? [] : [{ label: "asked", value: 1 - asked }],
      y: { share: true },
      value: (v) => percent(v),
      choose,
    });
  }

  curves() {
    return Object.entries(this.round.reliability)
      .sort(([a], [b]) => a.localeCompare(b))
      .map(([name, curve]) => {
        const ece = this.round.scores[`${name}.ece`];
        const { set } = scoreName(`${name}.ece`);
        const title = ece === undefined ? set : `${set} · ECE ${percent(ece)}`;
        return { curve, title };
      });
  }

  draw() {
    const width = this.pictures.clientWidth;
    if (!this.round || !width) return;
    const curves = this.curves();
    const columns = width < 560 ? 1 : Math.min(curves.length, 3);
    const size = Math.min(400, (width - 32 * (columns - 1)) / columns);
    this.pictures.replaceChildren(
      ...curves.map(({ curve, title }) =>
        picture(size, diagramHeight(size), `Reliability, ${title}`, (pen) =>
          diagram(pen, size, curve, title),
        ),
      ),
    );
  }

  drawing() {
    const curves = this.round ? this.curves() : [];
    const size = 400;
    return {
      title: this.title.textContent,
      width: curves.length * (size + 20),
      height: diagramHeight(size),
      draw: (pen) =>
        curves.forEach(({ curve, title }, k) =>
          moved(pen, k * (size + 20), 0, (there) => diagram(there, size, curve, title)),
        ),
      table: () => ({
        title: this.title.textContent,
        columns: ["set", "bin", "count", "confidence", "accuracy"],
        rows: curves.flatMap(({ curve, title }) =>
          curve.count.map((n, k) => [title, k + 1, n, curve.confidence[k], curve.accuracy[k]]),
        ),
      }),
    };
  }

  destroy() {
    this.observer.disconnect();
    this.ece.destroy();
    this.coverage.destroy();
    this.maps.destroy();
  }
}
