"""Forms over plain functions, each with a static twin."""
