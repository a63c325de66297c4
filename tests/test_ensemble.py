"""Ensembles of runs, and dropout that stays on: predictions averaged over more than the head's weights."""

import json
import math

import pytest
import torch

from engine.checkpoint import load_model
from engine.ensemble import Ensemble
from engine.tokens import TokenFile
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
    return root


def result(folder, name: str) -> dict:
    return json.loads((folder / name).read_text())


@pytest.mark.parametrize("likelihood", ["categorical", "smooth", "sigmoid"])
@pytest.mark.parametrize("weights, n_samples", [("point", 0), ("bayes", 0), ("bayes", 5), ("bayes", -1)])
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
    torch.testing.assert_close(found.aleatoric, torch.stack([p.aleatoric for p in each]).mean(0), atol=1e-4, rtol=1e-4)
    assert (found.epistemic > 0).all()


def test_evaluate_py_takes_an_ensemble_whose_nll_is_no_worse_than_its_members_mean(runs, monkeypatch, capsys):
    source = f"{runs}/seed1+{runs}/seed2"
    evaluate_py(monkeypatch, out_dir=f"{source},{runs}/seed1,{runs}/seed2")
    found = result(runs / "seed1", "eval_test_ensemble_of_2.json")
    each = [result(runs / f"seed{seed}", "eval_test.json") for seed in (1, 2)]
    file = TokenFile(runs / "data", "test")
    models = [load_model(runs / f"seed{seed}") for seed in (1, 2)]
    x, y = file.ids[: len(file) - 1].astype(int), file.ids[1:].astype(int)
    T, nll = models[0].config.block_size, 0.0
    for start in range(0, len(x), T):
        idx, targets = torch.tensor(x[None, start : start + T]), torch.tensor(y[None, start : start + T, None])
        p = sum(model.log_probs(idx).double().exp() for model in models) / 2
        nll -= p.gather(-1, targets).log().sum().item()
    assert found["nll"] == pytest.approx(nll / len(x), abs=1e-5)
    assert found["nll"] < (each[0]["nll"] + each[1]["nll"]) / 2  # Jensen
    assert found["head"] == "point x categorical, ensemble of 2"
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
    probs = torch.stack([model.lm_head.log_probs(model.hidden(IDS)).exp() for _ in range(6)]).mean(0)
    model.eval()
    torch.testing.assert_close(found.log_probs.exp(), probs, atol=1e-6, rtol=1e-4)
    assert (found.epistemic > 0).all()
    torch.testing.assert_close(model.log_probs(IDS), model.lm_head.log_probs(model.hidden(IDS)))


def test_evaluate_py_with_mc_dropout_tells_so_and_repeats_itself(runs, monkeypatch):
    rows = []
    for _ in range(2):
        evaluate_py(monkeypatch, out_dir=runs / "seed1", mc_dropout=True, n_samples=8, report="none")
        rows.append(result(runs / "seed1", "eval_test.json"))
    assert rows[0] == rows[1]
    assert rows[0]["mc_dropout"] and rows[0]["n_samples"] == 8 and rows[0]["mutual_information"] > 0
    evaluate_py(monkeypatch, out_dir=runs / "seed1", report="none")
    plain = result(runs / "seed1", "eval_test.json")
    assert "mc_dropout" not in plain and not math.isclose(plain["nll"], rows[0]["nll"])


@pytest.mark.parametrize(
    "options, says",
    [
        ({"out_dir": "plain", "mc_dropout": True, "n_samples": 4}, "was trained without dropout"),
        ({"out_dir": "seed1", "mc_dropout": True}, "give --n_samples"),
        ({"out_dir": "seed1+nowhere"}, "nowhere does not exist"),
        ({"out_dir": "seed1+longer"}, "same block_size"),
        ({"out_dir": "seed1+seed2", "continuations": 4}, "does not write"),
    ],
)
def test_what_an_ensemble_or_dropout_cannot_do_ends_in_one_line(runs, monkeypatch, capsys, options, says):
    source = "+".join(f"{runs}/{name}" for name in options["out_dir"].split("+"))
    with pytest.raises(SystemExit) as exit_:
        evaluate_py(monkeypatch, **options | {"out_dir": source})
    error = capsys.readouterr().err.strip().splitlines()
    assert exit_.value.code == 2 and len(error) == 1 and says in error[0]
