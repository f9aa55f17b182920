// Charts as SVG in real pixels, so that text keeps its size on every screen, and tables that can be sorted.
"use strict";

function element(name, attributes = {}, ...children) {
  const isSvg = ["svg", "g", "line", "rect", "path", "circle", "text"].includes(name);
  const made = isSvg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

// 1-2-5 steps between low and high; of counts only whole ones.
function ticks(low, high, most, isWhole = false) {
  const rough = (high - low) / Math.max(1, most);
  if (!(rough > 0)) return [low];
  const power = 10 ** Math.floor(Math.log10(rough));
  let step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
  if (isWhole) step = Math.max(1, step);
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9); at * step <= high * (1 + 1e-9); at++) found.push(at * step);
  return found;
}

function logTicks(low, high) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
    for (const factor of [1, 2, 5]) found.push(factor * 10 ** power);
  const within = found.filter((tick) => tick >= low * 0.999 && tick <= high * 1.001);
  return within.length > 9 ? within.filter((tick) => Math.abs(Math.log10(tick) % 1) < 1e-9) : within;
}

function short(value) {
  const size = Math.abs(value);
  for (const [limit, unit] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]])
    if (size >= limit) return +(value / limit).toPrecision(4) + unit;
  return size !== 0 && size < 1e-4 ? value.toExponential(1) : String(+value.toPrecision(4));
}

const percent = (value) => `${+(100 * value).toPrecision(3)}%`;

const whole = (value) => Math.round(value).toLocaleString("en-US");

// Redraws when the width changes.
function responsive(holder, draw) {
  let width = 0;
  new ResizeObserver(() => {
    if (Math.abs(holder.clientWidth - width) > 1) {
      width = holder.clientWidth;
      draw(Math.max(220, width));
    }
  }).observe(holder);
  return () => draw(Math.max(220, holder.clientWidth));
}

// Left, right, top and bottom of the plot within a chart.
const EDGE = { left: 56, right: 14, top: 18, bottom: 36 };

function frame(svg, width, height, { y, yTicks, yText = short, yName, xName }) {
  for (const tick of yTicks) {
    svg.append(
      element("line", { class: "grid", x1: EDGE.left, x2: width - EDGE.right, y1: y(tick), y2: y(tick) }),
      element("text", { x: EDGE.left - 6, y: y(tick) + 4, "text-anchor": "end" }, yText(tick)),
    );
  }
  const middle = (EDGE.top + height - EDGE.bottom) / 2;
  svg.append(
    element("text", { x: 11, y: middle, "text-anchor": "middle", transform: `rotate(-90 11 ${middle})` }, yName),
    element("text", { x: (EDGE.left + width - EDGE.right) / 2, y: height - 3, "text-anchor": "middle" }, xName),
  );
}

// Shows a text beside the pointer.
function tip(holder, lines, x, width) {
  let box = holder.querySelector(".tip");
  if (!box) holder.append((box = element("div", { class: "tip" })));
  box.replaceChildren(...lines);
  box.style.top = "24px";
  box.style.left = x < width / 2 ? `${x + 12}px` : "";
  box.style.right = x < width / 2 ? "" : `${width - x + 12}px`;
}

function tipLine(color, text) {
  const swatch = element("i", { class: "swatch" });
  swatch.style.background = color || "transparent";
  return element("div", {}, swatch, text);
}

// Names with their colors; a click hides or shows one.
function legend(series, hidden, changed) {
  const box = element("div", { class: "legend" });
  for (const { name, color, faint } of series) {
    const swatch = element("i", { class: "swatch" });
    swatch.style.background = color;
    swatch.style.opacity = faint ? 0.5 : 1;
    const button = element("button", { type: "button", "aria-pressed": String(!hidden.has(name)) }, swatch, name);
    if (hidden.has(name)) button.className = "off";
    button.addEventListener("click", () => {
      if (hidden.has(name)) hidden.delete(name);
      else hidden.add(name);
      changed();
    });
    box.append(button);
  }
  return box;
}

