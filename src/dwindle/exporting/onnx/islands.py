"""Nodes that stayed as they were in an ONNX file, written into another one: the rest goes by way of LiteRT."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from dwindle.errors import ConversionError, UnsupportedModelError, VerificationError
from dwindle.exporting.onnx.values import channels_first
from dwindle.exporting.onnx.writer import BATCH
from dwindle.exporting.verify import BOUNDS, compare
from dwindle.graph_editing import (
    Ref,
    Taps,
    calls,
    copy_by_path,
    functional_config,
    input_refs,
    output_refs,
    redirected,
    replace_refs,
)
from dwindle.lifting.lifted import LiftedModel
from dwindle.lifting.onnx.cutting import checked
from dwindle.lifting.onnx.graph import free_names, graphs_of
from dwindle.lifting.onnx.islands import OnnxIsland, drawing_in, runner_of
from dwindle.measuring.onnx_runtime import OnnxRunner
from dwindle.weights import rebuilding

# Samples at once where what islands give is computed.
_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A model with islands, taken apart.

    Attributes:
        model: The model.
        islands: Layers that run nodes of an ONNX file, each after those that it reads.
        body: The rest. It also takes what islands give, and also gives what they take.
        taken: Which tensors of the model the body's inputs are, those of the model first.
        given: Which tensors of the model the body's outputs are.
        outputs: The model's outputs.
        reads: What each island takes, by the layer's name.
    """

    model: keras.Model
    islands: tuple[OnnxIsland, ...]
    body: keras.Model
    taken: tuple[Ref, ...]
    given: tuple[Ref, ...]
    outputs: tuple[Ref, ...]
    reads: Mapping[str, Sequence[Ref]]

    @property
    def one_sample(self) -> bool:
        """Whether it takes one sample at a time."""
        return any(tensor.shape[:1] == (1,) for tensor in self.body.inputs)

    def samples(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return samples for the body: those for the model, and what its islands give for them."""
        more = self.taken[len(self.model.inputs) :]
        if not more:
            return list(arrays)
        taps = Taps(self.model, {"": more})
        size = 1 if self.one_sample else _BATCH
        parts = [taps.read([x[k : k + size] for x in arrays]) for k in range(0, len(arrays[0]), size)]
        return [*arrays, *(np.concatenate([part["", ref][0] for part in parts]) for ref in more)]


def islands_in(model: Any) -> tuple[OnnxIsland, ...]:
    """Return the layers of a model that run nodes of an ONNX file; not those of models inside of it."""
    layers = model.layers if isinstance(model, keras.Model) else ()
    return tuple(layer for layer in layers if isinstance(layer, OnnxIsland))


def results_of(island: OnnxIsland) -> list[Ref]:
    """Return the tensors that an island gives."""
    return [(island.name, 0, place) for place in range(len(island.shapes))]


def taken_apart(model: keras.Model) -> Parts:
    """Return a model's islands and the rest; the model is not changed.

    Raises:
        UnsupportedModelError: If layers read what an island gives, and not all its lengths but the number of samples
            are known; if there are no other layers; or if an island is called several times.
    """
    islands = islands_in(model)
    config = functional_config(model)
    made = calls(config)
    several = [name for name, number in made if number and any(name == island.name for island in islands)]
    if several:
        raise UnsupportedModelError(f"`{several[0]}` is called several times, which can't be written as ONNX")
    inner = {ref: island for island in islands for ref in results_of(island)}
    reads = {island.name: made[island.name, 0] for island in islands}
    inputs, outputs = input_refs(config), output_refs(config)
    if isinstance(model, LiftedModel) and model.ends is not None:
        fed, given = model.ends["fed"], model.ends["given"]
    else:
        wanted = dict.fromkeys([*(ref for refs in reads.values() for ref in refs), *outputs])
        given = [ref for ref in wanted if ref not in inner and ref not in inputs]
        read = _read_before(given, made, {*inner, *inputs})
        fed = [ref for ref in inner if ref in read]
    if not given:
        raise UnsupportedModelError(f"`{model.name}` has no layers but `{islands[0].name}`; its ONNX file is all of it")
    body = _body(model, config, inputs, {ref: _taken(inner[ref], ref[2]) for ref in fed}, given)
    for ref, tensor in zip(given, body.outputs, strict=True):
        reader = next((island for island in islands if ref in reads[island.name]), None)
        if reader is not None and tensor.shape[:1] not in ((None,), (1,)):
            raise UnsupportedModelError(
                f"`{reader.name}` ({reader.operator}) reads what `{ref[0]}` gives, of shape {tuple(tensor.shape)}; an "
                ".onnx is written by way of LiteRT, where the samples come first"
            )
    return Parts(model=model, islands=islands, body=body, taken=(*inputs, *fed), given=tuple(given),
                 outputs=tuple(outputs), reads=reads)  # fmt: skip


def _read_before(refs: Sequence[Ref], made: Mapping[tuple[str, int], Sequence[Ref]], ends: set[Ref]) -> set[Ref]:
    """Return which tensors of ``ends`` others are computed from."""
    waiting, seen = list(refs), set(refs)
    while waiting:
        ref = waiting.pop()
        if ref not in ends:
            more = [source for source in made[ref[0], ref[1]] if source not in seen]
            seen.update(more)
            waiting += more
    return seen & ends


def _taken(island: OnnxIsland, place: int) -> keras.layers.Layer:
    """Return the input that stands for what an island gives."""
    lengths = island.shapes[place]
    if lengths[:1] not in ([BATCH], [1]) or not all(isinstance(n, int) for n in lengths[1:]):
        raise UnsupportedModelError(
            f"layers read what `{island.name}` ({island.operator}) gives, of shape {tuple(lengths)}; an .onnx is "
            "written by way of LiteRT, which needs to know every length but the number of samples, which comes first"
        )
    return keras.layers.InputLayer(
        batch_shape=[None if n == BATCH else n for n in lengths],
        dtype=island.dtypes[place],
        name=f"{island.name}_result_{place}",
    )


def _body(
    model: keras.Model, config: Mapping[str, Any], inputs: Sequence[Ref], fed: Mapping[Ref, Any], given: Sequence[Ref]
) -> keras.Model:
    """Build the model that has inputs in place of islands."""
    entries = [
        {**keras.saving.serialize_keras_object(layer), "name": layer.name, "inbound_nodes": []}
        for layer in fed.values()
    ]
    instead = {ref: (layer.name, 0, 0) for ref, layer in fed.items()}
    config = {
        **config,
        "layers": [*entries, *config["layers"]],
        "input_layers": [list(ref) for ref in (*inputs, *instead.values())],
        "output_layers": [list(ref) for ref in given],
    }
    with rebuilding(model):
        body = keras.Model.from_config(redirected(config, instead))
    copy_by_path(model, body)
    if isinstance(model, LiftedModel):
        return _lifted(body, model)
    body.notes = getattr(model, "notes", ())
    return body


def put_together(parts: Parts, body: LiftedModel) -> LiftedModel:
    """Return a model with its islands, and another body in place of its own.

    Args:
        parts: The model, taken apart.
        body: What takes and gives the same as the model's own body, in the same order; it is not changed.
    """
    config, whole = functional_config(body), functional_config(parts.model)
    own = len(parts.model.inputs)
    takes, gives = input_refs(config), output_refs(config)
    there = dict(zip((*parts.taken, *parts.given), (*takes, *gives), strict=True))
    used = {entry["config"]["name"] for entry in config["layers"]}
    names = {layer.name: f"{layer.name}_of_onnx" if layer.name in used else layer.name for layer in parts.islands}

    def moved(ref: Ref) -> Ref:
        return there[ref] if ref in there else (names[ref[0]], ref[1], ref[2])

    entries = [
        {
            **entry, "name": names[name], "config": {**entry["config"], "name": names[name]},
            "inbound_nodes": replace_refs(entry["inbound_nodes"], moved),
        }
        for entry in whole["layers"] if (name := entry["config"]["name"]) in names
    ]  # fmt: skip
    config = {
        **config,
        "layers": [*entries, *config["layers"]],
        "input_layers": [list(ref) for ref in takes[:own]],
        "output_layers": [list(moved(ref)) for ref in parts.outputs],
    }
    fed = [(names[name], call, place) for name, call, place in parts.taken[own:]]
    with rebuilding(body):
        made = keras.Model.from_config(redirected(config, dict(zip(takes[own:], fed, strict=True))))
    copy_by_path(body, made)
    return _lifted(made, body, ends={"fed": fed, "given": gives})


def _lifted(graph: keras.Model, source: LiftedModel, *, ends: dict[str, list[Any]] | None = None) -> LiftedModel:
    """Return a model of the same float file with another graph of the same layers."""
    left = [
        f"stays as in the ONNX file that it came from, without a gradient: `{island.name}` ({island.operator})"
        for island in islands_in(graph)
    ]
    found = LiftedModel(graph.inputs, graph.outputs, links=list(source.links), name=source.name,
                        quantization=source.quantization, notes=[*source.notes, *left], ends=ends)  # fmt: skip
    found.float_file = source.float_file
    return found


def joined(parts: Parts, content: bytes, samples: Sequence[np.ndarray], layout: str) -> tuple[bytes, list[str]]:
    """Return the whole file, and what the user should know.

    Args:
        parts: The model, taken apart.
        content: The ONNX file of the body.
        samples: What it was compared on: one array for each of the body's inputs.
        layout: Order of the axes of its inputs and outputs.

    Raises:
        ConversionError: If an island's nodes can't be raised to the file's operator set.
        VerificationError: If the whole does not compute what its parts do.
    """
    joining = Joining(parts, content, layout)
    whole = joining.run()
    joining.compare(whole, samples)
    notes = [
        f"written as in the ONNX file that it came from: `{island.name}` ({island.operator})"
        for island in parts.islands
    ]
    if parts.one_sample:
        notes.append("takes one sample at a time, as the model does")
    notes += [
        f"not compared: {drawing} in `{island.name}` draws random numbers"
        for island in parts.islands
        if (drawing := drawing_in(island))
    ]
    return whole.SerializeToString(deterministic=True), notes


class Joining:
    """Puts the nodes of islands between the nodes of the body.

    Args:
        parts: The model, taken apart.
        content: The ONNX file of the body.
        layout: Order of the axes of its inputs and outputs.
    """

    def __init__(self, parts: Parts, content: bytes, layout: str) -> None:
        import onnx

        self.parts = parts
        self.first = layout == "NCHW"
        self.content = content
        self.message = onnx.ModelProto.FromString(content)
        graph = self.message.graph
        self.version = {opset.domain: opset.version for opset in self.message.opset_import}[""]
        refs = (*parts.taken, *parts.given)
        values = dict(zip(refs, (*graph.input, *graph.output), strict=True))
        tensors = zip(refs, (*parts.body.inputs, *parts.body.outputs), strict=True)
        # Name, type and number of axes of each tensor of the model that the file has, and whether channels are second.
        self.names: dict[Ref, str] = {ref: value.name for ref, value in values.items()}
        self.types = {ref: value.type.tensor_type.elem_type for ref, value in values.items()}
        self.ranks = {ref: len(tensor.shape) for ref, tensor in tensors}
        self.turned = {ref: self.first and rank > 3 for ref, rank in self.ranks.items()}
        self.fed = set(parts.taken[len(parts.model.inputs) :])
        self.nodes: list[Any] = []

    def run(self) -> Any:
        """Return the `onnx.ModelProto`."""
        import onnx

        graph = self.message.graph
        own, inputs, outputs = list(graph.node), list(graph.input), list(graph.output)
        for island in self.parts.islands:
            self._add(island)
        described = {value.name: value for value in (*inputs, *outputs)}
        del graph.node[:], graph.input[:], graph.output[:]
        graph.input.extend(inputs[: len(self.parts.model.inputs)])
        known = {value.name for value in (*graph.input, *graph.initializer)}
        graph.node.extend(_in_order([*own, *self.nodes], known))
        for ref, tensor in zip(self.parts.outputs, self.parts.model.outputs, strict=True):
            name = self.names[ref]
            if name not in described:
                lengths = [BATCH if k == 0 and n is None else n for k, n in enumerate(tensor.shape)]
                lengths = [f"{name}.{k}" if n is None else n for k, n in enumerate(lengths)]
                described[name] = onnx.helper.make_tensor_value_info(name, self.types[ref], lengths)
            graph.output.append(described[name])
        for value in (*graph.input, *graph.output) if self.parts.one_sample else ():
            for length in value.type.tensor_type.shape.dim[:1]:
                if length.dim_param == BATCH:
                    length.dim_value = 1
        try:
            onnx.checker.check_model(self.message)
        except Exception as error:  # it reports in many ways
            raise ConversionError(f"the ONNX graph is not valid: {' '.join(str(error).split())[:300]}") from error
        return self.message

    def _add(self, island: OnnxIsland) -> None:
        from onnx import helper, version_converter

        model = checked(island.content)
        if {opset.version for opset in model.opset_import if opset.domain == ""} != {self.version}:
            try:
                model = version_converter.convert_version(model, self.version)
            except Exception as error:
                text = " ".join(str(error).split())[:200]
                raise ConversionError(
                    f"`{island.name}` ({island.operator}) can't be raised to operator set {self.version}: {text}"
                ) from None
        known = {opset.domain for opset in self.message.opset_import}
        self.message.opset_import.extend(opset for opset in model.opset_import if opset.domain not in known)
        names: dict[str, str] = {}
        for ref, value in zip(self.parts.reads[island.name], model.graph.input, strict=True):
            names[value.name] = self._as_before(ref, value.type.tensor_type.elem_type, f"{island.name}/{value.name}")
        kinds = [helper.np_dtype_to_tensor_dtype(np.dtype(dtype)) for dtype in island.dtypes]

        def rename(name: str) -> str:
            return names.get(name, f"{island.name}/{name}") if name else name

        for ref, value, kind in zip(results_of(island), model.graph.output, kinds, strict=True):
            self._as_the_body(ref, rename(value.name), kind)
        _renamed(model.graph, rename)
        self.nodes.extend(model.graph.node)
        self.message.graph.initializer.extend(model.graph.initializer)

    def _as_before(self, ref: Ref, kind: int, name: str) -> str:
        """Return the name of a tensor with the type and the order of axes that an island takes."""
        from onnx import helper

        found: str = self.names[ref]
        if self.turned[ref]:
            order = channels_first(self.ranks[ref])
            back = [order.index(axis) for axis in range(len(order))]
            self.nodes.append(helper.make_node("Transpose", [found], [f"{name}/plain"], perm=back))
            found = f"{name}/plain"
        if self.types[ref] != kind:
            self.nodes.append(helper.make_node("Cast", [found], [f"{name}/cast"], to=kind))
            found = f"{name}/cast"
        return found

    def _as_the_body(self, ref: Ref, name: str, kind: int) -> None:
        """Name a result of an island, and make of it what the body takes."""
        from onnx import helper

        if ref in self.fed:
            wanted, found = self.names[ref], name
            if self.turned[ref]:
                perm = list(channels_first(self.ranks[ref]))
                self.nodes.append(helper.make_node("Transpose", [found], [f"{name}/turned"], perm=perm))
                found = f"{name}/turned"
            self.nodes.append(helper.make_node("Cast", [found], [wanted], to=self.types[ref]))
        self.names[ref], self.types[ref], self.turned[ref] = name, kind, False

    def compare(self, whole: Any, samples: Sequence[np.ndarray]) -> None:
        """Run the whole file, and each of its parts on what they take in it; but for nodes that draw random numbers.

        Raises:
            VerificationError: If a part alone gives something else.
        """
        import onnx

        watched = type(whole)()
        watched.CopyFrom(whole)
        there = {value.name for value in (*whole.graph.output, *whole.graph.input)}
        body = OnnxRunner(self.content)
        names = [spec.name for spec in (*body.inputs, *body.outputs)]
        islands = self.parts.islands
        ends = {island.name: (self.parts.reads[island.name], results_of(island)) for island in islands}
        names += [self.names[ref] for pair in ends.values() for refs in pair for ref in refs]
        inner = [name for name in dict.fromkeys(names) if name not in there]
        watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in inner)
        runner = OnnxRunner(watched.SerializeToString())
        count = 1 if self.parts.one_sample or any(spec.shape[:1] == (1,) for spec in body.inputs) else 16
        fed = {
            spec.name: np.moveaxis(x[:count], -1, 1) if self.first and x.ndim > 3 else x[:count]
            for spec, x in zip(runner.inputs, samples, strict=False)
        }
        found = dict(zip((spec.name for spec in runner.outputs), runner.run(*fed.values()), strict=True)) | fed
        pairs = [("the rest of the model", body.run(*(found[spec.name] for spec in body.inputs)),
                  [found[spec.name] for spec in body.outputs])]  # fmt: skip
        for island in islands:
            if drawing_in(island):
                continue
            given = [self._moved(found, ref) for ref in ends[island.name][0]]
            results = [found[self.names[ref]] for ref in ends[island.name][1]]
            pairs.append((f"`{island.name}` ({island.operator})", runner_of(island.content).run(*given), results))
        for what, expected, results in pairs:
            shapes = [a.shape for a in expected] == [b.shape for b in results]
            if not shapes or not compare(expected, results, BOUNDS["float32"], reference=what).passed:
                raise VerificationError(
                    f"the whole ONNX file does not compute what {what} does alone; nothing was written"
                )

    def _moved(self, found: Mapping[str, np.ndarray], ref: Ref) -> np.ndarray:
        value = found[self.names[ref]]
        return np.moveaxis(value, 1, -1) if self.turned[ref] else value


def _renamed(graph: Any, rename: Callable[[str], str]) -> None:
    """Rename every tensor and node of a graph, and of the graphs inside of it, in place."""
    for values in (graph.input, graph.output, graph.value_info, graph.initializer):
        for value in values:
            value.name = rename(value.name)
    for message in graph.node:
        message.name = rename(message.name)
        for names in (message.input, message.output):
            names[:] = [rename(name) for name in names]
        for inner in graphs_of(message):
            _renamed(inner, rename)


def _in_order(nodes: Sequence[Any], known: set[str]) -> list[Any]:
    """Return nodes after those that they read."""
    found: list[Any] = []
    waiting = [(node, set(node.input).union(*map(free_names, graphs_of(node))) - {""}) for node in nodes]
    while waiting:
        ready = [node for node, read in waiting if read <= known]
        if not ready:
            raise ConversionError(f"`{waiting[0][0].name}` reads what no node of the ONNX graph makes")
        waiting = [(node, read) for node, read in waiting if not read <= known]
        found += ready
        known = known.union(*(node.output for node in ready))
    return found
