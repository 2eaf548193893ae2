"""A script of the standing worlds: launch/examples/pretrain_video_core.py with an account of what each rank sent."""

from __future__ import annotations

import json
import os
from types import ModuleType

from dsp_plugin.comm.ledger import ledger
from dsp_plugin.launch.examples import pretrain_video_core


def account(script: ModuleType) -> None:
    """Trains under a ledger, with a script on `dsp_plugin.launch.examples.core_training`.

    Writes ``--metrics-out`` as the script does, and beside it ``sent-R.json`` on every rank R: the bytes of switches,
    and those of anything else of ours.
    """
    args = script.parse_args()
    with ledger() as log:
        script.main()
    forward = log.bytes(method="dsp", collective="all_to_all", phase="forward")
    backward = log.bytes(method="dsp", collective="all_to_all", phase="backward")
    sent = {"forward": forward, "backward": backward, "other": log.bytes() - forward - backward}
    args.metrics_out.with_name(f"sent-{os.environ['RANK']}.json").write_text(json.dumps(sent))


if __name__ == "__main__":
    account(pretrain_video_core)
