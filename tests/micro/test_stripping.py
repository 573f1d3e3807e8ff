"""Stripped files: the same outputs bit for bit in both runtimes, fewer bytes, aligned constants."""

from __future__ import annotations

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

from dwindle.errors import ConfigError
from dwindle.exporting import float_file
from dwindle.lifting.flatbuffer import parse, read_graph, serialize
from dwindle.measuring.litert import LiteRTRunner
from dwindle.micro.running import run_micro
from dwindle.micro.stripping import strip, write
from dwindle.micro.verifying import run_litert


def constants(content: bytes) -> list[bytes]:
    return [tensor.value.tobytes() for tensor in read_graph(content).tensors if tensor.value is not None]


@pytest.mark.parametrize("alignment", [4, 8, 16])
def test_outputs_are_identical_in_both_runtimes(cnn_file, alignment):
    small = strip(cnn_file.content, alignment=alignment)
    for reference in (False, True):
        expected = run_litert(cnn_file.content, cnn_file.samples, reference=reference)[0]
        np.testing.assert_array_equal(run_litert(small, cnn_file.samples, reference=reference)[0], expected)
    assert len(np.unique(expected.argmax(-1))) > 3
    np.testing.assert_array_equal(run_micro(small, cnn_file.samples).outputs[0], expected)
    assert len(small) < len(cnn_file.content) - 1500


@pytest.mark.parametrize("alignment", [4, 8, 16])
def test_constants_are_kept_and_aligned(cnn_file, alignment):
    small = strip(cnn_file.content, alignment=alignment)
    assert sorted(constants(small)) == sorted(constants(cnn_file.content))
    for buffer in parse(small).buffers:
        if buffer.data is not None and len(buffer.data) > 32:
            assert small.find(bytes(buffer.data)) % alignment == 0


def test_nothing_is_left_that_no_runtime_reads(cnn_file):
    model = parse(strip(cnn_file.content))
    assert model.signatureDefs is None
    assert model.metadata is None
    assert model.description is None
    assert all(tensor.name is None and tensor.shapeSignature is None for tensor in model.subgraphs[0].tensors)
    named = strip(cnn_file.content, keep_names=True)
    assert {t.name for t in read_graph(named).tensors} <= {t.name for t in read_graph(cnn_file.content).tensors}


def test_stripping_again_changes_nothing(cnn_file):
    once = strip(cnn_file.content)
    assert strip(once) == once


def test_equal_constants_are_written_once(cnn_file):
    model = parse(cnn_file.content)
    big = max((b for b in model.buffers if b.data is not None), key=lambda b: len(b.data))
    copied = schema.BufferT()
    copied.data = np.array(big.data)
    model.buffers.append(copied)
    tensor = next(t for t in model.subgraphs[0].tensors if model.buffers[t.buffer] is big)
    before = len(serialize(model))
    tensor.buffer = len(model.buffers) - 1
    assert len(serialize(model)) >= before
    assert strip(serialize(model)) == strip(cnn_file.content)


def test_sharing_reads_back_as_the_same_objects(cnn_file, trained):
    for content in (cnn_file.content, float_file(trained)):
        shared = write(parse(content))
        assert len(shared) < len(content)
        # Written plainly again, every object that was shared is there as often as it was.
        assert serialize(parse(shared)) == serialize(parse(content))


def test_micro_only_gives_the_same_in_micro_and_is_smaller(cnn_file):
    plain, small = strip(cnn_file.content), strip(cnn_file.content, micro_only=True)
    assert len(small) < len(plain)
    expected = run_micro(plain, cnn_file.samples)
    np.testing.assert_array_equal(run_micro(small, cnn_file.samples).outputs[0], expected.outputs[0])


def test_the_batch_stays_one(cnn_file):
    assert LiteRTRunner(cnn_file.content).takes_batches
    assert not LiteRTRunner(strip(cnn_file.content)).takes_batches


def test_bad_alignment_is_refused(cnn_file):
    with pytest.raises(ConfigError, match="`alignment` is 3; it must be 4, 8 or 16"):
        strip(cnn_file.content, alignment=3)
