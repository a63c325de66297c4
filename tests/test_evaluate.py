"""evaluate.py: its numbers, tables, files, and what it refuses."""

import json
import math
import runpy
import shutil
import subprocess
import sys

import pytest
import torch

from engine.data.tokenizer import ByteTokenizer, load_tokenizer
from engine.data.tokens import TokenFile
from engine.eval.table import flat
from engine.runs.checkpoint import load_model
from tests.helpers import (
    ROOT,
    flags,
    refused,
    run,
    scores_of,
    words,
    write_bytes,
    write_dataset,
    write_words,
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A softmax and a Bayes-Sig run on words by bytes."""
    root = tmp_path_factory.mktemp("runs")
    data = write_bytes(root / "data")
    run(data, root / "softmax", eval_interval=10)
    run(data, root / "bayes_sigmoid", eval_interval=10, weights="bayes", likelihood="sigmoid")
    return root


def evaluate_py(monkeypatch, **options) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *flags(device="cpu", **options)])
    runpy.run_path(str(ROOT / "evaluate.py"), run_name="__main__")


def test_evaluate_py_writes_the_contract_for_every_run(runs, monkeypatch, capsys):
    evaluate_py(monkeypatch, out_dir=f"{runs}/softmax,{runs}/bayes_sigmoid/", split="val")
    output = capsys.readouterr().out
    softmax, bayes = (
        json.loads((runs / name / "eval_val.json").read_text())
        for name in ("softmax", "bayes_sigmoid")
    )
    shared = {"nll", "perplexity", "n_tokens", "ece", "brier", "entropy"}
    bayesian = {"mutual_information", "log_sum_sigma", "kl", "kl_weight"}
    assert shared <= softmax.keys() and not bayesian & softmax.keys()
    assert shared | bayesian <= bayes.keys()
    file = TokenFile(runs / "data", "val")
    for found in (softmax, bayes):
        assert found["n_tokens"] == len(file) - 1
        assert found["perplexity"] == pytest.approx(math.exp(found["nll"]))
        assert found["bits_per_byte"] == pytest.approx(
            found["nll"] / math.log(2)
        )  # a token is a byte here
        assert f"{found['nll']:.4f}" in output
        frequencies = TokenFile(runs / "data", "train").frequencies(257)
        assert found["unigram_nll"] == pytest.approx(
            -frequencies[file.ids[1:].astype(int)].log().mean().item()
        )
    assert softmax["nll"] == pytest.approx(scores_of(load_model(runs / "softmax"), file, 5)["nll"])
    lines = output.splitlines()
    assert lines[0].endswith("(stretch)")
    ratio = math.exp(softmax["unigram_nll"] - softmax["nll"])
    assert f"{ratio:.3f}" in lines[4].split()
    assert [line.split()[0] for line in lines[3:7]] == [
        "run",
        "unigram",
        "softmax",
        "bayes_sigmoid",
    ]


def test_evaluate_py_gives_the_same_numbers_at_every_batch_size(runs, monkeypatch):
    found = []
    for batch_size in (1, 16):
        evaluate_py(
            monkeypatch,
            out_dir=runs / "bayes_sigmoid",
            batch_size=batch_size,
            n_samples=4,
            report="none",
        )
        found.append(json.loads((runs / "bayes_sigmoid" / "eval_test.json").read_text()))
    assert flat(found[0]) == pytest.approx(flat(found[1]), rel=1e-5, abs=1e-7)


def test_a_run_with_another_tokenizer_than_the_data_is_refused(runs, tmp_path, monkeypatch, capsys):
    words = write_words(tmp_path / "words")
    with pytest.raises(SystemExit) as exit_:
        evaluate_py(monkeypatch, out_dir=runs / "softmax", dataset=words)
    assert exit_.value.code == 2 and "another tokenizer" in capsys.readouterr().err


def test_a_checkpoint_file_alone_can_be_evaluated_and_sampled(runs, monkeypatch, capsys):
    checkpoint = runs / "softmax" / "ckpt_00000030.pt"
    evaluate_py(monkeypatch, out_dir=checkpoint, dataset=runs / "data", split="test", report="none")
    assert "ckpt_00000030.pt" in capsys.readouterr().out
    argv = flags(init_from=checkpoint, start="the ", num_samples=1, max_new_tokens=5, device="cpu")
    monkeypatch.setattr(sys, "argv", ["sample.py", *argv])
    runpy.run_path(str(ROOT / "sample.py"), run_name="__main__")
    assert capsys.readouterr().out.startswith("the ")


def test_two_processes_find_what_one_finds(runs, monkeypatch):
    options = {
        "split": "val",
        "batch_size": 3,
        "n_samples": 4,
        "report": "none",
        "ood_dataset": runs / "letters",
    }
    names = ("softmax", "bayes_sigmoid")
    out_dir = ",".join(f"{runs}/{name}" for name in names)
    write_dataset(runs / "letters", {"train": ["ab"], "val": ["x y z " * 99]}, ByteTokenizer())
    evaluate_py(monkeypatch, out_dir=out_dir, **options)
    one = [json.loads((runs / name / "eval_val.json").read_text()) for name in names]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    argv = flags(out_dir=out_dir, device="cpu", **options)
    result = subprocess.run(
        [*torchrun, "evaluate.py", *argv], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert (
        sum(line.startswith("bayes_sigmoid ") for line in result.stdout.splitlines()) == 3
    )  # one process speaks
    for name, expected in zip(names, one, strict=True):
        found = json.loads((runs / name / "eval_val.json").read_text())
        assert flat(found) == pytest.approx(flat(expected), rel=1e-5, abs=1e-9)


def test_foreign_text_is_told_apart_by_every_doubt_that_a_head_has(runs, monkeypatch, capsys):
    write_dataset(runs / "noise", {"train": ["ab"], "test": ["qx!zj# @vk? " * 40]}, ByteTokenizer())
    evaluate_py(
        monkeypatch,
        out_dir=f"{runs}/softmax,{runs}/bayes_sigmoid",
        ood_dataset=runs / "noise",
        report="none",
    )
    softmax, bayes = (
        json.loads((runs / n / "eval_test.json").read_text())["ood"]
        for n in ("softmax", "bayes_sigmoid")
    )
    assert softmax["auroc"].keys() == {"confidence", "entropy", "nll"}
    assert bayes["auroc"].keys() == softmax["auroc"].keys() | {"mutual_information"}
    assert softmax["auroc"]["nll"]["block"] > 0.99
    assert softmax["n_tokens"] == 479 and softmax["nll"] > 3
    assert "out-of-domain" in capsys.readouterr().out


def test_of_runs_with_other_tokenizers_only_bits_per_byte_are_compared(
    runs, tmp_path, monkeypatch, capsys
):
    data = write_words(tmp_path / "chars")
    run(data, tmp_path / "other")
    capsys.readouterr()
    evaluate_py(monkeypatch, out_dir=f"{runs}/softmax,{tmp_path}/other", report=tmp_path / "report")
    output = capsys.readouterr().out
    assert "only bits per byte" in output and "perplexity" not in output and "ECE" not in output
    found = [
        json.loads((folder / "eval_test.json").read_text())["bits_per_byte"]
        for folder in (runs / "softmax", tmp_path / "other")
    ]
    assert [line.split() for line in output.splitlines()[4:6]] == [
        ["softmax", f"{found[0]:.4f}"],
        ["other", f"{found[1]:.4f}"],
    ]


def test_the_tables_say_what_the_json_says(runs, tmp_path, monkeypatch, capsys):
    evaluate_py(
        monkeypatch,
        out_dir=f"{runs}/softmax,{runs}/bayes_sigmoid",
        report=tmp_path / "r",
        ood_dataset="",
    )
    output = capsys.readouterr().out
    page = (tmp_path / "r" / "report.html").read_text()
    for name in ("softmax", "bayes_sigmoid"):
        found = flat(json.loads((runs / name / "eval_test.json").read_text()))
        for number in ("nll", "ece", "aurc_confidence"):
            text = f"{found[number]:.4f}"
            assert text in output and f"<td>{text}</td>" in page


def test_continuations_have_the_same_prompts_and_settings_for_all_and_go_beside_the_numbers(
    runs, monkeypatch, capsys
):
    options = {
        "continuations": 6,
        "prompt_tokens": 9,
        "max_new_tokens": 20,
        "temperature": 0.7,
        "report": "none",
    }
    evaluate_py(monkeypatch, out_dir=f"{runs}/softmax,{runs}/bayes_sigmoid", limit=2, **options)
    found, texts = [], []
    for name in ("softmax", "bayes_sigmoid"):
        found.append(json.loads((runs / name / "eval_test.json").read_text()))
        texts.append(
            [
                json.loads(t)
                for t in (runs / name / "continuations_test.jsonl").read_text().splitlines()
            ]
        )
    settings = found[0]["continuations"]["settings"]
    assert settings == found[1]["continuations"]["settings"]
    assert options.items() - {("continuations", 6), ("report", "none")} <= settings.items()
    prompts = [[text["prompt"] for text in of_run] for of_run in texts]
    assert (
        prompts[0] == prompts[1]
        and len(prompts[0]) == 6
        and all(len(prompt) == 9 for prompt in prompts[0])
    )
    assert all(len(text["continuation"]) <= 20 for of_run in texts for text in of_run)
    assert found[0]["continuations"]["n_texts"] == 6 and found[0]["n_tokens"] == 2 * 16
    assert f"{found[0]['continuations']['self_bleu']:.2f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"continuations": 9, "prompt_tokens": 10**6}, "too few for 9 prompts of 1000000"),
        ({"labels": "none"}, "--name=none"),
        ({"ood_dataset": "no_test"}, "test.bin is missing"),
        ({"report": ROOT / "README.md" / "report"}, "cannot be written to"),
    ],
)
def test_what_an_option_lacks_is_said_before_the_evaluation(
    runs, tmp_path, monkeypatch, capsys, options, message
):
    shutil.copytree(runs / "data", tmp_path / "no_test")
    (tmp_path / "no_test" / "test.bin").unlink()
    folders = {name: tmp_path / options[name] for name in options if name == "ood_dataset"}
    monkeypatch.setattr("engine.eval.evaluation.evaluate", None)  # not called
    with pytest.raises(SystemExit) as exit_:
        evaluate_py(monkeypatch, out_dir=runs / "bayes_sigmoid", **options | folders)
    assert exit_.value.code == 2 and message in capsys.readouterr().err


def test_a_folder_that_takes_no_files_is_refused_before_the_evaluation(runs, monkeypatch, capsys):
    monkeypatch.setattr("engine.eval.evaluation.evaluate", None)  # not called
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(SystemExit) as exit_:
        evaluate_py(monkeypatch, out_dir=runs / "softmax")
    assert exit_.value.code == 2 and "cannot be written to; copy the run" in capsys.readouterr().err


def many_documents(folder):
    """Data with documents enough to resample them."""
    documents = [words(30, seed=k) for k in range(40)]
    write_dataset(
        folder, {"train": documents, "val": documents[:3], "test": documents[5:35]}, ByteTokenizer()
    )
    return folder


def test_errors_of_the_difference_are_those_of_pairs_of_documents(tmp_path, monkeypatch, capsys):
    data = many_documents(tmp_path / "data")
    for name, steps in (("a", 20), ("b", 25)):
        run(data, tmp_path / name, max_iters=steps)
    evaluate_py(monkeypatch, out_dir=f"{tmp_path}/a,{tmp_path}/b", report="none")
    first, second = (json.loads((tmp_path / name / "eval_test.json").read_text()) for name in "ab")
    assert first["unit"] == "document" and first["n_units"] == 30 and 0 < first["nll_se"] < 0.2
    assert first["n_words"] == 30 * 30
    assert first["word_perplexity"] == pytest.approx(
        math.exp(first["nll"] * first["n_tokens"] / first["n_words"])
    )
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("b "))
    ratio, error = map(float, line.split()[-2:])
    assert (
        ratio == pytest.approx(math.exp(second["nll"] - first["nll"]), abs=6e-4)
        and error < second["nll_se"]
    )


def test_a_text_of_few_documents_is_resampled_in_stretches_and_a_short_one_not_at_all(
    runs, monkeypatch
):
    evaluate_py(monkeypatch, out_dir=runs / "softmax", split="train", report="none", limit=0)
    found = json.loads((runs / "softmax" / "eval_train.json").read_text())
    assert (
        found["unit"] == "stretch"
        and found["n_units"] == math.ceil((found["n_tokens"] + 1) / 1024)
        and "nll_se" in found
    )
    evaluate_py(monkeypatch, out_dir=runs / "softmax", split="train", report="none", limit=12)
    found = json.loads((runs / "softmax" / "eval_train.json").read_text())
    assert found["unit"] == "window" and found["n_units"] == 12 and "nll_se" in found
    evaluate_py(monkeypatch, out_dir=runs / "softmax", split="test", report="none")
    assert "nll_se" not in json.loads((runs / "softmax" / "eval_test.json").read_text())


def test_a_run_whose_weights_are_not_finite_is_refused_and_nothing_written(
    runs, tmp_path, monkeypatch, capsys
):
    shutil.copytree(runs / "softmax", tmp_path / "bad")
    path = tmp_path / "bad" / "ckpt_00000030.pt"
    contents = torch.load(path)
    contents["model"]["transformer.ln_f.weight"].fill_(math.nan)
    torch.save(contents, path)
    argv = [f"--out_dir={tmp_path}/bad", "--device=cpu"]
    assert "not finite" in refused("evaluate.py", argv, tmp_path, monkeypatch, capsys)


def test_posterior_samples_change_the_prediction_of_bayesian_heads_alone(runs):
    file, found = TokenFile(runs / "data", "val"), {}
    for name in ("softmax", "bayes_sigmoid"):
        model = load_model(runs / name)
        found[name] = [scores_of(model, file, n_samples=n)["nll"] for n in (0, 4)]
    assert found["softmax"][0] == pytest.approx(found["softmax"][1], rel=1e-6)
    assert found["bayes_sigmoid"][0] != found["bayes_sigmoid"][1]
    assert found["bayes_sigmoid"][0] == pytest.approx(found["bayes_sigmoid"][1], rel=0.05)


def test_a_run_folder_has_its_tokenizer(runs):
    assert load_tokenizer(runs / "softmax").describe() == {"kind": "byte"}
