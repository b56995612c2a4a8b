"""Families of base models: how text enters each denoiser, as one table of doors."""

from .doors import DOOR_INPUT, ROWS, Family, Pooled
from .table import DENOISERS, FAMILIES, denoiser_family, reading_family


__all__ = ["DENOISERS", "DOOR_INPUT", "FAMILIES", "ROWS", "Family", "Pooled", "denoiser_family", "reading_family"]
