"""What methods and runs can be told: ranges, presets, and the settings about texts that several methods share."""

from .ranges import Choice, Number, Of, Range, Rule, Switch, Whole, check_settings, rules_of
from .resolving import USUAL, ByFacts, Facts, resolve


__all__ = [
    "USUAL",
    "ByFacts",
    "Choice",
    "Facts",
    "Number",
    "Of",
    "Range",
    "Rule",
    "Switch",
    "Whole",
    "check_settings",
    "resolve",
    "rules_of",
]
