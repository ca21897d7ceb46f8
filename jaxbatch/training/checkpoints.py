"""Checkpoints: the state of a run on disk, written completely or not at all. A run continues from the newest good one.

A checkpoint holds a :class:`jaxbatch.TrainState`: parameters, model state, optimizer state, and the number of updates. The
optimizer state counts updates too, which gives the place in a learning-rate schedule. The number of updates and the
configuration give the place in the batch-size schedule and in the order of examples; of a policy a checkpoint holds place and state.
"""

import errno
import itertools
import json
import os
import pathlib
import re
import shutil
import warnings
from collections.abc import Iterator
from typing import Any

from jaxtyping import PyTree

from jaxbatch.kinds import check_fields, checked
from jaxbatch.paths import local_path
from jaxbatch.states import pack_fields, unpack_like
from jaxbatch.training.fitting import fit_with
from jaxbatch.training.plan_machine import make_plan
from jaxbatch.training.plans import FitConfig, settled
from jaxbatch.training.run_fields import for_disk, is_over, shapes_on_disk
from jaxbatch.training.run_programs import RunPrograms
from jaxbatch.training.tasks import Task, fingerprint


@checked
def fit_with_checkpoints(
    task: Task, config: FitConfig, checkpoint_dir: str | os.PathLike, *, every: int = 1, keep: int = 2
) -> Iterator[dict[str, Any]]:
    """Runs :func:`jaxbatch.fit` and saves its state every ``every`` records; the same call continues an interrupted run.

    On CPU, a run that was killed at any point and continued ends with the same bits as an uninterrupted run: a step depends only on the state
    and its place in the order of examples. A longer duration is refused; to make a run longer, give :func:`jaxbatch.fit` its last ``state``.

    Args:
        task, config: as for :func:`jaxbatch.fit`. Give the same optimizer and model again: they are not saved.
        checkpoint_dir: a folder for this run alone.
        every: records between checkpoints; the last record always gets one.
        keep: how many of the newest checkpoints stay on disk.

    Yields:
        The records of :func:`jaxbatch.fit` after the newest good checkpoint. A checkpoint is written when the next record is
        requested, so a caller that saves each record loses none. After a kill some records may come a second time, with the same numbers.
        A state that is not finite is not saved. A damaged checkpoint is skipped, with a warning that names it.

    Raises:
        ValueError: ``every`` or ``keep`` is below 1; the folder holds a run with other training data, another seed or another plan or
            policy of batch sizes; or a file in it cannot be read (permission, a failing disk). Nothing is trained or removed.

    Example:
        >>> import tempfile, optax, jax.numpy as jnp
        >>> from jaxbatch import epochs
        >>> loss_fn = lambda w, x: 0.5 * (x - w) ** 2
        >>> metrics_fn = lambda w, x: {"loss": loss_fn(w, x)}
        >>> data = jnp.array([1.0, 2.0, 3.0, 4.0])
        >>> task, folder = Task(lambda key: jnp.array(0.0), loss_fn, metrics_fn, data, data), tempfile.mkdtemp()
        >>> config = FitConfig(optax.sgd(0.5), batch_size=4, duration=epochs(3))
        >>> run = fit_with_checkpoints(task, config, folder)
        >>> first, second = next(run), next(run)  # and then the machine goes away
        >>> [record["epoch"] for record in fit_with_checkpoints(task, config, folder)]
        [2.0, 3.0]
    """
    check_fields(config)
    if every < 1:
        raise ValueError(f"every={every} records must be at least 1.")
    yield from checkpointed(RunPrograms(task, config.optimizer), config, checkpoint_dir, every=every, keep=keep)


def checkpointed(shared: RunPrograms, config: FitConfig, folder: str | os.PathLike, *, every: int = 1, keep: int = 2) -> Iterator[dict[str, Any]]:
    """:func:`fit_with_checkpoints` with programs that it shares with other runs; their optimizer is trained with."""
    task, config = shared.task, settled(config._replace(optimizer=shared.optimizer), shared.task.tokens_per_example)
    plan = make_plan(config, task.num_examples)
    about: dict[str, Any] = {"data": fingerprint(task.train_data), "seed": config.seed, "num_examples": task.num_examples}
    about |= {"num_groups": config.num_groups, "batch_sizes": plan.about()}
    if config.monitor is not None:  # only then, so that folders from before there were monitors stay readable
        about["monitor"] = config.monitor._asdict()
    checkpoints = Checkpoints(folder, about, keep=keep)
    state = checkpoints.latest(shapes_on_disk(task, config, plan))
    if state is not None and is_over(plan, state):
        return  # the run is complete, so there is nothing left to do
    for number, record in enumerate(fit_with(shared, config, state), 1):
        batches, state = record["batches"], record["state"]
        wanted = not record["diverged"] and (number % every == 0 or batches == record["total_batches"])
        yield record
        if wanted:
            checkpoints.save(batches, for_disk(plan, state))


