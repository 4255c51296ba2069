"""The settings of a run: one typed tree, read from a TOML recipe and dotted overrides.

Defaults < ``model.preset``, or the model of the checkpoint that is loaded < recipe < command line. Every fault is
collected and reported at once, before any process group exists. ``settings`` declares the tree, ``loading`` reads a
recipe into it, ``model_section`` completes its model, ``rules`` checks settings against each other, ``faults`` words
what is wrong, ``describe`` what would be right.
"""

from megagap.config.describe import describe_settings
from megagap.config.loading import load_recipe, parse_overrides
from megagap.config.model_section import FindModel, StoredModel
from megagap.config.phases import Span, sources_of, span_of, spans, tokens_after
from megagap.config.rules import check_rules
from megagap.config.settings import Data, Model, Optim, Phase, RopeScaling, Settings, Source, Train

__all__ = ["Data", "FindModel", "Model", "Optim", "Phase", "RopeScaling", "Settings", "Source", "Span", "StoredModel"]
__all__ += ["Train", "check_rules", "describe_settings", "load_recipe", "parse_overrides", "sources_of", "span_of"]
__all__ += ["spans", "tokens_after"]
