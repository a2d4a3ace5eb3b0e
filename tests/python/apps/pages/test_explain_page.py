"""The page: its content, that nothing in it comes from elsewhere, that texts stay texts."""

import base64
import copy
import json
import math
import re
import zlib
from html.parser import HTMLParser

import headwise as hw
import pytest
import torch
from headwise.apps.pages import documents as documents_module
from headwise.apps.pages import pack as pack_module
from headwise.apps.pages import write_page, write_pngs
from headwise.apps.pages.page import LIMIT, page
from headwise.apps.pages.words import sentences
from headwise.explain import Explanation
from support.browser import browse
from support.explain_documents import (
    HOSTILE,
    RESULTS,
    compared,
    explanation,
    hostile,
    hostile_study,
    use,
)

pytest.importorskip("plotly", reason="plotly is not installed")


class Reader(HTMLParser):
    """Elements with their attributes, and the content of scripts."""

    def __init__(self, content):
        super().__init__()
        self.elements, self.scripts, self.text, self._inside = [], [], [], None
        self.feed(content)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, content):
        if self._inside == "script":
            self.scripts[-1] += content
        elif self._inside != "style":
            self.text.append(content)

    def data(self):
        place = next(
            i for i, (_, a) in enumerate(e for e in self.elements if e[0] == "script")
            if a.get("id") == "data"
        )  # fmt: skip
        return json.loads(self.scripts[place])


@pytest.fixture(scope="module")
def whole():
    return page(explanation(), use(), compared())


def test_one_file_that_loads_nothing_and_is_small_enough(whole):
    assert len(whole.encode()) < LIMIT <= 6_000_000
    reader = Reader(whole)
    for tag, attributes in reader.elements:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form")
        assert "src" not in attributes
        assert attributes.get("href", "#").startswith("#")
        assert not any(name.startswith("on") for name in attributes)
    css = re.search(r"<style>(.*?)</style>", whole, re.DOTALL)[1]
    assert "url(" not in css and "@import" not in css
    policy = next(a["content"] for t, a in reader.elements if "http-equiv" in a)
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-inline'; img" in policy and "unsafe-eval" not in policy
    assert "'unsafe-inline'" not in policy.split("script-src")[1].split(";")[0]
    assert policy.count("sha256-") == len(reader.scripts) - 1  # the data are no script


def test_sections_and_summary_follow_what_is_given(whole):
    def sections(content):
        return [a["id"] for t, a in Reader(content).elements if t == "section" and "id" in a]

    assert sections(whole) == ["explained", "use", "compared"]
    text = " ".join(Reader(whole).text)
    assert "4 of 6 heads ran." in text
    assert "Over 60 texts 3.0 of 6 heads ran on average (50%), from 2 to 4" in text
    assert compared()["findings"][0] in text
    assert compared()["verdicts"][0]["sentence"] in text
    assert {"accuracy", "time", "heads", "−17%"} <= set(Reader(whole).text)
    assert sections(page(explanation())) == ["explained"]
    assert sections(page(use())) == sections(page(use()["roles"])) == ["use"]
    alone = page(RESULTS)
    assert sections(alone) == ["compared"]
    assert "<h1>Static against dynamic heads</h1>" in alone
    ids = [a["id"] for _, a in Reader(whole).elements if "id" in a]
    assert len(ids) == len(set(ids))


def test_the_data_are_the_documents(whole):
    data = Reader(whole).data()
    given = explanation()["inputs"]
    assert [one["text"] for one in data["inputs"]] == [one["text"] for one in given]
    for own, other in zip(data["inputs"], given, strict=True):
        assert own["summary"] == Explanation({"inputs": [other]}).summary()
        for mine, layer in zip(own["layers"], other["layers"], strict=True):
            for head, full in zip(mine["heads"], layer["heads"], strict=True):
                assert head["effect"] == pytest.approx(full["effect"], rel=1e-3)
                assert head["shares"] == pytest.approx(full["shares"], rel=1e-3)
    assert data["use"]["use"] == use()["use"]
    assert len(data["compared"]["summary"]) == len(compared()["summary"])


