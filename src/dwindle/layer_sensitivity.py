"""Sensitivity: what pruning each layer by itself costs, at several sparsities."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np

from dwindle.attaching import effective_weights
from dwindle.data import Split
from dwindle.errors import ConfigError, DwindleError
from dwindle.files import check_output_file, write_text
from dwindle.finalizing import finalize
from dwindle.measuring.accuracy import check_metric, evaluate, higher_is_better
from dwindle.model_samples import output_change, outputs_of, samples_for
from dwindle.pruning import groups, prune
from dwindle.transformed_layers import resolve
from dwindle.weights import check_model, model_slots, raw_variable, select, walk_layers

SPARSITIES = (0.25, 0.5, 0.75, 0.9)
CHANGE = "change of the outputs"
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class LayerSensitivity:
    """One layer, or one group of layers whose channels go together.

    Attributes:
        layer: Its path; of a group, the paths of the layers that make its channels, with a ``+``.
        parameters: Of its prunable weights; of a group, those that would go with all of its channels.
        values: The metric at each sparsity; None where it can't be pruned so.
        reason: Why it can't where it can't; empty elsewhere.
    """

    layer: str
    parameters: int
    values: tuple[float | None, ...]
    reason: str


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """The metric with one layer pruned and all others whole.

    Attributes:
        metric: Name of the metric. Without labels, how far the outputs move.
        higher_is_better: Whether more of it is better.
        structure: What was pruned, as in `dwindle.prune`.
        criterion: By which criterion.
        sparsities: Fractions of zeros, or of channels.
        baseline: Metric of the model as it is.
        samples: Number of samples.
        rows: One for each layer, in the order of the graph.
        advice: What follows from it, in a sentence.
    """

    metric: str
    higher_is_better: bool
    structure: str
    criterion: str
    sparsities: tuple[float, ...]
    baseline: float
    samples: int
    rows: tuple[LayerSensitivity, ...]
    advice: str

    def losses(self, row: LayerSensitivity) -> list[float | None]:
        """Return how much worse than the whole model each sparsity of a layer is."""
        sign = 1.0 if self.higher_is_better else -1.0
        return [None if value is None else sign * (self.baseline - value) for value in row.values]

    def tolerated(self, max_drop: float = 0.01) -> dict[str, float]:
        """Return for each layer the largest sparsity up to which nothing costs more than ``max_drop``; 0.0 for none.

        Args:
            max_drop: In units of the metric; 0.01 of an accuracy is a point.
        """
        found = {}
        for row in self.rows:
            if any(value is not None for value in row.values):
                found[row.layer] = 0.0
                for sparsity, loss in sorted(zip(self.sparsities, self.losses(row), strict=True)):
                    if loss is None or not loss <= max_drop:
                        break
                    found[row.layer] = sparsity
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Sensitivity:
        """Make it from `to_dict`, or from the JSON that `save` wrote."""
        rows = tuple(LayerSensitivity(**{**row, "values": tuple(row["values"])}) for row in data["rows"])
        return cls(**{**data, "sparsities": tuple(data["sparsities"]), "rows": rows})

    def save(self, path: str | Path) -> Path:
        """Write it as JSON."""
        return write_text(check_output_file(path, suffixes=(".json",)), json.dumps(self.to_dict(), indent=2))


def sensitivity(
    model: keras.Model,
    data: Any,
    *,
    sparsities: Sequence[float] | None = None,
    structure: Any = "element",
    criterion: Any = None,
    layers: str | Sequence[str] | None = None,
    metric: Any = "accuracy",
    samples: int = 1000,
    cache: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Sensitivity:
    """Measure the model with each of its layers pruned by itself, at several sparsities, without training.

    What is measured is the Keras model, which ranks layers; what a file does, `dwindle.measure` says. Cost: one run
    over the samples for each layer and sparsity.

    Args:
        model: A built functional or sequential model; it is not changed. Techniques on it are baked in first.
        data: Labelled samples, as `dwindle.data.read_data` takes them (its test samples, else those for validation).
            Without labels the metric is how far the outputs move from the model's own: mean KL divergence of
            probabilities, relative mean squared error of other outputs, summed over the outputs; lower is better.
        sparsities: Fractions to remove, each in (0, 1); None: 0.25, 0.5, 0.75 and 0.9, or the one of a pattern
            such as ``"2:4"``.
        structure: As in `dwindle.prune`: ``"element"``, a block ``(rows, columns)``, a pattern, or ``"channel"``: there
            a row is a group of channels that go together.
        criterion: As in `dwindle.prune`; None: ``"magnitude"``, of channels ``"l2"``. One that needs data gets the
            samples.
        layers: Shell-style patterns of layer names; None: all that `dwindle.prune` would prune.
        metric: As in `dwindle.measure`; of the first output.
        samples: At most this many samples are used.
        cache: A folder in which each figure is kept as it is measured, under a hash of the model, the samples and the
            settings: what is there is not measured again, and an interrupted run goes on. None: nothing is kept.
        progress: Called with ``(done, all)`` figures.

    Returns:
        The metric for each layer and sparsity, and a sentence on what follows.

    Raises:
        ConfigError: For a value out of range, an unknown metric, or a pattern that matches nothing.
        DataError: If the samples do not fit.
        UnsupportedModelError: For a subclassed model, or one without weights to prune.

    References:
        Li et al. 2017, arXiv 1608.08710, section 3.2 (sensitivity of layers to pruning their channels).
    """
    check_model(model)
    check_metric(metric)
    if samples < 1:
        raise ConfigError(f"`samples` is {samples}; it must be at least 1")
    asked = _sparsities(sparsities, structure)
    given = samples_for(model, data, samples, judge=True)
    criterion = criterion if criterion is not None else "l2" if structure == "channel" else "magnitude"
    case = _Case(
        model=finalize(model), given=given, structure=structure, criterion=criterion, metric=metric, patterns=layers
    )
    names = case.channel_rows() if structure == "channel" else case.weight_rows(asked[0])
    store = _Store(cache, case)
    baseline = store.get("", 0.0)
    if baseline is None:
        baseline = store.put("", 0.0, case.measured(case.model))
    reasons = {name: reason for name, (_, _, reason) in names.items()}
    total, done = sum(not reason for reason in reasons.values()) * len(asked), 0
    found: dict[str, list[float | None]] = {name: [] for name in names}
    for sparsity in asked:
        free = [name for name in names if not reasons[name]]
        missing = {name: names[name][0] for name in free if store.get(name, sparsity) is None}
        figures = case.channels(missing, sparsity) if structure == "channel" else case.weights(missing, sparsity)
        for name in free:
            value = store.get(name, sparsity)
            if value is None:
                made = next(figures)
                if isinstance(made, str):
                    reasons[name] = made
                else:
                    value = store.put(name, sparsity, made)
            found[name].append(value)
            done += 1
            if progress is not None:
                progress(done, total)
    rows = tuple(
        LayerSensitivity(
            layer=name, parameters=parameters, reason=reasons[name],
            values=tuple((*found[name], *[None] * len(asked))[: len(asked)]),
        )
        for name, (_, parameters, _) in names.items()
    )  # fmt: skip
    result = Sensitivity(
        metric=case.name, higher_is_better=case.higher_is_better, structure=_words(structure),
        criterion=_words(criterion), sparsities=asked, baseline=baseline, samples=len(given), rows=rows, advice="",
    )  # fmt: skip
    return Sensitivity(**{**vars(result), "advice": _advice(result)})


def _sparsities(given: Sequence[float] | None, structure: Any) -> tuple[float, ...]:
    pattern = str(structure).split(":") if isinstance(structure, str) and ":" in structure else None
    if pattern is not None and len(pattern) == 2 and all(part.isdigit() for part in pattern) and int(pattern[1]):
        share = int(pattern[0]) / int(pattern[1])
        if given is not None and tuple(given) != (share,):
            raise ConfigError(f"`sparsities` is {given!r}, but `{structure}` is {share:g}; leave it out")
        return (share,)
    asked = SPARSITIES if given is None else tuple(given)
    if not asked or not all(isinstance(s, int | float) and 0 < s < 1 for s in asked):
        raise ConfigError(f"`sparsities` is {given!r}; they must be fractions in (0, 1), such as (0.5, 0.9)")
    return tuple(sorted({float(sparsity) for sparsity in asked}))


def _words(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)


Rows = dict[str, tuple[tuple[str, ...], int, str]]


@dataclass(frozen=True, kw_only=True)
class _Case:
    """A model, its samples and what is asked of it."""

    model: keras.Model
    given: Split
    structure: Any
    criterion: Any
    metric: Any
    patterns: str | Sequence[str] | None

    @property
    def name(self) -> str:
        if self.given.y is None:
            return CHANGE
        named = getattr(self.metric, "name", None) or getattr(self.metric, "__name__", "metric")
        return self.metric if isinstance(self.metric, str) else str(named)

    @property
    def higher_is_better(self) -> bool:
        return self.given.y is not None and higher_is_better(self.metric)

    def measured(self, model: keras.Model) -> float:
        made = outputs_of(model, self.given.x, batch_size=256)
        if self.given.y is not None:
            return evaluate(made[0], self.given.y, self.metric)
        if model is self.model:
            return 0.0
        return output_change(outputs_of(self.model, self.given.x, batch_size=256), made)

    def weight_rows(self, sparsity: float) -> Rows:
        """Return the layers whose weights `dwindle.prune` would prune, and those that the structure does not fit."""
        slots = model_slots(self.model)
        fitting = {path for path, _ in effective_weights(self._pruned(self.patterns, sparsity))}
        rows: Rows = {}
        for path in select(list(slots), self.patterns):
            chosen = [slot for slot in slots[path] if slot.prunable or self.patterns is not None]
            if chosen:
                reason = "" if path in fitting else self._misfit(path, sparsity)
                rows[path] = (path,), sum(int(np.prod(slot.shape)) for slot in chosen), reason
        return rows

    def _misfit(self, path: str, sparsity: float) -> str:
        try:
            self._pruned([path], sparsity)
        except DwindleError as error:
            return str(error).split(";")[0]
        return "it has no weights of this kind"

    def channel_rows(self) -> Rows:
        """Return the groups of channels, named by the layers that make them."""
        rows: Rows = {}
        found = groups(self.model)
        wanted = set(select(list(dict.fromkeys(name for group in found for name in group.producers)), self.patterns))
        for group in found:
            if wanted & set(group.producers):
                name = "+".join(group.producers)
                _, parameters, reason = rows.get(name, ((), 0, group.pinned or ""))
                # Groups with the same layers are cut together; one that can go is enough.
                reason = reason if group.pinned else ""
                rows[name] = group.producers, parameters + (0 if group.pinned else group.parameters), reason
        return rows

    def weights(self, names: Mapping[str, Sequence[str]], sparsity: float) -> Iterator[float | str]:
        """Yield the metric with each of the layers pruned; all are pruned at once, and put in one by one."""
        if not names:
            return
        masked: dict[str, dict[str, np.ndarray]] = {}
        for (path, key), value in effective_weights(self._pruned(self.patterns, sparsity)).items():
            masked.setdefault(path, {})[key] = value
        scratch = finalize(self.model)
        layers = dict(walk_layers(scratch))
        for name in names:
            whole = []
            for key, value in masked[name].items():
                variable = raw_variable(*resolve(layers[name], key))
                if variable is not None:
                    whole.append((variable, keras.ops.convert_to_numpy(variable)))
                    variable.assign(value)
            figure = self.measured(scratch)
            for variable, before in whole:
                variable.assign(before)
            yield figure

    def _pruned(self, layers: str | Sequence[str] | None, sparsity: float) -> keras.Model:
        pattern = isinstance(self.structure, str) and ":" in self.structure
        return prune(
            self.model, None if pattern else sparsity, structure=self.structure, criterion=self.criterion,
            layers=layers, **self._data(),
        )  # fmt: skip

    def channels(self, names: Mapping[str, Sequence[str]], sparsity: float) -> Iterator[float | str]:
        """Yield the metric with the channels of each of the groups cut, or why they can't be."""
        for paths in names.values():
            try:
                cut = prune(
                    self.model, sparsity, structure="channel", criterion=self.criterion, layers=list(paths),
                    **self._data(),
                )  # fmt: skip
            except DwindleError as error:
                yield str(error).split(";")[0]
            else:
                yield self.measured(cut)

    def _data(self) -> dict[str, Any]:
        """Return the samples, for a criterion that needs them."""
        if self.criterion in ("magnitude", "l1", "l2", "random", "batchnorm-scale", "geometric-median"):
            return {}
        return {"data": list(self.given.x) if self.given.y is None else (list(self.given.x), self.given.y)}


