"""The lifted model: a functional Keras model that knows which tensor of the file each of its weights is."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import keras
import numpy as np

from dwindle.lifting.building import Builder, refuse_states
from dwindle.lifting.flatbuffer import read_graph, replace_constants
from dwindle.lifting.float_files import as_float
from dwindle.lifting.grids import Grids
from dwindle.lifting.layout import channel_axis, to_file
from dwindle.lifting.links import Link
from dwindle.lifting.shared_constants import TiedWeight, followers, tie, unshared
from dwindle.lifting.states import with_states_outside
from dwindle.weights import recursion_of, walk_layers

#: Operations in a row that a lifted graph may have; Keras walks them recursively.
DEEPEST = 50_000


@keras.saving.register_keras_serializable("dwindle")
class LiftedModel(keras.Model):
    """A functional model lifted from a LiteRT file, which can be written back into that very file.

    Args:
        inputs: Keras inputs.
        outputs: Keras outputs.
        links: Which variable is which tensor.
        name: The model's name.
        quantization: For a model in quantized training: the scheme's dict and the calibrated ranges.
        notes: What the user should know, such as operators that could not be made trainable.
        ends: For a model with nodes of an ONNX file in it, which a LiteRT file can't hold: the tensors between those
            and the rest, as ``(layer, call, output)``; ``"fed"``, what the float file takes behind the model's inputs,
            and ``"given"``, all that it gives. None: the file is all of the model.

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
        notes: Sequence[str] = (),
        ends: dict[str, list[Any]] | None = None,
    ) -> None:
        with recursion_of(DEEPEST):
            super().__init__(inputs=_alone(inputs), outputs=_alone(outputs), name=name)
        self._dwindle_links = tuple(links)
        self._dwindle_quantization = quantization
        self._dwindle_notes = tuple(notes)
        self._dwindle_ends = ends
        self.float_file = b""
        tie(self, self.links)

    @property
    def links(self) -> tuple[Link, ...]:
        """Which variable is which tensor of the float file."""
        return tuple(self._dwindle_links)

    @property
    def ends(self) -> dict[str, list[tuple[str, int, int]]] | None:
        """Tensors between nodes of an ONNX file and the rest, which alone is in the float file; None without those."""
        found = self._dwindle_ends
        return None if found is None else {key: [tuple(ref) for ref in refs] for key, refs in found.items()}

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know: operators that run frozen in the interpreter, and how the file was widened."""
        return tuple(self._dwindle_notes)

    @property
    def quantization(self) -> dict[str, Any] | None:
        """Scheme, ranges and weight bounds of quantized training as they are now; None for a float model."""
        value = self._dwindle_quantization
        if value is None:
            return None
        value = dict(value)
        if value.get("ranged"):
            now = {name: self.get_layer(layer).range for name, layer in value["ranged"].items()}
            value["ranges"] = {**value["ranges"], **{name: list(ends) for name, ends in now.items()}}
        return value

    @property
    def weight_bounds(self) -> dict[str, np.ndarray]:
        """Float tensor name to the largest magnitude of each channel's grid, where it is not the weight's own."""
        layers = dict(walk_layers(self))
        shapes = {tensor.name: tensor.shape for tensor in read_graph(self.float_file).tensors}
        found = {}
        for link in self.links:
            layer = layers[link.layer]
            if link.variable not in layer.__dict__.get("_dwindle_transforms", {}):
                continue
            for transform, state in layer.transforms_and_states(link.variable):
                if transform.kind == "fake_quantize" and transform.own_bound:
                    bound = np.abs(keras.ops.convert_to_numpy(state["bound"]))
                    full = np.broadcast_to(bound, layer.effective_before(link.variable, order=0).shape)
                    inside = to_file(np.ascontiguousarray(full), link.layout, shapes[link.tensor])
                    axes = tuple(
                        a for a in range(inside.ndim) if bound.size == 1 or a != channel_axis(link.layout, inside)
                    )
                    found[link.tensor] = inside.max(axis=axes, keepdims=True)
        return found

    def sync(self) -> None:
        """Bring what depends on trained weights up to date: the steps of accumulators. Export calls this."""
        for name, (source, factor, scale) in (self._dwindle_quantization or {}).get("snaps", {}).items():
            scales = _kernel_scales(self.get_layer(source)) if source else np.ones(1, np.float32)
            step = np.float32(factor) * scales / np.float32(scale)
            layer = self.get_layer(name)
            # Wide steps are far above what float arithmetic errs by, and stale ones of trained weights would show.
            kept = np.where((step < 0.05) | (not source), step, 0.0)
            layer.step.assign(np.broadcast_to(kept, layer.step.shape).astype(np.float32))
            first = np.exp2(np.maximum(-np.frexp(step)[1], 0.0)).astype(np.float32)
            layer.first_step.assign(np.broadcast_to(first, layer.first_step.shape))

    def get_config(self) -> dict[str, Any]:
        """Return the functional graph and what ties it to the file."""
        with recursion_of(DEEPEST):
            graph = keras.Model(self.inputs, self.outputs, name=self.name).get_config()
        links = [vars(link) for link in self.links]
        return {"graph": graph, "links": links, "quantization": self.quantization, "name": self.name,
                "notes": list(self.notes), "ends": self.ends}  # fmt: skip

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> LiftedModel:
        """Make the model from `get_config`; `float_file` is loaded or set afterwards."""
        with recursion_of(len(config["graph"]["layers"])):
            graph = keras.Model.from_config(config["graph"], custom_objects=custom_objects)
        links = [Link(**link) for link in config["links"]]
        return cls(
            graph.inputs, graph.outputs, links=links, name=config["name"], quantization=config["quantization"],
            notes=config.get("notes", ()), ends=config.get("ends"),
        )  # fmt: skip

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


def _alone(tensors: Any) -> Any:
    return tensors[0] if isinstance(tensors, list) and len(tensors) == 1 else tensors


def _kernel_scales(layer: Any) -> np.ndarray:
    """Return the scale of each output channel of a layer's kernel, or that of its constant, as it is now."""
    counts = layer.counts_of(next(key for key in layer.__dict__["_dwindle_transforms"] if key != "bias"))
    return np.ravel(keras.ops.convert_to_numpy(counts[1])).astype(np.float32)


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
    file. Each layer is named after the operator's output in the file. An operator without an entry in the table runs
    frozen in the interpreter, and ``notes`` names it. float16, sparse and quantized files are widened to float32.
    Variables, in which streaming files keep a state between runs, become inputs and outputs, and ``notes`` says which.

    Args:
        source: Path or bytes of a ``.tflite`` file, or a `keras.Model` (which is converted to one first).
        name: Name of the model.

    Returns:
        A functional model; ``to_float_file`` writes its weights back into the file that it came from.

    Raises:
        UnsupportedModelError: For a broken file, or one that keeps a state between runs other than in variables.
    """
    if isinstance(source, keras.Model):
        from dwindle.exporting.convert import float_file

        name, content = name or source.name, float_file(source)
    else:
        content = source if isinstance(source, bytes) else Path(source).read_bytes()
    content, states = with_states_outside(content)
    refuse_states(read_graph(content))
    content, notes = as_float(content)
    notes = [*notes, *map(str, states)]
    return build_lifted(unshared(content), grids=None, name=name or "lifted", notes=notes)


def build_lifted(
    content: bytes,
    *,
    grids: Grids | None,
    name: str,
    quantization: dict[str, Any] | None = None,
    notes: Sequence[str] = (),
    ranges: str = "fixed",
) -> LiftedModel:
    """Build the model of a float file, with fake quantization where ``grids`` says so.

    Args:
        content: The float file.
        grids: Where the quantized file rounds; None for a float model.
        name: The model's name.
        quantization: What `LiftedModel.quantization` holds.
        notes: What the user should know.
        ranges: ``"fixed"``, ``"moving"`` or ``"learned"`` activation ranges.
    """
    power_of_two = bool(quantization and quantization["scheme"]["power_of_two"])
    graph = read_graph(content)
    refuse_states(graph)
    builder = Builder(content, graph, grids, ranges=ranges, power_of_two=power_of_two)
    inputs, outputs = builder.run()
    islands = [f"runs frozen in the interpreter: {island}" for island in builder.islands]
    if quantization is not None:
        snaps = {layer: list(source) for layer, source in builder.snaps.items()}
        quantization = {**quantization, "ranged": builder.ranged, "snaps": snaps}
    model = LiftedModel(
        inputs, outputs, links=builder.links, name=name, quantization=quantization, notes=[*notes, *islands]
    )
    model.float_file = content
    builder.fill(model)
    tied = {(link.layer, link.variable): [TiedWeight()] for _, link in followers(builder.links)}
    if grids is None and not tied:
        return model
    from dwindle.attaching import attach

    if grids is None:
        return cast(LiftedModel, attach(model, tied))
    rounded = builder.fake_quantized(model, learned=ranges == "learned")
    both = {key: [*tied.get(key, ()), *rounded.get(key, ())] for key in {**tied, **rounded}}
    model = cast(LiftedModel, attach(model, both))
    model.sync()
    return model
