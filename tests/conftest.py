# Copyright 2026 The FlowBP for diffusers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What all tests share: one thread, no network, and no state that a test leaves to the next."""

import os
from collections.abc import Iterator

# Before any Hugging Face library is imported, here and in the processes that tests start.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

# So that failed asserts in these helpers show values.
pytest.register_assert_rewrite("training_scripts")


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """One thread and a fixed global seed; a test must leave gradients on."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    assert torch.is_grad_enabled()
    yield
    was_enabled = torch.is_grad_enabled()
    torch.set_grad_enabled(True)
    assert was_enabled, "the test left gradients off"
