"""Pruning whole channels: a smaller, dense, plain Keras model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import keras
import numpy as np

from dwindle.attaching import attached
from dwindle.errors import ConfigError, UnsupportedModelError, check_choice
from dwindle.pruning.balancing import balanced
from dwindle.pruning.channel_groups import Counts, Group, Groups, groups
from dwindle.pruning.channel_importance import CHANNEL_CRITERIA, Evidence, scores
from dwindle.pruning.cutting import cut, untied
from dwindle.pruning.loss_gradients import labelled_samples, loss_gradients, loss_of
from dwindle.weights import check_model, select

TARGETS = ("channels", "parameters", "macs", "latency")
SCOPES = ("layer", "global", "balanced")


@dataclass(frozen=True, kw_only=True)
class ChannelOptions:
    """How channels are chosen; checked where it is made.

    Attributes:
        sparsity: Fraction to remove, in [0, 1), of what ``target`` says.
        criterion: Name of a criterion in `CHANNEL_CRITERIA`.
        scope: ``"layer"``: the same fraction of every group; ``"global"``: one ranking over all groups;
            ``"balanced"``: a group gives the more the more its channels take; see `dwindle.pruning.balancing`.
        target: ``"channels"``, ``"parameters"``, ``"macs"`` or measured ``"latency"``.
        multiple: Layers keep a multiple of this many channels, or all that they have.
        minimum: Layers keep at least this many.
        max_latency_ms: Instead of ``sparsity``: the time that the file may take; None where it is not given.
        scheme: Scheme of the file that is timed.
        samples: At most how many samples a criterion looks at.
        batch: Samples of a batch of these.
        seed: Seeds ``"random"``.
    """

    sparsity: float = 0.5
    criterion: str = "l2"
    scope: str = "layer"
    target: str = "channels"
    multiple: int = 1
    minimum: int = 1
    max_latency_ms: float | None = None
    scheme: Any = "float32"
    samples: int = 512
    batch: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.sparsity, bool) or not isinstance(self.sparsity, int | float) or not 0 <= self.sparsity < 1:
            raise ConfigError(f"`sparsity` is {self.sparsity!r}; it must be a fraction in [0, 1), such as 0.5")
        check_choice("criterion", self.criterion, CHANNEL_CRITERIA)
        check_choice("scope", self.scope, SCOPES)
        check_choice("target", self.target, TARGETS)
        for name in ("multiple", "minimum", "samples", "batch"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"`{name}` is {value!r}; it must be a whole number of at least 1")
        limit = self.max_latency_ms
        if limit is not None and (isinstance(limit, str) or not limit > 0):
            raise ConfigError(f"`max_latency_ms` is {limit!r}; it must be a time above 0 ms")


@dataclass(frozen=True, kw_only=True)
class ChannelPlan:
    """Which channels go: it can be printed, and `apply` carries it out.

    Attributes:
        model: The model.
        groups: Its groups.
        removed: The channels that go, as in `Group.channels`.
        notes: What stays and why, and what else the user should know.
        latency_ms: Measured time of the file before and after, where latency was the target.
    """

    model: keras.Model = field(repr=False)
    groups: Groups = field(repr=False)
    removed: np.ndarray
    notes: tuple[str, ...]
    latency_ms: tuple[float, float] | None = None

    @property
    def parameters(self) -> tuple[int, int]:
        """Parameters before and after."""
        return self.groups.parameters, self._left[0]

    @property
    def macs(self) -> tuple[int, int]:
        """Multiply-accumulates of a sample before and after."""
        return self.groups.macs, self._left[1]

    @cached_property
    def _left(self) -> tuple[int, int]:
        return Counts(self.model, self.groups.analysis).of(self.removed)

    def apply(self) -> keras.Model:
        """Return the smaller model; the one that was planned for is not changed."""
        return cut(self.model, self.groups.analysis, self.removed)

    def __str__(self) -> str:
        before, after = self.parameters, self.macs
        lines = [f"{before[0]:,} to {before[1]:,} parameters, {after[0]:,} to {after[1]:,} MACs"]
        for group in self.groups:
            left = group.size - int(np.isin(group.channels, self.removed).sum())
            if left < group.size:
                lines.append(f"{' + '.join(group.producers)}: {group.size * group.width} to {left * group.width}")
        return "\n".join([*lines, *self.notes])


def plan_channels(
    model: keras.Model,
    options: ChannelOptions,
    *,
    layers: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    data: Any = None,
    loss: Any = None,
) -> ChannelPlan:
    """Choose the channels to remove; see `prune_channels`."""
    check_model(model)
    kinds = {transform.kind for transforms in attached(model).values() for transform in transforms}
    if kinds - {"tied"}:
        raise UnsupportedModelError(
            f"`model` ({model.name}) carries masks or other techniques on its weights; pass dw.finalize(model), in "
            "which they are baked into the weights"
        )
    if kinds:
        model = untied(model)
    found = groups(model)
    chosen, notes = _chosen(found, layers, exclude)
    if kinds:
        notes.append("weights that several operators of the lifted file share are separate weights of the result")
    evidence = _evidence(model, found, options, data, loss)
    values, unjudged = scores(options.criterion, chosen, evidence)
    notes += unjudged
    judged = [(group, value) for group, value in zip(chosen, values, strict=True) if value is not None]
    if not judged:
        raise UnsupportedModelError(
            f"`model` ({model.name}) has no channels that can be cut: {'; '.join(notes) or 'no layers with weights'}"
        )
    if options.scope == "balanced":
        steps = [_allowed(group, options) for group, _ in judged]
        macs = options.max_latency_ms is not None or options.target in ("macs", "latency")
        blocks = balanced(judged, steps, Counts(model, found.analysis), macs=macs)
    else:
        blocks = _blocks(judged, options)
    if options.target == "latency" or options.max_latency_ms is not None:
        from dwindle.pruning.channel_latency import within_latency

        removed, latency, more = within_latency(model, found, blocks, options, data)
        return ChannelPlan(
            model=model, groups=found, removed=removed, notes=(*notes, *more), latency_ms=latency
        )  # fmt: skip
    if options.target == "channels":
        removed = _share_of_channels(judged, blocks, options)
    else:
        removed = _share_of_costs(model, found, blocks, options, notes)
    return ChannelPlan(model=model, groups=found, removed=removed, notes=tuple(notes))


def prune_channels(
    model: keras.Model,
    sparsity: float = 0.5,
    *,
    criterion: str = "l2",
    scope: str = "layer",
    layers: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    data: Any = None,
    loss: Any = None,
    **options: Any,
) -> keras.Model:
    """Return a smaller model without the channels that matter least: plain Keras layers, kept weights, ready to train.

    Removing a channel gives what the model computes with that channel masked to zero wherever it is used. A
    normalization over channels (layer, group, RMS) takes its statistics over those that stay.

    Args:
        model: A built functional, sequential or lifted model; it is not changed.
        sparsity: Fraction of the channels of each group to remove; or of the model's ``target``.
        criterion: ``"l1"``, ``"l2"``, ``"batchnorm-scale"``, ``"geometric-median"``, ``"taylor"``, ``"fisher"`` (these
            two need data) or ``"random"``.
        scope: ``"layer"``: the same fraction of every group; ``"global"``: one ranking over all groups;
            ``"balanced"``: large groups give more and small ones less, see `dwindle.pruning.balancing.balanced`.
        layers: Shell-style patterns of the layers whose channels may go. None: all.
        exclude: Patterns of layers whose channels stay.
        data: Labelled samples, ``(x, y)`` or anything that `dwindle.read_data` takes.
        loss: Loss for ``"taylor"`` and ``"fisher"``; None: see `dwindle.pruning.loss_gradients.loss_of`.
        **options: The other fields of `ChannelOptions`: ``target``, ``multiple``, ``minimum``, ``max_latency_ms``,
            ``scheme``, ``samples``, ``batch``, ``seed``.

    Returns:
        A new model, not compiled, with the same names, inputs and outputs. Its ``notes`` say what stays and why.

    Raises:
        ConfigError: For a value out of range, a pattern that matches nothing, or a target that can't be reached.
        UnsupportedModelError: For a subclassed model, or one in which nothing can be cut.

    Example:
        >>> import keras
        >>> from dwindle.pruning import prune_channels
        >>> layers = [keras.Input((8,)), keras.layers.Dense(6, name="a"), keras.layers.Dense(4, name="b")]
        >>> small = prune_channels(keras.Sequential(layers), 0.5)
        >>> small.get_layer("a").units, small.notes
        (3, ('b stays: output `b` of the model',))

    References:
        Li et al. 2016, arXiv 1608.08710; Fang et al. 2023, arXiv 2301.12900.
    """
    unknown = set(options) - set(ChannelOptions.__dataclass_fields__)
    if unknown:
        check_choice("option", sorted(unknown)[0], ChannelOptions.__dataclass_fields__)
    settled = ChannelOptions(sparsity=sparsity, criterion=criterion, scope=scope, **options)
    plan = plan_channels(model, settled, layers=layers, exclude=exclude, data=data, loss=loss)
    small = plan.apply()
    small.notes = plan.notes
    return small


def _chosen(
    found: Groups, layers: str | Sequence[str] | None, exclude: str | Sequence[str] | None
) -> tuple[list[Group], list[str]]:
    """Return the groups that may be cut, and a note for those that stay."""
    makers = list(dict.fromkeys(name for group in found for name in group.producers))
    wanted = set(select(makers, layers))
    spared = set() if exclude is None else set(select(makers, exclude, "exclude"))
    chosen, notes = [], [f"{' + '.join(names) or 'inputs'} stays: {reason}" for reason, names in found.pinned.items()]
    for group in found:
        if group.pinned:
            continue
        kept = [name for name in group.producers if name in spared]
        if kept:
            notes.append(f"{' + '.join(group.producers)} stays: `exclude` has {', '.join(kept)}")
        elif wanted & set(group.producers):
            chosen.append(group)
    return chosen, notes


def _evidence(model: keras.Model, found: Groups, options: ChannelOptions, data: Any, loss: Any) -> Evidence:
    sites = found.analysis.sites
    gradients: dict[tuple[str, str], np.ndarray] = {}
    if CHANNEL_CRITERIA[options.criterion].gradients:
        split = labelled_samples(model, data, options.samples, f"`criterion` {options.criterion!r}")
        taking = {key: site for key, site in sites.items() if "in" in site.roles}
        values = loss_gradients(
            model, split, loss_of(model, split, loss), batch=options.batch,
            variables=[site.variable for site in taking.values()],
        )  # fmt: skip
        gradients = dict(zip(taking, values, strict=True))
    weights = {key: np.asarray(keras.ops.convert_to_numpy(site.variable), np.float32) for key, site in sites.items()}
    return Evidence(weights=weights, gradients=gradients, generator=np.random.default_rng(options.seed))


@dataclass(frozen=True, kw_only=True)
class Block:
    """Channels of one group that go in one step, and when: blocks go in the order of ``rank``."""

    group: int
    channels: np.ndarray
    rank: float


def _allowed(group: Group, options: ChannelOptions) -> list[int]:
    """Return how many channels of a group may be removed, in steps that keep layers at a multiple."""
    step = options.multiple // math.gcd(options.multiple, group.width)
    least = max(1, math.ceil(options.minimum / group.width), min(step, group.size))
    return [group.size - keep for keep in range(group.size - 1, least - 1, -1) if keep % step == 0]


def _blocks(judged: list[tuple[Group, np.ndarray]], options: ChannelOptions) -> list[Block]:
    """Return everything that may go, in the order in which it goes."""
    blocks = []
    for number, (group, values) in enumerate(judged):
        order = np.argsort(values, kind="stable")
        before, rank = 0, -np.inf
        for count in _allowed(group, options):
            part = order[before:count]
            if options.scope == "layer":
                rank = count / group.size
            else:  # never before the block that has to go first
                rank = max(rank, float(values[part].mean()))
            blocks.append(Block(group=number, channels=group.channels[part], rank=rank))
            before = count
    return sorted(blocks, key=lambda block: block.rank)


def first(blocks: list[Block], count: int) -> np.ndarray:
    """Return the channels of the first blocks."""
    return np.concatenate([np.zeros(0, np.int64), *[block.channels for block in blocks[:count]]])


def _share_of_channels(
    judged: list[tuple[Group, np.ndarray]], blocks: list[Block], options: ChannelOptions
) -> np.ndarray:
    if options.scope != "layer":
        wanted = options.sparsity * sum(group.size for group, _ in judged)
        counts = np.cumsum([0, *[len(block.channels) for block in blocks]])
        return first(blocks, int(np.abs(counts - wanted).argmin()))
    removed = [np.zeros(0, np.int64)]
    for group, values in judged:
        steps = [0, *_allowed(group, options)]
        count = min(steps, key=lambda step: abs(step - options.sparsity * group.size))
        removed.append(group.channels[np.argsort(values, kind="stable")[:count]])
    return np.concatenate(removed)


def _share_of_costs(
    model: keras.Model, found: Groups, blocks: list[Block], options: ChannelOptions, notes: list[str]
) -> np.ndarray:
    """Return the channels that bring parameters or MACs nearest to the target."""
    counts = Counts(model, found.analysis)
    which = 0 if options.target == "parameters" else 1
    total = (found.parameters, found.macs)[which]
    wanted = (1 - options.sparsity) * total

    def left(count: int) -> int:
        return counts.of(first(blocks, count))[which]

    least = left(len(blocks))
    if least > 1.03 * wanted:
        what = {"parameters": "parameters", "macs": "MACs"}[options.target]
        raise ConfigError(
            f"`sparsity` is {options.sparsity:g} of the {what}, and at most {1 - least / total:.1%} can go"
            + (
                f": {'; '.join(notes)}"
                if notes
                else f" with `minimum` {options.minimum}, `multiple` {options.multiple}"
            )
        )
    low, high = 0, len(blocks)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if left(middle) > wanted else (low, middle)
    return first(blocks, min((low, high), key=lambda count: abs(left(count) - wanted)))
