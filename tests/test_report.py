"""Scores of a text token by token, and the page that shows them, also in a browser."""

import html
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Categorical

from engine.data.tokenizer import ByteTokenizer, CharTokenizer
from engine.eval.report import table_html, write_page, write_report
from engine.eval.scored_text import COLOURS, ScoredText, Token, score_text
from engine.eval.table import Table
from engine.runs.percentiles import percentiles_of
from tests.helpers import HEADS, WORDS, tiny_gpt
from tests.test_plots import make_row

HOSTILE = [  # each must stay text
    "<script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    '"><svg onload="window.hacked = 1">',
    "$body ${title} $",
    "line\nline",
    "\u202e",
    "",
]


@pytest.mark.parametrize("weights, likelihood", HEADS)
def test_each_token_has_the_scores_of_its_prediction(weights, likelihood):
    model = tiny_gpt(weights, likelihood, std=0.3)
    ids = np.random.default_rng(0).integers(0, 60, 41)
    chars = [chr(65 + i) for i in range(60)]  # fewer than the model's 67 ids
    _, *tokens = score_text(model, CharTokenizer(chars), ids)
    for i, token in enumerate(tokens, 1):
        start = 0 if i <= 16 else (i - 9) // 8 * 8  # at least 8 tokens before it
        log_p = model.log_probs(torch.tensor(ids[None, start:i]))[0, -1].double()
        p = log_p.exp()
        assert token.text == chars[ids[i]]
        assert token.nll == pytest.approx(-log_p[ids[i]].item(), rel=1e-4)
        assert token.total == pytest.approx(Categorical(p).entropy().item(), rel=1e-4)
        assert token.aleatoric + token.epistemic == pytest.approx(token.total, rel=1e-5)
        assert (token.epistemic > 0) == (weights == "bayes")
        best = p[:60].topk(5)
        assert [name for name, _ in token.top] == [chars[k] for k in best.indices]
        assert [p for _, p in token.top] == pytest.approx(best.values.tolist(), rel=1e-4)


def test_end_of_text_and_split_characters_have_a_text():
    tokenizer = ByteTokenizer()
    ids = np.array([*tokenizer.encode("é"), tokenizer.eot, 97])
    tokens = score_text(tiny_gpt(vocab_size=257), tokenizer, ids)
    assert [token.text for token in tokens] == ["", "é", "<|endoftext|>", "a"]


def make_tokens(texts: list[str], bayes: bool, scale: float = 1.0) -> ScoredText:
    """A text in which token i has nll i * scale; the first has none."""
    tokens = ScoredText([Token(texts[0], 0)])
    tokens.percentiles = percentiles_of({"nll": torch.linspace(0, 10, 1001)})
    for i, text in enumerate(texts[1:], 1):
        epistemic = 0.01 * i * scale if bayes else 0.0
        top = ((texts[0], 0.25),)
        tokens.append(Token(text, i, i * scale, 2.0 + i, 2.0 + i - epistemic, epistemic, top))
    return tokens


def write(folder: Path, words: list[str] = WORDS, name: str = "bayes") -> Path:
    """A report of two runs on a text, with a plot. The name is also that of the title and text."""
    texts = {"softmax": make_tokens(words, False), name: make_tokens(words, True, 2.0)}
    table = Table(name, ["run", name], [["softmax", "4.2"], [name, name]])
    rows = {name: make_row()}
    write_report(folder, name, name, [table], rows, {name: texts})
    return folder / "report.html"


def spans(page: Path) -> list[tuple[str, str, str]]:
    """The text, title and style of each token."""
    text = page.read_text(encoding="utf-8")
    found = re.findall(r'<span .*?title="([^"]*)"(?: style="(.*?)")?>(.*?)</span>', text, re.DOTALL)
    return [(html.unescape(token), html.unescape(title), style) for title, style, token in found]


def test_tokens_are_coloured_beyond_the_percentiles_of_the_run(tmp_path):
    found = [style for *_, style in spans(write(tmp_path))]
    nll = [*range(len(WORDS)), *(2 * i for i in range(len(WORDS)))]
    # the run's validation text has an nll of 0 to 10: 7.5, 9.5 and 9.9 are its percentiles
    limits = (7.5, 9.5, 9.9)
    expected = [COLOURS[sum(value > limit for limit in limits)] for value in nll]
    assert [style.partition(":")[2] for style in found] == expected


def test_a_token_shows_its_numbers_and_the_likeliest_alternatives(tmp_path):
    first, _, _, (text, title, _), *_ = spans(write(tmp_path))
    assert text == WORDS[3]
    assert first[1] == "given"
    assert "nll 3 nats, percentile 30" in title
    assert f"{WORDS[0]!r} 25.0%" in title


@pytest.mark.parametrize("text", HOSTILE[:4])
def test_hostile_texts_and_names_stay_text(tmp_path, text):
    page = write(tmp_path, HOSTILE, text)
    assert [token for token, *_ in spans(page)] == HOSTILE * 2
    head, _, body = page.read_text().partition("<body>")
    assert not re.search("<(script|svg|img src=x|!--)", body)
    assert "Content-Security-Policy" in head
    assert "default-src 'none'" in head


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Headless Chromium with a profile of its own; without it the test skips itself.

    With REQUIRE_CHROMIUM set, its absence is a failure instead."""
    if not shutil.which("chromedriver"):
        stop = pytest.fail if os.environ.get("REQUIRE_CHROMIUM") else pytest.skip
        stop("chromedriver is not installed")
    webdriver = pytest.importorskip("selenium.webdriver")

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    profile = f"user-data-dir={tmp_path_factory.mktemp('profile')}"
    for flag in ("headless=new", "no-sandbox", profile):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.mark.slow
def test_the_page_opens_offline_and_shows_a_tokens_numbers_on_a_click(browser, tmp_path):
    page = write(tmp_path, HOSTILE)
    browser.get(page.resolve().as_uri())
    loaded = "return [...document.images].filter(image => image.naturalWidth > 0).length"
    assert browser.execute_script(loaded) == 1
    requests = "return performance.getEntriesByType('resource').map(entry => entry.name)"
    urls = browser.execute_script(requests)
    assert [url for url in urls if not url.startswith("data:")] == []
    assert browser.get_log("browser") == []
    browser.find_elements("css selector", ".text span")[3].click()
    shown = "return getComputedStyle(document.activeElement, '::after').content"
    assert "nll 3 nats" in browser.execute_script(shown)


@pytest.mark.slow
def test_a_table_of_many_scores_is_whole_at_1200_pixels(browser, tmp_path):
    header = ["run", *["tempered score of a block"] * 10]
    line = ["out/first_run_of_three+out/second_run_of_three", *["0.1234"] * 10]
    page = tmp_path / "page.html"
    write_page(page, "", "", table_html(Table("", header, [line])), {})
    browser.set_window_size(1200, 900)
    browser.get(page.as_uri())
    excess = "const w = document.querySelector('.wide'); return w.scrollWidth - w.clientWidth"
    assert browser.execute_script(excess) == 0
