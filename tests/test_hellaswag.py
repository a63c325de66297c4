"""hellaswag.py: items prepared as both conventions say, scored as transformers scores each ending
alone.
"""

import hashlib
import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import hellaswag
from engine.base.errors import UserError
from engine.data.tokenizer import GPT2Tokenizer, load_tokenizer
from engine.eval.endings import encode, score_endings
from engine.runs.checkpoint import load_model, read_checkpoint
from tests.conftest import shared_data
from tests.helpers import ROOT, run, write_bytes, write_words

WIKIHOW = {
    "activity_label": "Home and Garden",
    "ctx_a": "[header] How to sow [title] Choose a  pot. [substeps] Clay is best. [step]",
    "ctx_b": "",
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
    "activity_label": "Canoeing",
    "ctx_a": "Two women sit in a canoe.",
    "ctx_b": "the Older one",
    "ctx": "Two women sit in a canoe. the Older one",
    "endings": ["paddles.", "sings a song.", "is a tree.", "swims away from the canoe."],
    "label": "1",  # as on the hub
}


@pytest.fixture
def gpt2_folder(tmp_path):
    """A transformers GPT-2 with random weights, and the same in float64."""
    config = GPT2Config(
        vocab_size=50257, n_positions=64, n_layer=2, n_head=2, n_embd=16, initializer_range=0.3
    )
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2", model.double()


def call(*argv: object, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["hellaswag.py", *map(str, argv)])
    hellaswag.main()


def write_items(path, records) -> object:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_transformers_folder_scores_as_transformers_does_in_both_styles(
    gpt2_folder, tmp_path, monkeypatch
):
    folder, reference = gpt2_folder
    source = write_items(tmp_path / "items.jsonl", [WIKIHOW, ACTIVITY])
    tokenizer = GPT2Tokenizer()
    for style in ("completion", "harness"):
        items = [hellaswag.prepare(record, style) for record in (WIKIHOW, ACTIVITY)]
        call(
            f"--out_dir={folder}",
            f"--source={source}",
            f"--style={style}",
            "--device=cpu",
            monkeypatch=monkeypatch,
        )
        result = json.loads((folder / "hellaswag.json").read_text())
        config = hellaswag.HellaSwagConfig(out_dir=str(folder), style=style, device="cpu")
        found = hellaswag.score(config, read_checkpoint(folder), items)
        log_probs, lengths = (values.tolist() for values in found)
        correct = {"acc": 0, "acc_norm": 0}
        for item, answer, n_units, label in zip(items, log_probs, lengths, (2, 1), strict=True):
            sums = []
            for ending in item.endings:
                context, ids = (
                    tokenizer.encode(item.context).tolist(),
                    tokenizer.encode(ending).tolist(),
                )
                with torch.no_grad():
                    logits = reference(torch.tensor([context + ids])).logits[
                        0, len(context) - 1 : -1
                    ]
                sums.append(logits.log_softmax(-1)[range(len(ids)), ids].sum().item())
            assert answer == pytest.approx(sums, abs=1e-3)
            if style == "completion":
                assert n_units == [len(tokenizer.encode(ending)) for ending in item.endings]
            else:
                assert n_units == item.n_chars
            normed = [total / length for total, length in zip(sums, n_units, strict=True)]
            correct["acc"] += sums.index(max(sums)) == label
            correct["acc_norm"] += normed.index(max(normed)) == label
        assert (result["style"], result["n"]) == (style, 2)
        assert {name: 2 * result[name] for name in correct} == correct


def test_the_completion_style_leaves_the_text_as_it_is():
    item = hellaswag.prepare(WIKIHOW, "completion")
    assert item.context == WIKIHOW["ctx"] and item.endings == [
        " " + ending for ending in WIKIHOW["endings"]
    ]


