"""Distillation, step by step: a teacher with 64 hidden units teaches a student with 32.

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
TEACHER_EPOCHS = 50


def build(hidden: int) -> keras.Model:
    """Return a 784-hidden-10 network."""
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            keras.layers.Flatten(),
            keras.layers.Dense(hidden, activation="relu", name="hidden"),
            keras.layers.Dense(10, activation="softmax", name="digit"),
        ]
    )


def main() -> None:
    """Train the teacher, the student alone and the student with the teacher; print what each gave."""
    data = dw.load_demo_data()
    x, y = data.train.x[0], data.train.y
    test = (data.test.x[0], data.test.y)

    def fit(model: keras.Model, epochs: int = EPOCHS) -> None:
        steps = epochs * (len(x) // 64 + 1)
        rate = keras.optimizers.schedules.CosineDecay(2e-3, decay_steps=steps)
        model.compile(keras.optimizers.Adam(rate), "sparse_categorical_crossentropy")
        model.fit(x, y, batch_size=64, epochs=epochs, verbose=0)

    # A teacher is worth listening to if it knows more: this one trains longer, on digits moved by up to two pixels,
    # as Hinton's did. The students see the plain digits only.
    keras.utils.set_random_seed(0)
    teacher = build(64)
    jitter = keras.layers.RandomTranslation(2 / 28, 2 / 28, fill_mode="constant")
    fit(keras.Sequential([keras.Input((28, 28, 1)), jitter, teacher]), TEACHER_EPOCHS)

    keras.utils.set_random_seed(1)
    alone = build(32)
    fit(alone)

    # The same student, the same start and the same number of steps, but with the teacher.
    keras.utils.set_random_seed(1)
    coach = dw.distill(build(32), teacher, temperature=3.0, beta=5.0)
    fit(coach)
    taught = coach.student

    for name, model in (("teacher, 64 units", teacher), ("student alone, 32", alone), ("student taught, 32", taught)):
        file = OUT / f"{name.split(',')[0].replace(' ', '_')}.tflite"
        dw.export(model, file)
        found = dw.measure(file, test)
        print(f"{name:20} {found.parameters:7,} parameters  {found.size_bytes:8,} bytes  {found.accuracy:.4f}")

    artefact = dw.export(taught, OUT / "student_int8.tflite", scheme="int8", data=x[:500])
    found = dw.measure(artefact.path, test)
    print(f"{'student taught, int8':20} {found.parameters:7,} parameters  {found.size_bytes:8,} bytes  ", end="")
    print(f"{found.accuracy:.4f}, test accuracy measured on {artefact.path.name}")


if __name__ == "__main__":
    main()
