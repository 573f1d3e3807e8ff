"""A search that is killed at any moment goes on where it was, and ends in the same file."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time

import numpy as np
import pytest
from small_searches import arrays

from dwindle.compressing.store import read_trials


def test_a_search_that_is_killed_goes_on_to_the_same_file(task, tmp_path):
    killed_and_resumed(task, tmp_path, moments=2)


@pytest.mark.slow
def test_killed_at_thirty_moments(task, tmp_path):
    killed_and_resumed(task, tmp_path, moments=30)


def killed_and_resumed(task, tmp_path, moments):
    """Kill runs at random moments and resume them: the files are those of a run that was left alone."""
    model, parts = task
    model.save(tmp_path / "m.keras")
    np.savez(tmp_path / "d.npz", **arrays(parts))
    command = [
        sys.executable, "-m", "dwindle", "compress", str(tmp_path / "m.keras"), "--data", str(tmp_path / "d.npz"),
        "--max-drop", "50%", "--max-size", "5KB", "--epochs", "2", "--trials", "7", "--progress", "json",
    ]  # fmt: skip
    begun = time.monotonic()
    straight = subprocess.run([*command, "--out", str(tmp_path / "whole")], capture_output=True, text=True, check=False)
    took = time.monotonic() - begun
    assert straight.returncode == 0, straight.stderr
    ends = [json.loads(line) for line in straight.stderr.splitlines() if line.startswith("{")]
    assert {"event", "trial", "text"} <= set(ends[0])
    whole = (tmp_path / "whole" / "model.tflite").read_bytes()
    chance = random.Random(0)
    for moment in range(moments):
        out = tmp_path / f"killed-{moment}"
        process = subprocess.Popen([*command, "--out", str(out)], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        try:
            process.wait(timeout=took * chance.uniform(0.3, 0.95))
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
        process.wait()
        there = (out / "trials.sqlite").exists()
        before = read_trials(out) if there else []
        told = [*command, "--out", str(out), *(["--resume"] if there else [])]
        done = subprocess.run(told, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert (out / "model.tflite").read_bytes() == whole
        assert done.stderr.count("done before") == len(before)
        with sqlite3.connect(out / "trials.sqlite") as database:
            numbers = [row[0] for row in database.execute("select number from trials order by number")]
        assert numbers == list(range(len(numbers)))
