"""What is known of TransformerLens: loading a model, naming its hook points, running it, and who writes its stream."""
