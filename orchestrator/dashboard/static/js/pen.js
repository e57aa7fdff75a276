// One way to draw, on two papers: a canvas (on the page and as PNG) and SVG elements (on the
// page and as a file). Coordinates are CSS pixels; colours and fonts are given, never inherited.

import { s } from "./dom.js";
import { colour } from "./palette.js";

const ANCHORS = { start: "left", middle: "center", end: "right" };

export class CanvasPen {
  constructor(context, scale = 1) {
    this.c = context;
    this.scale = scale;
    this.dx = 0;
    this.dy = 0;
  }

  place() {
    const { scale, dx, dy } = this;
    this.c.setTransform(scale, 0, 0, scale, dx * scale, dy * scale);
  }

  with(draw, { alpha = 1 } = {}) {
    this.c.save();
    this.place();
    this.c.globalAlpha = alpha;
    draw();
    this.c.restore();
  }

  ink(fill, stroke) {
    const { c } = this;
    if (fill) {
      c.fillStyle = fill;
      c.fill();
    }
    if (stroke) {
      c.strokeStyle = stroke;
      c.stroke();
    }
  }

  path(points, { stroke, fill, width = 1, dash = [], alpha = 1, close = false }) {
    this.with(
      () => {
        const { c } = this;
        c.beginPath();
        let pen = false;
        for (const point of points) {
          if (point) c[pen ? "lineTo" : "moveTo"](point[0], point[1]);
          pen = Boolean(point);
        }
        if (close) c.closePath();
        c.lineJoin = "round";
        c.setLineDash(dash);
        c.lineWidth = width;
        this.ink(fill, stroke);
      },
      { alpha },
    );
  }

  rects(list, { fill, alpha = 1 }) {
    this.with(
      () => {
        this.c.fillStyle = fill;
        for (const [x, y, w, h] of list) this.c.fillRect(x, y, w, h);
      },
      { alpha },
    );
  }

  circle(x, y, r, { stroke, fill, width = 1, alpha = 1 }) {
    this.with(
      () => {
        const { c } = this;
        c.beginPath();
        c.arc(x, y, r, 0, 2 * Math.PI);
        c.lineWidth = width;
        this.ink(fill, stroke);
      },
      { alpha },
    );
  }

  text(x, y, words, { fill, size = 11, weight = 400, anchor = "start", alpha = 1, halo = null }) {
    this.with(
      () => {
        this.c.font = `${weight} ${size}px ${colour("face")}`;
        this.c.fillStyle = fill;
        this.c.textAlign = ANCHORS[anchor];
        this.c.textBaseline = "alphabetic";
        if (halo) {
          Object.assign(this.c, { strokeStyle: halo, lineWidth: 4, lineJoin: "round" });
          this.c.strokeText(words, x, y);
        }
        this.c.fillText(words, x, y);
      },
      { alpha },
    );
  }

  clip(x, y, w, h, draw) {
    this.c.save();
    this.place();
    this.c.beginPath();
    this.c.rect(x, y, w, h);
    this.c.clip();
    draw(this);
    this.c.restore();
  }
}

/** A canvas pen whose origin lies elsewhere. */
export function moved(pen, x, y, draw) {
  if (pen instanceof SvgPen)
    return draw(new SvgPen(pen.add("g", { transform: `translate(${x} ${y})` })));
  const { dx, dy } = pen;
  Object.assign(pen, { dx: dx + x, dy: dy + y });
  draw(pen);
  return Object.assign(pen, { dx, dy });
}

const tidy = (x) => Number(x.toFixed(2));

class SvgPen {
  constructor(node) {
    this.node = node;
  }

  add(tag, attributes, ...children) {
    const child = s(tag, attributes, ...children);
    this.node.append(child);
    return child;
  }

  path(points, { stroke, fill, width = 1, dash = [], alpha = 1, close = false }) {
    let d = "";
    let pen = false;
    for (const point of points) {
      if (point) d += `${pen ? "L" : "M"}${tidy(point[0])} ${tidy(point[1])}`;
      pen = Boolean(point);
    }
    return this.add("path", {
      d: close ? `${d}Z` : d,
      fill: fill ?? "none",
      stroke: stroke ?? null,
      "stroke-width": stroke ? width : null,
      "stroke-linejoin": stroke ? "round" : null,
      "stroke-dasharray": dash.length ? dash.join(" ") : null,
      opacity: alpha < 1 ? alpha : null,
    });
  }

  rects(list, { fill, alpha = 1 }) {
    const d = list
      .map(([x, y, w, h]) => `M${tidy(x)} ${tidy(y)}h${tidy(w)}v${tidy(h)}h${tidy(-w)}z`)
      .join("");
    return this.add("path", { d, fill, opacity: alpha < 1 ? alpha : null });
  }

  circle(x, y, r, { stroke, fill, width = 1, alpha = 1 }) {
    return this.add("circle", {
      cx: tidy(x),
      cy: tidy(y),
      r,
      fill: fill ?? "none",
      stroke: stroke ?? null,
      "stroke-width": stroke ? width : null,
      opacity: alpha < 1 ? alpha : null,
    });
  }

  text(x, y, words, { fill, size = 11, weight = 400, anchor = "start", alpha = 1, halo = null }) {
    const attributes = {
      x: tidy(x),
      y: tidy(y),
      fill,
      "font-size": size,
      "font-weight": weight,
      "font-family": colour("face"),
      "text-anchor": anchor,
      opacity: alpha < 1 ? alpha : null,
      ...(halo
        ? { stroke: halo, "stroke-width": 4, "stroke-linejoin": "round", "paint-order": "stroke" }
        : {}),
    };
    return this.add("text", attributes, words);
  }

  clip(x, y, width, height, draw) {
    // A nested picture clips what is drawn in it, and needs no id.
    const inner = this.add("svg", { x, y, width, height, viewBox: `${x} ${y} ${width} ${height}` });
    draw(new SvgPen(inner));
  }
}

/** An SVG element with a drawing; `words` is what it says to who can't see it. */
export function picture(width, height, words, draw) {
  const node = s("svg", {
    xmlns: "http://www.w3.org/2000/svg",
    width,
    height,
    viewBox: `0 0 ${width} ${height}`,
    role: "img",
    "aria-label": words,
  });
  draw(new SvgPen(node), width, height);
  return node;
}

let ruler = null;

/** How wide some words are. */
export function measure(words, size = 11, weight = 400) {
  ruler ??= document.createElement("canvas").getContext("2d");
  ruler.font = `${weight} ${size}px ${colour("face")}`;
  return ruler.measureText(words).width;
}
