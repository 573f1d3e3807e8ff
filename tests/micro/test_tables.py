"""Look-up tables: the bytes that TensorFlow Lite Micro's own writer makes, and identical outputs."""

from __future__ import annotations

import numpy as np
import pytest
from micro.conftest import clustered

from dwindle.lifting.flatbuffer import parse, read_graph
from dwindle.micro.running import run_micro
from dwindle.micro.stripping import strip
from dwindle.micro.tables import with_tables


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
    made, stored = with_tables(content)
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
    made = strip(with_tables(content)[0], micro_only=True)
    assert len(plain) / len(made) >= 1.6
    np.testing.assert_array_equal(
        run_micro(made, per_tensor_file.samples).outputs[0], run_micro(plain, per_tensor_file.samples).outputs[0]
    )


def test_weights_of_many_values_are_left_alone(cnn_file):
    content = cnn_file.content
    made, stored = with_tables(content)
    names = {weight.name for weight in stored}
    for tensor in read_graph(content).tensors:
        if tensor.value is not None and tensor.dtype == np.int8 and len(np.unique(tensor.value)) > 128:
            assert tensor.name not in names
    assert (made == content) == (not stored)
