"""Examples to run and to copy from: python -m unitnorm.examples.cnn."""
