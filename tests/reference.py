"""ArchBN in float64 NumPy, forwards and backwards, written from the paper and not from our code."""

import numpy as np


def forward(layers, theta, x, y, eps):
    """Summed cross-entropy, logits and all that the backward pass needs.

    layers: list of (W, scale, shift) with one filter per row of W; y: labels.
    """
    kept = []
    for W, scale, shift in layers:
        h = x @ W.T
        mean, var = h.mean(0), h.var(0)
        n = (h - mean) / np.sqrt(var + eps)
        b = np.maximum(n * scale + shift, 0)
        pairs = b.reshape(len(b), -1, 2)
        kept.append((x, W, scale, n, np.sqrt(var + eps), b))
        x = pairs.max(-1)
    logits = x @ theta.T
    shifted = logits - logits.max(1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    loss = -log_p[np.arange(len(y)), y].sum()
    return loss, logits, (kept, x, np.exp(log_p))


def gradients(layers, theta, x, y, eps):
    """Gradients of the summed loss: [(dW, dscale, dshift), …], dtheta."""
    _, _, (kept, top, p) = forward(layers, theta, x, y, eps)
    d = p.copy()
    d[np.arange(len(y)), y] -= 1
    d_theta, d = d.T @ top, d @ theta
    result = []
    for x_in, W, scale, n, std, b in reversed(kept):
        count = len(b)
        d_b = np.zeros_like(b)
        for i in range(count):
            for j in range(b.shape[1] // 2):
                winner = 2 * j + (b[i, 2 * j + 1] > b[i, 2 * j])
                d_b[i, winner] = d[i, j]
        d_b[b <= 0] = 0
        d_scale, d_shift = (d_b * n).sum(0), d_b.sum(0)
        d_n = d_b * scale
        d_h = (d_n - d_n.mean(0) - n * (d_n * n).mean(0)) / std
        result.append((d_h.T @ x_in, d_scale, d_shift))
        d = d_h @ W
    return result[::-1], d_theta


def step(layers, theta, x, y, eps, rate, *, un=False):
    """Layers and θ after a mini-batch: a row of Table 1."""
    slopes, d_theta = gradients(layers, theta, x, y, eps)
    moved = []
    for (W, *norm), (dW, *d_norm) in zip(layers, slopes, strict=True):
        W = un_step(W, dW, rate) if un else W - rate * dW
        moved.append((W, *(p - rate * d for p, d in zip(norm, d_norm, strict=True))))
    return moved, theta - rate * d_theta


def un_step(W, G, rate):
    """Table 1 by hand: each row's gradient loses its part along the row; step; unit norm."""
    new = np.empty_like(W)
    for i, (w, g) in enumerate(zip(W, G, strict=True)):
        moved = w - rate * (g - (w @ g) * w)
        new[i] = moved / np.sqrt(moved @ moved)
    return new
