"""A trained CNN's full-integer file, with samples in its own type."""

from __future__ import annotations

import copy
import dataclasses

import keras
import numpy as np
import pytest

from dwindle.exporting import export
from dwindle.lifting.flatbuffer import parse, read_graph, serialize
from dwindle.measuring.litert import LiteRTRunner, quantize


@dataclasses.dataclass(frozen=True)
class IntegerFile:
    content: bytes
    samples: list[np.ndarray]


def integer_file(model, digits, folder, scheme="int8", count=24) -> IntegerFile:
    (x_train, _), (x_test, _) = digits
    export(model, folder / "model.tflite", scheme=scheme, data=x_train[:200], io_type="int8")
    content = (folder / "model.tflite").read_bytes()
    return IntegerFile(content, [quantize(x_test[:count], LiteRTRunner(content).inputs[0])])


@pytest.fixture(scope="session")
def cnn_file(trained, digits, tmp_path_factory) -> IntegerFile:
    return integer_file(trained, digits, tmp_path_factory.mktemp("cnn"))


@pytest.fixture(scope="session")
def per_tensor_file(trained, digits, tmp_path_factory) -> IntegerFile:
    from dwindle.quantization import SCHEMES

    scheme = dataclasses.replace(SCHEMES["int8"], granularity="tensor")
    return integer_file(trained, digits, tmp_path_factory.mktemp("per_tensor"), scheme)


def clustered(content: bytes, values: int = 16) -> bytes:
    """Return the file with each kernel's integers rounded to that many, evenly spaced."""
    model = copy.deepcopy(parse(content))
    grid = np.linspace(-127, 127, values).round().astype(int)
    for operation in read_graph(content).operations:
        kernel = operation.inputs[1] if len(operation.inputs) > 1 else None
        if kernel is None or kernel.value is None or kernel.dtype != np.int8 or kernel.value.ndim < 2:
            continue
        nearest = grid[np.abs(kernel.value.astype(int)[..., None] - grid).argmin(-1)].astype(np.int8)
        model.buffers[kernel.buffer].data = np.frombuffer(nearest.tobytes(), np.uint8)
    return serialize(model)


def pruned(content: bytes, sparsity: float) -> bytes:
    """Return the file with the smallest values of each kernel set to 0."""
    model = copy.deepcopy(parse(content))
    for operation in read_graph(content).operations:
        kernel = operation.inputs[1] if len(operation.inputs) > 1 else None
        if kernel is None or kernel.value is None or kernel.dtype != np.int8 or kernel.value.ndim < 2:
            continue
        flat = kernel.value.ravel().copy()
        order = np.argsort(np.abs(flat.astype(np.float64)), kind="stable")
        flat[order[: int(sparsity * flat.size)]] = 0
        model.buffers[kernel.buffer].data = np.frombuffer(flat.tobytes(), np.uint8)
    return serialize(model)


@pytest.fixture(scope="session")
def rows(digits):
    """A recurrent model over the rows of digits, trained, and digits as sequences of shape ``(n, 28, 28)``."""
    from micro.test_streaming import whole_model

    (x_train, y_train), (x_test, _) = digits
    keras.utils.set_random_seed(0)
    model = whole_model()
    model.compile(keras.optimizers.Adam(5e-3), "sparse_categorical_crossentropy")
    labels = np.repeat(y_train[:, None], 28, axis=1)
    model.fit(x_train[..., 0], labels, epochs=3, batch_size=64, verbose=0)
    return model, x_test[..., 0]
