"""Checkpoints of a training run: Orbax's, written aside while training goes on.

A killed run leaves whole checkpoints only: Orbax renames each into place when it is complete. The
arrays can be restored onto any mesh. Refuses to know what is trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

from slora_jax.errors import TrainingError

Adapter = TypeVar("Adapter")
State = TypeVar("State")

_KEPT = 2


class TrainingCheckpoints:
    """The checkpoints of one run in one directory; the two newest are kept.

    Args:
        directory: made where it is missing.
        about: JSON values that must be equal for a run to go on from a checkpoint.

    Raises:
        TrainingError: the directory cannot be used.
    """

    def __init__(self, directory: Path, about: Mapping[str, Any]):
        self._about = dict(about)
        try:
            self._directory = directory.expanduser().absolute()
            self._directory.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(
                self._directory, options=ocp.CheckpointManagerOptions(max_to_keep=_KEPT)
            )
        except (OSError, RuntimeError) as error:  # no home of that name
            raise TrainingError(f"{directory}: no checkpoints can be kept here: {error}") from error

    def save(self, step: int, adapter: Any, state: Any) -> None:
        """Write aside; the arrays may be donated as soon as this returns.

        Raises TrainingError where this or an earlier one cannot be written.
        """
        arrays = {"adapter": adapter, "optimizer": _numbered(state)}
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    arrays=ocp.args.StandardSave(arrays), about=ocp.args.JsonSave(self._about)
                ),
            )
        except OSError as error:
            raise TrainingError(
                f"{self._directory}: checkpoint {step} cannot be written: {error}"
            ) from error

    def restore(self, adapter: Adapter, state: State) -> tuple[int, Adapter, State] | None:
        """(step, adapter, state) of the newest checkpoint, placed as the given ones are; None where
        there is none.

        Raises:
            TrainingError: it belongs to another run, or cannot be read.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        wanted = jax.tree.map(_abstract, {"adapter": adapter, "optimizer": _numbered(state)})
        try:
            about = self._manager.restore(
                step, args=ocp.args.Composite(about=ocp.args.JsonRestore())
            )["about"]
            self._check_same(about)
            arrays = self._manager.restore(
                step, args=ocp.args.Composite(arrays=ocp.args.StandardRestore(wanted))
            )["arrays"]
        except TrainingError:
            raise
        except Exception as error:  # tensorstore and Orbax raise many types
            raise TrainingError(
                f"{self._directory}: checkpoint {step} cannot be read: {error!s:.300}"
            ) from error
        leaves = [arrays["optimizer"][name] for name in _numbered(state)]
        return step, arrays["adapter"], jax.tree.unflatten(jax.tree.structure(state), leaves)

    def close(self) -> None:
        """Wait until everything is written."""
        self._manager.close()

    def _check_same(self, about: Mapping[str, Any]) -> None:
        for key, mine in self._about.items():
            theirs = about.get(key)
            if isinstance(mine, dict) and isinstance(theirs, dict):
                odd = [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
                differs = ", ".join(f"{n}={theirs.get(n)!r}, now {mine.get(n)!r}" for n in odd)
            else:
                differs = "" if mine == theirs else f"another {key}"
            if differs:
                raise TrainingError(
                    f"{self._directory}: has checkpoints of another run ({differs}): go on with "
                    "the same configuration, base and examples, or choose another directory"
                )


def _numbered(tree: Any) -> dict[str, Any]:
    """Leaves by number, whatever types hold them: what optax's states look like may change."""
    return {f"{index:03d}": leaf for index, leaf in enumerate(jax.tree.leaves(tree))}


def _abstract(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
