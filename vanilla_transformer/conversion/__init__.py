"""Imports models of other frameworks, and exports ours. Each module needs only the library it is about."""