def test_the_harness_style_cleans_as_the_harness_does():
    assert (
        hellaswag.clean(" a [title] b  c [step] d[e]f   g  ") == "a. b c df  g"
    )  # one pass over the spaces
    item = hellaswag.prepare(WIKIHOW, "harness")
    assert item.context == "Home and Garden: How to sow. Choose a pot. Clay is best."
    assert item.endings == ["  Use a dry pot.", "   Wait.", "  Fill it. Put soil in.", "  Water é."]
    assert item.n_chars == [14, 6, 21, 8] and item.label == 2
    item = hellaswag.prepare(ACTIVITY, "harness")
    assert (
        item.context == "Canoeing: Two women sit in a canoe. The older one"
        and item.endings[0] == " paddles."
    )


def test_scores_errors_and_the_area_by_hand():
    log_probs = torch.tensor(
        [[-1.0, -2, -8, -8], [-1, -3, -3, -9], [-9, -9, -9, -8], [-3, -9, -9, -8]]
    ).double()
    lengths = torch.tensor([[1, 4, 4, 4]] * 4)
    result = hellaswag.judge(log_probs, lengths, torch.tensor([0, 1, 3, 3]))
    assert result["n"] == 4 and result["acc"] == 0.5 and result["acc_norm"] == 0.75
    assert result["acc_norm_stderr"] == pytest.approx((0.75 * 0.25 / 3) ** 0.5)
    # the margins of acc_norm are 0.5, 0, 0.25, 0.25; the answer to the first item is wrong
    assert result["aurc"] == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)


@pytest.mark.parametrize("style", ["completion", "harness"])
def test_a_run_of_any_tokenizer_is_scored_and_one_that_lacks_a_character_is_told_so(
    style, tmp_path, monkeypatch
):
    source = write_items(tmp_path / "items.jsonl", [WIKIHOW, ACTIVITY, ACTIVITY])
    out_dir = tmp_path / "run"
    run(write_bytes(tmp_path / "bytes"), out_dir, max_iters=1, eval_iters=1, weights="bayes")
    arguments = (f"--source={source}", f"--style={style}", "--device=cpu")
    call(f"--out_dir={out_dir}", "--limit=2", *arguments, monkeypatch=monkeypatch)
    result = json.loads((out_dir / "hellaswag.json").read_text())
    assert result["n"] == 2 and result["style"] == style and {"acc", "acc_norm"} <= result.keys()
    items = [hellaswag.prepare(record, style) for record in (WIKIHOW, ACTIVITY)]
    texts = [encode(load_tokenizer(out_dir), item.context, item.endings) for item in items]
    config = hellaswag.HellaSwagConfig(out_dir=str(out_dir), style=style, device="cpu")
    found, lengths = hellaswag.score(config, read_checkpoint(out_dir), items)
    expected = score_endings(load_model(out_dir), texts)
    torch.testing.assert_close(found.flatten(), expected)
    judged = hellaswag.judge(found, lengths, torch.tensor([item.label for item in items]))
    assert judged.items() <= result.items()
    run(write_words(tmp_path / "chars"), tmp_path / "of_chars", max_iters=1, eval_iters=1)
    with pytest.raises(UserError, match="character"):
        call(f"--out_dir={tmp_path / 'of_chars'}", *arguments, monkeypatch=monkeypatch)
    assert not (tmp_path / "of_chars" / "hellaswag.json").exists()


BROKEN = [
    "{",
    "\xff",
    "[1]",
    json.dumps(ACTIVITY | {"endings": ["a", "b", "c"]}),
    json.dumps(ACTIVITY | {"endings": ["a", "b", "c", 4]}),
    json.dumps(ACTIVITY | {"label": ""}),
    json.dumps(ACTIVITY | {"label": 4}),
    json.dumps({name: value for name, value in ACTIVITY.items() if name != "label"}),
]


