"use strict";
// A data set: how often heads run and for whom, their roles, and how far to trust that.

function startRoles(parent, roles) {
  const rows = roles.layers.flatMap(
      (layer) => layer.heads.flatMap(
          (head) => head.roles.filter(beats).map(
              (role) =>
                  [layer.site,
                   head.head,
                   roleName(role),
                   number(role.share, 2),
                   `${number(role.low, 2)} to ${number(role.high, 2)}`,
                   number(role.chosen_share, 2),
                   number(role.baseline, 2),
                   role.trials,
  ])));
  parent.append(make("h3", {}, "Roles of heads"));
  parent.append(
      rows.length ?
          table(
              "Roles of heads, with the evidence",
              [
                ["layer"],
                ["head"],
                ["role", null, "text"],
                [
                  "share",
                  "of the questions answered yes, in the half that scores; of broad and " +
                      "narrow: the mean entropy"
                ],
                ["95% interval", "bootstrap over inputs", "text"],
                ["share, other half", "in the half in which heads were chosen"],
                [
                  "baseline",
                  "the best head that always looks equally far away; for the first token and " +
                      "separators, which heads fall back on, the mean of the other heads"
                ],
                ["questions"],
              ],
              rows) :
          make("p", {}, "No head has a role at these thresholds."));
  foldedTable(
      parent, "Table: the best head for each question",
      () => table(
          "The best head for each question",
          [
            ["role", null, "text"],
            ["layer"],
            ["head"],
            ["share"],
            ["baseline", "as above"],
            ["questions"],
          ],
          roles.questions.map(
              (one) =>
                  [roleName(one), one.best.site, one.best.head, number(one.best.share, 2),
                   number(one.baseline, 2), one.trials])));
}

const tested = (key, name, field, what) => [name, what, (head) => head[key]?.[field] ?? null];
const uses = {
  frequency: [
    "how often it runs", "Share of the texts for which the head runs",
    (head, of) => (of < 0 ? head.frequency : head.by_class[of])
  ],
  difference: [
    "more or less often than for all",
    "How much more often the head runs for the class than for all texts",
    (head, of) => (of < 0 || head.by_class[of] === null ? null : head.by_class[of] - head.frequency)
  ],
  information: tested(
      "information", "bits about the class", "bits",
      "Mutual information of the head's running with the predicted class"),
  length: tested(
      "length", "with the length", "correlation",
      "Rank-biserial correlation with the number of tokens"),
  entropy: tested(
      "entropy", "with the input's entropy", "correlation",
      "Rank-biserial correlation with the entropy of the input's distribution of tokens"),
  confidence: tested(
      "confidence", "with confidence", "correlation",
      "Rank-biserial correlation with the probability of the predicted class"),
};

function startJoint(parent, joint) {
  const groups = joint.groups.map((group) => `layer ${group.site} heads ${group.heads.join(", ")}`);
  parent.append(
      make("h3", {}, "Heads that can replace each other"),
      make(
          "p", {class: "muted"},
          "Measured by taking heads out alone and in pairs: where both together cost the " +
              "prediction more than the sum of each alone, either stands in for the other " +
              `(${joint.pairs.length} pairs with the most similar outputs, ${
                  joint.inputs} texts).`),
      make(
          "p", {},
          groups.length ? `At a false discovery rate of 5%: ${groups.join("; ")}.` :
                          "No pair does so at a false discovery rate of 5%."));
  foldedTable(
      parent, "Table: joint ablation",
      () => table(
          "Joint ablation",
          [
            ["first", null, "text"], ["second", null, "text"],
            ["similarity", "linear CKA of their outputs"],
            ["first alone", "log-probability lost without it"],
            ["second alone", "log-probability lost without it"],
            ["beyond the sum", "what taking out both costs more than the sum"], ["standard error"],
            ["q", "false discovery rate"]
          ],
          joint.pairs.map(
              (pair) =>
                  [headName(...pair.first), headName(...pair.second), number(pair.similarity, 2),
                   signed(pair.alone[0], 4), signed(pair.alone[1], 4), signed(pair.effect, 4),
                   number(pair.standard_error, 4), number(pair.q)])));
}

