"""export.py: transformers loads what it writes, and predicts, reads and writes the same with it."""

import json
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers

import engine.gpt2.exporting
import export
import sample
from engine.base.errors import UserError
from engine.base.options import flatten
from engine.data.gpt2_bpe import GPT2Tokenizer
from engine.data.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer
from engine.data.tokens import TokenFile
from engine.eval.generation import generate
from engine.runs.checkpoint import load_model, read_checkpoint
from model import GPT
from tests.conftest import shared_data
from tests.helpers import (
    HEADS,
    contents,
    flags,
    refused,
    run,
    same_weights,
    scores_of,
    tiny_gpt,
    words,
    write_dataset,
)
from tests.test_model import tiny_gpt2, tokens
from tests.test_pretrained import write_nanogpt
from tests.test_tokenizer import STRANGE, TEXT, make

SOFTMAX = [head for head in HEADS if head[0] == "point" and head[1] != "sigmoid"]
OTHERS = [head for head in HEADS if head not in SOFTMAX]


CHARS = [chr(ord("!") + i) for i in range(67)]


def save(folder: Path, model: GPT, tokenizer=None) -> Path:
    """A run folder with this model, which does not say what it was trained on."""
    tokenizer = tokenizer or CharTokenizer(CHARS)
    folder.mkdir()
    torch.save(
        {"model": model.state_dict(), "model_config": flatten(model.config)},
        folder / "ckpt_00000007.pt",
    )
    meta = {"tokenizer": tokenizer.describe(), "vocab_size": model.config.vocab_size}
    (folder / "meta.json").write_text(json.dumps(meta))
    tokenizer.save(folder)
    return folder


def exported(source: Path, to: Path, *more: str) -> Path:
    """What export.py makes of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys, "argv", ["export.py", *flags(out_dir=source, to=to, device="cpu"), *more]
        )
        export.main()
    return to


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Words and all they are learnt by: a BPE, end-of-text between documents."""
    splits = {split: [words(300, seed) for seed in seeds] for split, seeds in SEEDS.items()}
    folder = tmp_path_factory.mktemp("data") / "sea"
    write_dataset(folder, splits, BPETokenizer.train(splits["train"], 300))
    return folder


SEEDS = {"train": range(10), "val": range(10, 13)}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "biases", [{"bias": True}, {"bias": False}, {"bias": False, "qkv_bias": True}], ids=str
)
@pytest.mark.parametrize("logit_bias", ["none", "unigram"])
@pytest.mark.parametrize(("weights", "likelihood"), SOFTMAX)
def test_a_softmax_head_keeps_its_log_probs_in_transformers(
    tmp_path, weights, likelihood, logit_bias, biases, tied
):
    model = tiny_gpt(weights, likelihood, std=0.3, logit_bias=logit_bias, tie_head=tied, **biases)
    with torch.no_grad():  # far from 1, some of it 0, and of any sign
        model.transformer.ln_f.weight.copy_(torch.randn(32) * 2).masked_fill_(
            torch.arange(32) % 8 == 0, 0.0
        )
        if logit_bias == "unigram":
            model.lm_head.bias.copy_(torch.randn(67) * 4 - 9)
    idx, folder = tokens(3, 16), exported(save(tmp_path / "run", model), tmp_path / "gpt2")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    with torch.no_grad():
        expected, logits = model.lm_head.logits(model.hidden(idx)), theirs(idx).logits
        assert expected.std() > 1
        torch.testing.assert_close(logits.log_softmax(-1), model.log_probs(idx), atol=1e-4, rtol=0)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    assert theirs.config.tie_word_embeddings == (tied and logit_bias == "none")
    assert theirs.config.n_positions == 16


