"""The lifted model against ONNX Runtime, on random inputs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from dwindle.errors import DwindleError, MissingDependencyError, UnsupportedModelError, VerificationError
from dwindle.exporting.verify import Bound, Verification, compare
from dwindle.lifting.onnx.building import Builder
from dwindle.lifting.onnx.graph import require_onnx
from dwindle.lifting.onnx.islands import OnnxIsland, drawing_in, runner_of
from dwindle.lifting.onnx.values import Moving

BOUND = Bound(tolerance=1e-3, unit="largest output", share=1.0)
_SAMPLES = 2
# Lengths that are tried for axes that stay open, since some networks need a certain size, and what integers are below:
# rows of a table that may be short.
_TRIED = ((32, 100), (64, 100), (224, 100), (32, 2), (64, 2), (224, 2))
#: Seconds after which a run is stopped: a file's loops have no end by themselves.
LONGEST_S = 60.0


def check(builder: Builder, model: keras.Model, source: Any) -> str:
    """Compare a model with its source in ONNX Runtime and return what was found, in words.

    Where nodes stay as they are, which may turn a difference of rounding into another result, they and the parts before
    and behind them are compared each for itself if the whole is not within the bound.

    Args:
        builder: What built the model.
        model: The model.
        source: Path or `onnx.ModelProto` that it was built from.

    Raises:
        VerificationError: If an output is further than 1e-3 of the largest output away; it names the first node where
            the two part.
    """
    for island in builder.islands:
        if drawing := drawing_in(island.layer):
            return f"not compared: {drawing} in `{island.layer.name}` draws random numbers"
    try:
        inputs, expected = _expected(builder, source)
    except MissingDependencyError:
        return "not compared with ONNX Runtime, which is not installed (pip install 'dwindle[onnx]')"
    except (DwindleError, ValueError) as error:
        return f"not compared: {error}"
    fed = [_turned(builder, name, x) for (name, _, _), x in zip(builder.graph.inputs, inputs, strict=True)]
    found = _predicted(model, fed)
    found = [np.moveaxis(y, -1, 1) if turned else y for y, turned in zip(found, builder.turned, strict=True)]
    shapes = [(y.shape, z.shape) for y, z in zip(found, expected, strict=True) if y.shape != z.shape]
    result = None if shapes else compare(expected, found, BOUND, reference="ONNX Runtime")
    said = "agrees with ONNX Runtime"
    if builder.islands and (result is None or not result.passed):
        said += " before and behind what stays as in the file"
        result = _in_parts(builder, source, inputs, fed) or result
    if result is None:
        raise VerificationError(f"an output has the shape {shapes[0][0]}; ONNX Runtime gives {shapes[0][1]}")
    if not result.passed:
        where = first_difference(builder, source, inputs)
        raise VerificationError(
            f"the model does not predict what ONNX Runtime predicts: the largest difference is "
            f"{result.max_abs_error:.3g} (bound: {result.bound}); they part at {where}"
        )
    return f"{said}: largest difference {result.max_abs_error:.2g} (bound: {result.bound})"


def _expected(builder: Builder, source: Any) -> tuple[list[np.ndarray], Sequence[np.ndarray]]:
    """Return random inputs, and what ONNX Runtime makes of them; its copies of the weights are gone then.

    Raises:
        UnsupportedModelError: If it can't run the file, with any lengths that are tried.
    """
    from dwindle.measuring.onnx_runtime import OnnxRunner

    content = source if isinstance(source, str | Path) else source.SerializeToString()
    runner = OnnxRunner(content, limit_s=LONGEST_S, checked=True, brief=True)
    problem = UnsupportedModelError("no lengths are tried")
    for length, below in _TRIED:
        inputs = _inputs(builder, [spec.shape for spec in runner.inputs], length, below)
        try:
            return inputs, runner.run(*inputs)
        except UnsupportedModelError as error:
            problem = error
            if runner.stopped:
                break
    raise problem


def _inputs(builder: Builder, shapes: Sequence[Sequence[int]], length: int, below: int) -> list[np.ndarray]:
    """Return random inputs; lengths that are open are the file's own (as the one sample that some take), or tried."""
    generator = np.random.default_rng(0)
    found = []
    for (name, _, dtype), own in zip(builder.graph.inputs, shapes, strict=True):
        shape = [
            n if isinstance(n, int) else given if given > 0 else _SAMPLES if axis == 0 else length
            for axis, (n, given) in enumerate(zip(builder.values[name].sizes, own, strict=True))
        ]
        kind = np.dtype(dtype)
        numbers = (
            generator.random(shape)
            if kind.kind == "f"
            else generator.integers(0, below if kind.kind in "iu" else 2, shape)
        )
        found.append(numbers.astype(kind))
    return found


