"""Knowledge distillation: a student learns from a teacher's softened outputs as well as from labels.

`distill` makes the model that trains the student. What it compares are small objects: of outputs `SoftTargets`,
`LogitError`, `Decoupled` and `Relations`; of layers `Hints`, `AttentionMaps`, `Contrast` and `Relations`. `record`
keeps what a teacher says on disk; `Annealed` is a temperature that changes.
"""

from dwindle.distillation.annealing import Annealed
from dwindle.distillation.coach import Coach
from dwindle.distillation.distilling import distill
from dwindle.distillation.features import AttentionMaps, Contrast, FeatureObjective, Hints, Relations
from dwindle.distillation.objectives import Decoupled, Lesson, LogitError, Objective, OutputObjective, SoftTargets
from dwindle.distillation.outputs import ends_in
from dwindle.distillation.recording import Recording, record
from dwindle.distillation.teachers import Teacher

__all__ = [
    "Annealed", "AttentionMaps", "Coach", "Contrast", "Decoupled", "FeatureObjective", "Hints", "Lesson", "LogitError",
    "Objective", "OutputObjective", "Recording", "Relations", "SoftTargets", "Teacher", "distill", "ends_in", "record",
]  # fmt: skip
