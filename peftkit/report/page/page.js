"use strict";
// The page is whole without this script: it adds switches, smoothing, a logarithmic scale, values under the pointer, sorting.
const CHARTS = JSON.parse(document.getElementById("charts").textContent);
const all = (selector, from = document) => [...from.querySelectorAll(selector)];
const make = (tag, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};
const hidden = new Set();
const number = (value) =>
  value === null ? "–" : Math.abs(value) >= 1e4 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(4)));

const short = (value) => {
  for (const [size, letter] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]]) if (Math.abs(value) >= size) return Number((value / size).toPrecision(4)) + letter;
  return value && Math.abs(value) < 1e-3 ? value.toExponential(1).replace(".0e", "e") : String(Number(value.toPrecision(4)));
};

// Exponential moving average, without the pull towards its start (Kingma and Ba 2014, arXiv:1412.6980, section 3).
function smoothed(values, weight) {
  let sum = 0;
  let total = 0;
  return values.map((value) => {
    if (value === null) return null;
    sum = weight * sum + (1 - weight) * value;
    total = weight * total + (1 - weight);
    return sum / total;
  });
}

// Multiples of 1, 2 or 5 times a power of ten, about four of them; logarithms: powers of ten, and their double and fivefold.
function ticksOf([low, high], isLog) {
  if (isLog) {
    const factors = high - low > 3 ? [1] : [1, 2, 5];
    const powers = Array.from({ length: Math.ceil(high) - Math.floor(low) + 1 }, (_, at) => 10 ** (Math.floor(low) + at));
    return powers.flatMap((power) => factors.map((factor) => factor * power))
      .filter((tick) => Math.log10(tick) >= low && Math.log10(tick) <= high);
  }
  const unit = 10 ** Math.floor(Math.log10((high - low) / 4));
  const off = (factor) => Math.abs((high - low) / (unit * factor) - 4);
  const step = unit * [1, 2, 5, 10].reduce((best, factor) => (off(factor) < off(best) ? factor : best));
  const first = Math.ceil(low / step - 1e-9);
  return Array.from({ length: Math.floor(high / step + 1e-9) - first + 1 }, (_, at) => Number(((first + at) * step).toPrecision(12)));
}

class Chart {
  constructor(figure, data) {
    Object.assign(this, { figure, data, weight: 0, isLog: false, place: -1, y: data.y });
    this.area = figure.querySelector(".area");
    this.steps = [...new Set(Object.values(data.lines).flatMap((line) => line.x))].sort((a, b) => a - b);
    this.settings = figure.querySelector(".settings");
    if ("smooths" in figure.dataset) this.addSmoothing();
    const values = this.values();
    const [low, high] = [Math.min(...values), Math.max(...values)];
    if (low > 0 && high > low * (high > 1 ? 3 : 100)) this.addScale(); // shares are read better as they are
    this.addReading();
    if (this.weight) this.draw();
  }

  values() {
    const lines = Object.entries(this.data.lines).filter(([key]) => !hidden.has(key));
    return lines.flatMap(([, line]) => line.y).filter((value) => value !== null);
  }

  addSmoothing() {
    const slider = make("input", { type: "range", min: 0, max: 0.98, step: 0.02, value: this.steps.length > 200 ? 0.9 : 0 });
    slider.addEventListener("input", () => { this.weight = Number(slider.value); this.draw(); });
    this.weight = Number(slider.value);
    this.settings.append(make("label", {}, "Smoothing", slider));
  }

  addScale() {
    const button = make("button", { type: "button", textContent: "Log scale" });
    button.setAttribute("aria-pressed", "false");
    button.addEventListener("click", () => {
      this.isLog = !this.isLog;
      button.setAttribute("aria-pressed", String(this.isLog));
      this.figure.classList.toggle("is-log", this.isLog);
      this.rescale();
    });
    this.settings.append(button);
  }

  // The axis is that of the lines that are shown; with all of them it is the one that the page came with.
  rescale() {
    const values = this.values();
    const isWhole = !Object.keys(this.data.lines).some((key) => hidden.has(key));
    if (values.length && (this.isLog || !isWhole)) {
      const scaled = this.isLog ? values.map(Math.log10) : values;
      const [low, high] = [Math.min(...scaled), Math.max(...scaled)];
      const margin = 0.04 * (high - low) || Math.abs(low) / 2 || 1;
      this.y = [!this.isLog && low >= 0 && low <= (high - low) / 2 ? 0 : low - margin, high + margin];
    } else {
      this.y = this.data.y;
    }
    const ticks = ticksOf(this.y, this.isLog).map((tick) => [tick, this.up(tick)]);
    const labels = ticks.map(([tick, at]) => {
      const label = make("span", { textContent: short(tick) });
      label.style.bottom = `${100 * at}%`;
      return label;
    });
    this.figure.querySelector(".y").replaceChildren(...labels);
    for (const line of all(".grid", this.figure)) line.remove();
    for (const [, at] of ticks) {
      const line = document.createElementNS("http://www.w3.org/2000/svg", "path");
      line.setAttribute("class", "grid");
      line.setAttribute("d", `M0 ${1000 * (1 - at)}H1000`);
      this.area.querySelector("svg").prepend(line);
    }
    const [stretch, shift] = [(this.data.y[1] - this.data.y[0]) / (this.y[1] - this.y[0]), this.up(this.data.y[1])];
    for (const band of all(".band", this.figure)) band.setAttribute("transform", `matrix(1 0 0 ${stretch} 0 ${1000 * (1 - shift)})`);
    this.draw();
  }

