"use strict";
// Small parts of the page. Text of users goes in by textContent alone.

function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === false || value === undefined || value === null) continue;
    if (name === "style") Object.assign(element.style, value);
    else if (name === "onclick") element.addEventListener("click", value);
    else element.setAttribute(name === "cls" ? "class" : name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

function drawn(tag, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

const number = (value) => {
  if (value === 0) return "0";
  const size = Math.abs(value);
  return size >= 1000 || size < 0.001 ? value.toExponential(1) : String(Number(value.toPrecision(3)));
};
const share = (value) => (value === 0 ? "0 %" : value < 0.001 ? number(100 * value) + " %" : (100 * value).toFixed(value < 0.1 ? 1 : 0) + " %");
const visible = (text) => text.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/^ +$/, (gap) => "·".repeat(gap.length)) || "(empty)";

function histogram(counts, largest) {
  const width = 300, height = 96, base = 78, most = Math.max(...counts, 1);
  const total = counts.reduce((sum, n) => sum + n, 0);
  const picture = drawn("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
  picture.append(drawn("title", {}, `Histogram of ${total} activations from 0 to ${number(largest)}`));
  const step = width / counts.length;
  counts.forEach((n, i) => {
    if (!n) return;
    const tall = Math.max(1, (n / most) * (base - 14));
    const bar = drawn("rect", { x: i * step + 0.5, y: base - tall, width: step - 1, height: tall, fill: "rgba(66,133,244,.75)" });
    bar.append(drawn("title", {}, `${number((i * largest) / counts.length)} to ${number(((i + 1) * largest) / counts.length)}: ${n} tokens`));
    picture.append(bar);
  });
  picture.append(drawn("line", { x1: 0, x2: width, y1: base, y2: base, stroke: "#80868b" }));
  picture.append(drawn("text", { x: 0, y: height - 4 }, "0"));
  picture.append(drawn("text", { x: width / 2, y: height - 4, "text-anchor": "middle" }, "activation"));
  picture.append(drawn("text", { x: width, y: height - 4, "text-anchor": "end" }, number(largest)));
  picture.append(drawn("text", { x: width, y: 10, "text-anchor": "end" }, `highest bar: ${most} tokens`));
  return picture;
}

function bars(pairs, highlighted) {
  const most = Math.max(...pairs.map(([, value]) => Math.abs(value)), 1e-12);
  const box = make("div", { cls: "bars" });
  pairs.forEach(([label, value], i) => {
    const text = make("span", { cls: "label", title: label }, label);
    if (i === highlighted) text.style.fontWeight = "650";
    const bar = make("div", { cls: value < 0 ? "bar down" : "bar", style: { width: `${(100 * Math.abs(value)) / most}%` } });
    box.append(text, make("div", {}, bar), make("span", { cls: "n" }, number(value)));
  });
  return box;
}

function shaded(pieces, activations, largest, top) {
  const text = make("div", { cls: "text" });
  pieces.forEach((piece, i) => {
    const value = activations.get(i) || 0;
    const span = make("span", { cls: i === top ? "top" : null, title: value ? `activation ${number(value)}` : null });
    // A new line is marked, and begins.
    span.textContent = i === top && !piece.trim() ? visible(piece) : piece.replace(/\n/g, "↵\n");
    if (value > 0) span.style.background = `rgba(var(--up),${(0.08 + 0.52 * Math.min(1, value / largest)).toFixed(3)})`;
    text.append(span);
  });
  return text;
}
