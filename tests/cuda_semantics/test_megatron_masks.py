"""Dense masks of Megatron's loaders: after the first one the host waits for none, and nothing as large is made."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from dsp_plugin import SequenceParallelConfig
from dsp_plugin.groups import SequenceParallelGroups
from dsp_plugin.layout import Layout
from dsp_plugin.patches.megatron import mask as masks
from dsp_plugin.rehearsal.cuda import device
from dsp_plugin.rehearsal.cuda.process import CudaProcess
from dsp_plugin.rehearsal.cuda.recorder import Counts, recording

pytestmark = pytest.mark.timeout(300)

LENGTH, SIZE, BATCH = 8192, 4, 2


def read(causal: bool, all_rows: bool, said: bool) -> tuple[Counts, bool]:
    """The second mask of a run, by rank 1, and whether a third would look at what is known of it."""
    with ExitStack() as stack:
        stack.enter_context(device.rank_of(1, SIZE))
        groups = SequenceParallelGroups.build(SequenceParallelConfig(method="ring", size=SIZE))
        state: Any = SimpleNamespace(groups=groups)
        module: Any = ModuleType("megatron.training.global_vars")
        module._GLOBAL_ARGS = SimpleNamespace(reset_attention_mask=not said)
        # Not by patch.dict, which would forget what is imported meanwhile.
        sys.modules[module.__name__] = module
        stack.callback(sys.modules.pop, module.__name__)
        stack.enter_context(mock.patch.dict(masks._whole, {causal: True}))
        stack.enter_context(mock.patch.dict(masks._unread))
        stack.enter_context(mock.patch.dict(masks._read))
        recorder = stack.enter_context(recording())
        rows = LENGTH if all_rows else LENGTH // SIZE
        mask = torch.empty(BATCH, 1, rows, LENGTH, dtype=torch.bool, device="cuda")
        layout = Layout("zigzag", LENGTH, SIZE)
        layout.position_ids(1, mask.device)
        recorder.take()
        try:
            masks.document_borders(mask, causal, layout, state)
        except torch._subclasses.fake_tensor.DataDependentOutputException:
            pass
        else:
            # Of the next layer.
            masks.document_borders(mask, causal, layout, state)
        return recorder.take(), causal in masks._unread


@pytest.mark.parametrize("all_rows", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_a_mask_without_documents_is_read_and_not_waited_for(worker: CudaProcess, causal: bool, all_rows: bool) -> None:
    found, unread = worker.run(read, causal, all_rows, True)
    assert unread
    assert found.syncs == found.mixed == []
    # Each element is read twice, by argmin and comparison, and in tiles compared with three of its kind.
    assert found.traffic < (12 if causal else 2 + all_rows * 2) * BATCH * (LENGTH // SIZE) * LENGTH


def test_one_that_may_hold_documents_is_waited_for_once(worker: CudaProcess) -> None:
    found, unread = worker.run(read, True, False, False)
    assert not unread
    assert len(found.syncs) == 1
