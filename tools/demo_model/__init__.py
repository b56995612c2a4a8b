"""Trains the embedded model and its judge, which the package ships: see `docs/demo_model.md`."""
