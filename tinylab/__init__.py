"""tinylab: pretrain small language models and understand what happened."""
