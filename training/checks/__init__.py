"""Checks before the first update, for errors that would end the run later and for the resources that it needs."""
