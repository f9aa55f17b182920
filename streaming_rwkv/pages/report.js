// The report on a data set.
"use strict";

const report = JSON.parse(document.getElementById("data").textContent);
const { figures, samples, colors } = report;
const sources = Object.keys(figures.counts);
const holder = (id) => document.getElementById(id);
const sum = (values) => values.reduce((left, right) => left + right, 0);

function sourceTable() {
  const streams = (source) => figures.streams.filter((stream) => stream.source === source);
  const row = (names) => {
    const of = names.flatMap(streams);
    const train = of.filter(({ split }) => split === "train");
    const counts = names.map((name) => figures.counts[name]);
    const [read, duplicates] = ["documents_read", "duplicates"].map((key) => sum(counts.map((count) => count[key])));
    const tokens = sum(of.map((stream) => stream.tokens));
    return [
      read, sum(of.map((stream) => stream.documents)), read ? (duplicates || 1e-12) / read : 1e-12,
      sum(counts.flatMap((count) => Object.values(count.rejected))), tokens,
      (sum(of.map((stream) => stream.text_bytes)) / Math.max(1, tokens)).toFixed(2),
      sum(train.map((stream) => stream.packs)), tokens - sum(train.map((stream) => stream.tokens)),
    ];
  };
  const head = ["source", "read", "written", "duplicates", "rejected", "tokens", "bytes per token", "packs", "validation tokens"];
  const rows = sources.map((source) => [source, ...row([source])]);
  sortable(holder("sources"), { head, rows, total: ["all", ...row(sources)] });
}

function rejectionTable() {
  const reasons = {};
  for (const source of sources)
    for (const [reason, count] of Object.entries(figures.counts[source].rejected))
      if (count) reasons[`${source}\0${reason}`] = count;
  const rows = Object.entries(reasons).map(([key, count]) => [...key.split("\0"), count]);
  if (rows.length) sortable(holder("rejections"), { head: ["source", "rejected because", "documents"], rows, text: 2 });
  else holder("rejections").append("No document was rejected.");
}

// All sources on one axis, with a line at the upper edge of each bucket that is a power of two, and at the cut.
function lengthCharts() {
  const all = sources.flatMap((source) => Object.keys(figures.lengths[source] ?? {}).map(Number));
  const per = figures.lengths_per_doubling;
  const step = (length) => Math.round(Math.log2(length) * per);
  const first = Math.min(...all.map(step)), last = Math.max(...all.map(step));
  const labels = [];
  for (let at = first; at <= last; at++) labels.push(at % per === 0 ? short(2 ** (at / per)) : "");
  const cut = figures.cut_tokens;
  for (const source of sources) {
    const values = labels.map(() => 0);
    for (const [length, count] of Object.entries(figures.lengths[source] ?? {})) values[step(+length) - first] += count;
    const box = element("figure", { style: "margin:0" }, element("h3", {}, source));
    const chart = element("div");
    box.append(chart);
    holder("lengths").append(box);
    lengths(chart, { values, first, per, color: colors[source], cut });
  }
}

function lengths(chart, { values, first, per, color, cut }) {
  const name = (at) => whole(2 ** ((first + at) / per));
  const labels = values.map((_, at) => (((first + at) / per) % 1 === 0 ? name(at) : ""));
  const at = Math.log2(cut) * per - first;
  const edges = at > 0 && at < values.length ? [{ at, label: "cut" }] : [];
  columns(chart, {
    labels: labels.map((label, place) => label || `${name(place)}–${name(place + 1)}`),
    shownLabels: labels, parts: [{ name: "documents", color, values }], edges,
    xName: "length in tokens", yName: "documents", height: 210,
  });
}

function tokenCharts() {
  const parts = sources.map((source) => ({
    name: source, color: colors[source],
    values: figures.buckets.map((bucket) =>
      sum(figures.streams.filter((s) => s.source === source && s.bucket === bucket).map((s) => s.tokens))),
  }));
  const common = { labels: figures.buckets, parts, xName: "bucket" };
  columns(holder("tokens"), { ...common, yName: "tokens" });
  columns(holder("shares"), { ...common, yName: "share of the bucket's tokens", share: true });
  holder("token-legend").append(...parts.map(({ name, color }) => {
    const swatch = element("i", { class: "swatch" });
    swatch.style.background = color;
    return element("span", {}, swatch, name);
  }));
}

