// One chart: lines over steps, tokens or time, drawn by uPlot. Charts of one group move together.

const MANY = 80; // points of a line above which they are not marked one by one
const MANY_BANDS = 6;
const NEAR = 7; // pixels from a mark at which its words are shown

/** Charts that share an axis: {name: "tokens" ..., log, range: [low, high] or null, charts}. */
function newGroup(key, name) {
  return { key, name, log: false, range: null, full: [0, 1], charts: [] };
}

const AXES = {
  tokens: { label: "training tokens", format: formatTokens },
  step: { label: "step", format: (value) => value.toLocaleString("en-US") },
  seconds: { label: "time without waiting", format: formatSeconds },
};

/** The lines of a chart as uPlot wants them: one table with all positions. */
function columns(lines, group) {
  const tables = lines.map((line) => {
    const x = line.x[group.name];
    const values = [line.y, ...(line.low ? [line.low, line.high] : [])];
    if (!group.log || x[0] > 0) return [x, ...values];
    const first = x.findIndex((position) => position > 0);
    return first < 0 ? [[], ...values.map(() => [])] : [x.slice(first), ...values.map((column) => column.slice(first))];
  });
  const isShared = tables.every((table) => table[0] === tables[0][0]);
  if (isShared && tables.length) return [tables[0][0], ...tables.flatMap((table) => table.slice(1))];
  return uPlot.join(
    tables,
    tables.map((table) => table.map(() => 0)),
  );
}

/** The color and dashes of a line, for a legend. */
function swatch(index, dash) {
  const made = element("span", { class: "swatch", "aria-hidden": "true" });
  made.style.borderTopColor = `var(--c${index % COLORS})`;
  if (dash) made.style.borderTopStyle = dash[0] > 3 ? "dashed" : "dotted";
  return made;
}

/** A value at an axis whose ticks are `step` apart, with as many decimals as tell them apart. */
function tick(value, step) {
  if (value === null) return "";
  const digits = step ? Math.max(0, -Math.floor(Math.log10(step) + 1e-9)) : 0;
  if (value === 0 || digits > 4 || Math.abs(value) >= 1e6) return value === 0 ? "0" : value.toExponential(1);
  return value.toLocaleString("en-US", step ? { maximumFractionDigits: digits + 1 } : { maximumSignificantDigits: 3 });
}

/** The value of a column at an index, or the last one before it. */
function valueAt(column, index) {
  for (let at = index; at >= 0; at--) {
    if (column[at] !== null && column[at] !== undefined) return column[at];
  }
  return null;
}

class Chart {
  /**
   * spec: {title, unit, height, wide, lines, marks, levels, logY}. A line is {label, color: index, dash, x: {tokens,
   * step, seconds}, y, low, high, faint}; a mark {kind, x: {...}, words, documents, color}; a level {label, y}.
   */
  constructor(spec, group) {
    Object.assign(this, { spec, group, hiddenLines: new Set(), plot: null, logY: Boolean(spec.logY) });
    this.holder = element("div", {
      class: "plot",
      tabindex: 0,
      role: "group",
      "aria-roledescription": "chart",
      "aria-label": this.summary(),
      keydown: (event) => this.key(event),
    });
    this.legend = element("div", { class: "legend" });
    this.tip = element("div", { class: "tip", role: "status", hidden: true });
    const canLog = spec.lines.every((line) =>
      line.y.every((value) => value === null || value === undefined || value > 0),
    );
    const log =
      canLog && spec.lines.length
        ? toggle(
            "log",
            this.logY,
            (on) => {
              this.logY = on;
              this.build();
            },
            `log scale of ${spec.title}`,
          )
        : null;
    this.head = element(
      "div",
      { class: "chart-head" },
      element("h3", {}, spec.title),
      spec.unit ? element("span", { class: "unit" }, spec.unit) : null,
      log,
    );
    this.root = element("div", { class: spec.wide ? "chart wide" : "chart" }, this.head, this.holder, this.legend);
    this.root.append(this.valuesBelow());
    this.observer = new ResizeObserver(() => this.fit());
    group.charts.push(this);
  }

