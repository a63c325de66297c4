"""hellaswag.py: scores as transformers', and the user's mistakes."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import hellaswag
from engine.base.files import read_json
from engine.data.tokenizer import GPT2Tokenizer
from engine.runs.checkpoint import read_checkpoint
from tests.helpers import flags, refusal, refused, run, write_bytes

WIKIHOW = {
    "ctx": "[header] How to sow [title] Choose a  pot. [substeps] Clay is best. [step]",
    "endings": [
        " Use a dry [substeps] pot.",
        "[step] Wait.",
        "Fill it [title] Put soil in.",
        "Water é.",
    ],
    "label": 2,
}
ACTIVITY = {
    "ctx": "Two women sit in a canoe. the Older one",
    "endings": ["paddles.", "sings a song.", "is a tree.", "swims away from the canoe."],
    "label": "1",  # as on the Hub
}


def call(**options) -> None:
    """Run the script in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["hellaswag.py", *flags(device="cpu", **options)])
        hellaswag.main()


def write_items(path: Path, *records: dict) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_transformers_folder_has_the_scores_of_transformers(tmp_path):
    shape = {"n_positions": 64, "n_layer": 2, "n_head": 2, "n_embd": 16}
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**shape, initializer_range=0.3)).eval()
    model.save_pretrained(tmp_path)
    model.double()
    tokenizer = GPT2Tokenizer()
    sums, lengths = [], []
    for record in (WIKIHOW, ACTIVITY):
        context = tokenizer.encode(record["ctx"]).tolist()
        for ending in record["endings"]:
            ids = tokenizer.encode(" " + ending).tolist()
            with torch.no_grad():
                logits = model(torch.tensor([context + ids])).logits[0]
            log_probs = logits[len(context) - 1 : -1].log_softmax(-1)
            sums.append(log_probs[range(len(ids)), ids].sum().item())
            lengths.append(len(ids))
    source = write_items(tmp_path / "items.jsonl", WIKIHOW, ACTIVITY)
    config = hellaswag.HellaSwagConfig(str(tmp_path), source=str(source), device="cpu")
    items = hellaswag.read_items(config)
    found, found_lengths = hellaswag.score(config, read_checkpoint(tmp_path), items)
    assert found.flatten().tolist() == pytest.approx(sums, abs=1e-3)
    assert found_lengths.flatten().tolist() == lengths
    call(out_dir=tmp_path, source=source)
    result = read_json(tmp_path / "hellaswag.json")
    expected = hellaswag.judge(found, found_lengths, torch.tensor([2, 1]))
    assert expected.items() <= result.items()


def test_scores_and_errors_by_hand():
    log_probs = [
        [-1, -2, -8, -8],
        [-1, -3, -3, -9],
        [-9, -9, -9, -8],
        [-3, -9, -9, -8],
    ]
    lengths = torch.tensor([[1, 4, 4, 4]] * 4)
    labels = torch.tensor([0, 1, 3, 3])
    result = hellaswag.judge(torch.tensor(log_probs).double(), lengths, labels)
    assert result["n"] == 4
    assert result["acc"] == 0.5
    assert result["acc_norm"] == 0.75
    assert result["acc_norm_stderr"] == pytest.approx((0.75 * 0.25 / 3) ** 0.5)


def test_a_run_is_scored_unless_its_tokenizer_lacks_a_character(tmp_path, trained):
    source = write_items(tmp_path / "items.jsonl", ACTIVITY, ACTIVITY)
    out_dir = tmp_path / "run"
    run(write_bytes(tmp_path / "bytes"), out_dir, max_iters=1, weights="bayes")
    results = tmp_path / "results"
    call(out_dir=out_dir, source=source, limit=1, n_samples=2, results=results)
    assert read_json(results / "hellaswag.json")["n"] == 1
    assert not (out_dir / "hellaswag.json").exists()
    assert "character" in refusal(call, out_dir=trained("point", "categorical"), source=source)


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "\xff",
        "[1]",
        json.dumps(ACTIVITY | {"endings": ["a", "b", "c"]}),
        json.dumps(ACTIVITY | {"label": 4}),
        json.dumps({"ctx": "a"}),
    ],
)
def test_a_line_that_is_no_item_is_named(line, tmp_path):
    source = tmp_path / "items.jsonl"
    source.write_bytes(json.dumps(ACTIVITY).encode() + b"\n" + line.encode("latin-1"))
    assert "item 2" in refusal(call, out_dir=tmp_path, source=source)


@pytest.mark.parametrize(
    "options, word",
    [
        ({"out_dir": ".", "source": "none.jsonl"}, "curl"),
        ({"out_dir": ".", "source": "empty.jsonl"}, "empty.jsonl"),
        ({"out_dir": ".", "limit": -1}, "limit"),
    ],
)
def test_mistakes_end_in_one_line(options, word, tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    argv = flags(device="cpu", **options)
    assert word in refused("hellaswag.py", argv, tmp_path)
