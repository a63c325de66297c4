"""engine/eval/report.py: texts read against the slow way, and report.html as a browser shows it, offline."""

import importlib.util
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.data.tokenizer import ByteTokenizer, CharTokenizer
from engine.eval.evaluation import ROWS
from engine.eval.reading import Token, read
from engine.eval.report import COLOURINGS, Document, best, write_report
from engine.eval.table import Table
from tests.helpers import HEADS, tiny_gpt
from tests.test_pictures import make_curve, make_row

HOSTILE = [  # none of them may be more than text, wherever it stands
    "<script>window.hacked = 1</script>",
    "</script><script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    '"><svg onload="window.hacked = 1">',
    "<!--<script>",
    "{{table}} ${hacked} \\u003c",
    "line\nline",
    "\u2028",
    "\u202e",
    "",
]


# reading


@pytest.mark.parametrize(("weights", "likelihood"), HEADS)
def test_a_document_has_the_predictions_of_each_token(weights, likelihood):
    model, ids = (
        tiny_gpt(weights, likelihood, std=0.3),
        np.random.default_rng(0).integers(0, 60, 41).astype(np.uint16),
    )
    chars = [chr(65 + i) for i in range(60)]  # fewer than the model's ids: its vocabulary is padded
    tokens = read(model, CharTokenizer(chars), ids)
    assert "".join(token.text for token in tokens) == "".join(chars[i] for i in ids)
    assert [getattr(tokens[0], name) for name in COLOURINGS] == [None] * 4 and tokens[0].top == ()
    start_of = {
        i: 0 if i <= 16 else (i - 9) // 8 * 8 for i in range(1, 41)
    }  # behind 8 tokens at least
    for i, token in enumerate(tokens[1:], 1):
        context = torch.tensor(ids[None, start_of[i] : i].astype(np.int64))
        p = model.log_probs(context)[0, -1].double().exp().detach().numpy()
        assert token.nll == pytest.approx(-np.log(p[ids[i]]), rel=1e-4)
        assert token.total == pytest.approx(-np.sum(p * np.log(p)), rel=1e-4)
        assert token.aleatoric + token.epistemic == pytest.approx(token.total, rel=1e-5)
        assert (token.epistemic > 0) == (weights == "bayes")
        order = np.argsort(-p[:60])[:5]
        assert token.top == tuple((chars[k], pytest.approx(p[k], rel=1e-4)) for k in order)


@pytest.mark.parametrize("n", [0, 1, 2])
def test_the_shortest_documents_are_read(n):
    assert len(read(tiny_gpt(std=0.3), CharTokenizer("abc"), np.zeros(n, dtype=np.int64))) == n


def test_draws_are_the_same_each_time_and_tell_what_the_weights_do_not_know():
    model, ids = tiny_gpt("bayes", std=0.3), np.arange(40) % 3
    first, second = (read(model, CharTokenizer("abc"), ids, n_samples=4) for _ in range(2))
    assert first == second and all(token.epistemic > 0 for token in first[1:])
    assert first != read(model, CharTokenizer("abc"), ids)


def test_a_long_document_never_has_all_its_predictions_at_once(monkeypatch):
    model, seen = tiny_gpt(block_size=512), []
    predict = model.lm_head.predict
    monkeypatch.setattr(
        model.lm_head, "predict", lambda x, n: seen.append(x[0].shape) or predict(x, n)
    )
    read(model, CharTokenizer("abc"), np.zeros(1000, dtype=np.int64))
    assert max(n for n, _ in seen) <= ROWS["cpu"] and sum(n for n, _ in seen) == 999


def test_end_of_text_and_split_characters_have_a_text():
    tokenizer = ByteTokenizer()
    model = tiny_gpt(vocab_size=257, std=0.3)
    ids = np.array([*tokenizer.encode("é"), tokenizer.eot, 97])
    assert [token.text for token in read(model, tokenizer, ids)] == ["", "é", "<|endoftext|>", "a"]


