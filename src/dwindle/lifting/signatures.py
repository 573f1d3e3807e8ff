"""The signature of a file's main graph: made where there is none, and kept true where tensors go."""

from __future__ import annotations

from typing import Any

from ai_edge_litert import schema_py_generated as schema

from dwindle.errors import UnsupportedModelError
from dwindle.lifting.flatbuffer import drop_tensors, given_names, integers


def with_signature(model: Any) -> Any:
    """Return the signature of an object tree's main graph; where there is none, one is made, named as in `read_graph`.

    It is the first one afterwards.
    """
    main, given = model.subgraphs[0], list(model.signatureDefs or [])
    found = next((signature for signature in given if signature.subgraphIndex == 0), None)
    if found is None:
        found = schema.SignatureDefT()
        found.signatureKey, found.subgraphIndex = b"serving_default", 0
        names = given_names(model, main)
        for kind in ("inputs", "outputs"):
            setattr(found, kind, [entry(names[index], index) for index in integers(getattr(main, kind))])
    found.inputs, found.outputs = list(found.inputs or []), list(found.outputs or [])
    model.signatureDefs = [found, *(signature for signature in given if signature is not found)]
    return found


def entry(name: str, index: int) -> Any:
    """Return what a signature calls a tensor."""
    found = schema.TensorMapT()
    found.name, found.tensorIndex = name.encode("utf8"), index
    return found


def drop_unread(model: Any) -> None:
    """Drop tensors of the main graph that nothing reads or writes any more, and buffers that no tensor has.

    Raises:
        UnsupportedModelError: If a signature names one of them.
    """
    numbers = drop_tensors(model.subgraphs[0])
    for signature in model.signatureDefs or []:
        if signature.subgraphIndex == 0:
            for named in (*(signature.inputs or ()), *(signature.outputs or ())):
                if named.tensorIndex not in numbers:
                    raise UnsupportedModelError(
                        f"the LiteRT file is damaged (tensor {named.tensorIndex} of its signature is not in its graph)"
                    )
                named.tensorIndex = numbers[named.tensorIndex]
    holders = [*(tensor for graph in model.subgraphs for tensor in graph.tensors or ()), *(model.metadata or ())]
    places = {old: new for new, old in enumerate(sorted({0, *(holder.buffer for holder in holders)}))}
    model.buffers = [model.buffers[old] for old in places]
    for holder in holders:
        holder.buffer = places[holder.buffer]
    model.metadataBuffer = None
