"""Distillation, step by step: train a teacher, train a student, see the difference, distil, again, until it is small.

A label says "this is a 3"; a trained teacher says "a 3, a bit like an 8, not at all like a 1". With a temperature
above 1 those small numbers grow large enough to learn from: the student's loss is its own loss on the labels, plus
beta * T^2 * KL(softened teacher, softened student).

    python examples/distill_mnist.py
"""

from __future__ import annotations

from pathlib import Path

import keras

import dwindle as dw

OUT = Path(__file__).parent / "out"
EPOCHS = 20
TEACHER_EPOCHS = 60
BATCH = 64
MAX_DROP = 0.01


def build(hidden: int) -> keras.Model:
    """Return a 784-hidden-10 network."""
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            keras.layers.Flatten(),
            keras.layers.Dense(hidden, activation="relu", name="hidden"),
            keras.layers.Dense(10, activation="softmax", name="digit"),
        ],
        name=f"student{hidden}",
    )


def main() -> None:
    """Train the teacher, then students until one is nearly as good; print what each step gave."""
    data = dw.load_demo_data()
    x, y = data.train.x[0], data.train.y

    def settings(epochs: int) -> dict[str, object]:
        rate = keras.optimizers.schedules.CosineDecay(2e-3, decay_steps=epochs * (len(x) // BATCH + 1))
        return {"optimizer": keras.optimizers.Adam(rate), "loss": "sparse_categorical_crossentropy"}

    # A teacher is worth listening to if it knows more: this one trains longer, on digits moved by up to two pixels,
    # as Hinton's did. The students see the plain digits only.
    print("1. The teacher, 128 hidden units")
    keras.utils.set_random_seed(0)
    teacher = build(128)
    jitter = keras.layers.RandomTranslation(2 / 28, 2 / 28, fill_mode="constant")
    moved = keras.Sequential([keras.Input((28, 28, 1)), jitter, teacher])
    moved.compile(**settings(TEACHER_EPOCHS))
    moved.fit(x, y, batch_size=BATCH, epochs=TEACHER_EPOCHS, verbose=0)

    # Each student is trained alone first, for the same number of steps and from the same start, then with the teacher,
    # and again, until it is good enough on the validation digits; if it is not after three rounds, the next one's turn.
    print(f"2. Students, until one is within {MAX_DROP:.1%} of the teacher")
    found = dw.distill_until(
        [build(32), build(64)],
        teacher,
        train=(x, y),
        validation=(data.val.x[0], data.val.y),
        compile=lambda: settings(EPOCHS),
        fit={"batch_size": BATCH, "epochs": EPOCHS},
        max_drop=MAX_DROP,
        alone=True,
        temperature=3.0,
        beta=5.0,
    )
    verdict = "good enough" if found.met else "none is good enough, this is the best"
    print(f"   {found.model.name}: alone {found.alone:.4f}, taught {found.value:.4f}, {verdict}")

    print("3. The files, on the test digits")
    test = (data.test.x[0], data.test.y)
    dw.export(teacher, OUT / "teacher.tflite")
    dw.export(found.model, OUT / "student.tflite")
    dw.export(found.model, OUT / "student_int8.tflite", scheme="int8", data=x[:500])
    for name in ("teacher", "student", "student_int8"):
        file = dw.measure(OUT / f"{name}.tflite", test)
        print(f"   {name:12} {file.parameters:7,} parameters  {file.size_bytes:8,} bytes  accuracy {file.accuracy:.4f}")


if __name__ == "__main__":
    main()
