"""Pages stand alone, say what they are given, and work in a browser without a network."""

import base64
import io
import re
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import pytest
from nbformat import v4
from PIL import Image

from mlrpl import drawing, tables
from mlrpl.config import load_study
from mlrpl.errors import StudyError
from mlrpl.report import LONG_TABLE, HomeEntry, Link, Picture, Section, notebook_to_html, write_home, write_index
from mlrpl.study_report import remarks, write_overview

ROOT = Path(__file__).parents[1]
WIDE = pd.DataFrame([[f"{10 * row + column:.3f}" for column in range(14)] for row in range(3)])


@pytest.fixture
def picture(tmp_path):
    figure, axes = plt.subplots(figsize=(12, 3))
    axes.plot([0, 1])
    for kind in ("svg", "png"):
        figure.savefig(tmp_path / f"curve.{kind}")
    plt.close(figure)
    return tmp_path / "curve.svg"


@pytest.fixture
def index(tmp_path, picture):
    """A study's page with one of everything; tables and figures wider than a phone."""
    table = pd.DataFrame(
        {
            "Case": ["case-2", "case-10", "case-1", "case-3"],
            "Dice (%)": ["9.50 ± 0.10", "—", "81.25", "70.31 ± 1.20"],
            "95HD (mm)": [12.0, 6.914, float("nan"), 3.0],
            "Change": ["−2.5", "1.0", "-10.25", "0"],
            "Cells": [1234, 5, 60, 700],
            "Seeds": ["9.28, 79.40", "50", "—", "12.00, 80.00"],
            "p": ["0.064", "—", "<0.001", "0.5"],
        }
    )
    runs = pd.DataFrame({"Run": [Link("mlrpl-4-s0", "runs/mlrpl-4-s0.html")], "Key": ["0" * 200]})
    write_index(
        tmp_path / "phantom" / "index.html",
        title="Phantom <tour>",
        lead="A *lead* with <b>angles</b>.",
        sections=[
            Section("Results & more", "Mean ± sd, **bold**.", table=table, caption="Test cases."),
            Section("Learning", figures=[Picture(picture, "Curves."), Picture(picture.with_suffix(".png"))]),
            Section("Runs", "| a | b |\n|---|---|\n| 1 | 2 |", table=runs, links=[Link("Training", "train.html")]),
        ],
        provenance={"commit": "c0ffee", "versions": {"torch": "2"}, "adopted": False, "cuda": None, "jobs": [1, 2]},
        home="../index.html",
    )
    return tmp_path / "phantom" / "index.html"


@pytest.fixture
def page(tmp_path):
    """An executed notebook as a page."""
    stream, display = v4.new_output, v4.new_output
    styled = tables.show(WIDE).to_html()
    cells = [
        v4.new_markdown_cell("# Training\n\nOne *run* of <i>several</i>."),
        v4.new_code_cell(
            'RUNS = "/home/someone/my runs"\nRESULTS = "../results"', metadata={"tags": ["injected-parameters"]}
        ),
        v4.new_code_cell(
            "a_rather_long_name = " + " + ".join(f"number_{i}" for i in range(40)),
            outputs=[
                stream("stream", name="stderr", text="progress: noise"),
                stream("stream", name="stdout", text=" 1%\r50%\rdone\nloss < 0.3\n"),
                display(
                    "display_data",
                    data={"application/vnd.jupyter.widget-view+json": {"model_id": "m"}, "text/plain": "bar 3/3"},
                ),
                display("execute_result", data={"text/plain": "'<script>window.injected = 1</script>'"}),
            ],
        ),
        v4.new_code_cell("frame", outputs=[display("execute_result", data={"text/html": styled, "text/plain": "no"})]),
        v4.new_markdown_cell("Within 95 % of it."),
        v4.new_code_cell("said", outputs=[display("execute_result", data={"text/markdown": "Of them 49 % are."})]),
    ]
    nbformat.write(v4.new_notebook(cells=cells), tmp_path / "train.ipynb")
    notebook_to_html(tmp_path / "train.ipynb", tmp_path / "pages" / "train.html", "Train <s0>", "../index.html")
    return tmp_path / "pages" / "train.html"


@pytest.fixture
def overview(tmp_path):
    dice = pd.DataFrame({"Method": ["MLRPL"], "4 labelled: last weights": ["79.61 ± 6.78"]})
    entries = [
        HomeEntry("Phantom", "phantom/index.html", "Volumes **drawn** from a seed.", dice),
        HomeEntry("LA", "la/index.html"),
    ]
    write_home(tmp_path / "index.html", title="All studies", lead="What was measured.", entries=entries)
    return tmp_path / "index.html"


