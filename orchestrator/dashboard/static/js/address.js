// What a viewer has chosen stands in the address, so that a link shows what its sender saw:
// #/RUN/VIEW/ROUND?x=bytes&metric=val.accuracy

export const VIEWS = ["overview", "rounds", "sites", "calibration", "strategies"];

export function read() {
  const [path, query = ""] = location.hash.replace(/^#\/?/, "").split("?");
  const [run = "", view = "", round = ""] = path.split("/").map(decodeURIComponent);
  const options = new URLSearchParams(query);
  return {
    run,
    view: VIEWS.includes(view) ? view : "overview",
    round: /^\d+$/.test(round) ? Number(round) : null,
    x: ["round", "bytes", "hours"].includes(options.get("x")) ? options.get("x") : "round",
    metric: options.get("metric") ?? "",
  };
}

export function write({ run, view, round, x, metric }) {
  const options = new URLSearchParams();
  if (x && x !== "round") options.set("x", x);
  if (metric) options.set("metric", metric);
  const query = options.size ? `?${options}` : "";
  const path = [run, view === "overview" && round === null ? "" : view, round ?? ""];
  while (path.length && path.at(-1) === "") path.pop();
  return `#/${path.map((part) => encodeURIComponent(part)).join("/")}${query}`;
}

/** Goes there: views are steps of the browser's history, options of a view are not. */
export function go(change) {
  const before = read();
  const hash = write({ ...before, ...change });
  const step = change.view && change.view !== before.view;
  history[step ? "pushState" : "replaceState"](null, "", hash);
  dispatchEvent(new Event("hashchange"));
}