// Stacked columns: labels, and parts of {name, color, values}; `share` stretches each column to 100 %.
function columns(holder, { labels, shownLabels = labels, parts, xName, yName, share = false, edges = [], height = 230 }) {
  const draw = (width) => {
    const totals = labels.map((_, at) => parts.reduce((sum, part) => sum + (part.values[at] || 0), 0));
    const highest = share ? 1 : Math.max(1, ...totals);
    const y = (value) => height - EDGE.bottom - (value / highest) * (height - EDGE.bottom - EDGE.top);
    const step = (width - EDGE.left - EDGE.right) / Math.max(1, labels.length);
    const svg = element("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img" });
    frame(svg, width, height, { y, yTicks: ticks(0, highest, 5, !share), yText: share ? percent : short, yName, xName });
    const shown = shownLabels.filter(Boolean);
    const room = Math.max(0, ...shown.map((label) => label.length)) * 6.6 + 8;
    const every = Math.ceil(room / (step * (labels.length / Math.max(1, shown.length))));
    let place = 0;
    labels.forEach((label, at) => {
      let base = 0;
      const left = EDGE.left + at * step;
      for (const part of parts) {
        const value = (part.values[at] || 0) / (share ? totals[at] || 1 : 1);
        if (value > 0) {
          const top = y(base + value);
          const size = { x: left + step * 0.08, width: step * 0.84, y: top, height: Math.max(0.5, y(base) - top) };
          svg.append(element("rect", { ...size, fill: part.color }));
        }
        base += value;
      }
      if (shownLabels[at] && place++ % every === 0) {
        const under = { x: left + step / 2, y: height - EDGE.bottom + 15, "text-anchor": "middle" };
        svg.append(element("text", under, shownLabels[at]));
      }
      const cover = { x: left, y: EDGE.top, width: step, height: height - EDGE.top - EDGE.bottom, fill: "transparent" };
      const enter = () => {
        const lines = [tipLine("", element("b", {}, label))];
        for (const part of parts)
          if (part.values[at]) {
            const portion = parts.length > 1 ? ` (${((100 * part.values[at]) / totals[at]).toFixed(1)}%)` : "";
            lines.push(tipLine(part.color, `${part.name ? part.name + ": " : ""}${whole(part.values[at])}${portion}`));
          }
        tip(holder, lines, left + step / 2, width);
      };
      svg.append(element("rect", { ...cover, onpointerenter: enter }));
    });
    for (const { at, label } of edges) {
      const x = EDGE.left + at * step;
      svg.append(
        element("line", { class: "mark", x1: x, x2: x, y1: EDGE.top, y2: height - EDGE.bottom }),
        element("text", { x, y: EDGE.top - 6, "text-anchor": "middle" }, label),
      );
    }
    svg.addEventListener("pointerleave", () => holder.querySelector(".tip")?.remove());
    holder.replaceChildren(svg);
  };
  holder.classList.add("chart");
  return responsive(holder, draw);
}

// A table whose columns sort on a click; `total` is a last row that stays last.
function sortable(holder, { head, rows, total, text = 1 }) {
  let by = -1;
  let falls = true;
  const shown = (value) =>
    typeof value === "number" ? (Number.isInteger(value) ? whole(value) : `${(100 * value).toFixed(1)}%`) : value;
  const cells = (row) =>
    row.map((value, at) => element("td", { class: at < text ? "" : "number" }, String(shown(value) ?? "")));
  const draw = () => {
    const ordered = by < 0 ? rows : [...rows].sort((left, right) => {
      const [a, b] = [left[by], right[by]];
      const order = typeof a === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
      return falls ? -order : order;
    });
    const names = head.map((name, at) => {
      const sort = (event) => {
        if (event.type === "keydown" && event.key !== "Enter") return;
        falls = by === at ? !falls : at >= text;
        by = at;
        draw();
      };
      const attributes = { class: at < text ? "" : "number", "data-column": at, tabindex: 0, onclick: sort, onkeydown: sort };
      if (at === by) attributes["aria-sort"] = falls ? "descending" : "ascending";
      return element("th", attributes, name);
    });
    const body = ordered.map((row) => element("tr", {}, ...cells(row)));
    if (total) body.push(element("tr", { class: "total" }, ...cells(total)));
    const table = element("table", {}, element("thead", {}, element("tr", {}, ...names)), element("tbody", {}, ...body));
    holder.replaceChildren(element("div", { class: "scroll" }, table));
  };
  draw();
}
