"""The rivals' published rules in float64 NumPy, one filter per row, written from their sources.

Each yields W after every step. The options are those of the publications.
"""

import itertools

import numpy as np


def dots(A, B):
    return np.array([[a @ b] for a, b in zip(A, B, strict=True)])


def lengths(A):
    return np.sqrt(dots(A, A))


def towards_sphere(W):
    return W / lengths(W)


def heo_projection(W, G, P, delta):
    """AdamP's Algorithm 1, lines 5 to 9: P without its radial part, and whether it lost it."""
    for view in (lambda A: A, lambda A: A.reshape(1, -1)):
        w, g, p = view(W), view(G), view(P)
        cosines = [abs(a @ b) / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-8)
                   for a, b in zip(w, g, strict=True)]  # fmt: skip
        if max(cosines) < delta / np.sqrt(w.shape[1]):
            unit = w / (lengths(w) + 1e-8)
            return (p - dots(unit, p) * unit).reshape(P.shape), True
    return P, False


def sgdp(W, gradient, rate, momentum=0.9, decay=0.0, nesterov=False, delta=0.1, ratio=0.1):
    M = np.zeros_like(W)
    while True:
        G = gradient(W)
        M = momentum * M + G
        P, projected = heo_projection(W, G, G + momentum * M if nesterov else M, delta)
        W = W * (1 - rate * decay * (ratio if projected else 1) / (1 - momentum)) - rate * P
        yield W


def adamp(W, gradient, rate, decay=0.0, nesterov=False, delta=0.1, ratio=0.1):
    M, V = np.zeros_like(W), np.zeros_like(W)
    for t in itertools.count(1):
        G = gradient(W)
        M, V = 0.9 * M + 0.1 * G, 0.999 * V + 0.001 * G * G
        step = 0.9 * M + 0.1 * G if nesterov else M
        P = step / (np.sqrt(V) / np.sqrt(1 - 0.999**t) + 1e-8)
        P, projected = heo_projection(W, G, P, delta)
        W = W * (1 - rate * decay * (ratio if projected else 1)) - rate / (1 - 0.9**t) * P
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


def lars(W, gradient, rate, momentum=0.9, decay=0.0, trust=1.0):
    M = np.zeros_like(W)
    while True:
        D = gradient(W) + decay * W
        M = momentum * M + rate * trust * np.linalg.norm(W) / np.linalg.norm(D) * D
        W = W - M
        yield W


def rotational_sgd(W, gradient, rate, momentum=0.9, decay=5e-4, zero_mean=False):
    if zero_mean:
        W = towards_sphere(W - W.mean(1, keepdims=True))
    M, a = np.zeros_like(W), np.zeros((len(W), 1))
    for t in itertools.count(1):
        M = momentum * M + gradient(W)
        D = M - M.mean(1, keepdims=True) if zero_mean else M
        D = D - dots(D, W) * W
        a = 0.9 * a + 0.1 * dots(D, D)
        angle = np.sqrt(2 * rate * decay / (1 + momentum))
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
