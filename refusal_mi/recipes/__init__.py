"""The published methods as stages of a run folder."""
