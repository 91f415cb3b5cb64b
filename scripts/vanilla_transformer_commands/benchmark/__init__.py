"""`vanilla-transformer benchmark`: this package beside its peers. docs/benchmarks.md says what is measured."""
