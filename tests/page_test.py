"""The report's page: what it is made of, and what it does in a real browser."""

import base64
import dataclasses
import json
import math
import re
import shutil
from collections.abc import Iterator
from decimal import Decimal
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from playwright.sync_api import Browser, ConsoleMessage, sync_playwright
from playwright.sync_api import Page as Tab

from gradjax.errors import GradjaxError
from gradjax.report import page as page_module
from gradjax.report.page import FigureImage, Page, Table, render, visible, write_page

CHROMIUM = shutil.which("chromium")
in_browser = pytest.mark.skipif(
    CHROMIUM is None,
    reason="NO BROWSER, THE PAGE IS UNTESTED: there is no chromium here (apt-get install chromium)",
)

ATTACKS = [
    "<script>window.pwned = 1</script>",
    "</script><script>window.pwned = 2</script>",
    "<!--<script>window.pwned = 3//-->",
    "<img src=x onerror='window.pwned = 4'>",
    '"><svg onload="window.pwned = 5">',
    "'-window.pwned=6-'",
    "{{ 7 * 7 }}{% raw %}${window.pwned = 7}",
    "]]></style><style>body { display: none }</style>",
    '<iframe srcdoc="<script>parent.pwned = 8</script>"></iframe>',
    "<meta http-equiv=refresh content='0;url=http://127.0.0.1:9/'><base href=//127.0.0.1:9>",
    "<link rel=stylesheet href=http://127.0.0.1:9/a.css><img src=http://127.0.0.1:9/b.png>",
    "&lt;b&gt; &amp;amp; \\u003cb\\u003e \\",
    "\0\x01\x07\x08\x0b\x0c\r\x1b[31m\x7f\x85\x9f",
    "\u202eevil\u202c \u2066isolated\u2069 \u200f\u061c",
    "שלום <b>עולם</b>\nمرحبا",
    "line\u2028paragraph\u2029end\ufeff\ufffe",
    "unpaired \ud800 and \udfff",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 👩‍👩‍👧 e\u0301",
    "w" * 3000,
    "",
]
SVG = b"""<svg xmlns="http://www.w3.org/2000/svg" width="1200" height="300" onload="pwned = 9">
<script>parent.pwned = 10</script><image href="http://127.0.0.1:9/c.png"/>
<rect width="1200" height="300" fill="teal"/></svg>"""
NUMBERS = ["num_tokens", "num_target_tokens", "loss", "effective_rank", "nuclear_norm"]


def examples_of(count: int, texts: list[str]) -> pd.DataFrame:
    """Rows of two groups; every seventh is unusable, and its numbers are null."""
    random = np.random.default_rng(0)
    row = np.arange(count)
    frame = pd.DataFrame(
        {
            "group": np.where(row % 3 == 0, "low", "high"),
            "example_id": row,
            "status": np.where(row % 7 == 3, "invalid_row", "ok"),
            "reason": np.where(row % 7 == 3, "field 'output' is missing", ""),
            "num_tokens": random.integers(5, 2000, count).astype(float),
            "num_target_tokens": random.integers(1, 5, count).astype(float),
            "truncated": pd.Series(row % 5 == 0, dtype=object),
            "loss": random.normal(2, 0.5, count),
            "effective_rank": random.normal(90, 40, count),
            "nuclear_norm": 10 ** random.normal(0, 4, count),
            "instruction": pd.Series([texts[i % len(texts)] for i in row], dtype=object),
            "output": pd.Series([texts[(i + 1) % len(texts)] for i in row], dtype=object),
        }
    )
    frame.loc[row % 7 == 3, [*NUMBERS, "truncated", "output"]] = None
    return frame


