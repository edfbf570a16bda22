# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Means, intervals and win rates of scores: over prompts by the bootstrap, over seeds by Student's t.

The scores of a model are `(P, m)`: one line for each of P prompts, with the scores of its m images. Prompts are the
unit of resampling, because images of one prompt are not independent (Efron and Tibshirani, 1993, "An Introduction to
the Bootstrap", chapters 8 and 13).
"""

import itertools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
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
    """Win rate of each prompt: the share of its images that score above the reference's image of the same noise.

    Args:
        scores: `(..., P, m)`; NaN for images without a score.
        base: the reference's, of a shape that broadcasts.

    Returns:
        `(..., P)` float64 in [0, 1]. Equal scores count half; images without a score in either model are left out,
        and the rate is NaN where none is left.
    """
    won = (scores > base).double() + 0.5 * (scores == base).double()
    return won.masked_fill((scores + base).isnan(), math.nan).nanmean(-1)


def over_seeds(values: torch.Tensor) -> tuple[float, float]:
    """95 % interval of the mean over seeds, by Student's t (Student, 1908, Biometrika 6).

    Of two methods, k and l seeds have k x l differences. The variances of their means over rows and over columns are
    added, with the degrees of freedom of Welch (1947, Biometrika 34): for differences a[i] - b[j] this is Welch's
    interval for unequal variances. Seeds are not paired: equal numbers do not make two methods' runs alike.

    Args:
        values: `(k, l)` float64, more than one: k seeds of a method against l of another; l = 1 for a method alone, or
            against a model that counts as fixed.
    """
    means = [part for part in (values.mean(1), values.mean(0)) if len(part) > 1]
    variances = [part.var().item() / len(part) for part in means]
    variance, half = sum(variances), 0.0
    if variance > 0:
        freedom = variance**2 / sum(each**2 / (len(part) - 1) for each, part in zip(variances, means, strict=True))
        half = _student_t(freedom) * math.sqrt(variance)
    mean = values.mean().item()
    return mean - half, mean + half


def _student_t(freedom: float) -> float:
    """The number that |t| exceeds in 5 % of the cases. With t = sqrt(freedom) tan(x), x has density cos^(freedom - 1).

    Args:
        freedom: degrees of freedom, at least 1, of any fraction.
    """
    edges = np.linspace(0, np.pi / 2, 100_001)
    shares = np.cumsum([0, *np.cos((edges[1:] + edges[:-1]) / 2) ** (freedom - 1)])
    return math.sqrt(freedom) * math.tan(np.interp(0.95 * shares[-1], shares, edges))


def summarise(
    scores: Mapping[str, Mapping[str, torch.Tensor]],
    groups: Mapping[str, Mapping[str, Sequence[int]]],
    lines: Mapping[str, Sequence[str]] | None = None,
    against: str | None = None,
) -> list[dict[str, Any]]:
    """Summarise the scores of each reward and line of the tables.

    Args:
        scores: reward -> model -> `(P, m)` float64 scores. An image without a score (NaN) in one model is left out in
            all models, so that they stay comparable. Models without any score do not count for this.
        groups: reward -> group -> indices of its prompts, for rewards with a table by group (GenEval's tasks).
        lines: line -> its models, several where these are seeds of one method. Default: a line for each model.
        against: the line that the others are compared with; default: the first.

    Returns:
        A record for each reward and line, with `reward`, `model` (the line), `seeds` (how many of its models have
        scores), `share` (whether all scores of the reward are 0 or 1), `left_out` (number of images left out) and
        `score`. Lines other than `against` also have it by name, and `change` and `win_rate` relative to its images
        of the same noise. Rewards with groups also have `groups`, by name, and `overall`, the mean of the groups'
        means, as in GenEval. Each of these values is a dict of `mean`, `interval` (95 %) and `over`, or None where
        there are no scores. `over` is `prompts` for bootstrap intervals, which is how values of single models vary.
        Where one of the lines has several seeds it is `seeds` (see `over_seeds`): of these prompts, how trainings
        vary.

        A reward for which every image is left out has no records.
    """
    records = []
    for reward, by_line, missing in _by_line(scores, lines):
        reference, is_share = next(iter(by_line)) if against is None else against, _is_share(by_line)
        for name, values in by_line.items():
            record: dict[str, Any] = {"reward": reward, "model": name, "share": is_share, "left_out": missing}
            record["seeds"] = len(values)
            record["score"] = _mean_and_interval(values[:, None].nanmean(-1), is_share)
            if name != reference:
                record["against"] = reference
                record["change"] = _mean_and_interval((values[:, None] - by_line[reference]).nanmean(-1))
                record["win_rate"] = _mean_and_interval(wins(values[:, None], by_line[reference]), True)
            if reward in groups:
                record |= _by_group(values.nanmean(-1), groups[reward], is_share)
            records.append(record)
    return records


def pairwise(
    scores: Mapping[str, Mapping[str, torch.Tensor]], lines: Mapping[str, Sequence[str]]
) -> list[dict[str, Any]]:
    """The differences between every two lines, on the same prompts and noise.

    Returns:
        A record for each reward and ordered pair, with `reward`, `share`, `model`, `against` and `difference` (of the
        first from the second; an estimate as those of `summarise`).
    """
    records = []
    for reward, by_line, _ in _by_line(scores, lines):
        found: dict[tuple[str, str], Any] = {}
        for name, other in itertools.combinations(by_line, 2):
            estimate = _mean_and_interval((by_line[name][:, None] - by_line[other]).nanmean(-1))
            found[name, other] = found[other, name] = estimate
            if estimate is not None:
                low, high = estimate["interval"]
                found[other, name] = {**estimate, "mean": -estimate["mean"], "interval": [-high, -low]}
        common = {"reward": reward, "share": _is_share(by_line)}
        records += [
            {**common, "model": name, "against": other, "difference": found[name, other]} for name, other in found
        ]
    return records


def _by_line(
    scores: Mapping[str, Mapping[str, torch.Tensor]], lines: Mapping[str, Sequence[str]] | None
) -> Iterator[tuple[str, dict[str, torch.Tensor], int]]:
    """For each reward with scores: `(k, P, m)` of each line's models that have any, and how many images are left out.

    Which images are left out, as NaN, is the same for all.
    """
    for reward, by_model in scores.items():
        without = {name: values.isnan() for name, values in by_model.items()}
        scored = [name for name, of_model in without.items() if not of_model.all()]
        missing = torch.stack([without[name] for name in scored or without]).any(0)
        if bool(missing.all()):
            continue
        by_line = {}
        for line, names in ({name: [name] for name in by_model} if lines is None else lines).items():
            parts = [by_model[name].masked_fill(missing, math.nan) for name in names if name in scored]
            by_line[line] = torch.stack(parts) if parts else torch.empty(0, *missing.shape, dtype=torch.float64)
        yield reward, by_line, int(missing.sum())


def _is_share(by_line: Mapping[str, torch.Tensor]) -> bool:
    return all(bool(((values == 0) | (values == 1) | values.isnan()).all()) for values in by_line.values())


def _mean_and_interval(values: torch.Tensor, is_share: bool = False) -> dict[str, Any] | None:
    """The estimate of k against l models' values of each prompt, `(k, l, P)`; of a model alone l is 1."""
    values = values[..., ~values.isnan().flatten(0, 1).any(0)]
    if not values.numel():
        return None
    if values.shape[:2] == (1, 1):
        return {"mean": values.mean().item(), "interval": list(interval(values.flatten())), "over": "prompts"}
    return _over_seeds(values.mean(-1), is_share)


def _over_seeds(values: torch.Tensor, is_share: bool) -> dict[str, Any]:
    low, high = over_seeds(values)
    if is_share:
        # No share is outside of [0, 1], whatever few seeds say.
        low, high = max(low, 0.0), min(high, 1.0)
    return {"mean": values.mean().item(), "interval": [low, high], "over": "seeds"}


def _by_group(values: torch.Tensor, groups: Mapping[str, Sequence[int]], is_share: bool) -> dict[str, Any]:
    """By group of prompts, of k models' values `(k, P)`."""
    parts = {name: values[:, torch.tensor(indices)] for name, indices in groups.items()}
    # A group without any score is left out; it is the same one for all models that have scores.
    parts = {name: part[:, ~part.isnan().any(0)] for name, part in parts.items()}
    parts = {name: part for name, part in parts.items() if part.numel()}
    if not parts:
        return {"groups": {}, "overall": None}
    found = {name: _mean_and_interval(part[:, None], is_share) for name, part in parts.items()}
    if len(values) > 1:
        of_seeds = torch.stack([part.mean(-1) for part in parts.values()]).mean(0)
        return {"groups": found, "overall": _over_seeds(of_seeds[:, None], is_share)}
    # Prompts are resampled within their groups, by one generator, so that groups vary independently.
    generator = torch.Generator().manual_seed(0)
    means = torch.stack([_resampled_means(part[0], DRAWS, generator) for part in parts.values()]).mean(0)
    overall = statistics.fmean(part.mean().item() for part in parts.values())
    return {"groups": found, "overall": {"mean": overall, "interval": list(_percentiles(means)), "over": "prompts"}}
