"""Scores with error bars: lm-eval's tasks on our models, every item kept, two models paired item by item."""
