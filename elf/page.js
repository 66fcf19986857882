// SPDX-License-Identifier: GPL-3.0-only
// Draws the page of elfplot.py from the data that page.py put into it: counts by line, bin and latency.
//
// view            the time that is shown, s; all figures and pictures follow it
// Section         a destination: picture, legend, findings, table
// figures()       statistics of some lines from one bin to another
// table()         a table that sorts
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const COLOURS =
    ["#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#e07b00", "#8c564b", "#d04fa5", "#17a2b0", "#7f7f00", "#444444"];
const DASHES = ["", "7 3", "2 3", "10 3 2 3"];          // of the hops 1 to 10, 11 to 20 and so on
const BINS_MAX = 300, STEPS = 1 << 11, BIN_SHIFT = 11;  // bins that are drawn, at most; of a key
const OPEN_MAX = 4;                                     // destinations that are shown without being asked for
const LOG_FROM = 10;  // ratio of slowest to fastest from which on the axis is logarithmic
const WIDE = 600;     // px; below, tables have fewer columns and pictures less height
const NICE = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1800, 3600, 7200, 14400, 21600, 43200, 86400];
const STATS = ["min", "median", "95%", "99%", "max"], SHARES = [0, 0.5, 0.95, 0.99, 1];

const READING =
    "Lines are medians, bands the middle half of each bin, dots its slowest answer. Number and colour of a line " +
    "are its hop's; hops above 10 are dashed. The rows below show unanswered probes: grey if all of a bin were " +
    "answered, coloured if not, the stronger the more were not. Shaded is the time of a finding. Draw over a time " +
    "to zoom in, or use the buttons; Ctrl and the wheel zoom, too. Click on lines in the legend to switch them.";

let view = [...data.x];
const isWhole = () => view[0] <= data.x[0] && view[1] >= data.x[1];

// ---- Making elements

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes))
    if (name.startsWith("on"))
      element.addEventListener(name.slice(2), value);
    else
      element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function draw(parent, tag, attributes = {}, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}

// ---- Words

const plural = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;
const share = (part, all) => all ? (100 * part / all).toFixed(1) + "%" : "";
const latency = ms => ms >= 1000 ? +(ms / 1000).toPrecision(3) + " s" :
    ms >= 1                      ? +ms.toPrecision(3) + " ms" :
                                   +(ms * 1000).toPrecision(3) + " µs";

function clock(s, digits = 3) {
  if (data.utc === null) return +s.toFixed(digits) + " s";
  const text = new Date(data.utc + s * 1000).toISOString();
  return text.slice(0, 10) + " " + text.slice(11, digits ? 20 + digits : 19) + " UTC";
}

const inSeconds = () => data.x[1] <= 125;  // and not in hours and minutes, where UTC is not known

function shortClock(s, step) {
  if (data.utc === null) {
    if (inSeconds()) return String(+s.toFixed(6));
    const text = [s / 3600, s / 60 % 60].map(Math.floor).map(n => String(n).padStart(2, "0")).join(":");
    return step >= 60 ? text : text + ":" + (s % 60).toFixed(step < 1 ? 3 : 0).padStart(step < 1 ? 6 : 2, "0");
  }
  const text = new Date(Math.round(data.utc + s * 1000)).toISOString();
  if (text.slice(11, 23) === "00:00:00.000") return text.slice(0, 10);
  return step >= 60 ? text.slice(11, 16) : step >= 1 ? text.slice(11, 19) : text.slice(11, 23);
}

// ---- Counts

// The series of a section: sorted keys, each of a bin and a rounded latency, and how often it occurs.
function decode(section) {
  const bytes = Uint8Array.from(atob(section.data), character => character.charCodeAt(0));
  let at = 0;
  const next = () => {
    let value = 0, scale = 1, byte;
    do {
      byte = bytes[at++];
      value += (byte & 127) * scale;
      scale *= 128;
    } while (byte > 127);
    return value;
  };
  return section.series.map(([kind, hop, name, rank]) => {
    const length = next(), keys = new Int32Array(length), counts = new Float64Array(length);
    for (let i = 0, key = 0; i < length; i++) {
      keys[i] = key += next();
      counts[i] = next();
    }
    return {kind, hop, name, rank, keys, counts};
  });
}

