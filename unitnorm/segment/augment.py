"""Random changes of a training image and its labels: scale, crop, flip, brightness, colour.

Scaling is JAX's own `jax.image.scale_and_translate`: it averages where an image shrinks and knows
where an image ends. Of the libraries tried, augmax samples without averaging and calls what is
outside an image the class 0, the sky; dm-pix transforms the whole image, twenty times as slow.
"""

import jax
import jax.numpy as jnp
from jax import Array

from unitnorm.segment.config import Augmentation


def augment(
    key: Array, image: Array, labels: Array, size: tuple[int, int], options: Augmentation
) -> tuple[Array, Array]:
    """A random part of an image, changed at random, and the labels of the same part.

    An image is never scaled to less than the part: black pixels around it would count in the
    statistics of batch normalisation, and no image that is measured has any.

    Args:
      image: (height, width, 3), 0 to 255.
      labels: (height, width).
      size: height and width of the part, at most the image's.

    Returns:
      float32 (*size, 3), 0 to 255, and int32 (*size).
    """
    zoom_key, place_key, flip_key, light_key, colour_key = jax.random.split(key, 5)
    whole, part = (jnp.asarray(x, jnp.float32) for x in (labels.shape, size))
    reach = jnp.log(options.zoom)
    least = jnp.maximum(-reach, jnp.log((part / whole).max()))
    zoom = jnp.exp(jax.random.uniform(zoom_key, minval=least, maxval=reach))
    free = jnp.floor(jnp.maximum(whole * zoom - part, 0))  # pixels that the part leaves out
    start = jnp.floor(jax.random.uniform(place_key, (2,)) * (free + 1))
    image, scale = jnp.asarray(image, jnp.float32), jnp.stack([zoom, zoom])
    image = jax.image.scale_and_translate(image, (*size, 3), (0, 1), scale, -start, "linear")
    rows, columns = (
        jnp.floor((jnp.arange(length) + 0.5 + start[axis]) / zoom).astype(jnp.int32)
        for axis, length in enumerate(size)
    )
    labels = jnp.asarray(labels)[rows[:, None], columns]
    if options.flip:
        flip = jax.random.bernoulli(flip_key)
        image = jnp.where(flip, image[:, ::-1], image)
        labels = jnp.where(flip, labels[:, ::-1], labels)
    light = options.brightness * jax.random.uniform(light_key, minval=-1.0)
    colour = options.colour * jax.random.uniform(colour_key, (3,), minval=-1.0)
    image = jnp.clip(image * jnp.exp(light + colour), 0.0, 255.0)
    return image, labels.astype(jnp.int32)