  across(x) { return (x - this.data.x[0]) / (this.data.x[1] - this.data.x[0]); }

  up(y) { return ((this.isLog ? Math.log10(y) : y) - this.y[0]) / (this.y[1] - this.y[0]); }

  path(xs, ys, dots) {
    let pen = "M";
    if (!dots && xs.length < 3) return "";
    return xs.map((x, at) => {
      if (ys[at] === null) { pen = "M"; return ""; }
      const point = `${Math.round(1000 * this.across(x))} ${(1000 * (1 - this.up(ys[at]))).toFixed(1)}`;
      if (dots) return `M${point}h0`;
      const part = pen + point;
      pen = "L";
      return part;
    }).join("");
  }

  draw() {
    for (const group of all("svg g", this.figure)) {
      const { x, y } = this.data.lines[group.dataset.key];
      const smooths = this.weight > 0 && x.length > 2;
      const line = group.querySelector(".line:not(.raw)");
      line.setAttribute("d", this.path(x, smooths ? smoothed(y, this.weight) : y));
      group.querySelector(".dots")?.setAttribute("d", smooths ? "" : this.path(x, y, true));
      let raw = group.querySelector(".raw");
      if (smooths && !raw) {
        raw = line.cloneNode();
        raw.classList.add("raw");
        group.prepend(raw);
      }
      raw?.setAttribute("d", smooths ? this.path(x, y) : "");
    }
  }

  // A slider is what it is to the keyboard and to a screen reader: arrows move over the steps, the values are told.
  addReading() {
    this.cursor = make("div", { className: "cursor", hidden: true });
    this.tip = make("div", { className: "tip", hidden: true });
    this.area.append(this.cursor, this.tip);
    this.area.tabIndex = 0;
    const title = this.figure.querySelector("h3").textContent;
    const says = { role: "slider", "aria-label": `${title}: values by step`, "aria-valuemin": 0, "aria-valuemax": this.steps.length - 1 };
    for (const [name, value] of Object.entries(says)) this.area.setAttribute(name, value);
    this.area.setAttribute("aria-valuenow", 0);
    this.area.addEventListener("pointermove", (event) => {
      const box = this.area.getBoundingClientRect();
      const at = (event.clientX - box.left) / box.width;
      const distance = (step) => Math.abs(this.across(step) - at);
      this.read(this.steps.reduce((best, step, place) => (distance(step) < distance(this.steps[best]) ? place : best), 0));
    });
    this.area.addEventListener("keydown", (event) => this.move(event));
    this.area.addEventListener("focus", () => { if (this.area.matches(":focus-visible")) this.read(Math.max(this.place, 0)); });
    for (const name of ["pointerleave", "blur"]) this.area.addEventListener(name, () => this.stop());
  }

  move(event) {
    const far = Math.max(1, Math.round(this.steps.length / 20));
    const by = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, PageUp: far, PageDown: -far, Home: -1e9, End: 1e9 }[event.key];
    if (event.key === "Escape") this.stop();
    if (!by) return;
    event.preventDefault();
    this.read(Math.min(Math.max(this.place + by, 0), this.steps.length - 1));
  }

  read(place) {
    this.place = place;
    const step = this.steps[place];
    const values = Object.entries(this.data.lines)
      .filter(([key]) => !hidden.has(key))
      .map(([key, line]) => [key, line.label, line.y[line.x.indexOf(step)] ?? null])
      .filter(([, , value]) => value !== null)
      .sort((a, b) => b[2] - a[2]);
    const title = make("div", { textContent: `step ${step.toLocaleString("en")}` });
    this.tip.replaceChildren(title, ...values.map(([key, label, value]) => {
      const group = this.figure.querySelector(`g[data-key="${key}"]`);
      const mark = make("i");
      mark.style.cssText = `width:.7rem;height:.25rem;background:${group.style.getPropertyValue("--c")}`;
      return make("div", {}, mark, label, make("b", { textContent: number(value) }));
    }));
    const at = this.across(step);
    this.cursor.hidden = this.tip.hidden = false;
    this.cursor.style.left = `${100 * at}%`;
    this.tip.style.cssText = at < 0.5 ? `left:calc(${100 * at}% + .6rem)` : `right:calc(${100 * (1 - at)}% + .6rem)`;
    this.area.setAttribute("aria-valuenow", place);
    const told = values.map(([, label, value]) => `${label} ${number(value)}`).join(", ");
    this.area.setAttribute("aria-valuetext", `step ${step}: ${told || "no value"}`);
  }

  stop() { this.cursor.hidden = this.tip.hidden = true; }
}

