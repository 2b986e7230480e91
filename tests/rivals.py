"""The rules of all updates in float64 NumPy, one filter per row, written from their sources.

Each takes W, the gradient there, the learning rate and a memory `m`, in which everything starts at
zero and "t" counts steps from 1; it gives the next W. As called, from a start and the gradient as a
function of W, it yields W after every step. The options are those of the update of its name.
"""

import collections
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np


def rule(step):
    @functools.wraps(step)
    def steps(W, gradient, rate, **options):
        memory = collections.defaultdict(lambda: np.zeros_like(W))
        for memory["t"] in itertools.count(1):
            W = step(W, gradient(W), rate, memory, **options)
            yield W

    return steps


def dots(A, B):
    return np.array([[a @ b] for a, b in zip(A, B, strict=True)])


def lengths(A):
    return np.sqrt(dots(A, A))


def towards_sphere(W):
    return W / lengths(W)


def project(W, Z):
    return Z - np.diag(np.diag(Z @ W.T)) @ W


@rule
def sgd_momentum(W, G, rate, m, momentum=0.9, weight_decay=5e-4, nesterov=False):
    G = G + weight_decay * W
    m["M"] = momentum * m["M"] + G
    return W - rate * (G + momentum * m["M"] if nesterov else m["M"])


def sgd_wd(W, gradient, rate, summed_over=1):
    return sgd_momentum(W, gradient, rate, momentum=0, weight_decay=5e-4 * summed_over)


b_sgd = functools.partial(sgd_momentum, momentum=0, weight_decay=0)


@rule
def un(W, G, rate, m):
    return towards_sphere(W - rate * project(W, G))


@rule
def un_momentum(W, G, rate, m, momentum=0.9, nesterov=False):
    R = project(W, G)
    m["M"] = momentum * project(W, m["M"]) + R
    return towards_sphere(W - rate * (R + momentum * m["M"] if nesterov else m["M"]))


un_nesterov = functools.partial(un_momentum, nesterov=True)


@rule
def un_adam(W, G, rate, m):
    R = project(W, G)
    m["M"] = 0.9 * project(W, m["M"]) + 0.1 * R
    m["v"] = 0.999 * m["v"] + 0.001 * dots(R, R)
    size = np.sqrt(m["v"] / (1 - 0.999 ** m["t"])) + 1e-8
    return towards_sphere(W - rate * m["M"] / (1 - 0.9 ** m["t"]) / size)


@rule
def sm(W, G, rate, m):
    return W - rate * np.diag(np.diag(W @ W.T)) @ G


@rule
def normalize(W, G, rate, m):
    return towards_sphere(W - rate * G)


@rule
def weight_norm(W, G, rate, m):
    """Descent on v and g by automatic differentiation through W(v, g)."""

    def of(v, g):
        return g[:, None] * v / jnp.linalg.norm(v, axis=1, keepdims=True)

    v, g = m["v, g"] if m["t"] > 1 else (jnp.asarray(W), jnp.linalg.norm(W, axis=1))
    dv, dg = jax.grad(lambda v, g: jnp.sum(of(v, g) * G), (0, 1))(v, g)
    m["v, g"] = v - rate * dv, g - rate * dg
    return np.asarray(of(*m["v, g"]))


@rule
def un_carried(W, G, rate, m, median=False):
    n, R = m["n"] if m["t"] > 1 else dots(W, W), project(W, G)
    m["n"] = n + rate**2 * dots(R, R) / n
    return towards_sphere(W - rate * R / (np.median(n) if median else n))


@rule
def b_sgd_median(W, G, rate, m):
    W = W - rate * np.median(lengths(W)) ** 2 * G
    return W / np.median(lengths(W))


