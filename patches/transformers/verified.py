"""Which families were compared with the unsharded model, by the results behind docs/models.md, which the package has.

A version of Transformers that has results of its own goes by them alone. Of another one nobody has tried anything:
there a family counts as verified if any version that was tried calls it exact, since to refuse all would help nobody.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from dsp_plugin.patches.transformers.wrapped import is_causal_lm

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SETTING = "unverified_model"


# Families that are compared with the unsharded model by our tests, as encoders and with heads of several kinds.
ENCODERS = ("bert", "electra", "modernbert", "roberta")


def unverified(model: PreTrainedModel) -> str | None:
    """Why nobody knows whether the model is exact when it is sharded; None where it is known to be."""
    kind, running = _class_of(model), version("transformers")
    if kind.__module__.partition(".")[0] != "transformers":
        return (
            f"its class is of {kind.__module__}, not of Transformers, whose families were compared with the unsharded"
        )
    results = _results()
    own = [run for run in results if run["versions"].get("transformers") == running]
    if not is_causal_lm(model) and model.config.model_type in ENCODERS:
        return None
    entries = [
        entry for run in own or results for family, entry in run["families"].items() if _is_of(model, family, entry)
    ]
    statuses = [entry["status"] for entry in entries]
    tried = ", ".join(sorted({run["versions"]["transformers"] for run in own or results})) or "no version"
    if "exact" in statuses and "wrong" not in statuses:
        return None
    found = dict.fromkeys(_told(entry) for entry in entries) or ["is not among them"]
    return (
        f"of the families that were compared with the unsharded model under Transformers {tried}, it {'; '.join(found)}"
    )


def _class_of(model: PreTrainedModel) -> type:
    """Its class, also where torch's ``fully_shard`` made a subclass of it and the model one of that."""
    return next(kind for kind in type(model).__mro__ if kind.__module__.partition(".")[0] != "torch")


def _is_of(model: PreTrainedModel, family: str, entry: dict[str, Any]) -> bool:
    """Whether it is the family's causal language model, or has the backbone of one, beneath another head."""
    if is_causal_lm(model):
        return bool(entry["class"] == _class_of(model).__name__)
    return family == model.config.model_type


def _told(entry: dict[str, Any]) -> str:
    """What became of a family, and why: of its plain run, or of what else is wrong."""
    reasons = [found["why"] for found in entry.get("features", {}).values() if found["status"] == entry["status"]]
    return f"was {entry['status']}" + (f" ({reasons[0].rstrip('.')})" if reasons else "")


@cache
def _results() -> tuple[dict[str, Any], ...]:
    folder = files("dsp_plugin.configs") / "models"
    paths = sorted((path for path in folder.iterdir() if path.name.endswith(".json")), key=lambda path: path.name)
    return tuple(json.loads(path.read_text()) for path in paths)
