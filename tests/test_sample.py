"""sample.py and engine/eval/run.py: texts against generate(), how they end, where they go."""

import io
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from engine.base.errors import UserError
from engine.base.files import read_json_lines
from engine.data.tokens import TokenFile
from engine.data.windows import windows
from engine.eval.evaluation import evaluate
from engine.eval.generation import generate
from engine.eval.run import Continuation, Run, Sampling
from engine.eval.scored_text import Token
from engine.eval.terminal import Screen
from sample import SampleConfig, read_prompts
from tests.helpers import (
    ONE,
    ROOT,
    assert_near,
    flags,
    refusal,
    refused,
    run,
    run_script,
    words,
    write_bytes,
)
from tests.test_report import spans


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory):
    """Runs on words: softmax and Bayesian by characters, Bayesian by bytes (with end-of-text)."""
    root = tmp_path_factory.mktemp("runs")
    (root / "softmax").symlink_to(trained("point", "categorical"))
    (root / "bayes").symlink_to(trained("bayes", "categorical"))
    run(write_bytes(root / "data"), root / "bytes", weights="bayes", max_iters=5)
    return root


@pytest.fixture(scope="module")
def bayes(folder):
    return Run(folder / "bayes", device="cpu", dtype="float32")


def stream(run: Run, prompt="the ", n: int = 1, **options) -> list[Continuation]:
    """The finished texts."""
    *_, texts = run.stream(prompt, n, Sampling(**options))
    return texts


def sample_py(monkeypatch, folder, *more: str, **options) -> None:
    monkeypatch.chdir(folder)
    defaults = {"out_dir": "bayes", "device": "cpu", "dtype": "float32", "start": "the "}
    if "--interactive" not in more:
        defaults["num_samples"] = 1
    argv = flags(**defaults | {"max_new_tokens": 30} | options)
    run_script("sample.py", *argv, *more)


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"n_samples": 3}, {"top_k": 3}, {"top_p": 0.5}]
)
def test_a_text_is_what_generate_draws_with_this_seed(bayes, options):
    idx = torch.tensor([bayes.encode("the ")])
    torch.manual_seed(7)
    ids = generate(bayes.model, idx, 40, **{"temperature": 0.8, "top_k": 200} | options)[0, 4:]
    found = bayes.generate_text("the ", max_new_tokens=40, seed=7, **options)
    assert found == bayes.tokenizer.decode(ids)


def test_the_scores_of_a_generated_text_are_those_of_reading_it(bayes):
    (text,) = stream(bayes, max_new_tokens=12)  # within a block
    read = bayes.uncertainty("the " + text.text)[4:]
    for token, again in zip(text.tokens, read, strict=True):
        assert (token.text, token.id) == (again.text, again.id)
        assert token[2:6] == pytest.approx(again[2:6], rel=1e-3, abs=1e-6)
        assert [name for name, _ in token.top] == [name for name, _ in again.top]


def test_uncertainty_reads_a_text_as_the_beginning_of_a_document(folder):
    by_bytes = Run(folder / "bytes", device="cpu", dtype="float32")
    ids = [256, *"é ship".encode()]
    log_probs = by_bytes.model.log_probs(torch.tensor([ids[:-1]]))[0]
    found = by_bytes.uncertainty("é ship")
    assert [token.id for token in found] == ids[1:]
    expected = -log_probs[range(len(found)), ids[1:]]
    assert [token.nll for token in found] == pytest.approx(expected.tolist(), rel=1e-4)


@pytest.mark.parametrize("n_samples", [0, -1])
def test_predict_is_the_models_prediction_after_the_last_block(bayes, n_samples):
    prompt = words(9, seed=5)
    found = bayes.predict(prompt, n_samples)
    idx = torch.tensor([bayes.encode(prompt)[-16:]])
    expected = bayes.model.log_probs(idx, n_samples)[0, -1]
    assert_near(found.log_probs, expected)


