"""The patches fit the installed DeepSpeed, are applied once, and leave no trace when reverted or refused."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from dsp_plugin.errors import PatchError, SequenceParallelConfigError
from dsp_plugin.patches import autoload
from dsp_plugin.patches import deepspeed as patches

deepspeed = pytest.importorskip("deepspeed")
DeepSpeedConfig = pytest.importorskip("deepspeed.runtime.config").DeepSpeedConfig
DeepSpeedEngine = pytest.importorskip("deepspeed.runtime.engine").DeepSpeedEngine


def targets() -> dict[str, Any]:
    """Everything that is patched, as it is now."""
    engine = ("__init__", "deepspeed_io", "set_train_batch_size", "set_train_micro_batch_size")
    return {
        "initialize": deepspeed.initialize,
        "batch": DeepSpeedConfig._configure_train_batch_size,
        **{name: getattr(DeepSpeedEngine, name) for name in engine},
    }


@pytest.fixture(autouse=True)
def _unpatched() -> Iterator[None]:
    """Every test starts from DeepSpeed as it was, and ends as `import dsp_plugin` leaves it."""
    patches.uninstall()
    yield
    patches.install()


def test_install_is_idempotent_and_reversible() -> None:
    """Twice is once; back is back."""
    upstream = targets()
    patches.install()
    patched = targets()
    assert all(patched[name] is not upstream[name] for name in upstream)
    patches.install()
    assert targets() == patched
    patches.uninstall()
    assert targets() == upstream


def test_an_unsupported_version_is_refused_and_nothing_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names version, patch and remedy."""
    upstream = targets()
    monkeypatch.setattr(metadata, "version", lambda name: "0.12.3")
    with pytest.raises(PatchError, match=r"deepspeed 0\.12\.3 is not supported by patch .*nothing was patched"):
        patches.install()
    assert targets() == upstream


def test_a_changed_signature_is_refused_and_nothing_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last target of the set differs, and the first ones stay unpatched too."""
    monkeypatch.setattr(DeepSpeedEngine, "set_train_micro_batch_size", lambda self, samples: None)
    upstream = targets()
    with pytest.raises(PatchError, match="set_train_micro_batch_size has no parameter micro_batch_size"):
        patches.install()
    assert targets() == upstream


def test_a_reload_of_deepspeed_is_patched_again() -> None:
    patches.install()
    before = deepspeed.initialize
    importlib.reload(deepspeed)
    assert deepspeed.initialize is not before
    assert patches.PATCHES.applied, "the hook behind the import has made the patch again"
    with pytest.raises(SequenceParallelConfigError, match="method='ulises'"):
        deepspeed.initialize(model=nn.Linear(1, 1), config={"sequence_parallel": {"method": "ulises", "size": 1}})
    patches.uninstall()
    assert deepspeed.initialize.__module__ == "deepspeed"
    assert not hasattr(deepspeed.initialize, "__wrapped__")


def test_what_somebody_else_has_wrapped_keeps_all_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    patches.install()
    step = DeepSpeedEngine.step
    with monkeypatch.context() as wrapped:
        wrapped.setattr(DeepSpeedEngine, "step", lambda self, *args, **kwargs: step(self, *args, **kwargs))
        with pytest.raises(PatchError, match=r"'log steps' cannot be reverted: .*step was replaced.*nothing of"):
            patches.uninstall()
        assert [patch.name for patch in patches.PATCHES if not patch.applied] == []
    patches.uninstall()


OTHERS = {"train_batch_size": 1, "sequence_parallel_size": 1}
OURS = {"method": "ulysses", "size": 1}


@pytest.mark.parametrize("reason", ["version", "signature"])
def test_an_unserved_deepspeed_refuses_our_section_and_nothing_else(
    reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`import deepspeed` is everybody's: it must not fail for who never asked for us."""
    with monkeypatch.context() as unserved:
        if reason == "version":
            real = metadata.version
            unserved.setattr(metadata, "version", lambda name: "0.12.3" if name == "deepspeed" else real(name))
        else:
            unserved.setattr(DeepSpeedEngine, "set_train_micro_batch_size", lambda self, samples: None)
        upstream = targets()
        autoload._install_deepspeed()
        autoload._install_deepspeed()
        assert targets() == upstream
        assert DeepSpeedConfig({**OTHERS}).train_batch_size == 1
        said = r"deepspeed 0\.12\.3 is not supported" if reason == "version" else "has no parameter micro_batch_size"
        (tmp_path / "config.json").write_text(json.dumps({**OTHERS, "sequence_parallel": OURS}))
        for config in (
            {**OTHERS, "sequence_parallel": OURS},
            {**OTHERS, "seq_parallel": OURS},
            str(tmp_path / "config.json"),
        ):
            with pytest.raises(PatchError, match=rf'has a "sequence_parallel" section, .* cannot honour: .*{said}'):
                DeepSpeedConfig(config)
    # Where it fits again, what refused gives way.
    patches.install()
    assert not hasattr(DeepSpeedConfig.__init__, "__wrapped__")
