"""What looks at checkpoints and models from outside: the command line and the public face import it, nothing else.

Knows loaders and the model's side; no module of those knows it.
"""
