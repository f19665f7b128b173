"""Text in: languages, vocabularies, tasks, batches. The only folder that may import TensorFlow, SeqIO."""
