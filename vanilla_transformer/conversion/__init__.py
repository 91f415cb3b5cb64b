"""Models of other frameworks for us, ours for other runtimes. A module needs the library it is about, no other does."""
