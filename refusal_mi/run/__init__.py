"""Run folders: stages that are done once, and what they leave behind."""
