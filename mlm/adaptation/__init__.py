"""What is done to trained parameters: sparse from dense, fewer experts."""
