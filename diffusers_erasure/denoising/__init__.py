"""The base model run by hand: prompts as it reads them, and its sampler step by step."""
