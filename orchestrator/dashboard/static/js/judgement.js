// How far the confidence can be trusted in one round, in numbers: all sites together, and each.

import { h } from "./dom.js";
import { score, scoreName } from "./format.js";
import { siteColour } from "./palette.js";

// Which scores, and whether they have another value behind the map.
const COLUMNS = ["ece", "aece", "classwise_ece", "nll", "coverage", "set_size"];

/** The set whose scores are shown: test data where a site has some. */
const setOf = (scores) => (Object.keys(scores).some((name) => name.startsWith("test.")) ? "test" : "val");

function cell(scores, set, key) {
  const name = `${set}.${key}`;
  if (!(name in scores)) return h("td", {}, "–");
  const after = scores[`${set}_calibrated.${key}`];
  const before = score(name, scores[name]);
  if (after === undefined) return h("td", {}, before);
  return h("td", {}, h("span", { class: "soft" }, `${before} → `), score(name, after));
}

/** @param round views.Round; @param names the run's sites, in the order of their colours */
export function judgement(round, names) {
  const set = setOf(round.scores);
  const columns = COLUMNS.filter((key) => `${set}.${key}` in round.scores);
  const at = new Map(names.map((name, k) => [name, k]));
  const row = (title, scores, key) =>
    h(
      "tr",
      {},
      h("th", { scope: "row" }, key, title),
      columns.map((column) => cell(scores, set, column)),
    );
  const sites = round.sites.filter((site) => Object.keys(site.scores).length);
  const dot = (name) =>
    at.has(name) ? h("i", { class: "key", style: { "--c": siteColour(at.get(name)) } }) : null;
  const { set: words } = scoreName(`${set}.ece`);
  return h(
    "table",
    { class: "plain", "data-table": "judgement" },
    h(
      "thead",
      {},
      h(
        "tr",
        {},
        h("th", { scope: "col" }, `${words}, before → after`),
        columns.map((key) => h("th", { scope: "col" }, scoreName(`${set}.${key}`).metric)),
      ),
    ),
    h(
      "tbody",
      {},
      row("all sites", round.scores, null),
      sites.map((site) => row(site.site, site.scores, dot(site.site))),
    ),
  );
}
