"""JAX inference for the Grok-1 checkpoint.

import grok1
model = grok1.load("toy")
print(model.generate("The ", max_new_tokens=32).text)

Each name below is imported when it is first used, so that what needs no model need not wait for
JAX.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from grok1.version import __version__

if TYPE_CHECKING:
    from grok1.comparison import compare
    from grok1.config import GROK_1, TOY, ModelConfig
    from grok1.factory import load, random_model, save
    from grok1.files import CheckpointError
    from grok1.generate.completion import Completion
    from grok1.generate.options import GenerationOptions
    from grok1.machine.processes import OtherProcessError, initialize_distributed
    from grok1.model import Model
    from grok1.planning.planning import Plan, plan
    from grok1.server.core import Server
    from grok1.server.serving import serve
    from grok1.study.comparison_report import Comparison
    from grok1.study.router_interventions import AblateExperts, ForceExperts, SelectExperts
    from grok1.study.scores import Choice, Score
    from grok1.study.stream_interventions import AddToResidual, CapLayers, Patch, ScaleHeads
    from grok1.study.tracing import Trace
    from grok1.tokenizer import Tokenizer

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
    "Server",
    "Tokenizer",
    "Trace",
    "__version__",
    "compare",
    "initialize_distributed",
    "load",
    "plan",
    "random_model",
    "save",
    "serve",
]

_HOMES = {
    "comparison": ("compare",),
    "config": ("GROK_1", "TOY", "ModelConfig"),
    "factory": ("load", "random_model", "save"),
    "files": ("CheckpointError",),
    "generate.completion": ("Completion",),
    "generate.options": ("GenerationOptions",),
    "machine.processes": ("OtherProcessError", "initialize_distributed"),
    "model": ("Model",),
    "planning.planning": ("Plan", "plan"),
    "server.core": ("Server",),
    "server.serving": ("serve",),
    "study.comparison_report": ("Comparison",),
    "study.router_interventions": ("AblateExperts", "ForceExperts", "SelectExperts"),
    "study.scores": ("Choice", "Score"),
    "study.stream_interventions": ("AddToResidual", "CapLayers", "Patch", "ScaleHeads"),
    "study.tracing": ("Trace",),
    "tokenizer": ("Tokenizer",),
}
_HOME_OF = {name: f"grok1.{home}" for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        message = f"module 'grok1' has no attribute {name!r}"
        raise AttributeError(message, name=name, obj=sys.modules[__name__])
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