  /** What the chart shows, for those who do not see it. */
  summary() {
    const { spec } = this;
    const lines = spec.lines
      .filter((line) => !line.faint)
      .map((line) => {
        const values = line.y.filter((value) => value !== null && value !== undefined);
        if (!values.length) return `${line.label}: no values`;
        let [low, high] = [Infinity, -Infinity];
        for (const value of values) {
          low = Math.min(low, value);
          high = Math.max(high, value);
        }
        return `${line.label}: ${values.length} values, first ${format(values[0])}, last ${format(values.at(-1))}, lowest ${format(low)}, highest ${format(high)}`;
      });
    return `${spec.title}${spec.unit ? `, ${spec.unit}` : ""}. ${lines.join(". ")}`;
  }

  /** Some of the values as a table, made when it is opened. */
  valuesBelow() {
    const box = element(
      "details",
      {
        toggle: () => {
          if (!box.open || box.children.length > 1) return;
          for (const line of this.spec.lines.filter((one) => !one.faint)) {
            const every = Math.max(1, Math.ceil(line.y.length / 25));
            const rows = line.y
              .map((value, index) => [value, index])
              .filter(([, index]) => index % every === 0 || index === line.y.length - 1);
            box.append(
              tableOf(
                ["step", "tokens", line.label],
                rows.map(([value, index]) => [
                  line.x.step?.[index] ?? "",
                  line.x.tokens ? formatTokens(line.x.tokens[index]) : "",
                  format(value),
                ]),
                line.label,
              ),
            );
          }
        },
      },
      element("summary", {}, "values"),
    );
    return box;
  }

  /** Show the chart in `parent`, as soon as there is time. */
  show(parent) {
    parent.append(this.root);
    later(() => {
      this.build();
      this.observer.observe(this.holder);
    });
    return this;
  }

  /** Draw it anew: after a change of the lines or of what an axis means. */
  build() {
    this.plot?.destroy();
    const { spec, group } = this;
    const lines = spec.lines.filter((line) => line.x[group.name] && !group.hiddenRuns?.has(line.run));
    this.table = columns(lines, group);
    const series = [{}];
    const bands = [];
    this.columnOf = [];
    for (const line of lines) {
      this.columnOf.push(series.length);
      const stroke = () => seriesColor(line.color);
      series.push({
        stroke: line.faint ? () => color("--line") : stroke,
        width: line.faint ? 1 : line.y.length > MANY ? 1.4 : 2,
        alpha: line.faint ? 0.9 : 1,
        dash: line.dash || [],
        spanGaps: true,
        show: !this.hiddenLines.has(line.label),
        points: { show: line.y.length <= MANY && !line.dense, size: 6, fill: stroke, stroke },
      });
      if (line.low) {
        // with many lines, bands hide what they are bands of
        const edge = {
          stroke: "transparent",
          width: 0,
          spanGaps: true,
          points: { show: false },
          show: !this.hiddenLines.has(line.label),
        };
        series.push(edge, { ...edge });
        if (lines.length <= MANY_BANDS)
          bands.push({
            series: [series.length - 1, series.length - 2],
            fill: () => seriesColor(line.color).replace("rgb(", "rgba(").replace(")", ", .16)"),
          });
      }
    }
    this.marks = (spec.marks || []).filter(
      (mark) => mark.x[group.name] !== null && (!group.log || mark.x[group.name] > 0),
    );
    this.plot = new uPlot(this.options(series, bands), this.table, this.holder);
    this.plot.over.append(this.tip);
    this.showLegend(lines);
  }

