"""The search over candidate directions."""
