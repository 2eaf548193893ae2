"""The launcher's command line: what it takes, what it leaves to the script, and what it says when it cannot."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from starters import JOBS, environment

from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.launch.__main__ import Command, main
from dsp_plugin.patches.megatron import Settings
from dsp_plugin.patches.megatron.arguments import check_sequence_length, heads_per_rank

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "train.py"
    path.write_text(
        "import json, sys\n"
        "import beside\n"
        "print(json.dumps({'argv': sys.argv, 'name': __name__, 'first': sys.path[0], 'beside': beside.here}))\n"
    )
    (tmp_path / "beside.py").write_text("here = True\n")
    return str(path)


@pytest.mark.parametrize(
    ("before", "after", "left", "flags", "cpu"),
    [
        ([], ["--lr", "1", "data"], ["--lr", "1", "data"], {}, None),
        (["--cpu"], ["--cpu", "x"], ["--cpu", "x"], {}, "1"),
        (["--cpu=force"], [], [], {}, "force"),
        ([], ["--sp-method", "ulysses", "--lr", "1"], ["--lr", "1"], {"sp_method": "ulysses"}, None),
        ([], ["--lr", "1", "--sp-method=ulysses"], ["--lr", "1"], {"sp_method": "ulysses"}, None),
        (["--sp-method", "ulysses"], ["--lr", "1"], ["--lr", "1"], {"sp_method": "ulysses"}, None),
        (["--sp-debug", "--cpu"], ["a"], ["a"], {"sp_debug": True}, "1"),
        (["--sp-quiet", "--cpu"], ["a"], ["a"], {"sp_quiet": True}, "1"),
        ([], ["a", "--sp-ulysses-size", "2", "b"], ["a", "b"], {"sp_ulysses_size": 2}, None),
        ([], ["a", "--", "--sp-own", "3", "--sp-method"], ["a", "--sp-own", "3", "--sp-method"], {}, None),
        ([], ["--sparse", "--spam=1", "-s"], ["--sparse", "--spam=1", "-s"], {}, None),
    ],
)
def test_splits_the_command_line(
    before: list[str], after: list[str], left: list[str], flags: dict[str, object], cpu: str | None, script: str
) -> None:
    command = Command.parse([*before, script, *after])
    assert (command.script, list(command.arguments), command.cpu) == (script, left, cpu)
    assert {name: value for name, value in vars(command.flags).items() if value not in (None, False)} == flags


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["no script", "SCRIPT"]),
        (["--cpu"], ["no script"]),
        (["no/such.py"], ["no script at 'no/such.py'"]),
        (["--gpu", "SCRIPT"], ["'--gpu'", "--cpu", "SCRIPT --gpu"]),
        (["SCRIPT", "--sp-metod", "ulysses"], ["--sp-metod", "did you mean --sp-method?", "lone --"]),
        (["SCRIPT", "--sp_method", "ulysses"], ["--sp_method", "did you mean --sp-method?"]),
        (["SCRIPT", "--sp-size", "2"], ["--sp-size", "did you mean --sp-", "Known flags"]),
        (["SCRIPT", "--sp-ulysses-size", "two"], ["--sp-ulysses-size", "two"]),
        (["--timeout", "1e300", "SCRIPT"], ["--timeout='1e300'", "30 days"]),
        (["--report", "SCRIPT", "SCRIPT"], ["--report=", "nothing can be written there", "every rank"]),
        (["--report", "/proc/no/such", "SCRIPT"], ["--report='/proc/no/such'", "nothing can be written there"]),
        (["--report"], ["--report", "no folder is named"]),
        (["SCRIPT", "--sp-method"], ["--sp-method", "expected one argument"]),
        (["--sequence-parallel"], ["--sequence-parallel=''", "no file can be read there"]),
        (["--sequence-parallel", "no/such.json", "SCRIPT"], ["no/such.json", "No such file"]),
        (["--sequence-parallel", "SCRIPT", "SCRIPT"], ["--sequence-parallel", "is not JSON"]),
        (["--sequence-parallel={'method': 1}", "SCRIPT"], ["--sequence-parallel", "is not JSON"]),
        (['--sequence-parallel={"method": "rings", "size": 2}', "SCRIPT"], ["--sequence-parallel", "'rings'", "ring"]),
        (['--sequence-parallel={"method": "ring", "sise": 2}', "SCRIPT"], ["unknown key 'sise'", "'size'"]),
    ],
)
def test_mistakes_are_named(argv: list[str], words: list[str], script: str) -> None:
    with pytest.raises(SequenceParallelConfigError) as error:
        Command.parse([script if argument == "SCRIPT" else argument for argument in argv])
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--sp-method", "ulises"], ["ulises", "the nearest is 'ulysses'"]),
        (["--sp-method", "ring", "--sp-layout", "striped"], ["--sp-layout='striped'", "zigzag or contiguous"]),
        (["--sp-method", "usp", "--sp-ulysses-order", "near"], ["ulysses_order='near'"]),
        (["--sp-method", "ulysses", "--sp-layout", "spiral"], ["spiral"]),
        (["--sp-method", "ulysses", "--sp-kernel", "fa9"], ["kernel", "fa9"]),
        (["--sp-method", "ulysses", "--sp-ring-size", "2"], ["ring_size=2", "ulysses has no ring"]),
        (["--sp-ulysses-size", "2"], ["--sp-ulysses-size", "without --sp-method"]),
        (["--sp-debug"], ["--sp-debug", "without --sp-method"]),
        (["--sp-memory", "auto"], ["--sp-memory", "without --sp-method"]),
        (["--sp-method", "ulysses", "--sp-memory", "most"], ["memory='most'", "expected a section", '"auto"']),
        (["--sp-method", "ulysses", "--sp-memory", '{"tile_tokens": 8'], ["--sp-memory=", "not JSON", '"auto"']),
        (["--sp-method", "ring", "--sp-memory", '{"tile_tokens": 0}'], ["memory.tile_tokens=0", "1 or more"]),
        (["--sp-method", "ring", "--sp-memory", '{"mlp_tiles": "8"}'], ["memory.mlp_tiles='8'", "1 or more"]),
        (["--sp-method", "ring", "--sp-memory", '{"tiles": 8}'], ["unknown key 'memory.tiles'", "'memory.mlp_tiles'"]),
    ],
)
def test_illegal_settings_end_with_one_line_and_status_2(
    flags: list[str],
    words: list[str],
    script: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("DSP_PLUGIN_CPU", raising=False)
    with pytest.raises(SystemExit) as ended:
        main([script, *flags])
    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert printed.out == ""
    assert printed.err.startswith("python -m dsp_plugin.launch: error: ")
    assert printed.err.count("\n") == 1
    assert all(word in printed.err for word in words), printed.err


def launch(*argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "DSP_PLUGIN_CPU"}
    return subprocess.run(
        [sys.executable, "-m", "dsp_plugin.launch", *argv],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_script_runs_as_if_alone(script: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    done = launch(script, "--lr", "1", cwd=tmp_path_factory.mktemp("elsewhere"))
    assert done.returncode == 0, done.stderr
    expected = (
        f'{{"argv": ["{script}", "--lr", "1"], "name": "__main__", "first": "{Path(script).parent}", "beside": true}}'
    )
    assert done.stdout.strip() == expected


@pytest.mark.parametrize(("given", "expected"), [({}, "3"), ({"LOCAL_WORLD_SIZE": "2"}, "2")])
def test_ranks_of_a_node_are_known_under_the_deepspeed_launcher(
    given: dict[str, str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    for name, value in {"LOCAL_SIZE": "3", **given}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "says.py").write_text("import os\nprint(os.environ['LOCAL_WORLD_SIZE'])\n")
    assert launch(str(tmp_path / "says.py"), cwd=tmp_path).stdout == f"{expected}\n"


def test_exit_status_and_traceback_are_the_scripts(tmp_path: Path) -> None:
    path = tmp_path / "fails.py"
    path.write_text("import sys\nsys.exit(7)\n")
    assert launch(str(path), cwd=tmp_path).returncode == 7
    path.write_text("1 / 0\n")
    done = launch(str(path), cwd=tmp_path)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


def test_help_shows_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    printed = capsys.readouterr().out
    assert all(flag in printed for flag in ("--cpu", "--sp-method", "--sp-kernel", "--context-parallel-size"))


@pytest.mark.parametrize("job", sorted(JOBS.glob("*_*.sh")), ids=lambda path: path.name)
@pytest.mark.parametrize("starter", ["", "elastic.sh", "slurm.sbatch", "hostfile.sh"])
def test_jobs_form_a_command_that_the_launcher_accepts(starter: str, job: Path, tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("node0 slots=8\n")
    start = [str(JOBS / starter)] if starter else []
    if starter == "hostfile.sh":
        start.append(str(hosts))
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    done = subprocess.run(
        ["bash", *start, str(job), "--train-iters", "5"],
        env={**kept, "DRY_RUN": "1", "RDZV": "host0:29400", "TP": "4", "CP": "2"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    words = done.stdout.split()
    assert words[0] == ("deepspeed" if starter == "hostfile.sh" else "torchrun")
    place = words.index("dsp_plugin.launch")
    assert words[place - 1] == ("--module" if starter == "hostfile.sh" else "-m")
    command = Command.parse(words[place + 1 :])
    framework, _, method = job.stem.split("_")
    if framework == "megatron":
        assert command.flags.sp_method == method
        assert command.arguments[command.arguments.index("--context-parallel-size") + 1] == "2"
    else:
        assert Path(command.arguments[command.arguments.index("--deepspeed_config") + 1]).is_file()
    assert command.arguments[-2:] == ("--train-iters", "5")


def documented() -> list[str]:
    """The commands of docs/launching.md that start a job."""
    lines = (ROOT / "docs" / "launching.md").read_text().splitlines()
    return [line.strip() for line in lines if line.startswith("    ") and "launch/" in line]


@pytest.mark.parametrize("command", documented())
def test_documented_commands_start_what_they_say(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    hosts = tmp_path / "hosts"
    hosts.write_text("host0 slots=8\nhost1 slots=8\n")
    (tmp_path / "pretrain_gpt.py").touch()
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    sbatch = 'sbatch() { while [[ $1 == -* ]]; do shift 2; done; bash "$@"; }'
    done = subprocess.run(
        ["bash", "-c", f"{sbatch}\n{command}"],
        env={**environment(tmp_path), "DRY_RUN": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    words = done.stdout.split()
    launched = Command.parse(words[words.index("dsp_plugin.launch") + 1 :])
    job = next(word for word in command.split() if "_" in word and word.endswith(".sh"))
    more = command.partition(job)[2].split()
    given = (*launched.arguments, *(f"--sp-exchange {launched.flags.sp_exchange}".split()))
    assert all(word in given for word in more)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["JOB"]),
        (["hosts.txt"], ["JOB"]),
        (["no/hosts", "job.sh"], ["no hostfile at 'no/hosts'", "slots="]),
    ],
)
def test_hostfile_starter_says_what_it_takes(argv: list[str], words: list[str]) -> None:
    done = subprocess.run(["bash", str(JOBS / "hostfile.sh"), *argv], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert all(word in done.stdout + done.stderr for word in words)


@pytest.mark.parametrize(
    ("argv", "layout", "words"),
    [
        (["--seq-length", "62", "--context-parallel-size", "2"], "zigzag", ["zigzag", "2 * ", "= 4", "60 or 64"]),
        (["--seq-length=62", "--context-parallel-size=4"], "contiguous", ["contiguous", "the 4 ranks", "60 or 64"]),
        (["--seq-length", "3", "--context-parallel-size", "4"], "zigzag", ["--seq-length to 8,"]),
        (["--seq-length", "8", "--context-parallel-size", "4", "--seq-length", "9"], "zigzag", ["--seq-length=9"]),
    ],
)
def test_length_that_ranks_cannot_share_is_refused(argv: list[str], layout: str, words: list[str]) -> None:
    with pytest.raises(SequenceParallelConfigError) as error:
        check_sequence_length(argv, layout)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("argv", "layout"),
    [
        (["--seq-length", "64", "--context-parallel-size", "4"], "zigzag"),
        (["--seq-length", "12", "--context-parallel-size", "4"], "contiguous"),
        (["--seq-length", "63"], "zigzag"),
        (["--context-parallel-size", "4"], "zigzag"),
        (["--seq-length", "long", "--context-parallel-size", "4"], "zigzag"),
    ],
)
def test_length_that_ranks_can_share_or_that_is_unknown_passes(argv: list[str], layout: str) -> None:
    check_sequence_length(argv, layout)


SPAWNS = """
import multiprocessing, sys
from pathlib import Path

