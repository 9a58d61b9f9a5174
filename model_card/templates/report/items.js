// Items along training: a grid of items and models, right or wrong and by how much.

const PAGE = 200; // rows at once
const itemCharts = newGroup("items", "step");
groups.push(itemCharts);

const SORTS = {
  // how rows are sorted: smallest first
  learnt: ["when they were learnt", (row) => row.learnt],
  forgotten: ["forgotten first", (row) => (row.isForgotten ? row.lastRight - 1e6 : row.learnt)],
  last: ["the last model's answer", (row) => -(row.last ?? -1)],
  name: ["their name", (row) => row.index],
};
const VALUE_SORTS = {
  gain: ["how much they improved", (row) => row.gain],
  last: ["the last model", (row) => row.last ?? Infinity],
  name: ["their name", (row) => row.index],
};
const STATES = {
  all: ["all", () => true],
  learnt: ["learnt", (row) => row.state === "learnt"],
  forgotten: ["forgotten", (row) => row.isForgotten],
  always: ["always right", (row) => row.state === "always right"],
  never: ["never right", (row) => row.state === "never right"],
};

/** What one item's answers along the steps `along` say. right: text of 0, 1 and - per model. */
function course(right, along) {
  const marks = along.map((index) => right[index]);
  let learnt = marks.length; // index from which on all answers are right
  while (learnt > 0 && marks[learnt - 1] === "1") learnt--;
  const lastRight = marks.lastIndexOf("1");
  const isForgotten = lastRight >= 0 && marks.indexOf("0", lastRight) > 0;
  let state = "learnt";
  if (learnt === 0) state = "always right";
  else if (lastRight < 0) state = "never right";
  else if (isForgotten) state = "forgotten";
  return { learnt: learnt + (lastRight < 0 ? 0.5 : 0), lastRight, isForgotten, state };
}

class ItemGrid {
  constructor(evaluation, parent) {
    this.evaluation = evaluation;
    this.runs = trajectories(evaluation);
    this.tools = element("div", { class: "tools" });
    this.summary = element("p", { class: "note", "aria-live": "polite" });
    this.box = element("div");
    parent.append(this.tools, this.summary, this.box);
    this.open(evaluation.grids[0]);
  }

  /** Show the grid of a task. */
  open(grid) {
    Object.assign(this, {
      grid,
      metric: grid.metrics[0],
      sort: grid.kind === "choice" ? "learnt" : "gain",
      state: "all",
      subject: -1,
      search: "",
      page: 0,
      run: 0,
    });
    this.controls();
    this.update();
  }

  controls() {
    const { grid, evaluation } = this;
    const set =
      (name, convert = String) =>
      (value) => {
        this[name] = convert(value);
        this.page = 0;
        this.update();
      };
    const sorts = grid.kind === "choice" ? SORTS : VALUE_SORTS;
    const parts = [];
    if (evaluation.grids.length > 1)
      parts.push(
        menu(
          "task",
          evaluation.grids.map((one, index) => [index, taskName(one.task)]),
          evaluation.grids.indexOf(grid),
          (index) => this.open(evaluation.grids[index]),
        ),
      );
    if (grid.metrics.length > 1)
      parts.push(
        menu(
          "right by",
          grid.metrics.map((name) => [name, name]),
          this.metric,
          set("metric"),
        ),
      );
    if (this.runs.length > 1)
      parts.push(
        menu(
          "along",
          this.runs.map((run, index) => [index, run.name]),
          this.run,
          set("run", Number),
        ),
      );
    parts.push(
      menu(
        "sorted by",
        Object.entries(sorts).map(([name, [text]]) => [name, text]),
        this.sort,
        set("sort"),
      ),
    );
    if (grid.kind === "choice" && this.along().length > 1)
      parts.push(
        menu(
          "show",
          Object.entries(STATES).map(([name, [text]]) => [name, text]),
          this.state,
          set("state"),
        ),
      );
    if (grid.subjects.length > 1)
      parts.push(
        menu(
          "subject",
          [[-1, "all"], ...grid.subjects.map((name, index) => [index, taskName(name)])],
          this.subject,
          set("subject", Number),
        ),
      );
    const search = element("input", { type: "search", input: () => set("search")(search.value.toLowerCase()) });
    parts.push(element("label", {}, "name contains", search));
    this.tools.replaceChildren(...parts);
  }

