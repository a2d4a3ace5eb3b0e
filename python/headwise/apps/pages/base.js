"use strict";
// What every part of the page uses: elements, numbers, tables, figures, the grid of heads, themes.

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);

// Texts of the data only ever become text nodes and values of plain attributes, never markup.
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) {
      element.setAttribute(name, value === true ? "" : value);
    }
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

// Plotly reads a few tags, entities and formulas in its labels: a text must not hold any.
const entities = {
  "&": "&amp;",
  "<": "&lt;",
  ">": "&gt;",
  $: "&#36;"
};
const plain = (text) => String(text).replace(/[&<>$]/g, (letter) => entities[letter]);

const missing = "–";
const given = (value) => value !== null && value !== undefined;
// What rounds to nothing has no sign.
const number = (value, digits = 3) =>
    given(value) ? value.toFixed(digits).replace(/^-(0\.?0*)$/, "$1") : missing;
const signed = (value, digits = 3) => {
  const text = number(value, digits);
  return given(value) && value > 0 && Number(text) !== 0 ? `+${text}` : text;
};
const percent = (value, digits = 0) =>
    (given(value) ? (100 * value).toFixed(digits) + "%" : missing);
const headName = (site, head) => `layer ${site} head ${head}`;
const roleName = (role) => (role.detail ? `${role.role} ${role.detail}` : role.role);
// A role is shown where a head beats its baseline by more than chance; broad and narrow have none.
const beats = (role) =>
    !given(role.baseline) || (given(role.low) ? role.low : role.share) > role.baseline;
const largest = (values) =>
    values.reduce((most, value) => (value === null ? most : Math.max(most, Math.abs(value))), 0);

// --- controls ---

function choice(parent, label, options, change) {
  const select = make("select", {});
  for (const [value, text] of options) select.append(make("option", {value}, text));
  select.addEventListener("change", () => change(select.value));
  parent.append(make("label", {class: "control"}, make("span", {}, label), select));
  return select;
}

// --- tables ---

function copyTable(table, button) {
  const lines = [...table.rows].map(
      (row) => [...row.cells]
                   .map((cell) => cell.textContent.replace(/\s+/g, " ").trim())
                   .join("\t"),
  );
  const text = lines.join("\n");
  const done = (ok) => {
    button.textContent = ok ? "Copied" : "Not copied: select the table by hand";
    setTimeout(() => (button.textContent = "Copy table"), 2500);
  };
  const byHand = () => {
    const area = make("textarea", {"aria-hidden": "true"});
    area.value = text;
    document.body.append(area);
    area.select();
    const ok = document.execCommand("copy");
    area.remove();
    button.focus();
    done(ok);
  };
  // Pages opened from disk may have no clipboard of their own.
  if (navigator.clipboard)
    navigator.clipboard.writeText(text).then(() => done(true), byHand);
  else
    byHand();
}

/** columns: [name, meaning or null, "text" where it is not a number]; cells are texts. */
function table(caption, columns, rows) {
  const kind = (place) => (columns[place][2] === "text" ? "text" : null);
  const head = columns.map(
      ([name, meaning], place) =>
          make("th", {scope: "col", title: meaning, class: kind(place)}, name),
  );
  const body = rows.map(
      (row) => make(
          "tr", {},
          ...row.map(
              (cell, place) => make(
                  place ? "td" : "th",
                  {scope: place ? null : "row", class: kind(place), dir: kind(place) && "auto"},
                  String(cell)),
              )),
  );
  const own = make(
      "table", {}, make("caption", {}, caption), make("thead", {}, make("tr", {}, ...head)),
      make("tbody", {}, ...body));
  const button = make(
      "button", {
        type: "button",
        class: "copy",
        "aria-label": `Copy table: ${caption}`,
        "aria-live": "polite"
      },
      "Copy table");
  button.addEventListener("click", () => copyTable(own, button));
  return make(
      "div", {class: "table"},
      make("div", {class: "scroll", tabindex: "0", role: "region", "aria-label": caption}, own),
      button);
}