def work(path):
    Path(path).write_text(__name__)

if __name__ == "__main__":
    print("started")
    process = multiprocessing.get_context("spawn").Process(target=work, args=(sys.argv[1],))
    process.start()
    process.join()
    sys.exit(process.exitcode)
"""


def test_processes_that_the_script_spawns_find_its_functions_and_do_not_run_it_again(tmp_path: Path) -> None:
    (tmp_path / "spawns.py").write_text(SPAWNS)
    done = launch(str(tmp_path / "spawns.py"), str(tmp_path / "out"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "started\n"
    assert (tmp_path / "out").read_text() == "__mp_main__"


@pytest.mark.parametrize(
    ("argv", "heads"),
    [
        (["--num-attention-heads", "8"], 8),
        (["--num-attention-heads=8", "--lr", "1", "--tensor-model-parallel-size", "4"], 2),
        (["--tensor-model-parallel-size=3", "--num-attention-heads", "8"], 2),
        (["--num-attention-heads", "2", "--tensor-model-parallel-size", "4"], None),
        (["--num-attention-heads"], None),
        (["--num-attention-heads", "many"], None),
        (["8"], None),
        ([], None),
    ],
)
def test_heads_are_read_off_a_megatron_command_line(argv: list[str], heads: int | None) -> None:
    assert heads_per_rank(argv) == heads


@pytest.mark.parametrize(("heads", "sizes"), [(None, (4, 1)), (8, (4, 1)), (2, (2, 2)), (3, (1, 4))])
def test_usp_takes_no_more_ulysses_ranks_than_heads(
    heads: int | None, sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    config = Settings("usp", heads=heads).config(4)
    assert (config.ulysses_size, config.ring_size) == sizes


@pytest.mark.parametrize("given", [["--local_rank=3"], ["--local_rank", "3"]])
def test_the_local_rank_of_the_deepspeed_launcher_reaches_the_script(given, tmp_path):
    script = tmp_path / "train.py"
    script.touch()
    command = Command.parse([*given, str(script), "--steps", "5"])
    assert command.script == str(script)
    assert command.arguments == (*given, "--steps", "5")
