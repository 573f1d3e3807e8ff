"""Every kind of file comes back bit for bit; both engines write the same; files are as small as their entropy says."""

from __future__ import annotations

import doctest
import hashlib
import lzma
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from packed_files import FILES, folded, gaussian, litert_file, pack_bytes, pruned, unpack_bytes

import dwindle.packing
from dwindle.errors import ConfigError, ConversionError, DataError, UnsupportedModelError
from dwindle.packing import c_sources, frames, native, pack, unpack
from dwindle.packing.contexts import dictionary
from dwindle.packing.frames import BYTES, LANES, LARGEST_FRAME, MIXED, PLANES, RAW, ROWS, SCALED, TABLE
from dwindle.packing.planning import cut, plan_frame
from dwindle.packing.segments import find_regions


@pytest.mark.parametrize("name", FILES)
def test_a_file_comes_back(name):
    assert unpack_bytes(pack_bytes(FILES[name])) == FILES[name]


@pytest.mark.parametrize("name", ["int8, 90% zeros", "float32, pruned in lanes", "float32, 16 values a row", "int4"])
def test_both_engines_write_the_same(name, compiler, in_python):
    slow = pack_bytes(FILES[name])
    assert unpack_bytes(slow) == FILES[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("DWINDLE_NATIVE")
        native.library.cache_clear()
        assert native.library() is not None
        fast = pack_bytes(FILES[name])
        assert unpack_bytes(slow) == FILES[name]
    native.library.cache_clear()
    assert fast == slow


def test_all_ways_of_coding_are_there():
    """The files above take every branch, so that the tests on them are tests of the whole format."""
    kinds, methods = set(), set()
    for content in FILES.values():
        for pieces in cut(len(content), find_regions(content)):
            begin = pieces[0][0]
            for segment in plan_frame(content[begin : pieces[-1][0] + pieces[-1][1]], begin, pieces):
                kinds.add(segment.kind)
                methods |= {plane.method for plane in segment.planes}
    assert kinds == {BYTES, PLANES, TABLE, SCALED, ROWS}
    assert methods == {RAW, LANES, MIXED}


def test_a_file_of_several_frames():
    content = litert_file(
        ("int8", pruned(gaussian((1500, 1001)), 0.95)), ("float32", np.ones((3, 5), np.float32)),
        ("int8", gaussian((2000, 333), 5.0)),
    )  # fmt: skip
    pieces = list(cut(len(content), find_regions(content)))
    assert len(pieces) == 3
    assert all(sum(length for _, length, _ in frame) <= LARGEST_FRAME for frame in pieces)
    assert pieces[0][0][0] == 0
    assert unpack_bytes(pack_bytes(content)) == content


@pytest.mark.parametrize("seed", range(40))
def test_any_constants_come_back(seed):
    rng = np.random.default_rng(seed)
    kinds = {"int8": np.int8, "uint8": np.uint8, "int16": np.int16, "int32": np.int32, "float32": np.float32,
             "float16": np.float16, "int4": np.uint8, "int2": np.uint8, "int64": np.int64}  # fmt: skip
    constants = []
    for kind in rng.choice(list(kinds), rng.integers(1, 5)):
        shape = tuple(rng.integers(1, 30, rng.integers(1, 4)))
        dtype = np.dtype(kinds[kind])
        raw = rng.integers(0, 256, (int(np.prod(shape)), dtype.itemsize), dtype=np.uint8)
        raw &= np.uint8(rng.choice([0xFF, 0x0F, 0x80, 0x11]))
        raw[rng.random(len(raw)) < rng.choice([0, 0.5, 0.95])] = 0
        constants.append((kind, raw.view(dtype).reshape(shape)))
    content = litert_file(*constants)
    assert unpack_bytes(pack_bytes(content)) == content


def entropy_bytes(values: np.ndarray) -> float:
    """Return the bytes that an ideal code for independent numbers of known frequencies takes."""
    counts = np.unique(values, return_counts=True)[1]
    return float(-(counts * np.log2(counts / counts.sum())).sum() / 8)


WEIGHTS = {
    "dense": (gaussian((400, 500)), 1.01),
    "90% zeros": (pruned(gaussian((400, 500)), 0.9), 1.01),
    "99% zeros": (pruned(gaussian((400, 500)), 0.992), 1.05),
    "16 values": (gaussian((400, 500)) // 12 * 12, 1.01),
    "small, 90% zeros": (pruned(gaussian((40, 100)), 0.9), 1.08),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_take_what_their_entropy_says(name):
    values, bound = WEIGHTS[name]
    structure = len(pack_bytes(litert_file(("int8", np.zeros(values.shape, np.int8)))))
    assert len(pack_bytes(litert_file(("int8", values)))) - structure <= entropy_bytes(values) * bound + 16


def test_rows_of_different_widths_take_less_than_the_entropy_of_all():
    values = np.concatenate([gaussian((300, 300), 3.0), gaussian((300, 300), 40.0, 1)])
    separate = entropy_bytes(values[:300]) + entropy_bytes(values[300:])
    size = len(pack_bytes(litert_file(("int8", values))))
    assert size < 1.02 * separate + 400 < 0.95 * entropy_bytes(values)


def others(content: bytes) -> int:
    """Return the size of the smaller of what zlib and xz make of a file."""
    return min(len(zlib.compress(content, 9)), len(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME)))


@pytest.mark.parametrize(
    ("name", "values", "share"),
    [
        ("int8", gaussian((400, 500)), 0.992),
        ("int8", pruned(gaussian((400, 500)), 0.9), 0.88),
        ("float32", pruned(gaussian((300, 300)).astype(np.float32) * np.float32(0.0173), 0.9), 0.88),
        ("float32", np.random.default_rng(0).normal(size=(300, 300)).astype(np.float32), 0.93),
        ("float32", folded(200, 300, 16), 0.63),
        ("uint8", np.random.default_rng(0).integers(0, 256, (300, 300), dtype=np.uint8), 1.001),
    ],
    ids=["int8", "int8 pruned", "float32 pruned", "float32", "float32 shared and folded", "noise"],
)
def test_smaller_than_zlib_and_xz(name, values, share):
    content = litert_file((name, values))
    assert len(pack_bytes(content)) <= share * others(content)


def test_an_exponent_in_lanes_skips_what_is_known():
    """In a class of one symbol nothing is coded: 90% zeros must not take bytes in the three planes of the mantissa."""
    content = FILES["float32, pruned in lanes"]
    kept = 400 * 300 // 10
    assert len(pack_bytes(content)) < kept * 4 + 400 * 300 * 0.47 / 8 + 600


def test_memory_stays_the_same_for_a_larger_file(compiler):
    peaks = []
    for rows in (4000, 12000):
        content = litert_file(("int8", gaussian((rows, 1000), 6.0)))
        regions = find_regions(content)
        tracemalloc.start()
        from dwindle.packing.container import packed

        size = sum(len(piece) for piece in packed(content, regions, table_bits=16))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert size < len(content)
    assert peaks[1] < 1.1 * peaks[0] < 150e6


def test_files_are_written_and_restored(tmp_path):
    source = tmp_path / "model.tflite"
    source.write_bytes(FILES["int8"])
    seen = []
    packed = pack(source, tmp_path / "new" / "model.dwz", progress=lambda done, every: seen.append((done, every)))
    assert packed.packed_bytes == packed.file.stat().st_size < packed.model_bytes == len(FILES["int8"])
    assert packed.times_smaller == packed.model_bytes / packed.packed_bytes
    assert seen == [(len(FILES["int8"]), len(FILES["int8"]))]
    back = unpack(packed.file, tmp_path / "back.tflite")
    assert back.file.read_bytes() == FILES["int8"]
    assert back.to_dict() == {**packed.to_dict(), "file": str(back.file)}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back.tflite", "model.tflite", "new"]


def test_bad_input_is_named(tmp_path):
    good, out = tmp_path / "good.tflite", tmp_path / "out.dwz"
    good.write_bytes(FILES["int8"])
    (tmp_path / "empty.tflite").write_bytes(b"")
    (tmp_path / "text.tflite").write_text("this is no model")
    (tmp_path / "cut.tflite").write_bytes(FILES["int8"][:60])
    for name, error, words in (
        ("missing.tflite", DataError, "missing.tflite` does not exist"),
        (".", DataError, "is a folder"),
        ("empty.tflite", UnsupportedModelError, "is empty"),
        ("text.tflite", UnsupportedModelError, "does not begin as a LiteRT model"),
        ("cut.tflite", UnsupportedModelError, "truncated or damaged"),
    ):
        with pytest.raises(error, match=words):
            pack(tmp_path / name, out)
    with pytest.raises(ConfigError, match=r"must end in \.dwz"):
        pack(good, tmp_path / "out.zip")
    with pytest.raises(ConfigError, match=r"must end in \.tflite"):
        unpack(good, tmp_path / "out.zip")
    with pytest.raises(DataError, match="does not begin as a packed model"):
        unpack(good, tmp_path / "out.tflite")
    assert not out.exists()
    assert not (tmp_path / "out.tflite").exists()


def test_an_old_file_outlives_a_failure(tmp_path, monkeypatch):
    (tmp_path / "model.tflite").write_bytes(FILES["int8"])
    pack(tmp_path / "model.tflite", tmp_path / "model.dwz")
    damaged = bytearray((tmp_path / "model.dwz").read_bytes())
    damaged[40] ^= 1
    (tmp_path / "damaged.dwz").write_bytes(damaged)
    (tmp_path / "old.tflite").write_bytes(b"precious")
    with pytest.raises(DataError, match=r"damaged\.dwz` can't be unpacked: it is truncated or damaged"):
        unpack(tmp_path / "damaged.dwz", tmp_path / "old.tflite")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConversionError, match="can't be written"):
        pack(tmp_path / "model.tflite", tmp_path / "file" / "model.dwz")
    assert (tmp_path / "old.tflite").read_bytes() == b"precious"
    assert not list(tmp_path.glob(".*"))


def test_a_file_of_version_1_is_read_for_ever():
    """Written when version 1 was fixed: a change of the format, or of the dictionary, needs another version."""
    content = unpack_bytes((Path(__file__).parent / "version1.dwz").read_bytes())
    assert hashlib.sha256(content).hexdigest() == (Path(__file__).parent / "version1.sha256").read_text().strip()


def test_the_dictionary_is_the_one_that_the_specification_names():
    page = (Path(__file__).parents[2] / "docs" / "packing.md").read_text(encoding="utf8")
    assert hashlib.sha256(dictionary()).hexdigest() in page
    assert f"the {len(dictionary())} bytes" in page


def test_the_c_sources_are_shipped():
    header, source, _ = c_sources()
    assert "dwz_unpack" in header.read_text(encoding="utf8")
    assert source.stat().st_size > 10_000
    assert "malloc" not in source.read_text(encoding="utf8")


def test_packing_needs_no_framework(tmp_path):
    (tmp_path / "model.tflite").write_bytes(FILES["int8"])
    code = (
        f"import sys; from dwindle.packing import pack; pack({str(tmp_path / 'model.tflite')!r}, "
        f"{str(tmp_path / 'model.dwz')!r}); print(sorted({{'keras', 'tensorflow', 'torch', 'jax'}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_docstring_examples():
    assert doctest.testmod(dwindle.packing).failed == 0


def test_a_library_that_others_could_have_written_is_not_loaded(tmp_path, monkeypatch, compiler):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.library.cache_clear()
    assert native.library() is not None
    assert len(list((tmp_path / "dwindle").glob("engine-*.so"))) == 1
    (tmp_path / "dwindle").chmod(0o777)
    native.library.cache_clear()
    assert native.library() is None
    assert unpack_bytes(pack_bytes(FILES["int4"])) == FILES["int4"]
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "none"))
    native.library.cache_clear()
    assert native.library() is None
    native.library.cache_clear()


def test_numbers_below_a_byte_are_packed_low_first():
    assert frames.numbers_of(b"\x21\x43", 4).tolist() == [1, 2, 3, 4]
    assert frames.numbers_of(b"\xe4", 2).tolist() == [0, 1, 2, 3]
    assert frames.bytes_of(np.array([1, 2, 3, 4], np.uint8), 4) == b"\x21\x43"