def _predicted(model: keras.Model, fed: list[Any]) -> list[np.ndarray]:
    packed = fed[0] if len(fed) == 1 else fed
    frozen = any(isinstance(layer, OnnxIsland) for layer in model.layers)
    # Compiled, results as long as the data says are not for every backend.
    found = model(packed, training=False) if frozen else model.predict_on_batch(packed)
    return [keras.ops.convert_to_numpy(y) for y in keras.tree.flatten(found)]


def _in_parts(builder: Builder, source: Any, inputs: list[np.ndarray], fed: list[np.ndarray]) -> Verification | None:
    """Compare each island alone, and all that it takes and the outputs where islands give what ONNX Runtime says.

    Returns:
        What was found; None if results have other shapes, or ONNX Runtime does not tell what is inside of the file.
    """
    given = list(dict.fromkeys(name for island in builder.islands for name in island.outputs))
    wanted = dict.fromkeys(name for island in builder.islands for name in island.inputs)
    wanted |= dict.fromkeys(name for name in builder.graph.outputs if isinstance(builder.values.get(name), Moving))
    own = [name for name, _, _ in builder.graph.inputs]
    names = [name for name in wanted if name not in {*given, *own}]
    there = _inside(source, [*names, *given], inputs)
    if there is None or not {*names, *given} <= set(there):
        return None
    found: list[np.ndarray] = []
    if names:
        keys = [builder.values[name].tensor for name in (*own, *given)]
        parts = keras.Model(keys, [builder.plain(builder.values[name]) for name in names])
        made = parts([*fed, *(there[name] for name in given)], training=False)
        found += [keras.ops.convert_to_numpy(y) for y in keras.tree.flatten(made)]
    try:
        for island in builder.islands:
            runner = runner_of(island.layer.content, limit_s=LONGEST_S)
            found += runner.run(*(there[name] for name in island.inputs))
    except UnsupportedModelError:
        return None
    expected = [there[name] for name in (*names, *(name for island in builder.islands for name in island.outputs))]
    if any(y.shape != z.shape for y, z in zip(found, expected, strict=True)):
        return None
    return compare(expected, found, BOUND, reference="ONNX Runtime")


def _inside(source: Any, names: Sequence[str], inputs: list[np.ndarray]) -> dict[str, np.ndarray] | None:
    """Return what ONNX Runtime takes, and computes inside of a file; None if it can't run that."""
    onnx = require_onnx()
    from dwindle.measuring.onnx_runtime import OnnxRunner

    message = onnx.ModelProto()
    message.CopyFrom(onnx.load(str(source)) if isinstance(source, str | Path) else source)
    there = {value.name for value in (*message.graph.output, *message.graph.input)}
    message.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in there)
    try:
        runner = OnnxRunner(message.SerializeToString(), limit_s=LONGEST_S)
        found = dict(zip((spec.name for spec in runner.outputs), runner.run(*inputs), strict=True))
        return found | dict(zip((spec.name for spec in runner.inputs), inputs, strict=True))
    except (DwindleError, ValueError):
        return None


def _turned(builder: Builder, name: str, x: np.ndarray) -> np.ndarray:
    return x.transpose(builder.values[name].axes)


def first_difference(builder: Builder, source: Any, inputs: list[np.ndarray]) -> str:
    """Return the first node whose result differs from ONNX Runtime's by more than the bound.

    Args:
        builder: What built the model, after `run`.
        source: Path or `onnx.ModelProto`.
        inputs: One array for each input, as the file has them.
    """
    makers = {name: node for node in builder.graph.nodes for name in node.outputs}
    names = [name for name, value in builder.values.items() if isinstance(value, Moving) and name in makers]
    expected = _inside(source, names, inputs)
    if expected is None:
        return "a node that is not known"
    keys = [builder.values[name].tensor for name, _, _ in builder.graph.inputs]
    fed = [_turned(builder, name, x) for (name, _, _), x in zip(builder.graph.inputs, inputs, strict=True)]
    watched = keras.Model(keys[0] if len(keys) == 1 else keys, [builder.plain(builder.values[name]) for name in names])
    found = _predicted(watched, fed)
    for name, value in zip(names, found, strict=True):
        wanted = expected.get(name)
        if wanted is None or wanted.shape != np.shape(value) or wanted.dtype.kind != "f":
            continue
        if not compare([wanted], [np.asarray(value)], BOUND, reference="").passed:
            return f"{makers[name].kind} `{makers[name].name}`"
    return "a node that is not known"
