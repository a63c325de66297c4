"""evaluate.py: its numbers, tables and files, and what it refuses."""

import contextlib
import io
import math
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from engine.base.files import read_json
from engine.data.tokenizer import ByteTokenizer
from engine.data.tokens import TokenFile
from engine.eval.ensemble import Ensemble
from engine.eval.run import Run
from engine.eval.table import flat
from engine.runs.checkpoint import load_model
from tests.faults import TORCHRUN
from tests.helpers import (
    contents,
    flags,
    output_of,
    refusal,
    refused,
    run,
    run_script,
    scores_of,
    words,
    write_bytes,
    write_dataset,
    write_nanogpt,
)
from tests.test_export import exported

NAMES = ("softmax", "bayes")
ENSEMBLE = "eval_test_ensemble_of_2.json"


def evaluate_py(**options) -> str:
    """Run the script in this process; returns what it prints."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        run_script("evaluate.py", *flags(**{"device": "cpu", "report": "none"} | options))
    return output.getvalue()


def read(folder: Path, file: str = "eval_test.json") -> dict:
    return read_json(folder / file)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A softmax and a Bayes-Sig run by bytes, with dropout; and OOD text."""
    root = tmp_path_factory.mktemp("runs")
    data = write_bytes(root / "data")
    run(data, root / "softmax", dropout=0.1)
    run(data, root / "bayes", dropout=0.1, weights="bayes", likelihood="sigmoid")
    noise = {"train": ["ab"], "test": ["qx!zj# @vk? " * 40]}
    write_dataset(root / "noise", noise, ByteTokenizer())
    return root


@pytest.fixture(scope="module")
def both(runs):
    return ",".join(str(runs / name) for name in NAMES)


@pytest.fixture(scope="module")
def evaluated(runs, both):
    """What evaluate.py printed on both runs and their ensemble; what it wrote is in runs."""
    ensemble = both.replace(",", "+")
    ood = runs / "noise"
    return evaluate_py(out_dir=f"{both},{ensemble}", ood_dataset=ood, report=runs / "report")


def test_every_run_gets_the_scores_of_the_contract(runs, evaluated):
    softmax, bayes = (read(runs / name) for name in NAMES)
    shared = {"nll", "perplexity", "n_tokens", "ece", "brier", "entropy"}
    bayesian = {"mutual_information", "log_sum_sigma", "kl", "kl_weight"}
    assert shared <= softmax.keys()
    assert not bayesian & softmax.keys()
    assert shared | bayesian <= bayes.keys()
    file = TokenFile(runs / "data", "test")
    frequencies = TokenFile(runs / "data", "train").frequencies(257)
    unigram = -frequencies[file[1:].astype(int)].log().mean().item()
    for name, found in zip(NAMES, (softmax, bayes), strict=True):
        expected = scores_of(load_model(runs / name), file, batch_size=5)["nll"]
        assert found["nll"] == pytest.approx(expected)
        assert found["bits_per_byte"] == pytest.approx(expected / math.log(2))
        assert found["unigram_nll"] == pytest.approx(unigram)


def test_the_terminal_and_the_page_show_the_scores_of_the_json(runs, evaluated):
    page = (runs / "report" / "report.html").read_text()
    for name in NAMES:
        found = read(runs / name)
        for score in ("nll", "ece"):
            text = f"{found[score]:.4f}"
            assert text in evaluated
            assert f"<td>{text}</td>" in page
    first_table = [line.split()[0] for line in evaluated.splitlines()[3:8]]
    assert first_table == ["run", "unigram", *NAMES, "softmax+bayes"]


def test_an_ensemble_is_evaluated_as_one_model(runs, evaluated):
    found = read(runs / "softmax", ENSEMBLE)
    ensemble = Ensemble([load_model(runs / name) for name in NAMES])
    expected = scores_of(ensemble.eval(), TokenFile(runs / "data", "test"))
    for name in ("nll", "mutual_information"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5)


def test_ood_text_is_separated_by_every_uncertainty_of_a_head(runs, evaluated):
    (softmax,), (bayes,) = (read(runs / name)["ood"] for name in NAMES)
    assert softmax["auroc"].keys() == {"confidence", "entropy", "mahalanobis", "nll"}
    assert bayes["auroc"].keys() == softmax["auroc"].keys() | {"mutual_information"}
    assert softmax["auroc"]["nll"]["block"] > 0.99


def test_two_processes_and_another_batch_size_find_the_same_numbers(runs, both):
    options = {"out_dir": both, "n_samples": 4, "report": "none", "ood_dataset": runs / "noise"}
    evaluate_py(**options)
    one = [read(runs / name) for name in NAMES]
    argv = flags(device="cpu", batch_size=3, **options)
    output = output_of(sys.executable, *TORCHRUN, "evaluate.py", *argv)
    assert output.count("likelihood (") == 1  # only one process prints
    for name, expected in zip(NAMES, one, strict=True):
        assert flat(read(runs / name)) == pytest.approx(flat(expected), rel=1e-5, abs=1e-7)


