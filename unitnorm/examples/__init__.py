"""Trainings to run and to copy from, each switched to unit norm by one line.

    python -m unitnorm.examples.flax_nnx      # or flax_linen, equinox_module, plain_dict

Each trains on the bundled MNIST for some steps, 600 if none are named, and prints the test error;
`transformer` trains on a text that Python ships, and prints the test loss.
"""
