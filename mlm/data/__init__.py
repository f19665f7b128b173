"""Text in: languages, vocabularies, preprocessors, sources and batches. The only folder that may import TensorFlow and SeqIO."""