function switchLine(key) {
  hidden.has(key) ? hidden.delete(key) : hidden.add(key);
  for (const element of all(`[data-key="${CSS.escape(key)}"]`)) {
    if (element.matches("button")) element.setAttribute("aria-pressed", String(!hidden.has(key)));
    else element.classList.toggle("is-off", hidden.has(key));
  }
  for (const chart of charts) if (key in chart.data.lines) chart.rescale();
}

function sortBy(table, column, header) {
  const descends = header.getAttribute("aria-sort") === "ascending";
  const valueOf = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
  const compare = (a, b) => {
    const [one, other] = [valueOf(a), valueOf(b)];
    if (one === "" || other === "") return (one === "") - (other === ""); // what is missing comes last, either way
    const order = isNaN(one) || isNaN(other) ? one.localeCompare(other, "en", { numeric: true }) : one - other;
    return descends ? -order : order;
  };
  for (const other of all("thead th", table)) other.setAttribute("aria-sort", other === header ? (descends ? "descending" : "ascending") : "none");
  table.tBodies[0].append(...[...table.rows].slice(table.tHead.rows.length).sort(compare));
}

function addFilter(table) {
  const rows = [...table.tBodies[0].rows];
  const count = make("output", { textContent: `${rows.length} rows` });
  const input = make("input", { type: "search", placeholder: "part of any cell" });
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/);
    for (const row of rows) row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
    count.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} rows`;
  });
  table.parentElement.before(make("label", { className: "filter" }, `Filter ${table.dataset.filter.toLowerCase()}`, input, count));
}

// Labels go where they overlap neither points nor each other: right, left, above or below, nearer first.
function placeLabels(area) {
  const inside = area.getBoundingClientRect();
  const points = all(".point", area).map((point) => {
    const dot = point.getBoundingClientRect();
    return { label: point.querySelector("b"), x: dot.left - inside.left, y: dot.top - inside.top };
  });
  const taken = points.map(({ x, y }) => [x - 7, y - 7, x + 7, y + 7]);
  for (const { label, x, y } of points) {
    const { width, height } = label.getBoundingClientRect();
    const places = [];
    for (const far of [0, 9, 18, 27, 36, 48, 60]) {
      places.push([10, -height / 2 - far], [10, -height / 2 + far], [-width - 10, -height / 2 - far], [-width - 10, -height / 2 + far]);
      places.push([-width / 2, -height - 8 - far], [-width / 2, 8 + far]);
    }
    const boxOf = ([left, top]) => [x + left, y + top, x + left + width, y + top + height];
    const fits = (box) => box[0] >= 0 && box[1] >= -4 && box[2] <= inside.width && box[3] <= inside.height &&
      !taken.some((other) => box[0] < other[2] && other[0] < box[2] && box[1] < other[3] && other[1] < box[3]);
    const place = places.find((candidate) => fits(boxOf(candidate))) ?? places[0];
    taken.push(boxOf(place));
    label.style.cssText = `left:${place[0]}px;top:${place[1]}px`;
  }
}

const charts = all("[data-chart]").map((figure) => new Chart(figure, CHARTS[figure.dataset.chart]));
for (const button of all("button.key")) button.addEventListener("click", () => switchLine(button.dataset.key));
for (const table of all("table[data-sort]")) {
  all("thead th", table).forEach((header, column) => {
    const button = make("button", { type: "button" }, ...header.childNodes);
    button.addEventListener("click", () => sortBy(table, column, header));
    header.setAttribute("aria-sort", "none");
    header.append(button);
  });
}
for (const table of all("table[data-filter]")) addFilter(table);
const placeAll = () => all(".pareto .area").forEach(placeLabels);
placeAll();
addEventListener("resize", placeAll);
let closed = [];
addEventListener("beforeprint", () => {
  closed = all("details:not([open])");
  for (const details of closed) details.open = true;
  placeAll();
});
addEventListener("afterprint", () => { for (const details of closed) details.open = false; });
// A link to something inside closed details opens them.
addEventListener("hashchange", () => document.getElementById(location.hash.slice(1))?.closest("details")?.setAttribute("open", ""));
