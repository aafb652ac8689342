"use strict";
// Draws items and modules from the JSON of this page. Names and texts are inserted as text, never as markup.

const data = JSON.parse(document.getElementById("data").textContent);
const tip = document.getElementById("tip");
const VIRIDIS = ["#440154", "#482878", "#3e4989", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725"];
const DRAWN = ["svg", "rect", "text", "path"];
const PAGE = 10; // items that are listed at once
const LONG = 320; // characters of a text that are shown at first

function make(tag, attributes = {}, ...children) {
  const drawn = DRAWN.includes(tag);
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

// Draws into a place by its width, and again when the window changes it.
function fitted(place, draw) {
  let width = 0;
  const redraw = () => {
    const now = place.clientWidth;
    if (!now || now === width) return;
    width = now;
    place.replaceChildren(...draw(now));
  };
  addEventListener("resize", redraw);
  redraw();
  return place;
}

// A grid of cells, each with a colour or class and a text that appears under the pointer; `cell.value` is written into it.
// `rows` are labels on the left, `columns` are labels below, or upright above if they are texts.
function grid(title, cells, nColumns, size, rows = [], columns = []) {
  const left = rows.length ? labelWidth(rows) : 0;
  const upright = columns.some((name) => typeof name === "string");
  const above = upright ? labelWidth(columns) : 0;
  const nRows = Math.ceil(cells.length / nColumns);
  const width = left + nColumns * size.width + 2, height = above + nRows * size.height + (columns.length && !upright ? 18 : 2);
  const svg = make("svg", { class: "grid", viewBox: `0 0 ${width} ${height}`, width, height, role: "img", tabindex: 0, "aria-label": title });
  const drawn = cells.map((cell, i) => {
    const x = left + (i % nColumns) * size.width, y = above + Math.floor(i / nColumns) * size.height;
    const rect = make("rect", { x, y, width: size.width, height: size.height });
    if (cell.fill) rect.setAttribute("fill", cell.fill);
    else rect.setAttribute("class", cell.kind);
    svg.append(rect);
    return rect;
  });
  cells.forEach((cell, i) => {
    if (!cell.value) return;
    const x = left + (i % nColumns + 0.5) * size.width, y = above + (Math.floor(i / nColumns) + 0.5) * size.height + 4;
    const text = make("text", { x, y, "text-anchor": "middle" }, cell.value);
    text.style.fill = cell.ink;
    svg.append(text);
  });
  rows.forEach((name, i) => {
    const y = above + (i + 0.5) * size.height + 4;
    svg.append(make("text", { x: left - 8, y, "text-anchor": "end" }, String(name)));
  });
  const step = upright ? 1 : [1, 2, 5, 10, 20].find((n) => size.width * n >= 20) || 50;
  columns.forEach((name, i) => {
    const x = left + (i + 0.5) * size.width;
    if (upright) svg.append(make("text", { transform: `translate(${x + 4},${above - 6}) rotate(-90)` }, name));
    else if (i % step === 0) svg.append(make("text", { x, y: height - 4, "text-anchor": "middle" }, String(name)));
  });
  addTips(svg, drawn, cells, nColumns);
  return svg;
}

function labelWidth(names) {
  return 12 + 6.2 * Math.max(...names.map((name) => String(name).length));
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
  svg.addEventListener("click", (event) => cells[index.get(event.target)]?.chosen?.());
  svg.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -nColumns, ArrowDown: nColumns };
    if (event.key === "Escape") leave();
    if (event.key === "Enter") cells[at].chosen?.();
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

function choice(label, names, changed, start = 0) {
  const select = make("select", {}, ...names.map((name, i) => make("option", { value: i }, name)));
  select.value = start;
  select.addEventListener("change", () => changed(Number(select.value)));
  return make("label", {}, `${label} `, select);
}

function modules(host) {
  for (const expert of data.experts) {
    const place = make("div"), shown = make("div");
    let at = 0;
    const draw = (width) => [map(expert, expert.maps[at], width), scale(expert.maps[at])];
    host.append(make("h3", {}, expert.name));
    if (expert.maps.length > 1) {
      const names = expert.maps.map((one) => one.title);
      const changed = (i) => {
        at = i;
        shown.replaceChildren(...draw(shown.clientWidth));
      };
      host.append(make("div", { class: "controls" }, choice("Show", names, changed)));
    }
    place.append(shown);
    host.append(place);
    fitted(shown, draw);
  }
}

// Blocks are columns; where they would be too narrow, as on a phone, they are rows.
function map(expert, shown, width) {
  const { components, blocks } = shown;
  const title = `${shown.title}, ${expert.name}`;
  const room = (width - labelWidth(components) - 2) / blocks.length;
  const cell = (row, column, wide) => moduleCell(expert, shown, row, column, wide);
  if (room >= 14) {
    const wide = Math.min(room, 64);
    const cells = components.flatMap((_, row) => blocks.map((_, column) => cell(row, column, wide)));
    return grid(title, cells, blocks.length, { width: wide, height: 22 }, components, blocks);
  }
  const wide = Math.min((width - labelWidth(blocks) - 2) / components.length, 64);
  const cells = blocks.flatMap((_, column) => components.map((_, row) => cell(row, column, wide)));
  return grid(title, cells, components.length, { width: wide, height: 20 }, blocks, shortened(components));
}

function shortened(components) {
  const last = components.map((name) => name.split(".").pop());
  return new Set(last).size === last.length ? last : components;
}

function moduleCell(expert, shown, row, column, width) {
  const [component, block, value] = [shown.components[row], shown.blocks[column], shown.values[row][column]];
  if (value === null) return { kind: "none", text: `block ${block} has no ${component}` };
  const share = (value - shown.bottom) / (shown.top - shown.bottom || 1);
  const text = [`block ${block}, ${component}`, ...expert.maps.map((one) => valueOf(one, component, block))].join("\n");
  const written = width >= 32 ? { value: digits(value), ink: share > 0.55 && share <= 1 ? "#000" : "#fff" } : {};
  return { fill: value > shown.top ? null : colour(share), kind: "over", text, ...written };
}

function digits(value) {
  const two = value.toPrecision(2);
  return two.includes("e") ? String(Number(two)) : two;
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
  const names = data.metrics.map((metric) => `${metric.task} (${metric.metric})`);
  const draw = (i) => compare(place, data.metrics[i]);
  host.append(make("div", { class: "controls" }, choice("Task", names, draw)), place);
  draw(0);
}

function compare(place, metric) {
  const rivals = metric.models.map((_, i) => i).filter((i) => i !== metric.merged);
  const shown = make("div");
  const draw = (i) => {
    shown.replaceChildren();
    beside(shown, metric, rivals[i]);
  };
  const start = Math.max(0, rivals.indexOf(metric.against));
  const names = rivals.map((i) => metric.models[i].name);
  const controls = make("div", { class: "controls" }, choice("Compare with", names, draw, start));
  place.replaceChildren(...(rivals.length ? [controls, shown] : [shown]));
  draw(start);
}

const RIGHT_OR_WRONG = { win: "only the merged model is right", loss: "only the other model is right", both: "both are right", none: "neither is right, or no answer" };
const MORE_OR_LESS = { win: "the merged model is better", loss: "the merged model is worse", both: "equal", none: "not comparable" };
const ALONE = { both: "right, or a number", none: "wrong, or no answer" };
const BADGES = { win: "▲ won", loss: "▼ lost", both: "= equal", none: "= neither right" };

// What the merged model did on each item beside a rival (undefined if it was scored alone): a key, a picture, a list.
function beside(place, metric, rival) {
  const mine = metric.models[metric.merged].items;
  const theirs = rival === undefined ? null : metric.models[rival].items;
  const marks = typeof mine === "string" && (!theirs || typeof theirs === "string");
  const words = !theirs ? ALONE : marks ? RIGHT_OR_WRONG : MORE_OR_LESS;
  const kinds = Array.from(mine, (_, i) => kind(metric, valueAt(mine, i), theirs ? valueAt(theirs, i) : undefined, marks));
  const list = listed(metric, rival, kinds);
  const cells = kinds.map((one, i) => {
    const said = metric.models.map((model) => `${model.name}: ${result(metric, model.items, i)}`);
    return { kind: one, text: [`item ${i}: ${words[one]}`, ...said].join("\n"), chosen: () => list.find(i) };
  });
  const key = Object.entries(words).map(([one, text]) => {
    const box = make("svg", { viewBox: "0 0 14 14", "aria-hidden": "true" }, make("rect", { class: one, width: 14, height: 14 }), glyph(one, 0, 0, 14));
    return make("li", {}, box, `${text}: ${kinds.filter((other) => other === one).length}`);
  });
  const picture = make("div");
  place.append(...list.parts, make("h3", {}, "All items"), make("ul", { class: "key" }, ...key), picture);
  fitted(picture, (width) => [overview(cells, width)]);
}

function overview(cells, width) {
  const side = cells.length <= 500 ? 16 : cells.length <= 2000 ? 13 : 8;
  const nColumns = Math.max(1, Math.floor((width - 2) / side));
  const svg = grid("items", cells, Math.min(nColumns, cells.length), { width: side, height: side });
  if (side >= 13) cells.forEach((cell, i) => svg.append(glyph(cell.kind, (i % nColumns) * side, Math.floor(i / nColumns) * side, side)));
  return svg;
}

// A triangle that points up or down, a dot or a ring: the kind of an item without its colour.
function glyph(one, x, y, side) {
  const [middle, r] = [side / 2, side * 0.24];
  const [cx, cy] = [x + middle, y + middle];
  const dot = (size) => `M${cx - size},${cy}a${size},${size} 0 1,0 ${2 * size},0a${size},${size} 0 1,0 ${-2 * size},0z`;
  const shapes = {
    win: `M${cx},${cy - r}l${r * 1.15},${2 * r}h${-2.3 * r}z`,
    loss: `M${cx},${cy + r}l${r * 1.15},${-2 * r}h${-2.3 * r}z`,
    both: dot(r * 0.6),
    none: `M${cx - r * 0.6},${cy - 0.6}h${r * 1.2}v1.2h${-r * 1.2}z`,
  };
  return make("path", { class: one, d: shapes[one] });
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

function result(metric, list, i) {
  const value = valueAt(list, i);
  return typeof list === "string" && value !== null ? (isRight(metric, value) ? "right" : "wrong") : number(value);
}

// The list of items with their texts, its filters and its search.
function listed(metric, rival, kinds) {
  const texts = data.texts?.[metric.texts];
  const same = rival === undefined ? null : metric.same[rival];
  const all = kinds.map((_, i) => i);
  const isOne = (...wanted) => (i) => wanted.includes(kinds[i]);
  const tests = rival === undefined ? { All: () => true } : {
    "Lost and won": isOne("loss", "win"), Lost: isOne("loss"), Won: isOne("win"),
    Changed: (i) => isOne("loss", "win")(i) || same?.[i] === "0", All: () => true,
  };
  const list = make("ol", { class: "list" }), count = make("p", { class: "count", role: "status" });
  const more = make("button", { type: "button" });
  const search = make("input", { type: "search", placeholder: texts ? "Search questions and answers, or #42" : "Go to an item: #42", "aria-label": "Search items" });
  let filter = Object.keys(tests).find((name) => all.some(tests[name])) || "All", nShown = PAGE;
  const buttons = Object.keys(tests).map((name) => {
    const button = make("button", { type: "button", "data-filter": name }, `${name} ${all.filter(tests[name]).length}`);
    button.addEventListener("click", () => choose(name));
    return button;
  });
  const draw = () => {
    const query = search.value.trim().toLowerCase();
    const order = filter === "Lost and won" ? (i) => (kinds[i] === "loss" ? 0 : 1) : () => 0;
    const found = all.filter(tests[filter]).filter((i) => matches(metric, texts, i, query)).sort((a, b) => order(a) - order(b));
    list.replaceChildren(...found.slice(0, nShown).map((i) => item(metric, texts, rival, i, kinds[i], query)));
    count.textContent = found.length ? `${Math.min(nShown, found.length)} of ${found.length} items` : "No such item.";
    more.textContent = `Show ${Math.min(PAGE, found.length - nShown)} more`;
    more.hidden = found.length <= nShown;
    for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.filter === filter));
  };
  const choose = (name) => {
    [filter, nShown] = [name, PAGE];
    draw();
  };
  search.addEventListener("input", () => choose(filter));
  more.addEventListener("click", () => {
    nShown += PAGE;
    draw();
  });
  const find = (i) => {
    search.value = `#${i}`;
    choose("All");
    list.scrollIntoView({ block: "nearest" });
  };
  draw();
  const filters = make("div", { class: "filters", role: "group", "aria-label": "Items" }, ...buttons);
  return { parts: [make("div", { class: "controls" }, filters, search), count, list, more], find };
}

function matches(metric, texts, i, query) {
  if (!query) return true;
  if (/^#\d+$/.test(query)) return query === `#${i}`;
  if (!texts) return false;
  const judged = metric.judged.map((read) => read[i]);
  return [texts.questions[i], texts.targets[i], ...texts.answers.map((said) => said[i]), ...judged].some((text) => text?.toLowerCase().includes(query));
}

// An item: question, expected answer, and what each model answered, the merged model and its rival first.
function item(metric, texts, rival, i, kindOf, query) {
  const badge = make("span", { class: `badge ${kindOf}` }, kindOf === "both" && typeof metric.models[metric.merged].items === "string" ? "= both right" : BADGES[kindOf]);
  const parts = [make("h4", {}, `Item ${i}`, ...(rival === undefined ? [] : [badge]))];
  const known = texts && texts.questions[i] !== null;
  if (known) {
    parts.push(said("said", ["Question"], [text(texts.questions[i], query)]));
    if (texts.targets[i]) parts.push(said("said", ["Expected"], [text(texts.targets[i], query)]));
  }
  const first = [metric.merged, ...(rival === undefined ? [] : [rival])];
  const others = metric.models.map((_, k) => k).filter((k) => !first.includes(k));
  const answered = (k) => {
    const model = metric.models[k], outcome = result(metric, model.items, i);
    const symbol = { right: "✓ ", wrong: "✗ " }[outcome] || "";
    const style = { right: "mark win", wrong: "mark loss" }[outcome] || "mark";
    const answer = known && metric.answers[k] !== null ? texts.answers[metric.answers[k]][i] : null;
    const read = known ? metric.judged[k][i] : undefined;
    const body = [...(answer === null ? [] : [text(answer, query)]), ...(read === undefined ? [] : [make("div", { class: "read" }, "read as: ", ...marked(read, query))])];
    return said(k === metric.merged ? "said merged" : "said", [model.name, make("span", { class: style }, symbol + outcome)], body);
  };
  parts.push(...first.map(answered));
  if (others.length) parts.push(folded(others.map((k) => metric.models[k].name), () => others.map(answered), query));
  return make("li", { class: `item ${kindOf}` }, ...parts);
}

// The answers of the other models, behind a button with their names; a search opens them.
function folded(names, open, query) {
  if (query) return make("div", {}, ...open());
  const place = make("div", { class: "said others" });
  const button = make("button", { type: "button", class: "plain" }, `Also answered by ${names.join(", ")}`);
  button.addEventListener("click", () => place.replaceWith(...open()));
  place.append(button);
  return place;
}

function said(style, who, body) {
  return make("div", { class: style }, make("div", { class: "who" }, ...who), make("div", {}, ...body));
}

// A text, whose end appears on demand if it is long.
function text(whole, query) {
  const block = make("div", { class: "text", dir: "auto" });
  if (!whole) block.append(make("span", { class: "soft" }, "(empty)"));
  else if (query || whole.length <= 1.25 * LONG) block.append(...marked(whole, query));
  else {
    const button = make("button", { type: "button", class: "plain" }, "show all");
    button.addEventListener("click", () => block.replaceChildren(whole));
    block.append(`${whole.slice(0, LONG)}… `, button);
  }
  return block;
}

function marked(whole, query) {
  if (!query || query.startsWith("#")) return [whole];
  const parts = [], lower = whole.toLowerCase();
  let from = 0;
  for (let at = lower.indexOf(query); at >= 0 && lower.length === whole.length; at = lower.indexOf(query, from)) {
    parts.push(whole.slice(from, at), make("mark", {}, whole.slice(at, at + query.length)));
    from = at + query.length;
  }
  return [...parts, whole.slice(from)];
}

for (const [id, fill] of [["items", items], ["modules", modules]]) {
  const host = document.getElementById(id);
  if (host) fill(host);
}
