"""A model becomes a folder for microcontrollers: a small file, proved in TensorFlow Lite Micro, and its sources."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import keras
import numpy as np

from dwindle.errors import ConfigError, UnsupportedModelError
from dwindle.exporting import RANDOM_SAMPLES, export, float_file
from dwindle.exporting.convert import random_input
from dwindle.exporting.verify import Verification
from dwindle.files import replace_folder, temporary_folder, write_bytes, write_text
from dwindle.lifting.flatbuffer import layer_name, read_graph
from dwindle.measuring.litert import LiteRTRunner, quantize, read_content
from dwindle.micro.encoding import EncodedWeight, encode_weights
from dwindle.micro.operators import check_operators, operators_of
from dwindle.micro.running import MicroRun, check_installed, run_micro
from dwindle.micro.sources import FILES, Sample, render
from dwindle.micro.streaming import (
    matched,
    quantized_frames,
    resolve_states,
    sequences,
    single_steps,
    streaming_file,
)
from dwindle.micro.stripping import ALIGNMENTS, strip
from dwindle.micro.substituting import substituted
from dwindle.micro.verifying import Agreement, agreement, require, run_litert
from dwindle.quantization import Scheme, calibration_samples, resolve_scheme

_SAMPLE_STEPS = 4


@dataclass(frozen=True, kw_only=True)
class MicroExport:
    """A folder for microcontrollers.

    Attributes:
        folder: Where it is.
        file: The ``.tflite`` in it.
        size_bytes: Bytes of the file, which are the flash that the model takes.
        plain_bytes: Bytes of the file before anything was stripped or encoded.
        stripped_bytes: Bytes of it stripped, its weights as they are.
        arena_bytes: Bytes of the tensor arena that are used, measured in TensorFlow Lite Micro on this machine.
        needed_bytes: The smallest arena in which the tensors can be allocated; ``main.cc`` sets aside a tenth more.
        persistent_bytes: The interpreter's own structures in it, smaller on 32-bit devices.
        sha256: Hash of the file.
        operators: Its operators.
        agreements: TensorFlow Lite Micro against LiteRT's reference kernels and against LiteRT as it comes (XNNPACK).
        verification: The file against the model; None where a ``.tflite`` was passed.
        encoded: Weights that are stored in fewer bytes, which DECODE expands.
        notes: What the user should know.
    """

    folder: Path
    file: Path
    size_bytes: int
    plain_bytes: int
    stripped_bytes: int
    arena_bytes: int
    needed_bytes: int
    persistent_bytes: int
    sha256: str
    operators: tuple[str, ...]
    agreements: tuple[Agreement, ...]
    verification: Verification | None
    encoded: tuple[EncodedWeight, ...] = ()
    notes: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {**asdict(self), "folder": str(self.folder), "file": str(self.file)}


def export_micro(
    model: keras.Model | str | Path,
    folder: str | Path,
    *,
    data: Any = None,
    scheme: str | Scheme | Mapping[str, Any] | None = None,
    states: Mapping[Any, Any] | None = None,
    decode: bool = False,
    alignment: int = 16,
    verify_samples: int = 64,
) -> MicroExport:
    """Write a model as sources for TensorFlow Lite Micro, once it has run there and agrees with LiteRT.

    The folder gets ``model.tflite``, ``model.cc`` and ``model.h`` (the same bytes), ``main.cc`` (a program that
    registers the model's operators and no others, and runs a sample), ``sample.h``, ``CMakeLists.txt``, an Arduino
    sketch and a README with the measured sizes.

    Bounds: a model's file against the model as `dwindle.export` has them; the file in TensorFlow Lite Micro against
    LiteRT's reference kernels, 99% of 8-bit outputs within 1, 99% of 16-bit ones within 32, every float one within
    1e-4 of the largest. The stripped file gives the same outputs, bit for bit, in both runtimes.

    Args:
        model: A built Keras model, or the path of a ``.tflite``.
        folder: Where to write: a folder that is not there, is empty, or was written by this function.
        data: Samples for calibration and verification, as `dwindle.export` takes them.
        scheme: For a Keras model: ``"int8"`` (the default), ``"int16x8"``, ``"float32"`` or what `dwindle.export`
            takes; None for one from `dwindle.quantize` is what it was quantized for.
        states: For a model of one step that carries states: each input to the output that is its next value, by name
            or number. ``data`` is then sequences, shape ``(n, steps, ...)`` for each of the other inputs; states begin
            at 0. Both ends of a state are put on one grid, and ``main.cc`` hands it back.
        decode: Store clustered and pruned weights in fewer bytes, which TensorFlow Lite Micro's operator DECODE expands
            in the arena as the model runs; see `dwindle.micro.encoding.encode_weights`. LiteRT does not run that file.
        alignment: See `dwindle.micro.stripping.strip`.
        verify_samples: At most this many samples are run in both runtimes.

    Returns:
        The folder, and what was measured.

    Raises:
        ConfigError: For a bad argument, or a folder that holds something else.
        MissingDependencyError: If ``tflite-micro`` is not installed.
        UnsupportedModelError: If TensorFlow Lite Micro lacks an operator, or its kernels refuse a type; nothing is
            written.
        VerificationError: If the runtimes do not agree; nothing is written.
        DataError: If data is needed or does not fit.
    """
    place = check_folder(folder)
    if alignment not in ALIGNMENTS:
        raise ConfigError(f"`alignment` is {alignment!r}; it must be 4, 8 or 16")
    check_installed()
    if states:
        content, verification, notes = _stepped_file_of(model, scheme, data, states)
        pairs = resolve_states(states, content)
        free = [spec for number, spec in enumerate(LiteRTRunner(content).inputs) if number not in pairs]
        samples = quantized_frames(sequences(data, content, pairs, limit=verify_samples), free)
    else:
        content, verification, notes = _file_of(model, scheme, data)
        samples, pairs = _samples(content, data, verify_samples), {}
    made = _prepared(content, samples, decode=decode, alignment=alignment, states=pairs)
    title = model.name if isinstance(model, keras.Model) else Path(model).stem
    return _write(place, title, content, made, samples, verification, notes)


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    """The file that ships, and what was found out about it."""

    content: bytes
    stripped: bytes
    run: MicroRun
    agreements: tuple[Agreement, ...]
    encoded: tuple[EncodedWeight, ...]
    states: Mapping[int, int]
    notes: tuple[str, ...]


def _file_of(model: Any, scheme: Any, data: Any) -> tuple[bytes, Verification | None, list[str]]:
    """Return the full-integer file of a model, with names, checked to have operators of TensorFlow Lite Micro only."""
    if not isinstance(model, keras.Model):
        if scheme is not None:
            raise ConfigError(f"`scheme` is {scheme!r}, but `{model}` is a file that has its types; leave `scheme` out")
        content = read_content(model)
        _check(content, f"`{model}`")
        return content, None, _float_notes(content)
    _check(float_file(model), f"`{model.name}`")
    chosen, io_type = _types(model, scheme)
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "model.tflite"
        trained = getattr(model, "quantization", None)
        made = export(model, path, scheme=None if trained else chosen, data=data, io_type=io_type)
        content = path.read_bytes()
    _check(content, f"`{model.name}`")
    return content, made.verification, _float_notes(content)


def _check(content: bytes, name: str) -> None:
    """Check the operators of a file as they will be written."""
    check_operators(substituted(content)[0], name)


def _types(model: keras.Model, scheme: Any) -> tuple[Scheme, str]:
    """Return a model's scheme, and the type of its file's inputs and outputs."""
    trained = getattr(model, "quantization", None)
    chosen = resolve_scheme(scheme or "int8")
    if trained and scheme is None:
        chosen = Scheme.from_dict(trained["scheme"])
    if trained and chosen.name != trained["scheme"]["name"]:
        raise ConfigError(
            f"`scheme` is `{chosen.name}`, but the model was made by dw.quantize for `{trained['scheme']['name']}`; "
            "leave `scheme` out"
        )
    widths = {8: "int8", 16: "int16"}
    return chosen, widths.get(chosen.activations or 0, "float32") if chosen.is_static else "float32"


def _stepped_file_of(model: Any, scheme: Any, data: Any, states: Any) -> tuple[bytes, Verification | None, list[str]]:
    """Return the file of a model that carries states, as `_file_of` does of one that does not."""
    if not isinstance(model, keras.Model):
        content, _, notes = _file_of(model, scheme, data)
        return matched(content, resolve_states(states, content)), None, notes
    _check(float_file(model), f"`{model.name}`")
    content, verification, error = streaming_file(model, *_types(model, scheme), data, states)
    _check(content, f"`{model.name}`")
    note = f"through whole sequences, outputs are within {error:.3g} of the float model's"
    return content, verification, [note, *_float_notes(content)]


def _float_notes(content: bytes) -> list[str]:
    """Say which layers compute in float, where others do not."""
    graph = read_graph(content)
    if not any(tensor.is_quantized for tensor in graph.tensors):
        return ["the file computes in float32; a core without a floating-point unit is slow at that"]
    floats = [
        op for op in graph.operations
        if op.outputs and op.outputs[0].dtype == np.float32 and op.name != "DEQUANTIZE"
    ]  # fmt: skip
    return list(dict.fromkeys(f"layer `{layer_name(op)}` ({op.name}) computes in float32" for op in floats))


def _samples(content: bytes, data: Any, count: int) -> list[np.ndarray]:
    """Return raw inputs of a file, shape ``(n, ...)``."""
    specs = LiteRTRunner(content).inputs
    if data is None:
        types = [np.float32 if spec.scale is not None else spec.dtype for spec in specs]
        drawn = [random_input(spec.shape[1:], kind, RANDOM_SAMPLES) for spec, kind in zip(specs, types, strict=True)]
    else:
        shapes = [tuple(None if size < 0 else size for size in spec.shape[1:]) for spec in specs]
        drawn = list(calibration_samples(shapes, data, limit=count))
    return [quantize(array[:count], spec).astype(spec.dtype) for array, spec in zip(drawn, specs, strict=True)]


def _prepared(
    content: bytes,
    samples: list[np.ndarray],
    *,
    decode: bool,
    alignment: int,
    states: Mapping[int, int] | None = None,
) -> _Prepared:
    """Strip a file, run it in both runtimes, and require that nothing changed and that they agree."""
    states = dict(states or {})
    original = content
    content, notes = substituted(original)
    plain = run_micro(content, samples, states=states)
    single, expected = samples, plain.outputs
    if states:  # where states are carried, the runtimes are compared step by step, each step from the same states
        single = single_steps(read_graph(content), samples, plain.outputs, states)
        expected = tuple(array.reshape(-1, *array.shape[2:]) for array in plain.outputs)
    reference = run_litert(content, single, reference=True)
    found = tuple(
        agreement(name, outputs, expected)
        for name, outputs in (
            ("LiteRT's reference kernels", reference),
            ("LiteRT with XNNPACK", run_litert(content, single)),
        )
    )
    require(found[0], content, single)
    if notes:
        _same("written with other operators", run_litert(original, single, reference=True), reference)
    stripped = strip(content, alignment=alignment)
    _same("stripped", reference, run_litert(stripped, single, reference=True))
    run = run_micro(stripped, samples, states=states, named=content)
    _same("stripped", plain.outputs, run.outputs)
    written = stripped
    stored: tuple[EncodedWeight, ...] = ()
    if decode:
        encoded, stored = encode_weights(content, alignment=alignment)
    if stored:
        written = strip(encoded, alignment=alignment, micro_only=True)
        run = run_micro(written, samples, states=states)
        _same("encoded", plain.outputs, run.outputs)
    return _Prepared(
        content=written, stripped=stripped, run=run, agreements=found, encoded=stored, states=states, notes=notes
    )  # fmt: skip


def _same(how: str, before: tuple[np.ndarray, ...], after: tuple[np.ndarray, ...]) -> None:
    if all(np.array_equal(left, right) for left, right in zip(before, after, strict=True)):
        return
    raise UnsupportedModelError(
        f"the file gives other outputs once it is {how}; pass the .tflite itself to `dwindle.measure`, and report this"
    )


def check_folder(folder: str | Path) -> Path:
    """Check where the sources are to be written.

    Raises:
        ConfigError: If there is a file, a link, or a folder with anything else in it.
    """
    path = Path(folder)
    if path.name in ("", ".."):
        raise ConfigError(f"`{path}` has no name of its own; name a folder that is to be made")
    if path.is_symlink() or path.is_file():
        raise ConfigError(f"`{path}` is a {'link' if path.is_symlink() else 'file'}; name a folder that is to be made")
    entries = sorted(entry.name for entry in path.iterdir()) if path.exists() else []
    foreign = [name for name in entries if name not in FILES and not name.endswith(".ino")]
    if foreign or (entries and "model.cc" not in entries):
        raise ConfigError(
            f"`{path}` holds something other than an export for microcontrollers (`{(foreign or entries)[0]}`), which "
            "writing would remove; name another folder"
        )
    return path


def _write(
    place: Path,
    title: str,
    plain: bytes,
    made: _Prepared,
    samples: list[np.ndarray],
    verification: Verification | None,
    notes: list[str],
) -> MicroExport:
    graph = read_graph(plain)
    notes = [*made.notes, *notes]
    steps = slice(0, _SAMPLE_STEPS)
    if made.states:
        sample = Sample(
            inputs=tuple(array[0, steps] for array in samples),
            outputs=tuple(array[0, steps] for array in made.run.outputs), said="The first steps of a sequence",
        )  # fmt: skip
    else:
        sample = Sample(
            inputs=tuple(array[:1] for array in samples), outputs=tuple(array[:1] for array in made.run.outputs),
            said="A sample",
        )  # fmt: skip
    if made.encoded:
        notes = [*notes, f"DECODE expands {len(made.encoded)} weights: LiteRT does not run this file"]
    checked = [f"in TensorFlow Lite Micro against {found}" for found in made.agreements]
    if verification is not None:
        asked = f"{verification.within:.2%} of the outputs are within the bound ({verification.bound})"
        checked.insert(0, f"against {verification.reference}, on {verification.samples} samples: {asked}")
    sources = render(
        made.content, title=title, run=made.run, sample=sample, states=made.states,
        names=(graph.input_names, graph.output_names), checked=checked, notes=notes, sketch=place.resolve().name,
    )  # fmt: skip
    with temporary_folder(place) as temporary:
        write_bytes(temporary / "model.tflite", made.content)
        for name, text in sources.items():
            write_text(temporary / name, text)
        replace_folder(temporary, place)
    return MicroExport(
        folder=place, file=place / "model.tflite", size_bytes=len(made.content), plain_bytes=len(plain),
        stripped_bytes=len(made.stripped), arena_bytes=made.run.arena_bytes, needed_bytes=made.run.needed_bytes,
        persistent_bytes=made.run.persistent_bytes, sha256=hashlib.sha256(made.content).hexdigest(),
        operators=operators_of(made.content), agreements=made.agreements, verification=verification,
        encoded=made.encoded, notes=tuple(notes),
    )  # fmt: skip