  /** Indices of the models along which items are learnt: the steps of one run, else all models. */
  along() {
    return this.runs[this.run]?.at ?? [...this.evaluation.models.keys()];
  }

  rows() {
    const { grid } = this;
    const along = this.along();
    const last = along.at(-1);
    return grid.items.map((name, index) => {
      const row = { index, name, subject: grid.of[index], source: grid.sources[index] };
      if (grid.kind !== "choice") {
        const values = along.map((at) => grid.values[index][at]).filter((value) => value !== null);
        const better = grid.kind === "bits" ? 1 : -1;
        return {
          ...row,
          last: better * (values.at(-1) ?? Infinity),
          gain: better * ((values.at(-1) ?? 0) - (values[0] ?? 0)),
          state: "",
        };
      }
      const right = grid.right[this.metric][index];
      const p = grid.p?.[index][last] ?? 0;
      return { ...row, ...course(right, along), last: (right[last] === "1" ? 1000 : 0) + p };
    });
  }

  update() {
    const { grid } = this;
    const sorts = grid.kind === "choice" ? SORTS : VALUE_SORTS;
    const every = this.rows();
    const filters = [
      STATES[this.state][1],
      (row) => this.subject < 0 || row.subject === this.subject,
      (row) =>
        !this.search ||
        `${row.name} ${row.source ?? ""} ${grid.subjects[row.subject]}`.toLowerCase().includes(this.search),
    ];
    const rows = every.filter((row) => filters.every((filter) => filter(row)));
    const by = sorts[this.sort][1];
    rows.sort((a, b) => by(a) - by(b) || a.index - b.index);
    this.summary.replaceChildren(...this.words(every, rows));
    const pages = Math.max(Math.ceil(rows.length / PAGE), 1);
    this.page = Math.min(this.page, pages - 1);
    const shown = rows.slice(this.page * PAGE, (this.page + 1) * PAGE);
    this.detail = element(
      "div",
      { class: "detail", "aria-live": "polite" },
      element("p", { class: "note" }, "Choose an item to see its line here."),
    );
    const pager = pages > 1 ? this.pager(pages, rows.length) : null;
    const box = element("div", { class: "grid" }, ...this.counts(rows), this.list(shown), pager);
    box.style.setProperty("--tracks", `repeat(${this.evaluation.models.length}, minmax(0, 1fr))`);
    this.box.replaceChildren(element("div", { class: "learning" }, box, this.detail));
    itemCharts.charts = [];
    if (shown.length) this.choose(shown[0], null);
  }

  words(every, rows) {
    const { grid } = this;
    const sample = grid.total > grid.items.length ? ` (${grid.items.length} of ${grid.total}, evenly)` : "";
    const count =
      rows.length === every.length
        ? `${every.length} items${sample}`
        : `${rows.length} of ${every.length} items${sample}`;
    const parts = [element("span", {}, `${count}. `)];
    if (grid.kind === "choice") {
      const of = (test) => rows.filter(test).length;
      if (this.along().length > 1)
        parts.push(
          element(
            "span",
            {},
            `Learnt ${of((row) => row.state === "learnt")}, forgotten ${of((row) => row.isForgotten)}, always right ${of((row) => row.state === "always right")}, never right ${of((row) => row.state === "never right")}. `,
          ),
        );
      const key = (kind, text) =>
        element("span", { class: "key" }, element("span", { class: `cell ${kind}`, "aria-hidden": "true" }), text);
      parts.push(key("right", "right"), key("wrong", "wrong"));
      if (grid.p)
        parts.push(
          element(
            "span",
            {},
            "The stronger the color, the surer: the probability of the right answer among the options." +
              (this.metric === "acc_norm" ? " acc_norm compares options by character, the probability does not." : ""),
          ),
        );
    } else {
      parts.push(
        element(
          "span",
          {},
          grid.kind === "bits"
            ? `${this.metric === "bits_per_byte" ? "Bits per byte" : this.metric} of each text: the stronger, the lower (better).`
            : `${this.metric}: the stronger, the higher.`,
        ),
      );
    }
    const apart = this.evaluation.models.filter((model) => model.run === null).map((model) => model.name);
    if (this.runs.length && apart.length) parts.push(element("span", {}, ` Apart, marked ·: ${apart.join(", ")}.`));
    return parts;
  }

