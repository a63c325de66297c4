"""engine/eval/scored_text.py and report.py: scores against the slow way; the page in a browser."""

import importlib.util
import json
import math
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.data.tokenizer import ByteTokenizer, CharTokenizer
from engine.eval.evaluation import CHUNK_ROWS
from engine.eval.report import write_report
from engine.eval.scored_text import NUMBERS, ScoredText, Token, score_text
from engine.eval.table import Table
from tests.helpers import HEADS, tiny_gpt
from tests.test_plots import make_curve, make_row

HOSTILE = [  # none of them may be more than text, wherever it stands
    "<script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    '"><svg onload="window.hacked = 1">',
    "<!--<script>",
    "$body ${title} $",
    "line\nline",
    "\u2028",
    "\u202e",
    "",
]


# scores


@pytest.mark.parametrize(("weights", "likelihood"), HEADS)
def test_a_document_has_the_predictions_of_each_token(weights, likelihood):
    model = tiny_gpt(weights, likelihood, std=0.3)
    ids = np.random.default_rng(0).integers(0, 60, 41).astype(np.uint16)
    chars = [chr(65 + i) for i in range(60)]  # fewer than the model's ids: its vocabulary is padded
    tokens = score_text(model, CharTokenizer(chars), ids)
    assert tokens.text == "".join(chars[i] for i in ids)
    assert [getattr(tokens[0], name) for name in NUMBERS] == [None] * 4 and tokens[0].top == ()
    for i, token in enumerate(tokens[1:], 1):
        start = 0 if i <= 16 else (i - 9) // 8 * 8  # at least 8 tokens before it
        context = torch.tensor(ids[None, start:i].astype(np.int64))
        p = model.log_probs(context)[0, -1].double().exp().detach().numpy()
        assert token.nll == pytest.approx(-np.log(p[ids[i]]), rel=1e-4)
        assert token.total == pytest.approx(-np.sum(p * np.log(p)), rel=1e-4)
        assert token.aleatoric + token.epistemic == pytest.approx(token.total, rel=1e-5)
        assert (token.epistemic > 0) == (weights == "bayes")
        order = np.argsort(-p[:60])[:5]
        assert token.top == tuple((chars[k], pytest.approx(p[k], rel=1e-4)) for k in order)


@pytest.mark.parametrize("n", [0, 1, 2])
def test_the_shortest_documents_are_read(n):
    ids = np.zeros(n, dtype=np.int64)
    assert len(score_text(tiny_gpt(std=0.3), CharTokenizer("abc"), ids)) == n


def test_draws_are_the_same_each_time_and_have_epistemic_uncertainty():
    model, ids = tiny_gpt("bayes", std=0.3), np.arange(40) % 3
    first, second = (score_text(model, CharTokenizer("abc"), ids, n_samples=4) for _ in range(2))
    assert first == second and all(token.epistemic > 0 for token in first[1:])
    assert first != score_text(model, CharTokenizer("abc"), ids)


def test_a_long_document_never_has_all_its_predictions_at_once(monkeypatch):
    model, seen = tiny_gpt(block_size=512), []
    predict = model.lm_head.predict
    spy = lambda x, n: seen.append(x[0].shape) or predict(x, n)  # noqa: E731
    monkeypatch.setattr(model.lm_head, "predict", spy)
    score_text(model, CharTokenizer("abc"), np.zeros(1000, dtype=np.int64))
    assert max(n for n, _ in seen) <= CHUNK_ROWS["cpu"] and sum(n for n, _ in seen) == 999


def test_end_of_text_and_split_characters_have_a_text():
    tokenizer = ByteTokenizer()
    ids = np.array([*tokenizer.encode("é"), tokenizer.eot, 97])
    tokens = score_text(tiny_gpt(vocab_size=257, std=0.3), tokenizer, ids)
    assert [token.text for token in tokens] == ["", "é", "<|endoftext|>", "a"]


# the page