// The place of the first key of a bin, or of one behind it.
function placeOf(keys, bin) {
  let low = 0, high = keys.length;
  while (low < high) {
    const middle = low + high >> 1;
    if (keys[middle] >> BIN_SHIFT < bin)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

function total(list, from, to) {
  let sum = 0;
  for (const {keys, counts} of list)
    for (let i = placeOf(keys, from), end = placeOf(keys, to); i < end; i++) sum += counts[i];
  return sum;
}

const tally = new Float64Array(STEPS);

// The latencies (ms) of so many shares of the answers of some series between two bins; null without an answer.
function quantiles(section, list, from, to, shares) {
  let count = 0, low = STEPS - 1, high = 0;
  for (const {keys, counts} of list)
    for (let i = placeOf(keys, from), end = placeOf(keys, to); i < end; i++) {
      const step = keys[i] & STEPS - 1;
      tally[step] += counts[i];
      count += counts[i];
      if (step < low) low = step;
      if (step > high) high = step;
    }
  if (!count) return null;
  let step = low, upto = 0;
  const values = shares.map(share => {
    while (step < high && upto + tally[step] < share * count) upto += tally[step++];
    return Math.exp(step * section.step) / 1e6;
  });
  tally.fill(0, low, high + 1);
  return {count, values};
}

// ---- A table that sorts. columns: name, and whether it is wide (left out where there is little room), is text,
// or cannot be sorted. rows: cells, each a text or element, or a pair of what is shown and what is sorted by.

function table(caption, columns) {
  const body = make("tbody");
  let rows = [], sorted = null, descending = false;
  const valueOf = cell => Array.isArray(cell) ? cell[1] : cell;
  function show() {
    const ordered = [...rows];
    if (sorted !== null)
      ordered.sort((a, b) => {
        const [x, y] = [valueOf(a[sorted]), valueOf(b[sorted])];
        const numbers = [x, y].map(value => value === "" ? NaN : +value);
        if (numbers.some(isNaN) && numbers.some(value => !isNaN(value))) return isNaN(numbers[0]) ? 1 : -1;
        const order = numbers.some(isNaN) ? String(x).localeCompare(String(y)) : numbers[0] - numbers[1];
        return descending ? -order : order;
      });
    body.replaceChildren(...ordered.map(
        cells => make("tr", {}, ...cells.map((cell, number) => {
          const {text, wide} = columns[number], shown = Array.isArray(cell) ? cell[0] : cell;
          const names = [text && "text", wide && "wide"].filter(Boolean).join(" ");
          return make(number ? "td" : "th", {...(number ? {} : {scope: "row"}), class: names}, shown);
        }))));
    heads.forEach((head, number) => {
      if (number === sorted)
        head.setAttribute("aria-sort", descending ? "descending" : "ascending");
      else
        head.removeAttribute("aria-sort");
    });
  }
  const heads = columns.map(
      ({name, text, wide, fixed}, number) => make(
          "th", {scope: "col", class: [text && "text", wide && "wide"].filter(Boolean).join(" ")},
          fixed ? name :
                  make(
                      "button", {
                        type: "button",
                        onclick: () => {
                          descending = sorted === number ? !descending : false;
                          sorted = number;
                          show();
                        }
                      },
                      name)));
  const element = make(
      "div", {class: "scroll", tabindex: "0", role: "region", "aria-label": caption},
      make("table", {}, make("caption", {}, caption), make("thead", {}, make("tr", {}, ...heads)), body));
  return {
    element,
    fill: its => {
      rows = its;
      show();
    }
  };
}

// ---- A destination

class Section {
  constructor(its, number) {
    Object.assign(this, its, {number, hidden: new Set(), lines: [], size: [0, 0]});
    this.label = this.dest + (this.host && ` from ${this.host}`);
    this.all = decode(its);
    this.answers = this.of("answers");
    this.flows = this.of("srtt");
    const probed = [...this.answers, ...this.of("unanswered")].map(each => each.hop);
    this.hopNumbers = [...new Set(probed)].sort((a, b) => a - b);
    this.element = make("section", {id: `destination-${number}`, "aria-labelledby": `title-${number}`});
    this.element.hidden = true;
  }

  of(kind, hop) {
    return this.all.filter(each => each.kind === kind && (hop === undefined || each.hop === hop));
  }

  colour(hop) {
    return COLOURS[Math.max(hop - 1, 0) % COLOURS.length];
  }
  dash(hop) {
    return DASHES[Math.floor(Math.max(hop - 1, 0) / COLOURS.length) % DASHES.length];
  }
  style(line) {
    const [colour, dash] = line.kind === "srtt" ? [COLOURS[(line.rank + 9) % COLOURS.length], ""] :
                                                  [this.colour(line.hop), this.dash(line.hop)];
    return {
      stroke: colour,
      "stroke-dasharray": dash,
      "stroke-width": line.rank && line.kind === "answers" ? 1 : 1.7
    };
  }
  nameOf(line) {
    return line.kind === "srtt" ? line.name : `${line.hop} ${line.name}`;
  }

  // The bins that are shown: from, to.
  get bins() {
    if (isWhole()) return [-1, STEPS << 8];
    return [Math.floor((view[0] - this.start) / this.width), Math.ceil((view[1] - this.start) / this.width)];
  }

  // The farthest hop that answers: what the list of destinations shows.
  get farthest() {
    const hop = Math.max(...this.answers.map(each => each.hop));
    return this.of("answers", hop);
  }

  build() {
    if (this.svg) return;
    const title = `title-${this.number}`;
    this.svg = draw(this.element, "svg", {
      tabindex: 0,
      role: "application",
      "aria-roledescription": "line chart",
      "aria-label":
          `Latency over time to ${this.label}. Arrow keys go from figure to figure, plus and minus zoom, ` +
          "0 shows the whole time. The table below has the figures."
    });
    this.tip = make("div", {class: "tip"});
    this.tip.hidden = true;
    const picture = make("div", {class: "picture"}, this.svg, this.tip);
    const entries = [
      ...this.answers,
      ...this.hopNumbers.filter(hop => !this.of("answers", hop).length)
          .map(hop => ({kind: "answers", hop, name: "(unresponsive)", rank: 0, keys: [], counts: []}))
    ].sort((a, b) => a.hop - b.hop || a.rank - b.rank);
    this.entries = [...entries, ...this.flows];
    this.buttons = this.entries.map(line => {
      const button = make("button", {
        type: "button",
        "aria-pressed": "true",
        onclick: () => this.toggle([line], this.hidden.has(this.nameOf(line))),
        onpointerenter: () => this.highlight(line),
        onpointerleave: () => this.highlight(),
        onfocus: () => this.highlight(line),
        onblur: () => this.highlight()
      });
      const sample = draw(button, "svg", {width: 26, height: 10, "aria-hidden": "true"});
      draw(sample, "path", {d: "M0 5h26", fill: "none", ...this.style(line)});
      button.append(" " + this.nameOf(line));
      return button;
    });
    const legend = make(
        "div", {class: "legend", role: "group", "aria-label": "Lines: hops, who answers, and flows"},
        ...this.buttons,
        make("button", {type: "button", class: "plain", onclick: () => this.toggle(this.entries, true)}, "all"),
        make("button", {type: "button", class: "plain", onclick: () => this.toggle(this.entries, false)}, "none"));
    this.places = this.findings.map(
        ([hop, from, until, text]) => from === null ?
            make("li", {}, text) :
            make("li", {}, make("button", {type: "button", onclick: () => this.goTo(from, until)}, text)));
    const rest = this.more ? [make("li", {}, `and ${this.more} more: choose less by --from and --to`)] : [];
    const found = this.places.length + rest.length ?
        [make("h3", {}, "Findings"), make("ul", {class: "findings"}, ...this.places, ...rest)] :
        [];
    this.table = table(`Hops to ${this.label}, latency in ms`, [
      {name: "hop"}, {name: "probes"}, {name: "answered"},
      ...STATS.map(name => ({name, wide: name !== "median" && name !== "95%"})), {name: "jitter", wide: true},
      {name: "responder", text: true}
    ]);
    this.exact = make("p", {class: "note"});
    this.element.append(
        make("h2", {id: title, tabindex: "-1"}, this.label), make("p", {}, this.about), picture, legend, ...found,
        this.table.element, this.exact);
    if (!this.data)
      this.exact.textContent = "There was no room for its figures: elfplot.py --dest makes a page of it alone.";
    this.listen();
  }

  toggle(lines, isShown) {
    for (const line of lines) this.hidden[isShown ? "delete" : "add"](this.nameOf(line));
    this.entries.forEach(
        (line, i) => this.buttons[i].setAttribute("aria-pressed", !this.hidden.has(this.nameOf(line))));
    this.paint();
  }

  goTo(from, until) {
    const margin = Math.max((until - from) / 2, 2 * this.width);
    setView(from - margin, until + margin);
    this.svg.focus();
    this.element.querySelector(".picture").scrollIntoView({block: "nearest"});
  }

  update() {
    if (this.element.hidden) return;
    this.build();
    this.paint();
    const [from, to] = this.bins, exact = new Map(isWhole() ? this.hops.map(row => [row[0], row]) : []);
    this.table.fill((this.hopNumbers.length ? this.hopNumbers : [...exact.keys()]).map(hop => {
      const lines = this.of("answers", hop), found = quantiles(this, lines, from, to, SHARES);
      const whole = exact.get(hop);
      const answered = whole ? whole[2] : found ? found.count : 0;
      const probes = whole ? whole[1] : answered + total(this.of("unanswered", hop), from, to);
      const stats = whole ? whole.slice(3) : found ? found.values : [];
      const who = lines.map(line => [line.name, total([line], from, to)]).filter(each => each[1]);
      return [
        [hop, hop], [probes, probes], [share(answered, probes), probes ? answered / probes : ""],
        ...[0, 1, 2, 3, 4, 5].map(i => stats[i] === undefined ? "" : [stats[i].toFixed(3), stats[i]]),
        who.map(([name, count]) => name + (who.length > 1 ? ` ${Math.round(100 * count / answered)}%` : ""))
                .join(", ") ||
            (probes ? "unresponsive" : "")
      ];
    }));
    if (this.data)
      this.exact.textContent = isWhole() && this.hops.length ?
          "Figures of the whole time, as elfplot.py prints them. Zoom in for those of a part." :
          `Figures of the time above, in steps of ${+ this.width.toPrecision(6)} s; latencies are exact to ${
              this.percent} %. ` +
              "Jitter is known for the whole time only.";
  }

  // ---- The picture

  // What is drawn: lines, with a point for each of up to BINS_MAX bins.
  prepare(plotWidth) {
    let [from, to] =
        [Math.floor((view[0] - this.start) / this.width), Math.ceil((view[1] - this.start) / this.width)];
    this.merged = 1;
    while ((to - from) / this.merged > Math.min(BINS_MAX, plotWidth / 2)) this.merged *= 2;
    from = Math.floor(from / this.merged);
    to = Math.ceil(to / this.merged);
    this.lines =
        [...this.answers, ...this.flows]
            .filter(line => !this.hidden.has(this.nameOf(line)))
            .map(line => {
              const points = [];
              for (let bin = from; bin < to; bin++) {
                const found =
                    quantiles(this, [line], bin * this.merged, (bin + 1) * this.merged, [0, 0.25, 0.5, 0.75, 1]);
                if (!found) continue;
                const [min, low, median, high, max] = found.values;
                points.push({
                  bin,
                  t: this.start + (bin + 0.5) * this.merged * this.width,
                  count: found.count,
                  min,
                  low,
                  median,
                  high,
                  max
                });
              }
              const apart = points.slice(1).map((point, i) => point.bin - points[i].bin).sort((a, b) => a - b);
              return {line, points, gap: Math.max(3, 5 * (apart[apart.length >> 1] || 0))};
            })
            .filter(({points}) => points.length);
    this.strip = this.hopNumbers.filter(
        hop => this.of("unanswered", hop).length &&
            this.entries.some(line => line.hop === hop && !this.hidden.has(this.nameOf(line))));
  }

  x(t) {
    return this.left + this.plotWidth * (t - view[0]) / (view[1] - view[0]);
  }
  t(x) {
    return view[0] + (x - this.left) / this.plotWidth * (view[1] - view[0]);
  }

  paint() {
    const outside = this.svg.parentElement.clientWidth || WIDE;
    Object.assign(this, {left: 58, plotWidth: Math.max(outside - 84, 100)});
    this.prepare(this.plotWidth);
    const main = outside < WIDE ? 230 : 340, row = 9;
    const stripHeight = this.strip.length * row, hasFlows = this.lines.some(({line}) => line.kind === "srtt");
    this.panels = {
      main: [8, main],
      strip: [main + 14, stripHeight],
      flow: [main + 22 + stripHeight, hasFlows ? 90 : 0]
    };
    const bottom = hasFlows ? this.panels.flow[0] + 90 : this.panels.strip[0] + stripHeight, height = bottom + 38;
    const svg = this.svg;
    svg.replaceChildren();
    svg.classList.toggle("many", this.lines.length > 10);
    for (const [name, value] of Object.entries({width: outside, height, viewBox: `0 0 ${outside} ${height}`}))
      svg.setAttribute(name, value);
    draw(
        draw(svg, "clipPath", {id: `clip-${this.number}`}), "rect",
        {x: this.left, y: 0, width: this.plotWidth, height});
    this.paintTime(svg, bottom);
    this.ys = {};
    for (const [panel, kind] of [["main", "answers"], ["flow", "srtt"]]) {
      const lines = this.lines.filter(({line}) => line.kind === kind);
      if (panel === "main" || lines.length) this.paintLines(svg, panel, lines);
    }
    this.paintStrip(svg);
    this.paintFindings(svg);
    this.guide = draw(svg, "path", {class: "guide"});
    this.drag = draw(svg, "rect", {class: "drag", y: 8, height: bottom - 8, width: 0});
    this.point = null;
    this.tip.hidden = true;
  }

  paintTime(svg, bottom) {
    const span = view[1] - view[0], wanted = span / Math.max(this.plotWidth / 110, 2);
    let step = 10 ** Math.floor(Math.log10(wanted));
    step = wanted < 1 ? [1, 2, 5, 10].map(n => n * step).find(n => n >= wanted) :
                        NICE.find(n => n >= wanted) || Math.ceil(wanted / 86400) * 86400;
    const offset = data.utc === null ? 0 : data.utc / 1000;
    for (let n = Math.ceil((view[0] + offset) / step); n * step - offset <= view[1]; n++) {
      const t = n * step - offset;
      if (data.utc === null && t < 0) continue;
      draw(svg, "path", {class: "grid", d: `M${this.x(t)} 8V${bottom}`});
      draw(svg, "text", {x: this.x(t), y: bottom + 14, "text-anchor": "middle"}, shortClock(t, step));
    }
    const [first, last] = view.map(t => clock(t).slice(0, 10));
    draw(
        svg, "text", {x: this.left, y: bottom + 30},
        data.utc === null ? (inSeconds()    ? "seconds" :
                                 step >= 60 ? "hours:minutes" :
                                              "hours:minutes:seconds") +
                " since the first probe" :
                            `UTC, ${first}` + (first === last ? "" : ` to ${last}`));
  }

  paintLines(svg, panel, lines) {
    const [top, height] = this.panels[panel], points = lines.flatMap(line => line.points);
    let low = Math.min(...points.map(point => point.low)), high = Math.max(...points.map(point => point.max));
    if (!points.length) {
      draw(
          svg, "text", {x: this.left + this.plotWidth / 2, y: top + height / 2, "text-anchor": "middle"},
          this.answers.length ? "nothing to show in this time" : "no probe was answered");
      [low, high] = [1, 2];
    }
    const fixed = panel === "main" && data.ylim,
          isLog = !fixed ? high > low * LOG_FROM && panel === "main" :
                           data.ylim[0] > 0 && data.ylim[1] > data.ylim[0] * LOG_FROM;
    [low, high] = fixed ? data.ylim : isLog ? [low / 1.25, high * 1.25] : [0, high * 1.08];
    const place = isLog ? ms => Math.log(Math.max(ms, low / 2) / low) / Math.log(high / low) :
                          ms => (ms - low) / (high - low);
    const y = this.ys[panel] = ms => top + height * (1 - place(ms));
    const ticks = [];
    if (isLog) {
      const many = high / low > 2e4 ? [1] : [1, 2, 5];
      for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
        ticks.push(...many.map(n => n * 10 ** power).filter(ms => ms >= low && ms <= high));
    } else {
      const wanted = (high - low) / Math.max(height / 45, 2), power = 10 ** Math.floor(Math.log10(wanted));
      const step = [1, 2, 5, 10].map(n => n * power).find(n => n >= wanted);
      for (let n = Math.ceil(low / step); n * step <= high; n++) ticks.push(n * step);
    }
    let above = Infinity;
    for (const ms of points.length ? ticks : []) {
      draw(svg, "path", {class: "grid", d: `M${this.left} ${y(ms)}h${this.plotWidth}`});
      if (above - y(ms) < 13) continue;
      above = y(ms);
      draw(svg, "text", {x: this.left - 5, y: y(ms) + 4, "text-anchor": "end"}, ms ? latency(ms) : "0");
    }
    draw(svg, "rect", {class: "frame", x: this.left, y: top, width: this.plotWidth, height});
    if (panel === "flow") this.paintRetransmitted(svg);
    const labels = [];
    for (const each of lines) {
      const {line, points, gap} = each, style = this.style(line);
      const group = draw(svg, "g", {class: "line", "clip-path": `url(#clip-${this.number})`});
      each.group = group;
      const parts = [];
      points.forEach((point, i) => {
        if (!i || point.bin - points[i - 1].bin > gap) parts.push([]);
        parts[parts.length - 1].push(point);
      });
      const path = (its, name) =>
          its.map(point => `${this.x(point.t).toFixed(1)} ${y(point[name]).toFixed(1)}`).join("L");
      for (const part of parts) {
        draw(
            group, "path",
            {fill: style.stroke, class: "band", d: `M${path(part, "high")}L${path([...part].reverse(), "low")}Z`});
        draw(group, "path", {fill: "none", "stroke-linecap": "round", ...style, d: `M${path(part, "median")}h0`});
      }
      const dots = points.filter(point => point.max > point.high * 1.02);
      draw(
          group, "path",
          {class: "dots", stroke: style.stroke, d: dots.map(point => `M${path([point], "max")}h0`).join("")});
      if (line.kind === "answers" && !line.rank)
        labels.push([y(points[points.length - 1].median), line.hop, style.stroke]);
    }
    // Beside the lines' ends, but not on one another.
    let last = -Infinity;
    for (const [at, hop, colour] of labels.sort((a, b) => a[0] - b[0])) {
      if (at - last < 9) continue;
      last = at;
      draw(svg, "text", {x: this.left + this.plotWidth + 4, y: at + 4, fill: colour, class: "hop"}, hop);
    }
    draw(
        svg, "text", {x: this.left + 4, y: top + 12, class: "title"},
        panel === "main" ? "latency, there and back" : "srtt, retransmitted");
  }

  paintRetransmitted(svg) {
    const shown = this.of("retransmitted").filter(each => !this.hidden.has(each.name));
    const [top, height] = this.panels.flow, width = this.merged * this.width, bars = [];
    for (let bin = Math.floor((view[0] - this.start) / width); this.start + bin * width < view[1]; bin++) {
      const count = total(shown, bin * this.merged, (bin + 1) * this.merged);
      if (count) bars.push([bin, count]);
    }
    const most = Math.max(...bars.map(bar => bar[1]), 1) * 1.15;
    for (const [bin, count] of bars) {
      const from = this.x(this.start + bin * width), to = this.x(this.start + (bin + 1) * width);
      const bar = draw(svg, "rect", {
        class: "retransmitted",
        x: from,
        width: Math.max(to - from, 1),
        y: top + height * (1 - count / most),
        height: height * count / most,
        "clip-path": `url(#clip-${this.number})`
      });
      draw(bar, "title", {}, plural(count, "segment") + " retransmitted");
    }
  }

  paintStrip(svg) {
    const [top] = this.panels.strip, width = this.merged * this.width;
    if (this.strip.length) draw(svg, "text", {x: 2, y: top + 7, class: "small"}, "unans.");
    this.strip.forEach((hop, number) => {
      const y = top + 9 * number, lost = this.of("unanswered", hop), all = [...lost, ...this.of("answers", hop)];
      draw(svg, "text", {x: this.left - 5, y: y + 7, "text-anchor": "end", class: "small"}, hop);
      for (let bin = Math.floor((view[0] - this.start) / width); this.start + bin * width < view[1]; bin++) {
        const range = [bin * this.merged, (bin + 1) * this.merged], probes = total(all, ...range);
        if (!probes) continue;
        const [from, to] = [bin, bin + 1].map(
            n => Math.min(Math.max(this.x(this.start + n * width), this.left), this.left + this.plotWidth));
        const part = total(lost, ...range) / probes;
        draw(svg, "rect", {
          x: from,
          y,
          width: to - from,
          height: 8,
          fill: part ? this.colour(hop) : "#e8e8e8",
          opacity: part ? 0.35 + 0.65 * part : 1
        });
      }
    });
  }

  paintFindings(svg) {
    this.findings.forEach(([hop, from, until, text], number) => {
      if (from === null || until < view[0] || from > view[1]) return;
      const x = Math.max(this.x(from), this.left), width = Math.min(this.x(until), this.left + this.plotWidth) - x;
      const span = draw(svg, "rect", {
        class: "span",
        x,
        width: Math.max(width, 3),
        y: this.panels.main[0],
        height: this.panels.main[1],
        fill: this.colour(hop)
      });
      span.onclick = () => this.places[number].firstChild.focus();
      draw(span, "title", {}, text);
    });
  }

  // ---- Pointer and keys

  highlight(line) {
    for (const each of this.lines) {
      each.group.classList.toggle("on", each.line === line);
      each.group.classList.toggle("off", Boolean(line) && each.line !== line);
    }
  }

  range(bin) {
    return [bin * this.merged, (bin + 1) * this.merged];
  }

  asked(hop, bin) {
    const lost = total(this.of("unanswered", hop), ...this.range(bin));
    return `hop ${hop}: ${plural(lost + total(this.of("answers", hop), ...this.range(bin)), "probe")}, ${
        lost} unanswered`;
  }

  when(bin) {
    const width = this.merged * this.width;
    return `from ${clock(this.start + bin * width)} for ${+ width.toPrecision(6)} s`;
  }

  textOf(line, point) {
    const figures = `median ${latency(point.median)} of ${point.count}` +
        (point.count < 2 ? "" :
                           `, middle half ${latency(point.low)} to ${latency(point.high)}, min ${
                               latency(point.min)}, max ${latency(point.max)}`);
    const retransmitted = () => "retransmitted: " +
        plural(total(
                   this.of("retransmitted").filter(each => !this.hidden.has(each.name)), ...this.range(point.bin)),
               "segment");
    return [
      this.when(point.bin), `${line.name}: ${figures}`,
      line.kind === "srtt" ? retransmitted() : this.asked(line.hop, point.bin)
    ];
  }

  // Show the figures of a point, or lines of text, at a place in the picture.
  tell(text, x, y, each) {
    this.tip.textContent = text.join("\n");
    this.tip.hidden = false;
    this.tip.style.borderLeftColor = each ? this.style(each.line).stroke : "#888";
    const outside = this.svg.parentElement.clientWidth;
    this.tip.style.left = Math.max(Math.min(x + 14, outside - this.tip.offsetWidth), 0) + "px";
    this.tip.style.top = Math.max(y - this.tip.offsetHeight - 12, 0) + "px";
    this.guide.setAttribute("d", `M${x} 8V${this.panels.main[0] + this.panels.main[1]}`);
    this.highlight(each && each.line);
  }

  hide() {
    this.tip.hidden = true;
    this.guide.setAttribute("d", "");
    this.highlight();
  }

  hover(x, y) {
    const panel = Object.keys(this.panels)
                      .find(name => y >= this.panels[name][0] && y < this.panels[name][0] + this.panels[name][1]);
    if (!panel || x < this.left || x > this.left + this.plotWidth) return this.hide();
    const bin = Math.floor((this.t(x) - this.start) / this.width / this.merged);
    if (panel === "strip") {
      const hop = this.strip[Math.floor((y - this.panels.strip[0]) / 9)];
      return this.tell([this.when(bin), this.asked(hop, bin)], x, y);
    }
    let best = null, least = Infinity;
    for (const each of this.lines) {
      if ((each.line.kind === "srtt") !== (panel === "flow")) continue;
      for (const point of each.points) {
        const dx = Math.abs(this.x(point.t) - x), away = Math.hypot(3 * dx, this.ys[panel](point.median) - y);
        if (dx < 40 && away < least) [best, least] = [{each, point}, away];
      }
    }
    if (!best) return this.hide();
    this.point = best;
    this.tell(this.textOf(best.each.line, best.point), this.x(best.point.t), y, best.each);
  }

  // Go to a neighbour of the point that is told, of the same line or of the next one.
  go(points, lines) {
    if (!this.lines.length) return;
    const {each, point} = this.point || {each: this.lines[0], point: this.lines[0].points[0]};
    const number = Math.max(this.lines.findIndex(one => one.line === each.line), 0);
    const next = this.lines[Math.min(Math.max(number + lines, 0), this.lines.length - 1)];
    let at = next.points.findIndex(one => one.bin >= point.bin);
    if (at < 0) at = next.points.length - 1;
    at = Math.min(Math.max(at + (this.point ? points : 0), 0), next.points.length - 1);
    this.point = {each: next, point: next.points[at]};
    const text = this.textOf(next.line, next.points[at]);
    const y = this.ys[next.line.kind === "srtt" ? "flow" : "main"](next.points[at].median);
    this.tell(text, this.x(next.points[at].t), y, next);
    say(text.join(". "));
  }

  listen() {
    const svg = this.svg;
    let start = null;
    const at = event => {
      const box = svg.getBoundingClientRect();
      return [(event.clientX - box.left) * svg.viewBox.baseVal.width / box.width, event.clientY - box.top];
    };
    svg.addEventListener("pointerdown", event => {
      start = at(event)[0];
      this.hover(...at(event));
    });
    svg.addEventListener("pointermove", event => {
      const [x, y] = at(event);
      if (start === null || !event.buttons || Math.abs(x - start) < 6) return this.hover(x, y);
      svg.setPointerCapture(event.pointerId);
      this.drag.setAttribute("x", Math.min(x, start));
      this.drag.setAttribute("width", Math.abs(x - start));
    });
    svg.addEventListener("pointerup", event => {
      const [from, to] = [start, at(event)[0]].sort((a, b) => a - b);
      const isDrag = start !== null && to - from >= 6;
      start = null;
      if (isDrag) setView(this.t(from), this.t(to));
    });
    svg.addEventListener("pointercancel", () => {
      start = null;
      this.drag.setAttribute("width", 0);
    });
    svg.addEventListener("pointerleave", event => {
      if (event.pointerType === "mouse") this.hide();  // a finger leaves when it is lifted
    });
    svg.addEventListener("blur", () => this.hide());
    svg.addEventListener("dblclick", () => setView(...data.x));
    svg.addEventListener("wheel", event => {
      if (!event.ctrlKey) return;  // the wheel alone scrolls the page
      event.preventDefault();
      zoom(event.deltaY < 0 ? 0.7 : 1 / 0.7, this.t(at(event)[0]));
    }, {passive: false});
    svg.addEventListener("keydown", event => {
      const act = {
        ArrowLeft: () => this.go(-1, 0),
        ArrowRight: () => this.go(1, 0),
        ArrowUp: () => this.go(0, -1),
        ArrowDown: () => this.go(0, 1),
        "+": () => zoom(0.5, this.point?.point.t),
        "-": () => zoom(2, this.point?.point.t),
        0: () => setView(...data.x),
        Escape: () => this.hide(),
      }[event.key];
      if (!act || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      act();
    });
  }

  // A row of the list of destinations.
  summary() {
    const [from, to] = this.bins, lines = this.farthest, hops = isWhole() ? this.hops : [];
    const its = this.answers.concat(this.of("unanswered"));
    const answered = hops.length ? hops.reduce((sum, row) => sum + row[2], 0) : total(this.answers, from, to);
    const probes = hops.length ? hops.reduce((sum, row) => sum + row[1], 0) : total(its, from, to);
    const found = quantiles(this, lines, from, to, [0.5, 0.95]);
    const button = make(
        "button", {
          type: "button",
          "aria-expanded": String(!this.element.hidden),
          "aria-controls": this.element.id,
          onclick: () => {
            this.element.hidden = !this.element.hidden;
            button.setAttribute("aria-expanded", String(!this.element.hidden));
            this.update();
            if (!this.element.hidden) {
              this.element.querySelector("h2").focus({preventScroll: true});
              this.element.scrollIntoView();
            }
          }
        },
        this.label);
    return [
      [button, this.label], this.sparkline(lines), [probes, probes],
      [share(answered, probes), probes ? answered / probes : ""],
      ...[0, 1].map(i => found ? [found.values[i].toFixed(3), found.values[i]] : ""),
      [this.findings.length + this.more || "", this.findings.length + this.more]
    ];
  }

  sparkline(lines) {
    const svg = draw(make("span"), "svg", {width: 120, height: 18, class: "spark", "aria-hidden": "true"});
    const points = [];
    for (let i = 0; i < 60; i++) {
      const [from, to] = [i, i + 1].map(n => (view[0] + (view[1] - view[0]) * n / 60 - this.start) / this.width);
      const found = quantiles(this, lines, Math.floor(from), Math.max(Math.floor(to), Math.floor(from) + 1), [0.5]);
      if (found) points.push([2 * i + 1, found.values[0]]);
    }
    const values = points.map(point => point[1]), low = Math.min(...values), high = Math.max(...values, low * 1.1);
    draw(svg, "path", {
      d: points
             .map(
                 ([x, ms], i) => `${i && x - points[i - 1][0] < 16 ? "L" : "M"}${x} ${
                     (16 - 14 * (ms - low) / (high - low)).toFixed(1)}h0`)
             .join("")
    });
    return svg;
  }
}

// ---- The page

const sections = data.sections.map((each, number) => new Section(each, number));
const shownTime = make("span", {role: "status"}), spoken = make("div", {class: "spoken", "aria-live": "polite"});
const say = text => {
  spoken.textContent = text;
};
const list = sections.length > 1 &&
    table(`${
              data.kinds[0].toUpperCase() +
              data.kinds.slice(1)}: median and 95% of the farthest hop that answers, in ms`,
          [
            {name: data.kinds.slice(0, -1), text: true}, {name: "over time", fixed: true},
            {name: "probes", wide: true}, {name: "answered"}, {name: "median"}, {name: "95%", wide: true},
            {name: "findings", wide: true}
          ]);

function setView(begin, end) {
  const least = Math.min(...sections.map(section => section.width), (data.x[1] - data.x[0]) / 4) * 2;
  const span = Math.min(Math.max(end - begin, least), data.x[1] - data.x[0]);
  begin = Math.min(Math.max((begin + end - span) / 2, data.x[0]), data.x[1] - span);
  view = [begin, begin + span];
  update();
}

function zoom(factor, at = (view[0] + view[1]) / 2) {
  setView(at - (at - view[0]) * factor, at + (view[1] - at) * factor);
}

const move = part => setView(...view.map(t => t + (view[1] - view[0]) * part));

function update() {
  shownTime.textContent = isWhole() ? "The whole time is shown." : `Shown: ${clock(view[0])} to ${clock(view[1])}.`;
  for (const [button, isOff] of [
           [out, isWhole()], [back, view[0] <= data.x[0]], [on, view[1] >= data.x[1]], [whole, isWhole()]])
    button.setAttribute("aria-disabled", String(isOff));
  if (list) list.fill(sections.map(section => section.summary()));
  for (const section of sections) section.update();
}

const control = (text, act) => make("button", {type: "button", onclick: act}, text);
const [into, out, back, on, whole] = [
  control("Zoom in", () => zoom(0.5)), control("Zoom out", () => zoom(2)), control("Earlier", () => move(-0.5)),
  control("Later", () => move(0.5)), control("Whole time", () => setView(...data.x))
];
const main = document.querySelector("main");
main.append(
    ...data.notes.map(note => make("p", {class: "note"}, note)), ...data.compared.map(({caption, head, rows}) => {
      const changes = table(caption, head.map((name, number) => ({name, text: number === head.length - 1})));
      changes.fill(rows.map(cells => cells.map(cell => [cell, cell.replace(/[<%]/g, "").replace(/^-$/, "")])));
      if (data.compared.length <= OPEN_MAX) return changes.element;
      return make("details", {}, make("summary", {}, caption), changes.element);
    }));
if (sections.length)
  main.append(
      make(
          "div", {class: "controls", role: "toolbar", "aria-label": "Time that is shown"}, into, out, back, on,
          whole, shownTime),
      ...(list ? [list.element] : []), ...sections.map(section => section.element),
      make("details", {class: "reading"}, make("summary", {}, "How to read the pictures"), make("p", {}, READING)),
      spoken);
else
  main.append(make("p", {}, "no probes yet"));
sections.slice(0, sections.length > OPEN_MAX ? 1 : OPEN_MAX).forEach(section => {
  section.element.hidden = false;
});
update();
let shownWidth = main.clientWidth;
new ResizeObserver(() => {
  if (main.clientWidth !== shownWidth) {
    shownWidth = main.clientWidth;
    update();
  }
}).observe(main);
