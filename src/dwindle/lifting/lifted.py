"""The lifted model: a functional Keras model that knows which tensor of the file each of its weights is."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras
import numpy as np

from dwindle.errors import UnsupportedModelError
from dwindle.lifting.flatbuffer import Graph, Operation, Tensor, read_graph, replace_constants
from dwindle.lifting.layout import to_file, to_keras
from dwindle.lifting.operators import OPERATORS
from dwindle.weights import model_slots, walk_layers

# Operators whose outputs lie on the grid of their input, so that quantizing them again changes nothing.
_KEEPS_GRID = {"MAX_POOL_2D", "RESHAPE", "SQUEEZE", "EXPAND_DIMS", "TRANSPOSE", "STRIDED_SLICE", "SLICE", "SPLIT",
               "SPLIT_V", "PAD", "RELU", "GATHER", "PACK", "UNPACK"}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Link:
    """Which constant of the float file fills which variable.

    Attributes:
        layer: Layer name.
        variable: Variable name in the layer, such as ``kernel``.
        tensor: Tensor name in the file.
        layout: How the axes differ; a key of `dwindle.lifting.layout`.
    """

    layer: str
    variable: str
    tensor: str
    layout: str


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A quantized tensor: ``(q - zero_point) * scale``."""

    scale: float
    zero_point: int
    bits: int


@dataclass(frozen=True, kw_only=True)
class Grids:
    """Where the quantized file rounds, told in the float file's terms.

    Attributes:
        inputs: Model input number to the grids that it goes through.
        outputs: ``(operator, output)`` number to the grid of what is produced there.
        edges: ``(operator, input)`` number to the grids between the producer and this consumer.
        weights: Float tensor name to ``(bits, per channel)`` of a quantized weight.
        operands: ``(operator, input)`` number to the grid of what the operator reads there.
        final: Model output number to the grids between its producer and the output.
    """

    inputs: dict[int, Grid] = field(default_factory=dict)
    outputs: dict[tuple[int, int], Grid] = field(default_factory=dict)
    edges: dict[tuple[int, int], tuple[Grid, ...]] = field(default_factory=dict)
    weights: dict[str, tuple[int, bool]] = field(default_factory=dict)
    operands: dict[tuple[int, int], Grid] = field(default_factory=dict)
    final: dict[int, tuple[Grid, ...]] = field(default_factory=dict)


