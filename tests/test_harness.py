"""hellaswag.py --style=harness has lm-evaluation-harness' numbers, ending by ending."""

import json
from pathlib import Path

import pytest
import torch

import hellaswag
from engine.data.tokenizer import BPETokenizer
from engine.runs.checkpoint import read_checkpoint
from tests.conftest import shared_data
from tests.helpers import tiny_gpt
from tests.test_export import exported, save

WHY = "lm_eval is not installed (160 MB, optional): pip install 'lm_eval[hf]==0.4.13'"
pytest.importorskip("lm_eval.models.huggingface", reason=WHY)
pytestmark = pytest.mark.slow


def test_a_run_has_the_scores_that_the_harness_finds_for_its_exported_folder(tmp_path, monkeypatch):
    import datasets
    import lm_eval.tasks

    lines = shared_data("hellaswag/hellaswag_val.jsonl").read_text(encoding="utf-8").splitlines()
    items = [json.loads(line) for line in lines]
    beyond_ascii = [item for item in items if not "".join(item["endings"]).isascii()]
    items = items[::400] + beyond_ascii[::9]
    for item in items:
        item["label"] = str(item["label"])  # as on the Hub
    source = tmp_path / "items.jsonl"
    source.write_text("".join(json.dumps(item) + "\n" for item in items))

    texts = [text for item in items for text in (item["ctx"], *item["endings"])]
    tokenizer = BPETokenizer.train(texts, 700)  # some items are too long for the model
    shape = {"vocab_size": tokenizer.vocab_size, "block_size": 128}
    model = tiny_gpt(std=0.3, logit_bias="unigram", **shape)
    run = save(tmp_path / "run", model, tokenizer)
    gpt2 = exported(run, tmp_path / "gpt2")

    splits = dict.fromkeys(("train", "validation"), datasets.Dataset.from_list(items))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: splits)
    task = Path(lm_eval.__file__).parent / "tasks" / "hellaswag"
    theirs = lm_eval.simple_evaluate(
        "hf",
        model_args={"pretrained": str(gpt2), "device": "cpu"},
        batch_size=8,
        tasks=["hellaswag"],
        task_manager=lm_eval.tasks.TaskManager(include_path=task, include_defaults=False),
    )
    samples = sorted(theirs["samples"]["hellaswag"], key=lambda sample: sample["doc_id"])

    config = hellaswag.HellaSwagConfig(
        out_dir=str(run),
        source=str(source),
        style="harness",
        device="cpu",
    )
    prepared = hellaswag.read_items(config)
    log_probs, lengths = hellaswag.score(config, read_checkpoint(run), prepared)
    for found, n_chars, sample in zip(log_probs, lengths, samples, strict=True):
        expected = [float(response[0]) for response in sample["filtered_resps"]]
        assert found.tolist() == pytest.approx(expected, rel=1e-4)
        assert n_chars.tolist() == [len(choice) for choice in sample["doc"]["choices"]]
    labels = torch.tensor([item.label for item in prepared])
    for name, value in hellaswag.judge(log_probs, lengths, labels).items():
        if name.startswith("acc"):
            assert value == pytest.approx(theirs["results"]["hellaswag"][f"{name},none"])
