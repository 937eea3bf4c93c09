"""The only place that writes HTML: escaping, tables, figures, coloured text, the report's parts."""
