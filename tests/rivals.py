"""The rules of all updates in float64 NumPy, one filter per row, written from their sources.

Each yields W after every step, and takes the options of the update of its name.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np


def dots(A, B):
    return np.array([[a @ b] for a, b in zip(A, B, strict=True)])


def lengths(A):
    return np.sqrt(dots(A, A))


def towards_sphere(W):
    return W / lengths(W)


def project(W, Z):
    return Z - np.diag(np.diag(Z @ W.T)) @ W


def sgd_momentum(W, gradient, rate, momentum=0.9, weight_decay=5e-4, nesterov=False):
    m = np.zeros_like(W)
    while True:
        g = gradient(W) + weight_decay * W
        m = momentum * m + g
        W = W - rate * (g + momentum * m if nesterov else m)
        yield W


def sgd_wd(W, gradient, rate, summed_over=1):
    return sgd_momentum(W, gradient, rate, momentum=0, weight_decay=5e-4 * summed_over)


b_sgd = functools.partial(sgd_momentum, momentum=0, weight_decay=0)


def un(W, gradient, rate):
    while True:
        W = towards_sphere(W - rate * project(W, gradient(W)))
        yield W


def un_momentum(W, gradient, rate, momentum=0.9, nesterov=False):
    M = np.zeros_like(W)
    while True:
        R = project(W, gradient(W))
        M = momentum * project(W, M) + R
        W = towards_sphere(W - rate * (R + momentum * M if nesterov else M))
        yield W


un_nesterov = functools.partial(un_momentum, nesterov=True)


def un_adam(W, gradient, rate):
    M, v = np.zeros_like(W), np.zeros(len(W))
    for t in itertools.count(1):
        R = project(W, gradient(W))
        M = 0.9 * project(W, M) + 0.1 * R
        v = 0.999 * v + 0.001 * np.diag(R @ R.T)
        size = np.sqrt(v / (1 - 0.999**t)) + 1e-8
        W = towards_sphere(W - rate * M / (1 - 0.9**t) / size[:, None])
        yield W


def sm(W, gradient, rate):
    while True:
        W = W - rate * np.diag(np.diag(W @ W.T)) @ gradient(W)
        yield W


def normalize(W, gradient, rate):
    while True:
        W = towards_sphere(W - rate * gradient(W))
        yield W


def weight_norm(W, gradient, rate):
    """Descent on v and g by automatic differentiation through W(v, g)."""

    def of(v, g):
        return g[:, None] * v / jnp.linalg.norm(v, axis=1, keepdims=True)

    v, g = jnp.asarray(W), jnp.linalg.norm(W, axis=1)
    while True:
        G = gradient(np.asarray(of(v, g)))
        dv, dg = jax.grad(lambda v, g, G=G: jnp.sum(of(v, g) * G), (0, 1))(v, g)
        v, g = v - rate * dv, g - rate * dg
        yield np.asarray(of(v, g))


def un_carried(W, gradient, rate, median=False):
    n = np.diag(W @ W.T)
    while True:
        R = project(W, gradient(W))
        size = np.full_like(n, np.median(n)) if median else n
        W = towards_sphere(W - rate * R / size[:, None])
        n = n + rate**2 * np.diag(R @ R.T) / n
        yield W


def b_sgd_median(W, gradient, rate):
    while True:
        W = W - rate * np.median(lengths(W)) ** 2 * gradient(W)
        W = W / np.median(lengths(W))
        yield W


def heo_projection(W, G, P, delta=0.1):
    """AdamP's Algorithm 1, lines 5 to 9: P without its radial part, and whether it lost it."""
    for view in (lambda A: A, lambda A: A.reshape(1, -1)):
        w, g, p = view(W), view(G), view(P)
        cosines = [abs(a @ b) / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-8)
                   for a, b in zip(w, g, strict=True)]  # fmt: skip
        if max(cosines) < delta / np.sqrt(w.shape[1]):
            unit = w / (lengths(w) + 1e-8)
            return (p - dots(unit, p) * unit).reshape(P.shape), True
    return P, False


