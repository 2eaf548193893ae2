"""Which of the library's code `torch.compile` leaves alone: all but models, which are written as users write theirs."""

from __future__ import annotations

import subprocess
import sys
from functools import wraps
from pathlib import Path

import pytest
import torch

import dsp_plugin
from dsp_plugin import patches
from dsp_plugin.sharding.compiling import pass_over_decorators, uncompiled

ROOMS = [Path(package.__file__).parent for package in (dsp_plugin, patches) if package.__file__ is not None]


def test_all_code_but_models_is_left_alone() -> None:
    from torch._dynamo.trace_rules import check_file

    files = [path for room in ROOMS for path in room.rglob("*.py") if path.name != "__init__.py"]
    assert len(files) > 150
    for path in files:
        models = "models" in path.parts[:-1] and path.parts[-2] == "models"
        assert check_file(str(path)).skipped != models, path


def test_the_compiler_is_not_imported_for_what_it_leaves_alone() -> None:
    """Which takes seconds."""
    code = "import sys, dsp_plugin; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


def test_what_is_never_compiled_says_why() -> None:
    function = uncompiled(lambda x: x + 1)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"dsp_plugin exchanges tokens .* leave out fullgraph=True"):
        torch.compile(lambda x: function(x) * 2, backend="eager", fullgraph=True)(torch.ones(2))


def test_decorators_of_forwards_are_passed_over_as_frames_and_not_where_they_are_part_of_a_graph() -> None:
    from torch._dynamo.testing import CompileCounter

    def decorated(forward):
        @wraps(forward)
        def call(self, x):
            return forward(self, x)

        return call

    class Inner(torch.nn.Module):
        @decorated
        def forward(self, x):
            return x + 1

    class Outer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        @decorated
        def forward(self, x):
            return self.inner(x) * 2

    torch.compiler.reset()
    model, counter = Outer(), CompileCounter()
    pass_over_decorators(model)
    assert torch.compile(model, backend=counter, fullgraph=True)(torch.ones(2)).tolist() == [4, 4]
    assert (counter.frame_count, counter.op_count) == (1, 2)
    torch.compiler.reset()
