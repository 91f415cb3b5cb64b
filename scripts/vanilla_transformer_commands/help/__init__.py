"""The help of commands whose options are those of a recipe, written by `make help`."""
