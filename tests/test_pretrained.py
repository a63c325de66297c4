"""Other programs' weights: transformers' folders, the Hub, nanoGPT's checkpoints; other heads on
them; the optimizer.
"""

from dataclasses import replace

import pytest
import safetensors.torch
import torch

from engine.base.files import read_json, write_json
from engine.base.optim import make_optimizer
from engine.gpt2.loading import load_state
from engine.runs.checkpoint import load_model
from heads import HeadConfig
from model import GPT
from tests.helpers import assert_near, refusal, same_weights, tiny_gpt
from tests.test_model import V, tiny_gpt2, tokens


def same_log_probs(ours: GPT, theirs) -> None:
    """ours must predict what theirs, a model of transformers, does."""
    for n_tokens in (1, 16):
        idx = tokens(3, n_tokens)
        with torch.no_grad():
            expected = theirs(idx).logits.log_softmax(-1)
            assert expected.std() > 1  # a network that does something
            assert_near(ours.log_probs(idx), expected, 1e-4)


def write_nanogpt(path, model: GPT, bias: bool, prefix: str = "_orig_mod."):
    """The file that nanoGPT's train.py leaves: compiled names, tied weights twice, masks."""
    state = {}
    for name, value in model.state_dict().items():
        state[prefix + name.replace("lm_head.weights.", "lm_head.")] = value.clone()
    for i in range(2):
        mask = torch.ones(16, 16).tril().view(1, 1, 16, 16)
        state[f"{prefix}transformer.h.{i}.attn.bias"] = mask
    shape = {
        "n_layer": 2,
        "n_head": 4,
        "n_embd": 32,
        "block_size": 16,
        "bias": bias,
        "vocab_size": V,
        "dropout": 0.0,
    }
    checkpoint = {"model": state, "model_args": shape, "best_val_loss": torch.tensor(4.2)}
    torch.save(checkpoint, path)


@pytest.mark.parametrize(
    "tied, dtype", [(True, torch.float32), (False, torch.float32), (True, torch.float16)]
)
def test_a_transformers_folder_predicts_as_transformers_does(tmp_path, tied, dtype):
    theirs = tiny_gpt2(tie_word_embeddings=tied).to(dtype)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    names = {name for name, _ in theirs.named_parameters()}
    assert {name.replace(".weights", "") for name, _ in ours.named_parameters()} == names
    same_log_probs(ours, theirs.float())
    assert ours.config.head == HeadConfig(tie_head=tied)
    assert ours.config.bias and not ours.training


def test_the_hubs_own_file_with_bare_names_and_masks_loads_too(tmp_path):
    theirs = tiny_gpt2()
    theirs.save_pretrained(tmp_path)
    mask = torch.ones(1, 1, 16, 16).tril()
    tensors = {"h.0.attn.bias": mask, "h.1.attn.bias": mask.clone()}
    for name, tensor in theirs.transformer.state_dict().items():
        tensors[name] = tensor.clone()
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    same_log_probs(load_model(tmp_path), theirs)


@pytest.mark.parametrize(
    "name, value",
    [
        ("activation_function", "relu"),
        ("scale_attn_by_inverse_layer_idx", True),
        ("layer_norm_epsilon", 1e-6),
        ("add_cross_attention", True),
        ("position_embedding_type", "relative_key"),
        ("n_layer", "two"),
    ],
)
def test_a_config_that_is_not_gpt2s_is_refused_by_name_and_value(tmp_path, name, value):
    tiny_gpt2().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = read_json(path)
    write_json(path, config | {name: value})
    message = refusal(load_model, tmp_path)
    assert name in message and repr(value) in message


def test_a_gpt2_saved_without_its_head_is_tied_unless_its_config_says_otherwise(tmp_path):
    theirs = tiny_gpt2()
    theirs.transformer.save_pretrained(tmp_path)
    same_log_probs(load_model(tmp_path), theirs)
    tiny_gpt2(tie_word_embeddings=False).transformer.save_pretrained(tmp_path)
    assert "lm_head.weight" in refusal(load_model, tmp_path)


