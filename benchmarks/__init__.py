"""``make bench``: every way to run a model whose weights do not fit: one checkpoint, one memory limit, one run.

How a run goes: :mod:`benchmarks.runner` starts each contender (:mod:`benchmarks.peers`) as a process of its own
(:mod:`benchmarks.contender`, :mod:`benchmarks.process`) inside a control group (:mod:`benchmarks.cgroup`), and reads
the checkpoint plainly in between (:mod:`benchmarks.disk`). What was measured becomes a :mod:`benchmarks.record`, a
plain value, from which :mod:`benchmarks.verdicts` computes the promises, :mod:`benchmarks.report` writes the report
and :mod:`benchmarks.plot` draws. Knows only the public face of odewei.
"""