def page_of(examples: pd.DataFrame, text: str = "plain", **changed: Any) -> Page:
    """A page with `text` wherever there is a text."""
    table = pd.DataFrame([(text, 3, 1 / 3), ("b", 4567, math.nan)], dtype=object)
    table.columns = pd.Index([f"a {text}", "n_high", "gap"], dtype=object)
    page = Page(
        title=f"Report {text}",
        answers=pd.DataFrame(
            {"comparison": [f"high against low {text}"], "pairs": [7]}, dtype=object
        ),
        verdicts=[f"high against low {text}: yes.", "slow against fast: undecided."],
        overview=[FigureImage(f"Forest {text}", SVG), FigureImage(f"By layer {text}", SVG)],
        rule=f"First {text}.\n\nSecond.",
        tables=[Table(f"Table {text}", f"Note {text}", table)],
        figures=[FigureImage(f"Figure {text}", SVG)],
        examples=examples,
        outliers=examples.head(2).assign(why=pd.Series([f"large {text}"] * 2, dtype=object)),
        not_used=pd.DataFrame([("low", "invalid_row", text, 18)], dtype=object).set_axis(
            ["group", "status", "reason", "rows"], axis=1
        ),
        manifest={"settings": {"model": text}},
    )
    return dataclasses.replace(page, **changed)


class Reader(HTMLParser):
    """Python's own reading of a page: its elements, its text, and its JSON."""

    def __init__(self, html: str):
        super().__init__()
        self.elements: list[str] = []
        self.text = ""
        self.data: list[Any] = []
        self._json = False
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]):
        self.elements.append(" ".join([tag, *(name for name, _ in attrs)]))
        self._json = ("type", "application/json") in attrs

    def handle_endtag(self, tag: str):
        self._json = False

    def handle_data(self, data: str):
        self.text += data
        if self._json:
            self.data.append(json.loads(data))


class TestMadeOf:
    @given(st.text() | st.sampled_from(ATTACKS))
    @settings(max_examples=50, deadline=None)
    def test_a_text_is_only_ever_text(self, text: str):
        examples = examples_of(3, ["plain", text])
        found = Reader(render(page_of(examples, text)))
        plain = Reader(render(page_of(examples_of(3, ["plain", "plain"]))))
        assert found.elements == plain.elements
        shown = visible(text)
        assert found.data[0][0][-2:] == ["plain", shown]
        assert f"Report {shown}" in found.text
        assert f"Figure {shown}" in found.text

    def test_control_characters_are_spelled_out_everywhere(self):
        text = "".join(ATTACKS)
        html = render(page_of(examples_of(5, ATTACKS), text))
        acting = re.compile(r"[^\n\t -\x7e\xa0-\u2029\u202f-\u2065\u206a-\ud7ff\ue000-\U0010ffff]")
        assert not acting.search(html)
        assert html.count(r"\x1b[31m\x7f\x85\x9f") >= 10
        assert r"\u202eevil\u202c" in html
        assert visible("tab\tand\nline, עולם\u200f") == "tab\tand\nline, עולם\u200f"

    def test_numbers_have_four_digits(self):
        frame = pd.DataFrame(
            {"p": [1 / 3, 2e-9], "n": [12345, 7], "gap": [math.nan, 1234.56], "is": [True, False]}
        )
        html = render(page_of(examples_of(3, ["x"]), tables=[Table("T", "N", frame)]))
        rows = re.findall(r"<tr>\n((?:<td .*\n)+)</tr>", html)
        cells = [re.findall(r"<td (\S+)>(.*)</td>", row) for row in rows[1:3]]
        right, left = 'class="number"', 'dir="auto"'
        assert cells[0] == [(right, "0.3333"), (right, "12345"), (right, "–"), (left, "yes")]
        assert cells[1] == [(right, "2.000e-09"), (right, "7"), (right, "1235"), (left, "no")]

    def test_the_page_says_what_there_is_none_of(self):
        examples = examples_of(3, ["x"])
        empty = page_of(
            examples,
            overview=[],
            verdicts=[],
            outliers=examples.head(0).assign(why=""),
            not_used=pd.DataFrame(),
        )
        text = Reader(render(empty)).text
        for said in ("No groups were compared.", "There are none.", "Every row was used."):
            assert said in text

    def test_infinities_are_unknown(self):
        examples = examples_of(3, ["x"])
        examples.loc[0, "loss"] = math.inf
        assert Reader(render(page_of(examples))).data[0][0][7] is None


