"""Sensitivity: each figure against pruning by hand, the cache, resuming, the command."""

from __future__ import annotations

import json
import re
from pathlib import Path

import keras
import numpy as np
import pytest
from conftest import small_cnn

import dwindle as dw
from dwindle.cli import main
from dwindle.layer_sensitivity import CHANGE
from dwindle.measuring.accuracy import accuracy
from dwindle.reporting import print_sensitivity, sensitivity_svg


@pytest.fixture(scope="module")
def case(trained, digits):
    x, y = digits[1]
    return trained, (x[:300], y[:300])


@pytest.fixture(scope="module")
def found(case):
    return dw.sensitivity(*case, sparsities=(0.9, 0.5))


def test_each_figure_is_that_of_the_model_pruned_by_hand(case, found):
    model, (x, y) = case
    assert found.baseline == accuracy(model.predict(x, verbose=0), y)
    assert found.sparsities == (0.5, 0.9)
    assert [row.layer for row in found.rows] == ["conv", "hidden", "digit"]
    for row in found.rows:
        for sparsity, value in zip(found.sparsities, row.values, strict=True):
            twin = keras.models.clone_model(model)
            twin.set_weights(model.get_weights())
            kernel = np.asarray(twin.get_layer(row.layer).kernel).copy()
            smallest = np.argsort(np.abs(kernel).ravel(), kind="stable")[: round(sparsity * kernel.size)]
            kernel.ravel()[smallest] = 0
            twin.get_layer(row.layer).kernel.assign(kernel)
            assert value == pytest.approx(accuracy(twin.predict(x, verbose=0), y), abs=1.01 / 300)
    assert {row.parameters for row in found.rows} == {200, 32 * 288, 320}
    assert model.get_layer("conv").kernel.numpy().all()  # not changed


def test_what_is_tolerated_follows_from_the_figures(found):
    for row in found.rows:
        losses = [found.baseline - value for value in row.values]
        expected = 0.0 if losses[0] > 0.02 else 0.5 if losses[1] > 0.02 else 0.9
        assert found.tolerated(0.02)[row.layer] == expected
    worst = max(found.rows, key=lambda row: max(found.losses(row)))
    assert f"`{worst.layer}` costs most" in found.advice


def test_channels_are_cut(case):
    model, (x, y) = case
    found = dw.sensitivity(model, (x, y), structure="channel", sparsities=(0.5,))
    rows = {row.layer: row for row in found.rows}
    cut = dw.prune(model, 0.5, structure="channel", criterion="l2", layers="hidden")
    assert rows["hidden"].values[0] == pytest.approx(accuracy(cut.predict(x, verbose=0), y), abs=1.01 / 300)
    assert "softmax" in rows["digit"].reason
    assert rows["digit"].values == (None,)
    assert found.criterion == "l2"
    assert "digit" not in found.tolerated(1.0)


def test_patterns_and_blocks(case):
    found = dw.sensitivity(*case, structure="2:4")
    assert found.sparsities == (0.5,)
    rows = {row.layer: row for row in found.rows}
    assert rows["hidden"].values[0] is not None
    assert dw.sensitivity(*case, structure=(4, 1), sparsities=(0.5,), layers="hidden").rows[0].values[0] is not None
    with pytest.raises(dw.ConfigError, match=r"`2:4` is 0.5; leave it out"):
        dw.sensitivity(*case, structure="2:4", sparsities=(0.7,))


def test_a_criterion_that_needs_data_gets_it(case):
    model, data = case
    found = dw.sensitivity(model, data, criterion="taylor", sparsities=(0.5,), layers="hidden")
    assert found.rows[0].values[0] > 0.5


def test_without_labels_it_is_how_far_the_outputs_move(case):
    model, (x, _) = case
    found = dw.sensitivity(model, x, sparsities=(0.5,), layers="conv")
    assert (found.metric, found.higher_is_better, found.baseline) == (CHANGE, False, 0.0)
    pruned = dw.finalize(dw.prune(model, 0.5, layers="conv"))
    p, q = (m.predict(x, verbose=0).astype(np.float64) for m in (model, pruned))
    expected = (p * np.log((p + 1e-12) / (q + 1e-12))).sum(1).mean()
    assert found.rows[0].values[0] == pytest.approx(expected, rel=1e-3)


def test_another_metric(case):
    model, (x, y) = case
    found = dw.sensitivity(model, (x, y), metric="sparse_categorical_crossentropy", sparsities=(0.9,), layers="conv")
    assert not found.higher_is_better
    assert found.losses(found.rows[0])[0] == pytest.approx(found.rows[0].values[0] - found.baseline)