  options(series, bands) {
    const { group, spec } = this;
    const font = "12px system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', Arial, sans-serif";
    const axis = {
      stroke: () => color("--muted"),
      font,
      grid: { stroke: () => color("--grid"), width: 1 },
      ticks: { stroke: () => color("--line"), width: 1, size: 5 },
    };
    return {
      width: Math.max(this.holder.clientWidth, 120),
      height: spec.height || 210,
      legend: { show: false },
      series,
      bands,
      scales: {
        x: { time: false, distr: group.log ? 3 : 1, range: () => group.range || this.fullRange() },
        y: { distr: this.logY ? 3 : 1, ...(spec.yRange ? { range: () => spec.yRange } : {}) },
      },
      axes: [
        {
          ...axis,
          size: 34,
          space: 70,
          values: (plot, splits) => splits.map((value) => (value === null ? "" : AXES[group.name].format(value))),
        },
        {
          ...axis,
          size: 66,
          space: 34,
          values: (plot, splits, axis, space, step) => splits.map((value) => tick(value, step)),
        },
      ],
      cursor: {
        drag: { x: true, y: false, setScale: false },
        sync: {
          key: group.key,
          setSeries: false,
          scales: ["x", null],
          filters: { pub: (type) => type === "mousemove" || type === "mouseleave" },
        },
        points: { size: 7 },
        focus: { prox: -1 },
        bind: {
          dblclick: () => () => {
            zoom(group, null);
            return null;
          },
        },
      },
      hooks: {
        setSelect: [
          (plot) => {
            if (plot.select.width > 4) {
              const range = [
                plot.posToVal(plot.select.left, "x"),
                plot.posToVal(plot.select.left + plot.select.width, "x"),
              ];
              zoom(group, range);
            }
            plot.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
          },
        ],
        setCursor: [(plot) => this.hover(plot)],
        drawClear: [(plot) => this.drawBehind(plot)],
        draw: [(plot) => this.drawMarks(plot)],
      },
    };
  }

  fullRange() {
    const [low, high] = this.group.full;
    return this.group.log ? [Math.max(low, this.group.lowest || 1e-9), high] : [low, high];
  }

  fit() {
    const width = Math.max(this.holder.clientWidth, 120);
    if (this.plot && Math.abs(this.plot.width - width) > 1)
      this.plot.setSize({ width, height: this.spec.height || 210 });
  }

  // ---- legend, cursor and keys ----

  showLegend(lines) {
    this.values = [];
    this.position = element("span", { class: "at" });
    const shown = lines.map((line, index) => [line, index]).filter(([line]) => !line.faint);
    const buttons = shown.map(([line, index]) => {
      const value = element(
        "span",
        { class: "value" },
        format(valueAt(this.table[this.columnOf[index]], this.table[0].length - 1)),
      );
      this.values.push([value, this.columnOf[index]]);
      const button = toggle("", !this.hiddenLines.has(line.label), (on) => {
        this.hiddenLines[on ? "delete" : "add"](line.label);
        this.build();
        this.legend.querySelectorAll("button")[buttons.indexOf(button)]?.focus();
      });
      button.append(swatch(line.color, line.dash), element("span", { class: "name" }, line.label), value);
      return button;
    });
    this.legend.replaceChildren(...buttons, this.position);
  }

  hover(plot) {
    const { idx, left } = plot.cursor;
    const isInside = idx !== null && idx !== undefined && left >= 0;
    const at = isInside ? idx : this.table[0].length - 1;
    for (const [value, column] of this.values || []) value.textContent = format(valueAt(this.table[column], at));
    if (this.position)
      this.position.textContent = isInside ? `at ${AXES[this.group.name].format(this.table[0][idx])}` : "";
    this.showTip(plot, isInside ? left : null);
  }

  showTip(plot, left) {
    let nearest = null;
    let distance = NEAR;
    for (const mark of left === null || !plot.over.matches(":hover, .keys") ? [] : this.marks) {
      const away = Math.abs(plot.valToPos(mark.x[this.group.name], "x") - left) + (mark.kind === "saved" ? 2 : 0);
      if (away < distance) [nearest, distance] = [mark, away];
    }
    this.tip.hidden = !nearest;
    if (!nearest) {
      this.tipOf = null;
      return;
    }
    if (this.tipOf !== nearest) {
      this.tipOf = nearest;
      this.tip.replaceChildren(...wordsOf(nearest));
    }
    const x = plot.valToPos(nearest.x[this.group.name], "x");
    const width = plot.over.clientWidth;
    this.tip.style.left = x < width / 2 ? `${x + 10}px` : "auto";
    this.tip.style.right = x < width / 2 ? "auto" : `${width - x + 10}px`;
    this.tip.style.top = "6px";
  }

