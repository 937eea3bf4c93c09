"""Named sources of documents."""
