"""How much each channel of a group matters: one function and one entry of a table a criterion."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dwindle.errors import ConfigError
from dwindle.pruning.channel_groups import MAKES, Group


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What a criterion may look at.

    Attributes:
        weights: Value of each weight, by layer path and key.
        gradients: Gradient of the loss of each batch by each weight, shape ``(batches, *weight)``; empty where the
            criterion needs no data.
        generator: Random numbers, seeded.
    """

    weights: Mapping[tuple[str, str], np.ndarray]
    gradients: Mapping[tuple[str, str], np.ndarray]
    generator: np.random.Generator


def rows(array: np.ndarray, axis: int, positions: np.ndarray) -> np.ndarray:
    """Return one row a channel with all entries of a weight that lie at the channel's positions on an axis."""
    found: np.ndarray = np.moveaxis(array, axis, 0)[positions].reshape(len(positions), -1)
    return found


def _norm(group: Group, evidence: Evidence, size: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Return the mean over the group's kernels of a size of each channel's slice, relative to the mean slice's."""
    found = []
    for member in group.members:
        weight = evidence.weights[member.layer, member.weight]
        if member.role in ("through", "scale") or weight.ndim < 2:
            continue
        sizes = size(rows(weight, member.axis, member.positions))
        found.append(sizes / max(float(sizes.mean()), 1e-12))
    return np.mean(found, axis=0) if found else np.ones(group.size)


def l1(group: Group, evidence: Evidence) -> np.ndarray:
    """``mean over kernels of sum |w|`` of the channel's slices: Li et al. 2016, arXiv 1608.08710.

    They rank by the kernel that makes the channel; we take those that use it as well, each relative to its mean.
    """
    return _norm(group, evidence, lambda slices: np.abs(slices).sum(axis=1))


def l2(group: Group, evidence: Evidence) -> np.ndarray:
    """``mean over kernels of sqrt(sum w^2)``, as `l1`."""
    return _norm(group, evidence, lambda slices: np.sqrt((slices**2).sum(axis=1)))


def batchnorm_scale(group: Group, evidence: Evidence) -> np.ndarray | None:
    """``|gamma|`` of the batch normalizations that the channel goes through: Liu et al. 2017, arXiv 1708.06519."""
    found = [
        np.abs(rows(evidence.weights[member.layer, member.weight], member.axis, member.positions)).mean(axis=1)
        for member in group.members
        if member.role == "scale" and member.weight.split("/")[-1] == "gamma"
    ]
    return np.mean(found, axis=0) if found else None


def geometric_median(group: Group, evidence: Evidence) -> np.ndarray:
    """``sum_j |w_i - w_j|`` over the filters that make the channels: He et al. 2018, FPGM, arXiv 1811.00250, eq. 7.

    A filter near the median of its layer can be stood in for by the others.
    """
    found = []
    for member in group.members:
        weight = evidence.weights[member.layer, member.weight]
        if member.role in MAKES and weight.ndim > 1:
            slices = rows(weight, member.axis, member.positions).astype(np.float64)
            squares = (slices**2).sum(axis=1)
            distances = np.sqrt(np.maximum(squares[:, None] + squares - 2 * slices @ slices.T, 0)).sum(axis=1)
            found.append(distances / max(float(distances.mean()), 1e-12))
    return np.mean(found, axis=0) if found else np.ones(group.size)


def _effects(group: Group, evidence: Evidence) -> np.ndarray:
    """Return ``sum w dL/dw`` over the slices that use a channel: what each batch's loss gains by a mask on it."""
    total: Any = 0.0
    for member in group.members:
        key = (member.layer, member.weight)
        if member.role == "in":
            product = evidence.weights[key] * evidence.gradients[key]
            at = np.moveaxis(product, member.axis + 1, 1)[:, member.positions]
            total = total + at.reshape(len(product), group.size, -1).sum(axis=2)
    return np.atleast_2d(total) * np.ones((1, group.size))


def taylor(group: Group, evidence: Evidence) -> np.ndarray:
    """``|mean over batches of dL/dm|`` for a mask ``m`` on the channel: Molchanov et al. 2019, arXiv 1906.10771."""
    found: np.ndarray = np.abs(_effects(group, evidence).mean(axis=0))
    return found


def fisher(group: Group, evidence: Evidence) -> np.ndarray:
    """``mean over batches of (dL/dm)^2``: Theis et al. 2018, arXiv 1801.05787, eq. 8, without the constant."""
    found: np.ndarray = (_effects(group, evidence) ** 2).mean(axis=0)
    return found


def random(group: Group, evidence: Evidence) -> np.ndarray:
    """Uniform numbers: what any other criterion has to beat."""
    return evidence.generator.uniform(size=group.size)


@dataclass(frozen=True, kw_only=True)
class ChannelCriterion:
    """A criterion, and what it needs.

    Attributes:
        score: From a group and the evidence to one score a channel, large for those that matter; None for a group that
            the criterion can't judge, which is then left alone.
        gradients: Whether it needs data and a loss.
        comparable: Whether scores of different groups can be compared as they are; else each group's are divided by
            their mean.
    """

    score: Callable[[Group, Evidence], np.ndarray | None]
    gradients: bool = False
    comparable: bool = False


CHANNEL_CRITERIA: dict[str, ChannelCriterion] = {
    "l1": ChannelCriterion(score=l1),
    "l2": ChannelCriterion(score=l2),
    "batchnorm-scale": ChannelCriterion(score=batchnorm_scale, comparable=True),
    "geometric-median": ChannelCriterion(score=geometric_median),
    "taylor": ChannelCriterion(score=taylor, gradients=True, comparable=True),
    "fisher": ChannelCriterion(score=fisher, gradients=True, comparable=True),
    "random": ChannelCriterion(score=random),
}


def scores(
    name: str, groups: list[Group], evidence: Evidence, *, normalized: bool = True
) -> tuple[list[np.ndarray | None], list[str]]:
    """Score every channel of some groups.

    Args:
        name: A criterion of `CHANNEL_CRITERIA`.
        groups: The groups.
        evidence: Weights, and gradients where needed.
        normalized: Whether groups' scores are made comparable for one ranking over all.

    Returns:
        Scores of each group, None where it can't be judged; and a note for each of these.

    Raises:
        ConfigError: If scores are not finite.
    """
    criterion = CHANNEL_CRITERIA[name]
    found: list[np.ndarray | None] = []
    notes = []
    for group in groups:
        values = criterion.score(group, evidence)
        if values is None:
            notes.append(f"{' + '.join(group.producers)} stays: `{name}` has nothing to judge it by")
        elif not np.isfinite(values).all():
            raise ConfigError(
                f"`criterion` {name!r} gives scores that are not finite for {' + '.join(group.producers)}"
            )
        elif normalized and not criterion.comparable:
            values = values / max(float(values.mean()), 1e-30)
        found.append(values)
    return found, notes
