"""Ensembles of runs, and dropout that stays on: predictions averaged over more than the head's
weights.
"""

import itertools
import json
import math
import re
import sys

import pytest
import torch

from engine.data.tokens import TokenFile
from engine.eval.ensemble import Ensemble
from engine.runs.checkpoint import load_model
from tests.helpers import run, tiny_gpt, write_bytes
from tests.test_evaluate import evaluate_py

IDS = torch.arange(24).view(3, 8)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    data = write_bytes(root / "data")
    for seed in (1, 2):
        run(data, root / f"seed{seed}", eval_interval=10, seed=seed, dropout=0.3)
    run(data, root / "plain", eval_interval=10)
    run(data, root / "longer", eval_interval=10, block_size=32)
    run(data, root / "mlp", eval_interval=10, bayes_mlp=True, weights="bayes")
    return root


def result(folder, name: str) -> dict:
    return json.loads((folder / name).read_text())


@pytest.mark.parametrize("likelihood", ["categorical", "smooth", "sigmoid"])
@pytest.mark.parametrize(
    "weights, n_samples", [("point", 0), ("bayes", 0), ("bayes", 5), ("bayes", -1)]
)
def test_an_ensemble_predicts_the_mean_of_its_members_probabilities(weights, n_samples, likelihood):
    members = [tiny_gpt(weights, likelihood, std=0.1).eval() for _ in range(3)]
    for i, member in enumerate(members):
        with torch.no_grad():
            member.transformer.wte.weight *= 1 + i
    torch.manual_seed(7)
    each = [m.lm_head.predict(m.hiddens(IDS, n_samples), n_samples) for m in members]
    torch.manual_seed(7)
    ensemble = Ensemble(members)
    found = ensemble.predict(ensemble.hiddens(IDS, n_samples), n_samples)
    probs = torch.stack([p.log_probs.double().exp() for p in each]).mean(0)
    torch.testing.assert_close(found.log_probs.double(), probs.log(), atol=1e-5, rtol=1e-5)
    total = -(probs * probs.log()).sum(-1)
    torch.testing.assert_close(found.total.double(), total, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(
        found.aleatoric, torch.stack([p.aleatoric for p in each]).mean(0), atol=1e-4, rtol=1e-4
    )
    assert (found.epistemic > 0).all()


def test_evaluate_py_takes_an_ensemble_whose_nll_is_no_worse_than_its_members_mean(
    runs, monkeypatch, capsys
):
    source = f"{runs}/seed1+{runs}/seed2"
    evaluate_py(monkeypatch, out_dir=f"{source},{runs}/seed1,{runs}/seed2")
    found = result(runs / "seed1", "eval_test_ensemble_of_2.json")
    each = [result(runs / f"seed{seed}", "eval_test.json") for seed in (1, 2)]
    file = TokenFile(runs / "data", "test")
    models = [load_model(runs / f"seed{seed}") for seed in (1, 2)]
    x, y = file.ids[: len(file) - 1].astype(int), file.ids[1:].astype(int)
    T, nll = models[0].config.block_size, 0.0
    for start in range(0, len(x), T):
        idx, targets = (
            torch.tensor(x[None, start : start + T]),
            torch.tensor(y[None, start : start + T, None]),
        )
        p = sum(model.log_probs(idx).double().exp() for model in models) / 2
        nll -= p.gather(-1, targets).log().sum().item()
    assert found["nll"] == pytest.approx(nll / len(x), abs=1e-5)
    assert found["nll"] < (each[0]["nll"] + each[1]["nll"]) / 2  # Jensen
    assert found["head"] == "point x categorical + point x categorical"
    assert found["mutual_information"] > 0 and "mutual_information" not in each[0]
    assert "seed1+seed2" in capsys.readouterr().out


def test_monte_carlo_dropout_averages_passes_with_dropout_on_and_leaves_it_off_afterwards():
    torch.manual_seed(0)
    model = tiny_gpt(dropout=0.4).eval()
    model.mc_dropout = True
    torch.manual_seed(3)
    found = model.lm_head.predict(model.hiddens(IDS, 6), 6)
    assert not any(module.training for module in model.modules())
    torch.manual_seed(3)
    model.train()
    probs = torch.stack([model.lm_head.log_probs(model.hidden(IDS)).exp() for _ in range(6)]).mean(
        0
    )
    model.eval()
    torch.testing.assert_close(found.log_probs.exp(), probs, atol=1e-6, rtol=1e-4)
    assert (found.epistemic > 0).all()
    torch.testing.assert_close(model.log_probs(IDS), model.lm_head.log_probs(model.hidden(IDS)))


def test_monte_carlo_dropout_drops_entries_of_the_embeddings_too():
    model = tiny_gpt(dropout=0.25)
    model.mc_dropout, model.transformer.ln_f = True, torch.nn.Identity()
    with torch.no_grad():
        for (
            block
        ) in model.transformer.h:  # the blocks add nothing: what is left is what they would read
            block.attn.c_proj.weight.zero_()
            block.mlp.c_proj.weight.zero_()
        embedded, passes = model.hidden(IDS), torch.stack(model.hiddens(IDS, 40))
    dropped = passes == 0
    torch.testing.assert_close(passes, (embedded / 0.75).expand_as(passes).masked_fill(dropped, 0))
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.02)


