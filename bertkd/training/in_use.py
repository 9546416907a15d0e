"""One run to a folder, in however many processes it trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object

from bertkd._locks import LOCK, InUseError, locked


@contextmanager
def kept_from_others(output_dir: Path, accelerator: Accelerator) -> Iterator[None]:
    """Make ``output_dir`` and keep other runs out of it; the main process locks it for all of this one.

    Two runs would replace and delete each other's checkpoints, and end with each other's weights.

    Raises:
        ValueError: in all processes: another run is at work there, or the folder cannot be made or
            written to.
    """
    reason = None
    with ExitStack() as held:
        if accelerator.is_main_process:
            try:
                output_dir.mkdir(parents=True, exist_ok=True)
                held.enter_context(locked(output_dir / LOCK))
            except InUseError as error:
                reason = str(error)
            except (FileExistsError, NotADirectoryError):
                reason = "cannot be a folder: it is, or lies in, a file or a link to nowhere; name another place"
            except OSError as error:
                reason = f"cannot be written to ({error.strerror}); name another place"
        if reason := next(filter(None, gather_object([reason])), None):
            raise ValueError(f"output_dir {str(output_dir)!r} {reason}")
        yield
