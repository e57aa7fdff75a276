// One round in full: its time at every site, its entry in the ledger, who contributed what.

import { go, read } from "./address.js";
import { action, h } from "./dom.js";
import {
  bytes,
  clock,
  count,
  date,
  number,
  plain,
  score,
  scoreName,
  seconds,
  short,
} from "./format.js";
import { Matrix } from "./matrix.js";
import { siteColour } from "./palette.js";
import { decided, Memory, workWords } from "./series.js";
import { WorkTable } from "./worktable.js";
import { nothing } from "./empty.js";

export class Rounds {
  constructor(root) {
    this.drawn = new Memory();
    this.entered = new Memory();
    this.matrix = new Matrix((round) => go({ round }));
    this.table = new WorkTable("timeline", "Timeline");
    this.title = h("h2", { class: "big" });
    this.back = action("← earlier", () => this.step(-1));
    this.next = action("later →", () => this.step(1));
    this.reason = h("p", { class: "soft" });
    this.entry = h("div", { class: "entry" });
    this.body = h(
      "div",
      { class: "stack" },
      this.matrix.node,
      h(
        "div",
        { class: "heading" },
        this.title,
        h("span", { class: "files shown" }, this.back, this.next),
      ),
      this.reason,
      this.table.node,
      this.entry,
    );
    this.empty = nothing(
      "Here each round will stand with its timeline, its entry in the ledger and its contributions. The first one has not begun.",
    );
    root.append(this.body, this.empty);
  }

  step(by) {
    const k = this.all.findIndex((round) => round.round === this.round.round) + by;
    if (this.all[k]) go({ round: this.all[k].round });
  }

  update({ run, rounds }) {
    this.empty.hidden = rounds.length > 0;
    this.body.hidden = !rounds.length;
    if (!rounds.length) return;
    const wanted = read().round;
    const round = rounds.find((r) => r.round === wanted) ?? rounds.at(-1);
    Object.assign(this, { round, all: rounds });
    this.back.disabled = round === rounds[0];
    this.next.disabled = round === rounds.at(-1);
    if (this.drawn.changed(round.round, rounds.length, ...decided(rounds)))
      this.matrix.update(run, rounds, round.round);
    if (!this.entered.changed(round, run.current, run.rounds)) return;
    const state = round.state === "planned" ? "under way" : round.state;
    const attempt = round.attempt > 1 ? ` · attempt ${round.attempt}` : "";
    this.title.textContent = `Round ${round.round} of ${run.rounds} · ${state}${attempt}`;
    const released = round.held && round.state === "committed";
    const reason = released ? `Released after it was held: ${round.held}` : round.reason;
    this.reason.textContent = reason;
    this.reason.hidden = !reason;
    this.table.update(round, run.sites, "Timeline", run.current === round.round);
    this.entry.replaceChildren(this.ledger(round), this.contributions(run, round));
  }

  ledger(round) {
    const rate = round.learning_rate ? round.learning_rate.map(plain).join(" → ") : "–";
    const counted = round.sites.filter((row) => row.state === "counted").length;
    const facts = [
      ["Started", `${date(round.started)}, ${clock(round.started)}`],
      ["Closed", clock(round.closed)],
      ["Committed", clock(round.committed)],
      ["Counted", `${counted} of ${round.sites.length}, quorum ${round.quorum}`],
      ["Work", workWords(round.work)],
      ["Learning rate", rate],
      ["|Δ| / |w|", number(round.relative_change)],
      ["On the wire", bytes(round.wire_bytes)],
      ["Base", h("code", { title: round.base }, short(round.base))],
      ["Model", h("code", { title: round.model }, short(round.model))],
    ];
    const scores = Object.entries(round.scores).map(([name, x]) => {
      const { metric, set } = scoreName(name);
      return [set ? `${metric}, ${set}` : metric, score(name, x)];
    });
    const list = (pairs) =>
      h(
        "dl",
        {},
        pairs.map(([k, v]) => h("div", {}, h("dt", {}, k), h("dd", {}, v))),
      );
    const sum = Object.values(round.seconds).reduce((a, b) => a + b, 0);
    const times = Object.entries(round.seconds).map(([k, v]) => [k, seconds(v)]);
    return h(
      "section",
      { class: "facts" },
      h("div", {}, h("h3", {}, "Ledger"), list(facts)),
      scores.length ? h("div", {}, h("h3", {}, "Scores"), list(scores)) : null,
      times.length ? h("div", {}, h("h3", {}, `Time, ${seconds(sum)}`), list(times)) : null,
    );
  }

  contributions(run, round) {
    const names = [...new Set(round.sites.flatMap((row) => Object.keys(row.scores)))].slice(0, 3);
    const head = [
      "Site",
      "Examples",
      "Weight",
      "Norm",
      "Loss",
      ...names.map((n) => `${scoreName(n).metric}, ${scoreName(n).set}`),
      "Received",
      "Sent",
    ];
    const key = (site) =>
      h("i", { class: "key", style: { "--c": siteColour(run.sites.indexOf(site)) } });
    const row = (r) => [
      h("th", { scope: "row" }, key(r.site), r.site),
      ...[
        count(r.examples),
        r.weight === null ? "–" : `${plain(Math.round(r.weight * 1000) / 10)}\u202f%`,
        number(r.norm),
        number(r.loss),
        ...names.map((n) => score(n, r.scores[n])),
        bytes(r.received_bytes),
        bytes(r.sent_bytes),
      ].map((x) => h("td", {}, x)),
    ];
    return h(
      "section",
      {},
      h("h3", {}, "Contributions"),
      h(
        "div",
        { class: "scroll" },
        h(
          "table",
          { class: "plain" },
          h(
            "thead",
            {},
            h(
              "tr",
              {},
              head.map((x) => h("th", { scope: "col" }, x)),
            ),
          ),
          h(
            "tbody",
            {},
            round.sites.map((r) => h("tr", {}, row(r))),
          ),
        ),
      ),
    );
  }

  destroy() {
    this.matrix.destroy();
    this.table.destroy();
  }
}
