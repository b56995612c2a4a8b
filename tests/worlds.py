"""Where the tiny models of other families are, for tests that need them."""

from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]

# They may be absent from an unpacked sdist, but not from a checkout.
in_a_checkout = pytest.mark.skipif(
    not (ROOT / ".git").exists() and not (ROOT / "tools/demo_worlds/models").exists(),
    reason="an sdist holds no worlds",
)
