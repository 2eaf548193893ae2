"""Runs a user's unmodified script with the plugin in place.

    python -m dsp_plugin.launch [--cpu[=force]] [--report FOLDER] [--timeout SECONDS]
        [--sequence-parallel SECTION] SCRIPT [ARGS ...]
    torchrun --nproc-per-node 8 -m dsp_plugin.launch SCRIPT [ARGS ...]

DeepSpeed scripts need nothing more: the "sequence_parallel" section of their DeepSpeed config is honoured. Scripts of
accelerate or Transformers' Trainer on DDP or FSDP2 get theirs by --sequence-parallel, a JSON file or '{"method": ...}'.
Megatron-core scripts take --context-parallel-size N --sp-method ulysses; a Megatron-LM checkout in the script's folder
is the one that is used. The --sp-* flags are read here and hidden from the script; a script that has --sp-* flags of
its own gets them after a lone --. With --report every rank writes what it sent and its peak memory to
FOLDER/rank-R.json. When a rank dies, or is silent for --timeout seconds (300), the others say so and end; 0 turns that
off (docs/failures.md).
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from tempfile import TemporaryFile
from typing import NoReturn

import torch

from dsp_plugin.config import told
from dsp_plugin.errors import DamagedCheckpointError, PatchError, SequenceParallelConfigError, UnsupportedError
from dsp_plugin.launch.report import report
from dsp_plugin.patches import cpu, megatron, restarts
from dsp_plugin.patches.liveness import watched
from dsp_plugin.patches.megatron import arguments, tracker
from dsp_plugin.patches.patch import PatchSet
from dsp_plugin.patches.post_import import after_import
from dsp_plugin.watch.liveness import seconds

PROGRAM = "python -m dsp_plugin.launch"


class _Parser(argparse.ArgumentParser):
    """Reports mistakes in one line, without the usage text of a parser that the user does not know about."""

    def error(self, message: str) -> NoReturn:
        raise SequenceParallelConfigError(message)


@dataclass(frozen=True)
class Command:
    """A command line of the launcher.

    Attributes:
        cpu: what ``--cpu`` was given, ``"1"`` for the bare flag; None where it was not.
        report: folder for what every rank sent; None to keep no account.
        script: path of the user's script.
        arguments: what the script sees.
        flags: the ``--sp-*`` flags, as attributes `sp_*`.
        timeout: seconds of silence after which a rank is taken for dead; 0 watches nobody.
        section: of ``--sequence-parallel``, as JSON.
    """

    cpu: str | None
    report: Path | None
    script: str
    arguments: tuple[str, ...]
    flags: argparse.Namespace
    timeout: float
    section: str | None = None

    @classmethod
    def parse(cls, argv: Sequence[str]) -> Command:
        """Splits a command line into the launcher's and the script's.

        Raises:
            SequenceParallelConfigError: no script, a script that does not exist, a flag that is not known, or a section
                that is not legal.
        """
        rest = list(argv)
        cpu_mode = None
        report_folder = None
        section: str | None = None
        timeout: str | None = None
        before: list[str] = []
        # The deepspeed launcher puts the local rank right behind the module; it is meant for the script.
        local_rank: list[str] = []
        while rest and rest[0].startswith("-"):
            flag = rest.pop(0)
            name, _, value = flag.partition("=")
            if name == "--cpu":
                cpu_mode = value or "1"
            elif name == "--report":
                report_folder = _folder(value or (rest.pop(0) if rest else ""))
            elif name == "--timeout":
                timeout = value or (rest.pop(0) if rest else "")
            elif name == told.OPTION:
                section = told.section_text(value or (rest.pop(0) if rest else ""))
            elif name in ("--local_rank", "--local-rank"):
                local_rank = [flag] if value else [flag, *rest[:1]]
                rest = rest if value else rest[1:]
            elif name.startswith("--sp-"):
                before.append(flag)
                if not value and name not in ("--sp-debug", "--sp-quiet") and rest:
                    before.append(rest.pop(0))
            else:
                raise SequenceParallelConfigError(
                    f"unknown option {flag!r} before the script; the launcher takes --cpu, --report, --timeout, "
                    f"{told.OPTION} and --sp-* there. "
                    f"Options of the script follow it: {PROGRAM} SCRIPT {flag} ..."
                )
        if not rest:
            raise SequenceParallelConfigError(f"no script given. Usage: {PROGRAM} [--cpu[=force]] SCRIPT [ARGS ...]")
        script, *rest = rest
        if not Path(script).is_file():
            raise SequenceParallelConfigError(
                f"no script at {script!r} (in {os.getcwd()}). Usage: {PROGRAM} SCRIPT [ARGS ...]"
            )
        flags, remaining = _take_flags([*before, *rest])
        return cls(cpu_mode, report_folder, script, (*local_rank, *remaining), flags, seconds(timeout), section)


def _folder(text: str) -> Path:
    """A folder that can be written to, found out before the run and not at its end.

    Raises:
        SequenceParallelConfigError: it is none.
    """
    try:
        if not text:
            raise OSError("no folder is named")
        Path(text).mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=text).close()
    except (OSError, ValueError) as error:
        raise SequenceParallelConfigError(
            setting="--report",
            value=text,
            why=f"nothing can be written there: {getattr(error, 'strerror', None) or error}",
            remedy="name a folder that every rank may write to",
        ) from None
    return Path(text)


def _take_flags(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The ``--sp-*`` flags before a lone ``--``, and everything else."""
    border = argv.index("--") if "--" in argv else len(argv)
    parser = arguments.add_flags(_Parser(add_help=False, allow_abbrev=False))
    flags, remaining = parser.parse_known_args(argv[:border])
    known = [option for action in parser._actions for option in action.option_strings]
    for argument in remaining:
        name = argument.partition("=")[0]
        if name.startswith("--sp-") or name.startswith("--sp_"):
            nearest = get_close_matches(name.replace("_", "-"), known, n=1, cutoff=0.0)[0]
            raise SequenceParallelConfigError(
                f"unknown flag {name}; did you mean {nearest}? Known flags: {', '.join(known)}. If it is the "
                f"script's own, put it after a lone --."
            )
    return flags, remaining + argv[border + 1 :]


