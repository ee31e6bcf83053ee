"""`import llmkernels` is cheap: it loads no array library, and takes a tenth of a second at most."""

import ast
import re
import subprocess
import sys
from pathlib import Path

LIMIT = 0.1  # seconds
TRIES = 7  # the best counts: a busy machine makes a run slower, never faster


def test_import_is_quick():
    assert min(seconds_to_import() for _ in range(TRIES)) < LIMIT


def test_import_loads_nothing_heavy():
    program = (
        "import llmkernels, sys; print({'torch', 'jax', 'numpy', 'triton', 'typer', 'rich'} & set(sys.modules) or '')"
    )
    assert python("-c", program).stdout.strip() == ""


def test_help_loads_no_array_library():
    """`llmkernels --help` answers at once, so no command may load torch before it is chosen."""
    program = "import llmkernels.cli, sys; print({'torch', 'jax'} & set(sys.modules) or '')"
    assert python("-c", program).stdout.strip() == ""


def test_every_public_name_is_there():
    """What llmkernels/__init__.py promises to type checkers is what it hands out."""
    import llmkernels

    promised = {
        alias.asname or alias.name
        for node in ast.walk(ast.parse(Path(llmkernels.__file__).read_text()))
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for line in node.body
        for alias in line.names
    }
    assert {"rms_norm", "use", "explain", "bind"} <= promised
    assert [name for name in promised if not hasattr(llmkernels, name)] == []


def seconds_to_import():
    """What Python itself says the import took, everything that it loads included."""
    report = python("-X", "importtime", "-c", "import llmkernels").stderr
    (microseconds,) = re.findall(r"\|\s*(\d+) \| llmkernels$", report, re.MULTILINE)
    return int(microseconds) / 1e6


def python(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True)
