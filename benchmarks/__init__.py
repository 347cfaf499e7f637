"""Measurements of latency, memory and accuracy; run as scripts or through pytest-benchmark."""
