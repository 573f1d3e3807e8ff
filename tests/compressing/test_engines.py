"""Trials in other processes and on Ray end in the same files."""

from __future__ import annotations

import subprocess
import sys

import keras
import numpy as np
import pytest
from small_searches import arrays, quick

import dwindle as dw


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_trials_in_other_processes_end_in_the_same_files(task, tmp_path, engine):
    if engine == "ray":
        pytest.importorskip("ray")
    events = []
    options = {"trials": 6, "epochs": 1}
    alone = quick(task, tmp_path / "alone", **options)
    beside = quick(task, tmp_path / "beside", workers=2, engine=engine, watch=events.append, **options)
    for one, two in zip(alone.report["trials"], beside.report["trials"], strict=True):
        assert (one["name"], one["accuracy"], one["size_bytes"]) == (two["name"], two["accuracy"], two["size_bytes"])
    assert beside.report["result"]["sha256"] == alone.report["result"]["sha256"]
    begun = [event.trial for event in events if event.kind == "begin"]
    assert sorted(begun) == list(range(len(beside.report["trials"])))
    assert not (tmp_path / "beside" / "shared").exists()


def test_a_script_that_its_workers_can_not_import_is_told_so(task, tmp_path):
    model, parts = task
    model.save(tmp_path / "m.keras")
    np.savez(tmp_path / "d.npz", **arrays(parts))
    script = tmp_path / "script.py"
    script.write_text(
        "import dwindle as dw\n"
        f"model = dw.load({str(tmp_path / 'm.keras')!r})\n"
        f"dw.compress(model, data={str(tmp_path / 'd.npz')!r}, goals=dw.Goals(max_drop=0.5), workers=2, out={str(tmp_path / 'out')!r})\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "under `if __name__ == '__main__':`" in done.stderr.splitlines()[-1]


def test_what_another_process_can_not_read_is_said(task, tmp_path):
    model, parts = task

    def own_loss(y, made):
        return keras.ops.mean((made - keras.ops.one_hot(y, 4)) ** 2)

    own = keras.models.clone_model(model)
    own.set_weights(model.get_weights())
    own.compile("adam", own_loss)
    with pytest.raises(dw.ConfigError, match=r"loss .* can't be read in another process"):
        dw.compress(own, data=arrays(parts), goals=dw.Goals(max_drop=0.5), out=tmp_path / "out", workers=2)
    for name, value in (("workers", 0), ("trials", 0), ("engine", "cloud")):
        with pytest.raises(dw.ConfigError, match=f"`{name}` is"):
            quick(task, tmp_path / "other", **{name: value})
