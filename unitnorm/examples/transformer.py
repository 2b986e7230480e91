"""A character transformer at unit norm: python -m unitnorm.examples.transformer [STEPS].

RMSNorm of queries, keys and of what each block adds, as in OLMo 2 (2025), so that every kernel
inside a block can be scaled. The text is Python's language reference, which ships for help().
"""

import sys
from collections.abc import Sequence
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from unitnorm.updates import build, normalized_kernels_nnx

CONTEXT, WIDTH, HEADS, BLOCKS, BATCH = 64, 64, 4, 2, 16


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        def heads() -> nnx.LinearGeneral:
            return nnx.LinearGeneral(WIDTH, (HEADS, WIDTH // HEADS), use_bias=False, rngs=rngs)

        def dense(before: int, after: int) -> nnx.Linear:
            return nnx.Linear(before * WIDTH, after * WIDTH, use_bias=False, rngs=rngs)

        self.query, self.key, self.value = heads(), heads(), heads()
        self.out, self.up, self.down = dense(1, 1), dense(1, 4), dense(4, 1)
        self.query_norm, self.key_norm = (nnx.RMSNorm(WIDTH // HEADS, rngs=rngs) for _ in "qk")
        self.norm, self.up_norm = (nnx.RMSNorm(WIDTH, rngs=rngs) for _ in range(2))

    def __call__(self, x: jax.Array) -> jax.Array:
        q, k = self.query_norm(self.query(x)), self.key_norm(self.key(x))
        h = jax.nn.dot_product_attention(q, k, self.value(x), is_causal=True)
        x = x + self.norm(self.out(h.reshape(x.shape)))
        return x + self.up_norm(self.down(nnx.relu(self.up(x))))


class Transformer(nnx.Module):
    def __init__(self, letters: int, rngs: nnx.Rngs):
        self.embed = nnx.Embed(letters, WIDTH, rngs=rngs)
        self.place = nnx.Embed(CONTEXT, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(BLOCKS)])
        self.out = nnx.Linear(WIDTH, letters, use_bias=False, rngs=rngs)

    def __call__(self, text: jax.Array) -> jax.Array:
        x = self.embed(text) + self.place(jnp.arange(CONTEXT))
        for block in self.blocks:
            x = block(x)
        return self.out(x)


def loss_of(model: Transformer, text: jax.Array) -> jax.Array:
    """Nats for each letter of text of shape (batch, CONTEXT + 1), from those before it."""
    logits = model(text[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:]).mean()


@nnx.jit
def step(model: Transformer, optimizer: nnx.Optimizer, text: jax.Array) -> None:
    optimizer.update(model, nnx.grad(loss_of)(model, text))


def train(
    seeds: Sequence[int], name: str, rate: float, rest_rate: float, decay: float, steps: int
) -> list[float]:
    """The loss of each seed on the last tenth of the text, after training on the rest.

    The update `name` is of the kernels, AdamW of the rest, or of all. Rates fall as half a cosine.
    """
    letters, text = np.unique(list("".join(topics.values())), return_inverse=True)
    windows = np.lib.stride_tricks.sliding_window_view(text, CONTEXT + 1)
    cut, cosine = len(text) * 9 // 10, optax.cosine_decay_schedule
    test, loss = jnp.asarray(windows[cut :: 4 * CONTEXT]), nnx.jit(loss_of)
    models = [Transformer(len(letters), nnx.Rngs(seed)) for seed in seeds]
    # With AdamW alone the next lines read: update = rest
    update = rest = optax.adamw(cosine(rest_rate, steps), weight_decay=decay)
    if name != "adamw":
        kernels = normalized_kernels_nnx(models[0], test[:8, :-1])
        update = build(name, cosine(rate, steps), kernels, rest=rest)
    for seed, model in zip(seeds, models, strict=True):
        optimizer = nnx.Optimizer(model, update, wrt=nnx.Param)
        for starts in np.random.default_rng(seed).integers(0, cut - CONTEXT, (steps, BATCH)):
            step(model, optimizer, windows[starts])
    return [float(loss(model, test)) for model in models]


def main(steps: int = 600) -> float:
    (loss,) = train([0], "un-adam", 0.01, 3e-3, 0.0, steps)
    print(f"test loss {loss:.4f} nats a letter")
    return loss


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
