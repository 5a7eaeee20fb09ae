"""A fuzz of uses: random sequences of what people do to a model, on an ordinary and on a streamed one, side by side.

- ``subjects``: the models, with checkpoints; ``side``: one of the two models, and what was kept of it
- ``action``: what an action is; ``passes``, ``flags``, ``edits``, ``layers``, ``wrappers``, ``copying``, ``saving``,
  ``keeping``, ``own``: the actions
- ``seen``: what is compared; ``run``: one sequence, judged after every step; ``shrink``: as few steps as fail
- ``child``, ``__main__``: ten thousand sequences; ``broken``: streamed models with a known fault, which must be caught
"""
