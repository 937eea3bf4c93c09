"""From corpora to the batch of a step."""
