"""Pruning channels: every architecture of `keras.applications` analysed and cut, and what removal errs by.

python benchmarks/channels.py architectures [NAME ...] [--out FILE] [--size N]

For each: seconds to find the groups and to build the smaller model at its smallest input, parameters and MACs before
and after half of every group's channels went, and the largest difference from the model with those channels masked to
zero, as a share of the largest output, at 30% and 60%. Weights are random.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "tests")]

import keras
from applications import architectures, built, images
from pruning_reference import difference

from dwindle.pruning import ChannelOptions, plan_channels


def one(name: str, size: int | None) -> dict[str, Any]:
    """Analyse and cut one architecture."""
    if size is None:
        model = built(name)
    else:
        keras.utils.set_random_seed(0)
        model = architectures()[name](weights=None, input_shape=(size, size, 3), classifier_activation=None)
    begun = time.perf_counter()
    plan = plan_channels(model, ChannelOptions(sparsity=0.5))
    planned = time.perf_counter()
    plan.apply()
    done = time.perf_counter()
    row: dict[str, Any] = {
        "plan_s": planned - begun, "cut_s": done - planned, "parameters": plan.parameters, "macs": plan.macs,
        "groups": len(plan.groups), "pinned": list(plan.notes),
    }  # fmt: skip
    if size is None:
        for sparsity in (0.3, 0.6):
            plan = plan_channels(model, ChannelOptions(sparsity=sparsity, criterion="random"))
            row[f"error_{sparsity}"] = difference(plan, [images(model, 4)])
    return row


def main() -> None:
    """Run what was asked for and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["architectures"])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--out", type=Path, default=Path("channels.json"))
    parser.add_argument("--size", type=int, default=None)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    done = json.loads(options.out.read_text()) if options.out.exists() else {}
    for name in options.names or architectures():
        if name not in done:
            done[name] = one(name, options.size)
            options.out.write_text(json.dumps(done, indent=1))
            keras.backend.clear_session()
        row = done[name]
        errors = [f"{key[6:]}: {value:.1e}" for key, value in row.items() if key.startswith("error")]
        print(
            f"{name:20} {row['groups']:4} groups in {row['plan_s']:5.1f} s, cut in {row['cut_s']:5.1f} s, parameters "
            f"{row['parameters'][0] / 1e6:.1f}M to {row['parameters'][1] / 1e6:.1f}M, MACs {row['macs'][0] / 1e6:.0f}M to "
            f"{row['macs'][1] / 1e6:.0f}M; {', '.join(errors)}; {len(row['pinned'])} pinned",
            flush=True,
        )


if __name__ == "__main__":
    main()