# The table


@pytest.mark.parametrize(
    ("name", "cells", "expected"),
    [
        ("nll", ["4.31", "4.30", "", "4.30 ± 0.01"], {1, 3}),
        ("perplexity", ["1,074.3", "980.0"], {1}),
        ("accuracy", ["0.1", "0.3", "0.2"], {1}),
        ("auroc_entropy", ["0.5", "nan", "0.9"], {2}),
        ("ece", ["1.2e-2", "9e-3"], {1}),
        ("nll se", ["0.1", "0.2"], set()),  # an error bar is neither good nor bad
        ("entropy", ["4.1", "4.2"], set()),
        ("n_samples", ["0", "16"], set()),
        ("brier", ["0.9", "0.9"], set()),
        ("brier", ["", "0.9"], set()),
    ],
)
def test_the_best_of_a_column_is_found_where_there_is_a_better(name, cells, expected):
    assert best(name, cells) == expected


def make_tokens(texts: list[str], known: bool, scale: float = 1.0) -> list[Token]:
    """A document in which token i has nll i * scale; the first has none."""
    tokens = []
    for i, text in enumerate(texts):
        epistemic = 0.01 * i * scale if known else 0.0
        values = {
            "nll": i * scale,
            "total": 2.0 + i,
            "aleatoric": 2.0 + i - epistemic,
            "epistemic": epistemic,
        }
        top = tuple((texts[(i + k) % len(texts)], 0.5 / (k + 1)) for k in range(5))
        tokens.append(Token(text, i, **values, top=top) if i else Token(text, i))
    return tokens


def write(
    folder: Path, name: str = "bayes", title: str = "A title", pictures: bool = False, **changes
) -> Path:
    """A report of two runs on two texts, one of them hostile; the pictures take longer than all else."""
    full = {"softmax": make_row(), name: make_row(bayes=True, seed=1)}
    rows = (
        full
        if pictures
        else {run: {"kl_weight": row.get("kl_weight", 1)} for run, row in full.items()}
    )
    words = [f"word{i} " for i in range(30)]
    documents = [
        Document(
            "words", {"softmax": make_tokens(words, False), name: make_tokens(words, True, 2.0)}
        ),
        Document(title, {"softmax": make_tokens(HOSTILE, False), name: make_tokens(HOSTILE, True)}),
    ]
    lines = [["unigram", "6.1", ""], ["softmax", "4.2", "0.3"], [name, "4.1", name]]
    given = {
        "title": title,
        "note": title,
        "tables": [Table(title, ["run", "nll", title], lines)],
        "rows": rows,
    } | changes
    curves = {"softmax": make_curve()} if pictures else {}
    files = write_report(folder, **given, curves=curves, documents=documents)
    assert all(path.is_file() for path in files) and files[-1] == folder / "report.html"
    return files[-1]


def embedded(page: Path) -> dict:
    """The data of the page's script."""
    found = re.search(
        r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL
    )
    return json.loads(found[1])


def test_a_colouring_has_one_scale_for_all_texts_and_runs(tmp_path):
    data = embedded(write(tmp_path))
    nlls = [
        i * scale
        for texts in ((30, 1), (30, 2), (10, 1), (10, 1))
        for n, scale in [texts]
        for i in range(1, n)
    ]
    assert data["scales"]["nll"] == pytest.approx(np.percentile(nlls, 99))
    known = [
        0.01 * i * scale for n, scale in ((30, 2), (10, 1)) for i in range(1, n)
    ]  # without the zeros of softmax
    assert data["scales"]["epistemic"] == pytest.approx(np.percentile(known, 99))


def test_the_table_stars_the_best_only_where_the_rows_are_of_the_same_text(tmp_path):
    assert (
        '<td class="best"><span role="img" aria-label="best">★</span> 4.1</td>'
        in write(tmp_path).read_text()
    )
    rows = {
        "softmax": {"dataset": "books", "split": "test"},
        "bayes": {"dataset": "plays", "split": "test"},
    }
    assert 'class="best"' not in write(tmp_path, rows=rows).read_text()