def test_each_member_of_an_ensemble_drops_out_where_that_is_asked_for(runs, monkeypatch):
    models, source = [], f"{runs}/seed1+{runs}/seed2"
    monkeypatch.setattr(
        "engine.eval.evaluator.evaluate", lambda model, *_: models.append(model) or sys.exit()
    )
    with pytest.raises(SystemExit):
        evaluate_py(monkeypatch, out_dir=source, mc_dropout=True, n_samples=3)
    passes = models[0].hiddens(IDS, 3)
    assert len(passes) == 6 and not any(
        torch.equal(a, b) for a, b in itertools.combinations(passes, 2)
    )


def test_an_ensemble_names_the_heads_of_all_its_members(runs, monkeypatch):
    for name, bayes in (("a", "point"), ("b", "bayes")):
        run(runs / "data", runs / name, max_iters=2, weights=bayes)
    evaluate_py(monkeypatch, out_dir=f"{runs}/a+{runs}/b", n_samples=2, report="none", limit=2)
    found = result(runs / "a", "eval_test_ensemble_of_2.json")
    assert found["head"] == "point x categorical + bayes x categorical"


def test_evaluate_py_with_mc_dropout_tells_so_and_repeats_itself(runs, monkeypatch):
    rows = []
    for _ in range(2):
        evaluate_py(
            monkeypatch, out_dir=runs / "seed1", mc_dropout=True, n_samples=8, report="none"
        )
        rows.append(result(runs / "seed1", "eval_test.json"))
    assert rows[0] == rows[1]
    assert rows[0]["mc_dropout"] and rows[0]["n_samples"] == 8 and rows[0]["mutual_information"] > 0
    evaluate_py(monkeypatch, out_dir=runs / "seed1", report="none")
    plain = result(runs / "seed1", "eval_test.json")
    assert not plain["mc_dropout"] and not math.isclose(plain["nll"], rows[0]["nll"])


@pytest.mark.parametrize(
    "options, says",
    [
        ({"out_dir": "plain", "mc_dropout": True, "n_samples": 4}, "trained with dropout"),
        ({"out_dir": "seed1", "mc_dropout": True}, "give --n_samples"),
        ({"out_dir": "seed1+nowhere"}, "nowhere does not exist"),
        ({"out_dir": "seed1+longer"}, "same block_size, not 16 and 32"),
        ({"out_dir": "seed1+mlp", "n_samples": 3}, "same bayes_mlp, not False and True"),
        (
            {"out_dir": "seed1+plain", "mc_dropout": True, "n_samples": 3},
            "trained with dropout",
        ),
        ({"out_dir": "seed1+seed1"}, "names a run twice"),
        (
            {"out_dir": "seed1+seed2,seed1+plain"},
            "eval_test_ensemble_of_2.json; name each run once, and begin each",
        ),
        ({"out_dir": "seed1,seed2/../seed1"}, "would both be written to"),
        (
            {"out_dir": "seed1", "mc_dropout": True, "n_samples": 3, "continuations": 4},
            "are generated without dropout",
        ),
        ({"out_dir": "seed1+seed2", "continuations": 4}, "does not generate"),
    ],
)
def test_what_an_ensemble_or_dropout_cannot_do_ends_in_one_line(
    runs, monkeypatch, capsys, options, says
):
    source = re.sub(r"(^|[+,])", rf"\1{runs}/", options["out_dir"])
    monkeypatch.setattr("engine.eval.evaluator.evaluate", None)  # not called
    with pytest.raises(SystemExit) as exit_:
        evaluate_py(monkeypatch, **options | {"out_dir": source})
    error = capsys.readouterr().err.strip().splitlines()
    assert exit_.value.code == 2 and len(error) == 1 and says in error[0]
