"use strict";
// Draws items and modules from the JSON of this page. Names are inserted as text, never as markup.

const data = JSON.parse(document.getElementById("data").textContent);
const tip = document.getElementById("tip");
const VIRIDIS = ["#440154", "#482878", "#3e4989", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725"];

function make(tag, attributes = {}, ...children) {
  const drawn = ["svg", "rect", "text"].includes(tag);
  const element = drawn ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function number(value) {
  return value === null || value === undefined ? "–" : String(value);
}

function colour(share) {
  const place = Math.min(Math.max(share, 0), 1) * (VIRIDIS.length - 1);
  const low = Math.min(Math.floor(place), VIRIDIS.length - 2);
  const part = (at) => [1, 3, 5].map((start) => parseInt(VIRIDIS[at].slice(start, start + 2), 16));
  const mixed = part(low).map((from, i) => Math.round(from + (part(low + 1)[i] - from) * (place - low)));
  return `rgb(${mixed.join(",")})`;
}

// A grid of cells, each with a colour or class and a text that appears under the pointer.
// `rows` are labels on the left, `columns` are labels below.
function grid(title, cells, nColumns, size, rows = [], columns = []) {
  const left = rows.length ? 12 + 6.2 * Math.max(...rows.map((name) => name.length)) : 0;
  const nRows = Math.ceil(cells.length / nColumns);
  const height = nRows * size.height + (columns.length ? 18 : 2);
  const box = `0 0 ${left + nColumns * size.width + 2} ${height}`;
  const svg = make("svg", { class: "grid", viewBox: box, role: "img", tabindex: 0, "aria-label": title });
  const drawn = cells.map((cell, i) => {
    const x = left + (i % nColumns) * size.width, y = Math.floor(i / nColumns) * size.height;
    const rect = make("rect", { x, y, width: size.width, height: size.height });
    if (cell.fill) rect.setAttribute("fill", cell.fill);
    else rect.setAttribute("class", cell.kind);
    svg.append(rect);
    return rect;
  });
  rows.forEach((name, i) => {
    const y = (i + 0.5) * size.height + 4;
    svg.append(make("text", { x: left - 8, y, "text-anchor": "end" }, name));
  });
  const step = [1, 2, 5, 10, 20].find((n) => columns.length <= 40 * n) || 50;
  columns.forEach((name, i) => {
    const x = left + (i + 0.5) * size.width;
    if (i % step === 0) svg.append(make("text", { x, y: height - 4, "text-anchor": "middle" }, String(name)));
  });
  addTips(svg, drawn, cells, nColumns);
  return svg;
}

// The pointer and the arrow keys select a cell.
function addTips(svg, drawn, cells, nColumns) {
  const index = new Map(drawn.map((rect, i) => [rect, i]));
  let at = 0;
  const leave = () => {
    drawn[at]?.classList.remove("at");
    tip.hidden = true;
  };
  svg.addEventListener("pointermove", (event) => {
    const i = index.get(event.target);
    if (i === undefined) leave();
    else show(cells[i].text, event.clientX, event.clientY);
  });
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("blur", leave);
  svg.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -nColumns, ArrowDown: nColumns };
    if (event.key === "Escape") leave();
    if (!(event.key in steps)) return;
    event.preventDefault();
    leave();
    at = Math.min(Math.max(at + steps[event.key], 0), cells.length - 1);
    drawn[at].classList.add("at");
    const place = drawn[at].getBoundingClientRect();
    show(cells[at].text, place.right, place.bottom);
  });
}

