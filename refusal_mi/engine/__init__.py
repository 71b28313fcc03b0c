"""Where pure pieces of work run: in other processes that hold the same model."""
