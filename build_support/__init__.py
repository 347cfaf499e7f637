"""How setup.py compiles csrc/: one module per compiled backend, and what they share."""
