"""What methods and runs can be told: ranges, presets, and the settings about texts that several methods share."""

from .ranges import Choice, Number, Of, Range, Rule, Switch, Whole, check_settings, fill, rules_of


__all__ = ["Choice", "Number", "Of", "Range", "Rule", "Switch", "Whole", "check_settings", "fill", "rules_of"]
