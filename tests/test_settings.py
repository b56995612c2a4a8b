"""Settings of the methods: what each may be, what it is told where it is something else, and what stands about it in the files."""

from typing import Any

import pytest

from diffusers_erasure import ErasureInputError
from diffusers_erasure.methods import get_method, make_config


# ------------------------------------------------------------------------------------------------------ templates


@pytest.mark.parametrize("method", ["uce", "esd"])
@pytest.mark.parametrize(
    "template",
    ["no place", "{} in {style}", "{} and {}", "{0}", "{} {0}", "{!r}", "{:>9}", "a {{}}", "{} {", "{} }", 3, None],
)
def test_a_template_that_cannot_be_filled_is_told(method: str, template: Any) -> None:
    with pytest.raises(ErasureInputError, match=r"must hold {} once.*doubled") as told:
        make_config(get_method(method), {"templates": ("{}", template)})
    assert repr(template) in str(told.value)


def test_braces_of_a_prompt_are_doubled() -> None:
    config = make_config(get_method("uce"), {"templates": ["a {}, {{style}}"]})
    assert [template.format("cat") for template in config.template_list()] == ["a cat, {style}"]
