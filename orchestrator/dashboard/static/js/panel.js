// A chart with what belongs to it: its title, the values under the crosshair, its files, its table.

import { action, h } from "./dom.js";
import { number } from "./format.js";
import { Plot } from "./plot.js";
import { savePng, saveCsv, saveSvg } from "./save.js";

const MOST_VALUES = 9;

/** The words under a drawing: `{ PNG, SVG, CSV, Table }`; `of` gives the drawing and its numbers. */
export function files(name, subject, of, holder) {
  const table = action("Table", () => {
    const shown = holder.querySelector(".numbers");
    table.setAttribute("aria-expanded", String(!shown));
    if (shown) shown.remove();
    else holder.append(numbers(of().table()));
  });
  table.setAttribute("aria-expanded", "false");
  const labelled = (word, does) => action(word, does, { label: `${word}: ${subject}` });
  return h(
    "span",
    { class: "files" },
    labelled("PNG", () => savePng(name, of())),
    labelled("SVG", () => saveSvg(name, of())),
    labelled("CSV", () => saveCsv(name, of().table())),
    table,
  );
}

function numbers({ columns, rows, title }) {
  const text = (x) => (typeof x === "number" ? number(x, 4) : (x ?? "–"));
  return h(
    "div",
    { class: "numbers", tabindex: 0 },
    h(
      "table",
      {},
      h("caption", { class: "unseen" }, title),
      h(
        "thead",
        {},
        h(
          "tr",
          {},
          columns.map((c) => h("th", { scope: "col" }, c)),
        ),
      ),
      h(
        "tbody",
        {},
        rows.map((row) =>
          h(
            "tr",
            {},
            row.map((x) => h("td", {}, text(x))),
          ),
        ),
      ),
    ),
  );
}

export class Panel {
  /**
   * @param group the charts that it shares crosshair and zoom with
   * @param options id, title, height: () => pixels, wide: values on a line of their own
   */
  constructor(group, { id, title, height, head = null }) {
    Object.assign(this, { id, title, spec: null });
    this.readout = h("div", { class: "readout", "aria-live": "off" });
    this.host = h("div", { class: "plot", role: "img" });
    this.note = h("p", { class: "note", hidden: true });
    this.node = h("figure", { class: "panel", "data-chart": id });
    this.words = h("span", { class: "title" });
    this.retitle(title);
    const saves = files(id, title, () => this.drawing(), this.node);
    this.node.append(
      h("figcaption", {}, h("div", { class: "caption" }, this.words, head, saves), this.readout),
      h("div", { class: "paper" }, this.host, this.note),
    );
    this.plot = new Plot(this.host, group, { height, hovered: (n) => this.show(n) });
  }

  /** "ECE, calibration error": what follows the comma is said more quietly. */
  retitle(title) {
    if (this.title === title && this.words.textContent) return;
    this.title = title;
    const [first, ...rest] = title.split(", ");
    this.words.replaceChildren(
      first,
      ...(rest.length ? [h("span", { class: "quiet" }, `, ${rest.join(", ")}`)] : []),
    );
  }

  /** Shows a spec (see plot.js); a sentence instead of lines where there are none yet. */
  update(spec, empty = "Drawn from the first committed round on.") {
    this.spec = spec;
    const there = spec.lines.some((line) => line.values.some((x) => x !== null));
    this.note.hidden = there;
    this.note.textContent = there ? "" : empty;
    this.plot.update(spec);
    this.host.setAttribute("aria-label", this.summary());
    this.node.querySelector(".numbers")?.replaceWith(numbers(this.table()));
  }

  summary() {
    const now = this.values(null).map(({ label, text }) => `${label} ${text}`);
    return `${this.title} over ${this.spec.rounds.length} rounds; last: ${now.join(", ")}`;
  }

  values(index) {
    const { lines, rounds, value } = this.spec;
    const n = index ?? rounds.length - 1;
    const row = (line) => ({ ...line, text: value(line.values[n] ?? null) });
    const shown = [...lines].sort((a, b) => Boolean(b.strong) - Boolean(a.strong));
    if (shown.length <= MOST_VALUES) return shown.map(row);
    // Too many to read: the strong ones, and where the others lie.
    const strong = shown.filter((line) => line.strong).map(row);
    const rest = shown.filter((line) => !line.strong && line.values[n] !== null);
    const sorted = rest.sort((a, b) => a.values[n] - b.values[n]);
    if (!sorted.length) return strong;
    const ends = [sorted[0], sorted.at(-1)].map((line) => row(line));
    return [...strong, ...ends];
  }

  show(index) {
    if (!this.spec) return;
    const round = index === null ? null : this.spec.rounds[index];
    const items = this.values(index).map(({ label, text, colour, strong, show, tint }) =>
      h(
        "span",
        { class: strong ? "value strong" : "value", title: label },
        tint ? h("i", { class: "key tint", style: { "--c": colour(), opacity: tint } }) : null,
        show === false ? null : h("i", { class: "key", style: { "--c": colour() } }),
        label ? h("span", { class: tint ? "unseen" : "who" }, `${label} `) : null,
        h("b", {}, text),
      ),
    );
    const extra = round && this.spec.more ? this.spec.more(round) : "";
    const when = h("span", { class: "when" }, round ? `round ${round.round}` : "");
    this.readout.replaceChildren(
      when,
      ...items,
      ...(extra ? [h("span", { class: "more" }, extra)] : []),
    );
  }

  /** What the files are made of. */
  drawing() {
    const { u } = this.plot;
    return {
      title: this.title,
      width: u?.width ?? 0,
      height: u?.height ?? 0,
      draw: (pen) => this.plot.draw(pen),
      table: () => this.table(),
    };
  }

  table() {
    const { rounds, lines, x } = this.spec;
    const extra = x.kind === "round" ? [] : [x.label];
    const columns = ["round", "state", ...extra, ...lines.map((line) => line.label)];
    const rows = rounds.map((round, n) => [
      round.round,
      round.state,
      ...(extra.length ? [x.values[n] * (x.unit ?? 1)] : []),
      ...lines.map((line) => line.values[n] ?? null),
    ]);
    return { columns, rows, title: this.title };
  }

  destroy() {
    this.plot.destroy();
  }
}
