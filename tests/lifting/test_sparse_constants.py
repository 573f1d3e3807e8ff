"""Sparse constants in every layout of the format, against arrays built by hand."""

from __future__ import annotations

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

import dwindle as dw
from dwindle.exporting.sparse import _parameters, encode
from dwindle.lifting.sparse_constants import densify


def level(size=None, segments=None, indices=None):
    made = schema.DimensionMetadataT()
    if size is not None:
        made.format, made.denseSize = schema.DimensionType.DENSE, size
        return made
    made.format = schema.DimensionType.SPARSE_CSR
    made.arraySegments, made.arrayIndices = schema.Int32VectorT(), schema.Int32VectorT()
    made.arraySegments.values, made.arrayIndices.values = segments, indices
    return made


def parameters(order, blocks, *levels):
    made = schema.SparsityParametersT()
    made.traversalOrder, made.blockMap, made.dimMetadata = order, blocks, list(levels)
    return made


MATRIX = np.array([[0, 5, 0, 6], [0, 0, 0, 0], [7, 0, 0, 8]], np.float32)


@pytest.mark.parametrize(
    ("layout", "values"),
    [
        (parameters([0, 1], [], level(3), level(segments=[0, 2, 2, 4], indices=[1, 3, 0, 3])), [5, 6, 7, 8]),
        (parameters([1, 0], None, level(4), level(segments=[0, 1, 2, 2, 4], indices=[2, 0, 0, 2])), [7, 5, 6, 8]),
        (parameters([0, 1], [], level(segments=[0, 2], indices=[0, 2]), level(4)), [0, 5, 0, 6, 7, 0, 0, 8]),
        (
            parameters([0, 1], [], level(segments=[0, 2], indices=[0, 2]), level(segments=[0, 2, 4], indices=[1, 3, 0, 3])),
            [5, 6, 7, 8],
        ),
        (
            parameters([0, 1, 2], [1], level(3), level(segments=[0, 2, 2, 4], indices=[0, 1, 0, 1]), level(2)),
            [0, 5, 0, 6, 7, 0, 0, 8],
        ),
    ],
)  # fmt: skip
def test_every_layout_is_the_matrix(layout, values):
    np.testing.assert_array_equal(densify(layout, np.array(values, np.float32), (3, 4)), MATRIX)


def test_what_is_written_is_read():
    generator = np.random.default_rng(0)
    for shape in ((6, 40), (8, 3, 3, 16), (4, 1, 1, 64)):
        weight = generator.normal(size=shape).astype(np.float32) * (generator.random(shape) > 0.8)
        found = encode(weight)
        np.testing.assert_array_equal(densify(_parameters(found, shape), found.values, shape), weight)


def test_damaged_ones_are_refused_before_litert_sees_them():
    rows = level(segments=[0, 2, 2, 4], indices=[1, 3, 0, 3])
    with pytest.raises(ValueError, match="3 values for 4 places"):
        densify(parameters([0, 1], [], level(3), rows), np.ones(3, np.float32), (3, 4))
    with pytest.raises(IndexError):
        densify(parameters([0, 1], [], level(3), rows), np.ones(4, np.float32), (3, 2))
    inner = level(segments=[0, 1, 1, 2, 2, 3, 4], indices=[1, 1, 0, 1])
    with pytest.raises(ValueError, match="compressed inside"):
        densify(parameters([0, 1, 2], [1], level(3), level(2), inner), np.ones(4, np.float32), (3, 4))


def test_a_sparse_file_that_was_cut_is_refused(tmp_path, trained):
    made = dw.export(dw.finalize(dw.prune(trained, 0.9)), tmp_path / "m.tflite", sparse=True)
    content = bytearray(made.path.read_bytes())
    (tmp_path / "cut.tflite").write_bytes(content[: len(content) // 2])
    with pytest.raises(dw.UnsupportedModelError, match="truncated or damaged"):
        dw.inspect_file(tmp_path / "cut.tflite")