  key(event) {
    const { plot, group } = this;
    if (event.target !== this.holder || !plot) return;
    const far = event.shiftKey ? 10 : 1;
    const moves = { ArrowLeft: -far, ArrowRight: far };
    if (event.key in moves) this.step(moves[event.key]);
    else if (event.key === "+" || event.key === "=") zoomBy(group, 0.5, this.cursorValue());
    else if (event.key === "-") zoomBy(group, 2, this.cursorValue());
    else if (event.key === "0" || event.key === "Escape") zoom(group, null);
    else return;
    event.preventDefault();
  }

  cursorValue() {
    const { idx } = this.plot.cursor;
    return idx === null || idx === undefined ? null : this.table[0][idx];
  }

  /** Move the cursor by some points, and read them out. */
  step(by) {
    const { plot } = this;
    const [low, high] = [plot.scales.x.min, plot.scales.x.max];
    const now =
      plot.cursor.left >= 0 && plot.cursor.idx !== null && plot.cursor.idx !== undefined
        ? plot.cursor.idx
        : plot.valToIdx(low) - (by > 0 ? 1 : -1);
    let next = Math.min(Math.max(now + by, 0), this.table[0].length - 1);
    if (this.table[0][next] < low || this.table[0][next] > high) next = now;
    if (next < 0 || next >= this.table[0].length) return;
    plot.over.classList.add("keys");
    plot.setCursor({ left: plot.valToPos(this.table[0][next], "x"), top: 10 }, true, true);
    plot.over.classList.remove("keys");
    const values = [...this.legend.querySelectorAll("button")].map((button) =>
      button.textContent.replace(/([\d.,–-]+)$/, " $1"),
    );
    byId("reading").textContent =
      `${AXES[this.group.name].format(this.table[0][next])}: ${values.join(", ")}${this.tip.hidden ? "" : `. ${this.tip.textContent}`}`;
  }

  // ---- what is drawn besides the lines ----

  drawBehind(plot) {
    const { ctx, bbox } = plot;
    ctx.save();
    ctx.lineWidth = devicePixelRatio;
    for (const mark of this.marks) {
      if (mark.kind !== "resumed") continue;
      const x = Math.round(plot.valToPos(mark.x[this.group.name], "x", true));
      if (x < bbox.left || x > bbox.left + bbox.width) continue;
      ctx.strokeStyle = color("--c2");
      ctx.setLineDash([6 * devicePixelRatio, 3 * devicePixelRatio]);
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
    }
    ctx.restore();
  }

  /** The label of a level at its right end, at the left one where another label is in the way. */
  drawLabel(plot, text, y) {
    const { ctx, bbox } = plot;
    const unit = devicePixelRatio;
    const isFree = this.labelled.every((other) => Math.abs(other - y) > 13 * unit);
    const x = isFree ? bbox.left + bbox.width - 4 * unit : bbox.left + 4 * unit;
    this.labelled.push(y);
    ctx.textAlign = isFree ? "right" : "left";
    ctx.textBaseline = "bottom";
    ctx.save();
    ctx.setLineDash([]);
    ctx.strokeStyle = color("--back");
    ctx.lineWidth = 4 * unit;
    ctx.strokeText(text, x, y - 3 * unit);
    ctx.restore();
    ctx.fillText(text, x, y - 3 * unit);
  }

  drawMarks(plot) {
    const { ctx, bbox } = plot;
    const unit = devicePixelRatio;
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left - 6 * unit, bbox.top, bbox.width + 12 * unit, bbox.height);
    ctx.clip();
    ctx.font = `${11 * unit}px system-ui, 'DejaVu Sans', Arial, sans-serif`;
    this.labelled = [];
    for (const level of this.spec.levels || []) {
      const y = plot.valToPos(level.y, "y", true);
      if (y < bbox.top || y > bbox.top + bbox.height) continue;
      ctx.strokeStyle = ctx.fillStyle = level.color === undefined ? color("--muted") : seriesColor(level.color);
      ctx.setLineDash([3 * unit, 3 * unit]);
      ctx.beginPath();
      ctx.moveTo(bbox.left, y);
      ctx.lineTo(bbox.left + bbox.width, y);
      ctx.stroke();
      this.drawLabel(plot, level.label, y);
    }
    ctx.setLineDash([]);
    for (const mark of this.marks) {
      const x = plot.valToPos(mark.x[this.group.name], "x", true);
      if (x < bbox.left || x > bbox.left + bbox.width) continue;
      if (mark.kind === "saved") {
        ctx.fillStyle = color("--muted");
        ctx.fillRect(x - unit / 2, bbox.top + bbox.height - 6 * unit, unit, 6 * unit);
      } else if (mark.kind === "spike" || mark.kind === "not finite") {
        const y =
          mark.y === undefined || mark.y === null
            ? bbox.top + 8 * unit
            : Math.max(plot.valToPos(mark.y, "y", true), bbox.top + 6 * unit);
        ctx.fillStyle = color("--wrong");
        ctx.beginPath();
        for (const [dx, dy] of [
          [0, -6],
          [5, 0],
          [0, 6],
          [-5, 0],
        ])
          ctx.lineTo(x + dx * unit, y + dy * unit);
        ctx.fill();
      }
    }
    ctx.restore();
  }
}

