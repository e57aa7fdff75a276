"""Whether a chart has drawn something, read from its pixels or its paths."""

from __future__ import annotations

from playwright.sync_api import Locator, Page, expect

# Pixels inside the plot that have a colour of a line: not the paper, and not the hairlines.
LINES = """
figure => {
  const canvas = figure.querySelector("canvas");
  const over = figure.querySelector(".u-over").getBoundingClientRect();
  const box = canvas.getBoundingClientRect();
  const k = canvas.width / box.width;
  const [x, y] = [(over.left - box.left) * k, (over.top - box.top) * k];
  const { data } = canvas.getContext("2d").getImageData(x, y, over.width * k, over.height * k);
  const style = getComputedStyle(document.documentElement);
  const names = ["ink", "soft", ...[...Array(7).keys()].map(n => `site-${n}`)];
  const wanted = names.map(name => style.getPropertyValue(`--${name}`).trim().slice(1))
    .map(hex => [0, 2, 4].map(at => parseInt(hex.slice(at, at + 2), 16)));
  let found = 0;
  for (let at = 0; at < data.length; at += 4) {
    if (data[at + 3] < 60) continue;
    if (wanted.some(c => c.every((v, j) => Math.abs(v - data[at + j]) < 24))) found += 1;
  }
  return found;
}
"""

SHAPES = """
figure => [...figure.querySelectorAll("svg path, svg circle")].filter(shape => {
  const box = shape.getBBox();
  return box.width + box.height > 2;
}).length
"""

# Pairs of words that lie on each other.
OVERLAPS = """
() => {
  const found = [];
  const groups = document.querySelectorAll(".caption, .row, .top, .heading, .phrases, .tabs");
  for (const group of groups) {
    const boxes = [...group.children]
      .filter(child => child.textContent.trim() && getComputedStyle(child).clipPath === "none")
      .map(child => [child, child.getBoundingClientRect()])
      .filter(([, box]) => box.width > 0 && box.height > 0);
    boxes.forEach(([a, p], k) => boxes.slice(k + 1).forEach(([b, q]) => {
      const wide = Math.min(p.right, q.right) - Math.max(p.left, q.left);
      const high = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
      if (wide > 1 && high > 1) found.push(`${a.textContent} / ${b.textContent}`);
    }));
  }
  return found;
}
"""


def chart(page: Page, name: str) -> Locator:
    """The figure of a chart."""
    return page.locator(f'figure[data-chart="{name}"]')


def expect_drawn(figure: Locator) -> None:
    """Lines on a canvas, or shapes in a picture, that can be seen."""
    expect(figure).to_be_visible()
    drawing = figure.locator("canvas, .matrix svg, .bar svg, .diagrams svg").first
    expect(drawing).to_be_visible()
    settle(figure.page)
    if figure.locator("canvas").count():
        assert figure.evaluate(LINES) > 40, f"{figure} has drawn no line"
    else:
        assert figure.evaluate(SHAPES) > 0, f"{figure} has drawn no shape"


def settle(page: Page) -> None:
    """Waits for two frames: in the first the page draws, at the second it has been shown."""
    page.evaluate(
        "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
    )


def hover(figure: Locator, share: float) -> None:
    """Puts the pointer over a plot, at a share of its width."""
    box = figure.locator(".u-over").bounding_box()
    assert box is not None
    figure.page.mouse.move(box["x"] + share * box["width"], box["y"] + box["height"] / 2)


def no_overlaps(page: Page) -> None:
    assert page.evaluate(OVERLAPS) == []


def no_sideways_scroll(page: Page) -> None:
    width = page.evaluate("() => document.scrollingElement.scrollWidth - innerWidth")
    assert width <= 0, f"the page is {width} pixels wider than its window"