def heo_projection(W, G, P, delta=0.1):
    """AdamP's Algorithm 1, lines 5 to 9: P without its radial part, and its share of the decay."""
    for view in (lambda A: A, lambda A: A.reshape(1, -1)):
        w, g, p = view(W), view(G), view(P)
        cosines = [abs(a @ b) / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-8)
                   for a, b in zip(w, g, strict=True)]  # fmt: skip
        if max(cosines) < delta / np.sqrt(w.shape[1]):
            unit = w / (lengths(w) + 1e-8)
            return (p - dots(unit, p) * unit).reshape(P.shape), 0.1
    return P, 1


@rule
def sgdp(W, G, rate, m, momentum=0.9, weight_decay=0.0, nesterov=False):
    m["M"] = momentum * m["M"] + G
    P, share = heo_projection(W, G, G + momentum * m["M"] if nesterov else m["M"])
    return W * (1 - rate * weight_decay * share / (1 - momentum)) - rate * P


@rule
def adamp(W, G, rate, m, weight_decay=0.0, nesterov=False):
    m["M"], m["V"] = 0.9 * m["M"] + 0.1 * G, 0.999 * m["V"] + 0.001 * G * G
    step = 0.9 * m["M"] + 0.1 * G if nesterov else m["M"]
    P = step / (np.sqrt(m["V"]) / np.sqrt(1 - 0.999 ** m["t"]) + 1e-8)
    P, share = heo_projection(W, G, P)
    return W * (1 - rate * weight_decay * share) - rate / (1 - 0.9 ** m["t"]) * P


def cho_lee_gradient(W, G, clip):
    H = G - dots(W, G) * W
    return H if clip is None else H * np.minimum(1, clip / lengths(H))


def geodesic(W, D, M):
    """exp_W(D), and the rows of M, which are tangent, transported along it."""
    t = lengths(D)
    U = D / t
    moved = M - (W * np.sin(t) + U * (1 - np.cos(t))) * dots(U, M)
    return W * np.cos(t) + U * np.sin(t), moved


@rule
def sgd_g(W, G, rate, m, momentum=0.9, clip=0.1):
    D = momentum * m["M"] - rate * cho_lee_gradient(W, G, clip)
    W, m["M"] = geodesic(W, D, D)
    return W


@rule
def adam_g(W, G, rate, m, clip=0.1):
    H = cho_lee_gradient(W, G, clip)
    M, m["v"] = 0.9 * m["M"] + 0.1 * H, 0.99 * m["v"] + 0.01 * dots(H, H)
    alpha = np.sqrt(1 - 0.99 ** m["t"]) / (1 - 0.9 ** m["t"])
    W, m["M"] = geodesic(W, -rate * alpha * M / np.sqrt(m["v"] + 1e-8), M)
    return W


@rule
def nero(W, G, rate, m):
    m["v"] = 0.999 * m["v"] + 0.001 * dots(G, G)
    W = W - rate * G / np.sqrt(m["v"] / (1 - 0.999 ** m["t"]))
    return towards_sphere(W - W.mean(1, keepdims=True))


@rule
def lars(W, G, rate, m, momentum=0.9, weight_decay=0.0):
    D = G + weight_decay * W
    m["M"] = momentum * m["M"] + rate * np.linalg.norm(W) / np.linalg.norm(D) * D
    return W - m["M"]


@rule
def rotational_sgd(W, G, rate, m, momentum=0.9, weight_decay=5e-4, zero_mean=False):
    """From rows of mean zero and norm one."""
    m["M"] = momentum * m["M"] + G
    D = m["M"] - m["M"].mean(1, keepdims=True) if zero_mean else m["M"]
    D = D - dots(D, W) * W
    m["a"] = 0.9 * m["a"] + 0.1 * dots(D, D)
    angle = np.sqrt(2 * rate * weight_decay / (1 + momentum))
    return towards_sphere(W - angle * D / (1e-8 + np.sqrt(m["a"] / (1 - 0.9 ** m["t"]))))


