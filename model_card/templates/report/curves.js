// Curves of everything that was logged, by tokens, step or time.

const TITLES = {
  // group: [title, unit]
  loss: ["Loss", "nats per token"],
  bits_per_byte: ["Bits per byte", ""],
  perplexity: ["Perplexity", ""],
  scores: ["Scores during training", ""],
  learning_rate: ["Learning rate", ""],
  grad_norm: ["Gradient norm", ""],
  tokens_per_second: ["Throughput", "tokens per second"],
  mfu: ["Model FLOPs utilization", "%"],
  goodput: ["Goodput", "% of the wall time that was training steps"],
  peak_memory_gib: ["Peak memory", "GiB"],
  mean_token_accuracy: ["Token accuracy", ""],
  entropy: ["Entropy of the predictions", "nats per token"],
  seconds: ["Wall time", "seconds since the start"],
};
const ORDER = Object.keys(TITLES);
const OF_SETS = ["loss", "bits_per_byte", "perplexity"]; // groups with a line for each validation set
const DASHES = [null, [7, 4], [2, 3], [10, 3, 2, 3]];
const curves = newGroup("curves", "tokens");
curves.hiddenRuns = new Set();
groups.push(curves);

/** The name of a logged value for readers. */
function labelOf(name, group) {
  if (name === "loss") return "training";
  if (name === `eval_${group}`) return "validation";
  if (name === group) return (TITLES[name]?.[0] ?? name.replaceAll("_", " ")).toLowerCase();
  if (name === "eval_end_loss") return "end of the answer"; // of a tuning run
  const base = name.replace(/^eval_/, "");
  return taskName(base.endsWith(`_${group}`) ? base.slice(0, -group.length - 1) : base);
}

/** A line after an exponential mean over about `count` points. */
function smoothed(values, count) {
  const weight = 2 / (count + 1);
  let mean = 0;
  let rest = 1;
  return values.map((value) => {
    if (value === null) return null;
    mean = (1 - weight) * mean + weight * value;
    rest *= 1 - weight;
    return mean / (1 - rest);
  });
}

/** Training before validation before the other sets. */
const seriesRank = (name, group) =>
  [group, `eval_${group}`].indexOf(name) + (name === group || name === `eval_${group}` ? 0 : 9);

/** The color of a line: a validation set has the same one in all charts. */
function lineColor(name, group, index) {
  if (!OF_SETS.includes(group)) return index;
  if (name === group || name === `eval_${group}`) return name === group ? 0 : 1;
  const all = data.runs.flatMap((run) => run.series.filter((series) => OF_SETS.includes(series.group)));
  const sets = new Set(all.map((series) => labelOf(series.name, series.group)));
  return 2 + [...sets].filter((label) => label !== "training" && label !== "validation").indexOf(labelOf(name, group));
}

/** {color, dash} of each run: the arms of a study that begin at several steps share the color of their arm. */
function runLooks() {
  const bases = data.runs.map((run) => run.name.replace(/ at \d+$/, ""));
  const distinct = [...new Set(bases)];
  return bases.map((base, index) => ({
    color: distinct.indexOf(base),
    dash: bases.slice(0, index).filter((other) => other === base).length,
  }));
}

/** The lines of a group of logged values, of all runs. */
function linesOf(group, smooth) {
  const lines = [];
  const several = data.runs.length > 1;
  const looks = runLooks();
  data.runs.forEach((run, number) => {
    const ofGroup = run.series.filter((series) => series.group === group);
    ofGroup
      .sort((a, b) => seriesRank(a.name, group) - seriesRank(b.name, group))
      .forEach((series, index) => {
        const x = run.grids[series.grid];
        const label = several
          ? `${run.name}${group === "loss" || index ? ` · ${labelOf(series.name, group)}` : ""}`
          : labelOf(series.name, group);
        const line = {
          label,
          run: number,
          color: several ? looks[number].color : lineColor(series.name, group, index),
          x,
          y: series.values,
          low: series.low,
          high: series.high,
        };
        if (several) line.dash = DASHES[(index + looks[number].dash) % DASHES.length];
        if (smooth && series.values.length > MANY && !series.low) {
          lines.push({ ...line, faint: true });
          line.y = smoothed(series.values, smooth);
        }
        lines.push(line);
      });
  });
  return lines;
}

/** Marks of a chart: spikes where loss and gradient norm show them, on the line of the loss; saves under the loss. */
function marksOf(group) {
  const kinds = { loss: ["resumed", "spike", "not finite", "saved"], grad_norm: ["resumed", "spike", "not finite"] }[
    group
  ] ?? ["resumed"];
  return data.runs.flatMap((run) =>
    (run.marks || [])
      .filter((mark) => kinds.includes(mark.kind))
      .map((mark) => ({
        kind: mark.kind,
        x: mark,
        words: mark.text,
        documents: mark.documents,
        y: group === "loss" ? mark.loss : undefined,
      })),
  );
}

