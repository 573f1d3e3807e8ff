"""What an operation does to labels, found by running it: nothing here knows one operation from another.

An operation without weights (reshape, pooling, addition, slicing, ...) is run on random numbers. Perturbing the
positions that carry a label, and looking at which outputs move, says which label each output position carries, or that
it depends on several. Afterwards a *trial* runs the operation on an input from which half of the channels were cut and
compares with the full result on the masked input: only what comes out equal may be cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

#: What stands in an array of labels for positions that depend on none, and on several.
NOTHING, SEVERAL = 0, -1

_LARGEST_RUN = 32_000_000  # numbers in one run

Run = Callable[[list[np.ndarray]], list[np.ndarray]]


def in_batches(run: Run, inputs: Sequence[np.ndarray], batch: int | None) -> list[np.ndarray]:
    """Run an operation on many samples: at once, or in pieces where memory or a fixed batch size asks for it."""
    samples = len(inputs[0])
    if batch is None:
        per_sample = max(1, sum(value[0].size for value in inputs))
        batch = max(1, min(samples, _LARGEST_RUN // per_sample))
    pieces = []
    for begin in range(0, samples, batch):
        part = [value[begin : begin + batch] for value in inputs]
        missing = batch - len(part[0])
        if missing:
            part = [np.concatenate([value, np.repeat(value[:1], missing, 0)]) for value in part]
        found = run(part)
        if any(value.shape[:1] != (batch,) for value in found):
            raise ValueError("the operation moves the batch axis")
        pieces.append([value[: batch - missing] for value in found])
    return [np.concatenate(parts) for parts in zip(*pieces, strict=True)]


def dependence(
    run: Run,
    shapes: Sequence[tuple[int, ...]],
    number: int,
    axis: int,
    codes: np.ndarray,
    batch: int | None,
    noise: float = 1e-5,
) -> list[np.ndarray]:
    """Return, for each output, which label along one axis of one input each of its positions depends on.

    Labels are told apart by their bits: for each bit, the positions whose label has it are perturbed, then those whose
    label has it not. A position that moves in both depends on several labels.

    Args:
        run: The operation, from arrays to arrays, samples first.
        shapes: Shapes of its inputs, with any size of the first axis.
        number: Which input is perturbed.
        axis: The axis in it.
        codes: Label of each position along the axis: 1, 2, ... in any order; 0 is never perturbed.
        batch: Samples that the operation takes at once; None for any number.
        noise: What results may differ by, relative to their size, without having moved.

    Returns:
        One integer array an output, without the samples' axis: the code, `NOTHING` or `SEVERAL`.
    """
    generator = np.random.default_rng(0)
    bits = max(1, int(codes.max()).bit_length())
    base = [generator.uniform(0.5, 1.5, shape[1:]).astype(np.float32) for shape in shapes]
    moved = generator.uniform(2.0, 3.0, shapes[number][1:]).astype(np.float32)
    along = [1] * (len(shapes[number]) - 1)
    along[axis - 1] = len(codes)
    variants = [base[number]]
    for bit in range(bits):
        for wanted in (1, 0):
            chosen = ((((codes >> bit) & 1) == wanted) & (codes > 0)).reshape(along)
            variants += [np.where(chosen, base[number] + sign * moved, base[number]) for sign in (1, -1)]
    inputs = [
        np.stack(variants) if index == number else np.repeat(value[None], len(variants), 0)
        for index, value in enumerate(base)
    ]
    found = []
    for output in in_batches(run, inputs, batch):
        # Not bit for bit: sums may be taken in another order in another sample.
        scale = np.abs(output[:1]) + 0.01 * np.abs(output[:1]).mean()
        changed = (
            ~(np.abs(output[1:] - output[:1]) <= noise * scale)
            if output.dtype.kind == "f"
            else (output[1:] != output[:1])
        )
        changed = changed.reshape(bits, 2, 2, *output.shape[1:]).any(axis=2)
        with_bit, without = changed[:, 0], changed[:, 1]
        weights = (1 << np.arange(bits)).reshape(-1, *[1] * (output.ndim - 1))
        value = (with_bit * weights).sum(axis=0)
        value = np.where((with_bit & without).any(axis=0), SEVERAL, value)
        # Whole numbers, such as those of an argmax, may depend on more than shows in a few samples.
        if output.dtype.kind not in "fb" and (value != NOTHING).any():
            value = np.full_like(value, SEVERAL)
        found.append(value)
    return found


def options(codes: np.ndarray) -> list[int]:
    """Return the axes (samples counted) along which an output can carry the labels, best first.

    An axis serves if every slice across it holds one label; if no axis does, every axis longer than one is an option
    that unites the labels in each of its slices.
    """
    exact: list[int] = []
    loose: list[int] = []
    for axis in range(codes.ndim):
        if codes.shape[axis] == 1:
            continue
        across = np.moveaxis(codes, axis, 0).reshape(codes.shape[axis], -1)
        high = across.max(axis=1, initial=0)
        low = np.where(across == NOTHING, high[:, None], across).min(axis=1, initial=1 << 60)
        (exact if (low == high).all() else loose).append(axis + 1)
    return exact[-1:] if exact else loose


def agrees(found: np.ndarray, expected: np.ndarray, noise: float = 1e-5) -> bool:
    """Whether two results are equal but for the order of float additions."""
    if found.shape != expected.shape:
        return False
    if found.dtype.kind != "f":
        return bool(np.array_equal(found, expected))
    finite = np.isfinite(expected)
    if not np.array_equal(finite, np.isfinite(found)):
        return False
    found, expected = found[finite], expected[finite]
    scale = max(1e-6, float(np.abs(expected).max(initial=0.0)))
    return bool(np.abs(found - expected).max(initial=0.0) <= 2 * noise * scale)
