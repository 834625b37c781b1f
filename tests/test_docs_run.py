"""Every code block of README.md, CHANGELOG.md and docs/ is run, page by page, in the order of the page.

`python`                   run in one namespace per page, in an empty working directory
`bash`, `sh`               run by bash in the same directory, with the folder of this Python first on the PATH
`console`                  the same for what follows `$ `; a command goes on after a final `\\` or with `> `
`toml`, `json`             must parse
`text`, `diff`, none       not run; any other language is an error, so that a misspelt one is not missed

The word `compare` after `console` compares the output too, where `...` stands for any text. In the working
directory both `shared/` and `../shared/` are links to ../shared (where it exists), and `examples/` is one to
the folder of that name. A comment above a block, alone on its line, changes how it is run:

<!-- test: skip reason="why" -->    not run; counted and named at the end of the test run
<!-- test: needs-shared -->         not run where ../shared is absent; says so
<!-- test: slow -->                 may take long; marks the test of its page `slow`
<!-- test: fails -->                a shell block that must end with an error
<!-- test: file=NAME -->            written to NAME in the working directory instead of being run

To run one page by hand: python tests/test_docs_run.py docs/architecture.md
"""

from __future__ import annotations

import doctest
import json
import os
import re
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[1]
SHARED = TOP.parent / "shared"

NOT_RUN = frozenset({"", "text", "diff"})
SHELL = frozenset({"bash", "sh", "console"})
PARSED = frozenset({"toml", "json"})
SECONDS, SLOW_SECONDS = 300, 1800  # limits for one block
MARK = "@@ next command @@"

FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,}|~{3,}) *(?P<info>[^`]*)$")
COMMENT = re.compile(r"^ *<!-- *test: *(?P<words>.*?) *-->\s*$")
WORD = re.compile(r'(?P<key>[a-z-]+)(?:=(?:"(?P<quoted>[^"]*)"|(?P<plain>\S+)))?(?:\s+|$)')


class DocsError(Exception):
    """A block that fails, or cannot be understood; the message begins with page and line."""


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    """Number of the opening fence; the code starts on the next line."""
    language: str
    code: str
    compare: bool = False
    skip: str = ""
    needs_shared: bool = False
    slow: bool = False
    fails: bool = False
    file: str = ""

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    def not_run(self, shared: Path) -> str:
        """Why the block is left out here; "" if it is run."""
        return self.skip or ("needs ../shared" if self.needs_shared and not shared.is_dir() else "")


def parse_page(text: str, page: str) -> list[Block]:
    """All fenced blocks of a page, in order."""
    blocks: list[Block] = []
    marks: dict[str, str] = {}
    lines = text.splitlines()
    at = 0
    while at < len(lines):
        line = lines[at]
        if comment := COMMENT.match(line):
            marks |= parse_marks(comment["words"], f"{page}:{at + 1}")
        elif fence := FENCE.match(line):
            start, close = at, re.compile(rf"^ *{fence['ticks']}[`~]* *$")
            at += 1
            while at < len(lines) and not close.match(lines[at]):
                at += 1
            if at == len(lines):
                raise DocsError(f"{page}:{start + 1}: the block is not closed")
            indent = len(fence["indent"])
            body = [row[indent:] if not row[:indent].strip() else row for row in lines[start + 1 : at]]
            blocks.append(make_block(page, start + 1, fence["info"].split(), body, marks))
            marks = {}
        elif marks and line.strip():
            raise DocsError(f"{page}:{at + 1}: a test comment must stand directly above a code block")
        at += 1
    if marks:
        raise DocsError(f"{page}: a test comment at the end, above no code block")
    return blocks


def parse_marks(words: str, place: str) -> dict[str, str]:
    marks = {word["key"]: word["quoted"] or word["plain"] or "" for word in WORD.finditer(words)}
    if WORD.sub("", words) or not marks or marks.keys() - {"skip", "reason", "needs-shared", "slow", "fails", "file"}:
        raise DocsError(f"{place}: cannot understand the test comment {words!r}")
    if ("skip" in marks) != bool(marks.get("reason", "").strip()):
        raise DocsError(f'{place}: skip and reason="…" go together; say why the block cannot be run')
    if "file" in marks and (not marks["file"] or Path(marks["file"]).is_absolute() or ".." in marks["file"]):
        raise DocsError(f"{place}: file=NAME needs a name inside the working directory")
    return marks


def make_block(page: str, line: int, info: list[str], body: list[str], marks: dict[str, str]) -> Block:
    language = info[0] if info else ""
    block = Block(
        page=page,
        line=line,
        language=language,
        code="".join(f"{row}\n" for row in body),
        compare="compare" in info[1:],
        skip=marks.get("reason", ""),
        needs_shared="needs-shared" in marks,
        slow="slow" in marks,
        fails="fails" in marks,
        file=marks.get("file", ""),
    )
    if not block.file and language not in NOT_RUN | SHELL | PARSED | {"python"}:
        known = ", ".join(sorted(NOT_RUN | SHELL | PARSED | {"python"} - {""}))
        raise DocsError(f"{block.place}: unknown language {language!r}; known: {known} (text is not run)")
    if block.compare and language != "console":
        raise DocsError(f"{block.place}: compare is for console blocks")
    if block.fails and language not in SHELL:
        raise DocsError(f"{block.place}: fails is for shell blocks")
    if marks and language in NOT_RUN and not block.file:
        raise DocsError(f"{block.place}: a {language or 'plain'} block is not run; remove its test comment")
    return block


def commands(block: Block) -> list[tuple[str, str]]:
    """(command, expected output) pairs of a shell block; a bash block is one command."""
    if block.language != "console":
        return [(block.code, "")]
    found: list[tuple[list[str], list[str]]] = []
    open_command = False
    for line in block.code.splitlines():
        if line.startswith("$ "):
            found.append(([line[2:]], []))
            open_command = True
        elif open_command and (line.startswith("> ") or found[-1][0][-1].endswith("\\")):
            found[-1][0].append(line.removeprefix("> "))
        elif found:
            found[-1][1].append(line)
            open_command = False
        elif line.strip():
            raise DocsError(f"{block.place}: a console block starts with '$ ' and a command")
    if not found:
        raise DocsError(f"{block.place}: a console block without a command; use text")
    return [("\n".join(command), "\n".join(output)) for command, output in found]


def run_shell(block: Block) -> None:
    """Run a shell block in the current directory."""
    pairs = commands(block)
    script = f"echo '{MARK}'\n".join(f"{command}\n" for command, _ in pairs)
    env = os.environ | {"PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))}
    answer = subprocess.run(
        ["bash", "-e", "-c", script],
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=SLOW_SECONDS if block.slow else SECONDS,
    )
    if block.fails and answer.returncode == 0:
        raise DocsError(f"{block.place}: marked 'fails', but succeeded:\n{block.code}\n{answer.stdout}")
    if not block.fails and answer.returncode != 0:
        raise DocsError(f"{block.place}: exit status {answer.returncode}:\n{block.code}\n{answer.stdout}")
    if block.compare:
        compare_output(block, pairs, answer.stdout)


def compare_output(block: Block, pairs: list[tuple[str, str]], output: str) -> None:
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    outputs = output.split(f"{MARK}\n")
    for (command, want), got in zip(pairs, [*outputs, *[""] * (len(pairs) - len(outputs))], strict=True):
        if not doctest.OutputChecker().check_output(f"{want}\n".lstrip("\n"), got, flags):
            raise DocsError(f"{block.place}: $ {command}\nexpected:\n{want}\ngot:\n{got}")


def run_python(block: Block, page: Path, namespace: dict[str, object]) -> None:
    """Run a python block; the numbers of its lines are those of the page, so that a traceback shows them."""
    exec(compile("\n" * block.line + block.code, str(page), "exec", dont_inherit=True), namespace)


def parse_data(block: Block) -> None:
    try:
        if block.language == "json":
            json.loads(block.code)
        elif sys.version_info >= (3, 11):
            import tomllib

            tomllib.loads(block.code)
    except ValueError as error:
        raise DocsError(f"{block.place}: not valid {block.language}: {error}") from error


def run_page(page: Path, shared: Path) -> None:
    """Run the blocks of a page in the current directory, in this process."""
    main = types.ModuleType("__main__")  # dataclasses and pickles look their module up by name
    sys.modules["__main__"] = main
    for block in parse_page(page.read_text(encoding="utf-8"), page.name):
        if block.not_run(shared):
            continue
        if block.file:
            Path(block.file).parent.mkdir(parents=True, exist_ok=True)
            Path(block.file).write_text(block.code, encoding="utf-8")
        elif block.language == "python":
            run_python(block, page, vars(main))
        elif block.language in SHELL:
            run_shell(block)
        elif block.language in PARSED:
            parse_data(block)


def working_directory(top: Path, shared: Path) -> Path:
    """An empty folder in which the paths of the docs hold, as they do in the repository."""
    cwd = top / "checkout"
    cwd.mkdir(parents=True)
    links = [(cwd / "examples", TOP / "examples"), (cwd / "shared", shared), (top / "shared", shared)]
    for link, target in links:
        if target.is_dir():
            link.symlink_to(target, target_is_directory=True)
    return cwd


def run_apart(page: Path, top: Path, shared: Path = SHARED) -> list[str]:
    """Run a page in a process of its own; the places and reasons of the blocks that were left out."""
    blocks = parse_page(page.read_text(encoding="utf-8"), page.name)
    limit = sum(SLOW_SECONDS if block.slow else SECONDS for block in blocks) + SECONDS
    answer = subprocess.run(
        [sys.executable, __file__, str(page), str(shared)],
        cwd=working_directory(top, shared),
        # The docs must not depend on what a model hub serves today.
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=limit,
    )
    if answer.returncode:
        raise DocsError(f"{page.name} fails:\n{answer.stdout[-6000:]}")
    return [f"{block.place}: {why}" for block in blocks if (why := block.not_run(shared))]


def pages(top: Path) -> list[Path]:
    found = [top / "README.md", top / "CHANGELOG.md", *sorted((top / "docs").rglob("*.md"))]
    return [page for page in found if page.is_file()]


def page_params(paths: Iterable[Path]) -> list[object]:
    return [
        pytest.param(
            path,
            id=path.relative_to(TOP).as_posix(),
            marks=[pytest.mark.slow] if re.search(r"<!-- *test:[^>]*\bslow\b", path.read_text("utf-8")) else [],
        )
        for path in paths
    ]


@pytest.mark.parametrize("page", page_params(pages(TOP)))
def test_every_block_of_the_page_runs(
    page: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    for left_out in run_apart(page, tmp_path):
        record_property("docs_skip", left_out)


# The runner, run.


def write(top: Path, text: str) -> Path:
    page = top / "page.md"
    page.write_text(text.replace("'''", "```"), encoding="utf-8")
    return page


def run_text(top: Path, text: str, shared: Path | None = None) -> list[str]:
    return run_apart(write(top, text), top / "run", shared or top / "absent")


def test_blocks_of_a_page_run_in_order_and_share_their_state(tmp_path: Path) -> None:
    text = """
# A page
'''python
from __future__ import annotations
from dataclasses import dataclass
from pathlib import Path
@dataclass
class Point:
    x: int
Path("a.txt").write_text(str(Point(3).x))
'''
1. indented
   '''console
   $ cat a.txt \\
   >   a.txt
   (the output is not compared)
   $ python -c 'open("b.txt", "w").write("b")'
   '''
'''bash
set -u
test -f b.txt
mv b.txt c.txt
'''
'''python
assert Path("c.txt").read_text() == "b" and Point(1).x == 1
'''
'''text
not $ run
'''
"""
    assert run_text(tmp_path, text) == []
    assert (tmp_path / "run/checkout/c.txt").is_file()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("'''python\nx = 1\n'''\n\n'''python\nassert x == 2\n'''", r"page\.md\", line 6"),
        ("'''python\nraise SystemExit(3)\n'''", "fails"),
        ("'''console\n$ true\n$ false\n$ true\n'''", r"page\.md:1: exit status 1"),
        ("\n'''bash\nfalse\ntrue\n'''", r"page\.md:2: exit status 1"),
        ("'''sh\nno-such-command\n'''", "exit status 127"),
        ("'''console compare\n$ echo one\none\n$ echo two\nthree\n'''", "expected:\nthree\ngot:\ntwo"),
        ("'''json\n{,}\n'''", "not valid json"),
        ("<!-- test: fails -->\n'''bash\ntrue\n'''", "marked 'fails', but succeeded"),
    ],
)
def test_a_failing_block_fails_its_page(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DocsError, match=message):
        run_text(tmp_path, text)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_a_block_of_broken_toml_fails(tmp_path: Path) -> None:
    with pytest.raises(DocsError, match="not valid toml"):
        run_text(tmp_path, "'''toml\na = = 1\n'''")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("'''pyhton\nx\n'''", "unknown language 'pyhton'"),
        ("'''python\nx = 1\n", "not closed"),
        ("'''console\nvitq demo\n'''", "starts with"),
        ("<!-- test: skip -->\n'''bash\nfalse\n'''", "go together"),
        ("<!-- test: skip reason=\"\" -->\n'''bash\nfalse\n'''", "go together"),
        ("<!-- test: skpi -->\n'''bash\nfalse\n'''", "cannot understand"),
        ("<!-- test: slow -->\nprose\n'''bash\ntrue\n'''", "directly above"),
        ("<!-- test: slow -->\n", "above no code block"),
        ("<!-- test: slow -->\n'''text\nx\n'''", "remove its test comment"),
        ("<!-- test: file=../x -->\n'''text\nx\n'''", "inside the working directory"),
        ("'''python compare\nx = 1\n'''", "compare is for console"),
    ],
)
def test_a_page_that_cannot_be_understood_is_an_error(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DocsError, match=message):
        run_text(tmp_path, text)


