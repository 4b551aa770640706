"""What tests share: builders of checkpoints, Hypothesis strategies, ways to look at a store and to harm it."""
