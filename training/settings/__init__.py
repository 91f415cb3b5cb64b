"""The settings of a run: the fields of recipes and command lines, their rules, and how they are read."""
