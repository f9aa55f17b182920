// The panels of a plot of runs.
"use strict";

const plot = JSON.parse(document.getElementById("data").textContent);
const redraws = [];

function smoothed(values, share) {
  const half = Math.floor((values.length * share) / 2);
  if (!half) return values;
  const sums = [0], counts = [0];
  values.forEach((value, at) => {
    sums.push(sums[at] + (value ?? 0));
    counts.push(counts[at] + (value === null ? 0 : 1));
  });
  return values.map((_, at) => {
    const low = Math.max(0, at - half), high = Math.min(values.length, at + half + 1);
    return counts[high] > counts[low] ? (sums[high] - sums[low]) / (counts[high] - counts[low]) : null;
  });
}

const textOf = (about) => (about.unit.startsWith("share") ? percent : short);

function panel(about, isFirst) {
  const holder = element("div", { class: "chart" });
  const names = element("div");
  const box = element("figure", { class: isFirst ? "wide" : "", style: "margin:0" });
  box.append(element("h3", {}, about.title), holder, names);
  const hidden = new Set();
  const height = isFirst ? 300 : 240;
  const isLoss = about.unit.startsWith("nats");

  const draw = (width) => {
    names.replaceChildren(...(about.series.length > 1 ? [legend(about.series, hidden, () => draw(width))] : []));
    const share = isLoss && about.title.startsWith("Training") ? smoothing.value / 500 : 0;
    const series = about.series
      .filter(({ name }) => !hidden.has(name))
      .map((one) => ({ ...one, parts: one.parts.map(([x, y]) => [x, one.dots ? y : smoothed(y, share)]) }));
    const isLog = about.log || (isLoss && logarithmic.checked);
    const x = (tokens) => EDGE.left + (tokens / Math.max(1, plot.end)) * (width - EDGE.left - EDGE.right);
    const [low, high] = about.kind === "areas" ? [0, 1] : bounds(series, isLog, about.zero);
    const scale = isLog ? Math.log10 : (value) => value;
    const inner = height - EDGE.top - EDGE.bottom;
    const y = (value) => height - EDGE.bottom - ((scale(value) - scale(low)) / (scale(high) - scale(low))) * inner;
    const svg = element("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img" });
    const yTicks = isLog ? logTicks(low, high) : ticks(low, high, 5);
    frame(svg, width, height, { y, yTicks, yText: textOf(about), yName: about.unit, xName: "tokens trained on" });
    for (const tick of ticks(0, plot.end, width / 90)) {
      const place = { x: x(tick), y: height - EDGE.bottom + 15, "text-anchor": "middle" };
      svg.append(element("text", place, short(tick)));
    }
    if (about.kind === "areas") areas(svg, series, x, y);
    else for (const one of series) curve(svg, one, x, y);
    marks(svg, x, width, height, isFirst);
    hover(svg, holder, series, about, x, width, height);
    holder.replaceChildren(svg);
  };
  redraws.push(responsive(holder, draw));
  return box;
}

function bounds(series, isLog, fromZero) {
  const values = series.flatMap((one) => one.parts.flatMap(([, y]) => y)).filter((v) => v !== null && (!isLog || v > 0));
  if (!values.length) return isLog ? [1, 10] : [0, 1];
  let low = Infinity, high = -Infinity;
  for (const value of values) {
    low = Math.min(low, value);
    high = Math.max(high, value);
  }
  if (isLog) return low === high ? [low / 2, high * 2] : [low / 1.05, high * 1.05];
  if (fromZero) return [0, high * 1.05 || 1];
  const margin = (high - low) * 0.05 || Math.abs(high) * 0.05 || 1;
  return [low - margin, high + margin];
}