class TestSize:
    def test_ten_thousand_examples_fit(self, tmp_path: Path):
        kinds = ["<b>&'" * 1000, "文" * 5000, "word " * 1500, "short", "x\0" + "y" * 4000]
        examples = examples_of(10_000, kinds)
        write_page(tmp_path / "report.html", page_of(examples))
        html = (tmp_path / "report.html").read_text()
        size = len(html.encode())
        assert 13_000_000 < size < 15_000_000
        found = Reader(html)
        rows = found.data[0]
        assert len(rows) == 10_000
        (characters,) = {len(row[-2]) - 1 for row in rows if row[-2][0] in "<文w"}
        said = f"texts are cut to their first {characters:,} characters"
        originals = [*examples["instruction"], *examples["output"].dropna()]
        originals += [*examples["instruction"][:2], *examples.head(2)["output"].dropna()]
        long = sum(len(text) > characters for text in originals)
        assert f"{long:,} of {len(originals):,} {said}" in found.text
        for row, text in zip(rows, examples["instruction"], strict=True):
            cut = text[:characters] + "…" if len(text) > characters else text
            assert row[-2] == visible(cut)

    def test_short_texts_are_whole_and_nothing_is_said(self):
        found = Reader(render(page_of(examples_of(11, ["x" * 999]))))
        assert found.data[0][0][-1] == "x" * 999
        assert "to keep this page small" not in found.text

    def test_more_examples_are_thinned_evenly(self):
        found = Reader(render(page_of(examples_of(20_011, ["x"]))))
        numbers = np.array([row[1] for row in found.data[0]])
        assert len(numbers) == 10_000
        assert (numbers[0], numbers[-1]) == (0, 20_010)
        assert set(np.diff(numbers)) == {2, 3}
        assert "10,000 of 20,011 examples are listed, evenly spaced" in found.text

    def test_many_long_reasons_are_cut(self):
        reasons = [f"{n} {'z' * 9999}" for n in range(211)]
        not_used = pd.DataFrame({"status": "too_long", "reason": reasons})
        html = render(page_of(examples_of(3, ["x"]), not_used=not_used))
        assert "The first 200 of 211 reasons" in html
        assert len(html) < 200_000
        assert "199 zzz" in html
        assert "200 zzz" not in html

    def test_large_figures_leave_less_for_texts(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(page_module, "PAGE_BYTES", 200_000)
        examples = examples_of(101, ["y" * 2000])
        figures = [FigureImage("large", b"<svg>" + b" " * 30_000 + b"</svg>")]
        lengths = []
        for page in (page_of(examples), page_of(examples, figures=figures)):
            html = render(page)
            assert len(html) < 200_000
            lengths.append(len(Reader(html).data[0][0][-1]))
        assert lengths[0] > lengths[1] > 100


class TestWriting:
    def test_replaces_an_earlier_page_and_leaves_nothing_else(self, tmp_path: Path):
        path = tmp_path / "report.html"
        path.write_text("earlier")
        page = page_of(examples_of(3, ["x"]))
        write_page(path, page)
        assert path.read_text() == render(page)
        assert list(tmp_path.iterdir()) == [path]

    def test_a_fault_is_one_sentence_and_leaves_nothing(self, tmp_path: Path):
        (tmp_path / "report.html").mkdir()
        with pytest.raises(GradjaxError, match=r"report\.html cannot be written .*--output_dir"):
            write_page(tmp_path / "report.html", page_of(examples_of(3, ["x"])))
        assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def examples() -> pd.DataFrame:
    return examples_of(127, ATTACKS)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, examples: pd.DataFrame) -> str:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_page(path, page_of(examples, "".join(ATTACKS)))
    return path.as_uri()


@dataclasses.dataclass
class Noticed:
    """What a tab says and asks for."""

    messages: list[str] = dataclasses.field(default_factory=list)
    requests: list[str] = dataclasses.field(default_factory=list)

    def watch(self, tab: Tab) -> None:
        def on_console(message: ConsoleMessage) -> None:
            self.messages.append(message.text)

        tab.on("console", on_console)
        tab.on("pageerror", lambda error: self.messages.append(str(error)))
        tab.on("dialog", lambda dialog: self.messages.append(dialog.message))
        tab.on("request", lambda request: self.requests.append(request.url))


