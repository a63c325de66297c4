"""Tiny data sets, runs and models, shared by the tests."""

import contextlib
import dataclasses
import io
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo
import torch._inductor.config
from torch import Tensor

import train
from engine.base import distributed
from engine.base.errors import UserError
from engine.base.files import read_json, read_json_lines
from engine.base.options import load_config
from engine.data.splits import Corpus, in_memory
from engine.data.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer, save_tokenizer
from engine.data.tokens import TokenFile
from engine.data.windows import Windows, windows
from engine.data.writer import install, tokenise
from engine.eval.evaluation import evaluate
from heads import LIKELIHOODS, WEIGHTS, Head, HeadConfig
from model import GPT, GPTConfig

torch.set_num_threads(1)  # for tiny tensors, threads cost more than they save

ROOT = Path(__file__).resolve().parents[1]
# likelihoods with a bound; one without is tested by a copy of tests/softcap.py (docs/heads.md)
BOUNDED = [name for name, likelihood in LIKELIHOODS.items() if likelihood.linear_in_logits]
HEADS = [(weights, likelihood) for weights in WEIGHTS for likelihood in BOUNDED]
WORDS = [
    "the",
    "old",
    "blue",
    "sea",
    "ship",
    "wind",
    "sail",
    "storm",
    "captain",
    "harbour",
    "of",
    "and",
]
ONE = distributed.Processes(torch.device("cpu"))
TINY = {
    "n_layer": 1,
    "n_head": 2,
    "n_embd": 32,
    "block_size": 16,
    "batch_size": 8,
    "gradient_accumulation_steps": 1,
    "max_iters": 30,
    "learning_rate": 1e-2,
    "min_lr": 1e-3,
    "warmup_iters": 3,
    "eval_interval": 30,
    "eval_iters": 5,
    "device": "cpu",
    "dtype": "float32",
    "compile": False,
}


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """For tests of torch.compile: fails if nothing was compiled, or if it gave up recompiling."""
    if not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("torch.compile on CPU needs a C++ compiler")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with (
        torch._inductor.config.patch(compile_threads=1),
        torch._dynamo.config.patch(fail_on_recompile_limit_hit=True),
    ):
        yield
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def words(n: int, seed: int = 0) -> str:
    """n random words: a text that is easy to learn."""
    return " ".join(np.random.default_rng(seed).choice(WORDS, n).tolist())


def write_dataset(
    folder: Path,
    splits: Mapping[str, Iterable[str]],
    tokenizer: Tokenizer,
    shard_tokens: int = 1 << 40,
) -> dict:
    """Write a data set of these documents like the prepare scripts; returns its meta.json."""
    work = Path(folder) / ".preparing-0"
    corpus = Corpus(in_memory({split: list(documents) for split, documents in splits.items()}))
    work.mkdir(parents=True)
    save_tokenizer(tokenizer, work)
    tokenise(corpus, work, shard_tokens, n_threads=1, about={})
    install(work, Path(folder))
    return read_json(Path(folder) / "meta.json")


def write_words(folder: Path, tokenizer: Tokenizer | None = None) -> Path:
    """A data set of random words with train, val and test; by default of characters."""
    splits = {"train": [words(4000)], "val": [words(500, seed=1)], "test": [words(200, seed=2)]}
    characters = sorted(set(splits["train"][0]))
    write_dataset(folder, splits, tokenizer or CharTokenizer(characters))
    return folder


def write_bytes(folder: Path) -> Path:
    """The same in bytes, most of which never occur."""
    return write_words(folder, ByteTokenizer())


def write_nanogpt(folder: Path, ids: Mapping[str, np.ndarray]) -> Path:
    """A folder like that of nanoGPT's prepare.py, without a meta file."""
    folder.mkdir(parents=True)
    for split, values in ids.items():
        np.asarray(values, dtype="<u2").tofile(folder / f"{split}.bin")
    return folder


def flags(**options) -> list[str]:
    """Options as a command line."""
    return [f"--{name}={value}" for name, value in options.items()]


def run(dataset: Path | str, out_dir: Path, **options) -> GPT:
    """Train in this process, as train.py does with TINY and these options."""
    argv = flags(**TINY | {"dataset": dataset, "out_dir": out_dir} | options)
    config, given = load_config(train.TrainConfig, argv)
    with distributed.init(config.device, config.backend) as processes:
        return train.train(config, processes, given)


def records(out_dir: Path, key: str) -> list[dict]:
    """The records of metrics.jsonl with this key: "loss" (training) or "val_nll" (evaluations)."""
    return [record for record in read_json_lines(Path(out_dir) / "metrics.jsonl") if key in record]


def values(out_dir: Path, key: str, of: str = "") -> list:
    """This value of each record that has it, or of each that has the key `of`."""
    return [record[key] for record in records(out_dir, of or key)]


