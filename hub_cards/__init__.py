"""The model-card templates. Installed as `diffusers_erasure.hub_cards`; see README.md in this folder."""
