"""The only place that writes HTML: escaping, tables, coloured text, parts of a view, the page of a report."""
