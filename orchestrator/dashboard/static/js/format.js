// Numbers as people read them: two or three significant digits, and always a unit.

const THIN = "\u202f";
const none = "–";

const known = (x) => typeof x === "number" && Number.isFinite(x);

export function number(x, digits = 3) {
  if (!known(x)) return none;
  const size = Math.abs(x);
  if (size >= 1000 || Number.isInteger(x)) return count(x);
  if (size < 0.0001) return x.toExponential(1).replace("e-", "e−");
  const places = Math.max(0, digits - 1 - Math.floor(Math.log10(size)));
  return x.toFixed(Math.min(places, 5)).replace("-", "−");
}

/** A number without trailing noise: 0.1, 5, 0.025. */
export const plain = (x) => (known(x) ? String(Number(x.toPrecision(3))).replace("-", "−") : none);

export const count = (x) =>
  known(x)
    ? Math.round(x)
        .toString()
        .replace("-", "−")
        .replace(/\B(?=(\d{3})+$)/g, THIN)
    : none;

export const percent = (x, places = 1) =>
  known(x) ? `${(100 * x).toFixed(places)}${THIN}%` : none;

function scaled(x, steps, units) {
  let k = 0;
  let value = Math.abs(x);
  while (k < units.length - 1 && value >= steps) {
    value /= steps;
    k += 1;
  }
  const text = k === 0 ? Math.round(value) : Number(value.toPrecision(value >= 100 ? 3 : 2));
  return `${text}${THIN}${units[k]}`;
}

export const bytes = (x) => (known(x) ? scaled(x, 1000, ["B", "kB", "MB", "GB", "TB"]) : none);

export function rate(x) {
  return known(x) ? `${x >= 10000 ? `${plain(x / 1000)}k` : count(x)} examples/s` : none;
}

export function seconds(x) {
  if (!known(x)) return none;
  if (x < 1) return `${x.toFixed(2)}${THIN}s`;
  if (x < 10) return `${x.toFixed(1)}${THIN}s`;
  if (x < 100) return `${Math.round(x)}${THIN}s`;
  if (x < 5400) return `${Math.round(x / 60)}${THIN}min`;
  if (x < 172800) return `${(x / 3600).toFixed(1)}${THIN}h`;
  return `${Math.round(x / 86400)} days`;
}

export const clock = (t) =>
  known(t) ? new Date(t * 1000).toLocaleTimeString([], { hour12: false }) : none;

export const date = (t) =>
  known(t)
    ? new Date(t * 1000).toLocaleDateString([], { year: "numeric", month: "short", day: "numeric" })
    : none;

export const short = (digest) => (digest ? digest.slice(0, 10) : none);

const SETS = { val: "validation", test: "test", test_calibrated: "test, calibrated", val_calibrated: "validation, calibrated", holdout: "holdout", holdout_test: "holdout, test" };
const METRICS = {
  accuracy: "Accuracy",
  nll: "NLL",
  ece: "ECE",
  aece: "AECE",
  classwise_ece: "Class-wise ECE",
  brier: "Brier score",
  coverage: "Coverage",
  set_size: "Set size",
  loss: "Loss",
};

/** "val.accuracy" as { set: "validation", metric: "Accuracy" }. */
export function scoreName(name) {
  const dot = name.indexOf(".");
  const [set, metric] = dot < 0 ? ["", name] : [name.slice(0, dot), name.slice(dot + 1)];
  const words = METRICS[metric] ?? metric.replaceAll("_", " ");
  return { set: SETS[set] ?? set.replaceAll("_", " "), metric: words, key: metric };
}

export const isShare = (name) => /accuracy|ece|error|coverage|agreement|share|rate$/.test(name);

/** A score, by the name it goes by. */
export const score = (name, x) => (isShare(name) ? percent(x) : number(x));
