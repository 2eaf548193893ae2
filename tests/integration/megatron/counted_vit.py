"""A script of the standing worlds: launch/examples/pretrain_vit_core.py with an account of what each rank sent."""

from __future__ import annotations

from counted_video import account

from dsp_plugin.launch.examples import pretrain_vit_core

if __name__ == "__main__":
    account(pretrain_vit_core)