def test_runs_with_other_tokenizers_are_compared_by_bits_per_byte_alone(runs, trained, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(trained("point", "categorical"), other)
    output = evaluate_py(out_dir=f"{runs}/softmax,{other}", report=tmp_path / "report")
    found = [read(folder)["bits_per_byte"] for folder in (runs / "softmax", other)]
    lines = [line.split() for line in output.splitlines()[4:]]
    assert lines[:2] == [["softmax", f"{found[0]:.4f}"], ["other", f"{found[1]:.4f}"]]
    assert "perplexity" not in output


def test_many_documents_are_the_units_of_the_standard_errors(runs, tmp_path):
    documents = [words(30, seed=k) for k in range(35)]
    splits = {"train": documents, "test": documents[5:]}
    write_dataset(tmp_path / "data", splits, ByteTokenizer())
    evaluate_py(out_dir=runs / "softmax", dataset=tmp_path / "data")
    found = read(runs / "softmax")
    assert found["unit"] == "document"
    assert found["n_units"] == 30
    nats_per_word = found["nll"] * found["n_tokens"] / (30 * 30)
    assert found["word_perplexity"] == pytest.approx(math.exp(nats_per_word))


@pytest.mark.parametrize(
    "options, unit", [({"split": "train"}, "stretch"), ({"limit": 12}, "window")]
)
def test_few_documents_are_resampled_in_stretches_and_a_part_of_them_in_windows(
    runs, options, unit
):
    evaluate_py(out_dir=runs / "softmax", **options)
    found = read(runs / "softmax", f"eval_{options.get('split', 'test')}.json")
    n_stretches = math.ceil((found["n_tokens"] + 1) / 1024)
    assert found["unit"] == unit
    assert found["n_units"] == options.get("limit", n_stretches)


def test_a_checkpoint_file_alone_can_be_evaluated(runs):
    checkpoint = runs / "softmax" / "ckpt_00000030.pt"
    output = evaluate_py(out_dir=checkpoint, limit=2)
    assert checkpoint.name in output
    assert read(runs / "softmax", "eval_test_ckpt_00000030.json")["n_tokens"] == 32


def test_monte_carlo_dropout_repeats_itself_and_changes_the_prediction(runs):
    rows = []
    for mc_dropout in (True, True, False):
        n_samples = 8 * mc_dropout
        evaluate_py(out_dir=runs / "softmax", mc_dropout=mc_dropout, n_samples=n_samples)
        rows.append(read(runs / "softmax"))
    assert rows[0] == rows[1]
    assert rows[0]["mutual_information"] > 0
    assert rows[2]["nll"] != rows[0]["nll"]


@pytest.mark.parametrize(
    "options, word",
    [
        ("softmax --dataset=characters", "tokenizer"),
        ("plain --mc_dropout --n_samples=4", "dropout"),
        ("softmax+nowhere", "nowhere"),
        ("softmax+softmax", "twice"),
        ("softmax --better=characters", "characters"),
        ("softmax,bayes/../softmax", "eval_test.json"),
    ],
)
def test_mistakes_end_in_one_line_before_the_evaluation(
    runs, trained, words_data, tmp_path, options, word
):
    folders = {"plain": trained("point", "categorical"), "characters": words_data}
    for name in ("softmax", "bayes", "data"):
        folders[name] = runs / name
    for name, folder in folders.items():
        (tmp_path / name).symlink_to(folder)
    argv = ["--device=cpu", "--out_dir", *options.split()]
    assert word in refused("evaluate.py", argv, tmp_path)


def test_a_run_folder_without_write_access_is_refused_before_the_evaluation(runs, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
    argv = flags(out_dir="softmax", device="cpu")
    message = refused("evaluate.py", argv, runs)
    assert "softmax" in message and "--results" in message


def test_tokens_of_unknown_text_are_evaluated_and_sampling_says_what_is_missing(tmp_path):
    ids = np.random.default_rng(0).integers(0, 50, 500)
    data = write_nanogpt(tmp_path / "ids", dict.fromkeys(("train", "val", "test"), ids))
    (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 50}))
    run(data, tmp_path / "run", max_iters=1)
    exported(tmp_path / "run", tmp_path / "gpt2")
    expected = scores_of(load_model(tmp_path / "run"), TokenFile(data, "test"))["nll"]
    for name in ("run", "gpt2"):
        evaluate_py(out_dir=tmp_path / name, dataset=data)
        assert read(tmp_path / name)["nll"] == pytest.approx(expected)
        assert "itos" in refusal(Run(tmp_path / name).generate_text, "a")


def test_with_a_folder_for_results_the_runs_do_not_change(runs, both, tmp_path):
    before = contents(runs)
    evaluate_py(out_dir=both, limit=1, results=tmp_path, report="")
    assert contents(runs) == before
    assert (tmp_path / "report_test" / "report.html").is_file()
    for name in NAMES:
        assert read(tmp_path / name)["n_tokens"] == 16
