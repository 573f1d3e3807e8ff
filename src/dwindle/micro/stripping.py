"""Smaller flatbuffers: what no runtime reads is left out, and what is there twice is written once."""

from __future__ import annotations

import copy
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from dwindle.errors import ConfigError
from dwindle.lifting.flatbuffer import drop_tensors, operator_name, parse

ALIGNMENTS = (4, 8, 16)


def strip(content: bytes, *, alignment: int = 16, keep_names: bool = False, micro_only: bool = False) -> bytes:
    """Return a file that computes the same in fewer bytes.

    Left out: names, signatures, metadata, descriptions, shape signatures (so the batch stays 1), recorded
    minima and maxima, and tensors, buffers and operator codes that nothing uses. Written once: constants with the same
    bytes, and every table, string and vector of numbers of the flatbuffer that is there twice.

    Args:
        content: A ``.tflite`` file.
        alignment: Constants begin at multiples of this many bytes: 16 is what the schema asks for and accelerators and
            vector instructions count on; 8 and 4 save padding, and serve the reference kernels and CMSIS-NN. Never
            less than a value's own size.
        keep_names: Keep the tensors' names.
        micro_only: Leave out too what LiteRT asks for and TensorFlow Lite Micro does not: scales of biases, which are
            those of input and weight multiplied, and zero points for each channel, which are all 0.

    Raises:
        ConfigError: If ``alignment`` is not 4, 8 or 16.
        UnsupportedModelError: If it is no LiteRT file, or a broken one.
    """
    if alignment not in ALIGNMENTS:
        raise ConfigError(f"`alignment` is {alignment!r}; it must be 4, 8 or 16")
    model = copy.deepcopy(parse(content))
    model.description = model.metadata = model.metadataBuffer = model.signatureDefs = None
    if hasattr(model, "externalBufferGroups"):
        model.externalBufferGroups = model.externalBuffers = None
    for graph in model.subgraphs:
        graph.name = None
        graph.debugMetadataIndex = -1
        drop_tensors(graph)
        for tensor in graph.tensors:
            _strip_tensor(tensor, keep_names=keep_names)
        if micro_only:
            _strip_scales(model, graph)
        for operation in graph.operators or []:
            operation.debugMetadataIndex = -1
            operation.mutatingVariableInputs = None
    _share_codes(model)
    _share_buffers(model)
    return write(model, alignment=alignment)


def _strip_tensor(tensor: Any, *, keep_names: bool) -> None:
    tensor.name = tensor.name if keep_names else None
    tensor.shapeSignature = None
    found = tensor.quantization
    if found is None:
        return
    found.min = found.max = None
    if found.scale is None or not len(found.scale):
        if not getattr(found, "details", None):
            tensor.quantization = None
    elif len(found.scale) == 1:
        found.quantizedDimension = 0


# Operators whose third input is a bias that takes its scale from the first two.
_BIASED = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")


def _strip_scales(model: Any, graph: Any) -> None:
    for operation in graph.operators or []:
        if operator_name(model, operation) in _BIASED and len(operation.inputs) > 2 and operation.inputs[2] >= 0:
            bias = graph.tensors[operation.inputs[2]]
            if model.buffers[bias.buffer].data is not None:
                bias.quantization = None
    for tensor in graph.tensors:
        found = tensor.quantization
        points = None if found is None or found.zeroPoint is None else np.asarray(found.zeroPoint)
        if points is not None and len(points) > 1 and not points.any():
            found.zeroPoint = np.zeros(1, np.int64)


def _share_codes(model: Any) -> None:
    """Write each operator once among the codes."""
    codes: list[Any] = []
    numbers: dict[Any, int] = {}
    for graph in model.subgraphs:
        for operation in graph.operators or []:
            code = model.operatorCodes[operation.opcodeIndex]
            code.builtinCode = max(int(code.builtinCode or 0), int(code.deprecatedBuiltinCode or 0))
            key = (code.builtinCode, code.customCode, code.version)
            if key not in numbers:
                numbers[key] = len(codes)
                codes.append(code)
            operation.opcodeIndex = numbers[key]
    model.operatorCodes = codes


