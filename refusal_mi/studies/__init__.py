"""Many models, prompts, seeds and methods in one folder and one table."""