@pytest.mark.parametrize("line", BROKEN)
def test_a_line_that_is_no_item_is_named(line, tmp_path, monkeypatch):
    source = tmp_path / "items.jsonl"
    source.write_bytes(json.dumps(ACTIVITY).encode() + b"\n" + line.encode("latin-1"))
    with pytest.raises(UserError, match="item 2 is no") as error:
        call(f"--out_dir={tmp_path}", f"--source={source}", monkeypatch=monkeypatch)
    assert str(source) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source=none.jsonl"], "--download"),
        (["--source=empty.jsonl"], "no items"),
        (["--limit=0"], "limit"),
        (["--limit=some"], "limit"),
        (["--style=mine"], "style"),
        (["--model=gpt2"], "not both"),
        (["--model=mine"], "model"),
        (["--out_dir="], "which model"),
        ([], "--download"),
        (["--out_dir=", "--model=gpt2"], "--download"),
    ],
)
def test_wrong_options_end_in_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hellaswag, "ITEMS", tmp_path / "hellaswag_val.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match=message):
        call("--out_dir=.", *arguments, monkeypatch=monkeypatch)


def test_download_alone_fetches_the_items_once(tmp_path, monkeypatch, capsys):
    original, items = tmp_path / "original.jsonl", tmp_path / "hellaswag" / "items.jsonl"
    monkeypatch.setattr(hellaswag, "URL", original.as_uri())
    monkeypatch.setattr(hellaswag, "ITEMS", items)
    with pytest.raises(UserError, match="cannot fetch"):
        call("--download", monkeypatch=monkeypatch)
    write_items(original, [ACTIVITY])
    with pytest.raises(UserError, match="not the items"):
        call("--download", monkeypatch=monkeypatch)
    assert not items.exists()
    monkeypatch.setattr(hellaswag, "SHA256", hashlib.sha256(original.read_bytes()).hexdigest())
    call("--download", monkeypatch=monkeypatch)
    assert items.read_bytes() == original.read_bytes() and str(items) in capsys.readouterr().out
    original.unlink()
    call("--download", monkeypatch=monkeypatch)  # it is there
    assert len(hellaswag.read_items(hellaswag.HellaSwagConfig(out_dir="x"))) == 1


def test_the_real_items_are_those_of_the_stated_hash_and_git_ignores_them():
    data = shared_data("hellaswag/hellaswag_val.jsonl").read_bytes()
    assert hashlib.sha256(data).hexdigest() == hellaswag.SHA256
    ignored = subprocess.run(["git", "check-ignore", "-q", hellaswag.ITEMS], cwd=ROOT)
    assert ignored.returncode == 0


def test_the_script_ends_with_code_2_and_one_line_and_keeps_what_was_there(tmp_path):
    (tmp_path / "hellaswag.json").write_text("before")
    command = [
        sys.executable,
        str(ROOT / "hellaswag.py"),
        f"--out_dir={tmp_path}",
        "--source=none.jsonl",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (
        done.returncode == 2
        and len(done.stderr.splitlines()) == 1
        and done.stderr.startswith("error: ")
    )
    assert (tmp_path / "hellaswag.json").read_text() == "before"


def test_real_items_need_no_joint_encoding_and_are_scored_without_a_network(gpt2_folder, tmp_path):
    folder, _ = gpt2_folder
    source, tokenizer = shared_data("hellaswag/hellaswag_val.jsonl"), GPT2Tokenizer()
    lines = source.read_bytes().splitlines()
    for line in lines[::50]:
        item = hellaswag.prepare(json.loads(line), "harness")
        for ending in item.endings:
            whole = tokenizer.encode(item.context + ending).tolist()
            assert whole == [
                *tokenizer.encode(item.context).tolist(),
                *tokenizer.encode(ending).tolist(),
            ]
    assert len(lines) == 10042
    code = "import socket; socket.getaddrinfo = socket.socket.connect = None; import runpy, sys; "
    code += "sys.argv = sys.argv[1:]; "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    arguments = [
        ROOT / "hellaswag.py",
        f"--out_dir={folder}",
        f"--source={source}",
        "--limit=6",
        "--device=cpu",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0 and "6 items" in done.stdout, done.stderr
    assert json.loads((folder / "hellaswag.json").read_text())["n"] == 6