def test_maps_keep_small_and_large_weights():
    rows = torch.softmax(4 * torch.randn(9, 13), 1).tolist()
    levels = zlib.decompress(base64.b64decode(pack_module.pack_map(rows)))
    assert len(levels) == 9 * 13
    for level, weight in zip(levels, (w for row in rows for w in row), strict=True):
        assert abs((level / 255) ** 2 - weight) <= math.sqrt(weight) / 255 + 1 / 255**2
    pack_module.pack_map([[1.0000001, -1e-9]])  # rounding may leave [0, 1]


@pytest.mark.parametrize("room", [8_000, 12_000, 40_000])
def test_what_does_not_fit_is_left_out_and_said(room):
    texts = [f"text {place}" for place in range(4)]
    found = documents_module.sort_documents((explanation(texts, tokens=20),))
    shown, notes = pack_module.pack(found, room)
    assert pack_module.size(shown) <= room + 200  # the braces around it
    kept = shown["inputs"]
    heads = [head for entry in kept for layer in entry["layers"] for head in layer["heads"]]
    maps = [head for head in heads if head["attention"] is not None]
    assert all(head.get("left_out") for head in heads if head["attention"] is None)
    joined = " ".join(notes)
    assert (f"first {len(kept)} of 4 inputs" in joined) == (len(kept) < 4)
    left = len(heads) - len(maps)
    assert (f"{left} of {len(heads)} attention maps" in joined) == (left > 0)
    if 0 < len(maps) < len(heads):
        least = min(abs(head["effect"]) for head in maps)
        assert least >= max(abs(h["effect"]) for h in heads if h not in maps) - 1e-3 or left < 3


def test_a_page_of_many_long_inputs_stays_under_the_limit():
    torch.manual_seed(0)
    document = explanation(["a"] * 12, layers=6, heads=8, tokens=60)
    content = page(document)
    assert len(content.encode()) < LIMIT
    assert "attention maps are left out" in " ".join(Reader(content).text)


def test_not_even_one_input_fits():
    found = documents_module.sort_documents((explanation(),))
    with pytest.raises(ValueError, match="^documents must be smaller: not even the first input"):
        pack_module.pack(found, 100)


def test_hostile_texts_are_no_markup():
    content = page(hostile(explanation()), hostile(use()), hostile_study())
    plain = page(explanation(), use(), compared())
    # The same elements, one for one: no text has become one.
    kinds = [(tag, sorted(a)) for tag, a in Reader(content).elements]
    assert kinds == [(tag, sorted(a)) for tag, a in Reader(plain).elements]
    assert content.count("</script>") == plain.count("</script>")
    data = re.search(r'id="data">(.*?)</script>', content, re.DOTALL)[1]
    assert not set("<>&'\u2028\u2029") & set(data)
    assert Reader(content).data()["inputs"][0]["text"].endswith(HOSTILE)


def test_half_a_surrogate_pair_can_be_written(tmp_path):
    document = explanation(["half \ud83d of it"], label="up\udc00")
    write_page(tmp_path / "page.html", document)
    assert "half ? of it" in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert write_pngs(tmp_path, document, use(["\udc00", "b"]))


def test_documents_are_sorted_by_what_they_are(tmp_path):
    path = tmp_path / "use.json"
    path.write_text(json.dumps(use()))
    found = documents_module.sort_documents((compared(), path, Explanation(explanation())))
    assert found.explanation["format"] == "headwise.explanation"
    assert found.roles == use()["roles"] and found.compared["findings"]


