"""`python -m tools.demo_model`: see `rebuild.py`."""

from .rebuild import main


main()
