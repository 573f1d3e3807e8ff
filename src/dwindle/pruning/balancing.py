"""The order in which channels go if every layer is to give what costs the model least for the size that it saves."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from dwindle.pruning.channel_groups import Counts, Group

if TYPE_CHECKING:
    from dwindle.pruning.channels import Block

#: A step takes at least this share of what a group has left.
_STEP = 0.05


def balanced(
    judged: Sequence[tuple[Group, np.ndarray]], allowed: Sequence[Sequence[int]], counts: Counts, *, macs: bool
) -> list[Block]:
    """Return all blocks of channels that may go, in the order in which they go.

    A group's penalty is the inverse of the share of its importance that is left, so the first channels of a wide layer
    cost little and the last of a narrow one much. Each step goes where the penalty grows least for what is saved;
    what a step saves depends on how wide its neighbours are by then. Large layers give most, small ones keep their
    channels: with channels of equal importance this is the allotment of widths that minimizes the sum of the inverse
    widths for a size.

    Args:
        judged: Groups, each with the importance of its channels.
        allowed: For each group how many channels may be gone, ascending.
        counts: Counts what is left.
        macs: Save multiply-accumulates rather than parameters.

    References:
        Gordon et al. 2018, MorphNet, arXiv 1711.06798, where what a channel costs depends on its neighbours, too.
    """
    from dwindle.pruning.channels import Block

    orders = [np.argsort(values, kind="stable") for _, values in judged]
    kept = [_shares(values[order]) for (_, values), order in zip(judged, orders, strict=True)]
    gone = [0] * len(judged)
    removed = np.zeros(0, np.int64)
    left = counts.of(removed)[macs]

    def coming(number: int) -> int | None:
        size = judged[number][0].size
        steps = [step for step in allowed[number] if step > gone[number]]
        far = gone[number] + _STEP * (size - gone[number])
        return next((step for step in steps if step >= far), steps[-1] if steps else None)

    def channels(number: int, until: int) -> np.ndarray:
        return judged[number][0].channels[orders[number][gone[number] : until]]

    def price(number: int, until: int) -> float:
        grown = 1 / kept[number][until] - 1 / kept[number][gone[number]]
        after = counts.of(np.concatenate([removed, channels(number, until)]))[macs]
        return float(grown / max(left - after, 0.5))

    waiting: list[tuple[float, int, int]] = []

    def add(number: int) -> None:
        if (until := coming(number)) is not None:
            heapq.heappush(waiting, (price(number, until), number, until))

    for number in range(len(judged)):
        add(number)
    blocks: list[Block] = []
    while waiting:
        _, number, until = heapq.heappop(waiting)
        # What a step saves only shrinks as others go, so an old price is never above the present one.
        now = price(number, until)
        if waiting and now > waiting[0][0]:
            heapq.heappush(waiting, (now, number, until))
            continue
        blocks.append(Block(group=number, channels=channels(number, until), rank=float(len(blocks))))
        removed = np.concatenate([removed, blocks[-1].channels])
        left = counts.of(removed)[macs]
        gone[number] = until
        add(number)
    return blocks


def _shares(ascending: np.ndarray) -> np.ndarray:
    """Return the share of the importance that is left with the first 0, 1, ... channels gone; never quite 0."""
    values = np.maximum(np.asarray(ascending, np.float64), 0)
    if values.sum() <= 0:
        values = np.ones(len(values))
    left = values.sum() - np.concatenate([[0.0], np.cumsum(values)])
    shares: np.ndarray = np.maximum(left / values.sum(), 1e-9)
    return shares
