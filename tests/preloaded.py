"""What the fork server of `faults` imports once, for all its processes."""

import warnings

# JAX warns of forks in processes with threads; the server has none
warnings.filterwarnings("ignore", "os.fork.. was called", RuntimeWarning)

import orbax.checkpoint  # noqa: E402, F401
