"""Finding what is worth a model of its own in a LiteRT file: constants, and vectors of scales and zero points."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from dwindle.errors import UnsupportedModelError

# Shorter ones stay with the bytes around them.
SHORTEST_BYTES = 48


class Region(NamedTuple):
    """A vector or tensor at some place of a file.

    Attributes:
        start: Its first byte.
        size: Its bytes.
        bits: Bits of one number: 2, 4, 8, 16, 32 or 64.
        is_float: Whether its numbers are floating-point.
        row: Numbers in a row, along the axis that scales do not run along.
    """

    start: int
    size: int
    bits: int
    is_float: bool
    row: int


def find_regions(content: Any) -> list[Region]:
    """Return the regions of a file, none overlapping, in the order of their places.

    Args:
        content: The file's bytes, or a memory map of it.

    Raises:
        UnsupportedModelError: If it is no LiteRT file, or a broken one.
    """
    from ai_edge_litert import schema_py_generated as schema

    if len(content) < 8 or content[4:8] != b"TFL3":
        raise UnsupportedModelError(
            f"the file does not begin as a LiteRT model does (`TFL3` at byte 4, found {bytes(content[4:8])!r}); "
            "pass a .tflite file"
        )
    try:
        found = _Finder(schema, content).regions()
    except Exception as error:  # the reader fails on broken bytes in ways that it does not name
        raise UnsupportedModelError(f"the LiteRT file is truncated or damaged ({type(error).__name__})") from None
    found.sort()
    result: list[Region] = []
    end = 0
    for region in found:
        if region.start >= end and region.start + region.size <= len(content) and region.size >= SHORTEST_BYTES:
            result.append(region)
            end = region.start + region.size
    return result


class _Finder:
    def __init__(self, schema: Any, content: Any) -> None:
        self._model = schema.Model.GetRootAs(content, 0)
        kinds = schema.TensorType
        self._bits = {
            getattr(kinds, name): bits
            for bits, names in ((2, "INT2"), (4, "INT4"), (8, "INT8 UINT8 BOOL"), (16, "INT16 UINT16 FLOAT16 BFLOAT16"),
                                (32, "INT32 UINT32 FLOAT32"), (64, "INT64 UINT64 FLOAT64"))
            for name in names.split() if hasattr(kinds, name)
        }  # fmt: skip
        floats = "FLOAT16", "BFLOAT16", "FLOAT32", "FLOAT64"
        self._floats = {getattr(kinds, name) for name in floats if hasattr(kinds, name)}

    def regions(self) -> list[Region]:
        """Return them all, in any order; the same one may be there twice."""
        result = []
        for number in range(self._model.SubgraphsLength()):
            graph = self._model.Subgraphs(number)
            for index in range(graph.TensorsLength()):
                tensor = graph.Tensors(index)
                result += self._constant(tensor)
                quantization = tensor.Quantization()
                if quantization is not None:
                    table = quantization._tab
                    # Fields `scale` and `zero_point` of `QuantizationParameters` in LiteRT's schema.
                    result += _vector(table, 8, 4, 32, True)
                    result += _vector(table, 10, 8, 64, False)
        return result

    def _constant(self, tensor: Any) -> list[Region]:
        bits = self._bits.get(tensor.Type())
        buffer = self._model.Buffers(tensor.Buffer())
        if bits is None or buffer is None:
            return []
        if buffer.Offset() > 1:
            start, size = buffer.Offset(), buffer.Size()
        else:
            data = buffer._tab.Offset(4)  # field `data` of `Buffer`
            if not data:
                return []
            start, size = buffer._tab.Vector(data), buffer.DataLength()
        shape = [tensor.Shape(i) for i in range(tensor.ShapeLength())]
        size -= size % max(bits // 8, 1)
        return [Region(start, size, bits, tensor.Type() in self._floats, _row(shape, tensor.Quantization()))]


def _row(shape: list[int], quantization: Any) -> int:
    numbers = int(np.prod(shape, dtype=np.float64)) if shape else 1
    axis = quantization.QuantizedDimension() if quantization is not None else 0
    # A depthwise kernel has its channels last: its rows are those of one place.
    row = shape[axis] if 0 < axis < len(shape) else numbers // max(shape[0], 1) if shape else 1
    return min(max(row, 1), 1 << 20)


def _vector(table: Any, field: int, size: int, bits: int, is_float: bool) -> list[Region]:
    place = table.Offset(field)
    if not place:
        return []
    return [Region(table.Vector(place), table.VectorLen(place) * size, bits, is_float, 1 << 20)]