function showCurves() {
  if (!byId("curves")) return;
  const names = [...new Set(data.runs.flatMap((run) => run.series.map((series) => series.group)))];
  const rank = (name) => (ORDER.includes(name) ? ORDER.indexOf(name) : ORDER.length - 1.5);
  names.sort((a, b) => rank(a) - rank(b) || a.localeCompare(b));
  for (const name of names) {
    const [title, unit] = TITLES[name] ?? [name.replaceAll("_", " "), ""];
    const isLoss = name === "loss";
    const baselines = isLoss && data.runs.length === 1 ? Object.entries(data.runs[0].baselines || {}) : [];
    const chart = new Chart(
      {
        title,
        unit,
        wide: isLoss,
        height: isLoss ? 340 : 200,
        logY: name === "grad_norm",
        lines: linesOf(name, 0),
        marks: marksOf(name),
        levels: baselines.map(([label, y]) => ({ label: `${label} counts ${y.toFixed(2)}`, y })),
      },
      curves,
    );
    chart.of = name;
    if (isLoss) chart.root.append(markKey());
  }
  const axes = Object.keys(AXES).filter((axis) => data.runs.every((run) => run.grids.every((grid) => grid[axis])));
  curves.name = axes[0];
  setAxis(curves, axes[0]);
  curveTools(axes);
  for (const chart of curves.charts) chart.show(byId("charts"));
  later(() => performance.mark("curves drawn"));
  const thinned = data.runs
    .filter((run) => run.thinned)
    .map((run) => `${run.name} logged ${run.thinned.toLocaleString("en-US")} lines`);
  byId("thinned").textContent = thinned.length
    ? `${thinned.join(", ")}: of each stretch the lines with the lowest and highest loss and gradient norm are drawn.`
    : "";
}

/** What the marks in the charts mean, as far as there are any. */
function markKey() {
  const kinds = new Set(data.runs.flatMap((run) => (run.marks || []).map((mark) => mark.kind)));
  const words = [
    ["spike", "◆ spike: point at it for its words"],
    ["resumed", "┆ resumed"],
    ["saved", "| at the bottom: checkpoint saved"],
  ];
  return element(
    "p",
    { class: "note" },
    words
      .filter(([kind]) => kinds.has(kind))
      .map(([, text]) => text)
      .join("    "),
  );
}

function curveTools(axes) {
  const tools = byId("curve-tools");
  const texts = { tokens: "tokens", step: "step", seconds: "time" };
  if (axes.length > 1)
    tools.append(
      choice(
        "x axis",
        axes.map((axis) => [axis, texts[axis]]),
        curves.name,
        (axis) => setAxis(curves, axis),
      ),
    );
  const button = (text, label, click) => element("button", { type: "button", "aria-label": label, click }, text);
  const moves = element(
    "div",
    { class: "group", role: "group", "aria-label": "zoom" },
    button("−", "zoom out", () => zoomBy(curves, 2)),
    button("+", "zoom in", () => zoomBy(curves, 0.5)),
    button("←", "earlier", () => pan(curves, -0.5)),
    button("→", "later", () => pan(curves, 0.5)),
    button("all", "show all", () => zoom(curves, null)),
  );
  tools.append(element("fieldset", {}, element("legend", {}, "zoom"), moves));
  tools.append(
    toggle(
      "log x",
      false,
      (on) => {
        curves.log = on;
        setAxis(curves, curves.name);
      },
      "log x axis",
    ),
  );
  if (data.runs.length > 1) tools.append(runButtons());
  if (data.runs.some((run) => run.series.some((series) => series.values.length > MANY && !series.low))) {
    tools.append(
      menu(
        "smooth over",
        [
          [0, "nothing"],
          [10, "10 lines"],
          [50, "50 lines"],
          [200, "200 lines"],
        ],
        0,
        (count) => {
          for (const chart of curves.charts) {
            chart.spec.lines = linesOf(chart.of, +count);
            later(() => chart.build());
          }
        },
      ),
    );
  }
}

/** A button for each run, which shows or hides its lines in all charts. */
function runButtons() {
  const group = element("div", { class: "group legend", role: "group", "aria-label": "runs that are shown" });
  runLooks().forEach((look, number) => {
    const button = toggle("", true, (on) => {
      curves.hiddenRuns[on ? "delete" : "add"](number);
      for (const chart of curves.charts) later(() => chart.build());
    });
    button.append(
      swatch(look.color, DASHES[look.dash % DASHES.length]),
      element("span", { class: "name" }, data.runs[number].name),
    );
    group.append(button);
  });
  return element("fieldset", { class: "runs" }, element("legend", {}, "runs"), group);
}

// ---- what happened ----

function showEvents() {
  const several = data.runs.length > 1;
  const rows = data.runs.flatMap((run) =>
    (run.marks || [])
      .filter((mark) => mark.kind !== "saved")
      .map((mark) => {
        const detail = element("div", {}, mark.text);
        if (mark.documents?.length)
          detail.append(element("ul", {}, ...mark.documents.map((name) => element("li", {}, name))));
        const show = element(
          "button",
          {
            type: "button",
            "aria-label": `show ${mark.kind} at step ${mark.step} in the curves`,
            click: () => {
              const [low, high] = curves.charts[0].fullRange();
              const at = mark[curves.name];
              zoom(curves, [Math.max(at - (high - low) / 40, low), Math.min(at + (high - low) / 40, high)]);
              byId("curves").scrollIntoView();
            },
          },
          "show",
        );
        const time = element("span", { class: "time" }, mark.time.replace("T", " ").replace("Z", ""));
        return [...(several ? [run.name] : []), mark.step.toLocaleString("en-US"), mark.kind, detail, time, show];
      }),
  );
  if (!rows.length) return;
  const section = byId("events");
  section.hidden = false;
  section.append(
    tableOf(
      [
        ...(several ? ["run"] : []),
        "step",
        "what",
        "detail",
        "time (UTC)",
        element("span", { class: "hidden" }, "in the curves"),
      ],
      rows,
      "events of the run",
    ),
  );
  const saves = data.runs.flatMap((run) => run.marks || []).filter((mark) => mark.kind === "saved").length;
  if (saves)
    section.append(element("p", { class: "note" }, `${saves} checkpoint${saves > 1 ? "s were" : " was"} saved.`));
}
