"""The settings of a run: one typed tree, read from a TOML recipe and dotted overrides.

Defaults < ``model.preset``, or the model of the checkpoint that is loaded < recipe < command line. Every fault is
collected and reported at once, before any process group exists. ``settings`` declares the tree, ``loading`` reads a
recipe into it, ``model_section`` completes its model, ``rules`` checks settings against each other, ``faults`` words
what is wrong, ``describe`` what would be right; ``timeline`` and ``learning_rate`` say what they make of each step.
"""

from megagap.config.describe import describe_settings
from megagap.config.loading import load_recipe, parse_overrides
from megagap.config.model_section import FindModel, StoredModel
from megagap.config.rules import check_rules
from megagap.config.settings import (
    Data,
    Guard,
    Model,
    Optim,
    PhaseSettings,
    RopeScaling,
    Settings,
    SourceSettings,
    Train,
)
from megagap.config.timeline import most_microbatches, sources_of, timeline_of, timeline_of_data

__all__ = ["Data", "FindModel", "Guard", "Model", "Optim", "PhaseSettings", "RopeScaling", "Settings", "SourceSettings"]
__all__ += ["StoredModel", "Train", "check_rules", "describe_settings", "load_recipe", "parse_overrides"]
__all__ += ["most_microbatches", "sources_of", "timeline_of", "timeline_of_data"]
