"""What several tests of interventions need."""

import numpy as np

import grok1

ALL = ("router", "residual", "branches")


def logits_with(model: grok1.Model, tokens, *interventions) -> np.ndarray:
    with model.intervene(*interventions) as changed:
        return changed.logits(tokens)
