"""Families of base models: how text enters each denoiser, as one table of doors."""

from .doors import DOOR_INPUT, ROWS, Family, Pooled
from .table import DENOISERS, FAMILIES, POOLED_INPUTS, ROW_INPUTS, denoiser_family, reading_family


__all__ = [
    "DENOISERS",
    "DOOR_INPUT",
    "FAMILIES",
    "POOLED_INPUTS",
    "ROWS",
    "ROW_INPUTS",
    "Family",
    "Pooled",
    "denoiser_family",
    "reading_family",
]
