// The timeline: prompts as coloured stretches, the playhead, and arcs from now to what memory gave back.

const SVG = "http://www.w3.org/2000/svg";
const BAR = 64; // top of the bar; the arcs are above it
const HEIGHT = 100;

export class Timeline {
  constructor(box, track, index, { colour, seek, label }) {
    Object.assign(this, { box, track, index, colour, label });
    this.reset();
    const at = (event) => {
      const inside = box.getBoundingClientRect();
      return ((event.clientX - inside.left) / inside.width) * this.span;
    };
    box.addEventListener("pointerdown", (event) => {
      if (event.button) return;
      box.setPointerCapture(event.pointerId);
      seek(at(event));
    });
    box.addEventListener("pointermove", (event) => {
      if (box.hasPointerCapture(event.pointerId)) seek(at(event));
    });
    new ResizeObserver(() => this.draw()).observe(box);
  }

  reset() {
    this.runs = []; // stretches with one prompt: { prompt, from, to }
    this.scanned = 0;
    this.now = 0;
    this.recalled = [];
  }

  get span() {
    return Math.max(10, this.index.seconds * 1.02);
  }

  // Look through blocks that are known by now, in order.
  scan() {
    for (let block; (block = this.index.known(this.scanned)); this.scanned++) {
      const last = this.runs[this.runs.length - 1];
      const end = block.time + block.duration;
      if (last && last.prompt === block.shot.prompt) last.to = end;
      else this.runs.push({ prompt: block.shot.prompt, from: block.time, to: end });
    }
  }

  show(now, recalled) {
    this.now = now;
    this.recalled = recalled;
    this.draw();
  }

  draw() {
    if (this.pending) return;
    this.pending = requestAnimationFrame(() => {
      this.pending = 0;
      this.paint();
    });
  }

  paint() {
    this.scan();
    const width = this.box.clientWidth;
    if (!width) return;
    const x = (time) => Math.min(width, (time / this.span) * width);
    const shapes = [make("rect", { x: 0, y: BAR, width, height: 22, rx: 7, class: "rail" })];
    for (const run of this.runs) {
      const from = x(run.from);
      const wide = Math.max(1, x(run.to) - from - 1);
      shapes.push(make("rect", { x: from, y: BAR, width: wide, height: 22, rx: Math.min(5, wide / 2), class: `run ${this.colour(run.prompt)}` }));
      if (wide > 7 * Math.min(run.prompt.length, 10) + 10) {
        shapes.push(make("text", { x: from + 7, y: BAR + 15, class: "name" }, shorten(run.prompt, (wide - 12) / 6.4)));
      }
    }
    for (const mark of ticks(this.span)) {
      shapes.push(make("text", { x: x(mark) + 3, y: HEIGHT - 1, class: "tick" }, clock(mark)));
      shapes.push(make("line", { x1: x(mark), x2: x(mark), y1: BAR + 22, y2: HEIGHT, class: "notch" }));
    }
    const here = x(this.now);
    for (const { time, similarity } of [...this.recalled].reverse()) {
      const there = x(time);
      const rise = Math.min(BAR - 8, 14 + Math.abs(here - there) * 0.22);
      const path = `M ${here} ${BAR} C ${here} ${BAR - rise * 1.3}, ${there} ${BAR - rise * 1.3}, ${there} ${BAR}`;
      shapes.push(make("path", { d: path, class: "arc", opacity: 0.35 + 0.65 * Math.max(0, Math.min(1, similarity)) }));
      shapes.push(make("circle", { cx: there, cy: BAR, r: 4, class: "end" }));
    }
    shapes.push(make("line", { x1: here, x2: here, y1: BAR - 8, y2: BAR + 28, class: "now" }));
    shapes.push(make("circle", { cx: here, cy: BAR - 8, r: 5, class: "now" }));
    this.track.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    this.track.replaceChildren(...shapes);
    this.box.setAttribute("aria-valuemax", this.index.seconds.toFixed(1));
    this.box.setAttribute("aria-valuenow", this.now.toFixed(1));
    this.box.setAttribute("aria-valuetext", this.label(this.now));
  }
}

export function clock(seconds) {
  const whole = Math.max(0, Math.floor(seconds));
  const hours = Math.floor(whole / 3600);
  const rest = `${String(Math.floor(whole / 60) % 60).padStart(hours ? 2 : 1, "0")}:${String(whole % 60).padStart(2, "0")}`;
  return hours ? `${hours}:${rest}` : rest;
}

function ticks(span) {
  const step = [1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600].find((each) => span / each <= 8) ?? 7200;
  return Array.from({ length: Math.ceil(span / step) }, (_, i) => i * step);
}

function shorten(text, most) {
  return text.length > most ? `${text.slice(0, Math.max(1, most - 1))}…` : text;
}

function make(kind, attributes, text) {
  const shape = document.createElementNS(SVG, kind);
  for (const [name, value] of Object.entries(attributes)) shape.setAttribute(name, value);
  if (text !== undefined) shape.textContent = text;
  return shape;
}
