"""The settings of a run: one typed tree, read from a TOML recipe and dotted overrides.

Defaults < ``model.preset`` < recipe < command line. Every fault is collected and reported at once, before any process
group exists. ``settings`` declares the tree, ``loading`` reads a recipe into it, ``rules`` checks settings against each
other, ``faults`` words what is wrong.
"""

from megagap.config.loading import load_recipe, parse_overrides, spread_layers
from megagap.config.phases import Span, sources_of, span_of, spans, tokens_after
from megagap.config.rules import check_rules
from megagap.config.settings import Data, Model, Optim, Phase, RopeScaling, Settings, Source, Train, describe_settings

__all__ = ["Data", "Model", "Optim", "Phase", "RopeScaling", "Settings", "Source", "Span", "Train"]
__all__ += ["check_rules", "describe_settings", "load_recipe", "parse_overrides", "sources_of", "span_of", "spans"]
__all__ += ["spread_layers", "tokens_after"]