@pytest.mark.parametrize("seed", range(20))
def test_a_text_ends_before_the_first_stop_string_and_never_shows_a_part_of_it(seed):
    rng = np.random.default_rng(seed)
    letters = list("ab\n")
    pieces = ["".join(rng.choice(letters, n)) for n in rng.integers(0, 4, 40)]
    stops = ["".join(rng.choice(letters, n)) for n in rng.integers(2, 5, 2)]
    full = "".join(pieces)
    end = min([full.find(stop) for stop in stops if stop in full], default=len(full))
    stop = "|".join(stops).replace("\n", "\\n")
    text = Continuation(Sampling(max_new_tokens=len(pieces), stop=stop))
    for i, piece in enumerate(pieces):
        before = text.text
        text.add(Token(piece, i))
        assert text.text.startswith(before)
        assert full[:end].startswith(text.text)
    assert text.text == full[:end]
    assert text.ended == ("stop" if end < len(full) else "length")


def test_end_of_text_is_one_stop_string_despite_its_bars():
    stops = Sampling(stop=r"\n\n|<|endoftext|>|a<|endoftext|>b").stops
    assert stops == ["\n\n", "<|endoftext|>", "a", "<|endoftext|>", "b"]


def test_abstaining_stops_before_the_first_token_of_high_epistemic_uncertainty(bayes):
    (plain,) = stream(bayes)
    limit = bayes.percentiles.value("epistemic", 80)
    first = next(i for i, token in enumerate(plain.tokens) if token.epistemic > limit)
    for options in ({"abstain": "stop", "max_epistemic": limit}, {"abstain": "80%"}):
        (stopped,) = stream(bayes, **options)
        assert stopped.tokens == plain.tokens[:first]
        assert stopped.ended == "abstain"
        assert bayes.generate_text("the ", **options) == stopped.text


def test_percentiles_are_those_of_the_scores_of_the_validation_split(bayes, words_data):
    val = TokenFile(words_data, "val")
    scores = evaluate(bayes.model, windows(val, 16, 8), ONE).columns
    for name, key in (("nll", "nll"), ("total", "entropy"), ("epistemic", "mutual_information")):
        for percentile in (0, 50, 99):
            value = np.percentile(scores[key], percentile)
            assert bayes.percentiles.value(name, percentile) == pytest.approx(value, rel=0.02)
            assert bayes.percentiles.of(name, value) == pytest.approx(percentile, abs=1)


# the script


def test_the_text_follows_its_prompt_and_is_plain_when_piped(folder, bayes, monkeypatch, capsys):
    expected = "the " + bayes.generate_text("the ", max_new_tokens=30)
    sample_py(monkeypatch, folder)
    assert capsys.readouterr().out == expected + "\n---------------\n"
    sample_py(monkeypatch, folder, "--show_uncertainty")
    output = capsys.readouterr().out
    assert expected in output
    assert "epistemic" in output
    assert "\033" not in output


def test_marks_follow_uncertain_tokens_in_plain_text_in_json_and_on_the_page(
    folder, bayes, monkeypatch, capsys
):
    (text,) = stream(bayes, max_new_tokens=30)
    limit = sorted(token.epistemic for token in text.tokens)[25]
    options = {"abstain": "mark", "max_epistemic": limit}
    sample_py(monkeypatch, folder, **options)
    marked = ""
    expected = []
    for i, token in enumerate(text.tokens):
        marked += token.text
        if token.epistemic > limit:
            marked += "[?]"
            expected.append(i)
    assert len(expected) == 4
    output = capsys.readouterr().out
    assert output.startswith("the " + marked)
    assert "4 of 30 tokens" in output
    sample_py(monkeypatch, folder, jsonl="marked.jsonl", html="marked.html", **options)
    assert (folder / "marked.html").read_text().count("<u>") == 4
    (record,) = read_json_lines(folder / "marked.jsonl")
    assert record["uncertain"] == expected


def test_prompts_come_from_a_file_and_texts_go_to_another(folder, monkeypatch, capsys):
    (folder / "prompts.txt").write_text("\ufeffthe ship\n\nold \n")
    options = {"prompts": "prompts.txt", "num_samples": 2, "jsonl": "texts.jsonl"}
    sample_py(monkeypatch, folder, "--show_uncertainty", **options)
    assert capsys.readouterr().out == ""
    records = read_json_lines(folder / "texts.jsonl")
    about = [(record["prompt"], record["seed"]) for record in records]
    assert about == [("the ship", 1337)] * 2 + [("old ", 1338)] * 2
    nlls = [token["nll"] for token in records[0]["tokens"]]
    assert records[0]["n_tokens"] == len(nlls) == 30
    assert records[0]["nll"] == pytest.approx(np.mean(nlls), abs=1e-4)