@pytest.mark.parametrize(
    "given, kind, message",
    [
        ((), ValueError, "documents must be at least one, got none"),
        (({"format": "x"},), ValueError, "documents must be of format 'headwise.e.*, got 'x'"),
        (({},), ValueError, "documents must be of format .*, got None"),
        ((use(), use()), ValueError, "documents must be one of each format, got two of .*use'"),
        ((3,), TypeError, "documents must be mappings or paths.*, got int"),
        (({**use(), "version": 2},), ValueError, "a document of .*use' must have version 1, got 2"),
    ],
)  # fmt: skip
def test_refuses_what_is_no_document(given, kind, message):
    with pytest.raises(kind, match=f"^{message}$"):
        page(*given)


def test_results_of_an_older_version():
    """Those of before images have no name for their examples."""
    older = compared()
    for task in older["tasks"]:
        task.pop("examples", None)
    assert Reader(page(older)).data()["compared"]["tables"][0]["title"].endswith(" test texts)")
    del older["model"]["layers"]
    message = "^documents must be of this version of headwise: one lacks 'layers'; run the command"
    with pytest.raises(ValueError, match=message):
        page(older)


def test_refuses_a_file_that_is_not_json(tmp_path):
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ValueError, match="x.json is not a JSON document$"):
        page(tmp_path / "x.json")


def test_words_say_what_the_numbers_say():
    document = use()
    told = sentences(documents_module.sort_documents((document,)))
    assert told[1] == (
        "2 heads ran for every text, 2 for none; which of the other 2 ran depends on the text."
    )
    assert told[2].startswith("2 heads of 2 tested run more for some classes than for others, ")
    assert told[3] == "2 of 6 heads have a role: offset 2."
    weak = copy.deepcopy(document)
    for layer in weak["roles"]["layers"]:
        for role in layer["heads"][0]["roles"]:
            role["baseline"] = role["low"]  # the interval reaches down to it
    told_weak = sentences(documents_module.sort_documents((weak,)))
    assert told_weak[3] == "None of 6 heads has a role at these thresholds."
    assert "80% of the heads that run before or after run both times" in told[4]
    assert told[5].endswith("so the gates' order of heads says something of what matters.")
    static = copy.deepcopy(document)
    static["use"].update(heads_mean=6.0, heads_min=6, heads_max=6, always=6, never=0)
    for layer in static["use"]["layers"]:
        for head in layer["heads"]:
            head["information"] = None
    static["roles"]["layers"] = [{**one, "heads": []} for one in static["roles"]["layers"]]
    static.update(stability=[], faithfulness=None)
    told = sentences(documents_module.sort_documents((static,)))
    assert told[0].startswith("Over 60 texts 6.0 of 6 heads ran on average (100%), the same number")
    assert len(told) == 3


def test_pictures(tmp_path):
    written = write_pngs(tmp_path / "png", explanation(["$a", "b"]), use(("x_1", "$y")), compared())
    kinds = ("heads", "attention", "tokens", "effect")
    assert [path.stem for path in written] == [
        *(f"input-{n}-{what}" for n in (1, 2) for what in kinds),
        "use-heads", "use-stability", "use-faithfulness", "front", "accuracy", "latency",
    ]  # fmt: skip
    for path in written:
        assert path.read_bytes().startswith(b"\x89PNG")
    bare = write_pngs(tmp_path / "bare", explanation(gated=False))
    assert [path.stem for path in bare] == [
        f"input-{n}-{what}" for n in (1, 2) for what in ("heads", "attention")
    ]


# --- in a browser ---