  /** Rows above the grid: the models, and how many items are right, new and lost at each. */
  counts(rows) {
    const { grid, evaluation } = this;
    const line = (name, texts, kind = "") =>
      element(
        "div",
        { class: "counts" },
        element("span", { class: "name" }, name),
        element(
          "span",
          { class: "cells" },
          ...texts.map((text, index) =>
            element(
              "span",
              {
                class: `count ${kind}${this.isApart(index) ? " apart" : ""}`,
                title: kind ? evaluation.models[index].name : null,
              },
              text,
            ),
          ),
        ),
      );
    const many = evaluation.models.length > 24;
    const names = line(
      "",
      evaluation.models.map((model) =>
        many ? "" : model.step === null || model.run === null ? "·" : formatTokens(model.step),
      ),
      "model",
    );
    names.querySelector(".name").textContent = "step";
    if (grid.kind !== "choice") return [names];
    const marks = rows.map((row) => grid.right[this.metric][row.index]);
    const along = this.along();
    const before = new Map(along.slice(1).map((at, index) => [at, along[index]]));
    const change = (from, to) =>
      evaluation.models.map((_, at) =>
        before.has(at) && !many ? marks.filter((mark) => mark[before.get(at)] === from && mark[at] === to).length : "",
      );
    const right = evaluation.models.map((_, at) => (many ? "" : marks.filter((mark) => mark[at] === "1").length));
    return [
      names,
      line("right", right),
      ...(along.length > 1 ? [line("newly right", change("0", "1")), line("lost again", change("1", "0"))] : []),
    ];
  }

  /** Whether a model begins another run, or is none of a run's steps. */
  isApart(index) {
    const { models } = this.evaluation;
    return index > 0 && models[index].run !== models[index - 1].run;
  }

  list(rows) {
    const list = element("div", {
      class: "rows",
      role: "group",
      "aria-label": "items; arrow keys move, Enter shows the line",
      keydown: (event) => this.key(event, list),
    });
    rows.forEach((row, index) => {
      const button = element(
        "button",
        {
          type: "button",
          class: "row",
          tabindex: index ? -1 : 0,
          "aria-expanded": "false",
          "aria-label": this.spoken(row),
          click: () => this.choose(row, button),
        },
        element("span", { class: "name" }, this.nameOf(row)),
        this.cells(row),
      );
      list.append(button);
    });
    if (!rows.length)
      list.append(element("p", { class: "note", style: "padding: .6rem" }, "No item is left: change the filters."));
    return list;
  }

  nameOf(row) {
    const [subject, number] = [
      row.name.slice(0, row.name.lastIndexOf(" ")),
      row.name.slice(row.name.lastIndexOf(" ") + 1),
    ];
    const shown = this.grid.subjects.length > 1 ? taskName(this.grid.subjects[row.subject]) : taskName(subject);
    return `${shown} ${number}`;
  }

  cells(row) {
    const { grid } = this;
    const cells = element("span", { class: "cells", "aria-hidden": "true" });
    this.evaluation.models.forEach((model, at) => {
      const [kind, by, words] = this.cellOf(grid, row, at);
      const cell = element("span", {
        class: `cell ${kind}${this.isApart(at) ? " apart" : ""}`,
        title: `${model.name}: ${words}`,
      });
      cell.style.setProperty("--by", `${Math.round(25 + 75 * by)}%`);
      cells.append(cell);
    });
    return cells;
  }

