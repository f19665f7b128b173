"""Text out: one jitted loop for every search, and exact scores of given targets."""
