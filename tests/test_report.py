"""Scores of a text token by token, and the page that shows them, also in a browser."""

import html
import importlib.util
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.data.tokenizer import ByteTokenizer, CharTokenizer
from engine.eval.report import write_report
from engine.eval.scored_text import ScoredText, Token, score_text
from engine.eval.table import Table
from tests.helpers import HEADS, tiny_gpt
from tests.test_plots import make_curve, make_row

HOSTILE = [  # each must stay text
    "<script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    '"><svg onload="window.hacked = 1">',
    "$body ${title} $",
    "line\nline",
    "\u202e",
    "",
]


@pytest.mark.parametrize(("weights", "likelihood"), HEADS)
def test_each_token_has_the_scores_of_its_prediction(weights, likelihood):
    model = tiny_gpt(weights, likelihood, std=0.3)
    ids = np.random.default_rng(0).integers(0, 60, 41)
    chars = [chr(65 + i) for i in range(60)]  # fewer than the model's 67 ids
    first, *tokens = score_text(model, CharTokenizer(chars), ids)
    assert first == Token(chars[ids[0]], ids[0])
    for i, token in enumerate(tokens, 1):
        start = 0 if i <= 16 else (i - 9) // 8 * 8  # at least 8 tokens before it
        log_p = model.log_probs(torch.tensor(ids[None, start:i]))[0, -1].double()
        p = log_p.exp()
        assert token.text == chars[ids[i]]
        assert token.nll == pytest.approx(-log_p[ids[i]].item(), rel=1e-4)
        assert token.total == pytest.approx(-(p * log_p).sum().item(), rel=1e-4)
        assert token.aleatoric + token.epistemic == pytest.approx(token.total, rel=1e-5)
        assert (token.epistemic > 0) == (weights == "bayes")
        best = p[:60].topk(5)
        assert [name for name, _ in token.top] == [chars[k] for k in best.indices]
        assert [p for _, p in token.top] == pytest.approx(best.values.tolist(), rel=1e-4)


@pytest.mark.parametrize("n", [0, 1, 2])
def test_the_shortest_texts_can_be_scored(n):
    ids = np.zeros(n, dtype=np.int64)
    assert len(score_text(tiny_gpt(), CharTokenizer("abc"), ids)) == n


def test_draws_are_the_same_each_time_and_have_epistemic_uncertainty():
    model = tiny_gpt("bayes", std=0.3)
    ids = np.arange(40) % 3
    first, second = (score_text(model, CharTokenizer("abc"), ids, n_samples=4) for _ in range(2))
    assert first == second
    assert all(token.epistemic > 0 for token in first[1:])


def test_end_of_text_and_split_characters_have_a_text():
    tokenizer = ByteTokenizer()
    ids = np.array([*tokenizer.encode("é"), tokenizer.eot, 97])
    tokens = score_text(tiny_gpt(vocab_size=257), tokenizer, ids)
    assert [token.text for token in tokens] == ["", "é", "<|endoftext|>", "a"]


def make_tokens(texts: list[str], bayes: bool, scale: float = 1.0) -> ScoredText:
    """A text in which token i has nll i * scale; the first has none."""
    tokens = ScoredText([Token(texts[0], 0)])
    for i, text in enumerate(texts[1:], 1):
        epistemic = 0.01 * i * scale if bayes else 0.0
        top = ((texts[0], 0.25),)
        tokens.append(Token(text, i, i * scale, 2.0 + i, 2.0 + i - epistemic, epistemic, top))
    return tokens


def write(folder: Path, name: str = "bayes", title: str = "title", plots: bool = False) -> Path:
    """A report of two runs on two texts, one of them hostile."""
    rows = {"softmax": make_row(), name: make_row(bayes=True, seed=1)} if plots else {}
    curves = {"softmax": make_curve()} if plots else {}
    words = [f"word{i} " for i in range(30)]
    texts = {
        "words": {"softmax": make_tokens(words, False), name: make_tokens(words, True, 2.0)},
        title: {"softmax": make_tokens(HOSTILE, False), name: make_tokens(HOSTILE, True)},
    }
    lines = [["softmax", "4.2", "0.3"], [name, "4.1", name]]
    table = Table(title, ["run", "nll", title], lines)
    write_report(folder, title, title, [table], rows, curves, texts)
    return folder / "report.html"


