"""The command: bad input is one sentence with exit status 2 and nothing written; good input does what it says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest

import dwindle as dw
from dwindle.cli import main
from dwindle.compressing.store import read_trials


@pytest.fixture(scope="module")
def place(tmp_path_factory, trained, digits):
    folder = tmp_path_factory.mktemp("cli")
    trained.save(folder / "cnn.keras")
    (x, y), (x_test, y_test) = digits
    np.savez(folder / "digits.npz", x_train=x[:1500], y_train=y[:1500], x_test=x_test, y_test=y_test)
    dw.export(trained, folder / "cnn.tflite")
    return folder


@pytest.fixture
def run(place, capsys):
    def call(*arguments):
        """Return exit status, standard output and error of the command, with {} replaced by the folder."""
        capsys.readouterr()
        try:
            status = main([str(argument).replace("{}", str(place)) for argument in arguments])
        except SystemExit as stop:  # argparse
            status = stop.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def listing(folder):
    return sorted((str(path.relative_to(folder)), path.stat().st_mtime_ns) for path in folder.rglob("*"))


GOAL = ("--max-drop", "1%")


def _bad_files(folder, digits):
    """Write each broken input once."""
    (x, y), _ = digits
    (folder / "text.keras").write_text("this is no model")
    (folder / "text.npz").write_text("this is no data")
    content = (folder / "cnn.tflite").read_bytes()
    (folder / "cut.tflite").write_bytes(content[: len(content) // 2])
    np.savez(folder / "keys.npz", images=x, labels=y)
    np.savez(folder / "large.npz", x_train=np.zeros((9, 32, 32, 1), np.float32), y_train=np.zeros(9, np.int64))
    np.savez(folder / "labels.npz", x_train=x[:9], y_train=np.full(9, 10))
    holes = x[:9].copy()
    holes[4, 3, 3] = np.nan
    np.savez(folder / "nan.npz", x_train=holes, y_train=y[:9])
    np.savez(folder / "pickle.npz", x_train=np.array([{}], dtype=object), y_train=y[:1])
    (folder / "other").mkdir()
    (folder / "other" / "thesis.txt").write_text("precious")
    (folder / "bad.yaml").write_text("steps: [{shrnk: {width: 0.5}}, {export: {}}]")
    lambda_model = keras.Sequential([keras.Input((28, 28, 1)), keras.layers.Lambda(lambda v: v * 2), keras.layers.Flatten(),
                                     keras.layers.Dense(10)])  # fmt: skip
    lambda_model.save(folder / "code.keras")
    lambda_model.save(folder / "code.h5")


BAD = {
    "missing model": (("compress", "{}/no.keras", "--data", "{}/digits.npz", *GOAL), r"no\.keras` does not exist"),
    "missing data": (("compress", "{}/cnn.keras", "--data", "{}/no.npz", *GOAL), r"no\.npz` does not exist"),
    "text as keras": (("compress", "{}/text.keras", "--data", "{}/digits.npz", *GOAL), r"text\.keras` is no Keras file"),
    "text as npz": (("compress", "{}/cnn.keras", "--data", "{}/text.npz", *GOAL), r"text\.npz` is no \.npz file"),
    "cut tflite": (("compress", "{}/cut.tflite", "--data", "{}/digits.npz", *GOAL), r"truncated or damaged"),
    "cut tflite measured": (("measure", "{}/cut.tflite"), r"cut\.tflite`: the LiteRT file is truncated or damaged"),
    "wrong keys": (("compress", "{}/cnn.keras", "--data", "{}/keys.npz", *GOAL), r"images, labels; expected x_train"),
    "image size": (("compress", "{}/cnn.keras", "--data", "{}/large.npz", *GOAL), r"\(32, 32, 1\).*\(28, 28, 1\)"),
    "labels": (("compress", "{}/cnn.keras", "--data", "{}/labels.npz", *GOAL), r"label 10 .* 10 classes, 0 to 9"),
    "nan": (("compress", "{}/cnn.keras", "--data", "{}/nan.npz", *GOAL), r"NaN .* 1 of 9 samples, the first at index 4"),
    "pickle": (("compress", "{}/cnn.keras", "--data", "{}/pickle.npz", *GOAL), r"only pickle reads"),
    "negative size": (("compress", "{}/cnn.keras", "--data", "{}/digits.npz", "--max-size=-3KB"), r"`max_size` is '-3KB'"),
    "drop of 200%": (("compress", "{}/cnn.keras", "--data", "{}/digits.npz", "--max-drop", "200%"), r"`max_drop` is '200%'"),
    "no goal": (("compress", "{}/cnn.keras", "--data", "{}/digits.npz"), r"no goal is given"),
    "latency": (("compress", "{}/cnn.keras", "--data", "{}/digits.npz", "--max-latency", "fast"), r"`max_latency` is 'fast'"),
    "unknown metric": (
        ("compress", "{}/cnn.keras", "--data", "{}/digits.npz", *GOAL, "--metric", "acuracy"), r"did you mean `accuracy`"
    ),
    "unknown scheme": (("convert", "{}/cnn.keras", "{}/x.tflite", "--scheme", "int9"), r"`--scheme` is 'int9'.*`int8`"),
    "foreign folder": (
        ("compress", "{}/cnn.keras", "--data", "{}/digits.npz", *GOAL, "--out", "{}/other"), r"other` has files that dwindle"
    ),
    "nothing to resume": (
        ("compress", "{}/cnn.keras", "--data", "{}/digits.npz", *GOAL, "--out", "{}/new", "--resume"), r"no run to resume"
    ),
    "lambda": (("compress", "{}/code.keras", "--data", "{}/digits.npz", *GOAL), r"Lambda layer.*--trust"),
    "lambda in h5": (("inspect", "{}/code.h5"), r"Lambda layer.*--trust"),
    "plan": (
        ("compress", "{}/cnn.keras", "--data", "{}/digits.npz", *GOAL, "--plan", "{}/bad.yaml"), r"did you mean `shrink`"
    ),
    "out name": (("convert", "{}/cnn.keras", "{}/x.pb"), r"x\.pb` ends in '\.pb'; it must end in \.tflite or \.onnx"),
    "out exists": (("convert", "{}/cnn.keras", "{}/cnn.tflite"), r"cnn\.tflite` exists; write over it with --force"),
    "no calibration": (("convert", "{}/cnn.keras", "{}/x.tflite", "--scheme", "int8"), r"needs calibration data"),
    "suffix": (("inspect", "{}/keys.npz"), r"ends in '\.npz'; known are \.keras"),
    "folder": (("inspect", "{}/other"), r"folder without `saved_model\.pb`"),
    "rescale": (("measure", "{}/cnn.tflite", "--data", "{}/digits.npz", "--rescale", "1/0"), r"`--rescale` is '1/0'"),
    "function": (("measure", "{}/cnn.tflite", "--data", "json:nothing"), r"`json` has no function `nothing`"),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _broken(place, digits):
    _bad_files(place, digits)


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, run, place, monkeypatch):
    import re

    monkeypatch.chdir(place)
    arguments, message = BAD[case]
    before = listing(place)
    status, out, error = run(*arguments)
    assert status == 2
    assert re.search(message, error), error
    said = [line for line in error.splitlines() if line.startswith("dwindle: ")]
    assert len(said) == 1, error
    assert "Traceback" not in error
    assert out == ""
    assert listing(place) == before


def test_trusting_a_file_runs_its_code(run):
    status, out, _ = run("inspect", "{}/code.keras", "--trust")
    assert status == 0
    assert "Lambda" in out


def test_a_full_disk_keeps_the_old_file(run, place, monkeypatch):
    out = place / "kept.tflite"
    out.write_bytes(b"the old file")
    real = os.fsync

    def full(descriptor):
        real(descriptor)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    status, _, error = run("convert", "{}/cnn.keras", "{}/kept.tflite", "--force")
    assert status == 2
    assert "No space left on device; the old file is unchanged" in error
    assert out.read_bytes() == b"the old file"
    assert not [path for path in place.iterdir() if path.name.endswith(".tmp")]


@pytest.mark.skipif(not hasattr(os, "mkfifo") or os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_really_full_disk_keeps_the_old_file(place, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", str(small)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a small disk can't be mounted here")
    try:
        (small / "model.tflite").write_bytes(b"the old file")
        done = subprocess.run(
            [sys.executable, "-m", "dwindle", "convert", str(place / "cnn.keras"), str(small / "model.tflite"), "--force"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 2
        assert "No space left on device" in done.stderr
        assert (small / "model.tflite").read_bytes() == b"the old file"
        assert [path.name for path in small.iterdir()] == ["model.tflite"]
    finally:
        subprocess.run(["umount", str(small)], check=False)


@pytest.mark.parametrize("scheme", ["float32", "float16", "int8", "int8-dynamic"])
def test_convert_and_measure(run, place, scheme):
    status, out, _ = run("convert", "{}/cnn.keras", "{}/out.tflite", "--scheme", scheme, "--data", "{}/digits.npz",
                         "--force", "--json")  # fmt: skip
    told = json.loads(out)
    assert status == 0
    assert told["size_bytes"] == (place / "out.tflite").stat().st_size
    assert told["verification"]["passed"]
    status, out, _ = run("measure", "{}/out.tflite", "--data", "{}/digits.npz", "--json")
    measured = json.loads(out)
    assert status == 0
    assert measured["accuracy"] > 0.9
    assert measured["sha256"] == told["sha256"]


def test_plan_says_what_would_be_tried_and_tries_nothing(run, place):
    before = listing(place)
    status, out, _ = run("plan", "{}/cnn.keras", "--data", "{}/digits.npz", *GOAL)
    assert status == 0
    assert "[1] int8 after training: export scheme=int8" in out
    assert "as wide, cut where bytes are, int8" in out
    assert listing(place) == before


def test_convert_for_a_microcontroller(run, place):
    pytest.importorskip("tflite_micro")
    told = ("convert", "{}/cnn.keras", "{}/device", "--target", "micro", "--data", "{}/digits.npz")
    status, out, error = run(*told)
    assert status == 0, error
    assert "TensorFlow Lite Micro against" in out
    assert "CONV_2D" in out
    made = (place / "device" / "model.tflite").stat().st_size
    assert f"a model of {made:,} bytes" in out
    assert run(*told)[0] == 2  # it exists
    status, out, _ = run("convert", "{}/device/model.tflite", "{}/again", "--target", "micro", "--json")
    assert status == 0
    assert json.loads(out)["size_bytes"] <= made
    for more, message in ((("--budget", "5KB"), "--budget does not go with --target micro"),
                          (("--scheme", "int4"), "`--scheme` is 'int4'")):  # fmt: skip
        status, _, error = run(*told, *more)
        assert (status, error.count("\n")) == (2, 1)
        assert message in error
    assert "writes a folder" in run("convert", "{}/cnn.keras", "{}/m.tflite", "--target", "micro")[2]
    assert "add --target micro" in run("convert", "{}/cnn.keras", "{}/m.tflite", "--decode")[2]


def test_convert_tflite_to_keras_and_back_is_the_same_model(run, place, digits):
    assert run("convert", "{}/cnn.tflite", "{}/lifted.keras")[0] == 0
    assert run("convert", "{}/lifted.keras", "{}/again.tflite")[0] == 0
    assert (place / "again.tflite").read_bytes() == (place / "cnn.tflite").read_bytes()


def test_inspect_prints_every_operator(run):
    status, out, _ = run("inspect", "{}/cnn.tflite")
    assert status == 0
    for name in ("CONV_2D", "MAX_POOL_2D", "FULLY_CONNECTED", "SOFTMAX"):
        assert name in out
    assert max(map(len, out.splitlines())) <= 140


def test_dry_run_writes_nothing(run, place):
    before = listing(place)
    status, out, _ = run("compress", "{}/cnn.keras", "--data", "{}/digits.npz", *GOAL, "--dry-run")
    assert status == 0
    assert "as wide, cut where bytes are, int8" in out
    assert listing(place) == before


@pytest.fixture(scope="module")
def plan_file(place):
    plan = dw.Plan(
        name="small student",
        steps=(("shrink", {"width": 0.5}), ("train", {"epochs": 8, "learning_rate": 5e-3}), ("quantize", {}), ("train", {"epochs": 1}), ("export", {})),
    )  # fmt: skip
    path = place / "plan.yaml"
    path.write_text(plan.to_yaml())
    return path


def test_compress_with_a_plan_met_and_not_met(run, place, plan_file):
    base = ("compress", "{}/cnn.keras", "--data", "{}/digits.npz", "--plan", "{}/plan.yaml", "--out", "{}/run")
    status, out, _ = run(*base, "--max-size", "20KB", "--max-drop", "50%")
    assert status == 0, out
    report = json.loads((place / "run" / "report.json").read_text())
    assert report["met"]
    assert report["status"] == "met"
    for name in ("goals", "met", "baseline", "result", "trials", "environment"):
        assert name in report
    for trial in (report["baseline"], report["result"]):
        assert {"file", "accuracy", "size_bytes", "latency_ms", "ram_bytes", "sha256"} <= set(trial)
        assert set(trial["latency_ms"]) == {"p50", "p90"}
    file = place / "run" / "model.tflite"
    assert report["result"]["size_bytes"] == file.stat().st_size
    assert report["result"]["sha256"] == dw.measure(file).sha256
    for name in ("model.keras", "report.html", "plan.yaml"):
        assert (place / "run" / name).exists()
    twin = dw.load(place / "run" / "model.keras")
    assert dw.export(twin, place / "again.tflite").sha256 == report["result"]["sha256"]
    status, _, error = run(*base, "--max-size", "2KB")
    assert status == 2
    assert "--resume" in error
    status, out, _ = run(*base, "--max-size", "2KB", "--force")
    assert status == 3
    report = json.loads((place / "run" / "report.json").read_text())
    assert not report["met"]
    assert "size" in out
    assert "at most 2.0 KB" in out


def test_the_same_seed_gives_the_same_file(run, place, plan_file):
    base = ("compress", "{}/cnn.keras", "--data", "{}/digits.npz", "--plan", "{}/plan.yaml", "--max-drop", "90%")
    for out in ("{}/one", "{}/two"):
        assert run(*base, "--out", out, "--seed", "7")[0] == 0
    one, two = ((place / name / "model.tflite").read_bytes() for name in ("one", "two"))
    assert one == two


def test_compare_puts_files_side_by_side(run, place):
    dw.export(dw.load(place / "cnn.tflite"), place / "half.tflite", scheme="float16")
    status, out, _ = run("compare", "{}/cnn.tflite", "{}/half.tflite", "--data", "{}/digits.npz")
    assert status == 0
    lines = [line for line in out.splitlines() if ".tflite" in line]
    assert [line.split()[0] for line in lines] == ["cnn.tflite", "half.tflite"]
    assert "1.00x" in lines[0]
    assert "100.00%" in lines[0]
    status, out, _ = run("compare", "{}/cnn.tflite", "{}/half.tflite", "--json")
    found = json.loads(out)
    assert [row["size_bytes"] for row in found] == [
        (place / name).stat().st_size for name in ("cnn.tflite", "half.tflite")
    ]
    assert found[1]["same_class"] is None
    status, _, error = run("compare", "{}/cnn.tflite")
    assert (status, error.count("\n")) == (2, 1)
    assert "at least two" in error


def test_interrupting_leaves_a_usable_folder_and_resuming_goes_on(place):
    out, plan_file = place / "stopped", place / "short.yaml"
    steps = (("shrink", {"width": 0.5}), ("train", {"epochs": 6}), ("export", {"scheme": "int8"}))
    plan_file.write_text(dw.Plan(name="small student", steps=steps).to_yaml())
    command = [sys.executable, "-m", "dwindle", "compress", str(place / "cnn.keras"), "--data", str(place / "digits.npz"),
               "--max-drop", "90%", "--max-size", "40KB", "--plan", str(plan_file), "--out", str(out)]  # fmt: skip
    # What a shell runs in the background ignores SIGINT, and so would this; Ctrl-C comes to what runs in front.
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    with process:
        try:
            deadline = time.monotonic() + 200
            while not (out / "trials" / "000").exists():
                assert time.monotonic() < deadline
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            _, error = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 130, error
    assert "Traceback" not in error
    report = json.loads((out / "report.json").read_text())
    assert report["status"] == "interrupted"
    assert (out / "report.html").exists()
    assert dw.measure(out / "model.tflite").size_bytes == report["result"]["size_bytes"]
    done = read_trials(out)
    files = {
        path.name: (path / "model.tflite").read_bytes() for path in (out / "trials").iterdir() if path.name[0] != "."
    }
    assert done
    finished = subprocess.run([*command, "--resume"], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert "done before" in finished.stderr
    assert read_trials(out)[: len(done)] == done
    for name, content in files.items():
        assert (out / "trials" / name / "model.tflite").read_bytes() == content
    assert json.loads((out / "report.json").read_text())["met"]
    other = [*command[:4], command[4], *command[5:], "--resume", "--seed", "5"]
    refused = subprocess.run(other, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "another seed" in refused.stderr
    assert not list(Path(out).glob("*.tmp"))
