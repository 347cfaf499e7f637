"""Scripts that made the bundled weights: run ``python -m ptq4arvg.training.{tokenizer,classifier,generator,package}`` in this order.

They need the Fashion-MNIST files (Debian package ``dataset-fashion-mnist``); nothing else in the project does.
"""