@pytest.fixture
def noticed() -> Noticed:
    return Noticed()


@pytest.fixture
def tab(browser: Browser, url: str, noticed: Noticed) -> Iterator[Tab]:
    """The page, opened; whatever a test does with it, nothing of the data ran."""
    tab = browser.new_page(viewport={"width": 1100, "height": 800})
    tab.set_default_timeout(10_000)
    noticed.watch(tab)
    tab.goto(url)
    yield tab
    assert tab.evaluate("window.pwned === undefined")
    assert tab.url.partition("#")[0] == url
    assert noticed.messages == []
    assert {r for r in noticed.requests if not r.startswith("data:")} == {url}
    tab.close()


def column(tab: Tab, label: str, section: str = "Examples") -> list[str]:
    """The texts of a list's column, as a reader of its page of rows sees them."""
    return tab.evaluate(
        """([section, label]) => {
            const region = document.querySelector(`[role=region][aria-label=${section}]`);
            const labels = [...region.querySelectorAll("th")].map((th) => th.textContent);
            const at = labels.indexOf(label);
            const rows = [...region.querySelectorAll("tbody tr")];
            return rows.map((row) => row.cells[at].textContent);
        }""",
        [section, label],
    )


def line(tab: Tab) -> str:
    return tab.locator("output").first.inner_text()


def press(tab: Tab, name: str) -> None:
    """Clicks on a button of the examples, also one that says it can do nothing."""
    tab.get_by_role("button", name=name, exact=True).first.click(force=True)


def all_pages(tab: Tab, label: str) -> list[str]:
    press(tab, "first")
    found = column(tab, label)
    for _ in range(2):
        press(tab, "next")
        found += column(tab, label)
    return found


def as_shown(value: Any, digits: bool) -> str:
    """A number as JavaScript prints it."""
    if pd.isna(value):
        return "–"
    if not digits:
        return str(int(value))
    if 1e-6 <= abs(value) < 1e4:
        return f"{Decimal(f'{value:.3e}'):f}"
    mantissa, exponent = f"{value:.3e}".split("e")
    return f"{mantissa}e{int(exponent):+d}"


