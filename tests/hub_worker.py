"""A process that imports the library once, and forks for each piece of work: a fresh client in a tenth of a second.

It reads `{"work": [{"code", "args", "fast"}, ...]}` line by line from standard input, runs each piece of a list in a
child of its own, all at once, and writes their results as one line. A piece sets `result`.
"""

import json
import logging
import os
import sys
import time
import traceback
from typing import Any

import torch

from diffusers_erasure import Erasure, demo, erase


def prepare() -> dict[str, Any]:
    torch.set_num_threads(1)
    pipe = demo.load_pipeline()
    lora = erase(pipe, ["cat"], anchors="animal", method="uce")
    other = erase(pipe, ["dog", "pizza"], anchors=["animal", "food"], rank=2)
    text_map = erase(pipe, ["cat"], anchors="animal", layer="text_map")
    return {"Erasure": Erasure, "pipe": pipe, "lora": lora, "other": other, "text_map": text_map, "torch": torch}


def run(piece: dict[str, Any], names: dict[str, Any]) -> dict[str, Any]:
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    for name in ("diffusers_erasure", "huggingface_hub"):
        logging.getLogger(name).handlers = [Keep()]
        logging.getLogger(name).propagate = False
    waited, sleep = [0.0], time.sleep

    def short(seconds: float) -> None:
        waited[0] += seconds
        sleep(min(seconds, 0.005))

    if piece["fast"]:
        time.sleep = short
    space = {**names, **piece["args"], "result": None}
    found: dict[str, Any] = {"error": None}
    start = time.monotonic()
    try:
        exec(piece["code"], space)  # noqa: S102
        found["result"] = space["result"]
    except BaseException as error:
        found["error"] = {
            "classes": [kind.__name__ for kind in type(error).__mro__],
            "message": str(error),
            "cause": type(error.__cause__).__name__,
            "traceback": traceback.format_exc(),
        }
    return {**found, "log": "\n".join(lines), "waited": waited[0], "seconds": time.monotonic() - start}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not mix with the answers
    names = prepare()
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        children = []
        for piece in json.loads(line)["work"]:
            reader, writer = os.pipe()
            child = os.fork()
            if child == 0:
                with os.fdopen(writer, "w") as pipe:
                    json.dump(run(piece, names), pipe)
                os._exit(0)
            os.close(writer)
            children.append((child, reader))
        results = []
        for child, reader in children:
            with os.fdopen(reader) as pipe:
                results.append(json.loads(pipe.read() or '{"error": {"message": "the child died", "classes": []}}'))
            os.waitpid(child, 0)
        print(json.dumps(results), file=answers, flush=True)


if __name__ == "__main__":
    main()
