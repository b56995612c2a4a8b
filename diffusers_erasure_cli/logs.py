"""What is logged while a command runs, and what other libraries are kept from saying at every start."""

import logging

from .options import err


# transformers says for each image processor that it takes Pillow's where torchvision is missing: nothing that anybody
# can or should do something about, as no erasure needs an image processor.
UNWANTED = ("transformers.utils.import_utils", "requires torchvision")


def _wanted(record: logging.LogRecord) -> bool:
    return UNWANTED[1] not in record.getMessage()


def show_logs(debug: bool) -> None:
    """Show the library's log on standard error."""
    logger = logging.getLogger("diffusers_erasure")
    if not logger.handlers:
        from rich.logging import RichHandler

        logger.addHandler(RichHandler(console=err, show_path=False, show_time=False))
    if debug:
        logger.setLevel(logging.DEBUG)
    else:
        logging.getLogger(UNWANTED[0]).addFilter(_wanted)
