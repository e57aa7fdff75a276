// What each strategy of the stack reports: its scalars as lines, and the rounds it did not take
// part in, with the reason.

import { go, read } from "./address.js";
import { copy, h } from "./dom.js";
import { isShare, number, percent, seconds } from "./format.js";
import { Group } from "./group.js";
import { Kept } from "./kept.js";
import { colour, siteColour, siteDash } from "./palette.js";
import { Panel } from "./panel.js";
import { picture } from "./pen.js";
import { one, small } from "./multiples.js";
import { axis, decided, Memory, shownOf } from "./series.js";
import { nothing } from "./empty.js";

const of = (round, name) => round.plugins.find((plugin) => plugin.name === name);

/** Keys that say the same of several sites, "teacher.north", are one chart: name to [site, key]. */
function charts(keys, sites) {
  const found = new Map();
  for (const key of keys) {
    const site = sites.find((name) => key.endsWith(`.${name}`)) ?? "";
    const name = site ? key.slice(0, -site.length - 1) : key;
    if (site && found.get(name)?.some(([other]) => !other)) found.set(key, [["", key]]);
    else found.set(name, [...(found.get(name) ?? []), [site, key]]);
  }
  return found;
}

/** A mark per round: full if it was done, hollow if it was skipped or held. */
function states(rounds, name, width) {
  const step = Math.min(14, width / Math.max(1, rounds.length));
  return picture(width, 16, `${name}: one mark per round`, (pen) => {
    rounds.forEach((round, k) => {
      const state = of(round, name)?.state;
      const x = 6 + k * step;
      if (state === "done")
        step > 7
          ? pen.circle(x, 8, 3, { fill: colour("soft") })
          : pen.rects([[x, 5, step, 6]], { fill: colour("soft") });
      else if (state)
        pen.circle(x, 8, 3.5, { stroke: colour("ink"), width: 1.5, fill: colour("paper") });
      else pen.rects([[x - 1.5, 7.5, 3, 1]], { fill: colour("faint") });
    });
  });
}

export class Strategies {
  constructor(root) {
    this.group = new Group();
    this.memory = new Memory();
    this.panels = new Map();
    this.sections = new Map();
    this.root = h("div", { class: "stack" });
    this.empty = nothing(
      "Here every strategy of the run will report its own numbers, from the first committed round on. ",
      h("code", {}, "farflung strategies"),
      " lists what there is.",
    );
    root.append(this.root, this.empty);
  }

  update({ run, rounds }) {
    const done = decided(rounds);
    if (!this.memory.changed(shownOf(run), ...done)) return;
    const x = axis(read().x, run, done);
    this.group.domain = x.domain;
    const seen = done.flatMap((round) => round.plugins.map((plugin) => plugin.name));
    const names = [...new Set([...run.strategies, ...seen])];
    this.empty.hidden = seen.length > 0;
    for (const name of names) this.section(name, done, x, run);
    if (!names.length)
      this.root.replaceChildren(h("p", {}, "No strategy: plain federated averaging."));
  }

  section(name, rounds, x, run) {
    let parts = this.sections.get(name);
    if (!parts) {
      parts = {
        head: h("div", { class: "heading" }),
        grid: h("div", { class: "multiples" }),
        kept: new Kept(name),
      };
      this.sections.set(name, parts);
      this.root.append(
        h("section", { class: "strategy", "data-strategy": name }, parts.head, parts.grid, parts.kept.node),
      );
    }
    const keys = [
      ...new Set(rounds.flatMap((round) => Object.keys(of(round, name)?.report ?? {}))),
    ];
    parts.grid.hidden = !keys.length;
    parts.head.replaceChildren(...this.headOf(name, rounds, keys.length));
    parts.kept.update(run, rounds);
    for (const [key, members] of charts(keys, run.sites)) {
      const id = `${name}.${key}`;
      if (!this.panels.has(id)) {
        const panel = new Panel(this.group, { id, title: key.replaceAll("_", " "), height: small });
        this.panels.set(id, panel);
        parts.grid.append(panel.node);
      }
      const lines = members.map(([site, from]) => {
        const values = rounds.map((round) => of(round, name)?.report[from] ?? null);
        if (!site) return one("", values);
        const k = run.sites.indexOf(site);
        return one(site, values, { colour: () => siteColour(k), dash: siteDash(k), width: 1.5 });
      });
      const all = lines.flatMap((line) => line.values);
      const share =
        (isShare(key) || ["teacher", "fidelity"].includes(key)) && all.every((v) => v === null || (v >= 0 && v <= 1));
      this.panels.get(id).update({
        x,
        rounds,
        lines,
        y: { share, zero: key === "teacher" },
        value: share ? (v) => percent(v) : (v) => number(v),
        choose: (round) => go({ view: "rounds", round }),
      });
    }
  }

  headOf(name, rounds, keys) {
    const there = rounds.filter((round) => of(round, name));
    const bad = there.filter((round) => of(round, name).state !== "done");
    const took = there.map((round) => of(round, name).seconds).filter((t) => t !== null);
    const words = [];
    const mean = (times) => seconds(times.reduce((a, b) => a + b, 0) / times.length);
    if (took.length) words.push(`${mean(took)} a round`);
    const burnt = there.map((round) => of(round, name).cpu_seconds ?? null).filter((t) => t !== null);
    if (burnt.length) words.push(`CPU ${mean(burnt)}`);
    if (!rounds.length) words.push("nothing reported yet");
    else if (!keys) words.push("reports no numbers of its own");
    const last = bad.at(-1);
    const plugin = last && of(last, name);
    const reason = plugin && `${plugin.state} in round ${last.round}: ${plugin.reason}`;
    const width = Math.min(720, this.root.clientWidth || 320);
    return [
      h("h2", {}, name),
      h("span", { class: "soft" }, words.join(" · ")),
      there.length
        ? h(
            "span",
            { class: "states" },
            states(rounds, name, Math.min(width, 14 * rounds.length + 8)),
          )
        : null,
      reason
        ? h(
            "p",
            { class: "soft" },
            `${reason[0].toUpperCase()}${reason.slice(1)}. `,
            copy(`${name} ${reason}`),
          )
        : null,
    ].filter(Boolean);
  }

  destroy() {
    for (const panel of this.panels.values()) panel.destroy();
    for (const { kept } of this.sections.values()) kept.destroy();
  }
}