def prepare(command: Command) -> None:
    """Puts the plugin in place for a command, and makes the interpreter look as it would to the script alone.

    Raises:
        SequenceParallelConfigError, UnsupportedError, PatchError: what was asked for cannot be had.
    """
    # First of all: megatron is a namespace package, and a user's checkout beside the script is part of it.
    sys.path[0] = str(Path(command.script).resolve().parent)
    sys.argv = [command.script, *command.arguments]
    # DeepSpeed's launcher has a name of its own for what everybody else calls so.
    if "LOCAL_SIZE" in os.environ:
        os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ["LOCAL_SIZE"])
    mode = cpu.requested(command.cpu)
    if mode is not None:
        cpu.install(force=mode == "force")
    flags = command.flags
    if command.section is not None:
        told.tell(command.section)
    if flags.sp_method is not None and told.told() is not None:
        raise SequenceParallelConfigError(
            setting="--sp-method",
            value=flags.sp_method,
            why=f"{told.OPTION} ({told.VARIABLE}) is for scripts of accelerate, and --sp-method for Megatron-core",
            remedy=f"drop {told.OPTION} and unset {told.VARIABLE}, or drop --sp-method",
        )
    if flags.sp_method is not None:
        arguments.settle_method(flags, command.arguments)
        given = {name.removeprefix("sp_"): value for name, value in vars(flags).items() if value is not None}
        state = megatron.install(**given, heads=arguments.heads_per_rank(command.arguments))
        arguments.check_sequence_length(command.arguments, state.settings.layout_kind())
        if mode is None and not torch.cuda.is_available() and os.environ.get("RANK", "0") == "0":
            print(
                f"{PROGRAM}: no CUDA device here; --cpu runs Megatron-core on CPU and gloo", file=sys.stderr, flush=True
            )
    elif stray := [name for name, value in vars(flags).items() if value is not None and value is not False]:
        raise SequenceParallelConfigError(
            setting=", ".join(f"--{name.replace('_', '-')}" for name in stray),
            why="set without --sp-method, so nothing would use it",
            remedy="add --sp-method ulysses on Megatron-core; under DeepSpeed write settings into the section "
            '"sequence_parallel" of its JSON',
        )
    else:
        megatron.install_checkpoints()
    after_import("megatron.training.arguments", PatchSet("megatron arguments", arguments.patches(flags)).apply)
    after_import("megatron.training.checkpointing", PatchSet("megatron's last iteration", (tracker.patch(),)).apply)


@contextmanager
def _served() -> Iterator[None]:
    """Fails a run that has ended well, but did not use the section that it was told."""
    try:
        yield
    except SystemExit as end:
        if end.code:
            told.settle()
            raise
    problem = told.unserved()
    if problem is not None:
        if os.environ.get("RANK", "0") == "0":
            print(f"{PROGRAM}: error: {problem}", file=sys.stderr, flush=True)
        raise SystemExit(1)


def main(argv: Sequence[str] | None = None) -> None:
    """The command: exits with 2 and one line where it is wrong, else as the script does."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in ("-h", "--help"):
        print((__doc__ or "").strip())
        arguments.add_flags(argparse.ArgumentParser(prog=PROGRAM, add_help=False, usage=argparse.SUPPRESS)).print_help()
        return
    try:
        command = Command.parse(argv)
        prepare(command)
    except (SequenceParallelConfigError, UnsupportedError, PatchError) as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr, flush=True)
        told.settle()
        raise SystemExit(2) from None
    restarts.install()
    try:
        with _served(), watched(command.timeout), report(command.report):
            runpy.run_path(command.script, run_name="__main__")
    except DamagedCheckpointError:
        # Here and not by the interpreter, for an agent that ends takes its ranks with it.
        traceback.print_exc()
        restarts.forgo()
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