def test_weights_in_several_files_load_and_a_bad_file_is_named(tmp_path):
    theirs = tiny_gpt2()
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 2
    same_log_probs(load_model(tmp_path), theirs)
    files[1].unlink()
    assert files[1].name in refusal(load_model, tmp_path)


def test_pickled_weights_are_refused_with_a_command_that_converts_them(tmp_path):
    tiny_gpt2().save_pretrained(tmp_path)
    expected = load_model(tmp_path)
    weights = tmp_path / "model.safetensors"
    torch.save(safetensors.torch.load_file(weights), tmp_path / "pytorch_model.bin")
    weights.unlink()
    _, code = refusal(load_model, tmp_path).split('python -c "')
    exec(code.removesuffix('"'), {})
    assert same_weights(load_model(tmp_path), expected)


def test_a_missing_tensor_and_one_of_another_shape_are_named(tmp_path):
    tiny_gpt2().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    name = "transformer.h.1.attn.c_attn.weight"
    tensors = safetensors.torch.load_file(path)
    tensors[name] = tensors[name].t().contiguous()  # as nn.Linear would store it
    safetensors.torch.save_file(tensors, path)
    assert name in refusal(load_model, tmp_path)
    del tensors[name]
    safetensors.torch.save_file(tensors, path)
    assert name in refusal(load_model, tmp_path)


@pytest.mark.parametrize("bias, tied, prefix", [(True, True, "_orig_mod."), (False, False, "")])
def test_a_nanogpt_checkpoint_loads_unless_it_has_an_option_that_gpt2_lacks(
    tmp_path, bias, tied, prefix, capsys
):
    model = tiny_gpt(std=0.3, bias=bias, tie_head=tied)
    idx = tokens(2, 16)
    write_nanogpt(tmp_path / "ckpt.pt", model, bias, prefix)
    for source in (tmp_path, tmp_path / "ckpt.pt"):
        loaded = load_model(source)
        assert torch.equal(loaded.log_probs(idx), model.log_probs(idx))
        assert (loaded.config.bias, loaded.config.head.tie_head) == (bias, tied)
    assert "GELU" in capsys.readouterr().err  # the one difference to nanoGPT
    contents = torch.load(source, weights_only=True)
    contents["model_args"]["rope"] = True
    torch.save(contents, source)
    assert "rope" in refusal(load_model, tmp_path)


def test_a_source_that_is_missing_empty_or_on_a_hub_out_of_reach_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for source in (tmp_path / "none", tmp_path, "gpt2-xl"):
        assert str(source) in refusal(load_model, source)


def test_a_shorter_block_size_keeps_the_predictions_within_it():
    source, idx = tiny_gpt("bayes", "sigmoid", std=0.3), tokens(2, 9)
    shorter = GPT(replace(source.config, block_size=9)).eval()
    assert load_state(shorter, source.state_dict()) == []
    assert_near(shorter.log_probs(idx), source.log_probs(idx))
    assert "transformer.wpe.weight" in refusal(load_state, source, shorter.state_dict())


def test_untied_output_weights_never_overwrite_the_embedding():
    untied, tied = tiny_gpt(std=0.3, tie_head=False), tiny_gpt()
    assert "tie_head" in refusal(load_state, tied, untied.state_dict())
    assert load_state(untied, tied.state_dict()) == []  # this direction loses nothing
    idx = tokens(1, 5)
    assert torch.equal(untied.log_probs(idx), tied.log_probs(idx))


@pytest.mark.parametrize("tied", [True, False])
def test_weight_decay_acts_on_matrices_and_embeddings_alone(tied):
    model = tiny_gpt("bayes", "sigmoid", bias=True, tie_head=tied, bayes_mlp=True)
    optimizer = make_optimizer(model, 1e-3, (0.9, 0.95), 0.1)
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names.pop(parameter)  # each is there once
            exempt = name.endswith(("bias", "log_std")) or "ln_" in name
            assert group["weight_decay"] == (0.0 if exempt else 0.1)
    assert names == {}