def test_index_says_what_it_was_given_and_escapes_it(index):
    html = index.read_text(encoding="utf-8")
    assert "<title>Phantom &lt;tour&gt;</title>" in html
    assert "A <em>lead</em> with &lt;b&gt;angles&lt;/b&gt;." in html
    assert '<a href="#results-more">Results &amp; more</a>' in html
    assert "<td>6.91</td>" in html
    assert "<td>12.00</td>" in html
    assert "<td>1234</td>" in html
    assert html.count("<td>—</td>") == 5  # texts, a missing distance, and in the provenance
    assert '<td><a href="runs/mlrpl-4-s0.html">mlrpl-4-s0</a></td>' in html
    facts = {"commit": "c0ffee", "versions.torch": "2", "adopted": "no", "cuda": "—", "jobs": "1, 2"}
    for name, value in facts.items():
        assert f'<th scope="row">{name}</th><td>{value}</td>' in html
    assert '<a href="../index.html">← All studies</a>' in html
    assert "For research, not for diagnosis" in html


def test_notebook_page_leaves_out_noise_and_folds_code(page):
    html = page.read_text(encoding="utf-8")
    assert "noise" not in html
    assert "bar 3/3" not in html
    assert "50%" not in html
    assert "done\nloss &lt; 0.3" in html
    assert "&lt;script&gt;window.injected" in html
    assert "<title>Train &lt;s0&gt;</title>" in html
    assert "someone" not in html
    assert '>"…/my runs"<' in html
    assert "../results" in html
    assert '<a href="../index.html">← Study</a>' in html
    assert html.count('<details class="code">') == 4
    assert "Within 95\u00a0% of it" in html and "Of them 49\u00a0% are" in html  # no line breaks before a per cent sign
    assert "<summary>Parameters of this run</summary>" in html
    assert "For research, not for diagnosis" in html


def test_overview_links_the_studies(overview):
    html = overview.read_text(encoding="utf-8")
    assert '<a href="phantom/index.html">Phantom</a>' in html
    assert "Volumes <strong>drawn</strong> from a seed." in html
    assert html.count("<table") == 1 and "<td>79.61 ± 6.78</td>" in html


@pytest.mark.parametrize("kind", ["index", "page", "overview"])
def test_pages_refer_to_nothing_outside(kind, request):
    html = request.getfixturevalue(kind).read_text(encoding="utf-8")
    assert re.findall(r"<(?:script|link|iframe)[^>]*(?:src|href)=", html) == []
    pictures = re.findall(r'<img[^>]*src="([^"]*)', html)
    assert [source[:20] for source in pictures if not source.startswith("data:")] == []
    assert "@import" not in html
    assert re.findall(r"url\((?!%23)", html) == []  # %23 is #: a part of the same SVG


def test_same_input_same_bytes(index, page, tmp_path):
    before = page.read_bytes()
    notebook_to_html(tmp_path / "train.ipynb", page, "Train <s0>", "../index.html")
    assert page.read_bytes() == before


def test_failing_cell_shows_its_error(tmp_path):
    error = v4.new_output("error", ename="E", evalue="bad", traceback=["\x1b[31mE\x1b[0m: a < b"])
    nbformat.write(v4.new_notebook(cells=[v4.new_code_cell("1/0", outputs=[error])]), tmp_path / "n.ipynb")
    notebook_to_html(tmp_path / "n.ipynb", tmp_path / "n.html", "Failed", "index.html")
    html = (tmp_path / "n.html").read_text(encoding="utf-8")
    assert re.search(r'class="error">\s*<span class="ansi-red-fg">E</span>: a &lt; b', html)


def test_pages_hold_the_pixels_of_a_png_in_fewer_bytes(tmp_path, picture):
    picture = picture.with_suffix(".png")
    content = base64.b64encode(picture.read_bytes()).decode()
    shown = v4.new_output("display_data", data={"image/png": content}, metadata={"image/png": {"width": 130}})
    nbformat.write(v4.new_notebook(cells=[v4.new_code_cell("draw()", outputs=[shown])]), tmp_path / "n.ipynb")
    notebook_to_html(tmp_path / "n.ipynb", tmp_path / "n.html", "Drawn", "index.html")
    write_index(
        tmp_path / "i.html", title="t", lead="", sections=[Section("S", figures=[Picture(picture)])], provenance={}
    )
    for page in ("n.html", "i.html"):
        html = (tmp_path / page).read_text(encoding="utf-8")
        (embedded,) = re.findall(r'src="data:image/webp;base64,([^"]+)"', html)
        assert len(embedded) < len(content)
        with Image.open(io.BytesIO(base64.b64decode(embedded))) as ours, Image.open(picture) as original:
            assert ours.convert("RGBA").tobytes() == original.convert("RGBA").tobytes()