@keras.saving.register_keras_serializable("dwindle")
class LiftedModel(keras.Model):
    """A functional model lifted from a LiteRT file, which can be written back into that very file.

    Args:
        inputs: Keras inputs.
        outputs: Keras outputs.
        links: Which variable is which tensor.
        name: The model's name.
        quantization: For a model in quantized training: the scheme's dict and the calibrated ranges.

    Attributes:
        float_file: The bytes of the float file that it came from.
    """

    def __init__(
        self,
        inputs: Any,
        outputs: Any,
        *,
        links: list[Link],
        name: str | None = None,
        quantization: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(inputs=inputs, outputs=outputs, name=name)
        self._dwindle_links = tuple(links)
        self._dwindle_quantization = quantization
        self.float_file = b""

    @property
    def links(self) -> tuple[Link, ...]:
        """Which variable is which tensor of the float file."""
        return tuple(self._dwindle_links)

    @property
    def quantization(self) -> dict[str, Any] | None:
        """Scheme and ranges of quantized training, None for a float model."""
        value = self._dwindle_quantization
        return None if value is None else dict(value)

    def get_config(self) -> dict[str, Any]:
        """Return the functional graph and what ties it to the file."""
        graph = keras.Model(self.inputs, self.outputs, name=self.name).get_config()
        links = [vars(link) for link in self.links]
        return {"graph": graph, "links": links, "quantization": self.quantization, "name": self.name}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> LiftedModel:
        """Make the model from `get_config`; `float_file` is loaded or set afterwards."""
        graph = keras.Model.from_config(config["graph"], custom_objects=custom_objects)
        links = [Link(**link) for link in config["links"]]
        return cls(graph.inputs, graph.outputs, links=links, name=config["name"], quantization=config["quantization"])

    def save_assets(self, path: str) -> None:
        """Save the float file, its trained constants zeroed: the variables hold them."""
        zeros = {link.tensor: np.zeros(1) for link in self.links}
        shapes = {t.name: t.shape for t in read_graph(self.float_file).tensors if t.name in zeros}
        blank = replace_constants(self.float_file, {name: np.zeros(shape) for name, shape in shapes.items()})
        Path(path, "float.tflite.z").write_bytes(zlib.compress(blank, 9))

    def load_assets(self, path: str) -> None:
        """Load what `save_assets` wrote."""
        self.float_file = zlib.decompress(Path(path, "float.tflite.z").read_bytes())

    def to_float_file(self) -> bytes:
        """Return the float file with this model's weights in it: masked and shared, but not rounded."""
        layers = dict(walk_layers(self))
        shapes = {tensor.name: tensor.shape for tensor in read_graph(self.float_file).tensors}
        values = {}
        for link in self.links:
            value = _float_value(layers[link.layer], link.variable)
            values[link.tensor] = to_file(value, link.layout, shapes[link.tensor])
        return replace_constants(self.float_file, values)


def _float_value(layer: Any, variable: str) -> np.ndarray:
    """Return a weight after every transform that comes before quantization."""
    transforms = layer.__dict__.get("_dwindle_transforms", {}).get(variable)
    if transforms is None:
        found = next(v for v in layer.variables if v.name == variable)
        return np.asarray(keras.ops.convert_to_numpy(found), np.float32)
    return np.asarray(layer.effective_before(variable, order=30), np.float32)


def lift(source: Any, *, name: str | None = None) -> LiftedModel:
    """Make a trainable Keras model from a LiteRT file, or from any Keras model by way of its float file.

    BatchNorm is folded, activations are fused, and nested, subclassed and custom layers are flat, exactly as in the
    file. Each layer is named after the operator's output in the file.

    Args:
        source: Path or bytes of a ``.tflite`` file, or a `keras.Model` (which is converted to one first).
        name: Name of the model.

    Returns:
        A functional model; ``to_float_file`` writes its weights back into the file that it came from.

    Raises:
        UnsupportedModelError: For a broken file, or an operator that has no entry in the table (named).
    """
    if isinstance(source, keras.Model):
        from dwindle.exporting.convert import float_file

        name, content = name or source.name, float_file(source)
    else:
        content = source if isinstance(source, bytes) else Path(source).read_bytes()
    return build_lifted(content, grids=None, name=name or "lifted")


def build_lifted(
    content: bytes, *, grids: Grids | None, name: str, quantization: dict[str, Any] | None = None
) -> LiftedModel:
    """Build the model of a float file, with fake quantization where ``grids`` says so."""
    graph = read_graph(content)
    missing = sorted({op.name for op in graph.operations if op.name not in OPERATORS})
    if missing:
        raise UnsupportedModelError(
            f"the model uses {', '.join(missing)}, which can't be made trainable yet; "
            "quantization after training works (scheme int8), or replace the layers that need it"
        )
    builder = _Builder(graph, grids)
    inputs, outputs = builder.run()
    model = LiftedModel(inputs, outputs, links=builder.links, name=name, quantization=quantization)
    model.float_file = content
    builder.fill(model)
    if grids is not None:
        from dwindle.attaching import attach

        model = attach(model, builder.fake_quantized(model, grids))
    return model


class _Builder:
    """Walks a graph once and makes the Keras layers."""

    def __init__(self, graph: Graph, grids: Grids | None) -> None:
        self.graph = graph
        self.grids = grids or Grids()
        self.links: list[Link] = []
        self.values: dict[int, Any] = {}
        self._names: dict[str, int] = {}
        self._given: dict[str, np.ndarray] = {}
        self._operations: dict[str, int] = {}
        ends = {tensor.index for tensor in graph.outputs}
        self._probabilities = {
            tensor.index
            for operation in graph.operations
            if operation.name in ("SOFTMAX", "LOGISTIC", "LOG_SOFTMAX")
            for tensor in operation.outputs
            if tensor.index in ends
        }
        self._on_grid: dict[int, Grid] = {}

    def run(self) -> tuple[Any, Any]:
        inputs = []
        for number, tensor in enumerate(self.graph.inputs):
            shape = tensor.shape[1:]
            key = keras.Input(shape, dtype=np.dtype(tensor.dtype).name, name=self._name(self.graph.input_names[number]))
            inputs.append(key)
            self.values[tensor.index] = self._round(key, self.grids.inputs.get(number), tensor)
        for operation in self.graph.operations:
            self._operate(operation)
        outputs = []
        for number, tensor in enumerate(self.graph.outputs):
            value = self.values[tensor.index]
            for grid in self.grids.final.get(number, ()):
                value = self._fake_quantize(value, grid, tensor.name)
            outputs.append(value)
        single = outputs[0] if len(outputs) == 1 else outputs
        return (inputs[0] if len(inputs) == 1 else inputs), single

    def _operate(self, operation: Operation) -> None:
        inputs = []
        for position, tensor in enumerate(operation.inputs):
            value = None if tensor is None or tensor.value is not None else self.values[tensor.index]
            before = None if tensor is None else self._on_grid.get(tensor.index)
            for step in self.grids.edges.get((operation.index, position), ()):
                scale = None if before is None else before.scale
                value = self._fake_quantize(value, step, tensor.name if tensor else "", input_scale=scale)
                before = step
            inputs.append(value)
        results = OPERATORS[operation.name](self, operation, inputs)
        results = results if isinstance(results, list) else [results]
        source = next((t for t in operation.inputs if t is not None and t.value is None), None)
        for number, (tensor, value) in enumerate(zip(operation.outputs, results, strict=False)):
            grid = self.grids.outputs.get((operation.index, number))
            same = source is not None and grid is not None and self._on_grid.get(source.index) == grid
            edged = any((operation.index, p) in self.grids.edges for p in range(len(operation.inputs)))
            if grid is not None and same and not edged and operation.name in _KEEPS_GRID:
                self.values[tensor.index] = value
                self._on_grid[tensor.index] = grid
            else:
                half_away = operation.name == "AVERAGE_POOL_2D"
                self.values[tensor.index] = self._round(value, grid, tensor, half_away=half_away)

    def _round(self, value: Any, grid: Grid | None, tensor: Tensor, *, half_away: bool = False) -> Any:
        if grid is None:
            return value
        self._on_grid[tensor.index] = grid
        quiet = tensor.index in self._probabilities
        return self._fake_quantize(value, grid, tensor.name, in_training=not quiet, half_away=half_away)

    def _fake_quantize(self, value: Any, grid: Grid, name: str, **options: Any) -> Any:
        from dwindle.quantization.fake_quantization import FakeQuantize

        layer = FakeQuantize(
            scale=grid.scale, zero_point=grid.zero_point, bits=grid.bits,
            name=self._name(f"{_short(name)}_quantized"), dtype="float32", **options,
        )  # fmt: skip
        return layer(value)

    def _name(self, wanted: str) -> str:
        clean = re.sub(r"[^A-Za-z0-9_.\-]+", "_", wanted).strip("_.") or "tensor"
        if not re.match(r"[A-Za-z0-9.]", clean):
            clean = f"t{clean}"
        count = self._names.get(clean, 0)
        self._names[clean] = count + 1
        return clean if count == 0 else self._name(f"{clean}_{count}")

    def layer(self, factory: Callable[..., Any], operation: Operation, **options: Any) -> Any:
        # The kernel's name says which layer it is; the output's may be that of a fused activation.
        kernel = operation.inputs[1] if len(operation.inputs) > 1 else None
        weighted = kernel is not None and kernel.value is not None and kernel.dtype == np.float32
        source = kernel.name if kernel is not None and weighted and "/" in kernel.name else operation.outputs[0].name
        layer = factory(name=self._name(_short(source)), dtype="float32", **options)
        self._operations[layer.name] = operation.index
        return layer

    def weights(self, layer: Any, **tensors: tuple[Tensor | None, str]) -> None:
        for variable, (tensor, layout) in tensors.items():
            if tensor is None or tensor.value is None:
                continue
            self.links.append(Link(layer=layer.name, variable=variable, tensor=tensor.name, layout=layout))
            self._given[f"{layer.name}/{variable}"] = to_keras(np.asarray(tensor.value, np.float32), layout)

    def fill(self, model: keras.Model) -> None:
        """Put the file's constants into the model's variables."""
        for _, layer in walk_layers(model):
            for variable in layer.weights:
                given = self._given.get(f"{layer.name}/{variable.name}")
                if given is not None:
                    variable.assign(given.reshape(variable.shape))

    def fake_quantized(self, model: keras.Model, grids: Grids) -> Mapping[tuple[str, str], list[Any]]:
        """Return the weight transforms that do to each weight what the quantizer will do."""
        from dwindle.quantization.fake_quantization import FakeQuantizedBias, FakeQuantizedWeight

        axes = {(path, slot.key): slot.channel_axes for path, slots in model_slots(model).items() for slot in slots}
        biased = {link.layer for link in self.links if link.variable == "bias"}
        found: dict[tuple[str, str], list[Any]] = {}
        for link in self.links:
            if link.tensor in grids.weights and (link.layer, link.variable) in axes:
                bits, per_channel = grids.weights[link.tensor]
                channel_axes = axes[link.layer, link.variable] if per_channel else ()
                grid = grids.operands.get((self._operations[link.layer], 0))
                scale = grid.scale if grid is not None and link.layer in biased else None
                found[link.layer, link.variable] = [
                    FakeQuantizedWeight(bits=bits, channel_axes=channel_axes, input_scale=scale)
                ]
                if scale is not None:
                    found[link.layer, "bias"] = [FakeQuantizedBias(input_scale=scale, kernel=link.variable)]
        return found


def _short(name: str) -> str:
    """Return the part of a converter's tensor name that says which layer it is."""
    name = name.split(";")[0].split(":")[0]
    parts = [part for part in name.split("/") if part]
    if len(parts) > 1:
        parts = parts[1:] if len(parts) > 2 else parts
        parts = parts[:-1] if len(parts) > 1 else parts
    return "_".join(parts) or "tensor"
