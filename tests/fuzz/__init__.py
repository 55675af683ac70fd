"""Fuzzing: random models, options and events, compared after every step with formulas that are written here once more.

`bounds` has numbers that know how far off arithmetic in a dtype may be, `formulas` the updates from the papers and from
transformers 4.34, `training` what a step should leave, `drawn` what is random, `machine` the events in random order.
`tests/test_fuzz.py` runs a fixed number of examples; `python -m fuzz` (`make fuzz`) goes on for as long as it is told.
"""
