"""Targets are plain files: which there are, what they ask for, a user's own, and a search for a microcontroller."""

from __future__ import annotations

import json

import pytest

import dwindle as dw
from dwindle.cli import main
from dwindle.compressing.plans import Plan
from dwindle.targets import known_targets, read_target


def test_every_target_that_comes_along_is_whole():
    assert {"litert", "micro", "cortex-m4-256k"} <= set(known_targets())
    for name in known_targets():
        target = read_target(name)
        assert target.description
        assert target.name == name
    assert read_target("cortex-m4-256k").max_ram == 192_000
    assert read_target("litert").schemes is None


def test_a_users_own_target(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("runtime: micro\nschemes: [int8]\nmax_size: 30KB\n")
    target = read_target(path)
    assert (target.name, target.runtime, target.schemes, target.max_size, target.max_ram) == (
        "mine", "micro", ("int8",), 30_000, None,
    )  # fmt: skip


@pytest.mark.parametrize(("text", "message"), [
    ("- a\n", "target `mine` is no mapping"),
    ("runtim: micro\n", "target `mine` has `runtim`; known are .*did you mean `runtime`"),
    ("runtime: tpu\n", "`runtime of target mine` is 'tpu'"),
    ("schemes: [int7]\n", "`schemes of target mine` is 'int7'"),
    ("max_size: big\n", "`max_size` is 'big'"),
    ("a: [\n", "can't be read"),
])  # fmt: skip
def test_bad_targets_get_one_sentence(tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(dw.ConfigError, match=message):
        read_target(tmp_path / "mine.yaml")
    with pytest.raises(dw.ConfigError, match=r"`target` is 'cortex-m4'.*did you mean `cortex-m"):
        read_target("cortex-m4")


def test_a_search_for_a_microcontroller_ends_in_its_sources(trained, digits, tmp_path):
    pytest.importorskip("tflite_micro")
    (x, y), _ = digits
    plan = Plan(name="float16", steps=(("export", {"scheme": "float16"}),))
    refused = dw.compress(
        trained, (x[:200], y[:200]), (x[200:300], y[200:300]), out=tmp_path / "half", target="cortex-m4-256k", plan=plan
    )  # fmt: skip
    assert refused.report["trials"][1]["reason"] == "cortex-m4-256k runs int8, not float16"
    plan = Plan(name="int8", steps=(("export", {"scheme": "int8"}),))
    result = dw.compress(
        trained, (x[:200], y[:200]), (x[200:300], y[200:300]), dw.Goals(max_drop="90%"), tmp_path / "out",
        target="cortex-m4-256k", plan=plan,
    )  # fmt: skip
    assert result.met
    assert {verdict.goal for verdict in result.verdicts} == {"max_drop", "max_size", "max_ram"}
    assert result.report["result"]["ram_source"] == "tflm-arena"
    made = result.report["result"]["micro"]
    assert made["size_bytes"] == (tmp_path / "out" / "micro" / "model.tflite").stat().st_size
    assert made["size_bytes"] < result.report["result"]["size_bytes"]
    assert (tmp_path / "out" / "micro" / "main.cc").exists()


def test_the_command_takes_a_target(trained, digits, tmp_path, capsys):
    import numpy as np

    (x, y), _ = digits
    trained.save(tmp_path / "m.keras")
    np.savez(tmp_path / "d.npz", x_train=x[:300], y_train=y[:300])
    told = ["compress", str(tmp_path / "m.keras"), "--data", str(tmp_path / "d.npz"), "--out", str(tmp_path / "out")]
    assert main([*told, "--target", "cortex-m5"]) == 2
    assert "did you mean" in capsys.readouterr().err
    assert main([*told, "--target", "cortex-m4-256k", "--budget", "1s", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["target"] == {"name": "cortex-m4-256k", "runtime": "micro"}
    assert report["goals"]["max_ram_bytes"] == 192_000
