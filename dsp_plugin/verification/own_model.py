"""The user's own model on local ranks beside one: what `dsp-plugin verify-model` runs.

A model of Transformers, from the folder of its config or from a function, is tried with every feature on a tiny random
copy. Any other model comes with a batch, and is sharded as the section describes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dsp_plugin.config.schema import DEEPSPEED_SECTION, SequenceParallelConfig
from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.groups import SequenceParallelGroups
from dsp_plugin.sharding.parallelize import hooked
from dsp_plugin.spawn import spawn
from dsp_plugin.verification.model import Verdict, compare
from dsp_plugin.verification.world import launched

# By where a class is from: the module that builds, shrinks, feeds and shards such models.
FAMILIES = "dsp_plugin.patches.transformers.trials"
GIVEN = "as given"


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        reference: the folder of a config, or ``package.module:function``, which returns a model or a model and a batch.
        section: of a DeepSpeed config.
        trust_remote_code: code that lies beside a config may run.
    """

    reference: str
    section: Mapping[str, Any]
    trust_remote_code: bool = False

    @property
    def size(self) -> int:
        """P."""
        return self.config.size

    @property
    def config(self) -> SequenceParallelConfig:
        """The section, checked."""
        config = SequenceParallelConfig.from_deepspeed({DEEPSPEED_SECTION: self.section})
        assert config is not None
        return config


@dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
        kind: the model's class.
        verdicts: by feature.
        shrunk: what was changed of its config, before and after.
    """

    kind: str
    verdicts: dict[str, Verdict]
    shrunk: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Nothing is wrong, and the plain run is exact."""
        statuses = [verdict.status for verdict in self.verdicts.values()]
        return statuses[0] == "exact" and "wrong" not in statuses


def verify_model(request: Request, timeout: float) -> Report:
    """Compare on spawned ranks.

    Raises:
        SequenceParallelConfigError: the section is illegal, or the reference leads to no model.
        RankFailure: a rank raised, died or hung.
    """
    if launched():
        raise SequenceParallelConfigError(
            setting="verify-model",
            why="it starts its ranks itself, and a launcher has made this process one",
            remedy="start it without torchrun",
        )
    size = request.size
    if ":" in request.reference:
        _function(request)
    elif not Path(request.reference).exists():
        raise _no_model(request, "there is no such folder")
    return spawn(report_of, size, request, timeout=timeout)[0]


def report_of(request: Request) -> Report:
    """What the ranks of a world find, the same on each; every one of them calls this.

    Raises:
        SequenceParallelConfigError: the reference leads to no model.
    """
    groups = SequenceParallelGroups.build(request.config)
    families: Any = import_module(FAMILIES)
    built = _call(request) if ":" in request.reference else families.from_folder(request.reference, request)
    model, batch = built if isinstance(built, tuple) else (built, None)
    if not isinstance(model, nn.Module):
        raise _no_model(request, f"it returned {type(model).__name__}, not a module or a module and its arguments")
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    ours = families.serves(model, request.config)
    shard: Callable[..., Any] = (
        partial(families.shard, section=request.section) if ours else partial(_hooked, config=request.config)
    )
    if batch is not None:
        verdict = compare(model.double().to(device), [_moved(batch, device)], shard, groups)
        return Report(type(model).__name__, {GIVEN: verdict})
    if not ours:
        raise _no_model(
            request, "it returned no batch beside the model, and what it is fed is known of Transformers' alone"
        )
    tiny, changes = families.tiny_copy(model)
    verdicts: dict[str, Verdict] = {}
    for feature in families.FEATURES:
        prepared, why = families.prepared_or_why(tiny, feature)
        if prepared is None:
            verdicts[feature] = Verdict("not built", why)
            continue
        batches = [_moved(whole, device) for whole in families.batches(tiny, feature)]
        verdicts[feature] = compare(prepared.to(device), batches, shard, groups)
        if verdicts[feature].status in ("refused", "not built") and len(verdicts) == 1:
            break
    return Report(type(model).__name__, verdicts, changes)


def _hooked(model: nn.Module, groups: SequenceParallelGroups, config: SequenceParallelConfig) -> Any:
    return hooked(model, config=config, groups=groups)


def _function(request: Request) -> Callable[[], Any]:
    module_name, _, attribute = request.reference.partition(":")
    try:
        function = getattr(import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise _no_model(request, f"it cannot be imported: {error}") from error
    if not callable(function):
        raise _no_model(request, f"it is a {type(function).__name__}, not a function")
    found: Callable[[], Any] = function
    return found


def _call(request: Request) -> Any:
    # Every rank builds the same one.
    torch.manual_seed(0)
    return _function(request)()


def _moved(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """On the device, floating point in fp64."""
    return {
        name: value.to(device, torch.float64 if value.is_floating_point() else value.dtype)
        if isinstance(value, Tensor)
        else value
        for name, value in batch.items()
    }


def _no_model(request: Request, why: str) -> SequenceParallelConfigError:
    return SequenceParallelConfigError(
        setting="model",
        value=request.reference,
        why=why,
        remedy="name the folder of a config.json, or package.module:function, where function() returns a model of "
        "Transformers, or a module and a dict of its forward arguments",
    )
