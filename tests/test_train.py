"""train.py: the loop, what it writes, and what must not change it."""

import math
import shutil
from contextlib import nullcontext

import pytest
import torch

from engine.base import distributed
from engine.data.batches import Batches
from engine.data.tokens import TokenFile
from engine.data.windows import eval_batches
from engine.eval.validation import mean_loss
from engine.runs import checkpoint, saver
from tests.helpers import HEADS, ONE, TINY, difference, records, refusal, run, same_weights, values

every_head = pytest.mark.parametrize("weights, likelihood", HEADS)


@pytest.fixture
def plain(trained):
    """A softmax run's folder, to compare others with."""
    return trained("point", "categorical")


@every_head
def test_every_head_learns_more_than_token_frequencies(words_data, trained, weights, likelihood):
    before, after = records(trained(weights, likelihood), "val_nll")
    val, train = TokenFile(words_data, "val"), TokenFile(words_data, "train")
    counts = val.counts(train.vocab_size)
    frequencies = train.frequencies(train.vocab_size)
    unigram = -(counts @ frequencies.log()).item() / counts.sum().item()
    assert after["val_nll"] < 0.75 * unigram < before["val_nll"]
    assert after["val_loss"] < before["val_loss"]


def nanogpt_learning_rate(step: int) -> float:
    """With 2 steps of warm-up and 4 of decay."""
    if step < 2:
        return 1e-2 * (step + 1) / 3
    if step > 4:
        return 1e-3
    return 1e-3 + 0.5 * (1 + math.cos(math.pi * (step - 2) / 2)) * 9e-3


@every_head
def test_training_is_a_plain_loop_with_adamw(words_data, tmp_path, weights, likelihood):
    options = {
        "weights": weights,
        "likelihood": likelihood,
        "dropout": 0.1,
        "grad_clip": 0.5 if likelihood == "sigmoid" else 0.0,
        "gradient_accumulation_steps": 2,
        "weight_decay": 0.5,
        "warmup_iters": 2,
        "lr_decay_iters": 4,
        "seed": 7,
    }
    model = run(words_data, tmp_path / "start", **options, max_iters=0).train()
    batches = Batches(TokenFile(words_data, "train"), TINY["batch_size"], 16, seed=7)
    groups = {0.0: [], 0.5: []}  # weight decay -> parameters
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() == 2 and not name.endswith("log_std")
        groups[0.5 * is_matrix].append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": group, "weight_decay": decay} for decay, group in groups.items()],
        betas=(0.9, 0.95),
    )
    max_norm = options["grad_clip"] or math.inf
    expected = []
    for step in range(6):
        for group in optimizer.param_groups:
            group["lr"] = nanogpt_learning_rate(step)
        model.lm_head.kl_ramp.fill_(min(1, (step + 1) / 3))
        loss = 0.0
        for micro_batch in (2 * step, 2 * step + 1):
            distributed.seed_micro_batch(7, micro_batch)
            loss += model(*batches[micro_batch]) / 2
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad()
        expected.append((loss.item(), norm.item(), nanogpt_learning_rate(step)))

    trained = run(words_data, tmp_path / "run", **options, max_iters=6)
    found = records(tmp_path / "run", "loss")
    for record, numbers in zip(found, expected, strict=True):
        assert [record[key] for key in ("loss", "grad_norm", "lr")] == pytest.approx(numbers, 1e-4)
    assert difference(model, trained) < 1e-5


def test_training_records_hold_the_contract(plain):
    found = records(plain, "loss")
    assert [record["step"] for record in found] == list(range(1, 31))
    keys = {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "seconds"}
    assert all(keys <= record.keys() for record in found)
    assert all(math.isfinite(value) for record in found for value in record.values())
    assert [record["tokens"] for record in found] == [128 * record["step"] for record in found]
    # without lr_decay_iters the cosine ends with the run
    middle = 1e-3 + 9e-3 * (1 + math.cos(math.pi * 13 / 27)) / 2
    assert found[16]["lr"] == pytest.approx(middle)
    seconds = values(plain, "seconds", "loss")
    assert seconds == sorted(seconds) and seconds[0] > 0


def test_evaluations_come_at_their_interval_and_at_the_last_step(words_data, tmp_path):
    options = {"decay_lr": False, "eval_interval": 3, "log_interval": 3}
    run(words_data, tmp_path, max_iters=7, **options)
    assert values(tmp_path, "step", "val_nll") == [0, 3, 6, 7]
    keys = {"step", "tokens", "val_nll", "val_perplexity", "val_ece", "val_loss"}
    assert all(keys <= record.keys() for record in records(tmp_path, "val_nll"))
    assert values(tmp_path, "step", "loss") == [3, 6]
    assert values(tmp_path, "lr") == [1e-2, 1e-2]  # constant without decay_lr


def test_evaluating_logging_and_saving_more_often_change_nothing(words_data, tmp_path):
    options = {"dropout": 0.1, "weights": "bayes", "max_iters": 12}
    rarely = options | {"eval_interval": 100, "log_interval": 100}
    often = options | {"eval_interval": 1, "save_interval": 2, "eval_iters": 3}
    model = run(words_data, tmp_path / "rarely", **rarely)
    assert same_weights(model, run(words_data, tmp_path / "often", **often))


