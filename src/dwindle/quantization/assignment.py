"""Which scheme each operator of a float file gets, and what LiteRT can hold in it."""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Sequence
from dataclasses import replace

from dwindle.errors import ConfigError, did_you_mean
from dwindle.lifting.flatbuffer import Graph, Operation, layer_name, short_name
from dwindle.quantization.schemes import SCHEMES, Scheme, without_layers

# The quantizer's names where they differ from the file format's.
QUANTIZER_NAMES = {"TRANSPOSE_CONV": "CONV_2D_TRANSPOSE"}


def names_of(operation: Operation) -> tuple[str, ...]:
    """Return what a user may call an operator: its layer, the parts of its tensors' names, its kind."""
    found = [operation.name, layer_name(operation)]
    kernel = operation.inputs[1] if len(operation.inputs) > 1 else None
    for tensor in (kernel if kernel is not None and kernel.value is not None else None, *operation.outputs):
        if tensor is not None:
            found += [tensor.name, short_name(tensor.name)]
    first = operation.result.split(";")[0]
    found += [part for part in re.split(r"[/:]", first) if part]
    return tuple(dict.fromkeys(found))


def display_names(graph: Graph) -> list[str]:
    """Return one readable name for each operator, unique: the layer's where there is one, else the tensor's."""
    layers = [layer_name(operation) for operation in graph.operations]
    found: list[str] = []
    taken: set[str] = set()
    for name in layers:
        count, shown = 0, name
        while shown in taken or (count and shown in layers):  # a number must not make it another layer's name
            count += 1
            shown = f"{name}_{count}"
        taken.add(shown)
        found.append(shown)
    return found


def pattern_of(graph: Graph, number: int) -> str:
    """Return a pattern for a scheme's layers that matches only this operator: its layer's name where that is enough."""
    shown = display_names(graph)
    every = [(*names_of(operation), name) for operation, name in zip(graph.operations, shown, strict=True)]
    matching = [i for i, names in enumerate(every) if _matches(shown[number], names)]
    return shown[number] if matching == [number] else graph.operations[number].result


def has_weights(operation: Operation) -> bool:
    """Whether an operator has a constant kernel or table of floats."""
    constants = [t for t in operation.inputs[:2] if t is not None and t.value is not None and t.value.dtype.kind == "f"]
    return bool(constants) and constants[0].value is not None and constants[0].value.size > 1


@functools.cache
def holds(kind: str, weights: int, activations: int, dynamic: bool) -> bool:
    """Whether LiteRT has a kernel of this kind with these widths, as the quantizer's policy says."""
    if weights >= 16:
        return True
    if weights == 2 and kind == "CONV_2D":
        return False  # LiteRT 2.3 reads 2-bit weights of a convolution wrongly: its outputs are not finite
    from ai_edge_quantizer import algorithm_manager, qtyping

    from dwindle.quantization.writing import config

    try:
        name = qtyping.TFLOperationName(QUANTIZER_NAMES.get(kind, kind))
        scheme = Scheme(weights=weights, activations=activations, dynamic=dynamic)
        algorithm_manager.check_op_quantization_config(
            algorithm_manager.AlgorithmName.MIN_MAX_UNIFORM_QUANT, name, config(scheme)
        )
    except ValueError:
        return False
    return True


def fitted(scheme: Scheme, operation: Operation) -> Scheme:
    """Return the scheme that an operator really gets: the nearest wider one that LiteRT holds, else float32."""
    block = not isinstance(scheme.granularity, str)
    if block:
        kernel = operation.inputs[1] if len(operation.inputs) > 1 else None
        width = kernel.shape[-1] if kernel is not None and kernel.shape else 1
        if operation.name != "FULLY_CONNECTED" or width % int(scheme.granularity):
            scheme = replace(scheme, granularity="channel", name="")
    for weights in [bits for bits in (2, 4, 8) if bits >= scheme.weights]:
        # A float activation next to an operator without weights means that nothing is quantized there.
        if weights == 2 and not scheme.dynamic:
            continue
        if holds(operation.name, weights, scheme.activations, scheme.dynamic):
            return (
                scheme
                if weights == scheme.weights
                else replace(scheme, weights=weights, granularity="channel", name="")
            )
    return SCHEMES["float32"] if scheme.weights < 16 else scheme


def assign(graph: Graph, scheme: Scheme) -> list[Scheme]:
    """Return the scheme of each operator of a file.

    Args:
        graph: The float file's.
        scheme: The model's, with its layers.

    Raises:
        ConfigError: If a pattern matches nothing, or names an operator that can't have the width.
    """
    asked = _asked(graph, scheme)
    return [fitted(each, operation) for each, operation in zip(asked, graph.operations, strict=True)]


def _asked(graph: Graph, scheme: Scheme) -> list[Scheme]:
    """Return what the user asks for in each operator, whether LiteRT has it or not."""
    every = [
        (names_of(operation), name) for operation, name in zip(graph.operations, display_names(graph), strict=True)
    ]
    chosen = [without_layers(scheme)] * len(every)
    for pattern, inner in scheme.layers:
        hits = [i for i, (names, name) in enumerate(every) if _matches(pattern, (*names, name))]
        if not hits:
            known = sorted({name for _, name in every} | {op.name for op in graph.operations})
            raise ConfigError(
                f"`scheme` has {pattern!r}, which matches no layer or operator of the model; it has "
                f"{', '.join(known[:40])}{', ...' if len(known) > 40 else ''}{did_you_mean(pattern, known)}"
            )
        weighted = [i for i in hits if has_weights(graph.operations[i])]
        refused = [i for i in weighted if fitted(inner, graph.operations[i]).weights != inner.weights]
        if refused and len(refused) == len(weighted) and inner.weights < 16:
            operation = graph.operations[refused[0]]
            kinds = [n for n, s in SCHEMES.items() if s.weights >= 8 and fitted(s, operation).weights == s.weights]
            raise ConfigError(
                f"`scheme` asks for {inner.weights}-bit weights ({inner.name}) in `{every[refused[0]][1]}`, and LiteRT "
                f"has no {operation.name} with them; use one of {', '.join(kinds)} for it"
            )
        for i in hits:
            chosen[i] = inner
    return chosen


def _matches(pattern: str, names: Sequence[str]) -> bool:
    return any(name == pattern or fnmatch.fnmatchcase(name, pattern) for name in names)


def widened(graph: Graph, scheme: Scheme) -> list[str]:
    """Say, one line a kind, which operators get wider weights than was asked for, since LiteRT has no other."""
    found: dict[tuple[str, str], int] = {}
    for operation, asked in zip(graph.operations, _asked(graph, scheme), strict=True):
        given = fitted(asked, operation)
        if has_weights(operation) and asked.weights < given.weights < 32:
            key = (operation.name, f"{given.weights}-bit")
            found[key] = found.get(key, 0) + 1
    return [f"{kind} has {bits} weights ({count}): LiteRT has no narrower" for (kind, bits), count in found.items()]