def contents(folder: Path) -> dict[str, int]:
    """All paths in a folder, and when each was written."""
    return {
        str(path): path.lstat().st_mtime_ns
        for path in folder.rglob("*")
        if "__pycache__" not in path.parts
    }


def run_script(script: str, *argv: str) -> None:
    """Run a script in this process as from the command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *argv])
        runpy.run_path(str(ROOT / script), run_name="__main__")


def output_of(*command, cwd: Path = ROOT, **environment: str) -> str:
    """What a process prints on stdout; it must succeed."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


def refusal(function: Callable, *args, **options) -> str:
    """The message with which a call is refused: one line."""
    with pytest.raises(UserError) as error:
        function(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def refused(script: str, argv: list[str], folder: Path) -> str:
    """Run a script in a folder. It must print one line on stderr, write nothing, and exit with 2.

    Returns the line.
    """
    before = contents(folder)
    output, error = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(error),
        pytest.raises(SystemExit) as exit_,
    ):
        patch.chdir(folder)
        run_script(script, *argv)
    line = error.getvalue()
    assert exit_.value.code == 2, line
    assert "error: " in line and line.count("\n") == 1
    assert output.getvalue() == "" and contents(folder) == before
    return line


def scores(model: GPT, *batches: tuple[Tensor, Tensor], cast=None, n_samples: int = 0) -> dict:
    """The result of evaluate() on batches of x, y (B, T), as consecutive parts of a text."""
    found, end = [], 0
    for x, y in batches:
        at = end + torch.arange(x.numel()).view_as(x)
        found.append(Windows(x, y, 0, at))
        end += x.numel()
    return evaluate(model, found, ONE, cast, n_samples).result()


def scores_of(
    model: GPT, file: TokenFile, batch_size: int = 8, n_samples: int = 0, **options
) -> dict:
    """The result of evaluate() on a split."""
    batches = windows(file, model.config.block_size, batch_size, **options)
    processes = distributed.Processes(next(model.parameters()).device)
    return evaluate(model, batches, processes, n_samples=n_samples).result()


def value_and_gradients(value: Tensor, inputs: Iterable[Tensor]) -> list[Tensor]:
    """A loss and its gradients by the inputs."""
    return [value, *torch.autograd.grad(value, list(inputs))]


def assert_near(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Compare absolutely, whatever the dtypes."""
    torch.testing.assert_close(found.double(), expected.double(), atol=tolerance, rtol=0)


def assert_close_in_norm(
    found: Iterable[Tensor], expected: Iterable[Tensor], tolerance: float = 1e-5
) -> None:
    """Each tensor must differ from the expected one by at most this share of its norm."""
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


def assert_same_loss(
    found: Tensor, expected: Tensor, inputs: Iterable[Tensor], tolerance: float = 1e-5
) -> None:
    """Two losses and their gradients must agree, each in norm."""
    inputs = list(inputs)
    ours = value_and_gradients(found, inputs)
    assert_close_in_norm(ours, value_and_gradients(expected, inputs), tolerance)


def same_weights(a: GPT, b: GPT) -> bool:
    """Whether two models have the same weights, bit for bit."""
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def difference(a: GPT, b: GPT) -> float:
    """The largest absolute difference between the weights of two models."""
    a, b = a.state_dict(), b.state_dict()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def tiny_head(weights: str = "point", likelihood: str = "categorical", **options) -> Head:
    """A head with 67 tokens and 16 channels; its parameters are random, no two tokens alike."""
    torch.manual_seed(0)
    head = Head(
        HeadConfig(**{"weights": weights, "likelihood": likelihood, "n_data": 1000} | options),
        67,
        16,
    )
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(noise / 4 - 2 if name.endswith("log_std") else noise / 2 + parameter)
    return head


def tiny_gpt(
    weights: str = "point", likelihood: str = "categorical", std: float = 0.0, **options
) -> GPT:
    """A GPT of 2 layers with 67 tokens and 16 positions, in eval mode.

    std > 0 draws every matrix and bias with this standard deviation, so that predictions depend on
    the context.
    """
    fields = {field.name for field in dataclasses.fields(HeadConfig)}
    of_head = {"n_data": 1000} | {name: value for name, value in options.items() if name in fields}
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 16, "vocab_size": 67}
    shape |= {name: value for name, value in options.items() if name not in fields}
    torch.manual_seed(0)
    model = GPT(GPTConfig(**shape, head=HeadConfig(weights, likelihood, **of_head)))
    for name, parameter in model.named_parameters():
        if std and not name.endswith("log_std"):
            torch.nn.init.normal_(
                parameter, mean=float("ln_" in name and name.endswith("weight")), std=std
            )
    return model.eval()
