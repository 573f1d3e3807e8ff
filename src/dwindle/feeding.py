"""Arrays as training reads them: in batches, in a random order, without the waits of TensorFlow's own pipeline."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

# Arguments of `fit` that go with a data set as with arrays.
_PASSED = frozenset(
    {"x", "y", "batch_size", "epochs", "verbose", "callbacks", "validation_data", "validation_freq", "initial_epoch"}
)
_BATCH_SIZE = 32
_GATHERING = 2


def fed(**arguments: Any) -> dict[str, Any]:
    """Return what to call ``fit`` with instead, so that epochs end when their work is done.

    Keras feeds arrays to TensorFlow by a pipeline that tunes itself in a thread. That thread sleeps for 10 ms, then
    for twice as long each time, and the end of an epoch may wait for it to wake up: an epoch of 3.4 s can take 5.1 s.
    Here the pipeline has nothing to tune. Order, batches and the last one, which may be smaller, are as Keras makes
    them; the order comes from NumPy's random numbers.

    Args:
        **arguments: Those of `keras.Model.fit`.

    Returns:
        The arguments: with a data set where samples and labels are arrays, the backend is TensorFlow, and nothing is
        asked for that needs arrays; otherwise as they were.
    """
    parts = tuple(part for part in (arguments.get("x"), arguments.get("y")) if part is not None)
    arrays = keras.tree.flatten(parts)
    usable = (
        keras.backend.backend() == "tensorflow"
        and arguments.keys() <= _PASSED
        and arguments.get("x") is not None
        and all(isinstance(array, np.ndarray) and array.ndim > 0 and array.dtype.kind in "fiub" for array in arrays)
        and {len(array) for array in arrays}.isdisjoint({0})
        and len({len(array) for array in arrays}) == 1
    )
    if not usable:
        return arguments
    size = arguments.get("batch_size") or _BATCH_SIZE
    rest = {name: value for name, value in arguments.items() if name not in ("x", "y", "batch_size")}
    return {"x": _dataset(parts, len(arrays[0]), size), "shuffle": False, **rest}  # it is shuffled already


def _dataset(parts: tuple[Any, ...], count: int, batch_size: int) -> Any:
    import tensorflow as tf

    with tf.device("CPU"):
        tensors = keras.tree.map_structure(tf.convert_to_tensor, keras.tree.lists_to_tuples(parts))

    def batch(rows: Any) -> Any:
        taken = keras.tree.map_structure(lambda one: tf.gather(one, rows), tensors)
        floats = keras.config.floatx()
        return keras.tree.map_structure(lambda one: tf.cast(one, floats) if one.dtype.is_floating else one, taken)

    order = tf.data.Dataset.range(count).shuffle(count, seed=int(np.random.randint(2**31))).batch(batch_size)
    batches = order.map(batch, num_parallel_calls=_GATHERING, deterministic=True)
    options = tf.data.Options()
    options.autotune.enabled = False
    return batches.prefetch(_GATHERING).with_options(options)
