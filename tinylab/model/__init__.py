"""The Llama model and what it costs."""
