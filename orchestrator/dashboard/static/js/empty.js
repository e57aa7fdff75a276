// Pages without anything on them yet: what will be here, and the command that starts it.

import { command, h } from "./dom.js";
import { colour } from "./palette.js";
import { picture } from "./pen.js";

const wave = (k, n) =>
  1 - Math.exp(-n / 3.2) * (1 - 0.06 * k) - 0.05 * k + 0.012 * Math.sin(n * (k + 2));

/** The first chart as it will be, faint, with its parts named. */
export function sketch() {
  return picture(800, 270, "A sketch of the chart that will be here", (pen) => {
    const at = (n, y) => [48 + n * 42, 214 - 170 * y];
    const ns = [...Array(13).keys()];
    const note = (x, y, words) => pen.text(x, y, words, { fill: colour("soft"), size: 12 });
    pen.path(
      [
        [48, 220],
        [610, 220],
      ],
      { stroke: colour("hair") },
    );
    pen.path(
      [
        [48, 36],
        [610, 36],
      ],
      { stroke: colour("faint"), dash: [5, 4] },
    );
    for (const k of [1, 2, 3])
      pen.path(
        ns.map((n) => at(n, wave(k, n))),
        { stroke: colour(`site-${k - 1}`), alpha: 0.6, width: 1.25 },
      );
    pen.path(
      ns.map((n) => at(n, wave(0, n))),
      { stroke: colour("soft"), width: 2 },
    );
    for (const n of ns) pen.circle(...at(n, wave(0, n)), 3, { fill: colour("soft") });
    for (const n of ns.slice(0, 12)) {
      const [x, y] = at(n, 0);
      pen.path(
        [
          [x, y + 38],
          [x, y + 26],
          [x + 42, y + 36],
          [x + 42, y + 38],
        ],
        { stroke: colour("faint") },
      );
    }
    note(618, 40, "a reference");
    note(566, 62, "the global model, round by round");
    note(566, 88, "each site, in its own colour");
    note(566, 250, "the learning rate, which");
    note(566, 265, "restarts with every round");
    note(70, 212, "a dot for every committed round");
  });
}

const step = (words, line) => h("li", {}, h("span", {}, words), " ", command(line));

export function noRun(daemon, sites) {
  const steps = [];
  if (!sites.some((site) => site.state === "attached"))
    steps.push(
      step("Invite a data center; the command prints its token.", "farflung invite north"),
      step(
        "There, join with the token, and stay attached.",
        "farflung-site join TOKEN && farflung-site run",
      ),
    );
  steps.push(
    step("Launch a run; this page follows it by itself.", "farflung launch run.toml --follow"),
  );
  return h(
    "section",
    { class: "empty" },
    h("div", { class: "sketch" }, sketch()),
    h("ol", { class: "steps" }, steps),
    h(
      "p",
      { class: "soft" },
      "No data center at hand? ",
      command("farflung demo --keep"),
      " trains on three sites of this machine.",
    ),
  );
}

export function noSites() {
  return h(
    "section",
    { class: "empty" },
    h(
      "p",
      {},
      "A row per data center: whether it is attached, what it runs on, how far its model drifts from the others’.",
    ),
    h("ol", { class: "steps" }, step("Invite the first one.", "farflung invite north")),
  );
}

export const nothing = (...words) => h("p", { class: "empty soft" }, words);