function curve(svg, { parts, color, faint, dots }, x, y) {
  for (const [xs, ys] of parts) {
    let line = "", pen = "M";
    ys.forEach((value, at) => {
      if (value === null) pen = "M";
      else {
        line += `${pen}${x(xs[at]).toFixed(1)} ${y(value).toFixed(1)}`;
        pen = "L";
        if (dots) svg.append(element("circle", { cx: x(xs[at]), cy: y(value), r: 2.5, fill: color }));
      }
    });
    svg.append(element("path", { d: line, fill: "none", stroke: color, "stroke-width": faint ? 1 : 1.8, opacity: faint ? 0.45 : 1 }));
  }
}

function areas(svg, series, x, y) {
  const bases = (series[0]?.parts ?? []).map(([edges]) => edges.slice(1).map(() => 0));
  for (const { parts, color } of series)
    parts.forEach(([edges, shares], part) => {
      let there = "", back = "";
      shares.forEach((share, at) => {
        const [left, right, low] = [x(edges[at]), x(edges[at + 1]), bases[part][at]];
        there += `${at ? "L" : "M"}${left} ${y(low + share)}L${right} ${y(low + share)}`;
        back = `L${right} ${y(low)}L${left} ${y(low)}${back}`;
        bases[part][at] += share;
      });
      svg.append(element("path", { d: `${there}${back}Z`, fill: color }));
    });
}

// Labels of runs first, then those of stages where there is room.
function marks(svg, x, width, height, hasLabels) {
  const taken = [];
  for (const { x: at, run, label } of [...plot.marks].sort((left, right) => right.run - left.run)) {
    const place = x(at);
    if (at > 0)
      svg.append(element("line", { class: run ? "mark run" : "mark", x1: place, x2: place, y1: EDGE.top, y2: height - EDGE.bottom }));
    const until = place + label.length * 6.5 + 8;
    if (!hasLabels || until > width + 20 || taken.some(([from, to]) => place < to && until > from)) continue;
    taken.push([place, until]);
    svg.append(element("text", { x: place + 3, y: EDGE.top - 6, "font-weight": run ? 600 : 400 }, label));
  }
}

function hover(svg, holder, series, about, x, width, height) {
  const line = element("line", { class: "at", y1: EDGE.top, y2: height - EDGE.bottom, visibility: "hidden" });
  svg.append(line);
  svg.addEventListener("pointermove", (event) => {
    const pointer = event.clientX - svg.getBoundingClientRect().left;
    const tokens = ((pointer - EDGE.left) / (width - EDGE.left - EDGE.right)) * plot.end;
    if (tokens < 0 || tokens > plot.end) return;
    const lines = [tipLine("", element("b", {}, `${short(tokens)} tokens`))];
    const ordered = about.kind === "areas" ? [...series].reverse() : series;
    for (const { name, color, parts } of ordered) {
      const value = about.kind === "areas" ? share(parts, tokens) : nearest(parts, tokens);
      if (value !== null && value !== undefined)
        lines.push(tipLine(color, `${name}: ${textOf(about)(value)}`));
    }
    for (const side of ["x1", "x2"]) line.setAttribute(side, pointer);
    line.setAttribute("visibility", "visible");
    tip(holder, lines, pointer, width);
  });
  svg.addEventListener("pointerleave", () => {
    line.setAttribute("visibility", "hidden");
    holder.querySelector(".tip")?.remove();
  });
}

function nearest(parts, tokens) {
  let best = null, distance = plot.end / 20;
  for (const [xs, ys] of parts)
    xs.forEach((at, index) => {
      if (ys[index] !== null && Math.abs(at - tokens) < distance) {
        distance = Math.abs(at - tokens);
        best = ys[index];
      }
    });
  return best;
}

function share(parts, tokens) {
  for (const [edges, shares] of parts) {
    const at = edges.findIndex((edge) => edge > tokens);
    if (at > 0) return shares[at - 1];
  }
  return null;
}

const logarithmic = document.getElementById("log");
const smoothing = document.getElementById("smooth");
const grid = document.getElementById("panels");
plot.panels.forEach((about, at) => grid.append(panel(about, at === 0)));
for (const control of [logarithmic, smoothing])
  control.addEventListener("input", () => redraws.forEach((redraw) => redraw()));