def make_tokens(texts: list[str], known: bool, scale: float = 1.0) -> ScoredText:
    """A document in which token i has nll i * scale; the first has none."""
    tokens = ScoredText([Token(texts[0], 0)])
    for i, text in enumerate(texts[1:], 1):
        epistemic = 0.01 * i * scale if known else 0.0
        top = tuple((texts[(i + k) % len(texts)], 0.5 / (k + 1)) for k in range(5))
        tokens.append(Token(text, i, i * scale, 2.0 + i, 2.0 + i - epistemic, epistemic, top))
    return tokens


def write(
    folder: Path, name: str = "bayes", title: str = "A title", pictures: bool = False
) -> Path:
    """A report of two runs on two texts, one of them hostile."""
    rows = {"softmax": make_row(), name: make_row(bayes=True, seed=1)} if pictures else {}
    words = [f"word{i} " for i in range(30)]
    of_words = {"softmax": make_tokens(words, False), name: make_tokens(words, True, 2.0)}
    of_hostile = {"softmax": make_tokens(HOSTILE, False), name: make_tokens(HOSTILE, True)}
    texts = {"words": of_words, title: of_hostile}
    lines = [["unigram", "6.1", ""], ["softmax", "4.2", "0.3"], [name, "4.1", name]]
    tables = [Table(title, ["run", "nll", title], lines)]
    curves = {"softmax": make_curve()} if pictures else {}
    write_report(folder, title, title, tables, rows, curves, texts)
    return folder / "report.html"


class Spans(HTMLParser):
    """Collects the tokens of a page: their text and the attributes of their <span>."""

    def __init__(self, page: str):
        super().__init__()
        self.found, self.inside = [], False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.inside = tag == "span"
        if self.inside:
            self.found.append(["", dict(attributes)])

    def handle_data(self, data):
        if self.inside:
            self.found[-1][0] += data

    def handle_endtag(self, tag):
        self.inside = False


def spans(page: Path) -> list[tuple[str, dict]]:
    return Spans(page.read_text(encoding="utf-8")).found


def shares(page: Path) -> list[float]:
    """Of each token, its share of the scale: how opaque its colour is."""
    return [float(re.search(r"/([\d.]+)\)", about["style"])[1]) for _, about in spans(page)]


def test_point_weights_are_coloured_by_nll_and_bayesian_ones_by_epistemic_uncertainty(tmp_path):
    """One scale for all texts: the 99th percentile of what is not 0."""
    found = shares(write(tmp_path))
    n = len(HOSTILE)
    texts = ((30, 1), (30, 2), (n, 1), (n, 1))  # length and scale; the second and last are Bayesian
    values = [scale * i for length, scale in texts for i in range(length)]
    nll_top = np.quantile([value for value in values if value], 0.99)
    epistemic = [0.01 * value for value in values[30:60] + values[60 + n :]]
    epistemic_top = np.quantile([value for value in epistemic if value], 0.99)
    assert found[:30] == [round(value / nll_top, 2) for value in values[:30]]
    expected = [round(min(1, value / epistemic_top), 2) for value in epistemic[:30]]
    assert found[30:60] == expected


def test_a_token_tells_its_numbers_and_the_likeliest_alternatives(tmp_path):
    _, third, fourth, *_ = spans(write(tmp_path))[1:]
    assert third[0] == "word2 " and fourth[0] == "word3 "
    assert (
        fourth[1]["title"].splitlines()[0] == "nll 3 nats"
        and "'word4 ' 25.0%" in fourth[1]["title"]
    )
    assert spans(tmp_path / "report.html")[0][1]["title"] == "given"


def test_hostile_texts_and_names_stay_text(tmp_path):
    for text in HOSTILE[:5]:
        page = write(tmp_path, name=text, title=text)
        assert [token for token, _ in spans(page)][-len(HOSTILE) :] == HOSTILE
        assert not re.search("<(script|svg|img|!--)", page.read_text().partition("<body>")[2])


