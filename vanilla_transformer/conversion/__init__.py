"""Models of this package for other runtimes. Each module needs the library it converts for, nothing else needs them."""
