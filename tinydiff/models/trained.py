"""From a checkpoint to a model that is ready for use: what each model's `load` does."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from tinydiff import checkpoint
from tinydiff.checkpoint import CheckpointError
from tinydiff.files import PathLike
from tinydiff.nn import Module

M = TypeVar("M", bound=Module)


def load_trained(path: PathLike, kind: str, make: Callable[[dict[str, Any]], M], without: str | None = None) -> M:
    """The model in a checkpoint, with the averaged weights (EMA), ready to be used.

    path: see `checkpoint.find`. make: gives the model, whatever its weights, of what dataclasses.asdict made of its
    configuration. without: the part of what was trained that is not needed any more. Raises CheckpointError as
    `checkpoint.load` does, and for a configuration or weights that do not fit, as another version of tinydiff may have
    written.
    """
    arrays, meta = checkpoint.load(path, kind)
    try:
        model = make(meta["config"])
        weights = checkpoint.part("ema", arrays)
        model.load_state_dict({name: a for name, a in weights.items() if not name.startswith(f"{without}.")})
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint.find(path)} does not fit this version of tinydiff: {error}") from error
    return model.eval()


def warn_of_another(part: str, given: Module, known: str, model: str) -> None:
    """Warn if a model was trained with another part, such as a text encoder, than it is given.

    part, model: their names. known: the fingerprint of the part that it was trained with, empty if not known.
    """
    if known and known != checkpoint.fingerprint(given):
        warnings.warn(f"the {model} was trained with another {part}, and may misunderstand this one", stacklevel=3)