def test_it_works_in_a_browser(whole, tmp_path):
    seen = browse(
        whole,
        """
        const cell = (row, place) => $(`#explained td[data-row="${row}"][data-place="${place}"]`);
        const heading = () => $("#head h3").textContent;
        const out = { start: heading() };
        out.headline = $("#headline .sentence").textContent;
        out.dots = [$$("#headline i.on").length, $$("#headline i.off").length];
        out.odd = $$("#headline li").map((one) => one.textContent);
        out.usually = $("#headline .muted").textContent;
        cell(1, 2).click();
        await pause();
        out.clicked = heading();
        out.selected = $$("#explained td[aria-selected=true]").length;
        out.map = $("#map").data[0].z;
        out.shares = $$("#explained .tokens small").map((one) => one.textContent);
        cell(1, 2).focus();
        key(cell(1, 2), "ArrowUp");
        key(document.activeElement, "ArrowLeft");
        out.focus = document.activeElement.dataset.row + document.activeElement.dataset.place;
        out.tip = $("#tip").hidden ? null : $("#tip").textContent;
        key(document.activeElement, "Enter");
        out.entered = heading();
        key(document.activeElement, "Escape");
        out.hidden = $("#tip").hidden;
        const choose = (label, value) => {
          const control = $$("label.control").find((one) => one.textContent.startsWith(label));
          const select = control.querySelector("select");
          select.value = value;
          select.dispatchEvent(new Event("change"));
          return select;
        };
        out.options = $$("#explained .controls select")[1].options.length;
        choose("Predicted class", "not up");
        out.filtered = $$("#explained .controls select")[1].options.length;
        out.text = $("blockquote").textContent;
        out.summary = $("#summary").textContent;
        out.rate = $('#use td[data-row="0"][data-place="1"]').textContent;
        choose("Texts predicted as", "0");
        out.rate0 = $('#use td[data-row="0"][data-place="1"]').textContent;
        for (let depth = 0; depth < 2; depth++) {  // some are made when others are opened
          $$("details").forEach((one) => (one.open = true));
          await pause();
        }
        const tables = $$("details:not(.findings)");
        out.front = $$(".front li").length;
        out.folded = tables.map((one) => one.querySelectorAll("tbody tr").length);
        out.figures = $$("figure").length;
        out.drawn = $$("figure .plot .main-svg").length >= $$("figure").length;
        out.labelled = $$(".plot").every((one) => one.getAttribute("aria-label"))
          && $$("select").every((one) => one.labels.length);
        out.buttons = [...new Set($$(".modebar-btn").map((one) => one.dataset.title))];
        let copied = null;
        const clipboard = { writeText: async (text) => { copied = text; } };
        Object.defineProperty(navigator, "clipboard", { value: clipboard });
        $("#compared details .copy").click();
        await pause(50);
        out.copied = copied.split("\\n")[0];
        out.theme = [];
        for (let turn = 0; turn < 3; turn++) {
          $("#theme").click();
          const paper = getComputedStyle(document.body).backgroundColor;
          out.theme.push([$("#theme").textContent, paper]);
        }
        out.wide = document.documentElement.scrollWidth <= innerWidth;
        return out;
        """,
        tmp_path,
    )
    assert seen["problems"] == [] and seen["loaded"] == []
    found, given = seen["found"], explanation()["inputs"]
    heads = [(one["site"], head) for one in given[0]["layers"] for head in one["heads"]]
    site, first = max(heads, key=lambda pair: abs(pair[1]["effect"]))
    assert found["start"].startswith(f"layer {site} head {first['head']}:")
    assert found["clicked"] == "layer 1 head 2: ran" and found["selected"] == 1
    assert found["headline"] == "4 of 6 heads ran" and found["dots"] == [4, 2]
    # Head 2 never runs over the data set, and ran here; head 0 always does.
    assert [line.split(":")[0] for line in found["odd"]] == [
        f"layer {site} head 2 ran, as for only 0% of the texts of the data set" for site in (0, 1)
    ]
    assert "2 heads of them run whatever the input says" in found["usually"]
    head = given[0]["layers"][1]["heads"][2]
    for row, other in zip(found["map"], head["attention"], strict=True):
        assert row == pytest.approx(other, abs=0.005)
    assert [float(share) for share in found["shares"]] == pytest.approx(head["shares"], abs=0.006)
    assert found["focus"] == "01" and found["tip"].startswith("layer 0 head 1\nslept")
    assert found["entered"] == "layer 0 head 1: slept" and found["hidden"]
    assert (found["options"], found["filtered"]) == (2, 1)
    assert found["text"] == "a dull plot" and "predicts not up" in found["summary"]
    assert (found["rate"], found["rate0"]) == ("◐50%", "◐25%")
    assert all(rows > 0 for rows in found["folded"]) and found["figures"] == 8 and found["drawn"]
    assert found["labelled"]
    assert not any("loud" in title for title in found["buttons"])  # nothing that sends data away
    assert found["copied"].split("\t") == [
        "method",
        "kind",
        "heads",
        "time, dense = 1",
        "range",
        "accuracy",
        "95% interval",
        "on the front",
    ]
    assert found["front"] == 7
    assert [name for name, _ in found["theme"]] == ["Theme: light", "Theme: dark", "Theme: system"]
    assert found["theme"][0][1] == "rgb(255, 255, 255)" != found["theme"][1][1]
    assert found["wide"]


