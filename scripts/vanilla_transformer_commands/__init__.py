"""The commands of `vanilla-transformer`.

They stand outside the package `vanilla_transformer`, whose import takes seconds: `--help` answers at once.
"""