def _share_buffers(model: Any) -> None:
    """Write each constant once, and drop buffers that nothing uses; buffer 0 stays empty, as the schema asks."""
    buffers = [schema.BufferT()]
    numbers: dict[bytes, int] = {b"": 0}
    for graph in model.subgraphs:
        for tensor in graph.tensors:
            data = model.buffers[tensor.buffer].data
            key = b"" if data is None else bytes(np.asarray(data, np.uint8))
            if key not in numbers:
                numbers[key] = len(buffers)
                buffer = schema.BufferT()
                buffer.data = np.frombuffer(key, np.uint8)
                buffers.append(buffer)
            tensor.buffer = numbers[key]
    model.buffers = buffers


def write(model: Any, *, alignment: int = 16) -> bytes:
    """Return the bytes of an object tree, equal tables and vectors of numbers written once, constants aligned."""
    builder = _SharingBuilder(alignment, model)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())


class _SharingBuilder(flatbuffers.Builder):
    """A builder that gives back an earlier table, vector of numbers or string where the new one would be equal.

    A flatbuffer is read only and its references are relative offsets, so several may lead to one place. The fields of a
    table are written once all are known, the widest first, which leaves no gaps between them.
    """

    def __init__(self, alignment: int, model: Any) -> None:
        super().__init__(1 << 16)
        self._alignment = alignment
        self._constants = {id(buffer.data) for buffer in model.buffers if buffer.data is not None}
        self._made: dict[Any, int] = {}
        self._begin = 0
        self._fields: list[tuple[int, Any, Any]] = []  # slot, type of number (None for a reference), value
        self._numbers: tuple[int, int] | None = None  # size of one and alignment, while a vector of numbers is made
        self._least = 1

    def StartObject(self, numfields: int) -> None:
        self._fields = []
        super().StartObject(numfields)

    def PrependSlot(self, flags: Any, o: int, x: Any, d: Any) -> None:
        if x is not None and x != d:
            self._fields.append((o, flags, x))

    def PrependUOffsetTRelativeSlot(self, o: int, x: int, d: int) -> None:
        if x != d:
            self._fields.append((o, None, x))

    def PrependStructSlot(self, v: int, x: int, d: int) -> None:
        raise NotImplementedError("the schema has no structs")

    def EndObject(self) -> int:
        key = ("table", *((slot, kind and kind.__name__, repr(value)) for slot, kind, value in self._fields))
        if key in self._made:
            self.nested, self.current_vtable = False, None
            return self._made[key]
        for slot, kind, value in sorted(self._fields, key=lambda field: -(field[1].bytewidth if field[1] else 4)):
            if kind is None:
                super().PrependUOffsetTRelativeSlot(slot, value, 0)
            else:
                super().PrependSlot(kind, slot, value, None)
        self._made[key] = int(super().EndObject())
        return self._made[key]

    def StartVector(self, elemSize: int, numElems: int, alignment: int) -> int:
        self._begin = self.Offset()
        alignment = max(alignment, self._least)
        self._numbers = (elemSize, alignment)
        return int(super().StartVector(elemSize, numElems, alignment))

    def PrependUOffsetTRelative(self, off: int) -> None:
        self._numbers = None
        super().PrependUOffsetTRelative(off)

    def EndVector(self, *args: Any) -> int:
        count, kind = int(self.vectorNumElems or 0), self._numbers
        self._numbers = None
        place = int(super().EndVector(*args))
        if kind is None:
            return place
        first = len(self.Bytes) - place
        key = ("vector", kind, bytes(self.Bytes[first : first + 4 + kind[0] * count]))
        if key in self._made:
            self.head = len(self.Bytes) - self._begin
        return self._made.setdefault(key, place)

    def CreateNumpyVector(self, x: np.ndarray) -> int:
        self._least = self._alignment if id(x) in self._constants and x.size else 1
        place = int(super().CreateNumpyVector(x))
        self._least = 1
        return place

    def CreateString(self, s: Any, encoding: str = "utf-8", errors: str = "strict") -> int:
        key = ("string", s)
        if key not in self._made:
            self._made[key] = int(super().CreateString(s, encoding, errors))
        return self._made[key]
