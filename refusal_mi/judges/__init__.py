"""Who says whether an answer refuses."""
