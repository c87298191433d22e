"""The compiler's passes, one file each: functions from graph to graph, without training state.

In the order in which :mod:`bpfx.compiler` runs them: ``capture`` (with ``reference``, ``verify``, ``opaque``,
``adapters``), ``shapes``, ``tail``, ``liveness`` and ``partition``, ``normalise`` (with ``alias``), ``lower``,
``heads``, ``programs`` (with ``joint``), ``emit`` (with ``stop_gradient``, ``rng``), ``isolation``.
"""
