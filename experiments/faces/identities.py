"""Very many identities without storage: an image is a pure function of an identity's number and an example's key.

An identity is a handwritten digit with a deformation of its own: turned, scaled, sheared, bent by a smooth random field, with thicker or
thinner strokes. All of it is drawn from the identity's number. Its examples differ by a small shift, a small turn and noise.
Identities of the training set are made of other digits than those that are held out.

Axes: P digits of 8 × 8 pixels, B examples, S × S pixels of an image.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from experiments.harness.deformed import grid, read_at

SIZE, SOURCE = 16, 8  # pixels of a side: of an image, of a digit
ANGLE, SCALE, SHEAR, BEND, STROKE = 0.4, 0.2, 0.3, 0.8, 0.5  # of an identity: radians, logarithm, slope, pixels of the digit, logarithm
SHIFT, TURN, NOISE = 0.4, 0.1, 0.1  # of an example: pixels of the digit, radians, grey levels of 0 to 1
BENDS = 3  # the random field is drawn on 3 × 3 places, and smooth between them
_IDENTITY = 0x66616365  # "face" in ASCII


def sources_of(images) -> Float[Array, "P 8 8"]:
    """The digits in the resolution that they were written in, with grey levels from 0 to 1; see :mod:`jaxbatch.data.digits`."""
    grey = jnp.asarray(images[:, 2:26, 2:26, 0], jnp.float32) / 255
    return grey.reshape(len(images), SOURCE, 3, SOURCE, 3).mean((2, 4))


def make_image(sources: Float[Array, "P 8 8"], identity: Int[Array, ""], key: Key[Array, ""]) -> Float[Array, "S S"]:
    """An example of an identity: the same numbers for the same sources, identity and key.

    Example:
        >>> one, other = (make_image(jnp.ones((2, 8, 8)), jnp.array(n), jax.random.key(0)) for n in (0, 1))
        >>> one.shape, bool(jnp.abs(one - other).max() > 0.1)
        ((16, 16), True)
    """
    of_identity = jax.random.fold_in(jax.random.key(_IDENTITY), identity)
    for_digit, for_form, for_bend = jax.random.split(of_identity, 3)
    digit = sources[jax.random.randint(for_digit, (), 0, sources.shape[0])]
    form = jax.random.uniform(for_form, (5,), minval=-1, maxval=1)
    bend = BEND * jax.random.normal(for_bend, (2, BENDS, BENDS))
    for_pose, for_noise = jax.random.split(key)
    pose = jax.random.uniform(for_pose, (3,), minval=-1, maxval=1)

    angle = ANGLE * form[0] + TURN * pose[0]
    zoom, shear, stroke = jnp.exp(SCALE * form[1:3]), SHEAR * form[3], jnp.exp(STROKE * form[4])
    rows, columns = (SOURCE / SIZE * each for each in grid(SIZE))
    rows, columns = rows * zoom[0], columns * zoom[1] + shear * rows
    rows, columns = jnp.cos(angle) * rows - jnp.sin(angle) * columns, jnp.sin(angle) * rows + jnp.cos(angle) * columns
    smooth = jax.image.resize(bend, (2, SIZE, SIZE), "cubic")
    middle = (SOURCE - 1) / 2
    image = read_at(digit, rows + middle + smooth[0] + SHIFT * pose[1], columns + middle + smooth[1] + SHIFT * pose[2])
    return image**stroke + NOISE * jax.random.normal(for_noise, image.shape)


def make_images(sources: Float[Array, "P 8 8"], identities: Int[Array, "B"], keys: Key[Array, "B"]) -> Float[Array, "B S S"]:
    """Examples of a batch of identities, with a key for each."""
    return jax.vmap(make_image, (None, 0, 0))(sources, identities, keys)


def keys_of(seed, epochs: Int[Array, "B"], identities: Int[Array, "B"]) -> Key[Array, "B"]:
    """A key for each example, a pure function of the seed, the pass over the identities, and the identity."""
    key = jax.random.fold_in(jax.random.key(seed), _IDENTITY)
    return jax.vmap(lambda epoch, identity: jax.random.fold_in(jax.random.fold_in(key, epoch), identity))(epochs, identities)
