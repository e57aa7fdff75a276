// What the page knows, and how it stays true: one snapshot, then events. The stream opens before
// the snapshot is read, so nothing that happens in between is lost.

const AGAIN_MS = 4000;
const MOST_LINES = 200;

async function json(path) {
  let answer;
  try {
    answer = await fetch(path, { headers: { accept: "application/json" } });
  } catch {
    throw { error: "Unavailable", message: "The daemon does not answer.", facts: {} };
  }
  const body = await answer.json();
  if (!answer.ok) throw body;
  return body;
}

export class Feed {
  constructor(changed) {
    this.changed = changed;
    this.daemon = null;
    this.sites = [];
    this.runs = [];
    this.run = null;
    this.rounds = [];
    this.lines = [];
    this.loaded = false;
    this.trouble = null;
    this.live = false;
    this.since = Date.now() / 1000;
    this.asked = "";
    this.source = null;
    this.timer = 0;
  }

  /** Shows a run: by name or id, or the one that matters most if there is no name. */
  async show(name) {
    this.asked = name;
    try {
      await this.head();
      this.trouble = null;
    } catch (problem) {
      this.trouble = problem;
    }
    this.changed();
    this.listen();
  }

  choose() {
    const newest = [...this.runs].sort((a, b) => b.created - a.created);
    if (this.asked) {
      const fits = newest.find((run) => run.id === this.asked || run.name === this.asked);
      if (fits) return fits;
    }
    return newest.find((run) => run.state === "running") ?? newest[0] ?? null;
  }

  async load() {
    try {
      await this.head();
      const id = this.run && encodeURIComponent(this.run.id);
      this.rounds = id ? await json(`/api/runs/${id}/rounds`) : [];
      this.trouble = null;
      this.loaded = true;
    } catch (problem) {
      this.trouble = problem;
    }
    this.changed();
  }

  async head() {
    const paths = ["/api/status", "/api/sites", "/api/runs"];
    [this.daemon, this.sites, this.runs] = await Promise.all(paths.map(json));
    this.run = this.choose();
  }

  listen() {
    this.source?.close();
    clearTimeout(this.timer);
    const query = this.run ? `?run=${encodeURIComponent(this.run.id)}` : "";
    const source = new EventSource(`/api/events${query}`);
    this.source = source;
    const hear = (kind, does) =>
      source.addEventListener(kind, (message) => {
        if (source !== this.source) return;
        does.call(this, JSON.parse(message.data));
        this.changed();
      });
    source.addEventListener("open", () => this.linked(true));
    source.addEventListener("error", () => {
      this.linked(false);
      if (!this.loaded) this.load();
      if (source.readyState !== EventSource.CLOSED || source !== this.source) return;
      this.timer = setTimeout(() => this.show(this.asked), AGAIN_MS);
    });
    hear("hello", () => this.load());
    hear("reset", () => this.load());
    hear("run", this.onRun);
    hear("round", this.onRound);
    hear("site", this.onSite);
    hear("daemon", this.onDaemon);
    hear("log", this.note);
  }

  linked(live) {
    if (this.live !== live) this.since = Date.now() / 1000;
    this.live = live;
    if (live && this.trouble) this.load();
    this.changed();
  }

  note(event) {
    if (event.text) this.lines = [event, ...this.lines].slice(0, MOST_LINES);
  }

  onRun(event) {
    const run = event.data;
    if (!run.id) return this.load();
    this.runs = [...this.runs.filter((other) => other.id !== run.id), run];
    if (!this.run) return this.show(this.asked);
    if (this.run.id === run.id) this.run = run;
  }

  onRound(event) {
    const round = event.data;
    if (!round.round) return this.load();
    if (round.run !== this.run?.id) return;
    const rest = this.rounds.filter((other) => other.round !== round.round);
    this.rounds = [...rest, round].sort((a, b) => a.round - b.round);
  }

  onSite(event) {
    this.note(event);
    const site = event.data;
    if (!site.name) return this.load();
    const at = this.sites.findIndex((other) => other.name === site.name);
    this.sites = at < 0 ? [...this.sites, site] : this.sites.with(at, site);
  }

  onDaemon(event) {
    this.note(event);
    if (event.data.federation) this.daemon = event.data;
  }
}