function show(text, x, y) {
  tip.textContent = text;
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - width - 8))}px`;
  tip.style.top = `${y + 18 + height > innerHeight ? y - height - 10 : y + 18}px`;
}

function choice(label, names, changed) {
  const select = make("select", {}, ...names.map((name, i) => make("option", { value: i }, name)));
  select.addEventListener("change", () => changed(Number(select.value)));
  return make("label", {}, `${label} `, select);
}

function modules(host) {
  for (const expert of data.experts) {
    const place = make("div");
    const draw = (i) => place.replaceChildren(map(expert, expert.maps[i]), scale(expert.maps[i]));
    host.append(make("h3", {}, expert.name));
    if (expert.maps.length > 1) {
      const names = expert.maps.map((one) => one.title);
      host.append(make("div", { class: "controls" }, choice("Show", names, draw)));
    }
    host.append(place);
    draw(0);
  }
}

function map(expert, shown) {
  const spread = shown.top - shown.bottom || 1;
  const cells = shown.components.flatMap((component, row) =>
    shown.blocks.map((block, column) => {
      const value = shown.values[row][column];
      const text = [`block ${block}, ${component}`, ...expert.maps.map((one) => valueOf(one, component, block))];
      if (value === null) return { kind: "none", text: `block ${block} has no ${component}` };
      const fill = value > shown.top ? null : colour((value - shown.bottom) / spread);
      return { fill, kind: "over", text: text.join("\n") };
    }));
  const width = Math.max(14, 700 / shown.blocks.length);
  return grid(`${shown.title}, ${expert.name}`, cells, shown.blocks.length, { width, height: 22 }, shown.components, shown.blocks);
}

function valueOf(one, component, block) {
  const row = one.values[one.components.indexOf(component)];
  const value = row ? row[one.blocks.indexOf(block)] : null;
  return `${one.title}: ${number(value)} ${one.unit}`.trim();
}

function scale(shown) {
  const bar = make("svg", { viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" });
  for (let i = 0; i < 50; i++) bar.append(make("rect", { x: 2 * i, width: 2.2, height: 10, fill: colour(i / 49) }));
  const ends = [make("span", {}, number(shown.bottom)), bar, make("span", {}, `${number(shown.top)} ${shown.unit}`)];
  return make("div", { class: "scale" }, ...ends, make("span", {}, shown.note));
}

function items(host) {
  const place = make("div");
  const names = data.metrics.map((one) => `${one.task} (${one.metric})`);
  const draw = (i) => compare(place, data.metrics[i]);
  host.append(make("div", { class: "controls" }, choice("Task", names, draw)), place);
  draw(0);
}

function compare(place, metric) {
  const rivals = metric.models.filter((_, i) => i !== metric.merged);
  const shown = make("div");
  const draw = (i) => shown.replaceChildren(...beside(metric, rivals[i]));
  const controls = make("div", { class: "controls" }, choice("Compare with", rivals.map((one) => one.name), draw));
  place.replaceChildren(...(rivals.length ? [controls, shown] : [shown]));
  draw(0);
}

const RIGHT_OR_WRONG = { win: "only the merged model is right", loss: "only the other model is right", both: "both are right", none: "neither is right, or no answer" };
const MORE_OR_LESS = { win: "the merged model is better", loss: "the merged model is worse", both: "equal", none: "not comparable" };
const ALONE = { both: "right, or a number", none: "wrong, or no answer" };

function beside(metric, rival) {
  const mine = metric.models[metric.merged].items;
  const theirs = rival ? rival.items : null;
  const marks = typeof mine === "string" && (!rival || typeof theirs === "string");
  const words = !rival ? ALONE : marks ? RIGHT_OR_WRONG : MORE_OR_LESS;
  const kinds = Array.from(mine, (_, i) => kind(metric, valueAt(mine, i), rival ? valueAt(theirs, i) : undefined, marks));
  const cells = kinds.map((one, i) => {
    const text = metric.models.map((model) => `${model.name}: ${said(metric, model.items, i)}`);
    return { kind: one, text: [`item ${i}: ${words[one]}`, ...text].join("\n") };
  });
  const key = Object.entries(words).map(([one, text]) => {
    const box = make("svg", { viewBox: "0 0 1 1", "aria-hidden": "true" }, make("rect", { class: one, width: 1, height: 1 }));
    return make("li", {}, box, `${text}: ${kinds.filter((other) => other === one).length}`);
  });
  const nColumns = cells.length <= 600 ? 50 : cells.length <= 4000 ? 80 : 160;
  const width = 800 / nColumns;
  return [make("ul", { class: "key" }, ...key), grid("items", cells, nColumns, { width, height: width })];
}

function isRight(metric, value) {
  return value === (metric.higher_is_better ? 1 : 0);
}

function kind(metric, mine, theirs, marks) {
  if (mine === null || theirs === null) return "none";
  if (theirs !== undefined && mine !== theirs) return mine > theirs === metric.higher_is_better ? "win" : "loss";
  return marks && !isRight(metric, mine) ? "none" : "both";
}

function valueAt(list, i) {
  if (typeof list !== "string") return list[i];
  return list[i] === "-" ? null : Number(list[i]);
}

function said(metric, list, i) {
  const value = valueAt(list, i);
  return typeof list === "string" && value !== null ? (isRight(metric, value) ? "right" : "wrong") : number(value);
}

for (const [id, fill] of [["items", items], ["modules", modules]]) {
  const host = document.getElementById(id);
  if (host) fill(host);
}
