# Copyright 2026 The FlowBP for diffusers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The training and evaluation scripts, installed as the package `flowbp.scripts`.

    accelerate launch -m flowbp.scripts.train_flowbp_sd3 --help

`python -m flowbp.scripts` prints where the scripts, the recipes and the configurations of accelerate are.
"""
