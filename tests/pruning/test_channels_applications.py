"""Every architecture of `keras.applications`: removing channels is masking them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from pruning_reference import difference

from dwindle.pruning import ChannelOptions, plan_channels

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from applications import architectures, built, images


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(architectures()))
def test_removing_is_masking(name):
    model = built(name)
    for sparsity in (0.3, 0.6):
        plan = plan_channels(model, ChannelOptions(sparsity=sparsity, criterion="random"))
        assert plan.parameters[1] < plan.parameters[0]
        assert difference(plan, [images(model, 4)]) < 1e-5


def test_a_small_one_in_the_fast_suite():
    model = built("MobileNetV3Small")
    plan = plan_channels(model, ChannelOptions(sparsity=0.5, criterion="random"))
    assert plan.groups.pinned == {"output `predictions` of the model": ["logits"]}
    assert difference(plan, [images(model, 4)]) < 1e-5
