"""Denoisers that are not loaded: known by their files, of which only what is asked for is read."""

from .denoiser import with_stored_denoiser


__all__ = ["with_stored_denoiser"]
