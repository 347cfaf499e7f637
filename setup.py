"""Kept beside `pyproject.toml` for the compiled extension; never imports torch, so isolated builds work."""

from setuptools import setup

setup()
