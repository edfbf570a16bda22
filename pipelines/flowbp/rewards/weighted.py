# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Weighted sums of rewards."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..columns import Columns
from ..videos import score_samples
from .held_gradient import hold_gradient


def call_reward(
    name: str,
    reward: Callable[..., Any],
    images: Tensor,
    prompts: Sequence[str],
    columns: Columns,
    reward_frames: int | None = None,
) -> Tensor:
    """`score_samples` by a reward whose name is in everything that goes wrong.

    Raises:
        ValueError: the reward does not return a tensor (B,).
        RuntimeError: it calls `sys.exit`, which would end the run as if all were done.
        Exception: what the reward raises, with its name as a note.
    """
    try:
        score = score_samples(reward, images, prompts, columns, reward_frames)
    except SystemExit as stop:
        raise RuntimeError(
            f"reward {name!r}: expected scores, got sys.exit({stop.code!r}); raise an error instead."
        ) from stop
    except Exception as error:
        note = f"It was raised by the reward {name!r}."
        if note not in getattr(error, "__notes__", ()):
            error.add_note(note)
        raise
    if not isinstance(score, Tensor) or score.shape != (len(images),):
        found = tuple(score.shape) if isinstance(score, Tensor) else type(score).__name__
        raise ValueError(
            f"reward {name!r}: expected a tensor of shape ({len(images)},), got {found}; return one for each image."
        )
    return score.to(images.device)


class WeightedReward(nn.Module):
    """A weighted sum of rewards that keeps each part's scores and differentiates one part at a time.

    Where the images require a gradient, `forward` computes each part's gradient together with its scores, so that only
    one part's graph is alive at a time: memory is that of the largest part, not of the sum. This relies on every
    reward scoring each image independently of its batch. There are no second derivatives.

    Args:
        rewards: name -> reward.
        weights: name -> weight, for the same names.
        offload: keep the parts on the CPU, whatever `.to` is told; each moves to the images' device while it scores.
        reward_frames: of a video, how many frames a part that scores images scores, see `chosen_frames`.

    Attributes:
        last_scores: name -> scores (B,) of each part in the last `forward`, not weighted, detached.
    """

    # Each part says it for itself.
    takes_videos = None

    def __init__(
        self,
        rewards: Mapping[str, nn.Module],
        weights: Mapping[str, float],
        offload: bool = False,
        reward_frames: int | None = None,
    ) -> None:
        super().__init__()
        self.reward_frames = reward_frames
        self.weights = {name: weights[name] for name in rewards}
        self.offload = offload
        # Modules in a dict are not moved when this one is.
        self._parts = dict(rewards)
        if not offload:
            # A list, because a submodule's name may not contain the dots of a user's own reward.
            self.rewards = nn.ModuleList(rewards.values())
        self.last_scores: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    @torch.no_grad()
    def parts(self, images: Tensor, prompts: Sequence[str], /, **columns: Sequence[Any]) -> dict[str, Tensor]:
        """Name -> scores (B,) of each part, not weighted, without gradients.

        Raises:
            ValueError: a part does not return a tensor (B,).
        """
        scores = {}
        for name, reward in self._parts.items():
            with self._on_device(reward, images.device):
                scores[name] = call_reward(name, reward, images, prompts, columns, self.reward_frames)
        return scores

    def forward(self, images: Tensor, prompts: Sequence[str], /, **columns: Sequence[Any]) -> Tensor:
        """Scores images (B, 3, H, W) or videos (B, F, 3, H, W) in [0, 1] against B prompts: the sum of weight x score.

        Each part gets those columns (lists of B values) that its signature has a place for.

        Raises:
            ValueError: a part does not return a tensor (B,), or has no gradient although the images require one.
        """
        if torch.is_grad_enabled() and images.requires_grad:
            return hold_gradient(images, *self.scores_and_gradient(images, prompts, columns))
        self.last_scores = self.parts(images, prompts, **columns)
        return self._sum(self.last_scores)

    def all_parts(self) -> list[nn.Module]:
        """The rewards of the sum."""
        return list(self._parts.values())

    def pop_means(self) -> dict[str, float]:
        """Name -> mean score, not weighted, over all images that were differentiated since the last call."""
        means = {name: total.item() / self._count for name, total in self._sums.items()}
        self._sums, self._count = {}, 0
        return means

    def scores_and_gradient(self, images: Tensor, prompts: Sequence[str], columns: Columns) -> tuple[Tensor, Tensor]:
        """The weighted sum (B,), and its gradient in the images, of their shape, in float32 or float64."""
        images = images.detach().to(torch.promote_types(images.dtype, torch.float32))
        scores, gradient = {}, torch.zeros_like(images)
        for name, reward in self._parts.items():
            with self._on_device(reward, images.device), torch.enable_grad():
                leaf = images.detach().requires_grad_()
                score = call_reward(name, reward, leaf, prompts, columns, self.reward_frames)
                if not score.requires_grad:
                    raise ValueError(
                        f"reward {name!r}: expected scores with a gradient in the images, got none; leave it out of "
                        "--reward and use it as --eval_reward."
                    )
                gradient += self.weights[name] * torch.autograd.grad(score.sum(), leaf)[0]
                scores[name] = score.detach()
        self.last_scores = scores
        self._sums = {name: self._sums.get(name, 0) + score.sum() for name, score in scores.items()}
        self._count += len(images)
        return self._sum(scores), gradient

    def _sum(self, scores: Mapping[str, Tensor]) -> Tensor:
        return sum(self.weights[name] * score for name, score in scores.items())

    @contextmanager
    def _on_device(self, reward: nn.Module, device: torch.device) -> Iterator[None]:
        if not self.offload:
            yield
            return
        try:
            reward.to(device)
            yield
        finally:
            reward.to("cpu")


def part_means(reward: nn.Module) -> dict[str, float]:
    """`WeightedReward.pop_means` of a sum, for logs; {} for a single reward."""
    return reward.pop_means() if isinstance(reward, WeightedReward) else {}
