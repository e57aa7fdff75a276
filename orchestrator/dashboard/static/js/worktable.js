// Who did what in a round: one row per site, its bar of time, its work, and what went wrong.

import { copy, h } from "./dom.js";
import { bytes, plain, rate, seconds } from "./format.js";
import { colour, siteColour } from "./palette.js";
import { moved, picture } from "./pen.js";
import { files } from "./panel.js";
import { BAR, bar, isBad, scale, serverBar, stretch } from "./timeline.js";

const nowS = () => Date.now() / 1000;

/** From the start of a round to its end, or to where it is expected to end. */
function domainOf(round, now) {
  const ends = round.sites.flatMap((row) => row.phases.map((phase) => phase.end ?? now + (row.eta_s ?? 0)));
  const last = round.committed ?? round.closed ?? 0;
  return [round.started, Math.max(round.started + 1, last, ...ends)];
}

function doneWords(row) {
  if (row.done === null) return "";
  if (row.planned && row.done < row.planned) return `${plain(row.done)} of ${plain(row.planned)} ${row.unit}`;
  return `${plain(row.done)} ${row.unit}`;
}

function timeWords(row) {
  const under = row.phases.at(-1)?.end === null;
  if (under) return row.eta_s === null ? "" : `${seconds(row.eta_s)} left`;
  return row.phases.length ? seconds(row.phases.at(-1).end - row.phases[0].start) : "";
}

export class WorkTable {
  /** @param sites names in the order that gives them their colours */
  constructor(id, title) {
    Object.assign(this, { id, titleWords: title, round: null, sites: [], bars: [], urgent: false });
    this.rows = h("div", { class: "rows" });
    this.heading = h("h2", {}, title);
    this.node = h("figure", { class: "work", "data-chart": id });
    const saves = files(id, title, () => this.drawing(), this.node);
    this.key = h("div", { class: "glyphs", "aria-hidden": "true" });
    this.node.append(h("figcaption", { class: "caption" }, this.heading, this.key, saves), this.rows);
    this.observer = new ResizeObserver(() => this.draw());
    this.observer.observe(this.rows);
    this.ticks = 0;
    this.timer = setInterval(() => this.running() && this.draw(), 1000);
  }

  /** Whether time goes on in a bar; many bars are drawn less often. */
  running() {
    this.ticks += 1;
    if (this.bars.length > 20 && this.ticks % 5) return false;
    return this.round?.sites.some((row) => row.phases.at(-1)?.end === null) ?? false;
  }

  update(round, sites, title, urgent = false) {
    const same = this.round === round;
    Object.assign(this, { round, sites, titleWords: title, urgent });
    this.heading.textContent = title;
    if (same) return;
    const order = new Map(sites.map((name, k) => [name, k]));
    const rows = [...round.sites].sort((a, b) => (order.get(a.site) ?? 999) - (order.get(b.site) ?? 999));
    this.bars = [];
    this.rows.replaceChildren(
      ...rows.map((row) => this.row(row, order.get(row.site) ?? -1)),
      ...(round.closed === null ? [] : [this.server()]),
      this.axis(),
    );
    this.draw();
  }

  row(row, index) {
    const cell = h("span", { class: "bar" });
    this.bars.push({ cell, paint: (pen, w, domain, now) => bar(pen, w, row, domain, siteColour(index), now), words: `${row.site}: ${row.state}` });
    const bad = isBad(row.state);
    const reason = row.reason || this.round.missing[row.site] || "";
    const state = h("span", { class: bad && this.urgent ? "state act" : "state" }, row.state);
    return h(
      "div",
      { class: bad ? "row bad" : "row", "data-site": row.site, "data-state": row.state },
      h("span", { class: "name" }, h("i", { class: "key", style: { "--c": siteColour(index) } }), row.site),
      cell,
      state,
      h("span", { class: "num" }, doneWords(row)),
      h("span", { class: "num far" }, rate(row.examples_per_s)),
      h("span", { class: "num far" }, row.sent_bytes ? `${bytes(row.sent_bytes)} sent` : ""),
      h("span", { class: "num left" }, timeWords(row)),
      reason ? h("span", { class: "reason" }, `${reason}. `, copy(`${row.error || row.state}: ${reason}`)) : null,
    );
  }

  server() {
    const cell = h("span", { class: "bar" });
    const { round } = this;
    this.bars.push({ cell, paint: (pen, w, domain) => serverBar(pen, w, round, domain), words: "orchestrator" });
    const parts = ["reducing", "refining", "assessing"].filter((part) => round.seconds[part]);
    const words = parts.map((part) => `${part} ${seconds(round.seconds[part])}`).join(" · ");
    return h(
      "div",
      { class: "row server" },
      h("span", { class: "name" }, h("i", { class: "key", style: { "--c": colour("ink") } }), "orchestrator"),
      cell,
      h("span", { class: "state wide" }, words),
    );
  }

  axis() {
    const cell = h("span", { class: "bar" });
    this.bars.push({ cell, paint: (pen, w, domain) => scale(pen, w, domain), words: "" });
    return h("div", { class: "row axis", "aria-hidden": "true" }, h("span", { class: "name" }), cell);
  }

  draw() {
    if (!this.round || !this.rows.clientWidth) return;
    const now = nowS();
    const domain = domainOf(this.round, now);
    const width = this.bars[0]?.cell.clientWidth ?? 0;
    for (const { cell, paint, words } of this.bars)
      cell.replaceChildren(picture(width, BAR, words, (pen) => paint(pen, width, domain, now)));
    this.drawKey();
  }

  drawKey() {
    const states = ["preparing", "fetching", "training", "encoding", "sending"];
    this.key.replaceChildren(
      ...states.map((state) =>
        h("span", {}, picture(18, BAR, "", (pen) => stretch(pen, state, 1, 17, colour("soft"))), state),
      ),
    );
  }

  /** What the files are made of. */
  drawing() {
    const [width, left] = [900, 120];
    const now = nowS();
    return {
      title: this.titleWords,
      width,
      height: (this.bars.length + 1) * BAR,
      table: () => this.table(),
      draw: (pen) => {
        const domain = domainOf(this.round, now);
        this.bars.forEach(({ paint, words }, k) => {
          pen.text(10, k * BAR + 15, words, { fill: colour("ink") });
          moved(pen, left, k * BAR, (there) => paint(there, width - left, domain, now));
        });
      },
    };
  }

  table() {
    const columns = ["site", "state", "reason", "done", "planned", "unit", "loss", "examples", "examples/s", "received bytes", "sent bytes", "norm", "weight"];
    const rows = (this.round?.sites ?? []).map((r) => [
      r.site, r.state, r.reason, r.done, r.planned, r.unit, r.loss, r.examples, r.examples_per_s, r.received_bytes, r.sent_bytes, r.norm, r.weight,
    ]);
    return { columns, rows, title: this.titleWords };
  }

  destroy() {
    clearInterval(this.timer);
    this.observer.disconnect();
  }
}
