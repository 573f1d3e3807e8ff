"""Damaged and hostile packed files: one clear error or the right model, in Python and in C, and nothing else."""

from __future__ import annotations

import os
import random
import subprocess
import time
import tracemalloc

import numpy as np
import pytest
from packed_files import FILES, gaussian, litert_file, pack_bytes, pruned, sealed, unpack_bytes

from dwindle.errors import DataError
from dwindle.packing.container import MAGIC, varint
from dwindle.packing.engines import PythonEngine

SANITIZERS = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
SMALL = ("int8", "int4", "float32, 16 values a row", "float32 with odd numbers", "scales of biases", "int64",
         "int8 rows of two widths", "float32, pruned in lanes")  # fmt: skip


def restored_in_c(program, files: list[bytes], folder) -> list[tuple[int, bytes]]:
    """Return the C decoder's status for each file, and what it restored."""
    given, found = folder / "given", folder / "found"
    given.write_bytes(b"".join(len(file).to_bytes(4, "little") + file for file in files))
    # The leak check needs rights that a container may not give; nothing is allocated in the decoder.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run([program, given, found], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    content, result, place = found.read_bytes(), [], 0
    for _ in files:
        status = int.from_bytes(content[place : place + 4], "little")
        place += 4
        model = b""
        if status == 0:
            size = int.from_bytes(content[place : place + 4], "little")
            model = content[place + 4 : place + 4 + size]
            place += 4 + size
        result.append((status, model))
    assert place == len(content)
    return result


def restored_in_python(file: bytes) -> bytes | None:
    """Return what Python restores, or None for its error."""
    try:
        return unpack_bytes(file)
    except DataError as error:
        said = str(error)
    assert "\n" not in said
    assert 10 < len(said) < 160
    return None


def test_the_c_decoder_restores_every_file(built, tmp_path):
    program = built("restore", "-O2", "-Wconversion")
    found = restored_in_c(program, [pack_bytes(content) for content in FILES.values()], tmp_path)
    assert found == [(0, content) for content in FILES.values()]


def mutations(content: bytes, count: int, seed: int) -> list[bytes]:
    """Return damaged copies whose checksum at the end is right, so that a decoder has to look at them."""
    rng = random.Random(seed)
    result = []
    for _ in range(count):
        damaged = bytearray(content)
        kind = rng.randrange(5)
        place = rng.randrange(4, len(damaged) - 4)
        if kind == 0:
            damaged[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            for _ in range(rng.randrange(1, 20)):
                damaged[rng.randrange(4, len(damaged) - 4)] = rng.randrange(256)
        elif kind == 2:
            del damaged[place : place + rng.randrange(1, 40)]
        elif kind == 3:
            damaged[place:place] = rng.randbytes(rng.randrange(1, 9))
        else:
            damaged[4 : 4 + rng.randrange(1, 16)] = rng.randbytes(rng.randrange(1, 16))
        damaged += bytes(max(0, 12 - len(damaged)))
        result.append(sealed(bytes(damaged)))
    return result


def test_python_and_c_agree_on_hostile_files_and_nothing_is_touched_outside(built, tmp_path):
    program = built("restore-checked", *SANITIZERS)
    files = [file for seed, name in enumerate(SMALL) for file in mutations(pack_bytes(FILES[name]), 60, seed)]
    noise = random.Random(5)
    files += [sealed(MAGIC + noise.randbytes(noise.randrange(5, 300))) for _ in range(60)]
    in_c = restored_in_c(program, files, tmp_path)
    for file, (status, model) in zip(files, in_c, strict=True):
        in_python = restored_in_python(file)
        assert (in_python is not None) == (status == 0)
        if in_python is not None:
            assert in_python == model
    assert sum(status == 0 for status, _ in in_c) < len(files) // 10


def test_the_python_engine_agrees_too(in_python):
    for seed, name in enumerate(("int4", "scales of biases")):
        packed = pack_bytes(FILES[name])
        for file in mutations(packed, 10, seed):
            assert restored_in_python(file) in (None, FILES[name])


def test_every_truncation_is_an_error():
    packed = pack_bytes(FILES["scales of biases"])
    for size in range(len(packed)):
        assert restored_in_python(packed[:size]) is None
        if size >= 9:
            assert restored_in_python(sealed(packed[:size])) is None


def test_every_flipped_bit_is_an_error():
    packed = pack_bytes(FILES["scales of biases"])
    for place in range(len(packed)):
        for bit in range(8):
            damaged = bytearray(packed)
            damaged[place] ^= 1 << bit
            assert restored_in_python(bytes(damaged)) is None


def test_bytes_behind_the_end_are_an_error():
    packed = pack_bytes(FILES["int4"])
    assert restored_in_python(packed + b"\0") is None
    assert restored_in_python(sealed(packed[:-4] + bytes(9))) is None


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "does not begin as a packed model"),
        (b"PK\3\4" + bytes(40), "does not begin as a packed model"),
        (b"DWZ", "version"),
        (b"DWZ\x02" + bytes(40), "version 2"),
        (MAGIC, "truncated or damaged"),
        (MAGIC + varint(1 << 62) + bytes([16]) + varint(1 << 61) + bytes(9), "larger than what is left"),
        (MAGIC + varint(1 << 62) + bytes([16]) + varint(1 << 20) + varint(1 << 60) + varint(0) + bytes(8), "takes"),
        (MAGIC + varint(1 << 40) + bytes([16]) + varint(1 << 20) + varint(100) + varint(100) + bytes(8), "truncated"),
        (MAGIC + varint(9) + bytes([63]) + bytes(9), r"2\^63 cells"),
        (MAGIC + b"\xff" * 12 + bytes(9), "63 bits"),
        (MAGIC + varint(9) + bytes([16]) + varint(0) + bytes(8), "holds 0 of 9"),
    ],
)  # fmt: skip
def test_bogus_sizes_are_named_and_take_no_memory(content, words):
    tracemalloc.start()
    with pytest.raises(DataError, match=words):
        unpack_bytes(sealed(content) if len(content) > 8 else content)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60e6


