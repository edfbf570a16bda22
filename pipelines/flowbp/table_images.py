# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Images, masks and videos in columns of the prompts' table: opened when they are used, one at a time."""

import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from diffusers.utils import load_image, load_video
from PIL import Image

from .columns import LazyValue
from .files import sha256

Media = Image.Image | list[Image.Image]
# Files of which diffusers' `load_video` makes frames: the first by PIL, the others by imageio.
_GIF, _VIDEOS = ".gif", (".mp4", ".webm", ".mov", ".avi", ".mkv")


def rgb(image: Image.Image) -> Image.Image:
    """The image as its viewer sees it: turned as its EXIF says, in RGB."""
    return load_image(image)


class TableImage(LazyValue):
    """An image, a mask or a video in a row of the prompts' table. Its text is a digest of its content.

    Args:
        name: for messages.
        read: opens it, in any mode: an image, or the frames of a video.
        digest: a hash of its content.
    """

    def __init__(self, name: str, read: Callable[[], Media], digest: Callable[[], str]) -> None:
        self.name, self._read, self._digest = name, read, digest

    @classmethod
    def of_file(cls, path: Path) -> "TableImage":
        """An image's file, a video's, or a folder of frames, which are in the order of their names."""
        path = path.absolute()
        if path.is_dir():
            frames = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
            return cls(str(path), lambda: [Image.open(file) for file in frames], lambda: "".join(map(sha256, frames)))
        if path.suffix.lower() in (_GIF, *_VIDEOS):
            return cls(str(path), lambda: load_video(str(path)), lambda: sha256(path))
        return cls(str(path), lambda: Image.open(path), lambda: sha256(path))

    @classmethod
    def of_row(
        cls, name: str, encoded: Callable[[], Mapping[str, Any] | None], decode: Callable[..., Image.Image]
    ) -> "TableImage":
        """A value of a `datasets.Image` column: `bytes` or a `path`, and what `datasets` makes of a path or URL."""

        def read() -> Image.Image:
            value = encoded()
            if value is None:
                raise ValueError("it is empty")
            return decode(value) if value["bytes"] is None else Image.open(io.BytesIO(value["bytes"]))

        def digest() -> str:
            value = encoded()
            path = Path(value["path"] or "")
            if value["bytes"] is None:
                # Of a URL its text.
                return sha256(path) if path.is_file() else str(path)
            return hashlib.sha256(value["bytes"]).hexdigest()

        return cls(name, read, digest)

    def open(self) -> Media:
        """The image, or the frames of a video, in RGB and turned as EXIF says.

        Raises:
            ValueError: in one line, for what cannot be read.
        """
        try:
            found = self._read()
            return [rgb(frame) for frame in found] if isinstance(found, list) else rgb(found)
        except Exception as error:  # PIL and imageio raise a dozen unrelated types
            raise self._unreadable(error) from error

    def shown(self, size: tuple[int, int]) -> Image.Image:
        """The image, or the middle frame of a video, reduced to fit into a width and height."""
        found = self.open()
        image = found[len(found) // 2] if isinstance(found, list) else found
        image.thumbnail(size)
        return image

    def check(self) -> None:
        """Read as much as tells whether it can be opened: headers of images, all of a video.

        Raises:
            ValueError: as `open`.
        """
        try:
            found = self._read()
            if found == []:
                raise ValueError("no frames in this folder")
            for each in found if isinstance(found, list) else [found]:
                each.close()
            str(self)
        except ImportError as error:
            raise ValueError(
                f"{self.name}: reading a video needs imageio and imageio-ffmpeg; install them, or give a folder of "
                "frames"
            ) from error
        except Exception as error:  # as in `open`
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> ValueError:
        return ValueError(f"{self.name}: expected an image or a video, got: {' '.join(str(error).split())}")

    @cached_property
    def _content(self) -> str:
        return hashlib.sha256(self._digest().encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return self._content


Sources = Mapping[str, Sequence[TableImage]]
"""Column -> what each prompt's images are made of."""
