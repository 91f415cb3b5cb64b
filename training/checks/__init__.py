"""Checks before the first update: errors that would end the run later, and the resources that the run needs."""
