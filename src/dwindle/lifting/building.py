"""Building the Keras model of a LiteRT graph, with fake quantization where the quantized file rounds."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np

from dwindle.errors import UnsupportedModelError
from dwindle.lifting.flatbuffer import Graph, Operation, Tensor, layer_name, short_name
from dwindle.lifting.grids import Grid, Grids, WeightGrid
from dwindle.lifting.islands import Island, dead_ends
from dwindle.lifting.kernel_tables import TABLED, ByTable, KernelTables
from dwindle.lifting.layout import to_keras
from dwindle.lifting.links import Link
from dwindle.lifting.operators import OPERATORS
from dwindle.weights import model_slots, walk_layers

# Operators whose outputs lie on the grid of their input, so that quantizing them again changes nothing.
_KEEPS_GRID = {"MAX_POOL_2D", "RESHAPE", "SQUEEZE", "EXPAND_DIMS", "TRANSPOSE", "STRIDED_SLICE", "SLICE", "SPLIT",
               "SPLIT_V", "PAD", "RELU", "GATHER", "PACK", "UNPACK", "BROADCAST_TO", "SPACE_TO_DEPTH",
               "DEPTH_TO_SPACE", "REVERSE_V2", "MIRROR_PAD", "TILE"}  # fmt: skip
# How kernels round what they compute, where it is not halves to even.
_ROUNDING = {"AVERAGE_POOL_2D": "away"}
_KERNELS = {"CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV"}
# Operators whose output has one grid, whatever the data.
_OWN_GRID = {"SOFTMAX", "LOGISTIC", "TANH", "LOG_SOFTMAX", "L2_NORMALIZATION"}
# Operators that keep a state from one run to the next; neither an entry nor an island can stand for them.
_STATEFUL = {"VAR_HANDLE", "READ_VARIABLE", "ASSIGN_VARIABLE", "CALL_ONCE", "SVDF", "HASHTABLE", "HASHTABLE_FIND"}


def refuse_states(graph: Graph) -> None:
    """Raise if a file keeps a state between runs.

    Raises:
        UnsupportedModelError: Naming the operator.
    """
    for operation in graph.operations:
        if operation.name in _STATEFUL:
            raise UnsupportedModelError(
                f"the file keeps a state between runs ({operation.name}), which can't be made trainable; "
                "dwindle measures, inspects and packs it as it is"
            )


class Builder:
    """Walks a graph once and makes the Keras layers.

    A Keras tensor has a sample axis first. Most of a file's tensors have it too, of size 1; where an operator moves
    or drops that axis, the tensors behind it are held as ``(samples, *shape in the file)``, and `shift` is 1 for the
    operators that work on them.

    Args:
        content: The float file.
        graph: Its graph.
        grids: Where the quantized file rounds; None for a float model.
        ranges: How activation ranges behave in training; see `dwindle.quantization.fake_quantization.FakeQuantize`.
        power_of_two: Whether activation scales are powers of two.

    Attributes:
        links: Which variable is which constant.
        islands: Names of the operators that run in the interpreter, and why.
        snaps: Layer that rounds what an operator sums, to what its accumulator's steps are made from: the layer whose
            kernel has scales ("" for none), a factor, and the output's scale.
        ranged: Tensor name to the layer that rounds it, where the range moves.
        shift: 1 while the operator at work sees tensors with a sample axis that the file's do not have, else 0.
    """

    def __init__(
        self, content: bytes, graph: Graph, grids: Grids | None, *, ranges: str = "fixed", power_of_two: bool = False
    ) -> None:
        self.content = content
        self.graph = graph
        self.grids = grids or Grids()
        self.ranges = ranges
        self.power_of_two = power_of_two
        self.links: list[Link] = []
        self.islands: list[str] = []
        self.ranged: dict[str, str] = {}
        self.snaps: dict[str, tuple[str, float, float]] = {}
        self.shift = 0
        self._values: dict[int, Any] = {}
        self._extra: set[int] = set()
        self._names: dict[str, int] = {}
        self._given: dict[str, np.ndarray] = {}
        self._operations: dict[str, int] = {}
        self._shared: dict[Grid, Any] = {}
        self._on_grid: dict[int, Grid] = {}
        self._tables: KernelTables | None = None
        ends = {tensor.index for tensor in graph.outputs}
        self._probabilities = {
            tensor.index
            for operation in graph.operations
            if operation.name in ("SOFTMAX", "LOGISTIC", "LOG_SOFTMAX")
            for tensor in operation.outputs
            if tensor.index in ends
        }
        self._pinned = {
            grid
            for (number, _), grid in self.grids.outputs.items()
            if graph.operations[number].name in _OWN_GRID or graph.operations[number].outputs[0].dtype != np.float32
        }

    def run(self) -> tuple[Any, Any]:
        """Return the inputs and outputs of the model."""
        self._reserve_names()
        inputs = []
        for number, tensor in enumerate(self.graph.inputs):
            shape = tensor.shape[1:]
            key = keras.Input(shape, dtype=np.dtype(tensor.dtype).name, name=self._name(self.graph.input_names[number]))
            inputs.append(key)
            if tensor.shape[:1] != (1,):
                if tensor.shape:
                    raise UnsupportedModelError(
                        f"input `{self.graph.input_names[number]}` has a fixed batch of {tensor.shape[0]} in the file; "
                        "convert the model with a batch of 1 or an open one"
                    )
                raise UnsupportedModelError(f"input `{self.graph.input_names[number]}` is a scalar, without samples")
            self._values[tensor.index] = self._round(key, self.grids.inputs.get(number), tensor)
        dead = dead_ends(self.graph)
        for operation in self.graph.operations:
            if operation.index not in dead:
                self._operate(operation)
        outputs = []
        for number, tensor in enumerate(self.graph.outputs):
            if tensor.index not in self._values:
                raise UnsupportedModelError(f"output `{self.graph.output_names[number]}` is a constant of the file")
            value = self._values[tensor.index]
            for grid in self.grids.final.get(number, ()):
                value = self._fake_quantize(value, grid, tensor.name)
            outputs.append(value)
        single = outputs[0] if len(outputs) == 1 else outputs
        return (inputs[0] if len(inputs) == 1 else inputs), single

    def _reserve_names(self) -> None:
        """Keep the names that layers will have out of those that Keras gives to operations without a layer."""
        highest: dict[str, int] = {}
        for operation in self.graph.operations:
            prefix, _, number = layer_name(operation).rpartition("_")
            pair = (prefix, int(number)) if prefix and number.isdigit() else (layer_name(operation), 0)
            highest[pair[0]] = max(highest.get(pair[0], 0), pair[1]) + 1
        for prefix, count in highest.items():
            while keras.backend.get_uid(prefix) <= count:
                pass

    def _operate(self, operation: Operation) -> None:
        inputs = self._rounded_inputs(operation)
        results = self._by_table(operation, inputs, self._computed(operation, inputs))
        source = next((t for t in operation.inputs if t is not None and t.value is None), None)
        for number, (tensor, value) in enumerate(zip(operation.outputs, results, strict=False)):
            grid = self.grids.outputs.get((operation.index, number))
            same = source is not None and grid is not None and self._on_grid.get(source.index) == grid
            edged = any((operation.index, p) in self.grids.edges for p in range(len(operation.inputs)))
            if grid is not None and same and not edged and operation.name in _KEEPS_GRID:
                self._values[tensor.index] = value
                self._on_grid[tensor.index] = grid
                if self.ranges != "fixed" and source is not None and source.name in self.ranged:
                    self.ranged[tensor.name] = self.ranged[source.name]
            else:
                self._values[tensor.index] = self._round(value, grid, tensor, **self._kernel_rounding(operation, grid))

    def _rounded_inputs(self, operation: Operation) -> list[Any]:
        """Return the operator's inputs, on the grids between their producer and it; None for constants."""
        inputs: list[Any] = []
        for position, tensor in enumerate(operation.inputs):
            if tensor is None or tensor.value is not None:
                inputs.append(None)
                continue
            value = self._values[tensor.index]
            before = self._on_grid.get(tensor.index)
            for step in self.grids.edges.get((operation.index, position), ()):
                narrow = before is not None and before.bits == step.bits == 8
                scale = before.scale if before is not None and narrow else None
                value = self._fake_quantize(value, step, tensor.name, input_scale=scale)
                before = step
            if position == 0 and operation.index in self.grids.dynamic and operation.name != "GATHER":
                from dwindle.quantization.fake_quantization import DynamicQuantize

                # XNNPACK runs a convolution of 1x1 with 8-bit weights as a fully connected operator on each position,
                # and leaves rows of narrow weights that do not end with a byte to LiteRT's own kernel.
                kernel = operation.inputs[1]
                grid = None if kernel is None else self.grids.weights.get(kernel.name)
                bits = 8 if grid is None else grid.bits
                convolution = "CONV" in operation.name
                axes = 3 if convolution and not (bits == 8 and _is_pointwise(operation)) else 1
                off_bytes = not convolution and kernel is not None and int(kernel.shape[-1]) * bits % 8 != 0
                name = self._name(f"{short_name(tensor.name)}_rounded")
                value = DynamicQuantize(axes=axes, symmetric=off_bytes, name=name, dtype="float32")(value)
            inputs.append(value)
        return inputs

    def _by_table(self, operation: Operation, inputs: list[Any], results: list[Any]) -> list[Any]:
        """Let an operator that works entry by entry give what LiteRT's 8-bit kernel gives, where it has one."""
        grids = [self.grids.operands.get((operation.index, position)) for position in range(len(inputs))]
        output = self.grids.outputs.get((operation.index, 0))
        found = [grid for grid in grids if grid is not None and grid.bits == 8]
        if operation.name not in TABLED or self.ranges != "fixed" or any(value is None for value in inputs):
            return results
        if output is None or output.bits != 8 or len(found) < len(inputs):
            return results
        if not all(len(value.shape) == len(results[0].shape) for value in inputs):
            return results
        if self._tables is None:
            self._tables = KernelTables(self.content)
        table = self._tables.table(operation, found, output)
        if table is None:
            return results
        layer = ByTable.of(table, found, output, name=self._name(f"{layer_name(operation)}_in_8_bits"), dtype="float32")
        return [layer([*inputs, results[0]])]

    def _computed(self, operation: Operation, inputs: list[Any]) -> list[Any]:
        """Return the operator's results: by its entry, else as an island."""
        extra = any(t is not None and t.index in self._extra for t in operation.inputs)
        reason = "no entry in the table of operators"
        if operation.name in OPERATORS:
            for shift in (1,) if extra else (0, 1):
                names, links = dict(self._names), len(self.links)
                try:
                    found = self._by_entry(operation, inputs, shift)
                except UnsupportedModelError as error:
                    reason = str(error)
                    self._names = names
                    del self.links[links:]
                    continue
                finally:
                    self.shift = 0
                if all(_fits(value, t, shift) for value, t in zip(found, operation.outputs, strict=False)):
                    return self._settled(operation, found, shift)
                reason = f"{operation.name} `{operation.outputs[0].name}` is used in a form that has no entry"
                self._names = names
                del self.links[links:]
        return self._settled(operation, self._island(operation, inputs, reason), 1)

    def _by_entry(self, operation: Operation, inputs: list[Any], shift: int) -> list[Any]:
        given = list(inputs)
        if shift:
            given = [
                value
                if value is None or tensor is None or tensor.index in self._extra
                else keras.layers.Reshape(tensor.shape, name=self._name("with_batch"))(value)
                for value, tensor in zip(inputs, operation.inputs, strict=True)
            ]
        self.shift = shift
        results = OPERATORS[operation.name](self, operation, given)
        return results if isinstance(results, list) else [results]

    def _settled(self, operation: Operation, results: list[Any], shift: int) -> list[Any]:
        """Return results in the usual form, a sample axis in place of the file's batch of 1, where they have one."""
        settled = []
        for value, tensor in zip(results, operation.outputs, strict=False):
            if shift and tensor.shape[:1] == (1,):
                value = keras.layers.Reshape(tensor.shape[1:], name=self._name("without_batch"))(value)
            elif shift:
                self._extra.add(tensor.index)
            settled.append(value)
        return settled

    def _island(self, operation: Operation, inputs: list[Any], reason: str) -> list[Any]:
        given = {
            tensor.index: value
            for tensor, value in zip(operation.inputs, inputs, strict=True)
            if tensor is not None and value is not None
        }
        if not given:
            raise UnsupportedModelError(f"{operation.name} `{operation.outputs[0].name}` computes from constants only")
        shapes = [list(tensor.shape) for tensor in operation.outputs]
        name = self._name(layer_name(operation))
        layer = Island.of(self.content, operation, shapes, name=name)
        self.islands.append(f"{name} ({operation.name}): {reason}")
        found = layer(list(given.values()))
        return found if isinstance(found, list) else [found]

    def _kernel_rounding(self, operation: Operation, grid: Grid | None) -> dict[str, Any]:
        """Return how the kernel that runs an operator rounds its output."""
        kernel = operation.inputs[1] if len(operation.inputs) > 1 else None
        stored = None if kernel is None else self.grids.weights.get(kernel.name)
        places = (2, 1) if operation.name == "TRANSPOSE_CONV" else (0, 1)
        operands = [self.grids.operands.get((operation.index, position)) for position in places]
        if grid is None or grid.bits != 8:
            return {"rounding": _ROUNDING.get(operation.name, "even")}
        if operands[0] is None or operands[0].bits != 8:
            return {"rounding": _ROUNDING.get(operation.name, "even")}
        # Where XNNPACK has no kernel, LiteRT's own multiplies, rounds, shifts and rounds again.
        odd = operation.name == "FULLY_CONNECTED" and kernel is not None and kernel.shape[-1] % 2 == 1
        own = {"rounding": "up", "fixed_point": True}
        if operation.name in _KERNELS and stored is not None:
            layer = self._layer_of(operation)
            fixed = own if stored.bits < 8 and (operation.name == "CONV_2D" or odd) else {}
            channels = operation.outputs[0].shape[-1]
            return {**fixed, "snap": channels, "source": (layer, operands[0].scale, grid.scale)}
        if operation.name == "MEAN":
            sizes = [
                np.prod(tensor.shape) for tensor in (operation.inputs[0], operation.outputs[0]) if tensor is not None
            ]
            return {"mean_of": [int(sizes[0] // sizes[1]), operands[0].scale, operands[0].zero_point]}
        if operands[1] is not None and operation.name in ("MUL", "BATCH_MATMUL"):
            moving = [
                operand.scale
                for operand, tensor in zip(operands, operation.inputs, strict=False)
                if operand is not None and tensor is not None and tensor.value is None
            ]
            layer = self._layer_of(operation) if len(moving) == 1 else ""
            return {"snap": 1, "source": (layer, float(np.prod(moving)), grid.scale)}
        return {"rounding": _ROUNDING.get(operation.name, "even")}

    def _layer_of(self, operation: Operation) -> str:
        """Return the name of the layer that has the weights of an operator."""
        return next(link.layer for link in self.links if self._operations[link.layer] == operation.index)

    def _round(self, value: Any, grid: Grid | None, tensor: Tensor, **options: Any) -> Any:
        if grid is None:
            return value
        self._on_grid[tensor.index] = grid
        quiet = tensor.index in self._probabilities
        return self._fake_quantize(value, grid, tensor.name, in_training=not quiet, made=True, **options)

    def _fake_quantize(
        self, value: Any, grid: Grid, name: str, *, made: bool = False, pinned: bool = False, **options: Any
    ) -> Any:
        from dwindle.quantization.fake_quantization import FakeQuantize

        moves = self.ranges != "fixed" and grid not in self._pinned and not pinned
        layer = self._shared.get(grid) if moves else None
        source = options.pop("source", None)
        if layer is None:
            if moves:
                options = {"ranges": self.ranges, "power_of_two": self.power_of_two}
                source = None
            layer = FakeQuantize(
                scale=grid.scale, zero_point=grid.zero_point, bits=grid.bits,
                name=self._name(f"{short_name(name)}_quantized"), dtype="float32", **options,
            )  # fmt: skip
            if moves:
                self._shared[grid] = layer
            elif source is not None:
                self.snaps[layer.name] = source
        if moves and made:
            self.ranged[name] = layer.name
        return layer(value)

    def _name(self, wanted: str) -> str:
        clean = re.sub(r"[^A-Za-z0-9_.\-]+", "_", wanted).strip("_.") or "tensor"
        if not re.match(r"[A-Za-z0-9.]", clean):
            clean = f"t{clean}"
        count = self._names.get(clean, 0)
        self._names[clean] = count + 1
        return clean if count == 0 else self._name(f"{clean}_{count}")

    def layer(self, factory: Callable[..., Any], operation: Operation, **options: Any) -> Any:
        """Make a layer named after the operator's output."""
        layer = factory(name=self._name(layer_name(operation)), dtype="float32", **options)
        self._operations[layer.name] = operation.index
        return layer

    def integer_scales(self, operation: Operation) -> tuple[float, float, float] | None:
        """Return the scales of two operands and of the result where an 8-bit kernel computes on integers; else None."""
        grids = (*(self.grids.operands.get((operation.index, position)) for position in (0, 1)),
                 self.grids.outputs.get((operation.index, 0)))  # fmt: skip
        found = [grid.scale for grid in grids if grid is not None and grid.bits == 8]
        if operation.name == "BATCH_MATMUL" and grids[1] is not None and grids[1].zero_point == 0:
            return None  # XNNPACK runs it, and rounds once
        if operation.name not in ("ADD", "SUB", "BATCH_MATMUL"):
            return None
        return (found[0], found[1], found[2]) if len(found) == 3 and self.ranges == "fixed" else None

    def kept_scale(self, operation: Operation) -> float | None:
        """Return the scale that an 8-bit operator's input and output share; else None."""
        grid = self.grids.operands.get((operation.index, 0))
        same = grid is not None and grid.bits == 8 and grid == self.grids.outputs.get((operation.index, 0))
        return grid.scale if grid is not None and same and self.ranges == "fixed" else None

    def weights(self, layer: Any, **tensors: tuple[Tensor | None, str]) -> None:
        """Note which constants of the file fill which variables of a layer, and how they are laid out."""
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

    def fake_quantized(self, model: keras.Model, *, learned: bool = False) -> Mapping[tuple[str, str], list[Any]]:
        """Return the weight transforms that do to each weight what the quantizer will do."""
        from dwindle.quantization.fake_quantization import FakeQuantizedBias, FakeQuantizedWeight

        slots = {(path, slot.key): slot for path, found in model_slots(model).items() for slot in found}
        biased = {link.layer for link in self.links if link.variable == "bias"}
        found: dict[tuple[str, str], list[Any]] = {}
        for link in self.links:
            grid = self.grids.weights.get(link.tensor)
            slot = slots.get((link.layer, link.variable))
            if grid is None or slot is None:
                continue
            number = self._operations[link.layer]
            place = 2 if self.graph.operations[number].name == "TRANSPOSE_CONV" else 0
            operand = self.grids.operands.get((number, place))
            scale = operand.scale if operand is not None and operand.bits == 8 and link.layer in biased else None
            bound = None
            if (grid.bound is not None or learned) and not grid.block and not grid.asymmetric:
                weight = np.abs(self._given[f"{link.layer}/{link.variable}"]).reshape(slot.shape)
                others = tuple(a for a in range(weight.ndim) if a not in slot.channel_axes or not grid.per_channel)
                bound = weight.max(axis=others, keepdims=True)
                if grid.bound is not None:
                    bound = np.asarray(grid.bound, np.float32).reshape(bound.shape)
            found[link.layer, link.variable] = [
                FakeQuantizedWeight(
                    bits=grid.bits, channel_axes=slot.channel_axes if grid.per_channel else (), input_scale=scale,
                    block=grid.block, power_of_two=grid.power_of_two, asymmetric=grid.asymmetric,
                    own_bound=bound is not None, learned=bound is not None and learned, bound=bound,
                    counted=self._counted(link, grid, operand),
                )
            ]  # fmt: skip
            if scale is not None:
                found[link.layer, "bias"] = [FakeQuantizedBias(input_scale=scale, kernel=link.variable)]
        return found

    def _counted(self, link: Link, grid: WeightGrid, operand: Grid | None) -> float | None:
        """Return the scale of a layer's input where its kernel sums products of 8-bit integers."""
        operation = self.graph.operations[self._operations[link.layer]]
        if self.ranges != "fixed" or operation.name not in _KERNELS or grid.block or grid.asymmetric:
            return None
        if operand is None or operand.bits != 8:
            return None
        return operand.scale


def _is_pointwise(operation: Operation) -> bool:
    kernel, given = operation.inputs[1], operation.inputs[0]
    if operation.name != "CONV_2D" or kernel is None or given is None:
        return False
    strides = operation.options["strideH"], operation.options["strideW"]
    return kernel.shape[1:3] == (1, 1) and strides == (1, 1) and kernel.shape[3] == given.shape[3]


def _fits(value: Any, tensor: Tensor, shift: int) -> bool:
    """Whether a result has the shape that the file gives it."""
    if shift:
        return tuple(value.shape[1:]) == tuple(tensor.shape)
    return tensor.shape[:1] == (1,) and tuple(value.shape[1:]) == tuple(tensor.shape[1:])