def test_figures_are_kept_and_an_interrupted_run_goes_on(case, found, tmp_path):
    class Stop(Exception):
        pass

    def stop(done, every):
        assert every == 6
        if done == 4:
            raise Stop

    with pytest.raises(Stop):
        dw.sensitivity(*case, sparsities=(0.5, 0.9), cache=tmp_path, progress=stop)
    (file,) = tmp_path.iterdir()
    kept = json.loads(file.read_text())
    assert sum(len(values) for values in kept["figures"].values()) == 1 + 4
    # What is there is believed, so a figure that only the file has shows that it was not measured again.
    kept["figures"]["conv"]["0.5"] = 0.125
    file.write_text(json.dumps(kept))
    seen = []
    resumed = dw.sensitivity(*case, sparsities=(0.5, 0.9), cache=tmp_path, progress=lambda *now: seen.append(now))
    assert resumed.rows[0].values[0] == 0.125
    assert resumed.rows[1] == found.rows[1]
    assert resumed.rows[2] == found.rows[2]
    assert seen[-1] == (6, 6)
    # More sparsities of the same are added; other weights, data or settings are another file.
    dw.sensitivity(*case, sparsities=(0.7,), layers="conv", cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    model, (x, y) = case
    dw.sensitivity(model, (x[:200], y[:200]), sparsities=(0.5,), layers="conv", cache=tmp_path)
    dw.sensitivity(small_cnn(), (x, y), sparsities=(0.5,), layers="conv", cache=tmp_path)
    dw.sensitivity(model, (x, y), sparsities=(0.5,), layers="conv", criterion="random", cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 4
    file.write_text("{damaged")
    again = dw.sensitivity(*case, sparsities=(0.5, 0.9), cache=tmp_path)
    assert again == found


def test_it_is_plain_data_that_can_be_read_back(found, tmp_path):
    path = found.save(tmp_path / "s.json")
    assert dw.Sensitivity.from_dict(json.loads(path.read_text())) == found


def test_table_and_picture_have_every_figure(found, capsys):
    print_sensitivity(found.to_dict())
    table, picture = capsys.readouterr().out, sensitivity_svg(found.to_dict())
    for row in found.rows:
        for value in row.values:
            assert f"{value:.4f}" in table
            assert f">{value:.4f}</text>" in picture
    assert found.advice[:40] in table
    assert picture.startswith("<svg")
    assert picture.endswith("</svg>")


def test_the_command(case, found, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, (x, y) = case
    model.save("m.keras")
    np.savez("d.npz", x_test=x, y_test=y)
    arguments = ["sensitivity", "m.keras", "--data", "d.npz", "--sparsity", "0.5", "--sparsity", "0.9"]
    assert main([*arguments, "--json", "--plot", "s.svg"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert dw.Sensitivity.from_dict(told) == found
    assert (tmp_path / "s.svg").read_text().startswith("<svg")
    assert len(list((tmp_path / ".dwindle-cache").iterdir())) == 1
    assert main([*arguments, "--no-cache", "--layers", "conv"]) == 0
    assert "conv" in capsys.readouterr().out
    assert main(["sensitivity", "m.keras", "--data", "d.npz", "--sparsity", "2"]) == 2
    assert "`sparsities` is [2.0]" in capsys.readouterr().err
    assert main(["sensitivity", "none.keras", "--data", "d.npz"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsities": (0.5, 1.0)}, r"`sparsities` is \(0.5, 1.0\); .*\(0, 1\)"),
        ({"sparsities": ()}, r"`sparsities` is \(\)"),
        ({"samples": 0}, r"`samples` is 0"),
        ({"metric": "acuracy"}, r"did you mean `accuracy`"),
        ({"layers": "c?"}, r"'c\?', which matches none"),
        ({"structure": "chanel"}, r"`structure` is 'chanel'"),
        ({"criterion": "magnitud"}, r"did you mean `magnitude`"),
    ],
)
def test_bad_input_is_one_clear_sentence(case, arguments, message):
    with pytest.raises(dw.ConfigError, match=message):
        dw.sensitivity(*case, **arguments)


def test_a_file_is_no_cache(case, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(dw.ConfigError, match="a file; name a folder"):
        dw.sensitivity(*case, cache=tmp_path / "file")


def test_the_code_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).resolve().parent.parent / "docs" / "depth.md").read_text(encoding="utf8")
    names: dict[str, object] = {}
    for block in re.findall(r"^```python\n(.*?)^```$", page, re.S | re.M):
        exec(compile(block, "depth.md", "exec"), names)
    assert len(names["layers"].depth.dropped) == 1
    assert names["same"].count_params() < names["model"].count_params()
    assert set(names["found"].tolerated()) == {row.layer for row in names["found"].rows}
