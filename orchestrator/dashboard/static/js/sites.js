// The data centers: who is there, how far each drifts, how much each weighs, what its link carries.

import { go, read } from "./address.js";
import { h } from "./dom.js";
import { bytes, date, number, percent, seconds } from "./format.js";
import { Group } from "./group.js";
import { noSites } from "./empty.js";
import { small } from "./multiples.js";
import { siteColour, siteDash } from "./palette.js";
import { Panel } from "./panel.js";
import { isOpen, speed, took } from "./timeline.js";
import { axis, bySite, decided, Memory, shownOf } from "./series.js";

const length = (row) => (isOpen(row) ? null : took(row));

const CHARTS = [
  {
    id: "drift",
    title: "Drift, norm of the contribution",
    of: (row) => row.norm,
    value: (x) => number(x),
  },
  {
    id: "weight",
    title: "Weight in the mean",
    of: (row) => row.weight,
    share: true,
    value: (x) => percent(x),
    zero: true,
  },
  {
    id: "speed",
    title: "Examples per second",
    of: speed,
    value: (x) => number(x),
    zero: true,
  },
  { id: "duration", title: "Seconds in the round", of: length, value: seconds, zero: true },
];

const ago = (t) => (t === null ? "" : `for ${seconds(Math.max(0, Date.now() / 1000 - t))}`);

export class Sites {
  constructor(root) {
    this.group = new Group();
    this.memory = new Memory();
    this.list = h("div", { class: "scroll" });
    this.empty = noSites();
    this.charts = CHARTS.map((chart) => ({
      ...chart,
      panel: new Panel(this.group, { ...chart, height: small }),
    }));
    this.grid = h(
      "div",
      { class: "multiples two" },
      this.charts.map(({ panel }) => panel.node),
    );
    root.append(this.empty, this.list, this.grid);
  }

  update({ run, rounds, sites }) {
    this.empty.hidden = sites.length > 0;
    this.list.hidden = !sites.length;
    this.table(run, rounds, sites);
    this.grid.hidden = !run;
    if (!run) return;
    const done = decided(rounds);
    if (!this.memory.changed(shownOf(run), ...done)) return;
    const x = axis(read().x, run, done);
    this.group.domain = x.domain;
    const many = run.sites.length > 9;
    for (const { panel, of, share, value, zero } of this.charts) {
      const lines = bySite(done, run.sites, of).map((values, k) => ({
        label: run.sites[k],
        values,
        colour: () => siteColour(k),
        dash: siteDash(k),
        width: many ? 0.75 : 1.5,
        alpha: many ? 0.6 : 1,
      }));
      const choose = (round) => go({ view: "rounds", round });
      panel.update({ x, rounds: done, lines, y: { share, zero }, value, choose });
    }
  }

  table(run, rounds, sites) {
    const rows = new Map(
      sites.map((site) => [site.name, { counted: 0, asked: 0, received: 0, sent: 0 }]),
    );
    for (const round of decided(rounds)) {
      for (const work of round.sites) {
        const sum = rows.get(work.site);
        if (!sum) continue;
        sum.asked += 1;
        sum.counted += work.state === "counted";
        sum.received += work.received_bytes;
        sum.sent += work.sent_bytes;
      }
    }
    const head = [
      "Site",
      "State",
      "Counted",
      "Received",
      "Sent",
      "Device",
      "Version",
      "Certificate until",
    ];
    const index = new Map((run?.sites ?? []).map((name, k) => [name, k]));
    const key = (name) =>
      index.has(name)
        ? h("i", { class: "key", style: { "--c": siteColour(index.get(name)) } })
        : null;
    const row = (site) => {
      const sum = rows.get(site.name);
      const away = site.state === "gone" || site.state === "revoked";
      const needed = away && run?.state === "running" && index.has(site.name);
      return h(
        "tr",
        { "data-site": site.name },
        h("th", { scope: "row" }, key(site.name), site.name),
        h(
          "td",
          { class: "words" },
          h("span", { class: needed ? "act" : "" }, site.state),
          h("span", { class: "soft" }, ` ${ago(site.since)}`),
          site.trouble ? h("div", { class: "act" }, site.trouble) : null,
        ),
        h("td", {}, sum.asked ? `${sum.counted} of ${sum.asked}` : "–"),
        h("td", {}, bytes(sum.received)),
        h("td", {}, bytes(sum.sent)),
        h("td", { class: "words" }, site.device || "–"),
        h("td", { class: "words" }, site.version || "–"),
        h("td", { class: "words" }, date(site.certificate_expires)),
      );
    };
    this.list.replaceChildren(
      h(
        "table",
        { class: "plain" },
        h(
          "thead",
          {},
          h(
            "tr",
            {},
            head.map((x, k) =>
              h("th", { scope: "col", class: [1, 5, 6, 7].includes(k) ? "words" : "" }, x),
            ),
          ),
        ),
        h("tbody", {}, sites.map(row)),
      ),
    );
  }

  destroy() {
    for (const { panel } of this.charts) panel.destroy();
  }
}