@rule
def adam_srt(W, G, rate, m):
    M, v = 0.9 * m["M"] + 0.1 * G, 0.999 * m["v"] + 0.001 * dots(G, G)
    size = np.sqrt(v) / np.sqrt(1 - 0.999 ** m["t"]) + 1e-8
    new = W - rate * np.sqrt(W.shape[1]) * M / (1 - 0.9 ** m["t"]) / size
    squared = dots(new, new) + 1e-8
    m["v"] = v * dots(W, W) / squared
    m["M"] = (dots(W, new) * M - dots(M, new) * W) / squared
    return new


def adam_direction(G, m, b2=0.999):
    """Adam's m̂/(√v̂ + 1e-8)."""
    m["M"], m["V"] = 0.9 * m["M"] + 0.1 * G, b2 * m["V"] + (1 - b2) * G * G
    return m["M"] / (1 - 0.9 ** m["t"]) / (np.sqrt(m["V"] / (1 - b2 ** m["t"])) + 1e-8)


@rule
def adam_on_sphere(W, G, rate, m):
    """What Adam is given, remembers and answers is made tangent."""
    m["M"] = project(W, m["M"])
    return towards_sphere(W - rate * project(W, adam_direction(project(W, G), m)))


@rule
def hyperball(W, G, rate, m):
    R = lengths(W)
    return R * towards_sphere(W - rate * R * towards_sphere(adam_direction(G, m)))


@rule
def hyperball_of_momentum(W, G, rate, m):
    """The norm of the whole matrix held, heavy-ball momentum 0.9 inside."""
    R, m["M"] = np.linalg.norm(W), 0.9 * m["M"] + G
    W = W - rate * R * m["M"] / np.linalg.norm(m["M"])
    return R * W / np.linalg.norm(W)


@rule
def ngpt(W, G, rate, m):
    return towards_sphere(W - rate * adam_direction(G, m, b2=0.95))


@rule
def renorm_sgd(W, G, rate, m, momentum=0.85, nesterov=True):
    m["M"] = momentum * m["M"] + G
    D = G + momentum * m["M"] if nesterov else m["M"]
    return towards_sphere(W) - rate * towards_sphere(D)


@rule
def adamwn(W, G, rate, m, norm_ratio=1.0, update_rate=0.01):
    m["start"] = m["start"] if m["t"] > 1 else lengths(W)
    excess = 1 - norm_ratio * m["start"] / lengths(W)
    return W - rate * adam_direction(G, m) - update_rate * excess * W


@rule
def muon(W, G, rate, m, momentum=0.95, weight_decay=0.0, nesterov=True):
    """Here with filters as rows: Newton-Schulz commutes with the transpose."""
    t, m["M"] = m["t"], momentum * m["M"] + (1 - momentum) * G
    X = m["M"] / (1 - momentum**t)
    if nesterov:
        ahead, now = momentum * m["M"], (1 - momentum) * G
        X = ahead / (1 - momentum ** (t + 1)) + now / (1 - momentum**t)
    X = X / (np.linalg.norm(X) + 1e-8)
    for _ in range(5):
        A = X @ X.T
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    scale = max(1, W.shape[0] / W.shape[1]) ** 0.5
    return W - rate * (scale * X + weight_decay * W)


def msign(X):
    U, _, V = np.linalg.svd(X, full_matrices=False)
    return U @ V


@rule
def manifold_muon(W, G, rate, m, dual_steps=10, dual_rate=0.1):
    """Orthonormal columns: of the transpose where there are fewer rows than columns."""
    turned = W.shape[0] < W.shape[1]
    X, G = (W.T, G.T) if turned else (W, G)
    L = -(X.T @ G + G.T @ X) / 4
    for k in range(dual_steps):
        A = msign(G + 2 * X @ L)
        H = X.T @ A + A.T @ X
        if np.linalg.norm(H) / np.sqrt(H.size) < 1e-6:
            break
        L = L - dual_rate * (1 - k / dual_steps) * H
    X = msign(X - rate * A)
    return X.T if turned else X
