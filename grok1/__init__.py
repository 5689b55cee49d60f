"""JAX inference for the Grok-1 checkpoint.

import grok1
model = grok1.load("checkpoints/toy")
print(model.generate("The ", max_new_tokens=32).text)
"""

from grok1.checkpoint.tensor_file import CheckpointError
from grok1.comparison import Comparison, compare
from grok1.config import GROK_1, TOY, ModelConfig
from grok1.factory import load, random_model, save
from grok1.generate.completion import Completion
from grok1.generate.options import GenerationOptions
from grok1.machine.processes import OtherProcessError, initialize_distributed
from grok1.model import Model
from grok1.planning.planning import Plan, plan
from grok1.study.intervention import (
    AblateExperts,
    AddToResidual,
    CapLayers,
    ForceExperts,
    Patch,
    ScaleHeads,
    SelectExperts,
)
from grok1.study.scoring import Choice, Score
from grok1.study.tracing import Trace
from grok1.tokenizer import Tokenizer
from grok1.version import __version__

__all__ = [
    "GROK_1",
    "TOY",
    "AblateExperts",
    "AddToResidual",
    "CapLayers",
    "CheckpointError",
    "Choice",
    "Comparison",
    "Completion",
    "ForceExperts",
    "GenerationOptions",
    "Model",
    "ModelConfig",
    "OtherProcessError",
    "Patch",
    "Plan",
    "ScaleHeads",
    "Score",
    "SelectExperts",
    "Tokenizer",
    "Trace",
    "__version__",
    "compare",
    "initialize_distributed",
    "load",
    "plan",
    "random_model",
    "save",
]