@pytest.mark.parametrize("likelihood", ["categorical", "smooth"])
def test_without_a_bias_per_token_every_weight_comes_back_bit_for_bit(tmp_path, likelihood):
    for bias in (True, False):
        model = tiny_gpt(likelihood=likelihood, std=0.3, bias=bias, block_size=9)
        back = load_model(exported(save(tmp_path / f"run{bias}", model), tmp_path / f"gpt2{bias}"))
        ours, theirs = model.state_dict(), back.state_dict()
        assert all(torch.equal(theirs.pop(name), ours[name]) for name in ours)
        assert (len(theirs) == 0) == bias
        assert all(name.endswith("bias") and not tensor.any() for name, tensor in theirs.items())


@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_of_transformers_comes_out_as_it_went_in(tmp_path, tied):
    tokenizer = CharTokenizer(sorted(set(TEXT)))
    theirs = tiny_gpt2(tie_word_embeddings=tied)
    theirs.save_pretrained(tmp_path / "in")
    (tmp_path / "in" / "meta.json").write_text(
        json.dumps({"tokenizer": tokenizer.describe(), "vocab_size": 67})
    )
    back = transformers.GPT2LMHeadModel.from_pretrained(exported(tmp_path / "in", tmp_path / "out"))
    before, after = theirs.state_dict(), back.state_dict()
    assert before.keys() == after.keys() and all(
        torch.equal(before[name], after[name]) for name in before
    )
    free = {
        "dtype",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "embd_pdrop",
        "attn_pdrop",
        "resid_pdrop",
    }
    before, after = theirs.config.to_dict(), back.config.to_dict()
    assert {name for name in before if name not in free and before[name] != after[name]} <= {
        "_name_or_path"
    }
    assert back.config.tie_word_embeddings == tied
    keys = [set(safe_names(tmp_path / name / "model.safetensors")) for name in ("in", "out")]
    assert keys[0] == keys[1]


def safe_names(path: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return list(file.keys())


@pytest.mark.parametrize(("weights", "likelihood"), HEADS)
def test_a_trained_run_goes_out_with_its_tokenizer_its_figures_and_its_text(
    tmp_path, data, weights, likelihood, capsys
):
    options = {
        "weights": weights,
        "likelihood": likelihood,
        "logit_bias": "unigram",
        "max_iters": 40,
    }
    model = run(data, tmp_path / "run", **options)
    exact = (weights, likelihood) in SOFTMAX
    folder = exported(
        tmp_path / "run", tmp_path / "sea_gpt2", *([] if exact else ["--approximate"])
    )
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    idx = torch.randint(
        model.config.vocab_size, (4, 16), generator=torch.Generator().manual_seed(2)
    )
    with torch.no_grad():
        off = (theirs(idx).logits.log_softmax(-1) - model.log_probs(idx)).abs().max()
    assert off < 1e-4 if exact or likelihood != "sigmoid" else 1e-4 < off < 1
    text = (folder / "README.md").read_text()
    file = TokenFile(data, "val")
    for each in (model, load_model(folder)):
        assert f"| {scores_of(each, file, limit=200)['nll']:.4f} |" in text
    if weights == "bayes":
        assert f"posterior | {scores_of(model, file, limit=200, n_samples=-1)['nll']:.4f} |" in text
    assert ("The export is exact" in text) == exact and ("The export is approximate" in text) == (
        not exact
    )
    about = huggingface_hub.ModelCard(text).data
    assert (about.library_name, about.pipeline_tag, about.license) == (
        "transformers",
        "text-generation",
        None,
    )
    assert "for 40 steps on sea" in text


def test_greedy_text_is_the_same_here_there_and_in_a_pipeline(tmp_path, monkeypatch, capsys):
    tokenizer = BPETokenizer.train([TEXT], 300)
    shape = {"vocab_size": tokenizer.vocab_size, "block_size": 32}
    model = tiny_gpt(std=0.4, logit_bias="unigram", **shape)
    folder = exported(save(tmp_path / "run", model, tokenizer), tmp_path / "gpt2")
    prompt = tokenizer.encode("the old").tolist()
    expected = generate(model, torch.tensor([prompt]), 20, temperature=0)[0].tolist()
    assert len(set(expected)) > 4 and tokenizer.eot not in expected
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder).generate(
        torch.tensor([prompt]), max_new_tokens=20, do_sample=False
    )
    assert theirs[0].tolist() == expected
    pipeline = transformers.pipeline("text-generation", model=str(folder), device="cpu")
    said = pipeline("the old", max_new_tokens=20, do_sample=False)[0]["generated_text"]
    assert said == tokenizer.decode(expected)
    capsys.readouterr()
    written = []
    for source in (tmp_path / "run", folder):
        options = {"start": "the old", "temperature": 0, "max_new_tokens": 20, "num_samples": 1}
        argv = flags(init_from=source, device="cpu", dtype="float32", **options)
        monkeypatch.setattr(sys, "argv", ["sample.py", *argv])
        sample.main()
        written.append(capsys.readouterr().out)
    assert written[0] == written[1] and said in written[1]


