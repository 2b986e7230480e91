"""How fast we are, beside the loops that people would write today and beside the machine's limits.

Nothing here changes a result; `unitnorm bench` is its command. Whatever is measured runs in a
process of its own, as a user would run it (`worker`: one of `contestants`, or of PyTorch's
`peers`), and waits while another one is measured (`measure`). `compare`, `scaling`, `updates`,
`kernels`, `convolution` and `startup` each describe a `survey.Survey`; `survey.measure` makes its
files of it, and what is printed.
"""
