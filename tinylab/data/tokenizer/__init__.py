"""Tokenizers: trained, loaded, checked against their reference, fast."""
