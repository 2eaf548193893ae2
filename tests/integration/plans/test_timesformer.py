"""transformers' TimeSformer, unmodified: a class token beside patches, and a layer that folds patches into rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from parity import Case, assert_parity, faults
from torch import nn

from dsp_plugin import Plan, SequenceParallelConfig, SequenceParallelGroups, UnsupportedError, parallelize
from dsp_plugin.patches.transformers.timesformer import plan
from dsp_plugin.spawn import spawn

pytestmark = pytest.mark.distributed

# 25 patches and 5 frames: none of 2, 3 and 4 divides either.
IMAGE, PATCH, FRAMES, BATCH = 20, 4, 5, 2


def timesformer(
    image: int = IMAGE,
    frames: int = FRAMES,
    labels: int = 0,
    checkpointed: bool = False,
    **settings: Any,
) -> tuple[nn.Module, dict[str, Any]]:
    """A model and a batch; with ``labels`` the one for classification, which takes its loss at the class token."""
    from transformers import TimesformerConfig, TimesformerForVideoClassification, TimesformerModel

    config = TimesformerConfig(
        image_size=image,
        patch_size=PATCH,
        num_frames=frames,
        hidden_size=24,
        num_attention_heads=4,
        num_hidden_layers=2,
        intermediate_size=32,
        num_labels=max(labels, 1),
        **settings,
    )
    model = TimesformerForVideoClassification(config) if labels else TimesformerModel(config)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    inputs: dict[str, Any] = {"pixel_values": torch.randn(BATCH, frames, 3, image, image)}
    if labels:
        inputs["labels"] = torch.randint(labels, (BATCH,))
    return model, inputs


CASES = (
    Case(timesformer),
    Case(timesformer, dtype=torch.float32),
    Case(timesformer, {"labels": 7}),
)
# Two frames of four patches: on three and four ranks some have no frame.
SHORT = Case(timesformer, {"frames": 2, "image": 8, "labels": 7})
CHECKPOINTED = Case(timesformer, {"labels": 7, "checkpointed": True}, counted=False)
WITHOUT_GRADIENTS = Case(timesformer, backward=False)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_sharded_timesformer_has_the_unsharded_output_gradients_and_the_planned_bytes(size):
    for result in assert_parity(size, *CASES, SHORT, CHECKPOINTED, WITHOUT_GRADIENTS):
        temporal, spatial, *_ = result.stages
        assert temporal == ("encoder.layer.0.temporal_attention", "s", "keep", "local")
        assert spatial == ("encoder.layer.0.attention", "t", "switch s -> t and back", "local")


def without_overrides(module: nn.Module) -> Plan:
    return replace(plan(module), overrides={})


def without_switch(module: nn.Module) -> Plan:
    """Takes spatial attention for attention along time."""
    right = plan(module)
    temporal, spatial = right.stages
    return replace(right, stages=(temporal, replace(spatial, computes_along=("t",))))


def test_validation_names_what_is_wrong_with_a_plan():
    right, rows, switch = faults(
        2,
        Case(timesformer),
        Case(timesformer, plan=without_overrides),
        Case(timesformer, plan=without_switch),
    )
    assert right == "None"
    # 13 patches are no rows of 5.
    assert "the sharded pass broke off: RuntimeError: shape '[2, 2, 5, 5, 24]' is invalid" in rows
    assert "maybe: an attribute that tells the whole size of s is not in plan.overrides" in rows
    assert "in encoder.layer.0.attention (sharded s)" in switch
    assert "it computes along s, and s is sharded there: the plan has computes_along=('t',)" in switch


def refusals() -> list[str]:
    """Of what a training script may ask for."""
    messages = []
    for settings, call in (
        ({"hidden_dropout_prob": 0.1}, {}),
        ({"drop_path_rate": 1}, {}),
        ({}, {"output_hidden_states": True}),
        ({}, {"output_attentions": True}),
        ({"attention_type": "joint_space_time"}, {}),
        ({"attention_probs_dropout_prob": 0.5}, {}),
    ):
        model, inputs = timesformer(**settings)
        config = SequenceParallelConfig(method="dsp", size=2)
        try:
            parallelize(model.train(), config=config, groups=SequenceParallelGroups.build(config))
            model(**inputs, **call)
            messages.append("runs")
        except UnsupportedError as error:
            messages.append(str(error))
    return messages


def test_what_would_be_wrong_in_silence_is_refused():
    everywhere = spawn(refusals, 2)
    assert everywhere[0] == everywhere[1]
    dropout, path, hidden, attentions, joint, dropped_weights = everywhere[0]
    assert dropout.startswith(
        "dropout of encoder.layer.0.intermediate.dropout=0.1: while s is sharded every rank holds"
    )
    assert path.startswith("drop path of encoder.layer.1.drop_path=1.0: it decides for a whole sample")
    assert "it holds 4 tensors, of which only the leading one is made whole again" in hidden
    assert "it holds 3 tensors" in attentions
    assert joint.startswith("attention_type='joint_space_time': its attention is written out")
    assert dropped_weights == "runs"


@pytest.mark.matrix
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_every_shape(size):
    shapes = [(image, frames) for image in (8, 12, 20, 24) for frames in (1, 2, 3, 8)]
    cases = [Case(timesformer, {"image": image, "frames": frames, "labels": 3}) for image, frames in shapes]
    assert_parity(size, *cases, *(replace(case, dtype=torch.float32) for case in cases), timeout=240)