/** A table that is made when it is opened. */
function foldedTable(parent, title, build) {
  const place = make("div", {});
  const details = make("details", {}, make("summary", {}, title), place);
  const fill = () => {
    if (details.open) place.replaceChildren(build());
  };
  details.addEventListener("toggle", fill);
  parent.append(details);
  return fill;
}

/** A part that is made when it is first opened. */
function folded(parent, title, build) {
  const place = make("div", {});
  const details = make("details", {}, make("summary", {}, title), place);
  details.addEventListener("toggle", () => {
    if (details.open && !place.hasChildNodes()) build(place);
  });
  parent.append(details);
}

// --- themes ---

const probe = make("span", {hidden: true});
document.body.append(probe);
function colour(name) {
  probe.style.color = `var(--${name})`;
  return getComputedStyle(probe).color;
}

const redraws = [];
const system = matchMedia("(prefers-color-scheme: dark)");
const themes = ["system", "light", "dark"];
function setTheme(theme) {
  if (theme === "system")
    delete document.documentElement.dataset.theme;
  else
    document.documentElement.dataset.theme = theme;
  byId("theme").textContent = `Theme: ${theme}`;
  byId("theme").dataset.theme = theme;
  for (const redraw of redraws) redraw();
}
byId("theme").addEventListener("click", () => {
  setTheme(themes[(themes.indexOf(byId("theme").dataset.theme) + 1) % themes.length]);
});
system.addEventListener("change", () => redraws.forEach((redraw) => redraw()));

// --- figures ---

const axis = (title, more = {}) => ({
  title: {text: title, standoff: 8},
  gridcolor: colour("line"),
  zerolinecolor: colour("muted"),
  linecolor: colour("line"),
  automargin: true,
  ...more,
});

// A figure follows its own width: a scroll bar that appears is no resize of the window.
const widths = new ResizeObserver((entries) => {
  for (const {target} of entries)
    if (target.data && target.offsetWidth) Plotly.Plots.resize(target);
});

/** What draw() returns, in the colours of the theme: {traces, layout}. */
function plot(node, {traces, layout}) {
  widths.observe(node);
  const shared = {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: {family: "system-ui, sans-serif", size: 13, color: colour("ink")},
    margin: {l: 60, r: 20, t: 20, b: 50},
    height: 380,
    hoverlabel:
        {bgcolor: colour("card"), bordercolor: colour("muted"), font: {color: colour("ink")}},
    legend: {orientation: "h", yref: "container", y: 0, yanchor: "bottom"},
    modebar: {bgcolor: "rgba(0,0,0,0)", color: colour("muted"), activecolor: colour("ink")},
  };
  return Plotly.react(node, traces, {...shared, ...layout}, {
    displaylogo: false,
    // These and no others: Plotly has one that sends the figure to a server.
    modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
  });
}

/** A figure with its table folded beneath it. Returns a function that redraws it. */
function figure(parent, title, note, draw, build) {
  const node = make("div", {
    class: "plot",
    role: "img",
    "aria-label": `${title}. ${note} The table below has the same numbers.`
  });
  const own = make(
      "figure", {},
      make("figcaption", {}, make("h3", {}, title), make("p", {class: "muted"}, note)), node);
  parent.append(own);
  const fill = foldedTable(own, `Table: ${title}`, build);
  const redraw = () => {
    plot(node, draw());
    fill();
  };
  redraws.push(redraw);
  redraw();
  return redraw;
}

// --- the grid of heads ---

const tip = byId("tip");
function showTip(cell) {
  tip.textContent = cell.dataset.tip;
  tip.hidden = false;
  const box = cell.getBoundingClientRect();
  const width = tip.offsetWidth, height = tip.offsetHeight;
  tip.style.left = Math.max(8, Math.min(box.left, innerWidth - width - 8)) + "px";
  tip.style.top =
      (box.bottom + height + 8 < innerHeight ? box.bottom + 6 : box.top - height - 6) + "px";
}
const hideTip = () => (tip.hidden = true);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") hideTip();
});
document.addEventListener("scroll", hideTip, true);

