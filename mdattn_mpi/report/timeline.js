"use strict";
// Draws the ranks' spans on a canvas as large as the window of a box that scrolls over all ranks.

const LABEL = 92; // pixels left of the lanes, for names
const AXIS = 22; // above them, for times
const LANE = { main: 14, read: 8, write: 8, device: 10 }; // heights
const GAP = 4; // between lanes, and twice between ranks
const FEW = 16; // ranks that are shown with all their lanes at first

function words(seconds) {
  const size = Math.abs(seconds);
  if (size < 1e-3) return `${(seconds * 1e6).toFixed(0)} µs`;
  if (size < 1) return `${(seconds * 1e3).toFixed(size < 0.1 ? 2 : 1)} ms`;
  if (size < 600) return `${seconds.toFixed(size < 10 ? 3 : 1)} s`;
  const minutes = Math.floor(seconds / 60);
  const rest = String(Math.floor(seconds % 60)).padStart(2, "0");
  return minutes < 60
    ? `${minutes} min ${rest} s`
    : `${Math.floor(minutes / 60)} h ${String(minutes % 60).padStart(2, "0")} min ${rest} s`;
}

// The first n for which values[n] > limit.
function after(values, limit) {
  let [low, high] = [0, values.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (values[middle] > limit) high = middle;
    else low = middle + 1;
  }
  return low;
}

class Timeline {
  constructor(place, data) {
    this.data = data;
    this.place = place;
    this.runs = [];
    this.tools = this.add(place, "div", "tools");
    this.view = this.add(place, "div", "view");
    this.canvas = this.add(this.view, "canvas");
    this.space = this.add(this.view, "div");
    this.said = this.add(place, "p", "span");
    this.said.setAttribute("role", "status");
    this.canvas.tabIndex = 0;
    this.canvas.setAttribute("role", "img");
    this.canvas.setAttribute("aria-label", "What every rank did when; arrow keys, +, - and 0");
    if (data.runs.length > 1) {
      const select = this.add(this.tools, "select");
      data.runs.forEach((_, n) => select.add(new Option(`run ${n + 1}`, n)));
      select.value = data.runs.length - 1;
      select.onchange = () => this.show(Number(select.value));
    }
    this.button("+", "zoom in", () => this.zoom(0.5));
    this.button("−", "zoom out", () => this.zoom(2));
    this.button("◀", "earlier", () => this.pan(-0.25));
    this.button("▶", "later", () => this.pan(0.25));
    this.button("whole run", "zoom out to all of it", () => this.all());
    const label = this.add(this.tools, "label");
    this.threads = this.add(label, "input");
    this.threads.type = "checkbox";
    this.threads.onchange = () => this.resize();
    label.append(" all threads, and the device");
    this.range = this.add(this.tools, "span", "range");
    this.listen();
  }

  add(parent, tag, name = "") {
    const made = document.createElement(tag);
    if (name) made.className = name;
    parent.append(made);
    return made;
  }

  button(text, title, action) {
    const made = this.add(this.tools, "button");
    Object.assign(made, { type: "button", textContent: text, title, onclick: action });
  }

