"use strict";
// One input: its tokens, the grid of heads, and what is known of the head that is chosen.

// Log-probability: effects below this are pale, whatever the largest is.
const leastEffect = .05;

const measures = {
  relevance:
      ["relevance", "What the gate scored the head for this input", (head) => head.relevance],
  effect: [
    "effect", "Log-probability of the prediction with the head less without it",
    (head) => head.effect
  ],
  margin: [
    "margin", "How far the relevance lies above (+) or below (-) the cut", (head) => head.margin
  ],
  weight: ["weight", "What the head's output is multiplied by", (head) => head.weight],
  budget_needed: [
    "budget needed", "Smallest budget, as a share of the heads, at which this one runs",
    (head) => head.budget_needed
  ],
  entropy:
      ["attention entropy", "0: looks at one token; 1: looks at all alike", (head) => head.entropy],
};

async function unpackMap(packed, queries, keys) {
  const bytes = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const levels = new Uint8Array(await new Response(stream).arrayBuffer());
  // Stored as 255 times the square root: small weights keep their digits.
  return Array.from(
      {length: queries},
      (_, query) => Array.from({length: keys}, (_, key) => (levels[query * keys + key] / 255) ** 2),
  );
}

function startExplained(parent, inputs) {
  const state = {input: 0, site: 0, head: 0, measure: "relevance", tokens: "shares"};
  const entry = () => inputs[state.input];
  const layer = () => entry().layers[state.site];
  const head = () => layer().heads[state.head];
  const tokenName = (place) => entry().tokens?.[place] ?? `token ${place}`;
  const keyName = (place) =>
      (place < layer().queries ? tokenName(place) : entry().tokens?.[place] ?? `added ${place}`);
  // Roles told with the input, or those of the data set on the same page where it is that model's.
  const known = data.use?.roles ?? data.roles;
  const rolesOf = (one, own) => {
    const same = known?.layers.length === entry().layers.length &&
        known.layers[one.site].name === one.name &&
        known.layers[one.site].num_heads === one.num_heads;
    const told = own.roles ?? (same ? known.layers[one.site].heads[own.head].roles : null);
    return told?.filter(beats) ?? null;
  };
  const roleNames = (roles) => roles ? roles.map(roleName).join(", ") || "none" : missing;
  const each = (visit) => entry().layers.flatMap((one) => one.heads.map((own) => visit(one, own)));
  const everywhere = (read) => inputs.some((one) => one.layers.some((own) => read(own)));
  const offered = Object.keys(measures).filter(
      (key) => everywhere((own) => own.heads.some((one) => measures[key][2](one) !== null)));
  state.measure = offered[0];
  const headline = startHeadline(byId("headline"), inputs), usual = usualUse(inputs);
  const label = (one) =>
      one.prediction && (one.prediction.label ?? `class ${one.prediction.class}`);

  // Controls: which input, and what the colours mean.
  const controls = make("div", {class: "controls"});
  parent.append(controls);
  const classes = [...new Set(inputs.map(label).filter((one) => one))].sort();
  const inputOptions = (wanted) =>
      inputs.map((one, place) => [place, one])
          .filter(([, one]) => !wanted || label(one) === wanted)
          .map(([place, one]) => [place, `${place + 1}. ${(one.text ?? "input").slice(0, 60)}`]);
  let inputSelect = null;
  if (classes.length > 1) {
    choice(
        controls, "Predicted class", [["", "all"], ...classes.map((one) => [one, one])],
        (wanted) => {
          const options = inputOptions(wanted);
          inputSelect.replaceChildren(
              ...options.map(([value, text]) => make("option", {value}, text)));
          showInput(options[0][0]);
        });
  }
  if (inputs.length > 1)
    inputSelect = choice(controls, "Input", inputOptions(""), (place) => showInput(+place));
  const text = make("blockquote", {dir: "auto"});
  parent.append(text);

  parent.append(make("h3", {}, "Heads"));
  const gridControls = make("div", {class: "controls"});
  parent.append(gridControls);
  choice(
      gridControls, "Number and colour", offered.map((key) => [key, measures[key][0]]), (key) => {
        state.measure = key;
        showGrid();
      });
  const meaning = make("p", {class: "muted"});
  parent.append(meaning);
  const grid = headGrid(
      parent, "Heads of every layer. Arrow keys move, Enter chooses a head.", (site, place) => {
        state.site = site;
        state.head = place;
        showHead();
      });
  const fillHeads = foldedTable(
      parent, "Table: all heads of this input",
      () => table(
          "All heads of this input",
          [
            ["layer"],
            ["head"],
            ["ran", null, "text"],
            ["weight"],
            ["relevance"],
            ["rank", "1 is the most relevant of those that it is ranked among"],
            ["margin", measures.margin[1]],
            ["budget needed", measures.budget_needed[1]],
            ["effect", measures.effect[1]],
            ["changes the prediction", "if it alone is toggled", "text"],
            ["entropy", measures.entropy[1]],
            ["roles", null, "text"],
          ],
          each(
              (one, own) =>
                  [one.site,
                   own.head,
                   own.on ? "yes" : "no",
                   number(own.weight),
                   number(own.relevance),
                   own.rank ?? missing,
                   signed(own.margin),
                   number(own.budget_needed, 2),
                   signed(own.effect),
                   own.changes_prediction === null ? missing :
                       own.changes_prediction      ? "yes" :
                                                     "no",
                   number(own.entropy),
                   roleNames(rolesOf(one, own)),
  ])));

  const panel = make("div", {class: "panel", id: "head"});
  parent.append(panel);
  const name = make("h3", {"aria-live": "polite"});
  const facts = make("dl", {});
  const pairs = make("div", {});
  panel.append(name, make("div", {class: "beside"}, facts, pairs));

  // Tokens, coloured by their share.
  const kinds = [
    [
      "shares", "share in the relevance of this head",
      everywhere((own) => own.heads.some((one) => one.shares))
    ],
    [
      "budget", "part in the budget of this layer",
      everywhere((own) => own.gate.budget?.attribution)
    ],
  ].filter(([, , there]) => there);
  const tokenTitle = make("h4", {}, "Tokens by their share");
  const tokenNote = make("p", {class: "muted"});
  const tokens = make("ol", {class: "tokens", "aria-label": "Tokens with their share"});
  const picture = make("canvas", {class: "picture", role: "img"});
  if (kinds.length) panel.append(tokenTitle);
  if (kinds.length > 1) {
    const tokenControls = make("div", {class: "controls"});
    panel.append(tokenControls);
    choice(tokenControls, "Colour tokens by", kinds, (kind) => {
      state.tokens = kind;
      showTokens();
    });
  } else if (kinds.length) {
    state.tokens = kinds[0][0];
  }
  if (kinds.length) panel.append(tokenNote, picture, tokens);

  const mapTitle = make("h4", {}, "Attention map");
  const mapNote = make("p", {class: "muted"});
  const mapNode = make("div", {class: "plot", id: "map", role: "img"});
  panel.append(mapTitle, mapNote, mapNode);
  let shown = null;
  const mapTable = make("div", {});
  panel.append(mapTable);
  const fillMap = foldedTable(
      mapTable, "Table: attention map",
      () => table(
          `Attention of ${headName(state.site, state.head)}: a row a query`,
          [
            ["token", null, "text"],
            ...Array.from({length: layer().keys}, (_, key) => [keyName(key)])
          ],
          (shown ??
           []).map((row, query) => [tokenName(query), ...row.map((weight) => number(weight))])));

  function showInput(place) {
    state.input = place;
    // The head that matters most is the first to look at; where none is known to, one that ran.
    const ranked = each(
        (one, own) =>
            [Math.abs(own.effect ?? own.relevance ?? (own.on ? 1 : 0)), one.site, own.head]);
    ranked.sort((a, b) => b[0] - a[0]);
    [, state.site, state.head] = ranked[0] ?? [0, 0, 0];
    text.textContent = entry().text ?? `input ${place + 1}`;
    byId("summary").textContent = entry().summary;
    headline(entry());
    grid.choose(state.site, state.head);
    showGrid();
    showHead();
    for (const redraw of perInput) redraw();
  }

  function showGrid() {
    const [title, what, read] = measures[state.measure];
    meaning.textContent = `${what}. A filled circle ran, an empty one slept.`;
    // Of effects that change nothing, none looks strong.
    const least = state.measure === "effect" ? leastEffect : 0;
    const most = Math.max(least, largest(each((one, own) => read(own)))) || 1;
    grid.update(
        entry().layers.map(
            (one) => ({
              label: String(one.site),
              name: one.call ? `${one.name}, call ${one.call}` : one.name,
              cells: one.heads.map(
                  (own) => ({
                    mark: own.on ? "●" : "○",
                    on: own.on,
                    text: number(read(own), 2),
                    strength: (read(own) ?? 0) / most,
                    tip: [
                      headName(one.site, own.head),
                      own.on ? "ran" : "slept",
                      usual?.of(one.site, own.head) === 1 ? "runs whatever the input says" : null,
                      `${title} ${number(read(own))}`,
                      own.rank === null ? null :
                                          `rank ${own.rank} of ${one.gate.ranked ?? one.num_heads}`,
                      own.effect === null || state.measure === "effect" ?
                          null :
                          `effect ${signed(own.effect)}`,
                      rolesOf(one, own)?.map(roleName).join(", "),
                    ].filter((line) => line)
                             .join("\n"),
                  })),
            })));
    fillHeads();
  }

  function showHead() {
    const own = head(), gate = layer().gate, roles = rolesOf(layer(), own);
    name.textContent = `${headName(state.site, state.head)}: ${own.on ? "ran" : "slept"}`;
    const rows = [
      ["layer", layer().call ? `${layer().name}, call ${layer().call}` : layer().name],
      [
        "gate",
        gate.type === "none" ? "none: every head runs" :
                               `${gate.type}, ${gate.count} of ${layer().num_heads} heads ran`
      ],
      ["how it decides", gate.how ?? missing],
      [
        "usually",
        !usual ? missing :
            usual.of(state.site, state.head) === 1 ?
                 `runs whatever the input says: for all ${usual.whom}` :
                 `runs for ${percent(usual.of(state.site, state.head))} of the ${usual.whom}`
      ],
      ["weight", number(own.weight)],
      [
        "relevance",
        own.rank === null ?
            number(own.relevance) :
            `${number(own.relevance)}, rank ${own.rank} of ${gate.ranked ?? layer().num_heads}`
      ],
      [
        "margin",
        own.margin === null ?
            missing :
            `${signed(own.margin)} (${
                own.margin < 0 ? "below the cut: it lacks that to be chosen" :
                                 "above the cut: it may lose that before it is dropped"})`
      ],
      [
        "budget needed",
        own.budget_needed === null  ? missing :
            own.budget_needed === 0 ? "none: it always runs" :
                                      `${percent(own.budget_needed, 1)} of the heads`
      ],
      [
        "effect",
        own.effect === null ? missing :
                              `${signed(own.effect)} log-probability of the prediction with it`
      ],
      [
        "prediction",
        own.changes_prediction === null ? missing :
            own.changes_prediction      ? "changes when this head is toggled" :
                                          "stays when this head is toggled"
      ],
      ["attention entropy", number(own.entropy)],
      [
        "roles",
        roles ?
            roles.map((role) => `${roleName(role)} (${percent(role.share)})`).join(", ") || "none" :
            missing
      ],
    ];
    const told = rows.filter(([, value]) => value !== missing);
    facts.replaceChildren(
        ...told.flatMap(([term, value]) => [make("dt", {}, term), make("dd", {}, value)]));
    pairs.replaceChildren(
        own.pairs.length ?
            table(
                "Strongest token pairs", [["from", null, "text"], ["to", null, "text"], ["weight"]],
                own.pairs.map(
                    (pair) => [tokenName(pair.query), keyName(pair.key), number(pair.weight, 2)])) :
            make("p", {class: "muted"}, "No token pairs were kept."));
    showTokens();
    showMap();
  }

  function showTokens() {
    const budget = layer().gate.budget?.attribution;
    const values = state.tokens === "budget" ? budget?.tokens : head().shares;
    tokens.replaceChildren();
    picture.hidden = !values || !entry().picture;
    if (!values) {
      tokenNote.textContent =
          "Tokens have no share: this head is not chosen by a sum over the tokens.";
      return;
    }
    if (state.tokens === "budget") {
      const error = budget.completeness_error?.toExponential(1) ?? missing;
      tokenNote.textContent = "Integrated gradients of the budget that layer " +
          `${state.site} asked for (completeness error ${error}).`;
    } else {
      const own = number(head().constant);
      tokenNote.textContent =
          `The relevance ${number(head().relevance)} is the gate's own ${own} and these shares. ` +
          "Each share is that of the position, which in deeper layers has mixed with others.";
    }
    // Against what would change the choice: shares that are small beside the margin look so.
    const margin = state.tokens === "budget" ? 0 : Math.abs(head().margin ?? 0);
    const most = Math.max(largest(values), margin) || 1;
    // Where in the picture, however much it is: the numbers below say that.
    if (entry().picture) drawPicture(values, largest(values) || 1);
    // Two digits that say something, of the largest.
    const digits = Math.min(6, Math.max(2, 1 - Math.floor(Math.log10(most))));
    values.forEach((value, place) => {
      const number = make("small", {}, signed(value, digits));
      const token = make("li", {}, make("bdi", {}, tokenName(place)), number);
      shade(token, value / most);
      tokens.append(token);
    });
  }

  // The input with its patches coloured as their tokens are.
  function drawPicture(values, most) {
    const {pixels, rows, columns, first} = entry().picture;
    const height = pixels.length, width = pixels[0].length;
    const scale = Math.max(1, Math.floor(256 / Math.max(width, height)));
    picture.width = width * scale;
    picture.height = height * scale;
    picture.setAttribute("aria-label", "The input, its patches coloured by their share");
    const brush = picture.getContext("2d");
    pixels.forEach((line, y) => line.forEach((grey, x) => {
      brush.fillStyle = `rgb(${grey}, ${grey}, ${grey})`;
      brush.fillRect(x * scale, y * scale, scale, scale);
    }));
    const wide = picture.width / columns, high = picture.height / rows;
    values.slice(first).forEach((value, place) => {
      brush.globalAlpha = .75 * Math.min(1, Math.abs(value) / most);
      brush.fillStyle = colour(value < 0 ? "second" : "accent");
      brush.fillRect((place % columns) * wide, Math.floor(place / columns) * high, wide, high);
    });
    brush.globalAlpha = 1;
  }

  async function showMap() {
    const packed = head().attention, {queries, keys} = layer();
    const about = [state.input, state.site, state.head].join();
    mapNode.hidden = mapTable.hidden = !packed;
    shown = null;
    if (!packed) {
      mapNote.textContent = head().left_out ?
          "This map is left out so that the page stays under its size limit; the JSON has it." :
          `No map was kept for this head. Run with --maps all, or --maps ${state.site}:${
              state.head}.`;
      return;
    }
    const rows = await unpackMap(packed, queries, keys);
    if (about !== [state.input, state.site, state.head].join()) return;  // another head by now
    shown = rows;
    mapNote.textContent =
        "Each row shares out one token's attention over the tokens that it looks at. " +
        "Rounded; the JSON is exact.";
    mapNode.setAttribute(
        "aria-label",
        `Attention map of ${
            headName(state.site, state.head)}. The table below has the same numbers.`);
    drawMap();
    fillMap();
  }

  function drawMap() {
    if (!shown) return;
    const {queries, keys} = layer();
    const short = (text) => plain(text.length > 14 ? text.slice(0, 13) + "…" : text);
    const narrow = mapNode.offsetWidth < 520;
    const ticks = (count, label, most) => {
      const every = Math.ceil(count / most);
      const places = Array.from({length: Math.ceil(count / every)}, (_, place) => place * every);
      return {
        tickvals: places,
        ticktext: places.map((place) => short(label(place))),
        tickfont: {size: count > 25 ? 10 : 12},
        showgrid: false,
        zeroline: false
      };
    };
    plot(mapNode, {
      traces: [{
        type: "heatmap",
        z: shown,
        zmin: 0,
        zmax: Math.max(...shown.map((row) => Math.max(...row))),
        colorscale: [[0, colour("paper")], [1, colour("strong")]],
        xgap: 1,
        ygap: 1,
        hoverinfo: "text",
        text: shown.map(
            (row, query) => row.map(
                (weight, key) =>
                    `${plain(tokenName(query))} → ${plain(keyName(key))}: ${number(weight)}`)),
        showscale: !narrow,
        colorbar: {thickness: 12, outlinewidth: 0, title: {text: "weight"}},
      }],
      layout: {
        height: Math.min(760, Math.max(340, 18 * queries + 150)),
        xaxis: axis(
            "looks at",
            {...ticks(keys, keyName, narrow ? 14 : 45), tickangle: -60, range: [-0.5, keys - 0.5]}),
        yaxis: axis("token", {...ticks(queries, tokenName, 45), range: [queries - 0.5, -0.5]}),
      },
    });
  }
  redraws.push(drawMap);

  // Figures over all heads of the input.
  const perInput = [];
  const both =
      everywhere((own) => own.heads.some((one) => one.relevance !== null && one.effect !== null));
  if (both) {
    perInput.push(figure(
        parent, "Relevance against effect",
        "Does the gate prefer the heads that help the prediction? Filled circles ran, open " +
            "diamonds slept.",
        () => ({
          traces: [true, false].map((on) => {
            const own =
                each((one, head) => ({site: one.site, ...head}))
                    .filter(
                        (one) => one.on === on && one.relevance !== null && one.effect !== null);
            return {
              type: "scatter",
              mode: "markers",
              name: on ? "ran" : "slept",
              x: own.map((one) => one.relevance),
              y: own.map((one) => one.effect),
              text: own.map(
                  (one) => `${headName(one.site, one.head)}<br>relevance ${
                      number(one.relevance)}<br>effect ${signed(one.effect)}`),
              hoverinfo: "text",
              marker: {
                size: 9,
                symbol: on ? "circle" : "diamond-open",
                color: colour(on ? "accent" : "second"),
                line: {width: on ? 0 : 2}
              },
            };
          }),
          layout: {xaxis: axis("relevance"), yaxis: axis("effect on log-probability")},
        }),
        () => table(
            "Relevance against effect",
            [["head", null, "text"], ["ran", null, "text"], ["relevance"], ["effect"]],
            each(
                (one, own) =>
                    [headName(one.site, own.head), own.on ? "yes" : "no", number(own.relevance),
                     signed(own.effect)]))));
  }
  if (everywhere((own) => own.gate.budget)) {
    const budgets = () => entry().layers.filter((one) => one.gate.budget);
    perInput.push(figure(
        parent, "Budget of each layer",
        "The share of its heads that each layer was given for this input.",
        () => ({
          traces: [
            {
              type: "bar",
              name: "given",
              x: budgets().map((one) => one.site),
              y: budgets().map((one) => one.gate.budget.value),
              marker: {color: colour("accent")}
            },
            {
              type: "scatter",
              mode: "markers",
              name: "ran",
              x: budgets().map((one) => one.site),
              y: budgets().map((one) => one.gate.count / one.num_heads),
              marker: {symbol: "diamond", size: 10, color: colour("second")}
            },
          ],
          layout: {
            xaxis: axis("layer", {dtick: 1, zeroline: false}),
            yaxis: axis("share of heads", {range: [0, 1.02]}),
            height: 320
          },
        }),
        () => table(
            "Budget of each layer",
            [["layer"], ["given"], ["asked by the network"], ["heads that ran"], ["heads"]],
            budgets().map(
                (one) =>
                    [one.site, number(one.gate.budget.value), number(one.gate.budget.asked),
                     one.gate.count, one.num_heads]))));
  }
  startSideBySide(parent, inputs);
  showInput(0);
}

if (data.inputs) startExplained(byId("explained-body"), data.inputs);