@in_browser
class TestInBrowser:
    def test_texts_of_the_data_are_shown_and_do_nothing(self, tab: Tab, examples: pd.DataFrame):
        opened: list[str] = []
        for _ in range(3):
            openers = tab.get_by_role("region", name="Examples").locator("td.opener button")
            openers.evaluate_all("all => all.forEach((opener) => opener.click())")
            opened += tab.locator(".texts div").all_text_contents()
            press(tab, "next")
        texts = examples[["instruction", "output"]].to_numpy().ravel()
        assert opened == ["–" if text is None else visible(text) for text in texts]
        assert tab.locator("img").count() == 3
        assert tab.locator("iframe, svg, base, main b").count() == 0
        loaded = "all => all.map((image) => image.complete && image.naturalWidth)"
        assert tab.locator("img").evaluate_all(loaded) == [1200] * 3
        assert tab.locator("h1").inner_text().startswith("Report <script>window.pwned = 1</script>")

    def test_were_markup_to_get_in_it_would_not_run(self, tab: Tab, noticed: Noticed):
        tab.evaluate(
            """() => {
                const holder = document.createElement("div");
                holder.innerHTML = "<img src=x onerror='window.pwned = 1' style='color: red'>"
                    + "<img src='http://127.0.0.1:9/d.png'>";
                document.body.append(holder);
                const script = document.createElement("script");
                script.textContent = "window.pwned = 2";
                document.body.append(script);
            }"""
        )
        tab.wait_for_timeout(100)
        assert tab.evaluate("window.pwned === undefined")
        assert len(noticed.messages) >= 4
        assert all("Content Security Policy" in message for message in noticed.messages)
        noticed.messages.clear()
        noticed.requests = [r for r in noticed.requests if r.endswith("report.html")]

    def test_verdicts_come_first_and_all_is_there_in_order(self, tab: Tab):
        headings = tab.locator("h2").all_inner_texts()
        assert headings == [
            *("Verdicts", "Tables", "Figures", "Examples", "Outliers", "Rows not used", "Manifest")
        ]
        assert tab.locator(".verdicts li").count() == 2
        places = tab.evaluate(
            """() => ["[aria-label=Verdicts] table", "figure", ".verdicts", "figure:nth-of-type(2)",
                ".rule", "#tables"].map((sought) =>
                document.querySelector(sought).getBoundingClientRect().top)"""
        )
        assert places == sorted(places)
        assert column(tab, "why", "Outliers")[0].startswith("large <script>")
        assert not tab.locator("pre").is_visible()
        tab.locator("details", has=tab.locator("pre")).locator("summary").click()
        assert '"model": "<script>' in tab.locator("pre").inner_text()

    @pytest.mark.parametrize(
        ("label", "name"),
        [("row", "example_id"), ("tokens", "num_tokens"), ("loss, nats per token", "loss")],
    )
    def test_sorts_numbers_with_nulls_last(
        self, tab: Tab, examples: pd.DataFrame, label: str, name: str
    ):
        header = tab.get_by_role("columnheader", name=label, exact=True).first
        assert header.get_attribute("aria-sort") is None
        for direction in ("ascending", "descending", "ascending"):
            press(tab, label)
            assert header.get_attribute("aria-sort") == direction
            expected = examples.sort_values(name, ascending=direction == "ascending")
            shown = [as_shown(value, digits=name == "loss") for value in expected[name]]
            assert all_pages(tab, label) == shown

    def test_sorts_text_and_numbers_out_of_range(self, tab: Tab, examples: pd.DataFrame):
        press(tab, "status")
        press(tab, "group")
        sort = examples.sort_values("status", kind="stable").sort_values("group", kind="stable")
        assert all_pages(tab, "row") == [str(row) for row in sort["example_id"]]
        assert tab.locator("[aria-sort]").count() == 1
        press(tab, "nuclear norm")
        norms = examples.sort_values("nuclear_norm")["nuclear_norm"]
        assert all_pages(tab, "nuclear norm") == [as_shown(norm, digits=True) for norm in norms]

    def test_searches_what_is_said_and_nothing_else(self, tab: Tab, examples: pd.DataFrame):
        search = tab.get_by_label("search").first
        texts = examples[["group", "status", "reason", "instruction", "output"]]
        words = texts.fillna("").map(visible).agg("\n".join, axis=1)
        words = words.str.lower() + "\n" + examples["example_id"].astype(str)
        for sought in ("INVALID", "onerror", "12", "עולם", "\\x1b[", "'", "<img"):
            search.fill(sought)
            found = examples["example_id"][words.str.contains(sought.lower(), regex=False)]
            assert column(tab, "row") == [str(row) for row in found[:50]]
            last = min(50, len(found))
            assert line(tab) == f"rows 1–{last} of {len(found)} found among 127"
        search.fill("nowhere to be found")
        assert column(tab, "row") == []
        assert line(tab) == "no rows found among 127"
        search.fill("")
        assert line(tab) == "rows 1–50 of 127"

    def test_histograms_filter(self, tab: Tab, examples: pd.DataFrame):
        section = tab.locator("section", has=tab.locator("#examples"))
        labels = section.locator(".histogram legend").all_inner_texts()
        assert labels == ["target tokens", "loss, nats per token", "effective rank", "nuclear norm"]
        for label, name in zip(labels, NUMBERS[1:], strict=True):
            values = examples[name].dropna()
            scaled = np.log(values) if values.min() > 0 else values
            if label == "target tokens":
                scaled = np.log1p(values)
            edges = np.linspace(scaled.min(), scaled.max(), 25)
            counts = np.histogram(scaled, edges)[0]
            box = section.locator(".histogram").nth(labels.index(label))
            heights = box.locator(".bars span").evaluate_all(
                "all => all.map((e) => e.clientHeight)"
            )
            np.testing.assert_allclose(heights, 48 * counts / counts.max(), atol=1.5)
            lower, upper = (
                tab.get_by_label(f"{label}, {end}", exact=True) for end in ("from", "to")
            )
            for handle, at in ((lower.first, 5), (upper.first, 17)):
                handle.fill(str(at))
            within = (scaled >= edges[5] - 1e-9) & (scaled < edges[17] - 1e-9)
            found = examples.loc[values.index[within], "example_id"]
            assert set(column(tab, "row")) <= set(map(str, found))
            assert f" of {len(found)} found among 127" in line(tab)
            assert box.locator(".bars .out").count() == 12
            lower.first.fill("20")  # no further than the other handle
            assert (lower.first.input_value(), upper.first.input_value()) == ("16", "17")
            tab.get_by_label("search").first.fill("no such text")
            assert line(tab) == "no rows found among 127"
            tab.get_by_label("search").first.fill("")
            lower.first.fill("0")
            upper.first.fill("24")
            assert line(tab) == "rows 1–50 of 127"  # those without a number, too

    def test_a_handle_moves_by_keys_and_says_where_it_is(self, tab: Tab):
        handle = tab.get_by_label("effective rank, from", exact=True).first
        handle.focus()
        before = handle.get_attribute("aria-valuetext")
        tab.keyboard.press("ArrowRight")
        assert handle.input_value() == "1"
        assert handle.get_attribute("aria-valuetext") != before
        assert "found among 127" in line(tab)

    def test_sorting_keeps_what_was_searched(self, tab: Tab, examples: pd.DataFrame):
        tab.get_by_label("search").first.fill("low")
        press(tab, "row")
        press(tab, "row")
        low = examples[examples["group"] == "low"]["example_id"][::-1]
        assert column(tab, "row") == [str(row) for row in low]
        assert tab.locator("output").nth(1).inner_text() == "rows 1–2 of 2"

    def test_turns_pages(self, tab: Tab):
        previous, following = (
            tab.get_by_role("button", name=name).first for name in ("previous", "next")
        )
        for name, range_, at_start, at_end in (
            ("previous", "1–50", "true", "false"),
            ("next", "51–100", "false", "false"),
            ("next", "101–127", "false", "true"),
            ("next", "101–127", "false", "true"),
            ("previous", "51–100", "false", "false"),
            ("last", "101–127", "false", "true"),
            ("first", "1–50", "true", "false"),
        ):
            press(tab, name)
            first, _, last = range_.partition("–")
            assert line(tab) == f"rows {range_} of 127"
            assert len(column(tab, "row")) == int(last) - int(first) + 1
            assert column(tab, "row")[0] == str(int(first) - 1)
            assert previous.get_attribute("aria-disabled") == at_start
            assert following.get_attribute("aria-disabled") == at_end

    def test_needs_no_mouse(self, tab: Tab, examples: pd.DataFrame):
        def focused() -> str:
            return tab.evaluate("document.activeElement.innerText")

        keyboard = tab.keyboard
        tab.get_by_label("search").first.focus()
        keyboard.type("ok")
        for expected in ("first", "previous", "next"):
            keyboard.press("Tab")
            assert focused() == expected
        ring = "(({outlineStyle, outlineWidth}) => [outlineStyle, outlineWidth])"
        assert tab.evaluate(f"{ring}(getComputedStyle(document.activeElement))") == ["solid", "3px"]
        keyboard.press("Enter")
        keyboard.press("Space")
        assert line(tab).startswith("rows 101–")
        assert focused() == "next"
        for _ in range(12):  # last, eight handles, the table's box if it scrolls, its headers
            keyboard.press("Tab")
            if focused() == "row":
                break
        assert focused() == "row"
        keyboard.press("Enter")
        keyboard.press("Space")
        used = examples[examples["status"] == "ok"]["example_id"][::-1]
        assert column(tab, "row") == [str(row) for row in used[:50]]
        while focused() != "text":
            keyboard.press("Tab")
        keyboard.press("Enter")
        assert tab.get_by_role("button", expanded=True).count() == 1
        assert tab.locator(".texts").is_visible()
        keyboard.press("Space")
        assert tab.locator(".texts").count() == 0

    def test_fits_a_phone(self, tab: Tab):
        tab.set_viewport_size({"width": 360, "height": 740})
        press(tab, "text of low, row 18")  # a very long word
        tab.locator("details", has=tab.locator("pre")).locator("summary").click()
        assert tab.evaluate("document.documentElement.scrollWidth") == 360
        figure = tab.locator("figure .scroll").first
        assert figure.get_attribute("tabindex") == "0"
        tab.set_viewport_size({"width": 1300, "height": 740})
        tab.wait_for_function("() => document.querySelector('figure .scroll').tabIndex === -1")
        tab.set_viewport_size({"width": 360, "height": 740})
        tab.wait_for_function("() => document.querySelector('figure .scroll').tabIndex === 0")
        assert figure.evaluate("e => [e.clientWidth < 360, e.scrollWidth > 500]") == [True, True]
        wide = tab.locator(".scroll").evaluate_all("all => all.map((e) => e.scrollWidth > 360)")
        assert any(wide)
        region = tab.get_by_role("region", name="Examples")
        for place in (0, 500):  # the text stays in view when its table is scrolled
            region.evaluate("(e, place) => { e.scrollLeft = place; }", place)
            first = region.locator("tbody tr td").first.bounding_box()
            assert first
            assert 0 <= first["x"] < 30  # as does whose row it is
            box = tab.locator(".texts").bounding_box()
            assert box
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= 360

    def test_is_legible_by_day_and_by_night(self, tab: Tab):
        press(tab, "text of high, row 1")
        pairs = {}
        for scheme in ("light", "dark"):
            tab.emulate_media(color_scheme=scheme)
            pairs[scheme] = tab.evaluate(COLOURS)
            assert len(pairs[scheme]) > 10
            for text, ground, where in pairs[scheme]:
                assert contrast(text, ground) >= 4.5, f"{where}, {scheme}"
        assert luminance(pairs["light"][0][1]) > 0.8 > 0.2 > luminance(pairs["dark"][0][1])
        tab.emulate_media(color_scheme="dark", media="print")
        for text, ground, where in tab.evaluate(COLOURS):
            assert luminance(text) < 0.5 < luminance(ground), where

    def test_prints_without_controls(self, tab: Tab):
        tab.emulate_media(media="print")
        for gone in ("body > nav", "input", ".controls button", ".histograms", ".opener"):
            assert not tab.locator(gone).first.is_visible()
        assert tab.locator("tbody tr").first.is_visible()


