"""Every Python block of README.md and docs/ is run, from top to bottom of its page, in one namespace and one folder.

What a page may hold, each at the start of a line and just before the block that it speaks of:

    <!-- setup: python code -->     is run where it stands, and not shown to the reader
    <!-- no-run: the reason -->     leaves the next block out: it needs the network or a model of several GB
    <!-- run -->                    runs the next bash block too (others are only shown)
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import types
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.forks import Fork, cli


ROOT = Path(__file__).resolve().parents[1]
PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if page.is_file()]

FENCE = re.compile(r"^(?P<indent>[ \t]*)(?P<fence>`{3,}|~{3,})[ \t]*(?P<info>.*?)[ \t]*$")
MARKER = re.compile(
    r"(?P<kind>setup|no-run)\s*:(?P<text>.*) | (?P<run>run)\s* | (?P<bad>(?:no-?run|setup|run)\b.*)",
    re.DOTALL | re.VERBOSE,
)
ANOTHER_NAME = {"py", "python3", "py3", "pycon", "ipython", "Python"}
SHELL = {"bash", "sh", "shell", "console"}


class PageError(ValueError):
    """The page is written wrongly; says where."""


@dataclass(frozen=True)
class Block:
    line: int  # of the first line of code
    language: str  # "python" or "bash"
    code: str
    skipped: str = ""  # the reason


def blocks_of(text: str, name: str = "page") -> list[Block]:
    """The blocks that are run, and those that a `no-run` leaves out."""
    lines = text.splitlines()
    blocks: list[Block] = []
    marker, reason, marker_line = "", "", 0  # waits for the next block
    number = 0

    def fail(line: int, message: str) -> PageError:
        return PageError(f"{name}:{line}: {message}")

    while number < len(lines):
        line = lines[number]
        number += 1
        start = number  # counted from one
        if line.lstrip().startswith("<!--"):
            comment = line.lstrip().removeprefix("<!--")
            while "-->" not in comment:
                if number == len(lines):
                    raise fail(start, "the comment is not closed")
                comment += "\n" + lines[number]
                number += 1
            comment = comment[: comment.index("-->")]
            found = MARKER.fullmatch(comment.strip())
            if found is None:
                continue
            if found["bad"]:
                raise fail(start, f"not understood: <!--{comment}-->; see tests/test_docs_snippets.py")
            if marker:
                raise fail(marker_line, f"<!-- {marker} --> is followed by no block")
            if found["kind"] == "setup":
                # blank lines in place of what stands before the code keep a traceback's line numbers right
                body = comment.split("setup", 1)[1].split(":", 1)[1]
                first, _, rest = body.partition("\n")
                blocks.append(Block(start, "python", f"{first.strip()}\n{textwrap.dedent(rest)}"))
            elif found["kind"] == "no-run":
                marker, reason, marker_line = "no-run", " ".join(found["text"].split()), start
                if not reason:
                    raise fail(start, "a block is left out without a reason")
            else:
                marker, marker_line = "run", start
            continue
        opened = FENCE.match(line)
        if opened is None:
            if marker and line.strip():
                raise fail(marker_line, f"<!-- {marker} --> is followed by no block")
            continue
        closing = re.compile(rf"^[ \t]*{opened['fence'][0]}{{{len(opened['fence'])},}}[ \t]*$")
        code: list[str] = []
        while number < len(lines) and not closing.match(lines[number]):
            code.append(lines[number].removeprefix(opened["indent"]))
            number += 1
        if number == len(lines):
            raise fail(start, "the block is not closed")
        number += 1
        language, _, options = opened["info"].partition(" ")
        if language in ANOTHER_NAME:
            raise fail(start, f"write ```python instead of ```{language}, so that the block is run")
        if language == "python" and re.search(r"no-?run", options):
            raise fail(start, "the site shows such a block wrongly; write <!-- no-run: reason --> before it")
        if marker == "no-run" and language != "python":
            raise fail(marker_line, "only Python blocks are run by default; <!-- no-run --> has nothing to leave out")
        if marker == "run" and language not in SHELL:
            raise fail(marker_line, "<!-- run --> speaks of a bash block")
        if language == "python" or marker == "run":
            blocks.append(Block(start + 1, "python" if language == "python" else "bash", "\n".join(code), reason))
        marker, reason = "", ""
    if marker:
        raise fail(marker_line, f"<!-- {marker} --> is followed by no block")
    return blocks


def our_commands(code: str) -> list[list[str]] | None:
    """The arguments of each command of a block, if it holds nothing but plain calls of `diffusers-erasure`.

    These are run without a shell, which would import the libraries for each of them.
    """
    lines = [line for line in code.replace("\\\n", " ").splitlines() if line.strip()]
    plain = re.compile(r"diffusers-erasure [^$`|&;<>()*?~!{}\\#]+")
    if not lines or not all(plain.fullmatch(line) for line in lines):
        return None
    return [shlex.split(line)[1:] for line in lines]


def run_page(page: Path, blocks: list[Block]) -> None:
    name = f"docs_snippets_{page.stem}"
    module = types.ModuleType(name)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up
    try:
        for block in blocks:
            if block.skipped:
                continue
            if block.language == "python":
                source = "\n" * (block.line - 1) + block.code
                exec(compile(source, str(page), "exec", dont_inherit=True), module.__dict__)  # noqa: S102
            elif (commands := our_commands(block.code)) is not None:
                for command in commands:
                    done = Fork(Path(".printed"), cli, *command)
                    code = done.wait()
                    print(done.output + done.errors)
                    if code:
                        raise AssertionError(f"{page}:{block.line}: exit status {code}\n{done.output}{done.errors}")
                shutil.rmtree(".printed")
            else:
                path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
                done = subprocess.run(
                    ["bash", "-euo", "pipefail", "-c", block.code],
                    env={**os.environ, "PATH": path},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    check=False,
                )
                print(done.stdout)
                if done.returncode:
                    raise AssertionError(f"{page}:{block.line}: exit status {done.returncode}\n{done.stdout}")
    finally:
        del sys.modules[name]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = blocks_of(page.read_text(encoding="utf-8"), str(page.relative_to(ROOT)))
    for block in blocks:
        if block.skipped:
            print(f"not run: {page.relative_to(ROOT)}:{block.line}: {block.skipped}")
            compile(block.code, str(page), "exec", dont_inherit=True)  # it parses at least
    monkeypatch.chdir(tmp_path)
    run_page(page, blocks)


def page(text: str) -> str:
    """A page written in a test, where the fences would end the block that shows it."""
    return textwrap.dedent(text).replace("'''", "```")


def test_a_page_is_one_story(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = page("""
        <!-- setup: x = 1 -->
        '''python
        y = x + 1
        '''
        <!-- setup:
        if y:
            x = 3
        -->
        - a list

            '''python
            if x == 3:
                open("written", "w").write(str(y))
            '''

        '''bash
        exit 1
        '''

        <!-- run -->

        '''bash
        python -c "print(open('written').read())" > read
        '''

        <!-- no-run: needs a
             network -->
        '''python
        raise SystemExit
        '''
        <!-- any other comment -->
    """)
    blocks = blocks_of(text)
    assert [block.language for block in blocks] == ["python", "python", "python", "python", "bash", "python"]
    assert [block.skipped for block in blocks] == [""] * 5 + ["needs a network"]
    run_page(tmp_path / "page.md", blocks)
    assert (tmp_path / "read").read_text() == "2\n"


def test_plain_calls_of_the_command_need_no_shell() -> None:
    code = "diffusers-erasure info 'a b' \\\n  --json\n\ndiffusers-erasure methods"
    assert our_commands(code) == [["info", "a b", "--json"], ["methods"]]
    for other in (
        "",
        "cd x\ndiffusers-erasure info x",
        "diffusers-erasure info x | head",
        "diffusers-erasure info $X",
    ):
        assert our_commands(other) is None


def test_a_failure_names_the_line_of_the_page(tmp_path: Path) -> None:
    text = page("""\
        <!-- setup:
        a = 0
        -->
        '''python
        b = 1
        b / a
        '''
    """)
    with pytest.raises(ZeroDivisionError) as caught:
        run_page(tmp_path / "page.md", blocks_of(text))
    assert caught.traceback[-1].lineno + 1 == 6
    with pytest.raises(AssertionError, match=r"page.md:3: exit status 1\n"):
        run_page(tmp_path / "page.md", blocks_of(page("<!-- run -->\n'''bash\nfalse\ntrue\n'''")))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- no-run -->\n'''python\n'''", "not understood"),
        ("<!-- no-run: -->\n'''python\n'''", "without a reason"),
        ("<!-- norun: x -->\n'''python\n'''", "not understood"),
        ("<!-- no-run: x -->\ntext\n'''python\n'''", "followed by no block"),
        ("<!-- no-run: x -->", "followed by no block"),
        ("<!-- no-run: x -->\n'''bash\n'''", "nothing to leave out"),
        ("<!-- run -->\n'''python\n'''", "a bash block"),
        ("'''python no-run\n'''", "<!-- no-run: reason -->"),
        ("'''py\n'''", "write ```python"),
        ("'''python\nx = 1", "not closed"),
        ("<!-- setup:", "not closed"),
    ],
)
def test_a_page_that_is_written_wrongly(text: str, message: str) -> None:
    with pytest.raises(PageError, match=re.escape(message)):
        blocks_of(page(text))