function streamTable() {
  const head = ["split", "source", "bucket", "documents", "pieces", "tokens", "packs", "fill"];
  const choices = ["split", "source", "bucket"].map((key) => {
    const values = [...new Set(figures.streams.map((stream) => stream[key]))];
    return choice(`all ${key === "split" ? "splits" : key + "s"}`, values, () => draw());
  });
  const draw = () => {
    const wanted = figures.streams.filter((stream) =>
      ["split", "source", "bucket"].every((key, at) => !choices[at].value || stream[key] === choices[at].value));
    const rows = wanted.map((stream) => [...head.slice(0, 7).map((key) => stream[key]), stream.fill + 1e-12]);
    const totals = ["documents", "pieces", "tokens", "packs"].map((key) => sum(wanted.map((stream) => stream[key])));
    const fill = totals[2] / Math.max(1, totals[3] * figures.pack_tokens);
    sortable(holder("streams"), { head, rows, total: ["all", "", "", ...totals, fill + 1e-12], text: 3 });
  };
  holder("stream-controls").append(...choices);
  draw();
}

function choice(every, values, changed) {
  const box = element("select", { "aria-label": every }, element("option", { value: "" }, every));
  box.append(...values.map((value) => element("option", { value }, value)));
  box.addEventListener("input", changed);
  return box;
}

// A page of samples at a time: by source and bucket, with a text in them, or drawn at random.
function browser() {
  const shownAtOnce = 6;
  const source = choice("all sources", [...new Set(samples.map((sample) => sample.source))], () => restart());
  const bucket = choice("all buckets", figures.buckets.filter((name) => samples.some((s) => s.bucket === name)), () => restart());
  const search = element("input", { type: "search", placeholder: "search in the samples", oninput: () => restart() });
  const next = element("button", { type: "button", onclick: () => turn(shownAtOnce) }, "next");
  const before = element("button", { type: "button", onclick: () => turn(-shownAtOnce) }, "back");
  const random = element("button", { type: "button", onclick: () => restart(true) }, "draw others");
  const status = element("span", { class: "quiet" });
  let order = samples.map((_, at) => at), from = 0, found = [];
  const restart = (shuffles = false) => {
    if (shuffles) {
      for (let at = order.length - 1; at > 0; at--) {
        const other = Math.floor(Math.random() * (at + 1));
        [order[at], order[other]] = [order[other], order[at]];
      }
    }
    const text = search.value.toLowerCase();
    found = order.map((at) => samples[at]).filter((sample) =>
      (!source.value || sample.source === source.value) && (!bucket.value || sample.bucket === bucket.value) &&
      (!text || sample.text.toLowerCase().includes(text)));
    from = 0;
    draw();
  };
  const turn = (by) => {
    from = Math.max(0, Math.min(from + by, Math.floor(Math.max(0, found.length - 1) / shownAtOnce) * shownAtOnce));
    draw();
  };
  const draw = () => {
    const until = Math.min(found.length, from + shownAtOnce);
    status.textContent = found.length ? `${from + 1}–${until} of ${whole(found.length)} samples` : "no sample";
    holder("samples").replaceChildren(...found.slice(from, until).map(article));
  };
  holder("sample-controls").append(source, bucket, search, random, before, next, status);
  restart();
}

function article(sample) {
  const mark = (text) => element("i", {}, text);
  const text = element("pre", {}, mark(sample.begins ? "⟨bos⟩" : "… inside a document "), sample.text);
  if (sample.left_out) text.append(mark(`\n\n[… ${whole(sample.left_out)} characters …]\n\n`), sample.rest);
  text.append(mark(sample.ends ? "⟨eos⟩" : " cut here …"));
  const place = `${sample.shard}, pack ${sample.pack}, document ${sample.key}`;
  const head = `${sample.source} · ${sample.bucket} · ${whole(sample.targets)} tokens, ${whole(sample.bytes)} bytes · ${place}`;
  return element("article", {}, element("header", {}, head), text);
}

sourceTable();
rejectionTable();
lengthCharts();
tokenCharts();
const fill = Object.entries(figures.fill);
columns(holder("fill"), {
  labels: fill.map(([name]) => name), parts: [{ name: "packs", color: colors[sources[0]], values: fill.map(([, count]) => count) }],
  xName: "share of the pack that is filled", yName: "packs",
});
streamTable();
browser();
