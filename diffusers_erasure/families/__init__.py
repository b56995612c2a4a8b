"""Families of base models: how text enters each denoiser, as one table of doors."""

from .doors import Family, Pooled
from .table import DENOISERS, FAMILIES


__all__ = ["DENOISERS", "FAMILIES", "Family", "Pooled"]