def test_what_is_not_known_has_no_place_in_a_browser(tmp_path):
    """Heads without relevance, effect or shares: as under a bank of plans, or without a gate."""
    document = explanation(["one"], gated=False)
    for layer in document["inputs"][0]["layers"]:
        for head in layer["heads"]:
            head.update(effect=None, changes_prediction=None, on=head["head"] == 1, weight=0.0)
    seen = browse(
        page(document),
        """
        return {
          terms: $$("#head dt").map((one) => one.textContent),
          values: $$("#head dd").map((one) => one.textContent),
          title: $("#head h3").textContent,
          parts: $$("#head h4").map((one) => one.textContent),
        };
        """,
        tmp_path,
    )
    assert seen["problems"] == []
    found = seen["found"]
    assert "relevance" not in found["terms"] and "–" not in found["values"]
    assert found["title"] == "layer 0 head 1: ran"  # not one that slept
    assert found["parts"] == ["Attention map"]


def test_a_data_set_without_differences_shows_none_in_a_browser(tmp_path):
    document = use(["a", "b"])
    for row in document["role_use"]:
        row["q"] = 0.6
    for group in document["use"]["by_length"]:
        group["heads_mean"] = 9.0
    document["data"]["predicted"] = [2, 0]
    seen = browse(
        page(document),
        """
        return {
          headings: $$("h3").map((one) => one.textContent),
          notes: $$("p.muted").map((one) => one.textContent),
          folded: $$("summary").map((one) => one.textContent),
          classes: $$("table")
            .find((one) => one.caption?.textContent.endsWith("by predicted class"))
            .tBodies[0].rows.length,
        };
        """,
        tmp_path,
    )
    assert seen["problems"] == []
    found = seen["found"]
    assert "Heads by length" not in found["headings"]
    assert any("Not measurably, at a false discovery rate" in note for note in found["notes"])
    assert "Table: role and use together" in found["folded"] and found["classes"] == 1


def test_pictures_have_the_colours_of_the_page_and_no_empty_half():
    from headwise.apps.pages import figures

    document = explanation(["one"])["inputs"][0]
    image = figures._heads(document).axes[0].images[0]
    assert image.get_cmap().name == "headwise"
    assert image.norm.vmin == -image.norm.vmax
    document = explanation(["one"], gated=False)["inputs"][0]
    for layer in document["layers"]:
        for head in layer["heads"]:
            head["effect"] = None
    image = figures._heads(document).axes[0].images[0]
    assert (image.norm.vmin, image.norm.vmax) == (0.0, 1.0)  # weights are not negative


