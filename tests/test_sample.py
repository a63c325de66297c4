"""sample.py and engine/eval/run.py: texts against generate(), how they end, where they go."""

import io
import json
import math
import os
import pty
import re
import runpy
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from engine.base.errors import UserError
from engine.data.tokenizer import BPETokenizer
from engine.eval import generation
from engine.eval.generation import generate
from engine.eval.run import Continuation, Run, Sampling
from engine.eval.scored_text import ScoredText, Token
from heads import Prediction
from tests.helpers import ROOT, flags, refused, run, words, write_bytes, write_words
from tests.test_report import spans


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs on words: softmax and Bayesian by characters, Bayesian by bytes (with end-of-text)."""
    root = tmp_path_factory.mktemp("runs")
    data = write_words(root / "data")
    run(data, root / "softmax", max_iters=5)
    run(data, root / "bayes", weights="bayes")
    shutil.copytree(root / "softmax", root / "diverged")
    diverged = torch.load(checkpoint := root / "diverged" / "ckpt_00000005.pt", weights_only=True)
    diverged["model"]["transformer.wte.weight"][3] = math.nan
    torch.save(diverged, checkpoint)
    run(write_bytes(root / "bytes"), root / "bytes_bayes", weights="bayes", max_iters=5)
    return root


@pytest.fixture(scope="module")
def bayes(folder):
    return Run(folder / "bayes", device="cpu", dtype="float32")


def sample_py(monkeypatch, folder, *more: str, **options) -> None:
    monkeypatch.chdir(folder)
    options = {
        "out_dir": "bayes",
        "device": "cpu",
        "dtype": "float32",
        "start": "the ",
        "max_new_tokens": 30,
    } | options
    options |= {} if "--interactive" in more else {"num_samples": options.get("num_samples", 1)}
    monkeypatch.setattr(sys, "argv", ["sample.py", *flags(**options), *more])
    runpy.run_path(str(ROOT / "sample.py"), run_name="__main__")


def lines_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# texts


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"n_samples": 3}, {"top_k": 3}, {"top_p": 0.5, "seed": 7}]
)
def test_a_text_is_what_generate_draws_with_this_seed(bayes, options):
    torch.manual_seed(options.get("seed", 1337))
    idx = torch.tensor([bayes.encode("the ")])
    of_model = {"temperature": 0.8, "top_k": 200} | {
        name: v for name, v in options.items() if name != "seed"
    }
    ids = generate(bayes.model, idx, 40, **of_model)[0, 4:]
    assert bayes.generate_text("the ", max_new_tokens=40, **options) == bayes.tokenizer.decode(ids)


def test_figures_of_a_text_are_those_of_reading_it(bayes):
    *_, (text,) = bayes.stream(
        "the ", 1, Sampling(max_new_tokens=12)
    )  # within a block: nothing slides
    read = bayes.uncertainty("the " + text.text)[4:]
    for token, again in zip(text.tokens, read, strict=True):
        assert (token.text, token.id, [name for name, _ in token.top]) == (
            again.text,
            again.id,
            [name for name, _ in again.top],
        )
        for name in ("nll", "total", "aleatoric", "epistemic"):
            assert getattr(token, name) == pytest.approx(getattr(again, name), rel=1e-3, abs=1e-6)


def test_uncertainty_is_that_of_the_model_where_a_document_begins(folder):
    bytes_run = Run(folder / "bytes_bayes", device="cpu", dtype="float32")
    reading, ids = bytes_run.uncertainty("é ship"), [256, *"é ship".encode()]
    log_probs = bytes_run.model.log_probs(torch.tensor([ids[:-1]]))[0].double()
    assert [token.id for token in reading] == ids[1:] and reading.text == "é ship"
    for token, log_p, i in zip(reading, log_probs, ids[1:], strict=True):
        assert token.nll == pytest.approx(-log_p[i].item(), rel=1e-4)
        assert token.total == pytest.approx(-(log_p.exp() * log_p).sum().item(), rel=1e-4)
        assert 0 < token.epistemic < token.total
    assert (
        Run(folder / "softmax", device="cpu", dtype="float32").uncertainty("the")[0].nll is None
    )  # characters have no end of text


@pytest.mark.parametrize("n_samples", [0, -1, 4])
def test_what_comes_next_is_the_models_last_prediction_of_all_that_fits(bayes, n_samples):
    prompt = words(9, seed=5)
    found, again = (bayes.predict(prompt, n_samples) for _ in range(2))
    idx = torch.tensor([bayes.encode(prompt)[-16:]])
    torch.manual_seed(1)
    expected = bayes.model.log_probs(idx, n_samples if n_samples < 1 else 4000)[0, -1]
    torch.testing.assert_close(
        found.log_probs.exp(), expected.exp(), rtol=0, atol=1e-6 if n_samples < 1 else 0.05
    )
    assert found.total.item() == pytest.approx(
        -(found.log_probs.exp() * found.log_probs).sum().item(), rel=1e-4
    )
    assert 0 < found.epistemic < found.total and torch.equal(found.log_probs, again.log_probs)


def test_the_samples_of_a_batch_differ_and_the_seed_repeats_them(bayes):
    def texts(seed: int) -> list[str]:
        *_, found = bayes.stream("the ", 3, Sampling(max_new_tokens=30, seed=seed), uncertain=False)
        return [text.text for text in found]

    assert len(set(texts(1))) == 3 and texts(1) == texts(1) != texts(2)


def test_a_text_that_is_being_written_leaves_the_precision_of_all_else_alone(folder):
    texts = Run(folder / "bayes", device="cpu", dtype="bfloat16").stream(
        "the ", 1, Sampling(max_new_tokens=5)
    )
    for _ in texts:
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    assert not torch.is_autocast_enabled("cpu")


# where a text ends


@pytest.mark.parametrize("seed", range(20))
def test_a_text_ends_before_the_first_stop_string_and_shows_nothing_of_it_on_the_way(seed):
    rng = np.random.default_rng(seed)
    pieces = ["".join(rng.choice(list("ab\n"), rng.integers(0, 4))) for _ in range(40)]
    stops = ["".join(rng.choice(list("ab\n"), rng.integers(2, 5))) for _ in range(2)]
    full = "".join(pieces)
    end = min([full.find(stop) for stop in stops if stop in full], default=len(full))
    text = Continuation(
        Sampling(max_new_tokens=len(pieces), stop="|".join(stops).replace("\n", "\\n"))
    )
    for i, piece in enumerate(pieces):
        before = text.text
        text.add(Token(piece, i))
        assert text.text.startswith(before) and full[:end].startswith(text.text)
    assert text.text == full[:end] and text.ended == ("stop" if end < len(full) else "length")
    assert [token.id for token in text.tokens] == sorted({token.id for token in text.tokens})


def test_generating_ends_with_the_last_text_that_ends(bayes):
    steps = list(bayes.stream("the ", 4, Sampling(max_new_tokens=200, stop=" ")))
    assert len(steps) < 100 and [text.ended for text in steps[-1]] == ["stop"] * 4
    assert not any(" " in text.text for text in steps[-1])


@pytest.mark.parametrize("abstain", ["mark", "stop"])
def test_abstaining_goes_by_the_epistemic_uncertainty(bayes, abstain):
    *_, (plain,) = bayes.stream("the ", 1, Sampling(max_new_tokens=40))
    epistemic = [token.epistemic for token in plain.tokens]
    limit = sorted(epistemic)[30]
    sampling = Sampling(max_new_tokens=40, abstain=abstain, max_epistemic=limit)
    *_, (text,) = bayes.stream("the ", 1, sampling)
    above = [i for i, value in enumerate(epistemic) if value > limit]
    if abstain == "mark":
        assert (
            text.text == plain.text
            and [i for i, t in enumerate(text.tokens) if sampling.too_uncertain(t)] == above
        )
    else:
        assert text.tokens == plain.tokens[: above[0]] and text.ended == "abstain"
        assert (
            bayes.generate_text("the ", max_new_tokens=40, abstain="stop", max_epistemic=limit)
            == text.text
        )


def test_end_of_text_is_a_stop_string_whose_bars_part_nothing():
    stops = Sampling(stop=r"\n\n|<|endoftext|>|a<|endoftext|>b").stops
    assert stops == ["\n\n", "<|endoftext|>", "a", "<|endoftext|>", "b"]
    text = Continuation(Sampling(max_new_tokens=5, stop="<|endoftext|>"))
    for i, piece in enumerate(["<", "endoftext", ">", "<|endoftext|>", "x"]):
        text.add(Token(piece, i))
    assert text.text == "<endoftext>" and text.ended == "stop"


def test_ids_that_the_tokenizer_does_not_have_are_never_drawn(bayes, monkeypatch):
    monkeypatch.setattr(bayes.tokenizer, "vocab_size", 3)
    *_, (text,) = bayes.stream(
        [0], 1, Sampling(max_new_tokens=50, temperature=100.0, top_k=0), uncertain=False
    )
    assert {token.id for token in text.tokens} == {0, 1, 2}


def test_a_text_goes_on_in_the_middle_of_its_prompts_last_character(folder, monkeypatch):
    run_ = Run(folder / "bytes_bayes", device="cpu", dtype="float32")
    step = torch.zeros(1, 1, 257), torch.zeros(1, 1), torch.zeros(1, 1)
    draws = [(torch.tensor([[i]]), Prediction(*step)) for i in "é!".encode()[1:]]
    monkeypatch.setattr("engine.eval.run.stream", lambda *_, **__: iter(draws))
    *_, (text,) = run_.stream(list("é".encode()[:1]), 1, Sampling(max_new_tokens=2))
    assert text.text == "é!"


def test_a_limit_may_be_a_prediction(bayes):
    limit = bayes.predict("the ").epistemic
    sampling = Sampling(max_new_tokens=5, abstain="stop", max_epistemic=limit.item())
    *_, (text,) = bayes.stream(bayes.tokenizer.encode("the "), 1, sampling)
    assert text.ended in ("length", "abstain")


def test_point_weights_have_no_epistemic_uncertainty_in_any_number_of_draws(folder):
    softmax = Run(folder / "softmax", device="cpu")
    assert softmax.predict("the", n_samples=4).epistemic.abs() < 1e-5
    assert all(token.epistemic < 1e-5 for token in softmax.uncertainty("the ship", n_samples=4)[1:])


# the script


def test_the_text_stands_behind_its_prompt_and_is_plain_when_piped(
    folder, bayes, monkeypatch, capsys
):
    expected = "the " + bayes.generate_text("the ", max_new_tokens=30)
    sample_py(monkeypatch, folder)
    assert capsys.readouterr().out == expected + "\n---------------\n"
    sample_py(monkeypatch, folder, "--show_uncertainty")
    output = capsys.readouterr().out
    assert expected in output and "\033" not in output
    assert re.search(r"total \d\.\d+ nats, epistemic \d\.\d+", output)


def test_colours_are_those_of_the_legend_and_a_tenth_is_underlined(
    folder, bayes, monkeypatch, capsys
):
    monkeypatch.setenv("FORCE_COLOR", "1")
    sample_py(monkeypatch, folder, "--show_uncertainty", max_new_tokens=200)
    legend, text = capsys.readouterr().out.split("\n", 1)
    shades = dict(reversed(pair) for pair in re.findall(r"\033\[38;5;(\d+)m(\w+)\033", legend))
    *_, (expected,) = bayes.stream("the ", 1, Sampling(max_new_tokens=200))
    found = re.findall(r"\033\[38;5;(\d+)(;4)?m([^\033]+)\033\[0m", text)
    assert [piece for *_, piece in found] == [token.text for token in expected.tokens]
    for (shade, _, _), token in zip(found, expected.tokens, strict=True):
        limits = [2, 5, 20, 100, math.inf]
        limit = next(limit for limit in limits if math.exp(token.total) <= limit)
        assert shade == shades[str(limit)]
    marked = [
        token.epistemic
        for (_, underlined, _), token in zip(found, expected.tokens, strict=True)
        if underlined
    ]
    assert 10 <= len(marked) <= 60 and min(marked) > np.median(
        [token.epistemic for token in expected.tokens]
    )


@pytest.mark.parametrize("plain", [{"NO_COLOR": "1"}, {"TERM": "dumb"}, {}])
def test_a_terminal_has_colours_unless_it_is_told_otherwise(folder, monkeypatch, capsys, plain):
    for name, value in ({"TERM": "xterm"} | plain).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    sample_py(monkeypatch, folder, "--show_uncertainty", max_new_tokens=3)
    assert ("\033[38;5;" in capsys.readouterr().out) == (not plain)


def test_compile_asks_the_model_for_it(folder, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(generation, "compile_step", asked.append)
    sample_py(monkeypatch, folder, max_new_tokens=2)
    assert not asked
    sample_py(monkeypatch, folder, "--compile", max_new_tokens=2)
    assert len(asked) == 1


def test_marks_stand_behind_the_tokens_that_abstaining_takes(folder, bayes, monkeypatch, capsys):
    *_, (text,) = bayes.stream("the ", 1, Sampling(max_new_tokens=30))
    limit = sorted(token.epistemic for token in text.tokens)[25]
    sample_py(monkeypatch, folder, abstain="mark", max_epistemic=limit)
    sample_py(monkeypatch, folder, abstain="mark", max_epistemic=limit, jsonl="marked.jsonl")
    (record,) = lines_of(folder / "marked.jsonl")
    assert record["uncertain"] == [
        i for i, token in enumerate(text.tokens) if token.epistemic > limit
    ]
    sample_py(monkeypatch, folder, abstain="stop", max_epistemic=limit)
    marked = "".join(token.text + "[?]" * (token.epistemic > limit) for token in text.tokens)
    output = capsys.readouterr().out
    assert output.startswith("the " + marked) and marked.count("[?]") == 4
    assert f"[abstains: epistemic uncertainty above {limit} nats]" in output


def test_prompts_come_from_a_file_and_texts_go_to_another(folder, monkeypatch, capsys):
    prompts = [{"prompt": "the ship", "id": 7}, {"prompt": "old "}]
    (folder / "prompts.jsonl").write_text("\ufeff" + "\n\n".join(map(json.dumps, prompts)))
    (folder / "prompts.txt").write_text("the ship\nold \n")
    for name in ("jsonl", "txt"):
        sample_py(
            monkeypatch,
            folder,
            "--show_uncertainty",
            prompts=f"prompts.{name}",
            num_samples=2,
            jsonl=f"o_{name}",
        )
    assert capsys.readouterr().out == ""
    found, of_txt = lines_of(folder / "o_jsonl"), lines_of(folder / "o_txt")
    assert [record.pop("id", None) for record in found] == [7, 7, None, None] and found == of_txt
    assert [(r["prompt"], r["sample"], r["seed"]) for r in found] == [
        ("the ship", 0, 1337),
        ("the ship", 1, 1337),
        ("old ", 0, 1338),
        ("old ", 1, 1338),
    ]
    for record in found:
        assert (
            record["text"] == "".join(token["text"] for token in record["tokens"])
            and record["n_tokens"] == 30
        )
        assert record["nll"] == pytest.approx(
            sum(token["nll"] for token in record["tokens"]) / 30, abs=1e-4
        )
    sample_py(monkeypatch, folder, prompts="prompts.txt", jsonl="alone", seed=1338, start="ignored")
    assert [record["seed"] for record in lines_of(folder / "alone")] == [1338, 1339]


def test_the_page_has_every_text_with_its_figures(folder, monkeypatch, capsys):
    sample_py(monkeypatch, folder, num_samples=2, html="texts.html")
    texts = capsys.readouterr().out.split("\n---------------\n")[:2]
    found = spans(folder / "texts.html")
    assert "".join(token for token, _ in found) == "".join(texts)
    given = [about["title"] == "given" for _, about in found]
    assert given == ([True] * 4 + [False] * 30) * 2


def test_a_conversation_goes_on_behind_its_last_text_and_outlives_mistakes(
    folder, bayes, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the \n\nTHE\nold "))
    sample_py(monkeypatch, folder, "--interactive", max_new_tokens=10)
    output, sampling = capsys.readouterr(), {"max_new_tokens": 10}
    first = bayes.generate_text("the ", **sampling)
    second = bayes.generate_text("the " + first, seed=1338, **sampling)
    assert output.out == "\n".join(
        [first, second, bayes.generate_text("old ", seed=1339, **sampling), ""]
    )
    assert "error: the character 'T' is not in this data set" in output.err


def test_an_interrupted_batch_leaves_the_texts_that_are_done(folder, monkeypatch, capsys):
    add, left = Continuation.add, iter([0] * 35 + [1])

    def interrupted(self, token):
        if next(left):
            raise KeyboardInterrupt
        add(self, token)

    monkeypatch.setattr(Continuation, "add", interrupted)
    (folder / "two.txt").write_text("the\nold")
    with pytest.raises(SystemExit) as exit_:
        sample_py(monkeypatch, folder, prompts="two.txt", html="some.html", jsonl="some.jsonl")
    assert exit_.value.code == 130
    (record,) = lines_of(folder / "some.jsonl")
    assert record["text"] == "".join(token for token, _ in spans(folder / "some.html")[3:])


def test_a_reader_that_has_seen_enough_ends_sampling_without_a_word(folder):
    argv = flags(
        out_dir=folder / "softmax", device="cpu", start="the ", num_samples=3, max_new_tokens=2000
    )
    command, pipe = [sys.executable, str(ROOT / "sample.py"), *argv], subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, cwd=ROOT)
    assert process.stdout.read(1) == b"t"
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(60) == 141


def test_an_interrupt_ends_a_text_of_a_conversation_and_not_the_conversation(
    folder, bayes, monkeypatch, capsys
):
    add, left = Continuation.add, iter([0] * 5 + [1] + [0] * 99)

    def interrupted(self, token):
        if next(left):
            raise KeyboardInterrupt
        add(self, token)

    monkeypatch.setattr(Continuation, "add", interrupted)
    monkeypatch.setattr(sys, "stdin", io.StringIO("the \nold "))
    sample_py(monkeypatch, folder, "--interactive", max_new_tokens=10)
    first, second, _ = capsys.readouterr().out.split("\n")
    assert len(first) == 5 and second == bayes.generate_text("old ", seed=1338, max_new_tokens=10)


def test_a_terminal_sees_tokens_one_by_one_and_no_character_that_steers_it(tmp_path):
    write_words(tmp_path / "data", BPETokenizer.train([words(400) + "\x1b[31m\x07" * 500], 300))
    run(tmp_path / "data", tmp_path / "run", max_iters=1)
    argv = flags(
        out_dir=tmp_path / "run",
        start="the \x1b[31m\x07",
        num_samples=1,
        max_new_tokens=3,
        device="cpu",
        dtype="float32",
    )
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "sample.py"), *argv], stdout=theirs, cwd=ROOT
    )
    os.close(theirs)
    output = b""
    while True:
        try:
            output += (part := os.read(ours, 4096))
        except OSError:  # the other end has closed
            break
        if not part:
            break
    os.close(ours)
    assert process.wait(60) == 0
    assert output.decode().startswith("the \ufffd[31m\ufffd") and b"\x1b[31m" not in output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"html": "there.txt"}, "there.txt exists already; delete it, or name another file"),
        ({"jsonl": "there.txt"}, "there.txt exists already"),
        ({"jsonl": "nowhere/x.jsonl"}, "there is no folder nowhere; make it"),
        ({"prompts": "missing.txt"}, "cannot read the prompt missing.txt"),
        ({"prompts": "there.txt"}, "there.txt has no prompts"),
        (
            {"prompts": "bad.jsonl", "jsonl": "new"},
            'bad.jsonl: its prompt 2 has no text "prompt"',
        ),
        ({"prompts": "strange.txt", "jsonl": "new"}, "the character 'S' is not in this data set"),
        ({"n_samples": 4, "out_dir": "softmax"}, "softmax has point weights"),
        (
            {"out_dir": "diverged"},
            "the weights diverged: transformer.wte.weight has values that are not finite",
        ),
        ({"interactive": True, "jsonl": "new"}, "leave --jsonl out"),
        ({"interactive": True, "num_samples": 1}, "leave --num_samples out"),
        ({"abstain": "maybe"}, "abstain = 'maybe' is not one of: no, mark, stop"),
        ({"abstain": "stop"}, "abstain = 'stop' needs a limit: --max_epistemic=0.05"),
        (
            {"abstain": "stop", "max_epistemic": 0.1, "out_dir": "softmax"},
            "softmax has point weights",
        ),
        ({"max_epistemic": -1}, "max_epistemic = -1.0 must be >= 0"),
    ],
)
def test_mistakes_end_in_one_line_before_anything_is_written(
    folder, monkeypatch, capsys, options, message
):
    for name, text in {
        "there.txt": "\n",
        "bad.jsonl": '{"prompt": "the"}\n{"text": "the"}\n',
        "strange.txt": "the\nSHIP",
    }.items():
        (folder / name).write_text(text)
    argv = flags(
        **{"out_dir": "bayes", "device": "cpu", "start": "the", "max_new_tokens": 2} | options
    )
    assert message in refused("sample.py", argv, folder, monkeypatch, capsys)


def test_a_notebook_shows_hostile_texts_as_text():
    page = ScoredText(
        [Token("<script>", 0), Token("</p>\"'", 1, 0.5, 1.0, 1.0, 0.0, (("<b>", 0.5),))]
    )._repr_html_()
    assert "<script>" not in page and '</p>"' not in page and "<b>" not in page
    assert "&lt;script&gt;" in page and "nll 0.5" in page


def test_what_a_user_got_wrong_is_a_line_in_a_notebook_too(bayes):
    with pytest.raises(UserError) as error:
        bayes.encode("Ж")
    (line,) = error.value._render_traceback_()
    assert line == f"error: {error.value}" and "Ж" in line


def test_a_wrong_option_of_the_python_face_is_refused(bayes):
    with pytest.raises(TypeError, match="temprature"):
        bayes.generate_text("the", temprature=1)
    with pytest.raises(UserError, match="temperature"):
        bayes.generate_text("the", temperature=-1)
    with pytest.raises(UserError, match="not a string"):
        bayes.generate_text("the", stop=["a"])
