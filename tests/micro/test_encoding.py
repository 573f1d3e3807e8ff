"""Encoded weights: identical outputs; tables in the bytes that TensorFlow Lite Micro's own writer makes."""

from __future__ import annotations

import numpy as np
import pytest
from micro.conftest import clustered, pruned

from dwindle.lifting.flatbuffer import parse, read_graph
from dwindle.micro.encoding import encode_weights
from dwindle.micro.running import run_micro
from dwindle.micro.stripping import strip


def official(content: bytes, names: list[str], bits: dict[str, int]) -> bytes:
    """The same tensors compressed by `tflite_micro`."""
    from tflite_micro.tensorflow.lite.micro.compression import compress, spec

    specs = []
    for tensor in read_graph(content).tensors:
        if tensor.name in names:
            channels = tensor.scale.size > 1
            mode = spec.PerChannel(axis=tensor.axis) if channels else spec.PerTensor()
            method = spec.LookUpTableCompression(index_bitwidth=bits[tensor.name], mode=mode)
            specs.append(spec.Tensor(subgraph=0, tensor=tensor.index, compression=[method]))
    return bytes(compress(content, specs))


@pytest.mark.parametrize("kind", ["cnn_file", "per_tensor_file"])
@pytest.mark.parametrize("values", [4, 16])
def test_outputs_are_identical_and_bytes_as_the_official_writer_has_them(kind, values, request):
    file = request.getfixturevalue(kind)
    content = clustered(file.content, values)
    made, stored = encode_weights(content)
    assert len(stored) >= 1
    plain, tabled = run_micro(content, file.samples), run_micro(made, file.samples)
    np.testing.assert_array_equal(tabled.outputs[0], plain.outputs[0])
    assert len(np.unique(plain.outputs[0])) > 5
    reference = official(content, [weight.name for weight in stored], {w.name: w.bits for w in stored})
    np.testing.assert_array_equal(run_micro(reference, file.samples).outputs[0], plain.outputs[0])

    def held(data: bytes) -> set[bytes]:
        return {bytes(buffer.data) for buffer in parse(data).buffers if buffer.data is not None}

    before = held(content)
    assert held(made) - before == held(reference) - before


def test_a_clustered_file_is_at_least_1_6_times_smaller(per_tensor_file):
    content = clustered(per_tensor_file.content, 16)
    plain = strip(content)
    made = strip(encode_weights(content)[0], micro_only=True)
    assert len(plain) / len(made) >= 1.6
    np.testing.assert_array_equal(
        run_micro(made, per_tensor_file.samples).outputs[0], run_micro(plain, per_tensor_file.samples).outputs[0]
    )


@pytest.mark.parametrize("kind", ["cnn_file", "per_tensor_file"])
def test_pruned_weights_are_stored_without_their_zeros(kind, request):
    file = request.getfixturevalue(kind)
    content = pruned(file.content, 0.8)
    made, stored = encode_weights(content)
    hidden = max(stored, key=lambda weight: weight.size_before_bytes)
    assert hidden.encoding == "zeros"
    value = next(t.value for t in read_graph(content).tensors if t.name == hidden.name)
    assert hidden.size_after_bytes == 16 + value.size // 8 + np.count_nonzero(value)
    plain = run_micro(content, file.samples)
    np.testing.assert_array_equal(run_micro(made, file.samples).outputs[0], plain.outputs[0])
    assert len(np.unique(plain.outputs[0])) > 5
    assert len(strip(content)) / len(strip(made, micro_only=True)) > 2


@pytest.mark.parametrize(
    ("values", "sparsity", "encoding"), [(16, 0.5, "table"), (16, 0.9, "zeros"), (2, 0.85, "table")]
)
def test_the_smaller_encoding_is_taken(per_tensor_file, values, sparsity, encoding):
    content = pruned(clustered(per_tensor_file.content, values), sparsity)
    _, stored = encode_weights(content)
    assert max(stored, key=lambda weight: weight.size_before_bytes).encoding == encoding


def test_weights_of_many_values_are_left_alone(cnn_file):
    content = cnn_file.content
    made, stored = encode_weights(content)
    names = {weight.name for weight in stored}
    for tensor in read_graph(content).tensors:
        if tensor.value is not None and tensor.dtype == np.int8 and len(np.unique(tensor.value)) > 128:
            assert np.mean(tensor.value == 0) < 0.1
            assert tensor.name not in names
    assert (made == content) == (not stored)
