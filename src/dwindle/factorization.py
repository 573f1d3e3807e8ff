"""Low rank: a layer with a large kernel becomes two with small ones, where that saves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import keras
import numpy as np

from dwindle.allotting import allot
from dwindle.errors import ConfigError, UnsupportedModelError
from dwindle.graph_editing import rebuilt, replace_refs
from dwindle.low_rank_forms import FORMS, Form, forms_of
from dwindle.low_rank_spectra import Candidate, Choice, Spectrum, points_of, spectrum_of, with_data
from dwindle.model_samples import samples_for
from dwindle.weights import check_model, model_slots, select, walk_layers

ENERGY = 0.95
TOLERANCE = 0.03  # of a number of parameters, where ranks allow it


@dataclass(frozen=True, kw_only=True)
class LayerFactorization:
    """What became of one layer.

    Attributes:
        layer: Its path.
        form: The two layers that stand in for it, such as ``3x1, then 1x3``; empty where it is left.
        rank: Width between the two; None where it is left.
        full_rank: The rank at which the form is exact; None where it is left.
        parameters_before: Of its kernel.
        parameters_after: Of the two kernels, or of the one that is left.
        error: Square root of the share of energy that is gone: with data the relative error of the layer's output on
            it, else that of the kernel, both in the Frobenius norm.
        reason: Why it is left; empty where it is not.
    """

    layer: str
    form: str = ""
    rank: int | None = None
    full_rank: int | None = None
    parameters_before: int
    parameters_after: int
    error: float = 0.0
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Factorization:
    """What `factorize` did, layer by layer.

    Attributes:
        layers: One entry for each layer that was looked at.
        parameters_before: Of the whole model.
        parameters_after: Of the model that came out.
    """

    layers: tuple[LayerFactorization, ...]
    parameters_before: int
    parameters_after: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    def __str__(self) -> str:
        """Say it in a few lines."""
        lines = [f"{self.parameters_before:,} parameters, {self.parameters_after:,} after factorization"]
        for row in self.layers:
            told = f"left: {row.reason}" if row.reason else f"{row.form}, rank {row.rank} of {row.full_rank}"
            error = "" if row.reason else f", error {row.error:.3f}"
            lines.append(f"{row.layer}: {row.parameters_before:,} to {row.parameters_after:,}, {told}{error}")
        return "\n".join(lines)


def factorize(
    model: keras.Model,
    energy: float | None = None,
    rank: int | None = None,
    parameters: float | None = None,
    layers: str | Sequence[str] | None = None,
    *,
    data: Any = None,
    samples: int = 256,
) -> keras.Model:
    r"""Return a twin in which large kernels are products of two small ones, each a stock layer of its own.

    A kernel, laid out as a matrix ``M``, becomes ``A B`` of rank ``r``: with ``M = U S V^T``, ``A B = U_r S_r V_r^T``,
    which no matrix of that rank comes closer to, and the error is what is left out: ``|M - A B|^2 = sum_{i>r} s_i^2``.
    With ``data``, ``A B = M V_r V_r^T`` with the eigenvectors ``V`` of ``Y^T Y``, where ``Y = X M`` is what the layer
    computes from the data: no product of that rank has outputs that are closer, ``|Y - X A B|^2`` in its place.

    Dense and EinsumDense layers become two of their kind. A convolution of window ``k`` from ``c`` to ``n`` channels
    has four forms, and takes the one that costs least: the window to ``r`` channels, then 1x1; 1x1 to ``r``, then the
    window; ``kx1``, then ``1xk``; ``1xk``, then ``kx1``. With data, the error of the last three is counted as if the
    inputs at different places of the window were uncorrelated. A layer is left as it is where that saves neither
    parameters nor multiplications, or where two stock layers can't do what it does; the result says so. The first of
    two layers is called ``<name>_in``; bias and activation are on the second, which has the old name.

    Args:
        model: A built functional or sequential model, nested and shared layers included; it is not changed.
        energy: Share of ``sum s_i^2`` that every layer keeps, in (0, 1]. 0.95 where no target is given.
        rank: The same width for every layer, at least 1; a layer takes the form with the least error that saves.
        parameters: Parameters that the whole model has at most, or a share of them in (0, 1). Ranks are then chosen
            together: those for which the sum of all layers' relative squared errors is smallest.
        layers: Shell-style patterns of layer names (``nested/layer`` in nested models); None: all.
        data: Samples, as `dwindle.data.read_data` takes them or an array; labels are not used.
        samples: At most this many of them are used.

    Returns:
        A new model, not compiled. Its attribute ``factorization`` is a `Factorization`: what was done, what was left
            and why; the latter is in its ``notes`` as well.

    Raises:
        ConfigError: For a value out of range, more than one target, a pattern that matches nothing, or a number of
            parameters that can't be reached (says what can).
        DataError: If the data does not fit.
        UnsupportedModelError: For a subclassed model, one in quantized training, or one without such layers.

    Example:
        >>> import keras, dwindle as dw
        >>> model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(64, name="wide")])
        >>> low = dw.factorize(model, rank=8)
        >>> [layer.name for layer in low.layers], low.count_params()
        (['wide_in', 'wide'], 1088)

    References:
        Denton et al. 2014, arXiv 1404.0736; Jaderberg et al. 2014, arXiv 1405.3866 (the separated forms, which we take
        from an SVD as Tai et al. 2015, arXiv 1511.06067, do); Zhang et al. 2015, arXiv 1505.06798 (outputs instead of
        weights, without their nonlinear part); Chen et al. 2021, DRONE, NeurIPS; Wang et al. 2024, SVD-LLM, arXiv
        2403.07378 (the same optimum by whitening inputs, where we take eigenvectors of outputs and invert nothing).
    """
    _check_targets(energy, rank, parameters, samples)
    check_model(model)
    if getattr(model, "quantization", None):
        raise UnsupportedModelError(f"`model` ({model.name}) is in quantized training; factorize first, then quantize")
    candidates, left = _candidates(model, layers)
    if data is not None and candidates:
        candidates = with_data(model, candidates, list(samples_for(model, data, samples).x))
    choices = _choose(model, candidates, energy, rank, parameters)
    twin = _rebuilt(model, {path: choice for path, choice in choices.items() if isinstance(choice, Choice)})
    rows = [*left, *(_row(candidates[path], choice) for path, choice in choices.items())]
    order = {path: number for number, (path, _) in enumerate(walk_layers(model))}
    twin.factorization = Factorization(
        layers=tuple(sorted(rows, key=lambda row: order[row.layer])), parameters_before=model.count_params(),
        parameters_after=twin.count_params(),
    )  # fmt: skip
    twin.notes = tuple(f"{row.layer} stays: {row.reason}" for row in twin.factorization.layers if row.reason)
    return twin


def _check_targets(energy: Any, rank: Any, parameters: Any, samples: int) -> None:
    given = [
        name for name, value in (("energy", energy), ("rank", rank), ("parameters", parameters)) if value is not None
    ]
    if len(given) > 1:
        raise ConfigError(f"`{given[0]}` and `{given[1]}` are both given; pass one target")
    if energy is not None and not (_number(energy) and 0 < energy <= 1):
        raise ConfigError(f"`energy` is {energy!r}; it must be a share in (0, 1], such as 0.95")
    if rank is not None and not (isinstance(rank, int | np.integer) and not isinstance(rank, bool) and rank >= 1):
        raise ConfigError(f"`rank` is {rank!r}; it must be a whole number of at least 1, such as 16")
    if parameters is not None and not (
        _number(parameters) and parameters > 0 and (parameters < 1 or parameters % 1 == 0)
    ):
        raise ConfigError(
            f"`parameters` is {parameters!r}; it must be a number of parameters, such as 50_000, or a share in (0, 1)"
        )
    if samples < 1:
        raise ConfigError(f"`samples` is {samples}; it must be at least 1")


def _number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool) and math.isfinite(value)


def _row(candidate: Candidate, choice: Choice | str) -> LayerFactorization:
    before = candidate.parameters
    if isinstance(choice, str):
        return LayerFactorization(
            layer=candidate.path, parameters_before=before, parameters_after=before, reason=choice
        )
    return LayerFactorization(
        layer=candidate.path, form=choice.spectrum.form.name, rank=choice.rank,
        full_rank=choice.spectrum.form.full_rank, parameters_before=before, parameters_after=choice.parameters,
        error=math.sqrt(max(choice.error, 0.0)),
    )  # fmt: skip


def _candidates(
    model: keras.Model, patterns: str | Sequence[str] | None
) -> tuple[dict[str, Candidate], list[LayerFactorization]]:
    """Return the layers that have a form, with the singular values of their kernels, and those that are left."""
    slots, layers = model_slots(model), dict(walk_layers(model))
    found: dict[str, Candidate] = {}
    left = []
    for path in select(list(slots), patterns):
        layer, size = layers[path], sum(math.prod(slot.shape) for slot in slots[path])
        try:
            forms = _forms(layer, slots[path][0].path)
        except UnsupportedModelError as error:
            row = LayerFactorization(layer=path, parameters_before=size, parameters_after=size, reason=str(error))
            left.append(row)
            continue
        found[path] = Candidate(path=path, layer=layer, spectra=tuple(spectrum_of(form) for form in forms))
    if not found and patterns is None and not any(type(layer).__name__ in FORMS for layer in layers.values()):
        raise UnsupportedModelError(
            f"`model` ({model.name}) has no Dense, EinsumDense or convolution layer to factorize"
        )
    return found, left


def _forms(layer: Any, inside: Sequence[str]) -> list[Form]:
    if layer.__dict__.get("_dwindle_transforms"):
        raise UnsupportedModelError("a technique hangs on its weights; factorize first, or pass dw.finalize(model)")
    cls = type(layer)
    if inside or (cls.__name__ not in FORMS and cls.__module__.startswith("keras.")):
        owner = f"inside a {cls.__name__}" if inside else f"of a {cls.__name__}"
        raise UnsupportedModelError(f"two stock layers can't stand in for weights {owner}")
    if not cls.__module__.startswith("keras."):
        raise UnsupportedModelError(f"{cls.__name__} is no stock layer")
    if getattr(layer, "quantization_mode", None) or getattr(layer, "lora_enabled", False):
        raise UnsupportedModelError("Keras' own quantization or LoRA is on it")
    return forms_of(cls.__name__, layer.get_config(), keras.ops.convert_to_numpy(layer.kernel))


def _choose(
    model: keras.Model, candidates: Mapping[str, Candidate], energy: Any, rank: Any, parameters: Any
) -> dict[str, Choice | str]:
    """Return the form and rank of each layer, or why it is left."""
    if parameters is not None:
        return _allocated(model, candidates, float(parameters))
    found: dict[str, Choice | str] = {}
    for path, candidate in candidates.items():
        if rank is not None:
            each = [Choice(spectrum=s, rank=min(int(rank), s.form.full_rank)) for s in candidate.spectra]
            best = min(each, key=lambda choice: (not _saves(choice), choice.error))
        else:
            keep = ENERGY if energy is None else float(energy)
            each = [Choice(spectrum=s, rank=_rank_for(s, keep)) for s in candidate.spectra]
            best = min(each, key=lambda choice: (not _saves(choice), choice.parameters))
        found[path] = best if _saves(best) else _no_saving(candidate, best)
    return found


def _saves(choice: Choice) -> bool:
    return choice.spectrum.form.saves(choice.rank)


def _no_saving(candidate: Candidate, choice: Choice) -> str:
    form = choice.spectrum.form
    what = "parameters" if choice.parameters >= candidate.parameters else "multiplications"
    return f"rank {choice.rank} of {form.full_rank} ({form.name}) saves no {what}"


def _rank_for(spectrum: Spectrum, energy: float) -> int:
    """Return the smallest rank that keeps a share of the energy."""
    return max(1, int(np.argmax(spectrum.errors() <= 1.0 - energy)))


def _allocated(model: keras.Model, candidates: Mapping[str, Candidate], parameters: float) -> dict[str, Choice | str]:
    """Choose all ranks together for a number of parameters."""
    total = model.count_params()
    wanted = int(parameters * total) if parameters < 1 else int(parameters)
    if wanted >= total:
        raise ConfigError(f"`parameters` is {wanted:,}, and the model has {total:,}; pass fewer")
    points = {path: points_of(candidate) for path, candidate in candidates.items()}
    fixed = total - sum(candidate.parameters for candidate in candidates.values())
    least = fixed + sum(int(each.costs.min()) for each in points.values())
    if wanted < least:
        raise ConfigError(
            f"`parameters` is {wanted:,}; with rank 1 wherever that is possible the model still has {least:,}"
        )
    picked = allot(points, wanted - fixed, floor=math.ceil((1 - TOLERANCE) * wanted) - fixed)
    return {
        path: choice
        if (choice := points[path].choices[place]) is not None
        else "the parameters suffice for it as it is"
        for path, place in picked.items()
    }


def _rebuilt(model: keras.Model, choices: Mapping[str, Choice]) -> keras.Model:
    """Return the model with two layers in place of each that was chosen."""
    firsts: dict[str, str] = {}

    def edit(prefix: str, config: dict[str, Any]) -> dict[str, Any]:
        names = {entry["config"]["name"] for entry in config["layers"]}
        layers = []
        for entry in config["layers"]:
            path = f"{prefix}{entry['config']['name']}"
            if path not in choices:
                layers.append(entry)
                continue
            name = _free(f"{entry['config']['name']}_in", names)
            names.add(name)
            firsts[path] = f"{prefix}{name}"
            layers += _pair(entry, name, choices[path])
        return {**config, "layers": layers}

    twin = rebuilt(model, edit, changed=choices)
    olds, news = dict(walk_layers(model)), dict(walk_layers(twin))
    for path, choice in choices.items():
        first, second = choice.spectrum.form.split(*choice.spectrum.factors(choice.rank))
        news[firsts[path]].kernel.assign(np.ascontiguousarray(first, np.float32))
        news[path].kernel.assign(np.ascontiguousarray(second, np.float32))
        if olds[path].bias is not None:
            news[path].bias.assign(keras.ops.convert_to_numpy(olds[path].bias))
    return twin


def _free(name: str, taken: set[str]) -> str:
    number, found = 0, name
    while found in taken:
        number += 1
        found = f"{name}_{number}"
    return found


def _pair(entry: dict[str, Any], name: str, choice: Choice) -> list[dict[str, Any]]:
    """Return the config entries of the two layers, the second fed by the first in every call."""
    changes, rest = choice.spectrum.form.configs(choice.rank)
    old = entry["config"]
    bare = {key: value for key, value in entry.items() if key != "build_config"}
    first = {**bare, "config": {**old, **changes, "name": name}}
    second = {**bare, "config": {**old, **rest}}
    if "name" in entry:
        first["name"] = name
    if "inbound_nodes" in entry:
        second["inbound_nodes"] = [
            replace_refs(node, lambda _, number=number: (name, number, 0))  # type: ignore[misc]
            for number, node in enumerate(entry["inbound_nodes"])
        ]
    return [first, second]
