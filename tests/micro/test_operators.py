"""The table of operators against the interpreter that `tflite-micro` ships."""

from __future__ import annotations

import subprocess
import sys

import keras
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

from dwindle.errors import UnsupportedModelError
from dwindle.exporting import float_file
from dwindle.lifting.flatbuffer import serialize
from dwindle.micro.operators import RESOLVER, check_operators, operators_of, resolver_calls

BUILTIN = {name: code for name, code in vars(schema.BuiltinOperator).items() if not name.startswith("_")}
ASK = """
import pathlib, sys
from tflite_micro import runtime
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    print("FILE", path.name, file=sys.stderr, flush=True)
    try:
        runtime.Interpreter.from_bytes(path.read_bytes(), arena_size=100_000)
    except RuntimeError:
        pass
"""


def file_of(*operators: tuple[int, bytes | None]) -> bytes:
    model, graph = schema.ModelT(), schema.SubGraphT()
    model.version, model.buffers, model.operatorCodes, model.subgraphs = 3, [schema.BufferT()], [], [graph]
    graph.tensors, graph.operators = [], []
    for _ in range(2):
        tensor = schema.TensorT()
        tensor.shape, tensor.type, tensor.buffer = np.array([1, 4], np.int32), schema.TensorType.FLOAT32, 0
        graph.tensors.append(tensor)
    graph.inputs, graph.outputs = np.array([0], np.int32), np.array([1], np.int32)
    for number, (builtin, custom) in enumerate(operators):
        code, operation = schema.OperatorCodeT(), schema.OperatorT()
        code.builtinCode, code.deprecatedBuiltinCode, code.customCode = builtin, min(builtin, 127), custom
        operation.opcodeIndex, operation.inputs, operation.outputs = number, graph.inputs, graph.outputs
        if builtin == schema.BuiltinOperator.VAR_HANDLE:
            operation.builtinOptionsType = schema.BuiltinOptions.VarHandleOptions
            operation.builtinOptions = schema.VarHandleOptionsT()
        model.operatorCodes.append(code)
        graph.operators.append(operation)
    return serialize(model)


def known_to_interpreter(names: list[str], folder) -> set[str]:
    """The interpreter looks operators up one after the other; it has the first if it stumbles over the second."""
    folder.mkdir()
    absent = (BUILTIN["HASHTABLE"], None)
    for number, name in enumerate(names):
        custom = name.removeprefix("CUSTOM:").encode() if name.startswith("CUSTOM:") else None
        first = (BUILTIN["CUSTOM"], custom) if custom else (BUILTIN[name], None)
        (folder / f"{number:03d}").write_bytes(file_of(first, absent))
    done = subprocess.run([sys.executable, "-c", ASK, str(folder)], capture_output=True, text=True, check=True)
    said = dict(part.split("\n", 1) for part in done.stderr.split("FILE ")[1:])
    assert len(said) == len(names)
    found = {name for number, name in enumerate(names) if "'HASHTABLE'" in said[f"{number:03d}"]}
    return found - {"HASHTABLE"}


def test_the_table_has_just_the_operators_of_the_interpreter(tmp_path):
    names = [name for name in BUILTIN if name not in ("CUSTOM", "PLACEHOLDER_FOR_GREATER_OP_CODES", "DELEGATE")]
    table = {name for name in RESOLVER if not name.startswith("CUSTOM:")}
    assert known_to_interpreter(names, tmp_path / "files") == table


def test_a_lacking_operator_is_named_with_its_layers():
    layers = keras.layers
    model = keras.Sequential(
        [keras.Input((4, 4, 4, 1)), layers.Conv3D(2, 2, name="volume"), layers.Conv3D(2, 2, name="second"),
         layers.Flatten(), layers.Dense(3, name="last")], name="scanner",
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError, match=r"`scanner`.*no operator `CONV_3D` \(layers `volume`, `second`\)"):
        check_operators(float_file(model), "`scanner`")


def test_an_unknown_custom_operator_is_named():
    with pytest.raises(UnsupportedModelError, match="no operator `FlexErf`"):
        check_operators(file_of((BUILTIN["CUSTOM"], b"FlexErf")))


def test_resolver_calls_are_those_of_the_operators(cnn_file):
    assert operators_of(cnn_file.content) == ("CONV_2D", "FULLY_CONNECTED", "MAX_POOL_2D", "RESHAPE", "SOFTMAX")
    calls = ("AddConv2D", "AddFullyConnected", "AddMaxPool2D", "AddReshape", "AddSoftmax")
    assert resolver_calls(cnn_file.content) == calls
