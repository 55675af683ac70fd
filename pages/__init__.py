"""What the documentation makes from the code instead of saying it twice.

`python -m pages` writes the parts of `docs/` that stand between marks. `site` joins files from outside `docs/` to the
site.
"""
