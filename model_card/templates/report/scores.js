// Scores of tasks along training, with their intervals.

const scoreCharts = newGroup("scores", "tokens");
groups.push(scoreCharts);

/** The runs of an evaluation whose steps were evaluated: [{name, at: [index of a model]}]; the rest are single models. */
function trajectories(evaluation) {
  const runs = new Map();
  evaluation.models.forEach((model, index) => {
    if (model.run !== null) runs.set(model.run, [...(runs.get(model.run) || []), index]);
  });
  return [...runs].filter(([, at]) => at.length > 1).map(([name, at]) => ({ name, at }));
}

function showScores() {
  if (!byId("scores")) return;
  for (const evaluation of data.evaluations) {
    if (data.evaluations.length > 1) byId("scores").append(element("h3", {}, evaluation.name));
    const runs = trajectories(evaluation);
    if (runs.length) scoreLines(evaluation, runs);
    else for (const task of evaluation.tasks) scoreRows(evaluation, task);
  }
  setAxis(
    scoreCharts,
    scoreCharts.charts.some((chart) => chart.spec.lines.some((line) => !line.x.tokens)) ? "step" : "tokens",
  );
}

function scoreLines(evaluation, runs) {
  const grid = element("div", { class: "charts" });
  byId("scores").append(
    element(
      "p",
      { class: "note" },
      "Bands are 95 % intervals over items. Two models differ if the interval of their paired difference excludes 0 (the table below), not when bands separate.",
    ),
    grid,
  );
  const inRuns = new Set(runs.flatMap((run) => run.at));
  for (const task of evaluation.tasks) {
    const lines = runs
      .map((run, number) => {
        const at = run.at.filter((index) => task.scores[index]);
        const part = (column) => at.map((index) => task.scores[index][column]);
        const hasInterval = at.every((index) => task.scores[index][1] !== null);
        const x = {
          step: at.map((index) => evaluation.models[index].step),
          tokens: at.map((index) => evaluation.models[index].tokens),
        };
        if (x.tokens.includes(null)) x.tokens = null;
        return {
          label: runs.length > 1 ? run.name : metricName(task.metric),
          color: number,
          x,
          y: part(0),
          ...(hasInterval ? { low: part(1), high: part(2) } : {}),
        };
      })
      .filter((line) => line.y.length);
    const levels = evaluation.models
      .map((model, index) => [model, index])
      .filter(([, index]) => !inRuns.has(index) && task.scores[index])
      .map(([model, index], number) => ({
        label: `${model.name} ${format(task.scores[index][0])}`,
        y: task.scores[index][0],
        color: runs.length + number,
      }));
    if (task.chance !== null) levels.push({ label: "chance", y: task.chance });
    const values = [
      ...lines.flatMap((line) => [...line.y, ...(line.low || []), ...(line.high || [])]),
      ...levels.map((level) => level.y),
    ];
    const [low, high] = [Math.min(...values), Math.max(...values)];
    const room = (high - low || 1) * 0.08;
    new Chart(
      {
        title: taskName(task.task),
        unit: metricName(task.metric),
        height: 200,
        lines,
        levels,
        yRange: [low - room, high + room],
      },
      scoreCharts,
    ).show(grid);
  }
}

function scoreRows(evaluation, task) {
  const rows = evaluation.models
    .map((model, index) => [model, task.scores[index]])
    .filter(([, score]) => score)
    .map(([model, score]) => ({
      label: model.name,
      numbers: score,
      text: `${format(score[0])}${score[1] === null ? "" : ` (${format(score[1])} to ${format(score[2])})`}, ${score[3]} items`,
    }));
  byId("scores").append(
    element(
      "h4",
      {},
      `${taskName(task.task)}, ${metricName(task.metric)}${task.chance === null ? "" : `, chance ${format(task.chance)}`}`,
    ),
    forest(rows, task.chance),
  );
}