def test_tempered_posteriors_say_so_in_the_table_and_beside_their_texts(tmp_path):
    page = write(tmp_path)
    assert '<th scope="row">bayes (kl_weight 0.1)</th>' in page.read_text()
    names = [run["name"] for text in embedded(page)["documents"] for run in text["runs"]]
    assert names == ["softmax", "bayes (kl_weight 0.1)"] * 2


def test_the_same_report_has_the_same_bytes(tmp_path):
    assert (
        write(tmp_path, pictures=True).read_bytes() == write(tmp_path, pictures=True).read_bytes()
    )


def test_numbers_that_are_none_leave_the_page_whole(tmp_path):
    tokens = [token._replace(nll=float("nan")) for token in make_tokens(["a", "b", "c"], False)]
    files = write_report(
        tmp_path, "t", "", [Table("", ["run"], [["x"]])], {}, {}, [Document("d", {"x": tokens})]
    )
    assert [path.name for path in files] == ["report.html"]
    assert embedded(files[0])["documents"][0]["runs"][0]["tokens"][1][4] is None


# In a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Headless Chromium with a profile of its own; where it is missing the test skips itself.

    With REQUIRE_CHROMIUM set, its absence is a failure instead."""
    missing = [name for name in ("chromium", "chromedriver") if not shutil.which(name)]
    missing += ["selenium"] if importlib.util.find_spec("selenium") is None else []
    if missing:
        (pytest.fail if os.environ.get("REQUIRE_CHROMIUM") else pytest.skip)(
            f"{', '.join(missing)} not installed"
        )
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    flags = [
        "headless=new",
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-sync",
    ]
    flags += ["disable-background-networking", "disable-component-update", "window-size=1000,900"]
    for flag in [*flags, f"user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def open_page(browser, page: Path, width: int = 1000, scheme: str = "light") -> None:
    """Load the page in a window of this width; what the browser said before is dropped."""
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [_scheme(scheme)]})
    metrics = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    for log in ("browser", "performance"):
        browser.get_log(log)
    browser.get(page.resolve().as_uri())


def _scheme(scheme: str) -> dict:
    return {"name": "prefers-color-scheme", "value": scheme}


def find(browser, selector: str) -> list:
    return browser.find_elements("css selector", selector)


def choose(browser, label: str) -> None:
    """Click the choice with this label."""
    next(found for found in find(browser, "#choices label") if found.text.strip() == label).click()


def colours(browser) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(background, text) of every token that is shown."""
    script = "return [...document.querySelectorAll('.text span')].map(s => [getComputedStyle(s).backgroundColor, "
    found = browser.execute_script(script + "getComputedStyle(s).color])")
    return [tuple(tuple(map(int, re.findall(r"\d+", one))) for one in pair) for pair in found]


def luminance(rgb: tuple[int, ...]) -> float:
    """WCAG 2's relative luminance."""
    linear = [
        v / 255 / 12.92 if v / 255 <= 0.04045 else ((v / 255 + 0.055) / 1.055) ** 2.4
        for v in rgb[:3]
    ]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def shown(browser) -> dict[str, str]:
    """The figures of the token that was pointed at."""
    return {
        found.get_attribute("id")[3:]: found.text for found in find(browser, "#about [id^=of_]")
    }


