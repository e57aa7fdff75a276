// What is on the page, as files: numbers as CSV, drawings as SVG and PNG.

import { CanvasPen, moved, picture } from "./pen.js";
import { colour } from "./palette.js";

const PNG_SCALE = 2;

function download(name, blob) {
  const address = URL.createObjectURL(blob);
  const link = document.createElement("a");
  link.href = address;
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}

// A cell that a spreadsheet would take for a formula is marked as text.
const cell = (value) => {
  const text = value === null || value === undefined ? "" : String(value);
  if (typeof value === "number") return text;
  const safe = /^[=+\-@\t]/.test(text) ? `'${text}` : text;
  return /[",\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
};

export function saveCsv(name, { columns, rows }) {
  const text = [columns, ...rows].map((row) => row.map(cell).join(",")).join("\n");
  download(`${name}.csv`, new Blob([text, "\n"], { type: "text/csv" }));
}

const HEAD = 30;

function sheet({ title, width, height, draw }) {
  return (pen) => {
    pen.rects([[0, 0, width, height + HEAD]], { fill: colour("paper") });
    pen.text(10, 20, title, { fill: colour("ink"), size: 13, weight: 600 });
    moved(pen, 0, HEAD, (below) => draw(below, width, height));
  };
}

export function saveSvg(name, drawing) {
  const { title, width, height } = drawing;
  const node = picture(width, height + HEAD, title, sheet(drawing));
  const text = new XMLSerializer().serializeToString(node);
  download(`${name}.svg`, new Blob([text], { type: "image/svg+xml" }));
}

export async function savePng(name, drawing) {
  const canvas = document.createElement("canvas");
  canvas.width = drawing.width * PNG_SCALE;
  canvas.height = (drawing.height + HEAD) * PNG_SCALE;
  sheet(drawing)(new CanvasPen(canvas.getContext("2d"), PNG_SCALE));
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  download(`${name}.png`, blob);
}
