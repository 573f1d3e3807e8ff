"""Labels of channels: which positions, on which axes of which tensors, can only be cut together.

Every position of an axis that can be cut carries a label, an integer. Labels that have to go together are united;
labels that have to stay are pinned, with a reason. The labels united with one another are one *channel*.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


class Labels:
    """A union-find over labels, in which classes can be pinned.

    Example:
        >>> labels = Labels()
        >>> a, b = labels.new(3), labels.new(3)
        >>> labels.unite(a, b)
        >>> labels.pin(a[:1], "an output")
        >>> labels.resolve(b).tolist(), labels.pinned(int(b[0])), labels.pinned(int(b[1]))
        ([0, 1, 2], 'an output', None)
    """

    def __init__(self) -> None:
        self._parents = np.zeros(1024, np.int64)
        self._count = 0
        self._pins: dict[int, str] = {}

    @property
    def count(self) -> int:
        """How many labels there are."""
        return self._count

    def new(self, count: int) -> np.ndarray:
        """Return ``count`` new labels."""
        first, self._count = self._count, self._count + count
        if self._count > len(self._parents):
            grown = np.zeros(max(2 * len(self._parents), self._count), np.int64)
            grown[:first] = self._parents[:first]
            self._parents = grown
        found = np.arange(first, self._count)
        self._parents[found] = found
        return found

    def resolve(self, labels: np.ndarray) -> np.ndarray:
        """Return the class of each label: the smallest label in it."""
        labels = np.asarray(labels)
        while True:
            parents = self._parents[labels]
            if np.array_equal(parents, labels):
                return labels
            labels = parents

    def unite(self, first: np.ndarray, second: np.ndarray) -> None:
        """Unite two vectors of labels, position by position."""
        first, second = self.resolve(first), self.resolve(second)
        differ = first != second
        for a, b in set(zip(first[differ].tolist(), second[differ].tolist(), strict=True)):
            self._unite(a, b)

    def _unite(self, a: int, b: int) -> None:
        a, b = self._find(a), self._find(b)
        if a == b:
            return
        low, high = min(a, b), max(a, b)
        self._parents[high] = low
        reason = self._pins.pop(high, None)
        if reason is not None:
            self._pins.setdefault(low, reason)

    def _find(self, label: int) -> int:
        while (parent := int(self._parents[label])) != label:
            self._parents[label] = self._parents[parent]
            label = parent
        return label

    def pin(self, labels: Iterable[int] | np.ndarray, reason: str) -> None:
        """Say that these labels' classes stay, and why; the first reason counts."""
        for label in np.unique(self.resolve(np.asarray(labels, np.int64))).tolist():
            self._pins.setdefault(label, reason)

    def pinned(self, label: int) -> str | None:
        """Return why a label's class has to stay, or None if it can be cut."""
        return self._pins.get(self._find(label))

    def free(self, labels: np.ndarray) -> np.ndarray:
        """Return the classes among the labels' that are not pinned, in order, each once."""
        classes = np.unique(self.resolve(labels))
        return classes[[label not in self._pins for label in classes.tolist()]] if len(classes) else classes
