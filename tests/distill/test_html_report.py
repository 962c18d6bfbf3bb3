"""The report's page: what it says, of whole and of unfinished runs, and that it is safe whatever names hold."""

import math
import re
from html.parser import HTMLParser

import pytest
from toy_reports import CONFIG, LAYERS, alone, joint, progressive, raster, row, summary, write_run

from distill.html_report import write_report
from distill.html_report.chart import spread_apart
from distill.html_report.frontier import pareto
from distill.html_report.headlines import tiles
from distill.html_report.palette import LEVELS, Palette, contrast, level_of
from distill.html_report.run_data import read_run
from distill.html_report.text import abbreviated, cleaned, duration, figures, percent, share, shortened
from distill.report import SATURATED, SILENT


class Page(HTMLParser):
    """What a browser would make of a page: elements with attributes, tables, text."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.tables, self.words, self._cell = [], [], [], False
        self.feed(text)
        self.text = " ".join("".join(self.words).replace("\u00a0", " ").split())

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.words.append(" ")
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._cell = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data):
        self.words.append(data)
        if self._cell:
            self.tables[-1][-1][-1] += data.replace("\u00a0", " ")

    def tags(self, tag):
        return [attributes for found, attributes in self.elements if found == tag]

    def table(self, *header):
        """The rows of the table whose header begins like this."""
        return next(rows[1:] for rows in self.tables if rows[0][: len(header)] == list(header))


def report(folder, *args, **kwargs):
    text = write_report(write_run(folder, *args, **kwargs)).read_text()
    return Page(text), text


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "digits"
    return *report(folder, joint(), summary(), raster()), folder


def test_the_page_needs_nothing_but_itself(whole):
    page, text, _ = whole
    assert not page.tags("script") and not page.tags("iframe") and not page.tags("object")
    assert re.findall(r"@import|url\((?!#)", text) == []
    addresses = [a[n] for _, a in page.elements for n in ("src", "href", "action", "data") if n in a]
    assert addresses and all(address.startswith(("data:", "#")) for address in addresses)
    (policy,) = [m["content"] for m in page.tags("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'") and "script" not in policy
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.tags("meta")
    assert len(text) < 500_000


def test_ids_are_unique_and_references_meet_them(whole):
    page, text, _ = whole
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(|href=")#([^)"]+)', text)) <= set(ids)
    assert "#f1" not in text  # every stand-in has become a variable
    used = set(re.findall(r"var\(--([\w-]+)\)", text))
    assert used and used <= set(re.findall(r"--([\w-]+):", text))


def test_equal_folders_give_equal_bytes(whole, tmp_path):
    _, text, folder = whole
    assert write_report(folder).read_text() == text
    _, again = report(tmp_path / "digits", joint(), summary(), raster())
    assert again == text


def test_the_headlines_are_those_of_the_summary(whole):
    page = whole[0]
    for words in (
        "85.00 % SNN top-1 at T = 4", "92.50 % teacher top-1", "7.50 points lost against the teacher",
        "20.0 % mean firing rate", "20 % of the teacher's energy", "0.0213 calibration error",
        "rate-based backpropagation (Yu et al., NeurIPS 2024)", "12,345", "563 images/s", "93 s",
    ):  # fmt: skip
        assert words in page.text, words
    better = summary() | {"student_top1": 93.75}
    third = tiles(read_run(write_run(whole[2].parent / "better", joint(), better)))[2]
    assert (third.value, third.unit, third.name) == ("1.25", "points", "above the teacher")


def test_every_chart_has_words_a_table_and_two_sizes(whole):
    page = whole[0]
    drawings = page.tags("svg")
    assert all(a["role"] == "img" and len(a["aria-label"]) > 40 for a in drawings)
    assert (
        len([a for a in drawings if a["class"] == "wide"]) == len([a for a in drawings if a["class"] == "narrow"]) == 6
    )
    assert len([a for a in drawings if a["class"] == "raster"]) == 2
    assert page.table("Network", "Top-1", "As the teacher predicts") == [
        ["teacher", "92.50 %", "\u2013", "+0.00"],
        ["hybrid up to layer1", "90.00 %", "91.00 %", "-2.50"],
        ["hybrid up to layer2", "89.00 %", "91.00 %", "-3.50"],
        ["SNN, T = 4", "85.00 %", "86.00 %", "-7.50"],
    ]
    by_t = page.table("Network", "T", "Top-1", "Against the teacher (points)")
    assert by_t[-3:] == [["SNN, T = 4", "1", "62.50 %", "-30.00"], ["SNN, T = 4", "2", "77.50 %", "-15.00"],
                         ["SNN, T = 4", "4", "85.00 %", "-7.50"]]  # fmt: skip
    assert by_t[0] == ["hybrid up to layer1", "1", "82.00 %", "-10.50"] and len(by_t) == 7
    epochs = page.table("Epoch", "Stage")
    assert [cells[0] for cells in epochs] == ["1", "2", "3"] and epochs[-1][2:] == ["90.00 %", "89.00 %", "85.00 %"]
    rates = page.table("Layer", "epoch 1")
    assert rates[1] == ["layer1.0.act1", "6.7 %", "13.3 %", "20.0 %", "20.0 %"]
    losses = page.table("Stage", "Epoch")
    assert [cells[:2] for cells in losses] == [
        ["teacher", "1"],
        ["teacher", "2"],
        *(["SNN", str(e)] for e in (1, 2, 3)),
    ]
    energies = page.table("Network", "T", "Top-1", "Arithmetic (\u00b5J an image)")
    assert energies[0] == ["teacher", "\u2013", "92.50 %", "40.0", "100.0 %", "120", "40,000,000", "0", "25 %", "yes"]
    assert energies[-1] == ["SNN", "4", "85.00 %", "8.00", "20.0 %", "24.0", "8,000,000", "8,000,000", "25 %", "yes"]
    spikes = page.table("Layer", "Neuron")
    assert spikes[:2] == [["act1", "3", "1 2 3 4", "1 2 3 4"], ["act1", "100", "4", "4"]]
    assert "4.6 pJ for a MAC" in page.text and "torch 9.9" in page.text
    assert "steps 1\u20133: cat (50 %) ✗ wrong step 4: dog (75 %) ✓ right" in page.text


def marks(text, key):
    """Tips and places of the marks of a drawing."""
    (drawing,) = (svg for svg in text.split("<svg ")[1:] if f'id="{key}-' in svg)
    found = {}
    for part in drawing.split("<title>")[1:]:
        if place := re.search(r'<use [^>]*x="([\d.]+)" y="([\d.]+)"', part):
            found[part.split("<")[0].replace("\u00a0", " ")] = tuple(map(float, place.groups()))
    return found


def test_marks_lie_where_their_numbers_are(whole):
    text = whole[1]
    taps = marks(text, "by-tap-wide")
    places = {float(re.search(r": ([\d.]+) %", tip)[1]): place for tip, place in taps.items()}
    assert sorted(places) == [85.0, 89.0, 90.0, 92.5]
    scale = (places[92.5][0] - places[85.0][0]) / 7.5
    for value, (x, _) in places.items():
        assert x == pytest.approx(places[85.0][0] + scale * (value - 85), abs=1e-3)
    assert places[92.5][1] < places[90.0][1] < places[89.0][1] < places[85.0][1]  # downwards: deeper taps
    energies = marks(text, "frontier-wide")
    found = {
        tip: (*map(float, re.search(r"([\d.]+) % at ([\d.]+)", tip).groups()), *at) for tip, at in energies.items()
    }
    assert len(found) == 8
    top1, energy, x0, y0 = found["SNN, T = 1: 62.50 % at 2.00 \u00b5J"]
    _, _, x1, y1 = found["teacher: 92.50 % at 40.0 \u00b5J"]
    for value, joule, x, y in found.values():
        assert x - x0 == pytest.approx((x1 - x0) * math.log(joule / energy) / math.log(40 / energy), abs=0.05)
        assert y - y0 == pytest.approx((y1 - y0) * (value - top1) / (92.5 - top1), abs=0.05)


def test_the_frontier_is_what_no_other_beats_in_both():
    rows = [row("a", 1, 50.0, 1.0), row("b", 1, 50.0, 2.0), row("c", 1, 60.0, 2.0), row("d", 1, 55.0, 3.0),
            row("e", 1, 70.0, 9.0), row("f", 1, 70.0, 9.0), row("g", 1, 60.5, 2.5)]  # fmt: skip
    assert [found["network"] for found in pareto(rows)] == ["a", "c", "g", "e"]


HOSTILE = "</title></svg></style><script>alert(1)</script><img src=http://x.example/ onerror=alert(1)>\"'&amp;$x^2$"


def test_names_are_text_whatever_they_hold(tmp_path):
    taps, layers = (f"{HOSTILE}a", "two\nlines\x00\ud800\u4e2d"), (HOSTILE, *LAYERS[1:])
    found = summary(taps, layers) | {
        "schedule": HOSTILE,
        "energy_assumptions": [HOSTILE],
        "versions": {HOSTILE: HOSTILE},
    }
    spikes = raster((HOSTILE, "dog"), layers)
    spikes["images"][1]["picture"] = 'http://x.example/" onload="alert(1)'  # not a picture that we made
    config = CONFIG | {"data": {"name": HOSTILE, HOSTILE: HOSTILE, "root": None}}
    name = HOSTILE.replace("/", "_")
    page, text = report(tmp_path / name, joint(3, taps, layers), found, spikes, config)
    assert not page.tags("script") and all(a["src"].startswith("data:image/png") for a in page.tags("img"))
    assert len(page.tags("img")) == 1 and not any(k.startswith("on") for _, a in page.elements for k in a)
    assert page.text.count("<script>alert(1)</script>") > 10 and name in page.text
    assert "hybrid up to two\nlines\ufffd\ufffd\u4e2d" in [
        a for a in text.split('<th scope="row">') for a in [a.split("<")[0]]
    ]


def test_names_may_look_like_the_stand_ins_of_colours(tmp_path):
    """`#f10002` stands for the ink in a drawing, `#f1ffff` for nothing."""
    taps, layers, labels = ("#f10002", "#f1ffff"), ("#f1ffff", *LAYERS[1:]), ("#f10002", "#f1ffff")
    page, _ = report(tmp_path / "r", joint(3, taps, layers), summary(taps, layers), raster(labels, layers))
    drawings = page.tags("svg")
    assert len(drawings) == 14 and any("#f1ffff" in a["aria-label"] for a in drawings)
    assert not any("var(" in a["aria-label"] for a in drawings) and "var(" not in page.text.split("}")[-1]
    assert {"hybrid up to #f10002", "hybrid up to #f1ffff"} <= {row[0] for table in page.tables for row in table}
    written = [a[name] for tag, a in page.elements for name in a if name in ("style", "fill", "stroke")]
    assert any("var(--ink)" in value for value in written) and not any("#f1" in value for value in written)


def test_layers_without_a_single_number_are_left_out_of_the_map(tmp_path):
    lines = joint()
    for values in lines[2:]:
        values["firing_rate/act1"] = math.nan
    without = {name: value for name, value in summary().items() if name != "firing_rates"}
    page, _ = report(tmp_path / "some", lines, without)
    assert [row[0] for row in page.table("Layer", "epoch 1")] == [*LAYERS[1:]]
    assert "Map of the firing rates of 2 layers" in next(
        a["aria-label"] for a in page.tags("svg") if "firing rates" in a["aria-label"]
    )
    for values in lines[2:]:
        values |= {f"firing_rate/{layer}": math.nan for layer in LAYERS}
    for found in (without, None):
        page, _ = report(tmp_path / f"none-{found is None}", lines, found)
        assert "No firing rate is a number." in page.text and page.tags("svg")


def test_a_run_that_has_not_ended_shows_what_is_there(tmp_path):
    page, _ = report(tmp_path / "r", joint(1))
    assert "has not ended: the last epoch is number 1 of stage 'SNN'" in page.text
    assert "85.00 % SNN top-1 at T = 4 last epoch" in page.text  # of one epoch
    for why in (
        "Accuracies at several T are measured when the run has ended.", "Energy is estimated when the run has ended.",
        "There is no raster.json: the run has not ended.", "Written when the run has ended.",
    ):  # fmt: skip
        assert why in page.text
    assert len(page.tags("svg")) == 2 * 4
    with (tmp_path / "r" / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "student", "epo')  # a crash tore it
    assert "number 1 of stage" in Page(write_report(tmp_path / "r").read_text()).text


def test_a_run_without_an_epoch_has_a_page(tmp_path):
    page, _ = report(tmp_path / "r", [])
    assert "no epoch has ended" in page.text and not page.tags("svg")
    assert page.text.count("No epoch has ended yet.") == 3


def test_only_the_teacher_has_trained_so_far(tmp_path):
    page, _ = report(tmp_path / "r", joint(1)[:1])
    assert "40.00 % teacher top-1 last epoch" in page.text and "number 1 of stage 'teacher'" in page.text
    assert page.table("Stage", "Epoch") == [["teacher", "1", "2.00", "0.0100"]]


def test_a_run_of_a_teacher_alone(tmp_path):
    config = {name: CONFIG[name] for name in ("run", "teacher", "data", "train")}
    page, _ = report(
        tmp_path / "r", joint()[:2], {"teacher_top1": 80.0, "classes": ["a"], "versions": {}}, None, config
    )
    assert "80.00 % teacher top-1" in page.text and page.text.count("The run trained no spiking network.") == 2


def test_stages_follow_each_other_and_lines_break_between_them(tmp_path):
    page, text = report(tmp_path / "r", progressive(), summary() | {"schedule": "progressive"})
    epochs = page.table("Epoch", "Stage", "hybrid up to layer1")
    assert [cells[:2] for cells in epochs] == [[str(e), s] for e, s in enumerate(
        ["layer1", "layer1", "layer2", "layer2", "SNN", "SNN"], 1)]  # fmt: skip
    assert epochs[0][2:] == ["50.00 %", "\u2013", "\u2013"] and epochs[5][2:] == ["\u2013", "\u2013", "85.00 %"]
    rates = page.table("Layer", "epoch 1")
    assert rates[2][:4] == ["layer2.0.act1", "\u2013", "\u2013", "15.0 %"]  # did not run in the first stage
    drawing = next(part for part in text.split("<svg ") if "Line charts of the training loss" in part)
    whole = re.search(r"<title>sum: [^<]+</title><path d=\"([^\"]+)\"", drawing)[1]
    assert whole.count("M") == 3 and whole.count("L") == 3  # three stages of two epochs


def test_a_run_without_a_teacher(tmp_path):
    found = {k: v for k, v in summary().items() if k not in ("teacher_top1", "hybrid_top1", "frontier", "schedule")}
    config = {name: value for name, value in CONFIG.items() if name != "teacher"}
    page, _ = report(tmp_path / "r", alone(), found | {"firing_rates": {"conv0": 0.2}}, None, config)
    assert "The run has one network only: there is nothing to compare." in page.text
    assert "summary.json holds no energies: the run was made by a version that did not estimate them." in page.text
    assert "lost against" not in page.text and "cross-entropy with the labels (nats)" in page.text
    only = found | {"student_top1_by_timesteps": {"4": 85.0}}
    page, _ = report(tmp_path / "event", alone(1), only, None, config)
    assert "evaluated at its own T = 4 only: 85.00 %" in page.text


def test_what_a_reader_must_know_is_said(tmp_path):
    lines = joint()
    lines[-1]["skipped_steps"], lines[-1]["loss/total"] = 2, float("nan")
    found = summary() | {"skipped_images": ["a.jpg"], "firing_rates": {"act1": 0.001, "layer1.0.act1": 0.99}}
    folder = write_run(tmp_path / "r", lines, found)
    (folder / "config.1.yaml").write_text("train: {lr: 0.2}\n")
    page = Page(write_report(folder).read_text())
    assert "Layer act1 is almost silent: 0.10 % of its neurons fire in a step." in page.text
    assert "Layer layer1.0.act1 fires almost always" in page.text and "2 steps were skipped" in page.text
    assert "1 images could not be read" in page.text and "resumed with another configuration" in page.text
    assert ["train.lr", "0.2", "0.1"] in page.table("Field", "Was", "Became")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [("summary.json", "{", "summary.json is not JSON"), ("raster.json", "[]", "raster.json holds list"),
     ("config.yaml", "a: [", "config.yaml is not YAML"), ("config.yaml", "- a", "holds no configuration")],
)  # fmt: skip
def test_a_damaged_file_is_named(name, text, message, tmp_path):
    folder = write_run(tmp_path / "r", joint(), summary(), raster())
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        write_report(folder)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is not the folder of a run: config\.yaml is missing"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dark", [False, True])
def test_colours_have_enough_contrast(dark):
    colours = {role: pair[dark] for role, pair in Palette(12).colours.items()}
    texts = ["ink", "muted", "link", "teacher", "student", *(f"tap{i}" for i in range(12))]
    for role in texts:  # 4.5: normal text, WCAG AA
        assert contrast(colours[role], colours["surface"]) >= 4.5, role
    for role in ("ink", "muted"):
        assert contrast(colours[role], colours["page"]) >= 4.5, role
    for i in range(len(LEVELS)):
        assert contrast(colours[f"on-level{i}"], colours[f"level{i}"]) >= 4.5, i
    assert contrast(colours["axis"], colours["surface"]) >= 3  # 3: marks
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.478, abs=1e-3)  # the known borderline case


def test_levels_of_firing_rates_end_where_warnings_begin():
    assert [level_of(rate) for rate in (0, SILENT - 1e-9, SILENT, 0.0999, 0.1, 0.5, 0.9499, 0.95, 1.0)] == [
        0, 0, 1, 2, 3, 6, 6, 7, 7]  # fmt: skip
    assert (LEVELS[0][1], LEVELS[-2][1]) == (SILENT, SATURATED)


def test_labels_move_apart_as_little_as_it_takes():
    assert spread_apart([10, 50], 12, 0, 100) == [10, 50]
    assert spread_apart([50, 50, 10], 12, 0, 100) == [50, 62, 10]
    assert spread_apart([99, 98], 12, 0, 100) == [100, 88]
    assert spread_apart([5, 5, 5], 60, 0, 100) == [0, 50, 100]  # no room: evenly


def test_numbers_and_names_are_written_for_people():
    assert [figures(v) for v in (0, 0.01234, 12.345, 999.4, 123456, 2.5e-12, math.nan, None)] == [
        "0", "0.0123", "12.3", "999", "123,000", "2.50e-12", "\u2013", "\u2013"]  # fmt: skip
    assert (percent(98.874), share(0.1234), percent(True)) == ("98.87\u00a0%", "12.3\u00a0%", "\u2013")
    assert [duration(s) for s in (93, 3600, 9000)] == ["93\u00a0s", "60\u00a0min", "2.5\u00a0h"]
    assert shortened("abcdefghij", 7) == "abc\u2026hij" and shortened("abc", 3) == "abc"
    names = [f"stages_1.blocks.{i}.act" for i in (0, 11)]
    assert abbreviated(names, 30) == names and abbreviated(names, 9) == ["\u20260\u2026", "\u202611\u2026"]
    assert abbreviated(["teacher", "a.b"], 5) == ["te\u2026er", "a.b"]
    assert cleaned({"a\x1b": ["\ud800", 1, None, "\u4e2d\U0001f600"]}) == {
        "a\ufffd": ["\ufffd", 1, None, "\u4e2d\U0001f600"]
    }
