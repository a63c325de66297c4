"""Weights of others: transformers' folders, nanoGPT's checkpoints, the Hub; other heads on them;
the optimiser.
"""

import contextlib
import json
import math
import os
import pickle
from dataclasses import replace
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch

from engine.base.errors import UserError
from engine.base.optim import learning_rate_at, make_optimizer
from engine.data.tokenizer import read_meta
from engine.gpt2.loading import HUB, load_state
from engine.runs.checkpoint import load_model, read, read_checkpoint
from engine.runs.finetune import on_backbone
from heads import HeadConfig
from model import GPT, GPTConfig
from tests.helpers import HEADS, same_weights, tiny_gpt
from tests.test_model import V, tiny_gpt2, tokens

every_head = pytest.mark.parametrize(("weights", "likelihood"), HEADS)


def refusal(source) -> str:
    """The one line with which a source is refused."""
    with pytest.raises(UserError) as error:
        load_model(source)
    assert "\n" not in str(error.value)
    return str(error.value)


def write_nanogpt(path, model: GPT, bias: bool, prefix: str = "_orig_mod."):
    """The file that nanoGPT's train.py leaves: compiled names, tied weights twice, an optimiser,
    plain options.
    """
    state = {
        name.replace("lm_head.weights.", "lm_head."): value
        for name, value in model.state_dict().items()
    }
    state |= {
        f"transformer.h.{i}.attn.bias": torch.ones(16, 16).tril().view(1, 1, 16, 16)
        for i in range(2)
    }
    shape = {
        "n_layer": 2,
        "n_head": 4,
        "n_embd": 32,
        "block_size": 16,
        "bias": bias,
        "vocab_size": V,
        "dropout": 0.0,
    }
    optimizer = torch.optim.AdamW(model.parameters())
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    contents = {
        "model": {prefix + name: value.clone() for name, value in state.items()},
        "model_args": shape,
    }
    contents |= {
        "optimizer": optimizer.state_dict(),
        "iter_num": 3,
        "best_val_loss": torch.tensor(4.2),
    }
    torch.save(contents | {"config": {"out_dir": "out", "dataset": "openwebtext"}}, path)


@pytest.mark.parametrize("tied", [True, False])
def test_a_transformers_folder_predicts_as_transformers_does(tmp_path, tied):
    theirs, idx = tiny_gpt2(tie_word_embeddings=tied), tokens(3, 11)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(
            ours.log_probs(idx), theirs(idx).logits.log_softmax(-1), atol=1e-4, rtol=0
        )
    assert ours.config.head == HeadConfig(tie_head=tied) and ours.config.bias and not ours.training


def test_the_hubs_own_file_with_bare_names_and_masks_loads_too(tmp_path):
    theirs = tiny_gpt2()
    theirs.save_pretrained(tmp_path)
    expected = load_model(tmp_path).state_dict()
    tensors = {
        n.removeprefix("transformer."): t.clone()
        for n, t in theirs.transformer.state_dict().items()
    }
    tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 16, 16).tril() for i in range(2)}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    torch.testing.assert_close(
        dict(load_model(tmp_path).state_dict()), dict(expected), atol=0, rtol=0
    )


def test_square_matrices_of_conv1d_are_transposed_as_well(tmp_path):
    theirs = tiny_gpt2()
    theirs.save_pretrained(tmp_path)
    ours, theirs = (
        load_model(tmp_path).transformer.h[1].attn.c_proj,
        theirs.transformer.h[1].attn.c_proj,
    )
    assert ours.weight.shape == theirs.weight.shape == (32, 32)
    assert torch.equal(ours.weight, theirs.weight.T) and torch.equal(ours.bias, theirs.bias)


@pytest.mark.parametrize(
    "option",
    [
        {"activation_function": "relu"},
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False},
        {"layer_norm_epsilon": 1e-6},
        {"add_cross_attention": True},
    ],
    ids=str,
)
def test_a_gpt2_that_computes_something_else_is_refused(tmp_path, option):
    tiny_gpt2(**option).save_pretrained(tmp_path)
    (name, value), *_ = option.items()
    assert f"has {name} = {value!r}; this model is GPT-2, which has " in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("model_type", other) for other in ("llama", "gpt_neo", "", None, 3)),
        ("position_embedding_type", "relative_key"),
    ],
)
def test_a_config_of_another_model_is_refused_by_name_and_value(tmp_path, name, value):
    tiny_gpt2().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {name: value}))
    assert f"has {name} = {value!r}" in refusal(tmp_path)


