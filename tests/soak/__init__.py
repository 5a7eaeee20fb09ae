"""Faults, injected one after another into models that run, and long runs: ``make soak``.

Every fault is one function in a module of its kind, entered in a table with ``@fault``. An injection counts only if it
was reached (``Row.fired``), and ends well in two ways only: the outputs have the resident model's bits (*right*), or
there is an error of this library that names place and cure, or the very exception that was thrown in (*clean error*).
After each one the cause is taken away, and the next pass has to be right, with no lease taken and every byte accounted
for. docs/faults.md says what is promised for each.
"""