/** The words of a mark, as elements. */
function wordsOf(mark) {
  const found = [
    element("strong", {}, `${mark.kind} · step ${mark.x.step.toLocaleString("en-US")}`),
    element("div", {}, mark.words || ""),
  ];
  if (mark.documents?.length) {
    found.push(
      element("div", {}, "documents that the step read:"),
      element("ul", {}, ...mark.documents.map((name) => element("li", {}, name))),
    );
  }
  return found;
}

// ---- all charts of a group ----

/** Show [low, high] of the axis in all charts of a group; null shows all. */
function zoom(group, range) {
  group.range = range;
  const [low, high] = range || (group.charts[0]?.fullRange() ?? [0, 1]);
  for (const chart of group.charts) later(() => chart.plot?.setScale("x", { min: low, max: high }));
  group.onZoom?.();
}

/** Zoom by a factor around a value of the axis, or around the middle. */
function zoomBy(group, factor, around = null) {
  const full = group.charts[0]?.fullRange();
  if (!full) return;
  const [low, high] = group.range || full;
  const middle = around === null || around < low || around > high ? (low + high) / 2 : around;
  const next = [
    Math.max(middle - (middle - low) * factor, full[0]),
    Math.min(middle + (high - middle) * factor, full[1]),
  ];
  zoom(group, next[0] <= full[0] && next[1] >= full[1] ? null : next);
}

/** Move what is shown to the left or right by a share of its width. */
function pan(group, share) {
  const full = group.charts[0]?.fullRange();
  if (!full || !group.range) return;
  const [low, high] = group.range;
  const by = Math.min(Math.max((high - low) * share, full[0] - low), full[1] - high);
  zoom(group, [low + by, high + by]);
}

/** Set what the axis of a group means, from all of its lines. */
function setAxis(group, name) {
  const zoomed = group.range;
  Object.assign(group, { name, range: null });
  let [low, high, lowest] = [Infinity, -Infinity, Infinity];
  for (const chart of group.charts) {
    for (const line of chart.spec.lines) {
      const x = line.x[name];
      if (!x?.length) continue;
      low = Math.min(low, x[0]);
      high = Math.max(high, x.at(-1));
      const first = x.find((position) => position > 0);
      if (first) lowest = Math.min(lowest, first);
    }
  }
  if (high <= low) [low, high] = [low - 0.5, low + 0.5];
  Object.assign(group, { full: [low, high], lowest });
  for (const chart of group.charts) if (chart.plot) later(() => chart.build());
  if (zoomed) group.onZoom?.();
}

recolored.push(() => {
  for (const group of groups) for (const chart of group.charts) later(() => chart.plot?.redraw(false, true));
});
const groups = [];

// ---- printing: the width of paper, in light ----

const PAPER = 690; // pixels between the margins

function fitPaper(isPrinting) {
  document.documentElement.toggleAttribute("data-print", isPrinting);
  known = new Map();
  for (const chart of groups.flatMap((group) => group.charts)) {
    if (!chart.plot) continue;
    const width = isPrinting ? (chart.spec.wide ? PAPER : PAPER / 2 - 14) : Math.max(chart.holder.clientWidth, 120);
    chart.plot.setSize({ width, height: chart.spec.height || 210 });
    chart.plot.redraw(false, true);
  }
}

addEventListener("beforeprint", () => fitPaper(true));
addEventListener("afterprint", () => fitPaper(false));
