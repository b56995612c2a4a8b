"""Families of base models: how text enters each denoiser, as one table of doors."""

from .doors import Family, Pooled
from .table import DENOISERS, FAMILIES, POOLED_INPUTS, ROW_INPUTS


__all__ = ["DENOISERS", "FAMILIES", "POOLED_INPUTS", "ROW_INPUTS", "Family", "Pooled"]
