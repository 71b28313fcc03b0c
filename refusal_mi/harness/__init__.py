"""lm-evaluation-harness on a model under interventions."""
