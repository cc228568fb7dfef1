"use strict";
// Shows the values of charts and heat maps at the pointer. The page is complete without it.
const page = document.body;
const tip = Object.assign(document.createElement("div"), { className: "tip", hidden: true });
const rule = Object.assign(document.createElement("div"), { className: "rule" });
page.append(tip);
for (const title of document.querySelectorAll(".area title")) title.remove();

const line = (text, name = "", mark = null) => {
  const row = document.createElement("div");
  if (mark) row.append(mark.cloneNode(true));
  row.append(name, Object.assign(document.createElement("b"), { textContent: text }));
  return row;
};

const key = (curve) => {
  const mark = document.querySelector("svg.key").cloneNode(true);
  mark.setAttribute("class", curve.getAttribute("class").replace("curve", "key"));
  return mark;
};

const curves = new Map();
const read = (area) => {
  if (!curves.has(area))
    curves.set(area, [...area.querySelectorAll(".curve")].map((curve) => {
      const numbers = (curve.querySelector(".line").getAttribute("d").match(/-?[\d.]+/g) || []).map(Number);
      const split = (name) => curve.dataset[name].split(" ");
      return {
        curve, x: numbers.filter((_, i) => i % 2 === 0), y: numbers.filter((_, i) => i % 2),
        v: split("v"), e: split("e"), u: split("u"),
      };
    }));
  return curves.get(area);
};

const showCurves = (area, x, y) => {
  const found = [];
  for (const one of read(area)) {
    let best = 0;
    one.x.forEach((value, i) => { if (Math.abs(value - x) < Math.abs(one.x[best] - x)) best = i; });
    const isOutside = x < one.x[0] - 20 || x > one.x.at(-1) + 20;
    if (one.x.length && !isOutside) found.push({ one, best, far: Math.abs(one.y[best] - y) });
  }
  if (!found.length) return false;
  found.sort((a, b) => a.far - b.far);
  const { one, best } = found[0];
  const head = `epoch ${one.e[best]}, update ${one.u[best]}`;
  const rows = found.slice(0, 10).sort((a, b) => a.one.y[a.best] - b.one.y[b.best]).map((each) => {
    const row = line(each.one.v[each.best], each.one.curve.dataset.name, key(each.one.curve));
    if (each === found[0] && found.length > 1) row.className = "nearest";
    return row;
  });
  if (found.length > 10) rows.push(line("", `and ${found.length - 10} more`));
  tip.replaceChildren(line(head), ...rows);
  rule.style.left = `${one.x[best] / 10}%`;
  area.append(rule);
  return true;
};

const showCell = (svg, x, y) => {
  const cells = JSON.parse(svg.dataset.cells);
  const row = Math.min(Math.floor(y / 1000 * cells.rows.length), cells.rows.length - 1);
  const column = cells.edges.findLastIndex((edge) => edge * 1000 <= x);
  const value = cells.v[row]?.[column];
  if (!value) return false;
  tip.replaceChildren(line(cells.columns[column]), line(value, cells.rows[row]));
  return true;
};

const hide = () => { tip.hidden = true; rule.remove(); };
const show = (event) => {
  const area = event.currentTarget, box = area.getBoundingClientRect();
  const x = (event.clientX - box.left) / box.width * 1000, y = (event.clientY - box.top) / box.height * 1000;
  const heat = area.querySelector("svg.heat");
  if (!(heat ? showCell(heat, x, y) : showCurves(area, x, y))) return hide();
  tip.hidden = false;
  const width = tip.offsetWidth, isRight = event.clientX + width + 24 > document.documentElement.clientWidth;
  tip.style.left = `${Math.max(4, isRight ? event.clientX - width - 14 : event.clientX + 14)}px`;
  tip.style.top = `${Math.max(4, Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 4))}px`;
};
for (const area of document.querySelectorAll(".area")) {
  area.addEventListener("pointermove", show);
  area.addEventListener("pointerdown", show);
  area.addEventListener("pointerleave", hide);
}
addEventListener("scroll", hide, { passive: true });

// A name in a legend emphasises its curve, in all charts if the legend is that of all charts.
for (const item of document.querySelectorAll(".legend [data-n]")) {
  const charts = item.closest("figure") || document;
  const fade = (isFaded) => {
    for (const curve of charts.querySelectorAll(".curve"))
      curve.classList.toggle("faded", isFaded && curve.dataset.n !== item.dataset.n);
  };
  item.addEventListener("pointerenter", () => fade(true));
  item.addEventListener("pointerleave", () => fade(false));
}

let folded = [];
addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open])")];
  for (const one of folded) one.open = true;
});
addEventListener("afterprint", () => { for (const one of folded) one.open = false; });
