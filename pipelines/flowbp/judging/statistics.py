# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Means, bootstrap intervals and win rates of scores.

The scores of a model are `(P, m)`: one line for each of P prompts, with the scores of its m images. Prompts are the
unit of resampling, because images of one prompt are not independent (Efron and Tibshirani, 1993, "An Introduction to
the Bootstrap", chapters 8 and 13).
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

DRAWS = 10_000
"""Bootstrap samples of an interval."""


def interval(values: torch.Tensor, draws: int = DRAWS) -> tuple[float, float]:
    """95 % bootstrap interval of the mean: percentiles of the means of resampled values, always from one seed.

    Args:
        values: `(P,)`, finite, of a floating dtype; at least one.
        draws: number of bootstrap samples.

    Returns:
        Lower and upper bound.
    """
    return _percentiles(_resampled_means(values, draws, torch.Generator().manual_seed(0)))


def _resampled_means(values: torch.Tensor, draws: int, generator: torch.Generator) -> torch.Tensor:
    # In parts, because the indices and values of all draws take gigabytes for thousands of prompts.
    parts = []
    for start in range(0, draws, 1000):
        count = min(1000, draws - start)
        parts.append(values[torch.randint(len(values), (count, len(values)), generator=generator)].mean(1))
    return torch.cat(parts)


def _percentiles(means: torch.Tensor) -> tuple[float, float]:
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
    return low, high


def estimate(scores: Sequence[float | None], images_per_prompt: int) -> dict[str, float | None]:
    """Mean and 95 % bootstrap interval over prompts.

    Args:
        scores: P * `images_per_prompt` scores, prompt by prompt; None or NaN for images without a score, which are
            left out.
        images_per_prompt: number of images of each prompt.

    Returns:
        `mean`, `low` and `high`. All are None without any score; the interval is None with one prompt.
    """
    values = torch.tensor([math.nan if score is None else score for score in scores], dtype=torch.float64)
    of_prompts = values.view(-1, images_per_prompt).nanmean(1)
    of_prompts = of_prompts[of_prompts.isfinite()]
    if len(of_prompts) == 0:
        return {"mean": None, "low": None, "high": None}
    low, high = interval(of_prompts) if len(of_prompts) > 1 else (None, None)
    return {"mean": of_prompts.mean().item(), "low": low, "high": high}


def wins(scores: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """Win rate of each prompt: the share of its images that score above the base model's image of the same noise.

    Args:
        scores: `(P, m)`; NaN for images without a score.
        base: `(P, m)`, the base model's.

    Returns:
        `(P,)` float64 in [0, 1]. Equal scores count half; images without a score in either model are left out, and
        the rate is NaN where none is left.
    """
    won = (scores > base).double() + 0.5 * (scores == base).double()
    return won.masked_fill((scores + base).isnan(), math.nan).nanmean(1)


def summarise(
    scores: Mapping[str, Mapping[str, torch.Tensor]], groups: Mapping[str, Mapping[str, Sequence[int]]]
) -> list[dict[str, Any]]:
    """Summarise the scores of each reward and model.

    Args:
        scores: reward -> model -> `(P, m)` float64 scores; the first model is the base model. An image without a
            score (NaN) in one model is left out in all models, so that they stay comparable. Models without any score
            do not count for this.
        groups: reward -> group -> indices of its prompts, for rewards with a table by group (GenEval's tasks).

    Returns:
        A record for each reward and model, with `reward`, `model`, `share` (whether all scores of the reward are 0 or
        1), `left_out` (number of images left out) and `score`. Models other than the base model also have `change`
        and `win_rate`, relative to the base model's images of the same noise. Rewards with groups also have `groups`,
        by name, and `overall`, the mean of the groups' means, as in GenEval. Each of these values is a dict of `mean`
        and `interval` (95 %), or None where a model or the base model has no scores.

        A reward for which every image is left out has no records.
    """
    records = []
    for reward, by_model in scores.items():
        without = [values.isnan() for values in by_model.values()]
        missing = [of_model for of_model in without if not of_model.all()]
        missing = torch.stack(missing or without).any(0)
        if bool(missing.all()):
            continue
        by_model = {name: values.masked_fill(missing, math.nan) for name, values in by_model.items()}
        base = next(iter(by_model.values()))
        is_share = all(bool(((values == 0) | (values == 1) | values.isnan()).all()) for values in by_model.values())
        for name, values in by_model.items():
            left_out = int(missing.sum())
            record: dict[str, Any] = {"reward": reward, "model": name, "share": is_share, "left_out": left_out}
            record["score"] = _mean_and_interval(values.nanmean(1))
            if values is not base:
                record["change"] = _mean_and_interval((values - base).nanmean(1))
                record["win_rate"] = _mean_and_interval(wins(values, base))
            if reward in groups:
                record |= _by_group(values.nanmean(1), groups[reward])
            records.append(record)
    return records


def _mean_and_interval(values: torch.Tensor) -> dict[str, Any] | None:
    values = values[~values.isnan()]
    if not len(values):
        return None
    return {"mean": values.mean().item(), "interval": list(interval(values))}


def _by_group(values: torch.Tensor, groups: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    parts = {name: values[torch.tensor(indices)] for name, indices in groups.items()}
    # A group without any score is left out; it is the same one for all models that have scores.
    parts = {name: part[~part.isnan()] for name, part in parts.items()}
    parts = {name: part for name, part in parts.items() if len(part)}
    if not parts:
        return {"groups": {}, "overall": None}
    # Prompts are resampled within their groups, by one generator, so that groups vary independently.
    generator = torch.Generator().manual_seed(0)
    means = torch.stack([_resampled_means(part, DRAWS, generator) for part in parts.values()]).mean(0)
    overall = statistics.fmean(part.mean().item() for part in parts.values())
    return {
        "groups": {name: _mean_and_interval(part) for name, part in parts.items()},
        "overall": {"mean": overall, "interval": list(_percentiles(means))},
    }
