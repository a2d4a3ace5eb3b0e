"use strict";
// What is unusual about an input, and two inputs side by side.

// How often a head runs: over the data set on the page if it is the same model's, else over the
// inputs of the page if there are enough of them. Returns {of(site, head), whom} or null.
function usualUse(inputs) {
  const layers = data.use?.use.layers, first = inputs[0].layers;
  const same = layers?.length === first.length &&
      first.every(
          (one, site) =>
              layers[site].name === one.name && layers[site].heads.length === one.heads.length);
  if (same)
    return {of: (site, head) => layers[site].heads[head].frequency, whom: "texts of the data set"};
  if (inputs.length < 3) return null;
  const mean = (site, head) =>
      inputs.filter((one) => one.layers[site].heads[head].on).length / inputs.length;
  return {of: mean, whom: `${inputs.length} inputs of this page`};
}

const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

// The tokens that spoke most for (sign 1) or against (-1) a head: names with their shares.
function strongest(entry, head, sign, most = 3) {
  return (head.shares ?? [])
      .map((share, place) => [share, entry.tokens?.[place] ?? `token ${place}`])
      .filter(([share]) => sign * share > 0)
      .sort((a, b) => sign * (b[0] - a[0]))
      .slice(0, most)
      .map(([share, name]) => `${name} (${signed(share, 2)})`)
      .join(", ");
}

/** The opening: how many heads ran, drawn, and where that differs from the usual. */
function startHeadline(parent, inputs) {
  const usual = usualUse(inputs);
  const sentence = make("p", {class: "sentence", "aria-live": "polite"});
  const dots = make("div", {class: "dots", "aria-hidden": "true"});
  const note = make("p", {class: "muted"});
  const reasons = make("ul", {class: "reasons"});
  parent.append(sentence, dots, note, reasons);
  return (entry) => {
    sentence.textContent = `${entry.heads_on} of ${entry.heads} heads ran`;
    const odd = [];
    let always = 0;
    dots.replaceChildren(...entry.layers.map((layer) => {
      const cells = layer.heads.map((head, place) => {
        const often = usual?.of(layer.site, place);
        if (often === 1) always++;
        const differs = given(often) && Math.abs(often - head.on) >= .75;
        if (differs) odd.push({layer, head, often});
        return make("i", {class: `${head.on ? "on" : "off"}${differs ? " odd" : ""}`});
      });
      return make("div", {}, make("span", {}, String(layer.site)), ...cells);
    }));
    odd.sort((a, b) => Math.abs(b.often - b.head.on) - Math.abs(a.often - a.head.on));
    note.textContent = !usual ?
        "Layer by layer; filled: ran." :
        `Layer by layer; filled: ran; ringed: not as usual for the ${usual.whom}. ` +
            `${plural(always, "head")} of them ${always === 1 ? "runs" : "run"} whatever the ` +
            "input says.";
    reasons.replaceChildren(...odd.slice(0, 5).map(({layer, head, often}) => {
      const words = strongest(entry, head, head.on ? 1 : -1);
      return make(
          "li", {dir: "auto"},
          `${headName(layer.site, head.head)} ${head.on ? "ran" : "slept"}, as for only ` +
              `${percent(head.on ? often : 1 - often)} of the ${usual.whom}` +
              (words ? `: ${words} spoke ${head.on ? "for" : "against"} it` : ""));
    }));
    if (usual && !odd.length) reasons.append(make("li", {}, "No head did anything unusual."));
  };
}

/** Two inputs side by side: the heads that ran for one of them only, and by which words. */
function startSideBySide(parent, inputs) {
  if (inputs.length < 2) return;
  const state = {first: 0, second: 1};
  parent.append(make("h3", {}, "Two inputs side by side"));
  const controls = make("div", {class: "controls"});
  const texts = make("div", {class: "beside"});
  const sentence = make("p", {"aria-live": "polite"});
  const place = make("div", {});
  parent.append(controls, texts, sentence, place);
  const options = inputs.map((one, at) => [at, `${at + 1}. ${(one.text ?? "input").slice(0, 60)}`]);
  for (const [key, label] of [["first", "A"], ["second", "B"]]) {
    choice(controls, label, options, (value) => {
      state[key] = +value;
      show();
    }).value = state[key];
  }
  const apart = (row) => Math.abs((row.heads[0].margin ?? 0) - (row.heads[1].margin ?? 0));
  function show() {
    const both = [inputs[state.first], inputs[state.second]];
    texts.replaceChildren(...both.map(
        (one, at) => make(
            "blockquote", {dir: "auto"}, make("strong", {}, `${"AB"[at]} `),
            one.text ?? `input ${at + 1}`)));
    const pairs = both[0].layers.flatMap(
        (layer, site) => layer.heads.map(
            (head, at) => ({site: layer.site, heads: [head, both[1].layers[site].heads[at]]})));
    const differ =
        pairs.filter(({heads}) => heads[0].on !== heads[1].on).sort((a, b) => apart(b) - apart(a));
    const only = [0, 1].map((at) => differ.filter(({heads}) => heads[at].on).length);
    const shared = pairs.filter(({heads}) => heads[0].on && heads[1].on).length;
    sentence.textContent = `${plural(shared, "head")} ran for both; ${only[0]} only for A, ` +
        `${only[1]} only for B.`;
    place.replaceChildren(
        differ.length ?
            table(
                "Heads that ran for one of the two",
                [
                  ["head", null, "text"], ["ran for", null, "text"],
                  ["spoke for it", "shares in the relevance, where it ran", "text"],
                  ["spoke against it", "shares in the relevance, where it slept", "text"],
                  ["margin A", measures.margin[1]], ["margin B", measures.margin[1]]
                ],
                differ.map(({site, heads}) => {
                  const ran = heads[0].on ? 0 : 1;
                  return [
                    headName(site, heads[0].head), "AB"[ran],
                    strongest(both[ran], heads[ran], 1) || missing,
                    strongest(both[1 - ran], heads[1 - ran], -1) || missing,
                    signed(heads[0].margin, 2), signed(heads[1].margin, 2)
                  ];
                })) :
            make("p", {class: "muted"}, "The same heads ran for both."));
  }
  show();
}
