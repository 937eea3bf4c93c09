"""Prepared tokens on disk: their format, writer, reader and integrity."""