def expressed(tmp_path: Path, tokenizer, vocab_size: int = 0) -> Path:
    model = tiny_gpt(vocab_size=vocab_size or tokenizer.vocab_size)
    return exported(save(tmp_path / "run", model, tokenizer), tmp_path / "out")


@pytest.mark.parametrize("kind", ["gpt2", "bpe", "byte"])
def test_byte_level_tokenizers_are_transformers_gpt2_tokenizer(tmp_path, kind):
    ours = make(kind)
    folder, n_tokens = expressed(tmp_path, ours), 0
    texts = [
        text.replace("<|endoftext|>", "<|end|>")
        for text in (*STRANGE, TEXT, "don't  stop\n \n we'LL", "")
    ]
    for cls in (transformers.GPT2TokenizerFast, transformers.AutoTokenizer):
        theirs = cls.from_pretrained(folder)
        assert len(theirs) == ours.vocab_size
        assert theirs.bos_token_id == theirs.eos_token_id == theirs.pad_token_id == ours.eot
        assert theirs.model_max_length == 16
        for text in texts:
            ids = ours.encode(text).tolist()
            n_tokens += len(ids)
            assert theirs(text)["input_ids"] == ids and theirs.decode(ids) == text
        assert theirs("a<|endoftext|>b")["input_ids"] == [
            *ours.encode("a"),
            ours.eot,
            *ours.encode("b"),
        ]
    assert n_tokens > 1000


def test_gpt2s_tokens_are_transformers_and_tiktokens_on_real_text(tmp_path):
    text = shared_data("wikitext2/wiki.valid.raw").read_text(encoding="utf-8")[:300_000]
    theirs = transformers.GPT2TokenizerFast.from_pretrained(
        expressed(tmp_path, ours := make("gpt2"), 50304)
    )
    assert (
        theirs(text)["input_ids"]
        == ours.encode(text).tolist()
        == GPT2Tokenizer().bpe.encode_ordinary(text)
    )


@pytest.mark.parametrize("eot", [True, False])
def test_characters_are_characters_in_transformers_and_unknown_ones_an_error(tmp_path, eot):
    text = "Naïve 日本\n\n  e\u0301\r👩‍👩 \x00<|end"
    ours = CharTokenizer(sorted(set(text)), eot)
    folder = expressed(tmp_path, ours)
    theirs, config = (
        c.from_pretrained(folder) for c in (transformers.AutoTokenizer, transformers.GPT2Config)
    )
    ids = ours.encode(text).tolist()
    assert (
        theirs(text)["input_ids"] == ids
        and theirs.decode(ids) == text
        and len(theirs) == ours.vocab_size
    )
    ends = [theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id]
    assert ends == [config.bos_token_id, config.eos_token_id, config.pad_token_id] == [ours.eot] * 3
    if eot:
        assert theirs("日<|endoftext|>")["input_ids"] == [*ours.encode("日"), ours.eot]
    assert theirs("日").keys() == {"input_ids", "attention_mask"}  # all that GPT-2 takes
    with pytest.raises(Exception, match="UNK"):
        theirs("ß")
    back = read_checkpoint(folder).tokenizer()
    assert back.describe() == ours.describe()