def test_two_inputs_side_by_side_in_a_browser(tmp_path):
    document = explanation(["one", "two", "three"])
    second = document["inputs"][1]["layers"][0]["heads"]
    second[0].update(on=False, margin=-0.5, shares=[-0.3, 0.2, -0.1, 0.0])
    document["inputs"][0]["layers"][0]["heads"][0].update(margin=0.5, shares=[0.4, 0.0, -1.0, 0.1])
    seen = browse(
        page(document),
        """
        const own = $$("#explained table").find((one) => one.caption?.textContent
          === "Heads that ran for one of the two");
        const row = [...own.tBodies[0].rows].map((row) => [...row.cells].map((c) => c.textContent));
        const sentence = $$("#explained p").find((one) => one.textContent.includes("only for B"));
        const out = { row, sentence: sentence.textContent };
        const select = $$("label.control").find((one) => one.textContent.startsWith("B"))
          .querySelector("select");
        select.value = "2";
        select.dispatchEvent(new Event("change"));
        await pause();
        out.same = sentence.textContent;
        out.usually = $("#headline .muted").textContent;
        return out;
        """,
        tmp_path,
    )
    assert seen["problems"] == []
    found = seen["found"]
    assert found["row"] == [
        ["layer 0 head 0", "A", "one (+0.40), t3 (+0.10)", "two (-0.30), t2 (-0.10)", "+0.50",
         "-0.50"]
    ]  # fmt: skip
    assert found["sentence"] == "3 heads ran for both; 1 only for A, 0 only for B."
    assert found["same"] == "4 heads ran for both; 0 only for A, 0 only for B."
    assert "3 heads of them run whatever the input says" in found["usually"]


def test_hostile_texts_stay_texts_in_a_browser(tmp_path):
    content = page(hostile(explanation()), hostile(use()), hostile_study())
    seen = browse(
        content,
        """
        for (let depth = 0; depth < 2; depth++) {
          $$("details").forEach((one) => (one.open = true));
          await pause();
        }
        for (const cell of $$("td[data-row]")) {
          cell.dispatchEvent(new MouseEvent("mouseover", { bubbles: true }));
          cell.click();
        }
        await pause();
        const first = [{ curveNumber: 0, pointNumber: 0 }];
        for (const node of $$("figure .plot")) Plotly.Fx.hover(node, first);
        Plotly.Fx.hover($("#map"), [{ curveNumber: 0, pointNumber: [0, 0] }]);
        await pause(600);
        return {
          hacked: window.hacked ?? null,
          images: $$("img").length,
          links: $$("a").map((one) => one.getAttribute("href") ?? one.getAttribute("xlink:href")),
          bold: $$("svg b, td b").length,
          text: $("blockquote").textContent,
          tick: $("#map .xtick text").textContent,
          hover: $$(".hoverlayer text").map((one) => one.textContent).join(" "),
          token: $(".tokens bdi").textContent,
        };
        """,
        tmp_path,
        width=420,
    )
    assert seen["problems"] == [] and seen["loaded"] == []
    found = seen["found"]
    assert found["hacked"] is None and found["images"] == 0 and found["bold"] == 0
    assert all(link.startswith("#") for link in found["links"])
    assert found["text"] == f"a fine film {HOSTILE}" == found["token"]
    assert found["tick"].startswith("a fine film")
    assert "<img src=x onerror" in found["hover"]


@pytest.mark.parametrize(
    "given",
    [
        lambda: (explanation(["one"], gated=False),),
        lambda: (use()["roles"],),
        lambda: (RESULTS,),
        lambda: (without_everything(),),
    ],
    ids=["no gates", "roles alone", "compared alone", "no scores, no texts, no maps"],
)
def test_parts_alone_open_without_errors(given, tmp_path):
    seen = browse(page(*given()), "return $$('table, .main-svg').length;", tmp_path)
    assert seen["problems"] == [] and seen["found"] > 0


def without_everything():
    """An explanation of a model without class scores, of inputs without texts."""
    document = explanation(["x"])
    del document["model"]  # as from C++
    for entry in document["inputs"]:
        entry.update(text=None, tokens=None, prediction=None, agreement=None)
        for layer in entry["layers"]:
            for head in layer["heads"]:
                head.update(
                    effect=None, changes_prediction=None, attention=None, pairs=[], roles=[]
                )
    return document


# --- from the command line ---


