"""What a layer's kernel loses at each rank: singular values of the weights, or of what they compute from data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import keras
import numpy as np

from dwindle.allotting import Points
from dwindle.graph_editing import Ref, Taps, calls, functional_config
from dwindle.low_rank_forms import Form

BATCH = 32
ROUNDING = 1e-12  # of the energy


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """A form with what its singular values say.

    Attributes:
        form: The form.
        energies: Squared singular values, largest first, shape ``(full rank,)``; of outputs where there is data.
        basis: Their vectors ``(rows or columns, full rank)``.
        from_outputs: Whether they are vectors of columns, ``A = M V``; else of rows, ``B = U^T M``.
        root: Square root of the inputs' covariance ``(rows, rows)`` and its inverse, where rows are weighted by it.
    """

    form: Form
    energies: np.ndarray
    basis: np.ndarray
    from_outputs: bool
    root: tuple[np.ndarray, np.ndarray] | None = None

    def errors(self) -> np.ndarray:
        """Return the share of energy that is left out at rank 0, 1, ..., full rank."""
        gone = np.concatenate([np.cumsum(self.energies[::-1])[::-1], [0.0]])
        share = gone / gone[0] if gone[0] > 0 else np.zeros_like(gone)
        # What is below is rounding, and not worth a rank.
        return np.where(share > ROUNDING, share, 0.0)

    def factors(self, rank: int) -> tuple[np.ndarray, np.ndarray]:
        """Return ``A (rows, rank)`` and ``B (rank, columns)``, both of the same scale."""
        vectors, matrix = self.basis[:, :rank], self.form.matrix
        if self.from_outputs:
            a, b = matrix @ vectors, vectors.T
        elif self.root is None:
            a, b = vectors, vectors.T @ matrix
        else:
            a, b = self.root[1] @ vectors, vectors.T @ self.root[0] @ matrix
        sizes = np.linalg.norm(a, axis=0), np.linalg.norm(b, axis=1)
        scale = np.sqrt(np.divide(sizes[1], sizes[0], out=np.ones(rank), where=(sizes[0] > 0) & (sizes[1] > 0)))
        return a * scale, b / scale[:, None]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A layer that has a form: its path, the layer, and a spectrum for each of its forms."""

    path: str
    layer: Any = field(repr=False)
    spectra: tuple[Spectrum, ...]

    @property
    def parameters(self) -> int:
        """Parameters of its kernel."""
        return int(self.spectra[0].form.matrix.size)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A form of a layer, with a rank."""

    spectrum: Spectrum
    rank: int

    @property
    def parameters(self) -> int:
        """Parameters of the two kernels."""
        return self.rank * self.spectrum.form.parameters_per_rank

    @property
    def error(self) -> float:
        """Share of energy that is left out."""
        return float(self.spectrum.errors()[self.rank])


def spectrum_of(form: Form) -> Spectrum:
    """Return the squared singular values of a form's matrix and their vectors, of whichever side is shorter."""
    matrix = form.matrix
    tall = matrix.shape[0] > matrix.shape[1]
    energies, basis = _eigen(matrix.T @ matrix if tall else matrix @ matrix.T, form.full_rank)
    return Spectrum(form=form, energies=energies, basis=basis, from_outputs=tall)