@pytest.mark.parametrize(("weights", "likelihood"), OTHERS)
@pytest.mark.parametrize("tied", [True, False])
def test_the_nearest_gpt2_has_the_mean_logits(tmp_path, weights, likelihood, tied):
    data = write_chars(tmp_path / "data")
    options = {
        "std": 0.2,
        "logit_bias": "unigram",
        "tie_head": tied,
        "pos_weight": 3.0,
        "bias": True,
    }
    model = tiny_gpt(weights, likelihood, bayes_mlp=weights == "bayes", **options)
    source = save(tmp_path / "run", model, CharTokenizer(CHARS))
    folder = exported(source, tmp_path / "out", "--approximate", f"--dataset={data}")
    theirs, idx = transformers.GPT2LMHeadModel.from_pretrained(folder).eval(), tokens(2, 16)
    with torch.no_grad():
        expected = model.lm_head.logits(model.hidden(idx)).log_softmax(-1)
        torch.testing.assert_close(theirs(idx).logits.log_softmax(-1), expected, atol=1e-4, rtol=0)


def write_chars(folder: Path) -> Path:
    """A data set of the 67 characters."""
    text = ["".join(CHARS[i] for i in tokens(500).tolist())]
    write_dataset(folder, {"train": text, "val": text}, CharTokenizer(CHARS))
    return folder


def refusal(source: Path, to: Path, *more: str) -> str:
    """The one line with which an export is refused; it must leave nothing."""
    before = contents(to.parent)
    with pytest.raises(UserError) as error:
        exported(source, to, *more)
    assert "\n" not in str(error.value) and contents(to.parent) == before
    return str(error.value)


@pytest.mark.parametrize(("weights", "likelihood"), OTHERS)
def test_what_gpt2_cannot_say_needs_a_flag_that_the_error_names(tmp_path, weights, likelihood):
    source = save(
        tmp_path / "run", tiny_gpt(weights, likelihood, logit_bias="unigram"), CharTokenizer(CHARS)
    )
    message = refusal(source, tmp_path / "out")
    assert "--approximate" in message
    assert ("posterior" in message) == (weights == "bayes") and ("sigmoid" in message) == (
        likelihood == "sigmoid"
    )
    assert "--dataset=" in refusal(source, tmp_path / "out", "--approximate")


def test_a_bayesian_mlp_is_a_loss_too(tmp_path):
    source = save(tmp_path / "run", tiny_gpt(bayes_mlp=True), CharTokenizer(CHARS))
    assert "posterior of weights" in refusal(source, tmp_path / "out")
    more = ("--approximate", f"--dataset={write_chars(tmp_path / 'data')}")
    text = (exported(source, tmp_path / "gpt2", *more) / "README.md").read_text()
    assert (
        "| the export |" in text and "averaged" not in text
    )  # which only draws of hidden layers could be


def test_an_export_that_predicts_otherwise_is_noticed_and_leaves_nothing(tmp_path, monkeypatch):
    source = save(tmp_path / "run", tiny_gpt(std=0.3, logit_bias="unigram"), CharTokenizer(CHARS))
    good = engine.gpt2.exporting.with_bias
    monkeypatch.setattr(
        engine.gpt2.exporting, "with_bias", lambda *parts: good(*parts) + 1e-2 * torch.eye(67, 32)
    )
    assert "log-probabilities differ" in refusal(source, tmp_path / "out")
    assert "log-probabilities differ" in refusal(
        source, tmp_path / "out", f"--dataset={write_chars(tmp_path / 'data')}"
    )
    monkeypatch.setattr(
        engine.gpt2.exporting, "with_bias", lambda *parts: good(*parts) * float("nan")
    )
    assert "values that are not finite" in refusal(source, tmp_path / "out")


