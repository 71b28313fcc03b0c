"""Prompts, chat templates, A/B pairs, and batches of tokens."""
