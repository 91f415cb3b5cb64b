"""`vanilla-transformer benchmark`: compares this package with others. docs/benchmarks.md explains the measurements."""
