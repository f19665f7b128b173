"""How good a checkpoint is: metrics of decoded text, and the loss of each language in bits per byte."""
