# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""A row that results.py tries and the table of methods does not have: `--method own_rows:CLOSED`, with this folder on
PYTHONPATH.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from flowbp import METHODS, Surrogate, Term
from flowbp.weights import leg_weights

_LAGRANGE = METHODS["flowbp-lagrange"]
# Of the demo's backbone alone: the others' defaults rescale.
_FOR_SD3 = _LAGRANGE.defaults("sd3")


def closed_supports(start: int, end: int, order: int) -> tuple[int, ...]:
    """`order` steps spread evenly over the leg, both ends included; all of a shorter leg."""
    places = min(order, end - start + 1)
    return tuple(start + round(place * (end - start) / max(places - 1, 1)) for place in range(places))


def _closed(sigmas: Sequence[float], options: Mapping[str, Any], generator: torch.Generator | None) -> Surrogate:
    """FlowBP-Lagrange whose first leg [k, j) has a support at j too: the velocity there is known, and j is active."""
    surrogate = _LAGRANGE.draw(sigmas, options, generator)
    first, last = surrogate.legs
    k, j = first.start, first.end
    if first.blend or options["grad_rescale"] or options["active_supports"] != "midpoint":
        raise ValueError("closed supports need anchor_lambda 1, grad_rescale 0 and active_supports=midpoint.")
    supports = closed_supports(k, j, options["order"])
    weights = leg_weights("lagrange", sigmas, k, j, supports)
    terms = {term.step: term for term in surrogate.terms if term.step >= j}
    for step, weight in zip(supports, weights, strict=True):
        scale = 1.0 if step in (k, j) else options["support_scale"]
        old = terms.get(step, Term(step, 0.0))
        terms[step] = replace(old, weight=old.weight + scale * weight)
    legs = (replace(first, supports=supports, weights=weights), last)
    return replace(surrogate, terms=tuple(terms[step] for step in sorted(terms)), legs=legs)


CLOSED = replace(_LAGRANGE, draw=_closed, title="FlowBP-Lagrange, closed supports", source="ours", options=_FOR_SD3)
