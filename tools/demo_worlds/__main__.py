"""`python -m tools.demo_worlds`: see `rebuild.py`."""

from .rebuild import main


main()