def test_comments_above_a_block_change_how_it_runs(tmp_path: Path) -> None:
    text = """
<!-- test: skip reason="runs these tests" -->
'''bash
false
'''
<!-- test: needs-shared -->
<!-- test: slow -->

'''bash
grep -q here shared/x ../shared/x
'''
<!-- test: fails -->
'''bash
false
'''
<!-- test: file=pkg/mine.py -->
'''python
value = undefined_name if False else 7
'''
'''console compare
$ python -c 'from pkg.mine import value; print(value); print("a b c")'
7
a ... c
'''
'''toml
a = 1
'''
'''json
{"a": [1]}
'''
"""
    assert run_text(tmp_path, text) == ["page.md:3: runs these tests", "page.md:9: needs ../shared"]
    (tmp_path / "there").mkdir()
    (tmp_path / "there/x").write_text("here")
    (tmp_path / "second").mkdir()
    assert run_text(tmp_path / "second", text, tmp_path / "there") == ["page.md:3: runs these tests"]


def by_hand(arguments: list[str]) -> None:
    """PAGE runs it in a fresh folder; PAGE SHARED runs it here, which is what the tests call."""
    sys.path[0] = ""
    page = Path(arguments[0]).resolve()
    if len(arguments) > 1:
        run_page(page, Path(arguments[1]))
        return
    with tempfile.TemporaryDirectory() as top:
        left_out = run_apart(page, Path(top))
    sys.stdout.write("".join(f"not run: {note}\n" for note in left_out) + f"{page.name}: every other block runs\n")


if __name__ == "__main__":
    by_hand(sys.argv[1:])