function startUse(parent, found) {
  const {use, roles} = found, classes = found.data.classes;
  const state = {class: -1, measure: "frequency", site: 0, head: 0};
  const head = () => use.layers[state.site].heads[state.head];
  const rolesOf = (site, place) => (roles?.layers[site]?.heads[place]?.roles ?? []).filter(beats);

  const controls = make("div", {class: "controls"});
  parent.append(controls);
  choice(
      controls, "Texts predicted as",
      [
        [-1, "all classes"],
        ...classes.map((name, place) => [place, `${name} (${found.data.predicted[place]} texts)`])
      ],
      (value) => {
        state.class = +value;
        show();
      });
  choice(
      controls, "Number and colour", Object.entries(uses).map(([key, [name]]) => [key, name]),
      (key) => {
        state.measure = key;
        show();
      });
  const meaning = make("p", {class: "muted"});
  parent.append(meaning);
  const grid = headGrid(
      parent, "Heads of every layer over the data set. Arrow keys move, Enter chooses a head.",
      (site, place) => {
        state.site = site;
        state.head = place;
        showHead();
      });
  const fill = foldedTable(
      parent, "Table: use of every head",
      () => table(
          "Use of every head",
          [
            ["layer"],
            ["head"],
            ["runs for", "share of all texts"],
            ...classes.map((name) => [name, "share of the texts predicted so"]),
            ["bits about the class"],
            ["q", "false discovery rate of the test"],
            ["with length"],
            ["q"],
            ["with entropy"],
            ["q"],
            ["with confidence"],
            ["q"],
            ["roles", null, "text"],
          ],
          use.layers.flatMap(
              (layer) => layer.heads.map(
                  (own) =>
                      [layer.site,
                       own.head,
                       percent(own.frequency, 1),
                       ...own.by_class.map((rate) => percent(rate, 1)),
                       number(own.information?.bits),
                       number(own.information?.q),
                       ...["length", "entropy", "confidence"].flatMap(
                           (key) => [signed(own[key]?.correlation, 2), number(own[key]?.q)]),
                       rolesOf(layer.site, own.head).map(roleName).join(", ") || "none",
  ]))));
  const panel = make("div", {class: "panel"});
  parent.append(panel);
  const name = make("h3", {"aria-live": "polite"}), line = make("p", {}), own = make("div", {});
  panel.append(name, line, own);

  function show() {
    const [title, what, read] = uses[state.measure];
    const whom = state.class < 0 ? "all texts" : `texts predicted as ${classes[state.class]}`;
    meaning.textContent = state.measure === "difference" && state.class < 0 ?
        `${what}: choose a class.` :
        `${what}; ${whom}. A filled circle always runs, a half one sometimes, an empty one never.`;
    const all = use.layers.flatMap((layer) => layer.heads.map((one) => read(one, state.class)));
    const most = state.measure === "frequency" ? 1 : largest(all) || 1;
    grid.update(use.layers.map(
        (layer) => ({
          label: String(layer.site),
          name: layer.call ? `${layer.name}, call ${layer.call}` : layer.name,
          cells: layer.heads.map((one) => {
            const value = read(one, state.class),
                  often = state.class < 0 ? one.frequency : one.by_class[state.class];
            return {
              mark: often === 1 ? "●" :
                  often         ? "◐" :
                                  "○",
              on: often > 0,
              strength: (value ?? 0) / most,
              text: state.measure === "frequency" ? percent(value) : number(value, 2),
              tip: [
                headName(layer.site, one.head),
                `${title} ${state.measure === "frequency" ? percent(value, 1) : number(value)}`,
                `runs for ${percent(one.frequency, 1)} of all texts`,
                rolesOf(layer.site, one.head).map(roleName).join(", ")
              ].filter((text) => text)
                       .join("\n"),
            };
          }),
        })));
    fill();
    showHead();
  }

  function showHead() {
    name.textContent = `${headName(state.site, state.head)} over the data set`;
    const has = rolesOf(state.site, state.head).map(roleName).join(", ");
    line.textContent = `Runs for ${percent(head().frequency, 1)} of the texts. ` +
        (has ? `Roles: ${has}.` : "It has no role.");
    own.replaceChildren(table(
        `${headName(state.site, state.head)} by predicted class`,
        [["class", null, "text"], ["texts"], ["runs for"]],
        classes
            .map(
                (one, place) =>
                    [one, found.data.predicted[place], percent(head().by_class[place], 1)])
            .filter(([, texts]) => texts)));
  }
  // The head that tells most about the class is the first to look at.
  const bits = use.layers.flatMap(
      (layer) => layer.heads.map(
          (one) => [one.information?.q < .05 ? one.information.bits : 0, layer.site, one.head]));
  [, state.site, state.head] = bits.sort((a, b) => b[0] - a[0])[0] ?? [0, 0, 0];
  grid.choose(state.site, state.head);
  show();

  const groups = use.by_length;
  const means = groups.map((group) => group.heads_mean);
  // The same number for every length is no figure.
  if (groups.length > 1 && Math.max(...means) - Math.min(...means) >= .05) {
    const names = groups.map((group) => `${group.from} to ${group.to}`);
    figure(
        parent, "Heads by length",
        "Heads that run for a text on average, in groups of texts by their number of tokens.",
        () => ({
          traces: [{
            type: "bar",
            x: names,
            y: means,
            text: groups.map((group) => number(group.heads_mean, 1)),
            marker: {color: colour("accent")}
          }],
          layout: {
            xaxis: axis("tokens", {type: "category"}),
            yaxis: axis("heads that run", {rangemode: "tozero"}),
            height: 320
          },
        }),
        () => table(
            "Heads by length", [["tokens", null, "text"], ["texts"], ["heads that run"]],
            groups.map(
                (group, place) => [names[place], group.inputs, number(group.heads_mean, 1)])));
  }
  if (roles) startRoles(parent, roles);
  if (found.role_use.length) {
    const told = found.role_use.filter((row) => row.q !== null && row.q < .05).length;
    parent.append(
        make("h3", {}, "Role and use together"),
        make(
            "p", {class: "muted"},
            "Are heads with a role used differently from the others? " +
                (told ? `In ${told} of ${found.role_use.length} ways` : "Not measurably") +
                ", at a false discovery rate q of 5% over this table."));
    const together = () => table(
        "Role and use together",
        [
          ["role", null, "text"],
          [
            "property",
            "how often heads run, or how their running goes with a property of the text", "text"
          ],
          ["heads"], ["their mean"], ["others"], ["mean of the others"], ["correlation"], ["p"],
          ["q"]
        ],
        found.role_use.map(
            (row) =>
                [row.role, row.property, row.heads, number(row.mean), row.others,
                 number(row.mean_of_others), signed(row.correlation, 2), number(row.p),
                 number(row.q)]));
    if (told) parent.append(together());
    else foldedTable(parent, "Table: role and use together", together);
  }
  foldedTable(
      parent, "Table: heads that run together, or apart",
      () => table(
          "Heads that run together, or apart",
          [
            ["first", null, "text"], ["second", null, "text"],
            ["phi", "1: always together; -1: always one of the two"]
          ],
          use.together.map(
              (pair) => [headName(...pair.first), headName(...pair.second), signed(pair.phi, 2)])));
  foldedTable(
      parent, "Table: heads that can replace each other",
      () => table(
          "Heads that can replace each other",
          [["layer"], ["heads", null, "text"], ["lowest phi"]],
          use.substitutes.map(
              (group) => [group.site, group.heads.join(", "), signed(group.phi_min, 2)])));
  if (found.joint_ablation) startJoint(parent, found.joint_ablation);

  const stable = found.stability;
  if (stable.length) {
    figure(
        parent, "Stability",
        "Overlap (Jaccard) of the heads that run before and after a change. Diamonds: " +
            "overlap of two different texts, to compare with.",
        () => ({
          traces: [
            {
              type: "scatter",
              mode: "markers",
              name: "same text, changed",
              y: stable.map((row) => plain(row.name)),
              x: stable.map((row) => row.jaccard),
              marker: {size: 11, color: colour("accent")},
              error_x: {
                type: "data",
                symmetric: false,
                array: stable.map((row) => row.high - row.jaccard),
                arrayminus: stable.map((row) => row.jaccard - row.low),
                color: colour("accent")
              }
            },
            {
              type: "scatter",
              mode: "markers",
              name: "another text",
              y: stable.map((row) => plain(row.name)),
              x: stable.map((row) => row.jaccard_other_inputs),
              marker: {size: 10, symbol: "diamond-open", color: colour("second"), line: {width: 2}}
            },
          ],
          layout: {
            xaxis: axis("overlap", {range: [0, 1.02]}),
            yaxis: axis("", {type: "category", autorange: "reversed"}),
            height: 200 + 40 * stable.length
          },
        }),
        () => table(
            "Stability",
            [
              ["change", null, "text"], ["overlap"], ["95% interval", null, "text"],
              ["different texts"], ["same prediction"], ["accuracy"]
            ],
            stable.map(
                (row) =>
                    [row.name, number(row.jaccard, 2),
                     `${number(row.low, 2)} to ${number(row.high, 2)}`,
                     number(row.jaccard_other_inputs, 2), percent(row.same_prediction, 1),
                     percent(row.accuracy, 1)])));
  }
  const faith = found.faithfulness;
  if (faith) {
    const shares = faith.removed.map((share) => 100 * share);
    figure(
        parent, "Faithfulness",
        "Heads that ran are removed, the least relevant first, and in random order. If the " +
            "order says what matters, its line stays higher: the area between the lines is " +
            `${signed(faith.area)} (95% interval ${signed(faith.low)} to ${signed(faith.high)}, ` +
            `${faith.inputs} texts).`,
        () => ({
          traces: [
            {
              type: "scatter",
              mode: "lines+markers",
              name: "in the stated order",
              x: shares,
              y: faith.stated,
              line: {color: colour("accent")},
              marker: {symbol: "circle"}
            },
            {
              type: "scatter",
              mode: "lines+markers",
              name: `at random (${faith.random_orders} orders)`,
              x: shares,
              y: faith.random,
              line: {color: colour("second"), dash: "dash"},
              marker: {symbol: "diamond-open"}
            },
          ],
          layout:
              {xaxis: axis("heads removed (%)"), yaxis: axis("log-probability of the prediction")},
        }),
        () => table(
            "Faithfulness", [["removed"], ["stated order"], ["random order"]],
            faith.removed.map(
                (share, place) =>
                    [percent(share), number(faith.stated[place]), number(faith.random[place])])));
  }
}

if (data.use)
  startUse(byId("use-body"), data.use);
else if (data.roles)
  startRoles(byId("use-body"), data.roles);
