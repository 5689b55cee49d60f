"""The model: to read (transformer) and to run on a mesh (decoder)."""

if not __debug__:
    # Haiku leaves a module by what stands in an assert: without it each module is within the last,
    # no file of a checkpoint has the name that is looked for, and a saved one would be unreadable.
    raise ImportError(
        "grok1 needs Python's asserts, by which Haiku names the weights; leave out -O and unset "
        "PYTHONOPTIMIZE"
    )