def test_bad_input_leaves_the_old_page(tmp_path, overview):
    old = overview.read_bytes()
    (tmp_path / "broken.ipynb").write_text("{ not a notebook")
    (tmp_path / "text.txt").write_text("no picture")
    for notebook, message in (("broken.ipynb", "not a notebook"), ("missing.ipynb", "cannot be read")):
        with pytest.raises(StudyError, match=message):
            notebook_to_html(tmp_path / notebook, overview, "t", "index.html")
    for name, message in (("missing.png", "cannot be read"), ("text.txt", "only .svg and .png")):
        section = Section("S", figures=[Picture(tmp_path / name)])
        with pytest.raises(StudyError, match=message):
            write_index(overview, title="t", lead="", sections=[section], provenance={})
    assert overview.read_bytes() == old


def test_unwritable_destination_leaves_nothing_behind(tmp_path):
    (tmp_path / "page").mkdir()  # a folder stands where the page should go
    with pytest.raises(OSError, match="directory"):
        write_home(tmp_path / "page", title="t", lead="", entries=[])
    assert [path.name for path in tmp_path.iterdir()] == ["page"]


# In a real browser, whose every connection fails


@pytest.mark.parametrize("width", [1600, 1200, 390])
@pytest.mark.parametrize("kind", ["index", "page", "overview"])
def test_page_fits_and_loads_without_a_network(kind, width, request, browser):
    browser.open(request.getfixturevalue(kind), width=width, mobile=width < 500)
    assert browser.problems == []
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    assert browser.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert browser.evaluate("window.injected") is None
    hanging = "[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, details'))"
    assert browser.evaluate(f"{hanging}.every(e => e.getBoundingClientRect().right <= innerWidth)")
    if kind == "page":  # unfolded code scrolls in its own box
        browser.click("#all-code")
        assert browser.evaluate("document.documentElement.scrollWidth") == width


KINDS = {  # of the pages that are committed
    "overview": "results/index.html",
    "study": "results/*/index.html",
    "notebook": "results/*/0[1-7]-*.html",
    "run": "results/*/runs/*.html",
}


@pytest.mark.parametrize("kind", KINDS)
def test_committed_pages_work_on_a_phone_without_a_network(kind, browser):
    pages = sorted(ROOT.glob(KINDS[kind]))
    if not pages:
        pytest.skip("no results are committed")
    by_name = {re.sub(r".*-(?=train|evaluate)", "", page.name): page for page in pages}  # one of each kind
    for page in by_name.values():
        browser.open(page, width=390, mobile=True)
        assert browser.problems == [], page
        assert browser.evaluate("document.documentElement.scrollWidth") == 390, page
        assert browser.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)"), page
        links = browser.evaluate("[...document.querySelectorAll('a[href]')].map(a => a.getAttribute('href'))")
        local = [link for link in links if not link.startswith(("#", "http"))]
        assert [link for link in local if not (page.parent / link.partition("#")[0]).exists()] == [], page


def test_the_network_really_is_cut(tmp_path, browser):
    """What the tests above look for is seen when it is there."""
    (tmp_path / "bad.html").write_text('<img src="https://example.org/a.png"><script>console.error("x"); no()</script>')
    browser.open(tmp_path / "bad.html")
    browser.evaluate("new Promise(done => setTimeout(done, 200))")
    text = "\n".join(browser.problems)
    for seen in ("asks for https://example.org/a.png", "Uncaught", "'value': 'x'"):
        assert seen in text


def column(browser, number: int, table: int = 0) -> list[str]:
    return browser.evaluate(
        f"[...document.querySelectorAll('table.data, table.dataframe')[{table}].tBodies[0].rows]"
        f".map(row => row.cells[{number}].textContent)"
    )


