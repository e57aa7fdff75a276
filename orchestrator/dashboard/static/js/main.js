// The page: what stands above every view, and which view is shown.

import { go, read, VIEWS, write } from "./address.js";
import { Calibration } from "./calibration.js";
import { copy, h, say } from "./dom.js";
import { noRun } from "./empty.js";
import { Feed } from "./feed.js";
import { clock } from "./format.js";
import { Overview } from "./overview.js";
import { forget } from "./palette.js";
import { Rounds } from "./rounds.js";
import { Sites } from "./sites.js";
import { Strategies } from "./strategies.js";

const KINDS = {
  overview: Overview,
  rounds: Rounds,
  sites: Sites,
  calibration: Calibration,
  strategies: Strategies,
};
const at = (id) => document.getElementById(id);

let shown = { key: "", view: null };
let waiting = false;

const feed = new Feed(() => {
  // Many events, one drawing.
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    render();
  });
});

function render() {
  header();
  status();
  trouble();
  tabs();
  content();
}

function header() {
  const { daemon, runs, run, live, since } = feed;
  say(at("federation"), daemon?.federation ?? "");
  at("run-choice").hidden = runs.length < 1;
  const newest = [...runs].sort((a, b) => b.created - a.created);
  const options = newest.map((r) => [r.id, `${r.name} · ${r.state}`]);
  const select = at("run-select");
  if (select.dataset.options !== JSON.stringify(options)) {
    select.dataset.options = JSON.stringify(options);
    select.replaceChildren(...options.map(([value, words]) => h("option", { value }, words)));
  }
  if (run) select.value = run.id;
  at("link").dataset.live = live;
  say(at("link"), live ? "live" : `not connected since ${clock(since)}, trying again`);
  if (daemon)
    say(
      at("bottom"),
      `Farflung ${daemon.version} · ${daemon.address} · ${daemon.attached} of ${daemon.sites} sites attached · reduction ${daemon.compute}`,
    );
}

// "·" separates statements: each stays in one piece, and no line begins or ends with a dot.
function phrases(words) {
  const parts = words
    .split(" · ")
    .map((phrase, k) => h("span", { class: "phrase" }, h("i", {}, k ? " · " : ""), phrase));
  return h("span", { class: "phrases" }, parts);
}

function status() {
  const { run, loaded } = feed;
  const words = run
    ? run.headline || `${run.name}: ${run.state}`
    : loaded
      ? "Nothing runs yet."
      : null;
  const headline = at("headline");
  if (words && headline.textContent !== words) headline.replaceChildren(phrases(words));
  headline.classList.toggle("act", Boolean(run?.needs_action));
  document.title = run ? `${run.name} · ${run.committed}/${run.rounds} · Farflung` : "Farflung";
  const diagnosis = at("diagnosis");
  const said = run
    ? run.diagnosis || run.reason
    : loaded
      ? "What will be here, and the commands that start it:"
      : "";
  if (diagnosis.dataset.said === said) return;
  diagnosis.dataset.said = said;
  const round = /round (\d+)/i.exec(said)?.[1];
  const evidence = h(
    "button",
    { type: "button", class: "word", onclick: () => go({ view: "rounds", round: Number(round) }) },
    `show round ${round}`,
  );
  diagnosis.replaceChildren(said, round && run ? " " : "", round && run ? evidence : "");
}

function trouble() {
  const place = at("trouble");
  const { trouble: problem } = feed;
  const key = problem ? JSON.stringify(problem) : "";
  if (place.dataset.key === key) return;
  place.dataset.key = key;
  place.replaceChildren();
  if (!problem) return;
  const facts = Object.entries(problem.facts ?? {})
    .map(([k, v]) => `${k} = ${v}`)
    .join(", ");
  const todo =
    problem.error === "Unavailable"
      ? " Start it with “farflung serve”; this page tries again by itself."
      : "";
  const words = `${problem.message}${todo}`;
  place.append(
    h(
      "p",
      { class: "trouble", role: "alert" },
      h("strong", { class: "act" }, problem.error),
      " ",
      words,
      facts ? h("span", { class: "soft" }, ` (${facts})`) : null,
      " ",
      copy(`${problem.error}: ${words} ${facts}`),
    ),
  );
}

function tabs() {
  const { run } = feed;
  at("tabs").hidden = !run;
  if (!run) return;
  const address = read();
  const links = VIEWS.map((view) => {
    const href = write({
      ...address,
      run: address.run,
      view,
      round: address.view === view ? address.round : null,
    });
    return h(
      "a",
      { href, "aria-current": view === address.view ? "page" : null },
      view[0].toUpperCase() + view.slice(1),
    );
  });
  const key = links
    .map((a) => `${a.getAttribute("href")} ${a.getAttribute("aria-current")}`)
    .join();
  if (at("tabs").dataset.key === key) return;
  at("tabs").dataset.key = key;
  at("tabs").replaceChildren(...links);
}

function content() {
  if (!feed.loaded) return;
  const { view } = read();
  const key = feed.run ? `${feed.run.id}/${view}` : `none/${feed.sites.length}`;
  if (shown.key !== key) {
    shown.view?.destroy();
    at("view").replaceChildren();
    shown = { key, view: null };
    if (feed.run) shown.view = new KINDS[view](at("view"));
    else at("view").append(noRun(feed.daemon, feed.sites));
  }
  shown.view?.update(feed);
}

/** Everything is drawn anew: colours or sizes are others now. */
function redraw() {
  forget();
  shown.view?.destroy();
  shown = { key: "", view: null };
  render();
}

at("run-select").addEventListener("change", (event) => {
  const run = feed.runs.find((r) => r.id === event.target.value);
  go({ run: run.id, view: "overview", round: null });
});
addEventListener("hashchange", () => {
  const { run } = read();
  const other = run && feed.run && run !== feed.run.id && run !== feed.run.name;
  if (other) feed.show(run);
  else render();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
feed.show(read().run);
