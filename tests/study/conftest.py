"""The text that traces and interventions run."""

import numpy as np
import pytest


@pytest.fixture(scope="module")
def tokens(nano_reference) -> np.ndarray:
    return nano_reference["tokens"]