  /** [class, strength from 0 to 1, words] of one answer. */
  cellOf(grid, row, at) {
    if (grid.kind !== "choice") {
      const value = grid.values[row.index][at];
      if (value === null) return ["none", 0, "not evaluated"];
      this.spans ??= new Map();
      if (!this.spans.has(grid)) {
        const every = grid.values.flat().filter((one) => one !== null);
        this.spans.set(grid, [Math.min(...every), Math.max(...every)]);
      }
      const [low, high] = this.spans.get(grid);
      const share = high > low ? (value - low) / (high - low) : 1;
      return ["right", grid.kind === "bits" ? 1 - share : share, format(value)];
    }
    const mark = grid.right[this.metric][row.index][at];
    if (mark === "-") return ["none", 0, "not evaluated"];
    const p = grid.p?.[row.index][at] ?? null;
    const words = `${mark === "1" ? "right" : "wrong"}${p === null ? "" : `, probability of the right answer ${(p / 10).toFixed(1)} %`}`;
    const strength = p === null ? 0.75 : mark === "1" ? p / 1000 : 1 - p / 1000;
    return [mark === "1" ? "right" : "wrong", strength, words];
  }

  /** An item in words, for those who do not see its cells. */
  spoken(row) {
    const along = this.along();
    const { models } = this.evaluation;
    if (this.grid.kind !== "choice")
      return `${this.nameOf(row)}: ${along.map((at) => `${models[at].name} ${format(this.grid.values[row.index][at])}`).join(", ")}`;
    const from =
      row.state === "learnt"
        ? ` from ${models[along[Math.floor(row.learnt)]].name} on`
        : row.isForgotten
          ? ` after ${models[along[row.lastRight]].name}`
          : "";
    return `${this.nameOf(row)}: ${row.state}${from}; ${along.map((at) => ({ 1: "right", 0: "wrong", "-": "none" })[this.grid.right[this.metric][row.index][at]]).join(", ")}`;
  }

  key(event, list) {
    const rows = [...list.querySelectorAll(".row")];
    const now = rows.indexOf(document.activeElement);
    const next = {
      ArrowDown: now + 1,
      ArrowUp: now - 1,
      Home: 0,
      End: rows.length - 1,
      PageDown: now + 20,
      PageUp: now - 20,
    }[event.key];
    if (next === undefined || now < 0) return;
    event.preventDefault();
    const target = rows[Math.min(Math.max(next, 0), rows.length - 1)];
    rows[now].tabIndex = -1;
    target.tabIndex = 0;
    target.focus();
  }

  pager(pages, total) {
    const move = (by) => () => {
      this.page += by;
      this.update();
    };
    const begin = this.page * PAGE;
    return element(
      "div",
      { class: "pager" },
      element("button", { type: "button", disabled: this.page === 0, click: move(-1) }, "previous"),
      element("span", {}, `${begin + 1} to ${Math.min(begin + PAGE, total)} of ${total}`),
      element("button", { type: "button", disabled: this.page === pages - 1, click: move(1) }, "next"),
    );
  }

  /** Show the line of an item. */
  choose(row, button) {
    const { grid, evaluation } = this;
    for (const other of this.box.querySelectorAll('.row[aria-expanded="true"]'))
      other.setAttribute("aria-expanded", "false");
    (button ?? this.box.querySelector(".row"))?.setAttribute("aria-expanded", "true");
    const source = row.source ? ` · ${row.source}` : "";
    const hasLine = grid.kind !== "choice" || grid.p;
    const value = (at) =>
      grid.kind === "choice"
        ? grid.p[row.index][at] === null
          ? null
          : grid.p[row.index][at] / 1000
        : grid.values[row.index][at];
    const head = [
      element("h3", {}, `${this.nameOf(row)}`),
      element(
        "p",
        { class: "note" },
        `${taskName(grid.subjects[row.subject])}${source}${row.state ? ` · ${row.state}` : ""}`,
      ),
    ];
    this.detail.replaceChildren(...head);
    itemCharts.charts = [];
    if (hasLine && this.runs.length) {
      const lines = this.runs.map((run, number) => ({
        label: this.runs.length > 1 ? run.name : grid.kind === "choice" ? "probability" : metricName(this.metric),
        color: number,
        x: {
          step: run.at.map((at) => evaluation.models[at].step),
          tokens: run.at.map((at) => evaluation.models[at].tokens),
        },
        y: run.at.map(value),
      }));
      const inRuns = new Set(this.runs.flatMap((run) => run.at));
      const levels = evaluation.models
        .map((model, at) => [model, at])
        .filter(([, at]) => !inRuns.has(at) && value(at) !== null)
        .map(([model, at], number) => ({
          label: `${model.name} ${format(value(at))}`,
          y: value(at),
          color: this.runs.length + number,
        }));
      const title = grid.kind === "choice" ? "Probability of the right answer" : metricName(this.metric);
      const unit = grid.kind === "choice" ? "among the options" : "";
      new Chart(
        { title, unit, height: 200, wide: true, lines, levels, ...(grid.kind === "choice" ? { yRange: [0, 1] } : {}) },
        itemCharts,
      );
      setAxis(itemCharts, "step");
      itemCharts.charts[0].show(this.detail);
    } else {
      this.detail.append(
        tableOf(
          ["model", "answer"],
          evaluation.models.map((model, at) => [model.name, this.cellOf(grid, row, at)[2]]),
          "answers of each model",
        ),
      );
    }
  }
}