def sgdp(W, gradient, rate, momentum=0.9, weight_decay=0.0, nesterov=False):
    M = np.zeros_like(W)
    while True:
        G = gradient(W)
        M = momentum * M + G
        P, projected = heo_projection(W, G, G + momentum * M if nesterov else M)
        decay = weight_decay * (0.1 if projected else 1) / (1 - momentum)
        W = W * (1 - rate * decay) - rate * P
        yield W


def adamp(W, gradient, rate, weight_decay=0.0, nesterov=False):
    M, V = np.zeros_like(W), np.zeros_like(W)
    for t in itertools.count(1):
        G = gradient(W)
        M, V = 0.9 * M + 0.1 * G, 0.999 * V + 0.001 * G * G
        step = 0.9 * M + 0.1 * G if nesterov else M
        P = step / (np.sqrt(V) / np.sqrt(1 - 0.999**t) + 1e-8)
        P, projected = heo_projection(W, G, P)
        decay = weight_decay * (0.1 if projected else 1)
        W = W * (1 - rate * decay) - rate / (1 - 0.9**t) * P
        yield W


def cho_lee_gradient(W, G, clip):
    H = G - dots(W, G) * W
    return H if clip is None else H * np.minimum(1, clip / lengths(H))


def geodesic(W, D):
    """exp_W(D), and the transport along it as a function of tangent rows."""
    t = lengths(D)
    U = D / t

    def transport(M):
        inner = dots(U, M)
        return M - (W * np.sin(t) + U * (1 - np.cos(t))) * inner

    return W * np.cos(t) + U * np.sin(t), transport


def sgd_g(W, gradient, rate, momentum=0.9, clip=0.1):
    M = np.zeros_like(W)
    while True:
        D = momentum * M - rate * cho_lee_gradient(W, gradient(W), clip)
        W, transport = geodesic(W, D)
        M = transport(D)
        yield W


def adam_g(W, gradient, rate, clip=0.1):
    M, v = np.zeros_like(W), np.zeros((len(W), 1))
    for t in itertools.count(1):
        H = cho_lee_gradient(W, gradient(W), clip)
        M, v = 0.9 * M + 0.1 * H, 0.99 * v + 0.01 * dots(H, H)
        alpha = np.sqrt(1 - 0.99**t) / (1 - 0.9**t)
        W, transport = geodesic(W, -rate * alpha * M / np.sqrt(v + 1e-8))
        M = transport(M)
        yield W


def nero(W, gradient, rate):
    v = np.zeros((len(W), 1))
    for t in itertools.count(1):
        G = gradient(W)
        v = 0.999 * v + 0.001 * dots(G, G)
        W = W - rate * G / np.sqrt(v / (1 - 0.999**t))
        W = towards_sphere(W - W.mean(1, keepdims=True))
        yield W


def lars(W, gradient, rate, momentum=0.9, weight_decay=0.0, trust_coefficient=1.0):
    M = np.zeros_like(W)
    while True:
        D = gradient(W) + weight_decay * W
        trust = trust_coefficient * np.linalg.norm(W) / np.linalg.norm(D)
        M = momentum * M + rate * trust * D
        W = W - M
        yield W


def rotational_sgd(W, gradient, rate, momentum=0.9, weight_decay=5e-4, zero_mean=False):
    if zero_mean:
        W = towards_sphere(W - W.mean(1, keepdims=True))
    M, a = np.zeros_like(W), np.zeros((len(W), 1))
    for t in itertools.count(1):
        M = momentum * M + gradient(W)
        D = M - M.mean(1, keepdims=True) if zero_mean else M
        D = D - dots(D, W) * W
        a = 0.9 * a + 0.1 * dots(D, D)
        angle = np.sqrt(2 * rate * weight_decay / (1 + momentum))
        W = towards_sphere(W - angle * D / (1e-8 + np.sqrt(a / (1 - 0.9**t))))
        yield W


def adam_srt(W, gradient, rate):
    M, v = np.zeros_like(W), np.zeros((len(W), 1))
    for t in itertools.count(1):
        G = gradient(W)
        M, v = 0.9 * M + 0.1 * G, 0.999 * v + 0.001 * dots(G, G)
        size = np.sqrt(v) / np.sqrt(1 - 0.999**t) + 1e-8
        new = W - rate * np.sqrt(W.shape[1]) * M / (1 - 0.9**t) / size
        squared = dots(new, new) + 1e-8
        v = v * dots(W, W) / squared
        M = (dots(W, new) * M - dots(M, new) * W) / squared
        W = new
        yield W