@pytest.mark.parametrize(
    ("number", "ascending", "descending"),
    [
        (0, ["case-1", "case-2", "case-3", "case-10"], ["case-10", "case-3", "case-2", "case-1"]),
        (1, ["9.50 ± 0.10", "70.31 ± 1.20", "81.25", "—"], ["81.25", "70.31 ± 1.20", "9.50 ± 0.10", "—"]),
        (2, ["3.00", "6.91", "12.00", "—"], ["12.00", "6.91", "3.00", "—"]),
        (3, ["-10.25", "−2.5", "0", "1.0"], ["1.0", "0", "−2.5", "-10.25"]),
        (4, ["5", "60", "700", "1234"], ["1234", "700", "60", "5"]),
        (5, ["9.28, 79.40", "12.00, 80.00", "50", "—"], ["50", "12.00, 80.00", "9.28, 79.40", "—"]),
        (6, ["<0.001", "0.064", "0.5", "—"], ["0.5", "0.064", "<0.001", "—"]),
    ],
)
def test_table_sorts_on_click(number, ascending, descending, index, browser):
    browser.open(index)
    head = f"table.data th:nth-child({number + 1})"
    browser.click(head)
    assert column(browser, number) == ascending
    assert browser.evaluate(f"document.querySelector('{head}').ariaSort") == "ascending"
    browser.click(head)
    assert column(browser, number) == descending
    browser.click("table.data th:nth-child(1)")
    assert browser.evaluate("document.querySelectorAll('[aria-sort]').length") == 1


def test_only_a_long_table_is_folded_and_unfolds_and_sorts(tmp_path, browser):
    short, long = (pd.DataFrame({"Run": map(str, range(rows))}) for rows in (LONG_TABLE, LONG_TABLE + 1))
    sections = [Section("Short", table=short), Section("Long", table=long)]
    write_index(tmp_path / "index.html", title="Runs", lead="", sections=sections, provenance={})
    browser.open(tmp_path / "index.html")
    shown = "[...document.querySelectorAll('table.data')].map((table) => table.checkVisibility())"
    assert browser.evaluate(shown) == [True, False]
    assert browser.evaluate("document.querySelector('summary').textContent") == f"Show all {LONG_TABLE + 1} rows"
    browser.click("summary")
    assert browser.evaluate(shown) == [True, True]
    for _ in range(2):
        browser.click("details th")
    first = "document.querySelector('details table').tBodies[0].rows[0].textContent.trim()"
    assert browser.evaluate(first) == str(LONG_TABLE)


def test_numbers_stand_to_the_right_and_names_to_the_left(index, browser):
    browser.open(index)
    align = "getComputedStyle(document.querySelector('table.data').tBodies[0].rows[0].cells[{}]).textAlign"
    assert [browser.evaluate(align.format(number)) for number in range(7)] == ["left", *["right"] * 6]


def test_notebook_tables_sort_too(page, browser):
    browser.open(page)
    head = "table.dataframe th:nth-child(1)"
    browser.click(head)
    browser.click(head)
    assert column(browser, 0) == ["20.000", "10.000", "0.000"]
    align = "getComputedStyle(document.querySelector('table.dataframe tbody td')).textAlign"
    assert browser.evaluate(align) == "right"


def test_code_unfolds_by_cell_and_all_at_once(page, browser):
    browser.open(page)
    visible = "[...document.querySelectorAll('details.code .highlight')].map(e => e.checkVisibility())"
    label = "document.getElementById('all-code').textContent"
    assert browser.evaluate(visible) == [False] * 4
    browser.click("details.code summary")
    assert browser.evaluate(visible) == [True, *[False] * 3]
    browser.click("#all-code")
    assert browser.evaluate(visible) == [True] * 4
    assert browser.evaluate(label) == "Hide all code"
    browser.click("#all-code")
    assert browser.evaluate(visible) == [False] * 4
    assert browser.evaluate(label) == "Show all code"


def test_on_a_phone_small_pictures_shrink_and_wide_ones_scroll(tmp_path, picture, browser):
    figure, axes = plt.subplots(figsize=(5, 3))
    axes.plot([0, 1])
    figure.savefig(tmp_path / "small.svg")
    plt.close(figure)
    pictures = [Picture(tmp_path / "small.svg"), Picture(picture)]
    write_index(tmp_path / "i.html", title="t", lead="", sections=[Section("S", figures=pictures)], provenance={})
    browser.open(tmp_path / "i.html", width=390, mobile=True)
    small, wide = browser.evaluate("[...document.images].map(image => image.getBoundingClientRect().width)")
    assert 300 < small < 390
    assert wide > 500
    assert browser.evaluate("document.documentElement.scrollWidth") == 390


