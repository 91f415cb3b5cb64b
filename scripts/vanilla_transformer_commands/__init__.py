"""The commands of `vanilla-transformer`.

They are outside the package `vanilla_transformer`, whose import takes seconds, so that `--help` is fast.
"""
