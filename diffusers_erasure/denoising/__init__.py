"""The base model run by hand: prompts as it reads them, and DDIM step by step."""
