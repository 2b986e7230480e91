"""What the fork server of `faults` imports once, for all its processes."""

import warnings

# JAX warns of forks in processes with threads; the server has none
warnings.filterwarnings("ignore", "os.fork.. was called", RuntimeWarning)

import unitnorm.table2.experiment  # noqa: E402, F401