class Checkpoints:
    """A folder of checkpoints of one run.

    orbax writes a checkpoint into a temporary folder and renames it when it is complete. So a kill while writing leaves the
    earlier checkpoints intact. A checkpoint is a folder ``step_<number>``; folders with other names are never read or removed.

    Args:
        folder: created if it does not exist.
        about: describes the run, with JSON values only; a folder that holds another run is refused.
        keep: how many of the newest checkpoints stay.

    Raises:
        ValueError: ``keep`` is below 1; the folder belongs to another run, holds checkpoints of an unknown run, or cannot be
            read; from ``latest``: the state has other shapes, or a checkpoint cannot be read.
    """

    def __init__(self, folder: str | os.PathLike, about: dict[str, Any], *, keep: int = 2):
        if keep < 1:
            raise ValueError(f"keep={keep} must be at least 1.")
        self.folder, self._keep = local_path(folder, "checkpoint_dir").absolute(), keep
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"checkpoint_dir={os.fspath(folder)!r} cannot be made: {error}. Take another folder.") from error
        file, text = self.folder / "about.json", json.dumps(about | {"format": _FORMAT}, sort_keys=True)
        written = _read_about(file)
        if written is not None:
            here = json.loads(text)
            if isinstance(rows := written.get("batch_sizes"), list):  # from before a row stood for all records of a size
                written["batch_sizes"] = [[size, sum(count for _, count in same)] for size, same in itertools.groupby(rows, key=lambda row: row[0])]
                here["batch_sizes"] = (here.get("batch_sizes") or {}).get("sizes")
            here["data"] = None if written.get("data", "") is None else here.get("data")  # of a stream, from before it had a fingerprint
            differing = sorted(key for key in {*written, *here} if written.get(key) != here.get(key))
            if differing:
                differences = ", ".join(f"{key}: {_brief(written.get(key))} there, {_brief(here.get(key))} here" for key in differing)
                raise ValueError(f"checkpoint_dir={os.fspath(folder)!r} holds another run ({differences}). Take another folder.")
        elif steps := self.steps():
            nameless = f"checkpoint_dir={os.fspath(folder)!r} holds {_name(steps[-1])} but no about.json"
            raise ValueError(f"{nameless}, which says whose run it is. Take another folder.")
        else:
            part = file.with_suffix(".part")
            part.write_text(text, encoding="utf-8")
            part.replace(file)

    def save(self, step: int, state: PyTree) -> None:
        """Writes a checkpoint, waits until it is on disk, and removes the oldest so that ``keep`` remain.

        Checkpoints of later steps stay. They are damaged, and this run has not reached their steps again.
        """
        ocp, path = _orbax(), self.folder / _name(step)
        if path.exists():
            shutil.rmtree(path)  # it is damaged: otherwise the run would have continued from it
        ocp.save(path, pack_fields(state))
        for old in [other for other in self.steps() if other <= step][: -self._keep]:
            shutil.rmtree(self.folder / _name(old))

    def steps(self) -> list[int]:
        """The steps that have a complete checkpoint, oldest first."""
        try:
            # Not path.is_dir(): it is False for a broken link, which would be skipped, and the run would start from zero.
            named = [(_NAME.fullmatch(path.name), path) for path in self.folder.iterdir()]
            return sorted(int(match[1]) for match, path in named if match and not path.is_file())
        except OSError as error:
            raise ValueError(_cannot_read(self.folder, error)) from error

    def latest(self, like: PyTree) -> PyTree | None:
        """The newest checkpoint that is not damaged, as a pytree with the shapes of ``like``; None if there is none.

        Damaged checkpoints are skipped, each with a warning.
        """
        ocp = _orbax()
        for step in reversed(self.steps()):
            path = self.folder / _name(step)
            try:
                state = unpack_like(ocp.load(path), like)
            except Exception as error:  # unreadable, or damaged in one of the many ways a file can be
                unreadable = _why_unreadable(path, error)
                if unreadable is not None:
                    raise ValueError(_cannot_read(path, unreadable)) from error
                reason = " ".join(str(error).split())[:200]
                warnings.warn(f"{path} is a damaged checkpoint and is skipped ({type(error).__name__}: {reason}).", stacklevel=2)
                continue
            if state is None:
                raise ValueError(
                    f"checkpoint_dir={os.fspath(self.folder)!r} holds the state of another model or optimizer, or policy. Take another folder."
                )
            return state
        return None


_FORMAT = 2  # raise this number when the form of the folders changes, so that an older one gives an error and is not skipped
_NAME = re.compile(r"step_(\d+)")


def _name(step: int) -> str:
    return f"step_{step}"


def _read_about(file: pathlib.Path) -> dict[str, Any] | None:
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(_cannot_read(file, error)) from error
    except ValueError:  # no JSON, or no text
        about = None
    if not isinstance(about, dict):
        raise ValueError(f"{file} is damaged, and it says to which run the checkpoints beside it belong. Take another folder.")
    return about


def _cannot_read(path: pathlib.Path, error: BaseException) -> str:
    return f"{path} cannot be read ({error}). Nothing was trained or removed: make it readable, or take another checkpoint_dir."


_OF_DAMAGE = (None, errno.ENOENT, errno.ENOTDIR, errno.EINVAL)  # errors that mean damage: a file is missing or wrong


def _why_unreadable(path: pathlib.Path, error: BaseException) -> BaseException | None:
    """The error that prevents reading a checkpoint that may be good; None if it can be read and so is damaged."""
    waiting: list[BaseException | None] = [error]
    known: set[int] = set()
    while waiting:  # orbax wraps the original error, several times and in groups
        one = waiting.pop()
        if one is None or id(one) in known:
            continue
        known.add(id(one))
        if isinstance(one, MemoryError) or (isinstance(one, OSError) and one.errno not in _OF_DAMAGE):
            return one
        waiting += [one.__cause__, one.__context__, *getattr(one, "exceptions", ())]
    try:
        for folder, _, files in os.walk(path, onerror=_raise):
            for name in files:
                with open(os.path.join(folder, name), "rb") as file:
                    while file.read(2**24):
                        pass
    except OSError as unreadable:
        return unreadable
    return None


def _raise(error: OSError) -> None:
    raise error


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:56]} ..."


def _orbax():
    """Imports orbax only when it is used, because its import takes longer than JAX's."""
    from orbax.checkpoint import v1

    return v1