def test_a_wide_table_takes_the_free_place_beside_the_column(index, browser):
    right, tables = "e => e.getBoundingClientRect().right", "document.querySelectorAll('.scroll:has(> table)')"
    for width, beyond in ((1600, True), (1100, False)):
        browser.open(index, width=width)
        column, boxes = browser.evaluate(f"[({right})(document.querySelector('nav')), [...{tables}].map({right})]")
        assert max(boxes) <= width
        assert [box > column + 1 for box in boxes[:2]] == [False, beyond]  # of a small table and of a wide one


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_pictures_are_shown_at_one_scale(tmp_path, kind, browser):
    """So that letters are as large in a narrow figure as in a wide one, whichever file is embedded."""
    for name, inches in (("narrow", 4.0), ("full", 7.2)):
        figure = plt.figure(figsize=(inches, 3))
        drawing.save(figure, tmp_path, name)
        plt.close(figure)
    pictures = [Picture(tmp_path / f"{name}.{kind}") for name in ("narrow", "full")]
    write_index(tmp_path / "i.html", title="t", lead="", sections=[Section("S", figures=pictures)], provenance={})
    browser.open(tmp_path / "i.html", width=1400)
    widths = browser.evaluate("[...document.images].map(image => image.getBoundingClientRect().width)")
    assert widths == pytest.approx([4 * drawing.SCREEN, 7.2 * drawing.SCREEN], abs=1)


def test_provenance_is_folded(index, browser):
    browser.open(index)
    shown = "document.querySelector('.provenance table').checkVisibility()"
    assert not browser.evaluate(shown)
    browser.click(".provenance summary")
    assert browser.evaluate(shown)


def test_remarks_tell_what_hinders_a_comparison():
    asked = list(load_study("smoke").runs())
    vnet, mlrpl = asked
    asked += [run.model_copy(update={"labelled": 3}) for run in asked] + [vnet.model_copy(update={"ablation": "a"})]
    runs = pd.DataFrame({"commit": ["abc", "abc+changes", "abc"], "precision": ["float32", "bfloat16", "float32"]})
    runs["device"] = ["CPU: A", "CPU: B", "CPU: A"]
    runs = runs.assign(title=[vnet.title, mlrpl.title, vnet.title], labelled=[2, 2, 3])
    said = remarks(asked, runs)
    assert "3 of 5 runs finished. None yet of these: with 3 labelled MLRPL. " in said
    assert "1 run made with uncommitted changes" in said
    assert "different precisions** (2 runs: float32; 1 run: bfloat16)" in said
    assert "different hardware (2 runs: CPU: A; 1 run: CPU: B)" in said
    assert remarks([vnet, asked[2]], runs.iloc[[0, 2]]) == ""


def test_the_overview_shows_each_studys_dice_and_goes_without_where_it_has_no_table(tmp_path):
    for name in ("another", "cut", "whole", "speed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "index.html").write_text(name)
    for name in ("another", "cut", "whole"):
        (tmp_path / name / "runs.csv").write_text("run,key\na,1\nb,2\n")
    (tmp_path / "whole" / "provenance.json").write_text('{"title": "Whole", "asked": 3}')
    (tmp_path / "speed" / "provenance.json").write_text('{"title": "Speed", "summary": "how fast"}')
    header = "Labelled,Method,Seeds,Selection,Output,Dice (%),Cases"
    rows = ["NA,1,last,decoder 1,79.50,10", "NA,1,published,decoder 1,80.10,10", "NA,1,last,mean of decoders,81.00,10"]
    for name, paper in {"another": "", "whole": "—"}.items():
        (tmp_path / name / "tables").mkdir()
        lines = [f"4,{row}" for row in rows]
        if paper:  # a study of the paper's data comes first
            header, lines = (
                f"{header},Paper: Dice (%)",
                [f"{line},{89.86 if 'published' in line else paper}" for line in lines],
            )
        (tmp_path / name / "tables/comparison.csv").write_text("\n".join([header, *lines]))
    write_overview(tmp_path)
    html = (tmp_path / "index.html").read_text(encoding="utf-8")
    places = [html.index(f'href="{name}/index.html"') for name in ("whole", "another", "cut", "speed")]
    assert places == sorted(places) and html.count("<table") == 2
    assert "10 test cases; 2 of 3 runs" in html and "how fast" in html
    assert all(f"<td>{text}</td>" in html for text in ("NA", "79.50", "80.10")) and "81.00" not in html