def test_the_page_opens_offline_without_errors_or_requests(browser, tmp_path):
    open_page(browser, page := write(tmp_path, pictures=True))
    assert len(find(browser, ".text span")) == 30 and len(find(browser, "figure img")) == 4
    assert browser.execute_script(
        "return [...document.images].every(image => image.naturalWidth > 0)"
    )
    requests = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [
        one["params"]["request"]["url"]
        for one in requests
        if one["method"] == "Network.requestWillBeSent"
    ]
    assert page.resolve().as_uri() in urls and all(
        url.startswith(("file://", "data:")) for url in urls
    )
    assert [url for url in urls if url.startswith("file:")] == [page.resolve().as_uri()]
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_stronger_colour_is_a_larger_value_and_the_text_stays_readable(browser, tmp_path, scheme):
    open_page(browser, write(tmp_path), scheme=scheme)
    seen = {}
    for colouring in COLOURINGS:
        choose(browser, colouring)
        seen[colouring] = colours(browser)
        assert seen[colouring][0][0][3:] == (0,)  # the first token has no prediction, so no colour
        shades = [
            luminance(background) for background, _ in seen[colouring][1:]
        ]  # values rise from token to token
        assert shades == sorted(shades, reverse=scheme == "light") and shades[0] != shades[-1]
        for background, text in seen[colouring][1:]:
            low, high = sorted([luminance(background), luminance(text)])
            assert (high + 0.05) / (low + 0.05) >= 4.5
        assert (
            colouring in find(browser, "#scale")[0].text and "≥" in find(browser, "#scale")[0].text
        )
    assert seen["nll"] != seen["total"]


def test_the_colours_follow_the_scheme_when_it_changes(browser, tmp_path):
    from selenium.webdriver.support.ui import WebDriverWait

    open_page(browser, write(tmp_path))
    light = colours(browser)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [_scheme("dark")]})
    WebDriverWait(browser, 10).until(lambda _: colours(browser)[1:] != light[1:])


def test_pointing_tapping_and_walking_show_the_figures_of_a_token(browser, tmp_path):
    from selenium.webdriver import ActionChains, Keys

    open_page(browser, write(tmp_path))
    spans = find(browser, ".text span")
    ActionChains(browser).move_to_element(spans[3]).perform()
    expected = {
        "token": '"word3 "',
        "nll": "6",
        "probability": "0.248 %",
        "total": "5",
        "aleatoric": "4.94",
    }
    assert shown(browser).items() >= (expected | {"epistemic": "0.06"}).items()
    assert find(browser, "#of_top")[0].text.splitlines()[:2] == ['"word3 " 50 %', '"word4 " 25 %']
    spans[4].click()
    assert shown(browser)["token"] == '"word4 "'
    browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT)
    assert shown(browser)["token"] == '"word5 "' and browser.switch_to.active_element == spans[5]
    browser.execute_script("arguments[0].focus()", spans[0])
    assert "given" in shown(browser)["prediction"]
    assert [span.text for span in find(browser, ".shown")] == ["word0 "]


def test_a_tap_on_a_touch_screen_shows_the_figures_too(browser, tmp_path):
    open_page(browser, write(tmp_path), width=400)
    place = "const r = document.querySelectorAll('.text span')[2]; r.scrollIntoView({block: 'center'}); "
    place += (
        "const b = r.getBoundingClientRect(); return {x: b.x + b.width / 2, y: b.y + b.height / 2}"
    )
    point = browser.execute_script(place)
    browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
    for kind, points in (("touchStart", [point]), ("touchEnd", [])):
        browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})
    assert shown(browser)["token"] == '"word2 "'


def test_another_text_is_shown_in_the_same_runs_and_colouring_without_the_old_figures(
    browser, tmp_path
):
    open_page(browser, write(tmp_path))
    choose(browser, "softmax")
    choose(browser, "nll")
    find(browser, ".text span")[3].click()
    choose(browser, "A title")
    assert [found.text for found in find(browser, "#runs h3")] == [
        "softmax",
        "bayes (kl_weight 0.1)",
    ]
    assert (
        len(find(browser, ".text span")) == 2 * len(HOSTILE)
        and "nll" in find(browser, "#scale")[0].text
    )
    assert shown(browser) == {} and find(browser, ".shown") == []
    assert browser.switch_to.active_element.get_property("checked")  # the keyboard is where it was


