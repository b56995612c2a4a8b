"""List the text-to-image denoisers of the installed diffusers that no family of this library serves."""

import inspect
import re
from collections import defaultdict

import diffusers
from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING

from diffusers_erasure.families import DENOISERS


DENOISER = re.compile(r"\b\w*(?:UNet\w*|Transformer\w*)\b")


def unserved() -> dict[str, list[str]]:
    """The denoisers' classes, with the names under which diffusers knows their pipelines."""
    found: dict[str, list[str]] = defaultdict(list)
    for name, pipeline in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.items():
        for parameter in inspect.signature(pipeline.__init__).parameters.values():
            if parameter.name.split("_")[-1] in ("unet", "transformer", "prior", "decoder"):
                for kind in DENOISER.findall(str(parameter.annotation)):
                    if kind not in DENOISERS:
                        found[kind].append(name)
    return dict(found)


if __name__ == "__main__":
    print(f"text-to-image denoisers of diffusers {diffusers.__version__} that are not served:")
    for kind, pipelines in sorted(unserved().items()):
        print(f"  {kind}: {', '.join(dict.fromkeys(pipelines))}")
