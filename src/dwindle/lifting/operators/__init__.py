"""The table of operators: how each LiteRT operator becomes a Keras layer.

An entry is a function ``(context, operation, inputs) -> outputs`` over Keras tensors, registered under the operator's
name. To add one: write the function with ``@operator("NAME")`` in the module where its relatives are, and give it a
numeric test in ``tests/lifting/test_operators.py``.
"""

from dwindle.lifting.operators import arithmetic, shapes, weighted
from dwindle.lifting.operators.registry import OPERATORS, Context, Entry, operator

__all__ = ["OPERATORS", "Context", "Entry", "arithmetic", "operator", "shapes", "weighted"]
