"""dwindle makes trained neural networks small and fast, and proves it on the very file that ships.

The names below are imported when they are first used; ``import dwindle`` alone imports no framework.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Every public name and the module that has it.
_NAMES: dict[str, str] = {
    "Artefact": "dwindle.exporting",
    "Blame": "dwindle.blaming",
    "ConfigError": "dwindle.errors",
    "Constant": "dwindle.pruning",
    "ConversionError": "dwindle.errors",
    "Data": "dwindle.data",
    "DataError": "dwindle.errors",
    "DwindleError": "dwindle.errors",
    "Distilled": "dwindle.iterative_distillation",
    "Goals": "dwindle.compressing.goals",
    "Measurement": "dwindle.measuring",
    "MicroExport": "dwindle.micro",
    "MissingDependencyError": "dwindle.errors",
    "Packed": "dwindle.packing",
    "Plan": "dwindle.compressing.plans",
    "PolynomialDecay": "dwindle.pruning",
    "Pruned": "dwindle.iterative_pruning",
    "Result": "dwindle.compressing.concluding",
    "Scheme": "dwindle.quantization.schemes",
    "Sensitivity": "dwindle.layer_sensitivity",
    "UnsupportedModelError": "dwindle.errors",
    "VerificationError": "dwindle.errors",
    "blame": "dwindle.blaming",
    "cluster": "dwindle.clustering",
    "compress": "dwindle.compressing.run",
    "distill": "dwindle.distillation",
    "distill_until": "dwindle.iterative_distillation",
    "export": "dwindle.exporting",
    "export_micro": "dwindle.micro",
    "factorize": "dwindle.factorization",
    "finalize": "dwindle.finalizing",
    "inspect_file": "dwindle.measuring",
    "inspect_model": "dwindle.measuring",
    "lift": "dwindle.lifting",
    "load": "dwindle.loading",
    "load_demo_data": "dwindle.data",
    "measure": "dwindle.measuring",
    "pack": "dwindle.packing",
    "prune": "dwindle.pruning",
    "prune_until": "dwindle.iterative_pruning",
    "quantize": "dwindle.quantization.training",
    "read_data": "dwindle.data",
    "record": "dwindle.distillation",
    "sensitivity": "dwindle.layer_sensitivity",
    "shrink": "dwindle.shrinking",
    "unpack": "dwindle.packing",
}

__all__ = ["__version__", *sorted(_NAMES)]

if TYPE_CHECKING:
    from dwindle.blaming import Blame as Blame
    from dwindle.blaming import blame as blame
    from dwindle.clustering import cluster as cluster
    from dwindle.compressing.concluding import Result as Result
    from dwindle.compressing.goals import Goals as Goals
    from dwindle.compressing.plans import Plan as Plan
    from dwindle.compressing.run import compress as compress
    from dwindle.data import Data as Data
    from dwindle.data import load_demo_data as load_demo_data
    from dwindle.data import read_data as read_data
    from dwindle.distillation import distill as distill
    from dwindle.distillation import record as record
    from dwindle.errors import ConfigError as ConfigError
    from dwindle.errors import ConversionError as ConversionError
    from dwindle.errors import DataError as DataError
    from dwindle.errors import DwindleError as DwindleError
    from dwindle.errors import MissingDependencyError as MissingDependencyError
    from dwindle.errors import UnsupportedModelError as UnsupportedModelError
    from dwindle.errors import VerificationError as VerificationError
    from dwindle.exporting import Artefact as Artefact
    from dwindle.exporting import export as export
    from dwindle.factorization import factorize as factorize
    from dwindle.finalizing import finalize as finalize
    from dwindle.iterative_distillation import Distilled as Distilled
    from dwindle.iterative_distillation import distill_until as distill_until
    from dwindle.iterative_pruning import Pruned as Pruned
    from dwindle.iterative_pruning import prune_until as prune_until
    from dwindle.layer_sensitivity import Sensitivity as Sensitivity
    from dwindle.layer_sensitivity import sensitivity as sensitivity
    from dwindle.lifting import lift as lift
    from dwindle.loading import load as load
    from dwindle.measuring import Measurement as Measurement
    from dwindle.measuring import inspect_file as inspect_file
    from dwindle.measuring import inspect_model as inspect_model
    from dwindle.measuring import measure as measure
    from dwindle.micro import MicroExport as MicroExport
    from dwindle.micro import export_micro as export_micro
    from dwindle.packing import Packed as Packed
    from dwindle.packing import pack as pack
    from dwindle.packing import unpack as unpack
    from dwindle.pruning import Constant as Constant
    from dwindle.pruning import PolynomialDecay as PolynomialDecay
    from dwindle.pruning import prune as prune
    from dwindle.quantization.schemes import Scheme as Scheme
    from dwindle.quantization.training import quantize as quantize
    from dwindle.shrinking import shrink as shrink


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        value = getattr(importlib.import_module(_NAMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'dwindle' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