  listen() {
    const { canvas, view } = this;
    new ResizeObserver(() => this.resize()).observe(this.place);
    view.addEventListener("scroll", () => this.draw());
    const keys = {
      "+": () => this.zoom(0.5), "=": () => this.zoom(0.5), w: () => this.zoom(0.5),
      "-": () => this.zoom(2), s: () => this.zoom(2), 0: () => this.all(),
      ArrowLeft: () => this.pan(-0.1), a: () => this.pan(-0.1),
      ArrowRight: () => this.pan(0.1), d: () => this.pan(0.1),
    };
    canvas.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey || !keys[event.key]) return;
      event.preventDefault();
      keys[event.key]();
    });
    canvas.addEventListener("wheel", (event) => {
      if (event.ctrlKey || event.metaKey) {
        event.preventDefault();
        this.zoom(Math.exp(event.deltaY / 200), this.timeAt(event.offsetX));
      } else if (Math.abs(event.deltaX) > Math.abs(event.deltaY)) {
        event.preventDefault();
        this.pan(event.deltaX / this.width());
      }
    }, { passive: false });
    canvas.addEventListener("dblclick", (event) => this.zoom(0.25, this.timeAt(event.offsetX)));
    canvas.addEventListener("pointerdown", (event) => {
      this.held = event.offsetX;
      canvas.setPointerCapture(event.pointerId);
    });
    canvas.addEventListener("pointerup", () => (this.held = undefined));
    canvas.addEventListener("pointerleave", () => (this.said.textContent = ""));
    canvas.addEventListener("pointermove", (event) => {
      if (this.held !== undefined) {
        this.pan((this.held - event.offsetX) / this.width());
        this.held = event.offsetX;
      } else {
        this.said.textContent = this.found(event.offsetX, event.offsetY);
      }
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.resize());
    addEventListener("beforeprint", () => this.print(true));
    addEventListener("afterprint", () => this.print(false));
  }

  async show(number) {
    this.runs[number] ??= await unpacked(this.data.runs[number]);
    this.run = this.data.runs[number];
    this.ranks = this.runs[number];
    this.place_of = Object.fromEntries(this.run.phases.map((phase, n) => [phase, n]));
    this.threads.checked = this.ranks.length <= FEW;
    [this.from, this.to] = [0, Math.max(this.run.until, 1e-6)];
    this.resize();
  }

  // Paper shows all ranks, in the colours of paper; there is no time for a frame of animation.
  print(begins) {
    if (!this.ranks) return;
    document.documentElement.classList.toggle("printing", begins);
    const high = Math.min(AXIS + this.ranks.length * this.rankHeight(), 8000);
    this.view.style.maxHeight = begins ? `${high + 2}px` : "";
    this.view.scrollTop = 0;
    this.printing = false;
    this.resize();
    this.printing = begins;
  }

  all() {
    [this.from, this.to] = [0, Math.max(this.run.until, 1e-6)];
    this.draw();
  }

  zoom(factor, about = (this.from + this.to) / 2) {
    const whole = Math.max(this.run.until, 1e-6);
    const wide = Math.min(whole, Math.max((this.to - this.from) * factor, this.run.tick * 20));
    const share = (about - this.from) / (this.to - this.from);
    this.from = Math.min(Math.max(0, about - share * wide), whole - wide);
    this.to = this.from + wide;
    this.draw();
  }

  pan(share) {
    const wide = this.to - this.from;
    const whole = Math.max(this.run.until, 1e-6);
    this.from = Math.min(Math.max(0, this.from + share * wide), whole - wide);
    this.to = this.from + wide;
    this.draw();
  }

  lanes() {
    return this.threads.checked ? ["main", "read", "write", "device"] : ["main"];
  }

  rankHeight() {
    const lanes = this.lanes();
    return lanes.reduce((sum, lane) => sum + LANE[lane] + GAP, lanes.length > 1 ? 2 * GAP : 0);
  }

  width() {
    return Math.max(50, this.canvas.clientWidth - LABEL);
  }

  timeAt(x) {
    return this.from + ((x - LABEL) / this.width()) * (this.to - this.from);
  }

  resize() {
    if (!this.ranks || this.printing) return;
    const whole = AXIS + this.ranks.length * this.rankHeight();
    const most = parseFloat(getComputedStyle(this.view).maxHeight) || 560;
    const [wide, high] = [this.view.clientWidth, Math.min(whole, most)];
    this.scale = Math.min(devicePixelRatio || 1, 16000 / Math.max(wide, high));
    this.canvas.style.width = `${wide}px`;
    this.canvas.style.height = `${high}px`;
    this.canvas.width = Math.round(wide * this.scale);
    this.canvas.height = Math.round(high * this.scale);
    this.space.style.height = `${Math.max(0, whole - high)}px`;
    const style = getComputedStyle(document.documentElement);
    this.colour = (name) => style.getPropertyValue(`--${name}`).trim();
    this.paint(); // at once: a canvas that has changed its size is empty
  }

  draw() {
    if (!this.ranks || !this.colour || this.asked || this.printing) return;
    this.asked = true;
    requestAnimationFrame(() => {
      this.asked = false;
      if (!this.printing) this.paint();
    });
  }

  paint() {
    const pen = this.canvas.getContext("2d");
    const [wide, high] = [this.canvas.clientWidth, this.canvas.clientHeight];
    pen.setTransform(this.scale, 0, 0, this.scale, 0, 0);
    pen.fillStyle = this.colour("back");
    pen.fillRect(0, 0, wide, high);
    pen.font = "12px system-ui, sans-serif";
    pen.textBaseline = "middle";
    const [top, each] = [this.view.scrollTop, this.rankHeight()];
    for (let n = Math.floor(top / each); n < this.ranks.length; n++) {
      let y = AXIS + n * each - top;
      if (y > high) break;
      pen.fillStyle = this.colour("text");
      pen.fillText(this.ranks[n].name, 6, y + LANE.main / 2, LABEL - 10);
      if (this.threads.checked) {
        pen.fillStyle = this.colour("aside");
        pen.fillText(this.ranks[n].host, 6, y + LANE.main + GAP + 8, LABEL - 10);
      }
      for (const lane of this.lanes()) {
        pen.fillStyle = this.colour("panel");
        pen.fillRect(LABEL, y, this.width(), LANE[lane]);
        this.paintLane(pen, lane, this.ranks[n].lanes[lane], y);
        y += LANE[lane] + GAP;
      }
    }
    this.paintAxis(pen, wide, high);
    this.range.textContent = `${words(this.from)} to ${words(this.to)}`;
  }

  paintAxis(pen, wide, high) {
    pen.fillStyle = this.colour("back");
    pen.fillRect(0, 0, wide, AXIS - 2);
    pen.strokeStyle = this.colour("line");
    const rough = ((this.to - this.from) * 110) / this.width();
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = power * ([1, 2, 5].find((m) => m * power >= rough) ?? 10);
    for (let n = Math.ceil(this.from / step); n * step <= this.to; n++) {
      const x = LABEL + ((n * step - this.from) / (this.to - this.from)) * this.width();
      pen.beginPath();
      pen.moveTo(x, AXIS - 6);
      pen.lineTo(x, high);
      pen.globalAlpha = 0.5;
      pen.stroke();
      pen.globalAlpha = 1;
      pen.fillStyle = this.colour("aside");
      const text = n ? words(n * step) : "0";
      pen.fillText(text, Math.min(x + 3, wide - pen.measureText(text).width - 2), 9);
    }
  }

  // A column of pixels is divided from the bottom up as its time was.
  paintLane(pen, name, lane, y) {
    const [left, columns] = [Math.round(LABEL * this.scale), Math.round(this.width() * this.scale)];
    const rate = columns / (this.to - this.from);
    const about = this.data.phases[name];
    const order = Object.keys(about).filter((part) => name === "device" || this.place_of[part] >= 0);
    const places = order.map((part) => (name === "device" ? SHARES.indexOf(part) : this.place_of[part]));
    const colours = order.map((part) => this.colour(about[part].colour));
    const shares = new Float64Array(order.length);
    const sums = new Float64Array(columns * order.length);
    const touched = new Uint8Array(columns);
    const [top, high] = [Math.round(y * this.scale), Math.round(LANE[name] * this.scale)];
    const stack = (x, wide, part_of) => {
      let done = 0;
      for (let part = 0; part < order.length; part++) {
        const share = part_of(part);
        if (!share) continue;
        const [low, up] = [done * high, Math.min(1, (done += share)) * high].map(Math.round);
        pen.fillStyle = colours[part];
        pen.fillRect(left + x, top + high - up, wide, up - low);
      }
    };
    const touch = (column, weight) => {
      if (weight <= 0 || column >= columns) return;
      touched[column] = 1;
      for (let part = 0; part < order.length; part++)
        sums[column * order.length + part] += weight * shares[part];
    };

    pen.setTransform(1, 0, 0, 1, 0, 0);
    for (let n = after(lane.end, this.from); n < lane.start.length; n++) {
      if (lane.start[n] >= this.to) break;
      const x = Math.max(0, (lane.start[n] - this.from) * rate);
      const end = Math.min(columns, (lane.end[n] - this.from) * rate);
      places.forEach((place, part) => {
        const fill = name === "device" ? lane.shares[place][n] : lane.fill[n];
        shares[part] = name === "device" || lane.phase[n] === place ? fill / 255 : 0;
      });
      const [first, last] = [Math.ceil(x), Math.floor(end)]; // whole columns of this span alone
      if (last < first) {
        touch(last, end - x);
      } else {
        touch(first - 1, first - x);
        if (last > first) stack(first, last - first, (part) => shares[part]);
        touch(last, end - last);
      }
    }
    for (let column = 0; column < columns; column++)
      if (touched[column]) stack(column, 1, (part) => sums[column * order.length + part]);
    pen.setTransform(this.scale, 0, 0, this.scale, 0, 0);
    if (name === "main") this.writeItems(pen, lane, y);
  }

  // Names of the items in whose computing there is room for them.
  writeItems(pen, lane, y) {
    const rate = this.width() / (this.to - this.from);
    for (let n = after(lane.end, this.from); n < lane.start.length; n++) {
      if (lane.start[n] >= this.to) break;
      const x = Math.max(0, (lane.start[n] - this.from) * rate);
      const wide = Math.min(this.width(), (lane.end[n] - this.from) * rate) - x;
      if (wide > 48 && this.run.phases[lane.phase[n]] === "enqueue" && lane.item[n] >= 0)
        this.write(pen, lane, n, x, wide, y);
    }
  }

  write(pen, lane, n, x, wide, y) {
    const more = lane.number[n] > 1 ? ` and ${lane.number[n] - 1} more` : "";
    pen.save();
    pen.beginPath();
    pen.rect(LABEL + x, y, wide - 3, LANE.main);
    pen.clip();
    pen.font = "11px system-ui, sans-serif";
    pen.fillStyle = this.colour("back");
    pen.fillText(this.data.items[lane.item[n]] + more, LABEL + x + 3, y + LANE.main / 2 + 0.5);
    pen.restore();
  }

  // What is at a place of the canvas, in a sentence.
  found(x, y) {
    const each = this.rankHeight();
    const down = y - AXIS + this.view.scrollTop;
    const rank = this.ranks[Math.floor(down / each)];
    if (!rank || x < LABEL || y < AXIS) return "";
    let rest = down % each;
    for (const name of this.lanes()) {
      if (rest < LANE[name]) return this.described(rank, name, this.timeAt(x));
      rest -= LANE[name] + GAP;
    }
    return "";
  }

  described(rank, name, time) {
    const lane = rank.lanes[name];
    const where = `${rank.name} on ${rank.host}, ${this.data.threads[name]}`;
    const n = after(lane.end, time);
    if (n >= lane.start.length || lane.start[n] > time) return `${where}: nothing at ${words(time)}`;
    const took = `${words(lane.end[n] - lane.start[n])} from ${words(lane.start[n])} on`;
    const about = this.data.phases[name];
    if (name === "device") {
      const shares = SHARES.map(
        (part, p) => `${about[part].words} ${Math.round(lane.shares[p][n] / 2.55)} %`,
      );
      return `${where}: ${shares.join(", ")}, in ${took}`;
    }
    const item = lane.item[n] >= 0 ? ` ${this.data.items[lane.item[n]]}` : "";
    const phase = about[this.run.phases[lane.phase[n]]].words;
    if (lane.number[n] < 2) return `${where}: ${phase},${item} ${took}`;
    const busy = Math.round(lane.fill[n] / 2.55);
    return `${where}: ${lane.number[n]} short phases, mostly “${phase}”, from${item} on, ${busy} % of ${took}`;
  }
}

const found = document.getElementById("timeline-data");
const timeline = new Timeline(document.getElementById("timeline"), JSON.parse(found.textContent));
timeline.show(timeline.data.runs.length - 1);