@pytest.mark.parametrize("dtype, likelihood", [("bfloat16", "categorical"), ("float16", "sigmoid")])
def test_half_precision_trains_as_float32_does(words_data, trained, tmp_path, dtype, likelihood):
    model = run(words_data, tmp_path, weights="bayes", likelihood=likelihood, dtype=dtype)
    full = values(trained("bayes", likelihood), "val_nll")
    assert values(tmp_path, "val_nll")[-1] == pytest.approx(full[-1], rel=0.02)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert ("scale" in checkpoint.read_newest(tmp_path)["scaler"]) == (dtype == "float16")


def test_compile_without_a_compiler_is_refused_before_the_run_has_a_folder(
    words_data, tmp_path, monkeypatch
):
    monkeypatch.setattr("engine.base.distributed.shutil.which", lambda name: None)
    assert "--compile=False" in refusal(run, words_data, tmp_path / "out", compile=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_a_compiled_run_has_the_same_losses_and_parameter_names(words_data, plain, tmp_path):
    run(words_data, tmp_path, compile=True, max_iters=5, lr_decay_iters=30)
    assert values(tmp_path, "loss") == pytest.approx(values(plain, "loss")[:5], abs=1e-4)
    states = [checkpoint.read_newest(folder)["model"] for folder in (tmp_path, plain)]
    assert states[0].keys() == states[1].keys()


def scripted(monkeypatch, *nlls: float) -> None:
    """Let the evaluations of a run return these values."""
    values = iter(nlls)
    monkeypatch.setattr("train.mean_loss", lambda *_: {"val_nll": next(values), "val_loss": 0.0})


def test_the_two_newest_checkpoints_and_the_best_are_kept(words_data, tmp_path, monkeypatch):
    scripted(monkeypatch, 3.0, 2.0, 1.0, 2.0, 2.0, 2.0, 2.0)
    run(words_data, tmp_path, max_iters=6, eval_interval=1)
    names = {path.name for path in tmp_path.iterdir()} - {"metrics.jsonl", "config.json"}
    checkpoints = {checkpoint.name_of(step) for step in (2, 5, 6)}
    assert names == checkpoints | {".lock", "meta.json", "percentiles.json"}


@pytest.mark.parametrize(
    "options, saved",
    [
        ({"eval_interval": 1, "always_save_checkpoint": False}, [1, 3]),
        ({"eval_interval": 2}, [2, 4, 5]),  # step 4 is no improvement, step 5 is the last
        ({"eval_interval": 100, "save_interval": 2}, [2, 4, 5]),
    ],
)
def test_checkpoints_come_at_their_interval_with_improvements_and_at_the_end(
    words_data, tmp_path, monkeypatch, options, saved
):
    scripted(monkeypatch, 3.0, 2.0, 2.5, 1.0, 1.0, 4.0)
    found = []
    monkeypatch.setattr(saver.Saver, "_write", lambda _, state, kept: found.append(state["step"]))
    run(words_data, tmp_path, max_iters=5, **options)
    assert found == saved


def test_a_full_disk_leaves_the_earlier_checkpoint_and_no_rubbish(
    words_data, plain, tmp_path, monkeypatch
):
    shutil.copy(plain / "ckpt_00000030.pt", tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    assert "--init_from=resume" in refusal(
        run, words_data, tmp_path, init_from="resume", max_iters=31, lr_decay_iters=30
    )
    assert [path.name for path in tmp_path.glob("ckpt*")] == ["ckpt_00000030.pt"]


def test_the_validation_loss_holds_the_kl_at_its_warm_up(words_data, tmp_path):
    model = run(words_data, tmp_path, weights="bayes", max_iters=4, warmup_iters=9)
    val = TokenFile(words_data, "val")
    assert model.config.head.n_data == len(TokenFile(words_data, "train"))
    assert model.lm_head.kl_ramp.item() == pytest.approx(0.5)
    batches = eval_batches(val, TINY["block_size"], TINY["batch_size"], TINY["eval_iters"])
    model.lm_head.kl_ramp.fill_(0.0)
    data_loss = mean_loss(model, batches, val, ONE, nullcontext())["val_loss"]
    kl = model.lm_head.weights.kl().item() / model.config.head.n_data
    val_loss = values(tmp_path, "val_loss")[-1]
    assert val_loss - data_loss == pytest.approx(0.5 * kl, rel=1e-4)


def test_eval_only_evaluates_once_and_saves_nothing(words_data, plain, tmp_path):
    # as nanoGPT's eval_gpt2.py does with gpt2
    run(words_data, tmp_path, eval_only=True, init_from=plain)
    assert values(tmp_path, "step") == [0]
    expected = values(plain, "val_nll")[-1:]
    assert values(tmp_path, "val_nll") == pytest.approx(expected, abs=1e-6)
    assert not list(tmp_path.glob("*.pt"))


def test_eval_only_on_a_run_leaves_its_records_alone(words_data, tmp_path):
    run(words_data, tmp_path, max_iters=4, eval_interval=4)
    longer = {"max_iters": 6, "eval_interval": 100, "always_save_checkpoint": False}
    run(words_data, tmp_path, **longer, init_from="resume")
    # as after a run whose last evaluations were no improvement
    (tmp_path / "ckpt_00000006.pt").unlink(missing_ok=True)
    before = records(tmp_path, "step")
    run(words_data, tmp_path, eval_only=True, init_from="resume")
    assert [record for record in records(tmp_path, "step") if record in before] == before


def test_divergence_ends_in_one_line_and_is_not_saved(words_data, tmp_path):
    options = {"learning_rate": 1e3, "grad_clip": 0, "eval_interval": 4, "warmup_iters": 0}
    assert "--learning_rate" in refusal(run, words_data, tmp_path, **options)
    assert not list(tmp_path.glob("*.pt"))