class _Store:
    """Figures on disk, each written as it is measured."""

    def __init__(self, folder: str | Path | None, case: _Case) -> None:
        self.path = None if folder is None else Path(folder) / f"sensitivity-{_fingerprint(case)[:32]}.json"
        self.figures: dict[str, dict[str, float]] = {}
        if folder is not None and Path(folder).exists() and not Path(folder).is_dir():
            raise ConfigError(f"`cache` is `{folder}`, a file; name a folder")
        if self.path is not None and self.path.exists():
            try:
                read = json.loads(self.path.read_text(encoding="utf8"))
                self.figures = read["figures"] if read["version"] == VERSION else {}
            except (OSError, ValueError, KeyError, TypeError):
                self.figures = {}  # damaged; it is measured anew

    def get(self, name: str, sparsity: float) -> float | None:
        """Return a figure, or None where it is not there yet."""
        return self.figures.get(name, {}).get(repr(sparsity))

    def put(self, name: str, sparsity: float, figure: float) -> float:
        """Keep a figure, on disk as well, and return it."""
        self.figures.setdefault(name, {})[repr(sparsity)] = float(figure)
        if self.path is not None:
            write_text(self.path, json.dumps({"version": VERSION, "figures": self.figures}, indent=1))
        return float(figure)


def _fingerprint(case: _Case) -> str:
    """Return a hash of the model, the samples and the settings, the sparsities left out."""
    digest = hashlib.sha256()
    code = getattr(getattr(case.metric, "__code__", None), "co_code", b"")
    settings = [VERSION, _words(case.structure), _words(case.criterion), case.name, code.hex()]
    digest.update(json.dumps(settings).encode())
    digest.update(json.dumps(case.model.get_config(), default=repr, sort_keys=True).encode())
    arrays = [keras.ops.convert_to_numpy(variable) for variable in case.model.weights]
    for array in (*arrays, *case.given.x, *([] if case.given.y is None else [case.given.y])):
        value = np.ascontiguousarray(array)
        digest.update(f"{value.shape}{value.dtype}".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()


def _advice(found: Sensitivity) -> str:
    """Say which layer costs most, and what the others bear."""
    rated = [row for row in found.rows if any(value is not None for value in row.values)]
    if not rated:
        return "No layer can be pruned so: " + "; ".join(f"{row.layer}: {row.reason}" for row in found.rows[:4]) + "."
    limit = 0.01 if found.metric == "accuracy" else 0.01 * max(abs(found.baseline), 1.0)
    worst = max(rated, key=lambda row: max(loss for loss in found.losses(row) if loss is not None))
    losses = [(loss, s) for loss, s in zip(found.losses(worst), found.sparsities, strict=True) if loss is not None]
    loss, sparsity = max(losses)
    if loss <= limit:
        return f"No layer costs more than {limit:.3g} by itself at any of these sparsities: prune all of them further."
    bearing = found.tolerated(limit)
    top = max(found.sparsities)
    free = [row.layer for row in rated if bearing[row.layer] == top]
    said = f"`{worst.layer}` costs most: {loss:.3g} at {sparsity:.0%}"
    if len(rated) > 1:
        many = f"{', '.join(f'`{name}`' for name in free[:4])}{f' and {len(free) - 4} more' if len(free) > 4 else ''}"
        said += f"; {many} bear {top:.0%} by themselves" if free else f"; no layer bears {top:.0%}"
    return f"{said}. Give such layers a sparsity of their own (`layers`), or prune with scope='global'; then retrain."
