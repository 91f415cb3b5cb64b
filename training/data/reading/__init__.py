"""The files that text is read from: lines.py, tables.py and documents.py have the formats, one idea each."""