def test_the_command_tells_the_first_two_texts_apart():
    from headwise.apps.cli.explain import render_differences

    document = explanation(["one", "two\x1b[2J"])
    first, second = document["inputs"]
    same = Explanation(document).differences()
    assert render_differences(first, second, same) == (
        "0 of 6 heads ran for only one of the first two inputs"
    )
    first["layers"][1]["heads"][2].update(margin=0.25, shares=[0.5, 0.0, 0.0, 0.0])
    second["layers"][1]["heads"][2].update(on=False, margin=None, shares=[-0.5, 0.0, 0.0, 0.0])
    told = render_differences(first, second, Explanation(document).differences()).splitlines()
    assert told[0].startswith(
        "1 of 6 heads ran for only one of the first two inputs: A, one; B, tw"
    )
    row = "    1    2        A    +0.250         -  one (+0.50); two\\x1b[2J (-0.50)"
    assert told[2] == row
    many = Explanation(document).differences() * 12
    assert render_differences(first, second, many).splitlines()[-1] == "and 2 more"


@pytest.fixture(scope="module")
def gated(tiny_model, tmp_path_factory):
    from headwise.apps.tasks.models import load_tokenizer, load_trained

    torch.manual_seed(0)
    model = hw.convert(load_trained(tiny_model), hw.BudgetGate(keep=0.5))
    folder = tmp_path_factory.mktemp("gated") / "model"
    hw.save(model, folder, tokenizer=load_tokenizer(tiny_model))
    return str(folder)


def test_the_command_writes_what_format_asks_for(gated, tmp_path, capsys):
    from headwise.apps.cli import main

    command = ["explain", "--model", gated, "--text", "a fine film", "--out", str(tmp_path)]
    assert main([*command, "--format", "html", "png", "json", "--compared", str(RESULTS)]) == 0
    assert "explanation.html" in capsys.readouterr().out
    document = json.loads((tmp_path / "explanation.json").read_text())
    assert document["inputs"][0]["layers"][0]["heads"][0]["attention"]  # maps without being asked
    data = Reader((tmp_path / "explanation.html").read_text(encoding="utf-8")).data()
    assert data["inputs"][0]["text"] == "a fine film" and data["compared"]
    assert (tmp_path / "input-1-heads.png").is_file() and (tmp_path / "accuracy.png").is_file()


def test_the_command_writes_the_page_of_a_data_set(gated, tiny_texts, tmp_path):
    from headwise.apps.cli import main

    command = [
        "explain", "--model", gated, "--data", str(tiny_texts), "--text-column", "review",
        "--limit", "20", "--out", str(tmp_path), "--format", "html",
    ]  # fmt: skip
    assert main(command) == 0
    content = (tmp_path / "use.html").read_text(encoding="utf-8")
    assert Reader(content).data()["use"]["data"]["texts"] == 20
    again = ["explain", "--model", gated, "--text", "so bad", "--roles", str(tmp_path / "use.json")]
    assert main([*again, "--out", str(tmp_path), "--format", "html", "--maps", "none"]) == 0
    data = Reader((tmp_path / "explanation.html").read_text(encoding="utf-8")).data()
    assert data["use"] and data["inputs"][0]["layers"][0]["heads"][0]["attention"] is None


@pytest.mark.parametrize(
    "more, message",
    [
        ("--format html", "--format needs --out DIR, the folder that the files are written to"),
        ("--compared x", "--compared needs --format html or png: it is shown on the page"),
        ("--format html --out o --compared x", "there is no file x"),
        ("--format png --out o --compared bad", "bad is not results.json of 'headwise compare'"),
    ],
)
def test_the_command_refuses(gated, more, message, tmp_path, monkeypatch, capsys):
    from headwise.apps.cli import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad").write_text("{}")
    assert main(["explain", "--model", gated, "--text", "a film", *more.split()]) == 2
    assert capsys.readouterr().err.strip() == f"headwise explain: {message}"
