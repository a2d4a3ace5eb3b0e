"use strict";
// Static against dynamic selection, from the results.json of `headwise compare`.

const symbols = [
  "circle", "square", "triangle-up", "star", "x", "pentagon", "cross", "hexagon", "triangle-down",
  "hourglass"
];

function startCompared(parent, compared) {
  // One colour and one symbol a method, the same in both figures; dynamic lines are thick and
  // whole.
  const methods =
      [...new Set(compared.summary.filter((one) => one.kind !== "dense").map((one) => one.method))];
  const look = (method, kind) => {
    const place = methods.indexOf(method), dynamic = kind === "dynamic";
    const shared = colour(`line-${place % 8}`);
    return {
      type: "scatter",
      mode: "lines+markers",
      line: {color: shared, width: dynamic ? 3 : 1.5, dash: dynamic ? "solid" : "dot"},
      marker: {
        size: dynamic ? 11 : 8,
        symbol: symbols[place % symbols.length] + (dynamic ? "" : "-open"),
        color: shared,
        line: {width: 2, color: shared}
      },
    };
  };
  const kindOf = (one) => `${one.title} (${
      one.kind === "static" && one.method.endsWith("posthoc") ? "static, not fine-tuned" :
                                                                one.kind})`;
  // A little beyond what was measured; the dense model's line goes through all of it.
  const span = () => {
    const x = own().filter((one) => one.kind !== "dense").map((one) => 100 * one.heads_mean);
    return x.length ? [Math.min(...x) - 6, Math.max(...x) + 6] : [0, 103];
  };
  const dense = (level, name) => ({
    type: "scatter",
    mode: "lines",
    name,
    x: span(),
    y: [level, level],
    line: {color: colour("ink"), dash: "dash", width: 1.5},
    hoverinfo: "name"
  });
  const shapeName = (shape) => `batch ${shape.batch}, ${
      shape.length === null ? "texts as they come" : `${shape.length} tokens`}`;
  const state = {task: 0, shape: 0};
  const task = () => compared.tasks[state.task].name;
  const own = () => compared.summary.filter((one) => one.task === task());
  const shapes = compared.summary[0]?.latency ?? [];
  const redraw = [];
  const controls = make("div", {class: "controls"});
  parent.append(controls);
  const again = (key) => (value) => {
    state[key] = +value;
    redraw.forEach((one) => one());
  };
  if (compared.tasks.length > 1)
    choice(controls, "Task", compared.tasks.map((one, place) => [place, one.title]), again("task"));

  redraw.push(figure(
      parent, "Accuracy against heads",
      "Test accuracy against the average share of heads that run. Thick whole lines with " +
          "filled marks choose heads for every text; thin dotted lines with open marks use the " +
          "same heads for all. Bars are 95% intervals; some may leave the figure.",
      () => {
        const all = own(), full = all.find((one) => one.kind === "dense");
        const traces =
            methods
                .map((method) => {
                  const line = all.filter((one) => one.method === method)
                                   .sort((a, b) => a.heads_mean - b.heads_mean);
                  const y = line.map((one) => 100 * one.accuracy);
                  return line.length && {
                    ...look(method, line[0].kind),
                    name: plain(kindOf(line[0])),
                    x: line.map((one) => 100 * one.heads_mean),
                    y,
                    error_y: {
                      type: "data",
                      symmetric: false,
                      thickness: 1,
                      array: line.map((one, place) => 100 * one.accuracy_high - y[place]),
                      arrayminus: line.map((one, place) => y[place] - 100 * one.accuracy_low)
                    },
                  };
                })
                .filter((one) => one);
        if (full) traces.unshift(dense(100 * full.accuracy, "dense"));
        const levels = all.map((one) => 100 * one.accuracy);
        const range = [Math.min(...levels) - 2, Math.max(...levels) + 2];
        return {
          traces,
          layout: {
            height: 520,
            xaxis: axis("average share of heads that run (%)", {range: span()}),
            yaxis: axis("test accuracy (%)", {range})
          }
        };
      },
      () => table(
          "Accuracy against heads",
          [
            ["method", null, "text"], ["kind", null, "text"], ["heads"], ["accuracy"],
            ["95% interval", null, "text"], ["seeds"]
          ],
          own().map(
              (one) =>
                  [one.title, one.kind, percent(one.heads_mean, 1), percent(one.accuracy, 1),
                   `${percent(one.accuracy_low, 1)} to ${percent(one.accuracy_high, 1)}`,
                   one.seeds]))));

  if (shapes.length) {
    const latencyControls = make("div", {class: "controls"});
    parent.append(latencyControls);
    if (shapes.length > 1)
      choice(
          latencyControls, "Measured with", shapes.map((shape, place) => [place, shapeName(shape)]),
          again("shape"));
    // Not fine-tuned and fine-tuned models of one plan have the same shape: one of them is enough.
    const timed = () =>
        own().filter((one) => one.kind !== "dense" && !one.method.endsWith("posthoc"));
    redraw.push(figure(
        parent, "Measured latency against heads",
        "Median of interleaved rounds, dense PyTorch model = 1, the mean over seeds; below the " +
            "dashed line is faster than dense. Bars are the range over seeds (of one seed: " +
            "quartiles of its rounds).",
        () => ({
          traces: [
            dense(1, "dense"),
            ...methods
                .map((method) => {
                  const line = timed()
                                   .filter((one) => one.method === method)
                                   .sort((a, b) => a.heads_mean - b.heads_mean);
                  const time = line.map((one) => one.latency[state.shape]);
                  return line.length && {
                    ...look(method, line[0].kind),
                    name: plain(kindOf(line[0])),
                    x: line.map((one) => 100 * one.heads_mean),
                    y: time.map((one) => one.ratio),
                    error_y: {
                      type: "data",
                      symmetric: false,
                      thickness: 1,
                      array: time.map((one) => one.ratio_high - one.ratio),
                      arrayminus: time.map((one) => one.ratio - one.ratio_low)
                    },
                  };
                })
                .filter((one) => one)
          ],
          layout: {
            height: 520,
            xaxis: axis("average share of heads that run (%)", {range: span()}),
            yaxis: axis("time, dense = 1", {rangemode: "tozero"})
          },
        }),
        () => table(
            "Measured latency against heads",
            [
              ["method", null, "text"], ["kind", null, "text"], ["seeds"], ["heads"],
              ["time, dense = 1"], ["range", null, "text"], ["ms"]
            ],
            timed().map((one) => {
              const time = one.latency[state.shape];
              return [
                one.title, one.kind, one.seeds, percent(one.heads_mean, 1), number(time.ratio, 2),
                `${number(time.ratio_low, 2)} to ${number(time.ratio_high, 2)}`, number(time.ms, 1)
              ];
            }))));
  }

  const tables = make("div", {});
  parent.append(tables);
  const showTables = () => tables.replaceChildren(
      ...compared.tables.filter((one) => one.task === task())
          .map((one) => table(one.title, one.columns, one.rows)),
      table(
          "How it was measured", [["what", null, "text"], ["value", null, "text"]],
          compared.facts));
  redraw.push(showTables);
  showTables();
}

if (data.compared) startCompared(byId("compared-body"), data.compared);
