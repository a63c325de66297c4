"""study/logs.py: the rows of a study, their order and their labels."""

import json

from study.logs import read
from tests.test_summary import NLL, write


def test_rows_keep_their_order_and_a_stranger_comes_last(tmp_path):
    study = write(tmp_path / "study", NLL | {"bayes": {1: 5.0}, "a_new_one": {1: 5.0}})
    assert list(read(study)) == ["softmax", "bayes", "sigmoid", "sigmoid_taught", "a_new_one"]


def test_labels_tell_the_options_of_a_runs_head_where_it_has_its_config(tmp_path):
    study = write(
        tmp_path / "study",
        dict.fromkeys(("dropout", "bayes", "sigmoid_weighted_taught", "smooth"), {1: 5.0}),
    )
    tuned = {
        "kl_weight": 0.03,
        "pos_weight": 2.0,
        "sum_penalty": 0.5,
    }  # a scale's file sets them for all rows
    for row, head, dropout in (
        ("dropout", ("point", "categorical"), 0.1),
        ("bayes", ("bayes", "categorical"), 0.0),
        ("sigmoid_weighted_taught", ("point", "sigmoid"), 0.2),
    ):
        options = tuned | {"weights": head[0], "likelihood": head[1], "dropout": dropout}
        (study / f"{row}-seed1/config.json").write_text(json.dumps(options))
    told = [
        "sigmoid weighted, pos_weight 2, sum_penalty 0.5, dropout 0.2, taught",
        "softmax, dropout 0.1",
    ]
    assert [row.label for row in read(study).values()] == [
        "smooth, ε = 0.1",
        "Bayes, kl_weight 0.03",
        *told,
    ]
    (study / "dropout-seed1/config.json").unlink()
    assert read(study)["dropout"].label == "softmax, dropout"
