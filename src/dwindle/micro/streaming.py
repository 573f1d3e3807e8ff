"""Models that carry states from one call to the next, such as those for wake words: one frame in, one score out.

The state is explicit: it comes in as an input and leaves as an output, and the caller hands it back with the next
frame. Both must be on one grid, so that the integers can be handed back as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from dwindle.errors import ConfigError, ConversionError, DataError, did_you_mean
from dwindle.exporting import check, float_file
from dwindle.exporting.verify import BOUNDS, Verification, require
from dwindle.lifting.flatbuffer import Graph, Tensor, parse, read_graph, serialize
from dwindle.micro.running import zeros
from dwindle.micro.verifying import run_litert
from dwindle.quantization import Scheme, calibrate, write_quantized
from dwindle.quantization.calibration import Ranges

States = Mapping[int, int]
_CLOSE = 1e-4


def resolve_states(states: Mapping[Any, Any], content: bytes) -> dict[int, int]:
    """Return the number of each state's input with the number of its output.

    Args:
        states: Input to output, each by name or number.
        content: The file.

    Raises:
        ConfigError: If a name or number is not there, is used twice, or the two differ in shape or type.
    """
    graph = read_graph(content)
    found: dict[int, int] = {}
    for key, value in states.items():
        given = _number(key, graph.input_names, "input")
        made = _number(value, graph.output_names, "output")
        first, second = graph.inputs[given], graph.outputs[made]
        if first.shape != second.shape or first.dtype != second.dtype:
            raise ConfigError(
                f"`states`: input `{key}` has shape {first.shape} of {np.dtype(first.dtype).name} and output `{value}` "
                f"{second.shape} of {np.dtype(second.dtype).name}; a state must be the same going in and out"
            )
        if given in found or made in found.values():
            raise ConfigError(f"`states`: `{key}` or `{value}` is there twice; a state has one input and one output")
        found[given] = made
    if len(found) == len(graph.inputs):
        raise ConfigError("`states` names every input, and none is left for the frames")
    return found


def _number(name: Any, names: Sequence[str], what: str) -> int:
    if isinstance(name, int) and not isinstance(name, bool) and 0 <= name < len(names):
        return name
    if name in names:
        return list(names).index(name)
    listed = ", ".join(f"`{other}`" for other in names)
    raise ConfigError(f"`states` names {what} {name!r}, and the model has {listed}{did_you_mean(name, names)}")


def sequences(data: Any, content: bytes, states: States, *, limit: int) -> list[np.ndarray]:
    """Return frames, shape ``(n, steps, ...)``, one array for each input that is no state.

    Args:
        data: An array, a list of arrays, or `Data` of sequences.
        content: The file.
        states: From `resolve_states`.
        limit: At most this many sequences.

    Raises:
        DataError: If there are none, or they do not fit.
    """
    from dwindle.quantization import calibration_samples

    if data is None:
        raise DataError(
            "a model with states needs sequences to run, and `data` is None; pass an array of shape "
            "(sequences, steps, ...) for each input that is no state"
        )
    graph = read_graph(content)
    shapes = [(None, *tensor.shape[1:]) for number, tensor in enumerate(graph.inputs) if number not in states]
    return list(calibration_samples(shapes, data, limit=limit))


def streaming_file(
    model: keras.Model, scheme: Scheme, io_type: str, data: Any, states: Mapping[Any, Any], *, limit: int = 64
) -> tuple[bytes, Verification, float]:
    """Return the file of a model with states, with each state on one grid going in and out.

    Args:
        model: A built Keras model of one step: frames and states in, results and states out.
        scheme: What it is quantized for.
        io_type: Type of its inputs and outputs.
        data: Sequences, see `sequences`.
        states: Input to output, by name or number.
        limit: At most this many sequences are calibrated with.

    Returns:
        The file; its float file against the model, on single steps; and the largest difference of an output that is no
        state from the float file's, each carrying its own states through the sequences.

    Raises:
        ConversionError: If a state is not quantized to one grid.
    """
    content = float_file(model)
    pairs = resolve_states(states, content)
    frames = sequences(data, content, pairs, limit=limit)
    expected = run_litert(content, frames, states=pairs)
    steps = single_steps(read_graph(content), frames, expected, pairs)
    verification = check(content, model, steps, BOUNDS["float32"], "the Keras model, step by step")
    require(verification, content, content, steps)
    if scheme.is_float:
        return content, verification, 0.0
    ranges = _on_one_grid(read_graph(content), calibrate(content, steps) if scheme.needs_data else {}, pairs)
    written = write_quantized(content, scheme, ranges or None, io_type=io_type)
    if not _agree(read_graph(written), pairs):
        for given, made in pairs.items():
            ranges[read_graph(content).inputs[given].name] = _range_of(read_graph(written).outputs[made])
        written = write_quantized(content, scheme, ranges, io_type=io_type)
    written = matched(written, pairs)
    return written, verification, _float_error(written, frames, expected, pairs)


def single_steps(
    graph: Graph, frames: Sequence[np.ndarray], outputs: Sequence[np.ndarray], states: States
) -> list[np.ndarray]:
    """Return every step of every sequence as a sample, one array for each input, with the states that it began with.

    Args:
        graph: The file's.
        frames: One array for each input that is no state, shape ``(n, steps, ...)``.
        outputs: What it gave, one array for each output, shape ``(n, steps, ...)``.
        states: From `resolve_states`.
    """
    rest = iter(frames)
    found = []
    for number in range(len(graph.inputs)):
        if number in states:
            made = outputs[states[number]]
            first = np.broadcast_to(zeros(graph, number)[0], made[:, :1].shape).astype(made.dtype)
            value = np.concatenate([first, made[:, :-1]], axis=1)
        else:
            value = next(rest)
        found.append(value.reshape(-1, *value.shape[2:]))
    return found


def _on_one_grid(graph: Graph, ranges: Ranges, states: States) -> Ranges:
    found = dict(ranges)
    for given, made in states.items():
        names = (graph.inputs[given].name, graph.outputs[made].name)
        ends = [found[name] for name in names if name in found]
        for name in names:
            found[name] = (min(low for low, _ in ends), max(high for _, high in ends))
    return found


def _range_of(tensor: Tensor) -> tuple[float, float]:
    scale, point = float(np.ravel(tensor.scale)[0]), int(np.ravel(tensor.zero_point)[0])  # type: ignore[arg-type]
    top = 2 ** (tensor.bits - 1) - 1
    return (-top - 1 - point) * scale, (top - point) * scale


def _agree(graph: Graph, states: States) -> bool:
    return all(_apart(graph.inputs[given], graph.outputs[made]) < _CLOSE for given, made in states.items())


def _apart(first: Tensor, second: Tensor) -> float:
    """Return how far two grids are apart: of their scales, relatively; infinite where zero points or types differ."""
    if first.scale is None or second.scale is None or first.zero_point is None or second.zero_point is None:
        return 0.0 if first.scale is None and second.scale is None and first.dtype == second.dtype else np.inf
    if first.dtype != second.dtype or first.zero_point.ravel()[0] != second.zero_point.ravel()[0]:
        return np.inf
    a, b = float(first.scale.ravel()[0]), float(second.scale.ravel()[0])
    return abs(a - b) / max(a, b)


def matched(content: bytes, states: States) -> bytes:
    """Return the file with each state's input on the very scale of its output, to the last bit.

    Raises:
        ConversionError: If they are further apart than rounding explains.
    """
    graph = read_graph(content)
    model = copy.deepcopy(parse(content))
    for given, made in states.items():
        first, second = graph.inputs[given], graph.outputs[made]
        if _apart(first, second) >= _CLOSE:
            raise ConversionError(
                f"state `{graph.input_names[given]}` goes in on a grid of step {first.scale} and zero point "
                f"{first.zero_point}, and out on one of step {second.scale} and {second.zero_point}, so its integers "
                "can't be handed back as they are; give the state one range going in and out"
            )
        if first.scale is not None:
            tensors = model.subgraphs[0].tensors
            tensors[first.index].quantization.scale = np.array(tensors[second.index].quantization.scale, np.float32)
    return serialize(model)


def _float_error(content: bytes, frames: Sequence[np.ndarray], expected: Sequence[np.ndarray], states: States) -> float:
    from dwindle.measuring.litert import LiteRTRunner, dequantize

    runner = LiteRTRunner(content)
    free = [spec for number, spec in enumerate(runner.inputs) if number not in states]
    found = run_litert(content, quantized_frames(frames, free), states=states)
    errors = [
        float(np.abs(dequantize(array, runner.outputs[number]) - expected[number]).max())
        for number, array in enumerate(found)
        if number not in states.values()
    ]
    return max(errors, default=0.0)


def quantized_frames(frames: Sequence[np.ndarray], specs: Sequence[Any]) -> list[np.ndarray]:
    """Return frames in the file's own types."""
    from dwindle.measuring.litert import quantize

    return [
        np.ascontiguousarray(quantize(array, spec), dtype=spec.dtype) for array, spec in zip(frames, specs, strict=True)
    ]