def test_point_weights_have_no_epistemic_uncertainty_rather_than_zeros(browser, tmp_path):
    open_page(browser, write(tmp_path))
    assert len(find(browser, "#runs section")) == 1  # the Bayesian run is shown first
    choose(browser, "softmax")
    softmax, bayes = find(browser, "#runs section")
    assert "has none" in softmax.text and "has none" not in bayes.text
    assert all(background[3:] == (0,) for background, _ in colours(browser)[:30])
    find(browser, ".text span")[3].click()
    assert shown(browser)["epistemic"] == "has none"
    assert [span.text for span in find(browser, ".shown")] == [
        "word3 "
    ] * 2  # its place in both runs
    choose(browser, "total")
    assert len(find(browser, ".shown")) == 2 and "has none" not in find(browser, "#runs")[0].text
    assert all(len(background) == 3 for background, _ in colours(browser)[1:30])


@pytest.mark.parametrize("text", HOSTILE[:6])
def test_hostile_names_and_texts_are_inert(browser, tmp_path, text):
    open_page(browser, write(tmp_path, name=text, title=text, pictures=text == HOSTILE[1]))
    find(browser, "#choices input[name=text]")[1].click()
    for box in find(browser, "#choices input[name=runs]"):
        if not box.is_selected():
            box.click()
    contents = browser.execute_script(
        "return [...document.querySelectorAll('.text span')].map(s => s.textContent)"
    )
    assert contents == [one.replace("\n", "↵\n") for one in HOSTILE] * 2
    for span in find(browser, ".text span"):
        browser.execute_script("arguments[0].focus()", span)
        assert len(find(browser, "#of_top li")) == (
            0 if span.get_attribute("data-token") == "0" else 5
        )
    assert browser.title == text and find(browser, "h1")[0].text == text
    assert (
        find(browser, "th[scope=row]")[2].get_property("textContent") == f"{text} (kl_weight 0.1)"
    )
    count = "return ['script', '#documents img', 'svg', 'h1'].map(s => document.querySelectorAll(s).length)"
    assert browser.execute_script(count) == [2, 0, 0, 1]
    assert (
        browser.execute_script("return window.hacked") is None and browser.get_log("browser") == []
    )


def test_a_script_that_gets_into_the_page_all_the_same_is_not_run(browser, tmp_path):
    page = write(tmp_path)
    planted = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'></main>"
    page.write_text(page.read_text().replace("</main>", planted))
    open_page(browser, page)
    assert (
        browser.execute_script("return window.hacked") is None
        and len(find(browser, ".text span")) == 30
    )
    assert "Content Security Policy" in browser.get_log("browser")[0]["message"]


@pytest.mark.parametrize("width", [320, 400, 1000])
def test_nothing_is_wider_than_the_window(browser, tmp_path, width):
    header = ["run", *(f"column {i}" for i in range(15))]
    lines = [["a_run_with_a_rather_long_name_" * 3, *["0.123456"] * 15]]
    page = write(
        tmp_path, title="title" * 30, tables=[Table("wide", header, lines)] * 2, pictures=True
    )
    open_page(browser, page, width)
    for title in find(browser, "#choices input[name=text]"):
        title.click()
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    aligned = browser.execute_script(
        "return [...document.querySelectorAll('td')].map(d => getComputedStyle(d).textAlign)"
    )
    assert set(aligned) == {"right"}


def test_a_report_without_texts_or_pictures_is_a_table(browser, tmp_path):
    table = Table("likelihood", ["run", "nll"], [["gpt2", "3.1"]])
    files = write_report(tmp_path, "t", "", [table], {"gpt2": {"nll": 3.1}}, {}, [])
    open_page(browser, files[-1])
    assert (
        not find(browser, "#documents")[0].is_displayed() and find(browser, "td")[0].text == "3.1"
    )
    assert browser.get_log("browser") == []
