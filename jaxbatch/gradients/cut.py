"""How a batch goes through a step: devices × groups × microbatches, one value.

A batch has K groups with an update each, devices share every group, and a device works on its share in microbatches. Shares are filled up
where the number of devices does not divide a group.

Axes: B examples in a batch, K groups, N devices.
"""

from typing import NamedTuple

from jaxtyping import Array, Bool, PyTree

from jaxbatch.gradients.parts import Method, Take
from jaxbatch.part_lengths import part_lengths, part_size


class Cut(NamedTuple):
    """How batches of one size go through training.

    Example:
        >>> cut = Cut(7, num_devices=2, microbatch_size=2)
        >>> cut.share, cut.at_a_time, cut.has_fillers, cut.piece_lengths
        (4, 2, True, {4: 1, 3: 1})
    """

    batch_size: int  # B, over all devices
    num_groups: int = 1
    num_devices: int = 1
    microbatch_size: int | None = None  # the most examples that a device works on at once; None: its whole share of a group
    axis: str | None = None  # the name of the axis of devices, if there are several
    to_measure: int | None = None  # a smaller one for the batches whose noise is measured, within the same program
    unmeasured: int | None = None  # the microbatch that would be without a monitor
    in_pieces: bool = False  # a Python loop runs the pieces of a step
    by_part: bool = False  # a compiled step takes the examples of each part when it works on it
    splits_prepare: bool = False  # ``prepare`` cannot see the batch of an update whole
    method: Method | None = None  # the order of work on the groups; None: as suits the platform

    @property
    def group_size(self) -> int:
        """The examples of an update, over all devices."""
        return self.batch_size // self.num_groups

    @property
    def share(self) -> int:
        """The examples of each group that a device works on, fillers included."""
        return -(-self.group_size // self.num_devices)

    @property
    def at_a_time(self) -> int:
        """The most examples that a device works on at once."""
        return part_size(self.share, self.microbatch_size)

    @property
    def has_fillers(self) -> bool:
        """Whether a share is filled up."""
        return self.share * self.num_devices > self.group_size

    @property
    def piece_lengths(self) -> dict[int, int]:
        """The lengths, over all devices, of the parts that a group has in pieces, and how many have each; the longest first."""
        size = self.microbatch_size
        return part_lengths(self.group_size, part_size(self.group_size, None if size is None else size * self.num_devices))


class Share(NamedTuple):
    """The examples that a device works on: of each group in turn; all of them on one device."""

    batch: PyTree  # leaves (B, ...)
    mask: Bool[Array, "B"] | None = None  # False for fillers, which fill up a share and do not count
    take: Take | None = None  # makes the examples of a part from that part of ``batch``, which then are indices
