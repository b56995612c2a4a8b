"""The command line, `diffusers-erasure`.

A package of its own, as `import diffusers_erasure` imports diffusers: help, version and completions need neither.
"""