@pytest.mark.parametrize("value", ["two", -4, 32.5, None])
def test_a_size_that_is_none_is_refused_by_value(tmp_path, value):
    tiny_gpt2().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_layer": value}))
    assert repr(value) in (message := refusal(tmp_path)) and "n_layer" in message


def test_an_mlp_of_another_width_is_refused_by_its_shape(tmp_path):
    tiny_gpt2(n_inner=64).save_pretrained(tmp_path)
    assert "mlp.c_fc.bias has shape (64,)" in refusal(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_load_by_value(tmp_path, dtype):
    theirs = tiny_gpt2().to(dtype)
    theirs.save_pretrained(tmp_path)
    expected = theirs.float()(idx := tokens(2, 9)).logits.log_softmax(-1)
    ours = load_model(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    torch.testing.assert_close(ours.log_probs(idx), expected, atol=1e-4, rtol=0)


def test_a_gpt2_saved_without_its_head_is_tied_as_gpt2_is(tmp_path):
    (theirs := tiny_gpt2()).transformer.save_pretrained(tmp_path)
    idx = tokens(2, 9)
    torch.testing.assert_close(
        load_model(tmp_path).log_probs(idx), theirs(idx).logits.log_softmax(-1), atol=1e-4, rtol=0
    )
    tiny_gpt2(tie_word_embeddings=False).transformer.save_pretrained(tmp_path)
    assert "has no lm_head.weight, which its config.json does not tie" in refusal(tmp_path)


def shards(folder) -> list:
    """A tiny GPT-2 in several files, as transformers writes large ones; the files."""
    tiny_gpt2().save_pretrained(folder, max_shard_size="20KB")
    files = sorted(folder.glob("model-*.safetensors"))
    assert len(files) > 2 and not (folder / "model.safetensors").exists()
    return files


def test_weights_in_several_files_are_those_in_one(tmp_path):
    shards(tmp_path / "several")
    tiny_gpt2().save_pretrained(tmp_path / "one")
    assert same_weights(load_model(tmp_path / "several"), load_model(tmp_path / "one"))


def test_a_missing_or_damaged_shard_and_an_index_of_nothing_are_named(tmp_path):
    files, index = shards(tmp_path), tmp_path / "model.safetensors.index.json"
    whole = files[1].read_bytes()
    files[1].write_bytes(whole[:-9])
    assert f"{files[1].name} is damaged" in refusal(tmp_path)
    files[1].unlink()
    assert f"{files[1].name} is missing" in refusal(tmp_path)
    files[1].write_bytes(whole)
    for text, message in (
        ("{", f"{index.name} is damaged"),
        ("[]", f"{index.name} is damaged"),
        ("{}", "no transformer.wte.weight"),
    ):
        index.write_text(text)
        assert message in refusal(tmp_path)


def test_pickled_weights_are_not_read_but_said_how_to_convert(tmp_path):
    tiny_gpt2().save_pretrained(tmp_path)
    expected = load_model(tmp_path)
    torch.save(
        safetensors.torch.load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin"
    )
    assert same_weights(load_model(tmp_path), expected)  # the good format is there too
    (tmp_path / "model.safetensors").unlink()
    message = refusal(tmp_path)
    assert "pytorch_model.bin" in message
    code = message.split('python -c "')[1].removesuffix('"')
    exec(code, {})
    assert same_weights(load_model(tmp_path), expected)


@pytest.mark.parametrize("name", ["attn.c_attn", "mlp.c_fc", "mlp.c_proj"])
def test_weights_saved_from_linear_layers_are_seen_by_their_shape(tmp_path, name):
    tiny_gpt2().save_pretrained(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    for each, tensor in tensors.items():
        if each.endswith((f"{name}.weight", "attn.c_proj.weight")):
            tensors[each] = tensor.t().contiguous()
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    assert f"{name}.weight has shape" in refusal(tmp_path)


def change_a_tensor(folder, name: str, change) -> str:
    tiny_gpt2().save_pretrained(folder)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors |= {name: change(tensors.pop(name))}
    safetensors.torch.save_file(
        {n: t for n, t in tensors.items() if t is not None}, folder / "model.safetensors"
    )
    return refusal(folder)


def test_a_tensor_of_another_shape_kind_or_not_there_is_named(tmp_path):
    name = "transformer.h.1.mlp.c_fc.weight"
    assert "h.1.mlp.c_fc.weight has shape (64, 32)" in change_a_tensor(
        tmp_path, name, lambda t: t[:, :64].contiguous()
    )
    assert "h.1.mlp.c_fc.weight" in change_a_tensor(tmp_path, name, lambda t: None)
    name = "transformer.wpe.weight"
    assert "wpe.weight has shape (8, 32)" in change_a_tensor(
        tmp_path, name, lambda t: t[:8].contiguous()
    )
    name = "transformer.wte.weight"
    assert "wte.weight has shape (66, 32)" in change_a_tensor(
        tmp_path, name, lambda t: t[:66].contiguous()
    )


def test_half_written_weights_are_refused_wherever_they_end(tmp_path):
    tiny_gpt2().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for n in (
        0,
        1,
        7,
        8,
        9,
        header // 2,
        header - 1,
        header,
        header + 1,
        len(whole) // 2,
        len(whole) - 1,
    ):
        weights.write_bytes(whole[:n])
        assert "model.safetensors is damaged" in refusal(tmp_path)


def test_a_flipped_bit_in_the_header_ends_in_one_line_or_changes_nothing(tmp_path):
    tiny_gpt2().save_pretrained(tmp_path)
    expected = load_model(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    header, n_refused = 8 + int.from_bytes(whole[:8], "little"), 0
    for place in [*range(8), *range(8, header, 37)]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        weights.write_bytes(damaged)
        try:
            same = same_weights(load_model(tmp_path), expected)
        except UserError as error:
            n_refused += "\n" not in str(error)
        else:
            assert same
    assert n_refused > 50


def test_a_folder_of_another_model_or_with_damaged_files_is_refused(tmp_path):
    tiny_gpt2().save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    good = config.read_text()
    config.write_text(json.dumps(json.loads(good) | {"model_type": "llama"}))
    assert "llama" in refusal(tmp_path)
    config.write_text("{}")
    assert "model_type" in refusal(tmp_path)
    config.write_text(good[:50])
    assert "config.json is damaged" in refusal(tmp_path)
    config.write_text(good)
    whole = weights.read_bytes()
    for damaged in (whole[:-100], whole[:5], b"", b"\xff" * 100):
        weights.write_bytes(damaged)
        assert "model.safetensors is damaged" in refusal(tmp_path)
    weights.write_bytes(whole)
    config.unlink()
    assert "config.json is missing" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("bias", "tied", "prefix"), [(True, True, "_orig_mod."), (False, True, ""), (True, False, "")]
)
def test_a_nanogpt_checkpoint_loads_as_a_file_and_as_a_folder(tmp_path, bias, tied, prefix):
    model, idx = tiny_gpt(std=0.3, bias=bias, tie_head=tied), tokens(2, 16)
    write_nanogpt(tmp_path / "ckpt.pt", model, bias, prefix)
    expected = model.log_probs(idx)
    for source in (tmp_path, tmp_path / "ckpt.pt", str(tmp_path)):
        loaded = load_model(source)
        assert torch.equal(loaded.log_probs(idx), expected)
        assert (loaded.config.bias, loaded.config.head.tie_head) == (bias, tied)


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("as_zip", [True, False])
def test_a_checkpoint_that_would_run_code_is_refused_and_does_not(tmp_path, as_zip):
    contents = {"model": {}, "model_args": {}, "config": Touch(tmp_path / "ran")}
    if as_zip:
        torch.save(contents, tmp_path / "ckpt.pt")
    else:
        (tmp_path / "ckpt.pt").write_bytes(pickle.dumps(contents))
    assert "not a good checkpoint" in refusal(tmp_path / "ckpt.pt")
    assert "not a good checkpoint" in refusal(tmp_path)
    assert not (tmp_path / "ran").exists()
    with contextlib.suppress(RuntimeError):  # a bare pickle runs first and is complained about then
        torch.load(tmp_path / "ckpt.pt", weights_only=False)
    assert (tmp_path / "ran").exists()  # the trap works


@pytest.mark.parametrize(
    "damage",
    [
        lambda good: good[:-9],
        lambda good: b"",
        lambda good: b"rubbish",
        lambda good: b"\x80\x04\x95" + b"\xff" * 40,
        lambda good: good.replace(b"\x8c\x01a", b"\x8c\x01\xff"),
        lambda good: pickle.dumps({"itos": {0: "a"}}),
        lambda good: pickle.dumps({"itos": {1: "a"}, "vocab_size": 1}),
        lambda good: pickle.dumps(["a"]),
    ],
)
def test_a_damaged_meta_pkl_is_refused_in_one_line(tmp_path, damage):
    good = pickle.dumps({"vocab_size": 2, "itos": {0: "a", 1: "b"}, "stoi": {"a": 0, "b": 1}})
    (tmp_path / "meta.pkl").write_bytes(good)
    assert read_meta(tmp_path)["tokenizer"] == {"kind": "char", "chars": ["a", "b"], "eot": False}
    (tmp_path / "meta.pkl").write_bytes(damage(good))
    with pytest.raises(UserError, match=r"meta\.pkl is not a nanoGPT character table") as error:
        read_meta(tmp_path)
    assert "\n" not in str(error.value)


def test_what_is_no_source_of_weights_is_refused(tmp_path):
    assert "does not exist" in refusal(tmp_path / "none")
    assert "no checkpoint" in refusal(tmp_path)
    for contents, message in (
        ({"model": {}}, "nanoGPT"),
        ({"weights": {}}, "no model"),
        ([1], "no model"),
    ):
        torch.save(contents, tmp_path / "file.pt")
        assert message in refusal(tmp_path / "file.pt")


def test_without_the_hub_a_name_gives_one_line_that_says_what_to_do(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for name in HUB:
        assert f"cannot fetch {name}" in (message := refusal(name)) and "folder" in message


@every_head
def test_a_shorter_block_size_keeps_the_predictions_within_it(weights, likelihood):
    source, idx = tiny_gpt(weights, likelihood, std=0.3), tokens(2, 9)
    shorter = GPT(replace(source.config, block_size=9)).eval()
    assert load_state(shorter, source.state_dict()) == []
    assert len(shorter.transformer.wpe.weight) == 9
    torch.testing.assert_close(shorter.log_probs(idx), source.log_probs(idx), atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="transformer.wpe.weight has shape"):
        load_state(source, shorter.state_dict())


@every_head
def test_a_softmax_gpt_takes_any_head_and_keeps_its_mean_logits(tmp_path, weights, likelihood):
    theirs, idx = tiny_gpt2(), tokens(2, 9)
    theirs.save_pretrained(tmp_path)
    found = read_checkpoint(tmp_path)
    shape, state = found.config, found.weights
    wanted = GPTConfig(
        block_size=9,
        dropout=0.1,
        head=HeadConfig(weights, likelihood, logit_bias="none", n_data=1000),
    )
    model = GPT(on_backbone(shape, wanted, {"block_size", "dropout"})).eval()
    assert load_state(model, state) == ([] if weights == "point" else ["lm_head.weights.log_std"])
    assert (
        model.config.n_layer,
        model.config.bias,
        model.config.dropout,
        model.config.block_size,
    ) == (2, True, 0.1, 9)
    with torch.no_grad():
        expected = theirs(idx).logits
        torch.testing.assert_close(
            model.lm_head.logits(model.hidden(idx)), expected, atol=1e-4, rtol=0
        )
        if likelihood != "sigmoid":
            torch.testing.assert_close(
                model.log_probs(idx), expected.log_softmax(-1), atol=1e-4, rtol=0
            )


@every_head
def test_a_head_of_its_own_bias_and_posterior_comes_back_from_its_state(weights, likelihood):
    source, idx = (
        tiny_gpt(weights, likelihood, std=0.3, logit_bias="unigram", tie_head=False),
        tokens(2, 9),
    )
    model = GPT(source.config).eval()
    assert load_state(model, source.state_dict()) == []
    for n_samples in (0, 2):
        predictions = []
        for each in (source, model):
            torch.manual_seed(0)
            predictions.append(each.log_probs(idx, n_samples))
        assert torch.equal(*predictions)


def test_a_backbone_refuses_options_that_contradict_it():
    shape = tiny_gpt(bias=True).config
    for name, value in (
        ("n_layer", 3),
        ("n_embd", 64),
        ("bias", False),
        ("vocab_size", 50),
        ("block_size", 32),
    ):
        with pytest.raises(UserError, match=f"{name} = {value}"):
            on_backbone(shape, replace(shape, **{name: value}), {name})
    assert on_backbone(shape, GPTConfig(), set()) == replace(shape, head=HeadConfig())


def test_output_weights_of_their_own_are_not_written_over_the_embedding():
    untied, tied = tiny_gpt(std=0.3, tie_head=False), tiny_gpt()
    with pytest.raises(UserError, match="--tie_head=False"):
        load_state(tied, untied.state_dict())
    assert load_state(untied, tied.state_dict()) == []  # the other way round nothing is lost
    assert torch.equal(untied.log_probs(tokens(1, 5)), tied.log_probs(tokens(1, 5)))


def test_a_state_of_another_shape_or_with_other_parameters_is_refused():
    model = tiny_gpt(bias=True)
    with pytest.raises(UserError, match="has shape"):
        load_state(model, tiny_gpt(bias=True, n_embd=16).state_dict())
    with pytest.raises(UserError, match="does not fit"):
        load_state(model, tiny_gpt(bias=False).state_dict())
    with pytest.raises(UserError, match="does not fit"):
        load_state(tiny_gpt(), tiny_gpt(n_layer=3).state_dict())


def test_our_own_checkpoints_round_trip_by_content(tmp_path):
    torch.save({"model": {"a": torch.ones(2)}, "step": 3}, tmp_path / "ckpt.pt")
    assert read(tmp_path / "ckpt.pt")["step"] == 3


def nanogpt_get_lr(it: int, config: SimpleNamespace) -> float:
    """nanoGPT's get_lr, as it stands there."""
    if it < config.warmup_iters:
        return config.learning_rate * (it + 1) / (config.warmup_iters + 1)
    if it > config.lr_decay_iters:
        return config.min_lr
    decay_ratio = (it - config.warmup_iters) / (config.lr_decay_iters - config.warmup_iters)
    coeff = 0.5 * (1.0 + math.cos(math.pi * decay_ratio))
    return config.min_lr + coeff * (config.learning_rate - config.min_lr)


@pytest.mark.parametrize(("warmup_iters", "lr_decay_iters"), [(7, 40), (0, 40), (10, 11), (0, 60)])
def test_the_learning_rate_is_nanogpts_at_every_step(warmup_iters, lr_decay_iters):
    options = {
        "learning_rate": 6e-4,
        "min_lr": 6e-5,
        "max_iters": 60,
        "decay_lr": True,
        "warmup_iters": warmup_iters,
    }
    config = SimpleNamespace(**options, lr_decay_iters=lr_decay_iters)
    expected = [nanogpt_get_lr(step, config) for step in range(61)]
    assert [learning_rate_at(step, config) for step in range(61)] == pytest.approx(expected)
    if lr_decay_iters == 60:  # 0 means max_iters
        config.lr_decay_iters = 0
        assert [learning_rate_at(step, config) for step in range(61)] == pytest.approx(expected)
    config.decay_lr = False
    assert {learning_rate_at(step, config) for step in range(61)} == {6e-4}


@every_head
@pytest.mark.parametrize("tied", [True, False])
def test_weight_decay_acts_on_matrices_and_embeddings_alone(weights, likelihood, tied):
    model = tiny_gpt(weights, likelihood, bias=True, logit_bias="unigram", tie_head=tied)
    optimizer = make_optimizer(model, 1e-3, (0.9, 0.95), 0.1)
    decay = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    names = {name: decay[p] for name, p in model.named_parameters()}
    assert len(decay) == len(names) == len(list(model.parameters()))  # each once
    kept = {n for n in names if n.endswith(("bias", "log_std")) or "ln_" in n}
    assert {n for n, value in names.items() if value == 0} == kept
    assert {value for n, value in names.items() if n not in kept} == {0.1}
    assert optimizer.defaults["betas"] == (0.9, 0.95)


def test_a_nanogpt_checkpoint_says_where_it_differs_and_one_of_another_model_is_refused(
    tmp_path, capsys
):
    write_nanogpt(tmp_path / "ckpt.pt", tiny_gpt(std=0.3), bias=False)
    load_model(tmp_path)
    assert "nanoGPT's GELU is exact" in capsys.readouterr().err
    contents = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    contents["model_args"]["rope"] = True
    torch.save(contents, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="model_args have 'rope'"):
        load_model(tmp_path)
