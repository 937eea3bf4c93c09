"""Weights on disk, whoever wrote them: opened lazily, read one tensor at a time, under Hugging Face's names."""
