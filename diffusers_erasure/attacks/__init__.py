"""Attacks: what brings an erased concept back, and how often."""

from .hard_prompts import Config as RingABellConfig
from .hard_prompts import Found, ring_a_bell
from .trial import EmojiSeer, PickerSeer, Row, Seer, Trial, attack


__all__ = ["EmojiSeer", "Found", "PickerSeer", "RingABellConfig", "Row", "Seer", "Trial", "attack", "ring_a_bell"]