def test_a_conversation_continues_its_last_text_and_survives_mistakes(
    folder, bayes, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the \n\nTHE\nold "))
    sample_py(monkeypatch, folder, "--interactive", max_new_tokens=10)
    output = capsys.readouterr()
    prompts = ["the ", "", "old "]
    shown = []
    for i, prompt in enumerate(prompts):
        whole = prompt or "the " + shown[1]
        text = bayes.generate_text(whole, max_new_tokens=10, seed=1337 + i)
        shown += [prompt, text]  # a pipe does not show what it feeds
    shown.insert(4, "THE")
    assert output.out == "\n".join([*shown, ""])
    assert "'T'" in output.err


def test_an_interrupt_keeps_the_texts_that_are_done(folder, monkeypatch):
    add = Continuation.add

    def interrupted(self, token):
        if self.sampling.seed == 1338:  # of the second text
            raise KeyboardInterrupt
        add(self, token)

    monkeypatch.setattr(Continuation, "add", interrupted)
    (folder / "two.txt").write_text("the\nold")
    with pytest.raises(SystemExit) as exit_:
        sample_py(monkeypatch, folder, prompts="two.txt", html="done.html", jsonl="done.jsonl")
    assert exit_.value.code == 130
    (record,) = read_json_lines(folder / "done.jsonl")
    assert record["text"] == "".join(token for token, *_ in spans(folder / "done.html")[3:])


@pytest.mark.slow
def test_a_closed_pipe_ends_sampling_silently(folder):
    argv = flags(out_dir="softmax", device="cpu", start="the", max_new_tokens=20_000)
    script = shlex.join([sys.executable, str(ROOT / "sample.py"), *argv])
    command = ["bash", "-o", "pipefail", "-c", f"{script} | head -c 1"]
    done = subprocess.run(command, cwd=folder, capture_output=True)
    assert (done.returncode, done.stderr) == (141, b"")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_no_control_characters():
    terminal = Terminal()
    Screen(terminal, Sampling(), coloured=False).begin("the \x1b[31m\x07\n")
    assert terminal.getvalue() == "the \ufffd[31m\ufffd\n"


@pytest.mark.parametrize(
    "options, word",
    [
        ("--html=there.txt", "there.txt"),
        ("--jsonl=there.txt", "there.txt"),
        ("--prompts=there.txt", "there.txt"),
        ("--prompts=strange.txt --jsonl=new", "'S'"),
        ("--n_samples=4 --out_dir=softmax", "--n_samples"),
        ("--interactive --jsonl=new", "--jsonl"),
        ("--abstain=often", "99%"),
        ("--abstain=99% --max_epistemic=0.1", "--abstain=stop"),
        ("--abstain=99% --out_dir=old", "evaluate.py"),
        ("--abstain=stop --max_epistemic=0.1 --out_dir=softmax", "--abstain"),
    ],
)
def test_mistakes_end_in_one_line_before_anything_is_written(folder, tmp_path, options, word):
    (tmp_path / "there.txt").write_text("\n")
    (tmp_path / "strange.txt").write_text("the\nSHIP")
    for name in ("softmax", "bayes"):
        (tmp_path / name).symlink_to(folder / name)
    shutil.copytree(folder / "bayes", tmp_path / "old")
    (tmp_path / "old" / "percentiles.json").unlink()
    argv = flags(out_dir="bayes", device="cpu", start="the", max_new_tokens=2) + options.split()
    assert word in refused("sample.py", argv, tmp_path)


def test_mistakes_are_one_line_in_a_notebook_too(bayes):
    with pytest.raises(UserError) as error:
        bayes.encode("Ж")
    assert error.value._render_traceback_() == [f"error: {error.value}"]
    assert "temperature" in refusal(bayes.generate_text, "the", temprature=1)


def test_the_command_that_a_run_ends_with_works_without_a_newline(trained):
    run = Run(trained())
    prompts = read_prompts(run, SampleConfig())
    assert [ids for _, ids in prompts] == [[0]]
    # as a shell gives it
    assert r"character '\n'" in refusal(read_prompts, run, SampleConfig(start="the\\nsea"))
