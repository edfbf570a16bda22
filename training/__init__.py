# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""The training and evaluation scripts, installed as the package `flowbp.scripts`.

    accelerate launch -m flowbp.scripts.train_flowbp_sd3 --help

`python -m flowbp.scripts` prints where the scripts, the recipes and the configurations of accelerate are.
"""
