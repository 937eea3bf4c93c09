"""The recipe of a run: one step, the loop around it, and what accompanies it."""
