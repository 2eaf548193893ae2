"""The patches fit the installed DeepSpeed, are applied once, and leave no trace when reverted or refused."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata
from typing import Any

import pytest

from dsp_plugin.errors import PatchError
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