def adam_direction(G, state, b1=0.9, b2=0.999):
    """Adam's m̂/(√v̂ + 1e-8); state: (M, V, t)."""
    M, V, t = state
    M, V, t = b1 * M + (1 - b1) * G, b2 * V + (1 - b2) * G * G, t + 1
    return M / (1 - b1**t) / (np.sqrt(V / (1 - b2**t)) + 1e-8), (M, V, t)


def adam_on_sphere(W, gradient, rate):
    """What Adam is given, remembers and answers is made tangent."""
    M, V, t = np.zeros_like(W), 0.0, 0
    while True:
        state = (project(W, M), V, t)
        U, (M, V, t) = adam_direction(project(W, gradient(W)), state)
        W = towards_sphere(W - rate * project(W, U))
        yield W


def hyperball(W, gradient, rate):
    R, state = lengths(W), (0.0, 0.0, 0)
    while True:
        U, state = adam_direction(gradient(W), state)
        W = R * towards_sphere(W - rate * R * towards_sphere(U))
        yield W


def hyperball_of_momentum(W, gradient, rate):
    """The norm of the whole matrix held, heavy-ball momentum 0.9 inside."""
    R, M = np.linalg.norm(W), np.zeros_like(W)
    while True:
        M = 0.9 * M + gradient(W)
        W = W - rate * R * M / np.linalg.norm(M)
        W = R * W / np.linalg.norm(W)
        yield W


def ngpt(W, gradient, rate):
    state = (0.0, 0.0, 0)
    while True:
        U, state = adam_direction(gradient(W), state, b2=0.95)
        W = towards_sphere(W - rate * U)
        yield W


def renorm_sgd(W, gradient, rate, momentum=0.85, nesterov=True):
    buffer = None
    while True:
        G = gradient(W)
        buffer = G if buffer is None else momentum * buffer + G
        D = G + momentum * buffer if nesterov else buffer
        W = towards_sphere(W) - rate * towards_sphere(D)
        yield W


def adamwn(W, gradient, rate, norm_ratio=1.0, update_rate=0.01):
    start, state = lengths(W), (0.0, 0.0, 0)
    while True:
        U, state = adam_direction(gradient(W), state)
        W = W - rate * U - update_rate * (1 - norm_ratio * start / lengths(W)) * W
        yield W


def muon(W, gradient, rate, momentum=0.95, weight_decay=0.0, nesterov=True):
    """Here with filters as rows: Newton-Schulz commutes with the transpose."""
    M = np.zeros_like(W)
    for t in itertools.count(1):
        G = gradient(W)
        M = momentum * M + (1 - momentum) * G
        X = M / (1 - momentum**t)
        if nesterov:
            X = momentum * M / (1 - momentum ** (t + 1)) + (1 - momentum) * G / (1 - momentum**t)
        X = X / (np.linalg.norm(X) + 1e-8)
        for _ in range(5):
            A = X @ X.T
            X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
        scale = max(1, W.shape[0] / W.shape[1]) ** 0.5
        W = W - rate * (scale * X + weight_decay * W)
        yield W


def msign(X):
    U, _, V = np.linalg.svd(X, full_matrices=False)
    return U @ V


def manifold_muon(W, gradient, rate, dual_steps=10, dual_rate=0.1):
    """Orthonormal columns: of the transpose where there are fewer rows than columns."""
    turned = W.shape[0] < W.shape[1]
    while True:
        G = gradient(W)
        X, G = (W.T, G.T) if turned else (W, G)
        L = -(X.T @ G + G.T @ X) / 4
        for k in range(dual_steps):
            A = msign(G + 2 * X @ L)
            H = X.T @ A + A.T @ X
            if np.linalg.norm(H) / np.sqrt(H.size) < 1e-6:
                break
            L = L - dual_rate * (1 - k / dual_steps) * H
        X = msign(X - rate * A)
        W = X.T if turned else X
        yield W
