"""The embedded demonstration model: its language, its training and its fixed data."""
