"use strict";
// Static against dynamic selection, from the results.json of `headwise compare`.

const symbols = [
  "circle", "square", "triangle-up", "star", "x", "pentagon", "cross", "hexagon", "triangle-down",
  "hourglass"
];

// How far a range reaches beyond a value: not at all where the value lies outside.
const reach = (from, to) => (given(from) && given(to) ? Math.max(0, to - from) : 0);

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
      shape.length === null ? "inputs as they come" : `${shape.length} tokens`}`;
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
  // Accuracy against time: what no other beats in both is named and joined, the rest is dim.
  const timeOf = (one) => one.latency[state.shape];
  const frontNote = "Further left is faster, higher is more accurate. The numbered models are " +
      "those that no other beats in both; the others are dim: point at one for its name. Bars: " +
      "95% intervals of accuracy, the range of time over seeds (of one seed, quartiles of its " +
      "rounds). Diamonds choose heads for every input.";
  const frontList = make("ol", {class: "front"});
  const marks = (entries, shade, more) => ({
    type: "scatter",
    mode: "markers",
    x: entries.map((one) => timeOf(one).ratio),
    y: entries.map((one) => 100 * one.accuracy),
    text: entries.map(
        (one) => `${plain(kindOf(one))}<br>${percent(one.heads_mean)} of the heads` +
            `<br>${percent(one.accuracy, 1)} at ${number(timeOf(one).ratio, 2)} of the time`),
    hoverinfo: "text",
    error_x: {
      type: "data",
      symmetric: false,
      thickness: 1,
      width: 0,
      color: shade,
      array: entries.map((one) => reach(timeOf(one).ratio, timeOf(one).ratio_high)),
      arrayminus: entries.map((one) => reach(timeOf(one).ratio_low, timeOf(one).ratio))
    },
    error_y: {
      type: "data",
      symmetric: false,
      thickness: 1,
      width: 5,
      color: shade,
      array: entries.map((one) => 100 * (one.accuracy_high - one.accuracy)),
      arrayminus: entries.map((one) => 100 * (one.accuracy - one.accuracy_low))
    },
    marker: {
      size: entries.map((one) => (one.kind === "dynamic" ? 11 : 9)),
      color: shade,
      symbol: entries.map(
          (one) => one.kind === "dynamic" ? "diamond" :
              one.kind === "dense"        ? "square" :
                                            "circle")
    },
    ...more
  });
  const drawFront = () => {
    const all = own(),
          best = all.filter((one) => one.front[state.shape])
                     .sort((a, b) => timeOf(a).ratio - timeOf(b).ratio);
    const full = all.find((one) => one.kind === "dense");
    // What loses more than it could be worth, or takes longer than any choice, sets no axis.
    const top = Math.max(...all.map((one) => 100 * one.accuracy));
    const floor = Math.max(
        Math.min(...all.map((one) => 100 * one.accuracy)), (full ? 100 * full.accuracy : top) - 6);
    const slowest = 1.05 * Math.max(1, ...best.map((one) => timeOf(one).ratio));
    const near = (one) => 100 * one.accuracy >= floor && timeOf(one).ratio <= slowest;
    const named = best.filter(near), shown = all.filter(near);
    const rest = shown.filter(
        (one) => !one.front[state.shape] && one !== full && !one.recommended);
    const x = shown.map((one) => timeOf(one).ratio);
    const gone = all.length - shown.length;
    const traces = [
      marks(rest, colour("muted"), {name: "not on the front", opacity: .35}),
      marks(named, colour("accent"), {
        name: "on the front",
        mode: "lines+markers+text",
        text: named.map((one, place) => String(place + 1)),
        textposition: "top left",
        hovertext: marks(named, "").text,
        line: {color: colour("accent"), width: 1.5, shape: "hv", dash: "dot"}
      })
    ];
    if (full) traces.push(marks([full], colour("ink"), {name: "dense"}));
    const outside = {
      xref: "paper",
      yref: "paper",
      x: 1,
      y: 0,
      xanchor: "right",
      yanchor: "bottom",
      showarrow: false,
      font: {size: 12, color: colour("muted")},
      text: `${gone} more ${gone === 1 ? "is" : "are"} outside: slower or less accurate`
    };
    const told = (one) => `${one.title}, ${percent(one.heads_mean)} of the heads: ${
        percent(one.accuracy, 1)} at ${number(timeOf(one).ratio, 2)} of the time`;
    frontList.replaceChildren(...named.map((one) => make("li", {}, told(one) + (one.recommended ? " (recommended)" : ""))));
    const advised = shown.find((one) => one.recommended && !named.includes(one));
    if (advised) {
      traces.push(marks([advised], colour("ink"), {
        name: "recommended above",
        mode: "markers+text",
        text: ["recommended"],
        textposition: "bottom right",
        hovertext: marks([advised], "").text
      }));
      frontList.append(make("li", {class: "advised"}, `recommended: ${told(advised)}`));
    }
    // The whole interval of what is named is in sight: a bar without ends tells nothing.
    const inSight = advised ? [...named, advised] : named;
    const low = Math.min(floor - 1.2, ...inSight.map((one) => 100 * one.accuracy_low - .3));
    const high = Math.max(top + 1.5, ...inSight.map((one) => 100 * one.accuracy_high + .3));
    const pad = .06 * (Math.max(...x) - Math.min(...x)) + .02;
    return {
      traces,
      layout: {
        height: 480,
        xaxis: axis("time, dense = 1", {range: [Math.min(...x) - pad, Math.max(...x) + pad]}),
        yaxis: axis("test accuracy (%)", {range: [low, high]}),
        annotations: gone ? [outside] : []
      }
    };
  };
  if (compared.tasks.length > 1)
    choice(controls, "Task", compared.tasks.map((one, place) => [place, one.title]), again("task"));

  if (shapes.length) {
    if (shapes.length > 1)
      choice(
          controls, "Time measured with", shapes.map((shape, place) => [place, shapeName(shape)]),
          again("shape"));
    redraw.push(figure(
        parent, "Accuracy against measured time", frontNote, () => drawFront(),
        () => table(
            "Accuracy against measured time",
            [
              ["method", null, "text"], ["kind", null, "text"], ["heads"], ["time, dense = 1"],
              ["range", null, "text"], ["accuracy"], ["95% interval", null, "text"],
              ["on the front", "no other is both faster and more accurate", "text"]
            ],
            own()
                .sort((a, b) => timeOf(a).ratio - timeOf(b).ratio)
                .map(
                    (one) =>
                        [one.title, one.kind, percent(one.heads_mean, 1),
                         number(timeOf(one).ratio, 2),
                         `${number(timeOf(one).ratio_low, 2)} to ${
                             number(timeOf(one).ratio_high, 2)}`,
                         percent(one.accuracy, 1),
                         `${percent(one.accuracy_low, 1)} to ${percent(one.accuracy_high, 1)}`,
                         one.front[state.shape] ? "yes" : "no"]))));
    parent.querySelector("figure .plot").after(frontList);
  }

  folded(
      parent, "Accuracy against heads",
      (place) => redraw.push(figure(
          place, "Accuracy against heads",
          "Test accuracy against the average share of heads that run. Thick whole lines with " +
              "filled marks choose heads for every input; thin dotted lines with open marks use the " +
              "same heads for all. Bars are 95% intervals. What loses more than 10 points leaves the " +
              "figure; the table has it.",
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
            // The weakest set no axis: their lines leave the figure.
            const top = Math.max(...levels);
            const range = [Math.max(Math.min(...levels) - 2, top - 10), top + 2];
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
                       one.seeds])))));

  if (shapes.length) {
    // Not fine-tuned and fine-tuned models of one plan have the same shape: one of them is enough.
    const timed = () =>
        own().filter((one) => one.kind !== "dense" && !one.method.endsWith("posthoc"));
    folded(
        parent, "Measured latency against heads",
        (place) => redraw.push(figure(
            place, "Measured latency against heads",
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
                          array: time.map((one) => reach(one.ratio, one.ratio_high)),
                          arrayminus: time.map((one) => reach(one.ratio_low, one.ratio))
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
                    one.title, one.kind, one.seeds, percent(one.heads_mean, 1),
                    number(time.ratio, 2),
                    `${number(time.ratio_low, 2)} to ${number(time.ratio_high, 2)}`,
                    number(time.ms, 1)
                  ];
                })))));
  }

  const tables = make("div", {});
  parent.append(
      make("details", {}, make("summary", {}, "All numbers, and how they were measured"), tables));
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
