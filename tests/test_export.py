"""export.py: transformers loads the exported folder, and predicts and tokenizes as we do."""

import sys
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import ModelCard

import engine.gpt2.exporting
import export
from engine.base.errors import UserError
from engine.base.files import read_json, write_json
from engine.base.options import flatten
from engine.data.tokenizer import ByteTokenizer, CharTokenizer
from engine.data.tokens import TokenFile
from engine.gpt2.card import model_card
from engine.runs.checkpoint import load_model
from model import GPT
from tests.helpers import assert_near, contents, flags, scores_of, tiny_gpt, write_dataset
from tests.test_model import tiny_gpt2, tokens
from tests.test_tokenizer import STRANGE, TEXT, make

CHARS = [chr(ord("!") + i) for i in range(67)]


def save(folder: Path, model: GPT, tokenizer=None) -> Path:
    """A run folder with this model, which does not say what it was trained on."""
    tokenizer = tokenizer or CharTokenizer(CHARS)
    folder.mkdir()
    checkpoint = {"model": model.state_dict(), "model_config": flatten(model.config)}
    torch.save(checkpoint, folder / "ckpt_00000007.pt")
    meta = {"tokenizer": tokenizer.describe(), "vocab_size": model.config.vocab_size}
    write_json(folder / "meta.json", meta)
    tokenizer.save(folder)
    return folder


def exported(source: Path, to: Path, *more: str) -> Path:
    """The folder that export.py makes."""
    options = flags(out_dir=source, to=to, device="cpu")
    argv = ["export.py", *options, *more]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        export.main()
    return to


def refusal(source: Path, to: Path, *more: str) -> str:
    """The one line with which an export is refused; it must leave nothing."""
    before = contents(to.parent)
    with pytest.raises(UserError) as error:
        exported(source, to, *more)
    assert "\n" not in str(error.value)
    assert contents(to.parent) == before
    return str(error.value)


def in_transformers(folder: Path) -> transformers.GPT2LMHeadModel:
    return transformers.GPT2LMHeadModel.from_pretrained(folder).eval()


@pytest.mark.parametrize(
    "options",
    [
        {"tie_head": False},
        {"logit_bias": "unigram"},
        {"likelihood": "smooth", "tie_head": False, "logit_bias": "unigram"},
    ],
)
def test_a_softmax_head_keeps_its_log_probs_in_transformers(tmp_path, options):
    model = tiny_gpt(std=0.3, **options)
    with torch.no_grad():
        # weights of the last norm far from 1, of both signs, some of them 0
        norm = torch.randn(32) * 2
        norm[::8] = 0
        model.transformer.ln_f.weight.copy_(norm)
        if "logit_bias" in options:
            model.lm_head.bias.copy_(torch.randn(67) * 4 - 9)
    theirs = in_transformers(exported(save(tmp_path / "run", model), tmp_path / "gpt2"))
    idx = tokens(3, 16)
    with torch.no_grad():
        expected = model.log_probs(idx)
        assert expected.std() > 1
        log_probs = theirs(idx).logits.log_softmax(-1)
        assert_near(log_probs, expected, 1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_of_transformers_comes_out_as_it_went_in(tmp_path, tied):
    tokenizer = CharTokenizer(sorted(set(TEXT)))
    theirs = tiny_gpt2(tie_word_embeddings=tied)
    theirs.save_pretrained(tmp_path / "in")
    meta = {"tokenizer": tokenizer.describe(), "vocab_size": 67}
    write_json(tmp_path / "in/meta.json", meta)
    back = in_transformers(exported(tmp_path / "in", tmp_path / "out"))
    before, after = theirs.state_dict(), back.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_model_card_has_the_nll_of_the_run_and_of_its_export(tmp_path, words_data, trained):
    source = trained("bayes", "sigmoid")
    folder = exported(source, tmp_path / "gpt2", "--approximate", "--license=mit")
    card = (folder / "README.md").read_text()
    model, file = load_model(source), TokenFile(words_data, "val")
    original = scores_of(model, file)["nll"]
    export = scores_of(load_model(folder), file)["nll"]
    assert original != export
    for nll in (original, export):
        assert f" {nll:.4f}" in card
    data = ModelCard.load(folder / "README.md").data  # as the Hub reads it
    (result,) = data.eval_results
    assert data.license == "mit" and result.dataset_name == words_data.name
    assert result.metric_value == pytest.approx(export, abs=1e-4)
    text = model_card("it's", model, {"config": {"init_from": "gpt2"}}, "", "mit", {"a: 'b'": 1.0})
    data = ModelCard(text).data
    assert data.base_model == "openai-community/gpt2"
    assert (data.model_name, data.eval_results[0].dataset_name) == ("it's", "a: 'b'")


def with_tokenizer(tmp_path: Path, tokenizer) -> Path:
    """The export of a model with this tokenizer."""
    model = tiny_gpt(vocab_size=tokenizer.vocab_size)
    folder = exported(save(tmp_path / "run", model, tokenizer), tmp_path / "out")
    config = read_json(folder / "config.json")
    assert config["n_ctx"] == config["n_positions"] == 16  # llama.cpp reads n_ctx
    return folder


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("gpt2", marks=pytest.mark.slow),
        "bpe",
        "byte",
    ],
)
def test_byte_level_tokenizers_are_transformers_gpt2_tokenizer(tmp_path, kind):
    ours = make(kind)
    folder = with_tokenizer(tmp_path, ours)
    for cls in (transformers.GPT2TokenizerFast, transformers.AutoTokenizer):
        theirs = cls.from_pretrained(folder)
        assert len(theirs) == ours.vocab_size
        assert theirs.eos_token_id == ours.eot
        for text in (*STRANGE, TEXT):
            text = text.replace("<|endoftext|>", "<|end|>")  # which theirs takes for the token
            ids = ours.encode(text).tolist()
            assert theirs(text)["input_ids"] == ids
            assert theirs.decode(ids) == text
        assert theirs("<|endoftext|>b")["input_ids"] == [ours.eot, *ours.encode("b")]