function showItems() {
  const evaluations = (data.evaluations || []).filter((evaluation) => evaluation.grids.length);
  if (!evaluations.length) return;
  byId("items").hidden = false;
  for (const evaluation of evaluations) {
    if (evaluations.length > 1) byId("items").append(element("h3", {}, evaluation.name));
    new ItemGrid(evaluation, byId("items"));
  }
}

// ---- calibration ----

function showCalibration() {
  const found = (data.evaluations || []).flatMap((evaluation) =>
    evaluation.grids.filter((grid) => grid.calibration.some(Boolean)).map((grid) => [evaluation, grid]),
  );
  if (!found.length) return;
  const section = byId("calibration");
  section.hidden = false;
  section.append(
    element(
      "p",
      { class: "note" },
      "How often the likeliest option is right, against its probability among the options (by the likelihood of its whole text). On the dashed line a model is as sure as it is right. Bars are 95 % intervals; the area of a point is its number of items. Error: the expected calibration error over ten bins.",
    ),
  );
  const body = element("div");
  const options = found.map(([evaluation, grid], index) => [
    index,
    `${taskName(grid.task)}${data.evaluations.length > 1 ? ` (${evaluation.name})` : ""}`,
  ]);
  const show = (index) => body.replaceChildren(element("div", { class: "diagrams" }, ...diagrams(...found[index])));
  if (found.length > 1) section.append(element("div", { class: "tools" }, menu("task", options, 0, show)));
  section.append(body);
  show(0);
}

function diagrams(evaluation, grid) {
  return evaluation.models
    .map((model, at) => [model, grid.calibration[at]])
    .filter(([, one]) => one)
    .map(([model, one]) => {
      const size = 150;
      const at = (value) => 6 + value * (size - 12);
      const up = (value) => size - at(value);
      const items = one.bins.reduce((sum, bin) => sum + bin[0], 0);
      const words = one.bins
        .map(([count, confidence, right]) => `${count} items at ${format(confidence)}: ${format(right)} right`)
        .join("; ");
      const picture = drawing("svg", {
        viewBox: `0 0 ${size} ${size}`,
        role: "img",
        "aria-label": `calibration of ${model.name}: ${words}`,
      });
      picture.append(
        drawing("rect", { x: 6, y: 6, width: size - 12, height: size - 12, fill: "none", class: "axis" }),
        drawing("line", { x1: at(0), y1: up(0), x2: at(1), y2: up(1), class: "ideal" }),
      );
      for (const [count, confidence, right, low, high] of one.bins) {
        const bar = drawing("line", {
          x1: at(confidence),
          x2: at(confidence),
          y1: up(low),
          y2: up(high),
          style: "stroke: var(--c0); opacity: .45",
        });
        const point = drawing("circle", {
          cx: at(confidence),
          cy: up(right),
          r: Math.max(1.6, 9 * Math.sqrt(count / items)),
          style: "fill: var(--c0); opacity: .85",
        });
        point.append(drawing("title", {}, `${count} items, probability ${format(confidence)}, ${format(right)} right`));
        picture.append(bar, point);
      }
      return element(
        "figure",
        {},
        picture,
        element(
          "figcaption",
          {},
          `${model.name}`,
          element("br"),
          element("span", { class: "note" }, `error ${format(one.error)}`),
        ),
      );
    });
}
