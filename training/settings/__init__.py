"""What a run is told: the fields of recipes and command lines, their rules, and how they are read."""
