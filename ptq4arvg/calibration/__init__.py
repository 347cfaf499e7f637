"""Offline calibration: DGC chooses sequences, GPS finds shifts and scales of channels, STWQ measures static scales per
position.

Models are known here by the protocol of :mod:`ptq4arvg.protocol` only.
"""
