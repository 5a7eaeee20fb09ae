"""The demonstration behind ``odewei demo``: real weights, and a real size, streamed and resident side by side.

Knows only the public face of odewei. :mod:`odewei.demo.synthetic` writes checkpoints of any size (benchmarks use it
too), :mod:`odewei.demo.real_weights` and :mod:`odewei.demo.real_size` run and return plain results,
:mod:`odewei.demo.show` prints them. Needs the extras ``hf`` and ``cli``.
"""