def test_the_same_report_has_the_same_bytes(tmp_path):
    first = write(tmp_path, pictures=True).read_bytes()
    assert first == write(tmp_path, pictures=True).read_bytes()


def test_numbers_that_are_none_leave_the_page_whole(tmp_path):
    tokens = make_tokens(["a", "b", "c"], False)
    text = ScoredText([tokens[0], *(token._replace(nll=math.nan) for token in tokens[1:])])
    write_report(tmp_path, "t", "", [Table("", ["run"], [["x"]])], {}, {}, {"d": {"x": text}})
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert shares(tmp_path / "report.html") == [0, 0, 0]


# in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Headless Chromium with a profile of its own; where it is missing the test skips itself.

    With REQUIRE_CHROMIUM set, its absence is a failure instead."""
    missing = [name for name in ("chromium", "chromedriver") if not shutil.which(name)]
    missing += ["selenium"] if importlib.util.find_spec("selenium") is None else []
    if missing:
        stop = pytest.fail if os.environ.get("REQUIRE_CHROMIUM") else pytest.skip
        stop(f"{', '.join(missing)} not installed")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    profile = f"user-data-dir={tmp_path_factory.mktemp('profile')}"
    flags = ["headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", profile]
    flags += ["disable-background-networking", "disable-component-update", "window-size=1000,900"]
    for flag in flags:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def open_page(browser, page: Path, width: int = 1000) -> None:
    """Load the page in a window of this width; what the browser logged before is dropped."""
    metrics = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    for log in ("browser", "performance"):
        browser.get_log(log)
    browser.get(page.resolve().as_uri())


def backgrounds(browser) -> list[float]:
    """How opaque the colour of each token is."""
    script = "return [...document.querySelectorAll('.text span')].map(s => getComputedStyle(s)."
    found = browser.execute_script(script + "backgroundColor)")
    return [float(colour.split(",")[3][:-1]) if "rgba" in colour else 1.0 for colour in found]


def test_the_page_opens_offline_without_errors_or_requests(browser, tmp_path):
    open_page(browser, page := write(tmp_path, pictures=True))
    assert len(browser.find_elements("css selector", "figure img")) == 3
    loaded = "return [...document.images].every(image => image.naturalWidth > 0)"
    assert browser.execute_script(loaded)
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    urls = {request["request"]["url"] for request in requests}
    assert {url for url in urls if not url.startswith("data:")} == {page.resolve().as_uri()}
    assert browser.get_log("browser") == []


def test_the_browser_shows_the_colours(browser, tmp_path):
    open_page(browser, page := write(tmp_path))
    assert backgrounds(browser) == pytest.approx(shares(page), abs=0.01)


def test_a_click_shows_the_numbers_of_a_token(browser, tmp_path):
    open_page(browser, write(tmp_path))
    browser.find_elements("css selector", ".text span")[3].click()
    shown = "return getComputedStyle(document.activeElement, '::after').content"
    assert "nll 3 nats" in browser.execute_script(shown)


def test_a_script_that_gets_into_the_page_all_the_same_is_not_run(browser, tmp_path):
    page = write(tmp_path)
    planted = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'></body>"
    page.write_text(page.read_text().replace("</body>", planted))
    open_page(browser, page)
    assert browser.execute_script("return window.hacked") is None
    assert "Content Security Policy" in browser.get_log("browser")[0]["message"]


@pytest.mark.parametrize("width", [320, 1000])
def test_nothing_is_wider_than_the_window(browser, tmp_path, width):
    header = ["run", *(f"column {i}" for i in range(15))]
    lines = [["a_run_with_a_rather_long_name_" * 3, *["0.123456"] * 15]]
    texts = {"words" * 30: {"x": make_tokens(["word" * 9] * 30, True)}}
    rows = {"x": make_row()}
    write_report(tmp_path, "t" * 90, "", [Table("wide", header, lines)], rows, {}, texts)
    open_page(browser, tmp_path / "report.html", width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
