"""Scripts that made the bundled weights.

Run ``python -m ptq4arvg.training.{tokenizer,classifier,generator,package,tune_guidance}`` in this order. They need the
Fashion-MNIST files (Debian package ``dataset-fashion-mnist``); nothing else in the project does.
"""