@pytest.mark.parametrize("eot", [True, False])
def test_characters_are_characters_in_transformers_and_unknown_ones_an_error(tmp_path, eot):
    text = "Naïve 日本\n\n  e\u0301\r👩‍👩 \x00<|end"
    ours = CharTokenizer(sorted(set(text)), eot)
    folder = with_tokenizer(tmp_path, ours)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ids = ours.encode(text).tolist()
    assert theirs(text)["input_ids"] == ids and theirs.decode(ids) == text
    assert theirs(text).keys() == {"input_ids", "attention_mask"}  # GPT-2 takes no others
    assert theirs.eos_token_id == ours.eot
    with pytest.raises(Exception, match="UNK"):
        theirs("ß")


@pytest.mark.parametrize(
    "weights, likelihood",
    [
        ("bayes", "categorical"),
        ("point", "sigmoid"),
    ],
)
def test_an_approximate_export_has_the_mean_logits_and_must_be_asked_for(
    tmp_path, weights, likelihood
):
    options = {"logit_bias": "unigram", "pos_weight": 3.0, "bias": True}
    model = tiny_gpt(weights, likelihood, std=0.2, bayes_mlp=weights == "bayes", **options)
    source, to = save(tmp_path / "run", model), tmp_path / "out"
    assert "--approximate" in refusal(source, to)
    assert "--dataset=" in refusal(source, to, "--approximate")
    data = tmp_path / "data"
    text = ["".join(CHARS) * 9]
    write_dataset(data, {"train": text, "val": text}, CharTokenizer(CHARS))
    theirs = in_transformers(exported(source, to, "--approximate", f"--dataset={data}"))
    idx = tokens(2, 16)
    with torch.no_grad():
        logits = model.lm_head.logits(model.hidden(idx))
        log_probs = theirs(idx).logits.log_softmax(-1)
        assert_near(log_probs, logits.log_softmax(-1), 1e-4)


def test_an_export_that_predicts_something_else_leaves_nothing(tmp_path, monkeypatch):
    source = save(tmp_path / "run", tiny_gpt(std=0.3, logit_bias="unigram"))
    good = engine.gpt2.exporting.with_bias
    for factor in (1.01, float("nan")):
        damaged = lambda *parts: good(*parts) * factor  # noqa: B023, E731
        monkeypatch.setattr(engine.gpt2.exporting, "with_bias", damaged)
        refusal(source, tmp_path / "out")


def test_a_tokenizer_that_does_not_fit_the_model_or_the_data_is_refused(tmp_path, words_data):
    source = save(tmp_path / "run", tiny_gpt(), ByteTokenizer())
    assert "257" in refusal(source, tmp_path / "out")
    source = save(tmp_path / "chars", tiny_gpt())
    assert "tokenizer" in refusal(source, tmp_path / "out", f"--dataset={words_data}")