def _eigen(gram: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the largest eigenvalues of a symmetric matrix, largest first, and their vectors as columns."""
    values, vectors = np.linalg.eigh(gram)
    return np.maximum(values[::-1][:count], 0.0), vectors[:, ::-1][:, :count]


def with_data(model: keras.Model, candidates: Mapping[str, Candidate], x: list[np.ndarray]) -> dict[str, Candidate]:
    """Return the candidates with the singular values of what they compute from the data."""
    wanted: dict[str, list[Ref]] = {}
    taken: dict[str, list[tuple[str, Ref]]] = {path: [] for path in candidates}
    for prefix, config in _graphs(model):
        for (name, _), refs in calls(config).items():
            if (path := f"{prefix}{name}") in candidates:
                wanted.setdefault(prefix, []).append(refs[0])
                taken[path].append((prefix, refs[0]))
    taps = Taps(model, wanted)
    linear = {path: _linear(candidate.layer) for path, candidate in candidates.items()}
    outputs: dict[str, Any] = dict.fromkeys(candidates, 0.0)
    rows: dict[tuple[str, int], Any] = {}
    for start in range(0, len(x[0]), BATCH):
        values = taps.read([array[start : start + BATCH] for array in x])
        for path, candidate in candidates.items():
            for given in (value for key in dict.fromkeys(taken[path]) for value in values[key]):
                made = linear[path](given)
                outputs[path] = outputs[path] + made.T @ made
                for number, spectrum in enumerate(candidate.spectra):
                    if spectrum.form.rows_of is not None:
                        met = spectrum.form.rows_of(given).astype(np.float64)
                        rows[path, number] = rows.get((path, number), 0.0) + met.T @ met
    return {
        path: replace(
            candidate,
            spectra=tuple(
                _weighted(spectrum.form, outputs[path], rows.get((path, number)))
                for number, spectrum in enumerate(candidate.spectra)
            ),
        )
        for path, candidate in candidates.items()
    }


def _weighted(form: Form, outputs: np.ndarray, rows: np.ndarray | None) -> Spectrum:
    if rows is None:
        energies, basis = _eigen(outputs, form.full_rank)
        return Spectrum(form=form, energies=energies, basis=basis, from_outputs=True)
    values, vectors = np.linalg.eigh(rows)
    # Directions that the data does not have still count a little, so that the inverse exists.
    values = np.maximum(values, 0.0) + 1e-6 * max(float(values.max()), 1e-30)
    root = (vectors * np.sqrt(values)) @ vectors.T
    inverse = (vectors / np.sqrt(values)) @ vectors.T
    weighted = root @ form.matrix
    energies, basis = _eigen(weighted @ weighted.T, form.full_rank)
    return Spectrum(form=form, energies=energies, basis=basis, from_outputs=False, root=(root, inverse))


def _graphs(model: keras.Model, prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the path and the functional config of a model and of every model nested in it."""
    yield prefix, functional_config(model)
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from _graphs(layer, f"{prefix}{layer.name}/")


def _linear(layer: Any) -> Any:
    """Return a function from a layer's input to what its kernel makes of it, float64 ``(positions, outputs)``."""
    config = layer.get_config()
    no_bias: dict[str, Any] = {"bias_axes": None} if "bias_axes" in config else {"use_bias": False}
    bare = {"activation": "linear", "name": f"{config['name']}_linear", "activity_regularizer": None, **no_bias}
    twin = type(layer).from_config({**config, **bare})
    twin.build(layer.get_build_config()["input_shape"])
    twin.kernel.assign(keras.ops.convert_to_numpy(layer.kernel))

    def compute(x: np.ndarray) -> np.ndarray:
        y = np.asarray(keras.ops.convert_to_numpy(twin(keras.ops.convert_to_tensor(x))), np.float64)
        if config.get("data_format") == "channels_first":
            y = np.moveaxis(y, 1, -1)
        if "equation" in config:
            left, output = config["equation"].replace(" ", "").split("->")
            axes = [_axis(output, label, y.ndim) for label in left.split(",")[1] if label in output]
            y = np.moveaxis(y, axes, range(y.ndim - len(axes), y.ndim))
            return y.reshape(-1, math.prod(y.shape[y.ndim - len(axes) :]))
        return y.reshape(-1, y.shape[-1])

    return compute


def _axis(labels: str, label: str, rank: int) -> int:
    """Return the axis that a label of an einsum output stands for, an ellipsis counted."""
    plain = labels.replace("...", "")
    place = plain.index(label)
    return rank - len(plain) + place if labels.startswith("...") else place


def points_of(candidate: Candidate) -> Points:
    """Return what a layer can cost, the error that comes with it, and how; leaving it as it is, None, comes first."""
    costs, errors, choices = [candidate.parameters], [0.0], [None]  # type: tuple[list[int], list[float], list[Any]]
    for spectrum in candidate.spectra:
        share = spectrum.errors()
        for rank in range(1, spectrum.form.full_rank + 1):
            if not spectrum.form.saves(rank):
                break
            costs.append(rank * spectrum.form.parameters_per_rank)
            errors.append(float(share[rank]))
            choices.append(Choice(spectrum=spectrum, rank=rank))
    return Points(costs=np.array(costs), errors=np.array(errors), choices=tuple(choices))
