"""Fuzzing: random models, options and events, compared after every step with formulas that are written here once more.

`bounds` has numbers that know how far off arithmetic in a dtype may be, `formulas` the updates from the papers and from
transformers 4.34. `setups` says what a run is made of, `training` takes its steps, `expectation` knows what each should
leave, `comparison` looks whether it did; `events` happen between steps. `drawn` is what is random, `machine` puts the
events in random order, `watch` tells of them.
`tests/test_fuzz.py` runs a fixed number of examples; `python -m fuzz` (`make fuzz`) goes on for as long as it is told.
"""
