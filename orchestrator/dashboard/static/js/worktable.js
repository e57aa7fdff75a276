// Who did what in a round: one row per site, its bar of time, its work, and what went wrong.

import { copy, h, say } from "./dom.js";
import { bytes, clock, plain, rate, seconds } from "./format.js";
import { colour, siteColour } from "./palette.js";
import { moved, picture } from "./pen.js";
import { files } from "./panel.js";
import {
  BAR,
  bar,
  isBad,
  isOpen,
  scale,
  serverBar,
  spans,
  speed,
  stretch,
  took,
} from "./timeline.js";

const nowS = () => Date.now() / 1000;

/** From the start of a round to its end, or to where it is expected to end. */
function domainOf(round, now) {
  const ends = round.sites.map(
    (row) => (spans(row).at(-1)?.end ?? now) + (isOpen(row) ? (row.eta_s ?? 0) : 0),
  );
  const last = round.committed ?? round.closed ?? 0;
  return [round.started, Math.max(round.started + 1, last, ...ends)];
}

function doneWords(row) {
  const words = amountWords(row);
  return row.from_round ? `${words} for round ${row.from_round}`.trim() : words;
}

function amountWords(row) {
  if (row.partial)
    return row.done === null
      ? "partial"
      : `partial: ${plain(row.done)} of ${plain(row.planned)} ${row.unit}`;
  // What was counted is complete, whatever was last heard of its progress.
  if (row.state === "counted" && row.planned) return `${plain(row.planned)} ${row.unit}`;
  if (row.done === null) return "";
  if (row.planned && row.done < row.planned)
    return `${plain(row.done)} of ${plain(row.planned)} ${row.unit}`;
  return `${plain(row.done)} ${row.unit}`;
}

function timeWords(row) {
  if (row.waits_until) return `paused until ${clock(row.waits_until)}`;
  if (isOpen(row)) return row.eta_s === null ? "" : `${seconds(row.eta_s)} left`;
  return spans(row).length ? seconds(took(row)) : "";
}

export class WorkTable {
  /** @param sites names in the order that gives them their colours */
  constructor(id, title) {
    Object.assign(this, {
      id,
      titleWords: title,
      round: null,
      sites: [],
      lines: new Map(),
      urgent: false,
    });
    this.rows = h("div", { class: "rows" });
    this.heading = h("h2", {}, title);
    this.node = h("figure", { class: "work", "data-chart": id });
    const saves = files(id, title, () => this.drawing(), this.node);
    this.key = h("div", { class: "glyphs", "aria-hidden": "true" });
    this.node.append(
      h("figcaption", { class: "caption" }, this.heading, this.key, saves),
      this.rows,
    );
    this.observer = new ResizeObserver(() => this.draw());
    this.observer.observe(this.rows);
    this.ticks = 0;
    this.timer = setInterval(() => this.running() && this.draw(), 1000);
  }

  /** Whether time goes on in a bar; many bars are drawn less often. */
  running() {
    this.ticks += 1;
    if (this.lines.size > 20 && this.ticks % 5) return false;
    return this.round?.sites.some(isOpen) ?? false;
  }

  update(round, sites, title, urgent = false) {
    const before = this.round;
    Object.assign(this, { round, sites, titleWords: title, urgent });
    say(this.heading, title);
    if (before === round) return;
    const order = new Map(sites.map((name, k) => [name, k]));
    const place = (row) => order.get(row.site) ?? sites.length;
    const rows = [...round.sites].sort((a, b) => place(a) - place(b));
    // Lines stay where they are while their words change, so that they can be read and clicked.
    const key = JSON.stringify([rows.map((row) => row.site), round.closed !== null, sites]);
    if (this.key_ !== key) {
      this.key_ = key;
      this.lines = new Map(
        rows.map((row) => [row.site, this.line(row.site, order.get(row.site) ?? -1)]),
      );
      const server = round.closed === null ? [] : [this.server()];
      this.rows.replaceChildren(
        ...[...this.lines.values()].map((line) => line.node),
        ...server,
        this.axis(),
      );
    }
    for (const row of rows) this.fill(this.lines.get(row.site), row);
    this.sayServer();
    this.draw();
  }

  line(site, index) {
    const cells = Object.fromEntries(
      ["bar", "state", "done", "speed", "sent", "left"].map((name) => [
        name,
        h("span", {
          class:
            { bar: "bar", state: "state", speed: "num far", sent: "num far" }[name] ??
            `num ${name}`,
        }),
      ]),
    );
    const name = h(
      "span",
      { class: "name" },
      h("i", { class: "key", style: { "--c": siteColour(index) } }),
      site,
    );
    const reason = h("span", { class: "reason", hidden: true });
    const node = h("div", { class: "row", "data-site": site }, name, Object.values(cells), reason);
    return { node, ...cells, reason, index, row: null };
  }

