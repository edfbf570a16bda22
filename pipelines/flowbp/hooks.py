# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Methods of classes and objects that are replaced for a while."""

import functools
from collections.abc import Callable
from typing import Any


class Patches:
    """Replaced methods, put back in reverse order by `undo`."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def replace(self, owner: Any, name: str, replacement: Callable[..., Any]) -> None:
        """Call `replacement(original, *args, **kwargs)` for `owner.name(*args, **kwargs)`.

        Args:
            owner: a class, whose methods get their instance as the first argument, or an object.
            name: of the method, which `owner` may inherit.
            replacement: gets the method that it replaces.
        """
        original = getattr(owner, name)
        is_own = name in vars(owner)

        # Pipelines read the signatures of scheduler methods, so the wrapper carries the original's.
        @functools.wraps(original)
        def patched(*args: Any, **kwargs: Any) -> Any:
            return replacement(original, *args, **kwargs)

        patched.is_flowbp_patch = True  # type: ignore[attr-defined]

        def undo() -> None:
            if is_own:
                setattr(owner, name, original)
            else:
                delattr(owner, name)

        setattr(owner, name, patched)
        self._undo.append(undo)

    def undo(self) -> None:
        """Put everything back."""
        while self._undo:
            self._undo.pop()()


def is_patched(owner: type, name: str) -> bool:
    """Whether `Patches` has replaced this method of a class, here or in a class that it inherits from."""
    return getattr(getattr(owner, name, None), "is_flowbp_patch", False)
