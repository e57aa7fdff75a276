// Colours, read from the style sheet so that light and dark are designed in one place.
// A site keeps its colour everywhere; from the eighth on, its dashes tell it from its namesake.

const SITES = 7;
const DASHES = [[], [6, 3], [2, 2], [8, 3, 2, 3]];

let seen = new Map();

export function colour(name) {
  if (!seen.has(name)) {
    const value = getComputedStyle(document.documentElement).getPropertyValue(`--${name}`);
    seen.set(name, value.trim());
  }
  return seen.get(name);
}

export const forget = () => (seen = new Map());

export const siteColour = (index) => colour(`site-${((index % SITES) + SITES) % SITES}`);

export const siteDash = (index) => DASHES[Math.floor(index / SITES) % DASHES.length];

export const font = (size, weight = 400) => `${weight} ${size}px ${colour("face")}`;

// What is done with a round's seconds: tints of the ink, since hues belong to the sites.
export const PHASES = [
  { name: "waiting", parts: ["asked", "waiting", "preparing"], tint: 0.13 },
  { name: "fetching", parts: ["fetching"], tint: 0.34 },
  { name: "training", parts: ["training"], tint: 0.66 },
  { name: "sending", parts: ["encoding", "sending"], tint: 0.34 },
  { name: "reducing", parts: ["reducing", "refining", "assessing", "committing"], tint: 0.95 },
];