  fill(line, row) {
    const bad = isBad(row.state);
    line.row = row;
    line.node.dataset.state = row.state;
    line.node.classList.toggle("bad", bad);
    line.state.classList.toggle("act", bad && this.urgent);
    say(line.state, row.state);
    say(line.done, doneWords(row));
    say(line.speed, speed(row) === null ? "" : rate(speed(row)));
    say(line.sent, row.sent_bytes ? `${bytes(row.sent_bytes)} sent` : "");
    say(line.left, timeWords(row));
    const { missing, unassessed } = this.round;
    const silent = unassessed[row.site];
    const reason =
      row.reason || missing[row.site] || (silent ? `did not evaluate the model: ${silent}` : "");
    if (line.reason.dataset.said === reason) return;
    line.reason.dataset.said = reason;
    line.reason.hidden = !reason;
    line.reason.replaceChildren(
      `${reason.replace(/\.$/, "")}. `,
      copy(`${row.error || row.state}: ${reason}`),
    );
  }

  server() {
    this.serverBar = h("span", { class: "bar" });
    this.serverWords = h("span", { class: "state wide" });
    const name = h(
      "span",
      { class: "name" },
      h("i", { class: "key", style: { "--c": colour("ink") } }),
      "orchestrator",
    );
    return h("div", { class: "row server" }, name, this.serverBar, this.serverWords);
  }

  sayServer() {
    const { round } = this;
    if (round.closed === null) return;
    const parts = ["reducing", "refining", "assessing"].filter((part) => round.seconds[part]);
    say(
      this.serverWords,
      parts.map((part) => `${part} ${seconds(round.seconds[part])}`).join(" · "),
    );
  }

  axis() {
    this.axisBar = h("span", { class: "bar" });
    return h(
      "div",
      { class: "row axis", "aria-hidden": "true" },
      h("span", { class: "name" }),
      this.axisBar,
    );
  }

  /** What is drawn, from top to bottom: its place, its words, and how. */
  bars() {
    const { round } = this;
    const now = nowS();
    const domain = domainOf(round, now);
    const rows = [...this.lines.values()].map((line) => ({
      cell: line.bar,
      words: `${line.row.site}: ${line.row.state}`,
      paint: (pen, width) => bar(pen, width, line.row, domain, siteColour(line.index), now),
    }));
    if (round.closed !== null)
      rows.push({
        cell: this.serverBar,
        words: "orchestrator",
        paint: (pen, width) => serverBar(pen, width, round, domain),
      });
    return [
      ...rows,
      { cell: this.axisBar, words: "", paint: (pen, width) => scale(pen, width, domain) },
    ];
  }

  draw() {
    if (!this.round || !this.rows.clientWidth) return;
    const width = this.axisBar.clientWidth;
    for (const { cell, paint, words } of this.bars())
      cell.replaceChildren(picture(width, BAR, words, (pen) => paint(pen, width)));
    this.drawKey();
  }

  drawKey() {
    const states = ["preparing", "fetching", "training", "encoding", "sending"];
    this.key.replaceChildren(
      ...states.map((state) =>
        h(
          "span",
          {},
          picture(18, BAR, "", (pen) => stretch(pen, state, 1, 17, colour("soft"))),
          state,
        ),
      ),
    );
  }

  /** What the files are made of. */
  drawing() {
    const [width, left] = [900, 150];
    const bars = this.bars();
    return {
      title: this.titleWords,
      width,
      height: (bars.length + 1) * BAR,
      table: () => this.table(),
      draw: (pen) =>
        bars.forEach(({ paint, words }, k) => {
          pen.text(10, k * BAR + 15, words, { fill: colour("ink") });
          moved(pen, left, k * BAR, (there) => paint(there, width - left));
        }),
    };
  }

  table() {
    const columns = [
      "site",
      "state",
      "reason",
      "done",
      "planned",
      "unit",
      "partial",
      "from round",
      "loss",
      "examples",
      "examples/s",
      "received bytes",
      "sent bytes",
      "norm",
      "weight",
    ];
    const rows = (this.round?.sites ?? []).map((r) => [
      r.site,
      r.state,
      r.reason,
      r.done,
      r.planned,
      r.unit,
      r.partial,
      r.from_round,
      r.loss,
      r.examples,
      r.examples_per_s,
      r.received_bytes,
      r.sent_bytes,
      r.norm,
      r.weight,
    ]);
    return { columns, rows, title: this.titleWords };
  }

  destroy() {
    clearInterval(this.timer);
    this.observer.disconnect();
  }
}
