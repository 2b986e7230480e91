"""How fast we are, beside the loops that people would write today and beside the machine's limits.

Nothing here changes a result; `unitnorm bench` is its command. Whatever is measured runs in a
process of its own, as a user would run it, and waits while another one is measured. Each of the
first six ends in a `measure.Measurement`: its files, and what is printed.

    compare      training samples per second of ours and of the peers, and what UN costs
    scaling      cost and memory against runs, depth, variants and devices
    updates      what a step of each update costs by itself
    kernels      kernels and bytes of a training step, and what a GPU would need for them
    convolution  SegNet's, through Fourier transforms and by XLA
    startup      from typing a command to the first epoch
    gpu          all that is to be measured and trained on a GPU, in steps: `make gpu`
    contestants  what one repetition is, for everything written in JAX
    peers        the same for PyTorch and geoopt
    worker       the process that serves one contestant
    measure      starts workers, takes turns among them, medians, tables, files
    roofline     floating-point operations and bytes of a sample
    figures      the figures
"""
