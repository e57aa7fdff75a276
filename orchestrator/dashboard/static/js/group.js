// Charts over the same rounds: one crosshair and one zoom for all of them.

let made = 0;

export class Group {
  constructor() {
    this.key = `rounds-${(made += 1)}`;
    this.plots = new Set();
    this.domain = [0, 1];
    this.zoom = null;
  }

  range() {
    return this.zoom ?? this.domain;
  }

  zoomTo(range) {
    this.zoom = range;
    for (const plot of this.plots) plot.rescale();
  }
}