/** Colours by strength in [-1, 1]: the sign chooses the hue. The number is there too. */
function shade(element, strength) {
  element.classList.add(strength < 0 ? "negative" : "positive");
  element.style.setProperty("--strength", `${Math.round(100 * Math.min(1, Math.abs(strength)))}%`);
}

/** Rows of {label, cells: [{mark, on, text, strength, tip}]}; select(row, place) on a click. */
function headGrid(parent, label, select) {
  const own = make("table", {class: "grid", role: "grid", "aria-label": label});
  parent.append(make("div", {class: "scroll"}, own));
  let at = [0, 0], chosen = [0, 0];
  const cellAt = ([row, place]) =>
      own.querySelector(`td[data-row="${row}"][data-place="${place}"]`);
  const mark = () => {
    for (const cell of own.querySelectorAll("td[data-row]")) {
      const is = (pair) => +cell.dataset.row === pair[0] && +cell.dataset.place === pair[1];
      cell.tabIndex = is(at) ? 0 : -1;
      cell.setAttribute("aria-selected", is(chosen) ? "true" : "false");
    }
  };
  const pick = (cell) => {
    at = chosen = [+cell.dataset.row, +cell.dataset.place];
    mark();
    select(...chosen);
  };
  const cellOf = (event) => event.target.closest("td[data-row]");
  own.addEventListener("click", (event) => cellOf(event) && pick(cellOf(event)));
  own.addEventListener(
      "mouseover", (event) => (cellOf(event) ? showTip(cellOf(event)) : hideTip()));
  own.addEventListener("mouseleave", hideTip);
  own.addEventListener("focusin", (event) => cellOf(event) && showTip(cellOf(event)));
  own.addEventListener("focusout", hideTip);
  own.addEventListener("keydown", (event) => {
    const step = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [
                    1, 0
                  ]}[event.key];
    if (step || event.key === "Home" || event.key === "End") {
      const row = own.querySelectorAll(`td[data-row="${at[0]}"]`);
      const end = event.key === "Home" ? row[0] : row[row.length - 1];
      const next = step ? cellAt([at[0] + step[0], at[1] + step[1]]) : end;
      if (next) {
        at = [+next.dataset.row, +next.dataset.place];
        mark();
        next.focus();
      }
    } else if (event.key === "Enter" || event.key === " ") {
      pick(cellAt(at));
    } else {
      return;
    }
    event.preventDefault();
  });
  return {
    choose(row, place) {
      at = chosen = [row, place];
      mark();
    },
    update(rows) {
      const focused = own.contains(document.activeElement);
      const width = Math.max(0, ...rows.map((row) => row.cells.length));
      const top = make(
          "tr", {role: "row"}, make("th", {role: "columnheader", scope: "col"}, "layer"),
          ...Array.from(
              {length: width},
              (_, place) => make("th", {role: "columnheader", scope: "col"}, String(place))));
      const body = rows.map((row, site) => {
        const cells = row.cells.map((cell, place) => {
          const td = make(
              "td", {
                role: "gridcell",
                "data-row": site,
                "data-place": place,
                "data-tip": cell.tip,
                class: cell.on ? "on" : "off",
                "aria-label": cell.tip.replace(/\n/g, ", ")
              },
              make("span", {class: "mark"}, cell.mark), make("span", {class: "value"}, cell.text));
          shade(td, cell.strength);
          return td;
        });
        return make(
            "tr", {role: "row"},
            make("th", {role: "rowheader", scope: "row", title: row.name}, row.label), ...cells);
      });
      own.replaceChildren(make("thead", {}, top), make("tbody", {}, ...body));
      mark();
      if (focused) cellAt(at)?.focus();
    },
  };
}