def frame(size: int, *calls: tuple) -> bytes:
    """Return a file of one frame that was made call by call, as no encoder would."""
    engine = PythonEngine(12)
    engine.start_encoding()
    for name, *arguments in calls:
        getattr(engine, name)(*arguments)
    coded = engine.finish()
    content = MAGIC + varint(size) + bytes([12]) + varint(size) + varint(len(coded)) + varint(0) + coded
    return sealed(content + varint(0) + bytes(8))


def planes(bits: int, row: int, rotated: int = 0) -> list[tuple]:
    return [("number", 0, 1), ("number", 1, 39), ("number", 2, bits), ("number", 4, row - 1), ("bit", 3, 0, rotated)]


def table(kind: int, bits: int, row: int, distinct: int) -> list[tuple]:
    header = [("number", 0, kind), ("number", 1, 39), ("number", 2, bits), ("number", 4, row - 1)]
    return [*header, ("number", 8, distinct - 1), *[("plain", (4, 8, 16, 32)[bits - 1], i) for i in range(distinct)]]


LANES_OF_ONE_CLASS = [("number", 5, 1), ("number", 6, 2), ("number", 7, 0)]
NONSENSE = {
    "nothing": [],
    "an unknown kind": [("number", 0, 5), ("number", 1, 39)],
    "more than the frame": [("number", 0, 0), ("number", 1, 40)],
    "a number without end": [("bit", 0, i, 1) for i in range(32)],
    "an unknown width": planes(6, 4),
    "half a number": [("number", 0, 1), ("number", 1, 38), ("number", 2, 3)],
    "a sign apart in a byte": planes(2, 4, 1),
    "an unknown method": [*planes(2, 4), ("number", 5, 3)],
    "no context": [*planes(2, 4), ("number", 5, 2), ("plain", 3, 0), ("plain", 8, 0)],
    "too many lanes": [*planes(2, 4), ("number", 5, 1), ("number", 6, 11), ("number", 7, 0)],
    "too many classes": [*planes(2, 4), ("number", 5, 1), ("number", 6, 2), ("number", 7, 16)],
    "a class that is not there": [
        *planes(2, 4),
        ("number", 5, 1),
        ("number", 6, 2),
        ("number", 7, 1),
        ("chain", 16, 0, 4, np.array([2])),
    ],
    "a level that is not there": [*planes(2, 4), *LANES_OF_ONE_CLASS, ("chain", 32, 2, 6, np.array([63]))],
    "a table without frequencies": [*planes(2, 4), *LANES_OF_ONE_CLASS, ("chain", 32, 2, 6, np.zeros(256, int))],
    "raw bytes that are not there": [*planes(2, 4), ("number", 5, 0)],
    "raw half bytes": [*planes(1, 4), ("number", 5, 0)],
    "a table of 257": table(1 + 1, 2, 4, 257),
    "a table of half bytes": table(2, 1, 4, 3),
    "rows of bytes": table(4, 2, 4, 3),
    "rows shorter than their table": table(4, 4, 4, 5),
    "a vector before the frame": [("number", 0, 3), ("number", 1, 39), ("number", 4, 80), ("plain", 32, 1 << 29)],
    "a vector in itself": [("number", 0, 3), ("number", 1, 39), ("number", 4, 0), ("plain", 32, 1 << 29)],
}


def test_nonsense_with_right_checksums_is_an_error(built, tmp_path):
    files = [frame(40, *calls) for calls in NONSENSE.values()]
    in_c = restored_in_c(built("restore-nonsense", *SANITIZERS), files, tmp_path)
    for name, file, (status, _) in zip(NONSENSE, files, in_c, strict=True):
        assert restored_in_python(file) is None, name
        assert status == 4, name


def test_much_for_little_is_quick(built, tmp_path):
    """A file that unpacks to thousands of times its size is legal, and read frame by frame."""
    content = litert_file(("int8", pruned(gaussian((3000, 2000)), 1 - 1e-5)))
    packed = pack_bytes(content)
    assert len(packed) < len(content) / 1000
    begun = time.perf_counter()
    assert restored_in_c(built("restore-quick", "-O2"), [packed], tmp_path) == [(0, content)]
    assert time.perf_counter() - begun < 20
    assert np.array_equal(np.frombuffer(unpack_bytes(packed), np.uint8), np.frombuffer(content, np.uint8))