def test_whoever_stops_it_half_way_finds_nothing(tmp_path, monkeypatch):
    source = save(tmp_path / "run", tiny_gpt(), CharTokenizer(CHARS))
    before = contents(tmp_path)

    def stop(*_):
        assert (list(tmp_path.glob(".out.*.tmp/model.safetensors"))) and not (
            tmp_path / "out"
        ).exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "model_card", stop)
    with pytest.raises(KeyboardInterrupt):
        exported(source, tmp_path / "out")
    assert contents(tmp_path) == before


def test_a_folder_with_files_is_never_written_over(tmp_path, monkeypatch, capsys):
    save(tmp_path / "run", tiny_gpt(), CharTokenizer(CHARS))
    (tmp_path / "file").write_text("x")
    for to in ("run", "file"):
        message = refused(
            "export.py", ["--out_dir=run", f"--to={to}"], tmp_path, monkeypatch, capsys
        )
        assert f"{to} exists already, and is never written over; give another --to" in message
    (tmp_path / "empty").mkdir()
    assert (exported(tmp_path / "run", tmp_path / "empty") / "config.json").is_file()


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(tmp_path):
    source = save(tmp_path / "run", tiny_gpt(), ByteTokenizer())
    assert "the tokenizer has 257 ids, the model 67" in refusal(source, tmp_path / "out")


def test_an_exported_run_starts_fine_tuning_on_its_own_tokens_alone(tmp_path, data):
    model = run(data, tmp_path / "run", max_iters=3)
    folder = exported(tmp_path / "run", tmp_path / "gpt2")
    tuned = run(data, tmp_path / "tuned", init_from=folder, max_iters=0, dropout=0.1, block_size=8)
    assert (
        torch.equal(tuned.transformer.wte.weight, model.transformer.wte.weight)
        and tuned.config.dropout == 0.1
    )
    write_dataset(tmp_path / "other", {"train": [words(300)], "val": [words(99)]}, ByteTokenizer())
    with pytest.raises(UserError, match="another tokenizer"):
        run(tmp_path / "other", tmp_path / "no", init_from=folder)
    theirs = transformers.AutoTokenizer.from_pretrained(
        folder
    )  # what transformers saves has no meta.json
    theirs.save_pretrained(tmp_path / "theirs")
    transformers.GPT2LMHeadModel.from_pretrained(folder).save_pretrained(tmp_path / "theirs")
    again = run(data, tmp_path / "again", init_from=tmp_path / "theirs", max_iters=0)
    assert same_weights(again, load_model(folder))
    with pytest.raises(UserError, match="another tokenizer"):
        run(tmp_path / "other", tmp_path / "no", init_from=tmp_path / "theirs")


def test_a_nanogpt_checkpoint_and_a_single_file_go_out_too(tmp_path):
    model = tiny_gpt(std=0.3)
    write_nanogpt(tmp_path / "ckpt.pt", model, bias=False)
    meta = {"tokenizer": CharTokenizer(CHARS).describe(), "vocab_size": 67}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    for i, source in enumerate((tmp_path / "ckpt.pt", tmp_path)):
        folder = exported(source, tmp_path / f"out{i}")
        assert torch.equal(load_model(folder).transformer.wte.weight, model.transformer.wte.weight)


def test_others_may_read_the_weights_and_dropout_goes_along(tmp_path):
    folder = exported(save(tmp_path / "run", tiny_gpt(dropout=0.25)), tmp_path / "gpt2")
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    config = json.loads((folder / "config.json").read_text())
    assert {config[name] for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop")} == {0.25}


def test_text_of_another_tokenizer_is_not_measured_on(tmp_path, data):
    source = save(tmp_path / "run", tiny_gpt(), CharTokenizer(CHARS))
    assert "another tokenizer" in refusal(source, tmp_path / "out", f"--dataset={data}")


def test_a_link_is_followed(tmp_path):
    source = save(tmp_path / "run", tiny_gpt(), CharTokenizer(CHARS))
    (tmp_path / "link").symlink_to(tmp_path / "real")
    exported(source, tmp_path / "link")
    assert (tmp_path / "real" / "model.safetensors").is_file()
