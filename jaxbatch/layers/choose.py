"""Chooses how convolutions and poolings run; no other module decides this.

**Layout.** Networks with few channels on CPU use ``batch_minor``, with axes ``(C, H, W, B)``. There, neighbouring examples are
neighbours in memory, so every slice and every maximum works on long vectors, whatever the number of channels. A convolution is
one product of the kernel with gathered patches (*im2col*). Everything else uses ``native``, with axes ``(B, H, W, C)``.

**Convolution in the native layout.** An accelerator uses the platform's convolution. A CPU uses one of the other ways
(``scripts/bench.py layers`` measures them):

===========  =====================================  ===========================  =============================  ==============
way          when                                   forward                      gradient of the input          of the kernel
===========  =====================================  ===========================  =============================  ==============
``platform`` not on CPU                             XLA's                        XLA's                          XLA's
``product``  1 × 1 kernel, no padding               matrix product               matrix product                 matrix product
``dense``    kernel larger than a small image,      product with the matrix      product with its transpose     matrix product
             16 examples or more                    of all shifts of the kernel
``patches``  kernel larger than the image else      patches                      patches                        patches
``xla``      everything else                        XLA's                        XLA's forward convolution      patches
                                                                                 with the turned kernel
===========  =====================================  ===========================  =============================  ==============

*patches* means im2col over a few images at a time, so that the patches (k² times the image) stay in the cache. XLA:CPU's own
gradient of the kernel is slow, and its convolutions with kernels larger than the image are very slow. Gradients per example or
per group never batch the kernel, so no way becomes XLA's slow grouped convolution.

**Loops.** Inside a compiled loop XLA:CPU has no fast convolution at all, forward included. :func:`loops_are_slow` says
whether a function contains one; training then loops in Python over a compiled step instead.
"""

from typing import Any, Literal

import jax
from jax.extend import core

from jaxbatch.machine.platform import compiled_platform

Layout = Literal["batch_minor", "native"]
Algorithm = Literal["platform", "product", "dense", "patches", "xla"]

PATCH_BYTES = 5 * 2**20  # the patches gathered at a time, a share of the last-level cache
SMALL_PRODUCT = 64 * 9 * 64  # kernels with fewer elements give products that leave cores idle, so two run at a time
DENSE_PIXELS = 16  # the most pixels of an image for "dense"; the matrix of all shifts grows with their square
DENSE_EXAMPLES = 16  # with fewer examples, filling the matrix costs more than it saves


def choose_layout(platform: str | None = None) -> Layout:
    """The fastest layout of a network with few channels on a platform (default: the one that is compiled for).

    Example:
        >>> choose_layout("cpu"), choose_layout("gpu")
        ('batch_minor', 'native')
    """
    return "batch_minor" if (platform or compiled_platform()) == "cpu" else "native"


def choose_conv(image: tuple[int, int], kernel_size: int, *, batch_size: int, padding: int = 0, platform: str | None = None) -> Algorithm:
    """The way to run a convolution in the native layout, see the table in the module's docstring.

    Example:
        >>> [choose_conv((side, side), 3, batch_size=128, padding=1, platform="cpu") for side in (2, 32)]
        ['dense', 'xla']
    """
    if (platform or compiled_platform()) != "cpu":
        return "platform"
    if kernel_size == 1 and padding == 0:
        return "product"
    if kernel_size <= min(image):
        return "xla"
    small = image[0] * image[1] <= DENSE_PIXELS
    return "dense" if small and batch_size >= DENSE_EXAMPLES else "patches"


def images_at_a_time(patch_bytes: int, batch_size: int) -> int:
    """The number of images whose patches are gathered at a time.

    Args:
        patch_bytes: bytes of the patches of one image.
        batch_size: images in the whole batch.

    Example:
        >>> images_at_a_time(2**20, 128), images_at_a_time(2**30, 128), images_at_a_time(1, 128)
        (5, 1, 128)
    """
    return min(batch_size, max(1, PATCH_BYTES // patch_bytes))


def choose_phases(patch_size: int, kernel_size: int) -> bool:
    """Whether convolution and max-pool run as one product over the pooling's phases (batch-minor layout).

    This pays only if the shifted kernels are small compared with the patches that they save. Otherwise, as in the last layers
    of a network and with small batches, im2col is used.

    Args:
        patch_size: the number of elements of the patches, gathered for all phases at once.
        kernel_size: the number of elements of the kernel, shifted to each phase and padded.
    """
    return patch_size >= 3 * kernel_size


def choose_reshaped_pool(platform: str | None = None) -> bool:
    """Whether a max-pool is the maximum over an axis of a reshaped array rather than XLA's ``reduce_window``.

    On CPU the gradient of ``reduce_window`` is slow; on an accelerator ``reduce_window`` is fast.
    """
    return (platform or compiled_platform()) == "cpu"


def loops_are_slow(function, *arguments: Any, platform: str | None = None) -> bool:
    """Whether ``function`` contains one of XLA's convolutions and the platform is a CPU. The function is traced, not run.

    Example:
        >>> import jax.numpy as jnp
        >>> loops_are_slow(lambda x: jnp.convolve(x, x), jnp.ones(3), platform="cpu")
        True
        >>> loops_are_slow(lambda x: x @ x, jnp.ones(3), platform="cpu")
        False
    """
    if (platform or compiled_platform()) != "cpu":
        return False
    return _has_convolution(jax.make_jaxpr(function)(*arguments).jaxpr)


def _has_convolution(jaxpr) -> bool:
    for equation in jaxpr.eqns:
        if equation.primitive.name == "conv_general_dilated":
            return True
        inner = jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr)
        if any(_has_convolution(getattr(one, "jaxpr", one)) for one in inner if _is_jaxpr(one)):
            return True
    return False


def _is_jaxpr(value) -> bool:
    return isinstance(value, core.Jaxpr | core.ClosedJaxpr)
