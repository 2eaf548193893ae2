"""A user's Megatron-LM script that knows nothing of us, on indexed data: same samples and losses, also resumed."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from cores import needs_training
from megatron_runs import EXAMPLES, ROOT, torchrun

pytestmark = [pytest.mark.timeout(600), needs_training()]
SCRIPT = Path(__file__).parent / "users_pretrain.py"
TINY = (ROOT / "configs" / "megatron" / "gpt_tiny_cpu.args").read_text().split()
END_OF_DOCUMENT = 255
MICROBATCHES = 4
CP2 = ["--context-parallel-size", "2"]


def write_corpus(prefix: Path) -> Path:
    """Forty random documents of 5 to 60 tokens, the same in every run, in the format of Megatron's preprocessing."""
    import numpy as np
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    # Documents count in one way, so in an unlucky corpus two pairs of them read alike for the length of a sample.
    generator = torch.Generator().manual_seed(0)
    for length in torch.randint(5, 60, (40,), generator=generator).tolist():
        # Counting, so that there is something to learn.
        tokens = (torch.randint(200, (), generator=generator) + 7 * torch.arange(length)) % 254 + 1
        document = torch.cat([tokens, torch.tensor([END_OF_DOCUMENT])])
        builder.add_document(document, [len(document)])
    builder.finalize(f"{prefix}.idx")
    return prefix


@dataclass(frozen=True)
class Trained:
    """What a run logged, and the tokens of each microbatch that each rank read."""

    losses: list[float]
    batches: list[list[list[int]]]


class Project:
    """A folder with a corpus, and runs of a script on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        corpus = write_corpus(folder / "corpus")
        flags = [flag for flag in TINY if flag != "--mock-data"]
        self.flags = [
            *flags,
            "--data-path",
            str(corpus),
            "--split",
            "100,0,0",
            "--data-cache-path",
            str(folder / "cache"),
        ]

    def train(self, ranks: int, *argv: str, script: Path = SCRIPT) -> Trained:
        """Trains for three iterations, or as `argv` says."""
        out = self.folder / f"batches-{len(list(self.folder.glob('batches-*')))}"
        record = ["--batches-out", str(out)] if script is SCRIPT else []
        start = ["-m", "dsp_plugin.launch", "--cpu", str(script)]
        done = torchrun(ranks, *start, *self.flags, *record, *argv, timeout=240)
        losses = [float(loss) for loss in re.findall(r"lm loss: (\S+)", done.stdout)]
        files = [out / f"rank-{rank}.json" for rank in range(ranks)] if record else []
        return Trained(losses, [json.loads(file.read_text()) for file in files])


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return Project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def alone(project: Project) -> Trained:
    """One rank of stock Megatron."""
    found = project.train(1)
    assert len(found.losses) == 3
    assert found.losses[-1] < found.losses[0]
    return found


@pytest.fixture(scope="module")
def sharded(project: Project) -> Trained:
    """Two ranks that share every sequence, which leave a checkpoint of the second iteration."""
    watched = ["--timing-log-level", "2", "--check-for-spiky-loss", "--note", "of our own"]
    saved = ["--save", str(project.folder / "checkpoints"), "--save-interval", "2"]
    return project.train(2, *CP2, "--sp-method", "usp", *watched, *saved)


def test_sequence_peers_read_the_samples_of_one_rank(alone: Trained, sharded: Trained) -> None:
    assert len(alone.batches[0]) == 3 * MICROBATCHES
    assert len({tuple(tokens) for tokens in alone.batches[0]}) == len(alone.batches[0]), "samples repeat"
    assert sharded.batches == alone.batches * 2
    assert sharded.losses == pytest.approx(alone.losses, rel=1e-6)


def test_resume_at_another_size_continues_with_the_next_sample(
    alone: Trained, sharded: Trained, project: Project
) -> None:
    resumed = project.train(1, "--load", str(project.folder / "checkpoints"), "--ckpt-step", "2")
    assert resumed.batches[0] == alone.batches[0][2 * MICROBATCHES :]
    assert resumed.losses == pytest.approx(alone.losses[2:], rel=1e-6)


@pytest.mark.parametrize(
    "method", ["usp", *(pytest.param(method, marks=pytest.mark.matrix) for method in ("ring", "ulysses", "lightseq"))]
)
def test_documents_of_a_sample_do_not_see_each_other(method: str, alone: Trained, project: Project) -> None:
    apart = ["--reset-attention-mask", "--reset-position-ids"]
    stock = project.train(1, *apart)
    found = project.train(2, *apart, *CP2, "--sp-method", method)
    assert abs(stock.losses[-1] - alone.losses[-1]) > 1e-4, "no sample has two documents"
    assert found.losses == pytest.approx(stock.losses, rel=1e-6)


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("parallel", "argv"),
    [
        ("--tensor-model-parallel-size 2 --sequence-parallel", "--sp-method ring"),
        # Megatron draws other weights on each pipeline stage.
        ("--pipeline-model-parallel-size 2", "--sp-method lightseq"),
        ("", "--sp-method ulysses --use-distributed-optimizer"),
    ],
    ids=["tp2 x cp2", "pp2 x cp2", "dp2 x cp2"],
)
@pytest.mark.parametrize("script", [SCRIPT, EXAMPLES / "pretrain_gpt.py"], ids=lambda path: path.stem)
def test_scripts_train_on_indexed_data_as_without_sequence_parallelism(
    parallel: str, argv: str, script: Path, project: Project
) -> None:
    stock = project.train(2 if parallel else 1, *parallel.split(), script=script)
    found = project.train(4, *parallel.split(), *CP2, *argv.split(), script=script)
    assert len(stock.losses) == 3
    assert found.losses == pytest.approx(stock.losses, rel=1e-6)


@pytest.mark.matrix
def test_hybrid_model_that_megatron_builds_from_its_arguments(project: Project) -> None:
    hybrid = ["--from-config", "--num-layers", "4", "--hybrid-layer-pattern", "*-*-"]
    hybrid += ["--spec", "users_model", "hybrid_stack"]
    stock = project.train(1, *hybrid)
    found = project.train(2, *hybrid, *CP2, "--sp-method", "lightseq")
    assert len(stock.losses) == 3
    assert found.losses == pytest.approx(stock.losses, rel=1e-6)


def test_help_has_megatrons_flags_and_ours() -> None:
    done = torchrun(1, "-m", "dsp_plugin.launch", "--cpu", str(SCRIPT), "--help")
    names = (
        "method ulysses-size ring-size ulysses-order ring-gradient-dtype layout kernel debug quiet recompute exchange"
    )
    flags = [f"--sp-{name}" for name in (*names.split(), "softmax-method")]
    assert all(flag in done.stdout for flag in [*flags, "--context-parallel-size"])