def spans(page: Path) -> list[tuple[str, str, str]]:
    """The text, title and style of each token."""
    text = page.read_text(encoding="utf-8")
    found = re.findall(r'<span .*?title="(.*?)" style="(.*?)">(.*?)</span>', text, re.DOTALL)
    return [(html.unescape(token), html.unescape(title), style) for title, style, token in found]


def opacities(page: Path) -> list[float]:
    """How opaque the colour of each token is."""
    return [float(re.search(r"/([\d.]+)\)", style)[1]) for *_, style in spans(page)]


def test_tokens_are_coloured_by_epistemic_uncertainty_or_for_point_weights_by_nll(tmp_path):
    """All texts share a scale: the 99th percentile of what is not 0."""
    found = opacities(write(tmp_path))
    i, hostile = np.arange(30), np.arange(len(HOSTILE))
    nll = np.concatenate([i, 2 * i, hostile, hostile])
    epistemic = 0.01 * np.concatenate([2 * i, hostile])
    tops = [np.quantile(values[values > 0], 0.99) for values in (nll, epistemic)]
    assert found[:30] == pytest.approx(i / tops[0], abs=0.006)
    assert found[30:60] == pytest.approx((epistemic[:30] / tops[1]).clip(0, 1), abs=0.006)


def test_a_token_shows_its_numbers_and_the_likeliest_alternatives(tmp_path):
    first, _, _, (text, title, _), *_ = spans(write(tmp_path))
    assert text == "word3 "
    assert first[1] == "given"
    assert "nll 3 nats" in title
    assert "'word0 ' 25.0%" in title


@pytest.mark.parametrize("text", HOSTILE[:4])
def test_hostile_texts_and_names_stay_text(tmp_path, text):
    page = write(tmp_path, name=text, title=text)
    assert [token for token, *_ in spans(page)][-len(HOSTILE) :] == HOSTILE
    head, _, body = page.read_text().partition("<body>")
    assert not re.search("<(script|svg|img|!--)", body)
    assert "Content-Security-Policy" in head
    assert "default-src 'none'" in head


def test_nan_leaves_the_page_whole(tmp_path):
    token = Token("b", 1, float("nan"), 1.0, 1.0, 0.0)
    text = ScoredText([Token("a", 0), token])
    write_report(tmp_path, "t", "", [], {}, {}, {"d": {"x": text}})
    assert opacities(tmp_path / "report.html") == [0, 0]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Headless Chromium with a profile of its own; without it the test skips itself.

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
    flags += ["disable-background-networking", "disable-component-update"]
    for flag in flags:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.mark.slow
def test_the_page_opens_offline_and_shows_a_tokens_numbers_on_a_click(browser, tmp_path):
    page = write(tmp_path, plots=True)
    browser.get(page.resolve().as_uri())
    loaded = "return [...document.images].filter(image => image.naturalWidth > 0).length"
    assert browser.execute_script(loaded) == 3
    requests = "return performance.getEntriesByType('resource').map(entry => entry.name)"
    urls = browser.execute_script(requests)
    assert [url for url in urls if not url.startswith("data:")] == []
    assert browser.get_log("browser") == []
    token = browser.find_elements("css selector", ".text span")[3]
    alpha = token.value_of_css_property("background-color").split(",")[3]
    assert float(alpha[:-1]) == pytest.approx(opacities(page)[3], abs=0.01)
    token.click()
    shown = "return getComputedStyle(document.activeElement, '::after').content"
    assert "nll 3 nats" in browser.execute_script(shown)