# What stands on what: colours of visible elements with text of their own.
COLOURS = """() => {
    const own = (e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    const ground = (e) => {
        const colour = e ? getComputedStyle(e).backgroundColor : "rgb(255, 255, 255)";
        return colour === "rgba(0, 0, 0, 0)" ? ground(e.parentElement) : colour;
    };
    const pairs = new Map();
    for (const e of document.querySelectorAll("body, body *")) {
        if (e !== document.body && (!own(e) || !e.checkVisibility())) continue;
        const pair = [getComputedStyle(e).color, ground(e)];
        pairs.set(`${e.tagName}.${e.className}`, [...pair, `${e.tagName}.${e.className}`]);
    }
    return [...pairs.values()];
}"""


def luminance(colour: str) -> float:
    """Relative luminance, as WCAG 2.2 defines it, of a CSS colour `rgb(r, g, b)`."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)]
    assert len(parts) == 3, colour
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def contrast(a: str, b: str) -> float:
    """Contrast ratio, as WCAG 2.2 defines it."""
    low, high = sorted([luminance(a), luminance(b)])
    return (high + 0.05) / (low + 0.05)


def test_the_figure_is_the_one_that_was_given():
    html = render(page_of(examples_of(3, ["x"])))
    images = re.findall(r'<img src="data:image/svg\+xml;base64,([^"]*)"', html)
    assert [base64.b64decode(data) for data in images] == [SVG] * 3
