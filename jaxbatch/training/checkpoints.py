"""The state of a run on disk: written whole or not at all, the newest good one found again.

What is kept is a :class:`jaxbatch.TrainState`: parameters, optimizer state (with its count of updates, the place in a
learning-rate schedule), model state, and the number of updates, which with the configuration gives the place in the
batch-size schedule and in the order of examples.
"""

import errno
import json
import os
import pathlib
import re
import shutil
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from jaxbatch.paths import local_path
from jaxbatch.states import as_arrays, kinds, pack, unpack
from jaxbatch.training.fitting import fit
from jaxbatch.training.plans import FitConfig, plan_segments, python_numbers
from jaxbatch.training.steps import init_state
from jaxbatch.training.tasks import Task, fingerprint


def fit_with_checkpoints(
    task: Task, config: FitConfig, checkpoint_dir: str | os.PathLike, *, every: int = 1, keep: int = 2
) -> Iterator[dict[str, Any]]:
    """:func:`jaxbatch.fit`, whose state goes to disk every so many records; the same call goes on from there.

    A run that was killed, wherever, and taken up again ends on CPU in the same bits as one that was not: what a step
    computes is a function of the state and its place in the order of examples, and both are kept.

    A longer run is another run, with another plan: give :func:`jaxbatch.fit` the ``state`` of the last record.

    Args:
        task, config: as :func:`jaxbatch.fit` takes them. The optimizer and the model are not written down: give the same.
        checkpoint_dir: a folder for this run alone.
        every: records between checkpoints; after the last record there always is one.
        keep: how many of the newest stay on disk.

    Yields:
        The records of :func:`jaxbatch.fit` that come after the newest good checkpoint. A checkpoint is written when the
        next record is asked for, so that whoever writes down what is yielded misses none; after a kill some may come a
        second time, with the same numbers. A state that is not finite is not kept. A damaged checkpoint is passed over with
        a warning that names it.

    Raises:
        ValueError: ``every`` or ``keep`` below 1, or a folder that holds a run with other training data, another seed or plan
            of batch sizes, or in which something cannot be read (permission, a failing disk): nothing is trained or removed.

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
    if every < 1:
        raise ValueError(f"every={every} records must be at least 1.")
    config = python_numbers(config)
    segments = plan_segments(config, task.num_examples)
    about = {
        "data": fingerprint(task.train_data),
        "seed": config.seed,
        "num_examples": task.num_examples,
        "num_groups": config.num_groups,
        "batch_sizes": [[segment.batch_size, segment.num_batches] for segment in segments],
    }
    checkpoints = Checkpoints(checkpoint_dir, about, keep=keep)
    ends = np.cumsum([segment.num_batches for segment in segments]).tolist()
    shapes = jax.eval_shape(lambda: as_arrays(init_state(task, config.optimizer, config.seed)))
    state = checkpoints.latest(shapes)
    if state is not None and ends and int(state.step) // (config.num_groups or 1) >= ends[-1]:
        return  # the run is whole, and the same call again has nothing to add
    for record in fit(task, config, state=state):
        batches, state, number = record["batches"], record["state"], ends.index(record["batches"]) + 1
        wanted = not record["diverged"] and (number % every == 0 or number == len(ends))
        yield record
        if wanted:
            checkpoints.save(batches, state._replace(progress=()))  # a function of the number of updates and the plan


class Checkpoints:
    """A folder of checkpoints of one run.

    Writing goes through orbax: into a folder beside, which is renamed when complete, so that a kill leaves the one before.
    A checkpoint is a folder ``step_<number>``; nothing by another name is read, written or removed.

    Args:
        folder: made if it is not there.
        about: what the run is, JSON values only; a folder that holds another run is refused.
        keep: how many of the newest stay.

    Raises:
        ValueError: ``keep`` below 1, a folder of another run, one with checkpoints of nobody knows which run, or one that
            cannot be read; from ``latest``, a state of other
            shapes, or a checkpoint that cannot be read.
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
            differing = sorted(key for key in {*written, *here} if written.get(key) != here.get(key))
            if differing:
                differences = ", ".join(f"{key}: {_brief(written.get(key))} there, {_brief(here.get(key))} here" for key in differing)
                raise ValueError(f"checkpoint_dir={os.fspath(folder)!r} holds another run ({differences}). Take another folder.")
        elif steps := self.steps():
            raise ValueError(
                f"checkpoint_dir={os.fspath(folder)!r} holds {_name(steps[-1])} and no about.json, which says whose it is. Take another folder."
            )
        else:
            part = file.with_suffix(".part")
            part.write_text(text, encoding="utf-8")
            part.replace(file)

    def save(self, step: int, state: PyTree) -> None:
        """Writes a checkpoint and removes the oldest beyond ``keep``; returns when it is on disk.

        Those of later steps stay: they are damaged, and this run has not come to them again.
        """
        ocp = _orbax()
        path = self.folder / _name(step)
        if path.exists():
            shutil.rmtree(path)  # a damaged one: a good one would have been gone on from
        ocp.save(path, pack(state))
        for old in [other for other in self.steps() if other <= step][: -self._keep]:
            shutil.rmtree(self.folder / _name(old))

    def steps(self) -> list[int]:
        """The steps that have a complete checkpoint, oldest first."""
        try:
            # Not "if it is a folder": a link that leads nowhere would be no checkpoint, and the run would begin anew.
            named = [(_NAME.fullmatch(path.name), path) for path in self.folder.iterdir()]
            return sorted(int(match[1]) for match, path in named if match and not path.is_file())
        except OSError as error:
            raise ValueError(_cannot_read(self.folder, error)) from error

    def latest(self, like: PyTree) -> PyTree | None:
        """The newest checkpoint that is not damaged, as a pytree of the shapes of ``like``; None where there is none.

        Damaged ones are passed over, each with a warning.
        """
        ocp = _orbax()
        for step in reversed(self.steps()):
            path = self.folder / _name(step)
            try:
                leaves = unpack(ocp.load(path))
            except Exception as error:  # unreadable, or damaged in one of the many ways a file can be
                unreadable = _why_unreadable(path, error)
                if unreadable is not None:
                    raise ValueError(_cannot_read(path, unreadable)) from error
                reason = " ".join(str(error).split())[:200]
                warnings.warn(f"{path} is a damaged checkpoint and is passed over ({type(error).__name__}: {reason}).", stacklevel=2)
                continue
            if kinds(leaves) != kinds(jax.tree.leaves(like)):
                raise ValueError(f"checkpoint_dir={os.fspath(self.folder)!r} holds the state of another model or optimizer. Take another folder.")
            return jax.tree.unflatten(jax.tree.structure(like), leaves)
        return None


_FORMAT = 2  # raised when folders are named or filled in another way, so that an older one is told and not passed over
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
        raise ValueError(f"{file} is damaged: it says which run the checkpoints beside it are of. Take another folder.")
    return about


def _cannot_read(path: pathlib.Path, error: BaseException) -> str:
    return f"{path} cannot be read ({error}). Nothing was trained or removed: make it readable, or take another checkpoint_dir."


_OF_DAMAGE = (None, errno.ENOENT, errno.ENOTDIR, errno.EINVAL)  # a file is gone, or not what it should be


def _why_unreadable(path: pathlib.Path, error: BaseException) -> BaseException | None:
    """What keeps a checkpoint from being read, which may be good; None where it was read and is damaged."""
    waiting: list[BaseException | None] = [error]
    known: set[int] = set()
    while waiting:  # orbax wraps what went wrong, several times and in groups
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
    """Imported on use: it takes longer than JAX."""
    from orbax.checkpoint import v1

    return v1
