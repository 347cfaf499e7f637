"""Low-bit inference for autoregressive image generators: calibration, models and the pipeline that joins them."""

__version__ = "0.1.0"
