"""The learning curve as TensorBoard event files, written with TensorBoard's own writer (pip install 'znn[tensorboard]').

curve.jsonl stays the record: the event file is made from it, so that a resumed run, whose curve is trimmed to its
checkpoint, replaces the file and shows every round once.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from znn.errors import DataError


class EventLog:
    """Writes lines of a learning curve (see `znn.train.loop`) into an event file in `folder`, which it empties of
    older ones; `lines` are those already there.

    Step is the round; the wall time of a line is the start of this log plus its seconds of training, so pauses do not
    show. Raises DataError where the package tensorboard is missing. Close it, or use it as a context manager.
    """

    def __init__(self, folder: str | os.PathLike, lines: Iterable[dict[str, Any]] = ()):
        writer = _writer_class()
        folder = Path(folder)
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        lines = list(lines)
        self._zero = time.time() - max((line["seconds"] for line in lines), default=0.0)
        self._writer = writer(str(folder))
        for line in lines:
            self.write(line)

    def write(self, line: dict[str, Any]) -> None:
        """Add one line: its loss under train/ or validation/, and the errors of a validation."""
        at = {"step": line["round"], "wall_time": self._zero + line["seconds"]}
        kind = line["kind"]
        for name in ("loss", "pixel_error", "standard_error", "trivial_error"):
            if name in line:
                self._writer.add_scalar(f"{kind}/{name}", line[name], **at)
        if kind == "train":
            self._writer.add_scalar("learning_rate", line["learning_rate"], **at)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def __enter__(self) -> EventLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _writer_class() -> Any:
    try:
        return importlib.import_module("tensorboard.summary").Writer
    except ImportError as error:
        raise DataError("event files need the package tensorboard; pip install 'znn[tensorboard]'") from error
